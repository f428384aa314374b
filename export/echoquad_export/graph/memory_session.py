"""Inference sessions of graphs that are in memory and not on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from echoquad_runtime.devices.session_factory import open_session

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["open_in_memory"]


def open_in_memory(graph: bytes) -> onnxruntime.InferenceSession:
    """Open a graph that lies on no disk as the runtime opens one, on the CPU."""
    return open_session(graph, device="cpu").session
