from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import textwrap
import threading
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from echoquad_runtime.devices import cuda_probe as cuda
from echoquad_runtime.devices import execution_providers as providers
from echoquad_runtime.devices import onnxruntime_loader as wheels
from echoquad_runtime.devices import session_factory as devices
from echoquad_runtime.devices.session_factory import CPU_PROVIDER, CUDA_PROVIDER, PROBE_MODEL, open_session, probe
from echoquad_runtime.errors import BundleError, DeviceUnavailableError, MissingExtraError, UsageError

if not devices.installed_wheels():
    pytest.skip("onnxruntime is not installed", allow_module_level=True)

RUNTIME = Path(devices.__file__).parents[2]
FRAME = np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2)
BROKEN = [b"", b"garbage", PROBE_MODEL[:50]]


@pytest.fixture(scope="module")
def obstacle() -> str | None:
    return devices.cuda_unavailable_reason()


@pytest.fixture
def no_cuda(obstacle: str | None) -> str:
    if obstacle is None:
        pytest.skip("CUDA works here")
    return obstacle


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


def pretend_to_list_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the real onnxruntime list CUDA, as the GPU wheel does on any machine."""
    ort = devices.load_onnxruntime()
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA_PROVIDER, CPU_PROVIDER])


def test_all_is_real() -> None:
    assert all(hasattr(devices, name) for name in devices.__all__)


# ---------------------------------------------------------------------------------------------- the probe


def test_the_probe_model_is_what_its_comment_says() -> None:
    onnx = pytest.importorskip("onnx")
    value = onnx.helper.make_tensor_value_info
    tensor, kind = onnx.helper.make_tensor, onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Conv", ["x", "w", "b"], ["y"])],
        "probe",
        [value("x", kind, [1, 1, 2, 2])],
        [value("y", kind, [1, 1, 2, 2])],
        [tensor("w", kind, [1, 1, 1, 1], [2.0]), tensor("b", kind, [1], [1.0])],
    )
    opset = onnx.helper.make_opsetid("", 17)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8, producer_name="echoquad")
    assert onnx.load_model_from_string(PROBE_MODEL) == model
    onnx.checker.check_model(model)
    assert len(PROBE_MODEL) < 400


def test_the_probe_computes_on_the_cpu() -> None:
    assert probe(CPU_PROVIDER) is None


def test_the_probe_believes_no_session_on_another_provider(no_cuda: str) -> None:
    failure = probe(CUDA_PROVIDER)
    assert failure is not None
    assert "\n" not in failure


@pytest.mark.parametrize("answer", [FRAME, np.zeros((1, 1, 3, 3), dtype=np.float32)])
def test_the_probe_believes_no_wrong_numbers(monkeypatch: pytest.MonkeyPatch, answer: np.ndarray) -> None:
    session = SimpleNamespace(run=lambda *_: [answer])
    monkeypatch.setattr(providers, "create_session", lambda *_, **__: session)
    failure = probe(CPU_PROVIDER)
    assert failure is not None
    assert "is right" in failure


# ---------------------------------------------------------------------------------------------- a session


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_a_session_computes(device: devices.Device) -> None:
    opened = open_session(PROBE_MODEL, device=device)
    (computed,) = opened.session.run(None, {"x": FRAME})
    np.testing.assert_allclose(computed, 2.0 * FRAME + 1.0, rtol=0, atol=1e-6)
    assert opened.session.get_providers()[0] == opened.provider


def test_the_cpu_when_asked_for_needs_no_excuse() -> None:
    opened = open_session(PROBE_MODEL, device="cpu")
    assert (opened.device, opened.provider, opened.note) == ("cpu", CPU_PROVIDER, "")


def test_a_session_keeps_its_provider_and_its_threads() -> None:
    session = open_session(PROBE_MODEL, device="cpu", threads=3).session
    assert session._enable_fallback is False
    options = session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 1)
    assert options.log_severity_level == 4


def test_threads_spin_within_an_inference_at_most() -> None:
    spin, stop = "session.intra_op.allow_spinning", "session.force_spinning_stop"
    for spinning, made, unmade in ((True, (stop, "1"), spin), (False, (spin, "0"), stop)):
        opened = open_session(PROBE_MODEL, device="cpu", threads=2, spinning=spinning)
        assert opened.threads == 2
        options = opened.session.get_session_options()
        assert options.get_session_config_entry(made[0]) == made[1]
        with pytest.raises(RuntimeError):  # onnxruntime has no other word for an entry that was never made
            options.get_session_config_entry(unmade)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_a_model_that_is_read_meanwhile(device: devices.Device, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "auto":  # the graph is wanted twice: by CUDA, which fails, and by the CPU
        pretend_to_list_cuda(monkeypatch)
        monkeypatch.setattr(devices, "_open_beside_cpu", lambda _, model, *__: f"no CUDA for {len(model)} bytes")
    read_by = []

    def read() -> bytes:
        read_by.append(threading.current_thread())
        return PROBE_MODEL

    opened = open_session(read, device=device, threads=threads)
    np.testing.assert_allclose(opened.session.run(None, {"x": FRAME})[0], 2.0 * FRAME + 1.0, rtol=0, atol=1e-6)
    (reader,) = read_by
    assert (reader is threading.current_thread()) == (threads == 1), "one thread is one"
    assert threads == 1 or not reader.is_alive()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("missing", [False, True])
def test_what_is_wrong_with_a_model_that_is_read_meanwhile_is_told(
    missing: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read() -> bytes:
        raise BundleError("it is torn")

    if missing:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BundleError, match="it is torn"):
        open_session(read, device="auto", threads=threads)


def test_threads_are_the_available_cpus_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "available_cpus", lambda: 3)
    opened = open_session(PROBE_MODEL, device="cpu")
    assert opened.threads == opened.session.get_session_options().intra_op_num_threads == 3


def test_auto_says_why_it_is_the_cpu(no_cuda: str) -> None:
    opened = open_session(PROBE_MODEL)
    ort = devices.load_onnxruntime()
    # Who installed the plain wheel chose the CPU and is told so; who has the GPU wheel is told what is in its way.
    has_cuda = CUDA_PROVIDER in ort.get_available_providers()
    cause = no_cuda if has_cuda else f"{wheels.named(wheels.installed_wheels())} is built without CUDA"
    assert (opened.device, opened.provider, opened.note) == ("cpu", CPU_PROVIDER, f"on the CPU: {cause}")


def test_auto_with_the_gpu_wheel_says_what_is_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_to_list_cuda(monkeypatch)
    monkeypatch.setattr(devices, "cuda_unavailable_reason", lambda: "no NVIDIA driver was found")
    assert open_session(PROBE_MODEL).note == "on the CPU: no NVIDIA driver was found"


def test_auto_with_the_plain_wheel_gives_no_advice_and_asks_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    ort = devices.load_onnxruntime()
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CPU_PROVIDER])
    monkeypatch.setattr(devices, "installed_wheels", lambda: {"onnxruntime": "1.31.1"})
    monkeypatch.setattr(devices, "cuda_unavailable_reason", lambda: pytest.fail("the driver was asked"))
    assert open_session(PROBE_MODEL).note == "on the CPU: onnxruntime 1.31.1 is built without CUDA"


def test_cuda_is_cuda_or_an_error(no_cuda: str) -> None:
    with pytest.raises(DeviceUnavailableError) as caught:
        open_session(PROBE_MODEL, device="cuda")
    assert no_cuda in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("device", ["cpu", "auto", "cuda", "openvino"])
@pytest.mark.parametrize("model", BROKEN, ids=["empty", "garbage", "cut"])
def test_a_broken_model_is_no_device_failure(model: bytes, device: devices.Device) -> None:
    with pytest.raises(BundleError, match=f"refuses the model of {len(model)} bytes") as caught:
        open_session(model, device=device)
    assert "\n" not in str(caught.value)


def test_a_broken_model_is_no_device_failure_where_cuda_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cuda_unavailable_reason", lambda: None)
    with pytest.raises(BundleError):
        open_session(b"garbage", device="cuda")


def test_a_model_that_only_cuda_refuses_is_a_device_failure(monkeypatch: pytest.MonkeyPatch, no_cuda: str) -> None:
    pretend_to_list_cuda(monkeypatch)
    monkeypatch.setattr(devices, "cuda_unavailable_reason", lambda: None)
    with pytest.raises(DeviceUnavailableError, match="CUDA works, but not for this model"):
        open_session(PROBE_MODEL, device="cuda")
    assert open_session(PROBE_MODEL).note.startswith("on the CPU: CUDA works, but not for this model")


@pytest.mark.parametrize(("device", "threads"), [("gpu", None), ("cpu", 0), ("cpu", -1)])
def test_values_that_cannot_be(device: devices.Device, threads: int | None) -> None:
    with pytest.raises(UsageError, match="expected"):
        open_session(PROBE_MODEL, device=device, threads=threads)


def test_nodes_on_the_cpu_are_not_cuda() -> None:
    ort = devices.load_onnxruntime()
    options = ort.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = ort.InferenceSession(PROBE_MODEL, options, providers=[CPU_PROVIDER])
    if not hasattr(session, "get_provider_graph_assignment_info"):
        pytest.skip("this onnxruntime does not tell where nodes run")
    message = providers.fallback_nodes(session, CUDA_PROVIDER)
    assert message == "1 of the model's 1 nodes (Conv)"


@pytest.mark.parametrize(("on_cuda", "on_cpu", "is_cuda"), [(3, 0, True), (3, 2, True), (2, 3, False)])
def test_the_device_is_where_most_nodes_run(on_cuda: int, on_cpu: int, is_cuda: bool) -> None:
    def part(provider: str) -> SimpleNamespace:
        return SimpleNamespace(ep_name=provider, get_nodes=lambda: [SimpleNamespace(op_type="Conv")])

    parts = [part(CUDA_PROVIDER)] * on_cuda + [part(CPU_PROVIDER)] * on_cpu
    session = SimpleNamespace(get_provider_graph_assignment_info=lambda: parts)
    assert (providers.fallback_nodes(session, CUDA_PROVIDER) is None) is is_cuda  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------- silence


def test_nothing_reaches_the_terminal_or_the_disk(tmp_path: Path) -> None:
    done = run_python(
        """
        from echoquad_runtime import errors
        from echoquad_runtime.devices import session_factory as devices
        for device in ("cpu", "auto", "cuda", "openvino"):
            for model in (devices.PROBE_MODEL, b"", b"garbage"):
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
    assert list(tmp_path.iterdir()) == []  # onnxruntime >= 1.29 keeps a device identifier unless told not to


def test_what_is_written_during_the_import_is_dropped_and_no_more(tmp_path: Path) -> None:
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
        from echoquad_runtime.devices.session_factory import load_onnxruntime
        assert load_onnxruntime().telemetry == "1"
        load_onnxruntime()
        os.write(2, b"after")
        print("out")
        """
    done = run_python(code, home=tmp_path, path=(tmp_path,))
    assert (done.returncode, done.stdout, done.stderr) == (0, "out\n", "after")


def test_an_import_that_fails_gives_stderr_back(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").write_text("raise ImportError('DLL load failed')")
    code = """
        import os
        from echoquad_runtime.devices.session_factory import load_onnxruntime
        try:
            load_onnxruntime()
        except ImportError as error:
            os.write(2, str(error).encode())
        """
    done = run_python(code, home=tmp_path, path=(tmp_path,))
    assert "cannot be imported (DLL load failed); do: pip uninstall -y onnxruntime" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_wheels_are_those_that_python_lists() -> None:
    listed = {
        re.sub(r"[-_.]+", "-", found.metadata["Name"]).lower(): found.version for found in metadata.distributions()
    }
    assert wheels.installed_wheels(listed) == listed
    assert wheels.installed_wheels(("none-such", "numpy")) == {"numpy": metadata.version("numpy")}


def test_the_first_of_two_wheels_on_the_path_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_without_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(wheels, "installed_wheels", dict)
    with pytest.raises(MissingExtraError) as caught:
        open_session(PROBE_MODEL)
    assert str(caught.value) == (
        'onnxruntime is not installed; do: pip install "echoquad[cpu]" (with an NVIDIA GPU: [gpu])'
    )


def test_what_is_left_of_two_wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", ModuleType("onnxruntime"))
    monkeypatch.setattr(wheels, "installed_wheels", lambda: {"onnxruntime-gpu": "1.31.1"})
    with pytest.raises(MissingExtraError, match=r"empty shell.*uninstall -y onnxruntime-gpu, then"):
        devices.load_onnxruntime()


# ---------------------------------------------------------------------------------------------- obstacles


def pretend(
    monkeypatch: pytest.MonkeyPatch,
    *,
    providers: tuple[str, ...] = (CUDA_PROVIDER, CPU_PROVIDER),
    installed: dict[str, str] | None = None,
    driver: tuple[int, str | None] = (13000, None),
    failure: str | None = "CUDA failure 36: API call is not supported",
    missing: str | None = None,
) -> str | None:
    """Ask for the obstacle on a machine that is not at hand."""
    installed = {"onnxruntime-gpu": "1.31.1"} if installed is None else installed
    fake = SimpleNamespace(
        __version__="1.31.1",
        cuda_version="13.0",
        get_available_providers=lambda: list(providers),
        preload_dlls=lambda: print("Failed to load libcublas.so.13"),  # noqa: T201
    )
    monkeypatch.setattr(cuda, "load_onnxruntime", lambda: fake)
    for module in (cuda, wheels):
        monkeypatch.setattr(
            module, "installed_wheels", lambda names=None: {"nvidia-cublas-cu12": "12.6"} if names else installed
        )
    monkeypatch.setattr(cuda, "nvidia_driver", lambda: driver)
    monkeypatch.setattr(cuda, "probe", lambda _: failure)
    monkeypatch.setattr(cuda, "_missing_library", lambda *_: missing)
    return cuda.cuda_unavailable_reason()


def test_no_obstacle(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert pretend(monkeypatch, failure=None) is None
    assert capfd.readouterr() == ("", "")


def test_a_wheel_without_cuda_must_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    message = pretend(monkeypatch, providers=(CPU_PROVIDER,), installed={"onnxruntime": "1.31.1"})
    assert message is not None
    if sys.platform != "darwin":
        assert message.startswith("no CUDA provider in onnxruntime 1.31.1; do: pip uninstall -y onnxruntime, ")


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no CUDA to install")
def test_two_wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.30.0"}
    assert pretend(monkeypatch, providers=(CPU_PROVIDER,), installed=both) == (
        "no CUDA provider in onnxruntime 1.31.1 and onnxruntime-gpu 1.30.0 (installed over each other); "
        'do: pip uninstall -y onnxruntime onnxruntime-gpu, then pip install "echoquad[gpu]"'
    )


def test_a_driver_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    message = pretend(monkeypatch, driver=(12080, None), missing="libcublas.so.13 cannot be loaded")
    assert message is not None
    assert message.startswith("the NVIDIA driver supports CUDA 12.8 at most, too old for onnxruntime-gpu 1.31.1")
    assert '"onnxruntime-gpu[cuda,cudnn]<1.27"' in message


def test_a_library_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pretend(monkeypatch, missing="libcublasLt.so.13 cannot be loaded") == (
        "libcublasLt.so.13 cannot be loaded, which onnxruntime-gpu 1.31.1 (built for CUDA 13.0) needs "
        '(pip lists nvidia-cublas-cu12 12.6); do: pip install "echoquad[gpu]"'
    )


def test_a_cause_that_only_onnxruntime_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    message = pretend(monkeypatch)
    assert message is not None
    assert "does not compute on CUDA: CUDA failure 36" in message


def test_a_driver_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    version, cause = cuda.nvidia_driver()
    assert version == 0
    assert cause is not None
    assert "no NVIDIA driver was found" in cause


@pytest.mark.parametrize("visible", [None, ""])
def test_a_driver_without_a_gpu(monkeypatch: pytest.MonkeyPatch, visible: str | None) -> None:
    def name_error(_code: int, label: object) -> int:
        label._obj.value = b"CUDA_ERROR_NO_DEVICE"  # type: ignore[attr-defined]
        return 0

    driver = SimpleNamespace(cuInit=lambda _: 100, cuDriverGetVersion=lambda _: 0, cuGetErrorName=name_error)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    _, cause = cuda.nvidia_driver()
    assert cause is not None
    assert "cuInit: 100, CUDA_ERROR_NO_DEVICE" in cause
    assert ("CUDA_VISIBLE_DEVICES=''" in cause) is (visible == "")


@pytest.mark.skipif(os.name == "nt", reason="Windows names no missing library")
def test_the_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, **_: object) -> None:
        if "cuda" in name:
            raise OSError("libcublasLt.so.13: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(ctypes, "CDLL", load)
    module = ModuleType("onnxruntime")
    module.__file__ = "/site-packages/onnxruntime/__init__.py"
    missing = cuda._missing_library(module, 13)
    assert missing == "libcublasLt.so.13 cannot be loaded"


def test_onnxruntime_falling_back_in_silence_is_caught(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], no_cuda: str
) -> None:
    # The real onnxruntime, made to list CUDA: it answers with a CPU session and a mere warning.
    pretend_to_list_cuda(monkeypatch)
    monkeypatch.setattr(cuda, "nvidia_driver", lambda: (13000, None))
    with pytest.raises(DeviceUnavailableError):
        open_session(PROBE_MODEL, device="cuda")
    opened = open_session(PROBE_MODEL)
    assert opened.device == "cpu"
    assert opened.note
    assert capfd.readouterr() == ("", "")


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
def test_one_line(text: str, line: str) -> None:
    assert wheels.one_line(ValueError(text)) == line


# ---------------------------------------------------------------------------------------------- with a GPU


@pytest.mark.gpu
def test_cuda_computes(obstacle: str | None) -> None:
    if obstacle is not None:
        pytest.skip(obstacle)
    opened = open_session(PROBE_MODEL, device="cuda")
    (computed,) = opened.session.run(None, {"x": FRAME})
    np.testing.assert_allclose(computed, 2.0 * FRAME + 1.0, rtol=0, atol=1e-6)
    assert (opened.device, opened.provider, opened.note) == ("cuda", CUDA_PROVIDER, "")


@pytest.mark.gpu
def test_auto_is_cuda_where_it_works(obstacle: str | None) -> None:
    if obstacle is not None:
        pytest.skip(obstacle)
    assert open_session(PROBE_MODEL).device == "cuda"
    with pytest.raises(BundleError):
        open_session(b"garbage")
