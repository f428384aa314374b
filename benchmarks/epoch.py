"""Time a training epoch of EchoQuad against a plain DataLoader with torchvision transforms.

Both train the same network from the same weights with the same recipe, batch size, precision and frames. Only the data
pipelines differ:

echoquad          decodes each frame once to 8-bit quadrants, and augments a whole batch with one warp
dataloader, N     loads one quadrant per item: PNG, grey, crop, split, resize, then RandomResizedCrop, flip, rotation,
                  affine and erasing by torchvision on PIL images; N worker processes

Rounds are interleaved; the first is a warm-up. "data" is the time that the loop waits for batches, augmentation
included; "compute" is the rest: forward, backward, optimizer. Validation is not included.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from argparse import ArgumentParser, RawTextHelpFormatter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parent))  # for spawned workers
from common import paired_ratio, report, rotated

from echoquad_runtime.contract import Contract
from echoquad_runtime.devices.cpu_info import available_cpus
from echoquad_runtime.quadrants import quadrant_boxes
from echoquad_train.data.dataset import LabelledFrame, Split, load_quadrants, read_classes, read_split
from echoquad_train.networks.classifier import QuadrantClassifier, build_model, set_trainable
from echoquad_train.networks.device import choose_device, make_deterministic, mixed_dtype
from echoquad_train.recipe import Recipe
from echoquad_train.training.augmentation import apply_augmentation
from echoquad_train.training.batches import BatchLoader, epoch_generator
from echoquad_train.training.optimizer_schedule import OptimizerSchedule, phase_of
from echoquad_train.training.sampling import class_weights, draw_batches

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]  # grey levels 0 to 255, float [B, 1, S, S]; labels, int64 [B]


class PngQuadrants(Dataset[tuple[torch.Tensor, int]]):
    """One quadrant per item through torchvision transforms, as in the reference pipeline."""

    def __init__(self, frames: tuple[LabelledFrame, ...], recipe: Recipe, contract: Contract) -> None:
        self.frames, self.contract = frames, contract
        size, bilinear = recipe.input_size, transforms.InterpolationMode.BILINEAR
        shear, move = recipe.shear, (recipe.translate, recipe.translate)
        self.transform = transforms.Compose(
            [
                transforms.Resize((size, size), bilinear),
                transforms.RandomResizedCrop(size, recipe.crop_scale, recipe.crop_ratio, bilinear),
                transforms.RandomHorizontalFlip(recipe.horizontal_flip),
                transforms.RandomRotation(recipe.rotate, bilinear),
                transforms.RandomAffine(0, move, recipe.zoom, [-shear, shear], bilinear),
                transforms.PILToTensor(),
                transforms.ConvertImageDtype(torch.float32),
                transforms.RandomErasing(recipe.erase, value=recipe.mean),
            ]
        )

    def __len__(self) -> int:
        return 4 * len(self.frames)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        frame = self.frames[index // 4]
        with Image.open(frame.path) as image:
            grey = image.convert("L")
        quadrant = grey.crop(quadrant_boxes(*grey.size, self.contract.keep, self.contract.quadrants)[index % 4])
        return 255 * self.transform(quadrant), frame.label


class Loop:
    """A network with its optimizer; both pipelines use the same."""

    def __init__(self, recipe: Recipe, contract: Contract, labels: np.ndarray, where: torch.device) -> None:
        torch.manual_seed(recipe.seed)
        self.where = where
        self.recipe = recipe
        self.model: QuadrantClassifier = build_model(recipe, contract).to(where, memory_format=torch.channels_last)
        self.dtype = mixed_dtype(recipe, recipe.backbone, recipe.input_size, where)
        self.weights = class_weights(labels, len(contract.classes)).to(where)
        self.scaler = torch.amp.GradScaler(where.type, enabled=self.dtype is torch.float16)
        phase = phase_of(recipe, recipe.epochs)
        groups = set_trainable(self.model, phase.layers)
        self.schedule = OptimizerSchedule(
            groups, recipe, phase, steps_per_epoch=10**6
        )  # the learning rate does not affect the time

    def epoch(self, batches: Batches) -> tuple[float, float]:
        """Train an epoch; return the seconds spent waiting for batches, and computing."""
        begin = time.perf_counter()
        waited = 0.0
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            waited += time.perf_counter() - asked
            if batch is None:
                break
            images, labels = batch
            with torch.autocast(self.where.type, self.dtype, enabled=self.dtype is not None):
                logits = self.model(images)
            smoothing = self.recipe.label_smoothing
            self.schedule.step(
                F.cross_entropy(logits.float(), labels, self.weights, label_smoothing=smoothing), self.scaler
            )
        if self.where.type == "cuda":
            torch.cuda.synchronize()
        return waited, time.perf_counter() - begin - waited


class Spent(NamedTuple):
    """Seconds of an epoch."""

    data: float
    compute: float

    @property
    def total(self) -> float:
        return self.data + self.compute


def echoquad_batches(split: Split, recipe: Recipe, contract: Contract, where: torch.device) -> Callable[[int], Batches]:
    """Return batches of EchoQuad; decoding happens once per run and is not part of an epoch."""
    store = load_quadrants(split, contract)
    loader = BatchLoader(recipe, store, where, torch.ones(len(contract.classes)))

    def batches(round_: int) -> Batches:
        generator = torch.Generator().manual_seed(round_)
        chosen = list(draw_batches(store, recipe, generator))
        for batch in loader.epoch(chosen, epoch_generator(where, generator, round_)):
            yield apply_augmentation(batch.quadrants, recipe, batch.draws, batch.positions), batch.labels

    return batches


def dataloader_batches(
    split: Split, recipe: Recipe, contract: Contract, where: torch.device, workers: int
) -> Callable[[int], Batches]:
    """Return batches of a plain DataLoader with persistent workers."""
    labels = np.repeat([frame.label for frame in split.frames], 4)
    balanced = WeightedRandomSampler((1.0 / np.bincount(labels))[labels].tolist(), len(labels))
    loader = DataLoader(
        PngQuadrants(split.frames, recipe, contract),
        recipe.batch_size,
        shuffle=not recipe.balanced_sampler,
        sampler=balanced if recipe.balanced_sampler else None,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=where.type == "cuda",
    )

    def batches(round_: int) -> Batches:
        for images, labels in loader:
            if len(labels) > 1:
                yield images.to(where, non_blocking=True), labels.to(where)

    return batches


def main() -> None:
    first, _, rest = (__doc__ or "").partition("\n")
    parser = ArgumentParser(description=first, epilog=rest, formatter_class=RawTextHelpFormatter)
    parser.add_argument("data", type=Path, help="DATA/{train,validation}/CLASS/**/*.png")
    parser.add_argument("--recipe", default="scratch", help="default %(default)s")
    parser.add_argument("--input-size", type=int, default=112, help="default %(default)s")
    parser.add_argument("--frames", type=int, help="number of training frames, drawn at random (default: all)")
    parser.add_argument(
        "--workers", type=int, nargs="*", default=[0, 1, 2], help="DataLoader workers (default %(default)s)"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--rounds", type=int, default=3, help="timed epochs (default %(default)s)")
    parser.add_argument("--threads", type=int, default=available_cpus(), help="CPU threads (default: all, %(default)s)")
    parser.add_argument("--results", type=Path, help="Markdown file whose section of this script is replaced")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    where = choose_device(options.device)
    make_deterministic(where)
    recipe = Recipe.load(options.recipe).replace(weights="none", input_size=options.input_size)
    classes = read_classes(options.data)
    contract = recipe.contract(classes)
    split = read_split(options.data, "train", classes)
    if options.frames and options.frames < len(split.frames):
        chosen = sorted(random.Random(0).sample(range(len(split.frames)), options.frames))
        split = Split(split.name, split.classes, tuple(split.frames[index] for index in chosen))
    labels = np.array([frame.label for frame in split.frames])

    ways: dict[str, Callable[[int], Batches]] = {"echoquad": echoquad_batches(split, recipe, contract, where)}
    ways |= {f"dataloader, {n} workers": dataloader_batches(split, recipe, contract, where, n) for n in options.workers}
    loops = {name: Loop(recipe, contract, labels, where) for name in ways}
    spent: dict[str, list[Spent]] = {name: [] for name in ways}
    for turn in range(options.rounds + 1):
        for name in rotated(list(ways), turn):
            took = Spent(*loops[name].epoch(ways[name](turn)))
            if turn:
                spent[name].append(took)

    own = [took.total for took in spent["echoquad"]]
    rows = [["way", "epoch s", "data s", "compute s", "frames/s", "over echoquad"]]
    record = {}
    for name, found in spent.items():
        epoch, data, compute = (
            statistics.median(getattr(took, field) for took in found) for field in ("total", "data", "compute")
        )
        ratio = paired_ratio([took.total for took in found], own)
        rows.append([name, *(f"{value:.2f}" for value in (epoch, data, compute, len(labels) / epoch, ratio))])
        record[name] = {"epoch_s": epoch, "data_s": data, "compute_s": compute, "over_echoquad": ratio}
    precision = {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[loops["echoquad"].dtype]
    how = f"{recipe.backbone} at {recipe.input_size}, batch {recipe.batch_size}, {precision} on {where.type}"
    report(
        "epoch",
        rows,
        {"frames": len(labels), "rounds": options.rounds, "training": how, "ways": record},
        options.results,
        threads=options.threads,
        notes=[f"{len(labels)} frames, {how}; medians of {options.rounds} epochs after a warm-up."],
    )


if __name__ == "__main__":
    main()
