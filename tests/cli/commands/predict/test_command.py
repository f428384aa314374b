"""``echoquad predict``: inputs, rows, vote methods, precisions, overlays and failed frames."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

HEADER = (
    "file,method,pred_image,prob_ASD,prob_NORM,pred_LA,p_LA_ASD,p_LA_NORM,pred_RA,p_RA_ASD,p_RA_NORM,"
    "pred_LV,p_LV_ASD,p_LV_NORM,pred_RV,p_RV_ASD,p_RV_NORM,flags,device,precision,typicality"
)
NAMES = ["a/0.png", "a/1.jpg", "a/2.bmp", "b/3.tif", "b/4.PNG", "b/5.png"]
BAD = ["a/cut.png", "a/text.png", "b/cut.jpg", "b/empty.jpg", "b/small.png"]
BAD_CODES = ["E_FRAME_DAMAGED", "E_FRAME_FORMAT", "E_FRAME_DAMAGED", "E_FRAME_DAMAGED", "E_FRAME_TOO_SMALL"]


def table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_predict_prints_a_row_for_each_frame_of_a_folder(
    tiny_bundle: Path, frames_folder: Path, echoquad: Callable[..., Any]
) -> None:
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


def test_stdout_has_the_bytes_of_the_result_file(
    tiny_bundle: Path, frames_folder: Path, echoquad: Callable[..., Any], tmp_path: Path
) -> None:
    with (tmp_path / "piped.csv").open("wb") as stream:
        echoquad("predict", tiny_bundle, frames_folder, "--out", tmp_path / "named.csv", "--batch-size", "1")
        echoquad("predict", tiny_bundle, frames_folder, "--batch-size", "4", stdout=stream)
    data = (tmp_path / "piped.csv").read_bytes()
    assert data == (tmp_path / "named.csv").read_bytes()
    assert b"\r" not in data


def test_inputs_are_files_folders_and_patterns(
    tiny_bundle: Path, frames_folder: Path, many: Callable[..., Any]
) -> None:
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


def test_jsonl_rows_equal_csv_rows(
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
                assert (";".join(value) if isinstance(value, list) else value or "") == row[key]


def test_frames_unlike_the_training_frames_are_counted_and_undecided_on_request(
    scored: Any, tiny_bundle: Path, many: Callable[..., Any], tmp_path: Path
) -> None:
    folder, out = tmp_path / "frames", tmp_path / "rows.csv"
    folder.mkdir()
    for index, frame in enumerate(scored.frames):
        Image.fromarray(frame).save(folder / f"{index}.png")
    predict = ["predict", scored.bundle, folder, "--device", "cpu"]
    (plain, abstaining, other, without), _ = many(
        [
            predict,
            [*predict, "--abstain-unlike", "--out", out],
            [*predict, "--out", out, "--resume"],
            ["predict", tiny_bundle, folder, "--abstain-unlike"],
        ]
    )
    rows, undecided = table(plain.out), table(out.read_text("utf-8"))
    assert sum("unlike-training" in row["flags"] for row in rows) == 5
    assert (plain.code, abstaining.code) == (0, 0)
    assert "5 unlike the training frames" in plain.err and "INDETERMINATE" not in plain.err
    assert "5 INDETERMINATE" in abstaining.err
    for before, row in zip(rows, undecided, strict=True):
        unlike = float(before["typicality"]) < scored.threshold
        assert row == {**before, "pred_image": "INDETERMINATE" if unlike else before["pred_image"]}
    assert json.loads((tmp_path / "rows.csv.run.json").read_text("utf-8"))["abstain_unlike"] == "yes"
    assert (other.code, other.error[0]) == (1, "E_RESULT")
    assert (without.code, without.error[0]) == (1, "E_CONFIG")


def test_method_changes_only_the_decision(tiny_bundle: Path, frames_folder: Path, many: Callable[..., Any]) -> None:
    methods = ("majority", "average", "weighted")
    found, _ = many([["predict", tiny_bundle, frames_folder, "--method", name] for name in methods])
    results = {name: table(ran.out) for name, ran in zip(methods, found, strict=True)}
    for name, rows in results.items():
        assert {row["method"] for row in rows} == {name}
        for row, other in zip(rows, results["majority"], strict=True):
            assert {k: v for k, v in row.items() if k.startswith("p")} | {"pred_image": ""} == {
                k: v for k, v in other.items() if k.startswith("p")
            } | {"pred_image": ""}
    for row in results["average"]:
        assert row["pred_image"] == ("ASD" if float(row["prob_ASD"]) > float(row["prob_NORM"]) else "NORM")
    votes = [(row["pred_image"], [row[f"pred_{q}"] for q in ("LA", "RA", "LV", "RV")]) for row in results["majority"]]
    assert all(quadrants.count(label) >= 2 for label, quadrants in votes)


def test_precisions_and_classes_are_those_of_the_bundle(
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
    assert "int8" in int8.errors[0] and "fp16, fp32" in int8.errors[0]
    assert {"prob_PFO", "p_RV_PFO"} <= table(classes.out)[0].keys()
    assert {row["method"] for row in table(classes.out)} == {"average"}


def test_cam_colours_the_overlays(
    make_tiny_bundle: Callable[..., Path], frames_folder: Path, echoquad: Callable[..., Any], tmp_path: Path
) -> None:
    bundle = make_tiny_bundle(tmp_path / "bundle", graph={"cam": True})
    plain, coloured = tmp_path / "plain", tmp_path / "coloured"
    first = echoquad("predict", bundle, frames_folder, "--overlay", plain)
    second = echoquad("predict", bundle, frames_folder, "--overlay", coloured, "--cam")
    assert first.out == second.out
    for name in NAMES:
        pictures = [np.asarray(Image.open(folder / f"{name}.overlay.png")).astype(int) for folder in (plain, coloured)]
        assert pictures[0].shape == pictures[1].shape
        below = [picture[picture.shape[0] // 2 :] for picture in pictures]
        saturation = [float((part.max(axis=2) - part.min(axis=2)).mean()) for part in below]
        assert saturation[1] > saturation[0] + 5


def test_cam_of_a_bundle_without_activation_maps_is_refused(
    tiny_bundle: Path, frames_folder: Path, echoquad: Callable[..., Any], tmp_path: Path
) -> None:
    ran = echoquad("predict", tiny_bundle, frames_folder, "--overlay", tmp_path / "o", "--cam", code=1)
    assert "class activation maps" in ran.errors[0] and not (tmp_path / "o").exists()


def test_overlay_draws_a_picture_for_each_frame(
    tiny_bundle: Path, frames_folder: Path, echoquad: Callable[..., Any], tmp_path: Path
) -> None:
    pictures = tmp_path / "pictures"
    ran = echoquad("predict", tiny_bundle, frames_folder, "--overlay", pictures)
    assert len(table(ran.out)) == 6
    found = sorted(path.relative_to(pictures).as_posix() for path in pictures.rglob("*.*"))
    assert found == sorted(f"{name}.overlay.png" for name in NAMES)
    with Image.open(pictures / "a" / "0.png.overlay.png") as picture:
        assert picture.mode == "RGB"
        assert min(picture.size) >= 400
    assert f"overlays in {pictures.as_posix()}/" in ran.err


@pytest.mark.parametrize("batch_size", ["1", "3", "64"])
def test_predict_skips_unreadable_frames_and_exits_5(
    batch_size: str, tiny_bundle: Path, mixed: Path, echoquad: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "out.csv"
    options = ["--out", out, "--batch-size", batch_size]
    ran = echoquad("predict", tiny_bundle, mixed, mixed / "gone.png", *options, code=5)
    assert [row["file"] for row in table(out.read_text("utf-8"))] == NAMES
    assert ran.error_codes == [*BAD_CODES, "E_INPUT_NOT_FOUND"]
    assert [error.split(": ")[0] for error in ran.errors] == [*BAD, (mixed / "gone.png").as_posix()]
    assert "6 frames: " in ran.err


def test_predict_without_a_readable_frame_exits_1_and_writes_nothing(
    tiny_bundle: Path, mixed: Path, many: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "out.csv"
    out.write_text("rows of an older run\n")
    (tmp_path / "empty").mkdir()
    lines = [
        ([mixed / name for name in BAD], BAD_CODES),
        ([mixed / "a" / "cut.png"], BAD_CODES[:1]),
        ([tmp_path / "empty"], ["E_INPUT_NOT_FOUND"]),
        ([tmp_path / "missing"], ["E_INPUT_NOT_FOUND"]),
        ([mixed / "*.gif"], ["E_INPUT_NOT_FOUND"]),
    ]
    found, _ = many([["predict", tiny_bundle, *inputs, "--out", out] for inputs, _ in lines])
    for (inputs, codes), ran in zip(lines, found, strict=True):
        assert (ran.code, ran.out, sorted(ran.error_codes)) == (1, "", sorted(codes)), inputs
    assert ".bmp" in found[2].errors[0]
    assert "*.gif" in found[4].errors[0]
    assert out.read_text() == "rows of an older run\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "frames", "out.csv"]


def test_missing_bundle_exits_1(frames_folder: Path, many: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found, _ = many(
        [["predict", model, frames_folder] for model in (tmp_path / "none", tmp_path / "file", frames_folder)]
    )
    for ran in found:
        assert (ran.code, ran.out, ran.error_codes) == (1, "", ["E_BUNDLE_NOT_FOUND"])
        assert "bundle.json" in ran.errors[0]


def test_altered_bundle_exits_3_and_writes_no_row(
    bundle_copy: Path, echoquad: Callable[..., Any], frames_folder: Path, tmp_path: Path
) -> None:
    model = bundle_copy / "model.fp32.onnx"
    data = bytearray(model.read_bytes())
    data[-1] ^= 1
    model.write_bytes(data)
    ran = echoquad("predict", bundle_copy, frames_folder, "--out", tmp_path / "out.csv", code=3)
    assert ran.error[0] == "E_BUNDLE_TAMPERED" and "model.fp32.onnx" in ran.errors[0]
    assert not (tmp_path / "out.csv").exists()


def test_bundle_that_fails_its_self_test_exits_3_and_writes_no_row(
    tmp_path: Path, make_tiny_bundle: Callable[..., Path], frames_folder: Path, echoquad: Callable[..., Any]
) -> None:
    bundle, out = make_tiny_bundle(tmp_path / "bundle", graph={"logit_scale": 1.01}), tmp_path / "out.csv"
    for options in ([], ["--out", out], ["--out", out, "--workers", "2"]):
        ran = echoquad("predict", bundle, frames_folder, "--device", "cpu", *options, code=3)
        code, message = ran.error
        assert code == "E_VERIFICATION"
        assert "self-test" in message and "on cpu in fp32" in message and "echoquad verify" in message
        assert len(ran.out.splitlines()) <= 1  # a header at most
        assert [path.name for path in tmp_path.glob("out.csv*")] == []
    assert echoquad("bench", bundle, "--frames", "2", "--device", "cpu", code=3).out == ""
    echoquad("verify", bundle, "--device", "cpu", code=3)


def test_predict_and_bench_leave_the_input_folder_unchanged(
    tiny_bundle: Path, frames_folder: Path, many: Callable[..., Any], tmp_path: Path
) -> None:
    before = Path(shutil.copytree(frames_folder, tmp_path / "before"))

    def contents(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    many([["predict", tiny_bundle, frames_folder], ["bench", tiny_bundle, frames_folder, "--frames", "2"]])
    assert contents(frames_folder) == contents(before)
