"""The inference worker: one result for each job, in order, whatever the files hold; bundles are swapped meanwhile."""

from __future__ import annotations

import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from echoquad_runtime.errors import BundleError, ConfigError
from echoquad_runtime.frames.reader import frames_in
from echoquad_runtime.predict.prediction import Prediction
from echoquad_runtime.predict.predictor import Predictor
from echoquad_serve.config import ModelConfig
from echoquad_serve.inference import inference_worker as worker_module
from echoquad_serve.inference.inference_worker import InferenceWorker
from echoquad_serve.inference.model_manager import BundleFolder, ModelManager
from echoquad_serve.inference.row_picture import draw_row
from echoquad_serve.records import Job, Result


class Queue:
    """A queue in memory."""

    def __init__(self, jobs: list[Job]) -> None:
        self.waiting, self.results, self.faults = deque(jobs), list[Result](), 0
        self.withdrawn = set[str]()
        self._changed = threading.Condition()

    def take(self, count: int, timeout: float) -> list[Job]:
        if not self.waiting:
            time.sleep(min(timeout, 0.02))
        return [self.waiting.popleft() for _ in range(min(count, len(self.waiting)))]

    def finish(self, result: Result) -> Result:
        if self.faults:
            self.faults -= 1
            raise OSError("disk full")
        if result.id in self.withdrawn:
            raise KeyError(result.id)
        with self._changed:
            self.results.append(replace(result, number=len(self.results) + 1))
            self._changed.notify_all()
        return self.results[-1]

    def wait_for(self, count: int) -> list[Result]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.results) >= count, 30)
        return self.results


@pytest.fixture
def models(tiny_bundle: Path) -> ModelManager:
    manager = ModelManager(tiny_bundle, ModelConfig(device="cpu", threads=2))
    manager.start()
    return manager


@pytest.fixture
def run(models: ModelManager) -> Iterator[Callable[[Queue], InferenceWorker]]:
    decides: list[InferenceWorker] = []

    def start(queue: Queue) -> InferenceWorker:
        decides.append(InferenceWorker(queue, models))
        decides[-1].start()
        return decides[-1]

    yield start
    for one in decides:
        one.close()
        assert one.fault == "no thread decides any more"


def job(path: Path, number: int = 0, **values: Any) -> Job:
    return Job(f"{number:032x}", path, time.time(), "http", path.name, **values)


def frames_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.png"))


def test_rows_are_those_of_predict_with_what_a_service_adds(
    frames_folder: Path, tiny_bundle: Path, models: ModelManager, run: Callable[[Queue], InferenceWorker]
) -> None:
    paths = frames_of(frames_folder)
    queue = Queue([job(path, number) for number, path in enumerate(paths)])
    run(queue)
    results = queue.wait_for(len(paths))
    expected = [one for one in Predictor(tiny_bundle, device="cpu").predict(paths) if isinstance(one, Prediction)]
    assert [result.id for result in results] == [f"{number:032x}" for number in range(len(paths))]
    for result, prediction in zip(results, expected, strict=True):
        (row,) = result.rows
        assert (row["pred_image"], row["device"], row["precision"]) == (prediction.label, "cpu", "fp32")
        assert row["prob_ASD"] == pytest.approx(prediction.probabilities[0], abs=1e-6)
        assert row["provider"] == "CPUExecutionProvider" and row["bundle_sha256"] == models.current.sha256
        assert 0 <= row["confidence"] <= 1
        assert result.status == "done" and set(result.timings_ms) == {"queue", "predict"}


def test_damaged_expired_and_vanished_objects_have_results_among_the_others(
    frames_folder: Path, tmp_path: Path, run: Callable[[Queue], InferenceWorker]
) -> None:
    good = frames_of(frames_folder)[0]
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(good.read_bytes()[:60])
    queue = Queue(
        [job(good, 1), job(damaged, 2), job(tmp_path / "gone.png", 3), job(good, 4, deadline=1.0), job(good, 5)]
    )
    run(queue)
    results = {int(result.id, 16): result for result in queue.wait_for(5)}
    assert {number: result.status for number, result in results.items()} == {
        1: "done",
        2: "failed",
        3: "failed",
        4: "expired",
        5: "done",
    }
    assert results[2].failures[0]["code"].startswith("E_FRAME") and results[2].bundle == {}


def test_a_fault_of_the_engine_fails_its_jobs_and_the_next_ones_are_decided(
    frames_folder: Path, run: Callable[[Queue], InferenceWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Predictor, items: Any) -> Iterator[Any]:
        raise BundleError("the engine is gone")
        yield

    good = frames_of(frames_folder)[0]
    queue = Queue([job(good, 1), job(good, 2)])
    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "predict", fail)
        run(queue)
        assert [result.status for result in queue.wait_for(2)] == ["failed", "failed"]
        assert queue.results[0].failures[0]["code"] == "E_BUNDLE"
    queue.waiting.append(job(good, 3))
    assert queue.wait_for(3)[2].status == "done"


def test_a_result_that_cannot_be_recorded_is_tried_again(
    frames_folder: Path, run: Callable[[Queue], InferenceWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "_RETRY_S", 0.01)
    queue = Queue([job(frames_of(frames_folder)[0], 1)])
    queue.faults = 3
    run(queue)
    assert queue.wait_for(1)[0].status == "done" and queue.faults == 0


def test_swap_and_roll_back_change_the_bundle_of_the_next_rows(
    frames_folder: Path,
    tiny_bundle: Path,
    make_tiny_bundle: Callable[..., Path],
    models: ModelManager,
    run: Callable[[Queue], InferenceWorker],
    tmp_path: Path,
) -> None:
    other = make_tiny_bundle(tmp_path / "other", graph={"cam": True})
    first, good = models.current, frames_of(frames_folder)[0]
    queue = Queue([job(good, 1)])
    run(queue)
    queue.wait_for(1)
    with pytest.raises(ConfigError, match="no earlier bundle"):
        models.roll_back()
    assert models.load(other) is models.current is not first
    assert models.load(other) is models.current  # no second swap, which would make the first unreachable
    queue.waiting.append(job(good, 2))
    assert queue.wait_for(2)[1].bundle["name"] == "other"
    assert models.roll_back() is first
    queue.waiting.append(job(good, 3))
    assert queue.wait_for(3)[2].bundle["name"] == tiny_bundle.name


def test_the_result_of_an_object_that_was_not_accepted_is_dropped(
    frames_folder: Path, run: Callable[[Queue], InferenceWorker]
) -> None:
    jobs = [job(frames_of(frames_folder)[0], number) for number in range(3)]
    queue = Queue(jobs)
    queue.withdrawn.add(jobs[1].id)
    worker = run(queue)
    assert [result.id for result in queue.wait_for(2)] == [jobs[0].id, jobs[2].id]
    assert worker.fault is None


def test_a_refused_bundle_leaves_the_one_in_use(tiny_bundle: Path, models: ModelManager, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_bundle, broken)
    with (broken / "MODEL_CARD.md").open("a") as stream:
        stream.write("changed")
    first = models.current
    with pytest.raises(BundleError):
        models.load(broken)
    with pytest.raises(BundleError):
        models.load(tmp_path / "absent")
    assert models.current is first


def test_a_bundle_that_appears_in_the_folder_is_loaded(
    tiny_bundle: Path, make_tiny_bundle: Callable[..., Path], models: ModelManager, tmp_path: Path
) -> None:
    folder = tmp_path / "bundles"
    folder.mkdir()
    shutil.copytree(tiny_bundle, folder / "early")
    watch = BundleFolder(folder, models.load, poll_s=0.02)
    watch.start()
    try:
        make_tiny_bundle(tmp_path / "late", graph={"cam": True})
        (tmp_path / "late").rename(folder / "late")
        until = time.monotonic() + 30
        while models.current.folder.name != "late" and time.monotonic() < until:
            time.sleep(0.02)
        assert models.current.folder == folder / "late"
    finally:
        watch.close()


def test_a_shadow_decides_beside_and_a_recorded_row_is_drawn(
    frames_folder: Path, make_tiny_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    first = make_tiny_bundle(tmp_path / "first", graph={"cam": True})
    shadow = tmp_path / "shadow"
    shutil.copytree(first, shadow)
    models = ModelManager(first, ModelConfig(device="cpu", shadow=shadow))
    models.start()
    good = frames_of(frames_folder)[0]
    queue = Queue([job(good, 1)])
    worker = InferenceWorker(queue, models)
    worker.start()
    (result,) = queue.wait_for(1)
    worker.close()
    assert [row["pred_image"] for row in result.shadow] == [row["pred_image"] for row in result.rows]
    for cam in (False, True):
        model = models.current
        picture = draw_row(result, 0, good, model.contract, model.activation_map if cam else None)
        assert picture.startswith(b"\x89PNG")


def test_result_is_recorded_before_a_longer_object_behind_it_is_decided(
    frames_folder: Path, models: ModelManager, run: Callable[[Queue], InferenceWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = frames_of(frames_folder)[0]
    queue = Queue([job(good, 1), job(good, 2)])
    recorded: list[int] = []
    listed: list[str] = []

    def frames(path: Path, name: str, options: Any) -> Iterator[Any]:
        for _ in range(60 if listed else 1):
            recorded.append(len(queue.results))
            yield from frames_in(path, name, options)
        listed.append(name)

    monkeypatch.setattr(worker_module, "frames_in", frames)
    run(queue)
    results = queue.wait_for(2)
    assert [len(result.rows) for result in results] == [1, 60]
    assert recorded[-1] == 1  # the first had its result while frames of the second were still being found


def test_the_limit_of_a_stuck_thread_leaves_each_frame_of_a_batch_its_time() -> None:
    for batch_size in (1, 2, 16):
        assert worker_module._stall_limit_s(batch_size) >= (batch_size + 1) * worker_module.TIME_LIMIT
