"""``echoquad predict``: classify frames with a bundle, on this machine or on a Ray cluster."""

from echoquad.cli.commands.predict.command import predict

__all__ = ["predict"]
