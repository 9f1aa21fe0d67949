"""The report of a synthesis study."""

from steerwell.studies.report.synthesis.sections import content

__all__ = ["content"]
