"""How many CPU cores this process may use."""

import os
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container on Linux: microseconds in so many


def usable_cores() -> int:
    """Fewer than the machine has under taskset, in a job of Slurm's, in a container with a quota; 1 or more."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = map(int, QUOTA.read_text().split())
    except (OSError, ValueError):  # no container, or "max"
        return cores
    return min(cores, max(1, -(-quota // period)))
