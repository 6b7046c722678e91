"""Reports: one conversion's measurements as a page, and several conversions side by side."""

from .comparing import ConversionComparison, compare_conversions
from .writing import ReportFiles, write_report

__all__ = ["ConversionComparison", "ReportFiles", "compare_conversions", "write_report"]
