"""Opening: one service at a time, what a crash left, and databases that cannot be used."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from echoquad_serve.config import StoreConfig
from echoquad_serve.errors import StoreError
from echoquad_serve.queue import JobStore


def refusal(open_store) -> str:
    """Return the one line by which a store is refused, and check that nothing in its folder changes."""
    with pytest.raises(StoreError) as caught:
        open_store()
    assert caught.value.code == "E_STORE"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


def test_a_second_service_is_refused_here_and_in_another_process(open_store, tmp_path: Path) -> None:
    store = open_store()
    assert "another service" in refusal(open_store)
    code = (
        "import sys; from pathlib import Path; from echoquad_serve.config import StoreConfig\n"
        "from echoquad_serve.queue import JobStore; JobStore(StoreConfig(folder=Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "store")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert "StoreError" in ended.stderr
    assert "another service" in ended.stderr.splitlines()[-1]
    store.close()
    open_store()


def test_jobs_that_were_taken_and_not_finished_wait_again_in_their_old_order(open_store, offer, finish) -> None:
    store = open_store()
    jobs = [offer(store) for _ in range(5)]
    store.take(3, 0)
    finish(store, jobs[1])
    store.close()
    store = open_store()
    assert store.take(9, 0) == [jobs[0], *jobs[2:]]


def crash(store: JobStore) -> None:
    """End a store as a crash of its process does."""
    noted = (store.incoming.parent / "taken").read_bytes()
    store.close()
    (store.incoming.parent / "taken").write_bytes(noted)


def test_a_job_during_which_the_service_crashed_says_so_and_is_taken_alone(open_store, offer, finish) -> None:
    store = open_store()
    first, second, third, fourth = (offer(store) for _ in range(4))
    store.take(3, 0)
    finish(store, first)
    crash(store)

    store = open_store()
    assert [(job.id, job.interrupted) for job in store.take(9, 0)] == [(second.id, 1)]
    crash(store)  # during the second alone

    store = open_store()
    assert [(job.id, job.interrupted) for job in store.take(9, 0)] == [(second.id, 2)]
    finish(store, second, status="failed", rows=())
    assert [(job.id, job.interrupted) for job in store.take(9, 0)] == [(third.id, 1)]
    assert store.take(9, 0) == [fourth]
    store.close()  # in order, which is no crash

    store = open_store()
    assert [(job.id, job.interrupted) for job in store.take(9, 0)] == [(third.id, 1)]


def test_no_other_job_is_taken_together_with_one_during_which_the_service_crashed(open_store, offer) -> None:
    store = open_store()
    first, second, third = (offer(store) for _ in range(3))
    store.close()
    (store.incoming.parent / "taken").write_text(f"{second.id}\n")
    store = open_store()
    assert [[job.id for job in store.take(9, 0)] for _ in range(3)] == [[first.id], [second.id], [third.id]]


def test_a_file_of_taken_jobs_that_is_damaged_or_a_link_does_no_harm(open_store, offer, tmp_path: Path) -> None:
    store = open_store()
    job = offer(store)
    store.close()
    taken = tmp_path / "store" / "taken"
    taken.write_bytes(b"\xff\x00 half an identif\n" * 100)
    store = open_store()
    assert store.take(9, 0) == [job]
    store.close()
    taken.unlink()
    taken.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="symbolic link"):
        open_store()
    assert not (tmp_path / "elsewhere").exists()


def test_more_jobs_than_the_queue_may_hold_by_now_are_not_lost(open_store, offer) -> None:
    store = open_store()
    jobs = [offer(store) for _ in range(5)]
    store.close()
    assert open_store(max_waiting=2).take(9, 0) == jobs


def test_what_was_being_received_is_swept(open_store) -> None:
    store = open_store()
    (store.incoming / "half.dcm").write_bytes(b"x")
    (store.incoming / "folder").mkdir()
    (store.incoming / "folder" / "part").write_bytes(b"x")
    (store.incoming / "link").symlink_to("/nowhere")
    store.close()
    assert not list(open_store().incoming.iterdir())


def test_a_file_without_a_job_is_set_aside_and_comes_back_with_its_job(open_store, offer, caplog) -> None:
    store = open_store()
    offer(store)
    database = store.incoming.parent / "queue.sqlite3"
    store.close()
    older = database.read_bytes()
    store = open_store()
    job = offer(store, b"newer")
    store.close()
    newer = database.read_bytes()

    database.write_bytes(older)  # as a copy that somebody restored
    store = open_store()
    assert not job.path.exists()
    assert (job.path.parent.parent / "unclaimed" / job.path.name).read_bytes() == b"newer"
    assert "1 files have no job" in caplog.text
    assert len(store.take(9, 0)) == 1
    store.close()

    database.write_bytes(newer)
    store = open_store()
    assert store.take(9, 0)[1] == job
    assert job.path.read_bytes() == b"newer"


def test_a_job_without_its_file_still_ends_in_a_result(open_store, offer, finish, caplog) -> None:
    store = open_store()
    lost, kept = offer(store), offer(store)
    store.close()
    lost.path.unlink()
    store = open_store()
    assert "1 jobs have no file" in caplog.text
    assert store.take(9, 0) == [lost, kept]
    assert finish(store, lost, status="failed", rows=()).number == 1


def damage_start(path: Path) -> None:
    path.write_bytes(b"This is no database. " * 1000)


def damage_middle(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096:20480] = os.urandom(16384)
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, 8192)


@pytest.mark.parametrize("damage", [damage_start, damage_middle, cut])
def test_a_damaged_database_is_refused_and_nothing_is_touched(open_store, offer, finish, damage) -> None:
    store = open_store("pacs")
    for _ in range(50):
        finish(store, offer(store))
    (store.incoming / "half").write_bytes(b"x")
    folder = store.incoming.parent
    store.close()
    damage(folder / "queue.sqlite3")
    before = files(folder)
    assert "damaged" in refusal(open_store)
    assert "damaged" in refusal(open_store)  # the lock was released
    assert files(folder) == before


def test_damage_of_any_page_is_found_when_the_store_is_opened(open_store, offer, finish) -> None:
    store = open_store("pacs")
    for number in range(50):
        finish(store, offer(store, key=f"k{number}"))
    path = store.incoming.parent / "queue.sqlite3"
    store.close()
    content = path.read_bytes()
    assert len(content) > 10 * 4096
    for start in range(0, len(content), 4096):
        path.write_bytes(content[:start] + os.urandom(4096) + content[start + 4096 :])
        assert "damaged" in refusal(open_store)
    path.write_bytes(content)
    assert len(open_store().results()) == 50


@pytest.mark.parametrize("content", [None, b""])
def test_a_missing_database_beside_a_spool_with_objects_is_refused(open_store, offer, content) -> None:
    store = open_store()
    job = offer(store)
    folder = store.incoming.parent
    store.close()
    (folder / "queue.sqlite3").unlink()
    if content is not None:
        (folder / "queue.sqlite3").write_bytes(content)
    assert "missing" in refusal(open_store)
    assert job.path.exists()
    job.path.unlink()
    open_store()  # nothing can be lost


def test_a_newer_schema_and_a_foreign_database_are_refused(open_store) -> None:
    store = open_store()
    path = store.incoming.parent / "queue.sqlite3"
    store.close()
    for statement, part in (
        ("PRAGMA user_version = 99", "version 99"),
        ("PRAGMA application_id = 7", "no database of this service"),
    ):
        with sqlite3.connect(path) as connection:
            connection.execute(statement)
        connection.close()
        before = path.read_bytes()
        assert part in refusal(open_store)
        assert path.read_bytes() == before


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(Exception) as caught:
            JobStore(StoreConfig(folder=folder))
        assert "\n" not in str(caught.value)
        assert caught.value.code in {"E_STORE", "E_OUTPUT"}


def test_the_database_commits_durably(open_store) -> None:
    connection = open_store()._database._connection
    answers = [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")]
    assert answers == ["truncate", 2]  # not "delete", whose commits are durable with EXTRA alone


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_only_the_owner_may_look_into_the_folders(open_store) -> None:
    store = open_store()
    for path in (store.incoming.parent, store.incoming, store._spool.accepted):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux, where a descriptor has a path")
def test_file_move_and_folder_are_on_the_disk_before_the_row_and_the_row_before_the_acknowledgement(
    open_store, offer, monkeypatch
) -> None:
    store = open_store()
    steps: list[str] = []
    sync, replace, connection = os.fsync, Path.replace, store._database._connection

    class Traced:
        def __getattr__(self, name: str) -> Any:
            return getattr(connection, name)

        def execute(self, statement: str, *values: Any) -> Any:
            if statement in {"COMMIT", "ROLLBACK"}:
                steps.append(statement)
            return connection.execute(statement, *values)

    def traced_sync(descriptor: int) -> None:
        steps.append("sync " + Path(f"/proc/self/fd/{descriptor}").readlink().parent.name)
        sync(descriptor)

    def traced_replace(path: Path, target: Path) -> Path:
        steps.append(f"move {path.parent.name} {target.parent.name}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", traced_sync)
    monkeypatch.setattr(Path, "replace", traced_replace)
    store._database._connection = Traced()
    offer(store)
    assert steps == ["move incoming spool", "sync spool", "sync store", "COMMIT"]  # "store" holds the spool
