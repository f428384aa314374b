"""``echoquad verify``: intact, damaged and wrong bundles, the JSON record, several devices and precisions."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from echoquad_runtime._version import __version__
from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.devices.execution_providers import CUDA_PROVIDER
from echoquad_runtime.devices.onnxruntime_loader import load_onnxruntime

FILES = ("bundle.json", "model.fp32.onnx", "golden.npz", "MODEL_CARD.md")

without_cuda = pytest.mark.skipif(
    CUDA_PROVIDER in load_onnxruntime().get_available_providers(), reason="this onnxruntime has CUDA"
)


def test_verify_of_an_intact_bundle_passes_in_one_line(tiny_bundle: Path, echoquad: Callable[..., Any]) -> None:
    ran = echoquad("verify", tiny_bundle, "--device", "cpu")
    assert ran.out.startswith(f"PASS {tiny_bundle.as_posix()}: 3 files intact, 6 golden frames on cpu in fp32: worst ")
    assert len(ran.out.splitlines()) == 1
    figures, provider, versions = ran.out.rstrip("\n").split("; ")
    assert figures.endswith("0 frame flips, 0 quadrant flips")
    assert provider == "CPUExecutionProvider"
    found = platform.python_version(), f"{platform.system()} {platform.machine()}"
    assert re.fullmatch(
        rf"echoquad {re.escape(__version__)}, onnxruntime\S* \S+, Python {found[0]}, {found[1]}", versions
    )
    assert ran.err == ""  # --device cpu leaves nothing to explain


@without_cuda
def test_auto_explains_why_it_takes_the_cpu(tiny_bundle: Path, echoquad: Callable[..., Any]) -> None:
    ran = echoquad("verify", tiny_bundle)
    assert " on cpu in fp32" in ran.out
    assert len(ran.err.splitlines()) == 1
    assert ran.err.startswith("on the CPU: onnxruntime")


def test_verify_of_a_damaged_or_wrong_bundle_exits_3(
    make_tiny_bundle: Callable[..., Path], many: Callable[..., Any], tmp_path: Path
) -> None:
    folders = {}
    for name in FILES:
        for fault in ("flipped", "cut", "gone"):
            folder = make_tiny_bundle(tmp_path / f"{fault}-{name}")
            data = bytearray((folder / name).read_bytes())
            data[len(data) // 2] ^= 1
            if fault == "gone":
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(data if fault == "flipped" else data[: len(data) // 2])
            folders[fault, name] = folder
    wrong = make_tiny_bundle(tmp_path / "wrong", graph={"logit_scale": 1.5})
    lines = [["verify", folder] for folder in [*folders.values(), wrong]]
    found, modules = many([*lines, ["predict", wrong, "x.png", "--precision", "fp64"]])
    assert "torch" not in modules
    for ((fault, name), folder), ran in zip(folders.items(), found[: len(folders)], strict=True):
        missing = (fault, name) == ("gone", "bundle.json")  # no bundle at all
        assert (ran.code, ran.out, len(ran.err.splitlines())) == (1 if missing else 3, "", 1), (fault, name, ran)
        assert ran.error[0] == ("E_BUNDLE_NOT_FOUND" if missing else "E_VERIFICATION"), (fault, name)
        assert ran.errors[0].startswith(f"{folder.as_posix()}: "), (fault, name)
        assert missing or name in ran.errors[0], (fault, name)
    ran = found[len(folders)]
    assert (ran.code, ran.out, ran.error[0]) == (3, "", "E_VERIFICATION")
    assert f"{wrong.as_posix()}: FAILED, 3 files intact" in ran.errors[0]
    assert ran.errors[0].endswith("do not deploy it on this device")
    assert found[-1].code == 1


def test_record_is_written_for_every_verdict(
    tiny_bundle: Path,
    make_tiny_bundle: Callable[..., Path],
    many: Callable[..., Any],
    left_in: Callable[..., Any],
    tmp_path: Path,
) -> None:
    wrong = make_tiny_bundle(tmp_path / "wrong", graph={"logit_scale": 1.5})
    nan = make_tiny_bundle(tmp_path / "nan", graph={"logit_scale": float("nan")})
    damaged = make_tiny_bundle(tmp_path / "damaged")
    (damaged / "MODEL_CARD.md").write_text("another")
    bundles = {"good": tiny_bundle, "wrong": wrong, "nan": nan, "damaged": damaged, "none": tmp_path / "none"}
    for name in bundles:
        (tmp_path / f"{name}.json").write_text("an older record")
    found, modules = many(
        [["verify", folder, "--device", "cpu", "--json", tmp_path / f"{name}.json"] for name, folder in bundles.items()]
    )
    assert "torch" not in modules
    assert left_in(tmp_path) == []
    records = {name: json.loads((tmp_path / f"{name}.json").read_text("utf-8")) for name in bundles}
    for (name, folder), ran in zip(bundles.items(), found, strict=True):
        assert ran.code == {"good": 0, "none": 1}.get(name, 3), name
        assert ran.err.startswith(f"wrote {(tmp_path / name).as_posix()}.json\n"), name
        assert records[name]["verdict"] == ("failed" if ran.code else "passed"), name
        assert records[name]["bundle"] == folder.as_posix()
    (one,) = records["good"]["checks"]
    assert (one["passed"], one["frame_flips"], len(one["golden"])) == (True, 0, 6)
    (one,) = records["wrong"]["checks"]
    assert one["passed"] is False and one["max_abs_dlogit"] > 1e-4
    assert records["nan"]["checks"][0]["max_abs_dlogit"] is None
    assert "MODEL_CARD.md" in records["damaged"]["error"] and records["damaged"]["checks"] == []
    assert "bundle.json" in records["none"]["error"] and records["none"]["manifest_sha256"] is None


def test_record_that_cannot_be_written_does_not_hide_the_verdict(
    tiny_bundle: Path, make_tiny_bundle: Callable[..., Path], many: Callable[..., Any], tmp_path: Path
) -> None:
    wrong = make_tiny_bundle(tmp_path / "wrong", graph={"logit_scale": 1.5})
    nowhere = tmp_path / "nowhere" / "record.json"
    lines = [["verify", folder, "--device", "cpu", "--json", nowhere] for folder in (tiny_bundle, wrong)]
    (good, bad), _ = many(lines)
    assert good.code == 1 and good.out.startswith("PASS ")
    assert good.error[0] == "E_OUTPUT" and "record.json" in good.errors[0]
    assert bad.code == 3 and bad.error[0] == "E_VERIFICATION"
    assert bad.err.startswith("the record is not written: ")


# A host where two devices work, here the CPU under two names, and one does not.
OTHER_DEVICES = """
import echoquad_runtime.devices.session_factory as devices, echoquad_runtime.engine.onnx_engine as engine
devices.probe_devices = lambda: {"cpu": None, "openvino": None, "cuda": "no NVIDIA driver was found; do: install it"}
def open_session(model, *, device, **options):
    return devices.open_session(model, device="cpu", **{**options, "bfloat16": False})
engine.open_session = open_session
"""


def test_every_precision_and_device_is_a_row_of_the_table(
    make_tiny_bundle: Callable[..., Path], echoquad: Callable[..., Any], many: Callable[..., Any], tmp_path: Path
) -> None:
    bundle = make_tiny_bundle(tmp_path / "bundle", precisions=("fp32", "int8"))
    record = tmp_path / "record.json"
    cpu = ["--device", "cpu"]
    (every, both, wrong), _ = many(
        [
            ["verify", bundle, "--precision", "all", *cpu],
            ["verify", bundle, "--all-devices", "--precision", "int8"],
            ["verify", bundle, "--all-devices", *cpu, "--json", record],
        ]
    )
    assert (every.code, wrong.code) == (0, 2)
    assert wrong.error[0] == "E_USAGE" and "--all-devices with --device cpu" in wrong.errors[0]
    assert not record.exists()
    lines = every.out.splitlines()
    assert [line.split()[:3] for line in lines[2:-1]] == [
        ["cpu", "fp32", "CPUExecutionProvider"],
        ["cpu", "int8", "CPUExecutionProvider"],
    ]
    assert all(line.split()[-3:] == ["0", "0", "passed"] for line in lines[2:-1])
    passed = f"PASS {bundle.as_posix()}: 4 files intact, 2 of 2 checks of 6 golden frames; echoquad "
    assert lines[-1].startswith(passed)
    assert both.out.splitlines()[2].split()[:2] == ["cpu", "int8"] and " fp32 " not in both.out

    ran = echoquad("verify", bundle, "--all-devices", "--json", record, driver=OTHER_DEVICES)
    lines = ran.out.splitlines()
    assert [line.split()[1] for line in lines[2:7]] == ["fp32", "int8", "fp32", "int8", "bf16"]
    assert lines[7] == "cuda is not usable: no NVIDIA driver was found; do: install it"
    assert "5 of 5 checks of 6 golden frames" in lines[8]
    found = json.loads(record.read_text("utf-8"))
    assert found["devices_not_usable"] == {"cuda": "no NVIDIA driver was found; do: install it"}
    assert [one["passed"] for one in found["checks"]] == [True] * 5


def test_one_failed_check_of_several_exits_3(
    make_tiny_bundle: Callable[..., Path],
    make_tiny_graph: Callable[..., bytes],
    many: Callable[..., Any],
    tmp_path: Path,
) -> None:
    contract = Bundle(make_tiny_bundle(tmp_path / "plain")).contract
    wrong = make_tiny_graph(contract, logit_scale=1.5)
    bundle = make_tiny_bundle(tmp_path / "bundle", precisions=("fp32", "int8"), graphs={"int8": wrong})
    (ran,), _ = many([["verify", bundle, "--precision", "all", "--device", "cpu"]])
    assert (ran.code, ran.error[0]) == (3, "E_VERIFICATION")
    assert [line.split()[-1] for line in ran.out.splitlines()[2:]] == ["passed", "FAILED"]
    assert ran.errors[0].startswith(f"{bundle.as_posix()}: FAILED in 1 of 2 checks: int8 on cpu: 4 files intact")
    assert ran.errors[0].endswith("do not deploy it on this device")
