"""The losses against the paper's equations, numbers computed outside the code, and exact arithmetic."""

import math
import subprocess
import sys
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cbl import ClassBalancedLoss, class_balanced_weights, class_counts, effective_number
from cbl.losses import KINDS, REDUCTIONS, focal_loss, sigmoid_loss, softmax_loss

# Logits, labels and counts of the golden vectors, whose losses were computed with numpy in float64.
LOGITS = torch.tensor([[2, -1, 0], [0.5, 0.3, -2], [-1, 1.5, 0.2], [0, -3, 1]])
TARGET = torch.tensor([0, 0, 1, 2])
COUNTS = [100, 10, 1]


def exact_effective_number(count: int, beta: float) -> Decimal:
    """(1 - β^n) / (1 - β) in 80 digits, for the very double that `beta` is."""
    with localcontext(prec=80):
        exact = Decimal(beta)
        return Decimal(count) if exact == 1 else (1 - exact**count) / (1 - exact)


def loss_by_the_equations(logits, target, counts, kind, beta, gamma, reduction):
    """Sections 3 and 4 of the paper, one scalar at a time."""
    inverse = [1 / float(exact_effective_number(n, beta)) for n in counts]
    weights = [len(counts) * value / sum(inverse) for value in inverse]
    weighted = []
    for z, y in zip(logits.tolist(), target.tolist(), strict=True):
        if kind == "softmax":
            loss = -math.log(math.exp(z[y]) / sum(math.exp(value) for value in z))
        else:
            loss = 0.0
            for i, value in enumerate(z):
                p = 1 / (1 + math.exp(-value if i == y else value))
                loss -= (1 - p) ** (gamma if kind == "focal" else 0) * math.log(p)
        weighted.append(weights[y] * loss)
    if reduction == "none":
        return weighted
    return sum(weighted) / (len(weighted) if reduction == "batch" else sum(weights[y] for y in target.tolist()))


# ---- effective numbers and weights


@pytest.mark.parametrize("beta", [0.0, 1e-300, 0.3, 0.5, 0.9, 0.999, 0.9999, 1 - 1e-9, 1 - 1e-12, 1 - 2**-53, 1.0])
def test_weights_are_right_to_1e12_for_the_double_beta(beta):
    counts = [1, 2, 3, 10, 4_999, 123_456, 10_000_000]
    effective = [exact_effective_number(n, beta) for n in counts]
    with localcontext(prec=80):
        total = sum(1 / e for e in effective)
        weights = [len(counts) / e / total for e in effective]
    assert effective_number(counts, beta).tolist() == pytest.approx([float(e) for e in effective], rel=1e-13)
    assert class_balanced_weights(counts, beta).tolist() == pytest.approx([float(w) for w in weights], rel=1e-12)


def test_the_limits_of_beta_are_exact():
    counts = class_counts(100, 200, 500)
    assert effective_number(counts, 0.0).tolist() == [1.0] * 100
    assert class_balanced_weights(counts, 0.0).tolist() == [1.0] * 100
    assert effective_number(counts, 1.0).tolist() == counts.tolist()
    inverse_frequency = 1 / counts
    expected = inverse_frequency * 100 / inverse_frequency.sum()
    np.testing.assert_allclose(class_balanced_weights(counts, 1.0).numpy(), expected, rtol=1e-14)


def test_effective_number_does_not_hand_out_the_callers_memory():
    counts = torch.tensor([3.0, 2.0], dtype=torch.float64, requires_grad=True)
    effective = effective_number(counts, 1.0)
    assert not effective.requires_grad
    effective.zero_()
    assert counts.tolist() == [3.0, 2.0]


@settings(deadline=None, max_examples=100)
@given(
    counts=st.lists(st.integers(1, 10**7), min_size=1, max_size=20),
    beta=st.one_of(st.floats(0, 1), st.floats(0, 12).map(lambda power: 1 - 10.0**-power)),
)
def test_properties_of_the_weights(counts, beta):
    effective = effective_number(counts, beta).double()
    following = effective_number([n + 1 for n in counts], beta)
    torch.testing.assert_close(following, 1 + beta * effective, rtol=1e-12, atol=0)  # Proposition 1
    weights = class_balanced_weights(counts, beta)
    assert weights.dtype == torch.float64
    assert weights.sum().item() == pytest.approx(len(counts), rel=1e-12)
    from_rare_to_frequent = weights[torch.tensor(counts).argsort()]
    assert (from_rare_to_frequent.diff() <= 1e-12 * len(counts)).all()


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        (0.9999, [0.0890, 0.1267, 0.1853, 0.2761, 0.4168, 0.6344, 0.9695, 1.4894, 2.2923, 3.5206]),
        (0.999, [0.2959, 0.3059, 0.3351, 0.3957, 0.5028, 0.6780, 0.9542, 1.3871, 2.0583, 3.0870]),
    ],
)
def test_weights_of_cifar10_at_imbalance_50(beta, expected):
    assert class_balanced_weights(class_counts(10, 50, 5000), beta).tolist() == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize(("beta", "expected"), [(0.99, [0.3170, 0.6297, 3.2939]), (0.9999, [0.0789, 0.5595, 3.8494])])
def test_weights_of_cifar100_at_imbalance_50(beta, expected):
    weights = class_balanced_weights(class_counts(100, 50, 500), beta)
    assert weights[[0, 50, 99]].tolist() == pytest.approx(expected, abs=5e-5)


SAMPLE_MEAN_WEIGHTS = [  # classes, largest class, imbalance factor; Σ n_i w_i / N at β 0.9, 0.99, 0.999, 0.9999
    (10, 5000, 200, [0.992, 0.625, 0.168, 0.105]),
    (10, 5000, 100, [0.999, 0.798, 0.273, 0.171]),
    (10, 5000, 50, [1.000, 0.920, 0.417, 0.269]),
    (10, 5000, 20, [1.000, 0.990, 0.651, 0.452]),
    (10, 5000, 10, [1.000, 0.999, 0.817, 0.623]),
    (100, 500, 200, [0.654, 0.189, 0.127, 0.122]),
    (100, 500, 100, [0.835, 0.312, 0.211, 0.203]),
    (100, 500, 50, [0.941, 0.464, 0.320, 0.307]),
    (100, 500, 20, [0.994, 0.690, 0.507, 0.489]),
    (100, 500, 10, [1.000, 0.842, 0.670, 0.650]),
]


@pytest.mark.parametrize(("classes", "n_max", "imbalance_factor", "expected"), SAMPLE_MEAN_WEIGHTS)
def test_the_mean_weight_of_a_sample(classes, n_max, imbalance_factor, expected):
    counts = class_counts(classes, imbalance_factor, n_max)
    weights = [class_balanced_weights(counts, beta).numpy() for beta in (0.9, 0.99, 0.999, 0.9999)]
    assert [(counts * w).sum() / counts.sum() for w in weights] == pytest.approx(expected, abs=5e-4)


# ---- the values of the losses


@pytest.mark.parametrize(
    ("beta", "weights", "expected"),
    [
        (0.0, [1, 1, 1], [0.360553, 1.239127, 0.795633, 0.530952, 0.253939]),
        (0.9, [0.239329, 0.367442, 2.393229], [0.271858, 0.906695, 0.574430, 0.378231, 0.175014]),
        (0.999, [0.028363, 0.271256, 2.700381], [0.246802, 0.819606, 0.516591, 0.338385, 0.154602]),
    ],
)
def test_golden_vectors(beta, weights, expected):
    losses = [ClassBalancedLoss(COUNTS, kind, beta) for kind in ("softmax", "sigmoid")]
    losses += [ClassBalancedLoss(COUNTS, "focal", beta, gamma) for gamma in (0.5, 1.0, 2.0)]
    assert class_balanced_weights(COUNTS, beta).tolist() == pytest.approx(weights, abs=5e-7)
    assert [loss(LOGITS, TARGET).item() for loss in losses] == pytest.approx(expected, abs=6e-7)


@pytest.mark.parametrize(("beta", "expected"), [(0.0, 0.360553), (0.9, 0.335696), (0.999, 0.325988)])
def test_weight_sum_is_what_cross_entropy_does_with_weights(beta, expected):
    loss = ClassBalancedLoss(COUNTS, "softmax", beta, reduction="weight_sum")
    assert loss(LOGITS, TARGET).item() == pytest.approx(expected, abs=6e-7)
    torch.testing.assert_close(loss(LOGITS, TARGET), F.cross_entropy(LOGITS, TARGET, weight=loss.weights))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("kind", "gamma"), [("softmax", 1.0), ("sigmoid", 1.0), ("focal", 0.0), ("focal", 0.5), ("focal", 2.0)]
)
def test_every_loss_and_reduction_against_the_papers_equations(kind, gamma, reduction):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(37, 5, generator=generator)
    target = torch.randint(5, (37,), generator=generator)
    counts = [900, 300, 80, 12, 1]
    expected = loss_by_the_equations(logits, target, counts, kind, 0.99, gamma, reduction)
    actual = ClassBalancedLoss(counts, kind, 0.99, gamma, reduction)(logits, target)
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "gamma", "classes", "prior_bias", "expected"),
    [
        ("sigmoid", 1.0, 10, False, 6.93),
        ("sigmoid", 1.0, 100, False, 69.3),
        ("sigmoid", 1.0, 8142, False, 5644),
        ("sigmoid", 1.0, 10, True, 3.25),
        ("sigmoid", 1.0, 100, True, 5.60),
        ("sigmoid", 1.0, 8142, True, 10.0),
        ("focal", 0.5, 10, True, 2.48),
        ("focal", 1.0, 10, True, 2.17),
        ("focal", 2.0, 10, True, 1.87),
        ("focal", 0.5, 100, True, 4.68),
        ("focal", 1.0, 100, True, 4.57),
        ("focal", 2.0, 100, True, 4.51),
    ],
)
def test_the_loss_of_a_network_that_knows_nothing(kind, gamma, classes, prior_bias, expected):
    logits = torch.full((8, classes), -math.log(classes - 1) if prior_bias else 0.0)
    loss = ClassBalancedLoss([7] * classes, kind, 0.9, gamma)(logits, torch.arange(8))
    last_digit = {6.93: 0.01, 69.3: 0.1, 5644: 1, 10.0: 0.1}.get(expected, 0.01)
    assert loss.item() == pytest.approx(expected, abs=last_digit / 2)


def test_focal_at_gamma_0_is_sigmoid_to_the_bit_with_its_gradient():
    logits = (50 * torch.randn(64, 10, generator=torch.Generator().manual_seed(1))).requires_grad_()
    target = torch.arange(64) % 10
    focal, sigmoid = focal_loss(logits, target, 0.0), sigmoid_loss(logits, target)
    assert torch.equal(focal, sigmoid)
    assert torch.equal(*(torch.autograd.grad(loss.sum(), logits)[0] for loss in (focal, sigmoid)))


@pytest.mark.parametrize("gamma", [0, 0.0, 0.5, 1.0, 2.0])
def test_a_class_masked_with_minus_infinity_adds_nothing_to_focal(gamma):
    logits = torch.tensor([[0.5, -math.inf, -2.0], [3.0, 1.0, -math.inf]], requires_grad=True)
    target = torch.tensor([0, 1])
    losses = focal_loss(logits, target, gamma)
    gradient = torch.autograd.grad(losses.sum(), logits)[0]
    kept = torch.tensor([[0.5, -2.0], [3.0, 1.0]], requires_grad=True)
    expected = focal_loss(kept, target, gamma)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(gradient[logits.isfinite()], torch.autograd.grad(expected.sum(), kept)[0].flatten())
    assert (gradient[logits.isinf()] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_beta_0_is_the_unweighted_loss_to_the_bit(kind):
    unweighted = {"softmax": softmax_loss, "sigmoid": sigmoid_loss, "focal": lambda z, y: focal_loss(z, y, 1.0)}[kind]
    assert torch.equal(ClassBalancedLoss(COUNTS, kind, 0.0)(LOGITS, TARGET), unweighted(LOGITS, TARGET).mean())


def test_sigmoid_loss_is_binary_cross_entropy_summed_over_the_classes():
    one_hot = F.one_hot(TARGET, 3).float()
    expected = F.binary_cross_entropy_with_logits(LOGITS, one_hot, reduction="none").sum(1)
    torch.testing.assert_close(sigmoid_loss(LOGITS, TARGET), expected)


# ---- gradients, extremes, precision


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("kind", "gamma"), [("softmax", 1.0), ("sigmoid", 1.0), ("focal", 0.5), ("focal", 1.0), ("focal", 2.0)]
)
def test_gradcheck(kind, gamma, reduction):
    logits = (2 * torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))).requires_grad_()
    loss = ClassBalancedLoss(COUNTS, kind, 0.9, gamma, reduction)
    assert loss(logits.detach(), torch.tensor([0, 1, 2, 0, 1])).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda z: loss(z, torch.tensor([0, 1, 2, 0, 1])), (logits,))


EXTREMES = [0.0, 1e-30, 1.0, 16.0, 88.0, 89.0, 104.0, 1e3, 1e4]


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_stay_finite_and_right_at_extreme_logits(kind, gamma):
    values = torch.tensor([sign * value for value in EXTREMES for sign in (1, -1)])
    pairs = torch.cartesian_prod(values, values)  # (324, 2): true class and other class take every value
    loss = ClassBalancedLoss([5, 2], kind, 0.9, gamma, reduction="none")
    target = torch.zeros(len(pairs), dtype=torch.long)
    results = []
    for dtype in (torch.float32, torch.float64):
        logits = pairs.to(dtype).requires_grad_()
        losses = loss(logits, target)
        results.append((losses.detach(), *torch.autograd.grad(losses.sum(), logits)))
    (losses, gradient), (losses64, gradient64) = results
    assert losses.isfinite().all() and gradient.isfinite().all()
    torch.testing.assert_close(losses, losses64.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, gradient64.float(), rtol=1e-5, atol=1e-6)


def test_focal_keeps_its_modulator_where_the_authors_formula_overflows():
    logits = torch.tensor([[-100.0, 0.0]], requires_grad=True)
    loss = focal_loss(logits, torch.tensor([0]), 2.0)
    gradient = torch.autograd.grad(loss.sum(), logits)[0]
    assert loss.item() == pytest.approx(100 + math.log(2) / 4, rel=1e-6)  # the true class alone: (1 - 0)^2 · 100
    assert gradient[0, 0].item() == pytest.approx(-1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_logits_are_taken_to_float32_under_autocast_too(kind, dtype):
    generator = torch.Generator().manual_seed(3)
    logits = torch.cat([4 * torch.randn(30, 3, generator=generator), torch.tensor([[1e4, -1e4, 0], [-1e4, 1e4, 88]])])
    target = torch.arange(32) % 3
    loss = ClassBalancedLoss(COUNTS, kind, 0.999, 0.5)
    half = logits.to(dtype).requires_grad_()
    expected = loss(half.detach().float(), target)
    with torch.autocast("cpu", dtype=dtype):
        under_autocast = loss(half, target)
        float32_under_autocast = loss(half.detach().float(), target)
    under_autocast.backward()
    assert under_autocast.dtype == torch.float32
    assert torch.equal(under_autocast, expected)
    assert torch.equal(float32_under_autocast, expected)
    assert torch.equal(loss(half, target), expected)
    assert half.grad.dtype == dtype and half.grad.isfinite().all()


# ---- torch.compile and CUDA


def value_and_gradient(function, logits, target):
    logits = logits.clone().requires_grad_()
    loss = function(logits, target)
    return loss.detach(), *torch.autograd.grad(loss, logits)


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_a_graph_break(kind):
    torch.compiler.reset()
    loss = ClassBalancedLoss(COUNTS, kind, 0.99, 0.5, reduction="weight_sum")
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        value_and_gradient(compiled, LOGITS, TARGET), value_and_gradient(loss, LOGITS, TARGET), rtol=0, atol=0
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_by_inductor_it_gives_the_same_numbers(kind):
    torch.compiler.reset()
    loss = ClassBalancedLoss(COUNTS, kind, 0.99, 0.5)
    compiled = torch.compile(loss, fullgraph=True)
    for scale in (1.0, 3e3):
        torch.testing.assert_close(
            value_and_gradient(compiled, scale * LOGITS, TARGET), value_and_gradient(loss, scale * LOGITS, TARGET)
        )


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("label", [-1, -100, 100])  # -1 and -100 count from the end, -100 is ignored by F.cross_entropy
@pytest.mark.parametrize("kind", KINDS)
def test_a_label_out_of_range_is_not_trained_on_under_torch_compile(kind, label, backend):
    torch.compiler.reset()
    loss = torch.compile(ClassBalancedLoss([7] * 100, kind), fullgraph=True, backend=backend)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        loss(torch.zeros(4, 100), torch.tensor([0, label, 1, 2]))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_never_synchronises_and_can_be_captured_in_a_cuda_graph(kind):
    expected = value_and_gradient(ClassBalancedLoss(COUNTS, kind, 0.99), LOGITS, TARGET)
    loss, logits, target = ClassBalancedLoss(COUNTS, kind, 0.99).cuda(), LOGITS.cuda(), TARGET.cuda()
    value_and_gradient(loss, logits, target)  # loads the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        value_and_gradient(loss, logits, target)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = value_and_gradient(loss, logits, target)
    graph.replay()
    torch.testing.assert_close([value.cpu() for value in captured], list(expected))


# ---- the module and its errors


def test_the_weights_are_a_float32_buffer_that_no_checkpoint_overwrites():
    loss = ClassBalancedLoss(COUNTS, beta=0.9999)
    assert dict(loss.named_buffers())["weights"].dtype == torch.float32
    assert not list(loss.parameters())
    model = torch.nn.ModuleDict({"loss": loss})
    model.load_state_dict(torch.nn.ModuleDict({"loss": ClassBalancedLoss(COUNTS, beta=0.0)}).state_dict(), strict=True)
    torch.testing.assert_close(loss.weights, class_balanced_weights(COUNTS, 0.9999).float())


@pytest.mark.parametrize(
    "counts",
    [
        (100, 10, 1),
        np.array(COUNTS),
        np.array(COUNTS, dtype=np.float32),
        np.array(COUNTS, dtype=">i8"),
        np.sort(COUNTS)[::-1],
        np.array(COUNTS, dtype=object),
        list(np.array(COUNTS)),
        torch.tensor(COUNTS),
    ],
)
def test_counts_may_be_any_sequence_of_whole_numbers(counts):
    assert torch.equal(class_balanced_weights(counts, 0.9), class_balanced_weights(COUNTS, 0.9))


@pytest.mark.filterwarnings("error")
def test_counts_may_be_read_only_as_pandas_hands_them_out():
    counts = np.array(COUNTS)
    counts.setflags(write=False)
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # else torch warns once in a process
    try:
        assert torch.equal(class_balanced_weights(counts, 0.9), class_balanced_weights(COUNTS, 0.9))
    finally:
        torch.set_warn_always(always)


def test_counts_in_the_order_of_a_pandas_series_are_refused():
    labels = pytest.importorskip("pandas").Series([2, 2, 2, 0, 0, 1])
    counts = labels.value_counts()
    with pytest.raises(ValueError, match=r"^counts must be in class order.*Series.*write \.sort_index\(\)\.to_numpy"):
        class_balanced_weights(counts, 0.9)
    ordered = class_balanced_weights(counts.sort_index().to_numpy(), 0.9)
    assert torch.equal(ordered, class_balanced_weights([2, 1, 3], 0.9))


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64]
)
def test_targets_of_any_integer_type_are_indices(dtype):
    for kind in KINDS:
        loss = ClassBalancedLoss(COUNTS, kind)
        assert torch.equal(loss(LOGITS, TARGET.to(dtype)), loss(LOGITS, TARGET))


def test_repr_says_what_it_computes():
    assert repr(ClassBalancedLoss(COUNTS, "focal", 0.99, 2.0)) == (
        "ClassBalancedLoss(classes=3, kind='focal', beta=0.99, gamma=2.0, reduction='batch')"
    )
    assert "gamma" not in repr(ClassBalancedLoss(COUNTS, "softmax"))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"beta": -0.1}, "-0.1"),
        ({"beta": 1.1}, "1.1"),
        ({"beta": math.nan}, "nan"),
        ({"gamma": -1.0}, "-1.0"),
        ({"gamma": math.nan}, "nan"),
        ({"gamma": math.inf}, "inf"),
        ({"kind": "sidmoid"}, "'sidmoid'"),
        ({"reduction": "mean"}, "'mean'"),
        ({"counts": [5, 0, 1]}, "got 0 for class 1"),
        ({"counts": [5, 2, -3]}, "got -3 for class 2"),
        ({"counts": [2.5, 1, 1]}, "got 2.5 for class 0"),
        ({"counts": [1, math.nan]}, "got nan for class 1"),
        ({"counts": [1, math.inf]}, "got inf for class 1"),
        ({"counts": []}, r"shape \(0,\)"),
        ({"counts": 7}, r"shape \(\)"),
        ({"counts": [10**400, 2]}, "^counts must be a flat list of whole numbers"),
        ({"counts": [[1, 2], [3, 4]]}, r"shape \(2, 2\)"),
        ({"counts": "abc"}, "'abc'"),
        ({"counts": {0: 5}}, "{0: 5}"),
        ({"counts": [1, None]}, "None"),
        ({"counts": np.array(["5", "3"])}, "'5'"),
        ({"counts": np.array([5, None])}, "None"),
        ({"counts": np.ma.array([5, 3], mask=[0, 1])}, "None"),
        ({"beta": "0.9"}, r"^beta must be a number in \[0, 1\], got '0.9'; the paper uses"),
        ({"beta": None}, "^beta must be a number .* got None"),
        ({"beta": [0.9, 0.99]}, r"^beta must be a number .* got \[0.9, 0.99\]"),
        ({"beta": torch.zeros(2)}, "^beta must be a number .* got tensor"),
        ({"gamma": "2"}, "^gamma must be a finite number >= 0, got '2'"),
        ({"gamma": None}, "^gamma must be a finite number >= 0, got None"),
    ],
)
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        ClassBalancedLoss(**{"counts": COUNTS, **arguments})


@pytest.mark.parametrize(
    ("logits", "target", "named"),
    [
        (torch.zeros(4, 5), TARGET, r"\(batch, 3\).*\(4, 5\)"),
        (torch.zeros(3), TARGET, r"\(3,\)"),
        (torch.zeros(2, 3, 8), TARGET, r"\(2, 3, 8\)"),
        (TARGET, LOGITS, r"\(4,\)"),
        (torch.zeros(0, 3), TARGET[:0], "empty"),
        (LOGITS, TARGET[:3], r"\(4,\).*\(3,\)"),
        (LOGITS, F.one_hot(TARGET, 3), r"\(4, 3\)"),
        (LOGITS, TARGET.float(), "float32"),
        (LOGITS, TARGET > 0, "bool"),
        (LOGITS, TARGET.to(torch.complex64), "complex64"),
        (LOGITS, torch.tensor([0, 1, 3, 2]), r"0\.\.2.*got 3"),
        (LOGITS, torch.tensor([0, 1, 3, 2], dtype=torch.uint16), r"0\.\.2.*got 3"),
        (LOGITS, [0, 1, 2, 0], "^target must be a tensor, got a list; torch.as_tensor makes one"),
        (LOGITS, np.array([0, 1, 2, 0]), "^target must be a tensor, got a ndarray"),
        (LOGITS.tolist(), TARGET, "^logits must be a tensor, got a list"),
        (LOGITS.long(), TARGET, r"^logits must be floating point, got torch\.int64"),
        (LOGITS, torch.tensor([0, -100, 1, 2]), "got -100"),
        (LOGITS.to("meta"), TARGET.to("meta"), "meta.*cpu"),
        (LOGITS, TARGET.to("meta"), "^the target is on meta but the logits are on cpu"),
    ],
)
def test_bad_batches_are_named(logits, target, named):
    for kind in KINDS:
        with pytest.raises(ValueError, match=named):
            ClassBalancedLoss(COUNTS, kind)(logits, target)


def test_importing_the_package_needs_torch_and_numpy_alone():
    code = (
        "import sys, torch, numpy; before = set(sys.modules); import cbl, cbl.models;"
        "new = {name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names;"
        "print(sorted(new - {'torch', 'numpy'}))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "['cbl']"
