"""Export with a code table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from echoquad_export.packing import exporter
from echoquad_export.packing.exporter import export_run
from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.errors import ConfigError

TABLE = '[class."{}".finding]\nvalue = "{}"\nscheme = "SCT"\nmeaning = "A finding"\n'


def test_export_puts_the_table_into_the_manifest(
    few_golden: None, case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thin: None
) -> None:
    graph = (case.bundle / "model.fp32.onnx").read_bytes()
    monkeypatch.setattr(exporter, "build_graph", lambda *_: graph)  # building takes seconds
    name = Bundle(case.bundle).contract.classes[0]
    (tmp_path / "codes.toml").write_text(TABLE.format(name, "70142008"), "utf-8")
    export_run(case.run, tmp_path / "out", codes=tmp_path / "codes.toml")
    codes = Bundle(tmp_path / "out").codes
    assert codes is not None and codes.classes[name].finding.value == "70142008"
    assert "A finding (70142008 SCT)" in (tmp_path / "out" / "MODEL_CARD.md").read_text("utf-8")
    export_run(case.run, tmp_path / "plain")
    assert "codes" not in json.loads((tmp_path / "plain" / "bundle.json").read_bytes())
    assert "Codes of" not in (tmp_path / "plain" / "MODEL_CARD.md").read_text("utf-8")


@pytest.mark.parametrize(("name", "value"), [("unheard-of", "70142008"), ("", "70142009")])
def test_invalid_table_stops_before_the_export(case: Any, tmp_path: Path, name: str, value: str, thin: None) -> None:
    name = name or Bundle(case.bundle).contract.classes[0]
    (tmp_path / "codes.toml").write_text(TABLE.format(name, value), "utf-8")
    steps: list[str] = []
    with pytest.raises(ConfigError, match=r"codes\.toml"):
        export_run(case.run, tmp_path / "out", codes=tmp_path / "codes.toml", progress=steps.append)
    assert steps == ["reading the run"] and not (tmp_path / "out").exists()
