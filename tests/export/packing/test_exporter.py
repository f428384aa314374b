"""Export of a run to a bundle: contents, parity, the target folder, and failures at each step."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from echoquad_export.packing import exporter as pack
from echoquad_export.packing.exporter import check_precisions, export_run
from echoquad_export.parity import golden
from echoquad_export.parity.parity import GATES, Gate
from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.manifest import INTENDED_USE
from echoquad_runtime.bundle.model_card import model_card
from echoquad_runtime.engine.onnx_engine import OnnxEngine
from echoquad_runtime.errors import (
    BundleTamperedError,
    DatasetError,
    OutputError,
    ParityError,
    RunError,
    UsageError,
    VerificationError,
)
from echoquad_runtime.predict.prediction import Prediction
from echoquad_runtime.predict.predictor import Predictor
from echoquad_runtime.verify.verify import verify
from echoquad_train.evaluation.intervals import wilson_interval
from echoquad_train.networks.torch_engine import TorchEngine
from echoquad_train.recipe import Recipe
from echoquad_train.runs.checkpoint import load_run

FILES = {"bundle.json", "model.fp32.onnx", "golden.npz", "MODEL_CARD.md"}


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def manifest(case: Any) -> dict[str, Any]:
    return json.loads((case.bundle / "bundle.json").read_text("ascii"))


@pytest.fixture
def ready(case: Any, thin: None, few_golden: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Reuse the graph that was built before, or a changed one, because building takes seconds."""

    def use(change: Callable[[onnx.ModelProto], None] | None = None) -> None:
        data = (case.bundle / "model.fp32.onnx").read_bytes()
        if change is not None:
            proto = onnx.load_from_string(data)
            change(proto)
            data = proto.SerializeToString()
        monkeypatch.setattr(pack, "build_graph", lambda model, contract, typicality: data)

    use()
    return use


# The bundle


@pytest.mark.parametrize("which", ["case", "other_case"])
def test_bundle_is_complete_and_verifies(which: str, request: pytest.FixtureRequest) -> None:
    made = request.getfixturevalue(which)
    assert set(tree(made.bundle)) == FILES
    found = verify(made.bundle, device="cpu")
    assert found.passed and found.files == 3
    assert found.frame_flips == found.quadrant_flips == 0 and found.max_abs_dlogit < 1e-4
    assert found.tolerated_frame_flips == found.tolerated_quadrant_flips == 0
    assert found.frames == Bundle(made.bundle).manifest["golden"]["frames"] > 15
    exported = made.exported
    assert exported.folder == made.bundle and exported.unreadable == 0 and exported.verification.passed
    assert [parity.precision for parity in exported.parities] == ["fp32"]
    assert exported.parities[0].passed and exported.parities[0].frames == 4 * len(Bundle(made.bundle).contract.classes)
    assert [path.name for path in made.bundle.parent.iterdir() if path.name.startswith(".")] == []


def test_bundle_holds_the_contract_of_the_run(other_case: Any, thin: None) -> None:
    contract = Bundle(other_case.bundle).contract
    assert contract == load_run(other_case.run).contract
    assert (contract.classes, contract.positive, contract.vote) == (("ASD", "NORM", "VSD"), "VSD", "weighted")
    assert (contract.keep, contract.mean, contract.std) == (0.7, 0.3, 0.21)
    assert contract.vote_weights == (0.0, 1.0, 2.0, 3.5)


def test_bundle_decides_as_its_run(other_case: Any, thin: None) -> None:
    run = load_run(other_case.run)
    torch_engine = Predictor(TorchEngine(run.model, run.contract))
    bundled = Predictor(other_case.bundle, device="cpu")
    for a, b in zip(
        torch_engine.predict([other_case.data / "validation"]),
        bundled.predict([other_case.data / "validation"]),
        strict=True,
    ):
        assert isinstance(a, Prediction) and isinstance(b, Prediction)
        assert (a.file, a.label, a.method, a.quadrant_labels) == (b.file, b.label, b.method, b.quadrant_labels)
        assert a.probabilities == pytest.approx(b.probabilities, abs=1e-5)


def test_manifest_records_provenance_and_parity(case: Any) -> None:
    found, info = manifest(case), json.loads((case.run / "run.json").read_text("utf-8"))
    assert found["intended_use"] == INTENDED_USE and "Research use only" in INTENDED_USE
    assert set(found["precisions"]) == {"fp32"} and found["default_precision"] == "fp32"
    maps = found["precisions"]["fp32"].pop("cam")
    assert found["precisions"]["fp32"] == {"opset": 18, "ir_version": 10}
    assert maps["sides"] == [1, 1] and maps["max_abs_difference"] < 1e-4
    training = found["training"]
    assert training["frames"] == info["data"]["frames"] and training["unreadable"] == 0
    assert training["best"] == info["best"] and training["epochs"] == 2 and training["git_commit"] == info["git_commit"]
    assert Recipe.from_toml(training["recipe"]) == load_recipe(case.run)
    assert training["audit"] == info["audit"] and info["audit"]["patients_across"] == 1  # its splits share a patient
    parity = found["parity"]["fp32"]
    assert parity["passed"] and parity["frames"] == 8 and parity["source"] == "validation split"
    assert [batch["batch_size"] for batch in parity["batches"]] == [1, 2, 5, 16]
    for name, entry in found["files"].items():
        assert (case.bundle / name).stat().st_size == entry["bytes"]


def load_recipe(run: Path) -> Recipe:
    return Recipe.load(str(run / "recipe.toml"))


@pytest.mark.parametrize("which", ["case", "other_case"])
def test_bundle_contains_no_names_of_the_data(which: str, request: pytest.FixtureRequest) -> None:
    made = request.getfixturevalue(which)
    assert any("DOE-JANE" in path.as_posix() for path in made.data.rglob("*"))  # otherwise the test proves nothing
    frames = Bundle(made.bundle).read_golden()
    words = " ".join([*frames.names, *(phrase for reasons in frames.reasons for phrase in reasons)])
    texts = {**tree(made.bundle), "golden frames": words.encode()}
    for words in ("DOE", "JANE", "scans of", made.data.parent.name, str(made.data.parent), made.run.as_posix()):
        for spelling in (words, words.replace(" ", "%20"), json.dumps(words)[1:-1]):
            assert [name for name, data in texts.items() if spelling.encode() in data] == [], spelling


def test_manifest_does_not_name_the_weights_file(case: Any, run: Path, tmp_path: Path, ready: Any) -> None:
    named = load_recipe(run).replace(weights="C:/scans of DOE-JANE/best.safetensors")
    (run / "recipe.toml").write_text(named.to_toml(), "utf-8")
    export_run(run, tmp_path / "bundle")
    assert b"DOE-JANE" not in b"".join(tree(tmp_path / "bundle").values())
    training = json.loads((tmp_path / "bundle" / "bundle.json").read_text("ascii"))["training"]
    assert Recipe.from_toml(training["recipe"]) == named.replace(weights="file")


def test_progress_reports_each_step(case: Any, run: Path, tmp_path: Path, ready: Any) -> None:
    steps: list[str] = []
    export_run(run, tmp_path / "bundle", progress=steps.append)
    assert steps == [
        "reading the run",
        "fitting the typicality score to 8 training frames",
        "running 8 validation frames through the training code",
        "building the fp32 graph and measuring its parity",
        "choosing golden frames",
        "measuring the validation figures",
        "replaying the golden frames",
    ]


# Model card and metrics


@pytest.mark.parametrize("which", ["case", "other_case"])
def test_model_card_is_generated_from_the_manifest(which: str, request: pytest.FixtureRequest) -> None:
    made = request.getfixturevalue(which)
    card = (made.bundle / "MODEL_CARD.md").read_text("utf-8")
    assert card == model_card(manifest(made)).markdown()
    assert f"**{INTENDED_USE}**" in card and Bundle(made.bundle).contract.sha256 in card
    assert "not stated" not in card  # an export fills in all fields


def test_metrics_are_those_of_the_validation_split(case: Any, thin: None) -> None:
    metrics, best = manifest(case)["metrics"], manifest(case)["training"]["best"]
    found = metrics["export"]
    assert found["source"] == "validation split"
    assert metrics["training"]["epoch"] == best["epoch"]
    assert metrics["training"]["frame_accuracy"]["share"] == best["validation_frame_accuracy"]
    run = load_run(case.run)
    predictor = Predictor(TorchEngine(run.model, run.contract))
    right = dict.fromkeys(run.contract.classes, 0)
    quadrants = 0
    for name in right:
        for result in predictor.predict([case.data / "validation" / name]):
            assert isinstance(result, Prediction)
            right[name] += result.label == name
            quadrants += result.quadrant_labels.count(name)
    for name, count in right.items():
        ci95 = list(wilson_interval(count, 4))
        assert found["recall"][name] == {"right": count, "count": 4, "share": count / 4, "ci95": ci95}
    total = sum(right.values())
    assert found["frame_accuracy"] == {
        "right": total,
        "count": 8,
        "share": total / 8,
        "ci95": list(wilson_interval(total, 8)),
    }
    assert found["quadrant_accuracy"] == {"right": quadrants, "count": 32, "share": quadrants / 32}


def test_unreadable_frames_are_skipped_and_counted(case: Any, run: Path, tmp_path: Path, ready: Any) -> None:
    data = Path(shutil.copytree(case.data, tmp_path / "data"))
    next((data / "validation" / "ASD").rglob("*.png")).write_bytes(b"")
    exported = export_run(run, tmp_path / "bundle", parity_data=data)
    assert exported.unreadable == 1 and exported.parities[0].frames == 7


# Parity


def head_bias(proto: onnx.ModelProto) -> onnx.TensorProto:
    (tensor,) = [t for t in proto.graph.initializer if list(t.dims) == [2] and t.data_type == onnx.TensorProto.FLOAT]
    return tensor


def nudge(proto: onnx.ModelProto) -> None:
    """Change one weight of the head, as a wrong conversion might."""
    tensor = head_bias(proto)
    values = onnx.numpy_helper.to_array(tensor) + np.array([1e-3, 0], np.float32)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def spoil(proto: onnx.ModelProto) -> None:
    tensor = head_bias(proto)
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.full(2, np.nan, np.float32), tensor.name))


@pytest.mark.parametrize("change", [nudge, spoil])
@pytest.mark.parametrize("older", [True, False])
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_failed_parity_leaves_the_target_unchanged(
    case: Any, run: Path, tmp_path: Path, ready: Any, change: Any, older: bool
) -> None:
    out = tmp_path / "deploy" / "bundle"
    if older:
        shutil.copytree(case.bundle, out)
        before = tree(out)
    ready(change)
    with pytest.raises(ParityError) as error:
        export_run(run, out)
    message = str(error.value)
    assert error.value.exit_code == 3 and "\n" not in message and "|dlogit|" in message and "no bundle" in message
    assert [path.name for path in out.parent.iterdir()] == (["bundle"] if older else [])
    if older:
        assert tree(out) == before and verify(out, device="cpu").passed


def test_gate_can_be_replaced(run: Path, tmp_path: Path, ready: Any) -> None:
    with pytest.raises(ParityError, match=r"\|dprobability\|"):
        export_run(run, tmp_path / "bundle", gate=Gate(None, -1.0, 0.0, None))
    ready(nudge)
    exported = export_run(run, tmp_path / "bundle", gate=Gate(None, 0.05, 0.01, None))
    assert exported.parities[0].passed and exported.parities[0].gate.max_abs_dlogit is None


def test_failed_verification_leaves_no_bundle(
    run: Path, tmp_path: Path, ready: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = golden.make_golden

    def other(*arguments: Any) -> Any:
        found = real(*arguments)
        found.probabilities[3] = found.probabilities[3, :, ::-1]
        return found

    monkeypatch.setattr(golden, "make_golden", other)
    with pytest.raises(VerificationError) as error:
        export_run(run, tmp_path / "new" / "bundle")
    assert error.value.exit_code == 3 and "phantom-00" in str(error.value)
    assert list((tmp_path / "new").iterdir()) == []


# The target


@pytest.mark.parametrize("held", ["folder", "file", "bundle and more"])
def test_other_files_in_the_target_raise_output_error(
    case: Any, run: Path, tmp_path: Path, ready: Any, held: str
) -> None:
    out = tmp_path / "deploy" / "bundle"
    if held == "bundle and more":
        shutil.copytree(case.bundle, out)
        (out / "predictions.csv").write_text("mine")
    elif held == "folder":
        out.mkdir(parents=True)
        (out / "thesis.docx").write_text("mine")
    else:
        out.parent.mkdir()
        out.write_text("mine")
    before = tree(out.parent)
    with pytest.raises(OutputError) as error:
        export_run(run, out)
    assert out.as_posix() in str(error.value) and "--out" in str(error.value) and "\n" not in str(error.value)
    assert tree(out.parent) == before and [path.name for path in out.parent.iterdir()] == ["bundle"]


@pytest.mark.parametrize(
    "held", ["nothing", "an empty folder", "an older bundle", "a damaged bundle", "with .DS_Store"]
)
def test_empty_folder_or_bundle_is_replaced(case: Any, run: Path, tmp_path: Path, ready: Any, held: str) -> None:
    out = tmp_path / "deploy" / "bundle"
    if held == "an empty folder":
        out.mkdir(parents=True)
    elif held != "nothing":
        shutil.copytree(case.bundle, out)
        (out / "MODEL_CARD.md").write_text("old")
    if held == "a damaged bundle":
        (out / "bundle.json").write_text("{")
        (out / "model.int8.onnx").write_text("old")
    if held == "with .DS_Store":
        (out / ".DS_Store").write_text("")
    export_run(run, out)
    assert set(tree(out)) == FILES and verify(out, device="cpu").passed
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]


def test_current_folder_can_be_the_target(
    run: Path, tmp_path: Path, ready: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    try:
        export_run(run, Path())
    except OutputError:  # Windows locks the current folder
        assert os.name == "nt"
    else:
        assert set(tree(here)) == FILES
    finally:
        monkeypatch.chdir(tmp_path)


def test_symbolic_link_to_the_target_is_kept(case: Any, run: Path, tmp_path: Path, ready: Any) -> None:
    real, link = tmp_path / "v1", tmp_path / "current"
    shutil.copytree(case.bundle, real)
    (real / "MODEL_CARD.md").write_text("old")
    try:
        link.symlink_to(real, target_is_directory=True)
    except OSError:
        pytest.skip("no symbolic links on this system")
    export_run(run, link)
    assert link.is_symlink() and verify(real, device="cpu").passed
    assert {path.name for path in tmp_path.iterdir()} == {"v1", "current", "run"}


# Atomic


class Stop(BaseException):
    """A BaseException that no code catches."""


@pytest.mark.parametrize("step", ["build_graph", "write_bytes", "measure_parity", "model_card", "verify", "Bundle"])
@pytest.mark.parametrize("error", [Stop, OSError])
def test_failure_at_any_step_leaves_the_older_bundle(
    case: Any, run: Path, tmp_path: Path, ready: Any, monkeypatch: pytest.MonkeyPatch, step: str, error: Any
) -> None:
    out = tmp_path / "deploy" / "bundle"
    shutil.copytree(case.bundle, out)
    before = tree(out)

    def stop(*_: object, **__: object) -> None:
        assert any(path.name.endswith(".partial") for path in out.parent.iterdir())
        raise error

    monkeypatch.setattr(pack, step, stop)
    with pytest.raises(error):
        export_run(run, out)
    assert tree(out) == before and [path.name for path in out.parent.iterdir()] == ["bundle"]


@pytest.mark.parametrize("error", [PermissionError(13, "Access is denied"), Stop()])
@pytest.mark.parametrize("call", [1, 2])
def test_failed_rename_restores_the_older_bundle(
    case: Any, run: Path, tmp_path: Path, ready: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException, call: int
) -> None:
    out = tmp_path / "deploy" / "bundle"
    shutil.copytree(case.bundle, out)
    before, real, calls = tree(out), Path.rename, 0

    def rename(path: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        return real(path, target)

    monkeypatch.setattr("echoquad_runtime.storage.atomic_folder._exchange", lambda a, b: False)
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises((OutputError, Stop)):
        export_run(run, out)
    assert tree(out) == before and [path.name for path in out.parent.iterdir()] == ["bundle"]


def test_older_bundle_stays_until_the_new_one_is_verified(
    case: Any, run: Path, tmp_path: Path, ready: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "bundle"
    shutil.copytree(case.bundle, out)
    before, seen = tree(out), []

    real = pack._replay

    def watch(folder: Path, *others: Any) -> Any:  # the last step before the bundle takes its name
        found = real(folder, *others)
        seen.append((tree(out) == before, set(tree(folder)) == FILES, found.passed))
        return found

    monkeypatch.setattr(pack, "_replay", watch)
    export_run(run, out)
    assert seen == [(True, True, True)]


def test_changed_byte_raises_bundle_tampered_error(case: Any, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(case.bundle, tmp_path / "bundle"))
    data = bytearray((copy / "model.fp32.onnx").read_bytes())
    data[-100] ^= 1
    (copy / "model.fp32.onnx").write_bytes(data)
    with pytest.raises(BundleTamperedError):
        verify(copy, device="cpu")


# Precisions asked for


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (["int4", "fp32"], "--precision 'int4,fp32'"),
        (["fp64"], "--precision 'fp64'"),
        (["fp32", "FP32"], "fp32, fp16, int8"),
        ([], "--precision ''"),
    ],
)
def test_unknown_precision_raises_usage_error(run: Path, tmp_path: Path, wanted: list[str], words: str) -> None:
    for call in (lambda: check_precisions(wanted), lambda: export_run(run, tmp_path / "bundle", precisions=wanted)):
        with pytest.raises(UsageError) as error:
            call()
        assert error.value.exit_code == 2 and words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "bundle").exists()


def test_duplicate_precision_is_built_once() -> None:
    assert check_precisions(["int8", "fp32", "int8"]) == ("int8", "fp32")


# The run


def test_incomplete_run_raises_run_error(case: Any, run: Path, tmp_path: Path, thin: None) -> None:
    out = tmp_path / "bundle"
    info = json.loads((run / "run.json").read_text("utf-8"))

    def refused(words: str, **changes: Any) -> None:
        (run / "run.json").write_text(json.dumps({**info, **changes}), "utf-8")
        with pytest.raises(RunError) as error:
            export_run(run, out)
        assert words in str(error.value) and "\n" not in str(error.value) and error.value.exit_code == 1
        assert not out.exists() and not [path for path in tmp_path.iterdir() if path.name.startswith(".")]

    refused("--parity DATA", data={})
    refused("--parity DATA", data=None)
    gone = {**info["data"], "folder": (tmp_path / "moved away").as_posix()}
    refused("--parity DATA", data=gone)
    refused("best.safetensors", best=None)
    with pytest.raises(RunError, match=r"run\.json"):
        export_run(tmp_path / "none", out)


def test_parity_data_with_unknown_class_raises_dataset_error(
    run: Path, tmp_path: Path, thin: None, other_case: Any
) -> None:
    with pytest.raises(DatasetError, match=r"VSD.*ASD, NORM"):
        export_run(run, tmp_path / "bundle", parity_data=other_case.data)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.slow
def test_reference_network_trains_and_exports(case: Any, tmp_path: Path) -> None:
    """A full resnet18 with random weights, at 64 pixels."""
    from echoquad_train.fitting.loop import fit

    class Silent:
        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *_: None

    recipe = Recipe.load("scratch").replace(input_size=64, epochs=1, batch_size=16)
    fit(case.data, tmp_path / "run", recipe, device="cpu", resume=False, reporter=Silent())
    assert export_run(tmp_path / "run", tmp_path / "bundle").verification.passed


def test_inexact_activation_maps_leave_no_bundle(
    case: Any, thin: None, few_golden: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("echoquad_export.graph.activation_map.CAM_TOLERANCE", -1.0)
    with pytest.raises(ParityError, match="class activation maps"):
        export_run(case.run, tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


# Precisions


def test_one_bundle_holds_all_precisions(case: Any, thin: None, few_golden: None, tmp_path: Path) -> None:
    steps: list[str] = []
    exported = export_run(
        case.run, tmp_path / "bundle", precisions=("int8", "fp16", "fp32"), calibration_frames=5, progress=steps.append
    )
    bundle = Bundle(tmp_path / "bundle")
    assert bundle.default_precision == "int8" and set(bundle.precisions) == {"int8", "fp16", "fp32"}
    assert [parity.precision for parity in exported.parities] == ["int8", "fp16", "fp32"]
    details = bundle.manifest["precisions"]["int8"]
    assert details["calibration"]["frames"] == 5 and details["calibration"]["split"] == "train"
    assert details["calibration"]["method"] == "min-max" and len(details["calibration"]["sha256"]) == 64
    assert details["float_layers"] == [] and details["attempts"][0]["passed"] is True
    assert set(bundle.manifest["precisions"]["fp16"]) == {"opset", "ir_version", "cam"}
    assert all(found["cam"]["max_abs_difference"] < 1e-4 for found in bundle.manifest["precisions"].values())
    assert "int8 passed: min-max calibration on 5 training frames" in steps
    quadrants = np.random.default_rng(0).integers(0, 256, (8, 1, 24, 24), np.uint8)
    engines = {name: OnnxEngine(bundle, precision=name, device="cpu") for name in bundle.precisions}
    logits = {name: engine.infer(quadrants)[0] for name, engine in engines.items()}
    assert 0 < np.abs(logits["fp16"] - logits["fp32"]).max() < 0.05
    assert 0 < np.abs(logits["int8"] - logits["fp32"]).max() < 0.5
    for name in bundle.precisions:
        assert verify(tmp_path / "bundle", device="cpu", precision=name).passed


def test_failed_int8_parity_leaves_no_bundle(
    case: Any, thin: None, few_golden: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    impossible = Gate(None, -1.0, 0.0, None)
    monkeypatch.setattr("echoquad_export.parity.parity.GATES", {"fp32": GATES["fp32"], "int8": impossible})
    with pytest.raises(ParityError, match="no int8 graph"):
        export_run(case.run, tmp_path / "bundle", precisions=("fp32", "int8"), calibration_frames=2)
    assert list(tmp_path.iterdir()) == []


def test_held_out_calibration_data_raises_dataset_error(case: Any, thin: None, tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    shutil.copytree(case.data / "validation", folder / "train")
    shutil.copytree(case.data / "validation", folder / "validation")
    with pytest.raises(DatasetError, match="all 8 frames of train/"):
        export_run(case.run, tmp_path / "bundle", precisions=("int8",), calibrate_data=folder)
    shutil.rmtree(folder / "train")
    with pytest.raises(DatasetError, match="no train/ folder"):
        export_run(case.run, tmp_path / "bundle", precisions=("int8",), calibrate_data=folder)
    assert not (tmp_path / "bundle").exists()
