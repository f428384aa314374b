"""A frame's pixels get the decision that its file gets at ``POST /api/v1/predict``."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from real_server import Served

from echoquad_runtime.contract import QUADRANTS
from echoquad_serve.config import HttpConfig
from echoquad_serve.http.limits import Limits
from echoquad_serve.service import BedsideService

triton = pytest.importorskip("tritonclient.http")

FRAMES = "ECHOQUAD_REAL_FRAMES"
"""A folder with real frames as PNG, in any depth."""

BUNDLE = "ECHOQUAD_REAL_BUNDLE"
"""A bundle for them."""


def from_file(served: Served, png: bytes) -> dict[str, Any]:
    answer = httpx.post(
        f"http://{served.address}/api/v1/predict", content=png, headers={"Content-Type": "image/png"}, timeout=60
    )
    assert answer.status_code == 200, answer.text
    (row,) = answer.json()["rows"]
    return row


def from_pixels(served: Served, frames: np.ndarray) -> list[dict[str, Any]]:
    """Return rows of the outputs for several frames of one size."""
    tensor = triton.InferInput("frames", list(frames.shape), "UINT8")
    tensor.set_data_from_numpy(frames)
    with triton.InferenceServerClient(served.address, connection_timeout=60, network_timeout=60) as client:
        result = client.infer("echoquad", [tensor])
    values = {output["name"]: result.as_numpy(output["name"]) for output in result.get_response()["outputs"]}
    return [{name: array[index] for name, array in values.items()} for index in range(len(frames))]


def check(found: dict[str, Any], row: dict[str, Any]) -> None:
    classes = [name.removeprefix("prob_") for name in row if name.startswith("prob_")]
    assert found["label"].decode() == row["pred_image"]
    assert found["predicted_class"].decode() == row["predicted_class"]
    assert bool(found["abstained"]) == (row["pred_image"] == "INDETERMINATE")
    assert [label.decode() for label in found["quadrant_labels"]] == [row[f"pred_{name}"] for name in QUADRANTS]
    assert found["flags"].decode().split(";") == (row["flags"] or [""])
    # Equal to the last bit of float32: the same pixels, the same slots.
    assert found["probabilities"].tolist() == [np.float32(row[f"prob_{name}"]) for name in classes]
    rows = [[np.float32(row[f"p_{quadrant}_{name}"]) for name in classes] for quadrant in QUADRANTS]
    assert found["quadrant_probabilities"].tolist() == rows
    assert found["confidence"] == pytest.approx(row["confidence"], abs=1e-6)
    if row["typicality"] is not None:
        assert found["typicality"] == pytest.approx(row["typicality"], rel=1e-6)


def to_png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def pictures(make_frame: Callable[..., np.ndarray]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    grey, odd = make_frame(1), make_frame(2, 61, 83)
    coloured = rng.integers(0, 256, (70, 90, 3), dtype=np.uint8)
    return {
        "grey": grey,
        "odd sides": odd,
        "grey as RGB": np.repeat(grey[..., None], 3, axis=2),
        "coloured": coloured,
        "a little colour": np.stack([grey, grey // 2, grey // 3], axis=2),
        "blank": np.zeros((40, 50), np.uint8),
        "saturated": np.full((40, 50), 255, np.uint8),
        "dark": make_frame(3) // 128,  # levels 0 and 1 are grey levels, not fractions of white
        "smallest": np.array([[0, 255], [128, 7]], np.uint8),
        "tall": make_frame(4, 400, 20),
        "with a toolbar": np.pad(make_frame(5, 110, 140), ((14, 0), (0, 0)), constant_values=200),
    }


PICTURES = (
    "grey",
    "odd sides",
    "grey as RGB",
    "coloured",
    "a little colour",
    "blank",
    "saturated",
    "dark",
    "smallest",
    "tall",
    "with a toolbar",
)


@pytest.mark.parametrize("name", PICTURES)
def test_pixels_of_a_png_get_its_row(roomy: Served, make_frame: Callable[..., np.ndarray], name: str) -> None:
    levels = pictures(make_frame)[name]
    row = from_file(roomy, to_png(Image.fromarray(levels)))
    (found,) = from_pixels(roomy, levels[None])
    check(found, row)
    if levels.ndim == 2:
        (with_channel,) = from_pixels(roomy, levels[None, :, :, None])
        check(with_channel, row)


def test_every_picture_is_tried(make_frame: Callable[..., np.ndarray]) -> None:
    assert tuple(pictures(make_frame)) == PICTURES


@pytest.mark.parametrize("layout", [("RV", "LV", "RA", "LA"), ("LA", "RA", "LV", "RV")])
def test_layout_vote_and_threshold_apply(
    tmp_path: Path,
    make_tiny_bundle: Callable[..., Path],
    make_frame: Callable[..., np.ndarray],
    open_service: Callable[..., BedsideService],
    run_server: Callable[..., Served],
    layout: Sequence[str],
) -> None:
    """The contract's layout, vote and crop, and the configuration's threshold, are those of files."""
    bundle = make_tiny_bundle(tmp_path / "other", quadrants=tuple(layout), vote="weighted", keep=0.7)
    service = open_service(bundle, tmp_path / "store", abstain_below=0.6)
    served = run_server(service, Limits(), HttpConfig())
    frames = np.stack([make_frame(seed) for seed in range(12)])
    rows = [from_file(served, to_png(Image.fromarray(frame))) for frame in frames]
    labels = {row["pred_image"] for row in rows}
    assert "INDETERMINATE" in labels and len(labels) > 1, "the frames must show a class and INDETERMINATE"
    for frame, row in zip(frames, rows, strict=True):
        check(from_pixels(served, frame[None])[0], row)


def test_typicality_is_an_output_of_bundles_that_have_it(
    scored: Any,
    tmp_path: Path,
    make_frame: Callable[..., np.ndarray],
    open_service: Callable[..., BedsideService],
    run_server: Callable[..., Served],
) -> None:
    served = run_server(open_service(scored.bundle, tmp_path / "store", abstain_unlike=True), Limits(), HttpConfig())
    with triton.InferenceServerClient(served.address) as client:
        names = [output["name"] for output in client.get_model_metadata("echoquad")["outputs"]]
    assert "typicality" in names
    flagged = 0
    for seed in range(6):
        frame = make_frame(seed)
        row = from_file(served, to_png(Image.fromarray(frame)))
        (found,) = from_pixels(served, frame[None])
        assert found["typicality"] > 0
        check(found, row)
        flagged += "unlike-training" in row["flags"]
    assert flagged


def test_many_frames_get_the_decisions_of_each(roomy: Served, make_frame: Callable[..., np.ndarray]) -> None:
    """Another batch size rounds in another order: the decisions agree, the last bits need not."""
    frames = np.stack([make_frame(seed) for seed in range(64)])
    for found, frame in zip(from_pixels(roomy, frames), frames, strict=True):
        (alone,) = from_pixels(roomy, frame[None])
        assert found["label"] == alone["label"]
        np.testing.assert_allclose(found["probabilities"], alone["probabilities"], atol=1e-5)


@pytest.mark.skipif(FRAMES not in os.environ or BUNDLE not in os.environ, reason=f"set {FRAMES} and {BUNDLE}")
def test_real_frames_get_the_row_of_their_file(
    tmp_path: Path, open_service: Callable[..., BedsideService], run_server: Callable[..., Served]
) -> None:
    served = run_server(open_service(Path(os.environ[BUNDLE]), tmp_path / "store"), Limits(), HttpConfig())
    paths = sorted(Path(os.environ[FRAMES]).rglob("*.png"))
    paths = paths[:: max(1, len(paths) // 100)]
    assert paths
    for path in paths:
        row = from_file(served, path.read_bytes())
        with Image.open(path) as image:
            check(from_pixels(served, np.asarray(image)[None])[0], row)
