"""Exceptions that EchoQuad raises on purpose.

There is one class per kind of failure. Each inherits :class:`EchoQuadError`, so that ``except EchoQuadError`` catches
all of them, and, where one matches, the builtin exception that a caller expects, so that ``except FileNotFoundError``
works too. ``code`` is the stable name that the command line prints with the message; ``exit_code`` is the exit code of
the process.

::

    EchoQuadError                       1
    ├── FrameError (ValueError)         1
    │   ├── FrameReadError (OSError)
    │   │   └── FrameTimeoutError (TimeoutError)
    │   ├── FrameFormatError
    │   ├── FrameDamagedError
    │   │   └── FrameCrashError
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

A message is one line: what is wrong, what was expected, and how to fix it.
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
    "FrameCrashError",
    "FrameDamagedError",
    "FrameError",
    "FrameExtraError",
    "FrameFormatError",
    "FrameReadError",
    "FrameTimeoutError",
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
    """Base class of all exceptions that EchoQuad raises on purpose."""

    code = "E_UNEXPECTED"
    exit_code = 1


class FrameError(EchoQuadError, ValueError):
    """A frame cannot be read or decided."""

    code = "E_FRAME"


class FrameReadError(FrameError, OSError):
    """The file cannot be opened or read."""

    code = "E_FRAME_UNREADABLE"


class FrameTimeoutError(FrameReadError, TimeoutError):
    """Reading and decoding the frame takes longer than the time limit."""

    code = "E_FRAME_TIMEOUT"


class FrameFormatError(FrameError):
    """The file is not a frame of a supported format."""

    code = "E_FRAME_FORMAT"


class FrameDamagedError(FrameError):
    """The file is truncated, or its checksums do not match."""

    code = "E_FRAME_DAMAGED"


class FrameCrashError(FrameDamagedError):
    """A decoder crashes on the file. Its process is replaced, and the other files are read."""

    code = "E_FRAME_CRASH"


class FrameTooLargeError(FrameError):
    """The frame has more pixels, the file more bytes, or its decoder takes more memory than the limit."""

    code = "E_FRAME_TOO_LARGE"


class FrameTooSmallError(FrameError):
    """The frame has too few pixels for four quadrants."""

    code = "E_FRAME_TOO_SMALL"


class FrameExtraError(FrameError, ImportError):
    """The frame's format needs packages that are not installed; other frames may be readable."""

    code = "E_FRAME_EXTRA_MISSING"


class InputNotFoundError(EchoQuadError, FileNotFoundError):
    """A path or pattern names no frame."""

    code = "E_INPUT_NOT_FOUND"


class ContractError(EchoQuadError, ValueError):
    """A contract has an invalid value."""

    code = "E_CONTRACT"


class ConfigError(EchoQuadError, ValueError):
    """A recipe or an option has an invalid value."""

    code = "E_CONFIG"


class DatasetError(EchoQuadError, ValueError):
    """A data folder cannot be used for training or evaluation."""

    code = "E_DATASET"


class RunError(EchoQuadError, ValueError):
    """A run folder is missing, unfinished, damaged, or already in use."""

    code = "E_RUN"


class OutputError(EchoQuadError, OSError):
    """A result cannot be written."""

    code = "E_OUTPUT"


class ResultError(EchoQuadError, ValueError):
    """A result file belongs to another run, is unfinished or damaged, or already exists."""

    code = "E_RESULT"


class BundleError(EchoQuadError, ValueError):
    """A bundle is malformed or has an unknown schema."""

    code = "E_BUNDLE"


class BundleNotFoundError(BundleError, FileNotFoundError):
    """There is no bundle at the path."""

    code = "E_BUNDLE_NOT_FOUND"


class BundleTamperedError(BundleError):
    """The bytes of a bundle are not those that were exported."""

    code = "E_BUNDLE_TAMPERED"
    exit_code = 3


class SignatureError(BundleTamperedError):
    """A bundle is unsigned, or its content does not match its signature."""

    code = "E_SIGNATURE"


class MissingExtraError(EchoQuadError, ImportError):
    """A command needs packages that are not installed."""

    code = "E_EXTRA_MISSING"


class ClusterError(EchoQuadError, RuntimeError):
    """A cluster cannot be reached, or its workers die repeatedly."""

    code = "E_CLUSTER"


class HostError(EchoQuadError, RuntimeError):
    """A check of ``echoquad doctor`` failed, other than that of a device."""

    code = "E_HOST"


class UsageError(EchoQuadError, ValueError):
    """Options contradict each other."""

    code = "E_USAGE"
    exit_code = 2


class VerificationError(EchoQuadError, ValueError):
    """A bundle does not reproduce the answers of its golden frames."""

    code = "E_VERIFICATION"
    exit_code = 3


class ParityError(VerificationError):
    """An exported graph does not decide as the training code does."""

    code = "E_PARITY"


class GateError(EchoQuadError, ValueError):
    """A measured figure exceeds its limit."""

    code = "E_GATE"
    exit_code = 3


class DeviceUnavailableError(EchoQuadError, RuntimeError):
    """The requested device is not available."""

    code = "E_DEVICE_UNAVAILABLE"
    exit_code = 4
