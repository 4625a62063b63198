"""Crop, flip and scaling on the device against one image at a time in numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cbl.data import augment


def reference(image: np.ndarray, shift: int, dy: int, dx: int, flip: bool) -> np.ndarray:
    """One image (H, W, C), padded, cut and mirrored step by step."""
    height, width = image.shape[:2]
    padded = np.pad(image, ((shift, shift), (shift, shift), (0, 0)))
    crop = padded[dy : dy + height, dx : dx + width]
    return np.fliplr(crop) if flip else crop


def batch(seed: int, shape: tuple[int, int, int, int], shift: int, size: int) -> tuple[torch.Tensor, ...]:
    """Random images, and which are picked, moved and mirrored."""
    rng = np.random.RandomState(seed)
    images = torch.from_numpy(rng.randint(0, 256, shape).astype(np.uint8))
    index = torch.from_numpy(rng.randint(0, shape[0], size))
    dy, dx, flip = (torch.from_numpy(drawn) for drawn in augment.draw_augmentation(rng, size, shift, True))
    return images, index, dy, dx, flip


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3])),
    shift=st.integers(0, 4),
    size=st.integers(1, 12),
)
@settings(max_examples=60, deadline=None)
def test_crop_flip_is_pad_slice_fliplr_of_every_image(seed, shape, shift, size):
    images, index, dy, dx, flip = batch(seed, shape, shift, size)
    got = augment.crop_flip(augment.pad(images, shift), index, dy, dx, flip, shape[1:3])
    want = [
        reference(images[i].numpy(), shift, y, x, f) for i, y, x, f in zip(index, dy, dx, flip.tolist(), strict=True)
    ]
    assert got.dtype == torch.uint8
    np.testing.assert_array_equal(got.numpy(), np.stack(want))


def test_the_middle_crop_is_the_image_and_the_ring_is_zero():
    images, index, *_ = batch(0, (6, 8, 8, 3), 2, 6)
    middle = torch.full_like(index, 2)
    no = torch.zeros(6, dtype=torch.bool)
    padded = augment.pad(images, 2)
    assert torch.equal(augment.crop_flip(padded, index, middle, middle, no, (8, 8)), images[index])
    corner = augment.crop_flip(padded, index, 0 * middle, 2 * middle, no, (8, 8))
    assert torch.equal(corner[:, 2:, :6], images[index][:, :6, 2:])
    assert corner[:, :2].eq(0).all() and corner[:, :, 6:].eq(0).all()


def test_flipping_twice_gives_the_crop_back():
    images, index, dy, dx, _ = batch(1, (4, 6, 5, 3), 1, 9)
    yes = torch.ones(9, dtype=torch.bool)
    padded = augment.pad(images, 1)
    flipped = augment.crop_flip(padded, index, dy, dx, yes, (6, 5))
    assert torch.equal(flipped.flip(2), augment.crop_flip(padded, index, dy, dx, ~yes, (6, 5)))


def test_shifts_are_uniform_and_flips_even():
    n, shift = 81_000, 4
    dy, dx, flip = augment.draw_augmentation(np.random.RandomState(0), n, shift, True)
    assert dy.dtype == dx.dtype == np.int64 and flip.dtype == bool
    cells = np.zeros((9, 9, 2))
    np.add.at(cells, (dy, dx, flip.astype(int)), 1)
    expected = n / cells.size
    chi2 = ((cells - expected) ** 2 / expected).sum()  # 161 degrees of freedom: mean 161, standard deviation 18
    assert 100 < chi2 < 240
    assert dy.min() == dx.min() == 0 and dy.max() == dx.max() == 8


@pytest.mark.parametrize(("shift", "flip"), [(4, True), (1, False), (0, False)])
def test_settings_do_not_change_what_is_drawn_next(shift, flip):
    rng, other = np.random.RandomState(5), np.random.RandomState(5)
    dy, dx, flipped = augment.draw_augmentation(rng, 100, shift, flip)
    _, _, both = augment.draw_augmentation(other, 100, 4, True)
    assert rng.randint(1 << 30) == other.randint(1 << 30)
    np.testing.assert_array_equal(flipped, both & flip)
    assert max(dy.max(), dx.max()) == 2 * shift


def test_scale_is_the_official_one_unless_statistics_are_given():
    images = torch.tensor([[[[0, 64, 128], [255, 1, 2]]]], dtype=torch.uint8)  # (1, 1, 2, 3)
    x = augment.scale(images)
    assert x.shape == (1, 3, 1, 2) and x.dtype == torch.float32
    assert x[0, :, 0].tolist() == [[-1, 255 / 128 - 1], [-0.5, 1 / 128 - 1], [0, 2 / 128 - 1]]
    mean, std = torch.tensor([0.5, 0.25, 0.0]), torch.tensor([0.5, 0.1, 2.0])
    want = (images.double() / 255 - mean) / std  # NHWC, as channels come last here
    torch.testing.assert_close(augment.scale(images, mean, std).permute(0, 2, 3, 1).double(), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_scaled_images_lie_channels_last(channels):
    images = torch.zeros(4, 6, 5, channels, dtype=torch.uint8)
    one = torch.ones(channels)
    for x in (augment.scale(images), augment.scale(images, one, one)):
        assert x.is_contiguous(memory_format=torch.channels_last)


def test_a_cropped_ring_is_minus_one_after_scaling():
    images = torch.full((1, 4, 4, 3), 200, dtype=torch.uint8)
    zero = torch.zeros(1, dtype=torch.int64)
    x = augment.scale(augment.crop_flip(augment.pad(images, 4), zero, zero, zero, zero.bool(), (4, 4)))
    assert x.eq(-1).all()


def test_channel_statistics_are_those_of_numpy():
    images = np.random.RandomState(0).randint(0, 200, (50, 7, 6, 3)).astype(np.uint8)
    images[..., 2] //= 3
    mean, std = augment.channel_statistics(torch.from_numpy(images))
    values = images.reshape(-1, 3) / 255
    np.testing.assert_allclose(mean.numpy(), values.mean(0), rtol=1e-6)
    np.testing.assert_allclose(std.numpy(), values.std(0), rtol=1e-6)


def test_compiles_into_one_graph():
    images, index, dy, dx, flip = batch(3, (5, 8, 8, 3), 1, 7)
    padded = augment.pad(images, 1)

    def step(index, dy, dx, flip):
        return augment.scale(augment.crop_flip(padded, index, dy, dx, flip, (8, 8)))

    compiled = torch.compile(step, fullgraph=True, backend="eager")  # traces as the real compiler, builds nothing
    assert torch.equal(compiled(index, dy, dx, flip), step(index, dy, dx, flip))


@pytest.mark.gpu
def test_captured_in_a_cuda_graph_it_equals_the_cpu():
    images, *drawn = batch(4, (50, 32, 32, 3), 4, 128)
    want = augment.scale(augment.crop_flip(augment.pad(images, 4), *drawn, (32, 32)))
    padded = augment.pad(images.cuda(), 4)
    static = [torch.zeros_like(tensor, device="cuda") for tensor in drawn]

    def step():
        return augment.scale(augment.crop_flip(padded, *static, (32, 32)))

    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for tensor, value in zip(static, drawn, strict=True):
        tensor.copy_(value)
    graph.replay()
    assert torch.equal(got.cpu(), want)
