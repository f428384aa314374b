"""Several processes, as torchrun starts them, train what one process trains."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from echoquad_train.fit import fit
from echoquad_train.recipe import Recipe

CPU = torch.device("cpu")

# Everything that a rank sees a share of: batch statistics, dropout, class weights, all draws of the augmentation. At a
# rate at which batch statistics over few values do not yet make much of the last bit.
RECIPE = Recipe.load("scratch").replace(
    input_size=40,
    epochs=2,
    batch_size=7,
    optimizer="sgd",
    lr=1e-3,
    dropout=0.4,
    mixed_precision=False,
    flip=0.5,
    erase=0.5,
    gamma=0.2,
    gain=0.2,
    attenuation=0.2,
    shadow=0.5,
    speckle=0.2,
)

SCRIPT = """
import json, sys
from pathlib import Path
import torch, torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet
from echoquad_train.fit import fit
from echoquad_train.ranks import joined
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
    """Run the script as torchrun would, without its second of waiting; gives what each rank printed."""
    script.write_text(SCRIPT)
    port = str(free_port())
    started = []
    for rank in range(count):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = {**os.environ, **{name: str(value) for name, value in place.items()}, "PYTHONWARNINGS": "error"}
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
    """Hold two runs against each other within what float32 sums in another order can differ by."""
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
    """Leave a run of one process that was killed in its second epoch."""

    def at_batch(epoch: int, done: int) -> None:
        if epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(data, folder, recipe, device="cpu", resume=False, reporter=quiet(at_batch=at_batch))
    return folder


def test_two_processes_train_what_one_does(
    tmp_path: Path, make_data: Callable[..., Path], quiet: Any, thin: None
) -> None:
    """From the start, and going on with a run that one process began: figures, weights and files."""
    data = make_data(tmp_path / "data", frames=4)
    (data / "train" / "dark" / "train0.png").unlink()  # unequal classes
    (data / "validation" / "dark" / "validation1.png").write_bytes(b"not an image")
    alone = tmp_path / "alone"
    fit(data, alone, RECIPE, device="cpu", resume=False, reporter=quiet())
    resumed = interrupted(data, tmp_path / "resumed", RECIPE, quiet)
    out = run_ranks(tmp_path / "rank.py", 2, [job(data, tmp_path / "two", RECIPE), job(data, resumed, RECIPE)])
    assert out == ["epoch 1\nepoch 2\nepoch 2\n", ""]  # rank 0 alone reports
    assert_alike(tmp_path / "two", alone)
    assert_alike(resumed, alone)
