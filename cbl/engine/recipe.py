"""The official recipe as pure functions of the step: how many, at which rate, on which images, with what decay.

An epoch here is `images seen / N` with true division, so a batch may cross the end of an epoch, as in the official
code. Steps count from 0 and every function speaks of the state before the update.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cbl import config
from cbl.data.augment import draw_augmentation
from cbl.errors import UserError


def total_steps(recipe: config.Recipe, n_train: int) -> int:
    """`N * epochs // batch_size`: 21,868 for CIFAR-10 at imbalance factor 50."""
    return n_train * recipe.epochs // recipe.batch_size


def epoch_steps(recipe: config.Recipe, n_train: int, epoch: int) -> range:
    """The steps that begin in `epoch` (0-indexed); together the epochs hold every step once."""
    return range(*(n_train * (epoch + i) // recipe.batch_size for i in (0, 1)))


def learning_rate(recipe: config.Recipe, n_train: int, step: int) -> float:
    """Linear warm-up from 0 by step, then constant, times `drop` at each milestone (paper, section 5.2)."""
    epoch = step * recipe.batch_size / n_train
    if epoch < recipe.warmup_epochs:
        return recipe.learning_rate * epoch / recipe.warmup_epochs
    return recipe.learning_rate * recipe.drop ** sum(epoch >= milestone for milestone in recipe.milestones)


def refuse_divergence(losses: np.ndarray, rates: Sequence[float] | np.ndarray, first: int) -> None:
    """Raises `UserError` for a loss (S,) that is no number; of the steps from `first` on, at their learning rates."""
    bad = np.flatnonzero(~np.isfinite(losses))
    if len(bad):
        raise UserError(
            f"The loss became {losses[bad[0]]} at step {first + bad[0]} (learning rate {rates[bad[0]]:.3g}): try a "
            "lower recipe.learning_rate, a longer recipe.warmup_epochs or engine.dtype=fp32."
        )


def parameter_groups(model: torch.nn.Module, recipe: config.Recipe, kind: str) -> list[dict]:
    """Two groups for SGD, with and without weight decay, by `recipe.decay_scope`:

    official              everything; for sigmoid and focal all but the last layer's bias (paper, section 5.2)
    everything            the last bias and batch norm too, whatever the loss
    not_bn                as official, but batch norm's scale and shift are exempt
    not_bn_not_last_bias  the authors' code for the large sets: both are exempt, whatever the loss
    only_last_bias        the last bias alone: how the paper's sentence is sometimes misread
    """
    last_bias = model.get_parameter("fc.bias")
    batch_norm = {
        id(p) for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters(recurse=False)
    }

    def decays(parameter: torch.nn.Parameter) -> bool:
        if recipe.decay_scope == "everything":
            return True
        if recipe.decay_scope == "only_last_bias":
            return parameter is last_bias
        if recipe.decay_scope.startswith("not_bn") and id(parameter) in batch_norm:
            return False
        if recipe.decay_scope == "not_bn_not_last_bias":
            return parameter is not last_bias
        return kind == "softmax" or parameter is not last_bias

    groups: dict[bool, list] = {True: [], False: []}
    for parameter in model.parameters():
        groups[decays(parameter)].append(parameter)
    decay = {True: recipe.weight_decay, False: 0.0}
    return [{"params": found, "weight_decay": decay[yes]} for yes, found in groups.items() if found]


@dataclass(frozen=True)
class Stream:
    """Which images, shifts and flips each step sees: a pure function of the seed and the step.

    Drawn on the CPU block by block from `(seed, block)`, so that any device, any neighbour and a resumed run see the
    same. With `order="shuffle"` a block is an epoch and each image comes once. With `"official_stream"` a block is
    what the official pipeline gives between two of its restarts, every 2 epochs: the records in `record_order`,
    repeated, through a shuffle buffer of 0.4 N + 3 * batch_size records.
    """

    n: int  # training images
    batch_size: int
    seed: int
    order: str
    shift: int  # pixels
    flip: bool
    record_order: np.ndarray  # (n,) positions as the official generator writes them

    @property
    def block_length(self) -> int:
        """Images in a block."""
        if self.order == "shuffle":
            return self.n
        return max(1, 2 * self.n // self.batch_size) * self.batch_size

    def block(self, number: int) -> np.ndarray:
        """(4, block_length) int64: position in the subset, row and column of the crop, flip (0 or 1)."""
        # RandomState is the one numpy generator whose stream is promised never to change
        rng = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([self.seed, number])))
        length = self.block_length
        if self.order == "shuffle":
            position = rng.permutation(self.n)
        else:
            position = self.record_order[_buffered(rng, self.n, int(0.4 * self.n) + 3 * self.batch_size, length)]
        dy, dx, flip = draw_augmentation(rng, length, self.shift, self.flip)
        return np.stack([position, dy, dx, flip]).astype(np.int64)

    def epochs(self, recipe: config.Recipe, first: int = 0) -> Iterator[tuple[range, np.ndarray]]:
        """From epoch `first` on: its steps, and (steps, 4, batch_size) int64 as `block` says."""
        held: dict[int, np.ndarray] = {}
        for epoch in range(first, recipe.epochs):
            steps = epoch_steps(recipe, self.n, epoch)
            begin, end = steps.start * self.batch_size, steps.stop * self.batch_size
            needed = range(begin // self.block_length, -(-end // self.block_length))
            held = {number: held[number] if number in held else self.block(number) for number in needed}
            if not steps:
                yield steps, np.empty((0, 4, self.batch_size), np.int64)
                continue
            images = np.concatenate(list(held.values()), axis=1)  # (4, images)
            offset = begin - needed.start * self.block_length
            images = images[:, offset : offset + end - begin].reshape(4, len(steps), self.batch_size)
            yield steps, np.ascontiguousarray(images.transpose(1, 0, 2))


def _buffered(rng: np.random.RandomState, n: int, buffer_size: int, length: int) -> np.ndarray:
    """(length,) records 0..n-1, repeated without end, as a shuffle buffer lets them out."""
    buffer = [i % n for i in range(buffer_size)]
    out = np.empty(length, np.int64)
    for i, slot in enumerate(rng.randint(buffer_size, size=length)):
        out[i] = buffer[slot]
        buffer[slot] = (buffer_size + i) % n
    return out
