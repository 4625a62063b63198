"""A GPU as the CPU can stand in for it, so that every line of the CUDA path runs on a machine without one.

Tensors on "cuda" are CPU tensors of which it is remembered that they are. An operation that mixes them with others is
refused, as CUDA does, and so is reading them as numpy. A graph records the operations of a capture and computes them
again, into the same memory: what the captured code does besides operations on tensors is not repeated, what would wait
for the device is refused in it, and tensors from before the capture are not kept alive by it. Streams and events do
nothing, as everything is done at once and in order: races, kernels, their rounding and their speed are what only a GPU
can tell.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
GROUP = "_group_tensors_by_device_and_dtype"
COPY = torch.ops.aten.copy_.default  # the one operation between devices; `.to` and `.cpu` are no operations here
READS = {torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.numpy}
FROM_HOST = {torch.tensor, torch.as_tensor}
WAITS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}


def is_cuda(value: Any) -> bool:
    return isinstance(value, torch.device | str) and str(value).startswith("cuda")


def is_cpu(value: Any) -> bool:
    return isinstance(value, torch.device | str) and str(value) == "cpu"


def is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Memory:
    """Which storages are on the stand-in."""

    def __init__(self) -> None:
        self.storages: dict[int, StorageWeakRef] = {}  # a weak reference keeps the address from being given again

    def holds(self, tensor: torch.Tensor) -> bool:
        return storage_of(tensor) in self.storages

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        reference = StorageWeakRef(tensor.untyped_storage())
        self.storages[reference.cdata] = reference
        return tensor

    def free(self, tensor: torch.Tensor) -> torch.Tensor:
        self.storages.pop(storage_of(tensor), None)
        return tensor


MEMORY = Memory()  # one for all tests: what is on the device stays in caches between them
Operation = tuple[Callable, tuple, dict, Any]  # what was called, with what, and what it gave


class Capture:
    """The operations of the capture under way, None when there is none."""

    operations: list[Operation] | None = None

    @classmethod
    def refuse(cls, what: Any) -> None:
        if cls.operations is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {what}")


class Operations(TorchDispatchMode):
    """Refuses to mix devices, passes them on to results, and records while a graph is captured."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if is_tensor(leaf)]
        held = [MEMORY.holds(tensor) for tensor in tensors]
        if any(held) and (func in WAITS or (func is COPY and not all(held))):
            Capture.refuse(func)
        if func is not COPY and any(held):
            strangers = [tuple(t.shape) for t, here in zip(tensors, held, strict=True) if not here and t.dim() > 0]
            if strangers:
                raise RuntimeError(f"Expected all tensors to be on the same device: {func} has {strangers} on the CPU.")
        result = func(*args, **kwargs)
        if any(held) and func is not COPY:
            for leaf in tree_leaves(result):
                if is_tensor(leaf):
                    MEMORY.take(leaf)
        if Capture.operations is not None:
            frozen = {id(t): t.detach().clone() for t, here in zip(tensors, held, strict=True) if not here}
            args, kwargs = tree_map(lambda leaf: frozen.get(id(leaf), leaf), (args, kwargs))  # numbers from the host
            Capture.operations.append((func, args, kwargs, result))
        return result


class Functions(TorchFunctionMode):
    """Answers what Python asks about devices, and moves tensors between them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == torch.Tensor.device.__get__:
            return CUDA if MEMORY.holds(args[0]) else func(*args)
        if func == torch.Tensor.is_cuda.__get__:
            return MEMORY.holds(args[0])
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.numpy and MEMORY.holds(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func in READS and MEMORY.holds(args[0]):
            Capture.refuse(func)
        if func is torch.Tensor.cpu:
            return MEMORY.free(args[0].clone()) if MEMORY.holds(args[0]) else args[0]
        named = [*args[1:], *kwargs.values()]
        to_cuda, to_cpu = any(map(is_cuda, named)), any(map(is_cpu, named))
        if not to_cuda and not (to_cpu and func is torch.Tensor.to):
            return func(*args, **kwargs)
        here = func is torch.Tensor.to and MEMORY.holds(args[0])
        if (func is torch.Tensor.to and here != to_cuda) or func in FROM_HOST:
            Capture.refuse(func)
        args, kwargs = tree_map(lambda leaf: torch.device("cpu") if is_cuda(leaf) else leaf, (args, kwargs))
        result = func(*args, **kwargs)
        if func is not torch.Tensor.to:
            return MEMORY.take(result)
        if here != to_cuda and storage_of(result) == storage_of(args[0]):
            result = result.clone()  # another device is other memory
        return MEMORY.take(result) if to_cuda else MEMORY.free(result) if here else result


class Outside:
    """A tensor that was there before a capture: the graph knows its address, and does not keep it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.dtype, self.place = tensor.dtype, (tensor.storage_offset(), tensor.size(), tensor.stride())

    def __call__(self) -> torch.Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            raise RuntimeError("A graph uses memory that was given back.")
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.place)


class Graph:
    """A CUDA graph: the operations of its capture, computed again into the memory of their results."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []

    def end(self) -> None:
        """Keeps what was done on the device, and lets go of all tensors that were not made in the capture."""
        self.operations = [
            (func, *rest)
            for func, *rest in self.operations
            if any(map(MEMORY.holds, filter(is_tensor, tree_leaves(rest))))
        ]
        inside: set[int] = set()
        seen: set[int] = set()
        for _, args, kwargs, result in self.operations:
            seen |= set(map(storage_of, filter(is_tensor, tree_leaves((args, kwargs)))))
            inside |= set(map(storage_of, filter(is_tensor, tree_leaves(result)))) - seen
            seen |= inside

        def let_go(leaf: Any) -> Any:
            outside = is_tensor(leaf) and MEMORY.holds(leaf) and storage_of(leaf) not in inside
            return Outside(leaf) if outside else leaf

        self.operations = [(func, *tree_map(let_go, rest)) for func, *rest in self.operations]

    def replay(self) -> None:
        with torch.no_grad(), _disable_current_modes(), torch._C.DisableTorchFunction():
            for func, *rest in self.operations:
                args, kwargs, recorded = tree_map(lambda leaf: leaf() if isinstance(leaf, Outside) else leaf, rest)
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(recorded), tree_leaves(again), strict=True):
                    if is_tensor(old) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Stream:
    def __init__(self, *args: Any) -> None: ...
    def wait_stream(self, other: "Stream") -> None: ...
    def synchronize(self) -> None:
        Capture.refuse("synchronize")

    def record(self) -> None: ...  # of an event
    def query(self) -> bool:
        Capture.refuse("query")
        return True


def grouped(lists: Any, with_indices: bool = False, find: Any = torch.optim.Optimizer.__dict__[GROUP]) -> Any:
    """An optimizer's tensors by device, which torch otherwise finds out without asking Python."""
    groups = find.__func__(lists, with_indices)
    return {
        (next((t.device for t in held[0] if t is not None), device), dtype): (held, indices)
        for (device, dtype), (held, indices) in groups.items()
    }


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Graph]]:
    """`cuda` is a device in this test; gives the graphs that were captured."""
    graphs: list[Graph] = []

    @contextlib.contextmanager
    def graph(cuda_graph: Graph, **kwargs: Any) -> Iterator[None]:
        Capture.operations = cuda_graph.operations
        try:
            yield
        finally:
            Capture.operations = None
            cuda_graph.end()
            graphs.append(cuda_graph)

    replaced = {
        "CUDAGraph": Graph,
        "Stream": Stream,
        "Event": Stream,
        "current_stream": Stream,
        "graph": graph,
        "stream": lambda stream: contextlib.nullcontext(),
        "device_count": lambda: 1,
        "get_device_name": lambda device: "stand-in",
        "mem_get_info": lambda device: (95, 100),
        "synchronize": lambda *device: Capture.refuse("synchronize"),
        "set_device": lambda device: None,
        "reset_peak_memory_stats": lambda device: None,
        "memory_reserved": lambda device: 2**20,
        "max_memory_reserved": lambda device: 2**20,
        "memory_allocated": lambda device: 2**20,
        "max_memory_allocated": lambda device: 3 * 2**20,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)
    # private, and absent from a build for the CPU; torch's own users of graphs call it around a capture too
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    monkeypatch.setattr(torch.optim.Optimizer, GROUP, staticmethod(grouped))
    with Operations(), Functions():
        yield graphs
