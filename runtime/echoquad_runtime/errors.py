"""Everything that EchoQuad raises on purpose.

One class a failure. Each inherits :class:`EchoQuadError`, so that ``except EchoQuadError`` catches all of it, and
where one fits the builtin that a caller would expect, so that ``except FileNotFoundError`` works too. ``code`` is the
stable name that the command line prints with the message, and ``exit_code`` is what the process ends with.

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
    ├── HostError (RuntimeError)
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
    "HostError",
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

    code = "E_UNEXPECTED"
    exit_code = 1


class FrameError(EchoQuadError, ValueError):
    """A frame cannot be judged."""

    code = "E_FRAME"


class FrameReadError(FrameError, OSError):
    """The file cannot be opened or read."""

    code = "E_FRAME_UNREADABLE"


class FrameFormatError(FrameError):
    """The bytes are not an image of a supported kind."""

    code = "E_FRAME_FORMAT"


class FrameDamagedError(FrameError):
    """The image is truncated or its checksums do not match."""

    code = "E_FRAME_DAMAGED"


class FrameTooLargeError(FrameError):
    """The header announces more pixels, or the file holds more bytes, than the cap allows."""

    code = "E_FRAME_TOO_LARGE"


class FrameTooSmallError(FrameError):
    """The frame has too few pixels for four quadrants."""

    code = "E_FRAME_TOO_SMALL"


class FrameExtraError(FrameError, ImportError):
    """A frame is of a kind whose packages this installation does not have; others may be judged."""

    code = "E_FRAME_EXTRA_MISSING"


class InputNotFoundError(EchoQuadError, FileNotFoundError):
    """A path or pattern names no frame."""

    code = "E_INPUT_NOT_FOUND"


class ContractError(EchoQuadError, ValueError):
    """A contract has a value that cannot be."""

    code = "E_CONTRACT"


class ConfigError(EchoQuadError, ValueError):
    """A recipe or an option has a value that cannot be."""

    code = "E_CONFIG"


class DatasetError(EchoQuadError, ValueError):
    """A data folder cannot be trained on or evaluated."""

    code = "E_DATASET"


class RunError(EchoQuadError, ValueError):
    """A run folder is missing, unfinished, damaged, or in the way."""

    code = "E_RUN"


class OutputError(EchoQuadError, OSError):
    """A result cannot be written."""

    code = "E_OUTPUT"


class ResultError(EchoQuadError, ValueError):
    """A result file is another run's, unfinished, damaged, or in the way."""

    code = "E_RESULT"


class BundleError(EchoQuadError, ValueError):
    """A bundle is malformed or of an unknown schema."""

    code = "E_BUNDLE"


class BundleNotFoundError(BundleError, FileNotFoundError):
    """There is no bundle at the path."""

    code = "E_BUNDLE_NOT_FOUND"


class BundleTamperedError(BundleError):
    """A bundle's bytes are not those that were exported."""

    code = "E_BUNDLE_TAMPERED"
    exit_code = 3


class SignatureError(BundleTamperedError):
    """A bundle is not as the holder of a key has signed it, or nobody has."""

    code = "E_SIGNATURE"


class MissingExtraError(EchoQuadError, ImportError):
    """A command needs packages that this installation does not have."""

    code = "E_EXTRA_MISSING"


class ClusterError(EchoQuadError, RuntimeError):
    """A cluster cannot be reached, or its workers keep dying."""

    code = "E_CLUSTER"


class HostError(EchoQuadError, RuntimeError):
    """A check of ``echoquad doctor`` failed, other than that of a device."""

    code = "E_HOST"


class UsageError(EchoQuadError, ValueError):
    """Options contradict each other."""

    code = "E_USAGE"
    exit_code = 2


class VerificationError(EchoQuadError, ValueError):
    """A bundle does not compute what its golden frames say."""

    code = "E_VERIFICATION"
    exit_code = 3


class ParityError(VerificationError):
    """An export does not decide as the training code does."""

    code = "E_PARITY"


class GateError(EchoQuadError, ValueError):
    """A figure that was measured is beyond the bound that was given for it."""

    code = "E_GATE"
    exit_code = 3


class DeviceUnavailableError(EchoQuadError, RuntimeError):
    """The device that was asked for is not there."""

    code = "E_DEVICE_UNAVAILABLE"
    exit_code = 4
