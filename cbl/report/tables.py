"""The paper's tables, its numbers and ours side by side: from rows of runs.csv to plain data.

`build` makes a `Table` of panels of rows of cells; `cbl.report.formats` and `cbl.report.page` write it out. No cell
holds a number that no recorded run produced, runs of different `cell` are never averaged, and a table shows one dtype.
What was not run is a visible gap.
"""

import functools
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from cbl import longtail, store
from cbl.config import nearest
from cbl.errors import UserError
from cbl.report import paper as printed
from cbl.report.verdict import Row, Verdict, bootstrap, difference, pairs, verdict

GRIDS = {"grid10": ("cifar10_lt", 8), "grid20": ("cifar20_lt", 9), "grid100": ("cifar100_lt", 10)}  # the paper's figure
FACTORS = [float(factor) for factor in printed.IMBALANCE_FACTORS if factor > 1]  # of the grids
NAMES = ["digits", "1", "2", *GRIDS, "ablation", "ablation_digits", "conditions", "division", "division_cifar"]
NAMES += ["ports", "drop", "3"]
SUBSET_BY_SEED = ("ablation_digits", "conditions", "division")  # in their configs/table/*.yaml
TITLES = {
    "digits_lt": "digits",
    "cifar10_lt": "CIFAR-10",
    "cifar20_lt": "CIFAR-20",
    "cifar100_lt": "CIFAR-100",
    "inaturalist2017": "iNaturalist 2017",
    "inaturalist2018": "iNaturalist 2018",
    "imagenet": "ILSVRC 2012",
}
LABELS = {  # rows of Table 2
    "softmax": "Softmax",
    "sigmoid": "Sigmoid",
    "focal_g0.5": "Focal γ 0.5",
    "focal_g1": "Focal γ 1.0",
    "focal_g2": "Focal γ 2.0",
    "class_balanced": "Class-balanced",
}
SIZES = {"cifar10_lt": (10, 5000), "cifar20_lt": (20, 2500), "cifar100_lt": (100, 500)}  # classes, largest class
NO_PRIOR, AUTHORS_ORDER = "model.prior_bias=false", 'recipe.image_order="official_stream"'
WEIGHT_SUM = 'loss.reduction="weight_sum"'
# What most ports to PyTorch have in place of the authors' network and input.
TOGETHER = "Strided, Kaiming, per-channel input together"
AS_MOST_PORTS = 'model.init="kaiming" model.shortcut="strided" recipe.input_scaling="mean_std"'
# What the ablations change, a detail at a time or three: a row's label, and the departure from the defaults.
DETAILS = [
    ("Loss divided by the sum of the drawn weights", WEIGHT_SUM),
    ("No prior in the last bias", NO_PRIOR),
    ("Shortcut: strided slice", 'model.shortcut="strided"'),
    ("Shortcut: projection", 'model.shortcut="projection"'),
    ("Initial weights: Kaiming", 'model.init="kaiming"'),
    ("Input: per-channel mean and sd", 'recipe.input_scaling="mean_std"'),
    (TOGETHER, AS_MOST_PORTS),
    ("Learning rate drops: ×0.1", "recipe.drop=0.1"),
    ("Weight decay: everything", 'recipe.decay_scope="everything"'),
    ("Weight decay: everything but BN", 'recipe.decay_scope="not_bn"'),
    ("Weight decay: last bias alone", 'recipe.decay_scope="only_last_bias"'),
    ("Image order: official stream", AUTHORS_ORDER),
]
# The class-balanced columns: beta of the best cell of the paper at imbalance factor 100; on the digits that of the
# lowest errors of softmax and focal (gamma 1) in the embedded table.
ABLATION_BETAS = {"cifar10_lt": 0.9999, "cifar100_lt": 0.9, "digits_lt": 0.9999}
DIGITS = ("engine.eval_every=5 recipe.batch_size=64 recipe.milestones=[32.0]", "resnet8", 40)  # experiment=digits
# What else is changed to see when a detail matters: a row's label, a departure from `DIGITS`, epochs.
CONDITIONS = [
    ("As in the ablation", DIGITS[0], 40),
    ("Warm-up over 20 epochs in place of 5", f"{DIGITS[0]} recipe.warmup_epochs=20.0", 40),
    ("Learning rate 0.02 in place of 0.1", f"{DIGITS[0]} recipe.learning_rate=0.02", 40),
    ("160 epochs in place of 40", DIGITS[0].replace("[32.0]", "[128.0]"), 160),
]
# The learning rate's first drop, at these epochs in place of 160, and the end of the run so many epochs later.
DROPS, AFTER_DROP = range(100, 161, 10), 20

LEGEND = (
    "≈ agrees with the paper: within two standard errors of the difference, one of which is √(0.7² + s²/n), where s is "
    "the standard deviation of our n runs (0.7 when n < 3); ↓ ours is better (lower error); ↑ ours is worse."
)
ERRORS = "Test error (%) after the last step, mean ± standard deviation (number of runs). –: not run."
BOLD = "The lowest error of a column is bold."
PAIRED = (
    "paired by seed and subset: mean [95 % bootstrap interval from 10,000 resamples; for two or three pairs, their "
    "whole range] (number of pairs)."
)
GAINS = f"Gains (points) are {PAIRED}"
FEWEST = "its classes with the fewest images"
ABLATED = (
    f"Errors after the last step, mean ± standard deviation (number of runs). Changes are {PAIRED} Blank: the change "
    f"has no effect on this loss. –: not run. {FEWEST.capitalize()}: of up to ten classes the third with the fewest, "
    "of more classes those with fewer than 20 images; the error is the mean over these classes."
)

BALANCED = "What balancing gains is the error without weights minus that with them, paired in the same way."

Kind = Literal["error", "best", "gain", "difference", "count"]


class Setting(NamedTuple):
    """What a cell of a table asks of a run; its seeds and dtype are free."""

    dataset: str
    imbalance_factor: float | None
    loss: str
    gamma: float | None
    beta: float
    departures: str = ""  # `overrides` of runs.csv, and loss.reduction where it has an effect; sorted, blank between
    model: str = "resnet32"
    epochs: int = 200


# What the ablations change a detail of, but for its loss.
ABLATED_CIFAR = {name: Setting(name, 100.0, "", None, 0.0) for name in ("cifar10_lt", "cifar100_lt")}
ABLATED_DIGITS = Setting("digits_lt", 50.0, "", None, 0.0, *DIGITS)


class Division(NamedTuple):
    """Where it is tried what undoes dividing by the sum of the drawn weights."""

    setting: Setting  # but for its loss
    losses: list[tuple[str, float | None]]  # with gamma
    weight: str  # of an image drawn, on average
    times: str  # the inverse: what the division multiplies the gradient by
    smaller: float  # learning rate, by about as much
    larger: float
    decay: float  # weight decay, larger by about as much

    def rows(self) -> list[tuple[str, list[str]]]:
        """A row's label and its departures from the default configuration.

        A loss k times as large is, to plain SGD, a learning rate k times as large and a k-th of the weight decay: both
        are undone in the third row.
        """
        smaller, larger = (f"recipe.learning_rate={rate}" for rate in (self.smaller, self.larger))
        decay = f"recipe.weight_decay={self.decay}"
        return [
            ("Loss divided by the sum of the drawn weights", [WEIGHT_SUM]),
            (f"The same at learning rate {self.smaller}", [WEIGHT_SUM, smaller]),
            (f"The same at learning rate {self.smaller} and weight decay {self.decay}", [WEIGHT_SUM, smaller, decay]),
            (f"Learning rate {self.larger} alone", [larger]),
        ]


DIVISIONS = {
    "division": Division(
        ABLATED_DIGITS._replace(beta=ABLATION_BETAS["digits_lt"]),
        [("softmax", None), ("focal", 1.0)],
        weight="0.22",
        times="4.6",
        smaller=0.025,
        larger=0.4,
        decay=0.0008,
    ),
    "division_cifar": Division(
        Setting("cifar10_lt", 200.0, "", None, 0.9999),
        [("softmax", None)],
        weight="0.10",
        times="9.5",
        smaller=0.0105,
        larger=0.95,
        decay=0.0019,
    ),
}

Done = Mapping[Setting, list[Row]]  # rows of runs.csv that are done, in the order of their seeds


@dataclass(frozen=True)
class Cell:
    """One number of the paper and what our runs say to it; `values` and `seeds` have one entry per run or pair of runs.

    kind says what the numbers are: `error` after the last step and `best` (lowest of all evaluations) in %; `gain`
    (baseline minus class-balanced) and `difference` (changed minus default) in points, paired by seed; `count`.
    """

    kind: Kind
    setting: Setting
    paper: float | None = None
    values: tuple[float, ...] = ()
    seeds: tuple[str, ...] = ()  # "0", or "0.1": seed 0 on the subset of seed 1
    best: tuple[float, ...] = ()  # lowest error of all evaluations of the same runs
    interval: tuple[float, float] | None = None  # bootstrap, 95 %
    run_ids: tuple[str, ...] = ()  # of a pair both, one after the other
    devices: tuple[str, ...] = ()
    commits: tuple[str, ...] = ()

    @property
    def mean(self) -> float | None:
        return float(np.mean(self.values)) if self.values else None

    @property
    def sd(self) -> float | None:
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else None

    @property
    def difference(self) -> float | None:
        return difference(self.paper, self.values)

    @property
    def verdict(self) -> Verdict | Literal["equal", "differs"]:
        if self.kind == "count" and self.difference is not None:
            return "equal" if abs(self.difference) <= 0.005 else "differs"  # ratios are printed with two decimals
        return verdict(self.paper, self.values) if self.kind == "error" else "–"


@dataclass(frozen=True)
class Panel:
    """Rows of cells under common columns; a cell that is None does not apply."""

    title: str
    columns: list[str]
    rows: Sequence[tuple[str, Sequence[Cell | None]]]
    apart: bool = False  # no headline: shown after the others

    @property
    def with_paper(self) -> bool:
        return any(cell.paper is not None for cell in self.cells())

    def cells(self) -> list[Cell]:
        return [cell for _, cells in self.rows for cell in cells if cell is not None]


@dataclass(frozen=True)
class Table:
    """All that is known of one table, before it is written in any format."""

    name: str
    title: str
    caption: str  # what is particular to it
    legend: str  # how to read it
    panels: list[Panel]
    notes: list[str] = field(default_factory=list)
    seeds: tuple[int, ...] = ()  # of the runs in it
    dtype: str = ""
    subset: int | None = None  # dataset.subset_seed of all runs in it; None: as the table asks for it, or several
    changed: tuple[str, ...] = ()  # other overrides of all runs in it, but for their dtype

    @property
    def short(self) -> str:
        return self.title.split(":")[0]

    @property
    def command(self) -> str:
        """What makes it again: its runs are found, or trained, only with their own seeds and dtype."""
        words = ["make reproduce-table"] + ([] if self.name == "digits" else [f"TABLE={self.name}"])
        if self.seeds and self.seeds != (0, 1, 2):
            words.append(f"SEEDS={seed_words(self.seeds)}")
        if overrides := " ".join([*self.arithmetic_and_images, *self.changed]):
            words.append(f"SET={shlex.quote(overrides)}")
        return " ".join(words)

    @property
    def arithmetic_and_images(self) -> list[str]:
        """Overrides without which its runs would be others, in the same cells."""
        dtype = [] if self.dtype in ("", "fp32") else [f"engine.dtype={self.dtype}"]
        return dtype if self.subset is None else [*dtype, f"dataset.subset_seed={self.subset}"]

    def cells(self) -> list[Cell]:
        """Those of the paper's own grid, in all panels: neither gains nor best-on-test."""
        return [cell for panel in self.panels for cell in panel.cells() if cell.kind == "error" and not panel.apart]


def build(name: str, runs: pd.DataFrame, counts: Mapping[str, Sequence[int]] | None = None) -> Table:
    """The table of that name, one of `NAMES`, from rows of runs.csv, failed and foreign ones among them.

    `counts`: images per class of large data sets, for Table 1. Raises `UserError` for another name.
    """
    done = done_runs(runs)
    table = _build(name, done, counts or {})
    shown = {run_id for panel in table.panels for cell in panel.cells() for run_id in cell.run_ids}
    rows = [row for rows in done.values() for row in rows if row["run_id"] in shown]
    return replace(
        table,
        notes=[*table.notes, *_two_devices(table, {row["run_id"]: row["device"] for row in rows})],
        seeds=tuple(sorted({int(row["seed"]) for row in rows})),
        dtype=rows[0]["dtype"] if rows else "",  # one for all: `one_dtype`
        subset=_subset(name, rows),
    )


def _subset(name: str, rows: Sequence[Row]) -> int | None:
    """The one choice of images of these runs, where the table's command would make another."""
    drawn = [row for row in rows if row["imbalance_factor"] != 1]  # there all images are kept
    asked = {(row["seed"] if name in SUBSET_BY_SEED else 0) == row["subset_seed"] for row in drawn}
    found = {int(row["subset_seed"]) for row in drawn}
    return found.pop() if len(found) == 1 and asked != {True} else None


def _build(name: str, done: Done, counts: Mapping[str, Sequence[int]]) -> Table:
    if name not in NAMES:
        raise UserError(f"There is no table '{name}'{nearest(name, NAMES)}")
    if name == "1":
        return table1(counts)
    if name in GRIDS:
        return grid(name, done)
    if name in DIVISIONS:
        return division(name, done)
    makers = {"digits": digits, "2": table2, "3": table3, "ablation": ablation, "ablation_digits": ablation_digits}
    return (makers | {"conditions": conditions, "ports": ports, "drop": drop})[name](done)


# -- from runs to cells ------------------------------------------------------------------------------------------------


def done_runs(runs: pd.DataFrame) -> Done:
    """Rows of runs.csv that are done, by setting; all dtypes are still together."""
    runs = runs[(runs["status"] == "done") & runs["error_last"].notna() & runs["beta"].notna()]
    runs = runs.sort_values(["subset_seed", "seed", "run_id"], kind="stable")
    done: dict[Setting, list[Row]] = {}
    for row in store.plain_rows(runs):
        departures = (row["overrides"] or "").split()
        if row["beta"] > 0 and row["reduction"] != "batch":  # at beta 0 both divide by the batch size
            departures.append(f'loss.reduction="{row["reduction"]}"')
        setting = setting_of(row)._replace(
            departures=" ".join(sorted(departures)), model=row["model"], epochs=row["epochs"]
        )
        done.setdefault(setting, []).append(row)
    return done


def one_dtype(done: Done, wanted: Iterable[Setting]) -> tuple[Done, str, list[str]]:
    """The runs of the wanted settings in the dtype that most of them have; a sentence that names it; notes.

    The sentence also says where several seeds share one choice of images, the notes count what is left out.
    """
    pool = {setting: done[setting] for setting in dict.fromkeys(wanted) if setting in done}
    count = Counter(row["dtype"] for rows in pool.values() for row in rows)
    if not count:
        return {}, "Nothing of this table was run yet.", []
    chosen = min(count, key=lambda dtype: (-count[dtype], dtype != "fp32", dtype))
    notes = [
        f"{plural(n, 'done run')} in {dtype} left out: a table shows one dtype."
        for dtype, n in sorted(count.items())
        if dtype != chosen
    ]
    found = {setting: [row for row in rows if row["dtype"] == chosen] for setting, rows in pool.items()}
    found = {setting: rows for setting, rows in found.items() if rows}
    strangers = 0
    for setting, rows in found.items():
        cell = Counter(row["cell"] for row in rows).most_common(1)[0][0]
        found[setting] = [row for row in rows if row["cell"] == cell]
        strangers += len(rows) - len(found[setting])
    if strangers:
        notes.append(f"{plural(strangers, 'done run')} of another `cell` left out: these are never averaged.")
    sentence = f"All runs of ours are in {chosen}."
    drawn = {setting: rows for setting, rows in found.items() if (setting.imbalance_factor or 1) > 1}
    subsets = {row["subset_seed"] for rows in drawn.values() for row in rows}
    if len(subsets) == 1 and any(len(rows) > 1 for rows in drawn.values()):
        sentence += (
            " They share one choice of training images: no deviation or interval here covers what another choice would "
            "change."
        )
    return found, sentence, notes


def error_cell(
    done: Done,
    setting: Setting,
    paper: float | None = None,
    column: Literal["error_last", "error_top5", "error_few"] = "error_last",
) -> Cell:
    """Test error after the last step of all runs of a setting; a gap when there is none."""
    rows = [row for row in done.get(setting, []) if row.get(column) is not None]
    best = tuple(row["error_best"] for row in rows) if column == "error_last" else ()
    return Cell(
        "error",
        setting,
        paper,
        values=tuple(row[column] for row in rows),
        seeds=_seeds(rows),
        best=() if None in best else best,
        run_ids=tuple(row["run_id"] for row in rows),
        devices=_distinct(rows, "device"),
        commits=_distinct(rows, "commit"),
    )


def paired_cell(
    kind: Literal["gain", "difference"],
    done: Done,
    setting: Setting,
    other: Setting,
    paper: float | None = None,
    column: Literal["error_last", "error_few"] = "error_last",
) -> Cell:
    """A class-balanced `setting` against its baseline, or a changed one against the official, over common seeds.

    column: of a difference; a gain is one of `error_last`.
    """
    rows, others = ([row for row in done.get(s, []) if row.get(column) is not None] for s in (setting, other))
    both = pairs(rows, others)
    values = [(base[column] - row[column]) if kind == "gain" else (row[column] - base[column]) for row, base in both]
    mean = bootstrap(values)
    return Cell(
        kind,
        setting,
        paper,
        values=tuple(values),
        seeds=_seeds([row for row, _ in both]),
        interval=mean.interval if mean else None,
        run_ids=tuple(row["run_id"] for pair in both for row in pair),
        devices=_distinct([row for pair in both for row in pair], "device"),
        commits=_distinct([row for pair in both for row in pair], "commit"),
    )


def _seeds(rows: Iterable[Row]) -> tuple[str, ...]:
    return tuple(map(seed_label, rows))


def seed_label(row: Row) -> str:
    """`1`, or `1.2`: seed 1 on the subset of seed 2."""
    return f"{row['seed']}.{row['subset_seed']}" if row["subset_seed"] else f"{row['seed']}"


def seed_words(seeds: Sequence[int]) -> str:
    """`0,1`, and `0-19` for more than three in a row."""
    if len(seeds) > 3 and seeds[-1] - seeds[0] == len(seeds) - 1:
        return f"{seeds[0]}-{seeds[-1]}"
    return ",".join(map(str, seeds))


def _two_devices(table: Table, device: Mapping[str, str | None]) -> list[str]:
    """A note of the pairs whose two runs were trained on different devices; `device` by run id."""
    named = []
    for panel in table.panels:
        against = " against β 0" if panel.apart else ""  # the same setting has its change in a headline panel
        for cell in panel.cells():
            if cell.kind == "gain" or (cell.kind == "difference" and not panel.apart):  # apart they are the same runs
                both = list(zip(cell.run_ids[::2], cell.run_ids[1::2], strict=True))
                apart = sum(device[run] != device[other] for run, other in both)
                if apart:
                    named.append(f"{full_label(cell.setting)}{against} ({apart} of {plural(len(both), 'pair')})")
    return [f"Pairs trained on two devices, which round differently: {'; '.join(named)}."] if named else []


def _distinct(rows: Iterable[Row], column: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(row[column] for row in rows if row[column]))


def plain(setting: Setting) -> Setting:
    """The same at beta 0, the baseline of a gain."""
    kept = [word for word in setting.departures.split() if not word.startswith("loss.reduction=")]
    return setting._replace(beta=0.0, departures=" ".join(kept))


def best_on_test(panel: Panel) -> Panel:
    """The error cells of a panel once more, by the lowest error of all evaluations."""

    def best(cell: Cell | None) -> Cell | None:
        return cell and replace(cell, kind="best", paper=None, values=cell.best)  # none of a run without evaluations

    rows = [(label, [best(cell) for cell in cells]) for label, cells in panel.rows if "gain" not in kinds(cells)]
    return Panel(f"{panel.title}, lowest error of all evaluations: chosen on the test set", panel.columns, rows, True)


def kinds(cells: Iterable[Cell | None]) -> set[Kind]:
    return {cell.kind for cell in cells if cell is not None}


# -- the tables --------------------------------------------------------------------------------------------------------


def digits(done: Done) -> Table:
    """The embedded table: 5 losses x 5 betas on long-tailed digits. The paper has none like it."""
    kinds = ((loss, gamma, beta) for loss, gamma in printed.LOSSES for beta in printed.BETAS)
    settings = {kind: Setting("digits_lt", 100.0, *kind, *DIGITS) for kind in kinds}
    runs, caption, notes = one_dtype(done, settings.values())
    others = [s for s in done if s[:2] == ("digits_lt", 100.0) and s[2:5] in settings and s[5:] != DIGITS]
    if left_out := sum(len(done[setting]) for setting in others):
        notes.append(f"{plural(left_out, 'done run')} with another network or schedule left out.")
    errors, gains = [], []
    for loss, gamma in printed.LOSSES:
        row = [settings[loss, gamma, beta] for beta in printed.BETAS]
        errors.append((loss_label(loss, gamma), [error_cell(runs, setting) for setting in row]))
        gains.append((loss_label(loss, gamma), [paired_cell("gain", runs, setting, row[0]) for setting in row[1:]]))
    columns = [f"β {beta:g}" for beta in printed.BETAS]
    panel = Panel("Digits", columns, errors)
    return Table(
        "digits",
        "Embedded table: long-tailed digits, imbalance factor 100",
        f"{_recipe(DIGITS)}. {caption}",
        f"{ERRORS} {BOLD} {GAINS}",
        [panel, Panel("Digits, gain over the same loss at β 0 (points)", columns[1:], gains), best_on_test(panel)],
        notes,
    )


def table1(counts: Mapping[str, Sequence[int]]) -> Table:
    """Table 1: what `longtail.class_counts` computes against the paper and the official code's own counts."""
    rows = []
    for row in store.plain_rows(printed.table1()):
        name, factor = row["dataset"], row["imbalance_factor"]
        if name in SIZES:
            found = longtail.class_counts(SIZES[name][0], factor, SIZES[name][1])
        else:
            found = np.asarray(counts.get(name, []))
        computed: list[float | None] = [None] * 5
        if len(found):
            computed = [len(found), max(found), min(found), max(found) / min(found), sum(found)]
        names = ("classes", "largest_class", "smallest_class", "ratio", "n_train")
        cells = [
            Cell(
                "count",
                Setting(name, factor, "", None, 0.0),
                None if row[key] is None else float(row[key]),
                () if value is None else (float(value),),
            )
            for key, value in zip(names, computed, strict=True)
        ]
        rows.append((f"{TITLES[name]}, IF {factor:g}" if name in SIZES else TITLES[name], cells))
    unchecked = [label for label, cells in rows if not cells[0].values]
    return Table(
        "1",
        "Table 1: data sets",
        "Images per class, computed by cbl.longtail.class_counts. The paper's column holds the paper's numbers, and "
        "for CIFAR, where it gives ranges, those of the official code.",
        "= equal, ≠ differs, – is a gap: not checked.",
        [Panel("Training sets", ["classes", "largest class", "smallest class", "largest / smallest", "images"], rows)],
        [
            f"Not checked: {', '.join(unchecked)}. `make reproduce-table TABLE=1` counts the images of those that "
            "`make data` has prepared."
        ]
        if unchecked
        else [],
    )


def table2(done: Done) -> Table:
    """Table 2: the five plain losses, and the class-balanced loss at the setting that was the paper's best."""
    cells = {(row["dataset"], row["row"], row["imbalance_factor"]): row for row in store.plain_rows(printed.table2())}
    datasets = ("cifar10_lt", "cifar100_lt")
    factors = [*FACTORS, 1.0]
    settings = {key: setting_of(row) for key, row in cells.items()}
    dropped = {key: settings[key]._replace(departures="recipe.drop=0.01") for key in cells if key[2] == 1}
    runs, caption, notes = one_dtype(done, [*settings.values(), *dropped.values()])

    def rows_of(settings: Mapping[tuple, Setting], columns: Sequence[tuple[str, float]]) -> list[tuple[str, list]]:
        rows = []
        for row, label in LABELS.items():
            keys = [(name, row, factor) for name, factor in columns]
            rows.append((label, [error_cell(runs, settings[key], cells[key]["error"]) for key in keys]))
        return rows

    panels = []
    for name in datasets:
        rows = rows_of(settings, [(name, factor) for factor in factors])
        gains: list[Cell | None] = []
        for best, factor in zip(rows[-1][1], factors, strict=True):
            base = plain(best.setting)
            [before] = {c.paper for _, row in rows[:-1] for c in row if c.setting == base}
            gain = paired_cell("gain", runs, best.setting, base, before - best.paper)
            gains.append(gain if factor > 1 else None)  # there every weight is 1
        rows.append(("Gain of balancing", gains))
        panels.append(Panel(TITLES[name], [factor_label(factor) for factor in factors], rows))
        used = "; ".join(f"{c.setting.imbalance_factor:g}: {setting_label(c.setting)}" for c in rows[-2][1])
        notes.append(f"Class-balanced, {TITLES[name]}, by imbalance factor: {used}.")
    rows = rows_of(dropped, [(name, 1.0) for name in datasets])
    footnote = Panel("IF 1 with the ×0.01 drops", [TITLES[name] for name in datasets], rows, apart=True)
    dtype = next((row["dtype"] for found in runs.values() for row in found), "fp32")  # one for all: `one_dtype`
    arithmetic = "" if dtype == "fp32" else f" engine.dtype={dtype}"  # as the runs that they are beside
    notes += [
        "At IF 1 all weights are 1: the class-balanced cell is the sigmoid run.",
        "At IF 1 the learning rate drops by ×0.1, as in the official script for the balanced sets, elsewhere by ×0.01, "
        "as the paper says; which of the two made its IF 1 column is unknown, so both are shown.",
        "The runs with the ×0.01 drops at IF 1 are not in TABLE=2: python scripts/train.py -m "
        "dataset=cifar10_lt,cifar100_lt dataset.imbalance_factor=1 "
        f"loss=softmax,sigmoid,focal_g0.5,focal_g1,focal_g2 recipe.drop=0.01 seed=0,1,2{arithmetic}",
    ]
    return Table(
        "2",
        "Table 2: long-tailed CIFAR",
        f"{caption} The paper chose its class-balanced row on test error, as the best of 25 settings; ours uses "
        "the settings it chose.",
        f"{ERRORS} {BOLD} {LEGEND} {GAINS}",
        [*panels, footnote, *(best_on_test(panel) for panel in panels)],
        notes,
    )


def grid(name: str, done: Done) -> Table:
    """Fig. 8, 9 or 10: the whole search on one data set, 25 settings x 5 imbalance factors."""
    dataset, figure = GRIDS[name]
    cells = {setting_of(row): row["error"] for row in store.plain_rows(printed.grids()) if row["dataset"] == dataset}
    runs, caption, notes = one_dtype(done, cells)
    rows, gains = [], []
    for loss, gamma in printed.LOSSES:
        for beta in printed.BETAS:
            label = loss_label(loss, gamma, beta)
            settings = [Setting(dataset, factor, loss, gamma, beta) for factor in FACTORS]
            rows.append((label, [error_cell(runs, setting, cells[setting]) for setting in settings]))
            if beta:
                both = [(setting, plain(setting)) for setting in settings]
                gains.append((label, [paired_cell("gain", runs, s, base, cells[base] - cells[s]) for s, base in both]))
    columns = [factor_label(factor) for factor in FACTORS]
    chosen = "" if name == "grid20" else "The lowest of each column is in the paper's Table 2, chosen on test error."
    panel = Panel(TITLES[dataset], columns, rows)
    gain = Panel(f"{TITLES[dataset]}, gain over the same loss without class balancing (points)", columns, gains)
    return Table(
        name,
        f"Figure {figure}: the whole search on long-tailed {TITLES[dataset]}",
        f"{caption} {chosen}".strip(),
        f"{ERRORS} {BOLD} {LEGEND} {GAINS}",
        [panel, gain, best_on_test(panel)],
        notes,
    )


def ablation(done: Done) -> Table:
    """The default configuration with one detail changed, or the three of most ports: long-tailed CIFAR, IF 100."""
    panels, caption, notes = _ablated(done, ABLATED_CIFAR)
    return Table(
        "ablation",
        "Ablation: details changed one at a time, and three together, imbalance factor 100",
        f"{caption} First row: test error (%); others: its change in points, positive is worse.",
        f"{ABLATED} {BALANCED}",
        panels,
        notes,
    )


def ablation_digits(done: Done) -> Table:
    """The same on the digits at imbalance factor 50, where many seeds cost minutes."""
    panels, caption, notes = _ablated(done, {"digits_lt": ABLATED_DIGITS})
    return Table(
        "ablation_digits",
        "Ablation on digits: details changed one at a time, and three together, imbalance factor 50",
        f"{_recipe(DIGITS)}, as in the embedded table; every seed draws a subset of its own. {caption} First row: test "
        "error (%); others: its change in points, positive is worse. The images are small and few, and the network "
        "is small: what matters here need not matter on CIFAR.",
        f"{ABLATED} {BALANCED} By chance one in seventeen such intervals of forty pairs leaves out zero.",
        panels,
        notes,
    )


def _ablated(done: Done, official: Mapping[str, Setting]) -> tuple[list[Panel], str, list[str]]:
    """A panel for each data set, from its official setting but for the loss; which dtype, in a sentence; and notes."""
    columns = {
        name: [
            setting._replace(loss=loss, gamma=gamma, beta=beta)
            for loss, gamma in (("softmax", None), ("focal", 1.0))
            for beta in (0.0, ABLATION_BETAS[name])
        ]
        for name, setting in official.items()
    }
    settings = {setting for row in columns.values() for setting in row}
    # any other single detail that somebody changed is a row as well; what only stops a run early is none
    others = set()
    for setting in done:
        if setting.dataset in official:
            usual = official[setting.dataset].departures
            more = set(setting.departures.split()) - set(usual.split())
            known = {word for _, word in DETAILS}
            if setting.dataset == "digits_lt":  # `conditions` and `division` show these
                known |= {word for _, words, _ in CONDITIONS for word in words.split()}
                known |= {word for _, words in DIVISIONS["division"].rows() for word in words}
            if len(more) == 1 and setting in {changed(s, *more) for s in settings}:
                others |= more - known
    details = [*DETAILS, *((word, word) for word in sorted(others) if not word.startswith("engine."))]
    wanted = [*settings, *(changed(setting, word) for setting in settings for _, word in details)]
    runs, caption, notes = one_dtype(done, wanted)

    def panel(name: str, column: Literal["error_last", "error_few"]) -> Panel:
        row = columns[name]
        rows: list[tuple[str, list[Cell | None]]] = []
        rows.append(("Default configuration (%)", [error_cell(runs, setting, column=column) for setting in row]))
        for label, word in details:
            cells = [paired_cell("difference", runs, changed(s, word), s, column=column) for s in row]
            rows.append((label, [cell if cell.values or _applies(word, cell.setting) else None for cell in cells]))
        few = column == "error_few"
        title = f"{TITLES[name]}, {FEWEST}" if few else TITLES[name]
        return Panel(title, [loss_label(*setting[2:5]) for setting in row], rows, apart=few)

    panels = [panel(name, "error_last") for name in columns] + [panel(name, "error_few") for name in columns]
    for name, row in columns.items():
        rows = {label: [changed(s, word) if _applies(word, s) else None for s in row] for label, word in details}
        panels.append(_balanced(TITLES[name], runs, row, rows))
    return panels, caption, notes


def _balanced(heading: str, runs: Done, row: Sequence[Setting], rows: Mapping[str, Sequence[Setting | None]]) -> Panel:
    """What balancing gains in the default `row`, and in those of `rows`, where None is a change without effect."""
    weighted = [place for place, setting in enumerate(row) if setting.beta]
    lines: list[tuple[str, list[Cell | None]]] = []
    for label, settings in {"Default configuration": row, **rows}.items():
        asked = [settings[place] for place in weighted]
        lines.append((label, [setting and paired_cell("gain", runs, setting, plain(setting)) for setting in asked]))
    columns = [loss_label(*row[place][2:5]) for place in weighted]
    return Panel(f"{heading}, what balancing gains (points)", columns, lines, apart=True)


def condition(words: str, epochs: int) -> Setting:
    """The ablation on digits under one of `CONDITIONS`, but for its loss."""
    return ABLATED_DIGITS._replace(departures=" ".join(sorted(words.split())), epochs=epochs)


def changed(setting: Setting, word: str) -> Setting:
    """With one departure more, or several with blanks between."""
    return setting._replace(departures=" ".join(sorted([*setting.departures.split(), *word.split()])))


def _applies(word: str, setting: Setting) -> bool:
    """Whether the departure changes anything at that loss and beta."""
    if word.startswith("loss.reduction="):
        return setting.beta > 0
    as_it_is = (NO_PRIOR, 'recipe.decay_scope="everything"')  # softmax has neither prior nor exemption
    return not (setting.loss == "softmax" and word in as_it_is)


def conditions(done: Done) -> Table:
    """Under which conditions the two largest changes of the ablation on digits are felt."""
    names = {NO_PRIOR: "no prior", AUTHORS_ORDER: "official stream"}
    asked = [("sigmoid", None, NO_PRIOR), ("focal", 1.0, NO_PRIOR)]
    asked += [("softmax", None, AUTHORS_ORDER), ("focal", 1.0, AUTHORS_ORDER)]
    rows = {
        label: [(condition(words, epochs)._replace(loss=loss, gamma=gamma), word) for loss, gamma, word in asked]
        for label, words, epochs in CONDITIONS
    }
    wanted = [s for row in rows.values() for setting, word in row for s in (setting, changed(setting, word))]
    runs, caption, notes = one_dtype(done, wanted)

    def panel(column: Literal["error_last", "error_few"]) -> Panel:
        few = column == "error_few"
        return Panel(
            f"Digits, change of the error{f' in {FEWEST}' if few else ''} (points)",
            [f"{loss_label(loss, gamma)}, {names[word]}" for loss, gamma, word in asked],
            [
                (label, [paired_cell("difference", runs, changed(s, word), s, column=column) for s, word in row])
                for label, row in rows.items()
            ],
            apart=few,
        )

    errors = [(label, [error_cell(runs, setting) for setting, _ in row[:3]]) for label, row in rows.items()]
    columns = [loss_label(loss, gamma) for loss, gamma, _ in asked[:3]]
    return Table(
        "conditions",
        "When a detail matters: the two largest changes of the ablation on digits under other conditions",
        f"Without class balancing. {_recipe(DIGITS)} where the row says nothing else; every seed draws a subset of its "
        f"own. {caption} Positive is worse.",
        f"{ABLATED} {BOLD}",
        [panel("error_last"), panel("error_few"), Panel("Digits, test error without the change (%)", columns, errors)],
        notes,
    )


def division(name: str, done: Done) -> Table:
    """What undoes dividing by the sum of the drawn weights: the learning rate and the weight decay it amounts to."""
    tried = DIVISIONS[name]
    row = [tried.setting._replace(loss=loss, gamma=gamma) for loss, gamma in tried.losses]
    rows = {label: [functools.reduce(changed, words, setting) for setting in row] for label, words in tried.rows()}
    panels, caption, notes = _on_the_same_seeds(done, row, rows)
    data = TITLES[tried.setting.dataset]
    recipe = f"{_recipe(DIGITS)}; every seed draws a subset of its own. " if name in SUBSET_BY_SEED else ""
    return Table(
        name,
        f"Division by the drawn weights on {data}: what undoes it",
        f"{recipe}{caption} A drawn image has weight {tried.weight} on average, so dividing by the sum of the "
        f"weights multiplies the gradient by {tried.times}; for SGD, a loss k times as large amounts to k times the "
        "learning rate and a k-th of the weight decay. Unless the row says otherwise, the learning rate is 0.1 and the "
        "weight decay 0.0002.",
        ABLATED,
        panels,
        notes,
    )


def ports(done: Done) -> Table:
    """What balancing gains with network and input of most ports to PyTorch, where the default has several seeds."""
    row = [Setting("cifar10_lt", 200.0, "softmax", None, beta) for beta in (0.0, ABLATION_BETAS["cifar10_lt"])]
    rows = {TOGETHER: [changed(setting, AS_MOST_PORTS) for setting in row]}
    panels, caption, notes = _on_the_same_seeds(done, row, rows)
    return Table(
        "ports",
        "Network and input of most ports to PyTorch: what balancing gains with them, CIFAR-10 IF 200",
        f"{caption} The three: the shortcut takes every other pixel, the weights are Kaiming's, the input is scaled by "
        "the mean and deviation of each channel.",
        f"{ABLATED} {BALANCED}",
        panels,
        notes,
    )


def _on_the_same_seeds(
    done: Done, row: Sequence[Setting], rows: Mapping[str, Sequence[Setting]]
) -> tuple[list[Panel], str, list[str]]:
    """Panels of the default `row` and what each of `rows` changes there; which dtype, in a sentence; and notes.

    The rows are compared with one another, so all are of the same seeds: the default has been run with more. Where a
    loss stands in `row` without weights too, a last panel has what balancing gains.
    """
    wanted = [*row, *(setting for settings in rows.values() for setting in settings)]
    runs, caption, notes = one_dtype(done, wanted)
    seeds = [set(map(seed_label, runs[setting])) for setting in wanted if runs.get(setting)]
    common = set.intersection(*seeds) if seeds else set()
    runs = {setting: [run for run in runs.get(setting, []) if seed_label(run) in common] for setting in wanted}
    data = TITLES[row[0].dataset]
    heading = f"{data[0].upper()}{data[1:]}, {factor_label(row[0].imbalance_factor)}"

    def panel(column: Literal["error_last", "error_few"]) -> Panel:
        few = column == "error_few"
        lines = [("Default configuration (%)", [error_cell(runs, setting, column=column) for setting in row])]
        for label, settings in rows.items():
            both = zip(settings, row, strict=True)
            lines.append((label, [paired_cell("difference", runs, s, usual, column=column) for s, usual in both]))
        title = f"{heading}, {FEWEST}" if few else heading
        return Panel(title, [loss_label(*setting[2:5]) for setting in row], lines, apart=few)

    panels = [panel("error_last"), panel("error_few")]
    if any(plain(setting) in row for setting in row if setting.beta):
        panels.append(replace(_balanced(heading, runs, row, rows), apart=False))
    caption += (
        " All rows are of the same seeds. First row: test error (%); others: its change in points, positive is worse."
    )
    return panels, caption, notes


def drop(done: Done) -> Table:
    """The learning rate's first drop moved by epochs: how far an error goes with the state that it falls on."""
    columns = [Setting("cifar10_lt", 200.0, "softmax", None, beta) for beta in (0.0, 0.9999)]
    moved = {
        epoch: [s._replace(departures=f"recipe.milestones=[{epoch:.1f}]", epochs=epoch + AFTER_DROP) for s in columns]
        for epoch in DROPS
    }
    runs, caption, notes = one_dtype(done, [setting for row in moved.values() for setting in row])
    rows = [
        (f"×0.01 at epoch {epoch}, end at {epoch + AFTER_DROP}", [error_cell(runs, setting) for setting in row])
        for epoch, row in moved.items()
    ]
    return Table(
        "drop",
        "Moved drop: how the error depends on the epoch at which the learning rate drops, CIFAR-10 IF 200",
        f"{caption} The official run drops at epoch 160 and again at 180, after which it hardly moves. Up to its "
        "drop, every run of a column is identical to the official run of its seed; a later drop also means more "
        "training before it.",
        f"{ERRORS} {BOLD}",
        [Panel("CIFAR-10, IF 200", [setting_label(setting) for setting in columns], rows)],
        notes,
    )


def table3(done: Done) -> Table:
    """Table 3: the large data sets, top-1 and top-5; and apart, what takes loss and balancing apart."""
    datasets = ("inaturalist2017", "inaturalist2018", "imagenet")
    measured: dict[str, Literal["error_last", "error_top5"]] = {"top1": "error_last", "top5": "error_top5"}
    paper: dict[tuple[Setting, str], float] = {}
    rows: dict[str, dict[str, Setting]] = {}  # label -> data set -> setting
    for row in store.plain_rows(printed.table3()):
        size = "" if row["image_size"] == 224 else f"dataset.image_size={row['image_size']}"
        setting = Setting(row["dataset"], None, row["loss"], row["gamma"], row["beta"], size, row["network"], 90)
        loss = "Softmax" if row["loss"] == "softmax" else f"CB {setting_label(setting)}"
        label = f"{row['network'].replace('resnet', 'ResNet-')}, {loss}, {row['image_size']} px"
        rows.setdefault(label, {})[row["dataset"]] = setting
        paper[setting, row["metric"]] = row["error"]
    # what configs/table/3.yaml adds: the paper's softmax with weights, its focal loss without
    softmax, focal = rows["ResNet-50, Softmax, 224 px"], rows["ResNet-50, CB Focal γ 0.5 β 0.999, 224 px"]
    crossed: dict[str, dict[str, Setting]] = {}
    for name in datasets:
        balanced = softmax[name]._replace(beta=focal[name].beta)
        for setting in (softmax[name], balanced, plain(focal[name]), focal[name]):
            crossed.setdefault(setting_label(setting), {})[name] = setting
    settings = [by_set[name] for by_set in (*rows.values(), *crossed.values()) for name in datasets]
    runs, caption, notes = one_dtype(done, settings)

    def panel(title: str, rows: Mapping[str, Mapping[str, Setting]], apart: bool = False) -> Panel:
        cells = []
        for label, by_set in rows.items():
            asked = [(by_set[name], metric) for name in datasets for metric in measured]
            cells.append((label, [error_cell(runs, s, paper.get((s, m)), measured[m]) for s, m in asked]))
        columns = [f"{TITLES[name].replace('iNaturalist', 'iNat')} top-{k}" for name in datasets for k in (1, 5)]
        return Panel(title, columns, cells, apart)

    return Table(
        "3",
        "Table 3: large data sets",
        caption,
        f"{ERRORS.replace('Test', 'Validation')} {BOLD} {LEGEND}",
        [
            panel("All from scratch, 90 epochs", rows),
            panel("ResNet-50, 224 px: loss and balancing, which the paper changes together", crossed, apart=True),
        ],
        notes,
    )


def setting_of(row: Mapping) -> Setting:
    """That of a row of runs.csv or of the paper's numbers, in the default configuration."""
    return Setting(row["dataset"], row["imbalance_factor"], row["loss"], row["gamma"], row["beta"])


# -- words -------------------------------------------------------------------------------------------------------------


def plural(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n:,} {noun}s"


def _recipe(rest: tuple[str, str, int]) -> str:
    """`ResNet-8, 40 epochs, recipe.batch_size=64`, from the last fields of a setting."""
    departures, model, epochs = rest
    return f"{model.replace('resnet', 'ResNet-')}, {epochs} epochs{', ' if departures else ''}{departures}"


def factor_label(factor: float) -> str:
    return f"IF {factor:g}"


def loss_label(loss: str, gamma: float | None, beta: float = 0.0) -> str:
    """`Focal γ 1.0 β 0.9999`."""
    name = f"Focal γ {gamma:.1f}" if loss == "focal" else loss.capitalize()
    return f"{name} β {beta!r}" if beta else name


def setting_label(setting: Setting) -> str:
    return loss_label(setting.loss, setting.gamma, setting.beta)


def full_label(setting: Setting) -> str:
    """`Focal γ 1.0 on CIFAR-10 IF 100 with recipe.drop=0.1`; the words of the digits' own schedule are left out."""
    network = "" if setting.model in ("resnet32", "resnet8") else f"{setting.model.replace('resnet', 'ResNet-')}, "
    factor = "" if setting.imbalance_factor is None else f" {factor_label(setting.imbalance_factor)}"
    usual = DIGITS[0].split() if setting.dataset == "digits_lt" else []
    departures = [word for word in setting.departures.split() if word not in usual]
    changed = f" with {' '.join(departures)}" if departures else ""
    return f"{network}{setting_label(setting)} on {TITLES.get(setting.dataset, setting.dataset)}{factor}{changed}"
