"""Worker of the fuzzing of files that EchoQuad reads back: damages one file for each number, and runs commands on it.

It is called with a scratch folder, the first number and the end, and prints a JSON line for each fault. The network is
thin, and runs in this process, so that a number takes a few hundredths of a second.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from echoquad.cli.framework.main import main as echoquad_main

FORBIDDEN = ("Traceback", "E_UNEXPECTED", "this is a fault in EchoQuad", "Exception ignored", "Warning")
TINY = ("--recipe", "scratch", "--input-size", "16", "--epochs", "2", "--set", "batch_size=8", "--device", "cpu")
VALUES = (None, True, -1, 0, 0.5, 1e308, 10**40, "", "x" * 300, [], {}, [None], {"a": 1}, "\x1b[31m", float("nan"))
TOML = ("-1", "0", "1e400", "nan", "1" * 30, "1" * 5000, '"x"', "[]", "{}", "true", "[1, 2]", '""', "1979-05-27", "0.5")


class ThinResNet(ResNet):
    """A residual network with 8 to 64 channels."""

    def _make_layer(self, block: Any, planes: int, *arguments: Any, **options: Any) -> nn.Sequential:
        return super()._make_layer(block, planes // 8, *arguments, **options)


def thin_backbone(name: str, weights: object = None) -> ResNet:
    body = ThinResNet(BasicBlock, [1, 1, 1, 1])
    body.fc = nn.Linear(64, 1000)
    return body


def run(*arguments: object) -> tuple[Any, str]:
    """Run a command line and return its exit code and all that it prints."""
    sys.argv[1:] = list(map(str, arguments))
    kept = sys.stdout, sys.stderr
    stream = io.TextIOWrapper(io.BytesIO(), "utf-8", newline="\n")
    sys.stdout = sys.stderr = stream
    try:
        echoquad_main()
    except SystemExit as ended:
        code = ended.code
    finally:
        sys.stdout, sys.stderr = kept
    stream.flush()
    return code, stream.buffer.getvalue().decode()  # type: ignore[attr-defined]


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """Cut, change, insert, reorder or repeat bytes."""
    at = rng.randrange(len(data) + 1)
    kind = rng.randrange(6)
    if kind == 0:
        return b""
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + bytes(rng.choices(range(256), k=rng.randrange(1, 40))) + data[at + rng.randrange(20) :]
    if kind == 3:
        lines = data.split(b"\n")
        rng.shuffle(lines)
        return b"\n".join(lines)
    if kind == 4:
        changed = bytearray(data)
        for _ in range(rng.randrange(1, 8)):
            changed[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(changed)
    return data + data


def damage_value(value: Any, rng: random.Random, values: tuple[Any, ...] = VALUES) -> Any:
    """Replace or remove one value inside nested dictionaries and lists."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(value)
    if not places or rng.random() < 0.03:
        return rng.choice(values)
    node, key = rng.choice(places)
    if rng.random() < 0.25:
        del node[key]
    else:
        node[key] = rng.choice(values)
    return value


def damage_json(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return damage_bytes(data, rng)
    return json.dumps(damage_value(json.loads(data), rng)).encode()


def damage_toml(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return damage_bytes(data, rng)
    lines = data.decode().splitlines()
    at = rng.randrange(len(lines))
    lines[at] = f"{lines[at].partition('=')[0]}= {rng.choice(TOML)}"
    return "\n".join(lines).encode()


def damage_tensor(tensor: Tensor, rng: random.Random) -> Tensor:
    return rng.choice(
        (
            tensor.to(torch.float64) if tensor.is_floating_point() else tensor.to(torch.float32),
            tensor.to(torch.int8),
            tensor.reshape(-1)[:0],
            tensor[None],
            tensor.reshape(-1)[:1],
            torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else tensor,
            tensor.to(torch.complex64),
        )
    )


def damage_state(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return damage_bytes(data, rng)
    state = torch.load(io.BytesIO(data), weights_only=True)
    some = torch.zeros(2)
    values = (*VALUES, some, some.to(torch.int64), [some], {"step": some})
    for _ in range(rng.choice((1, 1, 1, 4))):
        state = damage_value(state, rng, values)
        tensors: list[tuple[Any, Any]] = []

        def walk(node: Any, tensors: list[tuple[Any, Any]] = tensors) -> None:
            for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
                if isinstance(node[key], Tensor):
                    tensors.append((node, key))
                walk(node[key])

        walk(state)
        if tensors and rng.random() < 0.4:
            node, key = rng.choice(tensors)
            node[key] = damage_tensor(node[key], rng)
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


def damage_weights(data: bytes, rng: random.Random) -> bytes:
    kind = rng.random()
    if kind < 0.2:
        return damage_bytes(data, rng)
    length = int.from_bytes(data[:8], "little")
    if kind < 0.5:
        header = json.dumps(damage_value(json.loads(data[8 : 8 + length]), rng)).encode()
        return len(header).to_bytes(8, "little") + header + data[8 + length :]
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    if kind < 0.7:
        name = rng.choice(list(metadata))
        metadata[name] = damage_json(metadata[name].encode() if name.endswith("contract") else b"1", rng).decode(
            "utf-8", "replace"
        )
    tensors = safetensors.torch.load(data)
    name = rng.choice(list(tensors))
    tensors[name] = damage_tensor(tensors[name], rng).contiguous()
    if rng.random() < 0.3:
        del tensors[name]
    return safetensors.torch.save(tensors, metadata)


class Worker:
    """Prepares the files, and damages and uses them."""

    def __init__(self, scratch: Path) -> None:
        self.scratch, self.data, self.run = scratch, scratch / "data", scratch / "run"
        self.bundle, self.rows = scratch / "bundle", scratch / "rows.csv"
        self._must("data", "phantom", self.data, "--patients", "6", "--frames", "1")
        self._must("train", self.data, "--out", self.run, *TINY)
        self.predict = ("predict", self.bundle, self.data, "--device", "cpu", "--threads", "1", "--out", self.rows)
        self._must(*self.predict, "--untuned")
        self.row_bytes = self.rows.read_bytes()
        self.record = self.rows.with_name("rows.csv.run.json").read_bytes()
        self.settings = self._settings()
        self.saved = self.settings.read_bytes()
        self.kinds = (
            self.recipe,
            self.saved_recipe,
            self.run_json,
            self.metrics,
            self.best,
            self.last,
            self.last,
            self.partial_rows,
            self.partial_record,
            self.finished_record,
            self.tuned,
        )

    def _must(self, *arguments: object) -> None:
        code, printed = run(*arguments)
        assert code == 0, printed

    def _settings(self) -> Path:
        from echoquad_runtime.bundle.bundle import Bundle
        from echoquad_runtime.tuning.saved_settings import RunConfig, save

        return save(Bundle(self.bundle), RunConfig("cpu", "fp32", 1, True, 1, False, False), goal="latency")

    def check(self, seed: int) -> list[str]:
        """Damage the file of a number, run its commands, and return the faults."""
        rng = random.Random(seed)
        kind: Callable[[random.Random], list[tuple[object, ...]]] = self.kinds[seed % len(self.kinds)]
        faults = []
        for arguments in kind(rng):
            try:
                code, printed = run(*arguments)
            except BaseException as error:  # the harness must name what a command lets through
                code, printed = None, f"Traceback: {error!r}"
            found = [text for text in FORBIDDEN if text in printed]
            if found or code not in (0, 1, 2, 3, 5) or (code and "error[E_" not in printed):
                faults.append(f"{kind.__name__} {arguments[0]}: exit code {code}: {printed[-1500:]}")
        return faults

    def _fresh(self, name: str, damage: Callable[[bytes, random.Random], bytes], rng: random.Random) -> Path:
        folder = self.scratch / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.run, folder)
        (folder / name).write_bytes(damage((folder / name).read_bytes(), rng))
        shutil.rmtree(self.scratch / "out", ignore_errors=True)
        return folder

    def recipe(self, rng: random.Random) -> list[tuple[object, ...]]:
        path = self.scratch / "recipe.toml"
        path.write_bytes(damage_toml((self.run / "recipe.toml").read_bytes(), rng))
        empty = self.scratch / "empty"
        empty.mkdir(exist_ok=True)  # so that a recipe that is accepted does not train for hours
        return [("train", empty, "--out", self.scratch / "out", "--recipe", path, "--device", "cpu")]

    def _uses(self, folder: Path) -> list[tuple[object, ...]]:
        device = ("--device", "cpu")
        return [
            ("evaluate", folder, self.data, "--split", "test", *device),
            ("train", self.data, "--out", folder, "--resume", *TINY),
            ("ensemble", folder, folder, "--out", self.scratch / "out"),
        ]

    def saved_recipe(self, rng: random.Random) -> list[tuple[object, ...]]:
        return self._uses(self._fresh("recipe.toml", damage_toml, rng))

    def run_json(self, rng: random.Random) -> list[tuple[object, ...]]:
        return self._uses(self._fresh("run.json", damage_json, rng))

    def metrics(self, rng: random.Random) -> list[tuple[object, ...]]:
        return self._uses(self._fresh("metrics.csv", damage_bytes, rng))[1:2]

    def best(self, rng: random.Random) -> list[tuple[object, ...]]:
        return self._uses(self._fresh("best.safetensors", damage_weights, rng))

    def last(self, rng: random.Random) -> list[tuple[object, ...]]:
        folder = self._fresh("last.pt", damage_state, rng)
        return [("train", self.data, "--out", folder, "--resume", *TINY)]

    def _interrupted(self, rows: bytes, record: bytes) -> list[tuple[object, ...]]:
        for path in self.scratch.glob("rows.csv*"):
            path.unlink()
        self.rows.with_name("rows.csv.partial").write_bytes(rows)
        self.rows.with_name("rows.csv.partial.json").write_bytes(record)
        return [(*self.predict, "--untuned", "--resume")]

    def partial_rows(self, rng: random.Random) -> list[tuple[object, ...]]:
        return self._interrupted(damage_bytes(self.row_bytes, rng), self.record)

    def partial_record(self, rng: random.Random) -> list[tuple[object, ...]]:
        rows = self.row_bytes[: rng.randrange(len(self.row_bytes))]
        return self._interrupted(rows, damage_json(self.record, rng))

    def finished_record(self, rng: random.Random) -> list[tuple[object, ...]]:
        self._interrupted(b"", b"")
        self.rows.with_name("rows.csv.partial").unlink()
        self.rows.with_name("rows.csv.partial.json").unlink()
        self.rows.write_bytes(self.row_bytes)
        self.rows.with_name("rows.csv.run.json").write_bytes(damage_json(self.record, rng))
        merged = self.scratch / "merged.csv"
        merged.unlink(missing_ok=True)
        return [("merge", self.rows, "--out", merged), (*self.predict, "--untuned", "--resume")]

    def tuned(self, rng: random.Random) -> list[tuple[object, ...]]:
        for path in self.scratch.glob("rows.csv*"):
            path.unlink()
        self.settings.write_bytes(damage_json(self.saved, rng))
        return [self.predict]


def main() -> None:
    scratch, first, end = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torchvision.models.get_model = thin_backbone
    os.fsync = lambda descriptor: None
    torch.set_num_threads(1)
    worker = Worker(scratch)
    for seed in range(first, end):
        for fault in worker.check(seed):
            sys.stdout.write(json.dumps([seed, fault]) + "\n")


if __name__ == "__main__":
    main()
