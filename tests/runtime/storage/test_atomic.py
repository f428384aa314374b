"""Atomic writes: complete files or none, and one-line errors if the system refuses."""

from __future__ import annotations

import errno
import inspect
import json
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from echoquad_runtime.errors import EchoQuadError, FrameReadError, OutputError
from echoquad_runtime.storage import atomic
from echoquad_runtime.storage.atomic import (
    make_folder,
    output_errors,
    sync_folder,
    write_atomically,
    write_bytes,
    write_json,
)

if os.name != "nt":
    import fcntl

posix_only = pytest.mark.skipif(os.name == "nt", reason="POSIX only")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_file_appears_complete_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "out.csv"
    target.write_bytes(b"old")
    with write_atomically(target) as stream:
        stream.write(b"new")
        stream.flush()
        assert target.read_bytes() == b"old"
        (temporary,) = set(names(tmp_path)) - {"out.csv"}
        assert temporary.startswith(".")
    assert target.read_bytes() == b"new"
    assert names(tmp_path) == ["out.csv"]


@posix_only
def test_reader_of_the_old_file_keeps_reading_it(tmp_path: Path) -> None:
    target = tmp_path / "out.csv"
    target.write_bytes(b"old")
    with target.open("rb") as reader:
        write_bytes(target, b"new and longer")
        assert reader.read() == b"old"
    assert target.read_bytes() == b"new and longer"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, EchoQuadError])
@pytest.mark.parametrize("held", [b"old", None])
def test_failed_write_leaves_the_old_file_only(tmp_path: Path, held: bytes | None, error: type[BaseException]) -> None:
    target = tmp_path / "out.csv"
    if held is not None:
        target.write_bytes(held)
    with pytest.raises(error), write_atomically(target) as stream:
        stream.write(b"half")
        raise error("stop")
    assert names(tmp_path) == ([] if held is None else ["out.csv"])
    assert held is None or target.read_bytes() == held


def test_system_error_is_a_one_line_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "absent" / "out.csv", tmp_path / "file" / "out.csv", tmp_path / ("x" * 300)):
        with pytest.raises(OutputError, match=r"cannot be written \(.+\)") as caught:
            write_bytes(path, b"data")
        assert str(caught.value).startswith(path.as_posix())
        assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["file"]


def test_folder_as_target_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="folder"):
        write_bytes(tmp_path, b"data")


def test_output_errors_keeps_specific_errors() -> None:
    # A FrameReadError is an OSError as well, but not about the result file.
    with pytest.raises(FrameReadError, match=r"^gone$"), output_errors(Path("out.csv")):
        raise FrameReadError("gone")
    with pytest.raises(BrokenPipeError), output_errors(Path("stdout")):
        raise BrokenPipeError
    with pytest.raises(OutputError, match="No space left"), output_errors(Path("out.csv")):
        raise OSError(28, "No space left on device")


@posix_only
def test_full_disk_is_an_output_error(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with pytest.raises(OutputError, match="No space left on device"):
        write_bytes(Path("/dev/full"), b"data")
    (tmp_path / "out.csv").symlink_to("/dev/full")
    with pytest.raises(OutputError, match="No space left on device"):
        write_bytes(tmp_path / "out.csv", b"x" * 100_000)
    assert Path("/dev/full").exists()


@posix_only
def test_pipe_is_written_directly(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_bytes(tmp_path / "pipe", b"data")
    assert os.read(reader, 9) == b"data"
    os.close(reader)
    assert names(tmp_path) == ["pipe"]


@posix_only
def test_disk_that_fills_up_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "out.csv"
    target.write_bytes(b"old")
    code = f"""
        import resource
        from pathlib import Path
        from echoquad_runtime.errors import OutputError
        from echoquad_runtime.storage.atomic import write_atomically
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            with write_atomically(Path({str(target)!r})) as stream:
                for _ in range(1000):
                    stream.write(b"x" * 100)
        except OutputError as error:
            print(error)
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": str(Path(atomic.__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{target.as_posix()}: cannot be written (File too large)")
    assert (names(tmp_path), target.read_bytes()) == (["out.csv"], b"old")


def test_json_is_readable_and_finite(tmp_path: Path) -> None:
    value = {"name": "Überlagerung", "file": os.fsdecode(b"a\xff.png"), "figures": [1, 0.5, None]}
    write_json(tmp_path / "out.json", value)
    data = (tmp_path / "out.json").read_bytes()
    assert json.loads(data.decode("utf-8")) == value
    assert data.endswith(b"}\n")
    assert "Überlagerung".encode() in data
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "other.json", float("nan"))
    assert names(tmp_path) == ["out.json"]


def test_make_folder_creates_parents(tmp_path: Path) -> None:
    made = make_folder(tmp_path / "a" / "b")
    assert made.is_dir()
    assert make_folder(made) == made
    (made / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be written"):
        make_folder(made / "file")


@posix_only
def test_make_folder_is_not_limited_by_recursion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 60)
    try:
        assert make_folder(Path("d/" * 200)).is_dir()
    finally:
        sys.setrecursionlimit(limit)


def test_threads_may_write_one_file_at_once(tmp_path: Path) -> None:
    target = tmp_path / "out.bin"
    first, second = write_atomically(target), write_atomically(target)
    with first as one:
        one.write(b"one")
        with second as other:
            other.write(b"other")
        assert target.read_bytes() == b"other"
    assert target.read_bytes() == b"one"
    assert names(tmp_path) == ["out.bin"]


@posix_only
def test_file_name_of_maximum_length_is_written(tmp_path: Path) -> None:
    for name in ("x" * 251 + ".csv", "漢" * 83 + "x.csv"):
        write_bytes(tmp_path / name, b"data")
        assert (tmp_path / name).read_bytes() == b"data"
    assert len(names(tmp_path)) == 2


def test_sync_folder_raises_nothing(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        sync_folder(folder)


def temporary_name(target: Path) -> Path:
    """Return the name of the temporary file of a write."""
    with write_atomically(target):
        (name,) = (name for name in names(target.parent) if name.startswith("."))
    return target.with_name(name)


def test_a_write_removes_what_a_killed_write_of_the_same_file_left(tmp_path: Path) -> None:
    target = tmp_path / "out.csv"
    code = f"""
        import os
        from pathlib import Path
        from echoquad_runtime.storage.atomic import write_atomically
        with write_atomically(Path({str(target)!r})) as stream:
            stream.write(bytes(100_000))
            stream.flush()
            os._exit(9)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False).returncode == 9
    assert [name.startswith(".out.csv.") for name in names(tmp_path)] == [True]
    write_bytes(target, b"data")
    assert (names(tmp_path), target.read_bytes()) == (["out.csv"], b"data")


def test_writers_of_the_same_file_at_once_keep_their_temporary_files(tmp_path: Path) -> None:
    target = tmp_path / "out.csv"
    with write_atomically(target) as outer:
        outer.write(b"outer")
        with write_atomically(target) as inner:
            inner.write(b"inner")
            assert len(names(tmp_path)) == 2
        assert target.read_bytes() == b"inner"
    assert (names(tmp_path), target.read_bytes()) == (["out.csv"], b"outer")


def test_threads_that_write_the_same_file_all_succeed(tmp_path: Path) -> None:
    target = tmp_path / "out.csv"
    blocks = [bytes([value]) * 1000 for value in range(200)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda block: write_bytes(target, block), blocks))
    assert names(tmp_path) == ["out.csv"] and target.read_bytes() in blocks


@posix_only
@pytest.mark.parametrize("planted", ["link", "hard link", "folder", "pipe"])
def test_what_is_planted_at_the_temporary_name_is_not_written_to(tmp_path: Path, planted: str) -> None:
    target, victim = tmp_path / "out.csv", tmp_path / "victim"
    temporary = temporary_name(target)
    victim.write_text("mine")
    match planted:
        case "link":
            temporary.symlink_to(victim)
        case "hard link":
            temporary.hardlink_to(victim)
        case "folder":
            temporary.mkdir()
        case _:
            os.mkfifo(temporary)
    write_bytes(target, b"data")
    assert (target.read_bytes(), victim.read_text()) == (b"data", "mine")
    assert temporary.exists() is (planted != "hard link")


@posix_only
def test_without_file_locks_what_another_write_left_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    target = tmp_path / "out.csv"
    temporary = temporary_name(target)
    monkeypatch.setattr(fcntl, "flock", refuse)
    temporary.write_bytes(b"half")  # another process may still be writing it
    write_bytes(target, b"data")
    assert (names(tmp_path), target.read_bytes()) == ([temporary.name, "out.csv"], b"data")


@posix_only
def test_link_at_the_target_is_replaced_and_not_followed(tmp_path: Path) -> None:
    target, victim = tmp_path / "out.csv", tmp_path / "victim"
    victim.write_text("mine")
    target.symlink_to(victim)
    write_bytes(target, b"data")
    assert (target.is_symlink(), target.read_bytes(), victim.read_text()) == (False, b"data", "mine")
