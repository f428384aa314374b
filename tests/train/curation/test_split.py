"""Splits by patient: no patient in two splits, sizes near the fractions, every class in every split."""

from __future__ import annotations

import csv
import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from echoquad_runtime.errors import ConfigError, DatasetError, OutputError
from echoquad_train.curation.audit import audit
from echoquad_train.curation.split import assign, parse_fractions, partition, write_partition
from echoquad_train.phantom.dataset import write_dataset

SHARES = (0.7, 0.15, 0.15)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms of 12 patients in SOURCE/CLASS. Shared: tests must not modify them."""
    folder = tmp_path_factory.mktemp("pool")
    write_dataset(folder / "data", patients=12, frames_per_patient=2, seed=2)
    for path in (folder / "data").glob("*/*/*.png"):
        target = folder / "pool" / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    return folder / "pool"


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.png")}


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=6, max_size=80),
    st.integers(0, 5),
    st.sampled_from([SHARES, (0.8, 0.1, 0.1), (0.8, 0.2, 0.0), (0.34, 0.33, 0.33)]),
)
def test_every_split_has_every_class_and_nearly_its_fraction(units, seed, shares) -> None:
    sizes = np.array([unit for unit in units if sum(unit)], np.int64).reshape(-1, 2)
    used = [index for index, share in enumerate(shares) if share > 0]
    assume(((sizes > 0).sum(axis=0) >= 3 * len(used)).all())
    chosen = assign(sizes, shares, ("a", "b"), seed)
    assert chosen.shape == (len(sizes),) and set(chosen.tolist()) <= set(used)
    for split in used:
        assert (sizes[chosen == split].sum(axis=0) > 0).all()
    # Units are not divided, and one may have been moved to a split that lacked a class.
    slack = 2 * sizes.sum(axis=1).max()
    for split, share in enumerate(shares):
        assert abs(sizes[chosen == split].sum() - share * sizes.sum()) <= slack
    assert (assign(sizes, shares, ("a", "b"), seed) == chosen).all()


def test_equal_patients_are_split_by_the_fractions_within_each_class() -> None:
    sizes = np.array([[1, 1]] * 100 + [[4, 0]] * 40 + [[0, 4]] * 40)
    chosen = assign(sizes, SHARES, ("a", "b"), 0)
    shares = np.stack([sizes[chosen == split].sum(axis=0) for split in range(3)]) / sizes.sum(axis=0)
    assert np.abs(shares - np.array(SHARES)[:, None]).max() < 0.02
    assert (assign(sizes, SHARES, ("a", "b"), 1) != chosen).any()


def test_class_with_fewer_patients_than_splits_is_refused() -> None:
    with pytest.raises(DatasetError, match=r"class b: .* 2 patients .* 3"):
        assign(np.array([[1, 1], [1, 1], [1, 0], [1, 0]]), SHARES, ("a", "b"), 0)
    assert sorted(assign(np.array([[1, 1], [1, 1], [1, 1]]), SHARES, ("a", "b"), 0)) == [0, 1, 2]


@pytest.mark.parametrize("text", ["70-15-15", "0.7,0.15,0.15", "70/15/15"])
def test_fractions_are_parsed(text: str) -> None:
    assert parse_fractions(text) == pytest.approx(SHARES)
    assert parse_fractions("80-20-0") == pytest.approx((0.8, 0.2, 0))


@pytest.mark.parametrize("text", ["", "70-30", "70-20-20", "100-0-0", "a-b-c", "-10-90-20", "0-50-50", "nan-1-1"])
def test_invalid_fractions_raise_config_error(text: str) -> None:
    with pytest.raises(ConfigError, match="--fractions"):
        parse_fractions(text)


def test_written_splits_have_no_leak_and_list_every_file(pool: Path, tmp_path: Path) -> None:
    parts = partition(pool, (0.5, 0.25, 0.25))
    assert write_partition(parts, tmp_path / "data") == 0
    assert {name.split("/", 1)[1] for name in files(tmp_path / "data")} == files(pool)
    found = audit(tmp_path / "data").leaks
    assert not found.found and sum(found.patients_by_split.values()) == 12
    rows = list(csv.DictReader((tmp_path / "data" / "split.csv").read_text("utf-8").splitlines()))
    assert len(rows) == 24 and set(rows[0]) == {"file", "class", "patient", "split"}
    for row in rows:
        copy = tmp_path / "data" / row["split"] / row["file"]
        assert copy.read_bytes() == (pool / row["file"]).read_bytes()
        assert row["class"] == row["file"].split("/")[0] and row["patient"] in row["file"]
    assert copy.stat().st_nlink == 1


def test_existing_splits_are_pooled_and_split_again(pool: Path, tmp_path: Path) -> None:
    write_partition(partition(pool), tmp_path / "once")
    again = partition(tmp_path / "once", seed=3)
    write_partition(again, tmp_path / "twice")
    assert {name.split("/", 1)[1] for name in files(tmp_path / "twice")} == files(pool)
    assert files(tmp_path / "twice") != files(tmp_path / "once")
    assert not audit(tmp_path / "twice").leaks.found


def test_link_mode_links_and_copies_across_disks(pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = partition(pool)
    assert write_partition(parts, tmp_path / "linked", "link") == 0
    one = next((tmp_path / "linked").rglob("*.png"))
    assert one.samefile(pool / one.parent.name / one.name)

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "another device")

    monkeypatch.setattr(os, "link", refuse)
    assert write_partition(parts, tmp_path / "copied", "link") == 24
    assert files(tmp_path / "copied") == files(tmp_path / "linked")


def test_manifest_mode_writes_split_csv_only(pool: Path, tmp_path: Path) -> None:
    write_partition(partition(pool), tmp_path / "out", "manifest")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["split.csv"]


def test_patients_who_share_a_picture_stay_in_one_split(pool: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(pool, tmp_path / "pool"))
    shutil.copy(source / "ASD" / "ASD1-0.png", source / "ASD" / "ASD77-0.png")
    for seed in range(3):
        parts = partition(source, seed=seed)
        assert parts.joined == (("ASD1", "ASD77"),)
        homes = {split for split, who in zip(parts.splits, parts.patients, strict=True) if who in ("ASD1", "ASD77")}
        assert len(homes) == 1


def test_failed_write_leaves_no_folder(pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = partition(pool)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(OutputError, match="full"):
        write_partition(parts, tmp_path / "full")
    monkeypatch.setattr(shutil, "copyfile", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no space")))
    with pytest.raises(OutputError, match="no space"):
        write_partition(parts, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_missing_single_class_and_ambiguous_data_raise_dataset_error(tmp_path: Path, pool: Path) -> None:
    with pytest.raises(DatasetError, match="no such folder"):
        partition(tmp_path / "none")
    with pytest.raises(DatasetError, match="no frame found"):
        partition(tmp_path)
    one = tmp_path / "one"
    shutil.copytree(pool / "ASD", one / "ASD")
    with pytest.raises(DatasetError, match="ASD"):
        partition(one)
    for split in ("train", "test"):
        shutil.copytree(pool, tmp_path / "twice" / split)
    with pytest.raises(DatasetError, match=r"ASD/ASD1-0\.png"):
        partition(tmp_path / "twice")
