"""Knowledge distillation: the loss, the teacher's view, learning from the teacher, refusals."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from echoquad_runtime.errors import ConfigError, DatasetError, EchoQuadError, RunError
from echoquad_train.data.dataset import QuadrantStore, load_quadrants, read_split
from echoquad_train.data.stream import Storage
from echoquad_train.fitting.loop import fit
from echoquad_train.networks import device as devices
from echoquad_train.recipe import Recipe
from echoquad_train.training import optimizer_schedule as schedule
from echoquad_train.training import train_step as trainer
from echoquad_train.training.augmentation import apply_augmentation, draw_augmentation
from echoquad_train.training.distillation import Teacher, distillation_loss, load_teacher, open_teacher_store

CPU = torch.device("cpu")


def train(data: Path, folder: Path, recipe: Recipe, reporter: Any, **options: Any) -> Any:
    return fit(data, folder, recipe, **{"device": "cpu", "resume": False, "reporter": reporter, **options})


# Loss


def test_loss_equals_formula() -> None:
    student, teacher = [[1.0, -1.0, 0.5], [0.0, 2.0, 0.0]], [[2.0, 0.0, -2.0], [0.0, -1.0, 3.0]]

    def softened(logits: list[float], temperature: float) -> list[float]:
        powers = [math.exp(value / temperature) for value in logits]
        return [power / sum(powers) for power in powers]

    for weight, temperature in ((0.7, 4.0), (0.25, 1.0), (1.0, 20.0), (0.0, 2.0)):
        divergence = 0.0
        for ours, theirs in zip(student, teacher, strict=True):
            q, p = softened(ours, temperature), softened(theirs, temperature)
            divergence += sum(b * math.log(b / a) for a, b in zip(q, p, strict=True)) / 2
        expected = (1 - weight) * 0.9 + weight * temperature**2 * divergence
        found = distillation_loss(
            torch.tensor(0.9), torch.tensor(student), torch.tensor(teacher), weight, temperature
        ).item()
        assert found == pytest.approx(expected, rel=1e-5)


def test_gradient_does_not_shrink_with_temperature() -> None:
    """At a high temperature it is the difference of the centred logits divided by the classes: Hinton's equation 4."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(6, 3, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    distillation_loss(torch.zeros(()).double(), student, teacher, 1.0, 1e4).backward()  # type: ignore[no-untyped-call]
    centred = [logits - logits.mean(dim=1, keepdim=True) for logits in (student.detach(), teacher)]
    assert student.grad is not None
    torch.testing.assert_close(student.grad, (centred[0] - centred[1]) / 3 / 6, atol=1e-4, rtol=0)


def test_extreme_logits_give_finite_loss() -> None:
    student = torch.tensor([[300.0, -300.0]], requires_grad=True)
    loss = distillation_loss(torch.tensor(0.5), student, torch.tensor([[-300.0, 300.0]]), 0.5, 1.0)
    loss.backward()  # type: ignore[no-untyped-call]
    assert math.isfinite(loss.item()) and student.grad is not None and bool(student.grad.isfinite().all())


# Teacher's view


def smooth(size: int) -> torch.Tensor:
    """Return images of soft blobs, the same at every size, uint8 [8, 1, size, size]."""
    rng = np.random.default_rng(3)
    coarse = (Image.fromarray(rng.integers(0, 256, (6, 6), np.uint8)) for _ in range(8))
    pictures = [np.asarray(picture.resize((128, 128), Image.Resampling.BICUBIC)) for picture in coarse]
    fine = torch.from_numpy(np.stack(pictures)[:, None]).float()
    return F.avg_pool2d(fine, 128 // size).round().byte()


@pytest.mark.parametrize("speckle", [0.0, 0.3])
def test_student_and_teacher_see_same_view_at_their_sizes(speckle: float) -> None:
    recipe = Recipe(erase=0.8, speckle=speckle)
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        draws = draw_augmentation(8, 32, recipe, generator)
        small, large = (apply_augmentation(smooth(size), recipe, draws) for size in (32, 64))
        difference = (F.avg_pool2d(large, 2) - small).abs()
        # Away from the edges of erased boxes and of the image, where pixels are partly covered.
        assert difference.median() < 2 and difference.mean() < 4
        other = apply_augmentation(smooth(32), recipe, draw_augmentation(8, 32, recipe, generator))
        assert (other - small).abs().mean() > 15


@pytest.mark.parametrize("context_padding", [False, True])
@pytest.mark.parametrize(("size", "small"), [(16, 16), (24, 24), (16, 8)])
def test_teacher_receives_view_of_student(
    tmp_path: Path,
    trained: Any,
    quiet: Any,
    thin: None,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    small: int,
    context_padding: bool,
) -> None:
    """In each batch: the same quadrants with the same draws, at the teacher's 16 pixels."""
    shown_by: list[tuple[int, int]] = []  # side, and the identity of the warps of the draws
    judged: list[torch.Tensor] = []
    kept: list[Any] = []
    real_apply, real_call = trainer.apply_augmentation, Teacher.__call__

    def watched(quadrants: torch.Tensor, recipe: Recipe, draws: Any, positions: torch.Tensor | None) -> torch.Tensor:
        assert quadrants.shape[1] == (4 if context_padding else 1) and (positions is not None) == context_padding
        kept.append(draws["warp"])  # keep a reference, so that identities stay unique
        shown_by.append((quadrants.shape[-1], id(draws["warp"])))
        return real_apply(quadrants, recipe, draws, positions)

    def asked(self: Teacher, view: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        assert not self.model.training and not any(weight.requires_grad for weight in self.model.parameters())
        answers = real_call(self, view, dtype)
        assert not answers.requires_grad and answers.dtype == torch.float32
        judged.append(view)
        return answers

    monkeypatch.setattr(trainer, "apply_augmentation", watched)
    monkeypatch.setattr(Teacher, "__call__", asked)
    monkeypatch.setattr(schedule, "_MIN_TRAINING_SIZE", 8)
    shown = {"progressive_fraction": 1.0, "progressive_scale": small / size, "context_padding": context_padding}
    recipe = trained.recipe.replace(input_size=size, epochs=1, **shown)
    train(trained.data, tmp_path / "run", recipe, quiet(), teacher=trained.folder)
    assert len(judged) == 4 and all(view.shape == (8, 1, 16, 16) for view in judged)
    if small == 16:
        assert len(shown_by) == 4  # both use one view
    else:
        assert [side for side, _ in shown_by] == [small, 16] * 4
        assert [draws for _, draws in shown_by[::2]] == [draws for _, draws in shown_by[1::2]]
    assert len({draws for _, draws in shown_by}) == 4


def test_teacher_store_has_teacher_input_size(tmp_path: Path, trained: Any, thin: None) -> None:
    contract = trained.recipe.replace(input_size=24).contract(("bright", "dark"))
    split = read_split(trained.data, "train", contract.classes)
    store = load_quadrants(split, contract)
    teacher = load_teacher(trained.folder, contract, CPU)
    own = open_teacher_store(teacher, split, store, Storage(tmp_path))
    assert isinstance(own, QuadrantStore)
    assert own.names == store.names and np.array_equal(own.labels, store.labels)
    assert np.array_equal(own.quadrants, load_quadrants(split, teacher.contract).quadrants)
    assert open_teacher_store(teacher, split, own, Storage(tmp_path)) is own


def test_frames_that_change_during_reading_are_refused(tmp_path: Path, trained: Any, thin: None) -> None:
    """A teacher that sees other frames than the student would go unnoticed."""
    data = Path(shutil.copytree(trained.data, tmp_path / "data"))
    contract = trained.recipe.replace(input_size=24).contract(("bright", "dark"))
    split = read_split(data, "train", contract.classes)
    store = load_quadrants(split, contract)
    (data / "train" / "dark" / "train2.png").write_bytes(b"half")
    with pytest.raises(DatasetError, match=r"^train: train/dark/train2\.png changed while the frames were read; "):
        open_teacher_store(load_teacher(trained.folder, contract, CPU), split, store, Storage(tmp_path))


# Learning from the teacher


@pytest.fixture
def contrary(tmp_path: Path, trained: Any) -> Path:
    """Write the frames of the teacher's training with swapped labels."""
    for split in ("train", "validation"):
        for name, other in (("bright", "dark"), ("dark", "bright")):
            shutil.copytree(trained.data / split / name, tmp_path / "contrary" / split / other)
    return tmp_path / "contrary"


@pytest.mark.parametrize("size", [16, 24])
def test_student_learns_from_teacher(
    tmp_path: Path, contrary: Path, trained: Any, quiet: Any, thin: None, size: int
) -> None:
    """If labels and teacher contradict each other, the weight decides what the student learns.

    Compares the training metrics of the last epoch: in such a short run the running batch statistics lag behind, so
    that validation may stay at chance on some processors. Of 20 seeds none was closer than 0.09.
    """
    assert trained.fitted.best.validation_patch_accuracy > 0.9
    found = {}
    for weight in (0.0, 1.0):
        recipe = trained.recipe.replace(input_size=size, epochs=5, distill_weight=weight, seed=3)
        fitted = train(contrary, tmp_path / str(weight), recipe, quiet(), teacher=trained.folder)
        found[weight] = fitted.history[-1].train_patch_accuracy
    assert found[0.0] > 0.7 and found[1.0] < 0.3


def test_weight_zero_equals_run_without_teacher(tmp_path: Path, trained: Any, quiet: Any, thin: None) -> None:
    """The teacher does not use the student's random generators."""
    recipe = trained.recipe.replace(input_size=24, epochs=2)
    train(trained.data, tmp_path / "alone", recipe, quiet())
    train(trained.data, tmp_path / "taught", recipe.replace(distill_weight=0.0), quiet(), teacher=trained.folder)
    alone, taught = ((tmp_path / name / "best.safetensors").read_bytes() for name in ("alone", "taught"))
    assert alone == taught


@pytest.mark.parametrize(("teacher", "student"), [(16, 24), (24, 16)])
def test_teacher_uses_its_own_precision(
    tmp_path: Path, trained: Any, quiet: Any, thin: None, monkeypatch: pytest.MonkeyPatch, teacher: int, student: int
) -> None:
    """The student's and the teacher's precision are independent."""
    dtypes: list[torch.dtype | None] = []
    real = Teacher.__call__

    def asked(self: Teacher, view: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        dtypes.append(dtype)
        return real(self, view, dtype)

    monkeypatch.setattr(devices, "autocast_dtype", lambda _: torch.bfloat16)
    monkeypatch.setattr(Teacher, "__call__", asked)
    recipe = trained.recipe.replace(epochs=1, mixed_precision=True)
    train(trained.data, tmp_path / "teacher", recipe.replace(input_size=teacher), quiet())
    reporter, folder = quiet(), tmp_path / "run"
    train(trained.data, folder, recipe.replace(input_size=student), reporter, teacher=tmp_path / "teacher")
    assert set(dtypes) == {torch.bfloat16 if teacher == 24 else None}
    assert reporter.precision == ("bf16" if student == 24 else "fp32")


# Run metadata


def test_run_json_identifies_teacher_without_path(tmp_path: Path, trained: Any, quiet: Any, thin: None) -> None:
    reporter = quiet()
    recipe = trained.recipe.replace(input_size=24, epochs=1)
    train(trained.data, tmp_path / "run", recipe, reporter, teacher=trained.folder)
    info = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    assert info["teacher"] == {
        "backbone": "resnet18",
        "input_size": 16,
        "contract_sha256": trained.info["contract_sha256"],
        "weights_sha256": hashlib.sha256((trained.folder / "best.safetensors").read_bytes()).hexdigest(),
        "validation_frame_accuracy": trained.fitted.best.validation_frame_accuracy,
    }
    assert trained.folder.name not in json.dumps(info["teacher"]) and "teacher" not in trained.info
    assert [decoded for decoded in reporter.decoded if decoded[1] == 8] == [
        ("train", 8, 8),
        ("validation", 8, 8),
        ("train for the teacher", 8, 8),
    ]


# Refusals


def refused(kind: type[EchoQuadError], data: Path, folder: Path, recipe: Recipe, reporter: Any, **options: Any) -> str:
    with pytest.raises(kind) as error:
        train(data, folder, recipe, reporter, **options)
    assert "\n" not in str(error.value) and error.value.exit_code == 1
    return str(error.value)


def test_unsuitable_teacher_is_refused(tmp_path: Path, trained: Any, make_data: Any, quiet: Any, thin: None) -> None:
    out, recipe = tmp_path / "run", trained.recipe
    teacher = Path(shutil.copytree(trained.folder, tmp_path / "teacher"))
    others = make_data(tmp_path / "others", classes=("bright", "dim"), frames=1)
    label = f"--teacher {teacher.as_posix()}: "
    message = refused(ConfigError, others, out, recipe, quiet(), teacher=teacher)
    assert message == f"{label}its classes is bright, dark; expected the student's, bright, dim"
    message = refused(ConfigError, trained.data, out, recipe.replace(center_crop=0.8), quiet(), teacher=teacher)
    assert message == f"{label}its center_crop is 1.0; expected the student's, 0.8"
    turned = recipe.replace(quadrant_layout="apex-up")
    message = refused(ConfigError, trained.data, out, turned, quiet(), teacher=teacher)
    assert message == f"{label}its quadrant_layout is reference; expected the student's, apex-up"
    assert "no run here (run.json is missing)" in refused(
        RunError, trained.data, out, recipe, quiet(), teacher=tmp_path / "none"
    )
    (teacher / "run.json").write_text(json.dumps({**trained.info, "status": "running"}), "utf-8")
    message = refused(ConfigError, trained.data, out, recipe, quiet(), teacher=teacher)
    assert message.startswith(f"{label}the run is not finished; ") and "--resume" in message
    (teacher / "run.json").write_text(
        json.dumps({**trained.info, "best": {"epoch": trained.fitted.best.epoch}}), "utf-8"
    )
    message = refused(RunError, trained.data, out, recipe, quiet(), teacher=teacher)
    assert message == f"{teacher.as_posix()}: run.json lacks 'validation_frame_accuracy'; train again"
    (teacher / "best.safetensors").write_bytes(b"half")
    assert "best.safetensors cannot be read" in refused(RunError, trained.data, out, recipe, quiet(), teacher=teacher)
    assert not out.exists()
