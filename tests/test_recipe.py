"""The recipe against the facts of the official code: steps, learning rate, decay, image order."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cbl import class_counts, data
from cbl.config import Recipe
from cbl.engine import recipe
from cbl.engine.step import sgd
from cbl.errors import UserError
from cbl.longtail import class_groups
from cbl.models import resnet_cifar

OFFICIAL = Recipe(drop=0.01)

# (classes, n_max, imbalance factor, steps for 200 epochs)
STEPS = [
    (10, 5000, 200, 17504), (10, 5000, 100, 19384), (10, 5000, 50, 21868), (10, 5000, 20, 26598),
    (10, 5000, 10, 31923), (10, 5000, 1, 78125), (20, 2500, 100, 17990), (100, 500, 200, 14846),
    (100, 500, 100, 16948), (100, 500, 50, 19700), (100, 500, 20, 24854), (100, 500, 10, 30582), (100, 500, 1, 78125),
]  # fmt: skip


@pytest.mark.parametrize(("classes", "n_max", "factor", "steps"), STEPS)
def test_total_steps(classes: int, n_max: int, factor: int, steps: int) -> None:
    assert recipe.total_steps(OFFICIAL, int(class_counts(classes, factor, n_max).sum())) == steps


def test_learning_rate_around_its_changes() -> None:
    n = 12800  # 100 steps an epoch
    rate = [recipe.learning_rate(OFFICIAL, n, step) for step in range(20000)]
    assert rate[0] == 0.0
    assert rate[1] == pytest.approx(0.1 / 500)
    assert rate[250] == pytest.approx(0.05)
    assert rate[499] == pytest.approx(0.1 * 499 / 500)
    assert rate[500] == rate[15999] == 0.1
    assert rate[16000] == rate[17999] == pytest.approx(1e-3)
    assert rate[18000] == rate[19999] == pytest.approx(1e-5)


def test_learning_rate_changes_within_an_epoch() -> None:
    """N is no multiple of the batch: epoch = step * 128 / N is taken before the update, with true division."""
    n = 12406
    first = next(step for step in range(19384) if recipe.learning_rate(OFFICIAL, n, step) < 0.05 and step > 1000)
    assert first == -(-160 * n // 128) == 15508


def test_epoch_steps_hold_every_step_once() -> None:
    for n in (3, 304, 12406, 50000):
        steps = [s for epoch in range(200) for s in recipe.epoch_steps(OFFICIAL, n, epoch)]
        assert steps == list(range(recipe.total_steps(OFFICIAL, n)))


def test_a_larger_loss_is_a_larger_rate_and_less_decay() -> None:
    """What README says of the other division: a loss 8 times as large at 1/8 of the rate and 8 times the decay."""

    def trained(times: float, rate: float, decay: float) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = resnet_cifar(8, 3)
        groups = recipe.parameter_groups(model, Recipe(weight_decay=decay), "softmax")
        optimizer = sgd(groups, Recipe(), torch.device("cpu"))
        optimizer.param_groups[0]["lr"].fill_(rate)
        for _ in range(3):
            optimizer.zero_grad()
            (times * model(torch.randn(4, 3, 8, 8)).square().mean()).backward()
            optimizer.step()
        return list(model.parameters())

    plain = trained(1, 0.1, 0.01)
    for same, *changed in [(True, 8, 0.1 / 8, 0.08), (False, 8, 0.1 / 8, 0.01), (False, 8, 0.1, 0.01)]:
        weights = trained(*changed)
        assert same == all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(plain, weights, strict=True))


@pytest.mark.parametrize(
    ("scope", "kind", "without"),
    [
        ("official", "softmax", set()),
        ("official", "focal", {"fc.bias"}),
        ("official", "sigmoid", {"fc.bias"}),
        ("everything", "focal", set()),
        ("not_bn", "softmax", {"bn"}),
        ("not_bn", "focal", {"bn", "fc.bias"}),
        ("only_last_bias", "focal", {"all but fc.bias"}),
    ],
)
def test_decay_scope(scope: str, kind: str, without: set[str]) -> None:
    model = resnet_cifar(8, num_classes=10)
    names = {id(p): name for name, p in model.named_parameters()}
    norms = {
        f"{n}.{w}" for n, m in model.named_modules() if isinstance(m, torch.nn.BatchNorm2d) for w in ("weight", "bias")
    }
    expected = set()
    for name in names.values():
        decays = name != "fc.bias" if "fc.bias" in without else True
        decays = decays and not ("bn" in without and name in norms)
        if "all but fc.bias" in without:
            decays = name == "fc.bias"
        if decays:
            expected.add(name)
    groups = recipe.parameter_groups(model, Recipe(decay_scope=scope), kind)
    assert {names[id(p)] for g in groups if g["weight_decay"] == 2e-4 for p in g["params"]} == expected
    assert sum(len(g["params"]) for g in groups) == len(names)  # every parameter is trained, once
    assert {g["weight_decay"] for g in groups} <= {0.0, 2e-4}


def stream(n: int, batch: int, order: str = "shuffle", seed: int = 0, shift: int = 4) -> recipe.Stream:
    return recipe.Stream(n, batch, seed, order, shift, True, np.arange(n))


def rows(made: recipe.Stream, settings: Recipe, first: int = 0) -> np.ndarray:
    """(4, images) everything that is drawn from epoch `first` on, in order."""
    parts = [plan.transpose(1, 0, 2).reshape(4, -1) for _, plan in made.epochs(settings, first)]
    return np.concatenate(parts, axis=1)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 300), batch=st.integers(1, 64), epochs=st.integers(1, 6), seed=st.integers(0, 2**32 - 1))
def test_shuffled_stream_is_epochs_of_permutations(n: int, batch: int, epochs: int, seed: int) -> None:
    drawn = rows(stream(n, batch, seed=seed), Recipe(epochs=epochs, batch_size=batch))
    assert drawn.shape == (4, n * epochs // batch * batch)
    for begin in range(0, drawn.shape[1] - n + 1, n):
        assert sorted(drawn[0, begin : begin + n]) == list(range(n))
    assert drawn[1:3].min(initial=0) >= 0 and drawn[1:3].max(initial=0) <= 8
    assert set(drawn[3]) <= {0, 1}


@pytest.mark.parametrize("order", ["shuffle", "official_stream"])
def test_stream_is_a_function_of_seed_and_epoch(order: str) -> None:
    plan = Recipe(epochs=7, batch_size=32)
    whole = rows(stream(101, 32, order), plan)
    for first in range(7):  # what a resumed run draws
        skipped = recipe.epoch_steps(plan, 101, first).start * 32
        assert np.array_equal(rows(stream(101, 32, order), plan, first), whole[:, skipped:])
    assert not np.array_equal(rows(stream(101, 32, order, seed=1), plan), whole)


def test_first_draws_are_pinned() -> None:
    """Published runs name their seed: what it means must never change."""
    drawn = rows(stream(12406, 128), Recipe(epochs=1))
    assert drawn[:, :4].tolist() == [[7912, 7137, 1881, 9452], [8, 8, 1, 6], [8, 4, 4, 1], [1, 1, 0, 1]]


def test_official_stream_is_a_shuffle_buffer_over_sorted_records() -> None:
    """The fact sheet's simulation for CIFAR-100: in the first batches only the first classes can appear."""
    counts = class_counts(100, 100, 500)
    labels = np.repeat(np.arange(100), counts)  # records sorted by class
    n = len(labels)
    made = stream(n, 128, "official_stream")
    assert made.block_length == 2 * n // 128 * 128
    drawn = labels[made.block(0)[0]]
    reach = int(0.4 * n) + 3 * 128  # records in the buffer before the first one leaves it
    for step in range(5):
        last = labels[reach + 128 * (step + 1) - 1]
        assert drawn[128 * step : 128 * (step + 1)].max() <= last
        assert len(set(drawn[128 * step : 128 * (step + 1)])) <= 25


def labels_as_written(classes: int, counts: np.ndarray) -> np.ndarray:
    """(n,) labels in the order of the official records: CIFAR-10 comes in five files, CIFAR-100 in one."""
    labels = np.repeat(np.arange(classes), counts)
    files = np.random.default_rng(0).integers(5 if classes == 10 else 1, size=len(labels))
    return labels[data._record_order(labels, files, balanced=False)]


@pytest.mark.parametrize(
    ("classes", "largest", "often", "rare"),
    [(10, 5000, (1.00, 1.06), (0.93, 0.97)), (100, 500, (1.10, 1.27), (0.77, 0.83))],
)
def test_official_stream_shows_the_last_classes_less_often(
    classes: int, largest: int, often: tuple[float, float], rare: tuple[float, float]
) -> None:
    """The README says so: a twentieth on CIFAR-10, a fifth on CIFAR-100."""
    counts = class_counts(classes, 100, largest)
    labels = labels_as_written(classes, counts)
    made = stream(len(labels), 128, "official_stream")
    blocks = np.concatenate([labels[made.block(k)[0]] for k in range(20)])
    share = np.bincount(blocks, minlength=classes) / len(blocks) / (counts / len(labels))  # 1: as often as uniform
    tenth = classes // 10
    assert often[0] < share[:tenth].mean() < often[1]
    assert rare[0] < share[-tenth:].mean() < rare[1]


def test_official_stream_begins_each_two_epochs_without_the_classes_of_fewest_images_on_cifar100() -> None:
    """The README says so: for half an epoch none of them, then more of them than their share; not so on CIFAR-10."""
    for classes, largest in ((100, 500), (10, 5000)):
        counts = class_counts(classes, 100, largest)
        labels = labels_as_written(classes, counts)
        made = stream(len(labels), 128, "official_stream")
        fewest = class_groups(counts)[1]["few"]
        for number in range(5):
            drawn = np.isin(labels[made.block(number)[0]], fewest)
            first, second, *_ = (
                quarter.mean() / (counts[fewest].sum() / len(labels)) for quarter in np.array_split(drawn, 4)
            )
            if classes == 100:
                assert first == 0 and second > 1.1
            else:
                assert 0.8 < first < 1 and 0.85 < second < 1.05


def test_no_warm_up_begins_at_the_full_rate() -> None:
    assert recipe.learning_rate(Recipe(drop=0.01, warmup_epochs=0), 12800, 0) == 0.1


def test_a_divergence_is_named_by_its_step_of_the_whole_run() -> None:
    with pytest.raises(UserError, match=r"became nan at step 102 \(learning rate 0\.3\)"):
        recipe.refuse_divergence(np.array([1.0, 2.0, np.nan]), [0.1, 0.2, 0.3], 100)


def test_first_images_of_the_official_stream_are_pinned() -> None:
    """They must never change: published runs stand on them."""
    block = recipe.Stream(12406, 128, 0, "official_stream", 4, True, np.arange(12406)).block(0)
    assert block[:, :4].tolist() == [[2708, 4377, 4142, 5148], [2, 6, 2, 4], [3, 7, 8, 1], [1, 0, 1, 1]]
    assert block[0, -4:].tolist() == [10197, 12038, 11022, 10247]
