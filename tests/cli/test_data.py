"""``echoquad data audit``, ``data split`` and ``data patches``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from echoquad_runtime.frames.reader import read_frame


@pytest.fixture
def leaky(data_copy: Path) -> Path:
    """Give phantoms with a frame in two splits and one that is cut."""
    frame = next((data_copy / "train" / "NORM").iterdir())
    shutil.copy(frame, data_copy / "test" / "NORM" / "NORM90-0.png")
    whole = next((data_copy / "train" / "ASD").iterdir())
    whole.write_bytes(whole.read_bytes()[:-400])
    return data_copy


def test_audit(data: Path, leaky: Path, warm: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "audit"
    sound, found, strict, sure = warm(
        [
            ["data", "audit", data, "--strict"],
            ["data", "audit", leaky, "--out", out],
            ["data", "audit", leaky, "--strict"],
            ["data", "audit", leaky, "--patient-regex", "(.)"],
        ]
    )
    assert (sound.code, found.code, strict.code, sure.code) == (0, 0, 1, 0)
    assert "unreadable files: none\npatients in more than one split: none\nexact duplicates: none\n" in sound.out
    assert "LEAK" not in sound.out and "\nshortcuts: none\n" in sound.out
    assert "unreadable files: 1\n" in found.out
    assert "exact duplicates: 1\n  LEAK test/NORM/NORM90-0.png = train/NORM/" in found.out
    assert "(same file, of different patients)" in found.out
    assert f"wrote {out.as_posix()}/audit.json, {out.as_posix()}/contact-sheet.png" in found.err
    assert "train/ASD/" in found.err, "the unreadable file is named"
    record = json.loads((out / "audit.json").read_text("utf-8"))
    assert record["leak"] is True and len(record["unreadable"]) == 1
    assert (out / "contact-sheet.png").stat().st_size > 10_000
    assert len(strict.errors) == 1 and "1 exact duplicate" in strict.errors[0]
    assert strict.out == found.out, "strict says no less"
    assert "patients in more than one split: 2\n  LEAK A: test, train, validation\n" in sure.out


def test_split(data: Path, warm: Callable[..., Any], tmp_path: Path, left_in: Callable[..., Any]) -> None:
    linked, listed = warm(
        [
            ["data", "split", data, "--out", tmp_path / "new", "--mode", "link", "--fractions", "34-33-33"],
            ["data", "split", data, "--out", tmp_path / "list", "--mode", "manifest", "--seed", "3"],
        ]
    )
    assert (linked.code, listed.code) == (0, 0)
    assert linked.out.splitlines()[2].split() == ["train/ASD", "2", "1"]
    assert len(list((tmp_path / "new").glob("*/*/*.png"))) == 12
    assert [path.name for path in (tmp_path / "list").iterdir()] == ["split.csv"]
    assert listed.err == f"wrote {(tmp_path / 'list').as_posix()}/split.csv\n"
    assert left_in(tmp_path) == []


def test_split_tells_what_it_leaves_out(leaky: Path, warm: Callable[..., Any], tmp_path: Path) -> None:
    (ran,) = warm([["data", "split", leaky, "--out", tmp_path / "new"]])
    assert ran.code == 5 and len(ran.errors) == 1 and ran.errors[0].startswith("train/ASD/")
    assert "kept together, since they share a picture: NORM" in ran.err


def test_patches(data: Path, leaky: Path, warm: Callable[..., Any], tmp_path: Path) -> None:
    whole, cut = warm(
        [
            ["data", "patches", data, "--out", tmp_path / "a"],
            ["data", "patches", leaky, "--out", tmp_path / "b", "--keep", "1"],
        ]
    )
    assert whole.code == 0
    assert whole.out.endswith("stitched back: all 12 frames as they were, pixel for pixel, after the crop\n")
    assert len(list((tmp_path / "a").glob("*/*/*_L[AV].png"))) == 24
    assert (tmp_path / "a" / "patch_mapping.csv").is_file()
    assert cut.code == 5 and cut.errors[0].startswith("train/ASD/")
    assert "all 12 frames" in cut.out  # one more, one less


@pytest.fixture
def upside_down(leaky: Path, tmp_path: Path) -> Path:
    """Give the leaky phantoms as numpy files that stand on their heads; the one that is cut is no array."""
    folder = tmp_path / "matrices"
    for path in leaky.rglob("*.png"):
        target = folder / path.relative_to(leaky).with_suffix(".npy")
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            try:
                np.save(target, np.asarray(image.convert("L"))[::-1])
            except OSError:
                target.write_bytes(b"cut")
    return folder


def test_matrices(leaky: Path, upside_down: Path, warm: Callable[..., Any], tmp_path: Path) -> None:
    turned = ["--matrices", "--flip", "vertical"]
    bare, audited, split, cut, plain = warm(
        [
            ["data", "audit", upside_down],
            ["data", "audit", upside_down, *turned, "--out", tmp_path / "audit"],
            ["data", "split", upside_down, "--matrices", "--out", tmp_path / "new"],
            ["data", "patches", upside_down, *turned, "--out", tmp_path / "turned"],
            ["data", "patches", leaky, "--out", tmp_path / "plain"],
        ]
    )
    assert (bare.code, len(bare.errors)) == (1, 1) and "--matrices" in bare.errors[0]
    assert audited.code == 0 and "unreadable files: 1\n" in audited.out and "(same file" in audited.out
    found = json.loads((tmp_path / "audit" / "audit.json").read_text("utf-8"))
    assert found["reading"] == {"matrices": True, "flip": "vertical", "every": 1}
    assert list(found["classes"]["NORM"]["kinds"]) == ["npy"]
    assert split.code == 5 and len(list((tmp_path / "new").glob("*/*/*.npy"))) == 12
    assert (cut.code, plain.code) == (5, 5) and cut.out == plain.out
    patches = sorted(path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain").rglob("*.png"))
    assert len(patches) == 48
    for path in patches:
        assert np.array_equal(read_frame(tmp_path / "turned" / path), read_frame(tmp_path / "plain" / path)), path


def test_refusals(data: Path, many: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    new = ["--out", tmp_path / "new"]
    refusals = [
        (1, ["data", "audit", tmp_path / "none"], "no such folder"),
        (1, ["data", "audit", tmp_path / "full"], "none of train, validation, test found"),
        (1, ["data", "audit", data, "--patient-regex", "("], "invalid regular expression"),
        (1, ["data", "split", data, *new, "--fractions", "70-30"], "expected three shares"),
        (1, ["data", "split", tmp_path / "full", *new], "no frame found"),
        (1, ["data", "split", data, "--out", tmp_path / "full"], "expected a new or empty folder"),
        (2, ["data", "split", data, *new, "--mode", "move"], "'copy', 'link', 'manifest'"),
        (1, ["data", "patches", tmp_path / "full", *new], "none of train, validation, test found"),
        (2, ["data", "patches", data, *new, "--keep", "2"], "'--keep'"),
        (1, ["train", data, *new, "--patient-regex", "("], "invalid regular expression"),
    ]
    found, modules = many([line for _, line, _ in refusals])
    for (code, line, words), ran in zip(refusals, found, strict=True):
        assert (ran.code, ran.out, len(ran.err.splitlines())) == (code, "", 1), (line, ran)
        assert words in ran.err, line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
    assert "torch" not in modules
