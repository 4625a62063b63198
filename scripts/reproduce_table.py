"""Train what a table still lacks, then render it, paper and ours side by side.

python scripts/reproduce_table.py                                  # the embedded table, minutes on a CPU
python scripts/reproduce_table.py --table 2 --seeds 0,1,2 --dry    # what would be trained, and how long it takes here
python scripts/reproduce_table.py --table 2 --budget 3600          # stop cleanly within the hour; again to go on
"""

import argparse
import dataclasses
import functools
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from command_line import one_line, output_folder, results_folder
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from cbl import config, disk, records, store
from cbl.engine.train import exit_status, train
from cbl.errors import UserError
from hydra_plugins.cbl_launcher import compose_jobs

ROOT = Path(__file__).resolve().parent.parent
TABLES = sorted(path.stem for path in (ROOT / "configs/table").glob("*.yaml"))


def plan(table: str, seeds: Sequence[int], extra: Sequence[str] = ()) -> list[config.Run]:
    """The distinct runs of configs/table/<table>.yaml, seed by seed, so that an early end leaves whole seeds."""
    return distinct(run for run, _ in plan_pairs(table, seeds, extra))


def distinct(runs: Iterable[config.Run]) -> list[config.Run]:
    """Of those that are the same, the first."""
    found: dict[str, config.Run] = {}
    for run in runs:
        found.setdefault(config.run_id(run), run)
    return list(found.values())


def plan_pairs(table: str, seeds: Sequence[int], extra: Sequence[str]) -> list[tuple[config.Run, config.Run]]:
    """What is to be trained, and for which run of the table: the same without `extra`."""
    described = OmegaConf.to_container(OmegaConf.load(ROOT / f"configs/table/{table}.yaml"))
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        jobs: list[list[str]] = []
        for sweep in described["sweeps"]:
            for detail in [[], *([d] if isinstance(d, str) else d for d in described.get("details", []))]:
                jobs += _expand([*sweep, *detail])
        further = _expand(list(extra))
        words = [(job, more, f"seed={seed}") for seed in seeds for job in jobs for more in further]
        runs = _composed([[*job, *more, seed] for job, more, seed in words])
        of_table = _composed([[*job, seed] for job, _, seed in words]) if extra else runs
        return list(zip(runs, of_table, strict=True))


def _composed(jobs: list[list[str]]) -> list[config.Run]:
    runs = []
    for job, run in compose_jobs(lambda overrides: _compose(tuple(overrides)), jobs):
        if isinstance(run, UserError):
            raise UserError(f"{' '.join(job)}: {run}")
        runs.append(run)
    return runs


@functools.cache  # the runs with and without `extra` differ in plain values, mostly
def _compose(overrides: tuple[str, ...], hydra: bool = False) -> DictConfig:
    return compose("train", list(overrides), return_hydra_config=hydra)


def _expand(overrides: list[str]) -> list[list[str]]:
    """As -m would: the product of all comma lists, those of a named sweep included."""
    named = tuple(o for o in overrides if o.startswith("sweep="))
    parameters = _compose(named, hydra=True).hydra.sweeper.params or {}
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    parsed = parser.parse_overrides([*(f"{key}={value}" for key, value in parameters.items()), *overrides])
    return BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]


def say_plan(runs: Sequence[config.Run], done: set[str]) -> None:
    begun = failed = 0
    for run in runs:
        name = config.run_id(run)
        folder = records.folder_of(run)
        state = "done" if name in done else "to do"
        if state != "done" and (folder / "result.json").exists():
            try:
                state = "failed" if records.read_record(folder)["status"] == "failed" else "half done"
            except UserError:  # it cannot be read: said when its turn comes
                state = "failed"
            begun, failed = begun + (state == "half done"), failed + (state == "failed")
    print(
        f"{len(runs)} runs: {len(done)} done, {begun} half done, {failed} failed before, "
        f"{len(runs) - len(done) - begun - failed} not begun."
    )


def main() -> int:
    began = time.monotonic()
    asked = arguments()
    if any(word.lstrip("+").startswith("output_dir=") for word in asked.set):
        raise UserError("--set output_dir=… would part the runs from the table: give the folder of the runs as --runs.")
    if any(word.lstrip("+").startswith("seed=") for word in asked.set):
        raise UserError("--set seed=… is not for a table: give its seeds as --seeds (make: SEEDS=).")
    pairs = plan_pairs(asked.table, asked.seeds, [f"engine.device={asked.device}", *asked.set])
    one_in_a_place(pairs)
    planned = distinct(run for run, _ in pairs)
    runs = [dataclasses.replace(run, output_dir=asked.runs) for run in planned]  # not an override: any path will do
    published = store.load(results_folder(asked.results)) if asked.reuse else None
    known = set() if published is None else set(published.runs.query("status == 'done'").run_id)
    done = {
        config.run_id(run) for run in runs if config.run_id(run) in known or records.is_done(records.folder_of(run))
    }
    say_plan(runs, done)
    missing = [run for run in runs if config.run_id(run) not in done]

    from cbl.engine import advice, estimate, processes  # torch only now: a wrong argument is refused at once

    if processes.count([run for run in runs if run.dataset.name not in config.LARGE]) > 1:
        missing = [one_thread(run) for run in missing]
    if missing and (asked.dry or asked.budget is not None or len(missing) > 1):
        each = estimate.seconds(missing)
        if asked.dry:
            for run, taken in zip(missing, each, strict=True):
                print(f"  {_spoken(taken):>14}  {config.run_id(run)}")
        print(f"About {_spoken(sum(each))} of training on this machine, from a short measurement.", flush=True)
    if asked.dry:
        advice.advise(missing, print)
        return 0
    output_folder(asked.out / "tables")  # refused before the training, not after
    deadline = float("inf") if asked.budget is None else began + asked.budget
    ended = train(missing, deadline) if missing else []
    if left := sum(record["status"] == "running" for record in ended):
        print(f"{left} of {len(runs)} runs are left: the same command goes on with them.")
    render(asked, published, pairs)
    return exit_status(ended)


def one_thread(run: config.Run) -> config.Run:
    """Unless set, as of all runs of a sweep on the CPU; the last one left too: more threads add in another order."""
    if run.dataset.name in config.LARGE:
        return run
    return dataclasses.replace(run, engine=dataclasses.replace(run.engine, threads=run.engine.threads or 1))


def render(
    asked: argparse.Namespace, published: store.Store | None, pairs: Sequence[tuple[config.Run, config.Run]]
) -> None:
    """The table from the run folders, and from published runs where these count; shown, and written under --out."""
    from cbl.report import formats, page, tables

    held = store.read_folders([asked.runs] if Path(asked.runs).is_dir() else [])
    if published is not None:
        held = store.merge(published, held)
    for warning in held.warnings:
        print(warning, file=sys.stderr)
    words = dict.fromkeys(word for run, official in pairs for word in config.changes(run, official))
    changed = tuple(word for word in words if not word.startswith("engine.dtype="))
    wanted, others = as_in_the_table(held.runs, pairs, further=not changed)  # what else somebody ran has places too
    table = tables.build(asked.table, wanted, prepared_counts(asked.set) if asked.table == "1" else None)
    table = dataclasses.replace(
        table,
        caption=f"{table.caption} Set for every run: {' '.join(changed)}." if changed else table.caption,
        notes=[*table.notes, *others],
        changed=changed,
    )
    formats.show(table)
    written = formats.write(table, asked.out / "tables")
    html = asked.out / f"{written[0].stem}.html"
    disk.write(html, page.page({asked.table: table}, held.runs))
    print("Written:", *written, html)


def prepared_counts(overrides: Sequence[str]) -> dict[str, list[int]]:
    """Training images per class of the large sets that are prepared under dataset.root, for Table 1."""
    from cbl.data import index

    given = [word.partition("=")[2] for word in overrides if word.lstrip("+").startswith("dataset.root=")]
    root = Path(given[-1] if given else config.Dataset().root).expanduser()
    there = [name for name in config.LARGE if index.prepared(root / name) is not None]
    return {name: index.read(root, name, "train").counts.tolist() for name in there}


def one_in_a_place(pairs: Sequence[tuple[config.Run, config.Run]]) -> None:
    """Raises `UserError` when --set makes several runs of one of the table's, or one of several cells."""
    found: dict[tuple[str, str], str] = {}
    cells: dict[str, tuple[Any, ...]] = {}
    for run, official in pairs:
        name, record = config.run_id(run), records.new_record(official)
        # not the other columns: of an ablation, what is changed may be what --set changes everywhere
        cell = tuple(record[key] for key in ("dataset", "imbalance_factor", "model", "loss", "gamma", "beta"))
        if cells.setdefault(name, cell) != cell:
            raise UserError(
                f"--set makes one run of several cells of the table ({name}): leave out what they differ in, or train "
                "that run with python scripts/train.py."
            )
        if found.setdefault((config.run_id(official), run.engine.dtype), name) != name:
            raise UserError(
                f"--set makes several runs of one of the table's ({config.run_id(official)}): give one value for each "
                "key; python scripts/train.py -m sweeps."
            )


def as_in_the_table(
    runs: pd.DataFrame, pairs: Sequence[tuple[config.Run, config.Run]], further: bool
) -> tuple[pd.DataFrame, list[str]]:
    """The runs asked for, of any seed, in the places that they take in the table; notes on those in other dtypes.

    A table looks for its own settings: without this it would not find those that --set has changed. With `further`
    there are those of all other settings too.
    """

    def settings(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in store.SETTING)

    rows = store.plain_rows(runs)
    dtypes = {run.engine.dtype for run, _ in pairs}
    places: dict[tuple[Any, ...], dict[tuple[Any, ...], None]] = {}
    for run, official in pairs:
        places.setdefault(settings(records.new_record(run)), {})[settings(records.new_record(official))] = None
    found = [
        row | dict(zip(store.SETTING, place, strict=True))
        for row in rows
        if row["dtype"] in dtypes
        for place in places.get(settings(row), [settings(row)] if further else ())
    ]
    count = Counter(
        row["dtype"]
        for row in rows
        if row["dtype"] not in dtypes and row["status"] == "done" and settings(row) in places
    )
    notes = [f"{n} done run{'s' * (n != 1)} in {dtype} left out: not asked for." for dtype, n in sorted(count.items())]
    return pd.DataFrame(found, columns=runs.columns), notes


def _spoken(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:,.1f} hours"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=TABLES, default="digits", help="which table (default: digits)")
    parser.add_argument(
        "--seeds", type=seed_list, default=[0, 1, 2], help="comma list, with ranges such as 0-19 (default: 0,1,2)"
    )
    parser.add_argument("--dry", action="store_true", help="list the runs and the hours, train nothing")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="end cleanly by then, everything done kept")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--reuse", action="store_true", help="take published rows of results/runs.csv as done")
    parser.add_argument("--runs", default="outputs/runs", help="where the run folders are (default: outputs/runs)")
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="where the table goes (default: outputs)")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="the published runs, for --reuse")
    parser.add_argument(
        "--set", nargs="*", action="extend", default=[], metavar="KEY=VALUE", help="further overrides for every run"
    )
    return parser.parse_args()


def seed_list(text: str) -> list[int]:
    """`0,2` and `0-19`, both in one list if need be."""
    seeds: list[int] = []
    for part in text.split(","):
        if not (found := re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)):
            raise argparse.ArgumentTypeError(f"'{text}' is no list of whole numbers such as 0,1,2 or 0-19")
        first, last = int(found[1]), int(found[2] or found[1])
        if last < first:
            raise argparse.ArgumentTypeError(f"'{part}' is no range: write {last}-{first}")
        seeds += range(first, last + 1)
    return seeds


if __name__ == "__main__":
    with one_line():
        sys.exit(main())
