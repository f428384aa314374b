"""Writes of several threads share a commit, and none suffers from another's error."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from echoquad_serve.errors import StoreError
from echoquad_serve.queue.database import Database


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "queue.sqlite3", create=True)
    with database.transaction() as connection:
        connection.execute("CREATE TABLE marks (mark TEXT UNIQUE)")
    yield database
    database.close()


def write_together(database: Database, applies: list[Callable[[sqlite3.Connection], Any]]) -> tuple[list[Any], list]:
    """Return the outcomes of threads that write while the lock is held, and what was committed in which order."""
    outcomes: list[Any] = [None] * len(applies)
    committed: list[Any] = []

    def write(index: int) -> None:
        try:
            outcomes[index] = database.write(applies[index], lambda value: committed.append(value) or value)
        except Exception as error:
            outcomes[index] = error

    threads = []
    with database.lock:
        for index in range(len(applies)):
            threads.append(threading.Thread(target=write, args=[index]))
            threads[-1].start()
            while len(database._writes) <= index:
                time.sleep(0.001)
    for thread in threads:
        thread.join(10)
    return outcomes, committed


def mark(text: str) -> Callable[[sqlite3.Connection], str]:
    def apply(connection: sqlite3.Connection) -> str:
        connection.execute("INSERT INTO marks VALUES (?)", (text,))
        return text

    return apply


def marks(database: Database) -> list[str]:
    return [text for (text,) in database.read("SELECT mark FROM marks ORDER BY rowid")]


def test_waiting_writes_share_one_commit_in_their_order(database: Database) -> None:
    statements: list[str] = []
    database._connection.set_trace_callback(statements.append)
    outcomes, committed = write_together(database, [mark(text) for text in "abcdef"])
    assert outcomes == committed == list("abcdef") == marks(database)
    assert statements.count("COMMIT") == 1


def test_a_write_that_fails_does_not_fail_the_others_of_its_group(database: Database) -> None:
    def faulty(_: sqlite3.Connection) -> None:
        raise KeyError("unknown job")

    outcomes, committed = write_together(database, [mark("a"), faulty, mark("b"), mark("a"), mark("c")])
    assert committed == marks(database) == ["a", "b", "c"]
    assert [outcomes[index] for index in (0, 2, 4)] == ["a", "b", "c"]
    assert isinstance(outcomes[1], KeyError)
    assert isinstance(outcomes[3], StoreError)  # UNIQUE
    assert not database._connection.in_transaction


def test_queries_inside_a_write_see_it_and_do_not_end_it(database: Database) -> None:
    def apply(connection: sqlite3.Connection) -> list[str]:
        mark("a")(connection)
        return marks(database)

    assert database.write(apply, lambda value: value) == ["a"]
    assert marks(database) == ["a"]


def test_an_interrupted_write_is_undone_and_the_next_one_works(database: Database) -> None:
    def interrupted(_: sqlite3.Connection) -> None:
        raise KeyboardInterrupt

    database.write(mark("a"), lambda value: value)
    with pytest.raises(KeyboardInterrupt):
        database.write(interrupted, lambda value: value)
    assert marks(database) == ["a"]
    assert database.write(mark("b"), lambda value: value) == "b"


def test_no_query_sees_what_a_failed_rollback_has_left(database: Database) -> None:
    connection = database._connection

    class Faulty:
        broken = True

        def __getattr__(self, name: str) -> Any:
            return getattr(connection, name)

        def execute(self, statement: str, *values: Any) -> Any:
            if statement == "ROLLBACK" and self.broken:
                self.broken = False
                raise sqlite3.OperationalError("disk I/O error")
            return connection.execute(statement, *values)

    def apply(used: sqlite3.Connection) -> None:
        mark("a")(used)
        raise KeyError("the first error")

    database._connection = Faulty()  # type: ignore[assignment]
    with pytest.raises(KeyError, match="the first error"):  # and not that of the rollback
        database.write(apply, lambda value: value)
    assert connection.in_transaction
    assert marks(database) == []


def test_a_closed_database_says_so(tmp_path: Path) -> None:
    database = Database(tmp_path / "queue.sqlite3", create=True)
    database.close()
    for call in (
        lambda: database.read("SELECT 1"),
        lambda: database.write(lambda connection: None, lambda value: value),
    ):
        with pytest.raises(StoreError, match="closed"):
            call()
