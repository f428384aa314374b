"""The validation figures: their form in the manifest, what is refused, and what they say of a threshold."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.manifest import MANIFEST, encode_manifest
from echoquad_runtime.bundle.validation_figures import STEPS, Distribution, ValidationFigures, design_effect
from echoquad_runtime.errors import BundleError, BundleTamperedError
from echoquad_runtime.verify.inspection import inspect_bundle

FIGURES = ValidationFigures(
    frames=10,
    effective_frames=7.5,
    confidence=Distribution((0.6, 0.9), (2, 5, 3)),
    typicality=Distribution((0.8,), (4, 6)),
    agreement=(0, 0, 1, 4, 5),
    flags={"tie": 1, "unlike-training": 2},
    undecided=(*[0] * 12, 2, 2, 2, 4, 4, 6, 7, 9, 10),
    undecided_or_unlike=(*[2] * 12, 3, 3, 3, 5, 5, 7, 8, 9, 10),
)
Change = Callable[[dict[str, Any]], object]


def test_figures_survive_the_manifest(make_tiny_bundle: Any, tmp_path: Path) -> None:
    folder = make_tiny_bundle(
        tmp_path / "bundle", precisions=("fp32", "int8"), manifest={"validation": {"fp32": FIGURES.to_dict()}}
    )
    bundle = Bundle(folder)
    assert bundle.validation("fp32") == FIGURES == bundle.validation("tf32") == bundle.validation("bf16")
    assert bundle.validation("int8") is None
    assert inspect_bundle(folder).faults == ()


def test_bundle_without_figures_is_valid(tiny_bundle: Path) -> None:
    assert Bundle(tiny_bundle).validation("fp32") is None


def test_hash_of_the_manifest_covers_the_figures(make_tiny_bundle: Any, tmp_path: Path) -> None:
    folder = make_tiny_bundle(tmp_path / "bundle", manifest={"validation": {"fp32": FIGURES.to_dict()}})
    data = (folder / MANIFEST).read_bytes()
    (folder / MANIFEST).write_bytes(data.replace(b'"frames": 10', b'"frames": 11'))
    with pytest.raises(BundleTamperedError):
        Bundle(folder)


def test_value_at_an_edge_belongs_to_the_bin_above() -> None:
    assert [FIGURES.confidence.bin_of(value) for value in (-1, 0.59, 0.6, 0.89, 0.9, 7)] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("below", "unlike", "share"),
    [
        (None, False, 0.0),
        (None, True, 0.2),
        (0.6, False, 0.2),
        (0.6, True, 0.3),
        (0.75, False, 0.4),
        (0.725, False, 0.3),  # halfway between 0.2 and 0.4
        (1.0, False, 1.0),
        (1.0, True, 1.0),
    ],
)
def test_share_of_undecided_frames(below: float | None, unlike: bool, share: float) -> None:
    assert FIGURES.undecided_share(below, abstain_unlike=unlike) == pytest.approx(share)


def put(value: Any, *path: Any) -> Change:
    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


def without(key: str) -> Change:
    return lambda content: content.pop(key)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("confidence"), "expected an object with"),
        (put(1, "more"), "expected an object with"),
        (put(0, "frames"), "frames"),
        (put(-10, "frames"), "frames"),
        (put(True, "frames"), "frames"),
        (put("10", "frames"), "frames"),
        (put(10**400, "frames"), "frames"),
        (put(10.5, "effective_frames"), "effective_frames"),
        (put(0, "effective_frames"), "effective_frames"),
        (put(10**400, "effective_frames"), "effective_frames"),
        (put([0.9, 0.6], "confidence", "edges"), "ascending"),
        (put([0.9, 0.9], "confidence", "edges"), "ascending"),
        (put([], "confidence", "edges"), "ascending"),
        (put([0.6, True], "confidence", "edges"), "finite"),
        (put([0.6, 10**400], "confidence", "edges"), "finite"),
        (put("0.6", "confidence", "edges"), "list"),
        (put([2, 5, 4], "confidence", "counts"), "add up to all 10"),
        (put([-2, 9, 3], "confidence", "counts"), "numbers of frames"),
        (put([2, 5.0, 3], "confidence", "counts"), "numbers of frames"),
        (put([2, 8], "confidence", "counts"), "3 numbers"),
        (put(None, "typicality"), "typicality"),
        (put([0, 1, 4, 5], "agreement"), "agreement"),
        (put({"tie": 11}, "flags"), "flags.tie"),
        (put({"tie": -1}, "flags"), "flags.tie"),
        (put({"t\n": 1}, "flags"), "printable"),
        (put({"t" * 41: 1}, "flags"), "printable"),
        (put({f"f{index}": 1 for index in range(101)}, "flags"), "flags"),
        (put([1], "flags"), "flags"),
        (put([0] * 20, "undecided"), "undecided"),
        (put([0] * 19 + [5, 4], "undecided"), "undecided"),
        (put([3] * 21, "undecided_or_unlike", 3), "undecided_or_unlike"),
    ],
)
def test_malformed_figures_are_refused_with_the_key_at_fault(
    change: Change, words: str, make_tiny_bundle: Any, tmp_path: Path
) -> None:
    content = json.loads(json.dumps(FIGURES.to_dict()))
    change(content)
    folder = make_tiny_bundle(tmp_path / "bundle", manifest={"validation": {"fp32": content}})
    with pytest.raises(BundleError) as caught:
        Bundle(folder).validation("fp32")
    text = str(caught.value)
    assert words in text and "validation.fp32" in text and "\n" not in text and len(text) < 1000


@pytest.mark.parametrize("value", [[], "fp32", 3, {"fp32": []}, {"fp32": None}])
def test_section_of_another_type_is_refused(value: Any, make_tiny_bundle: Any, tmp_path: Path) -> None:
    folder = make_tiny_bundle(tmp_path / "bundle", manifest={"validation": value})
    with pytest.raises(BundleError, match="validation"):
        Bundle(folder).validation("fp32")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_json_lacks_are_refused(value: float, make_tiny_bundle: Any, tmp_path: Path) -> None:
    content = FIGURES.to_dict() | {"effective_frames": value}
    with pytest.raises(BundleError, match="effective_frames"):
        ValidationFigures.from_dict(content, "bundle")
    with pytest.raises(ValueError):
        encode_manifest({"validation": {"fp32": content}})
    folder = make_tiny_bundle(tmp_path / "bundle", manifest={"validation": {"fp32": FIGURES.to_dict()}})
    data = (folder / MANIFEST).read_bytes()
    (folder / MANIFEST).write_bytes(data.replace(b"7.5", json.dumps(value).encode()))
    with pytest.raises(BundleTamperedError):
        Bundle(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


@given(key=st.sampled_from(sorted(FIGURES.to_dict())), value=JSON)
def test_any_value_is_accepted_or_refused_by_name(key: str, value: Any) -> None:
    try:
        found = ValidationFigures.from_dict(FIGURES.to_dict() | {key: value}, "bundle: validation.fp32")
    except BundleError as error:
        assert str(error).startswith("bundle: validation.fp32")
    else:
        assert ValidationFigures.from_dict(found.to_dict(), "again") == found


def test_design_effect_is_one_for_independent_frames_and_the_size_of_groups_that_are_alike() -> None:
    rng = np.random.default_rng(0)
    independent = rng.multinomial(10, [0.1] * 10, 500)
    assert design_effect(independent) == pytest.approx(1, abs=0.06)
    alike = 10 * np.eye(10)[rng.integers(0, 10, 500)]
    assert design_effect(alike) == pytest.approx(10, rel=0.02)
    assert design_effect(np.array([[3.0, 4.0]])) == 7  # one patient is one frame
    assert design_effect(np.array([[3.0, 0.0], [5.0, 0.0]])) == 1  # there is one value alone
    assert replace(FIGURES, flags={}).to_dict()["flags"] == {} and STEPS == 20
