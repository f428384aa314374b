"""Limits of a reader process: address space, processor time, open files and core dumps.

==============  ==============================  ========================================
limit           POSIX                           Windows
==============  ==============================  ========================================
memory          ``RLIMIT_AS``; not on macOS     job object
processor time  ``RLIMIT_CPU``, for each file   none
elapsed time    the parent ends the process     the parent ends the process
open files      ``RLIMIT_NOFILE``               none
core dumps      ``RLIMIT_CORE``                 the error dialog is disabled
==============  ==============================  ========================================
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from pathlib import Path
from typing import Final

from echoquad_runtime.errors import FrameTimeoutError

__all__ = [
    "MAX_MESSAGE",
    "MEMORY_LIMIT",
    "TIME_LIMIT",
    "missing_limits",
    "renew_cpu_limit",
    "set_limits",
    "timeout_error",
]

TIME_LIMIT: Final = 60.0
"""Default seconds for reading and decoding a frame."""

MEMORY_LIMIT: Final = 2 << 30
"""Bytes of address space that a reader process may take beyond those that it has when it starts."""

MAX_MESSAGE: Final = 1000
"""Characters of an error message that a reader process sends."""

_OPEN_FILES: Final = 256
_TYPICAL_START_BYTES: Final = 512 << 20  # where the system does not tell: the interpreter, numpy and Pillow


def timeout_error(seconds: float) -> FrameTimeoutError:
    """Return the error of a file that takes longer than `seconds`."""
    return FrameTimeoutError(
        f"reading and decoding takes longer than {seconds:g} seconds; check the file, and the disk that holds it"
    )


def missing_limits() -> tuple[str, ...]:
    """Return the limits that this operating system does not enforce on a reader process."""
    if sys.platform == "darwin":
        return ("memory",)
    return ("processor time",) if sys.platform == "win32" else ()


def set_limits(memory: int) -> None:
    """Limit this process to `memory` bytes beyond what it has now, to few open files and to no core dump.

    A limit that is stricter already, such as one that a service manager sets, stays.
    """
    if sys.platform == "win32":
        _set_job_limits(memory)
        return
    import resource

    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_NOFILE, _OPEN_FILES)
    _lower(resource.RLIMIT_AS, _address_space() + memory)


def renew_cpu_limit(seconds: float) -> None:
    """Allow this process `seconds` of processor time from now on; the kernel ends it with SIGXCPU after that."""
    if sys.platform == "win32":
        return
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF)
    _lower(resource.RLIMIT_CPU, math.ceil(usage.ru_utime + usage.ru_stime + min(seconds, 1e6)) + 1)


def _lower(kind: int, value: int) -> None:
    """Set a soft limit, at most the hard one, which stays: the processor time is renewed."""
    if sys.platform != "win32":
        import resource

        _, hard = resource.getrlimit(kind)
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        with contextlib.suppress(OSError, ValueError):  # macOS refuses an address space below the current one
            resource.setrlimit(kind, (value, hard))


def _address_space() -> int:
    """Return the bytes of address space that this process has."""
    try:
        return int(Path("/proc/self/statm").read_text("ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return _TYPICAL_START_BYTES


def _set_job_limits(memory: int) -> None:
    """Put this process into a job object whose processes may commit `memory` bytes beyond what is usual at the start.

    https://learn.microsoft.com/windows/win32/api/winnt/ns-winnt-jobobject_extended_limit_information
    """
    if sys.platform == "win32":
        import ctypes
        from ctypes import wintypes

        class BasicLimits(ctypes.Structure):
            _fields_ = (
                ("PerProcessUserTimeLimit", ctypes.c_int64),
                ("PerJobUserTimeLimit", ctypes.c_int64),
                ("LimitFlags", wintypes.DWORD),
                ("MinimumWorkingSetSize", ctypes.c_size_t),
                ("MaximumWorkingSetSize", ctypes.c_size_t),
                ("ActiveProcessLimit", wintypes.DWORD),
                ("Affinity", ctypes.c_size_t),
                ("PriorityClass", wintypes.DWORD),
                ("SchedulingClass", wintypes.DWORD),
            )

        class ExtendedLimits(ctypes.Structure):
            _fields_ = (
                ("BasicLimitInformation", BasicLimits),
                ("IoInfo", ctypes.c_uint64 * 6),
                ("ProcessMemoryLimit", ctypes.c_size_t),
                ("JobMemoryLimit", ctypes.c_size_t),
                ("PeakProcessMemoryUsed", ctypes.c_size_t),
                ("PeakJobMemoryUsed", ctypes.c_size_t),
            )

        kernel = ctypes.WinDLL("kernel32", use_last_error=True)
        kernel.CreateJobObjectW.restype = kernel.GetCurrentProcess.restype = wintypes.HANDLE
        kernel.SetInformationJobObject.argtypes = (wintypes.HANDLE, ctypes.c_int, ctypes.c_void_p, wintypes.DWORD)
        kernel.AssignProcessToJobObject.argtypes = (wintypes.HANDLE, wintypes.HANDLE)
        limits = ExtendedLimits()
        limits.BasicLimitInformation.LimitFlags = 0x100 | 0x400  # process memory; no dialog for an unhandled exception
        limits.ProcessMemoryLimit = _TYPICAL_START_BYTES + memory
        job = kernel.CreateJobObjectW(None, None)
        extended_limit_information = 9
        if job and kernel.SetInformationJobObject(
            job, extended_limit_information, ctypes.byref(limits), ctypes.sizeof(limits)
        ):
            kernel.AssignProcessToJobObject(job, kernel.GetCurrentProcess())
