"""The model repository: read by Triton's protobuf, held against the graph, and run as Triton runs it."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image
from tritonclient.grpc import model_config_pb2 as proto

from echoquad_deploy.triton import repository
from echoquad_deploy.triton.model_config import MAX_QUEUED
from echoquad_deploy.triton.repository import MAX_BATCH, model_name, write_triton_model
from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.errors import BundleError, BundleTamperedError, OutputError, ParityError, UsageError
from echoquad_runtime.predict.predictor import Predictor

from .conftest import StandInServer, add_frame_graph, read_config

ONNX_TYPES = {
    onnx.TensorProto.UINT8: "TYPE_UINT8",
    onnx.TensorProto.INT64: "TYPE_INT64",
    onnx.TensorProto.FLOAT: "TYPE_FP32",
}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tensors_of(graph: bytes) -> tuple[dict[str, tuple[str, list[int]]], dict[str, tuple[str, list[int]]]]:
    """Return inputs and outputs of an ONNX file, read by onnx: type and shape, with -1 for a symbol."""
    model = onnx.load_model_from_string(graph)

    def read(values: Any) -> dict[str, tuple[str, list[int]]]:
        found = {}
        for value in values:
            tensor = value.type.tensor_type
            shape = [-1 if side.dim_param else side.dim_value for side in tensor.shape.dim]
            found[value.name] = (ONNX_TYPES[tensor.elem_type], shape)
        return found

    return read(model.graph.input), read(model.graph.output)


# ---------------------------------------------------------------------------------------------- the configuration


@pytest.mark.parametrize("name", ["config.pbtxt", "configs/gpu.pbtxt"])
def test_names_types_and_shapes_are_those_of_the_graph(framed: Path, tmp_path: Path, name: str) -> None:
    model = write_triton_model(Bundle(framed), tmp_path / "models")
    config = read_config(model.folder / name)
    graph = (model.folder / "1" / "model.onnx").read_bytes()
    inputs, outputs = tensors_of(graph)
    for stated, actual in ((config.input, inputs), (config.output, outputs)):
        assert [one.name for one in stated] == list(actual)
        for one in stated:
            dtype, (batch, *shape) = actual[one.name]
            assert proto.DataType.Name(one.data_type) == dtype
            assert batch == -1
            assert list(one.reshape.shape if one.HasField("reshape") else one.dims) == shape
            assert not one.HasField("reshape") or (list(one.dims), shape) == ([1], [])
    assert graph == (framed / "frame.fp32.onnx").read_bytes()
    assert (config.backend, config.default_model_filename) == ("onnxruntime", "model.onnx")


def test_batches_versions_instances_and_queue(framed: Path, tmp_path: Path) -> None:
    model = write_triton_model(Bundle(framed), tmp_path / "models")
    cpu, gpu = (read_config(model.folder / name) for name in ("config.pbtxt", "configs/gpu.pbtxt"))
    for config, kind in ((cpu, "KIND_CPU"), (gpu, "KIND_GPU")):
        assert [(proto.ModelInstanceGroup.Kind.Name(one.kind), one.count) for one in config.instance_group] == [
            (kind, 1)
        ]
        assert config.max_batch_size == MAX_BATCH == model.max_batch_size
        assert config.HasField("dynamic_batching")
        assert config.dynamic_batching.default_queue_policy.max_queue_size == MAX_QUEUED
        assert list(config.version_policy.specific.versions) == [1]
        config.ClearField("instance_group")
    assert cpu == gpu


def test_labels_and_parameters_name_the_bundle(framed: Path, tmp_path: Path) -> None:
    bundle = Bundle(framed)
    model = write_triton_model(bundle, tmp_path / "models")
    config = read_config(model.folder / "config.pbtxt")
    found = {key: value.string_value for key, value in config.parameters.items()}
    graph = (model.folder / "1" / "model.onnx").read_bytes()
    assert found["echoquad.bundle_sha256"] == bundle.manifest["manifest_sha256"]
    assert found["echoquad.contract_sha256"] == bundle.contract.sha256
    assert found["echoquad.graph_sha256"] == hashlib.sha256(graph).hexdigest()
    assert (found["echoquad.precision"], found["echoquad.vote"]) == ("fp32", "majority")
    assert found["echoquad.intended_use"].startswith("Research use only.")
    assert [one.name for one in config.output if one.label_filename] == ["probabilities"]
    assert (model.folder / "labels.txt").read_text("utf-8").splitlines() == ["ASD", "NORM"]


def test_line_break_in_a_class_name_shifts_no_label(tmp_path: Path, make_tiny_bundle: Any) -> None:
    bundle = add_frame_graph(make_tiny_bundle(tmp_path / "b", classes=("A\nB", "Z", "Ü ")))
    model = write_triton_model(Bundle(bundle), tmp_path / "models")
    assert (model.folder / "labels.txt").read_bytes().decode().split("\n") == ["A B", "Z", "Ü ", ""]


def test_warm_up_runs_golden_frames_and_a_full_batch(framed: Path, tmp_path: Path) -> None:
    model = write_triton_model(Bundle(framed), tmp_path / "models")
    server = StandInServer(model.folder)
    golden = {frame.tobytes(): frame.shape for frame in Bundle(framed).read_golden().frames}
    files = files_of(model.folder / "warmup")
    assert set(files.values()) <= golden.keys() and len(files) == len({golden[data] for data in files.values()}) > 3
    assert {shape[1:] for shape in server.ran} == {golden[data] for data in files.values()}
    largest = max(server.ran, key=lambda shape: shape[1] * shape[2])
    assert server.ran[-1] == (MAX_BATCH, *largest[1:])


def test_typicality_is_an_output_with_its_threshold(scored: Any, tmp_path: Path) -> None:
    model = write_triton_model(Bundle(add_frame_graph(scored.bundle)), tmp_path / "models")
    server = StandInServer(model.folder)
    threshold = float(server.config.parameters["echoquad.typicality_threshold"].string_value)
    assert threshold == scored.threshold
    frames = np.stack(scored.frames)
    found = server.infer({"frames": frames})["typicality"]
    expected = [Predictor(scored.bundle, device="cpu")(frame).typicality for frame in frames]
    assert found.shape == (10, 1)
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-3)


# ---------------------------------------------------------------------------------------------- the answers


@pytest.mark.parametrize("vote", ["majority", "average", "weighted"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_answers_are_those_of_predict(
    tmp_path: Path, make_tiny_bundle: Any, make_frame: Any, vote: str, precision: str
) -> None:
    folder = make_tiny_bundle(
        tmp_path / "bundle", precisions=("fp32", "int8"), vote=vote, vote_weights=(1.0, 0.5, 2.0, 0.25)
    )
    model = write_triton_model(Bundle(add_frame_graph(folder)), tmp_path / "models", precision)
    server = StandInServer(model.folder)
    frames = np.stack([make_frame(seed, 73, 91) for seed in range(MAX_BATCH)])
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"{index:02d}.png")
    answers = server.infer({"frames": frames})
    top = server.classify(answers["probabilities"], "probabilities")
    rows = tmp_path / "rows.csv"
    run_predict(folder, tmp_path, rows, precision)
    labels = ("ASD", "NORM")
    with rows.open(newline="") as stream:
        found = list(csv.DictReader(stream))
    assert len(found) == len(frames)
    for index, row in enumerate(found):
        assert row["pred_image"] == labels[answers["label"][index, 0]]
        assert [row[f"pred_{q}"] for q in ("LA", "RA", "LV", "RV")] == [labels[v] for v in answers["votes"][index]]
        assert float(row["prob_ASD"]) == pytest.approx(float(answers["probabilities"][index, 0]), abs=1e-4)
        assert float(row["p_RV_NORM"]) == pytest.approx(float(answers["quadrant_probabilities"][index, 3, 1]), abs=1e-4)
        most = "ASD" if answers["probabilities"][index, 0] > 0.5 else "NORM"
        assert top[index].endswith(f":{most}")
    assert len({row["pred_image"] for row in found}) == 2


def run_predict(bundle: Path, frames: Path, out: Path, precision: str) -> None:
    import subprocess
    import sys

    command = [sys.executable, "-m", "echoquad", "predict", str(bundle), *map(str, sorted(frames.glob("*.png")))]
    subprocess.run(
        [*command, "--out", str(out), "--device", "cpu", "--precision", precision, "--untuned"],
        check=True,
        capture_output=True,
        timeout=120,
    )


def couple_frames(model: Any) -> None:
    """Make the probabilities of a frame depend on the other frames of its batch."""
    graph = model.graph
    for node in graph.node:
        node.output[:] = ["alone" if name == "probabilities" else name for name in node.output]
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([0]), "batch_axis"))
    graph.node.extend(
        [
            onnx.helper.make_node("ReduceMean", ["alone", "batch_axis"], ["mean_of_batch"], keepdims=1),
            onnx.helper.make_node("Sub", ["alone", "mean_of_batch"], ["from_mean"]),
            onnx.helper.make_node("Add", ["alone", "from_mean"], ["probabilities"]),
        ]
    )


def test_graph_whose_frames_affect_each_other_is_not_batched(
    tmp_path: Path, make_tiny_bundle: Any, make_frame: Any
) -> None:
    bundle = add_frame_graph(make_tiny_bundle(tmp_path / "bundle"), couple_frames)
    model = write_triton_model(Bundle(bundle), tmp_path / "models")
    assert model.max_batch_size == 0
    config = read_config(model.folder / "config.pbtxt")
    assert not config.HasField("dynamic_batching") and not any(one.HasField("reshape") for one in config.output)
    assert [list(one.dims) for one in (*config.input, *config.output)] == [
        [-1, -1, -1],
        [-1, 4, 2],
        [-1, 2],
        [-1, 4],
        [-1],
    ]
    frame = make_frame(3)
    answer = StandInServer(model.folder).infer({"frames": frame[None]})
    assert ("ASD", "NORM")[answer["label"][0]] == Predictor(bundle, device="cpu")(frame).label


# ---------------------------------------------------------------------------------------------- refusals


def swap_classes(model: Any) -> None:
    """Make the graph decide the other class."""
    for node in model.graph.node:
        node.output[:] = ["other" if name == "label" else name for name in node.output]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(1), "one"))
    model.graph.node.append(onnx.helper.make_node("Sub", ["one", "other"], ["label"]))


def rename_contract(model: Any) -> None:
    for item in model.metadata_props:
        if item.key == "echoquad.contract_sha256":
            item.value = "0" * 64


def rename_input(model: Any) -> None:
    model.graph.input[0].name = "image"
    for node in model.graph.node:
        node.input[:] = ["image" if name == "frames" else name for name in node.input]


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        (swap_classes, ParityError, "another decision"),
        (rename_contract, BundleError, "another contract"),
        (rename_input, BundleError, "expected frames"),
    ],
)
def test_graph_that_is_not_the_predictors_is_refused(
    tmp_path: Path, make_tiny_bundle: Any, change: Callable[[Any], None], kind: type[Exception], text: str
) -> None:
    bundle = add_frame_graph(make_tiny_bundle(tmp_path / "bundle"), change)
    with pytest.raises(kind, match=text):
        write_triton_model(Bundle(bundle), tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_bundle_without_frame_graph_and_damaged_one_are_refused(
    tiny_bundle: Path, framed: Path, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match="export it again with --frame-graph"):
        write_triton_model(Bundle(tiny_bundle), tmp_path / "models")
    with pytest.raises(UsageError, match="no graph of its own"):
        write_triton_model(Bundle(framed), tmp_path / "models", "tf32")
    graph = framed / "frame.fp32.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleTamperedError, match=r"frame\.fp32\.onnx"):
        write_triton_model(Bundle(framed), tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_only_an_earlier_export_is_replaced(framed: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    (models / "resnet").mkdir(parents=True)
    (models / "resnet" / "config.pbtxt").write_text('name: "resnet"\n')
    model = write_triton_model(Bundle(framed), models, "int8")
    assert not model.gpu and not (model.folder / "configs").exists()
    before = files_of(model.folder)
    again = write_triton_model(Bundle(framed), models)
    assert again.folder == model.folder and files_of(model.folder) != before and again.gpu
    assert {path.name for path in models.iterdir()} == {"resnet", model.name}
    (model.folder / "2").mkdir()
    with pytest.raises(OutputError, match="no model that EchoQuad wrote"):
        write_triton_model(Bundle(framed), models)
    framed = framed.rename(tmp_path / "resnet")
    with pytest.raises(OutputError, match="no model that EchoQuad wrote"):
        write_triton_model(Bundle(framed), models)
    assert (models / "resnet" / "config.pbtxt").read_text() == 'name: "resnet"\n'
    with pytest.raises(OutputError, match="is a file"):
        write_triton_model(Bundle(framed), models / "resnet" / "config.pbtxt")


def test_full_disk_leaves_the_earlier_model(framed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_triton_model(Bundle(framed), tmp_path / "models", "int8")
    before = files_of(tmp_path / "models")
    written = repository.write_bytes

    def fill(path: Path, data: bytes) -> None:
        if path.name == "config.pbtxt":
            raise OSError(28, "No space left on device")
        written(path, data)

    monkeypatch.setattr(repository, "write_bytes", fill)
    with pytest.raises(OutputError, match="No space left on device"):
        write_triton_model(Bundle(framed), tmp_path / "models")
    assert files_of(tmp_path / "models") == before
    StandInServer(model.folder)


@pytest.mark.parametrize(
    ("folder", "name"),
    [("cart 7", "cart-7"), ("a/../b", "b"), ("Ü", "echoquad"), ("..x", "x"), ("v1.2_b-3", "v1.2_b-3")],
)
def test_model_is_named_after_the_bundle(tmp_path: Path, folder: str, name: str) -> None:
    assert model_name(tmp_path / folder) == name
