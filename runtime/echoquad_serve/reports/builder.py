"""Reports of a result: which are made, and why one is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from echoquad_runtime.bundle.bundle import Bundle
from echoquad_runtime.bundle.code_table import CodeTable, default_codes
from echoquad_runtime.contract import INDETERMINATE
from echoquad_runtime.errors import EchoQuadError, MissingExtraError
from echoquad_serve.errors import DeliveryError
from echoquad_serve.records import Result
from echoquad_serve.reports.decision_groups import DecisionGroup, group_rows
from echoquad_serve.reports.report import Report, Reports

__all__ = ["build_reports", "report_codes"]

Kind = Literal["sr", "sc"]
"""A structured report or a secondary capture."""


def report_codes(bundle: Bundle) -> CodeTable | None:
    """Return the codes that a bundle is reported with: its own table, or the default for a class ``ASD``.

    Returns
    -------
    CodeTable or None
        None if it has neither.

    Raises
    ------
    BundleError
        If its table is malformed.
    """
    return bundle.codes or default_codes(bundle.contract.classes)


def build_reports(
    result: Result,
    source: Path,
    *,
    codes: CodeTable | None,
    overlay: Callable[[int], bytes] | None,
    kinds: Sequence[Kind] = ("sr", "sc"),
    previous_versions: Sequence[Report] = (),
) -> Reports:
    """Build the DICOM reports of a result, without a clock or chance: the same arguments give the same bytes.

    Parameters
    ----------
    result
        A result with the bundle that decided.
    source
        The object's file. It is untrusted.
    codes
        The code table of that bundle; None makes no structured report.
    overlay
        Returns the picture of a row as PNG, by its index; None makes no secondary capture.
    kinds
        What to make.
    previous_versions
        Structured reports of earlier results of the same object, which this one replaces.

    Raises
    ------
    DeliveryError
        If the file cannot be read, or the system refuses to draw a picture now.
    DeliveryRefusedError
        If its header is damaged, or does not say which study, series and object it is.
    MissingExtraError
        If the extra ``pacs`` is not installed.
    """
    try:
        from echoquad_serve.reports.secondary_capture import build_secondary_capture
        from echoquad_serve.reports.source_header import read_source_header
        from echoquad_serve.reports.structured_report import build_structured_report
    except ImportError as error:
        raise MissingExtraError(
            f'DICOM reports need {error.name}, which cannot be imported; do: pip install "echoquad[pacs]"'
        ) from error

    if not result.rows:
        return Reports((), "no frame of the object was decided, so there is nothing to report")
    header = read_source_header(source)
    if header is None:
        return Reports(())  # the object is not DICOM: there is no study that a report is missing from
    groups = group_rows(result.rows)
    reports: list[Report] = []
    reasons: list[str] = []
    if "sr" in kinds:
        if codes is None or (reason := _uncoded(groups, codes)):
            reasons.append("no structured report: the bundle has no code table" if codes is None else reason)
        else:
            reports.append(build_structured_report(result, header, groups, codes, previous_versions))
    for number, group in enumerate(groups if "sc" in kinds and overlay is not None else (), start=1):
        assert overlay is not None
        frame = group.clearest_frame
        try:
            picture = overlay(group.clearest)
            reports.append(
                build_secondary_capture(result, header, picture, number=number, frame=frame, label=group.label)
            )
        except (EchoQuadError, KeyError) as error:
            cause = error.code if isinstance(error, EchoQuadError) else type(error).__name__
            reasons.append(f"no secondary capture: the picture cannot be drawn ({cause})")
        except OSError as error:  # it may pass: the delivery is tried again
            reason = error.strerror or type(error).__name__
            raise DeliveryError(f"a picture cannot be drawn now ({reason}); it is tried again") from error
    return Reports(tuple(reports), "; ".join(dict.fromkeys(reasons)))


def _uncoded(groups: Sequence[DecisionGroup], codes: CodeTable) -> str:
    """Return why decisions cannot be reported with a code table; empty if they can."""
    labels = [group.label for group in groups if group.label != INDETERMINATE]
    if uncoded := codes.uncoded(labels):
        return f"no structured report: the code table has no codes for the class {', '.join(sorted(uncoded))}"
    return ""
