"""``echoquad evaluate``: measure a run or a bundle on a labelled split."""

from echoquad.cli.commands.evaluate.command import evaluate

__all__ = ["evaluate"]
