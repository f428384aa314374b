"""``echoquad demo``: every step on phantoms, and folders that it must not replace."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from serving import Serving, get, predict

serves = pytest.mark.skipif(os.name != "posix", reason="Windows has none of these signals")


def test_demo_refuses_a_folder_that_is_not_a_demo(many: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("torch")
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "thesis.tex").write_text("years of work")
    file.write_text("text")
    found, modules = many([["demo", "--out", full], ["demo", "--out", file]])
    for place, ran in zip((full, file), found, strict=True):
        assert (ran.code, ran.out) == (1, "")
        code, message = ran.error
        assert code == "E_OUTPUT" and message.startswith(f"{place.as_posix()}: ") and "--out" in message
    assert (full / "thesis.tex").read_text() == "years of work"
    assert [path.name for path in full.iterdir()] == ["thesis.tex"]
    assert "torch" not in modules


@pytest.mark.slow
def test_demo_runs_every_step_and_replaces_an_older_demo(
    echoquad: Callable[..., Any], left_in: Any, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    out = tmp_path / "demo"
    for _ in range(2):
        ran = echoquad("demo", "--out", out, "--patients", "10", "--epochs", "1")
        steps = [line.split()[2] for line in ran.err.splitlines() if line.startswith("$ echoquad ")]
        assert steps == ["data", "train", "evaluate", "export", "verify", "predict", "bench"]
        assert "PASS " in ran.out
        shown = [line.strip() for line in ran.err.partition("What to look at:")[2].splitlines()]
        for path in ("data/", "run/curves.png", "evaluation/report.html", "bundle/MODEL_CARD.md", "bench.json"):
            assert f"{out.as_posix()}/{path}" in shown
            assert (out / path).exists()
        overlays = [Path(line) for line in shown if line.endswith(".overlay.png")]
        assert len(overlays) == 1
        assert overlays[0].is_file()
        frames = json.loads((out / "evaluation" / "metrics.json").read_text("utf-8"))["frames"]
        assert len((out / "predictions.csv").read_text("utf-8").splitlines()) == frames + 1
        assert left_in(out) == [".echoquad-demo"]
        assert "Research use only." in ran.err


@pytest.fixture
def made(tiny_bundle: Path, tmp_path: Path) -> Path:
    """Return the folder of an earlier demo, of which only the bundle is left."""
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    out = tmp_path / "demo"
    shutil.copytree(tiny_bundle, out / "bundle")
    (out / ".echoquad-demo").touch()
    return out


@pytest.fixture
def browser(tmp_path: Path) -> tuple[dict[str, str], Path]:
    """Return an environment whose browser is a script, and the file in which it notes what it opens."""
    script, opened = tmp_path / "browser", tmp_path / "opened"
    script.write_text(f'#!/bin/sh\necho "$1" > {opened}.partial\nmv {opened}.partial {opened}\n')
    script.chmod(0o755)
    return {**os.environ, "PYTHONUTF8": "1", "BROWSER": f"{script} %s"}, opened


def wait_for(path: Path) -> str:
    for _ in range(3000):
        if path.exists():
            return path.read_text().strip()
        time.sleep(0.02)
    raise AssertionError(f"there is no {path}")


@serves
def test_demo_serves_an_earlier_bundle_at_once_and_opens_its_page(
    started: Any, made: Path, browser: tuple[dict[str, str], Path], frames_folder: Path
) -> None:
    variables, opened = browser
    serving = Serving(started("demo", "--serve", "--out", made, env=variables))
    address = serving.address()
    assert not [line for line in serving.lines if line.startswith("$ echoquad ") and " serve " not in line]
    assert b"<title>EchoQuad</title>" in get(address)
    assert predict(address, frames_folder / "a/0.png")["status"] == "done"
    assert wait_for(opened) == address
    code, rest = serving.end(signal.SIGINT)
    assert code == 130 and rest[-1] == "interrupted"
    assert "Research use only" in "".join(rest)
    assert {path.name for path in made.iterdir()} == {".echoquad-demo", "bundle", "service"}


@serves
def test_demo_takes_a_free_port_and_opens_nothing_unless_it_may(
    started: Any, made: Path, browser: tuple[dict[str, str], Path]
) -> None:
    variables, opened = browser
    try:
        taken = socket.create_server(("127.0.0.1", 8770))
    except OSError:  # somebody else has it, which is as good
        taken = socket.socket()
    with taken:
        serving = Serving(started("demo", "--serve", "--no-open", "--out", made, env=variables))
        address = serving.address()
        assert not address.endswith(":8770/")
        assert json.loads(get(f"{address}api/v1/ready"))["ready"]
        assert serving.end(signal.SIGTERM)[0] == 143
    assert not opened.exists()


def test_demo_does_not_serve_a_damaged_bundle(made: Path, echoquad: Callable[..., Any]) -> None:
    model = made / "bundle" / "model.fp32.onnx"
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    ran = echoquad("demo", "--serve", "--out", made, driver="sys.modules['torch'] = None", code=1)
    assert "a new bundle is made" in ran.err
    assert ran.error[0] == "E_EXTRA_MISSING" and 'pip install "echoquad[export]"' in ran.err


def test_demo_does_not_serve_a_bundle_that_is_not_its_own(made: Path, many: Callable[..., Any]) -> None:
    pytest.importorskip("torch")
    (made / ".echoquad-demo").unlink()
    (ran,), _ = many([["demo", "--serve", "--out", made]])
    assert ran.error[0] == "E_OUTPUT" and (made / "bundle" / "bundle.json").is_file()


@pytest.mark.slow
@serves
def test_demo_makes_a_bundle_and_serves_it(started: Any, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    out = tmp_path / "demo"
    serving = Serving(started("demo", "--serve", "--no-open", "--out", out, "--patients", "10", "--epochs", "1"))
    address = serving.address()
    steps = [line.split()[2] for line in serving.lines if line.startswith("$ echoquad ")]
    assert steps == ["data", "train", "export", "serve"]
    result = predict(address, next((out / "data" / "test").rglob("*.png")))
    assert result["status"] == "done"
    assert serving.end(signal.SIGINT)[0] == 130
