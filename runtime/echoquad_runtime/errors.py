"""Everything that EchoQuad raises on purpose.

One class a failure. Each inherits :class:`EchoQuadError`, so that ``except EchoQuadError`` catches all of it, and
where one fits the builtin that a caller would expect, so that ``except FileNotFoundError`` works too. ``exit_code``
is what the command line ends with.

::

    EchoQuadError                       1
    ├── FrameError (ValueError)         1
    │   ├── FrameReadError (OSError)
    │   ├── FrameFormatError
    │   ├── FrameDamagedError
    │   ├── FrameTooLargeError
    │   ├── FrameTooSmallError
    │   └── FrameExtraError (ImportError)
    ├── InputNotFoundError (FileNotFoundError)
    ├── ContractError (ValueError)
    ├── ConfigError (ValueError)
    ├── DatasetError (ValueError)
    ├── RunError (ValueError)
    ├── OutputError (OSError)
    ├── ResultError (ValueError)
    ├── BundleError (ValueError)        1
    │   ├── BundleNotFoundError (FileNotFoundError)
    │   └── BundleTamperedError         3
    │       └── SignatureError
    ├── MissingExtraError (ImportError) 1
    ├── ClusterError (RuntimeError)
    ├── UsageError (ValueError)         2
    ├── VerificationError (ValueError)  3
    │   └── ParityError
    ├── GateError (ValueError)          3
    └── DeviceUnavailableError (RuntimeError)   4

A message is one line: what was found, what was expected, what to do.
"""

from __future__ import annotations

__all__ = [
    "BundleError",
    "BundleNotFoundError",
    "BundleTamperedError",
    "ClusterError",
    "ConfigError",
    "ContractError",
    "DatasetError",
    "DeviceUnavailableError",
    "EchoQuadError",
    "FrameDamagedError",
    "FrameError",
    "FrameExtraError",
    "FrameFormatError",
    "FrameReadError",
    "FrameTooLargeError",
    "FrameTooSmallError",
    "GateError",
    "InputNotFoundError",
    "MissingExtraError",
    "OutputError",
    "ParityError",
    "ResultError",
    "RunError",
    "SignatureError",
    "UsageError",
    "VerificationError",
]


class EchoQuadError(Exception):
    """Base of every error that EchoQuad raises on purpose."""

    exit_code = 1


class FrameError(EchoQuadError, ValueError):
    """A frame cannot be judged."""


class FrameReadError(FrameError, OSError):
    """The file cannot be opened or read."""


class FrameFormatError(FrameError):
    """The bytes are not an image of a supported kind."""


class FrameDamagedError(FrameError):
    """The image is truncated or its checksums do not match."""


class FrameTooLargeError(FrameError):
    """The header announces more pixels, or the file holds more bytes, than the cap allows."""


class FrameTooSmallError(FrameError):
    """The frame has too few pixels for four quadrants."""


class FrameExtraError(FrameError, ImportError):
    """A frame is of a kind whose packages this installation does not have; others may be judged."""


class InputNotFoundError(EchoQuadError, FileNotFoundError):
    """A path or pattern names no frame."""


class ContractError(EchoQuadError, ValueError):
    """A contract has a value that cannot be."""


class ConfigError(EchoQuadError, ValueError):
    """A recipe or an option has a value that cannot be."""


class DatasetError(EchoQuadError, ValueError):
    """A data folder cannot be trained on or evaluated."""


class RunError(EchoQuadError, ValueError):
    """A run folder is missing, unfinished, damaged, or in the way."""


class OutputError(EchoQuadError, OSError):
    """A result cannot be written."""


class ResultError(EchoQuadError, ValueError):
    """A result file is another run's, unfinished, damaged, or in the way."""


class BundleError(EchoQuadError, ValueError):
    """A bundle is malformed or of an unknown schema."""


class BundleNotFoundError(BundleError, FileNotFoundError):
    """There is no bundle at the path."""


class BundleTamperedError(BundleError):
    """A bundle's bytes are not those that were exported."""

    exit_code = 3


class SignatureError(BundleTamperedError):
    """A bundle is not as the holder of a key has signed it, or nobody has."""


class MissingExtraError(EchoQuadError, ImportError):
    """A command needs packages that this installation does not have."""


class ClusterError(EchoQuadError, RuntimeError):
    """A cluster cannot be reached, or its workers keep dying."""


class UsageError(EchoQuadError, ValueError):
    """Options contradict each other."""

    exit_code = 2


class VerificationError(EchoQuadError, ValueError):
    """A bundle does not compute what its golden frames say."""

    exit_code = 3


class ParityError(VerificationError):
    """An export does not decide as the training code does."""


class GateError(EchoQuadError, ValueError):
    """A figure that was measured is beyond the bound that was given for it."""

    exit_code = 3


class DeviceUnavailableError(EchoQuadError, RuntimeError):
    """The device that was asked for is not there."""

    exit_code = 4
