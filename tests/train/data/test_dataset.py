"""Data sets: class and split listing, decoding to quadrants, overflow to disk, and the fingerprint."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import DatasetError, FrameError, OutputError
from echoquad_runtime.quadrants import frame_quadrants
from echoquad_train.data import dataset
from echoquad_train.data.dataset import Split, load_quadrants, read_classes, read_split

MakeData = Callable[..., Path]


def read(data: Path, split: str = "train") -> Split:
    return read_split(data, split, read_classes(data))


def line(error: pytest.ExceptionInfo[DatasetError]) -> str:
    assert "\n" not in str(error.value) and error.value.exit_code == 1
    return str(error.value)


# Listing


@pytest.mark.parametrize(
    "classes",
    [("ASD", "NORM"), ("a", "b", "c"), ("10", "2", "9"), ("Defekt", "gesund", "ÄSD", "心房"), ("_x", "x y", "ß.1")],
)
def test_classes_are_the_sorted_folders_of_train(tmp_path: Path, make_data: MakeData, classes: tuple[str, ...]) -> None:
    data = make_data(tmp_path / "data", classes, frames=2)
    found = read_classes(data)
    assert found == tuple(sorted(classes))
    split = read_split(data, "validation", found)
    assert split.counts == dict.fromkeys(found, 2)
    assert [found[frame.label] for frame in split.frames] == [frame.name.split("/")[1] for frame in split.frames]


def test_nested_folders_are_listed_and_hidden_names_skipped(tmp_path: Path, make_data: MakeData) -> None:
    data = make_data(tmp_path / "data", frames=1)
    train = data / "train"
    source = train / "dark" / "train0.png"
    for name in ("p2/b/1.PNG", "p10/0.png", "p2/a.png", ".hidden.png", ".cache/x.png", "._train0.png", "notes.txt"):
        (train / "dark" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, train / "dark" / name)
    for name in (".git", "__MACOSX", "__pycache__"):
        (train / name).mkdir()
    (train / "list.csv").write_text("")
    split = read(data)
    assert split.classes == ("bright", "dark")
    assert [frame.name for frame in split.frames] == [
        "train/bright/train0.png",
        "train/dark/p10/0.png",
        "train/dark/p2/a.png",
        "train/dark/p2/b/1.PNG",
        "train/dark/train0.png",
    ]
    assert [(file.path, file.name) for file in split.files()] == [(f.path, f.name) for f in split.frames]


def test_order_does_not_depend_on_the_file_system(
    tmp_path: Path, make_data: MakeData, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_data(tmp_path / "data", ("c", "a", "b"), frames=5)
    expected = read(data)
    scandir, iterdir = os.scandir, Path.iterdir

    class Backwards:
        def __init__(self, folder: Path) -> None:
            with scandir(folder) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __enter__(self) -> list[os.DirEntry[str]]:
            return self.entries

        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(os, "scandir", Backwards)
    monkeypatch.setattr(Path, "iterdir", lambda path: sorted(iterdir(path), reverse=True))
    assert read(data) == expected


# Incomplete data


def test_missing_data_folder_raises_dataset_error(tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as error:
        read_classes(tmp_path / "none")
    assert "none: " in line(error) and "train/, validation/, test/" in line(error)


def test_missing_split_error_lists_the_folders_found(tmp_path: Path, make_data: MakeData) -> None:
    data = make_data(tmp_path / "data")
    with pytest.raises(DatasetError) as error:
        read(data, "test")
    assert "no test/ folder, only train, validation" in line(error)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="no train/ folder"):
        read_classes(tmp_path / "empty")


def test_fewer_than_two_classes_raise_dataset_error(tmp_path: Path, make_data: MakeData) -> None:
    data = make_data(tmp_path / "data", ("ASD",))
    with pytest.raises(DatasetError) as error:
        read_classes(data)
    assert "'ASD'" in line(error) and "two or more" in line(error)
    shutil.rmtree(data / "train" / "ASD")
    with pytest.raises(DatasetError, match="no class folder"):
        read_classes(data)


def test_split_with_missing_or_unknown_class_raises_dataset_error(tmp_path: Path, make_data: MakeData) -> None:
    data = make_data(tmp_path / "data", ("a", "b", "c"))
    shutil.rmtree(data / "validation" / "b")
    with pytest.raises(DatasetError) as error:
        read(data, "validation")
    assert "validation: class b " in line(error) and "a, b, c" in line(error)
    (data / "validation" / "b").mkdir()
    (data / "validation" / "d").mkdir()
    with pytest.raises(DatasetError) as error:
        read(data, "validation")
    assert "validation: class d " in line(error) and "a, b, c" in line(error)


def test_class_folder_without_frames_raises_dataset_error(tmp_path: Path, make_data: MakeData) -> None:
    data = make_data(tmp_path / "data")
    for path in (data / "train" / "dark").iterdir():
        path.rename(path.with_suffix(".docx"))
    with pytest.raises(DatasetError) as error:
        read(data)
    assert "train/dark: " in line(error) and ".bmp" in line(error)


# Decoding


@pytest.fixture
def contract() -> Contract:
    return Contract(("bright", "dark"), input_size=24, keep=0.8)


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


def test_decoded_quadrants_equal_those_of_the_runtime(flat_data: Path, contract: Contract) -> None:
    split, seen = read(flat_data), []
    store = load_quadrants(split, contract, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 8) for done in range(1, 9)]
    assert store.quadrants.shape == (8, 4, 24, 24) and store.quadrants.dtype == np.uint8
    assert store.labels.dtype == np.int64 and store.labels.tolist() == [0] * 4 + [1] * 4
    assert store.names == tuple(frame.name for frame in split.frames) and store.failures == ()
    for frame, quadrants in zip(split.frames, store.quadrants, strict=True):
        with Image.open(frame.path) as image:
            assert np.array_equal(quadrants, frame_quadrants(np.asarray(image), contract)[:, 0])


@pytest.mark.parametrize("bad", [[0], [3], [7], [1, 2, 6]])
def test_unreadable_frames_are_failures_and_shift_no_label(
    tmp_path: Path, make_data: MakeData, contract: Contract, bad: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    split = read(make_data(tmp_path / "data", frames=4))
    whole = load_quadrants(split, contract)
    for index in bad:
        damage(split.frames[index].path)
    good = [index for index in range(8) if index not in bad]
    for limit in (dataset.MEMORY_BYTES, 0):
        monkeypatch.setattr(dataset, "MEMORY_BYTES", limit)
        store = load_quadrants(split, contract, overflow=tmp_path)
        assert np.array_equal(store.quadrants, whole.quadrants[good])
        assert np.array_equal(store.labels, whole.labels[good])
        assert store.names == tuple(split.frames[index].name for index in good)
        assert [failure.file for failure in store.failures] == [split.frames[index].name for index in bad]
        assert all(isinstance(failure.error, FrameError) for failure in store.failures)
        del store
        gc.collect()


def test_class_without_readable_frame_raises_dataset_error(
    tmp_path: Path, make_data: MakeData, contract: Contract
) -> None:
    split = read(make_data(tmp_path / "data", frames=3))
    for index in (0, 3, 4, 5):  # one of class bright, all of class dark
        damage(split.frames[index].path)
    with pytest.raises(DatasetError) as error:
        load_quadrants(split, contract)
    message = line(error)
    assert message.startswith("train: ") and "class dark" in message and "train/dark/train0.png: " in message


def test_overflow_goes_to_a_temporary_file_that_is_removed(
    tmp_path: Path, flat_data: Path, contract: Contract, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = read(flat_data)
    inside = load_quadrants(split, contract, overflow=tmp_path)
    assert not isinstance(inside.quadrants, np.memmap)  # fits in memory: no file
    monkeypatch.setattr(dataset, "MEMORY_BYTES", inside.quadrants.nbytes - 1)
    folders = []
    temporary = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **given: folders.append(given["dir"]) or temporary(**given))
    mapped = load_quadrants(split, contract, overflow=tmp_path)
    assert isinstance(mapped.quadrants, np.memmap) and folders == [tmp_path]
    assert np.array_equal(mapped.quadrants, inside.quadrants)
    assert np.array_equal(mapped.quadrants[[1, 5], [2, 3]], inside.quadrants[[1, 5], [2, 3]])
    load_quadrants(split, contract)  # without a folder: memory, whatever the size
    assert len(folders) == 1
    del mapped
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_full_disk_raises_output_error(
    tmp_path: Path, flat_data: Path, contract: Contract, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "MEMORY_BYTES", 0)
    split = read(flat_data)
    with pytest.raises(OutputError, match=r"gone: .*No such file"):
        load_quadrants(split, contract, overflow=tmp_path / "gone")

    class Full:
        def __enter__(self) -> Full:
            return self

        def __exit__(self, *error: object) -> None: ...

        def write(self, data: bytes) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Full())
    with pytest.raises(OutputError, match="No space left on device"):
        load_quadrants(split, contract, overflow=tmp_path)


# Fingerprint


def test_fingerprint_depends_on_names_and_sizes_only(tmp_path: Path, make_data: MakeData) -> None:
    data = make_data(tmp_path / "data")
    first = read(data).fingerprint
    moved = data.rename(tmp_path / "elsewhere")
    assert read(moved).fingerprint == first != read(moved, "validation").fingerprint

    path = moved / "train" / "dark" / "train1.png"
    bytes_before = path.read_bytes()
    path.write_bytes(bytes_before + b"\0")
    assert read(moved).fingerprint != first
    path.write_bytes(bytes_before)
    assert read(moved).fingerprint == first
    path.rename(path.with_name("other.png"))
    assert read(moved).fingerprint != first
    path.with_name("other.png").rename(moved / "train" / "bright" / "train1b.png")
    assert read(moved).fingerprint != first


def test_removed_file_changes_the_fingerprint_and_is_a_failure(
    tmp_path: Path, make_data: MakeData, contract: Contract
) -> None:
    split = read(make_data(tmp_path / "data"))
    before = split.fingerprint
    split.frames[2].path.unlink()
    assert split.fingerprint != before
    assert [failure.file for failure in load_quadrants(split, contract).failures] == [split.frames[2].name]


# Clips and matrices


def test_frames_of_a_clip_belong_to_its_class(tmp_path: Path, contract: Contract) -> None:
    from echoquad_runtime.frames.formats import ReadOptions

    rng = np.random.default_rng(2)
    for name in ("bright", "dark"):
        folder = tmp_path / "train" / name
        folder.mkdir(parents=True)
        np.save(folder / "clip.npy", rng.integers(0, 200, (3, 20, 30)).astype(np.uint8))
        np.savetxt(folder / "one.txt", rng.integers(0, 200, (20, 30)), fmt="%d")
        (folder / "torn.npy").write_bytes((folder / "clip.npy").read_bytes()[:-9])
    with pytest.raises(DatasetError, match="--matrices"):
        read_split(tmp_path, "train", ("bright", "dark"))
    split = read_split(tmp_path, "train", ("bright", "dark"), ReadOptions(matrices=True))
    names = ["clip.npy#1", "clip.npy#2", "clip.npy#3", "one.txt", "torn.npy"]
    assert [frame.name for frame in split.frames] == [f"train/{c}/{n}" for c in ("bright", "dark") for n in names]
    store = load_quadrants(split, contract)
    assert store.labels.tolist() == [0] * 4 + [1] * 4
    assert [failure.file for failure in store.failures] == ["train/bright/torn.npy", "train/dark/torn.npy"]
    assert len({store.quadrants[index].tobytes() for index in range(8)}) == 8

    turned = read_split(tmp_path, "train", ("bright", "dark"), ReadOptions(matrices=True, flip="vertical"))
    assert turned.fingerprint != split.fingerprint
    upside_down = load_quadrants(turned, contract.__class__(**{**contract.to_dict(), "keep": 1.0})).quadrants
    straight = load_quadrants(split, contract.__class__(**{**contract.to_dict(), "keep": 1.0})).quadrants
    # LA and LV, RA and RV swap; the resize of a flipped quadrant differs by a rounding at most.
    assert np.abs(upside_down[:, [2, 3]].astype(int) - straight[:, [0, 1], ::-1].astype(int)).max() <= 1
