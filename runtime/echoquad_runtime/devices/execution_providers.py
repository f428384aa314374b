"""Sessions on one of onnxruntime's providers, and the two questions that it does not answer by itself.

Whether a provider computes: ``PROBE_MODEL`` is run on it and the numbers are looked at. Where a model's nodes
went: a session that lists a provider first may have given every node to the CPU.
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
from echoquad_runtime.devices.onnxruntime_loader import load_onnxruntime, one_line, silent_python

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
    "probe",
    "quiet_logger",
]

CPU_PROVIDER: Final = "CPUExecutionProvider"
CUDA_PROVIDER: Final = "CUDAExecutionProvider"
OPENVINO_PROVIDER: Final = "OpenVINOExecutionProvider"

# y = 2 x + 1 on float32 [1, 1, 2, 2], as a 1 x 1 convolution: cuDNN is loaded only when one runs.
PROBE_MODEL: Final = a2b_base64(
    "CAgSCGVjaG9xdWFkOnkKEgoBeAoBdwoBYhIBeSIEQ29udhIFcHJvYmUqEwgBCAEIAQgBEAEiBAAAAEBCAXcqDQgBEAEiBAAAgD9C"
    "AWJaGwoBeBIWChQIARIQCgIIAQoCCAEKAggCCgIIAmIbCgF5EhYKFAgBEhAKAggBCgIIAQoCCAIKAggCQgQKABAR"
)

# y = x w on uint8 [1, 8] and int8 [8, 4], every weight 127: sums of two products that do not fit into 16 bits.
_INTEGER_MODEL: Final = a2b_base64(
    "CAgSCGVjaG9xdWFkOngKGAoBeAoBdxIBeSINTWF0TXVsSW50ZWdlchIFcHJvYmUqKwgICAQQA0IBd0ogf39/f39/f39/f39/f39/f39/"
    "f39/f39/f39/f39/f39aEwoBeBIOCgwIAhIICgIIAQoCCAhiEwoBeRIOCgwIBhIICgIIAQoCCARCBAoAEBI="
)
_INTEGERS: Final = b"QuantizeLinear"  # in the bytes of every graph that computes in integers


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
    """Make a session on a provider; beside CUDA and OpenVINO, the CPU takes the nodes that they do not.

    Parameters
    ----------
    ort
        The onnxruntime package.
    model
        An ONNX file's bytes.
    provider
        onnxruntime's name of it.
    threads
        CPU threads inside an operator.
    spinning
        Whether they wait for their part of an inference in a busy loop. Between inferences they sleep, always: left to
        itself onnxruntime spins on after each, and burns a core between two frames of a live source. OpenVINO has
        threads of its own and does not care.
    bfloat16
        Whether OpenVINO shall compute a float32 graph in bfloat16; of no effect elsewhere.
    cuda_options
        Options of the CUDA provider, by onnxruntime's names, such as ``prefer_nhwc``; of no effect elsewhere. Without
        ``use_tf32`` float32 is float32.
    exact
        Whether integer products are to be exact, at the price of speed; None is `needs_exact_products`.
    adapt
        What else to do with the session's options.

    Raises
    ------
    RuntimeError
        The session is on another provider.
    Exception
        Whatever onnxruntime raises; its exceptions share no base.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4
    if needs_exact_products(model) if exact is None else exact:
        options.add_session_config_entry("session.x64quantprecision", "1")
    if not spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    else:
        options.add_session_config_entry("session.force_spinning_stop", "1")  # when a run ends
    providers: list[str | tuple[str, dict[str, str]]] = [provider]
    if provider == CUDA_PROVIDER:
        # Left to itself onnxruntime rounds float32 to TF32 from Ampere on, and precision fp32 would not be fp32.
        providers = [(CUDA_PROVIDER, {"use_tf32": "0", **(cuda_options or {})}), CPU_PROVIDER]
    elif provider == OPENVINO_PROVIDER:
        providers = [(OPENVINO_PROVIDER, _openvino_options(threads, bfloat16)), CPU_PROVIDER]
        options.intra_op_num_threads = 1  # OpenVINO has its own, and these would idle beside them
    if provider != CPU_PROVIDER:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if adapt is not None:
        adapt(options)
    with (
        quiet_logger(ort),
        contextlib.nullcontext() if provider == CPU_PROVIDER else silent_python(),
        CUDA_LOCK.alone() if provider == CUDA_PROVIDER else contextlib.nullcontext(),
    ):
        session = ort.InferenceSession(bytes(model), options, providers=providers, enable_fallback=0)
    session.disable_fallback()  # onnxruntime 1.20 ignores the argument
    if (made := session.get_providers()[0]) != provider:
        raise RuntimeError(f"asked for {provider}, onnxruntime made a session on {made}")
    return session


@contextlib.contextmanager
def quiet_logger(ort: ModuleType) -> Iterator[None]:
    """Silence onnxruntime's process-wide logger, which a session's options do not reach.

    It reports a provider that cannot be loaded, and on CUDA each kernel that cuDNN tries and that does not apply.
    """
    ort.set_default_logger_severity(4)
    try:
        yield
    finally:
        ort.set_default_logger_severity(2)  # its default; it cannot be asked what it was


def needs_exact_products(model: bytes) -> bool:
    """Say whether a graph computes in integers, and this processor needs the slower way to do that right."""
    return _INTEGERS in model and integers_overflow()


@cache
def integers_overflow() -> bool:
    """Say whether onnxruntime's fastest integer products are wrong on this processor: a tiny one is tried, once.

    On x86 without VNNI, uint8 times int8 is added up in 16 bits, which can overflow, and a graph of integers would
    decide otherwise than on the machine that it was proved on.
    """
    ort = load_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(_INTEGER_MODEL, options, providers=[CPU_PROVIDER])
    product = np.asarray(session.run(None, {"x": np.full((1, 8), 255, np.uint8)})[0])
    return bool((product != 8 * 255 * 127).any())


def _openvino_options(threads: int, bfloat16: bool) -> dict[str, str]:
    """Return OpenVINO's options: on the CPU, exactly so many threads, in the precision that is told."""
    settings = {
        # Said, not left to a default: OpenVINO's own is bfloat16 wherever a processor has it.
        "INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": str(threads),
        # For latency it would take one thread a core at most, however many are asked for.
        "ENABLE_HYPER_THREADING": "YES",
        # It would tie its threads to the first CPUs: two processes would share these, the others being idle.
        "ENABLE_CPU_PINNING": "NO",
    }
    return {"device_type": "CPU", "load_config": json.dumps({"CPU": settings})}


def probe(provider: str, *, bfloat16: bool = False) -> str | None:
    """Run ``PROBE_MODEL`` on a provider; None when it gave the right numbers, else one line on what happened.

    One number of its input has more digits than bfloat16 keeps. So float32 that is not float32 is told, and
    with `bfloat16`, for OpenVINO, bfloat16 that is not bfloat16.

    Raises
    ------
    MissingExtraError
        onnxruntime is not installed.
    """
    ort = load_onnxruntime()
    frame = np.array([[[[0.0, 1.0 + 2.0**-9], [-2.0, 0.5]]]], dtype=np.float32)
    expected = 2.0 * frame + 1.0
    if bfloat16:
        expected[0, 0, 0, 1] = 3.0  # 8 bits of 1 + 2^-9 are 1
    try:
        session = create_session(ort, PROBE_MODEL, provider, threads=1, bfloat16=bfloat16)
        computed = np.asarray(session.run(None, {"x": frame})[0])
    except Exception as error:  # onnxruntime's exceptions share no base
        return one_line(error)
    if computed.shape != expected.shape or not np.allclose(computed, expected, rtol=0.0, atol=1e-6):
        return f"{provider} computed {computed.ravel().tolist()} where {expected.ravel().tolist()} is right"
    return None


def fallback_nodes(session: onnxruntime.InferenceSession, provider: str) -> str | None:
    """Name the nodes that went to another provider when they are the most, as ``QLinearConv`` beside CUDA.

    Returns
    -------
    str or None
        Such as ``"21 of the model's 40 nodes (Add, QLinearConv)"``; None where most are on `provider`, and
        where onnxruntime does not tell (before 1.24).
    """
    assignment = getattr(session, "get_provider_graph_assignment_info", tuple)
    nodes = [(part.ep_name, node.op_type) for part in assignment() for node in part.get_nodes()]
    elsewhere = [kind for where, kind in nodes if where != provider]
    if 2 * len(elsewhere) <= len(nodes):
        return None
    kinds = ", ".join(sorted(set(elsewhere)))
    return f"{len(elsewhere)} of the model's {len(nodes)} nodes ({kinds})"
