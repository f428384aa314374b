"""The graph cache: bitwise equal outputs, no error in any condition, and no file that another user may write."""

from __future__ import annotations

import gc
import json
import os
import shutil
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.manifest import model_file
from echoquad_runtime.bundle.onnx_header import CONTRACT_HASH_KEY, CONTRACT_KEY, INPUT, OUTPUTS
from echoquad_runtime.contract import Contract
from echoquad_runtime.devices import graph_cache as cache
from echoquad_runtime.devices import onnxruntime_loader as wheels
from echoquad_runtime.devices.execution_providers import CPU_PROVIDER, create_session
from echoquad_runtime.devices.graph_cache import CacheEntry, create_cached_session, find_cache_entry
from echoquad_runtime.engine.onnx_engine import OnnxEngine
from echoquad_runtime.errors import BundleTamperedError

onnx = pytest.importorskip("onnx")
if not wheels.installed_wheels():
    pytest.skip("onnxruntime is not installed", allow_module_level=True)

CONTRACT = Contract(classes=("ASD", "NORM"), input_size=32)
POSIX = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows has other permissions")


def network(seed: int = 3) -> bytes:
    """Build a graph with weights that onnxruntime packs for the processor, and others that it leaves unchanged."""
    helper, kinds, rng = onnx.helper, onnx.TensorProto, np.random.default_rng(seed)

    def constant(name: str, *shape: int) -> Any:
        return onnx.numpy_helper.from_array(rng.normal(0, 0.2, shape).astype(np.float32), name)

    graph = helper.make_graph(
        [
            helper.make_node("Cast", [INPUT], ["grey"], to=kinds.FLOAT),
            helper.make_node("Div", ["grey", "white"], ["unit"]),
            helper.make_node("Conv", ["unit", "w1"], ["f1"], kernel_shape=[3, 3]),
            helper.make_node("Relu", ["f1"], ["r1"]),
            helper.make_node("Conv", ["r1", "w2"], ["f2"], kernel_shape=[3, 3]),
            helper.make_node("Relu", ["f2"], ["r2"]),
            helper.make_node("GlobalAveragePool", ["r2"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["vector"]),
            helper.make_node("Gemm", ["vector", "w3"], ["hidden"], transB=1),
            helper.make_node("Gemm", ["hidden", "w4"], [OUTPUTS[0]], transB=1),
            helper.make_node("Softmax", [OUTPUTS[0]], [OUTPUTS[1]], axis=1),
        ],
        "network",
        [helper.make_tensor_value_info(INPUT, kinds.UINT8, ["N", 1, 32, 32])],
        [helper.make_tensor_value_info(name, kinds.FLOAT, ["N", 2]) for name in OUTPUTS],
        [
            onnx.numpy_helper.from_array(np.float32(255), "white"),
            *(constant("w1", 16, 1, 3, 3), constant("w2", 64, 16, 3, 3), constant("w3", 64, 64), constant("w4", 2, 64)),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, {CONTRACT_KEY: CONTRACT.to_json(), CONTRACT_HASH_KEY: CONTRACT.sha256})
    return bytes(model.SerializeToString())


@pytest.fixture(scope="module")
def model() -> bytes:
    return network()


@pytest.fixture(scope="module")
def ort() -> Any:
    return wheels.load_onnxruntime()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of an empty cache that also accepts small graphs."""
    monkeypatch.setenv("ECHOQUAD_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_MIN_GRAPH", 0)
    return tmp_path / "cache" / "graphs"


@pytest.fixture
def entry(ort: Any, model: bytes) -> CacheEntry:
    found = find_cache_entry(ort, "0" * 64, len(model))
    assert found is not None
    return found


@pytest.fixture
def entry_file(ort: Any, entry: CacheEntry, model: bytes, folder: Path) -> Path:
    """Write the entry and return its file."""
    create_cached_session(ort, entry, None, model, threads=1, spinning=False)
    (file,) = folder.iterdir()
    return file


def open_cached(ort: Any, entry: CacheEntry, model: bytes) -> tuple[Any, bool]:
    """Open a session as the engine does; return it and whether it uses the cached graph."""
    session = create_cached_session(ort, entry, entry.read(), model, threads=2, spinning=False)
    level = session.get_session_options().graph_optimization_level
    return session, level == ort.GraphOptimizationLevel.ORT_DISABLE_ALL


def outputs(session: Any, batch: int = 5) -> list[np.ndarray]:
    frames = np.random.default_rng(batch).integers(0, 256, (batch, 1, 32, 32), np.uint8)
    return list(session.run(OUTPUTS, {INPUT: frames}))


@pytest.fixture
def expected_outputs(ort: Any, model: bytes) -> list[np.ndarray]:
    return outputs(create_session(ort, model, CPU_PROVIDER, threads=2, spinning=False))


def same(found: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(found, expected, strict=True))


# ---------------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize("batch", [1, 4, 7])
def test_cached_session_computes_the_same_bits(batch: int, ort: Any, entry: CacheEntry, model: bytes) -> None:
    plain = create_session(ort, model, CPU_PROVIDER, threads=2, spinning=False)
    made, used = open_cached(ort, entry, model)
    assert not used
    cached, used = open_cached(ort, entry, model)
    assert used
    for session in (made, cached):
        assert same(outputs(session, batch), outputs(plain, batch))


def test_entry_holds_only_the_changed_weights(entry_file: Path, entry: CacheEntry, model: bytes) -> None:
    found = entry.read()
    assert found is not None
    weights = found.weights(model)
    arrays = [*weights.values()]
    assert all(array.flags.aligned for array in arrays)
    assert sum(array.nbytes for array in arrays) >= 4 * (64 * 16 * 9 + 64 * 64)
    kept = sum(not inside for *_, inside, _ in found._tensors)
    assert kept < len(arrays), "weights that the bundle's graph holds must not be stored again"
    assert entry_file.stat().st_size < 2 * len(model)


def test_session_keeps_its_weights_alive(
    ort: Any, entry_file: Path, entry: CacheEntry, expected_outputs: list[np.ndarray]
) -> None:
    session, used = open_cached(ort, entry, network())
    assert used
    gc.collect()
    filled = [np.full(1 << 18, 7, np.uint8) for _ in range(64)]  # overwrites memory that was freed
    assert same(outputs(session), expected_outputs)
    assert len(filled) == 64


def test_entry_is_written_once(ort: Any, entry_file: Path, entry: CacheEntry, model: bytes) -> None:
    before = entry_file.stat()
    assert open_cached(ort, entry, model)[1]
    after = entry_file.stat()
    assert (before.st_ino, before.st_size) == (after.st_ino, after.st_size)


# ---------------------------------------------------------------------------------------------- damage


def test_entry_with_a_changed_byte_is_ignored(entry_file: Path, entry: CacheEntry) -> None:
    whole = entry_file.read_bytes()
    for position in [*range(0, 200), *range(200, len(whole), len(whole) // 50), len(whole) - 1]:
        entry_file.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        assert entry.read() is None, position
    entry_file.write_bytes(whole)
    assert entry.read() is not None


@pytest.mark.parametrize("kept", [0, 10, 49, 60, 5000, -1])
def test_truncated_entry_is_replaced(
    kept: int, ort: Any, entry_file: Path, entry: CacheEntry, model: bytes, expected_outputs: list[np.ndarray]
) -> None:
    entry_file.write_bytes(entry_file.read_bytes()[:kept])
    session, used = open_cached(ort, entry, model)
    assert not used and same(outputs(session), expected_outputs)
    session, used = open_cached(ort, entry, model)
    assert used and same(outputs(session), expected_outputs)


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"exact": False, "tensors": 5},
        {"exact": False, "tensors": [["w2", "float32", [64, 16, 3, 3], False, 1 << 40]]},
        {"exact": False, "tensors": [["w2", "float33", [1], False, 0]]},
        {"exact": False, "tensors": [["nothing", "float32", [1], False, 0]]},
        {"exact": False, "tensors": []},
    ],
)
def test_intact_entry_with_an_invalid_header_is_ignored(
    header: dict[str, Any],
    ort: Any,
    entry_file: Path,
    entry: CacheEntry,
    model: bytes,
    expected_outputs: list[np.ndarray],
) -> None:
    found = entry.read()
    assert found is not None
    text = json.dumps(header).encode()
    body = cache._SIZES.pack(len(text), len(found.graph)) + text + found.graph
    entry_file.write_bytes(cache._MAGIC + cache.hashlib.sha256(body).digest() + body)
    session, used = open_cached(ort, entry, model)
    assert not used and same(outputs(session), expected_outputs)


# ---------------------------------------------------------------------------------------------- ownership


@POSIX
def test_entry_is_private_whatever_the_umask(ort: Any, entry: CacheEntry, model: bytes, folder: Path) -> None:
    before = os.umask(0)
    try:
        open_cached(ort, entry, model)
    finally:
        os.umask(before)
    (file,) = folder.iterdir()
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder, file)] == [0o700, 0o600]


@POSIX
@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_file_that_others_may_write_is_ignored(mode: int, entry_file: Path, entry: CacheEntry) -> None:
    entry_file.chmod(mode)
    assert entry.read() is None


@POSIX
@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_folder_that_others_may_write_is_ignored(
    mode: int, ort: Any, entry_file: Path, entry: CacheEntry, model: bytes, folder: Path
) -> None:
    folder.chmod(mode)
    assert entry.read() is None
    entry_file.unlink()
    open_cached(ort, entry, model)
    assert list(folder.iterdir()) == []


@POSIX
def test_file_of_another_user_is_ignored(
    ort: Any, entry_file: Path, entry: CacheEntry, model: bytes, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: entry_file.stat().st_uid + 1)
    assert entry.read() is None
    before = entry_file.stat().st_mtime_ns
    assert not open_cached(ort, entry, model)[1]
    assert (entry_file.stat().st_mtime_ns, list(folder.iterdir())) == (before, [entry_file])


@POSIX
@pytest.mark.parametrize("what", ["file", "folder"])
def test_symlinks_are_not_followed(what: str, entry_file: Path, entry: CacheEntry, folder: Path) -> None:
    linked = entry_file if what == "file" else folder
    moved = linked.rename(linked.with_name("moved"))
    linked.symlink_to(moved)
    assert entry.read() is None


@POSIX
def test_pipe_in_place_of_the_entry_does_not_block(ort: Any, entry_file: Path, entry: CacheEntry, model: bytes) -> None:
    entry_file.unlink()
    os.mkfifo(entry_file, 0o600)
    assert entry.read() is None
    open_cached(ort, entry, model)
    assert entry.read() is not None


# ---------------------------------------------------------------------------------------------- failures of the cache


def break_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")


def fill_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))


def refuse_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "in use")  # on Windows, while another process reads it

    monkeypatch.setattr(Path, "replace", refuse)


def refuse_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(*arguments: Any, adapt: Any = None, **options: Any) -> Any:
        if adapt is not None:
            raise RuntimeError("onnxruntime cannot write")
        return create_session(*arguments, **options)

    monkeypatch.setattr(cache, "create_session", make)


def save_nonsense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(*arguments: Any, adapt: Any = None, **options: Any) -> Any:
        session = create_session(*arguments, adapt=adapt, **options)
        if adapt is not None:
            (file,) = (tmp_path / "cache" / "graphs").glob("*/graph.onnx")
            file.write_bytes(b"nonsense")
        return session

    monkeypatch.setattr(cache, "create_session", make)


@pytest.mark.parametrize("trouble", [break_folder, fill_disk, refuse_name, refuse_saving, save_nonsense])
def test_cache_failure_does_not_affect_the_session(
    trouble: Callable[..., None],
    ort: Any,
    entry: CacheEntry,
    model: bytes,
    expected_outputs: list[np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trouble(tmp_path, monkeypatch)
    for _ in range(2):
        session, used = open_cached(ort, entry, model)
        assert not used and same(outputs(session), expected_outputs)
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path != tmp_path / "cache"]
    assert left == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no disk that is always full")
def test_disk_that_fills_up_leaves_no_files(
    ort: Any,
    entry: CacheEntry,
    model: bytes,
    expected_outputs: list[np.ndarray],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened = os.open

    def full(path: Any, flags: int, *mode: int, **options: Any) -> int:
        return opened("/dev/full", os.O_WRONLY) if flags & os.O_EXCL else opened(path, flags, *mode, **options)

    monkeypatch.setattr(os, "open", full)
    session, used = open_cached(ort, entry, model)
    assert not used and same(outputs(session), expected_outputs)
    assert list(folder.iterdir()) == []


def test_concurrent_sessions_share_one_entry(
    ort: Any, entry: CacheEntry, model: bytes, expected_outputs: list[np.ndarray], folder: Path
) -> None:
    found: list[bool] = []

    def work() -> None:
        found.extend(same(outputs(open_cached(ort, entry, model)[0]), expected_outputs) for _ in range(4))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 16
    assert len(list(folder.iterdir())) == 1
    assert open_cached(ort, entry, model)[1]


# ---------------------------------------------------------------------------------------------- size limits


def test_least_recently_used_entries_are_removed(
    ort: Any, model: bytes, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [CacheEntry(folder, name) for name in "abcd"]
    for age, entry in zip((40, 30, 20), entries, strict=False):
        create_cached_session(ort, entry, None, model, threads=1, spinning=False)
        os.utime(folder / f"{'abcd'[entries.index(entry)]}.graph", (time.time() - age,) * 2)
    assert open_cached(ort, entries[0], model)[1]  # now the most recently used
    monkeypatch.setattr(cache, "_MAX_TOTAL", int(2.5 * (folder / "a.graph").stat().st_size))
    create_cached_session(ort, entries[3], None, model, threads=1, spinning=False)
    assert sorted(path.name for path in folder.iterdir()) == ["a.graph", "d.graph"]
    monkeypatch.setattr(cache, "_MAX_TOTAL", 0)
    create_cached_session(ort, entries[1], None, model, threads=1, spinning=False)
    assert [path.name for path in folder.iterdir()] == ["b.graph"]


def test_stale_temporary_folders_are_removed(ort: Any, entry_file: Path, model: bytes, folder: Path) -> None:
    for name, age in ((".old", 2 * cache._STALE_SECONDS), (".new", 0.0)):
        (folder / name).mkdir()
        (folder / name / "graph.onnx").write_bytes(b"half")
        os.utime(folder / name, (time.time() - age,) * 2)
    create_cached_session(ort, CacheEntry(folder, "other"), None, model, threads=1, spinning=False)
    assert sorted(path.name for path in folder.iterdir()) == sorted([".new", "other.graph", entry_file.name])


# ---------------------------------------------------------------------------------------------- names of entries


def name_of(ort: Any, digest: str = "0" * 64) -> Path | None:
    found = find_cache_entry(ort, digest, 1 << 22)
    return None if found is None else found._path


def test_entry_name_depends_on_graph_processor_and_versions(ort: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {name_of(ort), name_of(ort), name_of(ort, "1" * 64)}
    assert len(names) == 2
    changes: list[tuple[Any, str, Any]] = [
        (cache, "cpu_model", lambda: "another"),
        (cache, "_cpu_features", lambda: ["AVX2"]),
        (cache, "__version__", "0.0.0"),
        (cache, "_MIN_EXTERNAL", 512),
        (ort, "__version__", "1.20.0"),
        (ort, "get_build_info", lambda: "another build"),
    ]
    for index, (where, name, value) in enumerate(changes):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, value)
            names.add(name_of(ort))
        assert len(names) == 3 + index, name


def test_no_entry_without_cache_folder_or_cpu_features(ort: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_cpu_features", list)  # an unknown processor might be another one
        assert name_of(ort) is None
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_MIN_GRAPH", 1 << 30)
        assert name_of(ort) is None
    assert name_of(ort) is not None
    monkeypatch.setenv("ECHOQUAD_CACHE_DIR", "")
    assert name_of(ort) is None


def test_numpy_lists_the_cpu_features() -> None:
    assert len(cache._cpu_features()) > 1


@pytest.mark.parametrize(
    ("system", "variables", "expected"),
    [
        ("linux", {"HOME": "/home/x"}, "/home/x/.cache/echoquad"),
        ("linux", {"HOME": "/home/x", "XDG_CACHE_HOME": "/var/x"}, "/var/x/echoquad"),
        ("linux", {"HOME": "/home/x", "XDG_CACHE_HOME": "relative"}, "/home/x/.cache/echoquad"),
        ("darwin", {"HOME": "/Users/x"}, "/Users/x/Library/Caches/EchoQuad"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/EchoQuad/Cache"),
    ],
)
@POSIX
def test_cache_folder_of_each_platform(
    system: str, variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ECHOQUAD_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", system)
    assert cache.cache_folder() == Path(expected)


# ---------------------------------------------------------------------------------------------- bundles


@pytest.fixture
def bundle(make_tiny_bundle: Callable[..., Path], tmp_path: Path, model: bytes) -> Iterator[Path]:
    yield make_tiny_bundle(tmp_path / "bundle", contract=CONTRACT, graphs={"fp32": model})


def test_engine_uses_the_cache(bundle: Path, folder: Path, expected_outputs: list[np.ndarray], ort: Any) -> None:
    frames = np.random.default_rng(5).integers(0, 256, (5, 1, 32, 32), np.uint8)
    for level in ("ORT_ENABLE_ALL", "ORT_DISABLE_ALL"):
        engine = OnnxEngine(Bundle(bundle), device="cpu", threads=2)
        options = engine._session.get_session_options()
        assert options.graph_optimization_level == getattr(ort.GraphOptimizationLevel, level)
        assert same(list(engine.infer(frames)), expected_outputs)
        assert len(list(folder.iterdir())) == 1


def test_changed_graph_is_refused_despite_the_cache(bundle: Path, folder: Path) -> None:
    OnnxEngine(Bundle(bundle), device="cpu")
    assert len(list(folder.iterdir())) == 1
    file = bundle / model_file("fp32")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(BundleTamperedError, match=r"model.fp32.onnx has SHA-256"):
        OnnxEngine(Bundle(bundle), device="cpu")


def test_verified_signed_bundle_bypasses_the_cache(bundle: Path, folder: Path) -> None:
    opened = Bundle(bundle)
    opened.signed_by = "f" * 64  # as if a public key had been given
    OnnxEngine(opened, device="cpu")
    assert not folder.exists()
