"""What works on this machine: every device is made to compute, and what was found is put in words.

``examine`` changes nothing. What only the upper floors know (PyTorch, say) they pass in as ``extra_checks``.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from echoquad_runtime._version import __version__
from echoquad_runtime.devices.cpu_info import cpu_features
from echoquad_runtime.devices.cuda_probe import nvidia_driver
from echoquad_runtime.devices.onnxruntime_loader import reinstall
from echoquad_runtime.devices.session_factory import (
    CPU_PROVIDER,
    CUDA_PROVIDER,
    OPENVINO_PROVIDER,
    Device,
    available_cpus,
    cuda_unavailable_reason,
    installed_wheels,
    load_onnxruntime,
    openvino_unavailable_reason,
    probe,
)
from echoquad_runtime.engine.self_test import passes_on_this_host
from echoquad_runtime.errors import DeviceUnavailableError, MissingExtraError

__all__ = ["Check", "Report", "Status", "examine"]

Status = Literal["ok", "warning", "failed"]

_OLDEST_PYTHON = (3, 11)

# Instructions that multiply int8 and add in one step; without one of them int8 gains little.
_INT8_INSTRUCTIONS = ("amx_int8", "avx512_vnni", "avx_vnni", "asimddp", "i8mm")

# What the network alone takes for one frame, by instructions that the processor has, the fastest first. Each entry
# names what was measured, and where.
_HOW = "(ResNet-18 at 224, 2 threads, benchmarks/engines.py)"
_OPENVINO_GAINS: Mapping[tuple[str, ...], str] = {
    ("amx_int8",): "on an Intel Sapphire Rapids with AMX, OpenVINO took 12.5 ms a frame in int8, its first convolution "
    f"as trained, and 24.6 in bf16, device cpu 30.6 in int8 and 65.7 in fp32 {_HOW}",
    ("avx512_vnni", "avx_vnni"): "on an AMD EPYC with AVX-512 VNNI, OpenVINO took 8.2 ms a frame in int8 and 15.5 in "
    f"bf16, device cpu 9.0 in int8 and 30.1 in fp32 {_HOW}",
}
_CUDA_GAIN = (
    "an NVIDIA H100 took 1.12 ms for one frame in fp16 and 7.2 ms for 32 "
    "(onnxruntime-gpu 1.31.1, ResNet-18 at 224, November 2026)"
)


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was tried, and how it went.

    Attributes
    ----------
    name
        What was checked, such as ``"cuda"``.
    status
        ``"ok"``, ``"warning"`` (EchoQuad works without it) or ``"failed"``.
    detail
        One line: what was found and, unless it is ok, what to do.
    """

    name: str
    status: Status
    detail: str


@dataclass(frozen=True, slots=True)
class Report:
    """What :func:`examine` found.

    Attributes
    ----------
    device
        The device that was asked for.
    checks
        In the order in which they were made.
    facts
        Versions and sizes, as text, for a bug report.
    """

    device: Device
    checks: tuple[Check, ...]
    facts: dict[str, str]

    @property
    def healthy(self) -> bool:
        """Whether no check failed; warnings are allowed."""
        return all(check.status != "failed" for check in self.checks)

    @property
    def exit_code(self) -> int:
        """4 when CUDA or OpenVINO was asked for and failed, 1 when anything else failed, else 0."""
        failed = {check.name for check in self.checks if check.status == "failed"}
        if failed & {"cuda", "openvino"}:
            return DeviceUnavailableError.exit_code
        return 1 if failed else 0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON's types."""
        return {
            "device": self.device,
            "healthy": self.healthy,
            "exit_code": self.exit_code,
            "checks": [asdict(check) for check in self.checks],
            "facts": dict(self.facts),
        }


def examine(device: Device = "auto", *, extra_checks: Sequence[Callable[[], Check]] = ()) -> Report:
    """Check this machine: the wheels, and a tiny model run on each device.

    Parameters
    ----------
    device
        ``"cuda"`` makes a CUDA that does not work a failure, ``"openvino"`` such an OpenVINO; to ``"auto"``
        they are warnings, and only where the installed onnxruntime has them at all; ``"cpu"`` does not look.
    extra_checks
        Further checks, made last. One that raises is a failed check, not an end of the examination.
    """
    checks, features = [_python(), _one_wheel()], cpu_features()
    ort: ModuleType | None = None
    try:
        ort = load_onnxruntime()
    except MissingExtraError as error:
        checks.append(Check("onnxruntime", "failed", str(error)))
    else:
        providers = ort.get_available_providers()
        checks.append(Check("onnxruntime", "ok", f"{ort.__version__}, with {', '.join(providers)}"))
        checks.append(_cpu())
        if device == "cuda" or (device == "auto" and CUDA_PROVIDER in providers):
            checks.append(_cuda(device))
        if device == "openvino" or (device == "auto" and OPENVINO_PROVIDER in providers):
            checks.append(_openvino(device))
        checks.append(_self_tests())
        if device == "auto":
            checks += _other_wheels(providers, features)
    checks += _int8(features)
    checks += [_guarded(check) for check in extra_checks]
    return Report(device, tuple(checks), _facts(ort))


def _python() -> Check:
    oldest = ".".join(str(part) for part in _OLDEST_PYTHON)
    if sys.version_info[:2] >= _OLDEST_PYTHON:
        return Check("python", "ok", platform.python_version())
    return Check("python", "failed", f"found {platform.python_version()}; expected {oldest} or newer")


def _one_wheel() -> Check:
    wheels = installed_wheels()
    named = " and ".join(f"{name} {version}" for name, version in wheels.items())
    if len(wheels) < 2:
        return Check("one onnxruntime wheel", "ok", named or "pip lists none")
    extra = next((of for of in ("gpu", "openvino") if f"onnxruntime-{of}" in wheels), "cpu")
    return Check(
        "one onnxruntime wheel",
        "failed",
        f"{named} are installed over each other, and which one runs is chance; "
        f'do: pip uninstall -y {" ".join(wheels)}, then pip install "echoquad[{extra}]"',
    )


def _cpu() -> Check:
    failure = probe(CPU_PROVIDER)
    if failure is None:
        return Check("cpu", "ok", f"computed the expected numbers; {available_cpus()} CPUs to use")
    return Check("cpu", "failed", f"{failure}; do: install onnxruntime again")


def _cuda(device: Device) -> Check:
    obstacle = cuda_unavailable_reason()
    if obstacle is None:
        return Check("cuda", "ok", "computed the expected numbers")
    return Check("cuda", "failed" if device == "cuda" else "warning", obstacle)


def _openvino(device: Device) -> Check:
    obstacle = openvino_unavailable_reason()
    if obstacle is not None:
        return Check("openvino", "failed" if device == "openvino" else "warning", obstacle)
    bfloat16 = (
        "in bfloat16 too" if openvino_unavailable_reason(bfloat16=True) is None else "not in bfloat16 on this processor"
    )
    return Check("openvino", "ok", f"computed the expected numbers, {bfloat16}")


def _self_tests() -> Check:
    """Count the self-tests of bundles that this host remembers as passed."""
    found = passes_on_this_host()
    if not found:
        return Check("self-tests", "ok", "none remembered on this host; a bundle is tested before its first answer")
    last = found[-1]
    what = f"bundle {str(last['bundle'])[:12]} in {last['precision']} on {last['device']}, {last['created']}"
    return Check("self-tests", "ok", f"{len(found)} passed on this host, the last: {what}")


def _int8(features: frozenset[str]) -> list[Check]:
    """Name the CPU's int8 instructions, where Linux lists them: to know, not to pass or fail."""
    found = [name for name in _INT8_INSTRUCTIONS if name in features]
    missing = f"none of {', '.join(_INT8_INSTRUCTIONS)}: int8 may be no faster than fp32"
    return [Check("int8 instructions", "ok", ", ".join(found) or missing)] if features else []


def _other_wheels(providers: Sequence[str], features: frozenset[str]) -> list[Check]:
    """Return a line for each missing wheel that would help on this machine, by what was measured on another one."""
    if platform.system() not in ("Linux", "Windows") or platform.machine().lower() not in ("x86_64", "amd64"):
        return []
    found = []
    gain = next((words for names, words in _OPENVINO_GAINS.items() if features.intersection(names)), None)
    if gain is not None and not {OPENVINO_PROVIDER, CUDA_PROVIDER}.intersection(providers):
        detail = (
            f"not installed; it adds device openvino: {gain}; do: {reinstall('openvino')}, then echoquad tune BUNDLE"
        )
        found.append(Check("onnxruntime-openvino", "ok", detail))
    if CUDA_PROVIDER not in providers and nvidia_driver()[1] is None:
        detail = f"not installed, but there is an NVIDIA GPU; it adds device cuda: {_CUDA_GAIN}; do: {reinstall('gpu')}"
        found.append(Check("onnxruntime-gpu", "ok", detail))
    return found


def _guarded(check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:  # whatever it is, the other findings must still be told
        name = str(getattr(check, "__name__", "extra check")).strip("_")
        return Check(name, "failed", f"{type(error).__name__}: {' '.join(str(error).split())}")


def _facts(ort: ModuleType | None) -> dict[str, str]:
    facts = {
        "echoquad": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpus": str(available_cpus()),
    }
    if (memory := _memory_bytes()) is not None:
        facts["memory"] = f"{memory / 2**30:.1f} GiB"
    facts.update(installed_wheels(("numpy", "pillow")))
    facts.update(installed_wheels())
    if ort is not None:
        facts["onnxruntime imported"] = f"{ort.__version__} from {Path(ort.__file__ or '').parent}"
        facts["onnxruntime providers"] = ", ".join(ort.get_available_providers())
        if built_for := getattr(ort, "cuda_version", ""):
            facts["onnxruntime built for CUDA"] = str(built_for)
    return facts


def _memory_bytes() -> int | None:
    """Return the machine's memory in bytes; None where ``os.sysconf`` cannot tell it (Windows)."""
    sysconf = getattr(os, "sysconf", None)
    try:
        return int(sysconf("SC_PHYS_PAGES")) * int(sysconf("SC_PAGE_SIZE")) if sysconf else None
    except (ValueError, OSError):
        return None
