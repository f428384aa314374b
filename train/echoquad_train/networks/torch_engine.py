"""The training code as an engine: what an exported graph is held against."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from echoquad_runtime.contract import Contract
from echoquad_runtime.engine.io_binding import FloatArray
from echoquad_train.networks.device import make_deterministic

__all__ = ["TorchEngine"]


class TorchEngine:
    """A run's or an ensemble's model in eager PyTorch, float32; the calls of `OnnxEngine`."""

    precision = "fp32"
    note = ""

    def __init__(self, model: nn.Module, contract: Contract, device: torch.device | None = None) -> None:
        where = device or torch.device("cpu")
        make_deterministic(where)
        self.contract = contract
        self.device = where.type
        self._where = where
        self._model = model.to(where).eval()

    @torch.inference_mode()
    def infer(self, quadrants: npt.NDArray[np.uint8]) -> tuple[FloatArray, FloatArray]:
        """Give logits and probabilities, float32 [N, C], for quadrants, uint8 [N, 1, S, S]."""
        logits, probabilities = self.infer_on_device(torch.from_numpy(quadrants).to(self._where))
        return logits.cpu().numpy(), probabilities.cpu().numpy()

    @torch.inference_mode()
    def infer_on_device(self, quadrants: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the same as tensors, for quadrants on the device; does not wait for the device."""
        logits = self._model(quadrants).float()
        return logits, torch.softmax(logits / self.contract.temperature, dim=1)
