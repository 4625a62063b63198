"""The network in kernels of our own is the network: in Triton's interpreter here, compiled on a GPU."""

import copy
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cbl import config
from cbl.data import augment
from cbl.engine import job
from cbl.errors import UserError
from cbl.models import resnet_cifar

ROOT = Path(__file__).resolve().parent.parent
TRITON = "triton", "3.6", "needs Triton 3.6, which torch 2.11 brings where it is built for CUDA"


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
    with torch.no_grad():  # far larger than its deviation, as of a channel that hardly changes
        for one in (model, plain):
            norm = one.get_submodule("layer2.0.bn1")
            norm.running_mean[:4], norm.running_var[:4] = 30.0, 1e-4
    with torch.no_grad():
        torch.testing.assert_close(network(x), plain(x), rtol=1e-3, atol=1e-4)


def stay_in_bounds() -> None:
    """From here on a kernel that reads or writes outside the memory of its own tensors ends in an error."""
    from triton.runtime import interpreter

    start, memory = interpreter.GridExecutor._init_args_hst, interpreter._interpreter
    spans: list[tuple[int, int]] = []

    def started(self: Any, args: Any, kwargs: Any) -> Any:
        found = start(self, args, kwargs)
        tensors = [a for a in (*found[0], *found[1].values()) if isinstance(a, torch.Tensor)]
        storages = [tensor.untyped_storage() for tensor in tensors]
        spans[:] = [(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages]
        return found

    def check(pointers: np.ndarray, mask: np.ndarray, size: int) -> None:
        first = pointers[np.broadcast_to(mask, pointers.shape)]
        inside = [(first >= begin) & (first + np.uint64(size) <= end) for begin, end in spans]
        assert np.logical_or.reduce(inside).all(), "outside the tensors of the kernel"

    class Guarded:
        def __getattr__(self, name: str) -> Any:
            return getattr(memory, name)

        def load(self, pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
            check(pointers, mask, np.dtype(dtype).itemsize)
            return memory.load(pointers, mask, other, dtype)

        def store(self, pointers: Any, value: Any, mask: Any) -> Any:
            check(pointers, mask, value.itemsize)
            return memory.store(pointers, value, mask)

        def atomic_rmw(self, operation: Any, pointers: Any, value: Any, mask: Any, order: Any) -> Any:
            check(pointers, mask, value.itemsize)
            return memory.atomic_rmw(operation, pointers, value, mask, order)

    interpreter.GridExecutor._init_args_hst = started
    interpreter._interpreter = Guarded()


def interpret(code: str) -> None:
    """In a process of its own: whether Triton interprets is decided when the kernels are defined."""
    code = f"from test_fused import stay_in_bounds; stay_in_bounds(); {code}"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("shortcut", "channels", "size"), [("mean_pool", 3, (8, 8)), ("strided", 1, (4, 12))])
def test_fused_is_the_network(shortcut: str, channels: int, size: tuple[int, int]) -> None:
    pytest.importorskip(*TRITON)
    interpret(f"from test_fused import compare; compare({shortcut!r}, {channels}, 'cpu', {size})")


def check_nan(device: str) -> None:
    """One NaN in one weight makes the loss NaN, by which a run that diverges is known."""
    from cbl.engine.fused import Fused

    if device == "cpu":  # the interpreter's larger of NaN and a number is NaN; a GPU's is the number
        from triton.runtime.interpreter import InterpreterBuilder

        InterpreterBuilder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    model = resnet_cifar(8, seed=0).to(device, memory_format=torch.channels_last)
    with torch.no_grad():
        model.layer2[0].conv1.weight[0, 0, 0, 0] = torch.nan  # type: ignore[index,union-attr]
    x = torch.randn(4, 3, 8, 8).to(device, memory_format=torch.channels_last)
    assert F.cross_entropy(Fused(model, "fp32")(x), torch.arange(4, device=device)).isnan()


def test_a_run_that_has_diverged_is_seen() -> None:
    pytest.importorskip(*TRITON)
    interpret("from test_fused import check_nan; check_nan('cpu')")


def compare_augmentation(device: str) -> None:
    """`augmented` beside crop, flip and scaling in torch, with both scalings and images of 3 channels and of 1."""
    from cbl.engine import fused

    generator = torch.Generator().manual_seed(0)
    for channels, scaled in [(3, False), (3, True), (1, False)]:
        padded = torch.randint(0, 256, (7, 12, 16, channels), generator=generator, dtype=torch.uint8).to(device)
        drawn = torch.stack([torch.randint(0, n, (150,), generator=generator) for n in (7, 5, 5, 2)]).to(device)
        mean, std = augment.channel_statistics(padded) if scaled else (None, None)
        index, dy, dx, flip = drawn.unbind(0)
        expected = augment.scale(augment.crop_flip(padded, index, dy, dx, flip.bool(), (8, 12)), mean, std)
        x = fused.augmented(padded, drawn, (8, 12), mean, std)
        assert x.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(x, expected, rtol=1e-6 if scaled else 0, atol=1e-6 if scaled else 0)


def test_augmentation_in_one_kernel_is_the_augmentation() -> None:
    pytest.importorskip(*TRITON)
    interpret("from test_fused import compare_augmentation; compare_augmentation('cpu')")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="called by the next test, for the interpreter")
@pytest.mark.usefixtures("stand_in")
def test_a_step_of_a_run() -> None:
    """The job's wiring: engine.fused changes neither loss nor gradients, augmentation and scaling among them."""
    stay_in_bounds()
    found = []
    for fused in (True, False):
        settings = {
            "dataset": {"name": "digits_lt"},
            "engine": {"device": "cuda", "fused": fused, "capture": False},
            "model": {"depth": 8},
            "recipe": {"batch_size": 8, "input_scaling": "mean_std"},
        }
        made = job.prepare(config.from_mapping(settings), torch.device("cuda"))
        assert (type(made.step.model).__name__ == "Fused") == fused
        assert (made.step.augmented is not None) == fused
        assert made.facts["device"] == "stand-in" + fused * ", fused kernels"  # all that tells such a run from others
        made.step.optimizer = SimpleNamespace(step=lambda: None, zero_grad=lambda: None)  # type: ignore[assignment]
        made.step.load(np.array([[range(8), [0, 1, 2, 1] * 2, [2, 1, 0, 1] * 2, [0, 1] * 4]]), np.array([0.1]))
        made.step()
        found.append([made.step.losses[:1].cpu(), *(p.grad.cpu() for p in made.model.parameters())])
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 1e-3 * b.norm()


def test_a_run_computes_in_the_kernels() -> None:
    pytest.importorskip(*TRITON)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"{__file__}::test_a_step_of_a_run"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout


@pytest.mark.parametrize(("shortcut", "size"), [("projection", (8, 8)), ("mean_pool", (8, 6))])
def test_what_the_kernels_cannot_do_is_refused(shortcut: str, size: tuple[int, int]) -> None:
    pytest.importorskip(*TRITON)
    with pytest.raises(UserError, match=f"{size[0]} x {size[1]} pixels: set engine.fused=false"):
        job._fused(resnet_cifar(8, shortcut=shortcut, seed=0), size, {})


def test_more_images_at_once_than_32_bits_count_are_refused() -> None:
    pytest.importorskip(*TRITON)
    network, size = resnet_cifar(8, 10), (124, 124)
    most = job.kernels().most_images(network, size)
    elements = [(images * 125 * 125 + 2176) * 16 for images in (most, most + 1)]  # 2,176 pixels after them
    assert elements[0] <= 2**31 < elements[1]
    job._fused(network, size, {"recipe.batch_size": most})
    with pytest.raises(UserError, match=rf"^engine.eval_batch makes {most + 1:,} images of 124 x 124 at once"):
        job._fused(network, size, {"recipe.batch_size": 128, "engine.eval_batch": most + 1})


@pytest.mark.parametrize("version", [None, "3.5.1"])
def test_without_its_triton_it_says_what_to_upgrade(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "cbl.engine.fused", raising=False)
    monkeypatch.delattr("cbl.engine.fused", raising=False)
    if version is None:
        monkeypatch.setitem(sys.modules, "triton", None)
    else:
        monkeypatch.setattr(pytest.importorskip("triton"), "__version__", version)
    with pytest.raises(UserError, match=rf"Triton 3.6 or newer \(.*{version or 'triton'}.*\): upgrade torch"):
        job._fused(resnet_cifar(8, seed=0), (8, 8), {})


def compile_for_an_h200(dtype: str) -> None:
    """Every kernel of a training step, of augmentation and evaluation, as launched; none of them is run."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from cbl.engine import fused

    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device=None: 0,
            get_active_torch_device=lambda: torch.device("cpu"),
            map_python_to_cpp_type=lambda name: name,
        )
    )
    shared: dict[str, int] = {}

    def launcher(kernel: Any, grid: tuple[int, ...]) -> Any:
        def launch(*given: Any, **options: Any) -> None:
            compiled = kernel.warmup(*given, grid=grid, **options)
            shared[kernel.__name__] = max(shared.get(kernel.__name__, 0), compiled.metadata.shared)

        return launch

    JITFunction.__getitem__ = launcher  # type: ignore[method-assign]
    x = torch.zeros(128, 3, 32, 32).to(memory_format=torch.channels_last)
    padded, drawn = torch.zeros(1, 40, 40, 3, dtype=torch.uint8), torch.zeros(4, 128, dtype=torch.int64)
    for scaling in ((None, None), (torch.zeros(3), torch.ones(3))):
        fused.augmented(padded, drawn, (32, 32), *scaling)
    for shortcut in ("mean_pool", "strided"):
        network = fused.Fused(resnet_cifar(8, shortcut=shortcut, seed=0).to(memory_format=torch.channels_last), dtype)
        network(x).sum().backward()
        network.eval()(x)
    assert shared.keys() == {
        "_augment", "_enter", "_convolution", "_block_end", "_last_gradient", "_backward_weight", "_backward_data",
        "_add_partials",
    }  # fmt: skip
    assert max(shared.values()) <= 227 * 1024, shared  # bytes that a block of threads may have there


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "tf32", "fp32"])
def test_the_kernels_compile_for_a_gpu_that_is_not_there(dtype: str, tmp_path: Path) -> None:
    """The interpreter sees neither what the compiler refuses nor more shared memory than there is."""
    pytest.importorskip(*TRITON)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"PYTHONPATH": paths, "TRITON_CACHE_DIR": str(tmp_path)}
    code = f"from test_fused import compile_for_an_h200; compile_for_an_h200({dtype!r})"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("shortcut", ["mean_pool", "strided"])
def test_fused_is_the_network_on_a_gpu(shortcut: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    compare(shortcut, 3, "cuda")
    compare(shortcut, 3, "cuda", (32, 28))
    compare_augmentation("cuda")
    check_nan("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["tf32", "bf16"])
def test_fused_rounds_no_more_than_torch_does(dtype: str) -> None:
    """The gradient's distance from that in float64, beside the distance of torch's own kernels in the same dtype."""
    from cbl.engine.fused import Fused
    from cbl.engine.step import precision

    torch.manual_seed(0)
    device = torch.device("cuda")
    model = resnet_cifar(8, seed=0).to(device, memory_format=torch.channels_last)
    exact = copy.deepcopy(model).double()
    x = torch.randn(128, 3, 32, 32).to(device, memory_format=torch.channels_last)
    target = torch.arange(128, device=device) % 10

    def gradient(network: torch.nn.Module, parameters: Iterable[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        F.cross_entropy(network(x), target).backward()
        gradients = []
        for p in parameters:
            assert p.grad is not None
            gradients.append(p.grad.double().flatten())
            p.grad = None
        return torch.cat(gradients)

    expected = gradient(exact, exact.parameters(), x.double())
    with precision(dtype, device):
        plain, fused = (gradient(net, model.parameters(), x) for net in (model, Fused(model, dtype)))
    off = [((found - expected).norm() / expected.norm()).item() for found in (plain, fused)]
    assert 0 < off[1] <= 2 * off[0], off
