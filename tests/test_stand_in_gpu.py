"""The stand-in for a GPU does what it says; what it is for stands where the CUDA path is tested."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cbl.engine.step import capture

CUDA = torch.device("cuda")


@pytest.mark.usefixtures("stand_in")
def test_devices_are_not_mixed() -> None:
    there, here = torch.ones(3, device=CUDA), torch.ones(3)
    assert there.device == torch.device("cuda:0") and there.is_cuda and not here.is_cuda
    assert (2 * there.view(3, 1)).sum().is_cuda and not there.cpu().is_cuda and here.to(CUDA).is_cuda
    assert (there + torch.tensor(1.0)).is_cuda  # a number may come from the host
    for wrong in (lambda: there + here, lambda: torch.cat([there, here]), lambda: here.index_select(0, there.long())):
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            wrong()
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        there.numpy()


@pytest.mark.usefixtures("stand_in")
def test_moving_is_a_copy() -> None:
    there = torch.ones(3, device=CUDA)
    back = there.cpu()
    there.zero_()
    assert back.tolist() == [1, 1, 1] and there.tolist() == [0, 0, 0]
    there.copy_(back)
    assert there.is_cuda and there.tolist() == [1, 1, 1]


@pytest.mark.usefixtures("stand_in")
def test_a_graph_repeats_operations_and_nothing_else() -> None:
    x, calls = torch.zeros(2, device=CUDA), []

    def function() -> torch.Tensor:
        calls.append("called")
        x.add_(len(calls))
        return x * 10

    replay = capture(function, [x], warm_up=1)
    assert x.tolist() == [0, 0] and len(calls) == 2
    assert replay().tolist() == [20, 20]  # 2 is what `len` said while it was captured
    assert replay().tolist() == [40, 40] and len(calls) == 2


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x.copy_(torch.ones(2)),
        lambda x: x * torch.tensor(0.1, device=CUDA),
        lambda x: x + torch.ones(2).to(CUDA),
        lambda x: torch.cuda.synchronize(),
        lambda x: torch.cuda.Event().synchronize(),
    ],
)
def test_a_capture_refuses_what_waits(wrong: Callable[[torch.Tensor], Any]) -> None:
    x = torch.zeros(2, device=CUDA)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        capture(lambda: wrong(x), [], warm_up=0)
    assert capture(lambda: x * 0.1 + torch.ones(2, device=CUDA), [], warm_up=0)().tolist() == [1, 1]


@pytest.mark.usefixtures("stand_in")
def test_a_graph_does_not_repeat_what_was_done_on_the_host() -> None:
    x, here, number = torch.zeros(2, device=CUDA), torch.zeros(1), torch.tensor(1.0)
    replay = capture(lambda: (x.add_(number), here.add_(1)), [], warm_up=0)
    number.fill_(7)  # the graph has its value
    replay()
    assert x.tolist() == [2, 2] and here.tolist() == [1]


@pytest.mark.usefixtures("stand_in")
def test_a_graph_keeps_no_tensor_from_before_its_capture() -> None:
    x = torch.ones(2, device=CUDA)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = 2 * (x + 1)
    x.fill_(4)
    graph.replay()
    assert y.tolist() == [10, 10]
    del x
    with pytest.raises(RuntimeError, match="memory that was given back"):
        graph.replay()
