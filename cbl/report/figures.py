"""The paper's figures drawn again, and those it lacks: functions from data frames to matplotlib figures.

`runs`, `per_class` and `curves` are the frames of a `cbl.store.Store`, `grids` is `cbl.report.paper.grids()`. A figure
of runs shows what recorded runs produced, means over the runs of one cell and one dtype, as the tables do. Cells
without a run are visible gaps, and where there is no run at all the function returns None and nothing is drawn.
"""

import io
import json
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import font_manager
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from PIL import Image

from cbl import class_counts, disk, effective_number, store
from cbl.config import Dataset, Recipe
from cbl.report import formats, tables
from cbl.report.tables import FACTORS, SIZES, TITLES, Cell, Done, Setting, done_runs, one_dtype, plain
from cbl.report.verdict import PAPER_SD, Row, bootstrap, interval_name, pairs

Series = dict[float, list[Row]]  # runs that differ in β and seeds alone: rows of runs.csv by β
OFFICIAL = Setting("", None, "", None, 0.0)[5:]  # overrides, network and epochs of the paper's CIFAR runs

FONT = "DejaVu Sans"  # comes with matplotlib: the same letters on every machine
COLUMN, PAGE = 3.3, 6.9  # inches: one and two columns of a paper

# Okabe and Ito's palette, told apart with every common colour blindness; where lines cross, markers differ as well.
BLACK, ORANGE, SKY, GREEN, BLUE, RED, PINK = [
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
]
LOSSES = {  # loss and gamma: label, colour, marker
    ("softmax", None): ("softmax", BLUE, "o"),
    ("sigmoid", None): ("sigmoid", RED, "s"),
    ("focal", 0.5): ("focal γ 0.5", GREEN, "^"),
    ("focal", 1.0): ("focal γ 1", ORANGE, "D"),
    ("focal", 2.0): ("focal γ 2", PINK, "v"),
}
BETAS = {0.0: BLACK, 0.9: SKY, 0.99: GREEN, 0.999: ORANGE, 0.9999: RED}
FACTOR_COLOURS = dict(zip(FACTORS, (BLACK, RED, ORANGE, GREEN, SKY), strict=True))
GROUPS = {  # the groups of classes of `cbl.longtail`, in words
    ("shots", "many"): "classes of > 100 images",
    ("shots", "medium"): "classes of 20 to 100 images",
    ("shots", "few"): "classes of < 20 images",
    ("terciles", "many"): "largest third of the classes",
    ("terciles", "medium"): "middle third of the classes",
    ("terciles", "few"): "smallest third of the classes",
}
# The two details of the ablation on digits that cost most without class balancing: loss, gamma and what is changed.
COSTLIEST = {
    "focal γ 1, no prior in the last bias": ("focal", 1.0, tables.NO_PRIOR),
    "softmax, image order of the authors' code": ("softmax", None, tables.AUTHORS_ORDER),
}
SHADES = LinearSegmentedColormap.from_list("shades", ["#f7fbff", "#6baed6"])  # black text stays readable on all
DROP_SHADES = LinearSegmentedColormap.from_list("drops", [SKY, BLUE, "#001a33"])  # light to dark, early to late

STYLE: dict[Any, Any] = {
    "figure.constrained_layout.use": True,
    "font.family": FONT,
    "font.size": 7,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "legend.title_fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
    "hatch.color": "#bbbbbb",
    "hatch.linewidth": 0.5,
}
styled = mpl.rc_context(STYLE)


def save(figure: Figure, stem: Path) -> list[Path]:
    """Writes `stem`.svg and `stem`.png; the same figure gives the same bytes, so drawing it again makes no diff.

    Raises `UserError` where they cannot be written; what was there before then stays.
    """
    svg, png = (stem.with_name(f"{stem.name}.{kind}") for kind in ("svg", "png"))
    drawn = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "cbl", "svg.fonttype": "path"}):
        with disk.whole(svg) as file:
            figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        figure.savefig(drawn, format="png", metadata={"Software": None}, dpi=200)
    with Image.open(drawn) as image:  # 256 colours do for lines on white, in a third of the bytes
        few = image.convert("RGB").quantize(dither=Image.Dither.NONE)
    with disk.whole(png) as file:
        few.save(file, format="png", optimize=True)
    return [svg, png]


# -- closed form -------------------------------------------------------------------------------------------------------


@styled
def fig3() -> Figure:
    """Fig. 3: the class-balanced term (1 - β) / (1 - β^n), not normalised, against the images n of a class."""
    figure = Figure((COLUMN, 2.4))
    ax = figure.subplots()
    n = np.unique(np.logspace(0, 4, 200).astype(int))
    for beta, colour in BETAS.items():
        term = 1 / effective_number(n.tolist(), beta).numpy()
        ax.plot(n, term, color=colour, label=f"β = {beta:g}")
        ax.annotate(f"β = {beta:g}", (n[-1], term[-1]), (4, 0), textcoords="offset points", va="center")
    ax.set(xscale="log", yscale="log", xlim=(1, 1e4), xlabel="images of the class, n")
    ax.set_ylabel(r"$(1 - \beta)\;/\;(1 - \beta^n)$")
    return figure


@styled
def fig4() -> Figure:
    """Fig. 4: training images of every class of long-tailed CIFAR-100."""
    figure = Figure((COLUMN, 2.4))
    ax = figure.subplots()
    classes, largest = SIZES["cifar100_lt"]
    for factor, colour in reversed(FACTOR_COLOURS.items()):
        ax.plot(range(classes), class_counts(classes, factor, largest), color=colour, label=f"{factor:g}")
    ax.set(xlim=(0, classes - 1), ylim=(0, largest), xlabel="class index", ylabel="training images")
    ax.legend(title="imbalance factor", alignment="left")
    return figure


@styled
def fig6() -> Figure:
    """Fig. 6: images n and effective numbers E_n of every class at imbalance factor 50."""
    figure = Figure((PAGE, 2.6))
    left, right = figure.subplots(1, 2)
    for ax, name in ((left, "cifar10_lt"), (right, "cifar100_lt")):
        classes, largest = SIZES[name]
        counts = class_counts(classes, 50, largest)
        ax.plot(range(classes), counts, color=BLACK, label="$n$")
        for beta in (0.9999, 0.999, 0.99, 0.9):
            numbers = effective_number(counts.tolist(), beta).numpy()
            ax.plot(range(classes), numbers, "--", color=BETAS[beta], label=f"$E_n$, β = {beta:g}")
        ax.set(yscale="log", xlim=(0, classes - 1), xlabel="class index")
        ax.set_title(f"{_title(name)}, imbalance factor 50")
    left.set_xticks(range(10))
    left.set_ylabel("images n, effective number $E_n$")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


# -- the paper's figures of runs ---------------------------------------------------------------------------------------


@styled
def fig5(runs: pd.DataFrame, grids: pd.DataFrame) -> Figure | None:
    """Fig. 5: error against β at imbalance factor 50; the paper's numbers above, ours below on the same scale."""
    datasets, losses = ("cifar10_lt", "cifar100_lt"), [("focal", 0.5), ("sigmoid", None), ("softmax", None)]
    wanted = {name: [Setting(name, 50.0, *loss, beta) for loss in losses for beta in BETAS] for name in datasets}
    found, _, _ = one_dtype(done_runs(runs), wanted["cifar10_lt"] + wanted["cifar100_lt"])
    if not found:
        return None
    figure = Figure((PAGE, 4.6))
    axes = figure.subplots(2, 2, sharex=True, sharey="col")
    for (above, below), name in zip(axes.T, datasets, strict=True):
        for ax, errors in ((above, _printed(grids)), (below, _means(found))):
            for loss in losses:
                _, colour, marker = LOSSES[loss]
                unbalanced, *balanced = (errors.get(Setting(name, 50.0, *loss, beta), np.nan) for beta in BETAS)
                ax.plot(range(4), balanced, color=colour, marker=marker)
                if not np.isnan(unbalanced):
                    ax.axhline(unbalanced, color=colour, linestyle="--")
        above.set_title(f"{_title(name)}, imbalance factor 50: paper")
        below.set_title(f"Ours: {_size(found, wanted[name])}")
        if not any(setting in found for setting in wanted[name]):
            below.text(0.5, 0.5, "not run", transform=below.transAxes, ha="center", va="center", fontsize=8)
            below.grid(False)
        below.set_xticks(range(4), [f"{beta:g}" for beta in BETAS if beta])
        below.set_xlabel("β")
    for ax in axes[:, 0]:
        ax.set_ylabel("test error, %")
    handles = []
    for label, colour, marker in (LOSSES[loss] for loss in losses):
        handles.append(Line2D([], [], color=colour, marker=marker, label=f"class-balanced {label}"))
        handles.append(Line2D([], [], color=colour, linestyle="--", label=label))
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


@styled
def fig7(runs: pd.DataFrame, curves: pd.DataFrame, table: pd.DataFrame) -> Figure | None:
    """Fig. 7: top-1 error against the epoch, ResNet-50 at 224 pixels, softmax against class-balanced focal loss.

    `table` is `cbl.report.paper.table3()`: its errors after the last epoch are hollow points. Lines are means over
    seeds, bands one standard deviation up and down. Axes are the paper's, further down where an error is lower.
    """
    curves = curves[curves["test_error"].notna()]
    losses = [("softmax", None, 0.0), ("focal", 0.5, 0.999)]
    datasets = {"imagenet": (20, 60), "inaturalist2018": (40, 100)}
    wanted = {name: [Setting(name, None, *loss, "", "resnet50", 90) for loss in losses] for name in datasets}
    with_curves = done_runs(runs[runs["run_id"].isin(curves["run_id"])])
    found, _, _ = one_dtype(with_curves, wanted["imagenet"] + wanted["inaturalist2018"])
    if not found:
        return None
    figure = Figure((PAGE, 2.6))
    left, right = figure.subplots(1, 2)
    for ax, (name, (low, high)) in zip((left, right), datasets.items(), strict=True):
        shown = table["dataset"].eq(name) & table["network"].eq("resnet50") & table["image_size"].eq(224)
        printed = table[shown & table["metric"].eq("top1")].set_index("loss")["error"]
        for setting in wanted[name]:
            _, colour, marker = LOSSES[setting.loss, setting.gamma]
            if setting in found:
                style = "-" if setting.beta else "--"  # dashed without class balancing, as in Fig. 5
                _over_epochs(ax, curves, found[setting], "test_error", color=colour, linestyle=style)
            ax.plot(90, printed[setting.loss], marker, color=colour, markerfacecolor="none", clip_on=False)
        lowest = min(np.nanmin(line.get_ydata()) for line in ax.get_lines())
        ax.set(xlim=(0, 90), xticks=range(0, 91, 10), ylim=(min(low, lowest - 1), high), xlabel="epoch")
        ax.set_title(f"{_title(name)}: {_size(found, wanted[name])}")
    left.set_ylabel("top-1 error, %")
    handles = []
    for loss, gamma, beta in losses:
        label, colour, _ = LOSSES[loss, gamma]
        label = f"class-balanced {label}, β = {beta:g}" if beta else label
        handles.append(Line2D([], [], color=colour, linestyle="-" if beta else "--", label=label))
    label = "paper, after 90 epochs"
    hollow = Line2D([], [], color="#777777", marker="o", markerfacecolor="none", linestyle="", label=label)
    _legend(figure, [*handles, hollow])
    return figure


@styled
def grid(name: str, runs: pd.DataFrame, grids: pd.DataFrame) -> Figure | None:
    """Figs. 8, 9 and 10 (cifar10_lt, cifar20_lt, cifar100_lt): errors of 25 settings at five imbalance factors.

    The paper's table and ours, shaded alike by column, light is low, the lowest of each bold and underlined. A cell
    that was not run is hatched.
    """
    wanted = [Setting(name, factor, *loss, beta) for loss in LOSSES for beta in BETAS for factor in FACTORS]
    found, _, _ = one_dtype(done_runs(runs), wanted)
    if not found:
        return None
    figure = Figure((PAGE, 5.4))
    left, right = figure.subplots(1, 2, sharey=True)
    sources = (_printed(grids), _means(found))
    both = np.reshape([[errors.get(setting, np.nan) for setting in wanted] for errors in sources], (2, 25, 5))
    for ax, errors in zip((left, right), both, strict=True):  # shaded alike: few of ours may differ by next to nothing
        _heat(ax, errors, np.nanmin(both, axis=(0, 1)), np.nanmax(both, axis=(0, 1)))
    left.set_title(f"{_title(name)}: paper")
    right.set_title(f"Ours: {_size(found, wanted)}")
    left.set_yticks(range(25), [f"{beta:g}" for _ in LOSSES for beta in BETAS])
    left.set_ylabel("β (0: no class balancing)", labelpad=18)
    for i, (label, _, _) in enumerate(LOSSES.values()):  # between the label of the axis and those of its ticks
        at = {"xycoords": left.get_yaxis_transform(), "xytext": (-36, 0), "textcoords": "offset points"}
        left.annotate(label, (0, 5 * i + 2), **at, rotation=90, ha="center", va="center")
    note = "Test error, %. Shaded by column, alike in both, light is low; the lowest is underlined; hatched: not run."
    figure.supxlabel(note, fontsize=7)
    return figure


def _heat(ax: Axes, errors: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
    """One table of `grid`: errors (25, 5) in %, NaN where there is none; shades go from low (5,) to high (5,)."""
    present = np.ma.masked_invalid(errors)
    least = present.min(axis=0)  # (5,)
    ax.imshow((present - low) / (high - low), cmap=SHADES, vmin=0, vmax=1, aspect="auto")
    for (i, j), error in np.ndenumerate(errors):
        if np.isnan(error):
            ax.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, hatch="////", linewidth=0))
            continue
        lowest = error == least[j]
        ax.text(j, i, f"{error:.2f}", ha="center", va="center", weight="bold" if lowest else "normal")
        if lowest:
            ax.plot([j - 0.28, j + 0.28], [i + 0.32] * 2, color=BLACK, linewidth=0.8)
    for edge in range(5, 25, 5):  # a gap between losses
        ax.axhline(edge - 0.5, color="white", linewidth=2)
    ax.set_xticks(range(len(FACTORS)), [f"{factor:g}" for factor in FACTORS])
    ax.set_xlabel("imbalance factor")
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)


# -- what the paper does not show --------------------------------------------------------------------------------------


@styled
def error_against_beta(runs: pd.DataFrame) -> Figure | None:
    """Error against β, 0 first: a row of panels for each data set, a panel for each imbalance factor.

    Lines are means over seeds, bands one standard deviation up and down. Imbalance factors where no loss has runs at
    two β are left out.
    """
    rows = []
    for of, found in _by_dataset(runs).items():
        several = {base.imbalance_factor for base, runs_of in _series(found).items() if len(runs_of) > 1}
        if several:
            kept = {setting: rows for setting, rows in found.items() if setting.imbalance_factor in several}
            rows.append((_title(*of), kept, sorted(several, key=lambda factor: -(factor or 0))))
    if not rows:
        return None
    figure = Figure((PAGE, 2.1 * len(rows) + 0.3))
    parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for part, (title, found, factors) in zip(parts, rows, strict=True):
        part.suptitle(f"{title}: {_size(found)}", fontsize=8)
        axes = part.subplots(1, len(factors), squeeze=False)[0]
        for ax, factor in zip(axes, factors, strict=True):
            for base, runs_of in _series(found).items():
                if base.imbalance_factor == factor:
                    _, colour, marker = LOSSES[base.loss, base.gamma]
                    errors = [[row["error_last"] for row in runs_of.get(beta, [])] for beta in BETAS]  # β x its runs
                    values = np.array(list(zip_longest(*errors, fillvalue=np.nan)))  # (runs, β)
                    _banded(ax, range(len(BETAS)), values, color=colour, marker=marker)
            ax.set_title(_at_factor(factor))
            low, high = ax.get_ylim()
            # at least 2 points high: single runs are as far apart by chance (2 x 0.7 x √2), and less should look small
            lacking = max(0, 2 - (high - low)) / 2
            ax.set_ylim(low - lacking, high + lacking)
            ax.set_xticks(range(len(BETAS)), [f"{beta:g}" for beta in BETAS], rotation=90 if len(factors) > 2 else 0)
            ax.set_xlim(-0.2, len(BETAS) - 0.8)  # all β, and room for the markers at both ends
            ax.set_xlabel("β")
        axes[0].set_ylabel("test error, %")
    handles = [Line2D([], [], color=colour, marker=marker, label=label) for label, colour, marker in LOSSES.values()]
    _legend(figure, handles)
    return figure


@styled
def error_per_class(runs: pd.DataFrame, per_class: pd.DataFrame) -> Figure | None:
    """Error of every class from head to tail, with and without class balancing; a panel for each data set.

    At the imbalance factor and with the loss that `_shown` says. Above 20 classes a point is a tenth of the classes,
    numbered from the largest.
    """
    shown = _shown(runs, per_class)
    if not shown:
        return None
    figure = Figure((PAGE, 2.1 * len(shown) + 0.3))
    for ax, (base, runs_of) in zip(figure.subplots(len(shown), 1, squeeze=False)[:, 0], shown, strict=True):
        for beta, rows_of_runs in runs_of.items():
            rows = per_class[per_class["run_id"].isin([row["run_id"] for row in rows_of_runs])]
            classes = rows.drop_duplicates("class_index")
            classes = classes.sort_values("n_train", ascending=False, kind="stable", ignore_index=True)
            errors = rows.astype({"error": "float"}).pivot(index="run_id", columns="class_index", values="error")
            errors = errors[classes["class_index"]]  # (n, classes)
            groups = np.array_split(np.arange(len(classes)), len(classes) if len(classes) <= 20 else 10)
            means = [errors.iloc[:, group].mean(axis=1) for group in groups]  # groups x (n,)
            _banded(ax, range(len(groups)), np.transpose(means), color=BETAS[beta], marker="o")
        ax.set_xticks(range(len(groups)), [_classes_label(classes.iloc[group], len(classes)) for group in groups])
        low, high = ax.get_ylim()
        ax.set_ylim(max(low, -2), min(high, 102))  # a band may reach beyond what an error can be
        ax.set_title(_shown_title(base, runs_of))
        ax.set_ylabel("test error, %")
    ax.set_xlabel("class, and its training images")
    _beta_legend(figure, shown)
    return figure


@styled
def training_curves(runs: pd.DataFrame, curves: pd.DataFrame) -> Figure | None:
    """Training loss and test error over the epochs, with and without class balancing; a row for each data set.

    At the imbalance factor and with the loss that `_shown` says. The loss is the weighted one that is trained on: of
    different β it is different things. Its axis is logarithmic, and so are its mean and standard deviation.
    """
    curves = curves[curves["test_error"].notna()]
    shown = _shown(runs, curves)
    if not shown:
        return None
    figure = Figure((PAGE, 2.1 * len(shown) + 0.3))
    parts = figure.subfigures(len(shown), 1, squeeze=False)[:, 0]
    for part, (base, runs_of) in zip(parts, shown, strict=True):
        part.suptitle(_shown_title(base, runs_of), fontsize=8)
        left, right = part.subplots(1, 2)
        left.set(yscale="log", ylabel="training loss, weighted\n(geometric mean and sd)")
        for beta, rows_of_runs in runs_of.items():
            for ax, column in ((left, "train_loss"), (right, "test_error")):
                _over_epochs(ax, curves, rows_of_runs, column, color=BETAS[beta])
                ax.set_xlabel("epoch")
        right.set_ylabel("test error, %")
    _beta_legend(figure, shown)
    return figure


@styled
def ablation(runs: pd.DataFrame) -> Figure | None:
    """What each changed detail does to the error, `TABLE=ablation`, `TABLE=ports` and `TABLE=ablation_digits`.

    A row of panels for each data set, a panel for each loss and β: the mean change over pairs of runs of the same seed
    and subset, with its 95 % bootstrap interval; in colour where that leaves out zero.
    """
    found = []
    for name in ("ablation", "ports", "ablation_digits"):
        for panel in tables.build(name, runs).panels:
            rows = [(label, cells) for label, cells in panel.rows[1:] if any(cell and cell.values for cell in cells)]
            if rows and not panel.apart and "difference" in tables.kinds(panel.cells()):
                found.append((panel, rows))
    if not found:
        return None
    figure, parts = _row_by_row([0.17 * len(rows) + 0.9 for _, rows in found])
    for part, (panel, rows) in zip(parts, found, strict=True):
        official = [cell for cell in panel.rows[0][1] if cell is not None]
        factor = _at_factor(official[0].setting.imbalance_factor)
        part.suptitle(f"{_title(official[0].setting.dataset)}, {factor}", fontsize=8)
        axes = part.subplots(1, len(panel.columns), sharex=True, sharey=True)
        for ax, column, before, place in zip(axes, panel.columns, official, range(len(axes)), strict=True):
            ax.axvline(0, color="#777777", linewidth=0.8)
            for y, (_, cells) in enumerate(rows):
                cell = cells[place]
                if cell is None or cell.mean is None:
                    continue
                low, high = cell.interval or (np.nan, np.nan)
                colour = RED if low > 0 else GREEN if high < 0 else "#777777"
                ax.plot([low, high], [y, y], color=colour)
                ax.plot(cell.mean, y, "o", color=colour, markerfacecolor=colour if cell.interval else "none")
            ax.set_title(f"{column}\n{formats.ours_text(before)}", fontsize=7)
            ax.set_xlabel("change, points")
            ax.set_yticks(range(len(rows)), [label for label, _ in rows])
            ax.set_ylim(len(rows) - 0.5, -0.5)
        # never narrower than what one pair of runs scatters by, or next to nothing would look like much
        scatter = 2 * 2**0.5 * PAPER_SD
        left, right = axes[0].get_xlim()
        axes[0].set_xlim(min(left, -scatter), max(right, scatter))
    handles = [
        Line2D([], [], color=RED, marker="o", label="higher error"),
        Line2D([], [], color=GREEN, marker="o", label="lower error"),
    ]
    counts = {len(cell.values) for _, rows in found for _, cells in rows for cell in cells if cell and cell.values}
    if several := counts - {1}:
        label = f"{interval_name(*several)} holds zero"
        handles.append(Line2D([], [], color="#777777", marker="o", label=label))
    if 1 in counts:
        label = "one pair of runs"
        handles.append(Line2D([], [], color="#777777", marker="o", markerfacecolor="none", linestyle="", label=label))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


@styled
def gain_by_detail(runs: pd.DataFrame) -> Figure | None:
    """What balancing gains with each changed detail, `TABLE=ablation_digits` and `TABLE=ports`.

    A row of panels for each data set, a panel for each loss and β: the mean gain over pairs of runs of the same seed
    and subset, with its interval, and a line at that of the default configuration; in colour where the interval of the
    change between the two leaves out zero.
    """
    found = []
    for name in ("ablation_digits", "ports"):
        panel = tables.build(name, runs).panels[-1]
        rows = [(label, cells) for label, cells in panel.rows if any(cell and cell.values for cell in cells)]
        if len(rows) > 1:
            found.append((panel, rows))
    if not found:
        return None
    figure, parts = _row_by_row([0.17 * len(rows) + 0.8 for _, rows in found])
    for part, (panel, rows) in zip(parts, found, strict=True):
        setting = panel.cells()[0].setting
        part.suptitle(f"{_title(setting.dataset)}, {_at_factor(setting.imbalance_factor)}", fontsize=8)
        axes = part.subplots(1, len(panel.columns), squeeze=False, sharex=True, sharey=True)[0]
        for ax, column, place in zip(axes, panel.columns, range(len(axes)), strict=True):
            default = rows[0][1][place]
            for y, (_, cells) in enumerate(rows):
                cell = cells[place]
                if cell is None or cell.mean is None:
                    continue
                change = _change_of_gain(default, cell) if default else None
                clear = change is not None and (change[0] > 0 or change[1] < 0)
                colour = BLACK if y == 0 else BLUE if clear else "#777777"
                ax.plot(cell.interval or (cell.mean, cell.mean), [y, y], color=colour)
                ax.plot(cell.mean, y, "o", color=colour, markerfacecolor=colour if cell.interval else "none")
            if default and default.mean is not None:
                ax.axvline(default.mean, color=BLACK, linewidth=0.8, linestyle=":")
            ax.axvline(0, color="#777777", linewidth=0.8)
            ax.set_title(column, fontsize=7)
            ax.set_xlabel("gain of balancing, points")
            ax.set_yticks(range(len(rows)), [label for label, _ in rows])
            ax.set_ylim(len(rows) - 0.5, -0.5)
    handles = [
        Line2D([], [], color=BLACK, marker="o", label="default"),
        Line2D([], [], color=BLUE, marker="o", label="another gain than the default's"),
        Line2D([], [], color="#777777", marker="o", label="not told from the default's"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _row_by_row(heights: Sequence[float]) -> tuple[Figure, np.ndarray]:
    """A page-wide figure of parts below one another, `heights` (n,) in inches, with room for a legend; the parts."""
    figure = Figure((PAGE, sum(heights) + 0.3))
    return figure, figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]


def _change_of_gain(default: Cell, cell: Cell) -> tuple[float, float] | None:
    """The interval of what a gain is more than the default's, over common seeds; None for a single pair of gains."""
    before = dict(zip(default.seeds, default.values, strict=True))
    changes = [value - before[seed] for seed, value in zip(cell.seeds, cell.values, strict=True) if seed in before]
    mean = bootstrap(changes)
    return mean.interval if mean else None


@styled
def detail_curves(runs: pd.DataFrame, curves: pd.DataFrame) -> Figure | None:
    """Test error over the epochs, by default and with one of `COSTLIEST` changed; without class balancing.

    A row of panels for `TABLE=ablation_digits`, the longest training of `TABLE=conditions`, and each data set of
    `TABLE=ablation`: means over pairs of runs of the same seed and subset. Each panel has a scale of its own.
    """
    curves = curves[curves["test_error"].notna()]
    runs = runs[runs["run_id"].isin(curves["run_id"])]
    done = done_runs(runs)
    _, words, longest = tables.CONDITIONS[-1]
    shown: list[tuple[Setting, dict[str, list[tuple[Row, Row]]]]] = []  # (changed, default) by label
    for base in (tables.ABLATED_DIGITS, tables.condition(words, longest), *tables.ABLATED_CIFAR.values()):
        asked = {}
        for label, (loss, gamma, word) in COSTLIEST.items():
            default = base._replace(loss=loss, gamma=gamma)
            asked[label] = tables.changed(default, word), default
        found, _, _ = one_dtype(done, (setting for two in asked.values() for setting in two))
        both = {label: pairs(found.get(new, []), found.get(old, [])) for label, (new, old) in asked.items()}
        if any(both.values()):
            shown.append((base, both))
    if not shown:
        return None
    figure = Figure((PAGE, 1.9 * len(shown) + 0.3))
    parts = figure.subfigures(len(shown), 1, squeeze=False)[:, 0]
    for part, (base, both) in zip(parts, shown, strict=True):
        sizes = _size({base._replace(loss=label): [new for new, _ in two] for label, two in both.items() if two})
        title = f"{_title(base.dataset)}, {_at_factor(base.imbalance_factor)}, {base.epochs} epochs"
        part.suptitle(f"{title}: {sizes}", fontsize=8)
        for ax, (label, two) in zip(part.subplots(1, len(both)), both.items(), strict=True):
            ax.set_title(label, fontsize=7)
            ax.set(xlabel="epoch", ylabel="test error, %")
            if two:
                _over_epochs(ax, curves, [new for new, _ in two], "test_error", color=RED)
                _over_epochs(ax, curves, [old for _, old in two], "test_error", color=BLACK)
            else:
                ax.set(xticks=[], yticks=[])
                ax.text(0.5, 0.5, "not run", transform=ax.transAxes, ha="center", va="center")
    handles = [Line2D([], [], color=BLACK, label="default configuration")]
    handles.append(Line2D([], [], color=RED, label="changed as said above the panel"))
    _legend(figure, handles)
    return figure


@styled
def moved_drop(runs: pd.DataFrame, curves: pd.DataFrame) -> Figure | None:
    """Test error of one run whose learning rate drops at another epoch, `TABLE=drop`; a panel for each loss.

    The official run of the same seed is the one that the others part from at their drops; of several seeds the one with
    most runs. The number is the error after a run's last step.
    """
    curves = curves[curves["test_error"].notna()]
    runs = runs[runs["run_id"].isin(curves["run_id"])]
    done = done_runs(runs)
    rows_of = {row["run_id"]: row for rows in done.values() for row in rows}
    [panel, *_] = tables.build("drop", runs).panels
    found: dict[str, list[tuple[int, Row]]] = {}  # the drop's epoch and the run, by column
    for epoch, (_, cells) in zip(tables.DROPS, panel.rows, strict=True):
        for column, cell in zip(panel.columns, cells, strict=True):
            found.setdefault(column, []).extend((epoch, rows_of[name]) for name in cell.run_ids)
    found = {column: moved for column, moved in found.items() if moved}
    if not found:
        return None
    figure = Figure((PAGE, 2.6 * len(found) + 0.2))
    apart: list[float] = []  # epochs between two evaluations of the official run, the grey line
    for ax, (column, moved) in zip(figure.subplots(len(found), 1, squeeze=False)[:, 0], found.items(), strict=True):
        seeds = Counter(tables.seed_label(row) for _, row in moved)
        seed = max(seeds, key=seeds.__getitem__)
        moved = [(epoch, row) for epoch, row in moved if tables.seed_label(row) == seed]
        for epoch, row in moved:
            points = curves[curves["run_id"] == row["run_id"]]
            before = points["epoch"].le(epoch).sum()  # evaluations up to the drop; the line begins at the last of them
            colour = DROP_SHADES((epoch - tables.DROPS[0]) / (tables.DROPS[-1] - tables.DROPS[0]))
            ax.plot(points["epoch"].iloc[before - 1 :], points["test_error"].iloc[before - 1 :], color=colour)
            # below its end, at the bottom of the panel: elsewhere it would lie on a neighbour's line
            place = {"transform": ax.get_xaxis_transform(), "ha": "center", "color": colour}
            ax.text(points["epoch"].iloc[-1], 0.03, f"{row['error_last']:.1f}", **place)
        setting = tables.setting_of(moved[0][1])
        for row in done.get(setting, []):
            if row["dtype"] == moved[0][1]["dtype"] and tables.seed_label(row) == seed:
                points = curves[(curves["run_id"] == row["run_id"]) & (curves["epoch"] > tables.DROPS[0] - 40)]
                ax.plot(points["epoch"], points["test_error"], color="#aaaaaa", zorder=1)
                apart.extend(points["epoch"].diff().dropna())
        ax.set(xlabel="epoch", ylabel="test error, %")
        ax.margins(y=0.15)
        ax.set_title(f"{panel.title}, {column}, seed {seed}, {moved[0][1]['dtype']}")
    official = f"official run, ×0.01 at epoch {Recipe().milestones[0]:g}"
    if apart and (every := round(float(np.median(apart)))) > 1:
        official += f"; a point every {every} epochs"
    handles = [Line2D([], [], color="#aaaaaa", label=official)]
    handles.append(
        Line2D(
            [],
            [],
            color=DROP_SHADES(0.5),
            label=f"×0.01 where a line parts from it, end {tables.AFTER_DROP} epochs later, its error below",
        )
    )
    _legend(figure, handles)
    return figure


@styled
def head_against_tail(runs: pd.DataFrame) -> Figure | None:
    """Error of the classes with few images against that of those with many: a point for each loss and β.

    A panel for each data set, at the imbalance factor of most settings. Where no class has few images, those with
    medium.
    """
    panels = []
    for of, found in _by_dataset(runs).items():
        factor = _fullest(setting.imbalance_factor for setting in found)
        found = {setting: rows for setting, rows in found.items() if setting.imbalance_factor == factor}
        table = pd.DataFrame([row for rows in found.values() for row in rows])
        tail = "few" if table["error_few"].notna().all() else "medium"
        if len(found) > 1 and table[["error_many", f"error_{tail}"]].notna().all(axis=None):
            panels.append((_title(*of), factor, found, tail, table["groups"].iloc[0]))
    if not panels:
        return None
    lines = -(-len(panels) // 2)
    figure = Figure((PAGE, 2.9 * lines + 0.4))
    axes = figure.subplots(lines, 2, squeeze=False).ravel()
    for ax, (title, factor, found, tail, rule) in zip(axes, panels, strict=False):
        for setting, rows in found.items():
            _, _, marker = LOSSES[setting.loss, setting.gamma]
            many, few = (np.mean([row[f"error_{group}"] for row in rows]) for group in ("many", tail))
            ax.plot(many, few, marker, color=BETAS[setting.beta], markersize=5)
        ax.set_xlim(right=min(ax.get_xlim()[1], 102))
        ax.set_ylim(top=min(ax.get_ylim()[1], 102))
        ax.set_title(f"{title}, {_at_factor(factor)}\n{_size(found)}")
        ax.set_xlabel(f"error on {GROUPS[rule, 'many']}, %")
        ax.set_ylabel(f"error on {GROUPS[rule, tail]}, %")
    for ax in axes[len(panels) :]:
        ax.remove()
    handles = []  # the legend is filled column by column
    for (label, _, marker), (beta, colour) in zip(LOSSES.values(), BETAS.items(), strict=True):
        handles.append(Line2D([], [], color="#777777", marker=marker, linestyle="", label=label))
        handles.append(Line2D([], [], color=colour, linewidth=4, label=f"β = {beta:g}"))
    figure.legend(handles=handles, loc="outside lower center", ncols=5)
    return figure


# -- parts -------------------------------------------------------------------------------------------------------------


def _printed(grids: pd.DataFrame) -> dict[Setting, float]:
    """The paper's errors by setting, %."""
    return {tables.setting_of(row): row["error"] for row in store.plain_rows(grids)}


def _means(found: Done) -> dict[Setting, float]:
    """Mean test errors of our runs by setting, %."""
    return {setting: float(np.mean([row["error_last"] for row in rows])) for setting, rows in found.items()}


def passed_over(runs: pd.DataFrame) -> int:
    """Done runs with a loss or β that the figures do not show, which are those of the paper."""
    done = done_runs(runs)
    return sum(len(rows) for s, rows in done.items() if (s.loss, s.gamma) not in LOSSES or s.beta not in BETAS)


def _by_dataset(runs: pd.DataFrame) -> dict[tuple[str, str | None], Done]:
    """The done runs of each data set with the paper's losses and β, in one recipe and one dtype; by name and `_root`.

    On CIFAR the recipe is the official one; the paper has none for other data sets, where it is that of most runs.
    """
    done = {
        setting: rows
        for setting, rows in done_runs(runs).items()
        if (setting.loss, setting.gamma) in LOSSES and setting.beta in BETAS
    }
    dataset_of = {setting: (setting.dataset, _root(rows[0])) for setting, rows in done.items()}
    recipes: dict[tuple[str, str | None], Counter] = {}
    for setting, rows in done.items():
        recipes.setdefault(dataset_of[setting], Counter())[setting[5:]] += len(rows)
    names = [*TITLES, *(name for name, _ in recipes)]
    by_dataset = {}
    for of in sorted(recipes, key=lambda of: (names.index(of[0]), of[1] or "")):
        recipe = OFFICIAL if of[0] in SIZES else recipes[of].most_common(1)[0][0]
        found, _, _ = one_dtype(done, [s for s in done if dataset_of[s] == of and s[5:] == recipe])
        if found:
            by_dataset[of] = found
    return by_dataset


def _root(row: Row) -> str | None:
    """Which folder of images a run of `folder` is of; None of another data set, which is one wherever it lies."""
    if row["dataset"] != "folder":
        return None
    said = re.search(r'(?:^| )dataset\.root=("(?:[^"\\]|\\.)*")', row["overrides"] or "")
    return json.loads(said[1]) if said else Dataset.root


def _series(found: Done) -> dict[Setting, Series]:
    """The runs of each loss and imbalance factor by β, ascending; keys are the settings at β 0, run or not."""
    series: dict[Setting, Series] = {}
    for setting in sorted(found, key=lambda setting: setting.beta):
        series.setdefault(plain(setting), {})[setting.beta] = found[setting]
    return series


def _shown(runs: pd.DataFrame, details: pd.DataFrame) -> list[tuple[Setting, Series]]:
    """Of each data set the imbalance factor and loss with runs at β 0 and at most other β; their runs by β.

    Among equals the most runs, then imbalance factor 100, the largest, and the first of `LOSSES`. Runs that `details`
    lacks (its column run_id) are not counted.
    """
    known = set(details["run_id"])
    shown = []
    for found in _by_dataset(runs).values():
        found = {setting: [row for row in rows if row["run_id"] in known] for setting, rows in found.items()}
        series = _series({setting: rows for setting, rows in found.items() if rows})
        series = {base: runs_of for base, runs_of in series.items() if len(runs_of) > 1 and 0.0 in runs_of}
        if series:
            size = {base: (len(runs_of), sum(map(len, runs_of.values()))) for base, runs_of in series.items()}
            bases = [base for base in series if size[base] == max(size.values())]
            factor = _fullest(base.imbalance_factor for base in bases)
            base = next(base for loss in LOSSES for base in bases if base[1:4] == (factor, *loss))
            shown.append((base, series[base]))
    return shown


def _fullest(factors: Iterable[float | None]) -> float | None:
    """The imbalance factor that occurs most; among equals 100, then the largest."""
    count = Counter(factors)
    return max(count, key=lambda factor: (count[factor], factor == 100, factor or 0))


def _banded(ax: Axes, x: Sequence[float], values: np.ndarray, **look: Any) -> None:
    """Line at the mean of values (n, points) over the runs, NaN left out; band of one sd (n - 1) to each side.

    On a log axis both are of the logarithm: a band around the plain mean can reach below zero. A point that no band
    reaches, its neighbours having no spread, gets a whisker instead.
    """
    log = ax.get_yscale() == "log"
    present = np.ma.masked_invalid(values)
    present = np.ma.log(present) if log else present
    mean = present.mean(axis=0).filled(np.nan)
    sd = present.std(axis=0, ddof=1).filled(np.nan) if len(values) > 1 else np.full_like(mean, np.nan)
    low, high = mean - sd, mean + sd
    if log:
        mean, low, high = np.exp([mean, low, high])
    ax.plot(x, mean, **({"marker": "o"} if len(x) == 1 else {}) | look)
    if np.isfinite(sd).any():
        ax.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)
        spread = np.pad(np.isfinite(sd), 1)
        alone = spread[1:-1] & ~spread[:-2] & ~spread[2:]
        if alone.any():
            whiskers = (mean - low)[alone], (high - mean)[alone]
            ax.errorbar(np.asarray(x)[alone], mean[alone], whiskers, fmt="none", ecolor=look["color"], alpha=0.5)


def _over_epochs(ax: Axes, curves: pd.DataFrame, rows: Sequence[Row], column: str, **look: Any) -> None:
    """A column of `curves` over the epochs, `_banded` over the runs `rows`."""
    points = curves[curves["run_id"].isin([row["run_id"] for row in rows])]
    table = points.pivot(index="run_id", columns="epoch", values=column)  # (n, evaluations)
    _banded(ax, table.columns.to_numpy(float), table.to_numpy(float), **look)


def _legend(figure: Figure, handles: Sequence[Artist]) -> None:
    """Below all panels, in one line, with an entry for the bands of `_banded` if there are any."""
    band = Patch(color="#777777", alpha=0.15, linewidth=0, label="± 1 sd over runs")
    handles = [*handles, *([band] if any(ax.collections for ax in figure.axes) else [])]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def _size(found: Done, wanted: Sequence[Setting] | None = None) -> str:
    """`3 runs each, fp32`; `14 of 15 settings, 1 to 3 runs each, fp32` when some of the wanted settings are missing."""
    runs_of = [rows for setting, rows in found.items() if wanted is None or setting in wanted]
    if not runs_of:
        return "not run"
    fewest, most = min(map(len, runs_of)), max(map(len, runs_of))
    some = "" if wanted is None or len(runs_of) == len(wanted) else f"{len(runs_of)} of {len(wanted)} settings, "
    runs = "1 run" if most == 1 else f"{most} runs" if fewest == most else f"{fewest} to {most} runs"
    return f"{some}{runs} each, {runs_of[0][0]['dtype']}"


def _title(dataset: str, root: str | None = None) -> str:
    name = TITLES.get(dataset, dataset)
    if root is not None:  # in full, or two might look like one; wrapped, as half a page must hold it
        shown = "".join(c if _drawable(c) else ascii(c)[1:-1] for c in root)
        return _literal(textwrap.fill(f"{name} {shown}", 32, break_on_hyphens=False))
    return f"Long-tailed {name}" if dataset.endswith("_lt") else name


def _literal(words: str) -> str:
    """Between two `$` matplotlib would read maths."""
    return words.replace("$", r"\$")


@cache
def _glyphs() -> frozenset[int]:
    return frozenset(font_manager.get_font(font_manager.findfont(FONT)).get_charmap())


def _drawable(words: str) -> bool:
    """Whether the font has all these letters: for others there would be boxes, and a warning for each."""
    return _glyphs().issuperset(map(ord, words))


def _at_factor(factor: float | None) -> str:
    return "imbalance as it is" if factor is None else f"imbalance factor {factor:g}"


def _shown_title(base: Setting, runs_of: Series) -> str:
    loss, _, _ = LOSSES[base.loss, base.gamma]
    sizes = _size({base._replace(beta=beta): rows for beta, rows in runs_of.items()})
    title = _title(base.dataset, _root(next(iter(runs_of.values()))[0]))
    return f"{title}, {_at_factor(base.imbalance_factor)}, {loss}: {sizes}"


def _classes_label(classes: pd.DataFrame, total: int) -> str:
    """`cat` or `40–49`, and below it the images: rows of per_class of one group, head first, out of `total` classes.

    A group is named by its places from the largest class, the frame's index: of a set found as it is, the labels follow
    no size. A class whose name the font cannot draw has its index for a name.
    """
    first, last = classes.iloc[0], classes.iloc[-1]
    if len(classes) > 1:
        return f"{classes.index[0]}–{classes.index[-1]}\n{first['n_train']}–{last['n_train']}"
    named = total <= 10 and _drawable(first["class_name"])
    return f"{_literal(first['class_name']) if named else first['class_index']}\n{first['n_train']}"


def _beta_legend(figure: Figure, shown: list[tuple[Setting, Series]]) -> None:
    """Of the β that occur."""
    betas = sorted({beta for _, runs_of in shown for beta in runs_of})
    labels = [f"β = {beta:g}" if beta else "no class balancing" for beta in betas]
    handles = [Line2D([], [], color=BETAS[beta], label=label) for beta, label in zip(betas, labels, strict=True)]
    _legend(figure, handles)
