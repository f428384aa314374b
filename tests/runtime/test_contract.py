"""The contract: canonical JSON and hash, defaults, round trip, and refusal of invalid values."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from echoquad_runtime.contract import (
    MAX_INPUT_SIZE,
    QUADRANT_LAYOUTS,
    QUADRANTS,
    VOTE_METHODS,
    Contract,
    canonical_json,
    describe_layout,
    layout_name,
    parse_layout,
)
from echoquad_runtime.errors import ConfigError, ContractError

CONTRACT = Contract(classes=("ASD", "NORM"), keep=0.85, mean=0.5, std=0.25, temperature=1.5)
GOLDEN_JSON = (
    '{"classes":["ASD","NORM"],"input_size":224,"interpolation":"bilinear","keep":0.85,"mean":0.5,"positive":"ASD",'
    '"quadrants":["LA","RA","LV","RV"],"schema":1,"std":0.25,"temperature":1.5,"vote":"majority",'
    '"vote_weights":[1.0,1.0,1.5,1.5]}'
)
GOLDEN_SHA256 = "5bb54d0d7e81b7dff0023ad0c211d583b4896279c82733b2378a4b898a7bf656"

finite = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
contracts = st.builds(
    lambda classes, pick, **rest: Contract(classes=tuple(sorted(classes)), positive=sorted(classes)[pick], **rest),
    classes=st.sets(st.text(min_size=1, max_size=6), min_size=2, max_size=5),
    pick=st.integers(0, 1),
    keep=st.floats(min_value=0, max_value=1, exclude_min=True),
    input_size=st.integers(8, MAX_INPUT_SIZE),
    mean=finite,
    std=positive,
    vote=st.sampled_from(VOTE_METHODS),
    vote_weights=st.tuples(*[st.floats(0, 100)] * 4).filter(lambda weights: sum(weights) > 0),
    temperature=positive,
    quadrants=st.permutations(QUADRANTS).map(tuple),
)


def test_canonical_json_and_hash_are_fixed() -> None:
    # Released bundles carry this hash: changing it needs a new schema.
    assert CONTRACT.to_json() == GOLDEN_JSON
    assert CONTRACT.sha256 == hashlib.sha256(GOLDEN_JSON.encode()).hexdigest() == GOLDEN_SHA256


def test_canonical_json_is_ascii_sorted_and_finite() -> None:
    assert canonical_json({"b": [1, 0.1], "a": "é"}) == '{"a":"\\u00e9","b":[1,0.1]}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))


def test_contract_is_frozen_and_hashable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        CONTRACT.keep = 1.0  # type: ignore[misc]
    assert hash(CONTRACT) == hash(Contract.from_json(GOLDEN_JSON))


def test_defaults() -> None:
    contract = Contract(classes=("A", "B", "C"))
    assert (contract.positive, contract.positive_index) == ("A", 0)
    assert contract.quadrants == QUADRANTS == ("LA", "RA", "LV", "RV")
    assert (contract.keep, contract.input_size, contract.vote) == (0.9, 224, "majority")
    assert dataclasses.replace(contract, positive="C").positive_index == 2


@given(contracts)
def test_json_round_trip_keeps_contract_and_hash(contract: Contract) -> None:
    text = contract.to_json()
    again = Contract.from_json(text)
    assert again == contract
    assert (again.sha256, again.to_json()) == (contract.sha256, text)
    assert Contract.from_dict(json.loads(json.dumps(contract.to_dict()))) == contract


@given(contracts, contracts, st.data())
@settings(max_examples=100)
def test_hashes_are_equal_exactly_if_contracts_are(first: Contract, second: Contract, data: st.DataObject) -> None:
    name = data.draw(
        st.sampled_from(["keep", "mean", "std", "temperature", "vote", "vote_weights", "input_size", "quadrants"])
    )
    mixed = dataclasses.replace(first, **{name: getattr(second, name)})
    assert (mixed.sha256 == first.sha256) == (mixed == first)
    assert (second.sha256 == first.sha256) == (second == first)


@pytest.mark.parametrize(
    ("one", "other"),
    [({"keep": 1}, {"keep": 1.0}), ({"mean": 0.0}, {"mean": -0.0}), ({"vote_weights": [1, 1, 2, 2]}, {})],
)
def test_equal_numbers_of_other_types_give_the_same_contract(one: dict[str, Any], other: dict[str, Any]) -> None:
    first = Contract(("A", "B"), **one)
    second = Contract(("A", "B"), **(other or {"vote_weights": (1.0, 1.0, 2.0, 2.0)}))
    assert first == second
    assert first.sha256 == second.sha256


NUMBERS = [float("nan"), float("inf"), float("-inf"), "0.5", None, True, [0.5], 10**400]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            ("classes", value)
            for value in ((), ("A",), ("B", "A"), ("A", "A"), ("", "A"), ("A", 1), "AB", None, {"A": 1})
        ),
        *(("classes", value) for value in ((None, "A"), (["A"], ["B"]), 5)),
        *(("positive", value) for value in ("C", "a", 0, None, False, [])),
        *((name, value) for name in ("keep", "mean", "std", "temperature") for value in NUMBERS),
        *(("keep", value) for value in (0, -0.1, 1.0001)),
        *(("input_size", value) for value in (7, MAX_INPUT_SIZE + 1, 224.0, "224", True, None, -224)),
        *((name, value) for name in ("std", "temperature") for value in (0, -0.0, -1)),
        *(("vote", value) for value in ("", "plurality", None, 1, ["majority"])),
        *(("vote_weights", value) for value in ((1, 1, 1), (1,) * 5, (0,) * 4, (1, 1, 1, -1), (1, 1, 1, float("nan")))),
        *(("vote_weights", value) for value in ("1111", None, ("1",) * 4, 4)),
        *(("interpolation", value) for value in ("bicubic", None)),
        *(("quadrants", value) for value in (("LA", "LA", "LV", "RV"), ("LA", "RA", "LV"), (*QUADRANTS, "LA"))),
        *(("quadrants", value) for value in ((), "LARALVRV", None, ("la", "ra", "lv", "rv"), (1, 2, 3, 4))),
        *(("schema", value) for value in (0, 2, "1", None, True, 1.0)),
    ],
)
def test_invalid_value_is_refused_in_one_line(name: str, value: object) -> None:
    values = {**CONTRACT.to_dict(), name: value}
    with pytest.raises(ContractError, match=f"contract: {name} (is|has) .*; expected ") as caught:
        Contract.from_dict(values)
    assert "\n" not in str(caught.value)
    with pytest.raises(ContractError):
        Contract(**values)


@pytest.mark.parametrize(
    "name", [field.name for field in dataclasses.fields(Contract) if field.name != "frame_temperature"]
)
def test_missing_field_is_named(name: str) -> None:
    values = CONTRACT.to_dict()
    del values[name]
    with pytest.raises(ContractError, match=rf"\b{name};"):
        Contract.from_dict(values)


def test_frame_temperature_of_1_is_omitted_from_json() -> None:
    assert "frame_temperature" not in CONTRACT.to_dict()
    assert Contract.from_dict(CONTRACT.to_dict()).frame_temperature == 1
    sharper = dataclasses.replace(CONTRACT, frame_temperature=0.25)
    assert Contract.from_json(sharper.to_json()) == sharper and sharper.sha256 != CONTRACT.sha256
    with pytest.raises(ContractError, match=r"frame_temperature is 0\.0;"):
        dataclasses.replace(CONTRACT, frame_temperature=0)


def test_class_named_indeterminate_is_refused() -> None:
    with pytest.raises(ContractError, match="INDETERMINATE"):
        Contract(("ASD", "INDETERMINATE"))


def test_unknown_fields_are_named() -> None:
    values = {**CONTRACT.to_dict(), "flip": True, "augment": 1}
    del values["keep"]
    with pytest.raises(ContractError, match=r"\bkeep\b.*\baugment, flip;"):
        Contract.from_dict(values)


@pytest.mark.parametrize(
    "text",
    ["", "{", "nonsense", "null", "[]", "3", '"text"', "[" * 100_000, GOLDEN_JSON.replace("0.85", "NaN"), "\ud800"],
    ids=["empty", "cut", "word", "null", "list", "number", "string", "deep", "nan", "surrogate"],
)
def test_text_without_contract_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ContractError) as caught:
        Contract.from_json(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["classes", "vote_weights", "positive", "interpolation", "keep", "schema", "vote"])
@pytest.mark.parametrize("value", ["9" * 9999, 10**4000, ["9" * 9999, "9"], [10**4000] * 4], ids=type)
def test_long_invalid_value_is_abbreviated(name: str, value: object) -> None:
    with pytest.raises(ContractError) as caught:
        Contract.from_dict({**CONTRACT.to_dict(), name: value})
    assert len(str(caught.value)) < 400


# ---------------------------------------------------------------------------------------------- quadrant layout


def test_reference_layout_keeps_the_hash_and_others_change_it() -> None:
    assert dataclasses.replace(CONTRACT, quadrants=parse_layout("reference")).sha256 == GOLDEN_SHA256
    apex_up = dataclasses.replace(CONTRACT, quadrants=parse_layout("apex-up"))
    assert '"quadrants":["RV","LV","RA","LA"]' in apex_up.to_json()
    assert (apex_up.quadrant_layout, CONTRACT.quadrant_layout) == ("apex-up", "reference")
    assert apex_up.sha256 != GOLDEN_SHA256 and apex_up != CONTRACT


def test_apex_up_has_the_ventricles_above_and_the_left_heart_at_the_right() -> None:
    top_left, top_right, bottom_left, bottom_right = QUADRANT_LAYOUTS["apex-up"]
    assert (top_left, top_right, bottom_left, bottom_right) == ("RV", "LV", "RA", "LA")


@given(st.permutations(QUADRANTS))
def test_every_layout_has_a_name_that_is_read_back(names: list[str]) -> None:
    assert parse_layout(layout_name(names)) == tuple(names)
    assert parse_layout(" , ".join(names).lower()) == tuple(names)


@pytest.mark.parametrize("text", ["", "apex", "LA", "LA,RA,LV", "LA,LA,LV,RV", "LA,RA,LV,RV,", "LA RA LV RV"])
def test_unknown_layout_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="apex-up") as error:
        parse_layout(text)
    assert "\n" not in str(error.value)


def test_layout_is_described_by_position() -> None:
    assert describe_layout(("RV", "LV", "RA", "LA")) == (
        "apex-up (RV top left, LV top right, RA bottom left, LA bottom right)"
    )
