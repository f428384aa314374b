"""Patient identifiers in frame names: the default rule and --patient-regex."""

import re
from pathlib import Path

import pytest

from echoquad_runtime.errors import ConfigError
from echoquad_train.data.dataset import LabelledFrame
from echoquad_train.data.patient_summary import summarize_patients
from echoquad_train.data.patients import patient_of, patient_pattern, patients_of


@pytest.mark.parametrize(
    ("name", "patient"),
    [
        ("patient0001_4CH.png", "patient0001"),
        ("Patient-12/frame-3.png", "patient12"),
        ("site/patient0001_4CH_ES.png", "patient0001"),
        ("ASD3-0.png", "ASD3"),
        ("ASD3-101.png", "ASD3"),
        ("NORMS-39.png", "NORMS"),
        ("a/NORMS-39.png", "a/NORMS"),
        ("NORM_2_17.png", "NORM_2"),
        ("exam7/001.png", "exam7"),
        ("exam7/img-001.png", "exam7"),
        ("clip.dcm#12", "clip.dcm"),
        ("ASD3-7.avi#12", "ASD3"),
        ("frame.png", None),
        ("001.png", None),
        ("-1.png", None),
    ],
)
def test_default_rule_finds_patient_series_or_folder(name, patient):
    assert patient_of(name) == patient


@pytest.mark.parametrize(
    ("names", "patient"),
    [
        (["P001/clip1/frame.png", "P001/clip2/frame.png", "P001/x-003.png", "P001/A4C/2.dcm#7"], "P001"),
        (["site/P001/a.png", "Berlin/P001/b.png", "site2/P001/clip1/c.png", "2024-01-31/P001/d.png"], "P001"),
        (
            ["P001_A4C/clip1/1.png", "P001_20240131/2.png", "P001-visit2/3.png", "A4C/P001/4.png", "P001_2/5.png"],
            "P001",
        ),
        (["P001_ED.png", "P001_ES.png", "P001_A4C_3.png", "P001_A2C-4.png", "P001_A4C.dcm#2"], "P001"),
        (["0012/3/x.png", "siteA/0012/y.png", "A4C/0012_4.png"], "0012"),
        (
            ["M\u00fcller/clip1/1.png", "Mu\u0308ller/IMG_2034/2.png", "M\u00fcller/2/3.png", "M\u00fcller/img-4.png"],
            "M\u00fcller",
        ),
        (["Berlin/ASD3-101.png", "ASD3-4.png", "exam7/ASD3-2.png"], "ASD3"),
        (["site2/exam7/clip1/x.png", "exam7/img-001.png", "exam7/loop-002.png"], "exam7"),
        (["train/P7/x.png", "validation/P7/y.png", "Test/P7_20240131/z.png"], "P7"),
        (["DICOM/PAT00001/ST000001/IM000001", "PAT00001/ST000002/IM000001"], "pat00001"),
    ],
)
def test_folders_and_views_of_one_patient_are_one_patient(names, patient):
    assert {patient_of(name) for name in names} == {patient}


def test_summary_counts_patients_and_names_its_doubts():
    sound = summarize_patients(f"P{number:03}/clip{clip}/frame.png" for number in range(6) for clip in range(3))
    assert (sound.patients, sound.fewest, sound.median, sound.most, sound.single, sound.without) == (6, 3, 3, 3, 0, 0)
    assert sound.rules == {"a folder": 18} and sound.examples[0] == ("P000/clip0/frame.png", "P000")
    assert sound.doubts == () and "6, 3 frames each" in sound.line and "P000" in sound.line
    single = summarize_patients(f"P{number:03}/frame.png" for number in range(6))
    assert "6 of 6 patients" in single.doubts[0]
    (deep,) = summarize_patients(["P1/a.png", "P1/b.png", "x/P1/c.png"] * 2).doubts
    assert deep.startswith("P1, x/P1: ") and "depths" in deep
    (joined,) = summarize_patients([f"P1/{number}.png" for number in range(9)] + ["P2/0.png", "P2/1.png"]).doubts
    assert joined.startswith("P1 has 9 of 11 frames")
    assert summarize_patients(["x.png"]).line.startswith("patients: none")


def test_pattern_is_searched_and_its_first_group_is_the_patient():
    assert patient_of("siteA/id77_x.png", re.compile(r"id(\d+)")) == "77"
    assert patient_of("siteA/id77_x.png", re.compile(r"site\w")) == "siteA"
    assert patient_of("patient0001.png", re.compile(r"id(\d+)")) is None
    assert patient_of("a1.png", re.compile("png")) is None  # the extension is not searched


def test_frames_without_a_patient_count_as_patients_of_their_own():
    names = ["train/ED/patient1_a.png", "train/ES/patient1_b.png", "train/ED/x.png", "validation/ED/x.png"]
    frames = [LabelledFrame(Path(name), name, 0) for name in names]
    assert patients_of(frames) == ("patient1", "patient1", "train/ED/x.png", "validation/ED/x.png")


def test_invalid_pattern_raises_config_error():
    assert patient_pattern(None) is None
    with pytest.raises(ConfigError, match=r"--patient-regex '\('"):
        patient_pattern("(")
