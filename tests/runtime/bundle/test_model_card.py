"""The model card of valid, old and hostile manifests; ``model_card.md`` is the card of a valid one."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from echoquad_runtime.bundle.document import BulletList, Document, Paragraph, Section, Table
from echoquad_runtime.bundle.manifest import INTENDED_USE
from echoquad_runtime.bundle.model_card import format_value, model_card
from echoquad_runtime.contract import Contract, parse_layout

EXPECTED = Path(__file__).with_name("model_card.md")
SHA = "0123456789abcdef" * 4


def share(right: int, count: int, *ci95: float) -> dict[str, Any]:
    return {"right": right, "count": count, "share": right / count, **({"ci95": list(ci95)} if ci95 else {})}


def figures(gate: dict[str, float], **changes: Any) -> dict[str, Any]:
    batch = {
        "max_abs_dlogit": 1.19e-6,
        "max_abs_dprobability": 2.98e-7,
        "patch_flips": 0,
        "frame_flips": 0,
        "smallest_margin_at_flip": None,
    }
    batches = [{"batch_size": 1, **batch}, {"batch_size": 16, **batch, **changes}]
    return {
        "passed": True,
        "device": "cpu",
        "frames": 100,
        "source": "validation split",
        "gate": gate,
        "batches": batches,
    }


CONTRACT = Contract(classes=("ASD", "NORM"))
STRICT = {
    "max_abs_dlogit": 1e-4,
    "max_abs_dprobability": 1e-4,
    "max_frame_flip_fraction": 0.0,
    "max_patch_flip_fraction": 0.0,
    "max_rel_dtypicality": 1e-3,
}
LOOSE = {"max_abs_dprobability": 0.05, "max_frame_flip_fraction": 0.01}
VERSIONS = {"echoquad": "0.2.0", "python": "3.11.7", "platform": "Linux-6.1-x86_64", "numpy": "2.4.6"}

MANIFEST: dict[str, Any] = {
    "schema": 1,
    "created": "2026-01-02T03:04:05+00:00",
    "contract": CONTRACT.to_dict(),
    "contract_sha256": SHA,
    "default_precision": "fp32",
    "intended_use": INTENDED_USE,
    "files": {},
    "precisions": {
        "fp32": {"opset": 18, "ir_version": 10},
        "int8": {
            "opset": 18,
            "ir_version": 10,
            "calibration": {"split": "train", "frames": 64, "seed": 0, "sha256": SHA, "method": "percentile 99.99"},
            "layers": 21,
            "float_layers": ["layer4.1.conv2", "fc"],
            "attempts": [
                {"method": "min-max", "max_abs_dprobability": 0.0812, "passed": False},
                {"method": "percentile 99.99", "max_abs_dprobability": 0.0312, "passed": True},
            ],
        },
    },
    "frame_graphs": {"fp32": {"frames": 100, "max_abs_grey": 1, "flips": 0}},
    "parity": {
        "fp32": figures(STRICT, max_rel_dtypicality=2e-6),
        "int8": figures(
            LOOSE,
            max_abs_dlogit=0.21,
            max_abs_dprobability=0.0312,
            patch_flips=3,
            frame_flips=1,
            smallest_margin_at_flip=0.0123,
        ),
    },
    "typicality": {
        "features": "penultimate layer",
        "frames": 780,
        "validation_frames": 100,
        "thresholds": {"fp32": {"95": 0.7012, "99": 0.5842}, "int8": {"95": 0.6893, "99": 0.5714}},
    },
    "training": {
        "backbone": "resnet18",
        "pretrained": {"source": "weights-package 1.0", "sha256": SHA, "license": "Apache-2.0"},
        "teacher": {"backbone": "resnet18", "input_size": 224, "weights_sha256": SHA},
        "created": "2026-01-01T00:00:00+00:00",
        "seed": 7,
        "device": "cuda",
        "precision": "bf16",
        "epochs": 12,
        "frames": {"train": {"ASD": 400, "NORM": 380}, "validation": {"ASD": 50, "NORM": 50}},
        "unreadable": 2,
        "recipe": 'weights = "imagenet"\nepochs = 12\nlr = 1e-4\nclass_weights = true\nzoom = [0.95, 1.05]\n',
        "git_commit": "e5099f9c45276c8e61e2f47040b53a24a0318c2e",
        "versions": {**VERSIONS, "torch": "2.14.1"},
    },
    "metrics": {
        "training": {"split": "validation", "epoch": 9, "frame_accuracy": share(91, 100, 0.8377, 0.9519)},
        "export": {
            "source": "validation split",
            "frame_accuracy": share(91, 100, 0.8377, 0.9519),
            "recall": {"ASD": share(47, 50, 0.8378, 0.9794), "NORM": share(44, 50, 0.762, 0.9438)},
            "quadrant_accuracy": share(317, 400),
        },
    },
    "golden": {
        "source": "phantom",
        "frames": 27,
        "bytes": 178223,
        "classes": {"ASD": 10, "NORM": 17},
        "patterns_found": 16,
        "patterns_possible": 16,
        "ties": 10,
        "smallest_margin": 0.0015724,
        "smallest_quadrant_margin": 0.00089297,
    },
    "versions": VERSIONS,
}


def test_card_shows_the_calibration() -> None:
    def figures(ece: float) -> dict[str, Any]:
        return {"ece": ece, "ece_equal_width": 0.1, "nll": 0.3, "ece_if_calibrated": {"mean": 0.038, "q95": 0.065}}

    facts = {"temperature": 1.12, "frame_temperature": 0.246, "frames": 100, "patients": 50, "binning": "equal mass"}
    facts |= {"before": figures(0.22), "after": figures(0.053), "cross_fitted": figures(0.057)}
    training = {**MANIFEST["training"], "calibration": facts}
    text = model_card({**MANIFEST, "training": training}).markdown()
    assert "| calibrated on other patients, cross-fitted | 0.057 | 0.100 | 0.300 |" in text
    assert "100 validation frames of 50 patients" in text and "0.246 of a frame's mean" in " ".join(text.split())
    alone = model_card({**MANIFEST, "training": training | {"calibration": facts | {"cross_fitted": None}}}).markdown()
    assert "cross-fitted" not in alone
    assert "not stated" in model_card({**MANIFEST, "training": training | {"calibration": 7}}).markdown()


def test_card_states_what_the_validation_frames_decided() -> None:
    chosen, last = "The epoch was chosen on the run's own validation frames", "The weights are those of the last epoch"
    member = {"recipe": 'model_epoch = "last"\n'}
    for training, words in (
        (MANIFEST["training"], chosen),
        ({**MANIFEST["training"], **member}, last),
        ({**MANIFEST["training"], "kind": "ensemble", "members": [member, member]}, last),
        ({**MANIFEST["training"], "kind": "ensemble", "members": [member, {"recipe": ""}]}, chosen),
    ):
        card = " ".join(model_card({**MANIFEST, "training": training}).markdown().split())
        assert [text in card for text in (chosen, last)] == [words == chosen, words == last]


def test_card_shows_leaks_between_splits() -> None:
    counts = {"patients": {"train": 400, "validation": 50}, "patients_across": 2, "exact_across": 1, "near_across": 0}

    def paragraph(audit: object) -> Paragraph:
        card = model_card({**MANIFEST, "training": {**MANIFEST["training"], "audit": audit}})
        (section,) = [section for section in card.sections if section.title == "Training data"]
        (found,) = [b for b in section.blocks if isinstance(b, Paragraph) and "more than one of its splits" in b.text]
        return found

    leaky = paragraph(counts)
    assert "2 patients, 1 exact and 0 near duplicates" in leaky.text and leaky.strong
    assert "(patients by file name: train 400, validation 50)" in leaky.text
    assert not paragraph({**counts, "patients_across": 0, "exact_across": 0}).strong
    assert "not stated patients, not stated exact" in paragraph(7).text
    assert "more than one of its splits" not in model_card(MANIFEST).markdown()  # runs of early releases have no audit


def test_card_equals_the_golden_file() -> None:
    assert model_card(MANIFEST).markdown() == EXPECTED.read_text("utf-8")


def test_sections_have_a_fixed_order() -> None:
    titles = [section.title for section in model_card(MANIFEST).sections]
    assert titles == [
        "Intended use",
        "Contract",
        "Training data",
        "Metrics",
        "Frames unlike the training frames",
        "Parity with the training code",
        "Golden frames",
        "Limits",
        "Versions",
    ]
    assert model_card(MANIFEST).sections[0].blocks[0] == Paragraph(INTENDED_USE, strong=True)


def test_card_lists_every_field_of_the_contract() -> None:
    rows = dict(table(model_card(MANIFEST), "Contract").rows)
    assert len(rows) == len(CONTRACT.to_dict())
    assert rows["vote rule"] == "majority" and rows["side of a quadrant at the network, pixels"] == "224"
    assert rows["weights of LA, RA, LV, RV, for the weighted rule"] == "1, 1, 1.5, 1.5"


def test_card_shows_the_quadrant_layout() -> None:
    contract = replace(CONTRACT, quadrants=parse_layout("apex-up"))
    card = model_card({**MANIFEST, "contract": contract.to_dict()}).markdown()
    assert "Quadrant layout: apex-up." in card
    assert "| RV | top left |\n| LV | top right |\n| RA | bottom left |\n| LA | bottom right |" in card


@pytest.mark.parametrize("names", [None, 5, "LALVRARV", [], ["LA"], ["LA", "LA", "LV", "RV"], [["LA"], {}, None, 1]])
def test_card_of_a_malformed_layout_says_that_it_is_not_stated(names: object) -> None:
    card = model_card({**MANIFEST, "contract": {**CONTRACT.to_dict(), "quadrants": names}}).markdown()
    assert "Quadrant layout: not stated." in card


def table(card: Document, title: str) -> Table:
    (section,) = [section for section in card.sections if section.title == title]
    return next(block for block in section.blocks if isinstance(block, Table))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("phantom", "no patient's pixels are in this bundle"),
        ("validation", "this bundle holds patients' pixels"),
        ("folder", "this bundle may hold patients' pixels"),
    ],
)
def test_card_states_whose_pixels_are_in_the_bundle(source: str, words: str) -> None:
    manifest = {**MANIFEST, "golden": {**MANIFEST["golden"], "source": source}}
    assert words in " ".join(model_card(manifest).markdown().split())


def test_missing_values_are_not_stated() -> None:
    card = " ".join(model_card({}).markdown().split())
    assert f"**{INTENDED_USE}**" in card
    assert "as one of not stated" in card and "Metrics: not stated." in card
    assert "Numbers of frames: not stated." in card and "what they cover is not stated" in card
    assert "Distilled" not in card and "frame graph" not in card


def test_manifest_cannot_remove_the_intended_use() -> None:
    card = model_card({**MANIFEST, "intended_use": "Approved for diagnosis."}).markdown()
    assert card.index(f"**{INTENDED_USE}**") < card.index("**Approved for diagnosis.**")


def test_class_names_cannot_break_the_table_or_the_terminal() -> None:
    classes = ("A|B", "C\x1b[31m\nD")
    manifest = {**MANIFEST, "contract": {**CONTRACT.to_dict(), "classes": list(classes)}}
    card = model_card(manifest)
    assert table(card, "Training data").header == ("frames", "A|B", "C?[31m?D")
    markdown = card.markdown()
    assert r"| frames | A\|B | C?[31m?D |" in markdown
    assert "\x1b" not in markdown


# Untrusted manifests

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(deeper for key, item in below for deeper in paths(item, (*path, key)))]


PATHS = paths(MANIFEST)[1:]


@given(st.sampled_from(PATHS), VALUES)
@example(("parity", "fp32", "gate", "max_abs_dlogit"), 10**400)
@example(("parity", "fp32", "batches", 0, "patch_flips"), 0.5)
@example(("training", "recipe"), "zoom = nan\nlr = 1979-05-27T07:32:00Z")
@example(("training", "epochs"), 10**400)
@example(("metrics", "export", "recall"), {"A": None})
def test_card_accepts_any_value_anywhere(path: tuple[Any, ...], value: Any) -> None:
    manifest = copy.deepcopy(MANIFEST)
    target = manifest
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    card = model_card(manifest).markdown()
    assert f"**{INTENDED_USE}**" in card
    assert all(sign.isprintable() or sign == "\n" for sign in card)


@given(VALUES)
def test_format_value_returns_one_printable_line(value: Any) -> None:
    assert format_value(value).isprintable()


def test_format_value_of_nested_values() -> None:
    assert format_value({"frames": 64, "sha256": SHA, "left_out": 0}) == "frames 64, sha256 0123456789ab..., left out 0"
    assert format_value([{"a": True}, {"b": None}]) == "a yes; b none"
    assert format_value([]) == format_value({}) == "none"
    assert format_value(0.1 + 0.2) == "0.3"
    deep: Any = 1
    for _ in range(5000):
        deep = [deep]
    assert format_value(deep) == "..."


def test_markdown_wraps_text_and_escapes_cells() -> None:
    section = Section(
        "S", (Paragraph("word " * 40), Table(("a", "b"), (("1", "x|y"),)), BulletList(("long " * 30, "short")))
    )
    lines = Document("T", (section,)).markdown().splitlines()
    assert lines[:3] == ["# T", "", "## S"]
    assert max(map(len, lines)) <= 100
    assert lines[lines.index("| a | b |") + 1 :][:2] == ["|---|---|", r"| 1 | x\|y |"]
    assert [line[:2] for line in lines[-3:]] == ["- ", "  ", "- "]
