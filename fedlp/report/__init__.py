"""Tables, plots and one page from run directories.

Reads files only: nothing here imports torch, flwr or hydra, and matplotlib loads only when a plot is drawn.
"""

from fedlp.report.groups import Group, group_runs, run_label
from fedlp.report.page import write_report
from fedlp.report.runs import Run, find_runs, load_run
from fedlp.report.tables import summary_table

__all__ = ["Group", "Run", "find_runs", "group_runs", "load_run", "run_label", "summary_table", "write_report"]
