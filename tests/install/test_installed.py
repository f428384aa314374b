"""The installed wheel on a deployment machine: no torch, no checkout, no GPU."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from echoquad_runtime.bundle.golden_frames import GoldenFrames
from echoquad_runtime.bundle.manifest import REDUCED_GATE
from echoquad_runtime.contract import Contract
from echoquad_runtime.quadrants import frame_quadrants

HEAVY = ("torch", "torchvision", "onnx", "onnxscript", "sklearn", "scipy", "matplotlib", "safetensors", "pandas", "cv2")


def test_cpu_installation_is_small_and_without_torch(cpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    files = [path for path in cpu.site.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 1e6
    code = sum(path.stat().st_size for path in files if path.suffix == ".pyc") / 1e6
    with capsys.disabled():
        print(f"\nsite-packages with echoquad[cpu]: {size:.0f} MB, {code:.0f} MB of it compiled Python")  # noqa: T201
    assert size <= 220  # 202 MB with onnxruntime 1.32
    assert [name for name in HEAVY if (cpu.site / name).exists()] == []
    assert "No broken requirements found." in cpu.pip("check")


def test_installed_commands_run(cpu: Any, tiny_bundle: Path, frames_folder: Path, tmp_path: Path) -> None:
    assert cpu.echoquad("--version").out.startswith("echoquad ")
    assert cpu.echoquad("verify", tiny_bundle).out.startswith("PASS ")
    assert cpu.echoquad("inspect", tiny_bundle).out.startswith("Model card: ASD, NORM from echo frames")
    ran = cpu.echoquad("predict", tiny_bundle, frames_folder, "--overlay", tmp_path / "pictures")
    rows = list(csv.DictReader(io.StringIO(ran.out)))
    assert [(row["device"], row["precision"]) for row in rows] == [("cpu", "fp32")] * 6
    assert len(list((tmp_path / "pictures").rglob("*.png"))) == 6
    cpu.echoquad("bench", tiny_bundle, "--frames", "4", "--json", tmp_path / "bench.json")
    figures = json.loads((tmp_path / "bench.json").read_text("utf-8"))
    assert figures["device"] == "cpu"
    assert "onnxruntime" in figures["versions"]
    doctor = cpu.echoquad("doctor")
    assert "[ok] cpu: computed the expected numbers" in doctor.out
    assert '[ok] torch: not installed; only training and export need it: pip install "echoquad[export]"' in doctor.out
    # Phantoms need no torch.
    assert (
        "test: ASD 1, NORM 1"
        in cpu.echoquad("data", "phantom", tmp_path / "data", "--patients", "6", "--frames", "1").out
    )


def test_device_cuda_without_cuda_exits_with_4(cpu: Any, tiny_bundle: Path, frames_folder: Path) -> None:
    for command in (["predict", tiny_bundle, frames_folder], ["verify", tiny_bundle], ["bench", tiny_bundle]):
        ran = cpu.echoquad(*command, "--device", "cuda", code=4)
        assert ran.out == ""
        assert len(ran.err.splitlines()) == 1
        assert "device cuda cannot be used: no CUDA provider in onnxruntime" in ran.err
    ran = cpu.echoquad("doctor", "--device", "cuda", code=4)
    assert "[failed] cuda: no CUDA provider in onnxruntime" in ran.out


def test_missing_extra_is_named_with_its_install_command(cpu: Any, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    cpu.echoquad("data", "phantom", data, "--patients", "6", "--frames", "1")
    commands = {
        ("train", data, "--out", out): "train",
        ("evaluate", data, data, "--out", out): "train",
        ("export", data, "--out", out): "export",
        ("demo", "--out", out): "export",
    }
    for command, extra in commands.items():
        ran = cpu.echoquad(*command, code=1)
        assert ran.out == ""
        assert ran.err.startswith("error[E_EXTRA_MISSING]: ")
        assert f'pip install "echoquad[{extra}]"' in ran.err
        assert not out.exists()


def test_library_predicts_without_heavy_imports(cpu: Any, tiny_bundle: Path, frames_folder: Path) -> None:
    code = f"""
import sys
import echoquad
assert "numpy" not in sys.modules and "onnxruntime" not in sys.modules
from echoquad import Predictor
found = [result.label for result in Predictor({str(tiny_bundle)!r}).predict([{str(frames_folder)!r}])]
print(found, sorted(set({HEAVY}) & set(sys.modules)), echoquad.__file__)
"""
    found, heavy, file = cpu.run_python(code).replace("] [", "]|[").replace("] /", "]|/").split("|")
    assert found.count("ASD") + found.count("NORM") == 6
    assert heavy == "[]"
    assert file.startswith(str(cpu.folder))


def test_gpu_wheel_without_driver_reports_the_cause(
    gpu_without_driver: Any, tiny_bundle: Path, frames_folder: Path
) -> None:
    echoquad = gpu_without_driver.echoquad
    cause = "no NVIDIA driver was found"
    ran = echoquad("predict", tiny_bundle, frames_folder, "--device", "cuda", code=4)
    assert ran.out == ""
    assert len(ran.err.splitlines()) == 1
    assert ran.err.startswith("error[E_DEVICE_UNAVAILABLE]: ") and cause in ran.err

    ran = echoquad("predict", tiny_bundle, frames_folder, "--device", "auto")
    assert {row["device"] for row in csv.DictReader(io.StringIO(ran.out))} == {"cpu"}
    first, second = ran.err.splitlines()  # and no output of onnxruntime
    assert first.startswith(f"on the CPU: {cause}")
    assert second.startswith("6 frames: ")

    ran = echoquad("verify", tiny_bundle)
    assert ran.out.startswith("PASS ")
    assert len(ran.err.splitlines()) == 1
    ran = echoquad("doctor")
    assert f"[warning] cuda: {cause}" in ran.out
    assert ran.err == ""
    ran = echoquad("doctor", "--device", "cuda", code=4)
    assert f"[failed] cuda: {cause}" in ran.out
    assert "onnxruntime-gpu: " in ran.out


# OpenVINO

# Makes oneDNN, inside OpenVINO, assume a processor without bfloat16.
OLD_PROCESSOR = {"ONEDNN_MAX_CPU_ISA": "AVX2"}


def test_openvino_engine_agrees_with_the_cpu(openvino: Any, tiny_bundle: Path) -> None:
    ran = openvino.run_python(
        f"""
import json
import numpy as np
from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.devices.execution_providers import PROBE_MODEL
from echoquad_runtime.devices.session_factory import open_session, probe_devices
from echoquad_runtime.errors import BundleError, DeviceUnavailableError
from echoquad_runtime.engine.onnx_engine import OnnxEngine

bundle = Bundle({str(tiny_bundle)!r})
quadrants = np.random.default_rng(0).integers(0, 256, (64, 1, 32, 32), np.uint8)
expected = OnnxEngine(bundle, device="cpu").infer(quadrants)
found = {{"usable": probe_devices()}}
for precision in ("fp32", "bf16"):
    try:
        engine = OnnxEngine(bundle, device="openvino", precision=precision, threads=1)
    except DeviceUnavailableError as error:
        found[precision] = str(error)
        continue
    runs = {{n: [engine.infer(quadrants[i : i + 4 * n]) for i in range(0, 64, 4 * n)] for n in (1, 2, 5, 16)}}
    logits = {{n: np.concatenate([one for one, _ in run]) for n, run in runs.items()}}
    probabilities = {{n: np.concatenate([other for _, other in run]) for n, run in runs.items()}}
    found[precision] = {{
        "runs": [engine.device, engine.precision, engine.threads],
        "dlogit": max(float(abs(l - expected[0]).max()) for l in logits.values()),
        "dprobability": max(float(abs(p - expected[1]).max()) for p in probabilities.values()),
        "batches": max(float(abs(l - logits[1]).max()) for l in logits.values()),
    }}
for model in (b"", b"garbage", PROBE_MODEL[:50]):
    try:
        open_session(model, device="openvino")
    except BundleError:
        continue
    raise AssertionError(model)
print(json.dumps(found))
"""
    )
    found = json.loads(ran)
    assert found["usable"] == {"cpu": None, "openvino": None}
    assert found["fp32"]["runs"] == ["openvino", "fp32", 1]
    assert found["fp32"]["dlogit"] <= 1e-4  # bfloat16, OpenVINO's default, differs by 1e-2
    assert found["fp32"]["batches"] <= 1e-5
    if isinstance(found["bf16"], str):
        assert "OpenVINO does not compute in bfloat16 on this processor" in found["bf16"]
    else:
        assert found["bf16"]["runs"] == ["openvino", "bf16", 1]
        assert found["bf16"]["dlogit"] > 1e-3  # really bfloat16
        assert found["bf16"]["dprobability"] <= 0.05
        assert found["bf16"]["batches"] <= 1e-2


def test_openvino_predict_agrees_with_the_cpu_and_leaves_no_files(
    openvino: Any, tiny_bundle: Path, frames_folder: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    before = set(openvino.folder.iterdir())

    def rows(device: str) -> list[dict[str, str]]:
        ran = openvino.echoquad(
            "predict",
            tiny_bundle,
            frames_folder,
            "--device",
            device,
            env={"HOME": str(home), "XDG_CACHE_HOME": str(home)},
        )
        assert ran.err.startswith(f"on {device} in fp32\n6 frames: ")
        assert len(ran.err.splitlines()) == 2  # no output of other libraries
        return list(csv.DictReader(io.StringIO(ran.out)))

    for one, other in zip(rows("cpu"), rows("openvino"), strict=True):
        assert (one["device"], one["precision"]) == ("cpu", "fp32")
        assert (other["device"], other["precision"]) == ("openvino", "fp32")
        numbers = [name for name in one if name.startswith(("prob_", "p_"))]
        assert all(abs(float(one[name]) - float(other[name])) < 1.5e-4 for name in numbers)  # of 4 decimals each
        assert all(one[name] == other[name] for name in ("file", "pred_image", "flags"))
    assert list(home.iterdir()) == []  # no cache, no telemetry
    assert set(openvino.folder.iterdir()) == before  # nothing in the working directory
    ran = openvino.echoquad("verify", tiny_bundle, "--device", "openvino")
    assert ran.out.startswith("PASS ")
    assert " on openvino in fp32: " in ran.out


@pytest.fixture(scope="module")
def int8_bundle(make_tiny_bundle: Any, make_tiny_graph: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with an int8 graph whose first convolution has the stride 2."""
    onnx = pytest.importorskip("onnx")
    from echoquad_export.graph.onnx_graph import open_in_memory
    from echoquad_export.precision.calibration_set import Ranges
    from echoquad_export.precision.quantize import activation_tensors, prepare, quantize

    contract = Contract(classes=("ASD", "NORM"), input_size=32)
    model = onnx.load_from_string(make_tiny_graph(contract))
    convolution = next(node for node in model.graph.node if node.op_type == "Conv")
    convolution.attribute.append(onnx.helper.make_attribute("strides", [2, 2]))
    convolution.attribute.append(onnx.helper.make_attribute("pads", [1] * 4))
    single = model.SerializeToString()
    frames = np.random.default_rng(0).integers(0, 256, (8, 60, 80), np.uint8)
    quadrants = np.stack([frame_quadrants(frame, contract) for frame in frames])
    prepared = prepare(single, contract)
    graphs = {
        "fp32": single,
        "int8": quantize(prepared, Ranges(prepared, quadrants[:, :, 0], activation_tensors(prepared))),
    }
    found = open_in_memory(single).run(["logits", "probabilities"], {"quadrants": quadrants.reshape(-1, 1, 32, 32)})
    logits, probabilities = (answer.reshape(len(frames), 4, 2) for answer in found)
    golden = GoldenFrames(tuple(f"noise-{i}" for i in range(len(frames))), tuple(frames), logits, probabilities)
    parity = {name: {"device": "cpu", "gate": dict(REDUCED_GATE)} for name in graphs}
    return Path(
        make_tiny_bundle(
            tmp_path_factory.mktemp("int8") / "bundle",
            precisions=list(graphs),
            graphs=graphs,
            golden=golden,
            manifest={"parity": parity},
        )
    )


def test_openvino_verifies_and_runs_an_int8_graph(openvino: Any, int8_bundle: Path, frames_folder: Path) -> None:
    for device in ("cpu", "openvino"):
        verified = openvino.echoquad("verify", int8_bundle, "--device", device, "--precision", "int8")
        assert verified.out.startswith("PASS ") and f" on {device} in int8: " in verified.out
        ran = openvino.echoquad("predict", int8_bundle, frames_folder, "--device", device, "--precision", "int8")
        rows = list(csv.DictReader(io.StringIO(ran.out)))
        assert [(row["device"], row["precision"]) for row in rows] == [(device, "int8")] * 6


@pytest.mark.slow
def test_openvino_runs_the_first_convolution_in_integers(openvino_alone: Any, int8_bundle: Path) -> None:
    kernels = openvino_alone.run_python(
        f"""
import openvino
core = openvino.Core()
for file in ("fp32", "int8"):
    model = core.compile_model({str(int8_bundle)!r} + f"/model.{{file}}.onnx", "CPU").get_runtime_model()
    facts = [{{key: value.astype(str) for key, value in op.get_rt_info().items()}} for op in model.get_ordered_ops()]
    print(*[fact["primitiveType"] for fact in facts if "Convolution" in fact["layerType"]])
"""
    )
    single, integers = kernels.splitlines()
    assert "_I8" not in single and integers.endswith("_I8") and len(integers.split()) == 1


def test_openvino_bfloat16_needs_processor_support(openvino: Any, tiny_bundle: Path) -> None:
    verify = ("verify", tiny_bundle, "--precision", "bf16", "--device", "openvino")
    doctor = openvino.echoquad("doctor", "--device", "openvino")
    assert "[ok] openvino: computed the expected numbers, " in doctor.out
    if "also in bfloat16" in doctor.out:
        assert " on openvino in bf16: " in openvino.echoquad(*verify).out
    ran = openvino.echoquad(*verify, code=4, env=OLD_PROCESSOR)
    assert ran.out == ""
    assert "OpenVINO does not compute in bfloat16 on this processor" in ran.err


def test_device_without_support_in_the_wheel_exits_with_4(openvino: Any, cpu: Any, tiny_bundle: Path) -> None:
    for environment, device in ((openvino, "cuda"), (cpu, "openvino")):
        ran = environment.echoquad("verify", tiny_bundle, "--device", device, code=4)
        assert ran.out == ""
        assert f"device {device} cannot be used: " in ran.err


# Signing

KEYS = """
from pathlib import Path
from cryptography.hazmat.primitives import serialization as form
from cryptography.hazmat.primitives.asymmetric import ec
key = ec.generate_private_key(ec.SECP256R1())
private = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
Path({folder!r}, "key.pem").write_bytes(private)
public = key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
Path({folder!r}, "pub.pem").write_bytes(public)
"""


@pytest.mark.slow
def test_extra_sign_installs_all_dependencies(
    signing: Any, cpu: Any, tiny_bundle: Path, frames_folder: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    key, public_key = tmp_path / "key.pem", ["--public-key", tmp_path / "pub.pem"]
    signing.run_python(KEYS.format(folder=str(tmp_path)))
    assert "No broken requirements found." in signing.pip("check")
    assert signing.echoquad("sign", bundle, "--key", key).out.startswith("signed ")
    assert signing.echoquad("verify", bundle, *public_key).out.startswith("PASS ")
    assert len(signing.echoquad("predict", bundle, frames_folder, *public_key).out.splitlines()) == 7
    assert 'pip install "echoquad[sign]"' in cpu.echoquad("predict", bundle, frames_folder, *public_key, code=1).err
