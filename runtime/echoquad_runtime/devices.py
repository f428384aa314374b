"""How a session is made on a device, and the truth about which device it is.

Asked for CUDA where CUDA cannot be loaded, onnxruntime makes a CPU session and tells only its log. Here CUDA
and OpenVINO are there when they have *computed*: a probe is run on them before the caller's model is opened.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal, get_args

from echoquad_runtime.cuda import cuda_obstacle
from echoquad_runtime.errors import BundleError, DeviceUnavailableError, UsageError
from echoquad_runtime.openvino import openvino_obstacle
from echoquad_runtime.providers import (
    CPU_PROVIDER,
    CUDA_PROVIDER,
    OPENVINO_PROVIDER,
    PROBE_MODEL,
    create_session,
    probe,
    strays,
)
from echoquad_runtime.wheels import installed_wheels, load_onnxruntime, named, one_line

if TYPE_CHECKING:
    import onnxruntime

__all__ = [
    "CPU_PROVIDER",
    "CUDA_PROVIDER",
    "OPENVINO_PROVIDER",
    "PROBE_MODEL",
    "Device",
    "OpenedSession",
    "available_cpus",
    "cuda_obstacle",
    "installed_wheels",
    "load_onnxruntime",
    "open_session",
    "openvino_obstacle",
    "probe",
    "usable_devices",
]

Device = Literal["auto", "cpu", "cuda", "openvino"]


@dataclass(frozen=True, slots=True)
class OpenedSession:
    """A session and the device that really runs it.

    Attributes
    ----------
    session
        The onnxruntime session. It never falls back to another provider.
    device
        ``"cpu"``, ``"cuda"`` or ``"openvino"``: what runs, not what was asked for.
    provider
        onnxruntime's name of it, such as ``"CPUExecutionProvider"``.
    note
        One line saying why ``auto`` chose the CPU; ``""`` when it did not.
    threads
        CPU threads inside an operator, as they really are: OpenVINO takes no more than the process has CPUs.
    """

    session: onnxruntime.InferenceSession
    device: str
    provider: str
    note: str
    threads: int


def available_cpus() -> int:
    """Count the CPUs this process may use: its affinity and its cgroup's quota, rounded down, at least 1."""
    quotas = _cgroup_quotas(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))
    # Down, not up: onnxruntime's threads spin, and one that has used up the quota stalls the others.
    return max(1, int(min([_schedulable_cpus(), *quotas])))


def _schedulable_cpus() -> int:
    counts = [os.cpu_count() or 1]
    if (affinity := getattr(os, "sched_getaffinity", None)) is not None:
        counts.append(len(affinity(0)))
    if (process_count := getattr(os, "process_cpu_count", None)) is not None:
        counts.append(process_count() or 1)
    return min(counts)


def _cgroup_quotas(root: Path, membership: Path) -> list[float]:
    """Return the CPU quotas, in CPUs, of this process's cgroups (v2 and v1) and of their parents."""
    quotas: list[float] = []
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return quotas
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # The root itself is read too: a container may be told a path that only its host has.
        folder = root / "cpu" if controllers else root
        for part in ["", *path.split("/")]:
            folder = folder / part
            with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
                if controllers:
                    texts = [(folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")]
                else:
                    texts = (folder / "cpu.max").read_text().split()
                quota, period = (int(text) for text in texts)  # "max" is no number: no limit
                if quota > 0:
                    quotas.append(quota / period)
    return quotas


def open_session(
    model: bytes,
    *,
    device: Device = "auto",
    threads: int | None = None,
    spinning: bool = True,
    bfloat16: bool = False,
) -> OpenedSession:
    """Open a model on a device, or say why not.

    Parameters
    ----------
    model
        An ONNX file's bytes.
    device
        ``"cuda"`` is CUDA or an error, ``"openvino"`` OpenVINO on the CPU or an error, ``"cpu"`` onnxruntime's
        own CPU kernels, whichever wheel is installed. ``"auto"`` is CUDA where it works and else the CPU. It
        never is OpenVINO: that rounds otherwise than the kernels that an export was held to, and whether it is
        the quicker depends on the processor and the precision; somebody has to ask for it.
    threads
        CPU threads inside an operator; None for :func:`available_cpus`.
    spinning
        Whether those threads wait for work in a busy loop, as is onnxruntime's habit: quicker, and a core burnt.
        OpenVINO's threads are its own affair.
    bfloat16
        Whether to compute a float32 graph in bfloat16; only on ``"openvino"``, and only where the processor has
        it. Otherwise a float32 graph is computed in float32, whatever the device.

    Raises
    ------
    BundleError
        onnxruntime refuses the model, whatever the device.
    DeviceUnavailableError
        `device` is ``"cuda"`` or ``"openvino"`` and does not work, or not for this model, or not in bfloat16.
    MissingExtraError
        onnxruntime is not installed.
    UsageError
        `device` or `threads` has a value that cannot be, or `bfloat16` is asked of another device.
    """
    if device not in get_args(Device):
        raise UsageError(f"device is {device!r}; expected one of {', '.join(get_args(Device))}")
    if threads is not None and threads < 1:
        raise UsageError(f"threads is {threads}; expected at least 1")
    if bfloat16 and device != "openvino":
        raise UsageError(
            f"precision bf16 is computed on device openvino alone; found device {device}; "
            "do: ask for device openvino, or for another precision"
        )
    ort = load_onnxruntime()
    threads = threads or available_cpus()
    obstacle = ""
    if device == "auto" and CUDA_PROVIDER not in (providers := ort.get_available_providers()):
        # Somebody who installed the plain wheel has chosen the CPU: to be told, not to be advised.
        obstacle = f"{named(installed_wheels()) or 'this onnxruntime'} is built without CUDA"
        if OPENVINO_PROVIDER in providers:
            obstacle += "; for OpenVINO ask for device openvino"
    elif device != "cpu":
        opened = _open_beside_cpu(ort, model, device, threads, spinning, bfloat16)
        if isinstance(opened, OpenedSession):
            return opened
        obstacle = opened
    try:
        session = create_session(ort, model, CPU_PROVIDER, threads=threads, spinning=spinning)
    except Exception as error:  # they share no base
        raise BundleError(
            f"onnxruntime {ort.__version__} refuses the model of {len(model)} bytes ({one_line(error)}); "
            "expected an ONNX graph that it can run; do: export again, or upgrade onnxruntime"
        ) from error
    if device in ("cuda", "openvino"):
        raise DeviceUnavailableError(f"device {device} cannot be used: {obstacle}; or ask for device cpu")
    return OpenedSession(session, "cpu", CPU_PROVIDER, f"on the CPU: {obstacle}" if obstacle else "", threads)


def _open_beside_cpu(
    ort: ModuleType, model: bytes, device: Device, threads: int, spinning: bool, bfloat16: bool
) -> OpenedSession | str:
    """Open a model on OpenVINO, or for ``cuda`` and ``auto`` on CUDA; or say in one line why not."""
    if device == "openvino":
        name, title, provider = "openvino", "OpenVINO", OPENVINO_PROVIDER
        obstacle, threads = openvino_obstacle(bfloat16=bfloat16), min(threads, _schedulable_cpus())
    else:
        name, title, provider = "cuda", "CUDA", CUDA_PROVIDER
        obstacle = cuda_obstacle()
    if obstacle is not None:
        return obstacle
    try:
        session = create_session(ort, model, provider, threads=threads, spinning=spinning, bfloat16=bfloat16)
    except Exception as error:  # they share no base; whether it is the model's own fault, the CPU will tell
        return f"{title} works, but not for this model ({one_line(error)}); do: try another precision"
    if (left := strays(session, provider)) is not None:
        return f"{title} leaves {left} to the CPU; do: choose precision fp32 or fp16"
    return OpenedSession(session, name, provider, "", threads)


def usable_devices() -> dict[str, str | None]:
    """Try every device that this installation could have: the CPU, and CUDA and OpenVINO where the wheel has them.

    Returns
    -------
    dict
        By the device's name None where it computed the right numbers, else one line on what is in the way.

    Raises
    ------
    MissingExtraError
        onnxruntime is not installed.
    """
    providers = load_onnxruntime().get_available_providers()
    found = {"cpu": probe(CPU_PROVIDER)}
    if CUDA_PROVIDER in providers:
        found["cuda"] = cuda_obstacle()
    if OPENVINO_PROVIDER in providers:
        found["openvino"] = openvino_obstacle()
    return found
