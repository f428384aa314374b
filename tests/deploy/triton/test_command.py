"""``export --triton`` as a command, and the program of the documentation against a server of the same protocol."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tritonclient.grpc import model_config_pb2 as proto

from echoquad_deploy.triton.repository import write_triton_model
from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.predict.predictor import Predictor

from .conftest import DATA_TYPES, StandInServer, read_config

PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "triton.md"
HIDE = "import sys; sys.modules.update(dict.fromkeys(('torch', 'onnx', 'onnxscript')))"


def export(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command where torch and onnx are not installed."""
    code = f"{HIDE}\nfrom echoquad.cli.framework.main import main\nmain()"
    return subprocess.run(
        [sys.executable, "-c", code, "export", *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_existing_bundle_is_written_without_torch(framed: Path, tmp_path: Path) -> None:
    ran = export(framed, "--triton", tmp_path / "models", "--precision", "int8")
    assert (ran.returncode, ran.stdout.splitlines()) == (
        0,
        [f"wrote {tmp_path.as_posix()}/models/cart-7/; next: tritonserver --model-repository={tmp_path}/models"],
    )
    first, second = ran.stderr.splitlines()
    assert first == "the int8 frame graph decides 6 golden frames as predict does; batches of up to 16 frames"
    assert "int8 does not run on CUDA" in second
    config = read_config(tmp_path / "models" / "cart-7" / "config.pbtxt")
    assert config.parameters["echoquad.precision"].string_value == "int8"


def test_other_options_and_missing_ones_write_nothing(framed: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    cases = [
        (2, "E_USAGE", [tmp_path, "--triton", models]),  # neither a bundle nor --out
        (2, "E_USAGE", [framed, "--triton", models, "--frame-graph"]),
        (1, "E_BUNDLE", [tiny_bundle, "--triton", models]),
        (1, "E_BUNDLE", [framed, "--triton", models, "--precision", "fp8"]),
    ]
    for code, name, arguments in cases:
        ran = export(*arguments)
        assert (ran.returncode, ran.stdout) == (code, ""), ran
        assert re.fullmatch(rf"error\[{name}\]: .*\n", ran.stderr), ran
    assert not models.exists()


# ---------------------------------------------------------------------------------------------- the documentation


@contextmanager
def protocol_server(model: StandInServer) -> Iterator[int]:
    """Answer inference requests of KServe v2 with binary tensors, as Triton does; yield the port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            assert self.path == f"/v2/models/{model.config.name}/infer"
            body = self.rfile.read(int(self.headers["Content-Length"]))
            split = int(self.headers.get("Inference-Header-Content-Length", len(body)))
            request, tail = json.loads(body[:split]), body[split:]
            (given,) = request["inputs"]
            dtype = DATA_TYPES[f"TYPE_{given['datatype']}"]
            outputs = model.infer({given["name"]: np.frombuffer(tail, dtype).reshape(given["shape"])})
            described = []
            for one in model.config.output:
                tensor = outputs[one.name]
                kind = proto.DataType.Name(one.data_type).removeprefix("TYPE_")
                size = {"binary_data_size": tensor.nbytes}
                described.append({"name": one.name, "datatype": kind, "shape": tensor.shape, "parameters": size})
            head = json.dumps({"model_name": model.config.name, "model_version": "1", "outputs": described}).encode()
            answer = head + b"".join(np.ascontiguousarray(outputs[one["name"]]).tobytes() for one in described)
            self.send_response(200)
            self.send_header("Inference-Header-Content-Length", str(len(head)))
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Keep silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


def test_program_of_the_page_gets_the_decision(framed: Path, tmp_path: Path, make_frame: Any) -> None:
    pytest.importorskip("tritonclient.http", reason="needs tritonclient[http]")
    bundle = framed.rename(tmp_path / "bundle")
    model = write_triton_model(Bundle(bundle), tmp_path / "models")
    frame = make_frame(5)
    Image.fromarray(frame).save(tmp_path / "frame.png")
    (program,) = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    with protocol_server(StandInServer(model.folder)) as port:
        ran = subprocess.run(
            [sys.executable, "-c", program.replace(":8000", f":{port}")],
            cwd=tmp_path,
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        )
    expected = Predictor(bundle, device="cpu")(frame)
    found = [float(number) for number in re.findall(r"[\d.]+", ran.stdout)]
    assert expected.classes[int(found[0])] == expected.label
    assert found[1:] == pytest.approx(expected.probabilities, abs=1e-5)
