"""What a sweep ends with: lines made of records."""

from typing import Any

import pytest

from cbl import config, records
from cbl.report import sweep


def record(beta: float, seed: int, error: float, each: tuple[float, ...] = (), **groups: Any) -> dict[str, Any]:
    values = {"dataset": {"name": "digits_lt"}, "loss": {"beta": beta, **groups.pop("loss", {})}, "seed": seed}
    run = config.from_mapping(values | groups)
    return records.new_record(run) | {"status": "done", "error_last": error, "per_class_error": list(each)}


def test_seeds_are_averaged_and_balancing_is_paired_with_its_baseline() -> None:
    ended = [record(beta, seed, 20.0 + seed - 10 * beta) for beta in (0.0, 0.9) for seed in (0, 1)]
    ended.append(record(0.9, 2, 5.0))  # without a baseline of its seed
    ended.append(record(0.0, 3, 50.0) | {"status": "failed"})
    first, *rest = sweep.lines(ended)
    assert first == (
        "Test error after the last step, %: mean ± standard deviation (runs); how much lower than at beta 0 with the "
        "same seed [range of the 2 pairs] (pairs)"
    )
    assert [line.split() for line in rest] == [
        [ended[0]["cell"], "20.50", "±", "0.71", "(2)"],
        [ended[2]["cell"], "9.33", "±", "3.79", "(3)", "+9.00", "[+9.00,", "+9.00]", "(2)"],
    ]
    assert rest[0].index("20.50") == rest[1].index("9.33")


def test_single_pairs_among_others_are_no_interval() -> None:
    ended = [record(beta, seed, 20.0 - beta) for beta in (0.0, 0.9) for seed in range(3)]
    said = sweep.lines([*ended, record(0.99, 0, 18.0)])
    assert said[0].endswith("with the same seed [range of the 3 pairs] (pairs)") and said[3].endswith("+2.00 (1)")


def test_one_run_of_each_has_no_spread_and_no_interval() -> None:
    ended = [record(0.9, 0, 12.0), record(0.0, 0, 10.0)]
    first, balanced, plain = sweep.lines(ended)
    assert first.endswith("lower than at beta 0 with the same seed (pairs)")
    assert balanced.split()[1:] == ["12.00", "(1)", "−2.00", "(1)"] and plain.split()[1:] == ["10.00", "(1)"]


def test_the_baseline_is_alike_in_all_else() -> None:
    """At beta 0 the reduction has no effect, so all of a loss share their baseline; another drop has another."""
    ended = [
        record(0.0, 0, 30.0),
        record(0.9, 0, 29.0, loss={"reduction": "weight_sum"}),
        record(0.9, 0, 28.0, recipe={"drop": 0.1}),
        record(0.9, 0, 27.0, loss={"kind": "focal"}),
    ]
    _, *rest = sweep.lines(ended)
    assert ["+" in line for line in rest] == [False, True, False, False]
    assert "+1.00 (1)" in rest[1]


def test_a_skewed_test_set_shows_the_mean_over_the_classes_too() -> None:
    ended = [record(beta, seed, 3.0 + beta, (1.0, 20.0 - 10 * beta)) for beta in (0.0, 0.9) for seed in (0, 1)]
    said = sweep.lines(ended)
    assert len(said) == 6 and said[3] == "Mean over the classes, %, likewise"
    assert "−0.90" in said[2] and "10.50" in said[4] and "6.00" in said[5] and "+4.50" in said[5]
    balanced = [row | {"per_class_error": [row["error_last"]] * 2} for row in ended]
    assert sweep.lines(balanced) == said[:3]


def test_of_own_images_it_says_that_the_test_set_chooses_between_several_beta() -> None:
    own = {"dataset": {"name": "folder", "root": "images", "imbalance_factor": None}}
    ended = [record(beta, 0, 20.0 - beta, **own) for beta in (0.0, 0.9, 0.99)]
    assert "chance" not in " ".join(sweep.lines(ended[:2]))
    assert "low by chance too" in sweep.lines(ended)[-1] and len(sweep.lines(ended)) == 5
    assert len(sweep.lines([record(beta, 0, 20.0 - beta) for beta in (0.0, 0.9, 0.99)])) == 4


@pytest.mark.parametrize("betas", [(), (0.0,), (0.9, 0.99)])
def test_where_nothing_is_to_be_averaged_or_compared_nothing_is_said(betas: tuple[float, ...]) -> None:
    assert sweep.lines([record(beta, 0, 10.0) for beta in betas]) == []
