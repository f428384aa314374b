"""Torch engine: the PyTorch model behind the interface of `OnnxEngine`, as the reference of parity checks."""

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
    """Runs the model of a run or an ensemble in eager PyTorch, float32, with the methods of `OnnxEngine`."""

    precision = "fp32"
    note = ""

    def __init__(self, model: nn.Module, contract: Contract, device: torch.device | None = None) -> None:
        self._device = device or torch.device("cpu")
        make_deterministic(self._device)
        self.contract = contract
        self.device = self._device.type
        self._model = model.to(self._device).eval()

    @torch.inference_mode()
    def infer(self, quadrants: npt.NDArray[np.uint8]) -> tuple[FloatArray, FloatArray]:
        """Return logits and probabilities, float32 [N, C], for quadrants, uint8 [N, 1, S, S]."""
        logits, probabilities = self.infer_on_device(torch.from_numpy(quadrants).to(self._device))
        return logits.cpu().numpy(), probabilities.cpu().numpy()

    @torch.inference_mode()
    def infer_on_device(self, quadrants: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the same as tensors, for quadrants on the device, without waiting for the device."""
        logits = self._model(quadrants).float()
        return logits, torch.softmax(logits / self.contract.temperature, dim=1)
