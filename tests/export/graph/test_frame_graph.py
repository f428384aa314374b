"""The frame graph: exact quadrants, the votes of the runtime, a valid file, parity, and its export."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from echoquad.cli.commands.export import export
from echoquad_export.graph import frame_graph
from echoquad_export.graph.frame_graph import (
    CLASSES_KEY,
    FRAME_OUTPUTS,
    FrameParity,
    build_frame_graph,
    load_frames,
    measure_frame_parity,
    quadrants_part,
)
from echoquad_export.graph.resize_graph import FRAMES
from echoquad_export.packing.exporter import export_run
from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.manifest import frame_graph_file
from echoquad_runtime.bundle.onnx_header import CONTRACT_KEY, INPUT, OUTPUTS
from echoquad_runtime.contract import QUADRANTS, Contract, VoteMethod, parse_layout
from echoquad_runtime.devices.session_factory import open_session
from echoquad_runtime.engine.onnx_engine import OnnxEngine
from echoquad_runtime.errors import BundleError, BundleTamperedError, ParityError
from echoquad_runtime.quadrants import Grey, frame_quadrants
from echoquad_runtime.verify.verify import verify
from echoquad_runtime.voting import aggregate_votes
from echoquad_train.data.dataset import read_split

TINY = Contract(classes=("ASD", "NORM"), input_size=32)
APEX_UP = replace(TINY, quadrants=parse_layout("apex-up"))


class Graph:
    """A frame graph in an inference session, with access to the quadrants that its network reads."""

    def __init__(self, model: bytes, contract: Contract) -> None:
        self.bytes = build_frame_graph(model, contract)
        self._session = open_session(self.bytes, device="cpu", threads=1).session
        self._part = open_session(quadrants_part(self.bytes), device="cpu", threads=1).session

    def __call__(self, frames: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(FRAME_OUTPUTS, self._session.run(FRAME_OUTPUTS, {FRAMES: frames}), strict=True))

    def quadrants(self, frames: np.ndarray) -> np.ndarray:
        (found,) = self._part.run(None, {FRAMES: frames})
        return np.asarray(found)


VALUES = np.zeros(256, np.float32)
"""The probability that `pixel_model` returns for a grey level; some sums depend on the order of addition."""
VALUES[:14] = [0, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.9, 1 / 3, 1e-12, 1]


def pixel_model(contract: Contract, opset: int = 18) -> bytes:
    """Return a network whose probabilities of C classes are the `VALUES` of a quadrant's first C pixels."""
    size, classes = contract.input_size, len(contract.classes)
    nodes = [
        helper.make_node("Flatten", [INPUT], ["flat"], axis=1),
        helper.make_node("Gather", ["flat", "first"], ["pixels"], axis=1),
        helper.make_node("Cast", ["pixels"], ["rows"], to=TensorProto.INT64),
        helper.make_node("Gather", ["values", "rows"], [OUTPUTS[1]], axis=0),
        helper.make_node("Identity", [OUTPUTS[1]], [OUTPUTS[0]]),
    ]
    graph = helper.make_graph(
        nodes,
        "pixels",
        [helper.make_tensor_value_info(INPUT, TensorProto.UINT8, ["N", 1, size, size])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", classes]) for name in OUTPUTS],
        [numpy_helper.from_array(np.arange(classes), "first"), numpy_helper.from_array(VALUES, "values")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    helper.set_model_props(model, {CONTRACT_KEY: contract.to_json()})
    return bytes(model.SerializeToString())


def pixel_frame(levels: np.ndarray) -> Grey:
    """Return a frame, uint8 [16, 16], whose quadrants begin with the pixels of `levels`, [4, C]."""
    la, ra, lv, rv = np.zeros((4, 8, 8), np.uint8)
    for quadrant, pixels in zip((la, ra, lv, rv), levels, strict=True):
        quadrant[0, : len(pixels)] = pixels
    return np.block([[la, ra], [lv, rv]])


@cache
def deciding(vote: VoteMethod, classes: int) -> tuple[Graph, Contract]:
    """Return a frame graph for the frames of `pixel_frame`, and its contract."""
    contract = Contract(tuple("abcd"[:classes]), input_size=8, keep=1.0, vote=vote, vote_weights=(1, 0, 0.7, 2))
    return Graph(pixel_model(contract), contract), contract


# ---------------------------------------------------------------------------------------------- quadrants


def noise(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return noise; odd seeds give black and white only, which reveals other filters best."""
    levels = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
    return levels if seed % 2 == 0 else np.where(levels > 127, 255, 0).astype(np.uint8)


sides = st.integers(2, 9) | st.integers(2, 150)


@settings(max_examples=25)
@given(
    sizes=st.lists(st.tuples(sides, sides), min_size=1, max_size=6),
    keep=st.sampled_from([1.0, 0.9, 0.75, 0.5, 0.001]) | st.floats(0.01, 1),
    size=st.integers(8, 50),
    seed=st.integers(0, 1000),
)
@example(sizes=[(2, 2), (3, 2), (2, 3), (3, 3)], keep=1.0, size=8, seed=1)
@example(sizes=[(32, 64), (64, 32), (33, 65)], keep=1.0, size=32, seed=1)  # one pass changes nothing
@example(sizes=[(600, 800), (801, 599)], keep=0.9, size=224, seed=1)
@example(sizes=[(1500, 2), (2, 1500), (700, 7)], keep=0.9, size=16, seed=1)
def test_quadrants_equal_pillow_resize_exactly(sizes: list[tuple[int, int]], keep: float, size: int, seed: int) -> None:
    contract = replace(TINY, keep=keep, input_size=size)
    graph = Graph(pixel_model(contract), contract)
    for height, width in sizes:
        frames = noise(seed, (2, height, width))
        found = graph.quadrants(frames)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, np.concatenate([frame_quadrants(frame, contract) for frame in frames]))


@pytest.mark.parametrize("keep", [1.0, 0.9, 0.61])
def test_quadrants_equal_those_of_the_runtime(keep: float) -> None:
    contract = replace(TINY, keep=keep)
    graph = Graph(pixel_model(contract), contract)
    for shape in [(60, 80), (61, 79), (240, 320), (241, 319), (480, 640), (97, 133), (9, 40)]:
        frame = noise(1, shape)
        np.testing.assert_array_equal(graph.quadrants(frame[None]), frame_quadrants(frame, contract))


@pytest.mark.parametrize("layout", ["apex-up", "LV,RV,LA,RA", "RV,RA,LV,LA"])
@pytest.mark.parametrize("shape", [(60, 80), (61, 79), (62, 79)])
def test_quadrant_layout_decides_where_a_quadrant_is_cut(layout: str, shape: tuple[int, int]) -> None:
    contract = replace(TINY, quadrants=parse_layout(layout))
    reference, graph = Graph(pixel_model(TINY), TINY), Graph(pixel_model(contract), contract)
    frame = noise(2, shape)
    np.testing.assert_array_equal(graph.quadrants(frame[None]), frame_quadrants(frame, contract))
    order = [contract.quadrants.index(name) for name in QUADRANTS]
    frames = np.stack([noise(4, shape), frame])
    found, expected = graph(frames), reference(frames)
    for name in ("quadrant_probabilities", "votes"):
        np.testing.assert_array_equal(found[name], expected[name][:, order])


def test_reference_layout_adds_no_operator() -> None:
    operators = [len(onnx.load_from_string(build_frame_graph(pixel_model(c), c)).graph.node) for c in (TINY, APEX_UP)]
    assert operators[1] == operators[0] + 2


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1), (0, 9)])
def test_frame_smaller_than_2_by_2_raises(shape: tuple[int, int]) -> None:
    graph = Graph(pixel_model(TINY), TINY)
    with pytest.raises(Exception, match="Split"):
        graph(np.zeros((1, *shape), np.uint8))


# ---------------------------------------------------------------------------------------------- decisions


@settings(max_examples=150)
@given(vote=st.sampled_from(["majority", "average", "weighted"]), data=st.data())
def test_decisions_equal_those_of_the_runtime(vote: VoteMethod, data: st.DataObject) -> None:
    classes = data.draw(st.integers(2, 4))
    graph, contract = deciding(vote, classes)
    levels = data.draw(
        arrays(np.uint8, st.tuples(st.integers(1, 4), st.just(4), st.just(classes)), elements=st.integers(0, 13))
    )
    if data.draw(st.booleans()):  # a tie of votes and of means
        levels[:, 2:] = levels[:, 1::-1, ::-1]
    found = graph(np.stack([pixel_frame(level) for level in levels]))
    expected = aggregate_votes(VALUES[levels], vote, contract.vote_weights)
    np.testing.assert_array_equal(found["quadrant_probabilities"], VALUES[levels])
    np.testing.assert_array_equal(found["votes"], expected.quadrant_labels)
    np.testing.assert_array_equal(found["label"], expected.labels)
    np.testing.assert_array_equal(found["probabilities"], expected.probabilities.astype(np.float32))
    assert [array.dtype for array in found.values()] == [np.float32, np.float32, np.int64, np.int64]


A, B, B_SURE, C = (7, 5, 0), (5, 7, 0), (1, 10, 0), (4, 4, 5)  # .6 .4 0, .4 .6 0, .1 .9 0, .3 .3 .4


@pytest.mark.parametrize(
    ("vote", "levels", "label"),
    [
        ("majority", (A, A, B_SURE, B_SURE), 1),  # two votes each: the means decide
        ("majority", (A, A, B, B), 0),  # equal means: the first class
        ("majority", (A, A, A, B_SURE), 0),
        ("majority", (C, A, B_SURE, C), 2),  # a plurality of two
        ("average", (A, A, A, B_SURE), 1),  # one confident quadrant outweighs three
        ("average", (A, A, B, B), 0),
        ("weighted", (A, B_SURE, A, A), 0),  # the second quadrant has weight 0
        ("weighted", (A, A, A, B_SURE), 1),  # the last quadrant outweighs all others
    ],
)
def test_vote_rules_on_hand_computed_cases(vote: VoteMethod, levels: tuple[tuple[int, ...], ...], label: int) -> None:
    found = deciding(vote, 3)[0](pixel_frame(np.array(levels))[None])
    assert found["label"].tolist() == [label]


def test_batch_gives_the_same_results_as_single_frames(
    make_tiny_graph: Callable[..., bytes], make_frame: Callable[..., Grey]
) -> None:
    graph = Graph(make_tiny_graph(TINY), TINY)
    frames = np.stack([make_frame(seed, 61, 83) for seed in range(7)])
    together, alone = graph(frames), [graph(frame[None]) for frame in frames]
    np.testing.assert_array_equal(
        graph.quadrants(frames), np.concatenate([graph.quadrants(frame[None]) for frame in frames])
    )
    for name in FRAME_OUTPUTS:
        expected = np.concatenate([found[name] for found in alone])
        assert together[name].shape == expected.shape
        np.testing.assert_allclose(together[name], expected, rtol=0, atol=1e-6 if "prob" in name else 0)
    assert len({*together["label"].tolist()}) == 2


# ---------------------------------------------------------------------------------------------- the file


def test_frame_graph_file_is_deterministic_valid_and_typed(make_tiny_graph: Callable[..., bytes]) -> None:
    contract = Contract(("A", "C, D", "é"), input_size=20)
    model = make_tiny_graph(contract)
    data = build_frame_graph(model, contract)
    assert data == build_frame_graph(model, contract)
    found = onnx.load_model_from_string(data)
    onnx.checker.check_model(found, full_check=True)
    assert [(item.domain, item.version) for item in found.opset_import] == [("", 18)]
    assert (found.ir_version, found.producer_name) == (10, "echoquad")
    metadata = {item.key: item.value for item in found.metadata_props}
    assert Contract.from_json(metadata[CONTRACT_KEY]) == contract
    assert metadata["echoquad.contract_sha256"] == contract.sha256
    assert json.loads(metadata[CLASSES_KEY]) == list(contract.classes)
    graph = found.graph
    assert not found.doc_string + graph.doc_string + "".join(node.doc_string for node in graph.node)
    assert not any(item.external_data for item in graph.initializer)
    names = [node.name for node in graph.node if node.name]
    written = [name for node in graph.node for name in node.output]
    assert len(set(names)) == len(names) and len(set(written)) == len(written)

    def shapes(items: Any) -> list[tuple[str, int, list[str | int]]]:
        return [
            (
                item.name,
                item.type.tensor_type.elem_type,
                [dim.dim_param or dim.dim_value for dim in item.type.tensor_type.shape.dim],
            )
            for item in items
        ]

    # The network's N counts quadrants; onnxruntime assumes that dimensions of one name are equal.
    assert not any("N" in shape for *_, shape in shapes(graph.value_info))
    assert shapes(graph.input) == [("frames", TensorProto.UINT8, ["N", "H", "W"])]
    assert shapes(graph.output) == [
        ("quadrant_probabilities", TensorProto.FLOAT, ["N", 4, 3]),
        ("probabilities", TensorProto.FLOAT, ["N", 3]),
        ("votes", TensorProto.INT64, ["N", 4]),
        ("label", TensorProto.INT64, ["N"]),
    ]


def test_other_contract_or_old_opset_raises_bundle_error(make_tiny_graph: Callable[..., bytes]) -> None:
    with pytest.raises(BundleError, match="another contract"):
        build_frame_graph(make_tiny_graph(TINY), replace(TINY, keep=0.8))
    with pytest.raises(BundleError, match="opset 17; expected 18 or later"):
        build_frame_graph(pixel_model(TINY, opset=17), TINY)


# ---------------------------------------------------------------------------------------------- parity


@pytest.fixture(scope="module")
def engine(tiny_bundle: Path) -> OnnxEngine:
    return OnnxEngine(Bundle(tiny_bundle), device="cpu", threads=1)


@pytest.fixture(scope="module")
def frames(make_frame: Callable[..., Grey]) -> list[Grey]:
    return [make_frame(seed, 60 + seed, 90 - seed) for seed in range(8)] + [np.array([[0, 255], [128, 64]], np.uint8)]


def test_frame_parity_of_equal_graphs_is_exact(
    engine: OnnxEngine, make_tiny_graph: Callable[..., bytes], frames: list[Grey]
) -> None:
    found = measure_frame_parity(build_frame_graph(make_tiny_graph(TINY), TINY), engine, iter(frames))
    found.require()
    figures = found.to_dict()
    assert figures.pop("max_abs_dprobability") < 1e-6
    assert figures == {"frames": 9, "max_grey_difference": 0, "flips": 0}


def test_frame_graph_scores_the_typicality_of_frames(scored: Any, frames: list[Grey]) -> None:
    bundle = Bundle(scored.bundle)
    graph = build_frame_graph(bundle.read_model("fp32"), bundle.contract)
    session = open_session(graph, device="cpu", threads=1).session
    (found,) = session.run(["typicality"], {FRAMES: np.stack(scored.frames)})
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, 1 / (1 / scored.scores).mean(axis=1), rtol=1e-4)
    measured = measure_frame_parity(graph, OnnxEngine(bundle, device="cpu", threads=1), iter(frames))
    measured.require()
    assert measured.max_rel_dtypicality is not None and measured.max_rel_dtypicality < 1e-5
    with pytest.raises(ParityError, match="typicality"):
        FrameParity("int8", 10, 1, 0.05, 0, 0.51).require()


@pytest.mark.parametrize(
    ("contract", "options", "miss"),
    [
        (replace(TINY, keep=0.6), {}, "grey levels"),
        (TINY, {"logit_scale": 0.2}, r"\|dprobability\|"),
        (TINY, {"logit_scale": -1.0}, "changed decisions"),
        (TINY, {"logit_scale": float("nan")}, r"\|dprobability\| 1e\+30"),
    ],
)
def test_different_graph_raises_parity_error(
    engine: OnnxEngine,
    make_tiny_graph: Callable[..., bytes],
    frames: list[Grey],
    contract: Contract,
    options: dict[str, Any],
    miss: str,
) -> None:
    graph = build_frame_graph(make_tiny_graph(contract, **options), contract)
    found = measure_frame_parity(graph, engine, frames)
    with pytest.raises(ParityError, match=f"{miss}.*no bundle was written") as caught:
        found.require()
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(("grey", "difference", "flips"), [(2, 0.0, 0), (0, 0.051, 0), (0, 0.0, 1)])
def test_frame_parity_bounds(grey: int, difference: float, flips: int) -> None:
    FrameParity("int8", 10, 1, 0.05, 0).require()
    with pytest.raises(ParityError, match=r"the int8 frame graph .* on 10 frames"):
        FrameParity("int8", 10, grey, difference, flips).require()


def test_load_frames_skips_unreadable_and_tiny_frames(tmp_path: Path) -> None:
    for name in ("ASD", "NORM"):
        (tmp_path / "validation" / name).mkdir(parents=True)
        for index, shape in enumerate([(20, 30), (1, 30), (33, 21)]):
            Image.fromarray(noise(index, shape)).save(tmp_path / "validation" / name / f"{index}.png")
    (tmp_path / "validation" / "ASD" / "0.png").write_bytes(b"no image")
    found = load_frames(read_split(tmp_path, "validation", ("ASD", "NORM")), TINY)
    assert [frame.shape for frame in found] == [(33, 21), (20, 30), (33, 21)]


# ---------------------------------------------------------------------------------------------- export


def test_export_adds_frame_graphs_that_passed_parity(case: Any, thin: None, few_golden: None, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    export(case.run, folder, precision="fp32,fp16", frame_graph=True)
    bundle = Bundle(folder)
    for precision in ("fp32", "fp16"):
        data = bundle.read(frame_graph_file(precision))  # checks the hash
        assert data == build_frame_graph(bundle.read_model(precision), bundle.contract)
        figures = bundle.manifest["frame_graphs"][precision]
        assert figures.pop("max_rel_dtypicality") < 1e-3
        assert figures.keys() == {"frames", "max_grey_difference", "max_abs_dprobability", "flips"}
        assert figures["frames"] == len(bundle.read_golden().frames) + 8  # the validation frames
        assert figures["flips"] == 0 and figures["max_grey_difference"] == 0
    assert verify(folder, device="cpu").passed

    damaged = bytearray(data)
    damaged[len(data) // 2] ^= 1
    (folder / "frame.fp16.onnx").write_bytes(damaged)
    with pytest.raises(BundleTamperedError, match=r"frame\.fp16\.onnx"):
        verify(folder, device="cpu")

    export_run(case.run, folder)  # it replaces the older bundle
    assert not list(folder.glob("frame.*"))
    assert not [key for key in Bundle(folder).manifest if "frame" in key]


def test_failed_frame_parity_leaves_no_bundle(
    case: Any, thin: None, few_golden: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frame_graph, "MAX_GREY_DIFFERENCE", -1)
    with pytest.raises(ParityError, match=r"the fp32 frame graph .* grey levels"):
        export_run(case.run, tmp_path / "out" / "bundle", frame_graph=True)
    assert not list((tmp_path / "out").iterdir())
