"""Draw the figures, as SVG and PNG, from the published runs; nothing is trained.

    python scripts/figures.py                      # all, from results/ into results/figures/
    python scripts/figures.py fig5 fig8            # these
    python scripts/figures.py --runs outputs/runs  # from run folders that are not published, into outputs/figures/

A figure that has no run to show is not drawn, and a file of it from before is deleted.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from command_line import one_line, output_folder, results_folder
from matplotlib.figure import Figure

from cbl import disk, store
from cbl.config import nearest
from cbl.errors import UserError
from cbl.report import figures, paper, tables
from cbl.store import Store


class Entry(NamedTuple):
    shows: str
    draw: Callable[[Store], Figure | None]
    command: str = ""  # makes its runs; closed forms need none


FIGURES = {
    "fig3": Entry("class-balanced term against images of a class", lambda _: figures.fig3()),
    "fig4": Entry("images of every class, long-tailed CIFAR-100", lambda _: figures.fig4()),
    "fig5": Entry(
        "error against β at imbalance factor 50, paper and ours",
        lambda found: figures.fig5(found.runs, paper.grids()),
        "make reproduce-table TABLE=grid10, again with TABLE=grid100",
    ),
    "fig6": Entry("effective numbers of every class", lambda _: figures.fig6()),
    "fig7": Entry(
        "top-1 error over the epochs, ILSVRC 2012 and iNaturalist 2018",
        lambda found: figures.fig7(found.runs, found.curves, paper.table3()),
        "make reproduce-table TABLE=3",
    ),
    "fig8": Entry(
        "heat map of CIFAR-10, paper and ours",
        lambda found: figures.grid("cifar10_lt", found.runs, paper.grids()),
        "make reproduce-table TABLE=grid10",
    ),
    "fig9": Entry(
        "heat map of CIFAR-20, paper and ours",
        lambda found: figures.grid("cifar20_lt", found.runs, paper.grids()),
        "make reproduce-table TABLE=grid20",
    ),
    "fig10": Entry(
        "heat map of CIFAR-100, paper and ours",
        lambda found: figures.grid("cifar100_lt", found.runs, paper.grids()),
        "make reproduce-table TABLE=grid100",
    ),
    "error_against_beta": Entry(
        "error against β with the spread over seeds, all data sets",
        lambda found: figures.error_against_beta(found.runs),
        "make reproduce-table",
    ),
    "error_per_class": Entry(
        "error of every class, with and without class balancing",
        lambda found: figures.error_per_class(found.runs, found.per_class),
        "make reproduce-table",
    ),
    "training_curves": Entry(
        "training loss and test error over the epochs",
        lambda found: figures.training_curves(found.runs, found.curves),
        "make reproduce-table",
    ),
    "ablation": Entry(
        "what each changed detail does to the error",
        lambda found: figures.ablation(found.runs),
        "make reproduce-table TABLE=ablation_digits",
    ),
    "gain_by_detail": Entry(
        "what class balancing gains with each changed detail",
        lambda found: figures.gain_by_detail(found.runs),
        "make reproduce-table TABLE=ablation_digits",
    ),
    "detail_curves": Entry(
        "test error over the epochs with and without the two costliest details",
        lambda found: figures.detail_curves(found.runs, found.curves),
        "make reproduce-table TABLE=ablation_digits",
    ),
    "moved_drop": Entry(
        "test error when the learning rate drops at another epoch",
        lambda found: figures.moved_drop(found.runs, found.curves),
        "make reproduce-table TABLE=drop",
    ),
    "head_against_tail": Entry(
        "error of small classes against that of large ones",
        lambda found: figures.head_against_tail(found.runs),
        "make reproduce-table",
    ),
}


def main() -> None:
    listing = "\n".join(f"  {name:20}{entry.shows}" for name, entry in FIGURES.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"figures:\n{listing}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="figures to draw (default: all)")
    parser.add_argument("--results", default="results", type=Path, help="published runs (default: results)")
    parser.add_argument("--runs", type=Path, help="run folders to draw from instead")
    parser.add_argument(
        "--out", type=Path, help="where to write (default: figures/ in --results, for --runs outputs/figures)"
    )
    arguments = parser.parse_args()

    for name in arguments.names:
        if name not in FIGURES:
            raise UserError(f"There is no figure '{name}'{nearest(name, FIGURES)}")
    found = store.read_folders([arguments.runs]) if arguments.runs else store.load(results_folder(arguments.results))
    for warning in found.warnings:
        print(f"Warning: {warning}", file=sys.stderr)
    if passed := figures.passed_over(found.runs):
        gammas = ", ".join(f"{gamma:g}" for _, gamma in figures.LOSSES if gamma)
        betas = ", ".join(f"{beta:g}" for beta in figures.BETAS)
        print(
            f"Not in the figures: {tables.plural(passed, 'done run')}; they show γ {gammas} and β {betas} alone.",
            file=sys.stderr,
        )
    out = output_folder(arguments.out or (Path("outputs/figures") if arguments.runs else arguments.results / "figures"))
    for name in arguments.names or FIGURES:
        figure = FIGURES[name].draw(found)
        if figure is None:
            with disk.writing(out):
                for kind in ("svg", "png"):
                    (out / f"{name}.{kind}").unlink(missing_ok=True)  # it would show runs that are gone
            print(f"{name}: not drawn, for want of runs; {FIGURES[name].command}, then make collect")
        else:
            figures.save(figure, out / name)
            print(f"{name}: {out / name}.svg, .png")


if __name__ == "__main__":
    with one_line():
        main()
