"""``echoquad inspect``: what a bundle is, on a terminal, as JSON and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

HEAVY = {"torch", "onnx", "sklearn", "scipy", "matplotlib", "onnxruntime"}


@pytest.fixture(scope="module")
def ran(exported: tuple[Path, Any], many: Callable[..., Any]) -> dict[str, Any]:
    """Give what each form prints of a real export."""
    lines = {"text": [], "json": ["--json"], "markdown": ["--markdown"], "both": ["--json", "--markdown"]}
    found, modules = many([["inspect", exported[0], *options] for options in lines.values()], env={"COLUMNS": "100"})
    assert modules & HEAVY == set(), "a cart has none of these, and inspecting needs none"
    return dict(zip(lines, found, strict=True))


def test_the_markdown_is_the_bundles_card(ran: dict[str, Any], exported: tuple[Path, Any]) -> None:
    assert (ran["markdown"].code, ran["markdown"].err) == (0, "")
    assert ran["markdown"].out == (exported[0] / "MODEL_CARD.md").read_text("utf-8")


def test_the_text_has_all_of_the_card_and_the_files(ran: dict[str, Any], exported: tuple[Path, Any]) -> None:
    text = ran["text"]
    assert (text.code, text.err) == (0, "")
    lines = text.out.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0] == "Model card: ASD, NORM from echo frames, by quadrants"
    titles = [line for line, rule in pairwise(lines) if rule and set(rule) == {"-"}]
    card = (exported[0] / "MODEL_CARD.md").read_text("utf-8").splitlines()
    assert titles == [*(line[3:] for line in card if line.startswith("## ")), "Files", "Self-tests on this host"]
    begin = lines.index("Intended use") + 2
    assert lines[begin].startswith("Research use only. Not a medical device;")
    words, said = " ".join(ran["markdown"].out.replace("*", "").split()), " ".join(text.out.split())
    for sentence in ("The names are a heuristic", "The smallest decision margin of a frame is", "was not measured"):
        assert sentence in words and sentence in said
    assert [line.split()[0] for line in lines if line.endswith("  whole")] == [
        "MODEL_CARD.md",
        "golden.npz",
        "model.fp32.onnx",
    ]
    assert "not stated" not in said


def test_the_json(ran: dict[str, Any], exported: tuple[Path, Any]) -> None:
    assert (ran["json"].code, ran["json"].err) == (0, "")
    found = json.loads(ran["json"].out)
    manifest = json.loads((exported[0] / "bundle.json").read_text("ascii"))
    assert found["manifest"] == manifest
    assert (found["bundle"], found["whole"], found["signature"]) == (exported[0].as_posix(), True, None)
    assert {file["state"] for file in found["files"].values()} == {"whole"}
    assert manifest["golden"]["source"] == "phantom"
    assert len(manifest["metrics"]["export"]["frame_accuracy"]["ci95"]) == 2


def test_two_forms_at_once(ran: dict[str, Any]) -> None:
    assert (ran["both"].code, ran["both"].out) == (2, "")
    assert ran["both"].errors == ["--json and --markdown: expected one of the two; leave the other out"]


def test_a_bundle_that_is_not_whole_is_shown_and_refused(bundle_copy: Path, many: Callable[..., Any]) -> None:
    (bundle_copy / "golden.npz").unlink()
    (bundle_copy / "MODEL_CARD.md").write_text("another")
    (text, as_json, markdown), _ = many([["inspect", bundle_copy, *o] for o in ([], ["--json"], ["--markdown"])])
    for ran in (text, as_json, markdown):
        assert ran.code == 3
        assert ran.errors[0].startswith("not whole: ")
        assert "golden.npz cannot be read" in ran.errors[0] and "MODEL_CARD.md has" in ran.errors[0]
    assert "CHANGED" in text.out and "MISSING" in text.out
    assert json.loads(as_json.out)["whole"] is False
    assert markdown.out.startswith("# Model card: ")


def test_there_is_nothing_to_inspect(tmp_path: Path, bundle_copy: Path, many: Callable[..., Any]) -> None:
    manifest = bundle_copy / "bundle.json"
    manifest.write_bytes(manifest.read_bytes()[:-9])
    (none, cut), _ = many([["inspect", tmp_path / "none"], ["inspect", bundle_copy, "--json"]])
    assert (none.code, none.out, cut.code, cut.out) == (1, "", 3, "")
    assert "no bundle here" in none.errors[0] and "bundle.json" in cut.errors[0]


def test_a_narrow_terminal_has_a_line_for_each_cell(tiny_bundle: Path, echoquad: Callable[..., Any]) -> None:
    lines = echoquad("inspect", tiny_bundle, env={"COLUMNS": "50"}).out.splitlines()
    assert "largest probability difference: 0.00e+00 (at most" in lines
    assert [line for line in lines if len(line) > 50 and " " in line] == []  # a hash is not broken
