"""Engines: what turns quadrants into logits and probabilities. `OnnxEngine` is the one that ships."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from echoquad_runtime.bundle import Bundle
from echoquad_runtime.contract import Contract
from echoquad_runtime.devices import Device, open_session
from echoquad_runtime.errors import BundleError

__all__ = ["CONTRACT_KEY", "INPUT", "OUTPUTS", "Engine", "Floats", "OnnxEngine"]

INPUT = "quadrants"
OUTPUTS = ("logits", "probabilities")
CONTRACT_KEY = "echoquad.contract"

Floats = npt.NDArray[np.float32]


class Engine(Protocol):
    """What a predictor needs of a model, whatever runs it.

    Attributes
    ----------
    contract
        What the model was trained under.
    device
        What it really runs on: ``cpu``, ``cuda``.
    precision
        What it really computes in: ``fp32``.
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
        One that the bundle holds; None is its default.
    device
        ``auto``, ``cpu`` or ``cuda``.
    threads
        Threads of one inference; None is what affinity and cgroup allow.

    Attributes
    ----------
    note
        One line saying why ``auto`` settled for the CPU; empty where there is nothing to say.

    Raises
    ------
    BundleError
        If the bundle lacks the precision, was changed, or its graph is not of the shape it must have.
    DeviceUnavailableError
        If `device` is not there.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        precision: str | None = None,
        device: Device = "auto",
        threads: int | None = None,
    ) -> None:
        self.contract = bundle.contract
        self.precision = bundle.choose_precision(precision)
        opened = open_session(bundle.read_model(self.precision), device=device, threads=threads)
        self.device, self.note = opened.device, opened.note
        self._session = opened.session
        self._check(bundle.folder.as_posix())

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
        """
        logits, probabilities = self._session.run(OUTPUTS, {INPUT: quadrants})
        return logits, probabilities

    def _check(self, label: str) -> None:
        """Refuse a graph that is not the manifest's, before it judges anything."""
        metadata = self._session.get_modelmeta().custom_metadata_map
        try:
            inside = Contract.from_json(metadata[CONTRACT_KEY]).sha256
        except (KeyError, ValueError):
            inside = "none"
        if inside != self.contract.sha256:
            raise BundleError(
                f"{label}: the {self.precision} graph carries contract {inside[:12]}, the manifest "
                f"{self.contract.sha256[:12]}; they do not belong together; export it again"
            )
        size, classes = self.contract.input_size, len(self.contract.classes)
        nodes = [*self._session.get_inputs(), *self._session.get_outputs()[: len(OUTPUTS)]]
        # Any name stands for a number of quadrants that is left open; a number would be the only batch that runs.
        found = [(o.name, o.type, [i if isinstance(i, int) else "N" for i in o.shape]) for o in nodes]
        expected: list[tuple[str, str, list[int | str]]] = [(INPUT, "tensor(uint8)", ["N", 1, size, size])]
        expected += [(name, "tensor(float)", ["N", classes]) for name in OUTPUTS]
        if found != expected:
            raise BundleError(f"{label}: the {self.precision} graph takes and gives {found}; expected {expected}")
