"""``echoquad serve``: page, decision and end of a real process, and its options."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from serving import Serving, get, predict

pytest.importorskip("uvicorn", reason="needs the extra serve")
posix = pytest.mark.skipif(os.name != "posix", reason="Windows has none of these signals")


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return str(probe.getsockname()[1])


@posix
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_service_decides_a_frame_and_ends_in_good_order(
    number: signal.Signals, code: int, started: Any, tiny_bundle: Path, frames_folder: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    serving = Serving(started("serve", tiny_bundle, "--port", free_port(), "--store", store))
    address = serving.address()
    assert "Research use only, not for diagnosis" in serving.lines[-1]
    assert b"<title>EchoQuad</title>" in get(address)
    result = predict(address, frames_folder / "a/0.png")
    assert result["status"] == "done" and result["rows"][0]["pred_image"] in ("ASD", "NORM")
    assert serving.end(number) == (code, ["interrupted"])
    again = Serving(started("serve", tiny_bundle, "--port", free_port(), "--store", store))
    assert json.loads(get(f"{again.address()}api/v1/results"))["results"] == [result]
    again.end(number)


@posix
def test_source_and_shadow_are_those_of_the_configuration(
    started: Any, tiny_bundle: Path, bundle_copy: Path, frames_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("av")
    (tmp_path / "service.toml").write_text('[live]\nsource = "lavfi:none"\nmax_fps = 5\n[http]\nport = 1\n')
    options = ["--config", tmp_path / "service.toml", "--port", free_port(), "--store", tmp_path / "store"]
    source = "lavfi:testsrc=size=160x120:rate=5"
    serving = Serving(started("serve", tiny_bundle, *options, "--source", source, "--shadow", bundle_copy))
    address = serving.address()
    assert json.loads(get(f"{address}api/v1/status"))["live"]["source"] == "lavfi:testsrc"
    predict(address, frames_folder / "a/0.png")
    assert b'echoquad_shadow_frames_total{agreement="same"} 1.0' in get(f"{address}metrics")
    assert serving.end(signal.SIGINT)[0] == 130


def test_bundle_that_is_missing_is_one_line_and_no_page(echoquad: Callable[..., Any], tmp_path: Path) -> None:
    code, message = echoquad("serve", tmp_path / "none", "--port", free_port(), cwd=tmp_path, code=1).error
    assert code == "E_BUNDLE_NOT_FOUND" and "none" in message


def test_packages_that_are_missing_name_the_extra(
    echoquad: Callable[..., Any], tiny_bundle: Path, tmp_path: Path
) -> None:
    hidden = "sys.modules['uvicorn'] = None"
    code, message = echoquad("serve", tiny_bundle, driver=hidden, cwd=tmp_path, code=1).error
    assert code == "E_EXTRA_MISSING" and message.endswith('pip install "echoquad[serve]"')
    assert list(tmp_path.iterdir()) == []


def test_dicom_node_without_its_packages_names_the_extra(
    echoquad: Callable[..., Any], tiny_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "service.toml").write_text("[dicom]\n")
    hidden = "sys.modules |= dict.fromkeys(['pynetdicom', 'pydicom'])"
    options = ["--config", tmp_path / "service.toml", "--port", free_port(), "--store", tmp_path / "store"]
    code, message = echoquad("serve", tiny_bundle, *options, driver=hidden, code=1).error
    assert code == "E_EXTRA_MISSING" and message.endswith('pip install "echoquad[pacs]"')
