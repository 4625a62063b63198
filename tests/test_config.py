"""The schema, the names that follow from it, and that every file under configs/ composes into it."""

import dataclasses
import functools
import hashlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from cbl import config
from cbl.errors import UserError
from hydra_plugins.cbl_launcher import compose_jobs, to_run

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
YAMLS = sorted(CONFIGS.rglob("*.yaml"))
GROUPS = ("dataset", "model", "loss", "recipe", "engine", "tracking", "experiment", "sweep")
OPTIONS = [(group, path.stem) for group in GROUPS for path in sorted((CONFIGS / group).glob("*.yaml"))]
DIGITS = {"dataset.name": "digits_lt", "model.depth": 8, "recipe.epochs": 60, "recipe.batch_size": 64}


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """{"loss.beta": 0.9} -> {"loss": {"beta": 0.9}}."""
    values: dict[str, Any] = {}
    for key, value in flat.items():
        group, _, name = key.rpartition(".")
        (values.setdefault(group, {}) if group else values)[name] = value
    return values


def made(flat: dict[str, Any] | None = None) -> config.Run:
    return config.from_mapping(nested(flat or {}))


# -- the schema --------------------------------------------------------------------------------------------------------


@st.composite
def valid(draw: st.DrawFn) -> dict[str, Any]:
    """Some valid settings, flat; every key now and then, ints where floats are meant too."""
    name = draw(st.sampled_from(["cifar10_lt", "cifar20_lt", "cifar100_lt", "digits_lt", "folder"]))
    factor = st.none() | st.integers(1, 500) | st.floats(1, 500) if name == "folder" else st.floats(1, 500)
    seed = st.integers(0, 2**32 - 1)
    above = {"min_value": 0, "max_value": 1e6, "exclude_min": True}
    optional = {
        "dataset.imbalance_factor": factor,
        "dataset.subset_seed": seed,
        "dataset.root": st.text().filter(lambda path: not path.startswith("~")),  # somebody's home
        "dataset.download": st.booleans(),
        "dataset.shift": st.none() | st.integers(0, 8),
        "dataset.flip": st.none() | st.booleans(),
        "dataset.image_size": st.integers(4, 512),
        "model.depth": st.integers(1, 30).map(lambda n: 6 * n + 2),
        "model.shortcut": st.sampled_from(["mean_pool", "strided", "projection"]),
        "model.prior_bias": st.none() | st.booleans(),
        "loss.kind": st.sampled_from(["softmax", "sigmoid", "focal"]),
        "loss.gamma": st.floats(0, 10) | st.integers(0, 10) | st.just(-0.0),
        "loss.beta": st.floats(0, 1) | st.sampled_from([0, 1, -0.0]),
        "loss.reduction": st.sampled_from(["batch", "weight_sum"]),
        "recipe.epochs": st.integers(1, 1000),
        "recipe.learning_rate": st.floats(**above),
        "recipe.milestones": st.lists(st.floats(0, 1000) | st.integers(0, 1000), max_size=3).map(sorted),
        "recipe.drop": st.none() | st.floats(0, 1, exclude_min=True),
        "recipe.input_scaling": st.sampled_from(["symmetric", "mean_std"]),
        "engine.device": st.text(),
        "engine.dtype": st.sampled_from(["fp32", "tf32", "bf16"]),
        "engine.max_steps": st.none() | st.integers(1, 10**9),
        "tracking.entity": st.none() | st.text(),
        "seed": seed,
    }
    if name == "folder":
        optional = {"dataset.imbalance_factor": optional.pop("dataset.imbalance_factor")} | optional
    return {"dataset.name": name} | draw(st.fixed_dictionaries({}, optional=optional))


@settings(max_examples=50, deadline=None)
@given(valid())
def test_there_and_back(flat: dict[str, Any]) -> None:
    run = made(flat)
    plain = config.to_mapping(run)
    again = config.from_mapping(json.loads(json.dumps(plain, allow_nan=False)))
    assert again == run and config.to_mapping(again) == plain
    assert (config.run_id(again), config.cell(again)) == (config.run_id(run), config.cell(run))
    for key, value in flat.items():
        # what may become another: None what it stands for, the seed of no draw 0, a path a shorter one
        whole = key == "dataset.subset_seed" and run.dataset.imbalance_factor in (None, 1)
        if value is not None and not whole and (key, run.dataset.name) != ("dataset.root", "folder"):
            assert config.flat(run)[key] == value


@settings(max_examples=50, deadline=None)
@given(valid(), st.randoms())
def test_the_order_of_keys_is_nothing(flat: dict[str, Any], random: Any) -> None:
    shuffled = list(flat.items())
    random.shuffle(shuffled)
    assert config.run_id(made(dict(shuffled))) == config.run_id(made(flat))


@settings(max_examples=50, deadline=None)
@given(valid())
def test_names_are_fit_for_folders(flat: dict[str, Any]) -> None:
    run = made(flat)
    name, cell = config.run_id(run), config.cell(run)
    assert re.fullmatch(
        r"[a-z0-9_]+-(asis|if[0-9.e+]+)-[a-z]+(-g[0-9.e+-]+)?-b[0-9.e-]+-s\d+(\.\d+)?-[0-9a-f]{8}", name
    )
    assert len(name) < 120 and name.startswith(f"{cell[:-8]}s{run.seed}")


def test_values_that_follow_from_others() -> None:
    digits, cifar = made({"dataset.name": "digits_lt"}), made()
    assert (digits.dataset.shift, digits.dataset.flip) == (1, False)
    assert (cifar.dataset.shift, cifar.dataset.flip) == (4, True)
    assert [made({"loss.kind": kind}).model.prior_bias for kind in ("softmax", "sigmoid", "focal")] == [
        False, True, True
    ]  # fmt: skip
    assert made({"dataset.imbalance_factor": 1}).recipe.drop == 0.1
    assert made({"dataset.imbalance_factor": 1.01}).recipe.drop == made().recipe.drop == 0.01
    chosen = {"dataset.shift": 0, "dataset.flip": False, "model.prior_bias": True, "recipe.drop": 0.5}
    assert chosen.items() <= config.flat(made(chosen)).items()


def test_an_int_may_stand_for_a_float() -> None:
    run = made({"loss.beta": 0, "dataset.imbalance_factor": 50, "recipe.milestones": [1, 2.5]})
    assert all(type(x) is float for x in (run.loss.beta, run.dataset.imbalance_factor, *run.recipe.milestones))


BAD = [
    # unknown keys, with the nearest valid one
    ("loss.bta", 0.9, r"^Unknown key 'loss.bta'; did you mean 'beta'\?$"),
    ("dataset.imbalance", 10, r"^Unknown key 'dataset.imbalance'; did you mean 'imbalance_factor'\?$"),
    ("sead", 1, r"^Unknown key 'sead'; did you mean 'seed'\?$"),
    ("loss.q", 1, r"^Unknown key 'loss.q'; valid are kind, gamma, beta, reduction\.$"),
    ("loss.7", 1, r"^Unknown key 'loss.7'; valid are"),
    # wrong types
    ("loss", "softmax", r"^'loss' takes a group of keys, not 'softmax'\.$"),
    ("loss.beta", "0.9", r"^loss.beta takes a number, not '0.9'\.$"),
    ("loss.gamma", None, r"^loss.gamma takes a number, not None\.$"),
    ("recipe.learning_rate", True, r"^recipe.learning_rate takes a number, not True\.$"),
    ("recipe.epochs", 200.0, r"^recipe.epochs takes a whole number, not 200.0\.$"),
    ("seed", True, r"^seed takes a whole number, not True\.$"),
    ("dataset.subset_seed", [0], r"^dataset.subset_seed takes a whole number, not \[0\]\.$"),
    ("dataset.download", "no", r"^dataset.download takes true or false, not 'no'\.$"),
    ("dataset.flip", 1, r"^dataset.flip takes true or false, not 1\.$"),
    ("dataset.root", 7, r"^dataset.root takes a text, not 7\.$"),
    ("recipe.milestones", 160, r"^recipe.milestones takes a list such as \[160,180\], not 160\.$"),
    ("recipe.milestones", ["160"], r"^recipe.milestones takes a number, not '160'\.$"),
    # no such choice
    ("loss.kind", "focl", r"^loss.kind is 'focl'; did you mean 'focal'\?$"),
    ("loss.kind", ["focal"], r"^loss.kind is '\['focal'\]'; did you mean 'focal'\?$"),
    ("dataset.name", "mnist", r"^dataset.name is 'mnist'; valid are cifar10_lt, cifar20_lt, .*\.$"),
    ("loss.reduction", "mean", r"^loss.reduction is 'mean'; valid are batch, weight_sum\.$"),
    ("engine.dtype", "fp16", r"^engine.dtype is 'fp16'; did you mean '[bf]\w+'\?$"),
    # out of range
    ("dataset.imbalance_factor", 0.01, r"^dataset.imbalance_factor is 0.01, but .* at least 1; write 100 for what"),
    ("dataset.imbalance_factor", 0, r"^dataset.imbalance_factor is 0, but .* at least 1\.$"),
    ("dataset.imbalance_factor", -100, r"^dataset.imbalance_factor is -100, but .* at least 1\.$"),
    ("dataset.imbalance_factor", None, r"^dataset.imbalance_factor is null, but only dataset=folder can"),
    ("dataset.subset_seed", -1, r"^dataset.subset_seed is -1, but seeds are whole numbers from 0 to"),
    ("dataset.subset_seed", 2**32, r"^dataset.subset_seed is 4294967296, but seeds are whole numbers from 0 to"),
    ("dataset.shift", -1, r"^dataset.shift is -1, but a shift is 0 pixels or more\.$"),
    ("dataset.image_size", 3, r"^dataset.image_size is 3, but images need at least 4 pixels a side\.$"),
    ("seed", -1, r"^seed is -1, but seeds are"),
    ("seed", 2**32, r"^seed is 4294967296, but seeds are"),
    ("model.depth", 30, r"^model.depth is 30, but it must be 6n \+ 2, for example 26 or 32\.$"),
    ("model.depth", 2, r"^model.depth is 2, but it must be 6n \+ 2, for example 8 or 14\.$"),
    ("loss.beta", 1.5, r"^loss.beta is 1.5, but it must be in \[0, 1\], for example 0.9999\.$"),
    ("loss.beta", -0.1, r"^loss.beta is -0.1, but"),
    ("loss.beta", float("nan"), r"^loss.beta is nan, but it must be finite\.$"),
    ("loss.gamma", -1, r"^loss.gamma is -1.0, but it must be 0 or more\.$"),
    ("loss.gamma", float("inf"), r"^loss.gamma is inf, but it must be finite\.$"),
    ("recipe.epochs", 0, r"^recipe.epochs is 0, but it must be 1 or more\.$"),
    ("recipe.batch_size", 0, r"^recipe.batch_size is 0, but it must be 1 or more\.$"),
    ("recipe.learning_rate", 0, r"^recipe.learning_rate is 0.0, but it must be above 0\.$"),
    ("recipe.momentum", 1, r"^recipe.momentum is 1.0, but it must be in \[0, 1\)\.$"),
    ("recipe.weight_decay", -1e-4, r"^recipe.weight_decay is -0.0001, but it must be 0 or more\.$"),
    ("recipe.warmup_epochs", -1, r"^recipe.warmup_epochs is -1.0, but it must be 0 or more\.$"),
    ("recipe.milestones", [180, 160], r"^recipe.milestones is \[180.0, 160.0\], but epochs must ascend\.$"),
    ("recipe.milestones", [9, float("inf")], r"^recipe.milestones is \[9.0, inf\], but epochs must be finite\.$"),
    ("recipe.drop", 0, r"^recipe.drop is 0.0, but it must be in \(0, 1\]\.$"),
    ("recipe.drop", 10, r"^recipe.drop is 10.0, but it must be in \(0, 1\]\.$"),
    ("engine.max_steps", 0, r"^engine.max_steps is 0, but it must be 1 or more\.$"),
    ("engine.eval_every", 0, r"^engine.eval_every is 0, but"),
    ("engine.eval_batch", 0, r"^engine.eval_batch is 0, but"),
    ("engine.checkpoint_seconds", -1, r"^engine.checkpoint_seconds is -1.0, but"),
    ("engine.threads", 0, r"^engine.threads is 0, but"),
    ("engine.lanes", 0, r"^engine.lanes is 0, but"),
    ("engine.micro_batch", 0, r"^engine.micro_batch is 0, but"),
    ("engine.workers", -1, r"^engine.workers is -1, but it must be 0 or more\.$"),
]


def test_what_has_a_least_is_a_key() -> None:
    assert set(config._AT_LEAST) < set(config.keys())
    assert {key for key, *_ in BAD} > set(config._AT_LEAST)


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(UserError, match=r"^engine.deterministic is true, but .* set engine.fused=false\.$"):
        made({"engine.deterministic": True, "engine.fused": True})
    with pytest.raises(UserError, match=r"^engine.compile is true, but .* set engine.fused=false\.$"):
        made({"engine.compile": True, "engine.fused": True})
    large = {"dataset.name": "imagenet", "dataset.imbalance_factor": None, "engine.sync_bn": True}
    with pytest.raises(UserError, match=r"^engine.sync_bn is true, but it needs model=resnet50, .*\.$"):
        made(large)
    assert made(large | {"model.name": "resnet_imagenet", "model.depth": 50}).engine.sync_bn


def test_damaged_images_of_ones_own_are_not_skipped() -> None:
    own = {"dataset.name": "folder", "dataset.imbalance_factor": None, "dataset.on_damaged": "skip"}
    with pytest.raises(UserError, match=r"^dataset.on_damaged is skip, but .*: replace or remove what is damaged\.$"):
        made(own)


@pytest.mark.parametrize(("key", "value"), [("dataset.flip", False), ("dataset.shift", 2)])
def test_augmentation_that_the_large_sets_do_not_have_is_refused(key: str, value: Any) -> None:
    large = {"dataset.name": "imagenet", "dataset.imbalance_factor": None}
    with pytest.raises(UserError, match=rf"^{key} is {str(value).lower()}, but .* leave it out\.$"):
        made(large | {key: value})
    assert config.from_mapping(config.to_mapping(made(large))) == made(large)  # what a record holds is taken


@pytest.mark.parametrize(("key", "value", "message"), BAD)
def test_a_bad_value_is_one_sentence(key: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        made({key: value})
    assert "\n" not in str(caught.value) and str(caught.value)[-1] in ".?"


def test_keys_of_any_type_are_refused() -> None:
    with pytest.raises(UserError, match=r"^Unknown key 'loss.1'"):
        config.from_mapping({"loss": {1: 2}})


# -- names -------------------------------------------------------------------------------------------------------------

# Pinned. A change here gives the runs that people have on disk other names, so that they would be trained again.
NAMES = [
    ({}, "cifar10_lt-if100-softmax-b0-s0-44136fa3"),
    (
        {"dataset.imbalance_factor": 50, "loss.kind": "focal", "loss.gamma": 0.5, "loss.beta": 0.9999, "seed": 2},
        "cifar10_lt-if50-focal-g0.5-b0.9999-s2-4d8453d3",
    ),
    (
        {"dataset.name": "cifar100_lt", "dataset.imbalance_factor": 1, "loss.kind": "sigmoid"},
        "cifar100_lt-if1-sigmoid-b0-s0-25f33e02",
    ),
    (
        {"dataset.name": "cifar100_lt", "dataset.imbalance_factor": 1, "loss.kind": "sigmoid", "recipe.drop": 0.01},
        "cifar100_lt-if1-sigmoid-b0-s0-c067f06d",
    ),
    (
        DIGITS | {"recipe.milestones": [48], "dataset.subset_seed": 3, "loss.kind": "focal", "loss.beta": 0.99},
        "digits_lt-if100-focal-g1-b0.99-s0.3-ca77b271",
    ),
    (
        {
            "dataset.name": "cifar20_lt", "dataset.imbalance_factor": 200, "loss.beta": 0.9, "seed": 1,
            "loss.reduction": "weight_sum", "model.shortcut": "strided", "engine.dtype": "bf16",
        },
        "cifar20_lt-if200-softmax-b0.9-s1-74f86213",
    ),
    (
        {
            "dataset.name": "folder", "dataset.imbalance_factor": None, "dataset.root": "my/images",
            "dataset.image_size": 64, "loss.beta": 0.999,
        },
        "folder-asis-softmax-b0.999-s0-791dfc0a",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("flat", "name"), NAMES)
def test_pinned_names(flat: dict[str, Any], name: str) -> None:
    assert config.run_id(made(flat)) == name


def test_the_hash_is_that_of_the_departures() -> None:
    def digest(departures: dict[str, Any]) -> str:
        return hashlib.sha256(json.dumps(departures, sort_keys=True).encode()).hexdigest()[:8]

    cell = {"dataset.imbalance_factor": 50.0, "loss.kind": "focal", "loss.gamma": 0.5, "loss.beta": 0.9999}
    run = made(cell | {"seed": 2, "dataset.root": "elsewhere", "engine.device": "cuda", "recipe.drop": 0.01})
    assert config.cell(run) == f"cifar10_lt-if50-focal-g0.5-b0.9999-{digest(cell)}"
    assert config.run_id(run) == f"cifar10_lt-if50-focal-g0.5-b0.9999-s2-{digest(cell | {'seed': 2})}"


# Every key with another value than in BASE, and whether that makes another run.
BASE = {"loss.kind": "focal", "loss.beta": 0.9}
OTHERWISE = {
    "dataset.name": ("cifar100_lt", True),
    "dataset.imbalance_factor": (10, True),
    "dataset.subset_seed": (1, True),
    "dataset.root": ("elsewhere", False),
    "dataset.download": (False, False),
    "dataset.shift": (2, True),
    "dataset.flip": (False, True),
    "dataset.image_size": (64, False),  # these images are as large as they are
    "dataset.on_damaged": ("skip", False),  # for sets whose images are read while a network trains
    "model.name": ("resnet", False),  # the other is for the large sets
    "model.depth": (20, True),
    "model.shortcut": ("projection", True),
    "model.init": ("kaiming", True),
    "model.prior_bias": (False, True),
    "loss.kind": ("sigmoid", True),
    "loss.gamma": (2.0, True),
    "loss.beta": (0.99, True),
    "loss.reduction": ("weight_sum", True),
    "recipe.epochs": (100, True),
    "recipe.batch_size": (64, True),
    "recipe.learning_rate": (0.2, True),
    "recipe.momentum": (0.0, True),
    "recipe.nesterov": (True, True),
    "recipe.weight_decay": (5e-4, True),
    "recipe.decay_scope": ("not_bn", True),
    "recipe.warmup_epochs": (0, True),
    "recipe.milestones": ([100.0], True),
    "recipe.drop": (0.1, True),
    "recipe.input_scaling": ("mean_std", True),
    "recipe.image_order": ("official_stream", True),
    "engine.device": ("cuda:1", False),
    "engine.dtype": ("tf32", True),
    "engine.max_steps": (10, True),
    "engine.eval_every": (10, True),
    "engine.eval_batch": (10, False),
    "engine.checkpoint_seconds": (1, False),
    "engine.deterministic": (True, False),
    "engine.threads": (1, False),
    "engine.lanes": (4, False),
    "engine.capture": (False, False),
    "engine.micro_batch": (32, False),  # this and the next for the large sets
    "engine.sync_bn": (True, False),
    "engine.compile": (True, False),
    "engine.fused": (True, False),
    "engine.workers": (2, False),
    "tracking.mode": ("off", False),
    "tracking.project": ("other", False),
    "tracking.entity": ("team", False),
    "seed": (1, True),
    "output_dir": ("elsewhere", False),
}


def test_every_key_is_known_to_make_another_run_or_not() -> None:
    assert set(OTHERWISE) == set(config.keys())


@pytest.mark.parametrize(("key", "value", "another"), [(key, *case) for key, case in OTHERWISE.items()])
def test_what_makes_another_run(key: str, value: Any, another: bool) -> None:
    base, other = made(BASE), made(BASE | {key: value})
    assert (config.run_id(other) != config.run_id(base)) == another
    assert (config.cell(other) != config.cell(base)) == (another and key not in ("seed", "dataset.subset_seed"))


def test_keys_that_do_not_apply_are_no_part_of_a_name() -> None:
    def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
        return config.run_id(made(a)) == config.run_id(made(b))

    whole = [{"dataset.imbalance_factor": 1}, {"dataset.name": "folder", "dataset.imbalance_factor": None}]
    for kept in whole:  # all images: runs of several seeds would be one run, averaged with itself
        assert same(kept | {"dataset.subset_seed": 1}, kept)
        assert made(kept | {"dataset.subset_seed": 1}).dataset.subset_seed == 0
    assert not same(DIGITS | {"dataset.subset_seed": 1, "dataset.imbalance_factor": 1}, DIGITS)
    folder = {"dataset.name": "folder", "dataset.root": "data/x"}
    assert same(folder, folder | {"dataset.root": "./data/x/"})
    for kind in ("softmax", "sigmoid"):
        assert same({"loss.kind": kind, "loss.gamma": 2}, {"loss.kind": kind})
    assert same({"loss.reduction": "weight_sum"}, {})  # at beta 0 all weights are 1
    folder = {"dataset.name": "folder", "dataset.root": "a"}
    assert not same(folder, folder | {"dataset.root": "b"})  # there it says which images
    assert not same(folder, folder | {"dataset.image_size": 64})


def test_a_default_set_by_hand_is_the_default() -> None:
    for flat in ({}, {"dataset.imbalance_factor": 1}, {"dataset.name": "digits_lt"}, {"loss.kind": "sigmoid"}):
        spelled_out = config.from_mapping(config.to_mapping(made(flat)))
        assert config.run_id(spelled_out) == config.run_id(made(flat)) and config.overrides(made(flat)) == []


def test_overrides_tell_what_no_column_tells() -> None:
    told = {"loss.beta": 0.9, "seed": 1, "model.depth": 20, "recipe.epochs": 100, "engine.dtype": "tf32"}
    assert config.overrides(made(told)) == []
    untold = {"recipe.milestones": [80, 90], "recipe.drop": 0.1, "model.shortcut": "strided", "engine.max_steps": 5}
    assert set(config.overrides(made(untold))) == {
        "recipe.milestones=[80.0,90.0]", "recipe.drop=0.1", 'model.shortcut="strided"', "engine.max_steps=5"
    }  # fmt: skip
    run = made({"dataset.name": "folder", "dataset.root": "my own/images"})
    assert config.overrides(run) == ['dataset.root="my own/images"']


def test_a_new_key_leaves_the_names_of_old_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass(frozen=True)
    class LongerRecipe(config.Recipe):
        new: bool = False

    recipe = ("recipe", LongerRecipe, dataclasses.field(default_factory=LongerRecipe))
    LongerRun = dataclasses.make_dataclass("LongerRun", [recipe], bases=(config.Run,), frozen=True)
    monkeypatch.setattr(config, "Run", LongerRun)
    assert "recipe.new" in set(config.keys())  # the schema does have it now
    for flat, name in NAMES:
        assert config.run_id(made(flat)) == name
        assert config.run_id(made(flat | {"recipe.new": True})) != name
    assert config.overrides(made({"recipe.new": True})) == ["recipe.new=true"]


# -- configs/ ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def hydra() -> Iterator[None]:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield


@functools.cache
def composed_by_hydra(*overrides: str) -> DictConfig:
    return compose("train", overrides=list(overrides))


def composed(*overrides: str) -> config.Run:
    """As a sweep composes it, which saves Hydra's time; the last test here says that this is the same."""
    ((_, run),) = compose_jobs(lambda choices: composed_by_hydra(*choices), [overrides])
    if isinstance(run, UserError):
        raise run
    return run


def test_defaults_of_the_command_are_those_of_the_schema() -> None:
    assert composed() == made()


def test_official_recipe_is_the_schema_spelled_out() -> None:
    values = OmegaConf.to_container(OmegaConf.load(CONFIGS / "recipe" / "official.yaml"))
    assert set(values) == {field.name for field in dataclasses.fields(config.Recipe)}
    assert config.from_mapping({"recipe": values}) == made()


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes(group: str, option: str) -> None:
    values = OmegaConf.to_container(OmegaConf.load(CONFIGS / group / f"{option}.yaml"))
    if group in ("experiment", "sweep"):
        composed(f"{group}={option}")
        return
    # the networks for the large sets go with no other
    setting = ["dataset=imagenet"] if values.get("name") == "resnet_imagenet" else []
    chosen = config.to_mapping(composed(*setting, f"{group}={option}"))[group]
    assert {key: chosen[key] for key, value in values.items() if value is not None} == {
        key: value for key, value in values.items() if value is not None
    }


def test_paper_grid_is_a_product_of_names() -> None:
    names = ["softmax", "sigmoid", "focal_g0.5", "focal_g1", "focal_g2"]
    runs = [composed(f"loss={name}", f"loss.beta={beta}") for name in names for beta in ("0", "0.9999")]
    assert [(run.loss.kind, run.loss.gamma) for run in runs[4:10:2]] == [("focal", 0.5), ("focal", 1), ("focal", 2)]
    assert len({config.cell(run) for run in runs}) == 10


@pytest.mark.parametrize("sweep", [path.stem for path in sorted((CONFIGS / "sweep").glob("*.yaml"))])
def test_every_value_of_every_sweep_is_valid(sweep: str) -> None:
    full = compose("train", overrides=[f"sweep={sweep}"], return_hydra_config=True)
    assert full.hydra.mode.name == "MULTIRUN"
    for key, values in full.hydra.sweeper.params.items():
        choices = [f"{key}={value}" for value in str(values).split(",")]
        assert len({config.run_id(composed(choice)) for choice in choices}) == len(choices)


COMMANDS = [
    (path, shlex.split(line.split(" # ")[0]))
    for path in YAMLS
    for line in re.findall(r"^# +python scripts/train.py ?(.*)$", path.read_text(encoding="utf-8"), re.M)
]


@pytest.mark.parametrize(("path", "words"), COMMANDS, ids=[f"{p.parent.name}/{p.stem}-{len(w)}" for p, w in COMMANDS])
def test_the_commands_in_the_comments_are_right(path: Path, words: list[str]) -> None:
    assert "-m" in words or not any("," in word for word in words)
    choices = [[word] if "[" in word else word.split(",") for word in words if word != "-m"]
    choices = [[first, *(f"{first.split('=')[0]}={value}" for value in rest)] for first, *rest in choices]
    for job in {tuple(c[0] for c in choices), tuple(c[-1] for c in choices)}:
        composed(*job)
    if path.parent.name in ("experiment", "sweep"):
        assert any(word == f"{path.parent.name}={path.stem}" for word in words)


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_file_says_on_top_what_it_is_for(path: Path) -> None:
    lines = re.sub(r"^# @package .*\n", "", path.read_text(encoding="utf-8")).splitlines()
    assert re.match(r"# \w+", lines[0])
    if path.parent.name in ("experiment", "sweep"):
        assert any(line.startswith("#   python scripts/") for line in lines)


def test_a_sweep_composes_its_jobs_as_hydra_would() -> None:
    """The launcher composes each choice of groups once and sets plain values on copies."""
    jobs = [
        ("loss=focal_g2", "loss.beta=0.9", "seed=4"),
        ("loss=focal_g2", "loss.gamma=3", "recipe.milestones=[1,2]"),
        ("loss.gamma=3", "loss=focal_g2"),  # values win over options whatever the order
        ("dataset.root='a b'", "engine.max_steps=null", "+recipe.drop=0.5"),
        ("sweep=digits", "loss.beta=1", "experiment=digits"),
    ]
    found = dict(compose_jobs(lambda choices: compose("train", overrides=choices), jobs))
    assert found == {job: to_run(compose("train", overrides=list(job))) for job in jobs}


def test_a_bad_job_does_not_stop_the_others() -> None:
    jobs = [("seed=1",), ("loss.beta=2",), ("seed=2",)]
    found = [run for _, run in compose_jobs(lambda choices: composed_by_hydra(*choices), jobs)]
    assert found[0] == made({"seed": 1}) and found[2] == made({"seed": 2})
    assert isinstance(found[1], UserError) and str(found[1]).startswith("loss.beta is 2.0")
