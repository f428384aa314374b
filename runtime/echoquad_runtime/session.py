"""Engines: what turns quadrants into logits and probabilities. `OnnxEngine` is the one that ships."""

from __future__ import annotations

from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from echoquad_runtime.bundle import BF16, Bundle
from echoquad_runtime.contract import Contract
from echoquad_runtime.devices import Device, open_session
from echoquad_runtime.errors import BundleError
from echoquad_runtime.lanes import BoundLane, Floats, Lane, PlainLane, replay
from echoquad_runtime.onnx_scan import CONTRACT_KEY, INPUT, OUTPUTS, cam_sides, check_graph
from echoquad_runtime.wheels import load_onnxruntime, one_line

__all__ = ["CONTRACT_KEY", "INPUT", "OUTPUTS", "Engine", "Floats", "OnnxEngine", "infer_all", "open_lane"]

_MANY: Final = 1 << 30


class Engine(Protocol):
    """What a predictor needs of a model, whatever runs it.

    Attributes
    ----------
    contract
        What the model was trained under.
    device
        What it really runs on: ``cpu``, ``cuda``, ``openvino``.
    precision
        What it really computes in: ``fp32``, ``bf16``.
    note
        One line saying why ``auto`` settled for that device; empty where there is nothing to say.
    """

    contract: Contract
    device: str
    precision: str
    note: str

    def infer(self, quadrants: npt.NDArray[np.uint8]) -> tuple[Floats, Floats]:
        """Give logits and probabilities, float32 [N, C], for quadrants, uint8 [N, 1, S, S]."""
        ...


class OnnxEngine:
    """A bundle's graph in an onnxruntime session.

    Parameters
    ----------
    bundle
        Where the graph comes from; its bytes are hashed before they are loaded.
    precision
        One that the bundle holds; None is its default. ``bf16`` is the fp32 graph computed in bfloat16, on
        OpenVINO alone.
    device
        ``auto``, ``cpu``, ``cuda`` or ``openvino``; see :func:`~echoquad_runtime.devices.open_session`.
    threads
        Threads of one inference; None is what affinity and cgroup allow.
    spinning
        Whether they wait for their part of an inference in a busy loop: quicker, and never between inferences.
    cuda_graphs
        Whether CUDA shall capture each bucket's kernels once and replay them; of no effect elsewhere.
    cam
        Whether lanes shall give class activation maps as well.

    Attributes
    ----------
    provider
        onnxruntime's name of what runs, such as ``CPUExecutionProvider``.
    at_once
        Lanes that may run at the same time: on the CPU as many as there are, since each runs on its caller's thread;
        two on CUDA, so that one is copied while the other is computed.
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
    UsageError
        If `precision` is ``bf16`` and `device` another than ``openvino``.
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
        cam: bool = False,
    ) -> None:
        self.contract = bundle.contract
        self.precision = bundle.choose_precision(precision)
        self.spinning = spinning
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
            cuda_graphs=cuda_graphs,
            cached_as=bundle.cached_as(self.precision),
        )
        self.device, self.provider = opened.device, opened.provider
        self.note, self.threads = opened.note, opened.threads
        self._session = opened.session
        self._cuda_graphs = cuda_graphs and self.device == "cuda"
        # A run of any shape, from memory of any address, is nothing to capture.
        self._options = replay(load_onnxruntime(), -1) if self._cuda_graphs else None
        self.at_once = {"cpu": _MANY, "cuda": 1 if self._cuda_graphs else 2}.get(self.device, 1)

    def lane(self, frames: int) -> BoundLane:
        """Make a lane with room for `frames` frames.

        Raises
        ------
        BundleError
            From its run, as `infer`.
        """
        try:
            return BoundLane(
                self._session,
                self.contract,
                frames,
                fault=self._fault,
                provider=self.provider,
                cuda_graphs=self._cuda_graphs,
                cam=self._cam,
            )
        except Exception as error:  # onnxruntime's share no base; among them, memory that does not suffice
            raise self._fault(4 * frames, error) from error

    def infer(self, quadrants: npt.NDArray[np.uint8]) -> tuple[Floats, Floats]:
        """Run the graph once.

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
            If onnxruntime cannot run the graph, or it gives other answers than it declares.
        """
        try:
            logits, probabilities = self._session.run(OUTPUTS, {INPUT: quadrants}, self._options)
        except Exception as error:  # onnxruntime's share no base; among them, memory that does not suffice
            raise self._fault(len(quadrants), error) from error
        # What a graph declares onnxruntime takes for a hint; an answer of another shape would be read as another.
        expected = (len(quadrants), len(self.contract.classes))
        for name, answer in zip(OUTPUTS, (logits, probabilities), strict=True):
            if answer.shape != expected or answer.dtype != np.float32:
                found = f"{answer.dtype} {answer.shape}"
                raise BundleError(f"{self._what} gives {name} {found}; expected float32 {expected}; export it again")
        return logits, probabilities

    def _fault(self, quadrants: int, error: Exception) -> BundleError:
        return BundleError(
            f"{self._what} fails on {self.device} with {quadrants} quadrants ({one_line(error)}); "
            "try a smaller batch size, and run echoquad verify"
        )


def open_lane(engine: Engine, frames: int) -> Lane:
    """Make a lane of any engine: one with memory of its own bound to a session where the engine has such."""
    if isinstance(engine, OnnxEngine):
        return engine.lane(frames)
    return PlainLane(engine.infer, engine.contract, frames)


def infer_all(engine: Engine, quadrants: npt.NDArray[np.uint8], batch_size: int) -> tuple[Floats, Floats]:
    """Run frames' quadrants, uint8 [F, 4, S, S] or [F, 4, 1, S, S], through an engine, `batch_size` frames at a time.

    Returns
    -------
    logits, probabilities
        float32 [F * 4, C] each.
    """
    size = quadrants.shape[-1]
    parts = [
        engine.infer(np.ascontiguousarray(quadrants[start : start + batch_size]).reshape(-1, 1, size, size))
        for start in range(0, len(quadrants), batch_size)
    ]
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
