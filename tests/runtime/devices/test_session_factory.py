"""The session factory: devices, threads, the model reader, and errors."""

from __future__ import annotations

import sys
import threading

import numpy as np
import onnxruntime
import pytest

from echoquad_runtime.devices import cuda_probe as cuda
from echoquad_runtime.devices import onnxruntime_loader as wheels
from echoquad_runtime.devices import session_factory as devices
from echoquad_runtime.devices.execution_providers import CPU_PROVIDER, CUDA_PROVIDER, PROBE_MODEL
from echoquad_runtime.devices.session_factory import open_session
from echoquad_runtime.errors import BundleError, DeviceUnavailableError, UsageError

if not wheels.installed_wheels():
    pytest.skip("onnxruntime is not installed", allow_module_level=True)

FRAME = np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2)
BROKEN = [b"", b"garbage", PROBE_MODEL[:50]]


def pretend_to_list_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the real onnxruntime list CUDA, as the GPU wheel does on every machine."""
    ort = wheels.load_onnxruntime()
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA_PROVIDER, CPU_PROVIDER])


def test_all_names_exist() -> None:
    assert all(hasattr(devices, name) for name in devices.__all__)


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_session_computes(device: devices.Device) -> None:
    opened = open_session(PROBE_MODEL, device=device)
    (computed,) = opened.session.run(None, {"x": FRAME})
    np.testing.assert_allclose(computed, 2.0 * FRAME + 1.0, rtol=0, atol=1e-6)
    assert opened.session.get_providers()[0] == opened.provider


def test_requested_cpu_has_no_note() -> None:
    opened = open_session(PROBE_MODEL, device="cpu")
    assert (opened.device, opened.provider, opened.note) == ("cpu", CPU_PROVIDER, "")


def test_session_options_keep_provider_and_threads() -> None:
    session = open_session(PROBE_MODEL, device="cpu", threads=3).session
    assert session._enable_fallback is False
    options = session.get_session_options()
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 1)
    assert options.log_severity_level == 4


@pytest.mark.parametrize("version", ["1.25.1", "1.26.0", "1.100.0.dev20261127"])
def test_threads_spin_for_a_limited_time(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", version)
    spin, limit = "session.intra_op.allow_spinning", "session.intra_op.spin_duration_us"
    for spinning in (True, False):
        made, unmade = ((limit, "250"), spin) if spinning and version != "1.25.1" else ((spin, "0"), limit)
        opened = open_session(PROBE_MODEL, device="cpu", threads=2, spinning=spinning)
        assert opened.threads == 2
        options = opened.session.get_session_options()
        assert options.get_session_config_entry(made[0]) == made[1]
        with pytest.raises(RuntimeError):  # onnxruntime raises this for a missing entry
            options.get_session_config_entry(unmade)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_model_is_read_while_onnxruntime_is_imported(
    device: devices.Device, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "auto":  # the graph is needed twice: by CUDA, which fails, and by the CPU
        pretend_to_list_cuda(monkeypatch)
        monkeypatch.setattr(devices, "_open_on_accelerator", lambda _, model, *__: f"no CUDA for {len(model)} bytes")
    read_by = []

    def read() -> bytes:
        read_by.append(threading.current_thread())
        return PROBE_MODEL

    opened = open_session(read, device=device, threads=threads)
    np.testing.assert_allclose(opened.session.run(None, {"x": FRAME})[0], 2.0 * FRAME + 1.0, rtol=0, atol=1e-6)
    (reader,) = read_by
    assert (reader is threading.current_thread()) == (threads == 1), "a limit of one thread includes the reader"
    assert threads == 1 or not reader.is_alive()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("missing", [False, True])
def test_error_of_the_model_reader_is_raised(missing: bool, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def read() -> bytes:
        raise BundleError("it is torn")

    if missing:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BundleError, match="it is torn"):
        open_session(read, device="auto", threads=threads)


def test_default_threads_are_the_available_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "available_cpus", lambda: 3)
    opened = open_session(PROBE_MODEL, device="cpu")
    assert opened.threads == opened.session.get_session_options().intra_op_num_threads == 3


def test_auto_notes_why_it_chose_the_cpu(no_cuda: str) -> None:
    opened = open_session(PROBE_MODEL)
    ort = wheels.load_onnxruntime()
    # The plain wheel is a choice of the CPU; with the GPU wheel the note says why CUDA is unavailable.
    has_cuda = CUDA_PROVIDER in ort.get_available_providers()
    cause = no_cuda if has_cuda else f"{wheels.format_versions(wheels.installed_wheels())} is built without CUDA"
    assert (opened.device, opened.provider, opened.note) == ("cpu", CPU_PROVIDER, f"on the CPU: {cause}")


def test_auto_with_the_gpu_wheel_notes_the_unavailable_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_to_list_cuda(monkeypatch)
    monkeypatch.setattr(devices, "cuda_unavailable_reason", lambda: "no NVIDIA driver was found")
    assert open_session(PROBE_MODEL).note == "on the CPU: no NVIDIA driver was found"


def test_auto_with_the_plain_wheel_does_not_query_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    ort = wheels.load_onnxruntime()
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CPU_PROVIDER])
    monkeypatch.setattr(devices, "installed_wheels", lambda: {"onnxruntime": "1.31.1"})
    monkeypatch.setattr(devices, "cuda_unavailable_reason", lambda: pytest.fail("the driver was asked"))
    assert open_session(PROBE_MODEL).note == "on the CPU: onnxruntime 1.31.1 is built without CUDA"


def test_unavailable_cuda_raises(no_cuda: str) -> None:
    with pytest.raises(DeviceUnavailableError) as caught:
        open_session(PROBE_MODEL, device="cuda")
    assert no_cuda in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("device", ["cpu", "auto", "cuda", "openvino"])
@pytest.mark.parametrize("model", BROKEN, ids=["empty", "garbage", "cut"])
def test_broken_model_raises_bundle_error_on_every_device(model: bytes, device: devices.Device) -> None:
    with pytest.raises(BundleError, match=f"the model of {len(model)} bytes") as caught:
        open_session(model, device=device)
    assert "\n" not in str(caught.value)


def test_broken_model_raises_bundle_error_if_cuda_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cuda_unavailable_reason", lambda: None)
    with pytest.raises(BundleError):
        open_session(b"garbage", device="cuda")


def test_model_that_only_cuda_rejects_is_a_device_error(monkeypatch: pytest.MonkeyPatch, no_cuda: str) -> None:
    pretend_to_list_cuda(monkeypatch)
    monkeypatch.setattr(devices, "cuda_unavailable_reason", lambda: None)
    with pytest.raises(DeviceUnavailableError, match="CUDA works, but not for this model"):
        open_session(PROBE_MODEL, device="cuda")
    assert open_session(PROBE_MODEL).note.startswith("on the CPU: CUDA works, but not for this model")


@pytest.mark.parametrize(("device", "threads"), [("gpu", None), ("cpu", 0), ("cpu", -1)])
def test_invalid_device_or_threads_are_refused(device: devices.Device, threads: int | None) -> None:
    with pytest.raises(UsageError, match="expected"):
        open_session(PROBE_MODEL, device=device, threads=threads)


def test_silent_fallback_to_the_cpu_is_detected(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], no_cuda: str
) -> None:
    # The real onnxruntime, made to list CUDA, creates a CPU session with a mere warning.
    pretend_to_list_cuda(monkeypatch)
    monkeypatch.setattr(cuda, "nvidia_driver", lambda: (13000, None))
    with pytest.raises(DeviceUnavailableError):
        open_session(PROBE_MODEL, device="cuda")
    opened = open_session(PROBE_MODEL)
    assert opened.device == "cpu"
    assert opened.note
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------------------------------------- with a GPU


@pytest.mark.gpu
def test_cuda_computes(unavailable_reason: str | None) -> None:
    if unavailable_reason is not None:
        pytest.skip(unavailable_reason)
    opened = open_session(PROBE_MODEL, device="cuda")
    (computed,) = opened.session.run(None, {"x": FRAME})
    np.testing.assert_allclose(computed, 2.0 * FRAME + 1.0, rtol=0, atol=1e-6)
    assert (opened.device, opened.provider, opened.note) == ("cuda", CUDA_PROVIDER, "")


@pytest.mark.gpu
def test_auto_selects_working_cuda(unavailable_reason: str | None) -> None:
    if unavailable_reason is not None:
        pytest.skip(unavailable_reason)
    assert open_session(PROBE_MODEL).device == "cuda"
    with pytest.raises(BundleError):
        open_session(b"garbage")
