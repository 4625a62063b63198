"""The network in kernels of our own is the network: in Triton's interpreter here, compiled on a GPU."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from cbl.engine import job
from cbl.errors import UserError
from cbl.models import resnet_cifar

ROOT = Path(__file__).resolve().parent.parent


def compare(shortcut: str, channels: int, device: str, size: tuple[int, int] = (8, 8)) -> None:
    """Loss, gradients, running statistics and evaluation of `Fused` beside those of torch's network, in float32."""
    from cbl.engine.fused import Fused

    torch.manual_seed(0)
    model = resnet_cifar(8, in_channels=channels, shortcut=shortcut, seed=0)
    model.to(device, memory_format=torch.channels_last)
    plain, network = copy.deepcopy(model), Fused(model, "fp32")
    x = torch.randn(5, channels, *size).to(device, memory_format=torch.channels_last)
    target = torch.arange(5, device=device)
    losses = [F.cross_entropy(net(x), target) for net in (network, plain)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-3 * b.grad.norm(), name
    for (name, a), b in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    network.eval()
    plain.eval()
    with torch.no_grad():
        torch.testing.assert_close(network(x), plain(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("shortcut", "channels", "size"), [("mean_pool", 3, (8, 8)), ("strided", 1, (4, 12))])
def test_fused_is_the_network(shortcut: str, channels: int, size: tuple[int, int]) -> None:
    """In a process of its own: whether Triton interprets is decided when the kernels are defined."""
    pytest.importorskip("triton", reason="needs Triton, which torch brings where it is built for CUDA")
    code = f"from test_fused import compare; compare({shortcut!r}, {channels}, 'cpu', {size})"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("shortcut", "size"), [("projection", (8, 8)), ("mean_pool", (8, 6))])
def test_what_the_kernels_cannot_do_is_refused(shortcut: str, size: tuple[int, int]) -> None:
    pytest.importorskip("triton", reason="needs Triton, which torch brings where it is built for CUDA")
    with pytest.raises(UserError, match=f"{size[0]} x {size[1]} pixels: set engine.fused=false"):
        job._fused(resnet_cifar(8, shortcut=shortcut, seed=0), size, "bf16")


def test_without_triton_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "cbl.engine.fused", raising=False)
    monkeypatch.delattr("cbl.engine.fused", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UserError, match="pip install triton"):
        job._fused(resnet_cifar(8, seed=0), (8, 8), "bf16")


@pytest.mark.gpu
@pytest.mark.parametrize("shortcut", ["mean_pool", "strided"])
def test_fused_is_the_network_on_a_gpu(shortcut: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    compare(shortcut, 3, "cuda")
    compare(shortcut, 3, "cuda", (32, 28))
