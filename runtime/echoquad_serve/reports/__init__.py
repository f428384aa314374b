"""DICOM objects that report a result: a structured report for machines, and a secondary capture for people."""

from __future__ import annotations

from echoquad_serve.reports.builder import build_reports, report_codes
from echoquad_serve.reports.report import Report, Reports

__all__ = ["Report", "Reports", "build_reports", "report_codes"]
