"""Tests of a reader process: same results as in the thread, crashes, limits, hangs, shutdown and isolation."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import (
    ConfigError,
    FrameCrashError,
    FrameDamagedError,
    FrameError,
    FrameReadError,
    FrameTimeoutError,
    FrameTooLargeError,
)
from echoquad_runtime.frames import sources
from echoquad_runtime.frames.frame_file import FrameFile
from echoquad_runtime.frames.isolation import reader_process
from echoquad_runtime.frames.isolation.limits import MEMORY_LIMIT
from echoquad_runtime.frames.isolation.messages import Request
from echoquad_runtime.frames.isolation.reader_process import ReaderProcess

CONTRACT = Contract(classes=("ASD", "NORM"), input_size=32)
ROOT = Path(reader_process.__file__).parents[3]

linux = pytest.mark.skipif(sys.platform != "linux", reason="uses /proc")
posix = pytest.mark.skipif(sys.platform == "win32", reason="uses POSIX signals")

# The program of a reader process, with a reading function that fails in a way that the file's name selects.
FAULTS = """
import os, re, signal, sys, time
from echoquad_runtime.errors import FrameFormatError
from echoquad_runtime.frames.isolation import reader_main
perform = reader_main._perform

def replaced(request, data):
    name = os.path.basename(request["path"])
    if name.startswith("once "):
        marker = request["path"] + ".met"
        if os.path.exists(marker):
            return perform(request, data)
        open(marker, "x").close()
    match name.removeprefix("once "):
        case "abort":
            os.abort()
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            os._exit(3)
        case "hang":
            time.sleep(60)
        case "spin":
            while True:
                pass
        case "slow":
            time.sleep(0.3)
        case "hang with the lock":  # backtracks in C for a long time, holding the interpreter lock
            re.match("(a+)+$", "a" * 60 + "b")
        case "garbage":
            reader_main._send = lambda answers, *_: (answers.write(b"[" * 100_000), answers.flush())
        case "forged":
            return {"error": "FrameError", "message": "\\x1b[2J"}, None
        case "huge":
            return {"shape": [1 << 40, 1 << 40], "flags": []}, None
        case "print":
            os.write(1, b'{"shape": [2, 2], "flags": ["forged"]}\\n')
            print('{"shape": [2, 2], "flags": ["forged"]}', flush=True)
            os.write(2, b"libpng warning: it prints this")
        case "memory":
            raise MemoryError
        case "allocate":
            kept = [reader_main.np.empty(64 << 20, "u1") for _ in range(64)]  # not touched, which would take seconds
        case "fault":
            raise RuntimeError("PlantedDoe")
        case "modules":
            raise FrameFormatError(" ".join([name for name in sys.modules if "." not in name]))
        case "home":
            raise FrameFormatError(reader_main.__file__)
    return perform(request, data)

reader_main._perform = replaced
reader_main.main(settings)
"""
FAULTY_PROGRAM = reader_process._PROGRAM.replace("main(settings)\n", FAULTS)


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_process, "_PROGRAM", FAULTY_PROGRAM)


@pytest.fixture
def reader() -> Iterator[ReaderProcess]:
    with contextlib.closing(ReaderProcess()) as opened:
        yield opened


@pytest.fixture
def frame(frames_folder: Path) -> FrameFile:
    return FrameFile(frames_folder / "a/0.png", "a/0.png")


def named(frame: FrameFile, name: str) -> FrameFile:
    """Return a copy of a frame whose name selects a fault."""
    path = frame.path.with_name(name)
    path.write_bytes(frame.path.read_bytes())
    return FrameFile(path, name)


def read(reader: ReaderProcess, file: FrameFile, time_limit: float = 60) -> tuple[tuple[str, ...], bytes]:
    """Return the flags and the quadrants of a file."""
    request = Request("quadrants", file.path, frame=file.frame, flip=file.flip, contract=CONTRACT.to_json())
    answer = reader.ask(request, time_limit)
    if answer.error is not None:
        raise answer.error
    assert answer.levels is not None and answer.levels.shape == (4, 1, 32, 32) and answer.levels.dtype == np.uint8
    return answer.flags, answer.levels.tobytes()


def read_here(file: FrameFile) -> tuple[tuple[str, ...], bytes]:
    grey, flags = sources.to_grey_and_flags(sources.read_content(file))
    quadrants = np.zeros((4, 1, 32, 32), np.uint8)
    return (*sources.cut_quadrants(grey, CONTRACT, quadrants), *flags), quadrants.tobytes()


def outcome(reader: ReaderProcess | None, file: FrameFile) -> Any:
    """Return the flags and quadrants of a file, or the class and message of its error; None reads in the thread."""
    try:
        return read_here(file) if reader is None else read(reader, file)
    except FrameError as error:
        return type(error), str(error)


def assert_same(reader: ReaderProcess, files: list[FrameFile]) -> list[Any]:
    outcomes = []
    for file in files:
        outcomes.append(outcome(None, file))
        assert outcome(reader, file) == outcomes[-1], file
    return outcomes


def is_running(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    status = Path(f"/proc/{pid}/stat")
    if status.parent.parent.joinpath("self").exists():
        try:
            return status.read_text().rpartition(")")[2].split()[0] not in "ZX"
        except OSError:
            return False
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def names(folder: str) -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


def shared_memory() -> set[str]:
    """Return the names of shared memory, without the semaphores that other programs on the host may create."""
    return {name for name in names("/dev/shm") if not name.startswith("sem.")}


def wait_until(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timeout"
        time.sleep(0.01)


# ---------------------------------------------------------------------------------------------- equal results


def test_images_and_matrices_give_same_result_as_thread(reader: ReaderProcess, frames_folder: Path) -> None:
    for name, data in {
        "cut.png": (frames_folder / "a/0.png").read_bytes()[:-30],
        "cut.jpg": (frames_folder / "a/1.jpg").read_bytes()[:-300],
        "empty.png": b"",
        "text.png": b"no image",
        "small.txt": b"1",
        "levels.txt": "\n".join(" ".join(str(x * y % 256) for x in range(40)) for y in range(30)).encode(),
        "words.csv": b"patient,age\nPlantedDoe,40\n",
        "not.dcm": b"\0" * 128 + b"DICM",
        "not.avi": b"RIFF\0\0\0\0AVI ",
    }.items():
        (frames_folder / name).write_bytes(data)
    several = io.BytesIO()
    np.save(several, np.random.default_rng(1).integers(0, 256, (3, 30, 40), np.uint8))
    (frames_folder / "several.npy").write_bytes(several.getvalue())
    Image.new("RGB", (50, 40), (200, 30, 30)).save(frames_folder / "colour.png")
    Image.new("L", (1, 1)).save(frames_folder / "small.png")
    files = [FrameFile(path, path.name) for path in sorted(frames_folder.rglob("*"))]  # includes two folders
    files += [FrameFile(frames_folder / "several.npy", "", number) for number in (1, 3, 4)]
    files += [FrameFile(frames_folder / "levels.txt", "", flip="vertical"), FrameFile(frames_folder / "a/0.png", "", 2)]
    files += [FrameFile(frames_folder / "missing.png", ""), FrameFile(frames_folder / "nul\0.png", "")]
    outcomes = assert_same(reader, files)
    assert sum(isinstance(found[0], tuple) for found in outcomes) == 11
    assert "colour" in outcomes[[file.name for file in files].index("colour.png")][0]
    assert {found[0].__name__ for found in outcomes if isinstance(found[0], type)} >= {
        *("FrameReadError", "FrameFormatError", "FrameDamagedError", "FrameTooSmallError"),
    }


def test_dicom_gives_same_result_as_thread(reader: ReaderProcess) -> None:
    pydicom = pytest.importorskip("pydicom")
    folder = Path(pydicom.__file__).parent / "data/test_files"
    paths = [path for path in sorted(folder.glob("*.dcm")) if path.stat().st_size < 200_000]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcomes = assert_same(reader, [FrameFile(path, path.name, number) for path in paths for number in (None, 2)])
    assert sum(isinstance(found[0], tuple) for found in outcomes) > 20
    assert sum(isinstance(found[0], type) for found in outcomes) > 20


def test_video_gives_same_result_as_thread(reader: ReaderProcess, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as out:
        track = out.add_stream("mpeg4", rate=25)
        track.width, track.height, track.pix_fmt = 64, 48, "yuv420p"
        for number in range(12):
            picture = np.full((48, 64, 3), 20 + 15 * number, np.uint8)
            out.mux(track.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        out.mux(track.encode())
    outcomes = assert_same(reader, [FrameFile(path, "", number) for number in (1, 2, 12, 5, 13, None)])
    assert len({str(found) for found in outcomes}) == 6 and sum(isinstance(it[0], tuple) for it in outcomes) == 4


@pytest.mark.parametrize("name", ["two words.png", "naïve.png", "quote'\".png", "-c.png", os.fsdecode(b"by\xfft.png")])
def test_reads_any_file_name(name: str, reader: ReaderProcess, frame: FrameFile, tmp_path: Path) -> None:
    path = tmp_path / name
    try:
        path.write_bytes(frame.path.read_bytes())
    except OSError:
        pytest.skip("this file system has no such name")
    expected = outcome(reader, frame)
    assert expected[0] == ()
    assert outcome(reader, FrameFile(path, name)) == expected


def test_relative_path_after_working_directory_changed(
    reader: ReaderProcess, frame: FrameFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = outcome(reader, frame)
    monkeypatch.chdir(frame.path.parent)
    assert outcome(reader, FrameFile(Path(frame.path.name), "")) == expected


# ---------------------------------------------------------------------------------------------- crashes


@pytest.mark.parametrize(
    ("name", "kind", "ending"),
    [
        ("abort", FrameCrashError, "ended with SIGABRT twice"),
        ("kill", FrameReadError, "ended with SIGKILL twice"),
        ("exit", FrameCrashError, "ended with exit status 3 twice"),
        ("garbage", FrameCrashError, "sent a malformed answer twice"),
        ("forged", FrameCrashError, "sent a malformed answer twice"),
        ("huge", FrameCrashError, "sent a malformed answer twice"),
        ("allocate", FrameTooLargeError, f"limit of {MEMORY_LIMIT >> 20} MiB"),
    ],
)
@posix
@pytest.mark.usefixtures("faulty")
def test_crash_fails_one_file_and_starts_new_process(
    name: str, kind: type[FrameError], ending: str, reader: ReaderProcess, frame: FrameFile
) -> None:
    expected = outcome(reader, frame)
    first = reader.pid
    with pytest.raises(FrameError, match=ending) as raised:
        read(reader, named(frame, name))
    assert type(raised.value) is kind
    assert reader.pid != first
    assert outcome(reader, frame) == expected


@posix
@pytest.mark.usefixtures("faulty")
@pytest.mark.parametrize("name", ["once abort", "once kill", "once memory"])
def test_file_is_retried_once(name: str, reader: ReaderProcess, frame: FrameFile) -> None:
    expected = outcome(reader, frame)
    first = reader.pid
    assert outcome(reader, named(frame, name)) == expected
    assert reader.pid != first


@posix
def test_process_that_dies_between_frames_is_replaced(reader: ReaderProcess, frame: FrameFile) -> None:
    expected = outcome(reader, frame)
    first = reader.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    assert outcome(reader, frame) == expected
    assert reader.pid != first


@pytest.mark.usefixtures("faulty")
def test_decoder_output_on_stdout_is_ignored(reader: ReaderProcess, frame: FrameFile, capfd: Any) -> None:
    expected = outcome(reader, frame)
    assert outcome(reader, named(frame, "print")) == expected
    assert outcome(reader, frame) == expected
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("faulty")
def test_unexpected_exception_does_not_leak_its_text(reader: ReaderProcess, frame: FrameFile) -> None:
    with pytest.raises(FrameError, match="RuntimeError") as raised:
        read(reader, named(frame, "fault"))
    assert "Doe" not in str(raised.value) and type(raised.value) is FrameError
    with pytest.raises(FrameTooLargeError, match="more memory"):
        read(reader, named(frame, "memory"))


def test_process_that_cannot_start_raises_config_error(
    reader: ReaderProcess, frame: FrameFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_process, "_PROGRAM", "raise SystemExit(7)")
    with pytest.raises(ConfigError, match="exit status 7"):
        read(reader, frame)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(ConfigError, match="cannot be started"):
        read(reader, frame)


@posix
@pytest.mark.usefixtures("faulty")
def test_replacement_process_that_cannot_start(
    reader: ReaderProcess, frame: FrameFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    read(reader, frame)
    monkeypatch.setattr(reader_process, "_PROGRAM", "raise SystemExit(7)")
    with pytest.raises(FrameDamagedError, match="ended with SIGABRT, then ended with exit status 7"):
        read(reader, named(frame, "abort"))
    with pytest.raises(ConfigError):
        read(reader, frame)


@pytest.mark.parametrize("end", ["kill", "close"])
@pytest.mark.usefixtures("faulty")
def test_kill_and_close_stop_a_hanging_read(end: str, reader: ReaderProcess, frame: FrameFile) -> None:
    expected = outcome(reader, frame)
    pid = reader.pid
    assert pid is not None
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(outcome(reader, named(frame, "hang with the lock"))))
    thread.start()
    time.sleep(0.1)
    assert not found
    begun = time.monotonic()
    getattr(reader, end)()
    thread.join(5)
    assert time.monotonic() - begun < 2
    assert found[0][0] is FrameReadError and "stopped" in found[0][1]
    assert not is_running(pid)
    if end == "kill":
        assert outcome(reader, frame) == expected
    else:
        with pytest.raises(FrameReadError, match="stopped"):
            read(reader, frame)


@posix
@pytest.mark.usefixtures("faulty")
def test_interrupted_read_does_not_leave_stale_answer(reader: ReaderProcess, frame: FrameFile) -> None:
    missing = FrameFile(frame.path.with_name("missing.png"), "")
    expected = outcome(reader, missing)
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    timer = threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGUSR1))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            read(reader, named(frame, "slow"))
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
    time.sleep(0.4)  # until the stale answer has arrived
    assert outcome(reader, missing) == expected


@pytest.mark.parametrize("name", ["hang", "spin", "hang with the lock"])
@pytest.mark.usefixtures("faulty")
def test_time_limit_ends_the_process(name: str, reader: ReaderProcess, frame: FrameFile) -> None:
    expected = outcome(reader, frame)
    pid = reader.pid
    assert pid is not None
    begin = time.monotonic()
    with pytest.raises(FrameTimeoutError, match=r"longer than 0\.4 seconds"):
        read(reader, named(frame, name), time_limit=0.4)
    assert time.monotonic() - begin < 3
    assert not is_running(pid)
    assert outcome(reader, frame) == expected


@posix
@pytest.mark.usefixtures("faulty")
def test_crash_of_a_fresh_process_is_not_retried(reader: ReaderProcess, frame: FrameFile) -> None:
    """Hundreds of such files in a row then start one process each."""
    with pytest.raises(FrameCrashError, match="ended with SIGABRT;"):
        read(reader, named(frame, "abort"))


@linux
def test_processor_time_is_limited_for_each_file(reader: ReaderProcess, frame: FrameFile) -> None:
    def limits() -> dict[str, str]:
        lines = Path(f"/proc/{reader.pid}/limits").read_text().splitlines()
        return {line[:26].strip(): line[26:].split()[0] for line in lines}

    read(reader, frame, time_limit=40)
    found = limits()
    assert 40 < int(found["Max cpu time"]) < 50
    assert found["Max core file size"] == "0" and int(found["Max open files"]) <= 256
    assert MEMORY_LIMIT < int(found["Max address space"]) < MEMORY_LIMIT + (1 << 30)
    read(reader, frame, time_limit=100)
    assert 100 < int(limits()["Max cpu time"]) < 110


# ---------------------------------------------------------------------------------------------- isolation


@pytest.mark.usefixtures("faulty")
def test_process_imports_only_what_it_needs(reader: ReaderProcess, frame: FrameFile) -> None:
    with pytest.raises(FrameError) as raised:
        read(reader, named(frame, "modules"))
    modules = set(str(raised.value).split())
    assert {"numpy", "PIL"} <= modules
    assert {"onnxruntime", "pydicom", "av", "subprocess", "multiprocessing", "tempfile"}.isdisjoint(modules)


@linux
def test_process_has_one_thread(reader: ReaderProcess, frame: FrameFile) -> None:
    read(reader, frame)
    assert len(names(f"/proc/{reader.pid}/task")) == 1


@linux
def test_start_launches_process_before_first_frame(reader: ReaderProcess, frame: FrameFile) -> None:
    assert reader.pid is None
    reader.start()
    first = reader.pid
    wait_until(lambda: "numpy" in Path(f"/proc/{first}/maps").read_text())
    reader.start()
    read(reader, frame)
    assert reader.pid == first


@linux
def test_readers_leak_no_descriptors(frame: FrameFile) -> None:
    gc.collect()  # garbage of earlier tests
    before = names("/proc/self/fd")
    for number in range(50):
        with contextlib.closing(ReaderProcess()) as reader:
            if number < 5:
                read(reader, frame)
    del reader
    assert len(names("/proc/self/fd")) == len(before)


SCRIPT = """
import os, signal, sys
from pathlib import Path
from echoquad_runtime.frames.isolation import reader_process
from echoquad_runtime.frames.isolation.messages import Request
if faulty := os.environ.get("FAULTY_PROGRAM"):
    reader_process._PROGRAM = faulty
signal.signal(signal.SIGINT, lambda *_: None)
print("once", flush=True)
reader = reader_process.ReaderProcess()
for line in sys.stdin:
    try:
        path = Path(sys.argv[1]).with_name(line.strip())
        answer = reader.ask(Request("grey_and_flags", path), 60)
        print(answer.error or reader.pid, flush=True)
    except Exception as error:
        print(error, flush=True)
"""


def start_script(tmp_path: Path, frame: FrameFile, **environment: str) -> subprocess.Popen[str]:
    """Start a script without a main guard, which reads the file that each line on its standard input names."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    (tmp_path / "temporary").mkdir()
    for name in ("frame", "hang with the lock", "home"):
        named(frame, name)
    return subprocess.Popen(
        [sys.executable, script, frame.path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "temporary"), **environment},
    )


def ask(script: subprocess.Popen[str], name: str = "frame") -> str:
    assert script.stdin is not None and script.stdout is not None
    script.stdin.write(f"{name}\n")
    script.stdin.flush()
    return script.stdout.readline().strip()


def test_script_without_main_guard_runs_once(tmp_path: Path, frame: FrameFile) -> None:
    with start_script(tmp_path, frame) as script:
        assert script.stdout is not None and script.stdout.readline() == "once\n"
        first = ask(script)
        assert first.isdigit() and ask(script) == first
        out, _ = script.communicate()
    assert out == "" and script.returncode == 0


@posix
def test_works_without_standard_streams(tmp_path: Path, frame: FrameFile) -> None:
    script = tmp_path / "script.py"
    answer = "Path(sys.argv[2]).write_text(str(reader.ask(Request('grey_and_flags', Path(sys.argv[1])), 60).flags))"
    script.write_text(SCRIPT.replace('print("once", flush=True)', "").partition("for line")[0] + answer)
    done = subprocess.run(
        ["/bin/sh", "-c", 'exec "$@" 0<&- 1>&- 2>&-', "sh", sys.executable, script, frame.path, tmp_path / "answer"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert (tmp_path / "answer").read_text() == "()", done


@linux
@pytest.mark.parametrize("busy", [False, True])
def test_process_ends_with_its_parent(busy: bool, tmp_path: Path, frame: FrameFile) -> None:
    shared = shared_memory()
    with start_script(tmp_path, frame, FAULTY_PROGRAM=FAULTY_PROGRAM) as script:
        assert script.stdin is not None and script.stdout is not None
        script.stdout.readline()
        pid = int(ask(script))
        if busy:
            script.stdin.write("hang with the lock\n")
            script.stdin.flush()
            time.sleep(0.2)
        assert is_running(pid)
        script.kill()
    wait_until(lambda: not is_running(pid), seconds=2)
    assert list((tmp_path / "temporary").iterdir()) == []
    assert shared_memory() <= shared


@linux
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_process_ignores_group_signals(sent: signal.Signals, reader: ReaderProcess, frame: FrameFile) -> None:
    read(reader, frame)
    pid = reader.pid
    assert pid is not None
    os.kill(pid, sent)
    time.sleep(0.05)
    read(reader, frame)
    assert reader.pid == pid and is_running(pid)


@posix
def test_ctrl_c_does_not_end_a_starting_process(tmp_path: Path, frame: FrameFile) -> None:
    with start_script(tmp_path, frame) as script:
        assert script.stdin is not None and script.stdout is not None
        script.stdout.readline()
        script.stdin.write("frame\n")
        script.stdin.flush()
        for _ in range(30):
            os.killpg(script.pid, signal.SIGINT)
            time.sleep(0.01)
        first = script.stdout.readline().strip()
        assert first.isdigit() and ask(script) == first
        script.stdin.close()


def test_process_imports_package_of_its_parent(
    tmp_path: Path, frame: FrameFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As with an editable install, whose import hook finds the package without an entry in sys.path.
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry) != ROOT])
    assert str(ROOT) in reader_process.module_path()
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "echoquad_runtime").symlink_to(ROOT / "echoquad_runtime", target_is_directory=True)
    with start_script(tmp_path, frame, FAULTY_PROGRAM=FAULTY_PROGRAM, PYTHONPATH=str(packages)) as script:
        assert script.stdin is not None and script.stdout is not None
        script.stdout.readline()
        assert ask(script, "home").startswith(str(packages))
        script.stdin.close()


def test_frozen_program_starts_no_process(
    monkeypatch: pytest.MonkeyPatch, reader: ReaderProcess, frame: FrameFile
) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(ConfigError, match="not a Python interpreter"):
        read(reader, frame)
