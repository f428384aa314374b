"""Missing optional packages: each command names the extra that installs them, before it writes anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HIDDEN = (
    "sys.modules |= dict.fromkeys(['torch', 'torchvision', 'onnx', 'onnxscript', 'sklearn', 'matplotlib', 'uvicorn'])"
)


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        (["train", "DATA", "--out", "x"], "train"),
        (["evaluate", "DATA", "DATA", "--out", "x"], "train"),
        (["ensemble", "DATA", "--out", "x"], "train"),
        (["data", "split", "DATA", "--out", "x"], "train"),
        (["export", ".", "--out", "x"], "export"),
        (["demo", "--out", "x"], "export"),
        (["demo", "--serve", "--out", "x"], "serve"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_command_without_its_packages_names_the_extra(
    command: list[str], extra: str, data: Path, echoquad: Callable[..., Any], tmp_path: Path
) -> None:
    words = [str(data) if word == "DATA" else word for word in command]
    code, message = echoquad(*words, code=1, driver=HIDDEN, cwd=tmp_path).error
    assert code == "E_EXTRA_MISSING" and message.endswith(f'pip install "echoquad[{extra}]"')
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_has_an_extra_of_its_own(data: Path, echoquad: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("torch")
    hidden = "sys.modules['tensorboard'] = None"
    ran = echoquad("train", data, "--out", tmp_path / "x", "--tensorboard", code=1, driver=hidden)
    assert ran.error[0] == "E_EXTRA_MISSING" and 'pip install "echoquad[tensorboard]"' in ran.errors[0]
    assert list(tmp_path.iterdir()) == []
