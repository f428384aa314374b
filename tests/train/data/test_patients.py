"""Patient identifiers in frame names: the default rule and --patient-regex."""

import re
from pathlib import Path

import pytest

from echoquad_runtime.errors import ConfigError
from echoquad_train.data.dataset import LabelledFrame
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
