"""The target of a stick: processor, Python version and C library of the machine on which it installs."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal, get_args

from echoquad_runtime.errors import ConfigError

__all__ = ["Architecture", "Target"]

Architecture = Literal["x86_64", "aarch64", "win_amd64"]

_OLDEST_GLIBC: Final = {"x86_64": 5, "aarch64": 17}
"""The minor version of the oldest glibc that manylinux tags of an architecture name."""

_LEGACY: Final = {
    "x86_64": ("manylinux2014", "manylinux2010", "manylinux1", "linux"),
    "aarch64": ("manylinux2014", "linux"),
}


@dataclass(frozen=True, slots=True)
class Target:
    """A 64-bit machine with CPython: Linux with glibc, or Windows.

    Attributes
    ----------
    architecture
        Of Linux, as ``uname -m`` prints it; ``win_amd64`` is Windows on x86-64.
    python
        Version of its Python, such as ``3.12``.
    glibc
        Minor version of the oldest glibc 2 on which the stick installs. 28 is that of Debian 10, Ubuntu 20.04 and RHEL
        8, and the version that wheels of numpy and onnxruntime need.

    Raises
    ------
    ConfigError
        If the architecture is unknown or the version is none of Python 3.
    """

    architecture: Architecture
    python: str = f"{sys.version_info.major}.{sys.version_info.minor}"
    glibc: int = 28

    def __post_init__(self) -> None:
        if self.architecture not in get_args(Architecture):
            raise ConfigError(
                f"target {self.architecture!r}: unknown architecture; expected {', '.join(get_args(Architecture))}"
            )
        if not re.fullmatch(r"3\.[1-9]\d?", self.python):
            raise ConfigError(f"Python {self.python!r}: not a version; expected two numbers, such as 3.12")

    @property
    def windows(self) -> bool:
        """Whether the machine runs Windows."""
        return self.architecture == "win_amd64"

    @property
    def label(self) -> str:
        """The target in words, for messages."""
        return f"Python {self.python} on {self.architecture}{'' if self.windows else f' with glibc 2.{self.glibc}'}"

    def pip_options(self) -> Iterator[str]:
        """Yield the options that make ``pip download`` choose wheels of this target."""
        yield from ("--only-binary", ":all:", "--implementation", "cp", "--python-version", self.python)
        yield from ("--abi", f"cp{self.python.replace('.', '')}")  # pip would assume a free-threaded one from its own
        if self.windows:
            yield from ("--platform", self.architecture)
            return
        oldest = _OLDEST_GLIBC[self.architecture]
        # pip does not conclude from a tag that older ones fit as well.
        for name in (*(f"manylinux_2_{minor}" for minor in range(self.glibc, oldest - 1, -1)), *self._legacy()):
            yield from ("--platform", f"{name}_{self.architecture}")

    def _legacy(self) -> tuple[str, ...]:
        return _LEGACY[self.architecture]

    def marker_environments(self) -> Iterator[dict[str, str]]:
        """Yield what environment markers are evaluated with, for the first and the last patch release of the Python.

        A requirement that either of them wants belongs on the stick, since the patch release of the box is not known.
        """
        for patch in (0, 99):
            yield {
                "implementation_name": "cpython",
                "implementation_version": f"{self.python}.{patch}",
                "os_name": "nt" if self.windows else "posix",
                "platform_machine": "AMD64" if self.windows else self.architecture,
                "platform_python_implementation": "CPython",
                "platform_release": "",
                "platform_system": "Windows" if self.windows else "Linux",
                "platform_version": "",
                "python_full_version": f"{self.python}.{patch}",
                "python_version": self.python,
                "sys_platform": "win32" if self.windows else "linux",
            }
