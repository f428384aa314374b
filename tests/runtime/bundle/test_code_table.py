"""The code table: what is accepted, and what is refused with the key and the class at fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.code_table import CodeTable, default_codes, read_code_table
from echoquad_runtime.errors import BundleError, ConfigError
from echoquad_runtime.verify.inspection import inspect_bundle

CLASSES = ("ASD", "NORM", "POOR")
ASD = '[class.ASD.finding]\nvalue = "70142008"\nscheme = "SCT"\nmeaning = "Atrial septal defect"\n'


def test_table_survives_toml_and_json(tmp_path: Path) -> None:
    (tmp_path / "codes.toml").write_text(f'absent = "NORM"\n{ASD}', "utf-8")
    table = read_code_table(tmp_path / "codes.toml", CLASSES)
    assert table.uncoded(CLASSES) == ["POOR"] and table.absent == "NORM"
    assert (table.procedure.value, table.language.value) == ("433236007", "en-US")
    assert CodeTable.from_dict(json.loads(json.dumps(table.to_dict())), CLASSES, "json") == table


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("= 1", "not TOML"),
        ("", "at least one class"),
        (f"abset = 'NORM'\n{ASD}", "unknown key 'abset'"),
        (f"absent = 'NORMAL'\n{ASD}", "unknown class 'NORMAL'"),
        (f"absent = 'ASD'\n{ASD}", "absent"),
        (ASD.replace("class.ASD", "class.VSD"), "unknown class 'VSD'"),
        (ASD.replace("70142008", "70142009"), "class.ASD.finding.value"),  # one digit wrong
        (ASD.replace("70142008", "71042008"), "class.ASD.finding.value"),  # two digits swapped
        (ASD.replace('"70142008"', "70142008"), "class.ASD.finding.value"),
        (ASD.replace('"SCT"', '"S C T"'), "class.ASD.finding.scheme"),
        (ASD.replace("Atrial septal defect", "x" * 65), "class.ASD.finding.meaning"),
        (ASD.replace("Atrial septal defect", "a\\\\b"), "class.ASD.finding.meaning"),
        (f"{ASD}[language]\nvalue = 'English'\nscheme = 'RFC5646'\nmeaning = 'English'\n", "language"),
        (f"{ASD}[class.ASD]\nsite = 3\n", "class.ASD.site"),
        (f"{ASD}[class.ASD.site]\nvalue = '58095006'\n", "class.ASD.site.scheme"),
    ],
)
def test_malformed_table_is_one_line_that_names_the_fault(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "codes.toml").write_text(text, "utf-8")
    with pytest.raises(ConfigError) as caught:
        read_code_table(tmp_path / "codes.toml", CLASSES)
    assert words in str(caught.value) and "codes.toml" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_table_is_an_error_of_the_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_code_table(tmp_path / "none.toml", CLASSES)


def test_default_knows_the_class_asd_alone() -> None:
    table = default_codes(("ASD", "NORM"))
    assert table is not None and table.absent == "NORM" and table.uncoded(("ASD", "NORM")) == []
    other = default_codes(("ASD", "VSD"))
    assert other is not None and other.absent == "" and other.uncoded(("ASD", "VSD")) == ["VSD"]
    assert default_codes(("ED", "ES")) is None


def test_bundle_has_the_table_of_its_manifest_and_inspect_shows_it(make_tiny_bundle: Any, tmp_path: Path) -> None:
    table = default_codes(("ASD", "NORM"))
    assert table is not None
    folder = make_tiny_bundle(tmp_path / "coded", manifest={"codes": table.to_dict()})
    assert Bundle(folder).codes == table
    text = inspect_bundle(folder).card.markdown()
    assert "Codes of structured reports" in text and "Atrial septal defect (70142008 SCT)" in text
    plain = make_tiny_bundle(tmp_path / "plain")
    assert Bundle(plain).codes is None and "Codes of" not in inspect_bundle(plain).card.markdown()


def test_malformed_table_of_a_manifest_is_a_bundle_error(make_tiny_bundle: Any, tmp_path: Path) -> None:
    folder = make_tiny_bundle(tmp_path / "bad", manifest={"codes": {"class": {"X": 3}}})
    with pytest.raises(BundleError, match="unknown class"):
        _ = Bundle(folder).codes
    assert "malformed" in inspect_bundle(folder).card.markdown()
