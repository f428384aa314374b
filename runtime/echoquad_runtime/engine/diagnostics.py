"""Host diagnostics: run a small model on every device and report what works on this machine.

``run_diagnostics`` changes nothing. Higher layers pass the checks of their own libraries, such as PyTorch, as
``extra_checks``.
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
from echoquad_runtime.devices.cpu_info import available_cpus, cpu_features
from echoquad_runtime.devices.cuda_probe import cuda_unavailable_reason, nvidia_driver
from echoquad_runtime.devices.execution_providers import (
    CPU_PROVIDER,
    CUDA_PROVIDER,
    OPENVINO_PROVIDER,
    probe_provider,
)
from echoquad_runtime.devices.onnxruntime_loader import (
    format_versions,
    install_command,
    installed_wheels,
    load_onnxruntime,
)
from echoquad_runtime.devices.openvino_probe import openvino_unavailable_reason
from echoquad_runtime.devices.session_factory import Device
from echoquad_runtime.engine.self_test import cached_self_tests
from echoquad_runtime.errors import DeviceUnavailableError, MissingExtraError

__all__ = ["CheckStatus", "DiagnosticCheck", "DiagnosticReport", "run_diagnostics"]

CheckStatus = Literal["ok", "warning", "failed"]

_OLDEST_PYTHON = (3, 11)

# Instructions that multiply int8 values and accumulate in one step; without any of them int8 is hardly faster.
_INT8_INSTRUCTIONS = ("amx_int8", "avx512_vnni", "avx_vnni", "asimddp", "i8mm")

# Time of the network for one frame by processor instructions, fastest first, each with the machine that was measured.
_SETUP = "(ResNet-18 at 224, 2 threads, benchmarks/engines.py)"
_OPENVINO_GAINS: Mapping[tuple[str, ...], str] = {
    ("amx_int8",): "on an Intel Sapphire Rapids with AMX, OpenVINO took 12.5 ms per frame in int8, its first "
    f"convolution in float, and 24.6 in bf16; device cpu took 30.6 in int8 and 65.7 in fp32 {_SETUP}",
    ("avx512_vnni", "avx_vnni"): "on an AMD EPYC with AVX-512 VNNI, OpenVINO took 8.2 ms per frame in int8 and 15.5 in "
    f"bf16; device cpu took 9.0 in int8 and 30.1 in fp32 {_SETUP}",
}
_CUDA_GAIN = (
    "an NVIDIA H100 took 1.12 ms for one frame in fp16 and 7.2 ms for 32 "
    "(onnxruntime-gpu 1.31.1, ResNet-18 at 224, November 2026)"
)


@dataclass(frozen=True, slots=True)
class DiagnosticCheck:
    """The result of one check.

    Attributes
    ----------
    name
        The subject of the check, such as ``"cuda"``.
    status
        ``"ok"``, ``"warning"`` (EchoQuad works without it) or ``"failed"``.
    detail
        One line: the finding and, unless the status is ok, the remedy.
    """

    name: str
    status: CheckStatus
    detail: str


@dataclass(frozen=True, slots=True)
class DiagnosticReport:
    """The result of :func:`run_diagnostics`.

    Attributes
    ----------
    device
        The requested device.
    checks
        The checks in the order in which they ran.
    facts
        Versions and sizes, as text for a bug report.
    """

    device: Device
    checks: tuple[DiagnosticCheck, ...]
    facts: dict[str, str]

    @property
    def healthy(self) -> bool:
        """Whether no check failed; warnings are allowed."""
        return all(check.status != "failed" for check in self.checks)

    @property
    def exit_code(self) -> int:
        """4 if CUDA or OpenVINO was requested and failed, 1 if any other check failed, otherwise 0."""
        failed = {check.name for check in self.checks if check.status == "failed"}
        if failed & {"cuda", "openvino"}:
            return DeviceUnavailableError.exit_code
        return 1 if failed else 0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "device": self.device,
            "healthy": self.healthy,
            "exit_code": self.exit_code,
            "checks": [asdict(check) for check in self.checks],
            "facts": dict(self.facts),
        }


def run_diagnostics(
    device: Device = "auto", *, extra_checks: Sequence[Callable[[], DiagnosticCheck]] = ()
) -> DiagnosticReport:
    """Check this machine: the installed wheels, and a tiny model on each device.

    Parameters
    ----------
    device
        ``"cuda"`` or ``"openvino"``: a failure of this device is a failed check. ``"auto"``: it is a warning, and only
        if the installed onnxruntime has the provider. ``"cpu"``: checks neither.
    extra_checks
        Further checks, which run last. One that raises becomes a failed check.
    """
    checks, features = [_check_python(), _check_single_wheel()], cpu_features()
    ort: ModuleType | None = None
    try:
        ort = load_onnxruntime()
    except MissingExtraError as error:
        checks.append(DiagnosticCheck("onnxruntime", "failed", str(error)))
    else:
        providers = ort.get_available_providers()
        checks.append(DiagnosticCheck("onnxruntime", "ok", f"{ort.__version__}, with {', '.join(providers)}"))
        checks.append(_check_cpu())
        if device == "cuda" or (device == "auto" and CUDA_PROVIDER in providers):
            checks.append(_check_device("cuda", device, cuda_unavailable_reason()))
        if device == "openvino" or (device == "auto" and OPENVINO_PROVIDER in providers):
            checks.append(_check_openvino(device))
        checks.append(_check_self_tests())
        if device == "auto":
            checks += _suggest_wheels(providers, features)
    checks += _check_int8(features)
    checks += [_run_extra_check(check) for check in extra_checks]
    return DiagnosticReport(device, tuple(checks), _facts(ort))


def _check_python() -> DiagnosticCheck:
    if sys.version_info[:2] >= _OLDEST_PYTHON:
        return DiagnosticCheck("python", "ok", platform.python_version())
    oldest = ".".join(str(part) for part in _OLDEST_PYTHON)
    return DiagnosticCheck("python", "failed", f"found {platform.python_version()}; expected {oldest} or newer")


def _check_single_wheel() -> DiagnosticCheck:
    name, wheels = "one onnxruntime wheel", installed_wheels()
    if len(wheels) < 2:
        return DiagnosticCheck(name, "ok", format_versions(wheels) or "pip lists none")
    extra = next((extra for extra in ("gpu", "openvino") if f"onnxruntime-{extra}" in wheels), "cpu")
    return DiagnosticCheck(
        name,
        "failed",
        f"{format_versions(wheels)} are installed over each other, and either may run; do: {install_command(extra)}",
    )


def _check_cpu() -> DiagnosticCheck:
    failure = probe_provider(CPU_PROVIDER)
    if failure is None:
        return DiagnosticCheck("cpu", "ok", f"computed the expected numbers; {available_cpus()} CPUs to use")
    return DiagnosticCheck("cpu", "failed", f"{failure}; do: install onnxruntime again")


def _check_device(name: str, device: Device, reason: str | None, detail: str = "") -> DiagnosticCheck:
    if reason is None:
        return DiagnosticCheck(name, "ok", f"computed the expected numbers{detail}")
    return DiagnosticCheck(name, "failed" if device == name else "warning", reason)


def _check_openvino(device: Device) -> DiagnosticCheck:
    reason = openvino_unavailable_reason()
    no_bfloat16 = openvino_unavailable_reason(bfloat16=True) if reason is None else None
    detail = ", also in bfloat16" if no_bfloat16 is None else ", not in bfloat16 on this processor"
    return _check_device("openvino", device, reason, detail)


def _check_self_tests() -> DiagnosticCheck:
    """Report the saved self-tests of this host."""
    results = cached_self_tests()
    if not results:
        detail = "none saved on this host; a predictor tests a bundle before its first answer"
        return DiagnosticCheck("self-tests", "ok", detail)
    last = results[-1]
    latest = f"bundle {str(last['bundle'])[:12]} in {last['precision']} on {last['device']}, {last['created']}"
    return DiagnosticCheck("self-tests", "ok", f"{len(results)} passed on this host, the last: {latest}")


def _check_int8(features: frozenset[str]) -> list[DiagnosticCheck]:
    """Report the CPU's int8 instructions, for information only; Linux lists them."""
    present = ", ".join(name for name in _INT8_INSTRUCTIONS if name in features)
    missing = f"none of {', '.join(_INT8_INSTRUCTIONS)}: int8 may be no faster than fp32"
    return [DiagnosticCheck("int8 instructions", "ok", present or missing)] if features else []


def _suggest_wheels(providers: Sequence[str], features: frozenset[str]) -> list[DiagnosticCheck]:
    """Suggest onnxruntime wheels that would be faster on this machine, with figures measured on similar machines."""
    if platform.system() not in ("Linux", "Windows") or platform.machine().lower() not in ("x86_64", "amd64"):
        return []
    suggestions = []
    gain = next((text for names, text in _OPENVINO_GAINS.items() if features.intersection(names)), None)
    if gain is not None and not {OPENVINO_PROVIDER, CUDA_PROVIDER}.intersection(providers):
        command = install_command("openvino")
        detail = f"not installed; it adds device openvino: {gain}; do: {command}, then echoquad tune BUNDLE"
        suggestions.append(DiagnosticCheck("onnxruntime-openvino", "ok", detail))
    if CUDA_PROVIDER not in providers and nvidia_driver()[1] is None:
        command = install_command("gpu")
        detail = f"not installed, but there is an NVIDIA GPU; it adds device cuda: {_CUDA_GAIN}; do: {command}"
        suggestions.append(DiagnosticCheck("onnxruntime-gpu", "ok", detail))
    return suggestions


def _run_extra_check(check: Callable[[], DiagnosticCheck]) -> DiagnosticCheck:
    try:
        return check()
    except Exception as error:  # report the other checks in any case
        name = str(getattr(check, "__name__", "extra check")).strip("_")
        return DiagnosticCheck(name, "failed", f"{type(error).__name__}: {' '.join(str(error).split())}")


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
    """Return the machine's memory in bytes; None on systems without ``os.sysconf`` (Windows)."""
    sysconf = getattr(os, "sysconf", None)
    try:
        return int(sysconf("SC_PHYS_PAGES")) * int(sysconf("SC_PAGE_SIZE")) if sysconf else None
    except (ValueError, OSError):
        return None
