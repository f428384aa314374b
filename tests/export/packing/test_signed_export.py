"""A bundle that is signed as it is exported."""

from __future__ import annotations

import base64
import importlib
import json
from importlib import util
from pathlib import Path
from typing import Any

import pytest

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


def test_an_export_is_signed_before_it_takes_its_place(thin: None, case: Any, tmp_path: Path) -> None:
    private, public = key_pair(tmp_path)
    out, said = tmp_path / "signed bundle", []
    export_run(case.run, out, sign_key=private, progress=said.append)
    assert said[-1] == "signing the bundle"
    assert Bundle(out, public_key=public).signed_by is not None
    payload = base64.b64decode(json.loads((out / SIGNATURE).read_bytes())["dsseEnvelope"]["payload"])
    assert json.loads(payload)["subject"][0]["name"] == "signed bundle"  # not of the folder that it was made in
    assert SIGNATURE not in Bundle(out).manifest["files"]
    # A signed bundle is a bundle: it is replaced, and what replaces it has no signature of what is gone.
    export_run(case.run, out)
    with pytest.raises(SignatureError, match="it is not signed"):
        Bundle(out, public_key=public)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key.pem", "pub.pem", "signed bundle"]


def test_a_key_of_no_use_stops_an_export_before_it_begins(case: Any, tmp_path: Path) -> None:
    _, public = key_pair(tmp_path)
    for key, words in ((public, "it is not a private key in PEM form"), (tmp_path / "none", "cannot be read")):
        said: list[str] = []
        with pytest.raises(ConfigError, match=words):
            export_run(case.run, tmp_path / "out", sign_key=key, progress=said.append)
        assert said == []
    assert not (tmp_path / "out").exists()
