"""Streaming: batches from worker processes equal those of decoded quadrants bit for bit, and workers end."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import DatasetError, RunError
from echoquad_train.data import dataset, stream
from echoquad_train.data.dataset import QuadrantStore, Split, load_quadrants, read_split
from echoquad_train.data.stream import Storage, StreamedStore, stream_quadrants
from echoquad_train.fitting.loop import fit

CONTRACT = Contract(("bright", "dark"), input_size=24, keep=0.8)


def read(data: Path) -> Split:
    return read_split(data, "train", CONTRACT.classes)


def workers() -> set[int | None]:
    return {child.pid for child in multiprocessing.active_children()}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, make_data: Callable[..., Path]) -> Path:
    """Frames of which the second cannot be read."""
    folder = make_data(tmp_path_factory.mktemp("streamed") / "data", frames=4)
    (folder / "train" / "bright" / "train1.png").write_bytes(b"not an image")
    return folder


@pytest.fixture(scope="module")
def streamed(data: Path) -> Iterator[StreamedStore]:
    """A store with two workers. A test that breaks a worker makes its own store."""
    store = stream_quadrants(read(data), CONTRACT, 2)
    yield store
    store.close()


def test_streamed_store_equals_the_decoded_store(streamed: StreamedStore, data: Path) -> None:
    decoded = load_quadrants(read(data), CONTRACT)
    assert streamed.names == decoded.names and streamed.size == decoded.size == 24
    assert np.array_equal(streamed.labels, decoded.labels) and streamed.labels.dtype == np.int64
    assert [(f.file, str(f.error)) for f in streamed.failures] == [(f.file, str(f.error)) for f in decoded.failures]
    rng = np.random.default_rng(2)
    for whole in (False, True):  # the workers persist between passes
        batches = [rng.integers(0, 28, size) for size in (5, 8, 1, 0, 16)]
        pairs = list(zip(streamed.feed(batches, whole=whole), decoded.feed(batches, whole=whole), strict=True))
        assert [len(found) for found, _ in pairs] == [5, 8, 1, 0, 16]
        for found, expected in pairs:
            assert found.dtype == np.uint8 and found.shape[1:] == (4 if whole else 1, 24, 24)
            assert np.array_equal(found, expected)


def test_aborted_pass_does_not_affect_the_next(streamed: StreamedStore, data: Path) -> None:
    decoded = load_quadrants(read(data), CONTRACT)
    batches = [np.array([i]) for i in range(28)]
    fed = streamed.feed(batches)
    next(fed)
    fed.close()
    for found, expected in zip(streamed.feed(batches[::-1]), decoded.feed(batches[::-1]), strict=True):
        assert np.array_equal(found, expected)


def test_worker_receives_no_list_of_frames(streamed: StreamedStore) -> None:
    """Each worker would hold a copy of the list of ten million quadrants."""
    assert len(pickle.dumps(streamed._loader.dataset)) < 1000


def test_frame_is_decoded_once_per_batch(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    monkeypatch.setattr(
        stream, "decode", lambda frame, contract: [decoded.append(frame.name), real(frame, contract)][1]
    )
    real = dataset.decode
    frames = read(data).frames
    stream._Decoder(CONTRACT).__getitems__([(frames[0], quadrant) for quadrant in range(4)] + [(frames[2], 1)])
    assert decoded == [frames[0].name, frames[2].name]


def test_streamed_training_gives_the_same_weights(tmp_path: Path, trained: Any, quiet: Any, thin: None) -> None:
    before = workers()
    train = {"device": "cpu", "resume": False, "reporter": quiet()}
    fit(trained.data, tmp_path / "run", trained.recipe, stream="on", workers=1, **train)
    assert (tmp_path / "run" / "best.safetensors").read_bytes() == (trained.folder / "best.safetensors").read_bytes()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {path.name for path in trained.folder.iterdir()}
    assert workers() == before


def test_frame_damaged_in_training_raises_dataset_error(tmp_path: Path, trained: Any, quiet: Any, thin: None) -> None:
    data = Path(shutil.copytree(trained.data, tmp_path / "data"))
    before = workers()

    def damage(epoch: int, done: int) -> None:
        if (epoch, done) == (1, 4):
            (data / "train" / "dark" / "train2.png").write_bytes(b"half")

    with pytest.raises(DatasetError) as error:
        fit(
            data,
            tmp_path / "run",
            trained.recipe,
            device="cpu",
            resume=False,
            reporter=quiet(at_batch=damage),
            stream="on",
            workers=1,
        )
    message = str(error.value)
    assert message.startswith("train/dark/train2.png: ")
    assert "\n" not in message and "--resume" in message
    assert workers() == before  # although the traceback is still held


def test_killed_worker_raises_run_error(data: Path) -> None:
    before = workers()
    store = stream_quadrants(read(data), CONTRACT, 1)
    fed = store.feed([np.array([i % 28]) for i in range(1000)])
    next(fed)
    for child in multiprocessing.active_children():
        if child.pid not in before:
            child.kill()
    with pytest.raises(RunError) as error:
        list(fed)
    store.close()
    assert "\n" not in str(error.value) and "--workers" in str(error.value)


@pytest.mark.parametrize("mode", ["on", "auto"])
def test_missing_shared_memory_raises_run_error_before_anything_is_written(
    tmp_path: Path, trained: Any, quiet: Any, monkeypatch: pytest.MonkeyPatch, mode: stream.Stream
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(dataset, "MEMORY_BYTES", 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0, 0, 0))
    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", refuse)
    run = tmp_path / "run"
    with pytest.raises(RunError) as error:
        fit(trained.data, run, trained.recipe, device="cpu", resume=False, reporter=quiet(), stream=mode, workers=3)
    assert all(word in str(error.value) for word in ("3 ", "/dev/shm", "--shm-size", "--workers", "--stream off"))
    assert mode == "auto" or not run.exists()


def test_worker_that_cannot_start_raises_run_error(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = stream_quadrants(read(data), CONTRACT, 1)

    def refuse(*_: object) -> None:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr("multiprocessing.context.SpawnProcess._Popen", refuse)
    with pytest.raises(RunError, match="--workers"):
        list(store.feed([np.array([0])]))
    store.close()


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a file system")
def test_train_with_a_full_dev_shm_is_one_line(tmp_path: Path, trained: Any) -> None:
    mounted = 'mount -t tmpfs -o size=8k none /dev/shm && echo mounted && exec "$@"'
    train = ["train", str(trained.data), "--out", str(tmp_path / "run"), "--recipe", "scratch", "--stream", "on"]
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", mounted, "sh", sys.executable, "-m", "echoquad"]
    try:
        ended = subprocess.run([*command, *train, "--workers", "2"], check=False, capture_output=True, encoding="utf-8")
    except FileNotFoundError:
        pytest.skip("unshare is not installed")
    if "mounted" not in ended.stdout:
        pytest.skip("this process must not mount")
    assert ended.returncode == 1 and len(ended.stderr.splitlines()) == 1, ended.stderr
    assert ended.stderr.startswith("error[E_RUN]: ") and "--shm-size" in ended.stderr
    assert not (tmp_path / "run").exists()


def test_class_without_readable_frame_raises_dataset_error(tmp_path: Path, data: Path) -> None:
    broken = Path(shutil.copytree(data, tmp_path / "data"))
    for path in (broken / "train" / "dark").iterdir():
        path.write_bytes(b"half")
    with pytest.raises(DatasetError, match="class dark"):
        stream_quadrants(read(broken), CONTRACT, 1)


@pytest.mark.parametrize(
    ("mode", "memory", "disk", "expected"),
    [
        ("auto", 10**9, 0, "memory"),
        ("auto", 0, 10**9, "disk"),
        ("auto", 0, 1000, "stream"),
        ("off", 0, 1000, "disk"),
        ("off", 10**9, 0, "memory"),
        ("on", 10**9, 10**9, "stream"),
    ],
)
def test_storage_chooses_memory_disk_or_streaming(
    tmp_path: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: stream.Stream,
    memory: int,
    disk: int,
    expected: str,
) -> None:
    """`memory` and `disk` are the available bytes; the quadrants take 8 x 4 x 24 x 24."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(dataset, "MEMORY_BYTES", memory)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(disk, 0, disk))
    with Storage(tmp_path, mode, 1) as storage:
        store = storage.open(read(data), CONTRACT)
        found = "stream" if isinstance(store, StreamedStore) else "memory"
        if isinstance(store, QuadrantStore) and isinstance(store.quadrants, np.memmap):
            found = "disk"
        assert found == expected
    del store
    gc.collect()


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="a group of processes is interrupted")
@pytest.mark.parametrize("moment", ["training on", "Epoch 01"])
def test_ctrl_c_ends_workers_and_exits_130(tmp_path: Path, trained: Any, moment: str) -> None:
    """A terminal sends the signal to the workers too, which may be importing modules."""
    options = ["--recipe", "scratch", "--input-size", "32", "--epochs", "99", "--stream", "on", "--workers", "2"]
    line = [sys.executable, "-m", "echoquad", "train", str(trained.data), "--out", str(tmp_path / "run"), *options]
    started = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert started.stderr is not None
    said = iter(started.stderr.readline, "")
    assert any(moment in text for text in said)
    time.sleep(1)
    os.killpg(started.pid, signal.SIGINT)
    rest = [text for text in said if not text.startswith("Epoch")]
    assert (started.wait(60), rest) == (130, ["interrupted\n"])
    started.stderr.close()
