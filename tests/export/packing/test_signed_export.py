"""Export with a signature."""

from __future__ import annotations

import base64
import importlib
import json
from importlib import util
from pathlib import Path
from typing import Any

import pytest

from echoquad_export.packing import exporter
from echoquad_export.packing.exporter import export_run
from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.manifest import SIGNATURE
from echoquad_runtime.errors import ConfigError, SignatureError

if util.find_spec("model_signing") is None:
    pytest.skip("the extra sign is not installed", allow_module_level=True)


def key_pair(folder: Path) -> tuple[Path, Path]:
    ec = importlib.import_module("cryptography.hazmat.primitives.asymmetric.ec")
    form = importlib.import_module("cryptography.hazmat.primitives.serialization")
    key, private, public = ec.generate_private_key(ec.SECP256R1()), folder / "key.pem", folder / "pub.pem"
    private.write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()))
    pem = form.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(form.Encoding.PEM, pem))
    return private, public


def test_export_signs_the_bundle_before_moving_it_into_place(
    few_golden: None, case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, thin: None
) -> None:
    graph = (case.bundle / "model.fp32.onnx").read_bytes()
    monkeypatch.setattr(exporter, "build_graph", lambda *_: graph)  # building takes seconds
    private, public = key_pair(tmp_path)
    out, steps = tmp_path / "signed bundle", []
    export_run(case.run, out, sign_key=private, progress=steps.append)
    assert steps[-1] == "signing the bundle"
    assert Bundle(out, public_key=public).signed_by is not None
    payload = base64.b64decode(json.loads((out / SIGNATURE).read_bytes())["dsseEnvelope"]["payload"])
    assert json.loads(payload)["subject"][0]["name"] == "signed bundle"  # not that of the temporary folder
    assert SIGNATURE not in Bundle(out).manifest["files"]
    # A signed bundle can be replaced, and the old signature does not stay.
    export_run(case.run, out)
    with pytest.raises(SignatureError, match="not signed"):
        Bundle(out, public_key=public)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key.pem", "pub.pem", "signed bundle"]


def test_unusable_key_raises_config_error_before_the_export_begins(case: Any, tmp_path: Path) -> None:
    _, public = key_pair(tmp_path)
    for key in (public, tmp_path / "none"):
        steps: list[str] = []
        with pytest.raises(ConfigError, match=key.name):
            export_run(case.run, tmp_path / "out", sign_key=key, progress=steps.append)
        assert steps == []
    assert not (tmp_path / "out").exists()
