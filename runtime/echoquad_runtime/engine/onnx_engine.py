"""The onnxruntime engine: a bundle's graph in an inference session, and the inference slots that run it."""

from __future__ import annotations

import itertools
import threading
from typing import Final

import numpy as np
import numpy.typing as npt

from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.manifest import BF16, TF32
from echoquad_runtime.bundle.onnx_header import cam_size, check_graph, has_typicality
from echoquad_runtime.devices.error_summary import summarize_error
from echoquad_runtime.devices.session_factory import Device, open_session
from echoquad_runtime.engine.io_binding import FirstRunLock, FloatArray, IoBinding, new_batch
from echoquad_runtime.errors import BundleError, UsageError

__all__ = ["OnnxEngine"]

_UNLIMITED: Final = 1 << 30


class OnnxEngine:
    """A bundle's graph in an onnxruntime session.

    Parameters
    ----------
    bundle
        The bundle; the bytes of its graph are hashed before they are loaded.
    precision
        A precision of the bundle; None for its default. ``bf16`` runs the fp32 graph in bfloat16 and requires
        OpenVINO; ``tf32`` runs the fp32 graph in TF32 and requires CUDA.
    device
        ``auto``, ``cpu``, ``cuda`` or ``openvino``; see :func:`~echoquad_runtime.devices.session_factory.open_session`.
    threads
        CPU threads of one inference; None for the number that CPU affinity and cgroup allow.
    spinning
        Whether those threads busy-wait during an inference, which is faster, and for 250 µs after it.
    cuda_graphs
        Whether CUDA captures the kernels of each bucket as a CUDA graph and replays it; other devices ignore it.
    nhwc
        Whether CUDA computes convolutions in channels-last layout; other devices ignore it.
    cam
        Whether slots also return class activation maps.

    Attributes
    ----------
    provider
        onnxruntime's name of the execution provider, such as ``CPUExecutionProvider``.
    run_limit
        A semaphore that a slot holds while it runs. It admits any number on the CPU, where each slot runs in its
        caller's thread; two on CUDA, so that one copies while the other computes; one with CUDA graphs and on OpenVINO.
    note
        One line that says why ``auto`` chose the CPU; empty if there is nothing to report.
    threads
        Actual number of CPU threads.
    typicality
        Whether the graph computes the typicality score.

    Raises
    ------
    BundleError
        If the bundle lacks the precision or was changed, if its graph has unexpected inputs or outputs, or if it has no
        class activation maps and `cam` is set.
    DeviceUnavailableError
        If `device` is unavailable or cannot compute this graph in this precision, also if `precision` is ``int8`` and
        `device` is ``cuda``, which has no integer convolutions.
    UsageError
        If `precision` is ``bf16`` and `device` is not ``openvino``, or ``tf32`` and not ``cuda``.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        precision: str | None = None,
        device: Device = "auto",
        threads: int | None = None,
        spinning: bool = True,
        cuda_graphs: bool = False,
        nhwc: bool = False,
        cam: bool = False,
    ) -> None:
        self.contract = bundle.contract
        self.precision = bundle.choose_precision(precision)
        self.spinning = spinning
        if self.precision == TF32 and device != "cuda":
            raise UsageError(
                f"precision tf32 requires device cuda; found device {device}; "
                "do: choose device cuda or another precision"
            )
        self._label = f"{bundle.folder.as_posix()}: the {self.precision} graph"
        self._cam: tuple[int, int] | None = None
        self.typicality = False

        def read_model() -> bytes:
            model = bundle.read_model(self.precision)
            header = check_graph(model, self.contract, self._label)
            self.typicality = has_typicality(header)
            if cam:
                self._cam = cam_size(header, self._label)
            return model

        opened = open_session(
            read_model,
            device=device,
            threads=threads,
            spinning=spinning,
            bfloat16=self.precision == BF16,
            cuda_options={
                "use_tf32": str(int(self.precision == TF32)),
                **({"enable_cuda_graph": "1"} if cuda_graphs else {}),
                **({"prefer_nhwc": "1"} if nhwc else {}),
            },
            not_on_cuda=_no_int8_on_cuda(bundle) if self.precision == "int8" else "",
            cache_key=bundle.cache_key(self.precision),
        )
        self.device, self.provider = opened.device, opened.provider
        self.note, self.threads = opened.note, opened.threads
        self._session = opened.session
        self._first_runs = FirstRunLock(self.provider)
        graphs = cuda_graphs and self.device == "cuda"
        self._graph_ids = itertools.count(1) if graphs else None
        self.run_limit = threading.Semaphore({"cpu": _UNLIMITED, "cuda": 1 if graphs else 2}.get(self.device, 1))

    def open_slot(self, frames: int) -> IoBinding:
        """Open an inference slot for up to `frames` frames.

        Raises
        ------
        BundleError
            If memory runs out. The slot's runs raise it if onnxruntime cannot run the graph, or if the graph's outputs
            differ from those that it declares.
        """
        try:
            return IoBinding(
                self._session,
                self.contract,
                frames,
                make_error=self._make_error,
                provider=self.provider,
                first_runs=self._first_runs,
                graph_ids=self._graph_ids,
                cam=self._cam,
                typicality=self.typicality,
            )
        except Exception as error:  # onnxruntime's exceptions, such as out of memory, share no base class
            raise self._make_error(4 * frames, error) from error

    def infer(self, quadrants: npt.NDArray[np.uint8]) -> tuple[FloatArray, FloatArray]:
        """Run quadrants once, in a new slot; a `SlotPool` reuses its slots.

        Parameters
        ----------
        quadrants
            uint8 [N, 1, S, S], grey levels 0 to 255.

        Returns
        -------
        logits, probabilities
            float32 [N, C] each; each row of probabilities sums to 1.

        Raises
        ------
        BundleError
            As in `open_slot`.
        """
        count, frames = len(quadrants), -(-len(quadrants) // 4)
        batch = new_batch(self.contract, frames)
        batch.reshape(-1, *batch.shape[2:])[:count] = quadrants
        logits, probabilities, *_ = self.open_slot(frames).run(batch, frames)
        classes = len(self.contract.classes)
        return logits.reshape(-1, classes)[:count], probabilities.reshape(-1, classes)[:count]

    def _make_error(self, quadrants: int, error: Exception) -> BundleError:
        """Build the exception for a failed inference."""
        return BundleError(
            f"{self._label} fails on {self.device} with {quadrants} quadrants ({summarize_error(error)}); "
            "try a smaller batch size, and run echoquad verify"
        )


def _no_int8_on_cuda(bundle: Bundle) -> str:
    """Return why an int8 graph does not run on CUDA, and which precision of the bundle does."""
    better = [name for name in ("fp16", "fp32") if name in bundle.precisions]
    # onnxruntime's CUDA provider converts the weights back to float32 in every run: on an NVIDIA H100 a ResNet-18 took
    # 1.2 to 1.3 times as long as in fp32.
    return "CUDA has no integer convolutions, so int8 is slower there than fp32; do: " + (
        f"choose precision {better[0]}" if better else "export with --precision fp16"
    )
