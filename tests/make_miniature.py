"""Writes tests/miniature: a few run folders with made-up numbers, on which the chain from runs to tables is tested.

    python tests/make_miniature.py

Names, settings and layout are real, made by `cbl.config` and `cbl.records`; every error follows from a formula below,
and `device`, `commit` and `torch` say "synthetic", so that no such row can pass for a result. `runs/` is one machine's
outputs/runs, `second_machine/` another's, with duplicates of the first. Written again, the files are the same bytes.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from cbl import class_balanced_weights, config, longtail, records

MINIATURE = Path(__file__).resolve().parent / "miniature"
SYNTHETIC = {"device": "synthetic", "commit": "synthetic", "torch": "synthetic", "versions": {}}
# classes, images of the largest class, test images per class
SOURCES = {"cifar10_lt": (10, 5000, 1000), "cifar100_lt": (100, 500, 100), "digits_lt": (10, 124, 50)}
TENTHS = range(1, 11)  # of a run's epochs, a row of metrics.jsonl each
# as configs/experiment/digits.yaml
DIGITS: dict[str, Any] = {
    "model": {"depth": 8}, "recipe": {"epochs": 40, "batch_size": 64, "milestones": [32.0]}, "engine": {"eval_every": 5}
}  # fmt: skip


def run(dataset: str, factor: float, kind: str, beta: float = 0.0, seed: int = 0, **groups: Any) -> config.Run:
    """`model={"shortcut": "strided"}` and the like go in `groups`; gamma is 1."""
    return config.from_mapping(
        {
            "dataset": {"name": dataset, "imbalance_factor": factor},
            "loss": {"kind": kind, "beta": beta},
            "seed": seed,
            **groups,
        }
    )


def facts(run: config.Run) -> dict[str, Any]:
    """What a record knows once the data is read."""
    classes, n_max, n_test = SOURCES[run.dataset.name]
    counts = longtail.class_counts(classes, run.dataset.imbalance_factor, n_max)
    return {
        "n_train": int(counts.sum()),
        "n_test": classes * n_test,
        "class_counts": counts.tolist(),
        "class_weights": class_balanced_weights(counts, run.loss.beta).numpy().round(6).tolist(),
        "class_names": [f"class {i}" for i in range(classes)],
        "parameters": 1,
        "lanes": 1,
        "subset_hash": f"synthetic-{run.dataset.subset_seed}",
        "started": "2000-01-01T00:00:00",
        **SYNTHETIC,
    }


def errors(run: config.Run, shift: int = 0) -> dict[str, Any]:
    """Errors that grow from head to tail, less so with class balancing; `shift` more wrong images in every class."""
    classes, _, n_test = SOURCES[run.dataset.name]
    position = np.linspace(0, 1, classes)  # 0 head, 1 tail
    tail = 0.3 + 0.1 * np.log10(run.dataset.imbalance_factor) - 0.1 * (run.loss.beta > 0)
    share = 0.1 + tail * position + 0.01 * (run.loss.kind == "focal") + 0.2 * (classes == 100)
    share = share + 0.02 * (run.model.shortcut == "strided") + 0.005 * (run.engine.dtype == "bf16")
    wrong = np.rint(n_test * share).astype(int) + (3 if run.loss.beta == 0 else -2) * run.seed + shift
    per_class = (100 * wrong / n_test).round(4)  # %
    counts = facts(run)["class_counts"]
    rule, groups = longtail.class_groups(counts)
    means = {f"error_{k}": round(float(per_class[v].mean()), 4) if len(v) else None for k, v in groups.items()}
    return {
        "error_last": round(float(per_class.mean()), 4),
        "error_best": round(float(per_class.mean()) - 0.5, 4),
        **means,
        "groups": rule,
        "group_classes": {name: classes.tolist() for name, classes in groups.items()},
        "per_class_error": per_class.tolist(),
        "ece": 5.0 + run.seed,
    }


def write(place: str, run: config.Run, status: str = "done", shift: int = 0) -> Path:
    """A run folder under `place`, up to the point that `status` names."""
    folder = MINIATURE / place / config.run_id(run)
    record = records.new_record(run) | facts(run)
    end = errors(run, shift)
    steps = record["n_train"] * run.recipe.epochs // run.recipe.batch_size
    folder.mkdir(parents=True)
    for tenth in TENTHS if status == "done" else TENTHS[:3]:
        left = 1 - tenth / 10
        epoch = run.recipe.epochs * tenth / 10
        # the lowest error comes before the last, as it often does
        test_error = end["error_best"] if tenth == 9 else round(end["error_last"] + 30 * left**2, 4)
        records.append_metrics(
            folder,
            {
                "epoch": epoch,
                "step": steps * tenth // 10,
                "lr": 0.1 * run.recipe.drop ** sum(epoch >= milestone for milestone in run.recipe.milestones),
                "train_loss": round(0.2 + 2 * left, 4),
                "test_error": test_error,
                "best_error": end["error_best"] if tenth >= 9 else test_error,
                "images_per_second": 1000.0,
                "seconds": 20.0 * tenth,
            },
        )
    if status == "done":
        record |= end | {"status": "done", "steps": steps, "seconds": 200.0, "images_per_second": 1000.0}
    elif status == "failed":
        failure = "the loss is nan at step 5910 (learning rate 0.1): try a lower recipe.learning_rate."
        record |= {"status": "failed", "failure": failure}
    records.write_record(folder, record)
    if status == "done":
        (folder / "done").touch()
    return folder


def main() -> None:
    shutil.rmtree(MINIATURE, ignore_errors=True)
    # three seeds, one seed, and most of the paper's cells missing
    for beta in (0.0, 0.9999):
        for seed in (0, 1, 2):
            write("runs", run("cifar10_lt", 100, "softmax", beta, seed))
        write("runs", run("cifar10_lt", 100, "focal", beta))
        write("runs", run("cifar10_lt", 50, "softmax", beta))
        write("runs", run("cifar10_lt", 50, "focal", beta))
        write("runs", run("digits_lt", 100, "softmax", beta, **DIGITS))
    for drop in ({}, {"drop": 0.1}):  # an ablation's
        write("runs", run("digits_lt", 50, "softmax", **DIGITS | {"recipe": DIGITS["recipe"] | drop}))
    write("runs", run("cifar100_lt", 100, "softmax"))
    # the balanced set, and the same with the other learning rate drop
    write("runs", run("cifar10_lt", 1, "sigmoid"))
    write("runs", run("cifar10_lt", 1, "sigmoid", recipe={"drop": 0.01}))
    # cells of their own: another arithmetic, another network
    write("runs", run("cifar10_lt", 100, "softmax", engine={"dtype": "bf16"}))
    write("runs", run("cifar10_lt", 100, "softmax", model={"shortcut": "strided"}))
    # no results: failed, under way, killed while the record was copied
    write("runs", run("cifar100_lt", 50, "softmax"), "failed")
    folder = write("runs", run("cifar10_lt", 10, "softmax"), "running")
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as handle:
        handle.write('{"epoch": 80, "step": 12')
    path = write("runs", run("cifar10_lt", 20, "softmax")) / "result.json"
    path.write_text(path.read_text(encoding="utf-8")[:700], encoding="utf-8")

    # another machine: a run of the first with another result, one that was only under way there, one only it has
    write("second_machine", run("cifar10_lt", 100, "softmax"), shift=11)
    write("second_machine", run("cifar10_lt", 10, "softmax"))
    write("second_machine", run("cifar100_lt", 100, "softmax", 0.9999))


if __name__ == "__main__":
    main()
