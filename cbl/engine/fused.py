"""The CIFAR ResNet in kernels of our own: Triton, for GPUs, where cuDNN has little for 16 to 64 channels.

A convolution sums what the batch norm after it needs while it writes its output; batch norm, shortcut and ReLU are one
kernel. Backwards a convolution has two: the one for its weight also writes the gradient through the batch norm, and
the one for its input sums what the batch norm before it needs. What is computed is the same, with fewer roundings: in
bf16 what lies in memory is bfloat16, everything between is float32.

Tensors are NHWC, each image (H, W) in H + 1 rows of W + 1 pixels of which the last are zeros: they stand below and to
the right of it, above the next image and to the left of the next row, so that a convolution reads its three rows of
three pixels without asking where it is. Pixel m of such a tensor is m % (W + 1) in its row. What a convolution reads
has zeros before its first image too. The sums over a batch are float64: blocks of threads add to them in whatever order
they come, and the difference that makes is far below float32.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from cbl.models.resnet_cifar import BasicBlock, PoolAndPad, ResNetCifar

if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
    raise ImportError(f"this is {triton.__version__}")  # older ones were not tried, or failed

EPS = tl.constexpr(1e-5)  # of every batch norm
MOMENTUM = tl.constexpr(0.1)

# (channels in, channels out) of a convolution -> pixels, inputs and outputs at a time, warps, rounds under way at once;
# of the weights' gradient also the pixels that one block of threads adds up. Inputs are those of three pixels in a row
FORWARD = {
    (1, 16): (128, 16, 16, 4, 2), (3, 16): (128, 16, 16, 4, 2), (16, 16): (256, 16, 16, 4, 4),
    (16, 32): (128, 16, 32, 4, 4), (32, 32): (128, 32, 32, 4, 3), (32, 64): (64, 32, 64, 4, 3),
    (64, 64): (64, 64, 64, 4, 3),
}  # fmt: skip
BACKWARD_DATA = {
    (16, 16): (256, 16, 16, 4, 4), (16, 32): (256, 32, 16, 4, 3), (32, 32): (128, 32, 32, 4, 3),
    (32, 64): (64, 64, 32, 4, 3), (64, 64): (64, 64, 64, 4, 3),
}  # fmt: skip
BACKWARD_WEIGHT = {
    (1, 16): (128, 16, 16, 4, 2, 512), (3, 16): (128, 16, 16, 4, 2, 512), (16, 16): (64, 64, 16, 4, 2, 512),
    (16, 32): (64, 64, 32, 4, 2, 256), (32, 32): (64, 128, 32, 4, 2, 256), (32, 64): (64, 128, 32, 4, 2, 256),
    (64, 64): (64, 64, 32, 4, 2, 512),
}  # fmt: skip
TAIL = tl.constexpr(2048 + 128)  # pixels after the last image; no block of threads adds up more than 2048
COLOURS = 4  # channels of the images in memory
POINTWISE = 4096  # elements of a block of threads
AUGMENT_BLOCK = 512  # pixels of a block of threads
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
def _inside(m, M, H: tl.constexpr, W: tl.constexpr):
    """Whether pixel m is one of an image."""
    there = m < M
    m = m.to(tl.uint32)  # whose division by a constant is the shorter
    return there & (m // (W + 1) % (H + 1) != H) & (m % (W + 1) != W)


@triton.jit
def _origin(m, M, HI: tl.constexpr, WI: tl.constexpr, HO: tl.constexpr, WO: tl.constexpr, STRIDE: tl.constexpr):
    """The pixel of the convolution's input on which output pixel m is centred."""
    origin = m
    if STRIDE == 2:
        m = tl.minimum(m, M - 1)
        column, row, image = m % (WO + 1), m // (WO + 1) % (HO + 1), m // ((WO + 1) * (HO + 1))
        origin = (image * (HI + 1) + row * 2) * (WI + 1) + column * 2
    return origin


@triton.jit
def _three(x, left, run, C: tl.constexpr, BLOCK_K: tl.constexpr):
    """Elements run of the 3 C that begin at each pixel left; x has C channels."""
    at = x + (left * C)[:, None] + run
    if 3 * C % BLOCK_K:
        return tl.load(at, mask=(run < 3 * C)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def _clear_before(x, C: tl.constexpr, BEFORE: tl.constexpr):
    """Zeros before the first image of x."""
    tl.store(x - BEFORE * C + tl.arange(0, BEFORE * C), tl.zeros((BEFORE * C,), x.dtype.element_ty))


@triton.jit
def _augment(
    images, drawn, x, mean, std, B, M, HP: tl.constexpr, WP: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    CI: tl.constexpr, C: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x (B, H, W, CI) float32 of images (N, HP, WP, CI) uint8, as drawn (4, B): image, row, column, flip."""
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, C)
    column, row, b = m % W, m // W % H, m // (W * H)
    image, down = tl.load(drawn + b, mask=m < M, other=0), tl.load(drawn + B + b, mask=m < M, other=0)
    right, flip = tl.load(drawn + 2 * B + b, mask=m < M, other=0), tl.load(drawn + 3 * B + b, mask=m < M, other=0)
    pixel = (image * HP + down + row) * WP + right + tl.where(flip != 0, W - 1 - column, column)
    there = (m < M)[:, None] & (c < CI)
    found = tl.load(images + (pixel * CI)[:, None] + c, mask=there, other=0).to(tl.float32)
    if SCALED:
        offset, unit = tl.load(mean + c, mask=c < CI, other=0.0), tl.load(std + c, mask=c < CI, other=1.0)
        found = tl.div_rn(tl.div_rn(found, tl.full((1, 1), 255.0, tl.float32)) - offset, unit[None, :])
    else:
        found = found * 0.0078125 - 1.0  # x / 128 - 1
    tl.store(x + (m * CI)[:, None] + c, found, mask=there)


@triton.jit
def _enter(
    images, x, M, H: tl.constexpr, W: tl.constexpr, CI: tl.constexpr, C: tl.constexpr, BEFORE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """x = images (B, H, W, CI), with zeros around them and in the channels beyond CI."""
    if tl.program_id(0) == 0:
        _clear_before(x, C, BEFORE)
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, C)
    pixel = (m // ((W + 1) * (H + 1)) * H + m // (W + 1) % (H + 1)) * W + m % (W + 1)
    there = _inside(m, M, H, W)[:, None] & (c < CI)
    found = tl.load(images + (pixel * CI)[:, None] + c, mask=there, other=0.0)
    tl.store(x + m[:, None] * C + c, found.to(x.dtype.element_ty), mask=m[:, None] < M + TAIL)


@triton.jit
def _convolution(
    x, weight, z, sums, M,
    HI: tl.constexpr, WI: tl.constexpr, HO: tl.constexpr, WO: tl.constexpr, C: tl.constexpr, CI: tl.constexpr,
    CO: tl.constexpr, STRIDE: tl.constexpr, TRAIN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_CO: tl.constexpr,
):  # fmt: skip
    """z = conv3x3(x); adds what the batch norm after it needs to sums. x has C channels, of which CI have weights."""
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    co = tl.program_id(1) * BLOCK_CO + tl.arange(0, BLOCK_CO)
    left = _origin(m, M, HI, WI, HO, WO, STRIDE) - (WI + 2)
    CHUNKS: tl.constexpr = (3 * C + BLOCK_K - 1) // BLOCK_K
    total = tl.zeros((BLOCK, BLOCK_CO), tl.float32)
    for step in range(0, 3 * CHUNKS):
        row, run = step // CHUNKS, step % CHUNKS * BLOCK_K + tl.arange(0, BLOCK_K)
        a = _three(x, left + row * (WI + 1), run, C, BLOCK_K)
        at = weight + row * (3 * CI) + (run // C * CI + run % C)[:, None] + co[None, :] * (9 * CI)
        w = tl.load(at, mask=((run < 3 * C) & (run % C < CI))[:, None], other=0.0)
        total = tl.dot(a, w, total, input_precision=PRECISION)
    out = tl.where(_inside(m, M, HO, WO)[:, None], total, 0.0).to(z.dtype.element_ty)
    tl.store(z + m[:, None] * CO + co, out, mask=m[:, None] < M)
    if TRAIN:
        out = out.to(tl.float32)
        _add_sums(sums, co, CO, out, out * out)


@triton.jit
def _block_end(
    z, sums, gamma, beta, running_mean, running_var, x, h, M,
    N: tl.constexpr, H: tl.constexpr, W: tl.constexpr, C: tl.constexpr, CI: tl.constexpr,
    SHORTCUT: tl.constexpr, TRAIN: tl.constexpr, BEFORE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """h = relu(batch norm(z) + shortcut(x)); x of images (2H, 2W) with CI channels where the shortcut halves them."""
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, C)
    scale, shift = _affine(sums, gamma, beta, c, C, N)
    if tl.program_id(0) == 0:
        _clear_before(h, C, BEFORE)
        if TRAIN:
            _keep_running(sums, running_mean, running_var, c, C, N)
    there = _inside(m, M, H, W)[:, None]
    out = tl.load(z + m[:, None] * C + c, mask=there, other=0.0).to(tl.float32) * scale + shift
    if SHORTCUT == "identity":
        out += tl.load(x + m[:, None] * C + c, mask=there, other=0.0).to(tl.float32)
    if SHORTCUT == "strided" or SHORTCUT == "mean_pool":
        ci = c - (C - CI) // 2
        inside = there & (ci >= 0) & (ci < CI)
        corner = x + (_origin(m, M, 2 * H, 2 * W, H, W, 2) * CI)[:, None] + ci
        first = tl.load(corner, mask=inside, other=0.0).to(tl.float32)
        if SHORTCUT == "mean_pool":
            first += tl.load(corner + CI, mask=inside, other=0.0).to(tl.float32)
            first += tl.load(corner + (2 * W + 1) * CI, mask=inside, other=0.0).to(tl.float32)
            first += tl.load(corner + (2 * W + 2) * CI, mask=inside, other=0.0).to(tl.float32)
            first *= 0.25
        out += first
    # by itself the larger of NaN and 0 is 0 on a GPU: a run that has diverged would go on as if it had not
    out = tl.where(there, tl.maximum(out, 0.0, propagate_nan=tl.PropagateNan.ALL), 0.0).to(h.dtype.element_ty)
    tl.store(h + m[:, None] * C + c, out, mask=m[:, None] < M + TAIL)


@triton.jit
def _last_gradient(
    pooled, h, z, sums, gradient, gradient_sums,
    M: tl.constexpr, H: tl.constexpr, W: tl.constexpr, N: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of the mean over pixels, through the last ReLU."""
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, C)
    there = m[:, None] < M
    g = tl.load(pooled + (m // ((H + 1) * (W + 1)))[:, None] * C + c, mask=there, other=0.0) / (H * W)
    g = tl.where(tl.load(h + m[:, None] * C + c, mask=there, other=0.0).to(tl.float32) > 0, g, 0.0)  # around: no h
    g = g.to(gradient.dtype.element_ty)
    tl.store(gradient + m[:, None] * C + c, g, mask=there)
    mean, rstd = _moments(sums, c, C, N)
    g = g.to(tl.float32)
    _add_sums(gradient_sums, c, C, g, g * (tl.load(z + m[:, None] * C + c, mask=there, other=0.0) - mean) * rstd)


@triton.jit
def _backward_weight(
    x, g, z, sums, gradient_sums, gamma, dz, partial, M: tl.constexpr, N: tl.constexpr,
    HI: tl.constexpr, WI: tl.constexpr, HO: tl.constexpr, WO: tl.constexpr, C: tl.constexpr, CI: tl.constexpr,
    CO: tl.constexpr, STRIDE: tl.constexpr, PRECISION: tl.constexpr, BEFORE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_CO: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """From the gradient g after the batch norm of z = conv3x3(x): that of z, as dz, and that of the weight.

    The latter over EACH of the output's pixels, as partial (programs, CO, 3, 3, CI).
    """
    run = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    co = tl.program_id(2) * BLOCK_CO + tl.arange(0, BLOCK_CO)
    if tl.program_id(0) == 0 and tl.program_id(1) == 0 and tl.program_id(2) == 0:
        _clear_before(dz, CO, BEFORE)
    times, by_z, plus = _through_batch_norm(sums, gradient_sums, gamma, co, CO, N)
    above = tl.zeros((BLOCK_K, BLOCK_CO), tl.float32)  # of the weight's three rows
    level = tl.zeros((BLOCK_K, BLOCK_CO), tl.float32)
    below = tl.zeros((BLOCK_K, BLOCK_CO), tl.float32)
    for first in range(0, EACH, BLOCK):
        m = tl.program_id(0) * EACH + first + tl.arange(0, BLOCK)
        at, there = m[:, None] * CO + co, _inside(m, M, HO, WO)[:, None]
        d = tl.load(g + at, mask=there, other=0.0).to(tl.float32) * times
        d += tl.load(z + at, mask=there, other=0.0).to(tl.float32) * by_z + plus
        d = tl.where(there, d, 0.0).to(g.dtype.element_ty)
        if tl.program_id(1) == 0:
            tl.store(dz + at, d)
        left = _origin(m, M, HI, WI, HO, WO, STRIDE) - (WI + 2)
        above = tl.dot(tl.trans(_three(x, left, run, C, BLOCK_K)), d, above, input_precision=PRECISION)
        left += WI + 1
        level = tl.dot(tl.trans(_three(x, left, run, C, BLOCK_K)), d, level, input_precision=PRECISION)
        left += WI + 1
        below = tl.dot(tl.trans(_three(x, left, run, C, BLOCK_K)), d, below, input_precision=PRECISION)
    to = partial + tl.program_id(0) * (9 * CI * CO) + (run // C * CI + run % C)[:, None] + co[None, :] * (9 * CI)
    there = ((run < 3 * C) & (run % C < CI))[:, None]
    tl.store(to, above, mask=there)
    tl.store(to + 3 * CI, level, mask=there)
    tl.store(to + 6 * CI, below, mask=there)


@triton.jit
def _backward_data(
    dz, weight, shortcut, h, z, sums, out, gradient_sums, M: tl.constexpr, N: tl.constexpr,
    HI: tl.constexpr, WI: tl.constexpr, HO: tl.constexpr, WO: tl.constexpr, CI: tl.constexpr, CO: tl.constexpr,
    STRIDE: tl.constexpr, SHORTCUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_CI: tl.constexpr,
):  # fmt: skip
    """From the gradient dz of a convolution's output to the one after the batch norm of z, whose ReLU is its input h.

    The gradient of the shortcut around the convolution's block is added where it begins here.
    """
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ci = tl.program_id(1) * BLOCK_CI + tl.arange(0, BLOCK_CI)
    column, row, image = m % (WI + 1), m // (WI + 1) % (HI + 1), m // ((WI + 1) * (HI + 1))
    there = m[:, None] < M
    CHUNKS: tl.constexpr = (3 * CO + BLOCK_K - 1) // BLOCK_K
    total = tl.zeros((BLOCK, BLOCK_CI), tl.float32)
    for step in range(0, 3 * CHUNKS):
        tap_row, run = step // CHUNKS, step % CHUNKS * BLOCK_K + tl.arange(0, BLOCK_K)
        tap_column, co = run // CO, run % CO
        if STRIDE == 1:  # a pixel's gradient comes from its neighbours, the upper left one's by the lower right weight
            d = _three(dz, m - (WI + 2) + tap_row * (WI + 1), run, CO, BLOCK_K)
            tap_row, tap_column = 2 - tap_row, 2 - tap_column
        else:
            y, x = row + 1 - tap_row, column[:, None] + 1 - tap_column
            inside = ((y % 2 == 0) & (m < M))[:, None] & (x % 2 == 0) & (run < 3 * CO)
            at = ((image * (HO + 1) + y // 2) * (WO + 1))[:, None] + x // 2
            d = tl.load(dz + at * CO + co, mask=inside, other=0.0)
        at = weight + (co * (9 * CI) + (tap_row * 3 + tap_column) * CI)[:, None] + ci
        w = tl.load(at, mask=run[:, None] < 3 * CO, other=0.0)
        total = tl.dot(d, w, total, input_precision=PRECISION)
    at = m[:, None] * CI + ci
    if SHORTCUT == "identity":
        total += tl.load(shortcut + at, mask=there, other=0.0).to(tl.float32)
    if SHORTCUT == "mean_pool" or SHORTCUT == "strided":
        half = ((image * (HO + 1) + row // 2) * (WO + 1) + column // 2) * CO + (CO - CI) // 2
        if SHORTCUT == "mean_pool":
            total += 0.25 * tl.load(shortcut + half[:, None] + ci, mask=there, other=0.0).to(tl.float32)
        else:
            corner = there & ((row % 2 == 0) & (column % 2 == 0))[:, None]
            total += tl.load(shortcut + half[:, None] + ci, mask=corner, other=0.0).to(tl.float32)
    total = tl.where(tl.load(h + at, mask=there, other=0.0).to(tl.float32) > 0, total, 0.0)  # around: no h
    rounded = total.to(out.dtype.element_ty)
    tl.store(out + at, rounded, mask=there)
    rounded = rounded.to(tl.float32)
    mean, rstd = _moments(sums, ci, CI, N)
    normal = (tl.load(z + at, mask=there, other=0.0).to(tl.float32) - mean) * rstd
    _add_sums(gradient_sums, ci, CI, rounded, rounded * normal)


@triton.jit
def _add_partials(partials, weights, table, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr):
    """Every element of every convolution's gradient: the sum of what the blocks of threads have found, in order."""
    begin = table + tl.program_id(0) * 5
    source, target = tl.multiple_of(tl.load(begin), 16), tl.multiple_of(tl.load(begin + 1), 16)
    size, left = tl.multiple_of(tl.load(begin + 2), 16), tl.multiple_of(tl.load(begin + 4), 16)
    count = tl.load(begin + 3)
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

    @property
    def stored(self) -> int:
        """Channels of its input in memory."""
        return max(self.ci, COLOURS)


class Saved(NamedTuple):
    """What the backward pass needs of the forward pass; x, z and h hold pixels and those around them, by channels."""

    size: tuple[int, int]  # of the images
    x: Tensor
    z: list[Tensor]  # of every convolution
    h: list[Tensor]  # of every batch norm, with shortcut and ReLU
    sums: list[Tensor]  # (2 C,) float64 of every batch norm: of values, of squares
    gradient_sums: list[Tensor]  # (2 C,) float64, zeros: of gradients, of gradients times normalised values
    weights: list[Tensor]


def supports(model: nn.Module, size: tuple[int, int]) -> bool:
    """Whether `Fused` computes `model` on images of `size` (H, W): multiples of 4, W at most 124; no projection."""
    return (
        isinstance(model, ResNetCifar)
        and (model.conv1.in_channels, model.conv1.out_channels) in FORWARD
        and size[0] % 4 == 0
        and size[1] % 4 == 0
        and size[1] + 4 <= TAIL.value - 2048  # what is read after the last image
        and all(isinstance(b.shortcut, nn.Identity | PoolAndPad) for b in model.modules() if isinstance(b, BasicBlock))
    )


def most_images(model: ResNetCifar, size: tuple[int, int]) -> int:
    """Images of `size` (H, W) that `Fused` computes at once: the kernels count elements in 32 bits."""
    return (2**31 // model.conv1.out_channels - TAIL.value) // _pixels(1, size)


def augmented(padded: Tensor, drawn: Tensor, size: tuple[int, int], mean: Tensor | None, std: Tensor | None) -> Tensor:
    """Crop, flip and scaling of `cbl.data.augment` in one kernel: float32 (B, C, H, W) in channels_last memory.

    padded (N, H + 2s, W + 2s, C) uint8; drawn (4, B) int64: image, crop row, crop column, flip; mean and std (C,).
    """
    batch, channels = drawn.shape[1], padded.shape[3]
    x = torch.empty(batch, *size, channels, device=padded.device)
    m, scaled = _count(batch, size), mean is not None and std is not None
    _augment[(triton.cdiv(m, AUGMENT_BLOCK),)](
        padded, drawn, x, mean if scaled else x, std if scaled else x, batch, m, *padded.shape[1:3], *size, channels,
        triton.next_power_of_2(channels), scaled, AUGMENT_BLOCK,
    )  # fmt: skip
    return x.permute(0, 3, 1, 2)


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
        of = self.convolutions if dtype == "bf16" else []
        self.cast = [torch.empty_like(c.weight, dtype=self.dtype) for c in of]
        self.tables: dict[tuple[int, tuple[int, int]], tuple[list[int], Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            pairs = zip(self.convolutions, self.norms, strict=True)
            trained = [p for c, n in pairs for p in (c.weight, n.weight, n.bias)]
            pooled = _Body.apply(self, x, *trained)
        else:
            pooled = self.body(x, train=False)[0]
        with torch.autocast(x.device.type, enabled=False):  # small: casting would take longer than the product
            return self.model.fc(pooled)

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
            # float64 already here: in float32 a mean far larger than the deviation would swallow the variance
            means = torch.cat([n.running_mean for n in self.norms]).double()
            squares = torch.cat([n.running_var for n in self.norms]).double() + means * means
            of_each = [part.split([layer.co for layer in layers]) for part in (means, squares)]
            both = torch.cat([part for pair in zip(*of_each, strict=True) for part in pair])
            sums, gradient_sums = list(both.split(widths)), []
        size, stored = layers[0].size_in, layers[0].stored
        entered = self._surrounded(x, batch, size, stored)
        _enter[(triton.cdiv(_pixels(batch, size) + TAIL.value, POINTWISE // stored),)](
            x, entered, _pixels(batch, size), *size, x.shape[3], stored, _before(size), POINTWISE // stored
        )
        saved = Saved(size, entered, [], [], sums, gradient_sums, weights)

        def convolve(layer: Convolution, given: Tensor) -> Tensor:
            m = _pixels(batch, layer.size_out)
            z = torch.empty(m, layer.co, dtype=self.dtype, device=x.device)
            block, block_k, block_co, warps, rounds = self._tiles(FORWARD, layer)
            _convolution[triton.cdiv(m, block), layer.co // block_co](
                given, weights[layer.number], z, sums[layer.number], m, *layer.size_in, *layer.size_out, layer.stored,
                layer.ci, layer.co, layer.stride, train, self.precision, block, block_k, block_co,
                num_warps=warps, num_stages=rounds,
            )  # fmt: skip
            return z

        def end(layer: Convolution, z: Tensor, given: Tensor, shortcut: str) -> Tensor:
            h, count = self._surrounded(x, batch, layer.size_out, layer.co), _count(batch, layer.size_out)
            n, block = self.norms[layer.number], POINTWISE // layer.co
            _block_end[(triton.cdiv(len(z) + TAIL.value, block),)](
                z, sums[layer.number], n.weight.detach(), n.bias.detach(), n.running_mean, n.running_var, given, h,
                len(z), count if train else 1, *layer.size_out, layer.co, given.shape[1], shortcut, train,
                _before(layer.size_out), block,
            )  # fmt: skip
            if train:
                saved.z.append(z)
                saved.h.append(h)
            return h

        z = convolve(layers[0], entered)
        h = end(layers[0], z, z, "none")
        for number, block in enumerate(self.blocks):
            first, second = layers[1 + 2 * number : 3 + 2 * number]
            z = convolve(first, h)
            z = convolve(second, end(first, z, z, "none"))
            h = end(second, z, h, _shortcut(block))
        pixels, height, width = len(z) // batch, *layers[-1].size_out
        h = h[: len(z)].view(batch, pixels, -1)
        return h.sum(1, dtype=torch.float32) / (height * width), saved  # around the images are zeros

    @torch.no_grad()
    def body_backward(self, saved: Saved, pooled: Tensor) -> list[Tensor]:
        """Gradients of weight, scale and shift of every convolution, from that of the mean (B, 64)."""
        batch, layers = len(pooled), self.layers(saved.size)
        places, table = self._table(batch, layers, pooled.device)
        partial = torch.empty(places[-1], device=pooled.device)

        def weigh(layer: Convolution, given: Tensor, g: Tensor) -> Tensor:
            """The gradient of the output of `layer`, of `g` after its batch norm; that of its weight into partial."""
            number, size = layer.number, layer.size_out
            dz = self._surrounded(g, batch, size, layer.co)
            block, block_k, block_co, warps, rounds, each = self._tiles(BACKWARD_WEIGHT, layer)
            grid = triton.cdiv(len(g), each), triton.cdiv(3 * layer.stored, block_k), layer.co // block_co
            _backward_weight[grid](
                given, g, saved.z[number], saved.sums[number], saved.gradient_sums[number],
                self.norms[number].weight.detach(), dz, partial[places[number] :], len(g), _count(batch, size),
                *layer.size_in, *size, layer.stored, layer.ci, layer.co, layer.stride, self.precision, _before(size),
                block, block_k, block_co, each, num_warps=warps, num_stages=rounds,
            )  # fmt: skip
            return dz

        def through(layer: Convolution, dz: Tensor, shortcut: str, of_block: Tensor) -> Tensor:
            """The gradient after the batch norm before `layer`, of `dz` of its output."""
            before = layer.number - 1
            z = saved.z[before]
            out = torch.empty_like(z)
            block, block_k, block_ci, warps, rounds = self._tiles(BACKWARD_DATA, layer)
            _backward_data[triton.cdiv(len(z), block), layer.ci // block_ci](
                dz, saved.weights[layer.number], of_block, saved.h[before], z, saved.sums[before], out,
                saved.gradient_sums[before], len(z), _count(batch, layer.size_in), *layer.size_in, *layer.size_out,
                layer.ci, layer.co, layer.stride, shortcut, self.precision, block, block_k, block_ci,
                num_warps=warps, num_stages=rounds,
            )  # fmt: skip
            return out

        last, z = layers[-1], saved.z[-1]
        g, block = torch.empty_like(z), POINTWISE // last.co
        _last_gradient[(triton.cdiv(len(z), block),)](
            pooled.contiguous(), saved.h[-1], z, saved.sums[-1], g, saved.gradient_sums[-1], len(z), *last.size_out,
            _count(batch, last.size_out), last.co, block,
        )  # fmt: skip
        for number in reversed(range(len(self.blocks))):
            first, second = layers[1 + 2 * number : 3 + 2 * number]
            dz = weigh(second, saved.h[first.number], g)
            dz = weigh(first, saved.h[first.number - 1], through(second, dz, "none", dz))
            g = through(first, dz, _shortcut(self.blocks[number]), g)
        weigh(layers[0], saved.x, g)

        sizes = [c.weight.numel() for c in self.convolutions]
        flat = torch.empty(sum(sizes), device=pooled.device)
        _add_partials[(len(table),)](partial, flat, table, ADD_BLOCK, ADD_AT_ONCE)
        norms = torch.cat(saved.gradient_sums).float().split([2 * layer.co for layer in layers])
        found = []
        for convolution, part, both in zip(self.convolutions, flat.split(sizes), norms, strict=True):
            shift, scale = both.chunk(2)
            found += [part.as_strided(convolution.weight.shape, convolution.weight.stride()), scale, shift]
        return found

    def _tiles(self, table: Mapping[tuple[int, int], tuple[int, ...]], layer: Convolution) -> tuple[int, ...]:
        block, *others = table[layer.ci, layer.co]
        return block // (self.dtype.itemsize // 2), *others  # float32 takes twice the shared memory

    def _surrounded(self, like: Tensor, batch: int, size: tuple[int, int], channels: int) -> Tensor:
        """Room for images that a convolution reads: from the first pixel, with more before and TAIL after."""
        before = _before(size)
        shape = (before + _pixels(batch, size) + TAIL.value, channels)
        return torch.empty(shape, dtype=self.dtype, device=like.device)[before:]

    def _table(self, batch: int, layers: Sequence[Convolution], device: torch.device) -> tuple[list[int], Tensor]:
        """Where the partial sums of each convolution begin, and of the last end; `_add_partials`'s table of them."""
        key = batch, layers[0].size_in
        if key not in self.tables:
            places, rows, target = [0], [], 0
            for layer, convolution in zip(layers, self.convolutions, strict=True):
                each = BACKWARD_WEIGHT[layer.ci, layer.co][-1]
                count = triton.cdiv(_pixels(batch, layer.size_out), each)
                size = convolution.weight.numel()
                for first in range(0, size, ADD_BLOCK):
                    rows.append([places[-1] + first, target + first, size, count, size - first])
                places.append(places[-1] + count * size)
                target += size
            self.tables[key] = places, torch.tensor(rows, device=device)
        return self.tables[key]


def _count(batch: int, size: tuple[int, int]) -> int:
    return batch * size[0] * size[1]


def _pixels(batch: int, size: tuple[int, int]) -> int:
    """Those of the images and those around them."""
    return batch * (size[0] + 1) * (size[1] + 1)


def _before(size: tuple[int, int]) -> int:
    """Pixels before the first image: more than the row above and one to the left, and a power of two."""
    return triton.next_power_of_2(size[1] + 2)


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
