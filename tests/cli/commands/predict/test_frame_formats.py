"""``echoquad predict`` and other commands on DICOM files, clips and matrices."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pydicom = pytest.importorskip("pydicom")
av = pytest.importorskip("av")

from pydicom.data import get_testdata_file  # noqa: E402

from echoquad import Failure, Predictor  # noqa: E402

CLIP, SINGLE = "examples_ybr_color.dcm", "examples_palette.dcm"
TINY = ("--recipe", "scratch", "--input-size", "16", "--epochs", "1", "--set", "batch_size=8", "--device", "cpu")


def shipped(name: str) -> Path:
    return Path(str(get_testdata_file(name, download=False)))


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text("utf-8"))))


@pytest.fixture(scope="module")
def exam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder: a clip of 30 frames, a DICOM file without extension, a video, a matrix, an image, a DICOMDIR."""
    folder = tmp_path_factory.mktemp("exam")
    shutil.copy(shipped(CLIP), folder / "a.dcm")
    shutil.copy(shipped(SINGLE), folder / "IM000001")
    with av.open(folder / "b.avi", "w") as out:
        track = out.add_stream("mjpeg", rate=25)
        track.width, track.height, track.pix_fmt = 64, 48, "yuvj420p"
        for number in range(12):
            levels = np.full((48, 64, 3), 20 * number, np.uint8)
            out.mux(track.encode(av.VideoFrame.from_ndarray(levels, "rgb24")))
        out.mux(track.encode())
    np.savetxt(folder / "c.txt", np.add.outer(np.arange(40), np.arange(50)) / 100)
    Image.fromarray(np.arange(4800, dtype=np.uint16).astype(np.uint8).reshape(60, 80)).save(folder / "d.png")
    (folder / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    return folder


NAMES = ["IM000001", *(f"a.dcm#{n}" for n in range(1, 31)), *(f"b.avi#{n}" for n in range(1, 13)), "d.png"]


def test_folder_of_all_formats_has_a_row_for_each_frame(
    exam: Path, tiny_bundle: Path, tmp_path: Path, echoquad: Callable[..., Any]
) -> None:
    out, pictures = tmp_path / "rows.csv", tmp_path / "pictures"
    echoquad("predict", tiny_bundle, exam, "--out", out, "--overlay", pictures, "--device", "cpu")
    assert [row["file"] for row in rows_of(out)] == NAMES
    drawn = {path.name for path in pictures.iterdir()}
    assert drawn == {f"{name}.overlay.png" for name in NAMES}
    with Image.open(pictures / "a.dcm#12.overlay.png") as picture:
        assert picture.width == 640  # the 320 columns of the clip, enlarged
    echoquad("predict", tiny_bundle, exam, "--out", out, "--every", "10", "--matrices", "--device", "cpu")
    every = ["IM000001", "a.dcm#1", "a.dcm#11", "a.dcm#21", "b.avi#1", "b.avi#11", "c.txt", "d.png"]
    assert [row["file"] for row in rows_of(out)] == every


def test_shards_and_resume_equal_a_single_run(
    exam: Path, tiny_bundle: Path, tmp_path: Path, echoquad: Callable[..., Any]
) -> None:
    def run(out: Path, *more: object) -> None:
        echoquad("predict", tiny_bundle, exam, "--out", out, "--device", "cpu", *more)

    run(tmp_path / "whole.csv")
    for index in (1, 2):
        run(tmp_path / f"{index}.csv", "--shard", f"{index}/2")
    echoquad("merge", tmp_path / "2.csv", tmp_path / "1.csv", "--out", tmp_path / "merged.csv")
    assert (tmp_path / "merged.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    part = tmp_path / "part.csv"
    echoquad("predict", tiny_bundle, exam / "a.dcm", "--out", part, "--device", "cpu", "--every", "3")
    run(part, "--resume")
    assert sorted(row["file"] for row in rows_of(part)) == sorted(NAMES)


def test_truncated_clips_are_failures_and_their_readable_frames_rows(
    exam: Path, tiny_bundle: Path, tmp_path: Path, echoquad: Callable[..., Any]
) -> None:
    data = shipped(CLIP).read_bytes()
    (tmp_path / "cut.dcm").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.avi").write_bytes(b"")
    shutil.copy(exam / "d.png", tmp_path / "d.png")
    out = tmp_path / "rows.csv"
    ran = echoquad("predict", tiny_bundle, tmp_path, "--out", out, "--device", "cpu", code=5)
    names = [row["file"] for row in rows_of(out)]
    there = len(names) - 1
    assert names == [*(f"cut.dcm#{number}" for number in range(1, there + 1)), "d.png"] and 10 < there < 20
    assert ran.error_codes == ["E_FRAME_DAMAGED", "E_FRAME_FORMAT"]
    cut, empty = ran.errors
    assert cut.startswith("cut.dcm: ") and f"frames {there + 1} to 30 of 30" in cut
    assert empty.startswith("empty.avi: ") and "AVI, MP4 or Matroska" in empty


def test_missing_extra_fails_its_formats_only(
    exam: Path, tiny_bundle: Path, tmp_path: Path, echoquad: Callable[..., Any]
) -> None:
    out = tmp_path / "rows.csv"
    for module in ("openjpeg", "av"):
        stub = tmp_path / "hidden" / f"{module}.py"
        stub.parent.mkdir(exist_ok=True)
        stub.write_text("raise ImportError")
    hidden = f"sys.path.insert(0, {str(stub.parent)!r})"  # the path of reader processes too
    folder = shutil.copytree(exam, tmp_path / "exam")
    shutil.copy(shipped("examples_jpeg2k.dcm"), folder / "jpeg2000.dcm")
    ran = echoquad("predict", tiny_bundle, folder, "--out", out, "--device", "cpu", code=5, driver=hidden)
    assert sorted(row["file"] for row in rows_of(out)) == sorted(name for name in NAMES if "b.avi" not in name)
    assert ran.error_codes == ["E_FRAME_EXTRA_MISSING"] * 2
    assert sum('pip install "echoquad[dicom]"' in line for line in ran.errors) == 1
    assert sum('pip install "echoquad[video]"' in line for line in ran.errors) == 1


def test_bench_times_clips_and_matrices(exam: Path, tiny_bundle: Path, echoquad: Callable[..., Any]) -> None:
    ran = echoquad("bench", tiny_bundle, exam, exam / "c.txt", "--frames", "3", "--device", "cpu")
    assert "3 frames on cpu" in ran.out


def test_predictor_reads_the_same_formats(exam: Path, tiny_bundle: Path) -> None:
    predictor = Predictor(tiny_bundle, device="cpu")
    found = list(predictor.predict([exam / "a.dcm#12", exam / "c.txt", exam / "nothing.dcm#1"]))
    assert [result.file for result in found[:2]] == ["a.dcm#12", "c.txt"]
    assert isinstance(found[2], Failure)
    (same,) = predictor.predict(exam / "IM000001")
    alone = predictor((exam / "IM000001").read_bytes(), name="IM000001")
    assert same == alone


def test_rows_of_differently_flipped_matrices_do_not_mix(
    exam: Path, tiny_bundle: Path, tmp_path: Path, echoquad: Callable[..., Any]
) -> None:
    line = ("predict", tiny_bundle, exam / "c.txt", "--device", "cpu")
    echoquad(*line, "--out", tmp_path / "a.csv", "--flip", "both")
    record = json.loads((tmp_path / "a.csv.run.json").read_text("utf-8"))
    assert record["flip"] == "both"
    ran = echoquad(*line, "--out", tmp_path / "a.csv", "--resume", code=1)
    assert ran.error[0] == "E_RESULT" and "both" in ran.errors[0] and "none" in ran.errors[0]
    echoquad(*line, "--out", tmp_path / "1.csv", "--flip", "both", "--shard", "1/2")
    echoquad(*line, "--out", tmp_path / "2.csv", "--shard", "2/2")
    ran = echoquad("merge", tmp_path / "1.csv", tmp_path / "2.csv", "--out", tmp_path / "m.csv", code=1)
    assert ran.error[0] == "E_RESULT" and "matri" in ran.errors[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data folder of clips and matrices; the class is which half is bright."""
    folder = tmp_path_factory.mktemp("formats") / "data"
    rng = np.random.default_rng(0)
    for split in ("train", "validation"):
        for name in ("low", "top"):
            place = folder / split / name
            place.mkdir(parents=True)
            levels = rng.integers(0, 90, (4, 40, 40))
            half = slice(0, 20) if name == "top" else slice(20, 40)
            levels[:, half] += 120
            np.save(place / "clip.npy", levels[:3].astype(np.uint8))
            np.savetxt(place / "one.csv", levels[3] / 255, delimiter=";")
    return folder


@pytest.mark.slow
def test_read_options_of_training_apply_to_evaluation_and_prediction(
    data: Path, tmp_path: Path, echoquad: Callable[..., Any]
) -> None:
    pytest.importorskip("torch")
    run, bundle = tmp_path / "run", tmp_path / "bundle"
    refused = echoquad("train", data, "--out", tmp_path / "none", *TINY, "--weights", "none", code=1)
    assert "--matrices" in refused.errors[0]
    ran = echoquad("train", data, "--out", run, *TINY, "--weights", "none", "--matrices", "--flip", "vertical")
    assert "train: 8 frames (low 4, top 4)" in ran.err
    facts = json.loads((run / "run.json").read_text("utf-8"))["data"]
    assert facts["reading"] == {"matrices": True, "flip": "vertical", "every": 1}
    echoquad("train", data, "--out", run, *TINY, "--weights", "none", "--resume", "--set", "epochs=1")
    wrong = echoquad(
        "train", data, "--out", run, *TINY, "--weights", "none", "--resume", "--matrices", "--flip", "both", code=1
    )
    assert "data has changed" in wrong.errors[0]
    echoquad("evaluate", run, data, "--split", "validation", "--out", tmp_path / "evaluation")
    names = [row["file"] for row in rows_of(tmp_path / "evaluation" / "predictions.csv")]
    assert names[:4] == [*(f"validation/low/clip.npy#{number}" for number in (1, 2, 3)), "validation/low/one.csv"]

    echoquad("export", run, "--out", bundle)
    one = data / "validation" / "low" / "one.csv"
    default = echoquad("predict", bundle, one, "--out", tmp_path / "default.csv", "--device", "cpu")
    assert "matrices are flipped (vertical), as in training" in default.err
    other = echoquad("predict", bundle, one, "--out", tmp_path / "other.csv", "--device", "cpu", "--flip", "none")
    assert "--flip none: differs from training, which had vertical" in other.err
    (as_trained,), (as_stored,) = rows_of(tmp_path / "default.csv"), rows_of(tmp_path / "other.csv")
    assert as_trained != as_stored
    evaluated = rows_of(tmp_path / "evaluation" / "predictions.csv")[3]
    assert abs(float(as_trained["prob_low"]) - float(evaluated["prob_low"])) <= 1e-4
