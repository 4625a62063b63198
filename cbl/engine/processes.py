"""Several runs on the CPU: as many processes as cores, one thread each.

A step of these small networks is many short kernels, and threads that share one spend their time waiting for each
other. ResNet-8 on digits, two cores: 18.8 ms a step with one thread and 12.5 with two, so two runs side by side are a
third faster than one after the other; and when something else wants a core, two threads take 25 to 180 ms.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from cbl import config, records, tracking
from cbl.cores import usable_cores
from cbl.engine.device import on_cpu
from cbl.errors import UserError


def count(runs: Sequence[config.Run]) -> int:
    """How many processes to train `runs` with; 1 on a GPU, and when `engine.threads` takes all cores for one."""
    if not runs or not all(on_cpu(run.engine) for run in runs):
        return 1
    return max(1, min(len(runs), usable_cores() // max(run.engine.threads or 1 for run in runs)))


def train(
    runs: Sequence[config.Run], processes: int, deadline: float, quiet: bool
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, record) of each run as it ends. The folders' locks keep others out, as between any two commands."""
    # spawn: a forked child would inherit torch's threads half-alive
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, spawn, _begin, (os.getpid(), spawn.Semaphore(1)))
    try:
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # in the new processes too, until `_begin`
        try:
            futures = {pool.submit(_work, run, deadline, quiet): number for number, run in enumerate(runs)}
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool:
        raise UserError(
            "A training process was killed, perhaps for want of memory: the same command goes on from the last "
            "checkpoints, with engine.threads=2 or more in fewer processes."
        ) from None
    except BaseException:  # Ctrl-C: nobody would wait for the runs under way
        for child in multiprocessing.active_children():
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(parent: int, first: "multiprocessing.synchronize.Semaphore") -> None:
    """In a new process: leave Ctrl-C to the parent, and end with it however it ends."""
    tracking.says_where = first.acquire(block=False)  # for all of them
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C that waits is ignored with it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)  # the parent was killed; the run goes on from its checkpoint when the command is given again

    threading.Thread(target=watch, daemon=True).start()


def _work(run: config.Run, deadline: float, quiet: bool) -> dict[str, Any]:
    from cbl.engine import resident
    from cbl.engine.progress import Display

    if time.monotonic() >= deadline:
        return records.new_record(run)
    torch.set_num_threads(run.engine.threads or 1)
    return resident.drive(run, Display(bars=False, quiet=quiet), deadline)
