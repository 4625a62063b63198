"""Class counts against the paper's data sets, subsets against a loop written from their definition, class groups."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbl import class_counts, draw_subset
from cbl.longtail import class_groups, shot_groups, subset_hash, tercile_groups

# classes, largest class, imbalance factor; images in all, smallest class, steps of 200 epochs at batch size 128
DATA_SETS = [
    (10, 5000, 200, 11_203, 25, 17_504),
    (10, 5000, 100, 12_406, 50, 19_384),
    (10, 5000, 50, 13_996, 100, 21_868),
    (10, 5000, 20, 17_023, 250, 26_598),
    (10, 5000, 10, 20_431, 500, 31_923),
    (10, 5000, 1, 50_000, 5000, 78_125),
    (20, 2500, 200, 10_225, 12, 15_976),
    (20, 2500, 100, 11_514, 25, 17_990),
    (20, 2500, 50, 13_204, 50, 20_631),
    (20, 2500, 20, 16_396, 125, 25_618),
    (20, 2500, 10, 19_954, 250, 31_178),
    (100, 500, 200, 9_502, 2, 14_846),
    (100, 500, 100, 10_847, 5, 16_948),
    (100, 500, 50, 12_608, 10, 19_700),
    (100, 500, 20, 15_907, 25, 24_854),
    (100, 500, 10, 19_573, 50, 30_582),
    (100, 500, 1, 50_000, 500, 78_125),
]
CIFAR10 = {
    200: [5000, 2775, 1540, 854, 474, 263, 146, 81, 45, 25],
    100: [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50],
    50: [5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100],
    20: [5000, 3584, 2569, 1842, 1320, 946, 678, 486, 348, 250],
    10: [5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500],
    1: [5000] * 10,
}
CIFAR100_ENDS = {
    200: ([500, 473, 449, 425], [3, 2, 2, 2, 2]),
    100: ([500, 477, 455, 434], [6, 5, 5, 5, 5]),
    50: ([500, 480, 462, 444], [11, 11, 10, 10, 10]),
    20: ([500, 485, 470, 456], [27, 26, 25, 25]),
    10: ([500, 488, 477, 466], [53, 52, 51, 50]),
}


@pytest.mark.parametrize(("classes", "n_max", "imbalance_factor", "total", "smallest", "steps"), DATA_SETS)
def test_the_data_sets_of_the_paper(classes, n_max, imbalance_factor, total, smallest, steps):
    counts = class_counts(classes, imbalance_factor, n_max)
    assert counts.dtype == np.int64
    assert (len(counts), counts[0], counts[-1], counts.sum()) == (classes, n_max, smallest, total)
    assert counts.sum() * 200 // 128 == steps


@pytest.mark.parametrize("imbalance_factor", CIFAR10)
def test_every_count_of_cifar10(imbalance_factor):
    assert class_counts(10, imbalance_factor, 5000).tolist() == CIFAR10[imbalance_factor]


@pytest.mark.parametrize("imbalance_factor", CIFAR100_ENDS)
def test_both_ends_of_cifar100(imbalance_factor):
    head, tail = CIFAR100_ENDS[imbalance_factor]
    counts = class_counts(100, imbalance_factor, 500).tolist()
    assert counts[: len(head)] == head
    assert counts[-len(tail) :] == tail


@settings(deadline=None)
@given(st.integers(2, 300), st.floats(1, 1000), st.integers(1, 10_000))
def test_counts_fall_from_the_largest_class_to_at_least_one_image(classes, imbalance_factor, n_max):
    if n_max * (1 / imbalance_factor) < 1:
        with pytest.raises(ValueError, match="without images"):
            class_counts(classes, imbalance_factor, n_max)
        return
    counts = class_counts(classes, imbalance_factor, n_max)
    assert counts[0] == n_max
    assert (np.diff(counts) <= 0).all()
    assert counts[-1] == int(n_max * (1 / imbalance_factor))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 0.01, 5000), "must be >= 1, got 0.01; did you mean 100?"),
        ((10, 0.005, 5000), "must be >= 1, got 0.005; did you mean 200?"),
        ((10, 0, 5000), "must be >= 1, got 0."),
        ((10, -5, 5000), "must be >= 1, got -5."),
        ((10, float("nan"), 5000), "must be >= 1, got nan."),
        ((100, 1000, 500), "imbalance_factor 1000 leaves class 90 without images (500 in the largest class)"),
        ((10, float("inf"), 500), "imbalance_factor inf leaves class 1 without images"),
        ((3, 10, 1), "leaves class 1 without images (1 in the largest class); choose 1, which keeps it."),
        ((1, 10, 500), "num_classes must be at least 2 to be long-tailed, got 1."),
        ((10, 1, 0), "n_max must be at least 1 image, got 0."),
    ],
)
def test_impossible_counts_are_refused_with_a_sentence(arguments, message):
    with pytest.raises(ValueError) as error:
        class_counts(*arguments)
    assert message in str(error.value)


# ---- subsets


def labels_like_cifar() -> np.ndarray:
    return np.random.RandomState(9).permutation(np.repeat(np.arange(10), 500))


def subset_by_definition(labels, counts, seed):
    """One numpy state for all classes; every class's indices, in file order, shuffled as a list; the first n kept."""
    np.random.seed(seed)
    kept = []
    for label, count in enumerate(counts):
        indices = [i for i, value in enumerate(labels.tolist()) if value == label]
        np.random.shuffle(indices)
        kept += indices[:count]
    return sorted(kept)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_subset_is_the_one_of_the_community(seed):
    labels, counts = labels_like_cifar(), class_counts(10, 100, 500)
    indices = draw_subset(labels, counts, seed)
    assert indices.dtype == np.int64
    assert indices.tolist() == subset_by_definition(labels, counts, seed)


def test_subset_of_seed_0_never_changes():
    indices = draw_subset(labels_like_cifar(), class_counts(10, 100, 500), 0)
    assert indices[:8].tolist() == [4, 5, 8, 9, 11, 16, 24, 31]
    assert subset_hash(indices) == "1b43c5db1d584132"


def test_subset_holds_the_counts_and_takes_lists():
    labels, counts = labels_like_cifar(), class_counts(10, 50, 500)
    indices = draw_subset(labels.tolist(), counts.tolist(), 3)
    assert np.bincount(labels[indices]).tolist() == counts.tolist()
    assert (np.diff(indices) > 0).all()
    assert draw_subset(labels, [500.0] * 10, 3).tolist() == list(range(5000))


def test_subsets_are_nested_across_imbalance_factors_and_differ_across_seeds():
    labels = labels_like_cifar()
    subsets = [set(draw_subset(labels, class_counts(10, factor, 500), 5).tolist()) for factor in (200, 100, 50, 20, 10)]
    assert all(smaller < larger for smaller, larger in itertools.pairwise(subsets))
    assert subsets[0] != set(draw_subset(labels, class_counts(10, 200, 500), 6).tolist())


def test_drawing_leaves_the_global_generators_alone():
    np_state, state = np.random.get_state()[1].tolist(), random.getstate()
    draw_subset(labels_like_cifar(), [5] * 10, 0)
    assert np.random.get_state()[1].tolist() == np_state
    assert random.getstate() == state


@pytest.mark.parametrize(
    ("labels", "counts", "message"),
    [
        ([0, 0, 1], [2, 2], "class 1 has 1 images; draw 1 to 1 of them, not 2."),
        ([0, 0, 1], [2, 0], "class 1 has 1 images; draw 1 to 1 of them, not 0."),
        ([0, 0, 1], [1, 1, 1], "class 2 has 0 images"),
        ([0, 1, 2], [1, 1], "labels must lie in 0..1, one per count, got 2."),
        ([0, 1, -1], [1, 1], "labels must lie in 0..1, one per count, got -1."),
        ([0, 0, 1], [1.5, 1], "counts must be a list of whole numbers, one per class, got [1.5, 1.0]."),
        ([0, 0, 1], [[1, 1]], "one per class, got [[1, 1]]."),
        ([], [], "one per class, got []."),
        (["cat", "dog"], [1, 1], "labels must be class numbers, got <U3;"),
    ],
)
def test_a_subset_that_cannot_be_drawn_is_refused(labels, counts, message):
    with pytest.raises(ValueError) as error:
        draw_subset(labels, counts, 0)
    assert message in str(error.value)


def test_hash_is_of_the_numbers_and_not_of_their_type():
    assert subset_hash([1, 2, 3]) == subset_hash(np.array([1, 2, 3], dtype=np.int32)) == "e2e2033ae7e19d68"
    assert subset_hash([1, 2, 3]) != subset_hash([1, 2, 4])


# ---- groups


def test_shot_groups_at_their_bounds():
    groups = shot_groups([101, 100, 20, 19, 1])
    assert (groups["many"].tolist(), groups["medium"].tolist(), groups["few"].tolist()) == ([0], [1, 2], [3, 4])


@pytest.mark.parametrize(("imbalance_factor", "sizes"), [(100, [35, 35, 30]), (10, [69, 31, 0])])
def test_shot_groups_of_cifar100(imbalance_factor, sizes):
    rule, groups = class_groups(class_counts(100, imbalance_factor, 500))
    assert rule == "shots"
    assert [len(members) for members in groups.values()] == sizes


def test_terciles_of_cifar10_whatever_the_order_of_its_classes():
    rule, groups = class_groups(class_counts(10, 100, 5000))
    assert rule == "terciles"
    assert [members.tolist() for members in groups.values()] == [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]
    _, groups = class_groups([4, 9, 1, 8, 5, 2])
    assert [members.tolist() for members in groups.values()] == [[1, 3], [0, 4], [2, 5]]


@settings(deadline=None)
@given(st.lists(st.integers(1, 5000), min_size=3, max_size=40))
def test_every_class_is_in_one_group_and_terciles_are_even(counts):
    for groups in (shot_groups(counts), tercile_groups(counts)):
        assert list(groups) == ["many", "medium", "few"]
        assert sorted(np.concatenate(list(groups.values())).tolist()) == list(range(len(counts)))
    sizes = [len(members) for members in groups.values()]
    assert max(sizes) - min(sizes) <= 1
    many, medium, few = (np.array(counts)[members] for members in groups.values())
    assert many.min() >= medium.max() and medium.min() >= few.max()


def test_counts_in_an_order_of_their_own_are_refused() -> None:
    labels = pytest.importorskip("pandas").Series([1, 1, 1, 0, 0])
    with pytest.raises(ValueError, match=r"need not be in class order: \.sort_index\(\)\.to_numpy\(\) is\.$"):
        draw_subset(labels, labels.value_counts(), 0)
    assert draw_subset(labels, labels.value_counts().sort_index().to_numpy(), 0).tolist() == [0, 1, 2, 3, 4]


def test_from_eleven_classes_on_groups_go_by_shots() -> None:
    assert [class_groups([1] * n)[0] for n in (10, 11, 20)] == ["terciles", "shots", "shots"]
