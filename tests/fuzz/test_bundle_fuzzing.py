"""Bundle fuzzing: a corrupted bundle is refused or provably harmless; it never crashes, hangs or decides differently.

A number identifies a corruption (see ``bundle_corruptions.py``). ``verify`` and ``predict`` are run on the result:

- Both end with exit code 0, 1 or 3, without a traceback, and state the reason in a short line.
- If the hashes in the manifest are unchanged, ``predict`` refuses or prints the same rows.
- If the hashes were forged, ``verify`` refuses, or ``predict`` decides the same within twice the gate: golden frames
  represent all others, and are not the frames that are decided here. ``predict`` alone may decide differently: it does
  not replay golden frames, and hashes detect damage, not forgery.
- With ``--public-key`` both refuse every forgery.

``pytest tests/fuzz -m slow`` tries more than a thousand corruptions.
"""

from __future__ import annotations

import collections
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from echoquad_runtime.contract import Contract

onnx = pytest.importorskip("onnx")
helper = onnx.helper

HANG_SECONDS = 60.0
"""Seconds without an answer that count as a hang; a corruption takes a twentieth of a second."""

CONTRACT = Contract(classes=("ASD", "NORM"), input_size=32)
FAMILIES = {
    "bytes",
    "file",
    "manifest",
    "forged manifest",
    "forged graph, bytes",
    "forged graph",
    "forged golden",
    "forged and swapped",
}
HARMLESS = "harmless: the same outputs"
Result = dict[str, Any]


def quantized(graph: bytes) -> bytes:
    """Return the tiny graph with its convolution quantized as in an int8 export (QuantizeLinear, DequantizeLinear)."""
    model = onnx.load_from_string(graph)
    nodes, tensors = model.graph.node, model.graph.initializer
    (kernel,) = (tensor for tensor in tensors if tensor.name == "convolution")
    weights = onnx.numpy_helper.to_array(kernel)
    scales = np.abs(weights).max(axis=(1, 2, 3)) / 127
    steps = np.round(weights / scales[:, None, None, None]).astype(np.int8)
    tensors.remove(kernel)
    # Grey levels from 0 to 255, normalised to [-1, 1], are 256 steps of 2 / 255, up to half a step.
    for name, value in {
        "activation_scale": np.float32(2 / 255),
        "activation_zero": np.uint8(128),
        "kernel": steps,
        "kernel_scale": scales.astype(np.float32),
        "kernel_zero": np.zeros(len(scales), np.int8),
    }.items():
        tensors.append(onnx.numpy_helper.from_array(np.asarray(value), name))
    convolution = next(node for node in nodes if node.op_type == "Conv")
    at = list(nodes).index(convolution)
    convolution.input[0], convolution.input[1] = "activation", "convolution"
    activation, kernel_of = ["activation_scale", "activation_zero"], ["kernel", "kernel_scale", "kernel_zero"]
    for node in (
        helper.make_node("DequantizeLinear", kernel_of, ["convolution"], axis=0),
        helper.make_node("DequantizeLinear", ["steps", *activation], ["activation"]),
        helper.make_node("QuantizeLinear", ["normalised", *activation], ["steps"]),
    ):
        nodes.insert(at, node)
    return bytes(model.SerializeToString(deterministic=True))


@pytest.fixture(scope="module")
def valid_bundle(tmp_path_factory: pytest.TempPathFactory, make_tiny_bundle: Any, make_tiny_graph: Any) -> Path:
    """Return a bundle of fp32 and int8."""
    graph = make_tiny_graph(CONTRACT)
    strict = {"max_abs_dlogit": 1e-4, "max_abs_dprobability": 1e-4, "max_frame_flip_fraction": 0.0}
    # Tighter than in real bundles: a graph that passes cannot flip either of the two frames.
    gates = {"fp32": strict, "int8": {"max_abs_dprobability": 0.01, "max_frame_flip_fraction": 0.0}}
    return Path(
        make_tiny_bundle(
            tmp_path_factory.mktemp("valid_bundle") / "bundle",
            contract=CONTRACT,
            precisions=("fp32", "int8"),
            graphs={"fp32": graph, "int8": quantized(graph)},
            manifest={"parity": {name: {"gate": gate} for name, gate in gates.items()}},
        )
    )


@pytest.fixture(scope="module")
def two_frames(tmp_path_factory: pytest.TempPathFactory, make_frame: Callable[..., Any]) -> Path:
    """Return a folder of two frames, one of each class, whose quadrants have clear margins (0.08 and 0.96)."""
    folder = tmp_path_factory.mktemp("frames")
    for index, seed in enumerate((1914, 1519)):
        Image.fromarray(make_frame(seed)).save(folder / f"{index}.png")
    return folder


class WorkerEnded(Exception):
    """The worker died or hung while checking a corruption."""


@contextmanager
def worker(
    valid_bundle: Path, frames: Path, scratch: Path, *, public_key: Path | None = None, sabotage: str = ""
) -> Iterator[Callable[[int], Result]]:
    """Start a process that corrupts and uses bundles, and yield a function that lets it check one."""
    command = [sys.executable, str(Path(__file__).with_name("bundle_worker.py"))]
    environment = {
        **os.environ,
        "PYTHONUTF8": "1",
        "OMP_NUM_THREADS": "1",
        "ECHOQUAD_CONFIG_DIR": str(scratch / "configuration"),
        "ECHOQUAD_TRACEBACK": "",
    }
    chatter = (scratch / "stderr.txt").open("wb")
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": chatter}
    process = subprocess.Popen(command, encoding="utf-8", env=environment, cwd=scratch, **pipes)
    assert process.stdin is not None
    assert process.stdout is not None
    answers: queue.Queue[str] = queue.Queue()
    stdin, stdout = process.stdin, process.stdout

    def read() -> None:
        for line in stdout:
            answers.put(line)
        answers.put("")

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    options = {"bundle": str(valid_bundle), "frames": str(frames), "scratch": str(scratch), "sabotage": sabotage}
    stdin.write(json.dumps({**options, "public_key": public_key and str(public_key)}) + "\n")

    def check(seed: int) -> Result:
        stdin.write(f"{seed}\n")
        stdin.flush()
        try:
            answer = answers.get(timeout=HANG_SECONDS)
        except queue.Empty:
            raise WorkerEnded(f"corruption {seed}: no answer after {HANG_SECONDS} s") from None
        if not answer:
            stderr_text = (scratch / "stderr.txt").read_text("utf-8", "replace")
            raise WorkerEnded(f"corruption {seed}: the process ended with {process.wait()}\n{stderr_text[-2000:]}")
        return {"seed": seed, **json.loads(answer)}

    try:
        yield check
    finally:
        process.kill()
        process.wait()
        reader.join()
        for stream in (stdin, stdout, chatter):
            stream.close()


def check_all(check: Callable[[int], Result], seeds: Iterable[int], scratch: Path) -> collections.Counter[str]:
    """Check corruptions, assert that none shows a fault, and count the outcomes."""
    results = [check(seed) for seed in seeds]
    wrong = [result for result in results if result["faults"]]
    assert wrong == [], "\n".join(json.dumps(result) for result in wrong)
    # onnxruntime would print its own messages past Python.
    assert (scratch / "stderr.txt").read_text("utf-8", "replace") == ""
    assert {result["family"] for result in results} == FAMILIES
    return collections.Counter(result["outcome"] for result in results)


def test_corrupted_bundles_are_refused_or_harmless(valid_bundle: Path, two_frames: Path, tmp_path: Path) -> None:
    with worker(valid_bundle, two_frames, tmp_path) as check:
        outcomes = check_all(check, range(100), tmp_path)
    # Some are accepted, as they would not be if nothing worked, but not many.
    assert 0 < outcomes[HARMLESS] < 30, outcomes
    assert outcomes["refused"] > 40, outcomes


@pytest.mark.slow
def test_a_thousand_corrupted_bundles(
    valid_bundle: Path, two_frames: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    with worker(valid_bundle, two_frames, tmp_path) as check:
        outcomes = check_all(check, range(100, 1400), tmp_path)
    record_property("outcomes", dict(outcomes))
    assert 0 < outcomes[HARMLESS] < 350, outcomes
    assert outcomes["refused"] > 500, outcomes


def signed(valid_bundle: Path, folder: Path) -> tuple[Path, Path]:
    """Return a signed copy of the bundle, and the public key."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    from echoquad_runtime.bundle.signing import sign_bundle

    key, private, public = ec.generate_private_key(ec.SECP256R1()), folder / "key.pem", folder / "pub.pem"
    pem, spki = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(pem, spki))
    bundle = Path(shutil.copytree(valid_bundle, folder / "signed"))
    sign_bundle(bundle, private)
    return bundle, public


@pytest.mark.parametrize("seeds", [range(2000, 2030), pytest.param(range(2030, 2500), marks=pytest.mark.slow)])
def test_signature_detects_every_forgery(seeds: range, valid_bundle: Path, two_frames: Path, tmp_path: Path) -> None:
    if util.find_spec("model_signing") is None:
        pytest.skip("the extra sign is not installed")
    bundle, public_key = signed(valid_bundle, tmp_path)
    with worker(bundle, two_frames, tmp_path, public_key=public_key) as check:
        outcomes = check_all(check, seeds, tmp_path)
    assert outcomes["refused by verify alone"] == outcomes["refused by verify; predict decides the same"] == 0, outcomes
    assert outcomes["refused"] > 0.9 * len(seeds), outcomes


# ---------------------------------------------------------------------------------------------- tests of the harness

# Replaces the graph by one that decides differently.
OTHER_GRAPH = """
import bundle_corruptions
def corrupt(folder, seed):
    (folder / "model.fp32.onnx").write_bytes((folder.parent / "other.onnx").read_bytes())
    if seed:
        bundle_corruptions.forge(folder)
    return bundle_corruptions.Corruption("other", "model.fp32.onnx", "another graph", bool(seed))
"""
WITHOUT_HASHES = """
from echoquad_runtime.errors import BundleTamperedError
checked = Bundle.read
def read(self, name):
    try:
        return checked(self, name)
    except BundleTamperedError:
        return (self.folder / name).read_bytes()
Bundle.read = read
"""
WITHOUT_GOLDEN = """
from echoquad_runtime.verify import verify
from echoquad_runtime.engine import self_test
verify.max_abs_differences = self_test.max_abs_differences = lambda found, expected: verify.np.zeros(len(found))
verify.within_tolerance = lambda leads, *_: leads[..., 0] < 9
"""
CRASH = "import os, signal; Worker.use = lambda *_: os.kill(os.getpid(), signal.SIGSEGV)"
HANG = "import time; Worker.use = lambda *_: time.sleep(600)"


@pytest.mark.parametrize(
    ("seed", "without", "faults"),
    [
        (0, "", []),
        (0, WITHOUT_HASHES, ["another decision"]),
        (1, "", []),
        (1, WITHOUT_GOLDEN, ["verify passes, and predict decides differently"]),
    ],
    ids=["hashes", "no hashes", "golden frames", "no golden frames"],
)
def test_harness_detects_missing_checks(
    seed: int,
    without: str,
    faults: list[str],
    valid_bundle: Path,
    two_frames: Path,
    tmp_path: Path,
    make_tiny_graph: Any,
) -> None:
    (tmp_path / "other.onnx").write_bytes(make_tiny_graph(CONTRACT, logit_scale=-1.0))
    with worker(valid_bundle, two_frames, tmp_path, sabotage=OTHER_GRAPH + without) as check:
        assert check(seed)["faults"] == faults


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_harness_names_corruption_of_crash(valid_bundle: Path, two_frames: Path, tmp_path: Path) -> None:
    with (
        worker(valid_bundle, two_frames, tmp_path, sabotage=CRASH) as check,
        pytest.raises(WorkerEnded, match=r"corruption 7: .*-11"),
    ):
        check(7)


def test_harness_names_corruption_of_hang(
    valid_bundle: Path, two_frames: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with worker(valid_bundle, two_frames, tmp_path, sabotage=HANG) as check:
        monkeypatch.setitem(globals(), "HANG_SECONDS", 0.1)
        with pytest.raises(WorkerEnded, match=r"corruption 7: no answer after 0\.1 s"):
            check(7)
