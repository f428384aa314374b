"""A client that an independent program generates from the OpenAPI description talks to the service."""

from __future__ import annotations

import importlib
import io
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest

from .conftest import RunningServer
from .fake_backend import FakeBackend

pytest.importorskip("openapi_python_client")

OPERATIONS = ("events", "info", "is_live", "is_ready", "live_stream", "load_bundle", "metrics", "openapi", "overlay")
OPERATIONS += ("predict", "result", "results", "retry_destination", "roll_back_bundle", "status")
PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)


@pytest.fixture
def generated(tmp_path: Path, server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that imports a module of the client, which is generated from what the server describes."""
    description = tmp_path / "openapi.json"
    description.write_bytes(httpx.get(f"{server.url}/openapi.json", trust_env=False).content)
    command = [sys.executable, "-m", "openapi_python_client", "generate", "--meta", "none"]
    (tmp_path / "generator.yaml").write_text("post_hooks: []\n")
    made = subprocess.run(
        [*command, "--path", description, "--output-path", tmp_path / "made_client", "--config", "generator.yaml"],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    monkeypatch.syspath_prepend(tmp_path)

    def load(name: str) -> ModuleType:
        return importlib.import_module(f"made_client.{name}")

    yield load
    for name in [name for name in sys.modules if name.partition(".")[0] == "made_client"]:
        del sys.modules[name]


def test_generated_client_has_all_operations_and_reads_what_they_answer(
    generated: Any, server: RunningServer, backend: FakeBackend
) -> None:
    with generated("client").Client(base_url=server.url, httpx_args={"trust_env": False}) as client:
        use(client, generated, backend)


def use(client: Any, generated: Any, backend: FakeBackend) -> None:
    def call(operation: str, **arguments: Any) -> Any:
        return generated(f"api.default.{operation}").sync_detailed(client=client, **arguments)

    for operation in OPERATIONS:
        generated(f"api.default.{operation}")
    file = generated("types").File
    answer = call("predict", body=file(payload=io.BytesIO(PNG)), name="exam.png", idempotency_key="one")
    assert answer.status_code == 200
    assert answer.parsed.to_dict() == json.loads(answer.content)
    assert (answer.parsed.status.value, answer.parsed.name, len(answer.parsed.rows)) == ("done", "exam.png", 1)
    assert backend.accepted[-1] == ("exam.png", "one", PNG)
    again = call("result", id=answer.parsed.id)
    assert again.parsed.to_dict() == answer.parsed.to_dict()
    wait = generated("models.predict_wait").PredictWait.VALUE_0
    accepted = call("predict", body=file(payload=io.BytesIO(PNG)), wait=wait)
    assert (accepted.status_code, type(accepted.parsed).__name__) == (202, "Accepted")
    for operation in ("status", "info", "is_ready", "results"):
        answer = call(operation)
        assert answer.status_code == 200
        assert answer.parsed.to_dict() == json.loads(answer.content)
    refused = call("predict", body=file(payload=b""))
    assert (refused.status_code, refused.parsed.error.code) == (400, "E_HTTP_BODY_EMPTY")
    assert call("result", id="0" * 32).parsed.error.code == "E_RESULT_NOT_FOUND"
