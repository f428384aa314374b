"""Devices of torch: selection, mixed precision, deterministic algorithms."""

from __future__ import annotations

import os
from typing import Literal

import torch

from echoquad_runtime.errors import DeviceUnavailableError
from echoquad_train.networks.backbones import backbone_parts
from echoquad_train.recipe import Recipe

__all__ = ["Device", "autocast_dtype", "choose_device", "make_deterministic", "mixed_dtype"]

Device = Literal["auto", "cpu", "cuda"]

MIN_MIXED_SIZE = 17
"""Smallest input size for mixed precision. Below it layer4 starts on a 1x1 map, and oneDNN (torch 2.14, bfloat16)
leaves uninitialised memory in the gradient of weights that only see padding."""


def choose_device(device: Device) -> torch.device:
    """Return the torch device; ``auto`` is CUDA if it works, else the CPU.

    Raises
    ------
    DeviceUnavailableError
        If `device` is ``cuda`` and torch cannot compute on it.
    """
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        cause = (
            "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no working CUDA driver"
        )
        raise DeviceUnavailableError(
            f"--device cuda: {cause} (torch {torch.__version__}); expected an NVIDIA GPU with its driver; "
            "use --device cpu, or run `echoquad doctor`"
        )
    return torch.device("cuda")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype of mixed precision that the device computes natively; None if there is none."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else None


def mixed_dtype(recipe: Recipe, backbone: str, size: int, device: torch.device) -> torch.dtype | None:
    """Return a network's dtype of mixed precision; None if it is disabled, unsupported or slower than float32."""
    slower = device.type == "cpu" and not backbone_parts(backbone).mixed_on_cpu
    return autocast_dtype(device) if recipe.mixed_precision and size >= MIN_MIXED_SIZE and not slower else None


def make_deterministic(device: torch.device) -> None:
    """Make equal seeds give equal weights on this machine, and keep float32 exact on CUDA (no TF32)."""
    if device.type == "cuda":
        # cuBLAS reads it when it creates its first handle. https://docs.nvidia.com/cuda/cublas/#results-reproducibility
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
