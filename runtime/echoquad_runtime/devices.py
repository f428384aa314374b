"""How a session is made on a device, and the truth about which device it is.

Asked for CUDA where CUDA cannot be loaded, onnxruntime makes a CPU session and tells only its log. Here CUDA
is there when it has *computed*: ``PROBE_MODEL`` is run on it before the caller's model is opened on it.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import importlib
import io
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from echoquad_runtime.errors import BundleError, DeviceUnavailableError, MissingExtraError, UsageError

if TYPE_CHECKING:
    import onnxruntime

__all__ = [
    "CPU_PROVIDER",
    "CUDA_PROVIDER",
    "PROBE_MODEL",
    "Device",
    "OpenedSession",
    "available_cpus",
    "cuda_obstacle",
    "installed_wheels",
    "load_onnxruntime",
    "open_session",
    "probe",
]

Device = Literal["auto", "cpu", "cuda"]

CPU_PROVIDER = "CPUExecutionProvider"
CUDA_PROVIDER = "CUDAExecutionProvider"

# y = 2 x + 1 on float32 [1, 1, 2, 2], as a 1 x 1 convolution: cuDNN is loaded only when one runs.
PROBE_MODEL = base64.b64decode(
    "CAgSCGVjaG9xdWFkOnkKEgoBeAoBdwoBYhIBeSIEQ29udhIFcHJvYmUqEwgBCAEIAQgBEAEiBAAAAEBCAXcqDQgBEAEiBAAAgD9C"
    "AWJaGwoBeBIWChQIARIQCgIIAQoCCAEKAggCCgIIAmIbCgF5EhYKFAgBEhAKAggBCgIIAQoCCAIKAggCQgQKABAR"
)

# Each of these unpacks into the same `onnxruntime` folder, so two of them overwrite each other's files.
_WHEELS = ("onnxruntime", *(f"onnxruntime-{of}" for of in ("gpu", "directml", "openvino", "qnn", "rocm")))

# Redirecting stdout, stderr and warnings is process-wide: only one thread may do it at a time.
_REDIRECTING = threading.RLock()


@dataclass(frozen=True, slots=True)
class OpenedSession:
    """A session and the device that really runs it.

    Attributes
    ----------
    session
        The onnxruntime session. It never falls back to another provider.
    device
        ``"cpu"`` or ``"cuda"``: what runs, not what was asked for.
    provider
        onnxruntime's name of it, such as ``"CPUExecutionProvider"``.
    note
        One line saying why ``auto`` chose the CPU; ``""`` when it did not.
    """

    session: onnxruntime.InferenceSession
    device: str
    provider: str
    note: str


def available_cpus() -> int:
    """Count the CPUs this process may use: its affinity and its cgroup's quota, rounded down, at least 1."""
    counts: list[float] = [os.cpu_count() or 1]
    if (affinity := getattr(os, "sched_getaffinity", None)) is not None:
        counts.append(len(affinity(0)))
    if (process_count := getattr(os, "process_cpu_count", None)) is not None:
        counts.append(process_count() or 1)
    counts += _cgroup_quotas(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))
    # Down, not up: onnxruntime's threads spin, and one that has used up the quota stalls the others.
    return max(1, int(min(counts)))


def _cgroup_quotas(root: Path, membership: Path) -> list[float]:
    """Return the CPU quotas, in CPUs, of this process's cgroups (v2 and v1) and of their parents."""
    quotas: list[float] = []
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return quotas
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # The root itself is read too: a container may be told a path that only its host has.
        folder = root / "cpu" if controllers else root
        for part in ["", *path.split("/")]:
            folder = folder / part
            with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
                if controllers:
                    texts = [(folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")]
                else:
                    texts = (folder / "cpu.max").read_text().split()
                quota, period = (int(text) for text in texts)  # "max" is no number: no limit
                if quota > 0:
                    quotas.append(quota / period)
    return quotas


def installed_wheels(names: Iterable[str] = _WHEELS) -> dict[str, str]:
    """Return the versions of the installed wheels among those that provide onnxruntime: two are a clash."""
    found = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def load_onnxruntime() -> ModuleType:
    """Import onnxruntime, without its telemetry and without what it writes to the terminal.

    Whatever in EchoQuad needs onnxruntime gets it here: telemetry can be refused only before the import.

    Raises
    ------
    MissingExtraError
        onnxruntime is not installed, or what is installed cannot be imported.
    """
    # From 1.29 on it writes a device identifier to disk and reports models and their hashes to Microsoft.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    found = _named(installed_wheels())
    try:
        with _silent_import():
            ort = importlib.import_module("onnxruntime")
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "onnxruntime":
            found = "onnxruntime is not installed"
        else:
            found = f"{found or 'onnxruntime'} cannot be imported ({_one_line(error)})"
        raise MissingExtraError(f"{found}; do: {_reinstall('cpu')} (with an NVIDIA GPU: [gpu])") from error
    if not hasattr(ort, "InferenceSession"):
        # What is left when one of two wheels is uninstalled: it takes the files that they shared.
        found = f"the onnxruntime package is an empty shell (pip lists {found or 'no wheel of it'})"
        raise MissingExtraError(f"{found}; do: {_reinstall('cpu')} (with an NVIDIA GPU: [gpu])")
    ort.disable_telemetry_events()  # Windows knows only this switch
    return ort


def open_session(model: bytes, *, device: Device = "auto", threads: int | None = None) -> OpenedSession:
    """Open a model on a device, or say why not.

    Parameters
    ----------
    model
        An ONNX file's bytes.
    device
        ``"cuda"`` is CUDA or an error, ``"auto"`` CUDA where it works and else the CPU, ``"cpu"`` the CPU.
    threads
        CPU threads inside an operator; None for :func:`available_cpus`.

    Raises
    ------
    BundleError
        onnxruntime refuses the model, whatever the device.
    DeviceUnavailableError
        ``device`` is ``"cuda"`` and CUDA does not work, or not for this model.
    MissingExtraError
        onnxruntime is not installed.
    UsageError
        ``device`` or ``threads`` has a value that cannot be.
    """
    if device not in get_args(Device):
        raise UsageError(f"device is {device!r}; expected one of {', '.join(get_args(Device))}")
    if threads is not None and threads < 1:
        raise UsageError(f"threads is {threads}; expected at least 1")
    ort = load_onnxruntime()
    threads = threads or available_cpus()
    obstacle: str | None = ""
    if device == "auto" and CUDA_PROVIDER not in ort.get_available_providers():
        # Somebody who installed the plain wheel has chosen the CPU: to be told, not to be advised.
        obstacle = f"{_named(installed_wheels()) or 'this onnxruntime'} is built without CUDA"
    elif device != "cpu" and (obstacle := cuda_obstacle()) is None:
        try:
            session = _create(ort, model, CUDA_PROVIDER, threads)
            obstacle = _not_on_cuda(session)
        except Exception as error:  # they share no base; the CPU, below, tells model from device
            obstacle = f"CUDA works, but not for this model ({_one_line(error)}); do: try another precision"
        if obstacle is None:
            return OpenedSession(session, "cuda", CUDA_PROVIDER, "")
    try:
        session = _create(ort, model, CPU_PROVIDER, threads)
    except Exception as error:  # as above
        raise BundleError(
            f"onnxruntime {ort.__version__} refuses the model of {len(model)} bytes ({_one_line(error)}); "
            "expected an ONNX graph that it can run; do: export again, or upgrade onnxruntime"
        ) from error
    if device == "cuda":
        raise DeviceUnavailableError(f"device cuda cannot be used: {obstacle}; or ask for device cpu")
    return OpenedSession(session, "cpu", CPU_PROVIDER, f"on the CPU: {obstacle}" if obstacle else "")


def cuda_obstacle() -> str | None:
    """Say in one line why CUDA cannot be used here; None when it has just computed the right numbers.

    Raises
    ------
    MissingExtraError
        onnxruntime is not installed.
    """
    ort = load_onnxruntime()
    if CUDA_PROVIDER not in ort.get_available_providers():
        if sys.platform == "darwin":
            return "macOS has no CUDA"
        wheels = installed_wheels()
        clash = " (installed over each other)" if len(wheels) > 1 else ""
        return f"no CUDA provider in {_named(wheels) or 'onnxruntime'}{clash}; do: {_reinstall('gpu')}"
    supported, cause = _driver()
    if cause is not None:
        return cause
    with _silent_python(), contextlib.suppress(Exception):  # what this cannot load, the probe will miss
        ort.preload_dlls()
    failure = probe(CUDA_PROVIDER)
    return None if failure is None else _diagnosis(ort, supported, failure)


def _diagnosis(ort: ModuleType, supported: int, failure: str) -> str:
    """Name the cause when there is a driver (for CUDA ``supported``: 13000 is 13.0) and the probe failed.

    It opens onnxruntime's CUDA library by hand, so it comes after the probe: onnxruntime is to be the first
    to load its own libraries, in the order that it knows.
    """
    built_for = str(getattr(ort, "cuda_version", "") or "unknown")
    major = int(built_for.partition(".")[0]) if built_for[0].isdigit() else 0
    wheel = f"onnxruntime-gpu {ort.__version__} (built for CUDA {built_for})"
    if supported // 1000 < major:
        older = ', or pip install "onnxruntime-gpu[cuda,cudnn]<1.27" for CUDA 12' if major == 13 else ""
        most = f"{supported // 1000}.{supported % 1000 // 10}"
        return f"the NVIDIA driver supports CUDA {most} at most, too old for {wheel}; do: update it{older}"
    missing = _missing_library(ort, major)
    if missing is not None:
        has = _named(installed_wheels(("nvidia-cublas-cu11", "nvidia-cublas-cu12", "nvidia-cublas")))
        needed = f"which {wheel} needs (pip lists {has or 'no CUDA libraries'})"
        return f'{missing}, {needed}; do: pip install "echoquad[gpu]"'
    return f"{wheel} does not compute on CUDA: {failure}; do: compare with nvidia-smi"


def probe(provider: str) -> str | None:
    """Run ``PROBE_MODEL`` on a provider; None when it gave the right numbers, else one line on what happened.

    Raises
    ------
    MissingExtraError
        onnxruntime is not installed.
    """
    ort, frame = load_onnxruntime(), np.array([[[[0.0, 1.0], [-2.0, 0.5]]]], dtype=np.float32)
    expected = 2.0 * frame + 1.0
    try:
        session = _create(ort, PROBE_MODEL, provider, threads=1)
        computed = np.asarray(session.run(None, {"x": frame})[0])
    except Exception as error:  # onnxruntime's exceptions share no base
        return _one_line(error)
    if computed.shape != expected.shape or not np.allclose(computed, expected, rtol=0.0, atol=1e-6):
        return f"{provider} computed {computed.ravel().tolist()} where {expected.ravel().tolist()} is right"
    return None


def _create(ort: ModuleType, model: bytes, provider: str, threads: int) -> onnxruntime.InferenceSession:
    """Make a session on a provider; beside CUDA, the CPU takes the nodes that CUDA has no kernel for."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4
    providers: list[str | tuple[str, dict[str, str]]] = [provider]
    if provider == CUDA_PROVIDER:
        # Without this float32 is rounded to TF32 from Ampere on, and precision fp32 would not be fp32.
        providers = [(CUDA_PROVIDER, {"use_tf32": "0"}), CPU_PROVIDER]
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    # A provider that cannot be loaded is reported by the process-wide logger, which the options do not reach.
    ort.set_default_logger_severity(4)
    try:
        with contextlib.nullcontext() if provider == CPU_PROVIDER else _silent_python():
            session = ort.InferenceSession(bytes(model), options, providers=providers, enable_fallback=0)
    finally:
        ort.set_default_logger_severity(2)  # its default; it cannot be asked what it was
    session.disable_fallback()  # onnxruntime 1.20 ignores the argument
    if (made := session.get_providers()[0]) != provider:
        raise RuntimeError(f"asked for {provider}, onnxruntime made a session on {made}")
    return session


def _not_on_cuda(session: onnxruntime.InferenceSession) -> str | None:
    """Say so when most of a CUDA session's nodes went to the CPU, as those of a ``QLinearConv`` graph do."""
    assignment = getattr(session, "get_provider_graph_assignment_info", tuple)  # since onnxruntime 1.24
    nodes = [(part.ep_name, node.op_type) for part in assignment() for node in part.get_nodes()]
    elsewhere = [kind for provider, kind in nodes if provider != CUDA_PROVIDER]
    if 2 * len(elsewhere) <= len(nodes):
        return None
    kinds = ", ".join(sorted(set(elsewhere)))
    count = f"{len(elsewhere)} of the model's {len(nodes)} nodes"
    return f"onnxruntime has no CUDA kernel for {count} ({kinds}); do: choose precision fp32 or fp16"


def _driver() -> tuple[int, str | None]:
    """Return the CUDA version that the NVIDIA driver supports (13000 is 13.0) and what is wrong with it."""
    name = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
    version, label = ctypes.c_int(0), ctypes.c_char_p()
    try:
        driver = ctypes.CDLL(name)
        code = int(driver.cuInit(0))
        driver.cuDriverGetVersion(ctypes.byref(version))
        driver.cuGetErrorName(code, ctypes.byref(label))
    except (OSError, AttributeError):
        advice = "install the NVIDIA driver (in a container: start it with --gpus all)"
        return 0, f"no NVIDIA driver was found ({name} cannot be loaded); do: {advice}"
    if code == 0:
        return version.value, None
    error = f"{code}, {(label.value or b'unknown').decode(errors='replace')}"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    why = "" if hidden is None else f", with CUDA_VISIBLE_DEVICES={hidden!r}"
    return version.value, f"the NVIDIA driver gives no GPU (cuInit: {error}{why}); do: check nvidia-smi"


def _missing_library(ort: ModuleType, major: int) -> str | None:
    """Say what keeps onnxruntime's CUDA library, or cuDNN, from being loaded; None when nothing does."""
    capi = Path(ort.__file__ or "").parent / "capi"
    if os.name == "nt":  # Windows names no dependency: each one is tried before what needs it
        parts = ("cudart64_{0}", "cublasLt64_{0}", "cublas64_{0}", "cufft64_{1}", "cudnn64_9")
        names = [f"{part.format(major, major - 1)}.dll" for part in parts]
        names += [str(capi / f"onnxruntime_providers_{part}.dll") for part in ("shared", "cuda")]
    else:
        names = [str(capi / f"libonnxruntime_providers_{part}.so") for part in ("shared", "cuda")]
        names.append("libcudnn.so.9")
    for name in names:
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL, winmode=0)  # 0 searches PATH, as onnxruntime does
        except OSError as error:
            text = _one_line(error)
            lost, found, _ = text.partition(": cannot open shared object file")
            return f"{lost} cannot be loaded" if found else f"{Path(name).name} cannot be loaded ({text})"
    return None


@contextlib.contextmanager
def _silent_python() -> Iterator[None]:
    """Keep from the user what onnxruntime's Python side prints and warns."""
    with _REDIRECTING, warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _silent_import() -> Iterator[None]:
    """Keep from the user what onnxruntime writes while it is imported for the first time.

    From 1.23 on it warns about ``/sys/class/drm`` on Raspberry Pi, WSL and others before a log level can be
    set (its issues 26300, 26763, 27092): only the file descriptor is left to turn.
    """
    with _REDIRECTING, contextlib.ExitStack() as stack:
        if "onnxruntime" not in sys.modules:
            stack.enter_context(_silent_python())
            with contextlib.suppress(OSError):  # without a standard error there is nothing to keep clean
                kept, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
                stack.callback(os.close, kept)
                stack.callback(os.dup2, kept, 2)
                os.dup2(sink, 2)
                os.close(sink)
        yield


def _named(versions: dict[str, str]) -> str:
    return " and ".join(f"{name} {version}" for name, version in versions.items())


def _reinstall(extra: str) -> str:
    """Return the pip lines that leave one wheel: an old one must go first, or two overwrite each other."""
    wheels = " ".join(installed_wheels())
    return (f"pip uninstall -y {wheels}, then " if wheels else "") + f'pip install "echoquad[{extra}]"'


def _one_line(error: object) -> str:
    """Return an exception's message in one line of at most 240 characters, without onnxruntime's preamble."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : (\w+) :", r"\1:", text)
    # A CUDA call that fails reports a C++ signature first, and the machine's name after.
    text = re.sub(r"^.*?(\w+ failure -?\d+: .*?) ; GPU=.*$", r"\1", text).rstrip(".")
    return text if len(text) <= 240 else text[:237] + "..."
