from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echoquad_runtime.bundle import Bundle
from echoquad_runtime.devices import cuda_obstacle
from echoquad_runtime.errors import BundleError
from echoquad_runtime.lanes import PlainLane, buckets
from echoquad_runtime.session import OnnxEngine, open_lane

Make = Callable[..., Path]


@given(st.integers(1, 5000))
def test_buckets_are_few_and_hold_every_number(frames: int) -> None:
    found = buckets(frames)
    assert sorted(set(found)) == list(found)
    assert (found[0], found[-1]) == (1, frames)
    assert len(found) <= 2 + np.log2(frames)
    assert all(after <= 2 * before for before, after in itertools.pairwise(found))  # half is padding at worst


@pytest.fixture(scope="module")
def engine(tiny_bundle: Path) -> OnnxEngine:
    return OnnxEngine(Bundle(tiny_bundle), device="cpu", threads=1)


@pytest.fixture(scope="module")
def quadrants() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (12, 4, 1, 32, 32), np.uint8)


@pytest.mark.parametrize("room", [1, 2, 5, 8])
def test_a_lane_answers_as_the_engine_does_for_every_number_of_frames(
    engine: OnnxEngine, quadrants: np.ndarray, room: int
) -> None:
    lane = engine.lane(room)
    lane.quadrants[:] = 255  # padding that would show
    for count in range(1, room + 1):
        lane.quadrants[:count] = quadrants[:count]
        logits, probabilities = lane.run(count)
        expected = engine.infer(quadrants[:count].reshape(-1, 1, 32, 32))
        assert logits.shape == probabilities.shape == (4 * count, 2)
        np.testing.assert_array_equal(logits, expected[0])
        np.testing.assert_array_equal(probabilities, expected[1])


def test_nothing_is_allocated_run_after_run(engine: OnnxEngine, quadrants: np.ndarray) -> None:
    lane = engine.lane(2)
    lane.quadrants[:] = quadrants[:2]
    first = lane.run(2)
    kept = first[1].copy()
    lane.quadrants[:] = quadrants[2:4]
    second = lane.run(2)
    assert all(np.shares_memory(a, b) for a, b in zip(first, second, strict=True))
    assert not np.array_equal(kept, second[1])


def test_lanes_of_one_session_run_side_by_side(engine: OnnxEngine, quadrants: np.ndarray) -> None:
    expected = [engine.infer(one.reshape(-1, 1, 32, 32))[1] for one in quadrants]

    def work(index: int) -> bool:
        lane = engine.lane(1)
        equal = True
        for _ in range(50):
            lane.quadrants[0] = quadrants[index]
            equal &= bool(np.array_equal(lane.run(1)[1], expected[index]))
        return equal

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(12)))


def test_an_engine_of_another_kind_has_a_plain_lane(engine: OnnxEngine, quadrants: np.ndarray) -> None:
    class Other:
        contract, device, precision, note = engine.contract, "cpu", "fp32", ""

        def infer(self, given: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return engine.infer(given)

    lane = open_lane(Other(), 3)
    assert isinstance(lane, PlainLane)
    lane.quadrants[:2] = quadrants[:2]
    np.testing.assert_array_equal(lane.run(2)[0], engine.infer(quadrants[:2].reshape(-1, 1, 32, 32))[0])


def test_answers_of_another_shape_are_one_line(tmp_path: Path, make_tiny_bundle: Make) -> None:
    from onnx import helper, load_model_from_string

    from echoquad_runtime import session as module

    folder = make_tiny_bundle(tmp_path)
    bundle = Bundle(folder)
    model = load_model_from_string(bundle.read_model("fp32"))
    last = next(node for node in model.graph.node if "probabilities" in node.output)
    last.output[0] = "narrow"
    model.graph.node.append(helper.make_node("Concat", ["narrow", "narrow"], ["probabilities"], axis=1))
    engine = OnnxEngine(bundle, device="cpu", threads=1)
    changed = module.open_session(model.SerializeToString(), device="cpu", threads=1).session
    engine._session = changed
    with pytest.raises(BundleError, match="with 4 quadrants") as caught:
        engine.lane(1).run(1)
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_lanes_on_cuda_answer_as_the_engine_does(tiny_bundle: Path, quadrants: np.ndarray, cuda_graphs: bool) -> None:
    if cuda_obstacle() is not None:
        pytest.skip("no CUDA here")
    engine = OnnxEngine(Bundle(tiny_bundle), device="cuda", cuda_graphs=cuda_graphs)
    lanes = [engine.lane(4) for _ in range(min(2, engine.at_once))]
    for _ in range(3):
        for count in (4, 1, 3):
            expected = engine.infer(quadrants[:count].reshape(-1, 1, 32, 32))
            for lane in lanes:
                lane.quadrants[:count] = quadrants[:count]
                np.testing.assert_allclose(lane.run(count)[0], expected[0], rtol=0, atol=1e-5)
