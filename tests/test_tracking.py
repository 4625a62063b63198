"""cbl/tracking.py against the real wandb package: pages are read back, servers are local, nothing leaves this host."""

import http.server
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cbl import config, records, tracking

wandb = pytest.importorskip("wandb", reason="needs the wandb package")

KEY = "a" * 40  # the form of a key is all that wandb checks by itself
CLOSED = "http://127.0.0.1:1"  # nobody listens there
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """As on a machine where nobody has used wandb; what wandb and tracking.py keep per process is forgotten."""
    for name in list(os.environ):
        if name.startswith("WANDB_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_BASE_URL", CLOSED)
    monkeypatch.setattr(tracking, "_modes", {})
    tracking._say.cache_clear()
    yield
    tracking._forget_service()


def a_run(root: Path, mode: str = "offline", **keys: Any) -> config.Run:
    return config.from_mapping(
        {
            "dataset": {"name": "digits_lt"},
            "loss": {"kind": "focal", "gamma": 0.5, "beta": 0.999},
            "tracking": {"mode": mode, "project": "a-project"},
            "output_dir": str(root),
            **keys,
        }
    )


def rows(first: int, last: int) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl, evaluated every other epoch."""
    return [
        {
            "epoch": float(epoch),
            "step": 7 * epoch,
            "lr": 0.1,
            "train_loss": 1 / epoch,
            "test_error": 50.0 - epoch if epoch % 2 == 0 else None,
            "best_error": 50.0 - epoch if epoch % 2 == 0 else None,
            "images_per_second": 1000.0,
            "seconds": 0.5,
        }
        for epoch in range(first, last + 1)
    ]


def at_start(run: config.Run) -> dict[str, Any]:
    known = {"started": "2019-06-16T09:00:00+00:00", "n_train": 12, "class_counts": [9, 2, 1]}
    return records.new_record(run) | known


def at_end(run: config.Run, **results: Any) -> dict[str, Any]:
    values = {name: "text" if kind == "str" else 7 for name, (kind, _) in records.COLUMNS.items()}
    extra = {"per_class_error": [1.0, 2.0, 3.0], "group_classes": {"many": ["0"], "medium": ["1"], "few": ["2"]}}
    return values | at_start(run) | extra | {"status": "done"} | results


def start(run: config.Run, history: list[dict[str, Any]] | None = None) -> tracking.Tracker:
    return tracking.start(run, at_start(run), records.folder_of(run), history or [])


def read_page(run: config.Run) -> dict[str, Any]:
    """What a reader finds in the one page in the run's folder."""
    (file,) = (records.folder_of(run) / "wandb").glob("offline-run-*/run-*.wandb")
    shown = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    page: dict[str, Any] = {"rows": [], "summary": {}, "config": {}, "x_axis": {}}
    for line in shown.stdout.splitlines():
        item = json.loads(line)
        content = item.get(item["type"])
        if item["type"] == "run":
            page |= {key: content.get(key) for key in ("run_id", "display_name", "run_group", "job_type", "project")}
            page["tags"] = content.get("tags")
            page["config"] |= content["config"]["update"]
        elif item["type"] == "history":
            page["rows"].append(content["item"])
        elif item["type"] == "summary":
            page["summary"] |= content["update"]
        elif item["type"] == "metric" and "glob_name" in content:
            page["x_axis"][content["glob_name"]] = content["step_metric"]
        elif item["type"] == "exit":
            page["exit_code"] = content.get("exit_code", 0)
    return page


def test_two_open_runs_leave_a_page_each_that_holds_the_record(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_TAGS", "mine")
    first, second = a_run(tmp_path), a_run(tmp_path, seed=1)
    trackers = [start(first), start(second)]
    for row in rows(1, 4):
        trackers[0].log(row)
        trackers[1].log(row | {"train_loss": 9.0})
    trackers[1].finish(at_end(second, status="failed", failure="the loss is nan", error_last=float("nan")))
    trackers[0].finish(at_end(first))
    assert capfd.readouterr() == ("", "")

    page = read_page(first)
    assert page["run_id"] == page["display_name"] == config.run_id(first)
    assert page["run_group"] == config.cell(first)
    assert (page["job_type"], page["project"], page["exit_code"]) == ("train", "a-project", 0)
    assert page["tags"] == ["digits_lt", "focal", "mine"]
    assert page["x_axis"] == {"train/*": "epoch", "test/*": "epoch"}
    assert page["config"].items() >= {"loss": "focal", "gamma": 0.5, "beta": 0.999, "seed": 0, "n_train": 12}.items()
    assert page["config"]["class_counts"] == [9, 2, 1]
    assert config.from_mapping(page["config"]["config"]) == first
    assert [row["_step"] for row in page["rows"]] == [7, 14, 21, 28]
    assert [row["epoch"] for row in page["rows"]] == [1, 2, 3, 4]
    assert [row["train/loss"] for row in page["rows"]] == [1, 1 / 2, 1 / 3, 1 / 4]
    assert [row.get("test/error") for row in page["rows"]] == [None, 48, None, 46]
    assert page["rows"][3].keys() >= {"train/lr", "train/images_per_second", "train/seconds", "test/error_best"}
    # a team's runs.csv can be made from its pages
    whole = page["config"] | page["summary"]
    assert records.row(whole) == records.row(at_end(first))
    assert all(name in page["summary"] for name in records.COLUMNS)
    assert whole["per_class_error"] == [1, 2, 3]
    assert whole["group_classes"]["few"] == ["2"]

    page = read_page(second)
    assert page["run_id"] == config.run_id(second)
    assert page["exit_code"] == 1
    assert (page["summary"]["status"], page["summary"]["failure"]) == ("failed", "the loss is nan")
    assert page["summary"]["error_last"] is None
    assert [row["train/loss"] for row in page["rows"]] == [9, 9, 9, 9]


def test_a_resumed_run_is_replayed_into_one_fresh_page(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")  # tracking.mode=offline says otherwise
    run = a_run(tmp_path)
    tracker = start(run)
    for row in rows(1, 4):
        tracker.log(row)
    tracker.finish(at_end(run, status="running"))  # interrupted
    tracker = start(run, history=rows(1, 2))  # its last checkpoint was older than its last row
    for row in rows(3, 6):
        tracker.log(row)
    tracker.finish(at_end(run))
    page = read_page(run)  # there is one
    assert [row["epoch"] for row in page["rows"]] == [1, 2, 3, 4, 5, 6]
    assert (page["summary"]["status"], page["exit_code"]) == ("done", 0)


@pytest.mark.parametrize("mode", ["off", "auto"])
def test_off_and_disabled_do_not_import_wandb(mode, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_MODE", "disabled" if mode == "auto" else "offline")
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would raise, and be told
    run = a_run(tmp_path, mode)
    tracker = start(run, history=rows(1, 1))
    tracker.log(rows(2, 2)[0])
    tracker.finish(at_end(run))
    assert capfd.readouterr() == ("", "")
    assert not records.folder_of(run).exists()


def test_without_wandb_there_is_one_line_and_no_page(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "wandb", None)
    for seed in (0, 1):
        run = a_run(tmp_path, "auto", seed=seed)
        tracker = start(run)
        tracker.log(rows(1, 1)[0])
        tracker.finish(at_end(run))
    out, err = capfd.readouterr()
    assert out == ""
    assert err == "W&B: not installed, so no pages are written; `pip install wandb` brings it.\n"


def test_what_wandb_raises_costs_the_page_alone(tmp_path, monkeypatch, capfd):
    def refuse(*arguments: Any, **keys: Any) -> None:
        raise RuntimeError("no space left\nand a long explanation")

    for seed, broken in enumerate(["init", "log", "finish"]):
        run = a_run(tmp_path, seed=seed)
        with monkeypatch.context() as patch:
            if broken == "init":
                patch.setattr(wandb, "init", refuse)
            else:
                patch.setattr(wandb.Run, broken, refuse)
            tracking._say.cache_clear()
            tracker = start(run)
            for row in rows(1, 3):
                tracker.log(row)
            tracker.finish(at_end(run))
        err = capfd.readouterr().err
        assert err == "W&B failed (no space left); the run goes on without it, its record is in its folder.\n", broken


def test_a_killed_service_costs_the_open_pages_and_the_next_run_has_one_again(tmp_path, capfd):
    first, second, third = (a_run(tmp_path, seed=seed) for seed in range(3))
    trackers = [start(first), start(second)]
    service = wandb.setup()._connection._proc._process
    os.kill(service.pid, signal.SIGKILL)
    service.wait()
    began = time.monotonic()
    trackers[0].log(rows(1, 1)[0])
    trackers[0].finish(at_end(first))
    trackers[1].finish(at_end(second))
    assert time.monotonic() - began < 10
    assert re.fullmatch(r"(W&B failed \(.+\); the run goes on without it, .+\n){1,2}", capfd.readouterr().err)

    tracker = start(third)
    tracker.log(rows(1, 1)[0])
    tracker.finish(at_end(third))
    assert len(read_page(third)["rows"]) == 1


@pytest.mark.parametrize(
    ("mode", "environment", "settings", "expected"),
    [
        ("auto", {}, "", "offline"),
        ("auto", {"WANDB_API_KEY": KEY}, "", "online"),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "", "offline"),
        ("auto", {"WANDB_API_KEY": KEY}, "[default]\nmode = disabled\n", "off"),
        ("auto", {"WANDB_API_KEY": "short"}, "", "offline"),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": CLOSED}, "", "offline"),
        ("online", {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "", "online"),
        ("online", {}, "", "offline"),
        ("offline", {"WANDB_API_KEY": KEY, "WANDB_MODE": "disabled"}, "", "offline"),
    ],
)
def test_mode(mode, environment, settings, expected, tmp_path, monkeypatch, capfd):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        if settings:
            file = tmp_path / "home/.config/wandb/settings"
            file.parent.mkdir(parents=True)
            file.write_text(settings)
        run = a_run(tmp_path, mode)
        assert tracking._mode(run) == expected
        assert tracking._mode(run) == expected
    lines = capfd.readouterr().err.splitlines()
    fell_back = expected == "offline" and mode != "offline" and environment.get("WANDB_MODE") != "offline"
    assert len(lines) == fell_back, lines
    if fell_back:
        assert lines[0].startswith("W&B: ")
        assert f"`wandb sync {tmp_path}/*/wandb/offline-run-*` uploads them later" in lines[0]


def test_a_key_in_netrc_counts_and_a_proxy_is_what_must_answer(tmp_path, monkeypatch, capfd):
    home = tmp_path / "home"
    home.mkdir()
    (home / ".netrc").write_text(f"machine 127.0.0.1:1 login user password {KEY}\n")
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        assert tracking._mode(a_run(tmp_path, "auto")) == "online"
    assert capfd.readouterr().err == ""


PROGRAM = """
import sys, time
from pathlib import Path
from cbl import tracking
from tests.test_tracking import a_run, at_end, rows, start
tracking._INIT_TIMEOUT = 1.0
began = time.monotonic()
for seed in (0, 1):
    run = a_run(Path(sys.argv[1]), sys.argv[2], seed=seed)
    tracker = start(run)
    if seed == 0:
        print(f"started after {time.monotonic() - began:.1f} s", flush=True)
    tracker.log(rows(1, 1)[0])
    if seed == 0:  # the other is left to what runs at exit
        tracker.finish(at_end(run))
print(time.time())
"""


@pytest.mark.parametrize("server", ["absent", pytest.param("silent", marks=pytest.mark.slow)])
def test_a_dead_network_delays_neither_start_nor_end(server, tmp_path):
    """absent: nobody takes the connection; silent: somebody does, and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = CLOSED if server == "absent" else f"http://127.0.0.1:{listening.getsockname()[1]}"
        environment = os.environ | {"WANDB_BASE_URL": url, "WANDB_API_KEY": KEY}
        del environment["WANDB_ERROR_REPORTING"]  # reporting its errors is what would hold the process at its end
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path), "auto"],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        ended = time.time()
    assert done.returncode == 0, done.stderr
    started, last_line = done.stdout.splitlines()
    assert float(re.fullmatch(r"started after (.+) s", started)[1]) < 25  # 3 on an idle machine
    assert ended - float(last_line) < 8  # 1 on an idle machine
    (line,) = done.stderr.splitlines()
    assert line.startswith("W&B: ")
    assert "written offline" in line
    pages = list(tmp_path.glob("*/wandb/offline-run-*/run-*.wandb"))
    assert len(pages) == 2


def test_a_terminal_is_not_asked_for_a_key(tmp_path):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path), "online"], cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    shown = b""
    try:
        while block := os.read(ours, 1000):  # a prompt would wait here until pytest's own end
            shown += block
            if b"Enter" in shown:
                process.kill()
    except OSError:  # the process has closed its side
        pass
    os.close(ours)
    assert process.wait(timeout=60) == 0, shown.decode()
    first, second, _ = shown.decode().splitlines()
    assert first.startswith("W&B: not logged in (`wandb login` does it); pages are written offline")
    assert second.startswith("started after")


class _Server(http.server.BaseHTTPRequestHandler):
    """The least of a W&B server: keeps the rows and the summary of one page."""

    history: list[str] = []
    rows_sent = 0
    summary: dict[str, Any] = {}
    exit_code: int | None = None

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer: dict[str, Any] = {}
        if self.path == "/graphql":
            request = json.loads(body)
            name = re.search(r"(?:query|mutation) (\w+)", request["query"])[1]
            answer = {"data": getattr(self, name, lambda _: {})(request["variables"])}
        elif self.path.endswith("/file_stream"):
            request = json.loads(body)
            files = request.get("files") or {}
            if new := files.get("wandb-history.jsonl"):
                _Server.history[new["offset"] :] = new["content"]
                _Server.rows_sent += len(new["content"])
            if new := files.get("wandb-summary.json"):
                _Server.summary = json.loads(new["content"][-1])
            _Server.exit_code = request.get("exitcode", _Server.exit_code)
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_PUT = do_POST

    def log_message(self, *_: Any) -> None:
        pass

    def UpsertBucket(self, given: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "p", "name": given["project"], "entity": {"id": "e", "name": "team"}}
        bucket = {"id": "b", "name": given["name"], "displayName": given["displayName"], "project": project}
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}

    def RunResumeStatus(self, given: dict[str, Any]) -> dict[str, Any]:
        bucket = {
            "id": "b",
            "name": given["name"],
            "summaryMetrics": json.dumps(_Server.summary),
            "historyLineCount": len(_Server.history),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps(_Server.history[-1:]),
            "eventsTail": "[]",
            "config": "{}",
            "wandbConfig": '{"t": 1}',
        }
        return {"model": {"id": "p", "name": given["project"], "bucket": bucket}}

    def CreateRunFiles(self, given: dict[str, Any]) -> dict[str, Any]:
        url = f"http://{self.headers['Host']}/upload"
        files = [{"name": name, "uploadUrl": url} for name in given["files"]]
        return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}


def test_an_online_run_is_resumed_without_holes_and_without_doubles(tmp_path, monkeypatch, capfd):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("WANDB_BASE_URL", url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        run = a_run(tmp_path, "auto")
        tracker = start(run)
        for row in rows(1, 4):
            tracker.log(row)
        tracker.finish(at_end(run, status="running"))
        assert _Server.exit_code == 255
        _Server.history.pop()  # as if the process had been killed before epoch 4 was sent
        _Server.summary["_step"] = 21

        tracker = start(run, history=rows(1, 2))  # trains epochs 3 and 4 again
        for row in rows(3, 6):
            tracker.log(row)
        tracker.finish(at_end(run))
        server.shutdown()
    assert capfd.readouterr().err == f"W&B: {url}/team/a-project\n"
    assert _Server.exit_code == 0
    assert [json.loads(row)["epoch"] for row in _Server.history] == [1, 2, 3, 4, 5, 6]
    assert _Server.rows_sent == 4 + 3
    assert records.row(_Server.summary) == records.row(at_end(run))
