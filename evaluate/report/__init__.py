"""Reports: one conversion's measurements as a page, and several conversions side by side."""

from .writing import ReportFiles, write_report

__all__ = ["ReportFiles", "write_report"]
