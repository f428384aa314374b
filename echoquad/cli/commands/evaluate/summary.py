"""Summaries of an evaluation and of a comparison, as text for a terminal."""

from __future__ import annotations

from typing import Any

from echoquad.cli.framework.console import format_table

__all__ = ["summarize", "summarize_comparison"]


def summarize(metrics: dict[str, Any]) -> str:
    """Return the summary of an evaluation; `metrics` is the content of ``metrics.json``."""
    low, high = metrics["accuracy_ci95"]
    auc = "none, a class has no frame" if metrics["roc_auc"] is None else f"{metrics['roc_auc']:.4f}"
    classes = metrics["classes"]
    rows = [
        [
            name,
            *(f"{metrics['per_class'][name][figure]:.4f}" for figure in ("precision", "recall", "f1")),
            str(metrics["per_class"][name]["support"]),
            *map(str, metrics["confusion"][index]),
        ]
        for index, name in enumerate(classes)
    ]
    quadrants = "  ".join(f"{name} {value:.4f}" for name, value in metrics["per_quadrant"].items())
    patients = metrics["patients"]
    return "\n".join(
        [
            f"frame accuracy {metrics['accuracy']:.4f} (95 % interval {low:.4f} to {high:.4f}), "
            f"{metrics['frames']} frames",
            f"ROC AUC        {auc}{_interval(metrics['intervals']['roc_auc']['ci95'])}",
            f"quadrants      {quadrants}",
            f"by patient     {patients['accuracy']:.4f}{_interval(patients['intervals']['accuracy']['ci95'])}, "
            f"{patients['count']} decisions, one per {patients['unit']}",
            f"ECE            {_calibration(metrics['calibration'])}",
            *(_operating_point(point) for point in metrics["operating_points"] if point["sensitivity"]),
            *_abstention(metrics["abstention"]),
            "",
            format_table(["class", "precision", "recall", "F1", "frames", *(f"as {name}" for name in classes)], rows),
        ]
    )


def summarize_comparison(comparison: dict[str, Any]) -> str:
    """Return the summary of a comparison; it is the content of ``compare.json``."""
    difference = comparison["difference"]["accuracy"]
    table = format_table(
        ["frames", "B right", "B wrong"],
        [
            ["A right", str(comparison["both_right"]), str(comparison["first_only"])],
            ["A wrong", str(comparison["second_only"]), str(comparison["both_wrong"])],
        ],
    )
    return (
        f"{table}\nMcNemar's exact test p = {comparison['mcnemar_p']:.4g}; "
        f"accuracy A less B {difference['estimate']:+.4f}{_interval(difference['ci95'])}"
    )


def _calibration(calibration: dict[str, Any]) -> str:
    reported = f"{calibration['reported']['ece']:.4f} as reported"
    if not (refitted := calibration["refitted"]):
        return reported
    how = "cross-fitted by patient" if "temperatures" in refitted else "under temperatures from validation"
    return f"{reported}, {refitted['ece']:.4f} {how}"


def _operating_point(point: dict[str, Any]) -> str:
    fixed = point["fixed"]
    other = "sensitivity" if fixed == "specificity" else "specificity"
    reached, estimate = point[fixed]["estimate"], point[other]["estimate"]
    if reached is None or estimate is None:
        return f"at {fixed} {point['target']:g}: no frame of one of the two classes"
    return (
        f"at {fixed} {point['target']:g}: {other} {estimate:.4f}{_interval(point[other]['ci95'])}, "
        f"{fixed} reached {reached:.4f}"
    )


def _abstention(abstention: dict[str, Any]) -> list[str]:
    if not (at := abstention.get("at")):
        return []
    accuracy = at["accuracy"]["estimate"]
    share = "none decided" if accuracy is None else f"accuracy {accuracy:.4f}{_interval(at['accuracy']['ci95'])}"
    return [f"abstaining     below {at['below']:g}: coverage {at['coverage']['estimate']:.4f}, {share}"]


def _interval(bounds: list[float] | None) -> str:
    return "" if bounds is None else f" ({bounds[0]:.4f} to {bounds[1]:.4f})"
