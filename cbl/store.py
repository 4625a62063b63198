"""From run folders, of one machine or several, or a W&B project to the published runs under results/.

    runs.csv       one row per run, columns as `records.COLUMNS`; others that somebody added are kept to the right
    per_class.csv  one row per run and class
    curves.csv     at most 50 evaluations of each run, the last among them; all epochs stay in its metrics.jsonl

All three are sorted by setting and seed and written in one fixed form, so that a diff shows what is new, nothing else.
"""

import io
import math
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain, product
from pathlib import Path
from typing import Any

import pandas as pd

from cbl import disk, records, tracking
from cbl.errors import UserError

RUNS = {name: kind for name, (kind, _) in records.COLUMNS.items()}
PER_CLASS = {"run_id": "str", "class_index": "Int64", "class_name": "str", "n_train": "Int64", "error": "Float64"}
CURVES = {
    "run_id": "str",
    "epoch": "Float64",
    "step": "Int64",
    "lr": "Float64",
    "train_loss": "Float64",
    "test_error": "Float64",
}
POINTS = 50  # of a published curve: as many as a figure can show
# What runs that may take one place in a table share; seeds and dtype apart.
SETTING = [
    "dataset", "imbalance_factor", "model", "loss", "gamma", "weighting", "beta", "reduction", "overrides", "epochs",
]  # fmt: skip
_ORDER = ["dataset", "imbalance_factor", "model", "loss", "gamma", "beta", "reduction", "overrides", "epochs", "dtype"]
_ORDER += ["seed", "subset_seed", "run_id"]
_RANK = {"running": 0, "failed": 1, "done": 2}  # of two readings of a run the higher status counts
_LINE_END = r"\r\n?", "\n"
_PERCENT = {name for name in RUNS if name.startswith("error_")} | {"ece", "error", "test_error"}


@dataclass(frozen=True)
class Store:
    """Runs and what is known of them; numbers that a run lacks are NA, texts empty.

    runs: columns of `records.COLUMNS`, then foreign ones as text; one row per run_id, sorted.
    per_class: run_id, class_index, class_name, n_train (images), error (%).
    curves: run_id, epoch, step, lr, train_loss, test_error (%; NA where the epoch was not evaluated).
    warnings: what could not be read, or contradicts what is there, one sentence each.
    """

    runs: pd.DataFrame
    per_class: pd.DataFrame
    curves: pd.DataFrame
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Published:
    """What `publish` did: the store as it is now, and how many of the given runs were what."""

    store: Store
    added: int  # not there before
    changed: int  # there, but failed until now or with empty cells that are now filled
    kept: int  # there, and left as it was
    unfinished: int  # under way or interrupted: left out


# -- reading -----------------------------------------------------------------------------------------------------------


def read_folders(paths: Iterable[Path | str]) -> Store:
    """All runs in `paths`, each a run folder or a folder of run folders (outputs/runs, or another machine's).

    Runs under way are among them, with status running. A record that cannot be read costs a warning, not the others.
    Raises `UserError` for a path that does not exist or cannot be read.
    """
    store = _store([])
    for path in map(Path, paths):
        try:
            if not path.is_dir():
                raise UserError(
                    f"{path} is no folder: train a run first, or give the folder that runs were written to."
                )
            folders = [path] if (path / "result.json").exists() else sorted(path.iterdir())
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror or error}): mend it, or give another folder."
            ) from None
        found, skipped = [], []
        for folder in folders:
            try:
                if (folder / "result.json").exists():
                    record, metrics = records.read_record(folder), records.read_metrics(folder)
                    found.append(_one_run(record, metrics, records.is_done(folder)))
            except UserError as error:
                skipped.append(f"Skipped: {error}")
            except (OSError, ValueError, TypeError) as error:
                reason = getattr(error, "strerror", None) or error
                skipped.append(f"Skipped: {folder} cannot be read ({reason}).")
        store.warnings.extend(skipped if found or skipped else [f"{path} holds no runs."])
        store = merge(store, _store(found))
    return store


def from_wandb(project: str, api: Any = None) -> Store:
    """All runs of the W&B project "entity/project" that `cbl.tracking` logged, as `read_folders` reads their folders.

    api: a `wandb.Api`; by default one made from the login of this machine. Runs that something else logged there are
    passed over with a warning. Raises `UserError` when W&B cannot be reached, or not with this login.
    """
    try:
        import wandb  # here: it takes a second, and reading folders does not need it
    except ImportError:
        raise UserError("W&B is not installed: `pip install wandb` brings it.") from None

    if project.count("/") != 1 or not all(project.split("/")):
        raise UserError(f"'{project}' is no W&B project: write entity/project, as in its address.")
    try:
        pages = [
            (page.name, {"status": "running"} | dict(page.config) | dict(page.summary), list(page.scan_history()))
            for page in (api or wandb.Api()).runs(project)
        ]
    except (wandb.errors.Error, OSError, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"W&B gave no runs of {project} ({reason}): check the name and `wandb login`.") from None
    store = _store([])
    found = []
    for name, record, history in pages:
        metrics = [
            {key: row.get(name) for key, name in tracking.METRICS.items()} | {"step": row["_step"]} for row in history
        ]
        try:
            found.append(_one_run(record, metrics, done=record["status"] == "done"))
        except UserError as error:
            store.warnings.append(f"Skipped: the page {name}: {error}")
    return merge(store, _store(found))


def load(results: Path | str) -> Store:
    """The published runs in the folder `results`; a store without rows when there are none.

    Raises `UserError` when runs.csv has been damaged.
    """
    results = Path(results)
    runs = _read_csv(results / "runs.csv", RUNS)
    stray = runs["run_id"][(runs["cell"] == "") | ~runs["status"].isin(["done", "failed"])]
    if len(stray):
        raise UserError(f"{results / 'runs.csv'} has a row '{stray.iloc[0]}' that is no published run: delete it.")
    twice = runs["run_id"][runs["run_id"].duplicated()]
    if len(twice):
        raise UserError(f"{results / 'runs.csv'} has {twice.iloc[0]} in two rows: delete one of them.")
    return _sorted(runs, _read_csv(results / "per_class.csv", PER_CLASS), _read_csv(results / "curves.csv", CURVES))


# -- merging and publishing --------------------------------------------------------------------------------------------


def merge(old: Store, new: Store) -> Store:
    """Both by run_id. A done run beats a failed one, that one under way; of two done the old stays, else the new.

    Two done records with different errors (of two machines, or trained again) are warned of. Two readings of one and
    the same training complete each other, and the newer of two failures takes from the older what it leaves blank.
    Foreign columns stay with their runs. The warnings are those of both.
    """
    rows = {row["run_id"]: row for row in plain_rows(old.runs)}
    warnings = [*old.warnings, *new.warnings]
    taken: set[str] = set()  # runs whose details come from new where old has none
    replaced: set[str] = set()  # runs whose details come from new at all events
    for row in plain_rows(new.runs):
        name = row["run_id"]
        there = rows.setdefault(name, row)
        if there is row:
            taken.add(name)
        elif row["status"] == "done" == there["status"]:
            if row["error_last"] != there["error_last"]:
                warnings.append(
                    f"{name} was run twice, with errors {_text(there['error_last'])} and {_text(row['error_last'])} %: "
                    "the first is kept; to take the other, delete the first from runs.csv, or its folder."
                )
            elif all(row[key] == there[key] for key in ("started", "device")):
                taken.add(name)
                rows[name] = row | {key: value for key, value in there.items() if value not in (None, "")}
        elif _RANK[row["status"]] >= _RANK[there["status"]]:
            replaced.add(name)
            failed_again = row["status"] == "failed" == there["status"]
            blank = {key for key, value in row.items() if failed_again and value in (None, "")}
            rows[name] = row | {key: value for key, value in there.items() if key not in RUNS or key in blank}

    def details(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
        before = before[~before["run_id"].isin(replaced)]
        after = after[after["run_id"].isin((taken | replaced) - set(before["run_id"]))]
        return pd.concat([before, after])

    columns = list(dict.fromkeys([*RUNS, *old.runs.columns, *new.runs.columns]))
    runs = _typed(pd.DataFrame(list(rows.values()), columns=columns), RUNS)
    return _sorted(runs, details(old.per_class, new.per_class), details(old.curves, new.curves), warnings)


def publish(new: Store, results: Path | str) -> Published:
    """Merges the done and failed runs of `new` into the published ones in the folder `results`.

    Files are replaced whole, runs.csv last, under a lock: of several processes that publish at once each adds its runs.
    """
    results = Path(results)
    ended = new.runs[new.runs["status"].isin(["done", "failed"])]
    given = _sorted(ended, new.per_class, _thin(new.curves), new.warnings)
    while True:
        with disk.alone(results, "--results") as mine:
            if mine:
                old = load(results)
                store = merge(old, given)
                for name in ("per_class", "curves", "runs"):
                    _write(results / f"{name}.csv", _csv(getattr(store, name)))
                _write(results / "README.md", readme())
                break
        time.sleep(0.05)
    before, after = ({row["run_id"]: row for row in plain_rows(runs)} for runs in (old.runs, store.runs))
    known = [name for name in ended["run_id"] if name in before]
    changed = sum(before[name] != after[name] for name in known)
    return Published(
        store=store,
        added=len(ended) - len(known),
        changed=changed,
        kept=len(known) - changed,
        unfinished=len(new.runs) - len(ended),
    )


def summarise(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per `cell` over its done runs: what its runs share, then n, mean, sd, best_mean, best_sd, seeds, run_ids.

    mean and sd (n - 1; NA for one run) are of error_last, best_* of error_best, in %. seeds: list of (seed,
    subset_seed). Runs of different cells are never averaged.
    """
    shared = [*SETTING, "dtype"]
    done = runs[(runs["status"] == "done") & runs["error_last"].notna()]
    rows = []
    for cell, group in done.groupby("cell", sort=False):
        rows.append(
            {"cell": cell, **group.iloc[0][shared].to_dict()}
            | {"n": len(group), "mean": group["error_last"].mean(), "sd": group["error_last"].std()}
            | {"best_mean": group["error_best"].mean(), "best_sd": group["error_best"].std()}
            | {"seeds": list(zip(group["seed"], group["subset_seed"], strict=True)), "run_ids": list(group["run_id"])}
        )
    numbers = {"n": "Int64"} | dict.fromkeys(("mean", "sd", "best_mean", "best_sd"), "Float64")
    columns = ["cell", *shared, *numbers, "seeds", "run_ids"]
    kinds = {name: RUNS[name] for name in ("cell", *shared)} | numbers
    return pd.DataFrame(rows, columns=columns).astype(kinds)


def plain_rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain dicts, None for NA."""
    return frame.astype("object").where(frame.notna(), None).to_dict("records")


def readme() -> str:
    """results/README.md: what the published files hold."""
    lines = [f"| {name} | {kind} | {text} |" for name, (kind, text) in records.COLUMNS.items()]
    return "\n".join(
        [
            "# Published runs",
            "",
            "Written by `make collect`, from the folders of the runs. Only runs.csv may be edited: rows may be",
            "deleted, and columns of your own added, which are kept. `cbl.store.load('results')` reads the files;",
            "the types below are pandas' names. Errors are in percent.",
            "",
            "| file | one row per | columns |",
            "| --- | --- | --- |",
            "| runs.csv | run | below |",
            f"| per_class.csv | run and class | {', '.join(PER_CLASS)} |",
            f"| curves.csv | run and evaluation, at most {POINTS} of a run | {', '.join(CURVES)} |",
            "| paper/ | | the paper's own numbers, described there |",
            "| tables/, figures/, index.html | | made of these files by `make tables` and `make figures` |",
            "| details.md | | which details decide, as these runs show it: written by hand |",
            "| bench/ | | what `make bench` measured, per device and day: .json, and made of it .md, .png and .svg |",
            "",
            "## Columns of runs.csv",
            "",
            "| column | type | what it says |",
            "| --- | --- | --- |",
            *lines,
            "",
        ]
    )


# -- parts -------------------------------------------------------------------------------------------------------------


def _one_run(record: dict[str, Any], metrics: list[dict[str, Any]], done: bool) -> tuple[dict, list[dict], list[dict]]:
    """Row, rows of per_class, rows of curves. Raises `UserError` for a record with values of a wrong type."""
    row = records.row(record)
    name = row["run_id"]
    for key, value in row.items():
        wanted = {"str": str, "Int64": int, "Float64": int | float}[RUNS[key]]
        missing = value is None and key in ("run_id", "cell")
        if missing or not isinstance(value, wanted | None) or (key == "status" and value not in _RANK):
            raise UserError(f"a record of {name} has {key} = {value!r}, which no run of this project writes.")
    if row["status"] == "done" and not done:
        row["status"] = "running"  # killed at the very end: it will go on and end again
    lists = [record.get(key) or [] for key in ("class_names", "class_counts", "per_class_error")]
    per_class = [
        {"run_id": name, "class_index": index, "class_name": label, "n_train": count, "error": error}
        for index, (label, count, error) in enumerate(zip(*lists, strict=False))
    ]
    if strange := [point for point in metrics if not isinstance(point, dict)]:
        raise UserError(f"the metrics of {name} have a row {strange[0]!r}, which no run of this project writes.")
    curves = [{key: point.get(key) for key in CURVES} | {"run_id": name} for point in metrics if "step" in point]
    for details, kinds in ((per_class, PER_CLASS), (curves, CURVES)):
        for one, (key, kind) in product(details, kinds.items()):
            if not _fits(one[key], kind):
                raise UserError(f"{name} has {key} = {one[key]!r} in its details, which no run of this project writes.")
    return row, per_class, curves


def _fits(value: Any, kind: str) -> bool:
    """Whether `_typed` takes it: a number, or a text of one, as "NaN" in what W&B gives."""
    if kind == "str" or value is None:
        return True
    try:
        number = float(value)
    except (TypeError, ValueError):
        return False
    return kind == "Float64" or number.is_integer()


def _store(found: list[tuple[dict, list[dict], list[dict]]]) -> Store:
    """Of what `_one_run` gave; a run that is there twice (a copied folder, two W&B pages) is merged with itself."""
    first: dict[str, tuple] = {}
    again = [one for one in found if first.setdefault(one[0]["run_id"], one) is not one]
    rows, per_class, curves = zip(*first.values(), strict=True) if first else ((), (), ())
    store = _sorted(_frame(rows, RUNS), _frame(chain(*per_class), PER_CLASS), _frame(chain(*curves), CURVES))
    return merge(store, _store(again)) if again else store


def _frame(rows: Iterable[dict[str, Any]], kinds: dict[str, str]) -> pd.DataFrame:
    return _typed(pd.DataFrame(list(rows), columns=list(kinds)), kinds)


def _typed(frame: pd.DataFrame, kinds: dict[str, str]) -> pd.DataFrame:
    """The columns of `kinds`, added where missing, then the foreign ones as text; rounded to what is published.

    Lines of a text end with \\n: pandas leaves a lone \\r unquoted, and reads it back as the end of a row.
    Raises ValueError or TypeError for a text where a number belongs, and a fraction where a whole one does.
    """
    frame = frame.rename(columns=lambda name: re.sub(*_LINE_END, name))
    columns = {}
    for name in dict.fromkeys([*kinds, *frame.columns]):
        kind = kinds.get(name, "str")
        column = frame[name] if name in frame else pd.Series(None, index=frame.index, dtype="object")
        if kind == "str":
            text = column.astype("object").where(column.notna(), "").astype("str")
            columns[name] = text.str.replace(*_LINE_END, regex=True)
            continue
        column = pd.to_numeric(column.replace("", None)).astype(kind)
        if name in _PERCENT:
            column = column.round(4)
        elif name == "epoch":
            column = column.round(3)
        elif name in ("lr", "train_loss"):
            column = column.map(lambda value: float(f"{value:.6g}"), na_action="ignore").astype(kind)
        columns[name] = column
    return pd.DataFrame(columns, index=frame.index)


def _sorted(runs: pd.DataFrame, per_class: pd.DataFrame, curves: pd.DataFrame, warnings: Iterable[str] = ()) -> Store:
    """In the published order; what belongs to no run of `runs` is dropped."""
    runs = runs.sort_values(_ORDER, ignore_index=True)
    place = {name: number for number, name in enumerate(runs["run_id"])}

    def follow(frame: pd.DataFrame, within: str) -> pd.DataFrame:
        frame = frame[frame["run_id"].isin(place)]
        frame = frame.assign(place=frame["run_id"].map(place)).sort_values(["place", within], ignore_index=True)
        return frame.drop(columns="place")

    return Store(runs, follow(per_class, "class_index"), follow(curves, "step"), list(warnings))


def _thin(curves: pd.DataFrame) -> pd.DataFrame:
    """Evaluations only, of each run every k-th counted from its last."""
    evaluated = curves[curves["test_error"].notna()]
    from_last = evaluated.groupby("run_id").cumcount(ascending=False)
    size = evaluated.groupby("run_id")["step"].transform("size")
    return evaluated[from_last % (-(-size // POINTS)) == 0]


def _read_csv(path: Path, kinds: dict[str, str]) -> pd.DataFrame:
    try:
        frame = pd.read_csv(path, dtype="str", keep_default_na=False)
        if "run_id" not in frame:
            raise ValueError("it has no column run_id")
        return _typed(frame, kinds)
    except FileNotFoundError:
        return _frame([], kinds)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): mend it.") from None
    except (ValueError, TypeError) as error:  # pandas' own errors among them
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"{path} is damaged ({reason}): mend it, or take an older version from git.") from None


def _csv(frame: pd.DataFrame) -> str:
    text = io.StringIO()
    frame.apply(lambda column: column.astype("object").map(_text)).to_csv(text, index=False, lineterminator="\n")
    return text.getvalue()


def _text(value: Any) -> str:
    """The shortest text that reads back to the same value: 100 rather than 100.0."""
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _write(path: Path, text: str) -> None:
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        disk.write(path, text)
