"""The support report: a zip file of what a support engineer needs of a machine, without any value of a patient."""

from echoquad_deploy.support_report.report import write_support_report

__all__ = ["write_support_report"]
