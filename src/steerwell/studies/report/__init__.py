"""The report of an alignment study: one Markdown text, and the same as one HTML page that needs nothing else."""

from steerwell.studies.report.write import Report, write_report

__all__ = ["Report", "write_report"]
