"""IO binding and the slot pool: outputs of slots, buckets and concurrent runs."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.devices.cuda_probe import cuda_unavailable_reason
from echoquad_runtime.engine.io_binding import buckets
from echoquad_runtime.engine.onnx_engine import OnnxEngine
from echoquad_runtime.engine.slot_pool import SlotPool, infer_in_batches
from echoquad_runtime.errors import BundleError

Make = Callable[..., Path]


@given(st.integers(1, 5000))
def test_buckets_are_few_and_cover_every_batch_size(frames: int) -> None:
    found = buckets(frames)
    assert sorted(set(found)) == list(found)
    assert (found[0], found[-1]) == (1, frames)
    assert len(found) <= 2 + np.log2(frames)
    assert all(
        after <= 2 * before for before, after in itertools.pairwise(found)
    )  # at most half of a bucket is padding


@pytest.fixture(scope="module")
def engine(tiny_bundle: Path) -> OnnxEngine:
    return OnnxEngine(Bundle(tiny_bundle), device="cpu", threads=1)


@pytest.fixture(scope="module")
def quadrants() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (12, 4, 1, 32, 32), np.uint8)


@pytest.mark.parametrize("room", [1, 2, 5, 8])
def test_slot_output_equals_the_engines_for_every_batch_size(
    engine: OnnxEngine, quadrants: np.ndarray, room: int
) -> None:
    slot = engine.open_slot(room)
    batch = np.full((room, 4, 1, 32, 32), 255, np.uint8)  # padding that would change the output if it leaked
    for count in range(1, room + 1):
        batch[:count] = quadrants[:count]
        found = slot.run(batch, count)
        expected = engine.infer(quadrants[:count].reshape(-1, 1, 32, 32))
        assert found.logits.shape == found.probabilities.shape == (count, 4, 2)
        np.testing.assert_array_equal(found.logits.reshape(-1, 2), expected[0])
        np.testing.assert_array_equal(found.probabilities.reshape(-1, 2), expected[1])
        assert found.maps is None


def test_slot_output_is_not_changed_by_later_runs(engine: OnnxEngine, quadrants: np.ndarray) -> None:
    slot = engine.open_slot(2)
    first = slot.run(quadrants[:2], 2)
    kept = first.probabilities.copy()
    batch = quadrants[2:4].copy()
    second = slot.run(batch, 2)
    batch[:] = quadrants[4:6]
    third = slot.run(batch, 2)
    np.testing.assert_array_equal(first.probabilities, kept)
    expected = [engine.infer(quadrants[i : i + 2].reshape(-1, 1, 32, 32))[1].reshape(2, 4, 2) for i in (0, 2, 4)]
    for found, right in zip((first, second, third), expected, strict=True):
        np.testing.assert_array_equal(found.probabilities, right)


def test_slots_of_one_session_run_concurrently(engine: OnnxEngine, quadrants: np.ndarray) -> None:
    expected = [engine.infer(one.reshape(-1, 1, 32, 32))[1] for one in quadrants]
    slots = SlotPool(engine, 1)

    def work(index: int) -> bool:
        runs = (slots.run(quadrants[index : index + 1], 1) for _ in range(50))
        return all(np.array_equal(found.probabilities[0], expected[index]) for found in runs)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(12)))


@pytest.mark.parametrize("batch_size", [1, 2, 5, 16])
def test_batch_size_does_not_change_the_output(engine: OnnxEngine, quadrants: np.ndarray, batch_size: int) -> None:
    expected = engine.infer(quadrants.reshape(-1, 1, 32, 32))
    for frames in (quadrants, quadrants[:, :, 0]):
        found = infer_in_batches(engine, frames, batch_size)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b)


def test_engine_without_slots_runs_one_batch_at_a_time(engine: OnnxEngine, quadrants: np.ndarray) -> None:
    running, most, lock = 0, 0, threading.Lock()

    class Other:
        contract, device, precision, note = engine.contract, "cpu", "fp32", ""

        def infer(self, given: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
            found = engine.infer(given)
            with lock:
                running -= 1
            return found

    slots = SlotPool(Other(), 3)
    expected = engine.infer(quadrants[:2].reshape(-1, 1, 32, 32))[0].reshape(2, 4, 2)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: slots.run(quadrants[:3], 2), range(20)):
            np.testing.assert_array_equal(found.logits, expected)
    assert most == 1


def test_output_of_another_shape_raises_bundle_error(tmp_path: Path, make_tiny_bundle: Make) -> None:
    from onnx import helper, load_model_from_string

    from echoquad_runtime.engine import onnx_engine as module

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
        engine.open_slot(1).run(np.zeros((1, 4, 1, 32, 32), np.uint8), 1)
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_slot_output_on_cuda_equals_the_cpu(tiny_bundle: Path, quadrants: np.ndarray, cuda_graphs: bool) -> None:
    if cuda_unavailable_reason() is not None:
        pytest.skip("no CUDA here")
    on_cpu = OnnxEngine(Bundle(tiny_bundle), device="cpu")
    slots = SlotPool(OnnxEngine(Bundle(tiny_bundle), device="cuda", cuda_graphs=cuda_graphs), 4)
    for begin in range(3):
        for count in (4, 1, 3):
            batch = np.ascontiguousarray(quadrants[begin : begin + 4])
            expected = on_cpu.infer(batch[:count].reshape(-1, 1, 32, 32))[0].reshape(count, 4, 2)
            np.testing.assert_allclose(slots.run(batch, count).logits, expected, rtol=0, atol=1e-5)
