"""What the site is made of beside the pages in ``docs``: experiments, the log, the changes, options, equations.

Links of pages lead to files of the repository. Where such a file is a page of the site, the link leads there; where it
is not, its text stays without a link. Equations become MathML when the site is built, so that no script is fetched.
"""

from __future__ import annotations

import posixpath
import re
import sys
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
_PAGES = {"CHANGELOG.md": "changelog.md", "README.md": "index.md", "experiments/LOG.md": "results/log.md"}
_FOLDERS = {"conf": "reference/options.md", "fedlp/config": "reference/options.md"}


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made: experiments with their tables and figures, log, changes, options."""
    for name, target in _PAGES.items():
        if name != "README.md":
            _add(files, config, target, _redirect((ROOT / name).read_text(encoding="utf-8"), name, target))
    for readme in sorted(ROOT.glob("experiments/*/README.md")):
        experiment, target = readme.parent.name, f"results/{readme.parent.name}.md"
        text = _redirect(readme.read_text(encoding="utf-8"), f"experiments/{experiment}/README.md", target)
        front = "---\nhide: [toc]\n---\n"  # room for tables
        _add(files, config, target, front + text + _tables(readme.parent, target))
    for figure in sorted(ROOT.glob("experiments/*/results/**/*.png")):
        name = figure.relative_to(ROOT).as_posix()
        files.append(File.generated(config, _figure(name), content=figure.read_bytes()))
    _add(files, config, "reference/options.md", _options())
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links to files of the repository into links of the site."""
    generated = page.file.generated_by is not None
    return markdown if generated else _redirect(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Turn equations into MathML, and roles of reStructuredText in docstrings into code."""
    html = re.sub(r":math:<code>(.*?)</code>|<code>(.*?)</code>:math:", lambda m: _math(m[1] or m[2], "inline"), html)
    html = re.sub(r":(?:class|func|mod|meth|data):<code>~?([\w.]+)</code>", _role, html)
    html = re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', lambda m: _math(m[1], "inline"), html, flags=re.S)
    html = re.sub(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', lambda m: _math(m[1], "block"), html, flags=re.S)
    return re.sub(r"<p>\.\. math:: (.*?)</p>", lambda m: _math(m[1], "block"), html, flags=re.S)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Leave out the one script that the theme would fetch, which helps old browsers to search from the disk."""
    return re.sub(r'<script src="https://unpkg\.com/[^"]*"></script>', "", output)


def on_post_template(output_content: str, template_name: str, config: Any) -> str:
    """Leave it out of the page for what is not found, too."""
    return on_post_page(output_content, None, config)


def _math(tex: str, display: str) -> str:
    return convert(unescape(tex).strip(), display=display)


def _role(match: re.Match[str]) -> str:
    return f"<code>{match[1].rsplit('.', 1)[-1]}</code>"


def _add(files: Any, config: Any, target: str, text: str) -> None:
    files.append(File.generated(config, target, content=text))


def _figure(name: str) -> str:
    return "results/figures/" + name.removeprefix("experiments/").replace("/results/", "/").replace("/", "-")


def _place(path: str) -> str | None:
    """Return the page or picture of the site for a path of the repository; None where it has none."""
    path = path.rstrip("/")
    if path in _PAGES or path in _FOLDERS:
        return _PAGES.get(path) or _FOLDERS[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/") if (ROOT / path).is_file() and not path.endswith(".service") else None
    parts = path.split("/")
    if parts[0] == "experiments" and len(parts) > 1 and (ROOT / "experiments" / parts[1] / "README.md").is_file():
        return _figure(path) if path.endswith(".png") else f"results/{parts[1]}.md"
    return None


def _redirect(text: str, source: str, target: str) -> str:
    """Return a page of the repository with the links of the page ``target`` of the site."""

    def link(match: re.Match[str]) -> str:
        picture, label, url = match.groups()
        if url.startswith(("http", "#", "mailto:")):
            return match[0]
        path, _, anchor = url.partition("#")
        place = _place(posixpath.normpath(posixpath.join(posixpath.dirname(source), path)))
        if place is None:
            return label
        relative = posixpath.relpath(place, posixpath.dirname(target) or ".")
        kept = f"#{anchor}" if anchor and source.startswith("docs/") else ""
        return f"{picture}[{label}]({relative}{kept})"

    parts = re.split(r"(^```.*?^```$)", text, flags=re.S | re.M)
    return "".join(part if part.startswith("```") else _LINK.sub(link, part) for part in parts)


def _tables(folder: Path, target: str) -> str:
    """Return the tables of an experiment as the end of its page."""
    found = next((path for name in ("tables.md", "table.md") if (path := folder / "results" / name).is_file()), None)
    if found is None:
        return ""
    source = found.relative_to(ROOT).as_posix()
    text = _redirect(found.read_text(encoding="utf-8"), source, target)
    return "\n\n## All tables\n\n" + re.sub(r"^#(?=#* )", "##", re.sub(r"\A# .*\n", "", text), flags=re.M)


def _options() -> str:
    sys.path.insert(0, str(ROOT))  # the checkout's own package
    from fedlp.config.option_help import option_page

    return option_page()
