"""The floor of a step: its operations and bytes, counted while it runs, and the time they take at this device's rates.

`count` sees every tensor operation that a function makes, backward pass and update included. A step cannot be faster
than its products at the rate of a large matrix product, or its bytes at the rate of a large copy, whichever takes
longer, operation by operation; what is small enough for a cache may beat the second.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from cbl.engine.step import precision

_WRITE_ONLY = {"copy_", "fill_", "zero_"}
_GATHERS = {"index_select", "index", "gather"}  # read of their source what they return


@dataclasses.dataclass(frozen=True)
class Operation:
    """One call of a tensor operation that moves data."""

    name: str
    flops: int  # of convolutions and matrix products, 2 per multiplication with addition
    bytes: int  # every input read once, every result written once
    fused_bytes: int  # the same where an elementwise operation rides on its neighbour and reads its further inputs only


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a device reaches on large operands."""

    bytes_per_second: float
    flops_per_second: float


def count(function: Callable[[], Any]) -> list[Operation]:
    """The operations of one call of `function`, on whatever device and in whatever precision it computes."""
    with _Counter() as counter:
        function()
    return counter.operations


def seconds(operations: Sequence[Operation], rates: Rates, fused: bool = True) -> float:
    """Least time for `operations`, one after another: each is bound by its products or by its bytes."""
    return sum(
        max(o.flops / rates.flops_per_second, (o.fused_bytes if fused else o.bytes) / rates.bytes_per_second)
        for o in operations
    )


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        result = operator(*args, **kwargs)
        if isinstance(operator, torch._ops.OpOverload):
            self.operations += _operation(operator, args, kwargs, result)
        return result


def _operation(operator: torch._ops.OpOverload, args: tuple, kwargs: dict, result: Any) -> list[Operation]:
    """The call as a list of one, or of none where nothing moves: views, empty tensors, numbers."""
    name = operator.overloadpacket.__name__
    inputs = _tensors((args, kwargs))
    changed = [
        tensor
        for place, argument in enumerate(operator._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
        for tensor in _tensors(args[place] if place < len(args) else kwargs.get(argument.name))
    ]
    shared = {tensor.untyped_storage()._cdata for tensor in inputs}
    new = [tensor for tensor in _tensors(result) if tensor.untyped_storage()._cdata not in shared]
    if name.startswith("empty") or not (changed or new):
        return []
    read = [_size(tensor) for tensor in inputs]
    written = sum(map(_size, changed)) + sum(map(_size, new))
    if name in _WRITE_ONLY:
        read = read[1:]
    if name in _GATHERS:
        read[0] = min(read[0], written)
    flops = 0
    if formula := flop_registry.get(operator.overloadpacket):
        flops = formula(*args, **kwargs, out_val=result)
    rides = torch.Tag.pointwise in operator.tags or name == "_to_copy"
    whole = sum(read) + written
    return [Operation(name, flops, whole, sum(read) - max(read, default=0) if rides else whole)]


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _size(tensor: torch.Tensor) -> int:
    """Bytes of the distinct elements: an expanded dimension has stride 0 and is one."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else min(size, 1)
    return elements * tensor.element_size()


def measure_rates(device: torch.device, dtype: str) -> Rates:
    """The best of a few large copies (bytes read and written) and of a few large products in `dtype`."""
    big = device.type == "cuda"
    source = torch.ones(2**28 if big else 2**24, device=device)  # 1 GiB, 64 MiB: beyond most caches
    target = torch.empty_like(source)
    # neg, and not copy_, which has one thread on the CPU
    copy = best_seconds(lambda: torch.neg(source, out=target), device)

    size = 8192 if big else 512
    kinds = {torch.bfloat16} if dtype == "bf16" else {torch.float32}
    if not big:
        kinds.add(torch.float32)  # a processor without bfloat16 arithmetic computes in float32 and is slow at the rest
    with precision(dtype, device, autocast=False):
        product = min(_product_seconds(size, kind, device) for kind in kinds)
    return Rates(2 * source.nbytes / copy, 2 * size**3 / product)


def _product_seconds(size: int, kind: torch.dtype, device: torch.device) -> float:
    a, b = torch.randn(2, size, size, device=device).to(kind).unbind(0)  # a GPU is faster on constants
    return best_seconds(lambda: a @ b, device)


def best_seconds(function: Callable[[], Any], device: torch.device, repeats: int = 20, limit: float = 1.0) -> float:
    """The fastest of up to `repeats` calls in some `limit` seconds, the device waited for; the first does not count."""
    taken: list[float] = []
    end = time.perf_counter() + limit
    while len(taken) < 2 or (len(taken) <= repeats and time.perf_counter() < end):
        began = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - began)
    return min(taken[1:])
