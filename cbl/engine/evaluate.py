"""Predictions on the whole test set, and what is measured on them."""

from typing import Any

import numpy as np
import torch

from cbl import longtail
from cbl.engine.step import Scaling, precision
from cbl.errors import UserError

BINS = 15  # of the confidence, for the calibration


@torch.no_grad()
def predict(model: torch.nn.Module, images: torch.Tensor, scaling: Scaling, batch: int, dtype: str) -> torch.Tensor:
    """float32 logits (N, C) of uint8 images (N, H, W, C), with batch norm's running statistics."""
    model.eval()
    with precision(dtype, images.device):
        logits = [model(scaling(part)).float() for part in images.split(batch)]
    model.train()
    return torch.cat(logits)


def error(logits: torch.Tensor, target: torch.Tensor) -> float:
    """Top-1 error in percent; the prediction is the largest logit for every loss."""
    return 100.0 * (logits.argmax(1) != target).double().mean().item()


def confusion(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """(C, C) int64: row the true class, column the predicted one."""
    classes = logits.shape[1]
    return torch.bincount(target * classes + logits.argmax(1), minlength=classes**2).reshape(classes, classes)


def bin_of(confidence: torch.Tensor) -> torch.Tensor:
    """The number of the bin of each confidence: (k / BINS, (k + 1) / BINS], the first one closed at 0."""
    return (torch.ceil(confidence * BINS) - 1).clamp(0, BINS - 1).long()


def calibration(logits: torch.Tensor, target: torch.Tensor) -> dict[str, list[float] | float]:
    """Reliability of the softmax of the logits in `BINS` equal-width bins of the confidence.

    Returns `ece`, the expected calibration error in percent (mean |accuracy - confidence| weighted by the bins'
    shares), and per bin `confidence`, `accuracy` (both in percent, 0 where the bin is empty) and `count`. For
    sigmoid and focal the softmax is a convention of this report, not what the loss was trained on.
    """
    confidence, predicted = logits.double().softmax(1).max(1)  # (N,)
    hit = (predicted == target).double()
    number = bin_of(confidence)
    count = torch.bincount(number, minlength=BINS)
    held = count.clamp(min=1)
    mean_confidence = torch.bincount(number, confidence, minlength=BINS) / held
    mean_hit = torch.bincount(number, hit, minlength=BINS) / held
    gap = (mean_confidence - mean_hit).abs() * count / len(target)
    return {
        "ece": 100 * gap.sum().item(),
        "confidence": (100 * mean_confidence).tolist(),
        "accuracy": (100 * mean_hit).tolist(),
        "count": count.tolist(),
    }


def refuse_no_numbers(outputs: torch.Tensor) -> None:
    """Raises `UserError`: a loss is taken before its update, so that the last update's divergence shows only here."""
    if not outputs.isfinite().all():
        raise UserError(
            "The final network puts out numbers that are not finite: try a lower recipe.learning_rate, a longer "
            "recipe.warmup_epochs or engine.dtype=fp32."
        )


def measure(logits: torch.Tensor, target: torch.Tensor, counts: np.ndarray) -> dict[str, Any]:
    """What a record says of the final network: error, per class and by groups of classes, calibration; all in percent.

    A group's error is the mean over its classes; None for a group without classes. Raises `UserError` for logits that
    are no numbers.
    """
    logits, target = logits.cpu(), target.cpu()  # weighted bincount is not deterministic on CUDA
    refuse_no_numbers(logits)
    table = confusion(logits, target)
    total = table.sum(1)
    per_class = 100 * (total - table.diagonal()).double() / total  # (C,)
    rule, groups = longtail.class_groups(counts)
    return {
        "error_last": error(logits, target),
        "per_class_error": per_class.tolist(),
        "groups": rule,
        "group_classes": {name: classes.tolist() for name, classes in groups.items()},
        **{
            f"error_{name}": per_class[torch.from_numpy(classes)].mean().item() if len(classes) else None
            for name, classes in groups.items()
        },
        "ece": calibration(logits, target)["ece"],
    }
