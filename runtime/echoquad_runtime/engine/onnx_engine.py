"""The onnxruntime engine: a bundle's graph in a session, and the inference slots that run it."""

from __future__ import annotations

import itertools
import threading
from typing import Final

import numpy as np
import numpy.typing as npt

from echoquad_runtime.bundle.bundle import BF16, TF32, Bundle
from echoquad_runtime.bundle.onnx_header import CONTRACT_KEY, INPUT, OUTPUTS, cam_sides, check_graph
from echoquad_runtime.devices.onnxruntime_loader import one_line
from echoquad_runtime.devices.session_factory import Device, open_session
from echoquad_runtime.engine.io_binding import FirstRuns, FloatArray, IoBinding, new_batch
from echoquad_runtime.engine.slot_pool import Engine
from echoquad_runtime.errors import BundleError, UsageError

__all__ = ["CONTRACT_KEY", "INPUT", "OUTPUTS", "Engine", "FloatArray", "OnnxEngine"]

_MANY: Final = 1 << 30


class OnnxEngine:
    """A bundle's graph in an onnxruntime session.

    Parameters
    ----------
    bundle
        Where the graph comes from; its bytes are hashed before they are loaded.
    precision
        One that the bundle holds; None is its default. ``bf16`` is the fp32 graph computed in bfloat16, on
        OpenVINO alone; ``tf32`` is the fp32 graph computed in TF32, on CUDA alone.
    device
        ``auto``, ``cpu``, ``cuda`` or ``openvino``; see :func:`~echoquad_runtime.devices.session_factory.open_session`.
    threads
        Threads of one inference; None is what affinity and cgroup allow.
    spinning
        Whether they wait for their part of an inference in a busy loop: quicker, and never between inferences.
    cuda_graphs
        Whether CUDA captures each bucket's kernels once and replays them; of no effect elsewhere.
    nhwc
        Whether CUDA computes convolutions with the channels last in memory; of no effect elsewhere.
    cam
        Whether slots return class activation maps as well.

    Attributes
    ----------
    provider
        onnxruntime's name of what runs, such as ``CPUExecutionProvider``.
    turns
        Held by a slot while it runs: on the CPU by any number, since each runs on its caller's thread; by two on CUDA,
        so that one copies while the other computes; by one with CUDA graphs, and on OpenVINO.
    note
        One line saying why ``auto`` settled for the CPU; empty where there is nothing to say.
    threads
        How many there really are.

    Raises
    ------
    BundleError
        If the bundle lacks the precision, was changed, its graph is not of the shape it must have, or has no maps
        where they are asked for.
    DeviceUnavailableError
        If `device` is not there, or cannot compute this graph in this precision.
        Also if `precision` is ``int8`` and `device` is ``cuda``, which has no integer convolutions.
    UsageError
        If `precision` is ``bf16`` and `device` another than ``openvino``, or ``tf32`` and another than ``cuda``.
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
                f"precision tf32 is computed on device cuda alone; found device {device}; "
                "do: ask for device cuda, or for another precision"
            )
        self._what = f"{bundle.folder.as_posix()}: the {self.precision} graph"

        self._cam: tuple[int, int] | None = None

        def read() -> bytes:
            model = bundle.read_model(self.precision)
            graph = check_graph(model, self.contract, self._what)
            if cam:
                self._cam = cam_sides(graph, self._what)
            return model

        opened = open_session(
            read,
            device=device,
            threads=threads,
            spinning=spinning,
            bfloat16=self.precision == BF16,
            cuda_options={
                "use_tf32": str(int(self.precision == TF32)),
                **({"enable_cuda_graph": "1"} if cuda_graphs else {}),
                **({"prefer_nhwc": "1"} if nhwc else {}),
            },
            not_on_cuda=_int8_on_cuda(bundle) if self.precision == "int8" else "",
            cached_as=bundle.cached_as(self.precision),
        )
        self.device, self.provider = opened.device, opened.provider
        self.note, self.threads = opened.note, opened.threads
        self._session = opened.session
        self._first_runs = FirstRuns(self.provider)
        graphs = cuda_graphs and self.device == "cuda"
        self._graph_ids = itertools.count(1) if graphs else None
        self.turns = threading.Semaphore({"cpu": _MANY, "cuda": 1 if graphs else 2}.get(self.device, 1))

    def open_slot(self, frames: int) -> IoBinding:
        """Open an inference slot for up to `frames` frames.

        Raises
        ------
        BundleError
            If there is no memory for it. Its runs raise it if onnxruntime cannot run the graph, or the graph gives
            other answers than it declares.
        """
        try:
            return IoBinding(
                self._session,
                self.contract,
                frames,
                fault=self._fault,
                provider=self.provider,
                first_runs=self._first_runs,
                graph_ids=self._graph_ids,
                cam=self._cam,
            )
        except Exception as error:  # onnxruntime's share no base; among them, memory that does not suffice
            raise self._fault(4 * frames, error) from error

    def infer(self, quadrants: npt.NDArray[np.uint8]) -> tuple[FloatArray, FloatArray]:
        """Run quadrants once, through a slot that is opened for them; a `SlotPool` keeps its slots.

        Parameters
        ----------
        quadrants
            uint8 [N, 1, S, S], grey levels 0 to 255.

        Returns
        -------
        logits, probabilities
            float32 [N, C] each; a row of probabilities sums to 1.

        Raises
        ------
        BundleError
            As `open_slot` and its runs.
        """
        count, frames = len(quadrants), -(-len(quadrants) // 4)
        batch = new_batch(self.contract, frames)
        batch.reshape(-1, *batch.shape[2:])[:count] = quadrants
        logits, probabilities, _ = self.open_slot(frames).run(batch, frames)
        classes = len(self.contract.classes)
        return logits.reshape(-1, classes)[:count], probabilities.reshape(-1, classes)[:count]

    def _fault(self, quadrants: int, error: Exception) -> BundleError:
        return BundleError(
            f"{self._what} fails on {self.device} with {quadrants} quadrants ({one_line(error)}); "
            "try a smaller batch size, and run echoquad verify"
        )


def _int8_on_cuda(bundle: Bundle) -> str:
    """Return why an int8 graph does not run on CUDA, and which precision of the bundle does."""
    better = [name for name in ("fp16", "fp32") if name in bundle.precisions]
    # onnxruntime's CUDA provider converts the weights back to float32 in every run: on an NVIDIA H100 a ResNet-18 took
    # 1.2 to 1.3 times as long as in fp32.
    return "CUDA has no integer convolutions, so int8 is slower there than fp32; do: " + (
        f"choose precision {better[0]}" if better else "export with --precision fp16"
    )
