"""How many CPU cores this process may use."""

import os


def usable_cores() -> int:
    """Fewer than the machine has under taskset or in a job of Slurm's; 1 or more."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
