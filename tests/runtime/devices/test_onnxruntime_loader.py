"""The onnxruntime loader: installed wheels, telemetry, suppressed output, and error summaries."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

from echoquad_runtime.devices import onnxruntime_loader as wheels
from echoquad_runtime.devices import session_factory as devices
from echoquad_runtime.devices.error_summary import summarize_error
from echoquad_runtime.devices.execution_providers import PROBE_MODEL
from echoquad_runtime.devices.session_factory import open_session
from echoquad_runtime.errors import MissingExtraError

if not wheels.installed_wheels():
    pytest.skip("onnxruntime is not installed", allow_module_level=True)

RUNTIME = Path(devices.__file__).parents[2]


def run_python(code: str, *, home: Path, path: tuple[Path, ...] = (), **env: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    pythonpath = os.pathsep.join(str(folder) for folder in (*path, RUNTIME))
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**kept, "PYTHONPATH": pythonpath, "HOME": str(home), "XDG_CACHE_HOME": str(home), **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_sessions_write_nothing_to_terminal_or_disk(tmp_path: Path) -> None:
    done = run_python(
        """
        from echoquad_runtime import errors
        from echoquad_runtime.devices import session_factory as devices
        from echoquad_runtime.devices.execution_providers import PROBE_MODEL
        for device in ("cpu", "auto", "cuda", "openvino"):
            for model in (PROBE_MODEL, b"", b"garbage"):
                try:
                    session = devices.open_session(model, device=device).session
                    session.run(None, {"x": __import__("numpy").zeros((3, 3), "float32")})
                except errors.EchoQuadError:
                    pass
                except Exception as error:  # the wrong shape
                    assert "INVALID_ARGUMENT" in str(error)
        """,
        home=tmp_path,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []  # onnxruntime >= 1.29 writes a device identifier unless telemetry is refused


def test_only_output_of_the_import_is_suppressed(tmp_path: Path) -> None:
    package = tmp_path / "onnxruntime"
    package.mkdir()
    (package / "__init__.py").write_text(
        textwrap.dedent(
            """
            import os, warnings
            os.write(2, b"device_discovery.cc: GPU device discovery failed\\n")
            print("EP Error")
            warnings.warn("Unsupported Windows version")
            telemetry = os.environ["ORT_DISABLE_TELEMETRY"]
            class InferenceSession: ...
            def disable_telemetry_events(): ...
            """
        )
    )
    code = """
        import os, sys
        from echoquad_runtime.devices.onnxruntime_loader import load_onnxruntime
        assert load_onnxruntime().telemetry == "1"
        load_onnxruntime()
        os.write(2, b"after")
        print("out")
        """
    done = run_python(code, home=tmp_path, path=(tmp_path,))
    assert (done.returncode, done.stdout, done.stderr) == (0, "out\n", "after")


def test_failed_import_restores_stderr(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").write_text("raise ImportError('DLL load failed')")
    code = """
        import os
        from echoquad_runtime.devices.onnxruntime_loader import load_onnxruntime
        try:
            load_onnxruntime()
        except ImportError as error:
            os.write(2, str(error).encode())
        """
    done = run_python(code, home=tmp_path, path=(tmp_path,))
    assert "cannot be imported (DLL load failed); do: pip uninstall -y onnxruntime" in done.stderr
    assert "Traceback" not in done.stderr


def test_installed_wheels_agree_with_importlib_metadata() -> None:
    listed = {
        re.sub(r"[-_.]+", "-", found.metadata["Name"]).lower(): found.version for found in metadata.distributions()
    }
    assert wheels.installed_wheels(listed) == listed
    assert wheels.installed_wheels(("none-such", "numpy")) == {"numpy": metadata.version("numpy")}


def test_first_wheel_on_the_path_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, found in (
        ("1", ["onnxruntime_gpu-1.31.1+cu13.dist-info", "onnxruntime-1.30.0.dist-info"]),
        ("2", ["ONNXRuntime-1.29.0-py3.11.egg-info", "onnxruntime_openvino-1.24.1.dist-info", "onnxruntime-9.dist"]),
    ):
        for name in found:
            (tmp_path / folder / name).mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path / name) for name in ("absent", "1", "2")])
    expected = {"onnxruntime": "1.30.0", "onnxruntime-gpu": "1.31.1+cu13", "onnxruntime-openvino": "1.24.1"}
    assert wheels.installed_wheels() == expected
    (tmp_path / "1" / "onnxruntime-1.30.0.dist-info").rmdir()
    assert wheels.installed_wheels() == {**expected, "onnxruntime": "1.29.0"}


def test_missing_onnxruntime_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(wheels, "installed_wheels", dict)
    with pytest.raises(MissingExtraError) as caught:
        open_session(PROBE_MODEL)
    assert str(caught.value) == (
        'onnxruntime is not installed; do: pip install "echoquad[cpu]" (with an NVIDIA GPU: [gpu])'
    )


def test_empty_onnxruntime_package_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", ModuleType("onnxruntime"))
    monkeypatch.setattr(wheels, "installed_wheels", lambda: {"onnxruntime-gpu": "1.31.1"})
    with pytest.raises(MissingExtraError, match=r"empty shell.*uninstall -y onnxruntime-gpu, then"):
        wheels.load_onnxruntime()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[ONNXRuntimeError] : 7 : INVALID_PROTOBUF : Parsing\nfailed.", "INVALID_PROTOBUF: Parsing failed"),
        (
            "/src/cuda_call.cc:154 CudaCall() CUDA failure 36: no ; GPU=-1 ; hostname=cart",
            "CUDA failure 36: no",
        ),
        (
            "[ONNXRuntimeError] : 1 : FAIL : Exception during initialization: /src/basic_backend.cc:136 f(std::a<b>)\n"
            "[OpenVINO-EP] Exception while Loading Network for graph g: Exception from src/a.cpp:154:\n"
            "Exception from src/config.cpp:475:\nNotFound: Unsupported property X by CPU plugin.\n\n\n",
            "OpenVINO: Exception while Loading Network for graph g: NotFound: Unsupported property X by CPU plugin",
        ),
        ("", "ValueError"),
        ("x" * 500, "x" * 237 + "..."),
    ],
)
def test_summarize_error(text: str, line: str) -> None:
    assert summarize_error(ValueError(text)) == line
