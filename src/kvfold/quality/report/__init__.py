"""The report of an evaluation: one page for a browser, and its figures as PNG."""

from kvfold.quality.report.canvas import ReportError, require_matplotlib
from kvfold.quality.report.page import write_report

__all__ = ["ReportError", "require_matplotlib", "write_report"]
