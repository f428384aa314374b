"""The session factory: open an inference session on a device that has proven to compute.

If CUDA cannot be loaded, onnxruntime silently creates a CPU session. This module therefore runs a probe on CUDA and
OpenVINO before it opens the caller's model on them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, get_args

from echoquad_runtime.devices.cpu_info import available_cpus, schedulable_cpus
from echoquad_runtime.devices.cuda_probe import cuda_unavailable_reason
from echoquad_runtime.devices.error_summary import summarize_error
from echoquad_runtime.devices.execution_providers import (
    CPU_PROVIDER,
    CUDA_PROVIDER,
    OPENVINO_PROVIDER,
    create_session,
    fallback_nodes,
    probe_provider,
)
from echoquad_runtime.devices.graph_cache import create_cached_session, find_cache_entry
from echoquad_runtime.devices.onnxruntime_loader import format_versions, installed_wheels, load_onnxruntime
from echoquad_runtime.devices.openvino_probe import openvino_unavailable_reason
from echoquad_runtime.errors import BundleError, DeviceUnavailableError, MissingExtraError, UsageError

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["Device", "OpenedSession", "open_session", "probe_devices"]

Device = Literal["auto", "cpu", "cuda", "openvino"]


@dataclass(frozen=True, slots=True)
class OpenedSession:
    """An inference session and the device that runs it.

    Attributes
    ----------
    session
        The onnxruntime session. It never falls back to another provider.
    device
        ``"cpu"``, ``"cuda"`` or ``"openvino"``: the actual device, which may differ from the requested one.
    provider
        onnxruntime's name of the execution provider, such as ``"CPUExecutionProvider"``.
    note
        One line that says why ``auto`` chose the CPU; otherwise empty.
    threads
        Actual CPU threads of an operator: OpenVINO uses at most as many as the process has CPUs.
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
    cache_key: tuple[str, int] | None = None,
) -> OpenedSession:
    """Open an inference session of a model on a device.

    Parameters
    ----------
    model
        Bytes of an ONNX file, or a function that returns them. With two threads or more, the function runs in a thread
        of its own while onnxruntime is imported; its exceptions are raised here.
    device
        ``"cuda"`` or ``"openvino"`` (on the CPU): that device or an error. ``"cpu"``: onnxruntime's own CPU kernels.
        ``"auto"``: CUDA if it works, otherwise the CPU. ``"auto"`` never selects OpenVINO, because OpenVINO rounds
        differently from the kernels that the export measured, and its speed depends on processor and precision.
    threads
        CPU threads of an operator; None for :func:`~echoquad_runtime.devices.cpu_info.available_cpus`.
    spinning
        Whether those threads busy-wait during an inference, which is faster. They always sleep between inferences.
        OpenVINO ignores this option.
    bfloat16
        Whether to compute a float32 graph in bfloat16; requires ``"openvino"`` and a processor with bfloat16. By
        default every device computes a float32 graph in float32.
    cuda_options
        As in `create_session`.
    not_on_cuda
        The reason why this model must not run on CUDA; empty if it may.
    cache_key
        SHA-256 and size in bytes of `model`, to cache the graph that onnxruntime optimises for the CPU; see
        :mod:`echoquad_runtime.devices.graph_cache`. None for no cache.

    Raises
    ------
    BundleError
        onnxruntime rejects the model.
    DeviceUnavailableError
        `device` is ``"cuda"`` or ``"openvino"``, and it does not work, or not for this model or in bfloat16.
    MissingExtraError
        onnxruntime is not installed.
    UsageError
        `device` or `threads` is invalid, or `bfloat16` is requested on another device.
    """
    if device not in get_args(Device):
        raise UsageError(f"device is {device!r}; expected one of {', '.join(get_args(Device))}")
    if threads is not None and threads < 1:
        raise UsageError(f"threads is {threads}; expected at least 1")
    if bfloat16 and device != "openvino":
        raise UsageError(
            f"precision bf16 requires device openvino; found device {device}; "
            "do: choose device openvino or another precision"
        )
    threads = threads or available_cpus()
    read_model = _start_reading(model, in_thread=threads > 1)  # a limit of one thread includes the start
    try:
        ort = load_onnxruntime()
    except MissingExtraError:
        read_model()  # a damaged model is the error to report first, since no onnxruntime could run it
        raise
    reason = ""
    if device == "auto" and CUDA_PROVIDER not in (providers := ort.get_available_providers()):
        # A wheel without CUDA is a choice of the CPU: inform, without advice.
        reason = f"{format_versions(installed_wheels()) or 'this onnxruntime'} is built without CUDA"
        if OPENVINO_PROVIDER in providers:
            reason += "; for OpenVINO choose device openvino"
    elif device != "cpu":
        options: dict[str, Any] = {"spinning": spinning, "bfloat16": bfloat16, "cuda_options": cuda_options}
        opened = _open_on_accelerator(ort, read_model(), device, threads, not_on_cuda, options)
        if isinstance(opened, OpenedSession):
            return opened
        reason = opened
    session = _open_on_cpu(ort, read_model, threads, spinning, cache_key)
    if device in ("cuda", "openvino"):
        raise DeviceUnavailableError(f"device {device} cannot be used: {reason}; or choose device cpu")
    return OpenedSession(session, "cpu", CPU_PROVIDER, f"on the CPU: {reason}" if reason else "", threads)


def _start_reading(model: bytes | Callable[[], bytes], *, in_thread: bool) -> Callable[[], bytes]:
    """Start to read the model; return a function that waits for its bytes or raises the reader's exception."""
    if not callable(model):
        return partial(bytes, model)
    if not in_thread:
        return cache(model)
    # A plain thread: importing concurrent.futures would delay the first decision.
    results: list[bytes] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(model())
        except BaseException as error:  # raised again in the thread that needs the bytes
            errors.append(error)

    def wait() -> bytes:
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    thread = threading.Thread(target=run, name="echoquad-read", daemon=True)
    thread.start()
    return wait


def _open_on_cpu(
    ort: ModuleType,
    read_model: Callable[[], bytes],
    threads: int,
    spinning: bool,
    cache_key: tuple[str, int] | None,
) -> onnxruntime.InferenceSession:
    """Open a model on the CPU; read its cache entry while another thread reads the model.

    Raises
    ------
    BundleError
        onnxruntime rejects the model.
    """
    entry = None if cache_key is None else find_cache_entry(ort, *cache_key)
    cached = None if entry is None else entry.read()
    model = read_model()
    try:
        if entry is None:
            return create_session(ort, model, CPU_PROVIDER, threads=threads, spinning=spinning)
        return create_cached_session(ort, entry, cached, model, threads=threads, spinning=spinning)
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise BundleError(
            f"onnxruntime {ort.__version__} rejects the model of {len(model)} bytes ({summarize_error(error)}); "
            "expected an ONNX graph that it can run; do: export again, or upgrade onnxruntime"
        ) from error


def _open_on_accelerator(
    ort: ModuleType, model: bytes, device: Device, threads: int, not_on_cuda: str, options: dict[str, Any]
) -> OpenedSession | str:
    """Open a model on OpenVINO or, for ``cuda`` and ``auto``, on CUDA; or return in one line why that is impossible."""
    if device == "openvino":
        name, title, provider = "openvino", "OpenVINO", OPENVINO_PROVIDER
        reason, threads = openvino_unavailable_reason(bfloat16=options["bfloat16"]), min(threads, schedulable_cpus())
    else:
        name, title, provider = "cuda", "CUDA", CUDA_PROVIDER
        reason = cuda_unavailable_reason() or not_on_cuda or None
    if reason is not None:
        return reason
    try:
        session = create_session(ort, model, provider, threads=threads, **options)
    except Exception as error:  # no common base class; if the model itself is invalid, the CPU session reports it
        return f"{title} works, but not for this model ({summarize_error(error)}); do: try another precision"
    if (nodes := fallback_nodes(session, provider)) is not None:
        return f"{title} leaves {nodes} to the CPU; do: choose precision fp32 or fp16"
    return OpenedSession(session, name, provider, "", threads)


def probe_devices() -> dict[str, str | None]:
    """Probe the CPU, and CUDA and OpenVINO if the installed wheel has them.

    Returns
    -------
    dict
        For each device None if it computed the expected numbers, otherwise one line that says why it is unavailable.

    Raises
    ------
    MissingExtraError
        onnxruntime is not installed.
    """
    providers = load_onnxruntime().get_available_providers()
    reasons = {"cpu": probe_provider(CPU_PROVIDER)}
    if CUDA_PROVIDER in providers:
        reasons["cuda"] = cuda_unavailable_reason()
    if OPENVINO_PROVIDER in providers:
        reasons["openvino"] = openvino_unavailable_reason()
    return reasons
