"""Recipes: defaults, TOML files, ``--set`` and the values that are refused."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from echoquad_runtime.errors import ConfigError
from echoquad_train.recipe import SHIPPED, Recipe

REFERENCE = {
    # Values that the reference pipeline states.
    "backbone": "resnet18",
    "weights": "imagenet",
    "dropout": 0.5,
    "input_size": 224,
    "mean": 0.5,
    "std": 0.5,
    "vote": "majority",
    "epochs": 20,
    "batch_size": 32,
    "warmup_epochs": 3,
    "warmup_lr": 3e-4,
    "trained_layers": "layer4",
    "lr": 1e-4,
    "layer3_lr": 5e-5,
    "optimizer": "adamw",
    "weight_decay": 1e-4,
    "schedule": "plateau",
    "plateau_factor": 0.5,
    "plateau_patience": 2,
    "early_stopping_patience": 3,
    "model_epoch": "best",
    "balanced_sampler": True,
    "class_weights": True,
    "label_smoothing": 0.05,
    "crop_scale": (0.5, 1.0),
    "horizontal_flip": 0.5,
    "rotate": 10.0,
    "translate": 0.05,
    "zoom": (0.95, 1.05),
    "shear": 5.0,
    "erase": 0.5,
    # Choices where it gives a range: "85 to 90 %", "optionally", "LV and RV heavier"; torchvision's default ratio.
    "center_crop": 0.9,
    "layer3_epoch": 0,
    "vote_weights": (1.0, 1.0, 1.5, 1.5),
    "crop_ratio": (3 / 4, 4 / 3),
    # Fields that EchoQuad adds.
    "positive": "",
    "mixed_precision": True,
    "distill_weight": 0.7,
    "distill_temperature": 4.0,
    "seed": 0,
}


def refusal(error: pytest.ExceptionInfo[ConfigError]) -> str:
    message = str(error.value)
    assert "\n" not in message and error.value.exit_code == 1
    return message


DISABLED = dict.fromkeys(
    ("gamma", "gain", "attenuation", "shadow", "speckle", "mixup", "ema_decay", "progressive_fraction", "temperature"),
    0.0,
)


def test_transfer_recipe_and_defaults_equal_reference_pipeline() -> None:
    # Temperature scaling changes no quadrant's class.
    others = {"progressive_scale": 0.5, "temperature_scaling": True, "context_padding": False}
    others |= {"quadrant_layout": "reference"}
    assert dataclasses.asdict(Recipe.load("transfer")) == REFERENCE | DISABLED | others
    assert Recipe() == Recipe.load("transfer")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_survives_toml_round_trip(name: str) -> None:
    recipe = Recipe.load(name)
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert recipe.contract(("ASD", "NORM")).input_size == recipe.input_size


def test_configuration_page_lists_every_field() -> None:
    page = Path(__file__).parents[2] / "docs" / "reference" / "configuration.md"
    listed = re.findall(r"^\| `(\w+)` \| `.*` \| `.*` \| `.*` \|", page.read_text("utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(field.name for field in dataclasses.fields(Recipe))


def test_scratch_recipe_needs_no_download() -> None:
    scratch = Recipe.load("scratch")
    assert (scratch.weights, scratch.trained_layers, scratch.warmup_epochs) == ("none", "all", 0)
    assert scratch.schedule == "onecycle" and scratch.early_stopping_patience == 0


def test_last_epoch_refuses_what_looks_at_validation_frames() -> None:
    scratch = Recipe.load("scratch")
    assert (scratch.model_epoch, Recipe.load("transfer").model_epoch) == ("last", "best")
    assert Recipe.from_toml("epochs = 3").model_epoch == "best"  # recipes of earlier runs have no such field
    assert scratch.replace(schedule="constant").model_epoch == "last"
    with pytest.raises(ConfigError, match="early_stopping_patience is 3; expected 0 with model_epoch"):
        scratch.replace(early_stopping_patience=3)
    with pytest.raises(ConfigError, match="schedule is 'plateau'; expected onecycle or constant with model_epoch"):
        scratch.replace(schedule="plateau")
    assert scratch.replace(early_stopping_patience=3, model_epoch="best").early_stopping_patience == 3


@given(
    text=st.text(st.characters(codec="utf-8")),
    lr=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    seed=st.integers(0, 2**63 - 1),
    flag=st.booleans(),
)
def test_any_value_survives_toml_round_trip(text: str, lr: float, seed: int, flag: bool) -> None:
    recipe = Recipe(weights=text, positive=text, lr=lr, seed=seed, class_weights=flag, zoom=(0.1, 7))
    assert Recipe.from_toml(recipe.to_toml()) == recipe


def test_recipe_file_may_have_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    for text in ("epochs = 3\n", "\ufeffepochs = 3\r\n"):
        path.write_bytes(text.encode())
        assert Recipe.load(str(path)) == Recipe(epochs=3)


def test_recipe_file_with_former_field_names_is_accepted() -> None:
    former = "keep = 0.8\nneighbours = true\nsmall_share = 0.5\nsmall_scale = 0.25\nweight_average = 0.9\n"
    former += "stop_patience = 7\nflip = 0.1\ncalibrate = false\n"
    assert Recipe.from_toml(former) == Recipe(
        center_crop=0.8,
        context_padding=True,
        progressive_fraction=0.5,
        progressive_scale=0.25,
        ema_decay=0.9,
        early_stopping_patience=7,
        horizontal_flip=0.1,
        temperature_scaling=False,
    )
    with pytest.raises(ConfigError, match="unknown name keep"):
        Recipe.from_toml("keep = 0.8\ncenter_crop = 0.9\n")


@pytest.mark.parametrize(
    ("setting", "field", "value"),
    [
        ("horizontal_flip=0", "horizontal_flip", 0.0),
        ("lr=1e-3", "lr", 1e-3),
        (" lr = 0.5 ", "lr", 0.5),
        ("epochs=7", "epochs", 7),
        ("class_weights=false", "class_weights", False),
        ("zoom=[1, 1.5]", "zoom", (1.0, 1.5)),
        ("vote_weights=[1,2,3,4]", "vote_weights", (1.0, 2.0, 3.0, 4.0)),
        ("schedule=onecycle", "schedule", "onecycle"),
        ("schedule='onecycle'", "schedule", "onecycle"),
        ('weights="a file.pt"', "weights", "a file.pt"),
        (r"weights=C:\models\best.safetensors", "weights", r"C:\models\best.safetensors"),
        ("weights=runs/a=b/best.safetensors", "weights", "runs/a=b/best.safetensors"),
        ("positive=ÄSD", "positive", "ÄSD"),
        ("positive=", "positive", ""),
    ],
)
def test_set_parses_value_as_toml_or_bare_word(setting: str, field: str, value: object) -> None:
    assert Recipe().replace([setting]) == dataclasses.replace(Recipe(), **{field: value})


def test_set_overrides_options_and_last_value_wins() -> None:
    assert Recipe().replace(["epochs=4", "epochs=5"], epochs=3, seed=9) == Recipe(epochs=5, seed=9)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("epochs", "--set epochs: no '=' found; expected name=value"),
        ("epoch=3", "--set: unknown name epoch; expected some of backbone, "),
        ("keep=0.8", "--set: unknown name keep; expected some of backbone, "),
        ("=3", "--set: unknown name "),
        ("epochs=many", "epochs is 'many'; expected an integer"),
        ("epochs=3.0", "epochs is 3.0; expected an integer"),
        ("epochs=true", "epochs is True; expected an integer"),
        ("lr=true", "lr is True; expected a number"),
        ("lr=high", "lr is 'high'; expected a number"),
        ("class_weights=1", "class_weights is 1; expected true or false"),
        ("weights=1", "weights is 1; expected a string"),
        ("schedule=cosine", "schedule is 'cosine'; expected one of plateau, onecycle, constant"),
        ("schedule=1", "schedule is 1; expected one of plateau"),
        ("zoom=1", "zoom is 1; expected a list of 2 numbers"),
        ("zoom=[1]", "expected a list of 2 numbers"),
        ("zoom=['a', 1]", "zoom is 'a'; expected a number"),
        ("vote_weights=[1,1,1]", "expected a list of 4 numbers"),
    ],
)
def test_set_refuses_unknown_names_and_wrong_types(setting: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        Recipe().replace([setting])
    assert words in refusal(error)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("batch_size", 1),  # batch normalisation has nothing to average over
        ("warmup_epochs", -1),
        ("layer3_epoch", -1),
        ("plateau_patience", -1),
        ("early_stopping_patience", -2),
        ("seed", -1),
        ("seed", 2**63),
        ("lr", 0),
        ("lr", math.inf),
        ("lr", math.nan),
        ("warmup_lr", -1e-3),
        ("layer3_lr", 0),
        ("plateau_factor", 1.0),
        ("plateau_factor", 0),
        ("weight_decay", -1),
        ("weight_decay", math.nan),
        ("dropout", 1),
        ("label_smoothing", -0.1),
        ("horizontal_flip", 1.01),
        ("erase", -0.01),
        ("distill_weight", 1.01),
        ("distill_weight", -0.01),
        ("distill_temperature", 0),
        ("distill_temperature", -4),
        ("erase", math.nan),
        ("rotate", -10),
        ("rotate", math.inf),
        ("translate", -0.1),
        ("shear", 90),
        ("zoom", (1.05, 0.95)),
        ("zoom", (0, 1)),
        ("zoom", (0.5, math.inf)),
        ("crop_scale", (0.5, 1.2)),
        ("crop_ratio", (-1, 1)),
        ("vote", "loudest"),
        ("trained_layers", "layer2"),
        ("optimizer", "lion"),
        ("input_size", 4),
        ("input_size", 5000),
        ("center_crop", 0),
        ("center_crop", 1.1),
        ("std", 0),
        ("mean", math.nan),
        ("vote_weights", (0, 0, 0, 0)),
        ("vote_weights", (1, 1, 1, -1)),
    ],
)
def test_out_of_range_value_is_refused(field: str, value: object) -> None:
    with pytest.raises(ConfigError) as error:
        Recipe(**{field: value})  # type: ignore[arg-type]
    message = refusal(error)
    assert message.startswith(f"recipe: {field} ") and "; expected " in message


def test_bad_recipe_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    for text, words in (
        ("epochs = ", "mine.toml: not TOML"),
        ("epoch = 3\nlearning_rate = 1", "mine.toml: unknown name epoch, learning_rate; expected some of"),
        ("[recipe]\nepochs = 3", "unknown name recipe"),
        ("epochs = 1979-05-27", "epochs is datetime.date"),
        ("epochs = [1]", "epochs is [1]"),
    ):
        path.write_text(text, "utf-8")
        with pytest.raises(ConfigError) as error:
            Recipe.load(str(path))
        assert words in refusal(error)
    path.write_bytes(b"weights = '\xff'")
    for name in (str(path), str(tmp_path), str(tmp_path / "none.toml"), "transfr", ""):
        with pytest.raises(ConfigError, match=r"none of transfer, scratch, lite, and no readable TOML file \("):
            Recipe.load(name)


HOSTILE = {
    "deep list": b"lr = " + b"[" * 100_000,
    "deep table": b"a={" * 3000,
    "thousands of digits": b"epochs = " + b"9" * 5000,
    "beyond a float": b"lr = " + b"9" * 400,
    "hexadecimal": b"seed = 0x" + b"f" * 10_000,
    "long text": b'vote = "' + b"x" * 100_000 + b'"',
    "long name": b"x" * 100_000 + b" = 1",
    "list for a name": b"optimizer = [1]",
    "table for a name": b"optimizer = {a = 1}",
    "date": b"schedule = 2020-01-01",
    "twice": b"epochs = 1\nepochs = 2",
    "not a number": b"lr = nan",
    "not UTF-8": b"\xff\xfe",
    "null": b"\0",
    "large": b"#" * (1 << 21),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_malformed_recipe_is_one_short_line(case: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(HOSTILE[case])
    with pytest.raises(ConfigError) as error:
        Recipe.load(str(path))
    assert "\n" not in str(error.value) and len(str(error.value)) < 2500


@pytest.mark.parametrize("name", ["a\0b", "\udcff", ""])
def test_name_that_is_no_path_is_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        Recipe.load(name)


@given(st.binary(max_size=60))
def test_any_bytes_in_a_shipped_recipe_are_read_or_refused(data: bytes) -> None:
    text = Recipe().to_toml().encode()
    for place in (0, len(text) // 3, len(text)):
        changed = (text[:place] + data + text[place:]).decode("utf-8", "replace")
        with contextlib.suppress(ConfigError):
            Recipe.from_toml(changed)


def test_quadrant_layout_reaches_the_contract() -> None:
    assert Recipe().contract(("A", "B")).quadrants == ("LA", "RA", "LV", "RV")
    for text in ("apex-up", "RV,LV,RA,LA", "rv, lv, ra, la"):
        recipe = Recipe().replace([f"quadrant_layout={text}"])
        assert recipe.quadrant_layout == "apex-up"  # one spelling, so that a run resumes with either
        assert recipe.contract(("A", "B")).quadrants == ("RV", "LV", "RA", "LA")
        assert Recipe.from_toml(recipe.to_toml()) == recipe
    old = "".join(line for line in Recipe().to_toml().splitlines(True) if "quadrant_layout" not in line)
    assert Recipe.from_toml(old) == Recipe()


@pytest.mark.parametrize("value", ["apex", "LA,RA,LV", "LA,LA,LV,RV", ""])
def test_unknown_quadrant_layout_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="recipe: quadrant_layout is"):
        Recipe(quadrant_layout=value)
