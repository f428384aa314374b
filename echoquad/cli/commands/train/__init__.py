"""``echoquad train``: one run, cross-validation in folds, or a linear classifier."""

from echoquad.cli.commands.train.command import train

__all__ = ["train"]
