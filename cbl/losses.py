"""Class-balanced loss: effective numbers, the class weights made of them, and the three losses they weight.

Follows Cui et al., "Class-Balanced Loss Based on Effective Number of Samples" (CVPR 2019), sections 3 and 4, with the
scale of the authors' code where the paper leaves it open. Imports torch alone.
"""

import math
import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = ("softmax", "sigmoid", "focal")
REDUCTIONS = ("batch", "weight_sum", "none")
_NO_SIGN = torch.iinfo(torch.int64).max  # every bit but the sign


def effective_number(counts: Sequence[int] | Tensor, beta: float) -> Tensor:
    """Effective number of samples E_n = (1 - β^n) / (1 - β) of every class (paper, Proposition 1).

    counts: training images per class, (C,) whole numbers >= 1 as a list, numpy array or tensor, in class order. A
        pandas Series has an order of its own and is refused.
    beta: in [0, 1]; 0 gives E_n = 1, and 1 gives the limit E_n = n.
    Returns a (C,) float64 tensor on the CPU, accurate to a few units in the last place for `beta` as a double.
    Raises ValueError for counts or a beta outside these ranges.
    """
    counts = _checked_counts(counts)
    if not _lies(0.0, beta, 1.0):
        raise ValueError(f"beta must be a number in [0, 1], got {beta!r}; the paper uses 0.9, 0.99, 0.999 and 0.9999.")
    if beta == 0.0:
        return torch.ones_like(counts)
    if beta == 1.0:
        return counts.clone()  # never the caller's own memory
    # 1 - β^n cancels when β^n is close to 1; expm1 of n·log β does not. 1 - β itself is exact for β >= 0.5 and rounds
    # once below. log β is as good as log1p(-(1 - β)) here: β is given, so it carries no error for log to enlarge.
    return -torch.expm1(counts * math.log(beta)) / (1.0 - beta)


def class_balanced_weights(counts: Sequence[int] | Tensor, beta: float) -> Tensor:
    """Class weights proportional to 1 / E_n, scaled so that they sum to the number of classes (paper, section 4).

    Takes and raises what `effective_number` does. Returns a (C,) float64 tensor on the CPU. β = 0 gives exactly 1 for
    every class (no re-weighting), β = 1 inverse class frequency.
    """
    inverse = 1.0 / effective_number(counts, beta)  # (C,)
    return inverse * (len(inverse) / inverse.sum())


def softmax_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Softmax cross-entropy of each sample (paper, section 4.1): (B, C) logits, (B,) int64 target → (B,), unweighted.

    Like the next two functions it leaves checks to `ClassBalancedLoss`; unfit arguments raise torch's own errors.
    """
    return F.cross_entropy(_at_least_float32(logits), target, reduction="none")


def sigmoid_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Sigmoid cross-entropy of each sample, summed over the classes (paper, section 4.2): (B, C), (B,) → (B,)."""
    return -F.logsigmoid(_signed(logits, target)).sum(dim=1)


def focal_loss(logits: Tensor, target: Tensor, gamma: float) -> Tensor:
    """Sigmoid focal loss of each sample, Σ_i -(1 - p_i)^γ log p_i (paper, section 4.3): (B, C), (B,) → (B,).

    γ = 0 gives `sigmoid_loss` to the bit. Loss and gradient stay finite for |logit| up to 1e4 and beyond.
    """
    if gamma == 0:
        return sigmoid_loss(logits, target)  # below, a class masked with -inf would make 0 · -inf = NaN of γ = 0
    z = _signed(logits, target)  # (B, C)
    # 1 - p = σ(-z), so (1 - p)^γ = exp(γ·logsigmoid(-z)). The authors' form holds an exp(-z) that overflows at z < -88:
    # a badly wrong sample then loses its modulator and gets a gradient of NaN.
    modulator = torch.exp(gamma * F.logsigmoid(-z))  # (B, C), the gradient flows through it as in the authors' code
    return -(modulator * F.logsigmoid(z)).sum(dim=1)


class ClassBalancedLoss(nn.Module):
    """Class-balanced softmax, sigmoid or focal loss (paper, section 4): (logits (B, C), target (B,)) → scalar.

    counts: training images per class of the whole training set, (C,), each >= 1; class i is column i of the logits.
    kind: "softmax", "sigmoid" (binary cross-entropy summed over the classes) or "focal" (with `gamma`).
    beta: 0 for no balancing, towards 1 for inverse class frequency; the paper tries 0.9, 0.99, 0.999, 0.9999.
    gamma: focusing of the focal loss, >= 0; the other kinds ignore it.
    reduction: "batch" sums the weighted losses and divides by the batch size, as the authors' code does. "weight_sum"
        divides by the sum of the samples' weights, as `F.cross_entropy(weight=...)` does. "none" returns the weighted
        losses, (B,).

    Half-precision logits are taken to float32 first, under autocast too; float64 logits stay float64. The weights are
    float32: `.half()` or `.bfloat16()` of a module that holds the loss rounds them for good.

    Raises ValueError for bad arguments, for shapes that do not fit, for an empty batch, and for targets outside 0..C-1.
    The targets are checked only where that is free, on CPU tensors outside torch.compile; elsewhere the kernel that
    looks up the weights fails on them. No class index is ignored (there is no `ignore_index`).
    """

    weights: Tensor

    def __init__(
        self,
        counts: Sequence[int] | Tensor,
        kind: str = "focal",
        beta: float = 0.9999,
        gamma: float = 1.0,
        reduction: str = "batch",
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}.")
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}.")
        if not _lies(0.0, gamma, sys.float_info.max):
            raise ValueError(f"gamma must be a finite number >= 0, got {gamma!r}.")
        self.kind = kind
        self.beta = beta
        self.gamma = gamma
        self.reduction = reduction
        # A buffer, to follow the module to its device. Not in the state_dict: the constructor's counts and beta define
        # the weights, and a checkpoint saved under another beta must load without bringing the old weights back.
        self.register_buffer("weights", class_balanced_weights(counts, beta).float(), persistent=False)  # (C,)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        self._check(logits, target)
        target = target.long()
        if self.kind == "softmax":
            losses = softmax_loss(logits, target)  # (B,)
        elif self.kind == "sigmoid":
            losses = sigmoid_loss(logits, target)
        else:
            losses = focal_loss(logits, target, self.gamma)
        # Not by indexing, which counts a negative label from the end; an older torch.compile does so for gather too.
        index = target & _NO_SIGN if torch.compiler.is_compiling() else target
        weights = self.weights.gather(0, index)  # (B,): every sample is weighted by its own class
        weighted = weights * losses
        if self.reduction == "none":
            return weighted
        if self.reduction == "weight_sum":
            return weighted.sum() / weights.sum()
        return weighted.mean()

    def extra_repr(self) -> str:
        gamma = f", gamma={self.gamma}" if self.kind == "focal" else ""
        return f"classes={len(self.weights)}, kind={self.kind!r}, beta={self.beta}{gamma}, reduction={self.reduction!r}"

    def _check(self, logits: Tensor, target: Tensor) -> None:
        classes = len(self.weights)
        for name, given in (("logits", logits), ("target", target)):
            if not isinstance(given, Tensor):
                raise ValueError(f"{name} must be a tensor, got a {type(given).__name__}; torch.as_tensor makes one.")
        if logits.ndim != 2 or logits.shape[1] != classes:
            raise ValueError(
                f"logits must have shape (batch, {classes}), one column per class count, got {tuple(logits.shape)}."
            )
        if logits.shape[0] == 0:
            raise ValueError(f"the batch is empty (logits of shape {tuple(logits.shape)}), which has no loss; skip it.")
        if target.ndim != 1 or target.shape[0] != logits.shape[0]:
            raise ValueError(
                f"target must have shape ({logits.shape[0]},), one class index per sample, got {tuple(target.shape)}."
            )
        if not logits.is_floating_point():
            raise ValueError(f"logits must be floating point, got {logits.dtype}.")
        if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            raise ValueError(f"target must hold integer class indices, got {target.dtype}.")
        if logits.device != self.weights.device:
            raise ValueError(
                f"the logits are on {logits.device} but the loss is on {self.weights.device}; move it with .to(device)."
            )
        if target.device != logits.device:
            raise ValueError(f"the target is on {target.device} but the logits are on {logits.device}; move one.")
        # Reading values synchronises a GPU and breaks the graph under torch.compile; on the CPU it is all but free.
        if target.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = (int(bound) for bound in target.long().aminmax())  # uint16 to uint64 have none
            if low < 0 or high >= classes:
                wrong = low if low < 0 else high
                raise ValueError(f"target must lie in 0..{classes - 1} for {classes} class counts, got {wrong}.")


def _lies(low: float, value: float, high: float) -> bool:
    try:
        return bool(low <= value <= high)
    except (TypeError, ValueError, RuntimeError):  # a text, None, or an array of several
        return False


def _checked_counts(counts: Sequence[int] | Tensor) -> Tensor:
    """(C,) float64 on the CPU, or ValueError naming what is not a count."""
    if hasattr(counts, "iloc"):
        raise ValueError(
            f"counts must be in class order, which a pandas {type(counts).__name__} need not be (value_counts puts the "
            "largest class first); write .sort_index().to_numpy()."
        )
    try:
        # As a list, since torch takes an array's memory as it is: it refuses negative strides and foreign byte orders,
        # and warns of memory that is read-only, as pandas hands it out.
        if hasattr(counts, "tolist") and not isinstance(counts, Tensor):
            counts = counts.tolist()
        checked = torch.as_tensor(counts, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"counts must be a flat list of whole numbers, one per class, got {counts!r}.") from error
    if checked.ndim != 1 or len(checked) == 0:
        raise ValueError(f"counts must be a flat list, one per class, got shape {tuple(checked.shape)}.")
    is_count = torch.isfinite(checked) & (checked >= 1) & (checked == checked.floor())
    if not is_count.all():
        index = int((~is_count).nonzero()[0])
        raise ValueError(
            f"counts must be whole numbers >= 1, got {checked[index].item():g} for class {index}; "
            "leave classes without training images out."
        )
    return checked


def _at_least_float32(logits: Tensor) -> Tensor:
    # Once in float32, nothing the losses do is among the operations that autocast would take back to half precision.
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _signed(logits: Tensor, target: Tensor) -> Tensor:
    """z where the class is the true one, -z elsewhere, so that p = σ(result) is the probability of being right."""
    logits = _at_least_float32(logits)
    # A mask by comparison: F.one_hot would check the targets' range once more and fill an int64 tensor of this shape.
    is_true = target[:, None] == torch.arange(logits.shape[1], device=logits.device)  # (B, C)
    return torch.where(is_true, logits, -logits)
