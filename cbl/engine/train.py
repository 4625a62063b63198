"""Training of any runs: `train(runs)`, what a command or a sweep calls. Hydra imports this with every application."""

import math
import os
import time
from collections.abc import Sequence
from typing import Any

from cbl import config, records


def train(runs: Sequence[config.Run], deadline: float = math.inf) -> list[dict[str, Any]]:
    """The records of `runs`, of those on large sets last: many side by side, then one at a time on all devices.

    `deadline` as for `resident.train`. Raises `UserError` when one of several processes on a CPU was killed.
    """
    from cbl.engine import resident, streaming  # torch is wanted only once the configuration stands

    small = [run for run in runs if run.dataset.name not in config.LARGE]
    ended = resident.train(small, deadline) if small else []
    for run in runs:
        if run.dataset.name in config.LARGE:
            late = time.monotonic() >= deadline
            ended.append(records.new_record(run) if late else streaming.train(run, deadline))
            if ended[-1]["status"] == "failed" and "RANK" in os.environ:
                break  # the other processes may be anywhere by now
    return ended


def exit_status(ended: Sequence[dict[str, Any]]) -> int:
    """Of the command that trained: 1 when a run failed."""
    return int(any(record["status"] == "failed" for record in ended))
