"""Ranks: several processes, as torchrun starts them, train what a single process trains."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn
from torchvision.ops import StochasticDepth

from echoquad_runtime.errors import ConfigError, DeviceUnavailableError, RunError
from echoquad_train.fitting.loop import fit
from echoquad_train.parallel.gradient_sharing import share_layers
from echoquad_train.parallel.ranks import ALONE, Ranks, joined
from echoquad_train.recipe import Recipe
from echoquad_train.training.augmentation import apply_augmentation, draw_augmentation

CPU = torch.device("cpu")

# Uses everything that ranks share: batch statistics, dropout, class weights, all random numbers of the augmentation.
# The learning rate is low enough that batch statistics over few values do not amplify rounding.
RECIPE = Recipe.load("scratch").replace(
    input_size=40,
    epochs=2,
    batch_size=7,
    optimizer="sgd",
    lr=1e-3,
    dropout=0.4,
    mixed_precision=False,
    horizontal_flip=0.5,
    erase=0.5,
    gamma=0.2,
    gain=0.2,
    attenuation=0.2,
    shadow=0.5,
    speckle=0.2,
    ema_decay=0.9,
)

SCRIPT = """
import json, sys
from pathlib import Path
import torch, torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet
from echoquad_train.fitting.loop import fit
from echoquad_train.parallel.ranks import joined
from echoquad_train.recipe import Recipe

class Thin(ResNet):
    def _make_layer(self, block, planes, blocks, stride=1, dilate=False):
        return super()._make_layer(block, planes // 8, blocks, stride, dilate)

def thin(name, weights=None):
    body = Thin(BasicBlock, [1, 1, 1, 1])
    body.fc = nn.Linear(64, 1000)
    return body

class Reporter:
    def decoding(self, *_): ...
    def started(self, *_): ...
    def audited(self, *_): ...
    def batch(self, *_): ...
    def epoch(self, epoch, epochs, best): print("epoch", epoch.epoch, flush=True)

if __name__ == "__main__":
    torchvision.models.get_model = thin
    torch.set_num_threads(1)
    with joined(torch.device("cpu")) as ranks:
        for job in json.loads(sys.argv[1]):
            folder = Path(job["folder"])
            teacher = job["teacher"] and Path(job["teacher"])
            fit(Path(job["data"]), folder, Recipe.from_toml(job["recipe"]), device="cpu", resume=folder.exists(),
                reporter=Reporter(), ranks=ranks, teacher=teacher, stream=job["stream"], workers=1)
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def run_ranks(script: Path, count: int, jobs: Sequence[dict[str, Any]]) -> list[str]:
    """Start the script like torchrun, but without its delay of a second; return the output of each rank."""
    script.write_text(SCRIPT)
    port = str(free_port())
    started = []
    for rank in range(count):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = {
            **os.environ,
            **{name: str(value) for name, value in place.items()},
            "PYTHONWARNINGS": "error",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-P", str(script), json.dumps(list(jobs))]
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    ended = [process.communicate(timeout=240) for process in started]
    assert [process.returncode for process in started] == [0] * count, "\n".join(err for _, err in ended)
    return [out for out, _ in ended]


def job(data: Path, folder: Path, recipe: Recipe, teacher: Path | None = None, stream: str = "off") -> dict[str, Any]:
    return {
        "data": str(data),
        "folder": str(folder),
        "recipe": recipe.to_toml(),
        "teacher": teacher and str(teacher),
        "stream": stream,
    }


def assert_alike(found: Path, expected: Path) -> None:
    """Compare two runs within the rounding of float32 sums in another order."""
    first, second = (torch.load(folder / "last.pt", weights_only=True) for folder in (found, expected))
    for a, b in zip(first["history"], second["history"], strict=True):
        assert a.pop("phase") == b.pop("phase")
        assert {**a, "seconds": 0} == pytest.approx({**b, "seconds": 0}, rel=1e-4)
    for name, value in second["model"].items():
        torch.testing.assert_close(first["model"][name], value, atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    assert {path.name for path in found.iterdir()} == {path.name for path in expected.iterdir()}
    best = [safetensors.torch.load_file(folder / "best.safetensors") for folder in (found, expected)]
    assert best[0].keys() == best[1].keys()


def interrupted(data: Path, folder: Path, recipe: Recipe, quiet: Any) -> Path:
    """Write a run of one process that was killed in its second epoch."""

    def at_batch(epoch: int, done: int) -> None:
        if epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(data, folder, recipe, device="cpu", resume=False, reporter=quiet(at_batch=at_batch))
    return folder


def test_two_processes_train_as_one(tmp_path: Path, make_data: Callable[..., Path], quiet: Any, thin: None) -> None:
    """From the start, and resuming a run of one process: figures, weights and files are equal."""
    data = make_data(tmp_path / "data", frames=4)
    (data / "train" / "dark" / "train0.png").unlink()  # unequal classes
    (data / "validation" / "dark" / "validation1.png").write_bytes(b"not an image")
    alone = tmp_path / "alone"
    fit(data, alone, RECIPE, device="cpu", resume=False, reporter=quiet())
    resumed = interrupted(data, tmp_path / "resumed", RECIPE, quiet)
    out = run_ranks(tmp_path / "rank.py", 2, [job(data, tmp_path / "two", RECIPE), job(data, resumed, RECIPE)])
    assert out == ["epoch 1\nepoch 2\nepoch 2\n", ""]  # only rank 0 reports
    assert_alike(tmp_path / "two", alone)
    assert_alike(resumed, alone)


# Shared layers, in one process


def test_dropout_and_stochastic_depth_draw_for_global_batch() -> None:
    """Each rank's rows equal those of a single process."""
    x = torch.rand(10, 6, 4, 4) + 0.5
    for layer in (nn.Dropout(0.4), StochasticDepth(0.3, "row")):
        model = nn.Sequential(layer)
        torch.manual_seed(5)
        whole = model(x)
        batch = share_layers(model, CPU)
        parts = []
        for rank in range(3):
            batch.share = Ranks(rank, 3).share(10)
            torch.manual_seed(5)
            parts.append(model(x[batch.share.rows]))
        assert torch.equal(torch.cat(parts), whole) and not torch.equal(whole, x)
        assert torch.equal(model.eval()(x), x)


@pytest.mark.parametrize("total", [0, 1, 7, 8, 64])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_shares_partition_batch(total: int, count: int) -> None:
    rows = list(range(total))
    shares = [Ranks(rank, count).share(total) for rank in range(count)]
    assert [row for share in shares for row in rows[share.rows]] == rows
    sizes = [share.last - share.first for share in shares]
    assert max(sizes) - min(sizes) <= 1 and all(share.total == total for share in shares)


def test_share_is_augmented_as_in_global_batch() -> None:
    quadrants = torch.randint(0, 256, (9, 1, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    draws = draw_augmentation(9, 20, RECIPE, torch.Generator().manual_seed(4))
    batch = apply_augmentation(quadrants, RECIPE, draws)
    for rank in range(3):
        rows = Ranks(rank, 3).share(9).rows
        own = {name: values[rows] for name, values in draws.items()}
        # A grid of another size is vectorised differently, so the last bits may differ.
        torch.testing.assert_close(apply_augmentation(quadrants[rows], RECIPE, own), batch[rows], atol=1e-3, rtol=0)


# Environment variables


def test_process_without_torchrun_is_rank_0_of_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")  # some job schedulers set it
    with joined(CPU) as ranks:
        assert ranks == ALONE and ranks.first and not dist.is_initialized()
        assert ranks.gather(7) == [7] and ranks.from_first(lambda: 8) == 8 and ranks.fails_first()


def told(monkeypatch: pytest.MonkeyPatch, **values: object) -> None:
    known = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1, **values}
    for name, value in known.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("wrong", [{"RANK": "x"}, {"RANK": 2}, {"RANK": -1}, {"LOCAL_RANK": ""}])
def test_invalid_torchrun_variables_are_refused(monkeypatch: pytest.MonkeyPatch, wrong: dict[str, object]) -> None:
    told(monkeypatch, **wrong)
    with pytest.raises(ConfigError) as error, joined(CPU):
        pass
    assert "\n" not in str(error.value) and "RANK, WORLD_SIZE, LOCAL_RANK are " in str(error.value)


def test_more_processes_than_gpus_exits_4(monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, RANK=1, LOCAL_RANK=1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(DeviceUnavailableError) as error, joined(torch.device("cuda")):
        pass
    assert "process 1 of this machine found 1 GPUs" in str(error.value)
    assert error.value.exit_code == 4


def test_unreachable_processes_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, RANK=1, MASTER_PORT=free_port())
    monkeypatch.setattr("echoquad_train.parallel.ranks.TIMEOUT", timedelta(seconds=1))
    with pytest.raises(RunError) as error, joined(CPU):
        pass
    message = str(error.value)
    assert "\n" not in message and message.startswith("torchrun: the processes cannot reach each other (")


# The command line


def torchrun(*words: str | Path, count: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), "-m", "echoquad", "train"]
    return subprocess.run([*command, *map(str, words)], capture_output=True, text=True, timeout=240, check=False)


def said(ended: subprocess.CompletedProcess[str]) -> list[str]:
    """Return the messages of EchoQuad, without torchrun's report of a failed process."""
    return [line for line in ended.stderr.splitlines() if line.startswith(("error[", "Epoch", "interrupted", "best:"))]


@pytest.mark.slow
def test_torchrun_command_trains_streams_and_refuses(tmp_path: Path, make_data: Callable[..., Path]) -> None:
    """Streaming with workers for each rank gives equal weights; a failure is reported once."""
    data = make_data(tmp_path / "data", frames=4)
    line = [data, "--recipe", "scratch", "--input-size", "32", "--epochs", "1", "--batch-size", "6", "--device", "cpu"]
    ended = torchrun(*line, "--out", tmp_path / "run", "--tensorboard")
    assert ended.returncode == 0 and [text.partition(" ")[0] for text in said(ended)] == ["Epoch", "best:"], (
        ended.stderr
    )
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
    streamed = torchrun(*line, "--out", tmp_path / "streamed", "--stream", "on", "--workers", "1")
    assert streamed.returncode == 0, streamed.stderr
    first, second = ((tmp_path / name / "best.safetensors").read_bytes() for name in ("run", "streamed"))
    assert first == second
    again = torchrun(*line, "--out", tmp_path / "run")
    (line,) = said(again)
    assert again.returncode == 1 and line.startswith("error[E_RUN]: ") and "exists and is not empty" in line
    missing = torchrun(tmp_path / "gone", "--out", tmp_path / "other")
    assert missing.returncode == 1 and len(said(missing)) == 1 and "gone: no such folder" in said(missing)[0]


@pytest.mark.slow
def test_three_processes_with_teacher_phases_and_backbones(
    tmp_path: Path, make_data: Callable[..., Path], quiet: Any, thin: None
) -> None:
    """Also if a batch is smaller than the number of processes, and if only some layers are trained."""
    data = make_data(tmp_path / "data", frames=3)
    fit(data, tmp_path / "teacher", RECIPE.replace(epochs=1), device="cpu", resume=False, reporter=quiet())
    phases = Recipe.load("transfer").replace(
        weights="none",
        input_size=40,
        epochs=4,
        warmup_epochs=1,
        layer3_epoch=3,
        batch_size=11,
        mixed_precision=False,
        optimizer="sgd",
    )
    jobs, teachers = {"phases": phases, "taught": RECIPE.replace(input_size=48)}, {"taught": tmp_path / "teacher"}
    for name, recipe in jobs.items():
        options = {"device": "cpu", "resume": False, "reporter": quiet(), "teacher": teachers.get(name)}
        fit(data, tmp_path / name, recipe, **options)
    rows = [job(data, tmp_path / f"three-{name}", recipe, teachers.get(name)) for name, recipe in jobs.items()]
    run_ranks(tmp_path / "rank.py", 3, rows)
    for name in jobs:
        assert_alike(tmp_path / f"three-{name}", tmp_path / name)
