"""The watched folder: real files, each accepted once and whole, on shares that fail, and at a full queue."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from echoquad_serve.config import FolderIntakeConfig, StoreConfig
from echoquad_serve.errors import IntakeError, QueueFullError
from echoquad_serve.intake import folder_scan, watched_folder
from echoquad_serve.intake.watched_folder import WatchedFolder
from echoquad_serve.queue import JobStore
from echoquad_serve.records import IncomingObject, Job

POLL_S = 0.05


class Acceptor:
    """Accepts as the store does: moves the file, and makes one job of a key."""

    def __init__(self, folder: Path) -> None:
        self.incoming = folder / "store" / "incoming"
        self.incoming.mkdir(parents=True)
        self.jobs: dict[str, tuple[IncomingObject, bytes]] = {}
        self.offers = 0
        self.error: Exception | None = None
        self.room: Exception | None = None

    def __call__(self, incoming: IncomingObject) -> Job:
        self.offers += 1
        if self.error is not None:
            raise self.error
        assert incoming.path.parent == self.incoming and incoming.origin == "folder"
        if incoming.key not in self.jobs:
            self.jobs[incoming.key] = incoming, incoming.path.read_bytes()
            incoming.path.unlink()
        return Job(f"{len(self.jobs):032x}", incoming.path, 0.0, "folder", incoming.name)

    def check_room(self, _: int) -> None:
        if self.room is not None:
            raise self.room

    @property
    def names(self) -> list[str]:
        return [incoming.name for incoming, _ in self.jobs.values()]


@pytest.fixture
def accept(tmp_path: Path) -> Acceptor:
    return Acceptor(tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "watched"
    path.mkdir()
    return path


@pytest.fixture
def watch(folder: Path, accept: Acceptor) -> Iterator[Callable[..., WatchedFolder]]:
    """Start to watch; the threads of all must end, and leave nothing in the folder for incoming files."""
    opened: list[WatchedFolder] = []

    def watch_(after: Any = "leave", path: Path = folder) -> WatchedFolder:
        config = FolderIntakeConfig(path, poll_s=POLL_S, after=after)
        opened.append(WatchedFolder(config, accept, accept.incoming, accept.check_room))
        opened[-1].start()
        return opened[-1]

    yield watch_
    for watched in opened:
        watched.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "echoquad-intake-folder"]
    assert not list(accept.incoming.iterdir())


@pytest.fixture
def settle_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched_folder, "_SETTLE_S", 0.1)


def write(path: Path, content: bytes = b"pixels", mtime: float | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    if mtime is not None:
        os.utime(path, (mtime, mtime))
    return path


def wait_until(condition: Callable[[], object], timeout: float = 60.0) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "the condition has not come true"
        time.sleep(0.01)


def looks(count: int = 5) -> None:
    time.sleep(count * POLL_S)


def test_everything_that_is_there_at_the_start_is_accepted_the_oldest_first(
    folder: Path, accept: Acceptor, watch: Any
) -> None:
    for index, name in enumerate(("c.png", "sub/deeper/a.dcm", "b.AVI", "sub/a.jpeg")):
        write(folder / name, name.encode(), mtime=1000.0 + index)
    watched = watch()
    wait_until(lambda: len(accept.jobs) == 4)
    assert accept.names == ["c.png", "sub/deeper/a.dcm", "b.AVI", "sub/a.jpeg"]
    assert [data for _, data in accept.jobs.values()] == [name.encode() for name in accept.names]
    key, (incoming, _) = next(iter(accept.jobs.items()))
    assert key.endswith(":c.png:5:1000000000000") and incoming.path.suffix == ".png"
    wait_until(lambda: watched.status()["waiting"] == 0)
    assert watched.status()["ok"] and watched.status()["accepted"] == 4 and (folder / "c.png").exists()


def test_a_later_file_is_accepted(folder: Path, accept: Acceptor, watch: Any) -> None:
    watch()
    looks()
    write(folder / "later.png")
    wait_until(lambda: accept.names == ["later.png"])


def test_a_restart_makes_no_second_job_and_copies_nothing_again(folder: Path, accept: Acceptor, watch: Any) -> None:
    for number in range(20):
        write(folder / f"{number}.png")
    first = watch()
    wait_until(lambda: first.status()["accepted"] == 20)
    first.close()
    second = watch()
    write(folder / "new.png")
    wait_until(lambda: second.status()["accepted"] == 1)
    assert len(accept.jobs) == accept.offers == 21


def test_a_restart_without_the_record_offers_the_same_keys(folder: Path, accept: Acceptor, watch: Any) -> None:
    write(folder / "a.png")
    watch()
    wait_until(lambda: len(accept.jobs) == 1)
    wait_until(lambda: list(accept.incoming.parent.glob("*.accepted")))
    next(accept.incoming.parent.glob("*.accepted")).unlink()
    watch()
    wait_until(lambda: accept.offers == 2)
    looks()
    assert len(accept.jobs) == 1


def test_two_folders_with_the_same_names_sizes_and_times(tmp_path: Path, accept: Acceptor, watch: Any) -> None:
    for name in ("one", "two"):
        write(tmp_path / name / "a.png", name.encode(), mtime=1000.0)
        watch(path=tmp_path / name)
    wait_until(lambda: len(accept.jobs) == 2)


def test_a_file_that_is_replaced_is_a_new_object(folder: Path, accept: Acceptor, watch: Any) -> None:
    watch()
    write(folder / "a.png", b"first")
    wait_until(lambda: len(accept.jobs) == 1)
    write(folder / "a.png", b"second")
    wait_until(lambda: [data for _, data in accept.jobs.values()] == [b"first", b"second"])


def test_what_is_no_frame_stays_and_is_counted_once(
    folder: Path, accept: Acceptor, watch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    dicom = bytes(128) + b"DICM" + bytes(100)
    for name in ("report.pdf", "DOE^JOHN.txt", "IM000002", "1.2.840.1.7"):
        write(folder / name)
    write(folder / "IM000001", dicom)
    write(folder / "sub" / "1.2.840.113619", dicom)
    for name in (".hidden.png", "Thumbs.db", "a.png.part", "b.png.TMP", "c.png.partial", "x.overlay.png", "DICOMDIR"):
        write(folder / name)
    for name in (".git/a.png", "@eaDir/a.png", "__MACOSX/a.png"):
        write(folder / name)
    watched = watch()
    wait_until(lambda: len(accept.jobs) == 2 and watched.status()["ignored"] == 4)
    looks(10)
    assert sorted(accept.names) == ["IM000001", "sub/1.2.840.113619"]
    assert watched.status()["ignored"] == 4 and watched.status()["waiting"] == 0
    assert "DOE" not in caplog.text and "4 more files" in caplog.text


@pytest.mark.skipif(sys.platform == "win32", reason="needs links and pipes")
def test_links_and_pipes_are_not_followed(folder: Path, tmp_path: Path, accept: Acceptor, watch: Any) -> None:
    write(tmp_path / "secret.png", b"secret")
    write(tmp_path / "outside" / "x.png", b"secret")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "folder").symlink_to(tmp_path / "outside")
    (folder / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe.png")
    write(folder / "real.png")
    watch()
    wait_until(lambda: accept.names == ["real.png"])
    looks()
    assert accept.names == ["real.png"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs links")
def test_a_file_that_becomes_a_link_before_it_is_opened_is_not_followed(
    folder: Path, tmp_path: Path, accept: Acceptor, watch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "secret.png", b"secret", mtime=1000.0)
    swapped = write(folder / "a.png", b"pixels", mtime=1000.0)

    def check_room(_: int) -> None:
        if not swapped.is_symlink():
            swapped.unlink()
            swapped.symlink_to(tmp_path / "secret.png")

    monkeypatch.setattr(accept, "check_room", check_room)
    watched = watch()
    wait_until(lambda: watched.status()["failures"] == 1)
    looks()
    assert not accept.jobs


@pytest.mark.skipif(sys.platform != "linux", reason="needs names that are any bytes")
def test_a_name_that_is_not_utf_8(folder: Path, accept: Acceptor, watch: Any) -> None:
    write(folder / os.fsdecode(b"\xff.png"))
    watch()
    wait_until(lambda: accept.names == ["\\udcff.png"])


def test_a_growing_file_is_taken_when_it_is_whole(folder: Path, accept: Acceptor, watch: Any) -> None:
    watched = watch()
    with (folder / "clip.avi").open("wb") as stream:
        for _ in range(20):
            stream.write(b"x" * 1000)
            stream.flush()
            time.sleep(POLL_S / 2)
            assert watched.status()["accepted"] == 0
    wait_until(lambda: accept.jobs)
    looks()
    assert [len(data) for _, data in accept.jobs.values()] == [20_000]


def test_an_empty_file_waits_until_it_is_written(folder: Path, accept: Acceptor, watch: Any) -> None:
    write(folder / "a.png", b"")
    watch()
    looks(10)
    assert not accept.jobs
    write(folder / "a.png", b"pixels")
    wait_until(lambda: len(accept.jobs) == 1)


@pytest.mark.parametrize("change", ["grow", "shrink", "rewrite"])
def test_a_file_that_changes_while_it_is_copied_is_left_for_the_next_look(
    folder: Path, accept: Acceptor, watch: Any, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    path = write(folder / "a.avi", b"a" * 100_000, mtime=1000.0)
    final = {"grow": b"a" * 150_000, "shrink": b"b" * 10, "rewrite": b"c" * 100_000}[change]
    monkeypatch.setattr(watched_folder, "_COPY_BYTES", 1000)
    changed, original = [], watched_folder._write

    def change_after_the_first_piece(target: Any, data: bytes) -> None:
        original(target, data)
        if not changed:
            changed.append(True)
            write(path, final)

    monkeypatch.setattr(watched_folder, "_write", change_after_the_first_piece)
    watch()
    wait_until(lambda: accept.jobs)
    looks()
    assert [data for _, data in accept.jobs.values()] == [final]


def test_a_full_queue_loses_nothing_and_keeps_the_order(folder: Path, accept: Acceptor, watch: Any) -> None:
    accept.room = QueueFullError("1000 objects wait", retry_after=0.2)
    for number in range(30):
        write(folder / f"{29 - number}.png", mtime=1000.0 + number)
    watched = watch()
    wait_until(lambda: watched.status()["state"] == "full")
    assert not watched.status()["ok"] and watched.status()["waiting"] == 30 and accept.offers == 0
    accept.room, accept.error = None, IntakeError("full after all", retry_after=0.1)
    wait_until(lambda: accept.offers >= 1)
    accept.error = None
    wait_until(lambda: len(accept.jobs) == 30)
    assert accept.names == [f"{29 - number}.png" for number in range(30)]
    wait_until(lambda: watched.status()["ok"])


def test_the_pause_is_the_one_that_is_asked_for(folder: Path, accept: Acceptor, watch: Any) -> None:
    calls: list[float] = []

    def check_room(_: int) -> None:
        calls.append(time.monotonic())
        raise QueueFullError("full", retry_after=0.5)

    accept.check_room = check_room  # type: ignore[method-assign]
    write(folder / "a.png")
    write(folder / "b.png")
    watch()
    wait_until(lambda: len(calls) == 3)
    assert calls[2] - calls[0] >= 1.0


def test_a_fault_of_one_file_ends_nothing(folder: Path, accept: Acceptor, watch: Any) -> None:
    original = accept.__call__

    class Faulty(Acceptor):
        def __init__(self) -> None: ...

        def __call__(self, incoming: IncomingObject) -> Job:
            if incoming.name == "bad.png":
                raise ValueError("NAME^PATIENT")
            return original(incoming)

    write(folder / "bad.png", mtime=1.0)
    write(folder / "good.png", mtime=2.0)
    watched = WatchedFolder(FolderIntakeConfig(folder, POLL_S), Faulty(), accept.incoming, accept.check_room)
    watched.start()
    wait_until(lambda: accept.names == ["good.png"])
    assert watched.status()["faults"] == 1 and watched.status()["waiting"] >= 1
    watched.close()


@pytest.mark.usefixtures("settle_at_once")
def test_delete(folder: Path, accept: Acceptor, watch: Any) -> None:
    write(folder / "sub" / "a.png")
    watch("delete")
    wait_until(lambda: not (folder / "sub" / "a.png").exists())
    assert accept.names == ["sub/a.png"]


@pytest.mark.usefixtures("settle_at_once")
def test_move_overwrites_nothing(folder: Path, accept: Acceptor, watch: Any) -> None:
    kept = write(folder / "accepted" / "sub" / "a.png", b"from last year")
    watch("move")
    for content in (b"one", b"two"):
        write(folder / "sub" / "a.png", content)
        wait_until(lambda: not (folder / "sub" / "a.png").exists())
    looks()
    assert accept.names == ["sub/a.png", "sub/a.png"] and kept.read_bytes() == b"from last year"
    assert (folder / "accepted/sub/a-2.png").read_bytes() == b"one"
    assert (folder / "accepted/sub/a-3.png").read_bytes() == b"two"


@pytest.mark.parametrize("after", ["delete", "move"])
def test_a_writer_that_paused_is_not_cut_off(
    folder: Path, accept: Acceptor, watch: Any, monkeypatch: pytest.MonkeyPatch, after: Any
) -> None:
    monkeypatch.setattr(watched_folder, "_SETTLE_S", 0.5)
    watch(after)
    with (folder / "clip.avi").open("wb", buffering=0) as stream:
        stream.write(b"half")
        wait_until(lambda: len(accept.jobs) == 1)
        stream.write(b" and half")
    wait_until(lambda: not (folder / "clip.avi").exists())
    assert [data for _, data in accept.jobs.values()] == [b"half", b"half and half"]


@pytest.mark.usefixtures("settle_at_once")
@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs permissions, which do not bind root")
def test_a_file_that_cannot_be_deleted_is_accepted_once(folder: Path, accept: Acceptor, watch: Any) -> None:
    write(folder / "a.png")
    folder.chmod(0o500)
    watched = watch("delete")
    wait_until(lambda: watched.status()["failures"])
    looks(10)
    folder.chmod(0o700)
    assert accept.offers == 1


@pytest.mark.usefixtures("settle_at_once")
def test_a_file_that_the_share_does_not_let_go_is_accepted_once(
    folder: Path, accept: Acceptor, watch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", refuse)
    write(folder / "a.png")
    watched = watch("move")
    wait_until(lambda: watched.status()["failures"] >= 2)
    assert accept.offers == 1 and (folder / "a.png").exists()
    assert not list((folder / "accepted").iterdir())


# Shares


def test_a_share_that_goes_away_is_told_and_recovered_from(folder: Path, accept: Acceptor, watch: Any) -> None:
    write(folder / "a.png")
    watched = watch()
    wait_until(lambda: len(accept.jobs) == 1)
    away = folder.with_name("away")
    folder.rename(away)
    wait_until(lambda: watched.status()["state"] == "unreachable", 2)
    assert not watched.status()["ok"] and "No such file" in watched.status()["error"]
    write(away / "b.png")
    away.rename(folder)
    wait_until(lambda: len(accept.jobs) == 2)
    wait_until(lambda: watched.status()["ok"])
    assert accept.offers == 2


def test_a_folder_that_is_mounted_later(tmp_path: Path, accept: Acceptor, watch: Any) -> None:
    watched = watch(path=tmp_path / "later")
    wait_until(lambda: watched.status()["state"] == "unreachable")
    write(tmp_path / "later" / "a.png")
    wait_until(lambda: accept.names == ["a.png"])


def test_an_unmounted_share_looks_empty_and_its_files_make_no_second_job(
    folder: Path, accept: Acceptor, watch: Any
) -> None:
    for number in range(5):
        write(folder / f"{number}.png", mtime=1000.0)
    watch()
    wait_until(lambda: len(accept.jobs) == 5)
    away = folder.with_name("away")
    folder.rename(away)
    folder.mkdir()
    looks()
    folder.rmdir()
    away.rename(folder)
    write(folder / "new.png")
    wait_until(lambda: len(accept.jobs) == 6)
    assert accept.offers == 6


def test_a_subfolder_that_cannot_be_read_hides_no_other(
    folder: Path, accept: Acceptor, watch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder / "bad" / "a.png")
    write(folder / "good" / "b.png")
    original = os.scandir

    def scandir(path: Any) -> Any:
        if Path(path).name == "bad":
            raise OSError(5, "Input/output error")
        return original(path)

    with monkeypatch.context() as patch:
        patch.setattr(folder_scan.os, "scandir", scandir)
        watched = watch()
        wait_until(lambda: accept.names == ["good/b.png"])
        assert watched.status()["unreadable_folders"] == 1
    wait_until(lambda: accept.names == ["good/b.png", "bad/a.png"])


@pytest.mark.parametrize("call", ["scandir", "read"])
def test_a_call_that_blocks_is_told_within_two_seconds_and_recovered_from(
    folder: Path, accept: Acceptor, watch: Any, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """A dead server of a hard mount: the call does not return, and does not fail."""
    go_on = threading.Event()

    def block(original: Any) -> Any:
        def blocked(*values: Any, **named: Any) -> Any:
            go_on.wait(20)
            return original(*values, **named)

        return blocked

    if call == "scandir":
        monkeypatch.setattr(folder_scan.os, "scandir", block(os.scandir))
    else:
        monkeypatch.setattr(watched_folder.os, "open", block(os.open))
    write(folder / "a.png")
    watched = watch()
    wait_until(lambda: watched.status()["state"] == "blocked", 2)
    assert not watched.status()["ok"] and "not answered" in watched.status()["error"]
    began = time.monotonic()
    if call == "scandir":
        go_on.set()
        wait_until(lambda: watched.status()["ok"] and len(accept.jobs) == 1)
    else:  # close does not wait for it either
        watched.close()
        assert time.monotonic() - began < 2
        go_on.set()
        wait_until(lambda: not watched._thread.is_alive())


def test_a_file_that_cannot_be_read_does_not_hold_up_the_others(
    folder: Path, accept: Acceptor, watch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, locked = os.open, [True]

    def open_(path: Any, *values: Any, **named: Any) -> int:
        if locked[0] and str(path).endswith("locked.png"):
            raise PermissionError(13, "The process cannot access the file")
        return original(path, *values, **named)

    monkeypatch.setattr(watched_folder.os, "open", open_)
    write(folder / "locked.png", mtime=1.0)
    write(folder / "free.png", mtime=2.0)
    watched = watch()
    wait_until(lambda: accept.names == ["free.png"])
    assert watched.status()["failures"] == 1
    locked[0] = False
    wait_until(lambda: accept.names == ["free.png", "locked.png"])


def test_a_full_disk_of_the_queue_is_no_failure_of_the_share(
    folder: Path, accept: Acceptor, watch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(watched_folder, "write_all", full)
        write(folder / "a.png")
        watched = watch()
        wait_until(lambda: watched.status()["state"] == "full")
        assert "No space left" in watched.status()["error"] and not list(accept.incoming.iterdir())
    watched._resume_at = 0.0
    wait_until(lambda: len(accept.jobs) == 1)


# With the real store


def test_with_the_store(tmp_path: Path, folder: Path) -> None:
    for number in range(10):
        write(folder / f"{number}.png", bytes([number]) * 10, mtime=1000.0 + number)
    config = StoreConfig(folder=tmp_path / "queue", min_free_mb=0, max_waiting=4)
    jobs: list[Job] = []
    for _ in range(2):  # the second time after a restart
        store = JobStore(config)
        watched = WatchedFolder(FolderIntakeConfig(folder, POLL_S), store.accept, store.incoming, store.check_room)
        watched._clock = lambda: 100 * time.monotonic()  # the store asks for seconds of patience
        watched.start()
        while len(jobs) < 10:
            taken = store.take(10, 5)
            assert 0 < len(taken) <= 4
            for job in taken:
                assert job.path.read_bytes() == bytes([int(job.name[0])]) * 10
                jobs.append(job)
                store.finish(_result(job))
        looks(10)
        assert store.status()["waiting"] == 0 and not list(store.incoming.iterdir())
        watched.close()
        store.close()
    assert [job.name for job in jobs] == [f"{number}.png" for number in range(10)]


def _result(job: Job) -> Any:
    from echoquad_serve.records import Result

    return Result(job.id, "done", "folder", job.name, job.received, time.time())


@pytest.mark.slow
def test_ten_thousand_files(tmp_path: Path, folder: Path, accept: Acceptor, caplog: pytest.LogCaptureFixture) -> None:
    """All are accepted; after that a look takes milliseconds, and watching them less than a hundredth of a core."""
    for number in range(10_000):
        write(folder / f"study{number % 10}" / f"{number}.png", b"x", mtime=1000.0 + number)
    watched = WatchedFolder(FolderIntakeConfig(folder, 1.0), accept, accept.incoming, accept.check_room)
    watched.start()
    wait_until(lambda: len(accept.jobs) == 10_000, 120)
    wait_until(lambda: watched.status()["waiting"] == 0)
    assert accept.names == [f"study{number % 10}/{number}.png" for number in range(10_000)]
    time.sleep(3)
    began, cpu = time.monotonic(), time.process_time()
    time.sleep(20)
    idle = (time.process_time() - cpu) / (time.monotonic() - began)
    assert idle < 0.02
    write(folder / "study0" / "0.png", b"changed")  # found within some looks
    wait_until(lambda: len(accept.jobs) == 10_001, 60)
    watched.close()
    shutil.rmtree(tmp_path)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
