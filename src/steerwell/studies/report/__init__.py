"""What a study found: one Markdown text, and the same as one HTML page that needs nothing else.

`alignment` and `synthesis` say what is told of a study of their kind; the rest is shared.
"""

from steerwell.studies.report.write import Report, write_report

__all__ = ["Report", "write_report"]
