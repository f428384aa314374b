"""``echoquad predict``: which frames, which rows, where they go, and what becomes of bad ones."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from echoquad_runtime.storage.atomic import make_folder

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


def test_overlays_with_class_activation_maps(
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


def test_maps_that_cannot_be_are_refused_at_once(
    tiny_bundle: Path, frames_folder: Path, echoquad: Callable[..., Any], tmp_path: Path
) -> None:
    ran = echoquad("predict", tiny_bundle, frames_folder, "--cam", code=2)
    assert "--cam is given without --overlay DIR" in ran.err
    ran = echoquad("predict", tiny_bundle, frames_folder, "--overlay", tmp_path / "o", "--cam", code=1)
    assert "gives no class activation maps" in ran.err and not (tmp_path / "o").exists()
    ran = echoquad(
        "predict", tiny_bundle, frames_folder, "--overlay", tmp_path / "o", "--cam", "--engine", "ray", code=2
    )
    assert "--cam with --engine ray" in ran.err


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
    assert ran.errors[-1] == f"{(mixed / 'gone.png').as_posix()}: no such file or folder; check the path"
    assert [error.split(": ")[0] for error in ran.errors[:-1]] == BAD
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


# ---------------------------------------------------------------------------------------------- resumed


def tear(out: Path, kept: int) -> None:
    """Have a finished file look as its run left it behind row `kept`, in the middle of the next."""
    lines = out.read_bytes().splitlines(keepends=True)
    kept += out.suffix == ".csv"
    record = out.with_name(f"{out.name}.run.json")
    out.with_name(f"{out.name}.partial").write_bytes(b"".join(lines[:kept]) + lines[kept][:40])
    record.rename(out.with_name(f"{out.name}.partial.json"))
    out.unlink()


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_run_that_was_torn_is_gone_on_with(
    ending: str, tiny_bundle: Path, mixed: Path, many: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / f"out.{ending}"
    line = ["predict", tiny_bundle, mixed, "--out", out]
    ((whole,), _) = many([line])
    expected = out.read_bytes()
    tear(out, 4)
    found, _ = many([line, [*line, "--method", "average", "--resume"], [*line, "--resume"], [*line, "--resume"]])
    refused, other, resumed, again = found
    assert refused.code == 1
    assert refused.errors == [
        f"{out.as_posix()}.partial: the file holds rows of an interrupted run; continue with --resume, or delete it"
    ]
    assert (other.code, other.errors) == (
        1,
        [
            f"{out.as_posix()}.partial: its vote method is majority, this run's is average; use the same as before, or "
            "name another --out"
        ],
    )
    # The frames that failed before are tried again, so that list and exit code are those of the whole run.
    assert (resumed.code, resumed.errors) == (whole.code, whole.errors) == (5, whole.errors)
    assert "4 rows are there from before; 40 bytes behind them are torn, and dropped" in resumed.err
    assert resumed.err.splitlines()[-1].startswith("2 frames: ")
    assert resumed.err.splitlines()[-1].endswith(f"; 4 rows were there; wrote {out.as_posix()}")
    assert (again.code, again.errors) == (5, whole.errors)
    assert again.err.splitlines()[-1] == f"no new frame; 6 rows were there; left as it is: {out.as_posix()}"
    assert out.read_bytes() == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["frames", out.name, f"{out.name}.run.json"]


def test_an_archive_that_has_grown_gets_its_new_rows(
    tiny_bundle: Path, frames_folder: Path, many: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "out.csv"
    (frames_folder / "b").rename(tmp_path / "later")
    line = ["predict", tiny_bundle, frames_folder, "--out", out, "--resume"]
    many([line])
    assert [row["file"] for row in table(out.read_text())] == NAMES[:3]
    (tmp_path / "later").rename(frames_folder / "b")
    many([line])
    assert [row["file"] for row in table(out.read_text())] == NAMES


def test_an_archive_that_is_not_there_finishes_nothing(
    tiny_bundle: Path, frames_folder: Path, many: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "out.csv"
    line = ["predict", tiny_bundle, frames_folder, "--out", out, "--resume"]
    many([line])
    expected = out.read_bytes()
    tear(out, 2)
    frames_folder.rename(tmp_path / "unmounted")
    ((ran,), _) = many([line])
    assert (ran.code, len(ran.errors)) == (1, 1)
    assert not out.exists()
    (tmp_path / "unmounted").rename(frames_folder)
    many([line])
    assert out.read_bytes() == expected


def test_what_cannot_be_resumed_or_split_is_wrong_use(
    tiny_bundle: Path, frames_folder: Path, many: Callable[..., Any], tmp_path: Path
) -> None:
    lines = {
        ("--resume",): "--resume needs a result file; name it with --out",
        ("--shard", "3/2"): "--shard 3/2: expected i/n with i from 1 to n, such as 2/4",
        ("--shard", "half"): "--shard half: expected i/n",
    }
    if os.name == "posix":
        os.mkfifo(tmp_path / "pipe.csv")
        lines["--resume", "--out", str(tmp_path / "pipe.csv")] = "is not a regular file"
    found, _ = many([["predict", tiny_bundle, frames_folder, *options] for options in lines])
    for (options, words), ran in zip(lines.items(), found, strict=True):
        assert (ran.code, ran.out, len(ran.errors)) == (2, "", 1), options
        assert words in ran.errors[0]


# ---------------------------------------------------------------------------------------------- split and merged


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
@pytest.mark.parametrize("count", [2, 9])
def test_merged_shards_equal_the_single_run(
    ending: str, count: int, tiny_bundle: Path, mixed: Path, many: Callable[..., Any], tmp_path: Path
) -> None:
    single, merged = tmp_path / f"single.{ending}", tmp_path / f"merged.{ending}"
    shards = [tmp_path / f"part{index}.{ending}" for index in range(1, count + 1)]
    line = ["predict", tiny_bundle, mixed]
    lines: list[Any] = [[*line, "--out", single]]
    lines += [[*line, "--shard", f"{index}/{count}", "--out", out] for index, out in enumerate(shards, 1)]
    found, _ = many([*lines, ["merge", *shards, "--out", merged], ["merge", *shards[1:], "--out", tmp_path / "x.csv"]])
    assert merged.read_bytes() == single.read_bytes()
    whole, *parts, done, refused = found
    assert sorted(error for part in parts for error in part.errors) == sorted(whole.errors)
    assert {part.code for part in parts} <= {0, 1, 5}  # 1 where a shard has bad frames alone; its file is there
    assert done.err == f"6 rows of {count} shards; wrote {merged.as_posix()}\n"
    assert refused.code == (1 if ending == "csv" else 2)
    if count == 9:
        assert any("no frame of this shard; wrote" in part.err for part in parts)


def test_a_shard_on_stdout(tiny_bundle: Path, frames_folder: Path, many: Callable[..., Any]) -> None:
    found, _ = many([["predict", tiny_bundle, frames_folder, "--shard", f"{index}/3"] for index in (1, 2, 3)])
    assert sorted(row["file"] for ran in found for row in table(ran.out)) == NAMES


def test_a_merge_that_is_refused(many: Callable[..., Any], tmp_path: Path) -> None:
    ((absent, wrong, unnamed), _) = many(
        [
            ["merge", tmp_path / "absent.csv", "--out", tmp_path / "all.csv"],
            ["merge", tmp_path / "absent.csv", "--out", tmp_path / "all.jsonl"],
            ["merge", "--out", tmp_path / "all.csv"],
        ]
    )
    assert absent.code == 1
    assert "no such file; expected a result file of predict --shard" in absent.errors[0]
    assert wrong.code == 2
    assert unnamed.code == 2
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------- names


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


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere such names cannot be")
@pytest.mark.timeout(60)
def test_whatever_a_disk_holds(
    tiny_bundle: Path, make_frame: Any, many: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Names and kinds of files that an export may leave: a row or a line for each, and its picture."""
    folder = tmp_path / "frames"
    folder.mkdir()
    good = [
        "=1+1.png",
        "+1.png",
        "-1.png",
        "@a.png",
        "\ttab.png",
        "new\nline.png",
        "\r.png",
        '"quoted",.png',
        "a;=1.png",
    ]
    good += ["\x1b[31mred.png", "x" * 251 + ".png", "漢" * 83 + ".png", os.fsdecode(b"\xff\n.png")]
    for name in good:
        Image.fromarray(make_frame(1)).save(folder / name, "PNG")
    bad = ["\x1b[2Jclear\n.png", "pipe.png", "socket.png", "nowhere.png", "itself.png"]
    (folder / bad[0]).write_bytes(b"no image")
    os.mkfifo(folder / "pipe.png")
    monkeypatch.chdir(folder)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
    (folder / "nowhere.png").symlink_to("absent")
    (folder / "itself.png").symlink_to("itself.png")
    for name in ("loop", "again"):
        (folder / name).symlink_to(folder)
    pictures = tmp_path / "pictures"
    outs = [tmp_path / "out.csv", tmp_path / "out.jsonl"]
    line = ["predict", tiny_bundle, folder]
    found, _ = many([[*line, "--out", outs[0], "--overlay", pictures], [*line, "--out", outs[1]]])
    for ran in found:
        assert ran.code == 5
        assert len(ran.errors) == len(bad), ran.err
        assert all(text.isprintable() for text in ran.err.splitlines())
    rows = list(csv.DictReader(io.StringIO(outs[0].read_bytes().decode(), newline="")))
    lines = [json.loads(text) for text in outs[1].read_bytes().decode().split("\n")[:-1]]
    assert [(folder / name).exists() for name in (item["file"] for item in lines)] == [True] * len(good)
    assert {os.path.normpath(item["file"]) for item in lines} == set(good)
    assert [row["file"] for row in rows] == [
        item["file"].encode("utf-8", "backslashreplace").decode() for item in lines
    ]
    assert [row["file"] for row in rows if row["file"][:1] in {*"=+-@\t\r"}] == []
    assert len(list(pictures.iterdir())) == len(good)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a path is shorter")
@pytest.mark.parametrize("part", ["d" * 199, "d"], ids=["long", "deep"])
def test_paths_of_four_thousand_characters(
    part: str, tiny_bundle: Path, make_frame: Any, echoquad: Callable[..., Any], tmp_path: Path
) -> None:
    folder, pictures = tmp_path / "frames", tmp_path / "pictures"
    folders, rest = divmod(4060 - len(os.fspath(folder)) - len("/frame.png"), len(part) + 1)
    inside = f"{part}/" * folders + "x" * rest
    try:
        make_folder((folder / f"{inside}frame.png").parent)
        Image.fromarray(make_frame(1)).save(folder / f"{inside}frame.png")
        Image.fromarray(make_frame(1)).save(folder / "frame.png")
        ran = echoquad("predict", tiny_bundle, folder, "--overlay", pictures)
        assert sorted(row["file"] for row in table(ran.out)) == sorted([f"{inside}frame.png", "frame.png"])
        # The picture of the first cannot lie as deep as it does.
        flat, deep = sorted((path.name for path in pictures.iterdir()), key=len)
        assert re.fullmatch(r"x{0,40}[frame.png]*-[0-9a-f]{16}\.overlay\.png", deep)
        assert flat == "frame.png.overlay.png"
        ran = echoquad("predict", tiny_bundle, f"{folder}/**/*frame.png", folder / f"{inside}frame.png")
        assert len(table(ran.out)) == 3
    finally:  # Python's own way to remove them goes no deeper than its stack
        subprocess.run(["rm", "-rf", folder, pictures], check=True)


def test_a_bundle_that_fails_its_self_test_exits_3_and_writes_no_row(
    tmp_path: Path, make_tiny_bundle: Callable[..., Path], frames_folder: Path, echoquad: Callable[..., Any]
) -> None:
    bundle, out = make_tiny_bundle(tmp_path / "bundle", graph={"logit_scale": 1.01}), tmp_path / "out.csv"
    for options in ([], ["--out", out], ["--out", out, "--workers", "2"]):
        ran = echoquad("predict", bundle, frames_folder, "--device", "cpu", *options, code=3)
        (line,) = [line for line in ran.errors if "self-test" in line]
        assert "the self-test failed on cpu in fp32" in line and "no frame was judged; do: run echoquad verify" in line
        assert len(ran.out.splitlines()) <= 1  # a header at most
        assert [path.name for path in tmp_path.glob("out.csv*")] == []
    assert echoquad("bench", bundle, "--frames", "2", "--device", "cpu", code=3).out == ""
    verified = echoquad("verify", bundle, "--device", "cpu", code=3)
    assert "FAIL" in verified.out + verified.err
