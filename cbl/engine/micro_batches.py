"""One training step over a batch that is spread over processes and over micro-batches within each of them."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cbl import config
from cbl.engine.distributed import World
from cbl.engine.step import precision
from cbl.losses import ClassBalancedLoss

CHECK_STEPS = 50  # at most, between two looks at the losses, for which the host waits for the device


class Step:
    """Forward, loss, backward and update for one batch, its micro-batches one by one: `step(batch, rate)`.

    The loss is that of the whole batch on one device. The sum over a process's micro-batches is the sum of backward
    passes, that over processes is DistributedDataParallel's; the divisor is that of the whole batch in all of them.
    Losses stay on the device until `report`, which is due after `CHECK_STEPS` steps at the latest.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: ClassBalancedLoss,  # with reduction "none"
        reduction: str,
        optimizer: torch.optim.Optimizer,
        scaling: Callable[[Tensor], Tensor],  # uint8 (B, S, S, 3) -> float32 (B, 3, S, S)
        run: config.Run,
        world: World,
    ) -> None:
        self.loss, self.reduction, self.optimizer, self.scaling, self.world = loss, reduction, optimizer, scaling, world
        self.batch_size, self.dtype = run.recipe.batch_size, run.engine.dtype
        self.rate = optimizer.param_groups[0]["lr"]  # one tensor, shared by the groups
        self.losses = torch.zeros(CHECK_STEPS, dtype=torch.float64, device=world.device)
        self.count = 0  # of losses since the last report
        self.statistics = Statistics(model, world)
        self.network = model
        if world.size > 1:
            only = [world.device] if world.device.type == "cuda" else None
            self.network = DistributedDataParallel(model, device_ids=only, gradient_as_bucket_view=True)
            self.network.broadcast_buffers = False  # they are the affair of `Statistics`
        # for each size alone: after a second one torch would compile for any, into slower code
        self.forward = torch.compile(self.network, dynamic=False) if run.engine.compile else self.network
        self.image_bytes: float | None = None

    def __call__(self, batch: Sequence[tuple[Tensor, Tensor]], rate: float) -> None:
        divisor = self._divisor(batch)
        self.statistics.begin()
        for number, (images, target) in enumerate(batch, 1):
            together = contextlib.nullcontext() if number == len(batch) else self._alone()
            with together:
                self.losses[self.count] += self._backward(images, target, divisor)
            self.statistics.add(1 / len(batch))
        self.rate.fill_(rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.count += 1

    def report(self, *flags: bool) -> tuple[np.ndarray, list[bool]]:
        """(S,) losses of the S steps since the last report, and the flags that any process raised. Waits."""
        raised = torch.tensor(flags, dtype=torch.float64, device=self.losses.device)
        told = self.world.sum(torch.cat([self.losses[: self.count], raised])).cpu().numpy()
        losses, flagged = np.split(told, [self.count])
        self.losses.zero_()
        self.count = 0
        return losses, [bool(flag) for flag in flagged]

    def fits(self, images: int, size: int) -> bool:
        """Whether forward and backward of so many images of `size` pixels fit in this device's memory.

        Weights, momentum and batch norm's statistics are afterwards as before. What an image takes is kept for
        `memory`.
        """
        device = self.world.device
        cuda = device.type == "cuda"
        try:
            made_up = torch.zeros(images, size, size, 3, dtype=torch.uint8, device=device)
            target = torch.zeros(images, dtype=torch.int64, device=device)
            with self._alone():
                self._backward(made_up, target, divisor=images)
            if cuda:  # once more: the first time cuDNN tries its kernels, with more memory than it then takes
                self.optimizer.zero_grad()
                torch.cuda.reset_peak_memory_stats(device)
                with self._alone():
                    self._backward(made_up, target, divisor=images)
                taken = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
                self.image_bytes = taken / images
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            self.optimizer.zero_grad()
            self.statistics.give()
            if cuda:
                torch.cuda.empty_cache()

    def memory(self) -> dict[str, float]:
        """What the record says of a GPU's memory, in MiB."""
        if self.image_bytes is None:
            return {}
        peak = torch.cuda.max_memory_allocated(self.world.device)
        return {"memory_per_image_mib": round(self.image_bytes / 2**20, 2), "memory_peak_mib": round(peak / 2**20, 1)}

    def _backward(self, images: Tensor, target: Tensor, divisor: Tensor | int) -> Tensor:
        """Adds the gradients of a micro-batch's share of the loss, and returns that share."""
        with precision(self.dtype, self.world.device):
            logits = self.forward(self.scaling(images))  # (B, C)
            loss = self.loss(logits, target).sum() / divisor
        with precision(self.dtype, self.world.device, autocast=False):
            (loss * self.world.size).backward()  # DistributedDataParallel takes the mean over processes
        return loss.detach()

    def _divisor(self, batch: Sequence[tuple[Tensor, Tensor]]) -> Tensor | int:
        if self.reduction == "batch":
            return self.batch_size
        drawn = torch.cat([target for _, target in batch])
        return self.world.sum(self.loss.weights[drawn].sum())

    def _alone(self) -> contextlib.AbstractContextManager:
        """Backward without the sum over processes, which the last micro-batch's makes up for."""
        if isinstance(self.network, DistributedDataParallel):
            return self.network.no_sync()
        return contextlib.nullcontext()


class Statistics:
    """Batch norm's running mean and variance, moved once a step by their mean over the batch's micro-batches.

    Left to itself batch norm would move them at every micro-batch, and in each process to somewhere else, so that the
    network that is evaluated would depend on how many there are. So its momentum is set to 1, which leaves the last
    micro-batch's own statistics in its buffers, and the moving average is `kept` here. It is linear: the mean over
    processes is only needed when somebody looks.
    """

    def __init__(self, model: nn.Module, world: World) -> None:
        layers: list[Any] = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.momentum: float = layers[0].momentum  # one value in all of them
        self.live: list[Tensor] = [b for layer in layers for b in (layer.running_mean, layer.running_var)]
        self.world = world
        for layer in layers:
            layer.momentum = 1.0
        self.take()

    def take(self) -> None:
        """Starts from what is in batch norm's buffers."""
        self.kept = [buffer.clone() for buffer in self.live]

    def give(self) -> None:
        """Into batch norm's buffers."""
        for buffer, kept in zip(self.live, self.kept, strict=True):
            buffer.copy_(kept)

    def begin(self) -> None:
        torch._foreach_mul_(self.kept, 1 - self.momentum)

    def add(self, share: float) -> None:
        """The micro-batch just seen, as its share of this process's images."""
        torch._foreach_add_(self.kept, self.live, alpha=self.momentum * share)

    def settle(self) -> None:
        """The same in all processes and in batch norm's buffers: before evaluation and before a checkpoint."""
        for kept in self.kept if self.world.size > 1 else []:
            self.world.sum(kept).div_(self.world.size)
        self.give()
