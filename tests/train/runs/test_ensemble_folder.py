"""Ensembles: soft and hard votes, test-time augmentation, and the ensemble folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from echoquad_runtime.contract import Contract
from echoquad_runtime.errors import ConfigError, EchoQuadError, RunError
from echoquad_runtime.predict.predictor import Predictor
from echoquad_train.data.dataset import read_split
from echoquad_train.evaluation.evaluate import evaluate
from echoquad_train.fitting.loop import fit
from echoquad_train.networks.backbones import backbone_parts
from echoquad_train.networks.ensemble_classifier import MEAN_VOTE, EnsembleClassifier, EnsembleVote
from echoquad_train.networks.torch_engine import TorchEngine
from echoquad_train.runs.checkpoint import Run, load_run
from echoquad_train.runs.ensemble_folder import Ensemble, ensemble_metadata, load_trained, write_ensemble
from echoquad_train.training.distillation import load_teacher

QUADRANTS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 1, 16, 16), np.uint8))


class Stated(nn.Module):
    """A member with constant logits."""

    def __init__(self, *probabilities: tuple[float, ...], name: str = "resnet18") -> None:
        super().__init__()
        self.logits, self.name = torch.tensor(probabilities, dtype=torch.float64).log().float(), name
        self.parts = backbone_parts(name)

    def forward(self, quadrants: Tensor) -> Tensor:
        return self.logits


def joined(*rows: tuple[float, ...], vote: Any) -> list[float]:
    """Return the ensemble's probabilities for members with the given rows."""
    model = EnsembleClassifier([Stated(row) for row in rows], [1.0] * len(rows), vote)  # type: ignore[list-item]
    return torch.softmax(model(QUADRANTS[:1]), dim=1)[0].tolist()


# Votes


def test_soft_vote_is_mean_of_probabilities() -> None:
    assert joined((0.9, 0.1), (0.4, 0.6), (0.2, 0.8), vote="soft") == pytest.approx([0.5, 0.5], abs=1e-6)
    assert joined((0.7, 0.2, 0.1), (0.1, 0.1, 0.8), vote="soft") == pytest.approx([0.4, 0.15, 0.45], abs=1e-6)


@pytest.mark.parametrize(
    ("rows", "votes", "mean"),
    [
        # two votes to one, against the mean
        (((0.99, 0.01), (0.45, 0.55), (0.45, 0.55)), (1, 2), (0.63, 0.37)),
        # one vote each: the mean decides
        (((0.9, 0.1), (0.2, 0.8)), (1, 1), (0.55, 0.45)),
        (((0.6, 0.4), (0.2, 0.8)), (1, 1), (0.4, 0.6)),
        # a class without votes keeps the share of the mean
        (((0.5, 0.3, 0.2), (0.1, 0.5, 0.4), (0.4, 0.35, 0.25)), (2, 1, 0), (1 / 3, 0.38333333, 0.28333333)),
        # a tie within a member goes to the first class
        (((0.5, 0.5), (0.5, 0.5), (0.1, 0.9)), (2, 1), (11 / 30, 19 / 30)),
    ],
)
def test_hard_vote_is_fraction_of_votes(
    rows: tuple[tuple[float, ...], ...], votes: tuple[int, ...], mean: tuple[float, ...]
) -> None:
    expected = [(n + MEAN_VOTE * p) / (len(rows) + MEAN_VOTE) for n, p in zip(votes, mean, strict=True)]
    found = joined(*rows, vote="hard")
    assert found == pytest.approx(expected, abs=1e-6)
    assert sum(found) == pytest.approx(1, abs=1e-6)
    # Most votes win; the higher mean breaks ties.
    assert int(np.argmax(found)) == max(range(len(votes)), key=lambda index: (votes[index], mean[index]))


@pytest.mark.parametrize("vote", ["soft", "hard"])
def test_extreme_logits_stay_finite(vote: Any) -> None:
    member = Stated((0.5, 0.5))
    member.logits = torch.tensor([[500.0, -500.0]])
    assert EnsembleClassifier([member, member], [1.0, 0.1], vote)(QUADRANTS[:1]).isfinite().all()  # type: ignore[list-item]


# Properties


@pytest.fixture
def members(thin: None) -> list[Any]:
    """Return three thin networks with different outputs."""
    from echoquad_train.networks.classifier import QuadrantClassifier

    torch.manual_seed(1)
    contract = Contract(("a", "b", "c"), input_size=16)
    made = [QuadrantClassifier("resnet18", contract) for _ in range(3)]
    with torch.no_grad():
        for model in made:
            for _ in range(2):
                model.train()(torch.randint(0, 256, (16, 1, 16, 16)))
            model.head[-1].weight.mul_(5)
    return [model.eval() for model in made]


def answers(members: list[Any], vote: Any = "soft", flip_tta: bool = False, quadrants: Tensor = QUADRANTS) -> Tensor:
    model = EnsembleClassifier(members, [1.0] * len(members), vote, flip_tta).eval()
    with torch.inference_mode():
        return torch.softmax(model(quadrants), dim=1)


def test_repeated_member_equals_single_run(members: list[Any]) -> None:
    with torch.inference_mode():
        alone = torch.softmax(members[0](QUADRANTS), dim=1)
    assert alone.std(dim=0).min() > 0.01  # constant outputs would prove nothing
    torch.testing.assert_close(answers(members[:1]), alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(answers(members[:1] * 2), alone, atol=1e-6, rtol=0)
    assert torch.equal(answers(members[:1], "hard").argmax(dim=1), alone.argmax(dim=1))


def test_each_member_uses_its_own_temperature(members: list[Any]) -> None:
    with torch.inference_mode():
        parts = [torch.softmax(members[0](QUADRANTS) / t, dim=1) for t in (2.0, 0.5)]
        found = torch.softmax(EnsembleClassifier([members[0]] * 2, [2.0, 0.5])(QUADRANTS), dim=1)
    torch.testing.assert_close(found, (parts[0] + parts[1]) / 2, atol=1e-6, rtol=0)


@pytest.mark.parametrize("vote", ["soft", "hard"])
@pytest.mark.parametrize("flip", [False, True])
def test_order_of_members_does_not_matter(members: list[Any], vote: Any, flip: bool) -> None:
    torch.testing.assert_close(answers(members, vote, flip), answers(members[::-1], vote, flip), atol=1e-6, rtol=0)


@pytest.mark.parametrize("vote", ["soft", "hard"])
def test_flip_tta_is_invariant_to_flip(members: list[Any], vote: Any) -> None:
    mirrored = QUADRANTS.flip(3)
    assert not torch.allclose(answers(members), answers(members, quadrants=mirrored), atol=1e-3)
    found = answers(members, vote, flip_tta=True)
    torch.testing.assert_close(found, answers(members, vote, flip_tta=True, quadrants=mirrored), atol=1e-6, rtol=0)
    if vote == "soft":
        both = (answers(members) + answers(members, quadrants=mirrored)) / 2
        torch.testing.assert_close(found, both, atol=1e-6, rtol=0)


def test_one_backbone_without_mixed_precision_disables_it() -> None:
    parts = [Stated((0.5, 0.5), name=name) for name in ("resnet18", "mobilenet_v3_small")]
    assert EnsembleClassifier(parts, [1.0, 1.0]).name == "mobilenet_v3_small"  # type: ignore[arg-type]


# Ensemble folder


@pytest.fixture(scope="module")
def others(
    tmp_path_factory: pytest.TempPathFactory, trained: Any, quiet: Any, thin_session: Callable[[], Any]
) -> dict[str, Path]:
    """Train runs that each differ from the shared one in a field, and one with another seed."""
    folder, found = tmp_path_factory.mktemp("others"), {}
    changes: dict[str, dict[str, Any]] = {
        "seed": {"seed": 5},
        "input_size": {"input_size": 24},
        "positive": {"positive": "dark"},
        "keep": {"center_crop": 0.8},
        "quadrants": {"quadrant_layout": "apex-up"},
    }
    with thin_session():
        for name, change in changes.items():
            recipe = replace(trained.recipe, epochs=1, **change)
            fit(trained.data, folder / name, recipe, device="cpu", resume=False, reporter=quiet())
            found[name] = folder / name
    return found


def test_ensemble_frame_temperature_is_mean_of_members(trained: Any, thin: None) -> None:
    run = load_run(trained.folder)
    members = [
        (name, replace(run, contract=replace(run.contract, frame_temperature=value)))
        for name, value in (("a", 0.1), ("b", 0.4))
    ]

    def of(chosen: list[tuple[str, Run]], vote: EnsembleVote) -> float:
        contract = Contract.from_dict(ensemble_metadata(chosen, vote, flip_tta=False)["contract"])
        assert contract.temperature == 1
        return contract.frame_temperature

    assert of(members, "soft") == 0.2 and of(members[:1], "soft") == 0.1
    assert of(members, "hard") == 1  # hard votes ignore frame temperatures


def test_ensemble_folder_is_independent_of_runs(
    tmp_path: Path, trained: Any, others: dict[str, Path], thin: None
) -> None:
    runs = [
        Path(shutil.copytree(folder, tmp_path / name))
        for name, folder in (("a", trained.folder), ("b", others["seed"]))
    ]
    write_ensemble(runs, tmp_path / "ensemble", vote="hard", flip_tta=True)
    for run in runs:
        shutil.rmtree(run)
    found = load_trained(tmp_path / "ensemble")
    assert isinstance(found, Ensemble) and not found.trained_in_folds
    assert (found.model.vote, found.model.flip_tta, len(found.members)) == ("hard", True, 2)
    # The contract is that of the run except for the temperatures.
    assert found.contract == replace(load_run(trained.folder).contract, temperature=1.0, frame_temperature=1.0)
    assert {path.name for path in (tmp_path / "ensemble" / "members" / "2").iterdir()} == {
        "recipe.toml",
        "run.json",
        "best.safetensors",
    }
    with pytest.raises(RunError, match="this is an ensemble; expected a single run"):
        load_run(tmp_path / "ensemble")
    assert [path.name for path in tmp_path.iterdir()] == ["ensemble"]  # no partial folder remains
    info = json.loads((tmp_path / "ensemble" / "run.json").read_text("utf-8"))
    assert [member["seed"] for member in info["members"]] == [0, 5] and info["data"] == trained.info["data"]
    split = read_split(trained.data, "test", found.contract.classes)
    assert evaluate(Predictor(TorchEngine(found.model, found.contract)), split).metrics.frame.frames == 8


def test_ensemble_of_ensemble_contains_members(
    tmp_path: Path, trained: Any, others: dict[str, Path], thin: None
) -> None:
    write_ensemble([trained.folder], tmp_path / "one", flip_tta=True)
    made = write_ensemble([tmp_path / "one", others["seed"]], tmp_path / "two")
    assert len(made.members) == 2 and made.info["views"] == ["as it is"] and made.info["vote"] == "soft"


def test_ensemble_can_be_teacher(tmp_path: Path, trained: Any, others: dict[str, Path], thin: None, quiet: Any) -> None:
    write_ensemble([trained.folder, others["seed"]], tmp_path / "ensemble")
    teacher = load_teacher(tmp_path / "ensemble", load_run(trained.folder).contract, torch.device("cpu"))
    assert not any(weight.requires_grad for weight in teacher.model.parameters())
    assert (
        teacher.metadata["backbone"] == "soft vote of 2 networks (resnet18)" and len(teacher.metadata["members"]) == 2
    )
    recipe = replace(trained.recipe, epochs=1)
    options: dict[str, Any] = {"device": "cpu", "resume": False, "reporter": quiet()}
    fit(trained.data, tmp_path / "student", recipe, teacher=tmp_path / "ensemble", **options)
    info = json.loads((tmp_path / "student" / "run.json").read_text("utf-8"))
    assert info["teacher"]["weights_sha256"] == teacher.metadata["weights_sha256"]


def refused(kind: type[EchoQuadError], folders: list[Path], out: Path) -> str:
    with pytest.raises(kind) as error:
        write_ensemble(folders, out)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_incompatible_runs_are_refused(tmp_path: Path, trained: Any, others: dict[str, Path], thin: None) -> None:
    out, first = tmp_path / "ensemble", trained.folder.as_posix()
    for name, words in (
        ("input_size", f"its input_size is 24; expected that of {first}, 16; members need the same contract"),
        ("positive", f"its positive is dark; expected that of {first}, bright"),
        ("keep", f"its keep is 0.8; expected that of {first}, 1.0"),
        ("quadrants", f"its quadrants is RV, LV, RA, LA; expected that of {first}, LA, RA, LV, RV"),
    ):
        assert words in refused(ConfigError, [trained.folder, others[name]], out)
    running = Path(shutil.copytree(trained.folder, tmp_path / "running"))
    (running / "run.json").write_text(json.dumps({**trained.info, "status": "running"}), "utf-8")
    assert "the run is not finished" in refused(RunError, [running], out)
    assert "no run here" in refused(RunError, [tmp_path / "none"], out)
    assert "exists and is not empty" in refused(RunError, [trained.folder], running)
    assert [path.name for path in tmp_path.iterdir()] == ["running"]


def test_changed_ensemble_is_refused(tmp_path: Path, trained: Any, others: dict[str, Path], thin: None) -> None:
    out = tmp_path / "ensemble"
    write_ensemble([trained.folder, others["seed"]], out)
    info = json.loads((out / "run.json").read_text("utf-8"))
    changes: list[tuple[dict[str, Any], str]] = [
        ({"vote": "loud"}, "has a vote, views or members that this release does not support"),
        ({"members": [{**info["members"][0], "folder": "../run"}]}, "has a vote, views or members"),
        ({"members": []}, "has a vote, views or members"),
        ({"members": [{**info["members"][0], "weights_sha256": "0" * 64}]}, "members/1 was changed since"),
        ({"contract": {**info["contract"], "keep": 0.5}}, "keep of members/1 and run.json differ"),
        ({"contract": None}, "does not describe an ensemble"),
        ({"status": "running"}, "its folds are not all trained"),
    ]
    for change, words in changes:
        (out / "run.json").write_text(json.dumps({**info, **change}), "utf-8")
        with pytest.raises(RunError, match=words.replace("'", ".")):
            load_trained(out)
    calibrated = {**info["contract"], "temperature": 1.7}
    (out / "run.json").write_text(json.dumps({**info, "contract": calibrated}), "utf-8")
    assert load_trained(out).contract.temperature == 1.7
