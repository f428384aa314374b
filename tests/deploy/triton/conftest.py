"""Bundles with a frame graph, and a reader of model repositories that does what Triton does with them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx", reason="needs the extra export")
pytest.importorskip("torch", reason="needs the extra export")
pytest.importorskip("tritonclient.grpc", reason="needs tritonclient[grpc]")

import onnx
import onnxruntime
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as model_config

from echoquad_export.graph.frame_graph import build_frame_graph
from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.manifest import encode_manifest, frame_graph_file

DATA_TYPES = {"TYPE_UINT8": np.uint8, "TYPE_INT64": np.int64, "TYPE_FP32": np.float32}


def add_frame_graph(folder: Path, change: Callable[[Any], None] = lambda model: None) -> Path:
    """Add the frame graph of each precision to a bundle, after `change` of the ONNX model; return the bundle."""
    bundle = Bundle(folder)
    for precision in bundle.precisions:
        model = onnx.load_model_from_string(build_frame_graph(bundle.read_model(precision), bundle.contract))
        change(model)
        data = model.SerializeToString(deterministic=True)
        name = frame_graph_file(precision)
        bundle.manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        (folder / name).write_bytes(data)
    (folder / "bundle.json").write_bytes(encode_manifest(bundle.manifest))
    return folder


@pytest.fixture
def framed(tmp_path: Path, make_tiny_bundle: Any) -> Path:
    """Return a bundle with frame graphs in three precisions; its tests may change it."""
    return add_frame_graph(make_tiny_bundle(tmp_path / "cart 7", precisions=("fp32", "fp16", "int8")))


def read_config(path: Path) -> Any:
    """Parse a configuration with the messages of Triton's own client."""
    return text_format.Parse(path.read_text("utf-8"), model_config.ModelConfig())


@dataclass
class StandInServer:
    """What Triton and its onnxruntime backend do with a model, read from their sources.

    Only what the configuration states is known: shapes are checked against it, the batch dimension is added to them,
    outputs are reshaped, and the warm-up runs at the start.
    """

    folder: Path
    config_name: str = ""
    ran: list[tuple[int, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        custom = self.folder / "configs" / f"{self.config_name}.pbtxt"
        self.config = read_config(custom if custom.is_file() else self.folder / "config.pbtxt")
        assert self.config.name == self.folder.name  # Triton refuses another name
        (version,) = self.config.version_policy.specific.versions
        model = (self.folder / str(version) / self.config.default_model_filename).read_bytes()
        self._session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        for sample in self.config.model_warmup:
            self._warm_up(sample)

    def _warm_up(self, sample: Any) -> None:
        tensors = {}
        for name, value in sample.inputs.items():
            data = (self.folder / "warmup" / value.input_data_file).read_bytes()
            dtype = np.dtype(DATA_TYPES[model_config.DataType.Name(value.data_type)])
            size = int(np.prod(value.dims)) * dtype.itemsize
            assert len(data) == size  # Triton accepts a longer file, and ignores its end
            one = np.frombuffer(data, dtype).reshape(([1] if self.config.max_batch_size else []) + list(value.dims))
            tensors[name] = np.concatenate([one] * sample.batch_size)
        self.infer(tensors)

    def infer(self, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run a batch; the shapes are those of the client."""
        batching = self.config.max_batch_size > 0
        given = {one.name: one for one in self.config.input}
        assert tensors.keys() == given.keys()
        for name, tensor in tensors.items():
            assert tensor.dtype == DATA_TYPES[model_config.DataType.Name(given[name].data_type)]
            shape = tensor.shape[1:] if batching else tensor.shape
            assert len(shape) == len(given[name].dims)
            assert all(wanted in (-1, side) for wanted, side in zip(given[name].dims, shape, strict=True))
            assert not batching or len(tensor) <= self.config.max_batch_size
            self.ran.append(tensor.shape)
        names = [one.name for one in self.config.output]
        found = dict(zip(names, self._session.run(names, tensors), strict=True))
        for output in self.config.output:
            tensor = found[output.name]
            assert tensor.dtype == DATA_TYPES[model_config.DataType.Name(output.data_type)]
            inner = list(output.reshape.shape) if output.HasField("reshape") else list(output.dims)
            shape = list(tensor.shape[1:] if batching else tensor.shape)
            assert len(inner) == len(shape) and all(a in (-1, b) for a, b in zip(inner, shape, strict=True))
            if output.HasField("reshape"):
                found[output.name] = tensor.reshape([len(tensor), *output.dims])
        return found

    def classify(self, scores: np.ndarray, output: str) -> list[str]:
        """Return ``SCORE:INDEX:LABEL`` of the first class, as Triton's classification extension does."""
        (file,) = [one.label_filename for one in self.config.output if one.name == output]
        labels = (self.folder / file).read_text("utf-8").splitlines()
        return [f"{row.max():f}:{row.argmax()}:{labels[row.argmax()]}" for row in scores.reshape(len(scores), -1)]
