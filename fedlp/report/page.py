"""One self-contained HTML page from run directories and packed runs: interactive, light and dark, without a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fedlp.errors import DataError
from fedlp.report.export import summary_json
from fedlp.report.failures import failures_section
from fedlp.report.files import PACKED, is_packed
from fedlp.report.groups import ABSENT, Group, differences, flatten, group_runs, run_label, shorten, show
from fedlp.report.html import anchor, as_json, asset, number_table, plotly_script, section, table, text
from fedlp.report.interactive import CLOCK, COST, SECTIONS, Figure, figures
from fedlp.report.palette import DARK, LIGHT
from fedlp.report.reproduce import command
from fedlp.report.runs import find_runs
from fedlp.report.simulated import simulated_section
from fedlp.report.summary import summarize
from fedlp.report.tables import columns, notes

_MOST_NAMED = 3
_LONGEST_VALUE = 60
_SHOWN = ("failures",)  # columns that stand in the page's table at first, but not in the terminal's
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


def default_report_dir(path: Path) -> Path:
    """Return the folder of a report on ``path``: ``report`` in a folder, ``report-NAME`` beside a packed file."""
    return path.with_name(f"report-{path.name.removesuffix(PACKED)}") if is_packed(path) else path / "report"


def write_report(paths: Sequence[Path], out: Path, *, formats: Sequence[str] = ("png",)) -> Path:
    """Read the runs in ``paths`` and write ``report.html``, plots for papers and ``summary.json`` into ``out``.

    The page needs no other file and no network. Equal runs give equal bytes.

    Parameters
    ----------
    formats : sequence of str
        Of the plots beside the page: "png", "svg", "pdf".

    Returns
    -------
    Path
        Of the page.

    Raises
    ------
    DataError
        If there is no run, a run is damaged, or ``out`` cannot be written.
    """
    groups = group_runs(find_runs(paths))
    drawn = _draw(groups, formats)
    page = out / "report.html"
    try:
        out.mkdir(parents=True, exist_ok=True)
        for file, content in drawn.items():
            (out / file).write_bytes(content)
        (out / "summary.json").write_text(summary_json(groups), encoding="utf-8")
        page.write_text(render(groups, list(drawn)), encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"cannot write the report to {out}: {error.strerror}") from error
    return page


def _draw(groups: Sequence[Group], formats: Sequence[str]) -> dict[str, bytes]:
    """Return the plots beside the page, by file name."""
    from fedlp.report.figures import FORMAT
    from fedlp.report.plots import draw_plots  # matplotlib takes a second to load

    drawn: dict[str, bytes] = {}
    for kind in formats:
        token = FORMAT.set(kind)
        try:
            drawn |= {str(Path(plot.file).with_suffix(f".{kind}")): plot.png for plot in draw_plots(groups)}
        finally:
            FORMAT.reset(token)
    return drawn


def render(groups: Sequence[Group], files: Sequence[str] = ()) -> str:
    """Return the page, which names the files beside it; every text that comes from a file is escaped."""
    title, found = _title(groups), figures(groups)
    sections = {
        "Results": _results(groups),
        "Read this with the numbers": _notes(groups),
        **{name: _figures([one for one in found if one["section"] == name]) for name in SECTIONS},
        "Failures and attacks": failures_section(groups),
        COST: _figures([one for one in found if one["section"] == COST]),
        CLOCK: _figures([one for one in found if one["section"] == CLOCK]) + simulated_section(groups),
        "What differs": _differences(groups),
        "Run it again": _commands(groups),
        "Runs": _sources(groups),
        "For papers": _for_papers(files),
    }
    sections = {name: body for name, body in sections.items() if body}
    links = "".join(f'<li><a href="#{anchor(name)}">{text(name)}</a></li>' for name in sections)
    header = (
        f'<header><button id="theme" type="button" aria-label="switch between light and dark">light / dark</button>'
        f"<h1>{text(title)}</h1>\n{_made(groups)}\n{_setting(groups)}\n"
        f'<nav aria-label="sections"><ul>{links}</ul></nav></header>'
    )
    body = "\n".join(section(name, content) for name, content in sections.items())
    scripts = f"<script>{plotly_script()}</script>\n" if found else ""
    colours = as_json({"light": LIGHT, "dark": DARK})
    data = (
        f'<script type="application/json" id="palette">{colours}</script>\n'
        f'<script type="application/json" id="figures">{as_json(found)}</script>\n<script>{asset("page.js")}</script>'
    )
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'{meta}<link rel="icon" href="data:,"><title>{text(title)}</title>\n<style>{asset("page.css")}</style>'
    return (
        f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{header}\n<main>\n{body}\n</main>\n'
        f"{scripts}{data}\n</body>\n</html>\n"
    )


def _title(groups: Sequence[Group]) -> str:
    """Return the methods by name, and what they were run on where that is one data set."""
    methods = list(dict.fromkeys(run_label(group.config) for group in groups))
    more = len(methods) - _MOST_NAMED
    names = ", ".join(methods[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
    data = {show(flatten(group.config).get("dataset.name")) for group in groups}
    return f"{names} on {data.pop()}" if len(data) == 1 else names


def _made(groups: Sequence[Group]) -> str:
    """Return how many runs there are, and when, from which commit and on which hardware they were made."""
    runs = [run for group in groups for run in group.runs]
    facts: dict[str, dict[str, None]] = {"date": {}, "commit": {}, "hardware": {}}
    for run in runs:
        for name, value in _provenance(run.manifest).items():
            facts[name][value] = None
    dates = sorted(facts["date"])
    when = dates[:1] if len(set(dates)) < 2 else [f"{dates[0]} to {dates[-1]}"]
    commits = [f"commit {', '.join(list(facts['commit'])[:_MOST_NAMED])}"] if facts["commit"] else []
    count = f"{len(runs)} run{'s' if len(runs) > 1 else ''} of {len(groups)} config{'s' if len(groups) > 1 else ''}"
    words = [count, *when, *commits, *list(facts["hardware"])[:_MOST_NAMED]]
    return f'<p class="soft">{" · ".join(text(word) for word in words)}</p>'


def _provenance(manifest: Mapping[str, Any]) -> dict[str, str]:
    made = manifest.get("made") or {}
    versions = manifest.get("versions") or {}
    commit = made.get("commit") or manifest.get("commit") or versions.get("commit")
    found = {"date": str(made["date"])[:10]} if made.get("date") else {}
    found |= {"commit": shorten(str(commit), 13)} if commit else {}
    return found | ({"hardware": f"{made['cpu']}, {made.get('cores', '?')} cores"} if made.get("cpu") else {})


def _setting(groups: Sequence[Group]) -> str:
    """Main settings shared by all runs."""
    configs = [flatten(group.config) for group in groups]
    shared = {key: {show(config[key]) for config in configs if key in config} for key in _SETTING}
    words = [f"{_SETTING[key]} <b>{text(*values)}</b>" for key, values in shared.items() if len(values) == 1]
    return f'<p class="soft">{" · ".join(words)}</p>'


def _results(groups: Sequence[Group]) -> str:
    rows = [summarize(group) for group in groups]
    shown = columns(rows)
    head = []
    for column in shown:
        title = " ".join(column.title).strip()
        head.append((title, not column.in_terminal and title not in _SHOWN))
    caption = (
        "Means over seeds ± sample standard deviation. MB are 10⁶ bytes of encoded messages, summed over all clients; "
        "parameters are those sent to and from one client in one round; MACs are those of training."
    )
    cells = [[column.cell(row) for column in shown] for row in rows]
    choice = '<details><summary>Columns</summary><div class="controls columns"></div></details>'
    return f"{choice}\n{number_table(head, cells, caption)}"


def _notes(groups: Sequence[Group]) -> str:
    items = "".join(f"<li>{text(note)}</li>" for note in notes(groups))
    return f"<ul>{items}</ul>" if items else ""


def _figures(found: Sequence[Figure]) -> str:
    wide = len(found) % 2
    items = [
        f'<figure{_first(index, wide)} aria-labelledby="{one["id"]}-title">'
        f'<h3 id="{one["id"]}-title">{text(one["title"])}</h3>'
        f'<div class="controls" id="{one["id"]}-controls"></div>'
        f'<div class="plot" id="{one["id"]}" role="group" aria-label="{text(one["alt"])}"></div>'
        f"<figcaption>{text(one['caption'])}</figcaption></figure>"
        for index, one in enumerate(found)
    ]
    without = "<noscript><p>The plots need JavaScript; the same ones lie beside this page as files.</p></noscript>"
    return f'{without}<div class="plots">{"".join(items)}</div>' if items else ""


def _first(index: int, wide: int) -> str:
    """Return the class of a figure as wide as the page: the first of an odd number."""
    return ' class="first"' if index < wide else ""


def _differences(groups: Sequence[Group]) -> str:
    found = differences(groups)
    if not found:
        return ""
    rows = [[key, *(shorten(value, _LONGEST_VALUE) for value in values)] for key, values in found.items()]
    return table(
        ["option", *(group.label for group in groups)], rows, "Options in which the runs differ; all others are equal."
    )


def _sources(groups: Sequence[Group]) -> str:
    runs = [(group, run) for group in groups for run in group.runs]
    rows = [
        [group.label, run.seed, "dry run" if run.dry else "finished" if run.finished else "unfinished", run.path]
        for group, run in runs
    ]
    facts = [_facts(run.manifest) for _, run in runs]
    known = dict.fromkeys(key for fact in facts for key in fact)
    versions = [[key, _several(list(dict.fromkeys(fact.get(key, ABSENT) for fact in facts)))] for key in known]
    found = table(["method", "seed", "state", "run directory"], rows, "Run directories.")
    return found + (f"<br>\n{table(['what', 'value'], versions, 'Where they were made.')}" if versions else "")


def _several(values: Sequence[str]) -> str:
    """Return the values, or the first and the last in their order where there are many."""
    few = len(values) <= _MOST_NAMED
    return ", ".join(values) if few else f"{min(values)} to {max(values)}, {len(values)} in all"


def _facts(manifest: Mapping[str, Any]) -> dict[str, str]:
    made = {key: value for key, value in (manifest.get("made") or {}).items() if value is not None}
    commit = {"commit": manifest["commit"]} if "commit" in manifest else {}
    found = commit | made | dict(manifest.get("versions") or {})
    return {key: show(value) for key, value in flatten(found).items()}


def _commands(groups: Sequence[Group]) -> str:
    items = [
        f"<details{' open' if len(groups) == 1 else ''}><summary>{text(group.label)}</summary>"
        f'<pre tabindex="0">{escape(command(group))}</pre></details>'
        for group in groups
    ]
    return "\n".join(items)


def _for_papers(files: Sequence[str]) -> str:
    if not files:
        return ""
    names = ", ".join(f"<code>{text(file)}</code>" for file in files)
    vectors = "<code>fedlp-report --format svg</code> writes vectors."
    return f"<p>Beside this page: {names}, and every number in <code>summary.json</code>. {vectors}</p>"
