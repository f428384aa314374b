"""Fixtures for the tests of every package: synthetic frames, and a real bundle that takes milliseconds to build."""

from __future__ import annotations

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime reads it when it is imported
if "PYTEST_XDIST_WORKER" in os.environ:
    # Each test process would start as many torch threads as there are cores, which is slower for small networks. torch
    # reads the variable when it is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hashlib
import importlib
import pickle
import signal
import subprocess
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from echoquad_runtime.bundle.golden_frames import GoldenFrames, encode_golden
from echoquad_runtime.bundle.manifest import (
    GOLDEN,
    INTENDED_USE,
    MANIFEST,
    MODEL_CARD,
    SCHEMA,
    encode_manifest,
    model_file,
)
from echoquad_runtime.bundle.onnx_header import CAM, CONTRACT_HASH_KEY, CONTRACT_KEY, INPUT, OUTPUTS, TYPICALITY
from echoquad_runtime.contract import Contract
from echoquad_runtime.quadrants import Grey, frame_quadrants, quadrant_boxes
from echoquad_runtime.storage.file_lock import FileLock, LockedError

# A shell ignores SIGINT in background jobs, and the processes that tests start would inherit that. A handler is not
# inherited: they start with the default.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run, and no deadline: a busy machine must not fail a test.
settings.register_profile("echoquad", derandomize=True, deadline=None)
settings.load_profile("echoquad")

TINY_CONTRACT = Contract(classes=("ASD", "NORM"), input_size=32)
GATE = {
    "max_abs_dlogit": 1e-4,
    "max_abs_dprobability": 1e-4,
    "max_frame_flip_fraction": 0.0,
    "max_patch_flip_fraction": 0.0,
}
FILTERS = 6
TYPICAL = np.array([[1.0, 1.5, 2.0, 2.5]])  # brightness of a typical quadrant at each position, for the tiny network


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail a test that skips for want of a Debian package, where all are said to be installed."""
    report = yield
    if report.skipped and "needs Debian's" in str(report.longrepr) and os.environ.get("ECHOQUAD_ALL_PACKAGES"):
        report.outcome = "failed"
    return report


@pytest.fixture(scope="session", autouse=True)
def _isolated_config_and_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["ECHOQUAD_CONFIG_DIR"] = str(tmp_path_factory.mktemp("config"))
    os.environ["ECHOQUAD_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))


T = TypeVar("T")


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], T]], T]:
    """Return `once(name, make)`, which returns `make(folder)` from the first of the test processes that asks for it.

    What it returns is pickled for the others, and what it writes is theirs too: tests must not change it.
    """
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"

    def once(name: str, make: Callable[[Path], T]) -> T:
        root.mkdir(exist_ok=True)
        made = root / f"{name}.pickle"
        while True:
            try:
                lock = FileLock(root / f"{name}.lock")
                break
            except LockedError:
                time.sleep(0.05)
        try:
            if not made.exists():
                (root / name).mkdir()
                value = make(root / name)
                made.write_bytes(pickle.dumps(value))
            return pickle.loads(made.read_bytes())
        finally:
            lock.release()

    return once


# Keys and certificates


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two key pairs, NAME.pem and NAME.pub.pem: ours and theirs."""
    ec = importlib.import_module("cryptography.hazmat.primitives.asymmetric.ec")
    form = importlib.import_module("cryptography.hazmat.primitives.serialization")
    folder = tmp_path_factory.mktemp("keys")
    for name in ("ours", "theirs"):
        key = ec.generate_private_key(ec.SECP256R1())
        private = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
        public = key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
        (folder / f"{name}.pem").write_bytes(private)
        (folder / f"{name}.pub.pem").write_bytes(public)
    return folder


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an authority, a certificate for localhost, and one of a client."""
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        try:
            subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=60)
        except FileNotFoundError:
            pytest.skip("needs Debian's openssl")

    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl("req", "-x509", *new_key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=Test CA", "-days", "2")
    folder.joinpath("names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    for name in ("server", "client"):
        openssl("req", *new_key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        authority = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "names")
        openssl("x509", "-req", "-in", f"{name}.csr", *authority, "-out", f"{name}.pem", "-days", "2")
    return folder


# Frames


def draw_frame(seed: int, height: int = 60, width: int = 80) -> Grey:
    """Draw a synthetic grey frame, uint8 [height, width]: a dark or a bright blur in each quadrant, and speckle."""
    rng = np.random.default_rng(seed)
    bright = rng.integers(0, 2, 4) * 0.5 + rng.uniform(0.05, 0.45, 4)
    frame = np.empty((height, width))
    for (left, top, right, bottom), level in zip(quadrant_boxes(width, height, 1.0), bright, strict=True):
        frame[top:bottom, left:right] = level
    return np.clip(255 * frame + rng.normal(0, 12, frame.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def make_frame() -> Callable[..., Grey]:
    """Return `draw_frame(seed, height=60, width=80)`, which draws a synthetic grey frame."""
    return draw_frame


@pytest.fixture
def frames_folder(tmp_path: Path) -> Path:
    """Return a folder with six readable frames in two subfolders, as PNG, JPEG, BMP and TIFF."""
    folder = tmp_path / "frames"
    for index, name in enumerate(["a/0.png", "a/1.jpg", "a/2.bmp", "b/3.tif", "b/4.PNG", "b/5.png"]):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_frame(index, 60 + index, 80 - index)).save(path)
    return folder


# A tiny network


@dataclass(frozen=True)
class TinyWeights:
    """The network's weights: a 3x3 convolution without padding, ReLU, mean over the image, a linear layer."""

    convolution: np.ndarray  # [F, 1, 3, 3]
    matrix: np.ndarray  # [C, F]
    bias: np.ndarray  # [C]


@pytest.fixture
def without_isolation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode every file in the calling thread, as a frozen program does, so that a test can replace decoders."""
    monkeypatch.setattr("echoquad_runtime.frames.reader.can_isolate", lambda: False)


def tiny_weights(classes: int) -> TinyWeights:
    """Draw seeded weights whose classes are about equally likely on `draw_frame`'s frames."""
    rng = np.random.default_rng(7)
    convolution = rng.normal(0, 0.4, (FILTERS, 1, 3, 3))
    matrix = rng.normal(0, 2.5, (classes, FILTERS))
    weights = TinyWeights(convolution, matrix, np.zeros(classes))
    sample = np.concatenate([frame_quadrants(draw_frame(seed), TINY_CONTRACT) for seed in range(100, 110)])
    logits, _ = tiny_answers(sample, TINY_CONTRACT, weights)
    return replace(weights, bias=-np.median(logits, axis=0))


def tiny_answers(quadrants: np.ndarray, contract: Contract, weights: TinyWeights) -> tuple[np.ndarray, np.ndarray]:
    """Compute in numpy, float64, what the graph should give: logits and probabilities, [N, C] each."""
    x = (quadrants[:, 0] / 255.0 - contract.mean) / contract.std
    patches = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
    mapped = np.maximum(np.einsum("nyxij,fij->nfyx", patches, weights.convolution[:, 0]), 0)
    logits = mapped.mean(axis=(2, 3)) @ weights.matrix.T + weights.bias
    scaled = logits / contract.temperature
    exponentials = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return logits, exponentials / exponentials.sum(axis=1, keepdims=True)


def tiny_typicality(quadrants: np.ndarray, contract: Contract) -> np.ndarray:
    """Compute in numpy what the graph should give: the typicality of quadrants at each position, [N, 4]."""
    one = TinyWeights(tiny_weights(2).convolution, np.ones((1, FILTERS)), np.zeros(1))
    brightness, _ = tiny_answers(quadrants, contract, one)
    return 1 / (1 + (brightness - TYPICAL) ** 2)


def tiny_graph(
    contract: Contract,
    *,
    carried: str | None = None,
    input_name: str = INPUT,
    input_shape: Sequence[int | str] | None = None,
    output_names: Sequence[str] = OUTPUTS,
    logit_scale: float = 1.0,
    typicality: bool = False,
    cam: bool = False,
) -> bytes:
    """Build the network as the bytes of an ONNX file; with class activation maps where `cam`.

    With `typicality` it also computes the scores of `tiny_typicality`.

    `carried` is the contract's JSON in its metadata ("" is none; None is the right one); the other options make
    graphs that a session must refuse, and `logit_scale` one that computes something else (NaN among the choices).
    """
    onnx = pytest.importorskip("onnx")
    helper, kinds = onnx.helper, onnx.TensorProto
    weights, count = tiny_weights(len(contract.classes)), len(contract.classes)

    def constant(name: str, value: Any) -> Any:
        return onnx.numpy_helper.from_array(np.asarray(value, np.float32), name)

    size = contract.input_size
    graph = helper.make_graph(
        [
            helper.make_node("Cast", [input_name], ["grey"], to=kinds.FLOAT),
            helper.make_node("Div", ["grey", "white"], ["unit"]),
            helper.make_node("Sub", ["unit", "mean"], ["centred"]),
            helper.make_node("Div", ["centred", "std"], ["normalised"]),
            helper.make_node("Conv", ["normalised", "convolution"], ["features"], kernel_shape=[3, 3]),
            helper.make_node("Relu", ["features"], ["rectified"]),
            helper.make_node("GlobalAveragePool", ["rectified"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["vector"]),
            helper.make_node("Gemm", ["vector", "matrix", "bias"], [output_names[0]], transB=1),
            helper.make_node("Div", [output_names[0], "temperature"], ["scaled"]),
            helper.make_node("Softmax", ["scaled"], [output_names[1]], axis=1),
        ],
        "tiny",
        [helper.make_tensor_value_info(input_name, kinds.UINT8, input_shape or ["N", 1, size, size])],
        [
            helper.make_tensor_value_info(name, kinds.FLOAT, [input_shape[0] if input_shape else "N", count])
            for name in output_names
        ],
        [
            constant("white", 255),
            constant("mean", contract.mean),
            constant("std", contract.std),
            constant("convolution", weights.convolution),
            constant("matrix", weights.matrix * logit_scale),
            constant("bias", weights.bias * logit_scale),
            constant("temperature", contract.temperature),
        ],
    )
    if typicality:
        graph.initializer.append(constant("typical", TYPICAL))
        graph.node.append(helper.make_node("ReduceSum", ["vector", "features_axis"], ["brightness"]))
        graph.node.append(helper.make_node("Sub", ["brightness", "typical"], ["difference"]))
        graph.node.append(helper.make_node("Mul", ["difference", "difference"], ["distance"]))
        graph.initializer.append(constant("one", 1))
        graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "features_axis"))
        graph.node.append(helper.make_node("Add", ["distance", "one"], ["divisor"]))
        graph.node.append(helper.make_node("Reciprocal", ["divisor"], [TYPICALITY]))
        graph.output.append(helper.make_tensor_value_info(TYPICALITY, kinds.FLOAT, ["N", 4]))
    if cam:
        graph.initializer.append(constant("cam.weight", (weights.matrix * logit_scale)[:, :, None, None]))
        graph.node.insert(6, helper.make_node("Conv", ["rectified", "cam.weight"], [CAM]))
        graph.output.append(helper.make_tensor_value_info(CAM, kinds.FLOAT, ["N", count, size - 2, size - 2]))
    opset = helper.make_opsetid("", 18)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=10, producer_name="echoquad-tests")
    text = contract.to_json() if carried is None else carried
    if text:
        digest = hashlib.sha256(text.encode()).hexdigest()
        helper.set_model_props(model, {CONTRACT_KEY: text, CONTRACT_HASH_KEY: digest})
    return bytes(model.SerializeToString(deterministic=True))


# ---------------------------------------------------------------------------------------------- a tiny bundle


def tiny_golden(contract: Contract, *, typicality: bool = False) -> GoldenFrames:
    """Make golden frames and answer them in numpy, with `tiny_typicality` if wanted."""
    frames = {f"phantom-{i}": draw_frame(i, *size) for i, size in enumerate([(60, 80), (61, 79), (97, 33), (48, 48)])}
    frames |= {
        "ramp": (np.add.outer(np.arange(50), np.arange(71)) * 2).astype(np.uint8),
        "smallest": np.array([[0, 255], [128, 64]], np.uint8),
    }
    weights = tiny_weights(len(contract.classes))
    answers = [tiny_answers(frame_quadrants(frame, contract), contract, weights) for frame in frames.values()]
    return GoldenFrames(
        names=tuple(frames),
        frames=tuple(frames.values()),
        logits=np.stack([logits for logits, _ in answers]).astype(np.float32),
        probabilities=np.stack([probabilities for _, probabilities in answers]).astype(np.float32),
        typicality=np.stack(
            [tiny_typicality(frame_quadrants(frame, contract), contract).diagonal() for frame in frames.values()]
        ).astype(np.float32)
        if typicality
        else None,
    )


class MakeTinyBundle(Protocol):
    """See `build_tiny_bundle`."""

    def __call__(self, folder: Path, **changes: Any) -> Path: ...


def build_tiny_bundle(
    folder: Path,
    *,
    contract: Contract = TINY_CONTRACT,
    precisions: Sequence[str] = ("fp32",),
    graphs: Mapping[str, bytes] | None = None,
    graph: Mapping[str, Any] | None = None,
    golden: GoldenFrames | bytes | None = None,
    manifest: Mapping[str, Any] | None = None,
    without: Sequence[str] = (),
    **fields: Any,
) -> Path:
    """Write a whole, consistent bundle into `folder` and give the folder back.

    Parameters
    ----------
    contract
        Another contract. Its fields can be named alone: ``classes=("A", "B", "C"), vote="average"``.
    precisions
        Graphs to hold: the same float32 graph under each name, the first the default.
    graphs
        Bytes that take the place of a precision's graph; their hash is right.
    graph
        Options of `tiny_graph`: ``{"input_name": "x"}``, ``{"carried": ""}``, ``{"logit_scale": float("nan")}``.
    golden
        Other golden frames, or the bytes of the golden file.
    manifest
        Fields of ``bundle.json`` to put in place of the right ones; the manifest's own hash is right.
    without
        Fields of ``bundle.json`` to leave out.
    """
    contract = replace(contract, positive="", **fields) if fields else contract
    files: dict[str, bytes] = {}
    for name in precisions:
        given = (graphs or {}).get(name)
        files[model_file(name)] = tiny_graph(contract, **(graph or {})) if given is None else given
    golden = tiny_golden(contract) if golden is None else golden
    files[GOLDEN] = golden if isinstance(golden, bytes) else encode_golden(golden)
    files[MODEL_CARD] = b"# A tiny bundle, made by the tests\n\nResearch use only.\n"
    batches = [
        {
            "batch_size": size,
            "max_abs_dlogit": 0.0,
            "max_abs_dprobability": 0.0,
            "patch_flips": 0,
            "frame_flips": 0,
            "smallest_margin_at_flip": None,
        }
        for size in (1, 2)
    ]
    content = {
        "schema": SCHEMA,
        "created": "2026-01-01T00:00:00+00:00",
        "contract": contract.to_dict(),
        "contract_sha256": contract.sha256,
        "files": {
            name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in files.items()
        },
        "precisions": {name: {"opset": 18, "ir_version": 10} for name in precisions},
        "default_precision": precisions[0],
        "parity": {
            name: {"device": "cpu", "frames": 0, "source": "none", "gate": GATE, "batches": batches}
            for name in precisions
        },
        "training": {"backbone": "tiny", "seed": 7},
        "versions": {},
        "intended_use": INTENDED_USE,
        **(manifest or {}),
    }
    files[MANIFEST] = encode_manifest({key: value for key, value in content.items() if key not in without})
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="session")
def make_tiny_bundle() -> MakeTinyBundle:
    """Return `build_tiny_bundle(folder, **changes)`, which builds a bundle with changed or faulty parts."""
    return build_tiny_bundle


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a valid fp32 bundle with classes ASD and NORM and input size 32. Shared: tests must not change it."""
    return build_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture
def token_file(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Write the `TOKEN` of the test's module to a file that only its owner can read, and return its path."""
    path = tmp_path / "token"
    path.write_text(f"{request.module.TOKEN}\n")
    path.chmod(0o600)
    return path


@pytest.fixture(scope="session")
def make_tiny_graph() -> Callable[..., bytes]:
    """Return `tiny_graph(contract, **options)`, which returns the bytes of the bundle's network."""
    return tiny_graph


@dataclass(frozen=True)
class Scored:
    """A tiny bundle with the typicality score, and what it should answer on `draw_frame`'s frames.

    The median frame of `frames` has a typicality of `threshold`, the bundle's threshold; `quadrants` and `scores` are
    those of the frames, uint8 [F, 4, 1, 32, 32] and float [F, 4], and `golden` the bundle's golden frames.
    """

    bundle: Path
    frames: list[Grey]
    quadrants: np.ndarray
    scores: np.ndarray
    threshold: float
    golden: GoldenFrames
    manifest: dict[str, Any]


@pytest.fixture
def scored(tmp_path: Path) -> Scored:
    """Return a tiny bundle whose graph, golden frames and manifest have the typicality score."""
    frames = [draw_frame(seed) for seed in range(10)]
    quadrants = np.stack([frame_quadrants(frame, TINY_CONTRACT) for frame in frames])
    scores = np.stack([tiny_typicality(four, TINY_CONTRACT).diagonal() for four in quadrants])
    threshold = float(np.median(1 / (1 / scores).mean(axis=1)))
    manifest = {
        "typicality": {"thresholds": {"fp32": {"95": 2 * threshold, "99": threshold}}},
        "parity": {"fp32": {"gate": {**GATE, "max_rel_dtypicality": 1e-3}}},
    }
    golden = tiny_golden(TINY_CONTRACT, typicality=True)
    folder = build_tiny_bundle(
        tmp_path / "scored", graph={"typicality": True, "cam": True}, golden=golden, manifest=manifest
    )
    return Scored(folder, frames, quadrants, scores, threshold, golden, manifest)
