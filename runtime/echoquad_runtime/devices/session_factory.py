"""How a session is made on a device, and the truth about which device it is.

Asked for CUDA where CUDA cannot be loaded, onnxruntime makes a CPU session and tells only its log. Here CUDA
and OpenVINO are there when they have *computed*: a probe is run on them before the caller's model is opened.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType
from typing import TYPE_CHECKING, Literal, get_args

from echoquad_runtime.devices.cpu_info import available_cpus, schedulable_cpus
from echoquad_runtime.devices.cuda_probe import cuda_unavailable_reason
from echoquad_runtime.devices.execution_providers import (
    CPU_PROVIDER,
    CUDA_PROVIDER,
    OPENVINO_PROVIDER,
    PROBE_MODEL,
    create_session,
    fallback_nodes,
    probe,
)
from echoquad_runtime.devices.graph_cache import cached_session, find_cache
from echoquad_runtime.devices.onnxruntime_loader import installed_wheels, load_onnxruntime, named, one_line
from echoquad_runtime.devices.openvino_probe import openvino_unavailable_reason
from echoquad_runtime.errors import BundleError, DeviceUnavailableError, MissingExtraError, UsageError

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
    "cuda_unavailable_reason",
    "installed_wheels",
    "load_onnxruntime",
    "open_session",
    "openvino_unavailable_reason",
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


def open_session(
    model: bytes | Callable[[], bytes],
    *,
    device: Device = "auto",
    threads: int | None = None,
    spinning: bool = True,
    bfloat16: bool = False,
    cuda_options: Mapping[str, str] | None = None,
    not_on_cuda: str = "",
    cached_as: tuple[str, int] | None = None,
) -> OpenedSession:
    """Open a model on a device, or say why not.

    Parameters
    ----------
    model
        An ONNX file's bytes, or what gives them: with two threads or more it is called in one of its own while
        onnxruntime is imported, and what it raises is raised here.
    device
        ``"cuda"`` is CUDA or an error, ``"openvino"`` OpenVINO on the CPU or an error, ``"cpu"`` onnxruntime's
        own CPU kernels, whichever wheel is installed. ``"auto"`` is CUDA where it works and else the CPU. It
        never is OpenVINO: that rounds otherwise than the kernels that an export was held to, and whether it is
        the quicker depends on the processor and the precision; somebody has to ask for it.
    threads
        CPU threads inside an operator; None for :func:`available_cpus`.
    spinning
        Whether those threads wait for their part of an inference in a busy loop, which is quicker. Between inferences
        they sleep whatever is said here. OpenVINO's threads are its own affair.
    bfloat16
        Whether to compute a float32 graph in bfloat16; only on ``"openvino"``, and only where the processor has
        it. Otherwise a float32 graph is computed in float32, whatever the device.
    cuda_options
        As `create_session`.
    not_on_cuda
        Why CUDA is not to run this model though it could; empty where it may.
    cached_as
        SHA-256 and size of `model`, where what onnxruntime makes of it on the CPU may be kept and used again; see
        :mod:`echoquad_runtime.devices.graph_cache`.

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
    threads = threads or available_cpus()
    read = _begin(model, aside=threads > 1)  # one thread is one, at the start too
    try:
        ort = load_onnxruntime()
    except MissingExtraError:
        read()  # what is wrong with the model would be wrong with any onnxruntime, and is told first
        raise
    obstacle = ""
    if device == "auto" and CUDA_PROVIDER not in (providers := ort.get_available_providers()):
        # Somebody who installed the plain wheel has chosen the CPU: to be told, not to be advised.
        obstacle = f"{named(installed_wheels()) or 'this onnxruntime'} is built without CUDA"
        if OPENVINO_PROVIDER in providers:
            obstacle += "; for OpenVINO ask for device openvino"
    elif device != "cpu":
        opened = _open_beside_cpu(ort, read(), device, threads, spinning, bfloat16, cuda_options, not_on_cuda)
        if isinstance(opened, OpenedSession):
            return opened
        obstacle = opened
    session = _open_on_cpu(ort, read, threads, spinning, cached_as)
    if device in ("cuda", "openvino"):
        raise DeviceUnavailableError(f"device {device} cannot be used: {obstacle}; or ask for device cpu")
    return OpenedSession(session, "cpu", CPU_PROVIDER, f"on the CPU: {obstacle}" if obstacle else "", threads)


def _begin(model: bytes | Callable[[], bytes], *, aside: bool) -> Callable[[], bytes]:
    """Begin to read, in a thread if aside; gives what gives the bytes, or raises what the reading raised."""
    if not callable(model):
        return partial(bytes, model)
    if not aside:
        return cache(model)
    given: list[bytes] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            given.append(model())
        except BaseException as error:  # whatever it is, it is raised where the bytes are wanted
            raised.append(error)

    def wait() -> bytes:
        thread.join()
        if raised:
            raise raised[0]
        return given[0]

    thread = threading.Thread(target=run, name="echoquad-read", daemon=True)
    thread.start()
    return wait


def _open_on_cpu(
    ort: ModuleType, read: Callable[[], bytes], threads: int, spinning: bool, cached_as: tuple[str, int] | None
) -> onnxruntime.InferenceSession:
    """Open a model on the CPU; what is cached of it is read while the model is.

    Raises
    ------
    BundleError
        onnxruntime refuses it.
    """
    place = None if cached_as is None else find_cache(ort, *cached_as)
    cached = None if place is None else place.read()
    model = read()
    try:
        if place is None:
            return create_session(ort, model, CPU_PROVIDER, threads=threads, spinning=spinning)
        return cached_session(ort, place, cached, model, threads=threads, spinning=spinning)
    except Exception as error:  # they share no base
        raise BundleError(
            f"onnxruntime {ort.__version__} refuses the model of {len(model)} bytes ({one_line(error)}); "
            "expected an ONNX graph that it can run; do: export again, or upgrade onnxruntime"
        ) from error


def _open_beside_cpu(
    ort: ModuleType,
    model: bytes,
    device: Device,
    threads: int,
    spinning: bool,
    bfloat16: bool,
    cuda_options: Mapping[str, str] | None,
    not_on_cuda: str,
) -> OpenedSession | str:
    """Open a model on OpenVINO, or for ``cuda`` and ``auto`` on CUDA; or say in one line why not."""
    if device == "openvino":
        name, title, provider = "openvino", "OpenVINO", OPENVINO_PROVIDER
        obstacle, threads = openvino_unavailable_reason(bfloat16=bfloat16), min(threads, schedulable_cpus())
    else:
        name, title, provider = "cuda", "CUDA", CUDA_PROVIDER
        obstacle = cuda_unavailable_reason() or not_on_cuda or None
    if obstacle is not None:
        return obstacle
    try:
        session = create_session(
            ort,
            model,
            provider,
            threads=threads,
            spinning=spinning,
            bfloat16=bfloat16,
            cuda_options=cuda_options,
        )
    except Exception as error:  # they share no base; whether it is the model's own fault, the CPU will tell
        return f"{title} works, but not for this model ({one_line(error)}); do: try another precision"
    if (left := fallback_nodes(session, provider)) is not None:
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
        found["cuda"] = cuda_unavailable_reason()
    if OPENVINO_PROVIDER in providers:
        found["openvino"] = openvino_unavailable_reason()
    return found
