"""Tests of `RayPredictor` on a local Ray cluster of two workers: results, crashes, errors and shutdown."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import util
from pathlib import Path
from statistics import median_low
from typing import Any

import pytest
from PIL import Image

from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.signing import sign_bundle
from echoquad_runtime.cluster import ray_predictor as cluster
from echoquad_runtime.cluster import ray_session, ray_worker
from echoquad_runtime.cluster.ray_predictor import RayPredictor
from echoquad_runtime.cluster.ray_worker import MAX_ATTEMPTS
from echoquad_runtime.contract import INDETERMINATE
from echoquad_runtime.errors import (
    BundleTamperedError,
    ClusterError,
    ConfigError,
    DeviceUnavailableError,
    FrameDamagedError,
    FrameReadError,
    InputNotFoundError,
    SignatureError,
    UsageError,
)
from echoquad_runtime.frames.discovery import find_frames
from echoquad_runtime.frames.frame_file import Failure, FrameFile
from echoquad_runtime.predict.prediction import Prediction
from echoquad_runtime.predict.predictor import Predictor
from echoquad_runtime.quadrants import Grey

if util.find_spec("ray") is None:
    pytest.skip("the extra ray is not installed", allow_module_level=True)

# Ray warns about its own settings. Any other warning is an error, as in all tests.
pytestmark = pytest.mark.filterwarnings(r"ignore:`use_\w+` is deprecated:DeprecationWarning")

Frame = Callable[..., Grey]
Found = list[FrameFile | Failure]


# ---------------------------------------------------------------------------------------------- a cluster


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    """Set the environment that Ray reads on import, and that its processes and the command line inherit."""
    # The temporary folder of pytest would make the paths of Ray's sockets too long.
    made = tempfile.TemporaryDirectory(prefix="eq-", ignore_cleanup_errors=True)
    with pytest.MonkeyPatch.context() as patch, made as folder:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.setenv("TMPDIR", folder)  # for files of killed workers
        patch.delenv("RAY_ADDRESS", raising=False)
        yield


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Start a local cluster with two CPUs and return its address; check that all its processes end."""
    import ray

    handler = signal.getsignal(signal.SIGTERM)
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=128 << 20)
    signal.signal(signal.SIGTERM, handler)
    session = Path(ray._private.worker._global_node.get_session_dir_path()).name
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
    assert wait_until(lambda: not processes_of(session)), processes_of(session)


def wait_until(true: Callable[[], object], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def command_lines() -> dict[int, str]:
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found[int(path.parent.name)] = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return found


def processes_of(session: str) -> list[str]:
    return [line for line in command_lines().values() if session in line]


def processes_with(variable: str) -> list[str]:
    """Return the command lines of the processes that have inherited an environment variable."""
    found = []
    for process, line in command_lines().items():
        with contextlib.suppress(OSError):
            if variable.encode() in Path(f"/proc/{process}/environ").read_bytes().split(b"\0"):
                found.append(line)
    return found


def workers() -> set[int]:
    """Return the process IDs of the prediction workers of this process's Ray."""
    found = set()
    for process, line in command_lines().items():
        if line.startswith("ray::MapWorker"):
            with contextlib.suppress(OSError):
                raylet = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
                if int(Path(f"/proc/{raylet}/stat").read_text().rpartition(")")[2].split()[1]) == os.getpid():
                    found.add(process)
    return found


def start(*words: object, begin: str = "", **options: Any) -> subprocess.Popen[bytes]:
    """Start ``echoquad WORDS`` in a process that runs `begin` first."""
    code = f"{begin}\nfrom echoquad.cli.framework.main import main\nmain()"
    command = [sys.executable, "-c", code, *map(str, words)]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **{**streams, "env": {**os.environ, "PYTHONUTF8": "1"}, **options})


def echoquad(*words: object, code: int = 0, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run ``echoquad WORDS`` and check its exit code."""
    process = start(*words, **options)
    out, said = process.communicate(timeout=240)
    assert process.returncode == code, said
    assert b"Traceback" not in said
    return subprocess.CompletedProcess(process.args, process.returncode, out, said)


def lines_of(said: bytes) -> list[str]:
    """Return the lines of a command's output without progress lines, whose number depends on the host."""
    return [line for line in said.decode().splitlines() if not line.startswith("predicting: ")]


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")


# ---------------------------------------------------------------------------------------------- frames


def draw(folder: Path, make_frame: Frame, count: int) -> Path:
    for index in range(count):
        path = folder / f"{index % 7}" / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(make_frame(index % 50, 60 + index % 5, 80)).save(path)
    return folder


def slow_frames(folder: Path, make_frame: Frame) -> Path:
    """Draw frames that take some seconds to predict, so that a test can act during the run."""
    draw(folder / "0", lambda *_: make_frame(1, 1000, 1400), 1)
    for index in range(1, 60):
        (folder / f"{index}").symlink_to("0")
    return folder


def locally(bundle: Path, frames: Found, **settings: Any) -> list[Prediction | Failure]:
    return list(Predictor(bundle, device="cpu", concurrent=True, **settings).predict(frames))


def comparable(results: list[Prediction | Failure]) -> list[object]:
    """Return results in comparable form: an exception only equals itself."""
    return [(it.file, type(it.error), str(it.error)) if isinstance(it, Failure) else it for it in results]


def small_slices(monkeypatch: pytest.MonkeyPatch, *, block: int, frames: int) -> None:
    monkeypatch.setattr(cluster, "_BLOCK", block)
    monkeypatch.setattr(cluster, "_SLICE_PER_WORKER", frames // 2)


def test_results_equal_those_of_a_local_predictor(
    address: str,
    tiny_bundle: Path,
    tmp_path: Path,
    make_frame: Frame,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = draw(tmp_path / "frames", make_frame, 40)
    (folder / "0" / "0000.png").write_bytes(b"")
    (folder / "3" / "damaged.png").write_bytes((folder / "3" / "0003.png").read_bytes()[:-20])
    (folder / "6" / "leads nowhere.png").symlink_to("nowhere")
    if sys.platform == "linux":  # other systems only allow Unicode names
        shutil.copy(folder / "1" / "0001.png", os.fsencode(folder) + b"/2/\xff\xfe.png")
    monkeypatch.chdir(tmp_path)  # workers have another working directory: paths must be absolute
    found: Found = [*find_frames(["frames"])]
    found.insert(5, Failure("missing/*.png", InputNotFoundError("no file matches the pattern; check it")))
    small_slices(monkeypatch, block=4, frames=24)
    taken: list[int] = []

    def lazily() -> Iterator[FrameFile | Failure]:
        for index, item in enumerate(found):
            taken.append(index)
            yield item

    caplog.set_level(logging.INFO, "echoquad_runtime")
    contract = Bundle(tiny_bundle).contract
    confidences = [it.confidence(contract) for it in locally(tiny_bundle, found) if isinstance(it, Prediction)]
    threshold = median_low(confidences) + 1e-9
    rows = RayPredictor(Bundle(tiny_bundle), abstain_below=threshold).predict(lazily())
    assert taken == []
    results = [next(rows)]
    assert len(taken) == 24
    results += rows
    assert comparable(results) == comparable(locally(tiny_bundle, found, abstain_below=threshold))
    abstained = sum(isinstance(it, Prediction) and it.label == INDETERMINATE for it in results)
    assert 0 < abstained < len(confidences)
    failures = [type(it.error) for it in results if isinstance(it, Failure)]
    assert failures == [FrameDamagedError, InputNotFoundError, FrameDamagedError, FrameReadError]
    assert caplog.messages == ["2 Ray workers of 1 CPU each"]


@pytest.mark.slow
@on_linux
def test_killed_worker_loses_and_duplicates_no_row(
    address: str, tiny_bundle: Path, tmp_path: Path, make_frame: Frame
) -> None:
    """On the command line, since stdout may only carry rows while Ray reports the death."""
    line = [tiny_bundle, slow_frames(tmp_path / "frames", make_frame), "--device", "cpu"]
    expected = echoquad("predict", *line).stdout
    blocks_of_one = "from echoquad_runtime.cluster import ray_predictor; ray_predictor._BLOCK = 1"
    out = tmp_path / "rows.csv"
    words = ["predict", *line, "--engine", "ray", "--ray-address", address]
    with out.open("wb") as stream, start(*words, stdout=stream, begin=blocks_of_one) as process:
        assert wait_until(lambda: process.poll() is not None or len(out.read_bytes().splitlines()) > 4), "no rows come"
        before = workers()
        assert len(before) == 2
        victim = min(before)
        os.kill(victim, signal.SIGKILL)
        # Ray replaces it, since there are frames left.
        assert wait_until(lambda: victim not in workers() and workers() - before)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert out.read_bytes() == expected
    *lines, last = lines_of(said)
    assert lines == ["on cpu in fp32", "2 Ray workers of 1 CPU each"]
    assert last.startswith("60 frames: ")


def test_results_survive_encoding_as_rows(make_tiny_bundle: Callable[..., Path], tmp_path: Path) -> None:
    import pyarrow

    predictor = RayPredictor(Bundle(make_tiny_bundle(tmp_path / "bundle", classes=("A", "B", "C"), vote="average")))
    tenths = ((0.1, 0.2, 0.7), (1 / 3, 1 / 3, 1 / 3), (1.0, 0.0, 5e-324), (0.5, 0.25, 0.25))
    row = Prediction(
        "\udcff/ä.png",
        ("A", "B", "C"),
        "average",
        "C",
        tenths[0],
        ("C", "A", "A", "A"),
        tenths,
        ("tie",),
        "cpu",
        "fp32",
    )
    results = [row, replace(row, label="A", flags=()), Failure("\udcff", FrameReadError("cannot read \udcff\ud800"))]
    table = pyarrow.Table.from_pylist([ray_worker._row(*it) for it in enumerate(results)], schema=ray_worker._schema())
    items = [FrameFile(Path(it.file), it.file) for it in results]
    back = [predictor._result(*it, None) for it in zip(table.to_pylist(), range(3), items, strict=True)]
    assert comparable(back) == comparable(results)
    for lost in (None, table.to_pylist()[1]):
        with pytest.raises(ClusterError, match=r"^Ray returned .+; expected that of frame 0"):
            predictor._result(lost, 0, items[0], None)


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.slow
def test_error_names_node_that_cannot_open_bundle(
    address: str, tiny_bundle: Path, frames_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = cluster._files

    def spoiled(*arguments: Any) -> dict[str, bytes]:
        files = original(*arguments)
        return files | {"model.fp32.onnx": files["model.fp32.onnx"][:-1] + b"!"}

    monkeypatch.setattr(cluster, "_files", spoiled)
    rows = RayPredictor(Bundle(tiny_bundle), workers=1).predict(find_frames([frames_folder]))
    name = tiny_bundle.as_posix()
    with pytest.raises(
        BundleTamperedError, match=rf"^on the node [\d.]+: {name}: model.fp32.onnx has SHA-256 "
    ) as raised:
        next(rows)
    assert "\n" not in str(raised.value)
    assert raised.value.exit_code == 3


def test_address_without_cluster_raises(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but not listening
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        begin = time.monotonic()
        with pytest.raises(ClusterError, match=rf"^no Ray cluster answers at {address} \(.+\); start its head with"):
            RayPredictor(Bundle(tiny_bundle), address=address)
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ClusterError, match=address):
            RayPredictor(Bundle(tiny_bundle))
    assert time.monotonic() - begin < 15


def test_lost_head_is_reported_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(ray_session, "_CHECK_SECONDS", 0.02)
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        with ray_session._watch_head(address):
            time.sleep(0.2)
            assert caplog.messages == []
            head.close()
            assert wait_until(lambda: caplog.messages)
            time.sleep(0.1)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"the head of the Ray cluster, {address}, does not answer (")


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "head", "head:", ":6379", "head:port"])
def test_malformed_address_raises(tiny_bundle: Path, address: str) -> None:
    with pytest.raises(UsageError, match=rf"^the Ray address is '{address}'; expected auto, or HOST:PORT"):
        RayPredictor(Bundle(tiny_bundle), address=address)


@pytest.mark.parametrize(
    "settings", [{"threads": 0}, {"workers": 0}, {"batch_size": 0}, {"method": "none"}, {"public_key": "key.pem"}]
)
def test_settings_out_of_range_raise(tiny_bundle: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        RayPredictor(Bundle(tiny_bundle), **settings)


def test_missing_cluster_resources_raise(address: str, tiny_bundle: Path, frames_folder: Path) -> None:
    for settings, kind, text in (
        ({"device": "cuda"}, DeviceUnavailableError, "^none of the 1 nodes of the Ray cluster has a GPU"),
        ({"threads": 3}, ClusterError, "^no node of the Ray cluster has the 3 CPUs of a worker, but at most 2"),
    ):
        rows = RayPredictor(Bundle(tiny_bundle), **settings).predict(find_frames([frames_folder]))  # type: ignore[arg-type]
        with pytest.raises(kind, match=text):
            next(rows)


def test_worker_of_another_version_raises(tiny_bundle: Path) -> None:
    config = RayPredictor(Bundle(tiny_bundle))._config
    assert ray_worker._open(config).engine.precision == "fp32"
    with pytest.raises(ConfigError, match=r"^its echoquad is .+, expected 9; install the same on all nodes$"):
        ray_worker._open(replace(config, version="9"))


def test_missing_ray_raises_missing_extra(tiny_bundle: Path) -> None:
    code = (
        "import sys; sys.modules['ray'] = None; from echoquad_runtime.bundle.bundle import Bundle\n"
        "from echoquad_runtime.cluster.ray_predictor import RayPredictor\n"
        "from echoquad_runtime.errors import MissingExtraError\n"
        "try: RayPredictor(Bundle(sys.argv[1]))\n"
        "except MissingExtraError as error: print(error)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, tiny_bundle], check=False, capture_output=True, encoding="utf-8"
    )
    assert ended.stdout == 'this needs ray, which is not installed; do: pip install "echoquad[cpu,ray]"\n', ended.stderr


def test_command_line_without_cluster_or_ray(tiny_bundle: Path, frames_folder: Path, tmp_path: Path) -> None:
    line = ["predict", tiny_bundle, frames_folder, "--out", tmp_path / "rows.csv"]
    for words, code, text in (
        (
            ["--engine", "ray", "--ray-address", "127.0.0.1:1"],
            1,
            "error[E_CLUSTER]: no Ray cluster answers at 127.0.0.1:1 (",
        ),
        (["--ray-address", "auto"], 2, "error[E_USAGE]: --ray-address without --engine ray; "),
    ):
        ran = echoquad(*line, *words, code=code)
        assert ran.stdout == b""
        assert ran.stderr.decode().startswith(text)
        assert len(ran.stderr.splitlines()) == 1
    assert not (tmp_path / "rows.csv").exists()
    hidden = "import sys; sys.modules['ray'] = None"
    ran = echoquad(*line, "--engine", "ray", code=1, begin=hidden)
    assert ran.stderr.startswith(b"error[E_EXTRA_MISSING]: ") and b'pip install "echoquad[cpu,ray]"' in ran.stderr
    assert len(ran.stderr.splitlines()) == 1


# ---------------------------------------------------------------------------------------------- slow tests


@pytest.mark.slow
@on_linux
def test_resume_on_temporary_local_cluster(tiny_bundle: Path, tmp_path: Path, make_frame: Frame) -> None:
    folder, out = draw(tmp_path / "frames", make_frame, 40), tmp_path / "rows.jsonl"
    (folder / "2" / "0002.png").write_bytes(b"no image")
    line = ["predict", tiny_bundle, folder, "--device", "cpu", "--out", out]
    echoquad(*line, code=5)
    expected = out.read_bytes()
    out.unlink()
    (folder / "2").rename(tmp_path / "2")
    mark = secrets.token_hex(16)
    marked = {**os.environ, "PYTHONUTF8": "1", "ECHOQUAD_TEST": mark}
    own = [*line, "--engine", "ray", "--overlay", tmp_path / "pictures"]
    ran = echoquad(*own, env=marked)
    assert ran.stdout == b""
    kind, spread, _ = lines_of(ran.stderr)
    assert kind == "on cpu in fp32"
    assert spread.endswith(" of 1 CPU each")
    assert len([*(tmp_path / "pictures").rglob("*.png")]) == 34
    (tmp_path / "2").rename(folder / "2")
    echoquad(*own, "--resume", env=marked, code=5)
    assert sorted(out.read_bytes().splitlines()) == sorted(expected.splitlines())
    assert wait_until(lambda: not processes_with(f"ECHOQUAD_TEST={mark}"))


@pytest.mark.slow
@on_linux
def test_closing_the_iterator_ends_all_workers(
    address: str, tiny_bundle: Path, tmp_path: Path, make_frame: Frame
) -> None:
    rows = RayPredictor(Bundle(tiny_bundle)).predict(find_frames([slow_frames(tmp_path / "frames", make_frame)]))
    next(rows)
    assert len(workers()) == 2
    rows.close()
    assert wait_until(lambda: not workers())


@pytest.mark.slow
def test_signature_is_checked_on_the_nodes(
    address: str, tiny_bundle: Path, frames_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if util.find_spec("model_signing") is None:
        pytest.skip("the extra sign is not installed")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (tmp_path / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, *plain))
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "pub.pem").write_bytes(public)
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    sign_bundle(bundle, tmp_path / "key.pem")
    opened = Bundle(bundle, public_key=tmp_path / "pub.pem")
    with pytest.raises(ConfigError, match=r"^public_key must be the key with which the bundle was opened"):
        RayPredictor(opened)
    found: Found = [*find_frames([frames_folder])]
    predictor = RayPredictor(opened, public_key=tmp_path / "pub.pem")
    assert comparable(list(predictor.predict(found))) == comparable(locally(tiny_bundle, found))
    files = {name: data for name, data in predictor._config.files.items() if name != "MODEL_CARD.md"}
    monkeypatch.setattr(predictor, "_config", replace(predictor._config, files=files))
    with pytest.raises(SignatureError, match=r"^on the node [\d.]+: .+: 'MODEL_CARD.md' was removed after"):
        next(predictor.predict(found))


@pytest.mark.slow
@on_linux
def test_run_fails_after_four_dead_workers(
    address: str, tiny_bundle: Path, tmp_path: Path, make_frame: Frame, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: Found = [*find_frames([draw(tmp_path / "frames", make_frame, 4)])]
    small_slices(monkeypatch, block=4, frames=1000)
    rows = RayPredictor(Bundle(tiny_bundle), workers=1).predict(found)
    killed: set[int] = set()
    ended = threading.Event()

    def kill() -> None:
        while not ended.wait(0.005):
            for process in workers() - killed:
                with contextlib.suppress(OSError):
                    # Kill it while it opens its predictor.
                    if "onnxruntime" in Path(f"/proc/{process}/maps").read_text():
                        os.kill(process, signal.SIGKILL)
                        killed.add(process)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        with pytest.raises(ClusterError, match=r"^4 workers died in a row on .+ to .+ \(2 frames\); see the Ray logs"):
            next(rows)
    finally:
        ended.set()
        killer.join()
    assert len(killed) >= MAX_ATTEMPTS
