"""``echoquad inspect``: a bundle as text, JSON and Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

HEAVY = {"torch", "onnx", "sklearn", "scipy", "matplotlib", "onnxruntime"}


@pytest.fixture(scope="module")
def ran(exported: tuple[Path, Any], many: Callable[..., Any]) -> dict[str, Any]:
    """Return what each form prints for an exported bundle."""
    lines = {"text": [], "json": ["--json"], "markdown": ["--markdown"], "both": ["--json", "--markdown"]}
    found, modules = many([["inspect", exported[0], *options] for options in lines.values()], env={"COLUMNS": "100"})
    assert modules & HEAVY == set(), "a cart has none of these"
    return dict(zip(lines, found, strict=True))


def test_markdown_is_the_model_card(ran: dict[str, Any], exported: tuple[Path, Any]) -> None:
    assert (ran["markdown"].code, ran["markdown"].err) == (0, "")
    assert ran["markdown"].out == (exported[0] / "MODEL_CARD.md").read_text("utf-8")


def test_text_has_every_section_of_the_card_and_the_files(ran: dict[str, Any], exported: tuple[Path, Any]) -> None:
    text = ran["text"]
    assert (text.code, text.err) == (0, "")
    lines = text.out.splitlines()
    assert max(map(len, lines)) <= 100
    card = (exported[0] / "MODEL_CARD.md").read_text("utf-8").splitlines()
    assert f"# {lines[0]}" == card[0]
    titles = [line for line, rule in pairwise(lines) if rule and set(rule) == {"-"}]
    assert titles == [*(line[3:] for line in card if line.startswith("## ")), "Files", "Self-tests on this host"]
    begin = lines.index("Intended use") + 2
    assert lines[begin].startswith("Research use only.")
    # Every sentence of the card is in the text, whatever its line breaks.
    text_words = " ".join(text.out.split())
    for line in card:
        for sentence in line.lstrip("#-> ").split(". ") if not line.startswith("|") else ():
            assert " ".join(sentence.replace("*", "").replace("`", "").split()) in text_words.replace("`", "")
    files = text.out[text.out.index("\nFiles\n") :]
    assert [name for name in ("MODEL_CARD.md", "golden.npz", "model.fp32.onnx") if name not in files] == []
    assert "not stated" not in text_words


def test_json_has_the_manifest_and_the_state_of_each_file(ran: dict[str, Any], exported: tuple[Path, Any]) -> None:
    assert (ran["json"].code, ran["json"].err) == (0, "")
    found = json.loads(ran["json"].out)
    manifest = json.loads((exported[0] / "bundle.json").read_text("ascii"))
    assert found["manifest"] == manifest
    assert (found["bundle"], found["whole"], found["signature"]) == (exported[0].as_posix(), True, None)
    assert {file["state"] for file in found["files"].values()} == {"whole"}
    assert manifest["golden"]["source"] == "phantom"
    assert len(manifest["metrics"]["export"]["frame_accuracy"]["ci95"]) == 2


def test_json_and_markdown_exclude_each_other(ran: dict[str, Any]) -> None:
    assert (ran["both"].code, ran["both"].out) == (2, "")
    code, message = ran["both"].error
    assert code == "E_USAGE" and message.startswith("--json with --markdown: ")


def test_damaged_bundle_is_shown_and_exits_3(bundle_copy: Path, many: Callable[..., Any]) -> None:
    (bundle_copy / "golden.npz").unlink()
    (bundle_copy / "MODEL_CARD.md").write_text("another")
    (text, as_json, markdown), _ = many([["inspect", bundle_copy, *o] for o in ([], ["--json"], ["--markdown"])])
    for ran in (text, as_json, markdown):
        assert (ran.code, ran.error[0]) == (3, "E_VERIFICATION")
        assert "golden.npz" in ran.errors[0] and "MODEL_CARD.md" in ran.errors[0]
    assert "CHANGED" in text.out and "MISSING" in text.out
    assert json.loads(as_json.out)["whole"] is False
    assert markdown.out.startswith("# Model card: ")


def test_missing_or_cut_manifest_is_refused(tmp_path: Path, bundle_copy: Path, many: Callable[..., Any]) -> None:
    manifest = bundle_copy / "bundle.json"
    manifest.write_bytes(manifest.read_bytes()[:-9])
    (none, cut), _ = many([["inspect", tmp_path / "none"], ["inspect", bundle_copy, "--json"]])
    assert (none.code, none.out, none.error[0]) == (1, "", "E_BUNDLE_NOT_FOUND")
    assert (cut.code, cut.out) == (3, "") and "bundle.json" in cut.errors[0]


def test_narrow_terminal_has_one_line_for_each_cell(tiny_bundle: Path, echoquad: Callable[..., Any]) -> None:
    lines = echoquad("inspect", tiny_bundle, env={"COLUMNS": "50"}).out.splitlines()
    assert [line for line in lines if line.startswith("largest probability difference: 0.00e+00")] != []
    assert [line for line in lines if len(line) > 50 and " " in line] == []  # hashes are not broken


@pytest.mark.parametrize("options", [(), ("--markdown",), ("--json",)])
def test_control_characters_of_a_bundle_are_escaped(
    options: tuple[str, ...], make_tiny_bundle: Callable[..., Path], echoquad: Callable[..., Any], tmp_path: Path
) -> None:
    hostile = "\x1b]0;title\x07\x9b2J\u202egpj.\u2066\r"
    bundle = make_tiny_bundle(
        tmp_path / "bundle",
        classes=(f"A{hostile}\nforged", "B"),
        manifest={"training": {"backbone": hostile, "seed": 7}, "versions": {"onnxruntime": hostile}},
    )
    ran = echoquad("inspect", bundle, *options, env={"COLUMNS": "100"})
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]", ran.out)
    assert "\nforged" not in ran.out
