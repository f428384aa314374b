"""Execution providers of onnxruntime: session creation, a probe that computes, and where a model's nodes run.

onnxruntime answers two questions unreliably. Does a provider compute? `probe_provider` runs ``PROBE_MODEL`` on it and
compares the numbers. Which provider runs the nodes? A session that lists a provider first may still have assigned
every node to the CPU; see `fallback_nodes`.
"""

from __future__ import annotations

import contextlib
import json
from binascii import a2b_base64
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Final

import numpy as np

from echoquad_runtime.devices.device_lock import CUDA_LOCK
from echoquad_runtime.devices.error_summary import summarize_error
from echoquad_runtime.devices.onnxruntime_loader import load_onnxruntime
from echoquad_runtime.devices.output_suppression import suppress_python_output

if TYPE_CHECKING:
    import onnxruntime

__all__ = [
    "CPU_PROVIDER",
    "CUDA_PROVIDER",
    "OPENVINO_PROVIDER",
    "PROBE_MODEL",
    "create_session",
    "fallback_nodes",
    "integers_overflow",
    "needs_exact_products",
    "probe_provider",
    "quiet_logger",
]

CPU_PROVIDER: Final = "CPUExecutionProvider"
CUDA_PROVIDER: Final = "CUDAExecutionProvider"
OPENVINO_PROVIDER: Final = "OpenVINOExecutionProvider"

SPIN_MICROSECONDS: Final = 250
"""How long threads busy-wait after the last work: longer than the pauses within an inference and between two in a row.

A thread that sleeps may wake on the caller's core and wait there for the scheduler, 4 ms on Linux. That is twice the
time of a small int8 graph. Stopping threads at the end of each run (``session.force_spinning_stop``) costs it often.
"""

# y = 2 x + 1 on float32 [1, 1, 2, 2], as a 1 x 1 convolution: onnxruntime loads cuDNN only to run one.
PROBE_MODEL: Final = a2b_base64(
    "CAgSCGVjaG9xdWFkOnkKEgoBeAoBdwoBYhIBeSIEQ29udhIFcHJvYmUqEwgBCAEIAQgBEAEiBAAAAEBCAXcqDQgBEAEiBAAAgD9C"
    "AWJaGwoBeBIWChQIARIQCgIIAQoCCAEKAggCCgIIAmIbCgF5EhYKFAgBEhAKAggBCgIIAQoCCAIKAggCQgQKABAR"
)

# y = x w on uint8 [1, 8] and int8 [8, 4], all weights 127: the sum of two products overflows 16 bits.
_INTEGER_MODEL: Final = a2b_base64(
    "CAgSCGVjaG9xdWFkOngKGAoBeAoBdxIBeSINTWF0TXVsSW50ZWdlchIFcHJvYmUqKwgICAQQA0IBd0ogf39/f39/f39/f39/f39/f39/"
    "f39/f39/f39/f39/f39aEwoBeBIOCgwIAhIICgIIAQoCCAhiEwoBeRIOCgwIBhIICgIIAQoCCARCBAoAEBI="
)
_QUANTIZED_OPERATOR: Final = b"QuantizeLinear"  # occurs in the bytes of every int8 graph


def create_session(
    ort: ModuleType,
    model: bytes,
    provider: str,
    *,
    threads: int,
    spinning: bool = True,
    bfloat16: bool = False,
    cuda_options: Mapping[str, str] | None = None,
    exact: bool | None = None,
    adapt: Callable[[onnxruntime.SessionOptions], object] | None = None,
) -> onnxruntime.InferenceSession:
    """Create an inference session on a provider; the CPU runs the nodes that CUDA or OpenVINO does not support.

    Parameters
    ----------
    ort
        The onnxruntime package.
    model
        Bytes of an ONNX file.
    provider
        onnxruntime's name of the execution provider.
    threads
        CPU threads of an operator.
    spinning
        Whether those threads busy-wait for work during an inference, and for `SPIN_MICROSECONDS` after it; then they
        sleep. onnxruntime's default keeps a core busy between two frames of a live source. onnxruntime before 1.26
        cannot limit the time, so threads do not spin there. OpenVINO ignores this option.
    bfloat16
        Whether OpenVINO computes a float32 graph in bfloat16; other providers ignore it.
    cuda_options
        Options of the CUDA provider under onnxruntime's names, such as ``prefer_nhwc``; other providers ignore them.
        Unless ``use_tf32`` is set, float32 is computed in float32.
    exact
        Whether to use slower, exact integer products; None calls `needs_exact_products`.
    adapt
        Called with the session options before the session is created.

    Raises
    ------
    RuntimeError
        onnxruntime created the session on another provider.
    Exception
        Any exception of onnxruntime; its exceptions share no base class.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4
    if needs_exact_products(model) if exact is None else exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
    if spinning and _limits_spinning(ort):
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_MICROSECONDS))
    else:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers: list[str | tuple[str, dict[str, str]]] = [provider]
    if provider == CUDA_PROVIDER:
        # From Ampere on, onnxruntime's default rounds float32 to TF32: precision fp32 would not be float32.
        providers = [(CUDA_PROVIDER, {"use_tf32": "0", **(cuda_options or {})}), CPU_PROVIDER]
    elif provider == OPENVINO_PROVIDER:
        providers = [(OPENVINO_PROVIDER, _openvino_options(threads, bfloat16)), CPU_PROVIDER]
        options.intra_op_num_threads = 1  # OpenVINO has its own threads; these would be idle
    if provider != CPU_PROVIDER:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if adapt is not None:
        adapt(options)
    with (
        quiet_logger(ort),
        contextlib.nullcontext() if provider == CPU_PROVIDER else suppress_python_output(),
        CUDA_LOCK.exclusive() if provider == CUDA_PROVIDER else contextlib.nullcontext(),
    ):
        session = ort.InferenceSession(bytes(model), options, providers=providers, enable_fallback=0)
    session.disable_fallback()  # onnxruntime 1.20 ignores the argument
    if (actual := session.get_providers()[0]) != provider:
        raise RuntimeError(f"onnxruntime created a session on {actual}; expected {provider}")
    return session


def _limits_spinning(ort: ModuleType) -> bool:
    major, minor = ort.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (1, 26)


@contextlib.contextmanager
def quiet_logger(ort: ModuleType) -> Iterator[None]:
    """Silence onnxruntime's process-wide logger, which session options do not control.

    It reports providers that fail to load and, on CUDA, every kernel that cuDNN tries and rejects.
    """
    ort.set_default_logger_severity(4)
    try:
        yield
    finally:
        ort.set_default_logger_severity(2)  # the default; onnxruntime has no getter for the previous level


def needs_exact_products(model: bytes) -> bool:
    """Return whether a graph computes in integers on a processor whose fast integer products overflow."""
    return _QUANTIZED_OPERATOR in model and integers_overflow()


@cache
def integers_overflow() -> bool:
    """Return whether onnxruntime's fastest integer products overflow on this processor; measured once, on a tiny graph.

    On x86 without VNNI, products of uint8 and int8 are accumulated in 16 bits. An overflow would change decisions
    compared with the machine on which the export measured parity.
    """
    ort = load_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(_INTEGER_MODEL, options, providers=[CPU_PROVIDER])
    product = np.asarray(session.run(None, {"x": np.full((1, 8), 255, np.uint8)})[0])
    return bool((product != 8 * 255 * 127).any())


def _openvino_options(threads: int, bfloat16: bool) -> dict[str, str]:
    """Return OpenVINO's provider options: the CPU device, exactly `threads` threads, and an explicit precision."""
    settings = {
        # Explicit, because OpenVINO's default is bfloat16 on processors that support it.
        "INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": str(threads),
        # Without it the latency hint uses at most one thread per core, whatever INFERENCE_NUM_THREADS is.
        "ENABLE_HYPER_THREADING": "YES",
        # Pinning binds threads to the first CPUs: two processes would share these while the others are idle.
        "ENABLE_CPU_PINNING": "NO",
    }
    return {"device_type": "CPU", "load_config": json.dumps({"CPU": settings})}


def probe_provider(provider: str, *, bfloat16: bool = False) -> str | None:
    """Run ``PROBE_MODEL`` on a provider and compare the result; return the failure in one line, or None.

    One input value needs more mantissa bits than bfloat16 has. The probe therefore also fails if float32 is not
    computed in float32 and, with `bfloat16` (OpenVINO only), if bfloat16 is not computed in bfloat16.

    Raises
    ------
    MissingExtraError
        onnxruntime is not installed.
    """
    ort = load_onnxruntime()
    frame = np.array([[[[0.0, 1.0 + 2.0**-9], [-2.0, 0.5]]]], dtype=np.float32)
    expected = 2.0 * frame + 1.0
    if bfloat16:
        expected[0, 0, 0, 1] = 3.0  # 1 + 2^-9 rounds to 1 in bfloat16
    try:
        session = create_session(ort, PROBE_MODEL, provider, threads=1, bfloat16=bfloat16)
        computed = np.asarray(session.run(None, {"x": frame})[0])
    except Exception as error:  # onnxruntime's exceptions share no base class
        return summarize_error(error)
    if computed.shape != expected.shape or not np.allclose(computed, expected, rtol=0.0, atol=1e-6):
        return f"{provider} computed {computed.ravel().tolist()}; expected {expected.ravel().tolist()}"
    return None


def fallback_nodes(session: onnxruntime.InferenceSession, provider: str) -> str | None:
    """Describe the nodes that fell back to another provider if they are the majority.

    Returns
    -------
    str or None
        For example ``"21 of the model's 40 nodes (Add, QLinearConv)"``; None if most nodes run on `provider`, and with
        onnxruntime before 1.24, which does not report the assignment.
    """
    assignment = getattr(session, "get_provider_graph_assignment_info", tuple)
    nodes = [(part.ep_name, node.op_type) for part in assignment() for node in part.get_nodes()]
    fallback = [operator for assigned, operator in nodes if assigned != provider]
    if 2 * len(fallback) <= len(nodes):
        return None
    return f"{len(fallback)} of the model's {len(nodes)} nodes ({', '.join(sorted(set(fallback)))})"
