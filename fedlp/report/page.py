"""One self-contained HTML page from run directories and packed runs."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlp.errors import DataError
from fedlp.report.export import summary_json
from fedlp.report.files import PACKED, is_packed
from fedlp.report.groups import ABSENT, Group, clean, differences, flatten, group_runs, shorten, show
from fedlp.report.reproduce import command
from fedlp.report.runs import find_runs
from fedlp.report.summary import summarize
from fedlp.report.tables import columns, notes

if TYPE_CHECKING:
    from fedlp.report.figures import Plot

_MOST_FAILURES = 200
_LONGEST_VALUE = 60
_SETTING = {
    "dataset.name": "data set",
    "partition.name": "partition",
    "model.name": "model",
    "num_clients": "clients",
    "clients_per_round": "clients a round",
    "num_rounds": "rounds",
    "local.optimizer": "local optimizer",
    "local.lr": "learning rate",
    "local.epochs": "local epochs",
    "local.batch_size": "batch size",
}
_CSS = """
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #1c2024; background: #fff;
  max-width: 72rem; margin: 2.5rem auto 4rem; padding: 0 1.5rem; }
h1 { font-size: 1.7rem; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
.setting, figcaption, .more { color: #5a6270; } .setting b { color: #1c2024; font-weight: 600; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th { text-align: left; vertical-align: bottom; font-weight: 600; border-bottom: 2px solid #1c2024; }
th, td { padding: .35rem .8rem .35rem 0; } td { border-bottom: 1px solid #e4e7eb; vertical-align: top; }
.numbers th:not(:first-child), .numbers td:not(:first-child) { text-align: right; white-space: nowrap; }
.numbers td:first-child { font-weight: 600; min-width: 9rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap: 2rem; }
figure { margin: 0; } figure h3 { font-size: 1rem; margin: 0 0 .5rem; } img { width: 100%; height: auto; }
figcaption { font-size: .9rem; }
pre { font-size: .82rem; background: #f5f6f8; padding: .9rem 1rem; border-radius: 6px; overflow-x: auto; }
summary { cursor: pointer; padding: .2rem 0; }
"""


def default_report_dir(path: Path) -> Path:
    """Return the folder of a report on ``path``: ``report`` in a folder, ``report-NAME`` beside a packed file."""
    return path.with_name(f"report-{path.name.removesuffix(PACKED)}") if is_packed(path) else path / "report"


def write_report(paths: Sequence[Path], out: Path) -> Path:
    """Read the runs in ``paths`` and write ``report.html``, its plots as ``*.png`` and ``summary.json`` into ``out``.

    The page needs no other file and no network. Equal runs give equal bytes.

    Returns
    -------
    Path
        Of the page.

    Raises
    ------
    DataError
        If there is no run, a run is damaged, or ``out`` cannot be written.
    """
    from fedlp.report.plots import draw_plots  # matplotlib takes a second to load

    groups = group_runs(find_runs(paths))
    plots = draw_plots(groups)
    page = out / "report.html"
    try:
        out.mkdir(parents=True, exist_ok=True)
        for plot in plots:
            (out / plot.file).write_bytes(plot.png)
        (out / "summary.json").write_text(summary_json(groups), encoding="utf-8")
        page.write_text(render(groups, plots), encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"cannot write the report to {out}: {error.strerror}") from error
    return page


def render(groups: Sequence[Group], plots: Sequence[Plot]) -> str:
    """Return the page; every text that comes from a file is escaped."""
    count = sum(len(group.runs) for group in groups)
    title = groups[0].label if len(groups) == 1 else f"{len(groups)} methods"
    title = f"{title}, {count} run{'s' if count > 1 else ''}"
    parts = [
        f"<h1>{_text(title)}</h1>",
        _setting(groups),
        _results(groups),
        _notes(groups),
        _figures(plots),
        _differences(groups),
        _failures(groups),
        _sources(groups),
        _commands(groups),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{_text(title)}</title>'
    body = "\n".join(part for part in parts if part)
    head = f"<head>{head}<style>{_CSS}</style></head>"
    return f'<!doctype html>\n<html lang="en">\n{head}\n<body>\n{body}\n</body>\n</html>\n'


def _text(value: Any) -> str:
    return escape(clean(str(value)))


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], kind: str = "") -> str:
    titles = "".join(f"<th>{_text(title)}</th>" for title in head)
    lines = ["".join(f"<td>{_text(cell)}</td>" for cell in row) for row in rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f'<div class="wide"><table class="{kind}"><thead><tr>{titles}</tr></thead>\n<tbody>{body}</tbody></table></div>'
    )


def _section(title: str, body: str) -> str:
    return f"<h2>{_text(title)}</h2>\n{body}"


def _setting(groups: Sequence[Group]) -> str:
    """Main settings shared by all runs."""
    configs = [flatten(group.config) for group in groups]
    shared = {key: {show(config[key]) for config in configs if key in config} for key in _SETTING}
    words = [f"{_SETTING[key]} <b>{_text(*values)}</b>" for key, values in shared.items() if len(values) == 1]
    return f'<p class="setting">{" · ".join(words)}</p>'


def _results(groups: Sequence[Group]) -> str:
    rows = [summarize(group) for group in groups]
    shown = columns(rows)
    legend = (
        "Means over seeds ± sample standard deviation. MB are 10⁶ bytes of encoded messages, summed over all clients; "
        "parameters are those sent to and from one client in one round; MACs are those of training."
    )
    table = _table(
        [" ".join(column.title) for column in shown],
        [[column.cell(row) for column in shown] for row in rows],
        "numbers",
    )
    return _section("Results", f'{table}\n<p class="more">{legend}</p>')


def _notes(groups: Sequence[Group]) -> str:
    items = "".join(f"<li>{_text(note)}</li>" for note in notes(groups))
    return _section("Read this with the numbers", f"<ul>{items}</ul>") if items else ""


def _figures(plots: Sequence[Plot]) -> str:
    items = [
        f"<figure><h3>{_text(plot.title)}</h3>"
        f'<img alt="{_text(plot.title)}" src="data:image/png;base64,{base64.b64encode(plot.png).decode()}">'
        f"<figcaption>{_text(plot.caption)}</figcaption></figure>"
        for plot in plots
    ]
    return _section("Plots", f'<div class="plots">{"".join(items)}</div>') if items else ""


def _differences(groups: Sequence[Group]) -> str:
    table = differences(groups)
    if not table:
        return ""
    rows = [[key, *(shorten(value, _LONGEST_VALUE) for value in values)] for key, values in table.items()]
    return _section("What differs", _table(["config", *(group.label for group in groups)], rows))


def _failures(groups: Sequence[Group]) -> str:
    rows = [
        [group.label, run.seed, record.server_round, failure.client_id, failure.reason, failure.message]
        for group in groups
        for run in group.runs
        for record in run.rounds
        for failure in record.failures
    ]
    if not rows:
        return ""
    table = _table(["method", "seed", "round", "client", "reason", "message"], rows[:_MOST_FAILURES])
    more = len(rows) - _MOST_FAILURES
    return _section(
        f"Client failures ({len(rows)})", table + (f'<p class="more">and {more} more.</p>' if more > 0 else "")
    )


def _sources(groups: Sequence[Group]) -> str:
    runs = [(group, run) for group in groups for run in group.runs]
    rows = [
        [group.label, run.seed, "dry run" if run.dry else "finished" if run.finished else "unfinished", run.path]
        for group, run in runs
    ]
    facts = [_facts(run.manifest) for _, run in runs]
    known = dict.fromkeys(key for fact in facts for key in fact)
    versions = [[key, ", ".join(dict.fromkeys(fact.get(key, ABSENT) for fact in facts))] for key in known]
    table = _table(["method", "seed", "state", "run directory"], rows)
    return _section("Runs and versions", table + (f"<br>\n{_table(['what', 'version'], versions)}" if versions else ""))


def _facts(manifest: Mapping[str, Any]) -> dict[str, str]:
    commit = {"commit": manifest["commit"]} if "commit" in manifest else {}
    return {key: show(value) for key, value in flatten(commit | dict(manifest.get("versions") or {})).items()}


def _commands(groups: Sequence[Group]) -> str:
    items = [
        f"<details{' open' if len(groups) == 1 else ''}><summary>{_text(group.label)}</summary>"
        f"<pre>{escape(command(group))}</pre></details>"
        for group in groups
    ]
    return _section("Run it again", "\n".join(items))
