"""Evaluate a trained network on the whole test set: error, per class and by groups of classes, confusion, calibration.

    python scripts/evaluate.py run=outputs/runs/<run_id>
    python scripts/evaluate.py run=outputs/runs/<run_id>/checkpoint.pt --json
    python scripts/evaluate.py run=exports/<run_id>                             # what scripts/export.py wrote

Data and network are made again from the record in the run folder, or in the header of exported weights. A run that is
not done is evaluated at its last checkpoint. All errors and confidences are in percent.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command_line import one_line

from cbl import config, records
from cbl.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from cbl.engine import job, streaming

IN_FULL = 20  # classes up to which the confusion matrix is shown whole
PAIRS = 20  # most confused pairs that are shown instead above that
OF_RUNS = ("model.pt", "checkpoint.pt")
LISTED = 200  # classes up to which each has a line
LEFT = ("group", "class", "true class", "predicted class")  # columns of words; those of numbers stand to the right
DEFINED_AS = {
    "terciles": "thirds of the classes by training images",
    "shots": "more than 100, 20 to 100, fewer than 20 training images",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder or exported folder, or weights in one; run= may be left out")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--data", metavar="ROOT", help="where the data is (default: dataset.root of the record)")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    arguments = parser.parse_args()

    found = evaluate_run(Path(arguments.run.removeprefix("run=")), arguments.device, arguments.data)
    if arguments.json:
        print(json.dumps(found, indent=1, allow_nan=False))
    else:
        show(found)


def evaluate_run(path: Path, device: str, data_root: str | None) -> dict[str, Any]:
    """Everything that is printed, as plain data; raises `UserError` for a folder, data or a device that will not do."""
    folder, weights = locate(path)
    record = records.read_record(folder) if weights.name in OF_RUNS else exported(weights)[0]
    run = config.from_mapping(record["config"])
    run = dataclasses.replace(run, engine=dataclasses.replace(run.engine, device=device, capture=False, compile=False))
    if data_root is not None:  # nothing is to be downloaded to where somebody says that the data is
        run = dataclasses.replace(run, dataset=dataclasses.replace(run.dataset, root=data_root, download=False))
    ready = prepare(run, record)
    if ready.facts["class_names"] != record.get("class_names", ready.facts["class_names"]):
        raise UserError(
            f"The classes under {run.dataset.root} are not those that {record['run_id']} was trained on: "
            "give the data of that run with --data."
        )
    # of final weights the record says the step: with other images here `ready.last_step` would be another
    step, last_step = restore(ready, weights), ready.last_step
    if step is None:
        step = last_step = record.get("steps") or ready.last_step
    measured = streamed(run, ready, record) if run.dataset.name in config.LARGE else resident(ready)
    error, recorded, n = measured.pop("error_last"), recorded_error(record, weights, step), measured["n_test"]
    notes = []
    if ready.facts["subset_hash"] != record.get("subset_hash", ready.facts["subset_hash"]):
        notes.append(
            "The training images here are not those of the record; their counts and weights are those found here."
        )
    elif ready.facts.get("content_hash") != record.get("content_hash", ready.facts.get("content_hash")):
        notes.append("Some of the images here are not those of the record.")
    of_others = bool(notes)
    if step < last_step:
        notes.append(f"The run is not done: these are its weights after step {step:,} of {last_step:,}.")
    apart = None if recorded is None or of_others else round(abs(error - recorded) * n / 100)
    if of_others and recorded is not None:
        notes.append(f"The record's error, {recorded:.2f} %, is of its own images.")
    if apart:
        notes.append(
            f"The record says {recorded:.2f} %, {apart} of {n:,} images apart. A few are to be expected on "
            f"another device or version of torch (trained on: {record.get('device')}, torch {record.get('torch')})."
        )
    return {
        "run_id": record["run_id"],
        "status": record["status"],
        "weights": str(weights),
        "step": step,
        "last_step": last_step,
        "notes": notes,
        "error": error,
        "error_class_mean": records.class_mean({"error_last": error, **measured}),
        "error_recorded": recorded,
        "images_apart": apart,
        **measured,
        **{
            name: ready.facts[name]
            for name in ("class_names", "class_counts", "class_weights", "n_train", "parameters")
        },
        "trained_on": record.get("device"),
        "evaluated_on": ready.facts["device"],
        "config": config.to_mapping(run),
    }


def locate(path: Path) -> tuple[Path, Path]:
    """The folder and the weights in it that `path` means, which names either; final weights before a checkpoint."""
    if path.is_file() and (path.name in OF_RUNS or path.suffix == ".safetensors"):
        return path.parent, path
    for name in (*OF_RUNS, "model.safetensors"):
        if (path / name).is_file():
            return path, path / name
    if (path / "result.json").is_file():
        raise UserError(f"{path} has no weights, neither model.pt nor checkpoint.pt: train the run first.")
    raise UserError(
        f"{path} is no run: give a folder such as outputs/runs/<run_id>, or its model.pt or checkpoint.pt, or one that "
        "scripts/export.py wrote."
    )


def exported(weights: Path) -> tuple[dict[str, Any], dict[str, "Tensor"]]:
    """The record of the run, as far as exported weights hold it, and the weights."""
    from cbl import export

    return export.read(weights)


def prepare(run: config.Run, record: dict[str, Any]) -> "job.Job | streaming.Job":
    """Data and network of the run, ready on its device."""
    # after what a user can get wrong: torch takes seconds to import
    from cbl.engine import distributed, job
    from cbl.engine.device import choose_device

    device = choose_device(run.engine)
    if run.dataset.name in config.LARGE:
        from cbl.engine import streaming

        return streaming.prepare(run, distributed.World(0, 1, device))
    ready = job.prepare(run, device)
    if record.get("input", {}).get("mean"):  # exported weights bring their own, whatever training images lie here
        scaling = ready.step.scaling
        scaling.mean, scaling.std = (scaling.mean.new_tensor(record["input"][name]) for name in ("mean", "std"))
    return ready


def restore(ready: "job.Job | streaming.Job", weights: Path) -> int | None:
    """Puts the weights into the network; returns a checkpoint's step, None for final weights."""
    from cbl import export
    from cbl.engine import checkpoint

    try:
        if weights.name == "checkpoint.pt":
            return checkpoint.load(weights.parent, ready.model, ready.optimizer)["step"]
        tensors = export.read_weights(weights) if weights.name == "model.pt" else exported(weights)[1]
        ready.model.load_state_dict(tensors)
        return None
    except RuntimeError:
        said_by = "result.json beside it" if weights.name in OF_RUNS else "its header"
        raise UserError(f"{weights} does not fit the network that {said_by} describes.") from None


def resident(ready: "job.Job") -> dict[str, Any]:
    """What is measured on a test set whose logits fit in memory."""
    from cbl.engine import evaluate

    logits, target = ready.predict().cpu(), ready.test_labels.cpu()
    return {
        **evaluate.measure(logits, target, ready.images.counts),
        "n_test": len(target),
        "test_counts": target.bincount(minlength=logits.shape[1]).tolist(),
        "confusion": evaluate.confusion(logits, target).tolist(),  # row: true class, column: predicted class
        "calibration": evaluate.calibration(logits, target),
    }


def streamed(run: config.Run, ready: "streaming.Job", record: dict[str, Any]) -> dict[str, Any]:
    """The same of a large set, with the top-5 error; no confusion, which would be up to 10^8 numbers."""
    from cbl.engine import streaming

    ready.micro_batch = record.get("micro_batch") or streaming.MICRO_BATCH  # sets how many images go together
    ready.step.statistics.take()  # of batch norm: those that were just restored
    try:
        tally = streaming.evaluate(run, ready)
    finally:
        ready.close()
    held = tally.count.clamp(min=1)
    return {
        **tally.measure(ready.train.counts),
        "test_counts": tally.images.tolist(),
        "confusion": None,
        "calibration": {
            "confidence": (100 * tally.confidence / held).tolist(),
            "accuracy": (100 * tally.hits / held).tolist(),
            "count": tally.count.tolist(),
        },
    }


def recorded_error(record: dict[str, Any], weights: Path, step: int) -> float | None:
    """What the run itself measured on these weights; None when it did not evaluate there."""
    if weights.name != "checkpoint.pt" and record.get("error_last") is not None:
        return record["error_last"]
    rows = records.read_metrics(weights.parent, errors="replace")
    return next((row["test_error"] for row in rows if row["step"] == step), None)


# -- for the eye -------------------------------------------------------------------------------------------------------


def show(found: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    console.width = 10_000  # a table is as wide as it needs to be, nothing in it is cut
    summary(console, found)
    names, counts = found["class_names"], found["class_counts"]
    confusion = found["confusion"]
    groups = found["group_classes"].items()
    table(
        console,
        f"Groups of classes ({DEFINED_AS[found['groups']]})",
        ["group", "classes", "training images", "error %"],
        [
            [name, len(classes), span(counts[c] for c in classes), percent(found[f"error_{name}"])]
            for name, classes in groups
        ],
    )
    if len(names) <= LISTED:
        group_of = {c: name for name, classes in groups for c in classes}
        each = zip(names, counts, found["class_weights"], found["test_counts"], found["per_class_error"], strict=True)
        table(
            console,
            "Classes",
            ["", "class", "training images", "weight", "group", "test images", "error %"],
            [
                [c, name, count, f"{weight:.4f}", group_of[c], tested, percent(error)]
                for c, (name, count, weight, tested, error) in enumerate(each)
            ],
        )
    else:
        console.print("\nWhat is measured on each class is in what --json prints.")
    if confusion is None:
        pass
    elif len(names) <= IN_FULL:
        table(
            console,
            "Confusion (row: true class, column: predicted class, test images)",
            ["", "class", *map(str, range(len(names)))],
            [[c, name, *(n or "." for n in confusion[c])] for c, name in enumerate(names)],
        )
    else:
        wrong = [(n, t, p) for t, line in enumerate(confusion) for p, n in enumerate(line) if n and t != p]
        table(
            console,
            "Most confused pairs of classes",
            ["true class", "predicted class", "test images", "of the class %"],
            [
                [names[t], names[p], n, percent(100 * n / sum(confusion[t]))]
                for n, t, p in sorted(wrong, key=lambda pair: (-pair[0], pair[1:]))[:PAIRS]
            ],
        )
    bins = found["calibration"]
    edges = [100 * k / len(bins["count"]) for k in range(len(bins["count"]) + 1)]
    table(
        console,
        f"Calibration of the softmax of the logits, {len(bins['count'])} bins",
        ["confidence %", "test images", "mean confidence %", "accuracy %", "too confident by"],
        [
            [f"{low:.1f} - {high:.1f}", n, *(map(percent, (sure, right, sure - right)) if n else ["-"] * 3)]
            for low, high, n, sure, right in zip(
                edges, edges[1:], bins["count"], bins["confidence"], bins["accuracy"], strict=False
            )
        ],
    )


def summary(console: "Console", found: dict[str, Any]) -> None:
    run = config.from_mapping(found["config"])
    d, loss = run.dataset, run.loss
    factor = "as it is on disk" if d.imbalance_factor is None else f"imbalance factor {d.imbalance_factor:g}"
    gamma = f" (gamma {loss.gamma:g})" if loss.kind == "focal" else ""
    known = "as recorded"
    if found["images_apart"]:
        known = "not as recorded"
    elif found["images_apart"] is None:
        known = "not evaluated at this step before" if found["error_recorded"] is None else "of other images"
    skewed = records.is_skewed({**found, "error_last": found["error"]})
    lines = {
        "run": found["run_id"],
        "data": f"{d.name}, {factor}, subset seed {d.subset_seed}; {len(found['class_names'])} classes, "
        f"{found['n_train']:,} training and {found['n_test']:,} test images",
        "network": f"{config.model_name(run)}, {found['parameters']:,} parameters",
        "loss": f"{loss.kind}{gamma}, beta {loss.beta!r}, reduction {loss.reduction}",
        "training": f"{run.recipe.epochs} epochs, seed {run.seed}, {run.engine.dtype}, on {found['trained_on']}",
        "departures": " ".join(config.overrides(run)) or "none",
        "weights": f"{found['weights']}, step {found['step']:,} of {found['last_step']:,}",
        "evaluated on": found["evaluated_on"],
        "test error": f"{found['error']:.2f} % ({known})",
        **({"of classes": f"{found['error_class_mean']:.2f} % on average"} if skewed else {}),
        **({"top-5 error": f"{found['error_top5']:.2f} %"} if "error_top5" in found else {}),
        "calibration": f"{found['ece']:.2f} % expected calibration error",
    }
    for name, text in lines.items():
        console.print(f"{name:<13} {text}", soft_wrap=True)
    for note in found["notes"]:
        console.print(f"Note: {note}", soft_wrap=True)


def table(console: "Console", title: str, header: list[str], rows: list[list[Any]]) -> None:
    """Ruled on a terminal, aligned text elsewhere."""
    from rich import box
    from rich.table import Table

    ruled = box.SIMPLE_HEAD if console.is_terminal else None
    drawn = Table(box=ruled, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    for name in header:
        drawn.add_column(name, justify="left" if name in LEFT else "right", no_wrap=True)
    for row in rows:
        drawn.add_row(*map(str, row))
    console.print(f"\n{title}", style="bold")
    console.print(drawn)


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def span(counts: Iterable[int]) -> str:
    """`20 to 94`."""
    ordered = sorted(counts)
    if not ordered:
        return "-"
    return str(ordered[0]) if ordered[0] == ordered[-1] else f"{ordered[0]} to {ordered[-1]}"


if __name__ == "__main__":
    with one_line():
        main()
