"""``echoquad predict``: which frames, which rows, where they go, and what becomes of bad ones."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

HEADER = (
    "file,method,pred_image,prob_ASD,prob_NORM,pred_LA,p_LA_ASD,p_LA_NORM,pred_RA,p_RA_ASD,p_RA_NORM,"
    "pred_LV,p_LV_ASD,p_LV_NORM,pred_RV,p_RV_ASD,p_RV_NORM,flags,device,precision"
)
NAMES = ["a/0.png", "a/1.jpg", "a/2.bmp", "b/3.tif", "b/4.PNG", "b/5.png"]


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_a_folder_to_stdout(tiny_bundle: Path, frames_folder: Path, echoquad: Callable[..., Any]) -> None:
    ran = echoquad("predict", tiny_bundle, frames_folder, "--device", "cpu")
    lines = ran.out.splitlines()
    assert lines[0] == HEADER
    assert [line.split(",")[0] for line in lines[1:]] == NAMES
    for row in table(ran.out):
        assert (row["method"], row["device"], row["precision"]) == ("majority", "cpu", "fp32")
        assert row["pred_image"] in ("ASD", "NORM")
        assert float(row["prob_ASD"]) + float(row["prob_NORM"]) == pytest.approx(1, abs=1.01e-4)
    decided = [row["pred_image"] for row in table(ran.out)]
    assert ran.err.splitlines()[0] == "on cpu in fp32"
    counts = f"6 frames: {decided.count('ASD')} ASD, {decided.count('NORM')} NORM; "
    assert ran.err.splitlines()[1].startswith(counts)
    assert len(ran.err.splitlines()) == 2


def test_stdout_is_bytes_that_no_system_changes(
    tiny_bundle: Path, frames_folder: Path, echoquad: Callable[..., Any], tmp_path: Path
) -> None:
    with (tmp_path / "piped.csv").open("wb") as stream:
        echoquad("predict", tiny_bundle, frames_folder, "--out", tmp_path / "named.csv", "--batch-size", "1")
        echoquad("predict", tiny_bundle, frames_folder, "--batch-size", "4", stdout=stream)
    data = (tmp_path / "piped.csv").read_bytes()
    assert data == (tmp_path / "named.csv").read_bytes()
    assert b"\r" not in data


def test_every_way_to_name_frames(tiny_bundle: Path, frames_folder: Path, many: Callable[..., Any]) -> None:
    lines = {
        (frames_folder / "a" / "0.png",): ["0.png"],
        (frames_folder / "b" / "5.png", frames_folder / "a" / "0.png"): ["b/5.png", "a/0.png"],
        (frames_folder / "a", frames_folder / "b"): NAMES,
        (f"{frames_folder}{os.sep}**{os.sep}*.png",): ["a/0.png", "b/5.png"],
        (f"{frames_folder}/a/[01].*",): ["0.png", "1.jpg"],
        (f"{frames_folder}/?",): NAMES,
    }
    found, modules = many([["predict", tiny_bundle, *inputs] for inputs in lines])
    for (inputs, names), ran in zip(lines.items(), found, strict=True):
        assert ran.code == 0
        assert [row["file"] for row in table(ran.out)] == names, inputs
    heavy = {"torch", "torchvision", "onnx", "sklearn", "scipy", "matplotlib", "safetensors"}
    assert heavy & modules == set(), "a cart has none of these"


def test_relative_names_have_forward_slashes(
    tiny_bundle: Path, frames_folder: Path, echoquad: Callable[..., Any]
) -> None:
    given = str(Path("frames") / "a")
    ran = echoquad("predict", tiny_bundle, given, "frames", cwd=frames_folder.parent)
    assert [row["file"] for row in table(ran.out)] == ["a/0.png", "a/1.jpg", "a/2.bmp", *NAMES]


def test_jsonl_says_the_same_as_csv(
    tiny_bundle: Path, frames_folder: Path, many: Callable[..., Any], tmp_path: Path
) -> None:
    outs = [tmp_path / name for name in ("out.csv", "out.jsonl", "UPPER.CSV")]
    found, _ = many([["predict", tiny_bundle, frames_folder, "--out", out] for out in outs])
    for ran, out in zip(found, outs, strict=True):
        assert (ran.code, ran.out) == (0, "")
        assert f"; wrote {out.as_posix()}" in ran.err
    assert outs[2].read_bytes() == outs[0].read_bytes()
    rows = table(outs[0].read_text("utf-8"))
    objects = [json.loads(line) for line in outs[1].read_text("utf-8").splitlines()]
    assert len(objects) == len(rows) == 6
    for row, found in zip(rows, objects, strict=True):
        assert list(found) == HEADER.split(",")
        for key, value in found.items():
            if isinstance(value, float):
                assert f"{value:.4f}" == row[key]
            else:
                assert (";".join(value) if isinstance(value, list) else value) == row[key]


def test_methods(tiny_bundle: Path, frames_folder: Path, many: Callable[..., Any]) -> None:
    methods = ("majority", "average", "weighted")
    found, _ = many([["predict", tiny_bundle, frames_folder, "--method", name] for name in methods])
    results = {name: table(ran.out) for name, ran in zip(methods, found, strict=True)}
    for name, rows in results.items():
        assert {row["method"] for row in rows} == {name}
        # The method changes the decision alone: what the quadrants say, and their mean, are the frame's own.
        for row, other in zip(rows, results["majority"], strict=True):
            assert {k: v for k, v in row.items() if k.startswith("p")} | {"pred_image": ""} == {
                k: v for k, v in other.items() if k.startswith("p")
            } | {"pred_image": ""}
    for row in results["average"]:
        assert row["pred_image"] == ("ASD" if float(row["prob_ASD"]) > float(row["prob_NORM"]) else "NORM")
    votes = [(row["pred_image"], [row[f"pred_{q}"] for q in ("LA", "RA", "LV", "RV")]) for row in results["majority"]]
    assert all(quadrants.count(label) >= 2 for label, quadrants in votes)


def test_precisions_and_classes_are_the_bundles_own(
    make_tiny_bundle: Callable[..., Path], frames_folder: Path, many: Callable[..., Any], tmp_path: Path
) -> None:
    both = make_tiny_bundle(tmp_path / "both", precisions=("fp32", "fp16"))
    three = make_tiny_bundle(tmp_path / "three", classes=("ASD", "NORM", "PFO"), vote="average")
    (default, fp16, int8, classes), _ = many(
        [
            ["predict", both, frames_folder],
            ["predict", both, frames_folder, "--precision", "fp16"],
            ["predict", both, frames_folder, "--precision", "int8"],
            ["predict", three, frames_folder],
        ]
    )
    assert {row["precision"] for row in table(default.out)} == {"fp32"}
    assert {row["precision"] for row in table(fp16.out)} == {"fp16"}
    assert (int8.code, int8.out) == (1, "")
    assert "it holds no int8 graph, only fp16, fp32" in int8.errors[0]
    assert {"prob_PFO", "p_RV_PFO"} <= table(classes.out)[0].keys()
    assert {row["method"] for row in table(classes.out)} == {"average"}


def test_overlays(tiny_bundle: Path, frames_folder: Path, echoquad: Callable[..., Any], tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    ran = echoquad("predict", tiny_bundle, frames_folder, "--overlay", pictures)
    assert len(table(ran.out)) == 6
    found = sorted(path.relative_to(pictures).as_posix() for path in pictures.rglob("*.*"))
    assert found == sorted(f"{name}.overlay.png" for name in NAMES)
    with Image.open(pictures / "a" / "0.png.overlay.png") as picture:
        assert picture.mode == "RGB"
        assert min(picture.size) >= 400
    assert f"overlays in {pictures.as_posix()}/" in ran.err


@pytest.fixture
def mixed(frames_folder: Path) -> Path:
    """Give the six good frames with five bad ones among them."""
    whole = (frames_folder / "a" / "0.png").read_bytes()
    (frames_folder / "a" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (frames_folder / "a" / "text.png").write_text("id,label\n1,ASD\n")
    (frames_folder / "b" / "empty.jpg").write_bytes(b"")
    jpeg = (frames_folder / "a" / "1.jpg").read_bytes()
    (frames_folder / "b" / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    Image.fromarray(np.zeros((1, 1), np.uint8)).save(frames_folder / "b" / "small.png")
    return frames_folder


BAD = ["a/cut.png", "a/text.png", "b/cut.jpg", "b/empty.jpg", "b/small.png"]


@pytest.mark.parametrize("batch_size", ["1", "3", "64"])
def test_bad_frames_among_good_ones(
    batch_size: str, tiny_bundle: Path, mixed: Path, echoquad: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "out.csv"
    options = ["--out", out, "--batch-size", batch_size]
    ran = echoquad("predict", tiny_bundle, mixed, mixed / "gone.png", *options, code=5)
    assert [row["file"] for row in table(out.read_text("utf-8"))] == NAMES
    assert ran.errors[0] == f"{(mixed / 'gone.png').as_posix()}: no such file or folder; check the path"
    assert [error.split(": ")[0] for error in ran.errors[1:]] == BAD
    assert "6 frames: " in ran.err


def test_nothing_but_bad_frames(tiny_bundle: Path, mixed: Path, many: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    out.write_text("what an older run has found\n")
    (tmp_path / "empty").mkdir()
    lines = [
        ([mixed / name for name in BAD], len(BAD)),
        ([mixed / "a" / "cut.png"], 1),
        ([tmp_path / "empty"], 1),
        ([tmp_path / "missing"], 1),
        ([mixed / "*.gif"], 1),
    ]
    found, _ = many([["predict", tiny_bundle, *inputs, "--out", out] for inputs, _ in lines])
    for (inputs, count), ran in zip(lines, found, strict=True):
        assert (ran.code, ran.out, len(ran.errors)) == (1, "", count), inputs
    assert "the folder holds no image; expected .bmp" in found[2].errors[0]
    assert "no file matches the pattern" in found[4].errors[0]
    assert out.read_text() == "what an older run has found\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "frames", "out.csv"]


def test_no_bundle(frames_folder: Path, many: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (missing, file, folder), _ = many(
        [["predict", model, frames_folder] for model in (tmp_path / "none", tmp_path / "file", frames_folder)]
    )
    for ran in (missing, file, folder):
        assert (ran.code, ran.out) == (1, "")
        assert "bundle.json" in ran.errors[0]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are text")
def test_a_name_that_is_no_text(
    tiny_bundle: Path, make_frame: Any, echoquad: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    for name in (b"\xff.png", "é,\u2603.png".encode(), b'"quoted".png'):
        Image.fromarray(make_frame(1)).save(folder / os.fsdecode(name))
    (folder / os.fsdecode(b"\xfe.png")).touch()
    ran = echoquad("predict", tiny_bundle, folder, code=5)
    assert sorted(row["file"] for row in table(ran.out)) == ['"quoted".png', "\\udcff.png", "é,☃.png"]
    assert ran.errors[0].startswith("\\udcfe.png: ")
