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

from echoquad_runtime.frames.reader import read_grey

pytest.importorskip("torch")


@pytest.fixture
def leaky(data_copy: Path) -> Path:
    """Return phantoms with one frame in two splits and one truncated frame."""
    frame = next((data_copy / "train" / "NORM").iterdir())
    shutil.copy(frame, data_copy / "test" / "NORM" / "NORM90-0.png")
    whole = next((data_copy / "train" / "ASD").iterdir())
    whole.write_bytes(whole.read_bytes()[:-400])
    return data_copy


def test_audit_finds_leaks_and_strict_exits_1(
    data: Path, leaky: Path, warm: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "audit"
    sound, found, strict, by_letter = warm(
        [
            ["data", "audit", data, "--strict"],
            ["data", "audit", leaky, "--out", out],
            ["data", "audit", leaky, "--strict"],
            ["data", "audit", leaky, "--patient-regex", "(.)"],
        ]
    )
    assert (sound.code, found.code, strict.code, by_letter.code) == (0, 0, 1, 0)
    assert "unreadable files: none\npatients in more than one split: none\nexact duplicates: none\n" in sound.out
    assert "LEAK" not in sound.out and "\nshortcuts: none\n" in sound.out
    assert "unreadable files: 1\n" in found.out
    assert "exact duplicates: 1\n  LEAK test/NORM/NORM90-0.png = train/NORM/" in found.out
    assert "(same file, of different patients)" in found.out
    assert f"wrote {out.as_posix()}/audit.json, {out.as_posix()}/contact-sheet.png" in found.err
    assert "train/ASD/" in found.err  # the unreadable file
    record = json.loads((out / "audit.json").read_text("utf-8"))
    assert record["leak"] is True and len(record["unreadable"]) == 1
    assert (out / "contact-sheet.png").stat().st_size > 10_000
    assert strict.error[0] == "E_DATASET" and "1 exact duplicate" in strict.errors[0]
    assert strict.out == found.out
    assert "patients in more than one split: 2\n  LEAK A: test, train, validation\n" in by_letter.out


def test_split_links_files_or_writes_a_manifest(
    data: Path, warm: Callable[..., Any], tmp_path: Path, left_in: Callable[..., Any]
) -> None:
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
    patients, wrote = listed.err.splitlines()
    assert patients.startswith("patients: 6, 2 frames each") and wrote == f"wrote {tmp_path.as_posix()}/list/split.csv"
    assert left_in(tmp_path) == []


def test_split_skips_unreadable_frames_and_keeps_duplicates_together(
    leaky: Path, warm: Callable[..., Any], tmp_path: Path
) -> None:
    (ran,) = warm([["data", "split", leaky, "--out", tmp_path / "new"]])
    assert (ran.code, ran.error_codes) == (5, ["E_FRAME_DAMAGED"]) and ran.errors[0].startswith("train/ASD/")
    assert "kept together, because they share a picture: NORM" in ran.err


def test_patches_equal_the_frames_when_stitched(
    data: Path, leaky: Path, warm: Callable[..., Any], tmp_path: Path
) -> None:
    whole, cut = warm(
        [
            ["data", "patches", data, "--out", tmp_path / "a"],
            ["data", "patches", leaky, "--out", tmp_path / "b", "--keep", "1"],
        ]
    )
    assert whole.code == 0
    assert whole.out.splitlines()[-1].startswith("stitched back: all 12 frames ")
    assert len(list((tmp_path / "a").glob("*/*/*_L[AV].png"))) == 24
    assert (tmp_path / "a" / "patch_mapping.csv").is_file()
    assert (cut.code, cut.error_codes) == (5, ["E_FRAME_DAMAGED"]) and cut.errors[0].startswith("train/ASD/")
    assert "all 12 frames" in cut.out  # one frame more, one unreadable


@pytest.fixture
def upside_down(leaky: Path, tmp_path: Path) -> Path:
    """Return the leaky phantoms as numpy files, flipped vertically; the truncated one is not an array."""
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


def test_matrices_are_read_with_the_given_flip(
    leaky: Path, upside_down: Path, warm: Callable[..., Any], tmp_path: Path
) -> None:
    flipped = ["--matrices", "--flip", "vertical"]
    bare, audited, split, cut, plain = warm(
        [
            ["data", "audit", upside_down],
            ["data", "audit", upside_down, *flipped, "--out", tmp_path / "audit"],
            ["data", "split", upside_down, "--matrices", "--out", tmp_path / "new"],
            ["data", "patches", upside_down, *flipped, "--out", tmp_path / "flipped"],
            ["data", "patches", leaky, "--out", tmp_path / "plain"],
        ]
    )
    assert (bare.code, bare.error[0]) == (1, "E_DATASET") and "--matrices" in bare.errors[0]
    assert audited.code == 0 and "unreadable files: 1\n" in audited.out and "(same file" in audited.out
    found = json.loads((tmp_path / "audit" / "audit.json").read_text("utf-8"))
    assert found["reading"] == {"matrices": True, "flip": "vertical", "every": 1}
    assert list(found["classes"]["NORM"]["kinds"]) == ["npy"]
    assert split.code == 5 and len(list((tmp_path / "new").glob("*/*/*.npy"))) == 12
    assert (cut.code, plain.code) == (5, 5) and cut.out == plain.out
    patches = sorted(path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain").rglob("*.png"))
    assert len(patches) == 48
    for path in patches:
        assert np.array_equal(read_grey(tmp_path / "flipped" / path), read_grey(tmp_path / "plain" / path)), path


def test_invalid_data_commands_are_refused_without_torch(data: Path, many: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    new = ["--out", tmp_path / "new"]
    refusals = [
        ("E_DATASET", ["data", "audit", tmp_path / "none"], "none: no such folder"),
        ("E_DATASET", ["data", "audit", tmp_path / "full"], "train, validation, test"),
        ("E_CONFIG", ["data", "audit", data, "--patient-regex", "("], "--patient-regex '('"),
        ("E_CONFIG", ["data", "split", data, *new, "--fractions", "70-30"], "70-30"),
        ("E_DATASET", ["data", "split", tmp_path / "full", *new], "full"),
        ("E_OUTPUT", ["data", "split", data, "--out", tmp_path / "full"], "new or empty folder"),
        ("E_USAGE", ["data", "split", data, *new, "--mode", "move"], "'copy', 'link', 'manifest'"),
        ("E_DATASET", ["data", "patches", tmp_path / "full", *new], "train, validation, test"),
        ("E_USAGE", ["data", "patches", data, *new, "--keep", "2"], "'--keep'"),
        ("E_CONFIG", ["data", "patches", data, *new, "--quadrant-layout", "LA,RA"], "apex-up"),
    ]
    found, modules = many([line for _, line, _ in refusals])
    for (code, line, words), ran in zip(refusals, found, strict=True):
        exit_code = 2 if code == "E_USAGE" else 1
        assert (ran.code, ran.out, len(ran.err.splitlines()), ran.error_codes) == (exit_code, "", 1, [code]), line
        assert words in ran.errors[0], (line, ran)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
    assert "torch" not in modules
