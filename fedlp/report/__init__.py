"""Tables, plots and one page from run directories and packed runs.

Reads files only: nothing here imports torch, flwr or hydra, and matplotlib loads only when a plot is drawn.
"""

from fedlp.report.groups import Group, group_runs, run_label
from fedlp.report.packed import pack_runs, unpack_runs
from fedlp.report.page import default_report_dir, write_report
from fedlp.report.runs import Run, find_runs, load_run
from fedlp.report.tables import summary_table

__all__ = [
    "Group",
    "Run",
    "default_report_dir",
    "find_runs",
    "group_runs",
    "load_run",
    "pack_runs",
    "run_label",
    "summary_table",
    "unpack_runs",
    "write_report",
]
