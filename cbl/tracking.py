"""W&B: a projection of a run's record, never the only one, and never a reason for a run to fail, to ask or to wait.

One page per run: group = cell, name = id = run_id, x-axis = epoch. The page's config is the record as it stood when
training began, its summary the record at the end, so that `{**config, **summary}` holds every column of runs.csv, the
nested configuration (`config`), `class_counts`, `per_class_error` and `group_classes`. Metrics:

    train/loss  train/lr  train/images_per_second  train/seconds  test/error  test/error_best  epoch

Whatever W&B raises costs the page and one line on stderr; the run goes on. Pages that could not be sent lie in the
run's folder, in `wandb/offline-run-*`, for `wandb sync`.
"""

import contextlib
import functools
import os
import shutil
import socket
import sys
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from cbl import config, records

# Names on the page of the keys of metrics.jsonl; "/" puts charts in groups.
METRICS = {
    "epoch": "epoch",
    "train_loss": "train/loss",
    "lr": "train/lr",
    "images_per_second": "train/images_per_second",
    "seconds": "train/seconds",
    "test_error": "test/error",
    "best_error": "test/error_best",
}
_EXIT_CODES = {"done": 0, "failed": 1}
_INTERRUPTED = 255  # W&B's own code for a run stopped by Ctrl-C
# Seconds that W&B may take to open a page online, and to send what is left when a run ends.
_INIT_TIMEOUT = 10.0
_FINISH_TIMEOUT = 20.0
# What W&B raises when its service process has gone; two of them are private to it, hence names.
_SERVICE_GONE = {"BrokenPipeError", "ConnectionResetError", "HandleAbandonedError", "MailboxClosedError"}

Mode = Literal["off", "offline", "online"]
# What each tracking.mode comes to on this machine, found out once per process.
_modes: dict[str, Mode] = {}
says_where = True  # of a sweep's processes one alone, or each would say where its pages go


class Tracker:
    """The page of one run. When there is none, or no longer one, its methods do nothing."""

    def __init__(self) -> None:
        self._page: Any = None  # wandb.Run

    def log(self, row: dict[str, Any]) -> None:
        """Adds a row of metrics.jsonl. W&B itself leaves out a row whose step is not above those the page has."""
        if self._page is not None:
            with self._guarded():
                values = {name: row[key] for key, name in METRICS.items() if row.get(key) is not None}
                self._page.log(values, step=row["step"], commit=True)

    def finish(self, record: dict[str, Any]) -> None:
        """Writes the record into the summary and closes the page, whether the run is done, failed or interrupted."""
        if self._page is not None:
            with self._guarded():
                self._page.summary.update(records.row(record) | {k: v for k, v in record.items() if k != "config"})
                # When the server was lost since, W&B's exit hook gives all such pages one last chance together:
                # waiting here would cost every run the whole timeout.
                if self._page.offline or "online" in _modes.values():
                    self._page.finish(exit_code=_EXIT_CODES.get(record["status"], _INTERRUPTED))
            self._page = None

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Whatever W&B raises here ends the page, not the run."""
        try:
            yield
        except Exception as error:
            self._page = None
            later = " Later runs are tracked offline." if _go_offline() else ""
            _say(f"W&B failed ({_reason(error)}); the run goes on without it, its record is in its folder.{later}")
            if type(error).__name__ in _SERVICE_GONE:
                _forget_service()  # no stack trace at exit then, and the next run starts another


def start(run: config.Run, record: dict[str, Any], folder: Path, history: list[dict[str, Any]]) -> Tracker:
    """Opens the page of `run`; never raises, never prompts.

    `record` is what is known before training. `history` are the rows of metrics.jsonl that a resumed run goes on from,
    [] for a run from the start. W&B cannot append offline, so there a resumed run is replayed into a fresh page, which
    replaces what an earlier attempt left in `folder`. Online the page is continued; of `history`, and of what is
    trained again after it, only the steps beyond the server's last are added. A run from the start replaces the page.
    """
    tracker = Tracker()
    with tracker._guarded():
        mode = _mode(run)
        if mode != "off":
            # Uploaded, an older page would replace this one: they share the id.
            for older in (folder / "wandb").glob("offline-run-*"):
                shutil.rmtree(older, ignore_errors=True)
            tracker._page = _open(run, record, folder, online=mode == "online", resumed=bool(history))
    for row in history:
        tracker.log(row)
    return tracker


def _open(run: config.Run, record: dict[str, Any], folder: Path, online: bool, resumed: bool) -> Any:
    """The run's page; an offline one when W&B does not take it online."""
    import wandb

    settings = wandb.Settings(
        silent=True,
        console="off",
        symlink=False,
        disable_git=True,  # the record has the commit
        disable_code=True,
        x_save_requirements=False,  # 0.3 s a run, and the record has the versions
        x_disable_stats=True,  # all runs of a sweep would report the same machine
        init_timeout=_INIT_TIMEOUT,
        finish_timeout=_FINISH_TIMEOUT,  # what is not sent by then stays in the folder
        finish_timeout_raises=True,
    )
    tags = _setup().settings.run_tags or ()  # WANDB_TAGS
    try:
        page = wandb.init(
            project=run.tracking.project,
            entity=run.tracking.entity,
            group=record["cell"],
            name=record["run_id"],
            id=record["run_id"],
            job_type="train",
            tags=[record["dataset"], record["loss"], *tags],
            config={key: value for key, value in record.items() if value is not None and key != "status"},
            dir=folder.resolve(),  # its files go to folder/wandb
            mode="online" if online else "offline",
            reinit="create_new",  # many runs are open at once
            resume="allow" if online and resumed else None,
            settings=settings,
        )
    except Exception as error:
        # The service keeps the id of a page that failed; a new one does not, but would end the pages that are open.
        if not online or _setup().most_recent_active_run is not None:
            raise
        _say_where(f"W&B: {_reason(error)}; {_offline_note(run)}")
        _go_offline()
        _forget_service()
        return _open(run, record, folder, online=False, resumed=resumed)
    page.define_metric("epoch", hidden=True)
    page.define_metric("train/*", step_metric="epoch")
    page.define_metric("test/*", step_metric="epoch")
    if online:
        _say_where(f"W&B: {page.project_url}")
    return page


def _mode(run: config.Run) -> Mode:
    asked = run.tracking.mode
    if asked not in _modes:
        _modes[asked] = _find_mode(run)
    return _modes[asked]


def _find_mode(run: config.Run) -> Mode:
    asked: str = run.tracking.mode
    # Looked up before the import, which takes a second.
    if asked == "off" or (asked == "auto" and os.environ.get("WANDB_MODE") == "disabled"):
        return "off"
    # W&B reports its errors to its server; in a dead network the process would wait for that at its end.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        import wandb
    except ImportError:
        _say_where("W&B: not installed, so no pages are written; `pip install wandb` brings it.")
        return "off"
    if asked == "auto":  # WANDB_MODE, or what `wandb offline` and `wandb disabled` wrote; online when nobody said
        asked = _setup().settings.mode
    if asked == "disabled":
        return "off"
    if asked in ("offline", "dryrun"):
        return "offline"
    host = _setup(mode="online").settings.base_url  # the mode, because login() looks at it
    try:
        trouble = "" if wandb.login(prompt=False, verify=False) else "not logged in (`wandb login` does it)"
    except wandb.Error as error:  # a key of the wrong form
        trouble = _reason(error)
    if not trouble and not _answers(host):
        trouble = f"{host} does not answer"
    if trouble:
        _say_where(f"W&B: {trouble}; {_offline_note(run)}")
        return "offline"
    return "online"


def _answers(url: str, seconds: float = 2.0) -> bool:
    """Whether the host of `url`, or the proxy before it, takes a TCP connection."""
    target = urllib.parse.urlsplit(url)
    proxy = urllib.request.getproxies().get(target.scheme)
    if proxy and not urllib.request.proxy_bypass(target.hostname or ""):
        target = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    address = (target.hostname, target.port or {"https": 443}.get(target.scheme, 80))
    answered = threading.Event()

    def connect() -> None:
        with contextlib.suppress(OSError), socket.create_connection(address, timeout=seconds):
            answered.set()

    # A thread, because looking up a name in a dead network heeds no timeout.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()


def _setup(**settings: Any) -> Any:
    """W&B's state in this process, with its service process started and its own messages off."""
    import wandb

    return wandb.setup(wandb.Settings(silent=True, **settings))


def _forget_service() -> None:
    with contextlib.suppress(Exception):
        sys.modules["wandb"].teardown()


def _go_offline() -> bool:
    """Later runs of this process do not wait for a server that has failed once; False when none would."""
    online = [asked for asked, mode in _modes.items() if mode == "online"]
    _modes.update(dict.fromkeys(online, "offline"))
    return bool(online)


def _offline_note(run: config.Run) -> str:
    return f"pages are written offline, `wandb sync {run.output_dir}/*/wandb/offline-run-*` uploads them later."


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _say_where(line: str) -> None:
    if says_where:
        _say(line)


@functools.cache  # the same line once per process
def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # a terminal that was closed is no reason to fail
        print(line, file=sys.stderr, flush=True)
