"""Every table and figure of the experiments, and the rows that documents quote, from the committed results.

    python experiments/regenerate.py                       # all of it, in place
    python experiments/regenerate.py per_byte demo         # some experiments
    python experiments/regenerate.py --out FOLDER          # elsewhere; nothing here is touched

Each experiment's ``tables.py`` has a function ``regenerate(results, out)``. Nothing is trained.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from experiments.quotes import fill_in  # noqa: E402

EXPERIMENTS = tuple(sorted(path.parent.name for path in ROOT.glob("experiments/*/tables.py")))
PAGES = ("README.md", "docs/*.md", "experiments/*/README.md")


def regenerate(names: Sequence[str] = EXPERIMENTS, out: Path = ROOT) -> None:
    """Write tables and figures of some experiments, then the pages that quote rows of any, below ``out``."""
    for name in names:
        results = Path("experiments", name, "results")
        importlib.import_module(f"experiments.{name}.tables").regenerate(ROOT / results, out / results)

    def read(path: str) -> str:
        return ((out if (out / path).is_file() else ROOT) / path).read_text(encoding="utf-8")

    for page in [page for pattern in PAGES for page in sorted(ROOT.glob(pattern))]:
        was = page.read_text(encoding="utf-8")
        if "<!-- rows of " in was:
            target = out / page.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(fill_in(was, read), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "experiments", nargs="*", metavar="EXPERIMENT", help=f"of {', '.join(EXPERIMENTS)}; default: all"
    )
    parser.add_argument("--out", type=Path, default=ROOT, help="a folder that stands for the repository's root")
    arguments = parser.parse_args()
    if unknown := set(arguments.experiments) - set(EXPERIMENTS):
        parser.error(f"no experiment {', '.join(sorted(unknown))}; there are {', '.join(EXPERIMENTS)}")
    regenerate(arguments.experiments or EXPERIMENTS, arguments.out.resolve())


if __name__ == "__main__":
    main()
