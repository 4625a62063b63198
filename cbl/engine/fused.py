"""The CIFAR ResNet in kernels of our own: Triton, for GPUs, where cuDNN has little for 16 to 64 channels.

A convolution sums what the batch norm after it needs while it writes its output; batch norm, shortcut and ReLU are one
kernel. Backwards a convolution has two: the one for its weight also writes the gradient through the batch norm, and
the one for its input sums what the batch norm before it needs. What is computed is the same, with fewer roundings: in
bf16 what lies in memory is bfloat16, everything between is float32.

Tensors are NHWC. The sums over a batch are float64: blocks of threads add to them in whatever order they come, and the
difference that makes is far below float32.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from cbl.models.resnet_cifar import BasicBlock, PoolAndPad, ResNetCifar

EPS = tl.constexpr(1e-5)  # of every batch norm
MOMENTUM = tl.constexpr(0.1)

# (channels in, channels out) of a convolution -> pixels, inputs and outputs at a time, warps, rounds under way at once;
# of the weights' gradient also the pixels that one block of threads adds up
FORWARD = {
    (1, 16): (128, 16, 16, 4, 1), (3, 16): (128, 32, 16, 4, 1), (16, 16): (128, 64, 16, 4, 2),
    (16, 32): (128, 64, 32, 4, 2), (32, 32): (128, 64, 32, 4, 2), (32, 64): (64, 64, 64, 4, 2),
    (64, 64): (64, 64, 64, 4, 2),
}  # fmt: skip
BACKWARD_DATA = {
    (16, 16): (128, 64, 16, 4, 2), (16, 32): (128, 64, 16, 4, 2), (32, 32): (128, 64, 32, 4, 2),
    (32, 64): (64, 64, 32, 4, 2), (64, 64): (64, 64, 64, 4, 2),
}  # fmt: skip
BACKWARD_WEIGHT = {
    (1, 16): (128, 16, 16, 4, 2, 1024),
    (3, 16): (128, 32, 16, 4, 2, 1024), (16, 16): (64, 256, 16, 4, 2, 1024), (16, 32): (64, 256, 32, 4, 2, 512),
    (32, 32): (64, 128, 32, 4, 2, 512), (32, 64): (64, 64, 64, 4, 2, 256), (64, 64): (64, 64, 64, 4, 2, 512),
}  # fmt: skip
POINTWISE = 4096  # elements of a block of threads
ADD_BLOCK, ADD_AT_ONCE = 256, 16  # elements and partial sums of a block of threads at a time


# -- kernels -----------------------------------------------------------------------------------------------------------
# M pixels of the output, N of what a batch norm was taken over; C channels


@triton.jit
def _moments(sums, c, C: tl.constexpr, N: tl.constexpr):
    """Mean and 1 / deviation of channels c from the sums of values and of squares."""
    mean = tl.load(sums + c) * (1.0 / N)  # a float64 division is some 50 instructions, for every channel of a thread
    variance = tl.load(sums + C + c) * (1.0 / N) - mean * mean
    return mean.to(tl.float32), tl.rsqrt(variance.to(tl.float32) + EPS)


@triton.jit
def _affine(sums, gamma, beta, c, C: tl.constexpr, N: tl.constexpr):
    """Batch norm as scale and shift."""
    mean, rstd = _moments(sums, c, C, N)
    scale = tl.load(gamma + c) * rstd
    return scale, tl.load(beta + c) - mean * scale


@triton.jit
def _keep_running(sums, running_mean, running_var, c, C: tl.constexpr, N: tl.constexpr):
    """The running statistics after this batch, as torch has them: the variance unbiased."""
    mean = tl.load(sums + c) * (1.0 / N)
    variance = (tl.load(sums + C + c) * (1.0 / N) - mean * mean) * (N / (N - 1))
    before = tl.load(running_mean + c)  # constants to the right: Triton's interpreter takes them only there
    tl.store(running_mean + c, before + (mean.to(tl.float32) - before) * MOMENTUM)
    before = tl.load(running_var + c)
    tl.store(running_var + c, before + (variance.to(tl.float32) - before) * MOMENTUM)


@triton.jit
def _through_batch_norm(sums, gradient_sums, gamma, c, C: tl.constexpr, N: tl.constexpr):
    """Of batch norm backwards: the gradient at its input is x * gradient + y * input + z."""
    mean, rstd = _moments(sums, c, C, N)
    scale = tl.load(gamma + c) * rstd
    first = (tl.load(gradient_sums + c) * (1.0 / N)).to(tl.float32)
    second = (tl.load(gradient_sums + C + c) * (1.0 / N)).to(tl.float32)
    return scale, -scale * second * rstd, scale * (second * rstd * mean - first)


@triton.jit
def _add_sums(sums, c, C: tl.constexpr, first, second):
    tl.atomic_add(sums + c, tl.sum(first, 0).to(tl.float64), sem="relaxed")
    tl.atomic_add(sums + C + c, tl.sum(second, 0).to(tl.float64), sem="relaxed")


@triton.jit
def _around(
    m, k, M, HI: tl.constexpr, WI: tl.constexpr, HO: tl.constexpr, WO: tl.constexpr, C: tl.constexpr,
    STRIDE: tl.constexpr,
):  # fmt: skip
    """Of a 3x3 convolution over (B, HI, WI, C) at output pixels m: where its inputs k of 9 C lie, and whether."""
    down, right, c = k // (3 * C) - 1, k // C % 3 - 1, k % C
    column, row = m % WO, m // WO % HO
    y, x = (row * STRIDE)[:, None] + down, (column * STRIDE)[:, None] + right
    inside = (y >= 0) & (y < HI) & (x >= 0) & (x < WI) & (m < M)[:, None] & (k < 9 * C)
    if STRIDE == 1:
        origin = m
    else:
        origin = (m // (WO * HO) * HI + row * STRIDE) * WI + column * STRIDE
    return (origin * C)[:, None] + ((down * WI + right) * C + c), inside


@triton.jit
def _convolution(
    x, weight, z, sums, M,
    HI: tl.constexpr, WI: tl.constexpr, HO: tl.constexpr, WO: tl.constexpr, CI: tl.constexpr, CO: tl.constexpr,
    STRIDE: tl.constexpr, TRAIN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_CO: tl.constexpr,
):  # fmt: skip
    """z = conv3x3(x); adds what the batch norm after it needs to sums."""
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    co = tl.program_id(1) * BLOCK_CO + tl.arange(0, BLOCK_CO)
    total = tl.zeros((BLOCK, BLOCK_CO), tl.float32)
    for first in range(0, 9 * CI, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        at, inside = _around(m, k, M, HI, WI, HO, WO, CI, STRIDE)
        a = tl.load(x + at, mask=inside, other=0.0)
        w = tl.load(weight + co[None, :] * (9 * CI) + k[:, None], mask=k[:, None] < 9 * CI, other=0.0)
        total = tl.dot(a.to(z.dtype.element_ty), w, total, input_precision=PRECISION)
    out = total.to(z.dtype.element_ty)
    tl.store(z + m[:, None] * CO + co, out, mask=m[:, None] < M)
    if TRAIN:
        out = out.to(tl.float32)  # beyond M all zeros
        _add_sums(sums, co, CO, out, out * out)


@triton.jit
def _block_end(
    z, sums, gamma, beta, running_mean, running_var, x, h, M,
    N: tl.constexpr, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, CI: tl.constexpr,
    SHORTCUT: tl.constexpr, TRAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """h = relu(batch norm(z) + shortcut(x)); x (B, 2H, 2W, CI) where the shortcut halves, none for the stem."""
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, C)
    scale, shift = _affine(sums, gamma, beta, c, C, N)
    if TRAIN and tl.program_id(0) == 0:
        _keep_running(sums, running_mean, running_var, c, C, N)
    there = m[:, None] < M
    out = tl.load(z + m[:, None] * C + c, mask=there, other=0.0).to(tl.float32) * scale + shift
    if SHORTCUT == "identity":
        out += tl.load(x + m[:, None] * C + c, mask=there, other=0.0).to(tl.float32)
    if SHORTCUT == "strided" or SHORTCUT == "mean_pool":
        ci = c - (C - CI) // 2
        inside = there & (ci >= 0) & (ci < CI)
        column, row, image = m % W, m // W % H, m // (W * H)
        corner = x + (((image * 2 * H + 2 * row) * 2 * W + 2 * column) * CI)[:, None] + ci
        first = tl.load(corner, mask=inside, other=0.0).to(tl.float32)
        if SHORTCUT == "mean_pool":
            first += tl.load(corner + CI, mask=inside, other=0.0).to(tl.float32)
            first += tl.load(corner + 2 * W * CI, mask=inside, other=0.0).to(tl.float32)
            first += tl.load(corner + 2 * W * CI + CI, mask=inside, other=0.0).to(tl.float32)
            first *= 0.25
        out += first
    tl.store(h + m[:, None] * C + c, tl.maximum(out, 0.0).to(h.dtype.element_ty), mask=there)


@triton.jit
def _last_gradient(
    pooled, h, z, sums, gradient, gradient_sums,
    M: tl.constexpr, PIXELS: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of the mean over pixels, through the last ReLU."""
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, C)
    there = m[:, None] < M
    g = tl.load(pooled + (m // PIXELS)[:, None] * C + c, mask=there, other=0.0) / PIXELS
    g = tl.where(tl.load(h + m[:, None] * C + c, mask=there, other=0.0).to(tl.float32) > 0, g, 0.0)
    g = g.to(gradient.dtype.element_ty)
    tl.store(gradient + m[:, None] * C + c, g, mask=there)
    mean, rstd = _moments(sums, c, C, M)
    g = g.to(tl.float32)
    _add_sums(gradient_sums, c, C, g, g * (tl.load(z + m[:, None] * C + c, mask=there, other=0.0) - mean) * rstd)


@triton.jit
def _backward_weight(
    x, g, z, sums, gradient_sums, gamma, dz, partial, M: tl.constexpr,
    HI: tl.constexpr, WI: tl.constexpr, HO: tl.constexpr, WO: tl.constexpr, CI: tl.constexpr, CO: tl.constexpr,
    STRIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_CO: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """From the gradient g after the batch norm of z = conv3x3(x): that of z, as dz, and that of the weight.

    The latter over EACH of the output's pixels, as partial (programs, CO, 3, 3, CI).
    """
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    co = tl.program_id(2) * BLOCK_CO + tl.arange(0, BLOCK_CO)
    times, by_z, plus = _through_batch_norm(sums, gradient_sums, gamma, co, CO, M)
    total = tl.zeros((BLOCK_K, BLOCK_CO), tl.float32)
    for first in range(0, EACH, BLOCK):
        m = tl.program_id(0) * EACH + first + tl.arange(0, BLOCK)
        at, there = m[:, None] * CO + co, m[:, None] < M
        d = tl.load(g + at, mask=there, other=0.0).to(tl.float32) * times
        d += tl.load(z + at, mask=there, other=0.0).to(tl.float32) * by_z + plus
        d = tl.where(there, d, 0.0).to(g.dtype.element_ty)
        if tl.program_id(1) == 0:
            tl.store(dz + at, d, mask=there)
        at, inside = _around(m, k, M, HI, WI, HO, WO, CI, STRIDE)
        a = tl.load(x + at, mask=inside, other=0.0).to(g.dtype.element_ty)
        total = tl.dot(tl.trans(a), d, total, input_precision=PRECISION)
    to = partial + tl.program_id(0) * (9 * CI * CO) + co[None, :] * (9 * CI) + k[:, None]
    tl.store(to, total, mask=k[:, None] < 9 * CI)


@triton.jit
def _backward_data(
    dz, weight, shortcut, h, z, sums, out, gradient_sums, M: tl.constexpr,
    HI: tl.constexpr, WI: tl.constexpr, HO: tl.constexpr, WO: tl.constexpr, CI: tl.constexpr, CO: tl.constexpr,
    STRIDE: tl.constexpr, SHORTCUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_CI: tl.constexpr,
):  # fmt: skip
    """From the gradient dz of a convolution's output to the one after the batch norm of z, whose ReLU is its input h.

    The gradient of the shortcut around the convolution's block is added where it begins here.
    """
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ci = tl.program_id(1) * BLOCK_CI + tl.arange(0, BLOCK_CI)
    column, row, image = m % WI, m // WI % HI, m // (WI * HI)
    there = m[:, None] < M
    total = tl.zeros((BLOCK, BLOCK_CI), tl.float32)
    for first in range(0, 9 * CO, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        tap, co = k // CO, k % CO
        down, right = tap // 3 - 1, tap % 3 - 1
        y, x = row[:, None] - down, column[:, None] - right
        inside = (y >= 0) & (x >= 0) & there & (k < 9 * CO)
        if STRIDE == 1:
            at = (m * CO)[:, None] + (co - (down * WO + right) * CO)
        else:
            inside = inside & (y % 2 == 0) & (x % 2 == 0)
            y, x = y // 2, x // 2
            at = ((image[:, None] * HO + y) * WO + x) * CO + co
        inside = inside & (y < HO) & (x < WO)
        d = tl.load(dz + at, mask=inside, other=0.0)
        w = tl.load(weight + (co * (9 * CI) + tap * CI)[:, None] + ci, mask=k[:, None] < 9 * CO, other=0.0)
        total = tl.dot(d, w, total, input_precision=PRECISION)
    at = m[:, None] * CI + ci
    if SHORTCUT == "identity":
        total += tl.load(shortcut + at, mask=there, other=0.0).to(tl.float32)
    if SHORTCUT == "mean_pool" or SHORTCUT == "strided":
        half = ((image * HO + row // 2) * WO + column // 2) * CO + (CO - CI) // 2
        if SHORTCUT == "mean_pool":
            total += 0.25 * tl.load(shortcut + half[:, None] + ci, mask=there, other=0.0).to(tl.float32)
        else:
            corner = there & ((row % 2 == 0) & (column % 2 == 0))[:, None]
            total += tl.load(shortcut + half[:, None] + ci, mask=corner, other=0.0).to(tl.float32)
    total = tl.where(tl.load(h + at, mask=there, other=0.0).to(tl.float32) > 0, total, 0.0)  # beyond M too
    rounded = total.to(out.dtype.element_ty)
    tl.store(out + at, rounded, mask=there)
    rounded = rounded.to(tl.float32)
    mean, rstd = _moments(sums, ci, CI, M)
    normal = (tl.load(z + at, mask=there, other=0.0).to(tl.float32) - mean) * rstd
    _add_sums(gradient_sums, ci, CI, rounded, rounded * normal)


@triton.jit
def _add_partials(partials, weights, table, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr):
    """Every element of every convolution's gradient: the sum of what the blocks of threads have found, in order."""
    begin = table + tl.program_id(0) * 5
    source, target, size = tl.load(begin), tl.load(begin + 1), tl.load(begin + 2)
    count, left = tl.load(begin + 3), tl.load(begin + 4)
    i = tl.arange(0, BLOCK)
    p = tl.arange(0, AT_ONCE)
    total = tl.zeros((BLOCK,), tl.float32)
    first = count * 0
    while first < count:  # not range: Triton's interpreter cannot count to a loaded value
        there = (first + p < count)[:, None] & (i < left)[None, :]
        part = tl.load(partials + source + (first + p)[:, None] * size + i[None, :], mask=there, other=0.0)
        total += tl.sum(part, 0)
        first += AT_ONCE
    tl.store(weights + target + i, total, mask=i < left)


# -- the network -------------------------------------------------------------------------------------------------------


class Convolution(NamedTuple):
    """One of the network's convolutions with the batch norm after it, at a given size of image."""

    number: int  # its place in the network
    ci: int
    co: int
    stride: int
    size_in: tuple[int, int]
    size_out: tuple[int, int]


class Saved(NamedTuple):
    """What the backward pass needs of the forward pass; z and h hold (B, H, W, C)."""

    x: Tensor
    z: list[Tensor]  # of every convolution
    h: list[Tensor]  # of every batch norm, with shortcut and ReLU
    sums: list[Tensor]  # (2 C,) float64 of every batch norm: of values, of squares
    gradient_sums: list[Tensor]  # (2 C,) float64, zeros: of gradients, of gradients times normalised values
    weights: list[Tensor]


def supports(model: nn.Module, size: tuple[int, int]) -> bool:
    """Whether `Fused` computes `model` on images of `size` (H, W), which must be multiples of 4; no projection."""
    return (
        isinstance(model, ResNetCifar)
        and (model.conv1.in_channels, model.conv1.out_channels) in FORWARD
        and size[0] % 4 == 0
        and size[1] % 4 == 0
        and all(isinstance(b.shortcut, nn.Identity | PoolAndPad) for b in model.modules() if isinstance(b, BasicBlock))
    )


class Fused(nn.Module):
    """`model` in the kernels above: x (B, C_in, H, W) float32 channels_last -> logits (B, C), as `model(x)`.

    Gradients and running statistics go where `model` has them. In training one backward pass belongs to each call.
    """

    def __init__(self, model: ResNetCifar, dtype: str) -> None:
        super().__init__()
        self.model = model
        self.dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
        self.precision = "ieee" if dtype == "fp32" else "tf32"
        self.blocks: list[Any] = [*model.layer1, *model.layer2, *model.layer3]
        pairs = [(model.conv1, model.bn1)]
        for block in self.blocks:
            pairs += [(block.conv1, block.bn1), (block.conv2, block.bn2)]
        self.convolutions = [convolution for convolution, _ in pairs]
        self.norms = [norm for _, norm in pairs]
        self.cast = [torch.empty_like(c.weight, dtype=self.dtype) for c in self.convolutions]
        self.tables: dict[torch.Size, tuple[list[int], Tensor, int]] = {}

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            pairs = zip(self.convolutions, self.norms, strict=True)
            trained = [p for c, n in pairs for p in (c.weight, n.weight, n.bias)]
            return self.model.fc(_Body.apply(self, x, *trained))
        return self.model.fc(self.body(x, train=False)[0])

    def layers(self, size: tuple[int, int]) -> list[Convolution]:
        found = []
        for number, convolution in enumerate(self.convolutions):
            stride = convolution.stride[0]
            after = (size[0] // stride, size[1] // stride)
            found.append(Convolution(number, convolution.in_channels, convolution.out_channels, stride, size, after))
            size = after
        return found

    @torch.no_grad()
    def body(self, x: Tensor, train: bool) -> tuple[Tensor, Saved]:
        """The mean over the pixels of the last block's output, (B, 64) float32."""
        batch, layers = len(x), self.layers((x.shape[2], x.shape[3]))
        x = x.permute(0, 2, 3, 1).contiguous()  # (B, H, W, C); free in channels_last
        weights = [c.weight.detach() for c in self.convolutions]
        if self.dtype != torch.float32:
            torch._foreach_copy_(self.cast, weights)
            weights = self.cast
        widths = [2 * layer.co for layer in layers]
        if train:
            both = torch.zeros(2, sum(widths), dtype=torch.float64, device=x.device)
            sums, gradient_sums = (list(part.split(widths)) for part in both)
        else:
            means = [n.running_mean for n in self.norms]
            squares = torch._foreach_addcmul([n.running_var for n in self.norms], means, means)
            both = torch.cat([part for pair in zip(means, squares, strict=True) for part in pair]).double()
            sums, gradient_sums = list(both.split(widths)), []
        saved = Saved(x, [], [], sums, gradient_sums, weights)

        def new(layer: Convolution) -> Tensor:
            return torch.empty(batch, *layer.size_out, layer.co, dtype=self.dtype, device=x.device)

        def convolve(layer: Convolution, given: Tensor) -> Tensor:
            z, m = new(layer), batch * layer.size_out[0] * layer.size_out[1]
            block, block_k, block_co, warps, rounds = self._tiles(FORWARD, layer)
            _convolution[triton.cdiv(m, block), layer.co // block_co](
                given, weights[layer.number], z, sums[layer.number], m, *layer.size_in, *layer.size_out, layer.ci,
                layer.co, layer.stride, train, self.precision, block, block_k, block_co,
                num_warps=warps, num_stages=rounds,
            )  # fmt: skip
            return z

        def end(layer: Convolution, z: Tensor, given: Tensor, shortcut: str) -> Tensor:
            h, m = new(layer), batch * layer.size_out[0] * layer.size_out[1]
            n, block = self.norms[layer.number], POINTWISE // layer.co
            _block_end[(triton.cdiv(m, block),)](
                z, sums[layer.number], n.weight.detach(), n.bias.detach(), n.running_mean, n.running_var, given, h,
                m, m if train else 1, *layer.size_out, layer.co, given.shape[3], shortcut, train, block,
            )  # fmt: skip
            if train:
                saved.z.append(z)
                saved.h.append(h)
            return h

        z = convolve(layers[0], x)
        h = end(layers[0], z, z, "none")
        for number, block in enumerate(self.blocks):
            first, second = layers[1 + 2 * number : 3 + 2 * number]
            z = convolve(first, h)
            z = convolve(second, end(first, z, z, "none"))
            h = end(second, z, h, _shortcut(block))
        return h.mean((1, 2), dtype=torch.float32), saved

    @torch.no_grad()
    def body_backward(self, saved: Saved, pooled: Tensor) -> list[Tensor]:
        """Gradients of weight, scale and shift of every convolution, from that of the mean (B, 64)."""
        batch, layers = len(pooled), self.layers((saved.x.shape[1], saved.x.shape[2]))
        counts, table, size = self._table(saved.x, layers)
        places = [0]
        for count, weight in zip(counts, saved.weights, strict=True):
            places.append(places[-1] + count * weight.numel())
        partial = torch.empty(places[-1], device=pooled.device)

        def pixels(layer: Convolution) -> int:
            return batch * layer.size_out[0] * layer.size_out[1]

        def weigh(layer: Convolution, given: Tensor, g: Tensor) -> Tensor:
            """The gradient of the output of `layer`, of `g` after its batch norm; that of its weight into partial."""
            number, dz = layer.number, torch.empty_like(g)
            block, block_k, block_co, warps, rounds, each = self._tiles(BACKWARD_WEIGHT, layer)
            grid = triton.cdiv(pixels(layer), each), triton.cdiv(9 * layer.ci, block_k), layer.co // block_co
            _backward_weight[grid](
                given, g, saved.z[number], saved.sums[number], saved.gradient_sums[number],
                self.norms[number].weight.detach(), dz, partial[places[number] :], pixels(layer), *layer.size_in,
                *layer.size_out, layer.ci, layer.co, layer.stride, self.precision, block, block_k, block_co, each,
                num_warps=warps, num_stages=rounds,
            )  # fmt: skip
            return dz

        def through(layer: Convolution, dz: Tensor, shortcut: str, of_block: Tensor) -> Tensor:
            """The gradient after the batch norm before `layer`, of `dz` of its output."""
            before = layer.number - 1
            out, m = torch.empty_like(saved.h[before]), batch * layer.size_in[0] * layer.size_in[1]
            block, block_k, block_ci, warps, rounds = self._tiles(BACKWARD_DATA, layer)
            _backward_data[triton.cdiv(m, block), layer.ci // block_ci](
                dz, saved.weights[layer.number], of_block, saved.h[before], saved.z[before], saved.sums[before], out,
                saved.gradient_sums[before], m, *layer.size_in, *layer.size_out, layer.ci, layer.co, layer.stride,
                shortcut, self.precision, block, block_k, block_ci, num_warps=warps, num_stages=rounds,
            )  # fmt: skip
            return out

        last = layers[-1]
        g, block = torch.empty_like(saved.h[-1]), POINTWISE // last.co
        _last_gradient[(triton.cdiv(pixels(last), block),)](
            pooled.contiguous(), saved.h[-1], saved.z[-1], saved.sums[-1], g, saved.gradient_sums[-1], pixels(last),
            last.size_out[0] * last.size_out[1], last.co, block,
        )  # fmt: skip
        for number in reversed(range(len(self.blocks))):
            first, second = layers[1 + 2 * number : 3 + 2 * number]
            dz = weigh(second, saved.h[first.number], g)
            dz = weigh(first, saved.h[first.number - 1], through(second, dz, "none", dz))
            g = through(first, dz, _shortcut(self.blocks[number]), g)
        weigh(layers[0], saved.x, g)

        flat = torch.empty(size, device=pooled.device)
        _add_partials[(len(table),)](partial, flat, table, ADD_BLOCK, ADD_AT_ONCE)
        norms = torch.cat(saved.gradient_sums).float()
        found, at, at_norm = [], 0, 0
        for layer, convolution in zip(layers, self.convolutions, strict=True):
            weight = convolution.weight
            found.append(flat.as_strided(weight.shape, weight.stride(), at))
            at += weight.numel()
            found += [norms[at_norm + layer.co : at_norm + 2 * layer.co], norms[at_norm : at_norm + layer.co]]
            at_norm += 2 * layer.co
        return found

    def _tiles(self, table: Mapping[tuple[int, int], tuple[int, ...]], layer: Convolution) -> tuple[int, ...]:
        block, *others = table[layer.ci, layer.co]
        return block // (self.dtype.itemsize // 2), *others  # float32 takes twice the shared memory

    def _table(self, x: Tensor, layers: Sequence[Convolution]) -> tuple[list[int], Tensor, int]:
        """Partial sums of each convolution, `_add_partials`'s table of what to add, elements of the result."""
        if x.shape not in self.tables:
            counts, rows, source, target = [], [], 0, 0
            for layer, convolution in zip(layers, self.convolutions, strict=True):
                each = BACKWARD_WEIGHT[layer.ci, layer.co][-1]
                count = triton.cdiv(len(x) * layer.size_out[0] * layer.size_out[1], each)
                size = convolution.weight.numel()
                for first in range(0, size, ADD_BLOCK):
                    rows.append([source + first, target + first, size, count, size - first])
                counts.append(count)
                source, target = source + count * size, target + size
            self.tables[x.shape] = counts, torch.tensor(rows, device=x.device), target
        return self.tables[x.shape]


def _shortcut(block: BasicBlock) -> str:
    if isinstance(block.shortcut, nn.Identity):
        return "identity"
    return "mean_pool" if block.shortcut.mean else "strided"


class _Body(torch.autograd.Function):
    """All of the network but its last layer."""

    @staticmethod
    def forward(ctx: Any, network: Fused, x: Tensor, *trained: Tensor) -> Tensor:
        pooled, ctx.saved = network.body(x, train=True)
        ctx.network = network
        return pooled

    @staticmethod
    def backward(ctx: Any, pooled: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.network.body_backward(ctx.saved, pooled)
