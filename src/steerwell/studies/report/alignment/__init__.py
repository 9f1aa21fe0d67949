"""The report of an alignment study."""

from steerwell.studies.report.alignment.sections import content

__all__ = ["content"]
