"""Files of a finished run that trackers store as artifacts."""

from __future__ import annotations

from pathlib import Path

from fedlp.report.page import write_report


def result_files(run_dir: Path, report: bool) -> list[Path]:
    """Return config, manifest and, if requested, the report page, which is written to ``report``."""
    found = [run_dir / "config.yaml", run_dir / "manifest.json"]
    if report:
        found.append(write_report([run_dir], run_dir / "report"))
    return [path for path in found if path.is_file()]
