"""The command line as a user runs it: a process, its exit code, and what it printed where."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest

# A chatter of a library, or a fault, is none of what a command may print.
FORBIDDEN = ("Traceback", "this is a fault in EchoQuad", "Exception ignored", "Warning", "[W:onnxruntime", "[E:onnx")

TINY = ("--recipe", "scratch", "--input-size", "16", "--epochs", "1", "--set", "batch_size=8", "--device", "cpu")
"""Options of a training that takes a second, once torch is there."""


@dataclass(frozen=True)
class Ran:
    """A command that has ended: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line.removeprefix("error: ") for line in self.err.splitlines() if line.startswith("error: ")]


def environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("ECHOQUAD_TRACEBACK", "COLUMNS")}
    return {**kept, "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1", **(changes or {})}


def hold(arguments: Sequence[object], ran: Ran, code: int | None, *, help_only: bool = False) -> Ran:
    """Hold what a command did against what every command owes its user; `code` None is any.

    No traceback. An exit code from 1 to 4 comes with a line that begins with ``error:``, and from 2 on with no more
    than one; 5 comes with one for each input that failed, 0 with none. Help that was not asked for is the exception.
    """
    shown = f"{arguments} gave {ran.code}, expected {code}\n--- stdout\n{ran.out}\n--- stderr\n{ran.err}"
    assert code is None or ran.code == code, shown
    for text in FORBIDDEN:
        assert text not in ran.out + ran.err, shown
    assert bool(ran.errors) == (ran.code in (1, 2, 3, 4, 5) and not help_only), shown
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
    """Run ``echoquad ARGUMENTS`` in a process of its own; it has to end with `code` and to pass `hold`.

    `driver` is Python text that is run before the command, in the same process: to hide a package, to change a bound.
    """
    begin = ["-m", "echoquad"]
    if driver is not None:
        begin = ["-c", f"import sys\n{driver}\nfrom echoquad.cli.app import main\nmain()"]
    ended = subprocess.run(
        [sys.executable, *begin, *map(str, arguments)],
        check=False,
        cwd=cwd,
        env=environment(env),
        stdin=subprocess.DEVNULL,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 240, **options},
    )
    ran = Ran(ended.returncode, *(_text(stream) for stream in (ended.stdout, ended.stderr)))
    return hold(arguments, ran, code, help_only=help_only)


# Runs lists of command lines in one process, where what they say is of interest and not how they leave.
_SERVER = """
import io, json, sys
from echoquad.cli import app
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
            app.main()
        except SystemExit as error:
            said = [(stream.flush(), stream.buffer.getvalue().decode())[1] for stream in (sys.stdout, sys.stderr)]
            ended.append([error.code, *said])
    sys.stdout, sys.stderr = kept[1:]
    print(json.dumps([ended, sorted(name for name in sys.modules if "." not in name)]), flush=True)
"""

Lines = Sequence[Sequence[str | Path]]


class Server:
    """A process that runs one list of command lines after the other; what they import is imported once."""

    def __init__(self, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> None:
        command = [sys.executable, "-c", _SERVER]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "encoding": "utf-8"}
        self._process = subprocess.Popen(command, cwd=cwd, env=environment(env), **pipes)

    def __call__(self, lines: Lines) -> tuple[list[Ran], set[str]]:
        """Give what each line did, and the packages that were imported up to now; each line has to pass `hold`.

        A line ``["python", TEXT]`` runs TEXT in the process, to change a bound and to put it back, and gives nothing.
        """
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps([[str(word) for word in line] for line in lines]) + "\n")
        process.stdin.flush()
        found, modules = json.loads(process.stdout.readline())
        lines = [line for line in lines if line[0] != "python"]
        assert len(found) == len(lines)
        return [hold(line, Ran(*values), None) for line, values in zip(lines, found, strict=True)], set(modules)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._process.kill()  # it has nothing to write, and torch takes its time to leave
        self._process.wait()


def run_many(
    lines: Lines, *, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> tuple[list[Ran], set[str]]:
    """Run command lines in one new process; gives what each did, and the packages that were imported for them."""
    with Server(cwd, env) as server:
        return server(lines)


def _text(stream: bytes | None) -> str:
    # Windows' line ends are of no interest here; that the CSV has none of them a test sees for itself.
    return (stream or b"").decode("utf-8", "surrogateescape").replace("\r\n", "\n")


@pytest.fixture(scope="session")
def echoquad() -> Callable[..., Ran]:
    """Give `run(*arguments, code=0, cwd=None, env=None, driver=None)`: see there."""
    return run


@pytest.fixture(scope="session")
def many() -> Callable[..., tuple[list[Ran], set[str]]]:
    """Give `run_many(lines)`: see there."""
    return run_many


@pytest.fixture(scope="session")
def warm() -> Iterator[Callable[[Lines], list[Ran]]]:
    """Give a function that runs command lines in a process that lives as long as the tests: torch is imported once."""
    with Server() as server:
        yield lambda lines: server(lines)[0]


@pytest.fixture
def started() -> Any:
    """Give a function that starts ``echoquad ARGUMENTS`` and does not wait; what still runs at the end is killed."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str | Path, **options: Any) -> subprocess.Popen[bytes]:
        if os.name == "posix":
            # A test run in a shell's background has SIGINT ignored, and its children inherit that.
            options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
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
    """Give the options of a training that takes a second."""
    return TINY


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    """Give a data set of six patients and what ``data phantom`` printed. Shared: a test must not change it."""
    folder = tmp_path_factory.mktemp("phantoms") / "data"
    return folder, run("data", "phantom", folder, "--patients", "6", "--frames", "2")


@pytest.fixture(scope="session")
def data(phantoms: tuple[Path, Ran]) -> Path:
    """Give the phantoms' folder. Shared: a test must not change it."""
    return phantoms[0]


@pytest.fixture(scope="session")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    """Give a run of one epoch and what ``train`` printed. Shared: a test must not change it."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    return folder, run("train", data, "--out", folder, *TINY)


@pytest.fixture(scope="session")
def exported(trained: tuple[Path, Ran], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    """Give a bundle of that run and what ``export`` printed. Shared: a test must not change it."""
    folder = tmp_path_factory.mktemp("exported") / "bundle"
    return folder, run("export", trained[0], "--out", folder)


@pytest.fixture
def data_copy(data: Path, tmp_path: Path) -> Path:
    """Give a copy of the phantoms that a test may spoil."""
    return Path(shutil.copytree(data, tmp_path / "data"))


@pytest.fixture
def bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """Give a copy of the tiny bundle that a test may spoil."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.name.startswith(".") or "partial" in path.name)


@pytest.fixture(scope="session")
def left_in() -> Callable[[Path], list[str]]:
    """Give a function that lists the hidden and half-written files of a folder."""
    return leftovers
