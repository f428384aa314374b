"""Summaries of an evaluation and of a comparison, as text for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from echoquad.cli.framework.console import format_table

if TYPE_CHECKING:
    from echoquad_train.evaluation.abstention import Abstention
    from echoquad_train.evaluation.metrics import CalibrationMetrics, EvaluationMetrics, UnlikeTraining
    from echoquad_train.evaluation.operating_points import OperatingPoint
    from echoquad_train.reporting.comparison import Comparison

__all__ = ["summarize", "summarize_comparison"]


def summarize(metrics: EvaluationMetrics) -> str:
    """Return the summary of an evaluation."""
    frame, patients = metrics.frame, metrics.patients
    low, high = frame.accuracy_ci95
    auc = "none, a class has no frame" if frame.roc_auc is None else f"{frame.roc_auc:.4f}"
    rows = [
        [
            name,
            *("none" if value is None else f"{value:.4f}" for value in (of.precision, of.recall, of.f1)),
            str(of.support),
            *map(str, frame.confusion[index]),
        ]
        for index, (name, of) in enumerate(frame.per_class.items())
    ]
    quadrants = "  ".join(f"{name} {value:.4f}" for name, value in frame.per_quadrant.items())
    return "\n".join(
        [
            f"frame accuracy {frame.accuracy:.4f} (95 % interval {low:.4f} to {high:.4f}), {frame.frames} frames",
            f"ROC AUC        {auc}{_interval(metrics.intervals.roc_auc.ci95)}",
            f"quadrants      {quadrants}",
            f"by patient     {patients.accuracy:.4f}{_interval(patients.intervals['accuracy'].ci95)}, "
            f"{patients.count} decisions, one per {patients.unit}",
            f"ECE            {_calibration(metrics.calibration)}",
            *(_operating_point(point) for point in metrics.operating_points if point.sensitivity),
            *_abstention(metrics.abstention),
            *_unlike_training(metrics.unlike_training),
            "",
            format_table(
                ["class", "precision", "recall", "F1", "frames", *(f"as {name}" for name in frame.classes)], rows
            ),
        ]
    )


def summarize_comparison(comparison: Comparison) -> str:
    """Return the summary of a comparison."""
    difference = comparison.difference["accuracy"]
    table = format_table(
        ["frames", "B right", "B wrong"],
        [
            ["A right", str(comparison.both_right), str(comparison.first_only)],
            ["A wrong", str(comparison.second_only), str(comparison.both_wrong)],
        ],
    )
    return (
        f"{table}\nMcNemar's exact test p = {comparison.mcnemar_p:.4g}; "
        f"accuracy A less B {difference.estimate:+.4f}{_interval(difference.ci95)}"
    )


def _calibration(calibration: CalibrationMetrics) -> str:
    reported = f"{calibration.reported.ece:.4f} as reported"
    if not (refitted := calibration.refitted):
        return reported
    how = "cross-fitted by patient" if refitted.cross_fitted else "under temperatures from validation"
    return f"{reported}, {refitted.reliability.ece:.4f} {how}"


def _unlike_training(found: UnlikeTraining | None) -> list[str]:
    if found is None:
        return []
    return [f"unlike training {found.share:.4f}{_interval(found.ci95)}, {found.frames} frames"]


def _operating_point(point: OperatingPoint) -> str:
    if not point.measured or point.sensitivity is None or point.specificity is None:
        return f"at {point.fixed} {point.target:g}: no frame of one of the two classes"
    fixed, other = ("specificity", "sensitivity") if point.fixed == "specificity" else ("sensitivity", "specificity")
    rates = {"sensitivity": point.sensitivity, "specificity": point.specificity}
    return (
        f"at {fixed} {point.target:g}: {other} {rates[other].estimate:.4f}{_interval(rates[other].ci95)}, "
        f"{fixed} reached {rates[fixed].estimate:.4f}"
    )


def _abstention(abstention: Abstention) -> list[str]:
    if not (at := abstention.at):
        return []
    accuracy = at.accuracy.estimate
    share = "none decided" if accuracy is None else f"accuracy {accuracy:.4f}{_interval(at.accuracy.ci95)}"
    return [f"abstaining     below {at.below:g}: coverage {at.coverage.estimate:.4f}, {share}"]


def _interval(bounds: tuple[float, float] | None) -> str:
    return "" if bounds is None else f" ({bounds[0]:.4f} to {bounds[1]:.4f})"
