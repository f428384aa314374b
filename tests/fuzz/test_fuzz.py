"""Corrupted bundles: each is refused, or provably harmless; never a crash, a hang, or another decision.

Each number stands for one corruption (see ``corruptions.py``). ``verify`` and ``predict`` are run on what it leaves:

- Neither ends in a traceback, with another exit code than 0, 1 or 3, or without saying why in a short line.
- Where the manifest's hashes were left as they are, ``predict`` refuses, or prints the very same rows.
- Where they were made right again, ``verify`` refuses, or ``predict`` decides the same, within twice the gate: golden
  frames stand for all others, and are not the ones that are judged here.
  ``predict`` alone may then decide otherwise: it replays no golden frames, and hashes show damage, not a forger.
- With ``--public-key`` both refuse every one of these forgeries.

``pytest tests/fuzz -m slow`` goes through a thousand and more.
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

SECONDS = 60.0
"""How long a single corruption may take on a busy machine; they take a twentieth of a second."""

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
    """Have the tiny graph's convolution computed as int8 is exported: quantize, dequantize, around it."""
    model = onnx.load_from_string(graph)
    nodes, tensors = model.graph.node, model.graph.initializer
    (kernel,) = (tensor for tensor in tensors if tensor.name == "convolution")
    weights = onnx.numpy_helper.to_array(kernel)
    scales = np.abs(weights).max(axis=(1, 2, 3)) / 127
    whole = np.round(weights / scales[:, None, None, None]).astype(np.int8)
    tensors.remove(kernel)
    # Grey levels from 0 to 255, normalised to -1 to 1, are 256 steps of 2 / 255 but for half a step.
    for name, value in {
        "activation_scale": np.float32(2 / 255),
        "activation_zero": np.uint8(128),
        "kernel": whole,
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
def whole(tmp_path_factory: pytest.TempPathFactory, make_tiny_bundle: Any, make_tiny_graph: Any) -> Path:
    """Give a bundle of fp32 and int8."""
    graph = make_tiny_graph(CONTRACT)
    strict = {"max_abs_dlogit": 1e-4, "max_abs_dprobability": 1e-4, "max_frame_flip_fraction": 0.0}
    # Tighter than that of real bundles: what passes it can turn neither of the two frames.
    gates = {"fp32": strict, "int8": {"max_abs_dprobability": 0.01, "max_frame_flip_fraction": 0.0}}
    return Path(
        make_tiny_bundle(
            tmp_path_factory.mktemp("whole") / "bundle",
            contract=CONTRACT,
            precisions=("fp32", "int8"),
            graphs={"fp32": graph, "int8": quantized(graph)},
            manifest={"parity": {name: {"gate": gate} for name, gate in gates.items()}},
        )
    )


@pytest.fixture(scope="module")
def two_frames(tmp_path_factory: pytest.TempPathFactory, make_frame: Callable[..., Any]) -> Path:
    """Give a folder of two frames, one of each class, whose quadrants all lead clearly enough (0.08 and 0.96)."""
    folder = tmp_path_factory.mktemp("frames")
    for index, seed in enumerate((1914, 1519)):
        Image.fromarray(make_frame(seed)).save(folder / f"{index}.png")
    return folder


class Ended(Exception):
    """The worker died, or went silent, over a corruption."""


@contextmanager
def worker(
    whole: Path, frames: Path, scratch: Path, *, public_key: Path | None = None, sabotage: str = ""
) -> Iterator[Callable[[int], Result]]:
    """Start a process that corrupts and uses bundles; gives a function that has it judge one."""
    command = [sys.executable, str(Path(__file__).with_name("worker.py"))]
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
    options = {"bundle": str(whole), "frames": str(frames), "scratch": str(scratch), "sabotage": sabotage}
    stdin.write(json.dumps({**options, "public_key": public_key and str(public_key)}) + "\n")

    def judge(seed: int) -> Result:
        stdin.write(f"{seed}\n")
        stdin.flush()
        try:
            answer = answers.get(timeout=SECONDS)
        except queue.Empty:
            raise Ended(f"corruption {seed}: no answer after {SECONDS} s") from None
        if not answer:
            said = (scratch / "stderr.txt").read_text("utf-8", "replace")
            raise Ended(f"corruption {seed}: the process ended with {process.wait()}\n{said[-2000:]}")
        return {"seed": seed, **json.loads(answer)}

    try:
        yield judge
    finally:
        process.kill()
        process.wait()
        reader.join()
        for stream in (stdin, stdout, chatter):
            stream.close()


def go_through(judge: Callable[[int], Result], seeds: Iterable[int], scratch: Path) -> collections.Counter[str]:
    """Have corruptions judged; none may show a fault. Gives how often each outcome was."""
    results = [judge(seed) for seed in seeds]
    wrong = [result for result in results if result["faults"]]
    assert wrong == [], "\n".join(json.dumps(result) for result in wrong)
    # onnxruntime's own complaints go past Python; nobody who reads an error line needs them.
    assert (scratch / "stderr.txt").read_text("utf-8", "replace") == ""
    assert {result["family"] for result in results} == FAMILIES
    return collections.Counter(result["outcome"] for result in results)


def test_corrupted_bundles(whole: Path, two_frames: Path, tmp_path: Path) -> None:
    with worker(whole, two_frames, tmp_path) as judge:
        outcomes = go_through(judge, range(200), tmp_path)
    # Neither is everything refused, as it would be if nothing worked, nor is much found harmless.
    assert 0 < outcomes[HARMLESS] < 60, outcomes
    assert outcomes["refused"] > 80, outcomes


@pytest.mark.slow
def test_a_thousand_corrupted_bundles(
    whole: Path, two_frames: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    with worker(whole, two_frames, tmp_path) as judge:
        outcomes = go_through(judge, range(200, 1400), tmp_path)
    record_property("outcomes", dict(outcomes))
    assert 0 < outcomes[HARMLESS] < 350, outcomes
    assert outcomes["refused"] > 500, outcomes


def signed(whole: Path, folder: Path) -> tuple[Path, Path]:
    """Sign a copy of the bundle; gives it, and the public key."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    from echoquad_runtime.bundle.signing import sign_bundle

    key, private, public = ec.generate_private_key(ec.SECP256R1()), folder / "key.pem", folder / "pub.pem"
    pem, spki = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(pem, spki))
    bundle = Path(shutil.copytree(whole, folder / "signed"))
    sign_bundle(bundle, private)
    return bundle, public


@pytest.mark.parametrize("seeds", [range(2000, 2060), pytest.param(range(2060, 2500), marks=pytest.mark.slow)])
def test_a_signature_stops_every_forgery(seeds: range, whole: Path, two_frames: Path, tmp_path: Path) -> None:
    if util.find_spec("model_signing") is None:
        pytest.skip("the extra sign is not installed")
    bundle, public_key = signed(whole, tmp_path)
    with worker(bundle, two_frames, tmp_path, public_key=public_key) as judge:
        outcomes = go_through(judge, seeds, tmp_path)
    assert outcomes["refused by verify alone"] == outcomes["refused by verify; predict gives the same"] == 0, outcomes
    assert outcomes["refused"] > 0.9 * len(seeds), outcomes


# ---------------------------------------------------------------------------------------------- the test of the test

# Puts a graph of other decisions in place of the true one.
OTHER = """
import corruptions
def corrupt(folder, seed):
    (folder / "model.fp32.onnx").write_bytes((folder.parent / "other.onnx").read_bytes())
    if seed:
        corruptions.forge(folder)
    return corruptions.Corruption("other", "model.fp32.onnx", "another graph", bool(seed))
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
DEAD = "import os, signal; Worker.use = lambda *_: os.kill(os.getpid(), signal.SIGSEGV)"
SILENT = "import time; Worker.use = lambda *_: time.sleep(600)"


@pytest.mark.parametrize(
    ("seed", "without", "faults"),
    [
        (0, "", []),
        (0, WITHOUT_HASHES, ["another decision"]),
        (1, "", []),
        (1, WITHOUT_GOLDEN, ["verify passes, and predict gives another decision"]),
    ],
    ids=["hashes", "no hashes", "golden frames", "no golden frames"],
)
def test_what_is_not_checked_is_found_out(
    seed: int, without: str, faults: list[str], whole: Path, two_frames: Path, tmp_path: Path, make_tiny_graph: Any
) -> None:
    (tmp_path / "other.onnx").write_bytes(make_tiny_graph(CONTRACT, logit_scale=-1.0))
    with worker(whole, two_frames, tmp_path, sabotage=OTHER + without) as judge:
        assert judge(seed)["faults"] == faults


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_crash_names_the_corruption(whole: Path, two_frames: Path, tmp_path: Path) -> None:
    with (
        worker(whole, two_frames, tmp_path, sabotage=DEAD) as judge,
        pytest.raises(Ended, match=r"corruption 7: .*-11"),
    ):
        judge(7)


def test_a_hang_names_the_corruption(
    whole: Path, two_frames: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with worker(whole, two_frames, tmp_path, sabotage=SILENT) as judge:
        monkeypatch.setitem(globals(), "SECONDS", 0.1)
        with pytest.raises(Ended, match=r"corruption 7: no answer after 0\.1 s"):
            judge(7)
