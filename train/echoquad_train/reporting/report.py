"""The report of an evaluation: one HTML file with every figure and number, to be opened offline and printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from echoquad_runtime._version import __version__
from echoquad_runtime.bundle.manifest import INTENDED_USE
from echoquad_train.reporting.html import figure, figures, items, page, paragraph, section, table
from echoquad_train.reporting.mistake_gallery import Mistake
from echoquad_train.reporting.saved_figures import Picture, point_words

__all__ = ["PRIVACY", "evaluation_report", "figure_row", "number"]

PRIVACY: Final = (
    "This file holds pixels of frames where it shows mistakes, and names of files and folders: it is as private as the "
    "data that it was made of."
)
NONE: Final = "–"
_FIGURES: Final[Mapping[str, str]] = {
    "accuracy": "accuracy, frames",
    "balanced_accuracy": "balanced accuracy: the mean of the classes' recalls",
    "roc_auc": "area under the ROC curve",
    "sensitivity": "sensitivity of the vote for {positive}",
    "specificity": "specificity of the vote for {positive}",
    "f1": "F1 of {positive}",
    "macro_f1": "F1, mean over the classes",
    "ece": "expected calibration error",
    "brier": "Brier score, 0 to 2",
    "nll": "negative log-likelihood, nats",
}


def number(value: float | None, digits: int = 3) -> str:
    """Write a number; a dash where there is none."""
    return NONE if value is None else f"{value:.{digits}f}"


def bounds(values: Sequence[float] | None) -> str:
    """Write an interval; a dash where there is none."""
    return NONE if values is None else f"{values[0]:.3f} to {values[1]:.3f}"


def figure_row(label: str, found: Mapping[str, Any] | None) -> list[str]:
    """Give the row of a figure with its interval."""
    return [label, number(found["estimate"]), bounds(found["ci95"])] if found else [label, NONE, NONE]


def evaluation_report(
    metrics: Mapping[str, Any], pictures: Sequence[Picture], mistakes: Sequence[Mistake], folder: Path
) -> str:
    """Give the page.

    Parameters
    ----------
    metrics
        What ``metrics.json`` holds.
    pictures
        The figures, on the disk.
    mistakes
        The gallery, its pictures below `folder`.
    folder
        The evaluation's.

    Raises
    ------
    OSError
        If a picture cannot be read.
    """
    model = metrics.get("model") or {}
    name = f"{model['name']} on " if "name" in model else ""
    parts = [
        paragraph(INTENDED_USE, strong=True),
        paragraph(PRIVACY),
        _summary(metrics),
        _measured(metrics, model),
        section("Figures", [figures([figure(picture.path, picture.title, picture.caption) for picture in pictures])]),
        _classes(metrics),
        _points(metrics),
        _calibration(metrics),
        _votes(metrics),
        _abstention(metrics),
        _gallery(mistakes, metrics, folder),
        _limits(),
    ]
    return page(f"Evaluation: {name}{metrics['split']}", parts)


def _summary(metrics: Mapping[str, Any]) -> str:
    found, patients = metrics["intervals"], metrics["patients"]
    rows = [figure_row(words.format(positive=metrics["positive"]), found[name]) for name, words in _FIGURES.items()]
    unit = f"{patients['count']} decisions, one a {patients['unit']}"
    rows += [
        figure_row(f"accuracy, patients: {unit}", patients["intervals"]["accuracy"]),
        figure_row("area under the ROC curve, patients", patients["intervals"]["roc_auc"]),
    ]
    words = (
        f"{metrics['frames']} frames of {found['patients']} patients. Intervals: {found['method']}, "
        f"{found['resamples']} resamples, seed {found['seed']}; by Wilson's formula, which takes frames as "
        f"independent, the accuracy's is {bounds(metrics['accuracy_ci95'])}. A patient's decision is "
        f"{patients['joined_by']}."
    )
    return section("Summary", [table(("figure", "estimate", "95 % interval"), rows), paragraph(words)])


def _measured(metrics: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    classes = metrics["classes"]
    counts = ", ".join(f"{name} {metrics['per_class'][name]['support']}" for name in classes)
    hashes = {"manifest_sha256": "SHA-256 of the bundle's manifest", "weights_sha256": "SHA-256 of the run's weights"}
    rows = [
        ["model", f"{model.get('name', '')} ({model.get('kind', 'model')})".strip()],
        *([words, model[key]] for key, words in hashes.items() if key in model),
        ["SHA-256 of the contract", metrics["contract_sha256"]],
        ["ran on", f"{metrics['device']} in {metrics['precision']}, vote: {metrics['method']}"],
        ["data", f"{metrics.get('data', '')} {metrics['split']}".strip()],
        ["frames", f"{metrics['frames']} ({counts}); {metrics['unreadable']} could not be read"],
        [
            "patients",
            f"{metrics['intervals']['patients']}, at most {metrics['patients']['most_frames']} frames of a class each",
        ],
        ["positive class", metrics["positive"]],
        [
            "temperatures, the contract's",
            f"{metrics['calibration']['temperature']:g} of a quadrant's softmax, "
            f"{metrics['calibration']['frame_temperature']:g} of a frame's mean",
        ],
        ["thresholds, refitted temperatures", metrics["chosen_on"]],
        ["EchoQuad", __version__],
    ]
    return section("What was measured", [table(("", ""), rows, words=True)])


def _classes(metrics: Mapping[str, Any]) -> str:
    classes = metrics["classes"]
    header = ("class", "precision", "recall", "F1", "frames", *(f"as {name}" for name in classes))
    rows = [
        [
            name,
            *(number(metrics["per_class"][name][key]) for key in ("precision", "recall", "f1")),
            str(metrics["per_class"][name]["support"]),
            *map(str, metrics["confusion"][index]),
        ]
        for index, name in enumerate(classes)
    ]
    patients = metrics["patients"]
    joined = [[name, *map(str, patients["confusion"][index])] for index, name in enumerate(classes)]
    return section(
        "Classes",
        [
            table(header, rows),
            paragraph(f"By {patients['unit']}, {patients['joined_by']}:"),
            table(("class", *(f"as {name}" for name in classes)), joined),
        ],
    )


def _points(metrics: Mapping[str, Any]) -> str:
    rows = []
    for point in metrics["operating_points"]:
        thresholds = point.get("thresholds") or [point.get("threshold")]
        chosen = NONE if None in thresholds else " ".join(f"{value:.4f}" for value in thresholds)
        pair = (figure_row("", point[name])[1:] for name in ("sensitivity", "specificity"))
        rows.append([point_words(point), chosen, *(cell for cells in pair for cell in cells)])
    vote = metrics["intervals"]
    pair = (figure_row("", vote[name])[1:] for name in ("sensitivity", "specificity"))
    rows.append(["the vote, no threshold", NONE, *(cell for cells in pair for cell in cells)])
    words = (
        f"A frame is called {metrics['positive']} where its mean probability of it is at or above the threshold. "
        f"Thresholds were chosen {metrics['chosen_on']}; what they reach here need not be what they were chosen for."
        if not metrics["chosen_on"].startswith("not")
        else f"Thresholds were {metrics['chosen_on']}; name some with --threshold-from DATA."
    )
    header = ("held", "threshold", "sensitivity", "95 % interval", "specificity", "95 % interval")
    return section("Operating points", [table(header, rows), paragraph(words)])


def _calibration(metrics: Mapping[str, Any]) -> str:
    found = metrics["calibration"]
    kinds = [
        (f"as reported, temperatures {found['temperature']:g} and {found['frame_temperature']:g}", found["reported"])
    ]
    if found["uncalibrated"]:
        kinds.append(("the plain mean, no temperatures", found["uncalibrated"]))
    if refitted := found["refitted"]:
        fitted = refitted.get("temperatures") or [refitted["temperature"]]
        frames = refitted.get("frame_temperatures") or [refitted["frame_temperature"]]
        how = "cross-fitted by patient" if "temperatures" in refitted else "fitted on validation"
        pairs = ", ".join(f"{value:g} and {frame:g}" for value, frame in zip(fitted, frames, strict=True))
        kinds.append((f"temperatures {how}: {pairs}", refitted))
    rows = [
        [
            label,
            *(number(of[key], 4) for key in ("ece", "ece_equal_width", "brier", "nll")),
            f"{of['ece_if_calibrated']['mean']:.4f}, at most {of['ece_if_calibrated']['q95']:.4f}",
        ]
        for label, of in kinds
    ]
    header = ("probabilities", "ECE", "ECE, 15 equal widths", "Brier", "NLL", "ECE of a perfect model")
    words = (
        f"Confidence is {found['confidence']}. ECE: {found['binning']}. So few frames show some error whatever the "
        "model: the last column is what frames with these confidences would show were every one of them true (mean, "
        "and the bound of 95 in 100)."
    )
    parts = [table(header, rows), paragraph(words)]
    if trained := metrics.get("trained_calibration"):
        crossed = trained.get("cross_fitted")
        told = f"The training fitted the temperatures on {trained['frames']} validation frames"
        told += f", ECE {crossed['ece']:.4f} cross-fitted by patient." if crossed else "."
        parts.append(paragraph(told))
    return section("Calibration", parts)


def _votes(metrics: Mapping[str, Any]) -> str:
    quadrants = [
        [name, number(share), bounds(metrics["quadrant_ci95"][name])] for name, share in metrics["per_quadrant"].items()
    ]
    votes = [
        [
            str(row["quadrants"]),
            str(row["frames"]),
            str(row["right"]),
            number(row["accuracy"]),
            bounds(row["accuracy_ci95"]),
        ]
        for row in metrics["vote_agreement"]
    ]
    return section(
        "Quadrants and their agreement",
        [
            table(("quadrant", "accuracy", "95 % interval"), quadrants),
            table(
                ("quadrants that agree with the decision", "frames", "right", "accuracy", "95 % interval (Wilson)"),
                votes,
            ),
        ],
    )


def _abstention(metrics: Mapping[str, Any]) -> str:
    found = metrics["abstention"]
    rows = [
        [f"{point['threshold']:.4f}", f"{point['coverage']:.1%}", number(point["accuracy"])]
        for point in found["points"]
    ]
    parts = [
        table(("decided at or above", "coverage", "accuracy"), rows),
        paragraph(
            f"Area under the risk-coverage curve {found['aurc']:.4f}. The bounds in this table are read off the frames "
            "that they are reported on: choose one for use on validation frames."
        ),
    ]
    if at := found.get("at"):
        coverage, accuracy = at["coverage"], at["accuracy"]
        parts.append(
            paragraph(
                f"With --abstain-below {at['below']:g}, {at['indeterminate']} frames are INDETERMINATE: coverage "
                f"{number(coverage['estimate'])} ({bounds(coverage['ci95'])}), accuracy among the decided "
                f"{number(accuracy['estimate'])} ({bounds(accuracy['ci95'])})."
            )
        )
    return section("Abstention", parts)


def _gallery(mistakes: Sequence[Mistake], metrics: Mapping[str, Any], folder: Path) -> str:
    wrong = sum(map(sum, metrics["confusion"])) - sum(row[index] for index, row in enumerate(metrics["confusion"]))
    title = "The most confident mistakes"
    if not mistakes:
        words = (
            "Every frame was judged rightly." if not wrong else f"{wrong} frames were judged wrongly; none is shown."
        )
        return section(title, [paragraph(words)])
    shown = [
        figure(
            folder / mistake.picture,
            f"{mistake.true} taken for {mistake.decided}, {mistake.confidence:.3f}",
            f"{mistake.file}, patient {mistake.patient}",
        )
        for mistake in mistakes
    ]
    return section(title, [paragraph(f"{len(mistakes)} of {wrong} frames that were judged wrongly."), figures(shown)])


def _limits() -> str:
    return section(
        "Limits",
        [
            items(
                (
                    "The quadrants are a heuristic: nothing checks that a chamber lies where its name says.",
                    "A patient is told from the file's name; where names do not tell, each frame counts for itself and "
                    "the intervals are too narrow.",
                    "On-screen text, borders and scanner settings can give a class away, whatever the figures.",
                    "Frames of another scanner, view or population were not measured.",
                )
            )
        ],
    )
