"""What is measured on the predictions for a validation set that is spread over processes."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cbl import longtail
from cbl.engine.distributed import World
from cbl.engine.evaluate import BINS, bin_of, refuse_no_numbers


class Tally:
    """What is measured on predictions, as sums that processes can add up; all zero at first."""

    def __init__(self, classes: int, device: torch.device) -> None:
        self.images, self.top1, self.top5 = torch.zeros(3, classes, dtype=torch.int64, device=device)  # (C,) each
        self.confidence = torch.zeros(BINS, dtype=torch.float64, device=device)  # (BINS,) summed in each bin
        self.hits, self.count = torch.zeros(2, BINS, dtype=torch.int64, device=device)

    def add(self, logits: Tensor, target: Tensor) -> None:
        """A batch: logits (B, C) float, target (B,)."""
        classes = logits.shape[1]
        hit = logits.argmax(1) == target
        near = (logits.topk(min(5, classes)).indices == target[:, None]).any(1)
        for sums, of in ((self.images, target), (self.top1, target[hit]), (self.top5, target[near | hit])):
            sums += of.bincount(minlength=classes)
        confidence = logits.double().softmax(1).amax(1)  # (B,)
        member = bin_of(confidence)[:, None] == torch.arange(BINS, device=logits.device)  # (B, BINS)
        self.confidence += confidence @ member.double()
        self.hits += member[hit].sum(0)
        self.count += member.sum(0)

    def sum(self, world: World) -> "Tally":
        for tensor in (self.images, self.top1, self.top5, self.confidence, self.hits, self.count):
            world.sum(tensor)
        return self

    @property
    def error(self) -> float:
        """Top-1 error, %."""
        return 100 * (1 - self.top1.sum().item() / self.images.sum().item())

    def measure(self, counts: np.ndarray) -> dict[str, Any]:
        """As `evaluate.measure` of all logits, and the top-5 error. None for a class without validation images."""
        refuse_no_numbers(self.confidence)  # as that of one image is in no bin, it makes all of them so
        total = int(self.images.sum())
        wrong = (100 * (self.images - self.top1).double() / self.images).cpu().numpy()  # (C,), NaN without images
        rule, groups = longtail.class_groups(counts)
        found = {name: wrong[classes][self.images.cpu().numpy()[classes] > 0] for name, classes in groups.items()}
        return {
            "error_last": self.error,
            "error_top5": 100 * (1 - self.top5.sum().item() / total),
            "n_test": total,
            "per_class_error": [None if np.isnan(value) else value for value in wrong.tolist()],
            "groups": rule,
            "group_classes": {name: classes.tolist() for name, classes in groups.items()},
            **{f"error_{name}": float(values.mean()) if len(values) else None for name, values in found.items()},
            "ece": 100 * (self.confidence - self.hits).abs().sum().item() / total,
        }
