"""The model card: what a reader must know of a bundle before using it, filled from the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from echoquad_runtime.bundle import INTENDED_USE
from echoquad_runtime.contract import QUADRANTS, Contract
from echoquad_train.evaluate import wilson_interval

__all__ = ["model_card"]

_FIGURES = ("max_abs_dlogit", "max_abs_dprobability", "patch_flips", "frame_flips")


def model_card(contract: Contract, training: Mapping[str, Any], parity: Mapping[str, Any], created: str) -> str:
    """Write the card as Markdown.

    Parameters
    ----------
    contract
        How a frame becomes a decision.
    training, parity
        As the manifest holds them.
    created
        Date and time of the export.
    """
    best, frames = training["best"], training["frames"]
    count = sum(frames["validation"].values())
    low, high = wilson_interval(round(best["validation_frame_accuracy"] * count), count)
    positions = dict(zip(QUADRANTS, ("top left", "top right", "bottom left", "bottom right"), strict=True))
    lines = [
        f"# Model card: {', '.join(contract.classes)} from echo frames, by quadrants",
        "",
        f"**{INTENDED_USE}**",
        "",
        f"Exported {created} by EchoQuad {training['versions']['echoquad']}. Contract `{contract.sha256}`.",
        "",
        "## What it does",
        "",
        f"Judges a still echocardiogram frame as one of {', '.join(contract.classes)}. The frame is read as grey, the",
        f"centre {contract.keep:.0%} of each side is kept and cut into four quadrants, each is resized to",
        f"{contract.input_size}x{contract.input_size} and judged by a {training['backbone']}; the quadrants are joined",
        f"by {contract.vote} vote.",
        "",
        "| quadrant | part of the frame |",
        "|---|---|",
        *(f"| {name} | {where} |" for name, where in positions.items()),
        "",
        "The names are a heuristic: nothing checks that the chamber really lies there.",
        "",
        "## Training data",
        "",
        f"| split | {' | '.join(contract.classes)} |",
        f"|---|{'---|' * len(contract.classes)}",
        *(
            f"| {split} | {' | '.join(str(counts[name]) for name in contract.classes)} |"
            for split, counts in frames.items()
        ),
        "",
        f"Frames that could not be read: {training['unreadable']}. Seed {training['seed']},",
        f"{training['epochs']} epochs, trained on {training['device']} in {training['precision']}.",
        "",
        "## Validation",
        "",
        f"Frame accuracy {best['validation_frame_accuracy']:.3f}",
        f"(95 % interval {low:.3f} to {high:.3f}, {count} frames),",
        f"quadrant accuracy {best['validation_patch_accuracy']:.3f}, in epoch {best['epoch']}.",
        "That epoch was chosen on these same frames, so the figures are optimistic; measure on a test split of",
        "other patients with `echoquad evaluate`. The interval takes frames as independent; where a patient has",
        "several it is too narrow.",
        "",
        "## Parity with the training code",
        "",
        "| precision | frames | worst logit difference | worst probability difference | patch flips | frame flips |",
        "|---|---|---|---|---|---|",
    ]
    for precision, figures in parity.items():
        batches = figures["batches"]
        dlogit, dp, patches, flips = (max(batch[name] for batch in batches) for name in _FIGURES)
        lines.append(f"| {precision} | {figures['frames']} | {dlogit:.2e} | {dp:.2e} | {patches} | {flips} |")
    lines += [
        "",
        "Largest over all batch sizes. `echoquad verify` replays the golden frames, synthetic phantoms,",
        "on the device at hand.",
        "",
        "## Limits",
        "",
        "- The quadrants are fixed; a tilted, mirrored or zoomed view puts other anatomy in them.",
        "- Each quadrant was trained with its whole frame's label, whether or not it shows anything of it.",
        "- On-screen text, borders and scanner settings can give a class away; a high accuracy does not rule that out.",
        "- Frames of another scanner, view or population than the training data were not measured.",
        "",
    ]
    return "\n".join(lines)
