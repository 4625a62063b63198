"""A run's folder: what a kill, a torn line or a damaged file does to it."""

import json
import math
import os
import resource
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cbl import config, records
from cbl.errors import UserError

# -- metrics.jsonl -----------------------------------------------------------------------------------------------------


def rows(steps: list[int]) -> list[dict[str, Any]]:
    return [{"epoch": step / 4, "step": step, "lr": 0.1, "train_loss": 1 / 3, "test_error": None} for step in steps]


def test_metrics_without_a_file(tmp_path: Path) -> None:
    assert records.read_metrics(tmp_path) == []
    assert records.rewind_metrics(tmp_path, 0) == []


@pytest.mark.parametrize("kept", [0, 1, 20, -2, -1])
def test_a_last_line_that_a_kill_cut_short_is_left_out(tmp_path: Path, kept: int) -> None:
    for row in rows([4, 8, 12]):
        records.append_metrics(tmp_path, row)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_text(encoding="utf-8")
    last = whole.splitlines(keepends=True)[-1]
    path.write_text(whole[: -len(last)] + last[:kept], encoding="utf-8")
    complete = kept == -1  # the line lacks nothing but its end
    assert records.read_metrics(tmp_path) == rows([4, 8, 12] if complete else [4, 8])
    # what a resumed run does: rewind, and write on
    assert records.rewind_metrics(tmp_path, 8) == rows([4, 8])
    records.append_metrics(tmp_path, rows([12])[0])
    assert path.read_text(encoding="utf-8") == whole


@pytest.mark.parametrize("garbage", [bytes(40), b"\xff\xfe\x00{", b"\xc3"], ids=["zeros", "no UTF-8", "half a letter"])
def test_what_a_machine_that_went_down_left_is_no_row(tmp_path: Path, garbage: bytes) -> None:
    for row in rows([4, 8]):
        records.append_metrics(tmp_path, row)
    with (tmp_path / "metrics.jsonl").open("ab") as handle:
        handle.write(garbage)
    assert records.rewind_metrics(tmp_path, 8) == rows([4, 8])
    assert records.read_metrics(tmp_path) == rows([4, 8])


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, hard))
    try:
        for write in (
            lambda: records.append_metrics(tmp_path, {"step": 1, "epoch": 0.5}),
            lambda: records.write_record(tmp_path, {"status": "running"}),
        ):
            with pytest.raises(UserError, match=rf"^{tmp_path} cannot be written to \(File too large\): make room"):
                write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert records.rewind_metrics(tmp_path, 9) == []  # what there was room for is no row
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_rewinding_drops_what_will_be_trained_again(tmp_path: Path) -> None:
    for row in rows([4, 8, 12, 16]):
        records.append_metrics(tmp_path, row)
    assert records.rewind_metrics(tmp_path, 11) == records.read_metrics(tmp_path) == rows([4, 8])
    assert records.rewind_metrics(tmp_path, 8) == rows([4, 8])
    assert records.rewind_metrics(tmp_path, 0) == records.read_metrics(tmp_path) == []


# -- the record --------------------------------------------------------------------------------------------------------


def run(**groups: Any) -> config.Run:
    return config.from_mapping(groups)


def test_a_new_record_fills_the_columns_that_need_no_data() -> None:
    record = records.new_record(
        run(loss={"kind": "focal", "beta": 0.99}, recipe={"drop": 0.1, "milestones": [80]}, engine={"max_steps": 5})
    )
    row = records.row(record)
    assert list(row) == list(records.COLUMNS)
    assert row["run_id"] == config.run_id(config.from_mapping(record["config"]))
    assert (row["weighting"], row["gamma"], row["beta"]) == ("effective_number", 1.0, 0.99)
    assert set(row["overrides"].split(" ")) == {"recipe.drop=0.1", "recipe.milestones=[80.0]", "engine.max_steps=5"}
    assert (row["status"], row["model"], row["torch"]) == ("running", "resnet32", record["versions"]["torch"])
    assert {name for name, value in row.items() if value is not None} - {"commit"} == {
        "run_id", "cell", "dataset", "imbalance_factor", "model", "loss", "gamma", "weighting", "beta", "reduction",
        "overrides", "dtype", "seed", "subset_seed", "epochs", "status", "torch", "started",
    }  # fmt: skip


def test_weighting_and_gamma_are_empty_where_they_mean_nothing() -> None:
    plain = records.new_record(run(loss={"kind": "sigmoid", "gamma": 2.0}))
    assert (plain["weighting"], plain["gamma"], plain["beta"], plain["overrides"]) == ("none", None, 0.0, "")


def test_a_row_has_every_column_and_no_more() -> None:
    assert records.row({"run_id": "x", "class_counts": [1]}) == dict.fromkeys(records.COLUMNS) | {"run_id": "x"}


def test_folder_names_and_the_marker(tmp_path: Path) -> None:
    chosen = run(output_dir=str(tmp_path))
    folder = records.folder_of(chosen)
    assert folder == tmp_path / config.run_id(chosen) and not records.is_done(folder)
    folder.mkdir()
    records.write_record(folder, records.new_record(chosen) | {"status": "done"})
    assert not records.is_done(folder)  # only the marker says so
    (folder / "done").touch()
    assert records.is_done(folder)
    with pytest.raises(UserError, match=r"name too long.*: choose another output_dir\.") as caught:
        records.is_done(tmp_path / ("n" * 300))
    assert "\n" not in str(caught.value)


def test_record_there_and_back(tmp_path: Path) -> None:
    record = records.new_record(run(seed=3)) | {"class_counts": [2, 1], "error_last": 12.5, "n_train": 3}
    records.write_record(tmp_path, record)
    assert records.read_record(tmp_path) == record
    text = (tmp_path / "result.json").read_text(encoding="utf-8")
    top = list(json.loads(text))
    assert top[: len(top) - 3] == [name for name in records.COLUMNS if name in record]  # the columns first, in order
    assert text.endswith("}\n")


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    wrong = {"error_last": math.nan, "error_best": math.inf, "per_class_error": [1.0, math.nan], "ece": 0.5}
    records.write_record(tmp_path, records.new_record(run()) | wrong)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    read = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert read["error_last"] is None and read["error_best"] is None and read["ece"] == 0.5
    assert read["per_class_error"] == [1.0, None]


def test_records_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    def refuses(text: str | None, message: str) -> None:
        if text is not None:
            (tmp_path / "result.json").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=message) as caught:
            records.read_record(tmp_path)
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)

    refuses(None, "is no run folder: it has no result.json")
    refuses('{"run_id": "x", "con', r"result.json cannot be read \(.*\): delete the folder and run it again")
    refuses("", "result.json cannot be read")
    refuses("[1]", "is not the record of a run: it lacks run_id or config")
    refuses('{"run_id": "x"}', "it lacks run_id or config")
    (tmp_path / "result.json").unlink()
    (tmp_path / "result.json").mkdir()
    refuses(None, "result.json cannot be read")


# -- the commit --------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository that records.py is part of, one commit old."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)  # set when the tests run in a git hook
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    root = tmp_path / "checkout"
    for name in ("cbl/records.py", "results/runs.csv", "README.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("one\n", encoding="utf-8")
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "-c", "user.name=x", "-c", "user.email=x@x", "commit", "--quiet", "-m", "one")
    monkeypatch.setattr(records, "__file__", str(root / "cbl" / "records.py"))
    return root


def git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def commit() -> str | None:
    records.commit.cache_clear()
    found = records.commit()
    records.commit.cache_clear()
    return found


def test_commit_and_its_plus(checkout: Path) -> None:
    head = git(checkout, "rev-parse", "HEAD")[:10]
    assert commit() == head
    (checkout / "new.py").touch()  # nobody knows it, so nothing imports it
    (checkout / "results" / "runs.csv").write_text("two\n", encoding="utf-8")
    (checkout / "README.md").write_text("two\n", encoding="utf-8")
    assert commit() == head
    (checkout / "cbl" / "records.py").write_text("two\n", encoding="utf-8")
    assert commit() == head + "+"


def test_no_commit_outside_a_checkout(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = checkout / ".venv" / "records.py"  # in somebody else's repository, but no part of it
    installed.parent.mkdir()
    installed.touch()
    monkeypatch.setattr(records, "__file__", str(installed))
    assert commit() is None
    outside = checkout.parent / "records.py"
    monkeypatch.setattr(records, "__file__", str(outside))
    assert commit() is None
    monkeypatch.setenv("PATH", "")
    assert commit() is None
