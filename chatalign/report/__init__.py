"""What a run or a pipeline has to say for itself: report.md, report.html, plots, and tables for the terminal."""

from chatalign.report.compare import write_comparison
from chatalign.report.pipeline_report import write_pipeline_report
from chatalign.report.run_report import write_run_report
from chatalign.report.terminal import print_evaluation, print_pipeline_summary

__all__ = [
    "print_evaluation",
    "print_pipeline_summary",
    "write_comparison",
    "write_pipeline_report",
    "write_run_report",
]
