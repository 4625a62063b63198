"""The processes that train one run together: who they are, and the few things they tell each other.

They are started by torchrun or are the tasks of one Slurm job; a process that nobody started so is a world of its own,
in which every function here does nothing. All of them call the same functions in the same order.
"""

import atexit
import dataclasses
import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from cbl import config
from cbl.cores import usable_cores
from cbl.engine.device import choose_device
from cbl.errors import UserError


@dataclasses.dataclass(frozen=True)
class World:
    """This process among all, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this is the one process that writes records, speaks and decides."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def share(self, tensors: Iterable[torch.Tensor]) -> None:
        """Gives all processes the values of the leading one, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def tell(self, value: Any) -> Any:
        """The leading process's value, plain data."""
        told = [value]
        if self.size > 1:
            dist.broadcast_object_list(told, src=0)
        return told[0]

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes by rank, plain data."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values


def rank() -> int:
    """Of this process among those that train together."""
    _read_slurm()
    return int(os.environ.get("RANK", 0))


def join(engine: config.Engine) -> World:
    """The world this process belongs to, once it is complete: NCCL between GPUs, gloo between CPUs.

    Raises `UserError` for an `engine.device` that the processes cannot have one each of.
    """
    place, size = rank(), int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return World(0, 1, choose_device(engine))
    if ":" in engine.device:
        raise UserError(
            f"engine.device is '{engine.device}', but {size} processes train together and each takes a device of its "
            "own: write auto, cuda or cpu."
        )
    if engine.device == "cuda" or (engine.device == "auto" and torch.cuda.is_available()):
        engine = dataclasses.replace(engine, device=f"cuda:{os.environ.get('LOCAL_RANK', place)}")
    device = choose_device(engine)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return World(place, size, device)


def fall_out() -> None:
    """After a failure: this process ends without waiting for the others, which torchrun or Slurm then ends as well."""
    atexit.unregister(dist.destroy_process_group)


def cores() -> int:
    """CPU cores for this process: its own as a Slurm task, else its share of the machine's; 1 or more."""
    if "SUBMITIT_EXECUTOR" in os.environ and "SLURM_CPUS_PER_TASK" in os.environ:
        return min(usable_cores(), int(os.environ["SLURM_CPUS_PER_TASK"]))
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _read_slurm() -> None:
    """Brings the tasks of a job that submitit started into the form in which torchrun names processes."""
    if "RANK" in os.environ or "SUBMITIT_EXECUTOR" not in os.environ:
        return
    import submitit

    if submitit.JobEnvironment().num_tasks > 1:
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
