"""Fixtures that run the command line as a user does: a process, its exit code, its stdout and its stderr."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest

# No command prints a traceback, a warning of a library, or a report of its own fault.
FORBIDDEN = ("Traceback", "this is a fault in EchoQuad", "Exception ignored", "Warning", "[W:onnxruntime", "[E:onnx")

TINY = ("--recipe", "scratch", "--input-size", "16", "--epochs", "1", "--set", "batch_size=8", "--device", "cpu")
"""Options of a training that takes a second once torch is imported."""


@dataclass(frozen=True)
class Ran:
    """A command that has ended: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The messages of the error lines, without ``error[CODE]: ``."""
        return [message for _, message in self._error_lines]

    @property
    def error_codes(self) -> list[str]:
        """The stable codes of the error lines."""
        return [code for code, _ in self._error_lines]

    @property
    def error(self) -> tuple[str, str]:
        """The code and the message of the only error line."""
        (line,) = self._error_lines
        return line

    @property
    def _error_lines(self) -> list[tuple[str, str]]:
        return re.findall(r"^error\[(E_[A-Z_]+)\]: (.*)$", self.err, re.MULTILINE)


def environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("ECHOQUAD_TRACEBACK", "COLUMNS")}
    return {**kept, "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1", **(changes or {})}


def check(arguments: Sequence[object], ran: Ran, code: int | None, *, help_only: bool = False) -> Ran:
    """Check what every command guarantees; `code` None allows any exit code.

    There is no traceback. Exit codes 1 to 4 come with an ``error[CODE]:`` line, 2 to 4 with exactly one; 5 comes with
    one for each failed input, 0 with none. A help page that was not requested (`help_only`) has exit code 2 and no
    error line.
    """
    shown = f"{arguments} returned {ran.code}, expected {code}\n--- stdout\n{ran.out}\n--- stderr\n{ran.err}"
    assert code is None or ran.code == code, shown
    for text in FORBIDDEN:
        assert text not in ran.out + ran.err, shown
    assert bool(ran.errors) == (ran.code in (1, 2, 3, 4, 5) and not help_only), shown
    assert not re.search(r"^error(?!\[E_[A-Z_]+\]: )", ran.err, re.MULTILINE), shown
    if ran.code in (2, 3, 4):
        assert len(ran.errors) <= 1, shown
    return ran


def run(
    *arguments: str | Path,
    code: int = 0,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    driver: str | None = None,
    help_only: bool = False,
    **options: Any,
) -> Ran:
    """Run ``echoquad ARGUMENTS`` in a process of its own; it has to end with `code` and to pass `check`.

    `driver` is Python code that runs before the command in the same process, for example to hide a package.
    """
    begin = ["-m", "echoquad"]
    if driver is not None:
        begin = ["-c", f"import sys\n{driver}\nfrom echoquad.cli.framework.main import main\nmain()"]
    ended = subprocess.run(
        [sys.executable, *begin, *map(str, arguments)],
        check=False,
        cwd=cwd,
        env=environment(env),
        stdin=subprocess.DEVNULL,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 240, **options},
    )
    ran = Ran(ended.returncode, *(_text(stream) for stream in (ended.stdout, ended.stderr)))
    return check(arguments, ran, code, help_only=help_only)


# Runs lists of command lines in one process: imports are paid once.
_SERVER = """
import io, json, sys
from echoquad.cli.framework.main import main
kept = sys.stdin, sys.stdout, sys.stderr
for lines in kept[0]:
    ended = []
    for line in json.loads(lines):
        if line[0] == "python":
            exec(line[1])
            continue
        sys.argv[1:] = line
        sys.stdout, sys.stderr = (io.TextIOWrapper(io.BytesIO(), "utf-8", newline="\\n") for _ in range(2))
        try:
            main()
        except SystemExit as error:
            printed = [(stream.flush(), stream.buffer.getvalue().decode())[1] for stream in (sys.stdout, sys.stderr)]
            ended.append([error.code, *printed])
    sys.stdout, sys.stderr = kept[1:]
    print(json.dumps([ended, sorted(name for name in sys.modules if "." not in name)]), flush=True)
"""

Lines = Sequence[Sequence[str | Path]]


class Server:
    """A process that runs lists of command lines, one after the other."""

    def __init__(self, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> None:
        command = [sys.executable, "-c", _SERVER]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "encoding": "utf-8"}
        self._process = subprocess.Popen(command, cwd=cwd, env=environment(env), **pipes)

    def __call__(self, lines: Lines) -> tuple[list[Ran], set[str]]:
        """Return the result of each line, and the packages imported so far; each line has to pass `check`.

        A line ``["python", CODE]`` executes CODE in the process and has no result.
        """
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps([[str(word) for word in line] for line in lines]) + "\n")
        process.stdin.flush()
        results, modules = json.loads(process.stdout.readline())
        lines = [line for line in lines if line[0] != "python"]
        assert len(results) == len(lines)
        return [check(line, Ran(*values), None) for line, values in zip(lines, results, strict=True)], set(modules)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._process.kill()  # it has nothing to write, and torch is slow to shut down
        self._process.wait()


def run_many(
    lines: Lines, *, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> tuple[list[Ran], set[str]]:
    """Run command lines in one new process; return their results and the packages imported for them."""
    with Server(cwd, env) as server:
        return server(lines)


def _text(stream: bytes | None) -> str:
    # Windows line ends are ignored; a test of its own checks that the CSV has none.
    return (stream or b"").decode("utf-8", "surrogateescape").replace("\r\n", "\n")


@pytest.fixture(scope="session")
def echoquad() -> Callable[..., Ran]:
    """Return `run(*arguments, code=0, cwd=None, env=None, driver=None)`."""
    return run


@pytest.fixture(scope="session")
def many() -> Callable[..., tuple[list[Ran], set[str]]]:
    """Return `run_many(lines)`."""
    return run_many


@pytest.fixture(scope="session")
def warm() -> Iterator[Callable[[Lines], list[Ran]]]:
    """Return a function that runs command lines in one process for all tests: torch is imported once."""
    with Server() as server:
        yield lambda lines: server(lines)[0]


@pytest.fixture
def started() -> Any:
    """Return a function that starts ``echoquad ARGUMENTS`` without waiting; the test's end kills what still runs."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str | Path, **options: Any) -> subprocess.Popen[bytes]:
        command: Sequence[str] = [sys.executable, "-m", "echoquad", *map(str, arguments)]
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, **{**streams, "env": environment(), **options})
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


@pytest.fixture(scope="session")
def tiny() -> tuple[str, ...]:
    """Return the options of a training that takes a second."""
    return TINY


@pytest.fixture(scope="session")
def phantoms(make_once: Any) -> tuple[Path, Ran]:
    """Return a data set of six patients and the output of ``data phantom``. Shared: tests must not change it."""

    def make(folder: Path) -> tuple[Path, Ran]:
        return folder / "data", run("data", "phantom", folder / "data", "--patients", "6", "--frames", "2")

    return make_once("phantoms", make)


@pytest.fixture(scope="session")
def data(phantoms: tuple[Path, Ran]) -> Path:
    """Return the folder of the phantoms. Shared: tests must not change it."""
    return phantoms[0]


@pytest.fixture(scope="session")
def trained(data: Path, make_once: Any) -> tuple[Path, Ran]:
    """Return a run of one epoch and the output of ``train``. Shared: tests must not change it."""
    pytest.importorskip("torch")

    def make(folder: Path) -> tuple[Path, Ran]:
        return folder / "run", run("train", data, "--out", folder / "run", *TINY)

    return make_once("trained", make)


@pytest.fixture(scope="session")
def exported(trained: tuple[Path, Ran], make_once: Any) -> tuple[Path, Ran]:
    """Return a bundle of that run and the output of ``export``. Shared: tests must not change it."""
    pytest.importorskip("onnxscript")

    def make(folder: Path) -> tuple[Path, Ran]:
        return folder / "bundle", run("export", trained[0], "--out", folder / "bundle")

    return make_once("exported", make)


@pytest.fixture
def data_copy(data: Path, tmp_path: Path) -> Path:
    """Return a copy of the phantoms that a test may change."""
    return Path(shutil.copytree(data, tmp_path / "data"))


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """Return a copy of the tiny bundle that a test may change."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture
def many_frames(make_frame: Any, tmp_path: Path) -> Path:
    """Return a folder of 60 frames: their rows exceed the buffer of a stream, their overlays take seconds."""
    from PIL import Image

    folder = tmp_path / "many"
    folder.mkdir()
    for index in range(60):
        Image.fromarray(make_frame(index)).save(folder / f"{index:02d}.png")
    return folder


@pytest.fixture
def mixed(frames_folder: Path) -> Path:
    """Return six good frames and five bad ones: `BAD_FRAMES`."""
    import numpy as np
    from PIL import Image

    png, jpeg = ((frames_folder / "a" / name).read_bytes() for name in ("0.png", "1.jpg"))
    (frames_folder / "a" / "cut.png").write_bytes(png[: len(png) // 2])
    (frames_folder / "a" / "text.png").write_text("id,label\n1,ASD\n")
    (frames_folder / "b" / "empty.jpg").write_bytes(b"")
    (frames_folder / "b" / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    Image.fromarray(np.zeros((1, 1), np.uint8)).save(frames_folder / "b" / "small.png")
    return frames_folder


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.name.startswith(".") or "partial" in path.name)


@pytest.fixture(scope="session")
def left_in() -> Callable[[Path], list[str]]:
    """Return a function that lists the hidden and unfinished files of a folder."""
    return leftovers
