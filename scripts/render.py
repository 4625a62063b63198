"""Render tables from recorded runs, without training: Markdown, CSV, LaTeX, one HTML page, and the README's results.

python scripts/render.py                                  # published: results/tables, results/index.html, README.md
python scripts/render.py --results OTHER                  # the same in OTHER; a README only with --readme
python scripts/render.py --runs outputs/runs --tables 2   # local runs: outputs/tables
"""

import argparse
import sys
from pathlib import Path

from command_line import one_line, output_folder, results_folder

from cbl import disk, store
from cbl.errors import UserError
from cbl.report import formats, page, paper, readme, tables

RESULTS, README = Path("results"), Path("README.md")


def main() -> None:
    asked = arguments()
    published = not asked.runs and not asked.out
    if asked.readme and not published:
        raise UserError("--readme is for the published runs in their own place: leave it out, or --runs and --out.")
    renewed = asked.readme or (README if published and asked.results == RESULTS and README.exists() else None)
    old = text_of(renewed) if renewed else ""
    if renewed:
        readme.replace_block(old, "")  # refused before anything is written
    counts = dict(images_per_class(pair) for pair in asked.counts)
    found = store.read_folders(asked.runs) if asked.runs else store.load(results_folder(asked.results))
    for warning in found.warnings:
        print(f"Warning: {warning}", file=sys.stderr)
    built = {name: tables.build(name, found.runs, counts) for name in tables.NAMES}

    folder = output_folder(asked.results / "tables" if published else asked.out or Path("outputs/tables"))
    written = [path for name in asked.tables for path in formats.write(built[name], folder)]
    written.append((asked.results if published else folder) / "index.html")
    disk.write(written[-1], page.page(built, found.runs, None if asked.runs else asked.results / "figures"))
    if renewed:
        disk.write(renewed, readme.replace_block(old, readme.block(found.runs, built)))
        written.append(renewed)
    print("\n".join(map(str, written)))


def text_of(path: Path) -> str:
    """The README as it is; raises `UserError` when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read ({reason}): give --readme a file with a results block.") from None


def images_per_class(pair: str) -> tuple[str, list[int]]:
    """`inaturalist2018=counts.txt`, the file with one number a line, as the official code reads them."""
    name, _, path = pair.partition("=")
    large = [known for known in dict.fromkeys(paper.table1()["dataset"]) if known not in tables.SIZES]
    if name not in large:
        raise UserError(f"--counts {pair}: Table 1 wants counts of {', '.join(large)}, not of '{name}'.")
    try:
        counts = [int(line) for line in Path(path).read_text(encoding="utf-8").split()]
    except (OSError, ValueError) as error:
        raise UserError(f"--counts {pair} cannot be read ({error}): write NAME=FILE, one number a line.") from None
    if min(counts, default=0) < 1:
        found = f"holds {min(counts)}" if counts else "is empty"
        raise UserError(f"--counts {pair}: the file {found}, but wants a whole number of 1 or more for each class.")
    return name, counts


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=tables.NAMES, default=tables.NAMES, help="default: all")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the published runs (default: results)")
    parser.add_argument("--runs", nargs="+", metavar="FOLDER", help="run folders to render instead of published runs")
    parser.add_argument("--out", type=Path, help="where to write (default: results/tables, for --runs outputs/tables)")
    parser.add_argument(
        "--readme",
        type=Path,
        help="whose results block is renewed (default: README.md, for other --results, --runs and --out none)",
    )
    parser.add_argument("--counts", nargs="+", default=[], metavar="NAME=FILE", help="images per class, for Table 1")
    return parser.parse_args()


if __name__ == "__main__":
    with one_line():
        main()
