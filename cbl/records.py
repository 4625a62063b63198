"""A run's folder and its one JSON record, and the flat row that tables are made from.

A folder `outputs/runs/<run_id>/` holds

    result.json     the record: written when the run starts, replaced whole at its end
    metrics.jsonl   one line per epoch
    checkpoint.pt   what a killed run goes on from; gone when the run is done
    model.pt        the final weights
    done            empty, written last: only then is the run done

`result.json` is the record of truth; W&B, runs.csv and the tables are made from it.
"""

import contextlib
import datetime
import functools
import importlib.metadata
import json
import math
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cbl import config, disk
from cbl.errors import UserError

# The columns of runs.csv, in order: type as pandas reads it back, and what it says.
COLUMNS: dict[str, tuple[str, str]] = {
    "run_id": ("str", "name of the run and of its folder"),
    "cell": ("str", "run_id without seeds: runs of one cell may be averaged, others never"),
    "dataset": ("str", "cifar10_lt, cifar20_lt, cifar100_lt, digits_lt, folder, ..."),
    "imbalance_factor": ("Float64", "largest class / smallest as asked for; empty: as on disk"),
    "n_train": ("Int64", "training images"),
    "n_test": ("Int64", "test images"),
    "model": ("str", "network and depth, resnet32"),
    "loss": ("str", "softmax, sigmoid or focal"),
    "gamma": ("Float64", "of the focal loss; empty for the others"),
    "weighting": ("str", "none at beta 0, else effective_number"),
    "beta": ("Float64", "of the effective number"),
    "reduction": ("str", "batch: weighted sum / batch size; weight_sum: / sum of the drawn weights"),
    "overrides": ("str", "every other departure from the defaults, as key=value, separated by spaces"),
    "dtype": ("str", "fp32, tf32 or bf16"),
    "seed": ("Int64", "initial weights, image order, augmentation"),
    "subset_seed": ("Int64", "which images are kept"),
    "epochs": ("Int64", "of the schedule"),
    "steps": ("Int64", "taken"),
    "status": ("str", "done, failed or running (under way, or interrupted)"),
    "error_last": ("Float64", "test error after the last step, %: the headline"),
    "error_best": ("Float64", "lowest test error of all evaluations, %: chosen on the test set"),
    "error_top5": ("Float64", "share of test images whose class is not among the 5 largest logits, %; large sets only"),
    "error_many": ("Float64", "mean error of the classes with many images (`groups` says how they are cut), %"),
    "error_medium": ("Float64", "same, medium"),
    "error_few": ("Float64", "same, few"),
    "groups": ("str", "shots: > 100, 20 to 100, < 20 training images; terciles: thirds of the classes by count"),
    "ece": ("Float64", "15-bin expected calibration error of the softmax of the logits, %"),
    "seconds": ("Float64", "wall time of the run, evaluation included"),
    "images_per_second": ("Float64", "training images / seconds spent on training steps"),
    "device": ("str", "name of the processor or GPU, and what else rounds differently there"),
    "lanes": ("Int64", "runs that shared the device side by side"),
    "subset_hash": ("str", "of the kept images' indices"),
    "commit": ("str", "of the code, + when it had uncommitted changes"),
    "torch": ("str", "version"),
    "started": ("str", "UTC"),
    "failure": ("str", "why a failed run failed"),
}


def folder_of(run: config.Run) -> Path:
    return Path(run.output_dir) / config.run_id(run)


def is_done(folder: Path) -> bool:
    """Raises `UserError` for a folder that may not be looked into."""
    try:
        return (folder / "done").exists()
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}): choose another output_dir.") from None


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Replaces `result.json`: the columns of runs.csv first, in their order."""
    ordered = {name: record[name] for name in COLUMNS if name in record} | record
    disk.write(folder / "result.json", json.dumps(_without_nan(ordered), indent=1, allow_nan=False) + "\n")


def _without_nan(value: Any) -> Any:
    """JSON knows no NaN: what could not be computed is null."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_record(folder: Path) -> dict[str, Any]:
    """The record in `folder`; raises `UserError` when there is none or it cannot be read."""
    path = folder / "result.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} is no run folder: it has no result.json.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): delete the folder and run it again.") from None
    if not isinstance(record, dict) or "run_id" not in record or "config" not in record:
        raise UserError(f"{path} is not the record of a run: it lacks run_id or config.")
    return record


def append_metrics(folder: Path, row: dict[str, Any]) -> None:
    with disk.writing(folder), open(folder / "metrics.jsonl", "a", encoding="utf-8") as handle:
        handle.write(json.dumps(row) + "\n")


def read_metrics(folder: Path, errors: str = "strict") -> list[dict[str, Any]]:
    """Rows of metrics.jsonl; a last line that a kill cut short is left out. `errors` of UTF-8 as for `bytes.decode`."""
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8", errors=errors).splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def rewind_metrics(folder: Path, step: int) -> list[dict[str, Any]]:
    """Drops the rows after `step` (they will be trained again) and returns the others.

    What a machine that went down left behind them, whatever its bytes, goes with them.
    """
    rows = [row for row in read_metrics(folder, errors="replace") if row["step"] <= step]
    disk.write(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def mark_done(folder: Path) -> None:
    """Writes the marker, after which the checkpoint is wanted no more."""
    with disk.writing(folder):
        (folder / "done").touch()
    with contextlib.suppress(OSError):  # done all the same
        (folder / "checkpoint.pt").unlink(missing_ok=True)


def new_record(run: config.Run) -> dict[str, Any]:
    """What is known of a run before its data is read."""
    balanced = run.loss.beta > 0
    return {
        "run_id": config.run_id(run),
        "cell": config.cell(run),
        "dataset": run.dataset.name,
        "imbalance_factor": run.dataset.imbalance_factor,
        "model": config.model_name(run),
        "loss": run.loss.kind,
        "gamma": run.loss.gamma if run.loss.kind == "focal" else None,
        "weighting": "effective_number" if balanced else "none",
        "beta": run.loss.beta,
        "reduction": run.loss.reduction,
        "overrides": " ".join(config.overrides(run)),
        "dtype": run.engine.dtype,
        "seed": run.seed,
        "subset_seed": run.dataset.subset_seed,
        "epochs": run.recipe.epochs,
        "status": "running",
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": config.to_mapping(run),
        **environment(),
    }


def row(record: dict[str, Any]) -> dict[str, Any]:
    """The record as one flat row of runs.csv: every column, None where the record has nothing."""
    return {name: record.get(name) for name in COLUMNS}


def class_mean(record: Mapping[str, Any]) -> float:
    """Mean test error over the classes, in percent: `error_last`, were every class tested on as many images."""
    known = [error for error in record.get("per_class_error") or [] if error is not None]
    return sum(known) / len(known) if known else record["error_last"]


def is_skewed(record: Mapping[str, Any]) -> bool:
    """Whether `class_mean` is another number than `error_last`, as on a test set that is skewed too."""
    return abs(class_mean(record) - record["error_last"]) > 0.005  # of what is printed with two decimals


@functools.cache
def environment() -> dict[str, Any]:
    """Commit and versions: what a result depends on besides its configuration."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "numpy", "hydra-core", "wandb"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {"commit": commit(), "torch": versions.get("torch"), "versions": versions}


@functools.cache
def commit() -> str | None:
    """Short hash of the code's commit, with a + when files differ from it; None outside a checkout."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # not another repository that this was installed into
        # results/ is left out: publishing a run must not make the next one look as if its code had changed
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/results", ":!/README.md")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return None
