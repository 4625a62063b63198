"""What a run says while it trains, a bar on a terminal, plain lines elsewhere; and in the end, of a failure too."""

import contextlib
import time
import traceback
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from cbl import records
from cbl.errors import UserError

PLAIN_SECONDS = 15.0  # between two plain lines of one run, at the ends of epochs
SILENT_SECONDS = 60.0  # after so long a plain line in the middle of an epoch too


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # as any other error: rich would end the process


class Display:
    """Bars for the runs under way, one each; lines above them, or lines alone when stderr is no terminal.

    With several runs there is a bar for all of them too. `quiet` says nothing: another process has the terminal.
    When nothing can be written any more (the terminal was closed, the disk of a log is full) it becomes quiet.
    """

    def __init__(self, total: int = 0, bars: bool = True, quiet: bool = False) -> None:
        self.console = _Console(stderr=True, highlight=False, soft_wrap=True)
        self.total, self.finished, self.quiet = total, 0, quiet
        self.bars: Progress | None = None
        if bars and self.console.is_terminal:
            self.bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                TextColumn("{task.percentage:3.0f} %"),
                TextColumn("{task.fields[text]}"),
                TextColumn("left"),
                TimeRemainingColumn(compact=True),
                console=self.console,
                transient=True,
                refresh_per_second=4,
            )
            with self.speaking():
                self.bars.start()
                self.all = self.bars.add_task("all runs", total=total, text=f"0 of {total}", visible=total > 1)

    @contextlib.contextmanager
    def speaking(self) -> Iterator[None]:
        """What a run says is no reason for it to fail."""
        try:
            yield
        except OSError:
            bars, self.bars, self.quiet = self.bars, None, True
            if bars:
                with contextlib.suppress(OSError):
                    bars.stop()

    def say(self, text: str) -> None:
        if not self.quiet:
            with self.speaking():
                self.console.print(text, markup=False)

    def run(self, name: str, steps: int, batch_size: int, done: int = 0) -> "Line":
        return Line(self, name, steps, batch_size, done)

    def end(self, text: str) -> None:
        """One run is through: its line, counted when there are several."""
        self.finished += 1
        self.say(f"[{self.finished}/{self.total}] {text}" if self.total > 1 else text)
        if self.bars:
            self.bars.update(self.all, completed=self.finished, text=f"{self.finished} of {self.total}")

    def close(self) -> None:
        if self.bars:
            with self.speaking():
                self.bars.stop()


class Line:
    """The bar, or the plain lines, of one run."""

    def __init__(self, display: Display, name: str, steps: int, batch_size: int, done: int) -> None:
        self.display, self.name, self.steps, self.batch_size, self.done = display, name, steps, batch_size, done
        self.began, self.from_step, self.said = time.monotonic(), done, time.monotonic()
        self.text, self.error, self.shown = "", None, 0.0
        self.task: TaskID | None = None
        if display.bars:
            with display.speaking():
                self.task = display.bars.add_task(name, total=steps, completed=done, text="")

    def advance(self) -> None:
        """A step was begun."""
        self.done += 1
        now = time.monotonic()
        # a redraw costs as much as a small step
        if self.display.bars and self.task is not None and now - self.shown >= 0.1:
            self.shown = now
            text = ", ".join(filter(None, [f"{self._rate(now):,.0f} images/s", self.text]))
            self.display.bars.update(self.task, completed=self.done, text=text)
        if self.task is None and now - self.said >= SILENT_SECONDS:
            self._say(f"step {self.done:,}", now)

    def epoch(self, row: dict) -> None:
        """A row of metrics.jsonl was written."""
        self.text = f"loss {row['train_loss']:.3f}"
        if row["test_error"] is not None:
            self.error = row["test_error"]
        if self.error is not None:
            self.text += f", error {self.error:.2f} %"
        now = time.monotonic()
        if self.task is None and now - self.said >= PLAIN_SECONDS:
            self._say(f"epoch {row['epoch']:.0f}", now)

    def _rate(self, now: float) -> float:
        """Images/s since the command began."""
        return (self.done - self.from_step) * self.batch_size / max(now - self.began, 1e-9)

    def _say(self, place: str, now: float) -> None:
        self.said = now
        rate = self._rate(now)
        minutes = (self.steps - self.done) * self.batch_size / max(rate, 1e-9) / 60
        percent, left = f"{100 * self.done / self.steps:.0f} %", f"{minutes:.0f} min left"
        parts = [f"{self.name}: {place}", percent, self.text, f"{rate:,.0f} images/s", left]
        self.display.say(", ".join(filter(None, parts)))

    def close(self) -> None:
        if self.display.bars and self.task is not None:
            self.display.bars.remove_task(self.task)


def failure(error: Exception) -> dict[str, str]:
    """What the record says of a run that failed."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's; this module does without torch
        error = UserError(
            "The GPU is out of memory: lower engine.eval_batch or recipe.batch_size, of the large sets "
            "engine.micro_batch, or end what else runs on it."
        )
    if isinstance(error, UserError):
        return {"status": "failed", "failure": str(error)}
    with contextlib.suppress(OSError):  # nobody may read it any more
        traceback.print_exception(error)  # a defect of ours: all of it
    return {"status": "failed", "failure": repr(error)}


def closing_line(record: dict[str, Any]) -> str:
    name = record["run_id"]
    if record["status"] == "failed":
        return f"{name}: failed. {record['failure']}"
    if record["status"] != "done":
        return f"{name}: {record.get('skipped', 'stopped, the same command goes on')}"
    top5 = f" (top-5 {record['error_top5']:.2f} %)" if "error_top5" in record else ""
    skewed = records.is_skewed(record)
    of_classes = f", mean over the classes {records.class_mean(record):.2f} %" if skewed else ""
    last = f"error {record['error_last']:.2f} %{top5} after the last step{of_classes}"
    shown = f"{name}: {last}, best {record['error_best']:.2f} %"
    if "skipped" in record:
        return f"{shown} ({record['skipped']})"
    return f"{shown}, {record['seconds']:.0f} s, {record['images_per_second']:,.0f} images/s"
