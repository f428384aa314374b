"""Export from PyTorch: outputs, versions, metadata, privacy and determinism of the graph."""

from __future__ import annotations

import copy
import getpass
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from echoquad_export.graph.build import IR_VERSION, OPSET, build_graph
from echoquad_export.graph.typicality import ReferenceEngine, fit_typicality
from echoquad_export.packing.exporter import REFERENCE_BATCH
from echoquad_export.precision.calibration_set import draw_calibration_set
from echoquad_runtime.bundle.onnx_header import CONTRACT_KEY, MAX_IR_VERSION, MAX_OPSET
from echoquad_runtime.contract import Contract
from echoquad_runtime.devices.onnxruntime_loader import load_onnxruntime
from echoquad_train.networks.classifier import QuadrantClassifier
from echoquad_train.networks.torch_engine import TorchEngine
from echoquad_train.runs.checkpoint import load_run

OTHER = Contract(("a", "b", "c"), positive="b", input_size=33, mean=0.31, std=0.22, temperature=1.7, vote="weighted")
MakeModel = Callable[[Contract], QuadrantClassifier]
Built = tuple[bytes, QuadrantClassifier, Contract]
_KNOWN: dict[str, Built] = {}


@pytest.fixture(params=["bundle", "nothing at its default"])
def built(request: pytest.FixtureRequest, thin: None, case: Any, thin_model: MakeModel) -> Built:
    """Return a graph, its model and its contract; each is built once."""
    if request.param == "bundle":
        run = load_run(case.run)
        return (case.bundle / "model.fp32.onnx").read_bytes(), run.model, run.contract
    if not _KNOWN:
        model = thin_model(OTHER)
        _KNOWN["other"] = build_graph(model, OTHER), model, OTHER
    return _KNOWN["other"]


def session(data: bytes) -> Any:
    return load_onnxruntime().InferenceSession(data, providers=["CPUExecutionProvider"])


def test_graph_has_the_documented_inputs_and_outputs(built: Built) -> None:
    data, _, contract = built
    opened, classes, size = session(data), len(contract.classes), contract.input_size
    (given,) = opened.get_inputs()
    assert (given.name, given.type, given.shape) == ("quadrants", "tensor(uint8)", ["N", 1, size, size])
    outputs = [(out.name, out.type, out.shape) for out in opened.get_outputs()]
    side = -(-size // 32)  # side of the thin ResNet's last feature map
    typicality = [("typicality", "tensor(float)", ["N", 4])]
    assert outputs == [
        ("logits", "tensor(float)", ["N", classes]),
        ("probabilities", "tensor(float)", ["N", classes]),
        *(typicality if contract != OTHER else []),
        ("cam", "tensor(float)", ["N", classes, side, side]),
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 64])
def test_graph_computes_what_the_training_code_computes(built: Built, count: int) -> None:
    data, model, contract = built
    size = contract.input_size
    quadrants = np.random.default_rng(count).integers(0, 256, (count, 1, size, size), np.uint8)
    quadrants[0] = 255
    logits, probabilities, *_ = session(data).run(None, {"quadrants": quadrants})
    expected = TorchEngine(model, contract).infer(quadrants)
    assert logits.dtype == probabilities.dtype == np.float32
    np.testing.assert_allclose(logits, expected[0], atol=2e-5)
    np.testing.assert_allclose(probabilities, expected[1], atol=1e-5)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
    if count > 3:
        assert np.ptp(logits, axis=0).min() > 0.05  # otherwise the comparison proves nothing


def test_opset_and_ir_version_are_pinned(built: Built) -> None:
    proto = onnx.load_from_string(built[0])
    assert (OPSET, IR_VERSION) == (18, 10) and proto.ir_version == 10
    assert (OPSET, IR_VERSION) == (MAX_OPSET, MAX_IR_VERSION)
    assert [(opset.domain, opset.version) for opset in proto.opset_import] == [("", 18)]
    assert proto.producer_name == "echoquad"
    onnx.checker.check_model(proto, full_check=True)
    assert {node.domain for node in proto.graph.node} == {""} and not proto.functions


def test_graph_has_no_external_data(built: Built) -> None:
    proto = onnx.load_from_string(built[0])
    for tensor in proto.graph.initializer:
        assert tensor.data_location == onnx.TensorProto.DEFAULT and not tensor.external_data


def test_metadata_holds_contract_and_hash(built: Built) -> None:
    data, _, contract = built
    metadata = session(data).get_modelmeta().custom_metadata_map
    assert Contract.from_json(metadata[CONTRACT_KEY]) == contract
    assert metadata["echoquad.contract_sha256"] == contract.sha256 == hashlib.sha256(
        metadata[CONTRACT_KEY].encode()
    ).hexdigest()  # fmt: skip
    assert set(metadata) == {CONTRACT_KEY, "echoquad.contract_sha256"}


def test_graph_contains_no_paths_or_names_of_the_machine(built: Built) -> None:
    data = built[0]
    places = {str(Path.home()), str(Path.cwd()), sys.prefix, str(Path(torch.__file__).parent), os.sep + "site-packages"}
    words = {place.encode() for place in places if len(place) > 3}
    words |= {b".py", b"stack_trace", b'File "', b"line ", b"namespace", b"pkg.torch", b"fx_node"}
    if len(user := getpass.getuser()) > 4:
        words.add(user.encode())
    assert [word for word in words if word in data] == []
    proto = onnx.load_from_string(data)
    assert not any(node.doc_string or node.metadata_props for node in proto.graph.node)


def test_graph_reads_one_grey_channel(built: Built) -> None:
    shapes = [list(tensor.dims) for tensor in onnx.load_from_string(built[0]).graph.initializer]
    assert [64, 1, 7, 7] in shapes and [64, 3, 7, 7] not in shapes
    kinds = {node.op_type for node in onnx.load_from_string(built[0]).graph.node}
    assert not kinds & {"Dropout", "Expand", "Tile"}


def test_build_graph_is_deterministic_and_leaves_the_model_unchanged(case: Any, thin: None) -> None:
    run = load_run(case.run)
    engine = ReferenceEngine(run.model, run.contract)
    fit_typicality(engine, draw_calibration_set(case.data, run.contract).quadrants, REFERENCE_BATCH)
    before = copy.deepcopy(run.model.state_dict())
    run.model.train()  # the deployed copy is in evaluation mode regardless
    assert build_graph(run.model, run.contract, engine.typicality) == (case.bundle / "model.fp32.onnx").read_bytes()
    assert run.model.training and run.model.backbone.conv1.in_channels == 3
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())


SCRIPT = """
import hashlib, torch
from echoquad_export.graph.build import build_graph
from echoquad_runtime.contract import Contract
from echoquad_train.networks.classifier import QuadrantClassifier
torch.manual_seed(0)
contract = Contract(("a", "b"), input_size=32)
print(hashlib.sha256(build_graph(QuadrantClassifier("resnet18", contract), contract)).hexdigest())
"""


@pytest.mark.slow
def test_two_processes_build_equal_graphs(tmp_path: Path) -> None:
    hashes = set()
    for seed in ("0", "1"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        (folder := tmp_path / seed).mkdir()
        command = [sys.executable, "-c", SCRIPT]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder, env=environment)
        hashes.add(done.stdout.strip())
        assert list(folder.iterdir()) == []
    assert len(hashes) == 1
