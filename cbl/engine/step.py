"""One training step over images that are resident on the device, and the precision that it is computed in.

The step reads its row of the epoch's plan by a counter that lives on the device, so that it needs nothing from the
host: called as it is it is the plain step, captured once as a CUDA graph it is the fast one, and both are this code.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from cbl import config
from cbl.data import augment


@contextlib.contextmanager
def precision(dtype: str, device: torch.device, autocast: bool = True) -> Iterator[None]:
    """fp32 is true fp32 on a GPU too; tf32 rounds the inputs of its products; bf16 is autocast.

    Backward without `autocast`, which is for the forward pass alone: the rounding of fp32's products holds for both.
    """
    cudnn, matmul = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    try:
        # each weight is cast once per step in any case, and a cache would keep tensors of a captured graph
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast and dtype == "bf16", cache_enabled=False):
            yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = cudnn, matmul


class Scaling:
    """uint8 (B, H, W, C) -> float32 (B, C, H, W): `x/128 - 1`, or the training images' mean and deviation."""

    def __init__(self, images: torch.Tensor | None, device: torch.device) -> None:
        mean, std = augment.channel_statistics(images) if images is not None else (None, None)
        self.mean = None if mean is None else mean.to(device)
        self.std = None if std is None else std.to(device)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return augment.scale(images, self.mean, self.std)


class Step:
    """Gather, crop, flip, scale, forward, loss, backward, update: `step()` once per row of `load`.

    images  uint8 (M, H + 2s, W + 2s, C), padded, on the device
    labels  int64 (M,), on the device
    """

    def __init__(
        self,
        model: torch.nn.Module,
        loss: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        images: torch.Tensor,
        labels: torch.Tensor,
        scaling: Scaling,
        size: tuple[int, int],
        batch_size: int,
        longest: int,
        dtype: str,
        augmented: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        device = images.device
        longest = max(longest, 4)  # the warm-up of a capture takes rows too
        self.model, self.loss, self.optimizer, self.scaling = model, loss, optimizer, scaling
        self.augmented = augmented  # not `or self._augmented`: a cycle would keep the job until Python looks for it
        self.images, self.labels, self.size, self.dtype, self.device = images, labels, size, dtype, device
        self.plan = torch.zeros(longest, 4, batch_size, dtype=torch.int64, device=device)
        self.rates = torch.zeros(longest, device=device)  # learning rate of each row
        self.losses = torch.zeros(longest, device=device)
        self.at = torch.zeros(1, dtype=torch.int64, device=device)  # the next row
        self.rate = optimizer.param_groups[0]["lr"]  # one tensor, shared by the groups
        self.rows = 0

    def load(self, plan: np.ndarray, rates: np.ndarray) -> None:
        """The rows of an epoch: plan (S, 4, B) = image, crop row, crop column, flip; rates (S,)."""
        self.rows = len(plan)
        for buffer, values in ((self.plan, plan), (self.rates, rates)):
            source = torch.from_numpy(values).to(buffer.dtype)
            if self.device.type == "cuda":
                source = source.pin_memory()  # so that the copy queues behind the steps and the host goes on
            buffer[: self.rows].copy_(source, non_blocking=True)
        self.at.zero_()

    def _augmented(self, drawn: torch.Tensor) -> torch.Tensor:
        """(4, B) image, crop row, crop column, flip -> (B, C, H, W) float32; what `augmented` does in one kernel."""
        index, dy, dx, flip = drawn.unbind(0)  # (B,) each
        return self.scaling(augment.crop_flip(self.images, index, dy, dx, flip.bool(), self.size))

    def __call__(self) -> None:
        drawn = self.plan.index_select(0, self.at)[0]  # (4, B)
        with precision(self.dtype, self.device):
            logits = self.model((self.augmented or self._augmented)(drawn))  # (B, C)
            loss = self.loss(logits, self.labels.index_select(0, drawn[0]))
        with precision(self.dtype, self.device, autocast=False):
            loss.backward()
        self.rate.copy_(self.rates.index_select(0, self.at)[0])
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.index_copy_(0, self.at, loss.detach().reshape(1))
        self.at.add_(1)

    def epoch_losses(self) -> np.ndarray:
        """(S,) the loss of every row; waits for the device."""
        return self.losses[: self.rows].cpu().numpy()


def sgd(groups: list[dict], recipe: config.Recipe, device: torch.device) -> torch.optim.SGD:
    """SGD with momentum whose learning rate is a tensor on the device and whose momentum exists from the start."""
    rate = torch.zeros((), device=device)
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=recipe.momentum, nesterov=recipe.nesterov, fused=True)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            # zero and present, not absent until the first step: a captured step must find it, a checkpoint too
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def capture(function: Callable[[], Any], restore: list[torch.Tensor], warm_up: int = 3) -> Callable[[], Any]:
    """`function` recorded once as a CUDA graph; calling the result replays it and returns the same output tensors.

    `function` is run `warm_up` times first, so that cuDNN has chosen its kernels; the tensors in `restore`, which it
    changes, are put back in place afterwards.
    """
    kept = [tensor.detach().clone() for tensor in restore]
    stream = torch.cuda.current_stream()
    side = torch.cuda.Stream()
    side.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        for _ in range(warm_up):
            function()
    side.synchronize()
    # torch keeps one workspace of cuBLAS for each of its 32 streams: graphs captured on the same one would share it
    # while they run side by side, and the first to go would free it for all. Cleared, each has its own.
    torch._C._cuda_clearCublasWorkspaces()
    # thread_local: other threads of the process (W&B's, a progress bar's) may call CUDA meanwhile
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        output = function()
    torch._C._cuda_clearCublasWorkspaces()
    stream.wait_stream(side)
    with torch.no_grad():
        for tensor, value in zip(restore, kept, strict=True):
            tensor.copy_(value)

    def replay(reads: Callable[[], Any] = function) -> Any:  # kept: the graph has addresses, `function` the tensors
        graph.replay()
        return output

    return replay
