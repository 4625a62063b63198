"""From run folders to results/: what is read, what is merged, what is published, on the runs of tests/miniature."""

import csv
import errno
import json
import multiprocessing
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import make_miniature
import pandas as pd
import pytest
import requests
import wandb
from hypothesis import given, settings
from hypothesis import strategies as st
from make_miniature import MINIATURE, run
from pandas.testing import assert_frame_equal
from wandb.apis.public.summary import HTTPSummary

from cbl import config, records, store
from cbl.errors import UserError

RUNS = MINIATURE / "runs"
SECOND = MINIATURE / "second_machine"
TWICE = config.run_id(run("cifar10_lt", 100, "softmax"))  # on both machines, with different errors
FAILED = config.run_id(run("cifar100_lt", 50, "softmax"))
UNDER_WAY = config.run_id(run("cifar10_lt", 10, "softmax"))  # done on the second machine
HALF_WRITTEN = config.run_id(run("cifar10_lt", 20, "softmax"))
ALL = store.read_folders([RUNS])


def names(found: store.Store) -> list[str]:
    return found.runs["run_id"].tolist()


def status(found: store.Store, name: str) -> str:
    return found.runs.set_index("run_id").loc[name, "status"]


def error(found: store.Store, name: str) -> float:
    return found.runs.set_index("run_id").loc[name, "error_last"]


def files(folder: Path) -> dict[str, bytes]:
    return {f"{path.relative_to(folder)}": path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def published(results: Path) -> dict[str, bytes]:
    return {name: text for name, text in files(results).items() if name != ".lock"}


# -- the miniature itself ----------------------------------------------------------------------------------------------


def test_miniature_is_what_its_script_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(make_miniature, "MINIATURE", tmp_path / "miniature")
    make_miniature.main()
    assert files(tmp_path / "miniature") == files(MINIATURE)


def test_miniature_cannot_pass_for_results():
    assert set(ALL.runs["device"]) == set(ALL.runs["commit"]) == {"synthetic"}


# -- reading -----------------------------------------------------------------------------------------------------------


def test_folders_become_typed_rows():
    assert list(ALL.runs.columns) == list(records.COLUMNS)
    for name, (kind, _) in records.COLUMNS.items():
        assert ALL.runs[name].dtype == pd.Series(dtype=kind).dtype, name
    row = ALL.runs.set_index("run_id").loc[config.run_id(run("cifar10_lt", 50, "focal", 0.9999))]
    assert row[["dataset", "loss", "weighting", "dtype"]].tolist() == [
        "cifar10_lt",
        "focal",
        "effective_number",
        "fp32",
    ]
    assert row[["imbalance_factor", "gamma", "beta", "error_last"]].tolist() == [50, 1, 0.9999, 29.49]
    assert row[["n_train", "n_test", "steps"]].tolist() == [13996, 10000, 21868]
    assert row["overrides"] == "" and row["failure"] == ""
    plain = ALL.runs[ALL.runs["loss"] == "softmax"]
    assert plain["gamma"].isna().all()


def test_status_is_what_the_folder_says():
    assert status(ALL, FAILED) == "failed" and status(ALL, UNDER_WAY) == "running"
    failed = ALL.runs.set_index("run_id").loc[FAILED]
    assert pd.isna(failed["error_last"]) and failed["failure"].startswith("the loss is nan")
    assert (ALL.runs["status"] == "done").sum() == len(ALL.runs) - 2


def test_half_written_record_costs_one_warning_and_nothing_else():
    assert HALF_WRITTEN not in names(ALL)
    assert len(names(ALL)) == len(list(RUNS.iterdir())) - 1
    assert len(ALL.warnings) == 1 and HALF_WRITTEN in ALL.warnings[0]


def test_record_of_wrong_values_is_skipped(tmp_path):
    folder = shutil.copytree(RUNS / TWICE, tmp_path / TWICE)
    record = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(record | {"error_last": "low"}))
    found = store.read_folders([tmp_path])
    assert names(found) == [] and "error_last = 'low'" in found.warnings[0]


def test_record_of_an_unknown_status_is_skipped(tmp_path):
    folder = shutil.copytree(RUNS / TWICE, tmp_path / TWICE)
    records.write_record(folder, records.read_record(folder) | {"status": "finished"})
    found = store.read_folders([tmp_path])
    assert names(found) == [] and "status = 'finished'" in found.warnings[0]


@pytest.mark.parametrize(
    ("metrics", "says"),
    [
        (b'{"step": 1}\n\xff\n', "{folder} cannot be read ('utf-8' codec can't decode byte 0xff in position 12: "),
        (b'{"step": 1}\n7\n', "the metrics of {name} have a row 7, which"),
        (b'"no step"\n', "the metrics of {name} have a row 'no step', which"),
        (b'{"step": 1, "test_error": "low"}\n', "{name} has test_error = 'low' in its details"),
        (b'{"step": 1.5}\n', "{name} has step = 1.5 in its details"),
    ],
    ids=["not UTF-8", "bare number", "bare text", "text for a number", "fraction"],
)
def test_metrics_that_cannot_be_read_cost_one_warning_and_nothing_else(tmp_path, metrics, says):
    whole = shutil.copytree(RUNS / FAILED, tmp_path / FAILED).name
    folder = shutil.copytree(RUNS / TWICE, tmp_path / TWICE)
    (folder / "metrics.jsonl").write_bytes(metrics)
    found = store.read_folders([tmp_path])
    assert names(found) == [whole] and len(found.warnings) == 1
    assert found.warnings[0].startswith("Skipped: " + says.format(folder=folder, name=TWICE))


@pytest.mark.parametrize("damage", [{"class_counts": 5}, {"class_counts": ["many"] * 10}])
def test_classes_that_cannot_be_read_cost_one_warning_and_nothing_else(tmp_path, damage):
    whole = shutil.copytree(RUNS / FAILED, tmp_path / FAILED).name
    folder = shutil.copytree(RUNS / TWICE, tmp_path / TWICE)
    records.write_record(folder, records.read_record(folder) | damage)
    found = store.read_folders([tmp_path])
    assert names(found) == [whole]
    assert len(found.warnings) == 1 and found.warnings[0].startswith("Skipped: ") and TWICE in found.warnings[0]


def deny(monkeypatch, method: str, denied: Path) -> None:
    """Permission bits do not bind root."""
    real = getattr(Path, method)

    def checked(path: Path) -> object:
        if denied in (path, path.parent):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, method, checked)


def test_a_folder_among_them_that_cannot_be_read_costs_one_warning_and_nothing_else(tmp_path, monkeypatch):
    shutil.copytree(RUNS / TWICE, tmp_path / TWICE)
    (tmp_path / "lost+found").mkdir()
    deny(monkeypatch, "exists", tmp_path / "lost+found")
    found = store.read_folders([tmp_path])
    assert names(found) == [TWICE]
    assert found.warnings == [f"Skipped: {tmp_path / 'lost+found'} cannot be read (Permission denied)."]


@pytest.mark.parametrize("method", ["is_dir", "exists", "iterdir"])
def test_a_path_that_cannot_be_read_is_one_sentence(tmp_path, monkeypatch, method):
    deny(monkeypatch, method, tmp_path)
    with pytest.raises(UserError, match=rf"^{tmp_path} cannot be read \(Permission denied\): mend it"):
        store.read_folders([tmp_path])


def test_run_without_its_marker_is_not_done(tmp_path):
    folder = shutil.copytree(RUNS / TWICE, tmp_path / TWICE)
    (folder / "done").unlink()
    assert status(store.read_folders([tmp_path]), TWICE) == "running"


def test_one_run_folder_and_stray_files_are_fine(tmp_path):
    (tmp_path / "notes.txt").write_text("not a run")
    (tmp_path / "begun").mkdir()
    shutil.copytree(RUNS / TWICE, tmp_path / TWICE)
    assert names(store.read_folders([tmp_path])) == names(store.read_folders([tmp_path / TWICE])) == [TWICE]
    assert store.read_folders([tmp_path / "begun"]).warnings == [f"{tmp_path / 'begun'} holds no runs."]
    with pytest.raises(UserError, match="nowhere is no folder"):
        store.read_folders(["nowhere"])


def test_a_copied_folder_is_no_second_run(tmp_path):
    shutil.copytree(RUNS / TWICE, tmp_path / "a")
    shutil.copytree(RUNS / TWICE, tmp_path / "b")
    found = store.read_folders([tmp_path])
    assert names(found) == [TWICE] and found.warnings == []
    assert len(found.per_class) == 10


def test_per_class_errors_and_curves_are_those_of_the_record():
    record = records.read_record(RUNS / TWICE)
    mine = ALL.per_class[ALL.per_class["run_id"] == TWICE]
    assert mine["class_index"].tolist() == list(range(10))
    assert mine["class_name"].tolist() == record["class_names"]
    assert mine["n_train"].tolist() == record["class_counts"]
    assert mine["error"].tolist() == record["per_class_error"]
    points = ALL.curves[ALL.curves["run_id"] == TWICE]
    assert points["test_error"].tolist() == [row["test_error"] for row in records.read_metrics(RUNS / TWICE)]
    assert ALL.per_class["run_id"].nunique() == (ALL.runs["status"] == "done").sum()


# -- merging -----------------------------------------------------------------------------------------------------------


def test_of_two_results_the_first_stays_and_both_are_told():
    second = store.read_folders([SECOND])
    both = store.merge(ALL, second)
    assert error(ALL, TWICE) == 35 and error(second, TWICE) == 36.1
    assert error(both, TWICE) == 35 and error(store.merge(second, ALL), TWICE) == 36.1
    assert len(both.warnings) == 2 and TWICE in both.warnings[1]
    assert "35" in both.warnings[1] and "36.1" in both.warnings[1]
    for merged, first in ((both, ALL), (store.merge(second, ALL), second)):  # details go with their row
        for details in ("per_class", "curves"):
            expected, got = (getattr(s, details).query("run_id == @TWICE") for s in (first, merged))
            assert_frame_equal(expected.reset_index(drop=True), got.reset_index(drop=True))


def test_done_beats_not_done_from_either_side():
    second = store.read_folders([SECOND])
    for both in (store.merge(ALL, second), store.merge(second, ALL)):
        assert status(both, UNDER_WAY) == "done"
        assert both.curves.query("run_id == @UNDER_WAY")["epoch"].max() == 200
        assert len(both.per_class.query("run_id == @UNDER_WAY")) == 10


def again(**changes) -> store.Store:
    """The failed run of the miniature, read once more."""
    mine = ALL.runs[ALL.runs["run_id"] == FAILED].assign(**changes)
    return store.Store(mine, ALL.per_class, ALL.curves.assign(lr=0.5))


def test_failed_beats_under_way_from_either_side():
    under_way = again(status="running", failure="", device="other")
    for both in (store.merge(ALL, under_way), store.merge(under_way, ALL)):
        for got, kept in ((both.runs, ALL.runs), (both.curves, ALL.curves)):
            assert got.query("run_id == @FAILED").to_csv() == kept.query("run_id == @FAILED").to_csv()


def test_a_newer_failure_takes_what_it_leaves_blank_from_the_older():
    both = store.merge(ALL, again(failure="", steps=pd.NA, device="other"))
    row, old = (found.runs.set_index("run_id").loc[FAILED] for found in (both, ALL))
    assert row["device"] == "other" and (row["failure"], row["steps"]) == (old["failure"], old["steps"])
    assert store.merge(ALL, again(failure="another")).runs.set_index("run_id").loc[FAILED, "failure"] == "another"


def test_same_training_read_again_fills_what_an_older_file_lacked():
    old = store.Store(ALL.runs.drop(columns="ece"), ALL.per_class.iloc[:0], ALL.curves.iloc[:0])
    both = store.merge(old, ALL)
    assert_frame_equal(both.runs, ALL.runs)
    assert_frame_equal(both.per_class, ALL.per_class)
    assert_frame_equal(both.curves, ALL.curves)


def test_another_training_with_the_same_error_fills_nothing():
    elsewhere = store.Store(ALL.runs.assign(device="other", ece=1.0), ALL.per_class, ALL.curves)
    lacking = store.Store(ALL.runs.assign(ece=pd.NA), ALL.per_class.iloc[:0], ALL.curves.iloc[:0])
    both = store.merge(lacking, elsewhere)
    done = both.runs[both.runs["status"] == "done"]
    assert set(done["device"]) == {"synthetic"} and done["ece"].isna().all() and both.warnings == []
    assert both.per_class.empty and set(both.curves["run_id"]) == {FAILED, UNDER_WAY}  # their newer attempts


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=len(ALL.runs), max_size=len(ALL.runs)))
def test_order_and_grouping_of_machines_do_not_matter(machine):
    merged = store.read_folders([])
    for number in range(3):
        part = ALL.runs[[m == number for m in machine]]
        mine = store.Store(
            part, *(frame[frame["run_id"].isin(part["run_id"])] for frame in (ALL.per_class, ALL.curves))
        )
        merged = store.merge(store.merge(merged, mine), mine)
    for name in ("runs", "per_class", "curves"):
        assert_frame_equal(getattr(merged, name), getattr(ALL, name))


def test_rows_are_sorted_by_setting_then_seed():
    at = [*ALL.runs[["dataset", "imbalance_factor", "loss", "gamma", "beta", "overrides", "seed"]].fillna(-1).values]
    at = [tuple(row) for row in at]
    assert at == sorted(at)


# -- publishing --------------------------------------------------------------------------------------------------------


def test_published_files_read_back(tmp_path):
    done = store.publish(ALL, tmp_path)
    assert (done.added, done.changed, done.kept, done.unfinished) == (len(ALL.runs) - 1, 0, 0, 1)
    back = store.load(tmp_path)
    ended = ALL.runs[ALL.runs["status"] != "running"].reset_index(drop=True)
    assert_frame_equal(back.runs, ended)
    assert_frame_equal(back.per_class, ALL.per_class)
    assert_frame_equal(back.curves, ALL.curves.query("run_id != @UNDER_WAY").reset_index(drop=True))
    assert UNDER_WAY not in names(back) and status(back, FAILED) == "failed"


def test_numbers_are_short_and_stable(tmp_path):
    store.publish(ALL, tmp_path)
    text = (tmp_path / "runs.csv").read_text().splitlines()
    assert text[0] == ",".join(records.COLUMNS)
    name = config.run_id(run("cifar10_lt", 50, "focal", 0.9999))
    (line,) = [line for line in text if line.startswith(name)]
    assert line == (
        f"{name},{name.replace('-s0', '')},cifar10_lt,50,13996,10000,resnet32,focal,1,effective_number,0.9999,batch,,"
        "fp32,0,0,200,21868,done,29.49,28.99,,17.15,31.5333,43.9,terciles,5,200,1000,synthetic,1,synthetic-0,"
        "synthetic,synthetic,2000-01-01T00:00:00,"
    )
    (line,) = [line for line in (tmp_path / "per_class.csv").read_text().splitlines() if line.startswith(f"{name},9")]
    assert line.startswith(f"{name},9,class 9,100,")


def test_published_again_nothing_moves(tmp_path):
    store.publish(ALL, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.*") if path.name != ".lock"}
    again = store.publish(ALL, tmp_path)
    assert (again.added, again.changed, again.kept) == (0, 0, len(ALL.runs) - 1)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_what_a_killed_process_left_half_written_goes(tmp_path):
    store.publish(ALL, tmp_path)
    before = published(tmp_path)
    (tmp_path / "runs.csv.123.tmp").write_text("run_")
    store.publish(ALL, tmp_path)
    assert published(tmp_path) == before


def test_a_new_run_is_one_new_line(tmp_path):
    store.publish(ALL, tmp_path)
    before = (tmp_path / "runs.csv").read_text().splitlines()
    result = store.publish(store.read_folders([SECOND]), tmp_path)
    after = (tmp_path / "runs.csv").read_text().splitlines()
    assert (result.added, result.kept) == (2, 1)
    assert [line for line in after if line in before] == before
    assert len(after) == len(before) + 2
    assert error(result.store, TWICE) == 35


def test_failed_run_is_replaced_when_it_is_done(tmp_path):
    results = tmp_path / "results"
    store.publish(ALL, results)
    table = pd.read_csv(results / "runs.csv", dtype="str", keep_default_na=False)
    table.assign(note="look here").to_csv(results / "runs.csv", index=False)
    folder = shutil.copytree(RUNS / FAILED, tmp_path / "runs" / FAILED)
    record = records.read_record(folder) | {"status": "done", "error_last": 61.0, "failure": None}
    records.write_record(folder, record)
    (folder / "done").touch()
    result = store.publish(store.read_folders([folder]), results)
    assert (result.added, result.changed, result.kept) == (0, 1, 0)
    assert status(result.store, FAILED) == "done" and error(result.store, FAILED) == 61
    assert (result.store.runs["note"] == "look here").all()
    back = store.publish(ALL, results)  # the old failure does not come back
    assert back.changed == 0 and status(back.store, FAILED) == "done"


def test_foreign_columns_are_kept_to_the_right(tmp_path):
    store.publish(ALL, tmp_path)
    path = tmp_path / "runs.csv"
    table = pd.read_csv(path, dtype="str", keep_default_na=False)
    table.insert(3, "note", ["0010" if name in (TWICE, FAILED) else "" for name in table["run_id"]])
    table.drop(columns="torch").to_csv(path, index=False)  # an older file lacks a column, too
    result = store.publish(store.read_folders([SECOND]), tmp_path)
    back = store.load(tmp_path)
    assert list(back.runs.columns) == [*records.COLUMNS, "note"]
    notes = back.runs.set_index("run_id")["note"]
    assert notes[TWICE] == notes[FAILED] == "0010" and (notes.drop([TWICE, FAILED]) == "").all()
    assert back.runs.set_index("run_id").loc[FAILED, "torch"] == ""
    assert_frame_equal(back.runs, result.store.runs)


def test_texts_of_several_lines_read_back(tmp_path):
    folder = shutil.copytree(RUNS / FAILED, tmp_path / "runs" / FAILED)
    classes = {"class_names": ["a\rb", "c\r\nd"], "class_counts": [2, 1], "per_class_error": [0.5, 1.5]}
    records.write_record(folder, records.read_record(folder) | classes | {"failure": "one\rtwo\r\nthree\n\rfour"})
    results = tmp_path / "results"
    store.publish(store.read_folders([folder]), results)
    table = pd.read_csv(results / "runs.csv", dtype="str", keep_default_na=False)
    table["my\rnote"] = ["look\rhere\r\nand there"]
    table.to_csv(results / "runs.csv", index=False, quoting=csv.QUOTE_ALL)  # as another program writes it
    again = store.publish(store.read_folders([folder, SECOND]), results)
    assert (again.changed, again.kept) == (0, 1)
    back = store.load(results)
    assert_frame_equal(back.runs, again.store.runs)
    assert_frame_equal(back.per_class, again.store.per_class)
    row = back.runs.set_index("run_id").loc[FAILED]
    assert row["failure"] == "one\ntwo\nthree\n\nfour" and row["my\nnote"] == "look\nhere\nand there"
    assert back.per_class.query("run_id == @FAILED")["class_name"].tolist() == ["a\nb", "c\nd"]
    assert b"\r" not in b"".join(published(results).values())


def test_curves_are_thinned_and_keep_their_last_point(tmp_path):
    folder = shutil.copytree(RUNS / TWICE, tmp_path / "runs" / TWICE)
    (folder / "metrics.jsonl").unlink()
    for epoch in range(1, 201):
        test_error = 50 - epoch / 10 if epoch % 2 == 0 else None
        row = {"epoch": epoch, "step": 97 * epoch, "lr": 0.1, "train_loss": 1.23456789, "test_error": test_error}
        records.append_metrics(folder, row)
    found = store.read_folders([folder])
    assert len(found.curves) == 200 and found.curves["test_error"].notna().sum() == 100
    curve = store.publish(found, tmp_path / "results").store.curves
    assert curve["epoch"].tolist() == list(range(4, 201, 4))
    assert curve["test_error"].iloc[-1] == 30 and curve["train_loss"].iloc[0] == 1.23457
    assert_frame_equal(store.load(tmp_path / "results").curves, curve)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda text: text.replace("cifar10_lt", "<<<<<<< HEAD\ncifar10_lt", 1), "'<<<<<<< HEAD'"),
        (lambda text: text + text.splitlines()[1] + "\n", "in two rows"),
        (lambda text: text.replace(",13996,", ",many,", 1), "many"),
        (lambda text: text.replace("run_id,", "id,", 1), "no column run_id"),
        (lambda text: text.replace(",13996,", ",13996.5,", 1), "is damaged"),
        (lambda text: "", "is damaged"),
    ],
    ids=["merge conflict", "row twice", "text for a number", "no run_id", "fraction", "empty"],
)
def test_damaged_file_is_refused_and_left_alone(tmp_path, damage, says):
    store.publish(ALL, tmp_path)
    path = tmp_path / "runs.csv"
    path.write_text(damage(path.read_text()))
    before = published(tmp_path)
    with pytest.raises(UserError, match=says) as refusal:
        store.publish(store.read_folders([SECOND]), tmp_path)
    assert "runs.csv" in str(refusal.value) and "\n" not in str(refusal.value)
    assert published(tmp_path) == before


def test_published_runs_that_cannot_be_read_are_one_sentence(tmp_path):
    (tmp_path / "runs.csv").mkdir()
    with pytest.raises(UserError, match=r"runs.csv cannot be read \(Is a directory\): mend it\.$"):
        store.load(tmp_path)


def test_store_without_runs(tmp_path):
    empty = store.load(tmp_path)
    assert empty.runs.empty and list(empty.runs.columns) == list(records.COLUMNS)
    assert store.summarise(empty.runs).empty
    assert store.publish(empty, tmp_path).store.runs.empty
    assert_frame_equal(store.load(tmp_path).runs, empty.runs)


def _publish_one_by_one(folders: list[Path], results: Path, start) -> None:
    start.wait()
    for folder in folders:
        store.publish(store.read_folders([folder]), results)


def test_processes_that_publish_at_once_lose_nothing(tmp_path):
    done = sorted(RUNS / name for name in ALL.runs[ALL.runs["status"] == "done"]["run_id"])[:9]
    fork = multiprocessing.get_context("fork")  # spawned ones would spend seconds on imports, not on publishing
    start = fork.Barrier(3)
    processes = [fork.Process(target=_publish_one_by_one, args=(done[i::3], tmp_path, start)) for i in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert sorted(names(store.load(tmp_path))) == [folder.name for folder in done]
    at_once = published(tmp_path)
    store.publish(store.read_folders(done), tmp_path / "alone")
    assert at_once == published(tmp_path / "alone")


# -- W&B ---------------------------------------------------------------------------------------------------------------


class Page:
    """A run as `wandb.Api` gives it; tests/test_tracking.py says what `cbl.tracking` writes."""

    dir = "."  # HTTPSummary asks for it
    name = "a page"

    def __init__(self, config: dict, summary: dict, rows: list[dict]):
        self.config = config
        self.summary = HTTPSummary(self, None, summary=summary)
        self.rows = rows

    def scan_history(self) -> Iterator[dict]:
        return iter(self.rows)


def page(folder: Path) -> Page:
    """config: the record when training began, less empty values; summary: the last row, and the record at the end."""
    record = json.loads((folder / "result.json").read_text())
    end = {"error_last", "error_best", "error_many", "error_medium", "error_few", "groups", "group_classes", "ece"}
    end |= {"per_class_error", "steps", "status", "seconds", "images_per_second", "failure"}
    config = {key: value for key, value in record.items() if key not in end and value is not None}
    rows = []
    for row in records.read_metrics(folder):
        values = {"epoch": row["epoch"], "train/loss": row["train_loss"], "train/lr": row["lr"], "_step": row["step"]}
        rows.append(values | {"_timestamp": 1.0, "_runtime": 1, "train/images_per_second": 1000, "train/seconds": 20})
        if row["test_error"] is not None:
            rows[-1] |= {"test/error": row["test_error"], "test/error_best": row["best_error"]}
    summary = {**rows[-1], "_wandb": {"runtime": 200}}
    if record["status"] != "running":  # that one was killed: nothing more was sent
        summary |= records.row(record) | {key: value for key, value in record.items() if key != "config"}
    return Page(config, summary, rows)


class Api:
    def __init__(self, pages: list[Page]):
        self.pages = pages

    def runs(self, path: str) -> Iterator[Page]:
        assert path == "team/project"
        return iter(self.pages)


@pytest.fixture(scope="module")
def pages() -> list[Page]:
    """What W&B would hold of the miniature's runs."""
    return [page(folder) for folder in sorted(RUNS.iterdir()) if folder.name != HALF_WRITTEN]


def test_wandb_gives_back_what_the_folders_hold(pages):
    found = store.from_wandb("team/project", Api(pages))
    assert found.warnings == []
    for name in ("runs", "per_class", "curves"):
        assert_frame_equal(getattr(found, name), getattr(ALL, name))


def test_wandb_and_folders_are_one_and_the_same(pages):
    both = store.merge(ALL, store.from_wandb("team/project", Api(pages)))
    assert both.warnings == ALL.warnings
    assert_frame_equal(both.runs, ALL.runs)


def test_other_pages_in_the_project_are_passed_over(pages):
    stranger = Page({"learning_rate": 0.1}, {"loss": 0.5}, [{"loss": 0.5, "_step": 0}])
    found = store.from_wandb("team/project", Api([stranger, *pages]))
    assert len(found.runs) == len(ALL.runs)
    [said] = found.warnings
    assert said.startswith(f"Skipped: the page {stranger.name}: ")


@pytest.mark.parametrize(
    "trouble",
    [wandb.errors.CommError("Could not find project"), requests.ConnectionError("no route"), ValueError("bad path")],
)
def test_wandb_out_of_reach_is_one_sentence(trouble):
    class Silent:
        def runs(self, path):
            raise trouble

    with pytest.raises(UserError, match=f"team/project.*{trouble}.*wandb login"):
        store.from_wandb("team/project", Silent())


def test_wandb_project_needs_its_entity():
    with pytest.raises(UserError, match="'project' is no W&B project"):
        store.from_wandb("project", Api([]))


# -- averages ----------------------------------------------------------------------------------------------------------


def test_averages_are_per_cell():
    cells = store.summarise(ALL.runs).set_index("cell")
    seeds = cells.loc[config.cell(run("cifar10_lt", 100, "softmax"))]
    assert seeds["n"] == 3 and seeds["mean"] == pytest.approx(35.3) and seeds["sd"] == pytest.approx(0.3)
    assert seeds["best_mean"] == pytest.approx(34.8) and seeds["seeds"] == [(0, 0), (1, 0), (2, 0)]
    assert seeds["run_ids"][0] == TWICE
    one = cells.loc[config.cell(run("cifar10_lt", 50, "softmax"))]
    assert one["n"] == 1 and pd.isna(one["sd"])
    others = [
        run("cifar10_lt", 100, "softmax", engine={"dtype": "bf16"}),
        run("cifar10_lt", 100, "softmax", model={"shortcut": "strided"}),
    ]
    for other in others:  # same data, loss and beta, another cell
        assert cells.loc[config.cell(other), "n"] == 1
    assert cells["n"].sum() == (ALL.runs["status"] == "done").sum()
    assert config.cell(run("cifar100_lt", 50, "softmax")) not in cells.index  # failed
    assert config.cell(run("cifar10_lt", 10, "softmax")) not in cells.index  # under way


# -- the command -------------------------------------------------------------------------------------------------------


def collect(*arguments: str) -> subprocess.CompletedProcess:
    script = Path(__file__).resolve().parents[1] / "scripts" / "collect.py"
    return subprocess.run([sys.executable, str(script), *map(str, arguments)], capture_output=True, text=True)


def test_collect_says_what_it_did(tmp_path):
    first = collect(RUNS, SECOND, "--results", tmp_path)
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines() == [
        f"{tmp_path / 'runs.csv'}: 24 new, 0 changed, 0 kept, 0 unfinished and left out; 24 runs in all."
    ]
    assert [line.split(":")[0] for line in first.stderr.splitlines()] == ["Warning", "Warning"]
    assert status(store.load(tmp_path), UNDER_WAY) == "done"


def test_collect_refuses_in_one_sentence(tmp_path):
    refused = collect(tmp_path / "none", "--results", tmp_path / "results")
    assert refused.returncode == 2 and refused.stdout == ""
    assert (
        refused.stderr
        == f"{tmp_path / 'none'} is no folder: train a run first, or give the folder that runs were written to.\n"
    )
    assert not (tmp_path / "results").exists()
    (tmp_path / "file").touch()
    refused = collect(SECOND, "--results", tmp_path / "file" / "results")
    assert refused.returncode == 2 and refused.stdout == ""
    assert (
        refused.stderr
        == f"{tmp_path / 'file/results'} cannot be written to (Not a directory): choose another --results.\n"
    )


def test_readme_of_the_results_is_up_to_date():
    path = Path(__file__).resolve().parents[1] / "results" / "README.md"
    assert path.read_text(encoding="utf-8") == store.readme(), "run `make collect`"
