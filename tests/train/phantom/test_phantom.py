"""Phantom frames and data sets: determinism, geometry, absence of shortcut features, and errors."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from echoquad_runtime.errors import ConfigError, OutputError
from echoquad_train.phantom import dataset as phantom_data
from echoquad_train.phantom import drawing as phantom
from echoquad_train.phantom.dataset import write_dataset
from echoquad_train.phantom.drawing import (
    LABELS,
    Anatomy,
    draw_patient,
    echo_level,
    phantom_frame,
    render,
)

HEART = {"lv", "rv", "la", "ra", "bow", "gap", "label"}  # all that a label may change


def rng(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(list(key)))


def tree(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*.png"))}


def auc(score: NDArray[np.float64], ill: NDArray[np.bool_]) -> float:
    a, b = score[ill][:, None], score[~ill][None, :]
    return float(np.mean(a > b) + 0.5 * np.mean(a == b))


# Determinism


def test_seed_determines_the_frame() -> None:
    first = phantom_frame(11, "ASD")
    np.random.seed(5)
    assert np.array_equal(first, phantom_frame(11, "ASD"))
    assert not np.array_equal(first, phantom_frame(12, "ASD", (first.shape[0], first.shape[1])))


def test_speckle_depends_on_the_generator_and_not_on_the_patient() -> None:
    patient = draw_patient(rng(1), "NORM")
    assert np.array_equal(render(patient, rng(2), 0.3), render(patient, rng(2), 0.3))
    assert not np.array_equal(render(patient, rng(2), 0.3), render(patient, rng(3), 0.3))


def test_patient_does_not_depend_on_the_number_of_patients(tmp_path: Path) -> None:
    write_dataset(tmp_path / "few", patients=6, frames_per_patient=1, seed=4)
    write_dataset(tmp_path / "more", patients=8, frames_per_patient=2, seed=4)
    few = {name.rsplit("/", 1)[1]: data for name, data in tree(tmp_path / "few").items()}
    more = {name.rsplit("/", 1)[1]: data for name, data in tree(tmp_path / "more").items()}
    assert few.items() <= more.items()


# Frames


@pytest.mark.parametrize("size", [(300, 350), (201, 333), (419, 203), (32, 32), (64, 257)])
@pytest.mark.parametrize("label", LABELS)
def test_frame_has_the_requested_size(size: tuple[int, int], label: str) -> None:
    frame = phantom_frame(3, label, size)
    assert frame.shape == size
    assert frame.dtype == np.uint8
    assert frame.max() > 100


def test_frames_have_the_range_and_the_sector_of_an_echo() -> None:
    for seed in range(8):
        patient = replace(draw_patient(rng(seed), LABELS[seed % 2]), overlay=False)
        frame = render(patient, rng(seed, 1), 0.0)
        assert frame.flags.c_contiguous and min(frame.shape) >= 195 and max(frame.shape) <= 425
        lit = frame > 0
        assert 0.3 < lit.mean() < 0.75
        assert lit[: frame.shape[0] // 2].sum() > 2 * lit[frame.shape[0] // 2 :].sum()  # the sector opens upwards
        assert not lit[0, 0] and not lit[-1, 0] and not lit[-1, -1]
        assert frame[lit].std() > 20  # speckle and dark chambers


def test_overlay_changes_only_the_border() -> None:
    patient = replace(draw_patient(rng(1), "NORM"), overlay=False)
    bare, marked = render(patient, rng(2), 0.1), render(replace(patient, overlay=True), rng(2), 0.1)
    changed = bare != marked
    assert 20 < changed.sum() < 0.05 * bare.size
    height, width = bare.shape
    assert not changed[height // 4 : -height // 4, width // 8 : -width // 8].any()


def test_frame_renders_within_80_ms() -> None:
    patient = replace(draw_patient(rng(1), "ASD"), height=300, width=350)
    render(patient, rng(2), 0.1)
    times = []
    for _ in range(5):
        start = time.process_time()
        render(patient, rng(2), 0.1)
        times.append(time.process_time() - start)
    assert min(times) < 0.08  # about 13 ms on one slow core; the limit allows for slower machines


# Geometry


def plane(n: int = 110) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    side = np.linspace(-0.5, 0.5, n, dtype=np.float32)
    v, u = np.meshgrid(side, side, indexing="ij")
    return u, v


def pools(patient: Anatomy, phase: float) -> dict[str, int]:
    """Return the area of blood in each chamber, in cells of the plane."""
    u, v = plane()
    blood = echo_level(patient, phase, u, v) < phantom.BLOOD_DB + 3
    return {
        "LA": int(blood[(u < -0.02) & (v > 0.02)].sum()),
        "RA": int(blood[(u > 0.02) & (v > 0.02)].sum()),
        "LV": int(blood[(u < -0.02) & (v < -0.02)].sum()),
        "RV": int(blood[(u > 0.02) & (v < -0.02)].sum()),
    }


def septum(patient: Anatomy) -> NDArray[np.float32]:
    """Return the level along the interatrial septum at end-diastole, away from the crux and the roof."""
    v = np.linspace(0.05, 0.19, 80, dtype=np.float32)
    return echo_level(patient, 0.0, np.zeros_like(v), v)


def test_asd_has_a_gap_in_the_septum() -> None:
    ill = [septum(draw_patient(rng(seed), "ASD")) for seed in range(40)]
    well = [septum(draw_patient(rng(seed), "NORM")) for seed in range(40)]
    assert all(line.min() < phantom.BLOOD_DB + 0.5 for line in ill)
    assert np.mean(ill) < np.mean(well) - 3.0
    assert auc(np.array([-line.mean() for line in ill + well]), np.arange(80) < 40) > 0.75


def test_closed_gap_shows_an_intact_septum() -> None:
    patient = replace(draw_patient(rng(7), "ASD"), dropout=0.0)
    assert septum(replace(patient, gap=0.0)).min() > phantom.WALL_DB - 5.0
    assert septum(patient).min() < phantom.BLOOD_DB + 0.5


def test_some_normal_septa_drop_out_without_a_gap() -> None:
    lowest = np.array([septum(draw_patient(rng(seed), "NORM")).min() for seed in range(60)])
    assert 0.15 < (lowest < phantom.WALL_DB - 10.0).mean() < 0.7
    assert (lowest > phantom.WALL_DB - 5.0).mean() > 0.2


def test_right_heart_is_larger_in_asd_with_overlap() -> None:
    def ratio(seed: int, label: str) -> float:
        area = pools(draw_patient(rng(seed), label), 0.0)
        return (area["RA"] + area["RV"]) / (area["LA"] + area["LV"])

    ill = np.array([ratio(seed, "ASD") for seed in range(30)])
    well = np.array([ratio(seed, "NORM") for seed in range(100, 130)])
    assert np.median(ill) > 1.25 * np.median(well)
    assert ill.min() < well.max()


def test_cardiac_cycle_moves_chambers_and_valves() -> None:
    patient = draw_patient(rng(5), "NORM")
    diastole, systole = pools(patient, 0.0), pools(patient, 0.4)
    assert systole["LV"] < 0.9 * diastole["LV"] and systole["RV"] < 0.9 * diastole["RV"]
    assert systole["LA"] > 1.05 * diastole["LA"] and systole["RA"] > 1.05 * diastole["RA"]

    u, v = plane()
    for sign in (-1.0, 1.0):  # the middle of each valve: leaflets meet there when shut, blood flows when open
        mouth = (np.abs(u - sign * 0.1) < 0.02) & (v > -0.08) & (v < 0.01)
        shut = echo_level(patient, 0.0, u, v)[mouth].max()
        wide = echo_level(patient, 0.57, u, v)[mouth].max()
        assert shut > phantom.VALVE_DB - 3.0
        assert wide < shut - 6.0


# Shortcut features


def test_label_changes_the_heart_and_not_the_scanner() -> None:
    for seed in range(20):
        ill, well = asdict(draw_patient(rng(seed), "ASD")), asdict(draw_patient(rng(seed), "NORM"))
        assert {f.name for f in fields(Anatomy) if ill[f.name] != well[f.name]} == HEART
        assert well["gap"] == 0.0 < ill["gap"]


@pytest.fixture(scope="module")
def sample() -> tuple[list[NDArray[np.uint8]], NDArray[np.bool_]]:
    """120 patients, one frame of each, no seed shared between the labels."""
    ill = np.arange(120) % 2 == 0
    return [phantom_frame(seed, LABELS[seed % 2]) for seed in range(120)], ill


@pytest.mark.parametrize("name", ["height", "width", "area", "aspect", "mean", "lit", "overlay"])
def test_simple_features_do_not_predict_the_label(
    name: str, sample: tuple[list[NDArray[np.uint8]], NDArray[np.bool_]]
) -> None:
    frames, ill = sample
    scores: dict[str, Callable[[NDArray[np.uint8]], float]] = {
        "height": lambda f: f.shape[0],
        "width": lambda f: f.shape[1],
        "area": lambda f: f.size,
        "aspect": lambda f: f.shape[1] / f.shape[0],
        "mean": lambda f: float(f.mean()),
        "lit": lambda f: float((f > 0).mean()),
        "overlay": lambda f: float((f[:, :5] > 0).mean() + (f[:, -5:] > 0).mean()),
    }
    assert 0.35 < auc(np.array([scores[name](f) for f in frames], dtype=np.float64), ill) < 0.65


def test_right_atrium_predicts_the_label_better_than_left_ventricle(
    sample: tuple[list[NDArray[np.uint8]], NDArray[np.bool_]],
) -> None:
    frames, ill = sample
    half = len(frames) // 2

    def accuracy(right: bool, lower: bool) -> float:
        """Ridge classifier on 16 x 16 pixels of a quadrant, fitted on one half of the patients, both ways."""
        rows = []
        for f in frames:
            h, w = f.shape
            part = f[h // 2 :] if lower else f[: h // 2]
            part = part[:, w // 2 :] if right else part[:, : w // 2]
            small = np.asarray(Image.fromarray(part).resize((16, 16), Image.Resampling.BILINEAR), dtype=np.float64)
            rows.append((small.ravel() - small.mean()) / small.std())
        x, y = np.array(rows), np.where(ill, 1.0, -1.0)
        hits = 0
        for fit, held in ((slice(0, half), slice(half, None)), (slice(half, None), slice(0, half))):
            middle = x[fit].mean(axis=0)
            known = x[fit] - middle
            weights = known.T @ np.linalg.solve(known @ known.T + 100.0 * np.eye(len(known)), y[fit])
            hits += int(np.sum(((x[held] - middle) @ weights > 0) == ill[held]))
        return hits / len(frames)

    ra, lv = accuracy(right=True, lower=False), accuracy(right=False, lower=True)
    assert 0.7 < ra < 0.99
    assert lv < ra - 0.1


# Dataset


def test_write_dataset_splits_by_patient_and_counts_frames(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    out = tmp_path / "new" / "data"
    counts = write_dataset(
        out,
        patients=21,
        frames_per_patient=2,
        seed=1,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(k, 42) for k in range(1, 43)]
    assert not (out.parent / "data.partial").exists()
    series: dict[str, set[str]] = {}
    found: dict[str, dict[str, int]] = {}
    for path in out.rglob("*"):
        if path.is_dir():
            continue
        split, label, name = path.relative_to(out).parts
        match = re.fullmatch(r"(ASD|NORM)(\d+)-(\d+)\.png", name)
        assert match is not None and match[1] == label and int(match[3]) in (0, 1)
        series.setdefault(match[1] + match[2], set()).add(split)
        found.setdefault(split, {}).setdefault(label, 0)
        found[split][label] += 1
        with Image.open(path) as image:
            assert image.mode == "L"
    assert found == counts
    assert all(len(splits) == 1 for splits in series.values())
    assert set(series) == {f"ASD{k}" for k in range(1, 11)} | {f"NORM{k}" for k in range(1, 12)}
    assert counts["train"] == {"ASD": 14, "NORM": 16}
    assert sum(counts["validation"].values()) + sum(counts["test"].values()) == 12


def test_seed_determines_the_data_set(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_dataset(tmp_path / name, patients=6, frames_per_patient=1, seed=seed)
    assert tree(tmp_path / "a") == tree(tmp_path / "b") != tree(tmp_path / "c")


@pytest.mark.parametrize("split", [(0.7, 0.15, 0.15), (0.98, 0.01, 0.01), (0.34, 0.33, 0.33)])
def test_split_sizes_add_up_and_are_not_empty(split: tuple[float, float, float]) -> None:
    for total in range(3, 60):
        shares = phantom_data._shares(total, split)
        assert sum(shares) == total and min(shares) >= 1
        assert abs(shares[0] - split[0] * total) < 3


def test_write_dataset_accepts_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    assert write_dataset(tmp_path / "data", patients=6, frames_per_patient=1)["test"] == {"ASD": 1, "NORM": 1}


# Errors


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"patients": 5}, "patients is 5, expected 6 or more"),
        ({"frames_per_patient": 0}, "frames per patient is 0"),
        ({"split": (0.7, 0.2, 0.2)}, "sum 1"),
        ({"split": (1.0, 0.0, 0.0)}, "above 0"),
        ({"split": (float("nan"), 0.5, 0.5)}, "above 0"),
        ({"split": (0.5, 0.5)}, "three shares"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_numbers_out_of_range_raise_config_error(tmp_path: Path, options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        write_dataset(tmp_path / "data", **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_invalid_label_size_seed_or_phase_raise_config_error() -> None:
    with pytest.raises(ConfigError, match="label is 'VSD'"):
        phantom_frame(0, "VSD")
    with pytest.raises(ConfigError, match="frame is 31 x 300"):
        phantom_frame(0, size=(31, 300))
    with pytest.raises(ConfigError, match="seed is -3"):
        phantom_frame(-3)
    for phase in (-0.1, 1.0, float("nan")):
        with pytest.raises(ConfigError, match="phase is"):
            render(draw_patient(rng(0), "NORM"), rng(1), phase)


def test_existing_target_raises_output_error_and_is_kept(tmp_path: Path) -> None:
    full, file, busy = tmp_path / "full", tmp_path / "file", tmp_path / "busy.partial"
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    file.write_text("keep")
    busy.mkdir()
    (busy / "half.png").write_text("keep")
    with pytest.raises(OutputError, match="full"):
        write_dataset(full)
    with pytest.raises(OutputError, match="is a file, expected"):
        write_dataset(file)
    with pytest.raises(OutputError, match=r"busy\.partial exists"):
        write_dataset(tmp_path / "busy")
    assert (full / "mine.txt").exists() and (busy / "half.png").exists() and file.read_text() == "keep"
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_interrupted_write_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def stop(done: int, _: int) -> None:
        if done == 3:
            assert (tmp_path / "data.partial").is_dir() and not (tmp_path / "data").exists()
            raise error

    with pytest.raises(error):
        write_dataset(tmp_path / "data", patients=6, frames_per_patient=1, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_disk_error_raises_output_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OutputError, match=r"cannot be written \(.*No space left"):
        write_dataset(tmp_path / "data", patients=6, frames_per_patient=1)
    assert list(tmp_path.iterdir()) == []


def test_file_as_parent_raises_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        write_dataset(tmp_path / "file" / "data")


def test_all_names_exist() -> None:
    for module in (phantom, phantom_data):
        assert all(hasattr(module, name) for name in module.__all__)
