"""The JavaScript client, installed and run as by a user: it prints the rows of ``echoquad predict``."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.manifest import MANIFEST, encode_manifest, model_file
from echoquad_runtime.contract import Contract
from echoquad_runtime.frames.reader import read_grey
from echoquad_runtime.quadrants import frame_quadrants

SOURCE = Path(__file__).parents[2] / "examples" / "javascript"
NO_NETWORK = ("ENOTFOUND", "EAI_AGAIN", "ECONNREFUSED", "ECONNRESET", "ENETUNREACH", "ETIMEDOUT", "ERR_SOCKET_TIMEOUT")
SECONDS = 180

MakeBundle = Callable[..., Path]


class Client:
    """The installed client."""

    def __init__(self, folder: Path, node: str) -> None:
        self.folder, self.node = folder, node

    def __call__(self, *arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run ``node predict.mjs ARGUMENTS``; check the exit code, and one line of error unless it is 0."""
        ended = self._run("predict.mjs", *map(str, arguments))
        assert ended.returncode == code, ended.stderr
        if code:
            assert ended.stdout == ""
            assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1
            assert "unexpected" not in ended.stderr
        else:
            assert ended.stderr == ""
        return ended

    def greys(self, paths: Sequence[Path]) -> list[np.ndarray]:
        """Return the grey levels that the client reads from PNG files, uint8 [H, W] each."""
        lines = (
            'import { readFileSync } from "node:fs"; import { readGrey } from "./png.mjs";'
            "for (const path of process.argv.slice(1)) { const { width, height, grey } = readGrey(readFileSync(path));"
            'console.log(JSON.stringify([height, width, Buffer.from(grey).toString("hex")])); }'
        )
        ended = self._run("--input-type=module", "-e", lines, *map(str, paths))
        assert ended.returncode == 0, ended.stderr
        found = [json.loads(line) for line in ended.stdout.splitlines()]
        return [np.frombuffer(bytes.fromhex(text), np.uint8).reshape(height, width) for height, width, text in found]

    def _run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.node, *words], check=False, cwd=self.folder, capture_output=True, encoding="utf-8", timeout=SECONDS
        )


@pytest.fixture(scope="session")
def client(tmp_path_factory: pytest.TempPathFactory) -> Client:
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node or npm is not installed")
    folder = tmp_path_factory.mktemp("javascript") / "client"
    shutil.copytree(SOURCE, folder, ignore=shutil.ignore_patterns("node_modules"))
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=0"]
    try:
        ended = subprocess.run(command, check=False, cwd=folder, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm ci took more than {SECONDS} s: the registry is unreachable or slow")
    if ended.returncode and any(word in ended.stderr for word in NO_NETWORK):
        pytest.skip("npm ci cannot reach the registry")
    assert ended.returncode == 0, ended.stderr
    return Client(folder, node)


def add_frame_graph(folder: Path) -> Path:
    """Add a frame graph to a tiny bundle, as ``export --frame-graph`` does."""
    build = pytest.importorskip("echoquad_export.graph.frame_graph").build_frame_graph
    manifest = json.loads((folder / MANIFEST).read_text())
    contract = Contract.from_dict(manifest["contract"])
    for precision in manifest["precisions"]:
        data = build((folder / model_file(precision)).read_bytes(), contract)
        name = f"frame.{precision}.onnx"
        (folder / name).write_bytes(data)
        manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (folder / MANIFEST).write_bytes(encode_manifest(manifest))
    return folder


@pytest.fixture(scope="module")
def bundle(make_tiny_bundle: MakeBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a frame graph. Shared: tests must not change it."""
    return add_frame_graph(make_tiny_bundle(tmp_path_factory.mktemp("js") / "bundle"))


@pytest.fixture
def frame(tmp_path: Path, make_frame: Callable[..., np.ndarray]) -> Path:
    path = tmp_path / "frame.png"
    Image.fromarray(make_frame(1)).save(path)
    return path


# PNG files

SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # samples per pixel, by colour type


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(colour: int, depth: int, size: tuple[int, int], seed: int, *others: tuple[bytes, bytes]) -> bytes:
    """Return noise as a PNG of any colour type and depth, which Pillow cannot write; `others` are extra chunks."""
    height, width = size
    rng = np.random.default_rng(seed)
    row = -(-width * SAMPLES[colour] * depth // 8)
    pixels = rng.integers(0, 256, (height, row)).astype(np.uint8)
    if colour in (2, 6) and depth == 8:
        pixels[:, : row // 2] |= 0xF0  # bright values, where rounding matters
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", head), *(chunk(*other) for other in others)]
    return b"\x89PNG\r\n\x1a\n" + b"".join([*parts, chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")])


def test_client_reads_each_png_type_as_predict(client: Client, tmp_path: Path) -> None:
    palette = (b"PLTE", np.random.default_rng(0).integers(0, 256, 768).astype(np.uint8).tobytes())
    few = (b"PLTE", palette[1][:12])
    alphas = (b"tRNS", np.random.default_rng(1).integers(0, 256, 256).astype(np.uint8).tobytes())
    size = (33, 47)
    files = {f"grey-{depth}": png(0, depth, size, depth) for depth in (1, 2, 4, 8, 16)}
    files |= {f"{name}-8": png(colour, 8, size, colour) for name, colour in (("rgb", 2), ("la", 4), ("rgba", 6))}
    files |= {f"{name}-16": png(colour, 16, size, colour) for name, colour in (("rgb", 2), ("la", 4), ("rgba", 6))}
    files |= {
        "palette-8": png(3, 8, size, 1, palette),
        "palette-8-alpha": png(3, 8, size, 2, palette, alphas),
        "palette-2": png(3, 2, size, 3, few),
        "palette-2-alpha": png(3, 2, size, 4, few, (b"tRNS", b"\x10\x90")),
        "grey-transparent": png(0, 8, size, 5, (b"tRNS", b"\0\x80")),
        "grey-16-transparent": png(0, 16, size, 5, (b"tRNS", b"\x12\x34")),
        "rgb-transparent": png(2, 8, size, 6, (b"tRNS", b"\0\xff\0\xff\0\xff")),
        "gamma": png(0, 8, size, 7, (b"gAMA", struct.pack(">I", 100_000)), (b"tEXt", b"Comment\0none")),
        "trailing-data": png(0, 8, size, 8) + b"appended by a camera",
    }
    # All pairs of level and alpha.
    pairs = np.stack(np.meshgrid(np.arange(256), np.arange(256)), axis=-1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.merge("LA", [Image.fromarray(part) for part in pairs.transpose(2, 0, 1)]).save(buffer, "PNG")
    files["la-all"] = buffer.getvalue()
    paths = []
    for name, data in files.items():
        paths.append(tmp_path / f"{name}.png")
        paths[-1].write_bytes(data)
    for path, found in zip(paths, client.greys(paths), strict=True):
        np.testing.assert_array_equal(found, read_grey(path), err_msg=path.name)


# Rows


def save_frames(folder: Path, make_frame: Callable[..., np.ndarray]) -> list[Path]:
    """Write frames as 8-bit grey of even and odd sizes, RGB, RGBA and 16-bit grey."""
    folder.mkdir()
    images = {
        f"grey-{i}": Image.fromarray(make_frame(i, *size)) for i, size in enumerate([(60, 80), (61, 79), (45, 97)])
    }
    one, two, three = (make_frame(seed, 62, 81) for seed in (3, 4, 5))
    images |= {
        "rgb": Image.fromarray(np.stack([one, two, three], axis=-1)),
        "rgba": Image.fromarray(np.stack([one, two, three, two], axis=-1)),
        "sixteen": Image.fromarray(one.astype(np.uint16) * 255 + two),
        "smallest": Image.fromarray(np.array([[0, 255], [128, 64]], np.uint8)),
        'with, "quotes"' if os.name == "posix" else "with, comma": Image.fromarray(three),
    }
    paths = [folder / f"{name}.png" for name in sorted(images)]
    for path in paths:
        images[path.stem].save(path)
    return paths


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


@pytest.mark.parametrize(
    ("contract", "count"),
    [
        ({}, 8),
        ({"classes": ("A, B", 'C "D"', "É"), "vote": "average", "input_size": 20}, 2),
        ({"vote": "weighted", "keep": 1.0}, 2),
    ],
    ids=["majority", "average", "weighted"],
)
def test_client_prints_the_rows_of_predict(
    client: Client,
    make_tiny_bundle: MakeBundle,
    make_frame: Callable[..., np.ndarray],
    tmp_path: Path,
    contract: dict[str, Any],
    count: int,
) -> None:
    bundle = add_frame_graph(make_tiny_bundle(tmp_path / "bundle", **contract))
    paths = save_frames(tmp_path / "frames", make_frame)
    command = [sys.executable, "-m", "echoquad", "predict", str(bundle), str(tmp_path / "frames"), "--device", "cpu"]
    ended = subprocess.run(command, check=True, capture_output=True, encoding="utf-8", timeout=SECONDS)
    header, expected = ended.stdout.splitlines()[0], rows(ended.stdout)
    assert [row["file"] for row in expected] == [path.name for path in paths]
    for path, row in [*zip(paths, expected, strict=True)][:count]:
        printed = client(bundle, path).stdout
        assert printed.splitlines()[0] == header
        (found,) = rows(printed)
        for name, value in row.items():
            if name.startswith(("prob_", "p_")):
                assert len(found[name]) == len(value) == 6
                assert abs(float(found[name]) - float(value)) < 1.5e-4  # one unit in the last place
            elif name == "flags":  # the client reports ties only
                assert found[name] == ("tie" if "tie" in value.split(";") else "")
            else:
                assert found[name] == value, name
    if count == len(paths):
        assert {"tie" in row["flags"] for row in expected} == {True, False}  # otherwise the flag is not tested


def test_client_scores_the_typicality_and_flags_frames_unlike_training(
    client: Client, scored: Any, tmp_path: Path
) -> None:
    bundle, path = add_frame_graph(scored.bundle), tmp_path / "frame.png"
    flags = set()
    for frame, typicality in zip(scored.frames[:4], 1 / (1 / scored.scores).mean(axis=1), strict=False):
        Image.fromarray(frame).save(path)
        (row,) = rows(client(bundle, path).stdout)
        assert abs(float(row["typicality"]) - typicality) < 1e-3
        assert ("unlike-training" in row["flags"]) == (typicality < scored.threshold)
        flags.add(row["flags"])
    assert len(flags) > 1


def test_client_prints_the_row_of_predict_for_an_int8_graph(
    client: Client,
    tiny_bundle: Path,
    make_tiny_bundle: MakeBundle,
    make_frame: Callable[..., np.ndarray],
    tmp_path: Path,
) -> None:
    from echoquad_export.precision.calibration_set import Ranges
    from echoquad_export.precision.quantize import activation_tensors, prepare, quantize

    contract = Bundle(tiny_bundle).contract
    model = prepare((tiny_bundle / model_file("fp32")).read_bytes(), contract)
    frames = np.stack([frame_quadrants(make_frame(seed), contract)[:, 0] for seed in range(4)])
    integers = quantize(model, Ranges(model, frames, activation_tensors(model)))
    assert b"QuantizeLinear" in integers
    gate = {"max_abs_dprobability": 0.05, "max_frame_flip_fraction": 0.01}
    parity = {"parity": {"int8": {"gate": gate}}}
    folder = make_tiny_bundle(tmp_path / "bundle", precisions=("int8",), graphs={"int8": integers}, manifest=parity)
    bundle = add_frame_graph(folder)
    path = tmp_path / "frame.png"
    Image.fromarray(make_frame(9)).save(path)
    command = [sys.executable, "-m", "echoquad", "predict", str(bundle), str(path), "--device", "cpu"]
    ended = subprocess.run(command, check=True, capture_output=True, encoding="utf-8", timeout=SECONDS)
    (expected,), (found,) = rows(ended.stdout), rows(client(bundle, path).stdout)
    assert found["precision"] == "int8"
    assert {name: value for name, value in found.items() if not name.startswith(("prob_", "p_"))} == {
        name: value for name, value in expected.items() if not name.startswith(("prob_", "p_"))
    }
    assert abs(float(found["prob_ASD"]) - float(expected["prob_ASD"])) < 1.5e-4


# Refusals


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_changed_bundle_exits_with_3(client: Client, bundle: Path, frame: Path, tmp_path: Path) -> None:
    for name in ("frame.fp32.onnx", MANIFEST):
        copy = Path(shutil.copytree(bundle, tmp_path / name))
        spoil(copy / name)
        assert name in client(copy, frame, code=3).stderr
    copy = Path(shutil.copytree(bundle, tmp_path / "blank"))
    text = (copy / MANIFEST).read_text()
    (copy / MANIFEST).write_text(text.replace('"keep": 0.9', '"keep": 0.8'))
    assert MANIFEST in client(copy, frame, code=3).stderr
    (copy / MANIFEST).write_text(text[:-40])
    assert "JSON" in client(copy, frame, code=3).stderr


def test_unusable_bundle_exits_with_1(
    client: Client, bundle: Path, frame: Path, tmp_path: Path, make_tiny_bundle: MakeBundle
) -> None:
    assert "ENOENT" in client(tmp_path, frame, code=1).stderr
    plain = make_tiny_bundle(tmp_path / "plain")
    assert "--frame-graph" in client(plain, frame, code=1).stderr
    newer = make_tiny_bundle(tmp_path / "newer", manifest={"schema": 2})
    assert "schema 2" in client(newer, frame, code=1).stderr
    lost = Path(shutil.copytree(bundle, tmp_path / "lost"))
    (lost / "frame.fp32.onnx").unlink()
    assert "frame.fp32.onnx cannot be read (ENOENT)" in client(lost, frame, code=1).stderr
    broken = add_frame_graph(make_tiny_bundle(tmp_path / "broken", graph={"logit_scale": float("nan")}))
    assert "not a number" in client(broken, frame, code=1).stderr


def test_unusable_frame_exits_with_1(client: Client, bundle: Path, frame: Path, tmp_path: Path) -> None:
    intact, bad = frame.read_bytes(), tmp_path / "bad.png"
    damaged = bytearray(intact)
    damaged[-20] ^= 1
    cases = {
        b"no image at all": "not a PNG",
        intact[:-20]: "truncated",
        bytes(damaged): "IDAT chunk",
        png(0, 8, (1, 9), 0): "the frame is 9x1 pixels; expected at least 2x2",
        png(0, 8, (9, 9), 0, (b"acTL", struct.pack(">II", 2, 0))): "animation",
        png(0, 8, (9, 9), 0, (b"eXIf", b"II*\0\x08\0\0\0\0\0")): "EXIF",
        png(0, 3, (9, 9), 0): "damaged or truncated",
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 7000, 7000, 8, 0, 0, 0, 0)): "7000x7000 pixels",
    }
    for data, message in cases.items():
        bad.write_bytes(data)
        stderr = client(bundle, bad, code=1).stderr
        assert stderr.startswith("error: bad.png: ") and message in stderr
    assert "missing.png: it cannot be read (ENOENT)" in client(bundle, tmp_path / "missing.png", code=1).stderr
    assert "expected two arguments" in client(bundle, code=2).stderr


def test_lock_file_names_no_registry() -> None:
    lock = json.loads((SOURCE / "package-lock.json").read_text())
    packages = [entry for name, entry in lock["packages"].items() if name]
    assert packages
    assert all(entry["integrity"].startswith("sha512-") and "resolved" not in entry for entry in packages)
