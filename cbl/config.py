"""The schema of a run: plain frozen dataclasses, their checks, and the names that follow from them.

`from_mapping` turns nested plain data (what Hydra composed, what a record holds) into a `Run`; every key, type and
choice is checked there, so nothing below this module sees a DictConfig or a wrong value. `run_id` and `cell` are the
identity of a run: same settings, same folder.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import json
import math
import os
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cbl.errors import UserError


@dataclass(frozen=True)
class Dataset:
    """Which images, and how long their tail is."""

    name: Literal[
        "cifar10_lt", "cifar20_lt", "cifar100_lt", "digits_lt", "folder",
        "inaturalist2017", "inaturalist2018", "imagenet",
    ] = "cifar10_lt"  # fmt: skip
    imbalance_factor: float | None = 100.0  # largest class / smallest, >= 1; None (folder, large sets): as on disk
    subset_seed: int = 0  # which images are kept; 0 where all are
    root: str = "data"  # where the files are; for `folder` the tree that holds train/ and test/
    download: bool = True  # fetch CIFAR when it is not under root
    shift: int | None = None  # pixels of zero padding and random crop, not on large sets; None: 4, on 8 x 8 digits 1
    flip: bool | None = None  # random horizontal flip, always on large sets; None: yes, but not on digits
    image_size: int = 32  # pixels, `folder` and large sets only; the paper's are 224 and 320
    on_damaged: Literal["refuse", "skip"] = "refuse"  # an image that cannot be read; large sets only


@dataclass(frozen=True)
class Model:
    """The CIFAR ResNet, of which the paper's is depth 32 with every other key at its default, or torchvision's."""

    name: Literal["resnet", "resnet_imagenet"] = "resnet"
    depth: int = 32  # 6n + 2; of resnet_imagenet 50, 101 or 152, which has no choice of shortcut and init
    shortcut: Literal["mean_pool", "strided", "projection"] = "mean_pool"
    init: Literal["glorot", "kaiming"] = "glorot"
    prior_bias: bool | None = None  # last bias starts at -log(C-1); None: for sigmoid and focal only


@dataclass(frozen=True)
class Loss:
    """Loss and class weights; beta 0 is no balancing."""

    kind: Literal["softmax", "sigmoid", "focal"] = "softmax"
    gamma: float = 1.0  # focal only
    beta: float = 0.0  # of the effective number, in [0, 1]
    reduction: Literal["batch", "weight_sum"] = "batch"  # divide by the batch size, or by the drawn weights' sum


@dataclass(frozen=True)
class Recipe:
    """The paper's recipe, where it is silent that of the official code, but for `image_order`."""

    epochs: int = 200
    batch_size: int = 128
    learning_rate: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 2e-4
    decay_scope: Literal["official", "everything", "not_bn", "not_bn_not_last_bias", "only_last_bias"] = "official"
    warmup_epochs: float = 5.0
    milestones: tuple[float, ...] = (160.0, 180.0)  # in epochs
    drop: float | None = None  # factor at each milestone; None: 0.01, at imbalance factor 1 and on the large sets 0.1
    input_scaling: Literal["symmetric", "mean_std"] = "symmetric"  # x/128 - 1, or per-channel mean and deviation
    image_order: Literal["shuffle", "official_stream"] = "shuffle"


@dataclass(frozen=True)
class Engine:
    """Where and how a run is computed.

    Only dtype, max_steps, eval_every, micro_batch and sync_bn change its result by more than rounding.
    """

    device: str = "auto"  # auto | cpu | cuda | cuda:1
    dtype: Literal["fp32", "tf32", "bf16"] = "fp32"
    max_steps: int | None = None  # stop early without moving the milestones
    eval_every: int = 2  # epochs between evaluations, as the official code
    eval_batch: int = 1000  # images
    checkpoint_seconds: float = 60.0  # at the end of an epoch (large sets: anywhere), at least this long after the last
    deterministic: bool = False  # same bits on CUDA too, slower; the CPU always is
    threads: int | None = None  # CPU threads; None: as torch decides, of several runs side by side on the CPU one each
    lanes: int | None = None  # runs side by side on one GPU; None: measured; the CPU has one
    capture: bool = True  # on CUDA, replay the whole step as one CUDA graph; not for the large sets
    fused: bool = False  # on CUDA, kernels of our own (cbl/engine/fused.py) in place of cuDNN's; not for the large sets
    # From here on for the large sets alone, but for `compile`.
    micro_batch: int | None = None  # images normalised together; None: 128 as on the authors' TPU, or what fits
    sync_bn: bool = False  # normalise over the micro-batches of all processes
    compile: bool = False  # torch.compile: about a minute at the start, faster from then on
    workers: int | None = None  # processes that decode, for each one that trains; None: its share of the CPU cores


@dataclass(frozen=True)
class Tracking:
    """W&B: a projection of the run's own record."""

    mode: Literal["auto", "online", "offline", "off"] = "auto"  # auto: online when logged in, else offline
    project: str = "class-balanced-loss"
    entity: str | None = None


@dataclass(frozen=True)
class Run:
    """One training run: one configuration of the paper and one seed."""

    dataset: Dataset = field(default_factory=Dataset)
    model: Model = field(default_factory=Model)
    loss: Loss = field(default_factory=Loss)
    recipe: Recipe = field(default_factory=Recipe)
    engine: Engine = field(default_factory=Engine)
    tracking: Tracking = field(default_factory=Tracking)
    seed: int = 0  # initial weights, image order, augmentation
    output_dir: str = "outputs/runs"


# Sets whose images are read from disk while a network trains on them (cbl/engine/streaming.py), as they are.
LARGE = ("inaturalist2017", "inaturalist2018", "imagenet")

# Keys that cannot change a run's result, so that they are no part of its name.
_NOT_IDENTITY = {"dataset.root", "dataset.download", "output_dir"} | {
    f"engine.{name}"
    for name in (
        "device", "eval_batch", "checkpoint_seconds", "deterministic", "threads", "lanes", "capture", "fused",
        "compile", "workers",
    )
}  # fmt: skip
# Keys that have a column of their own in runs.csv; every other departure is an override.
_TOLD = {
    "dataset.name", "dataset.imbalance_factor", "dataset.subset_seed", "model.depth", "loss.kind",
    "loss.gamma", "loss.beta", "loss.reduction", "recipe.epochs", "engine.dtype", "seed",
}  # fmt: skip
# The least that a number may be, where that is all there is to check.
_AT_LEAST = {
    "loss.gamma": 0, "recipe.epochs": 1, "recipe.batch_size": 1, "recipe.weight_decay": 0, "recipe.warmup_epochs": 0,
    "engine.max_steps": 1, "engine.eval_every": 1, "engine.eval_batch": 1, "engine.checkpoint_seconds": 0,
    "engine.threads": 1, "engine.lanes": 1, "engine.micro_batch": 1, "engine.workers": 0,
}  # fmt: skip


def official_large(dataset: str, kind: str) -> dict[str, Any]:
    """The settings of Table 3 where they are not the schema's defaults, by dotted key.

    The learning rate is 0.1 per 256 images for softmax, and for focal 2 times (ILSVRC) and 4 times (iNaturalist) that.
    Sigmoid, which the paper did not train on these sets, takes that of focal.
    """
    factor = 1 if kind == "softmax" else 2 if dataset == "imagenet" else 4
    return {
        "dataset.imbalance_factor": None,
        "dataset.image_size": 224,
        "model.name": "resnet_imagenet",
        "recipe.epochs": 90,
        "recipe.batch_size": 1024,
        "recipe.learning_rate": 0.4 * factor,
        "recipe.nesterov": True,
        "recipe.weight_decay": 1e-4,
        "recipe.decay_scope": "not_bn_not_last_bias",
        "recipe.milestones": [30.0, 60.0, 80.0],
        "recipe.input_scaling": "mean_std",
    }


def nearest(word: str, valid: typing.Iterable[str]) -> str:
    """`; did you mean 'beta'?`, or the valid names when none is near."""
    valid = list(valid)
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; valid are {', '.join(valid)}."


def from_mapping(values: Mapping[str, Any]) -> Run:
    """Checked `Run` of nested plain data; missing keys take their defaults.

    Raises `UserError`, one sentence, for an unknown key (with the nearest valid one), a wrong type, a value out of
    range or settings that contradict each other.
    """
    run = _build(Run, values, "")
    _check(run)
    return _resolve(run)


def to_mapping(run: Run) -> dict[str, Any]:
    """Nested plain data, ready for JSON; `from_mapping` reads it back to an equal `Run`."""
    return json.loads(json.dumps(dataclasses.asdict(run)))


def flat(run: Run) -> dict[str, Any]:
    """`{"loss.beta": 0.9, ...}`."""
    out: dict[str, Any] = {}
    for key, value in to_mapping(run).items():
        if isinstance(value, dict):
            out |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            out[key] = value
    return out


def keys() -> list[str]:
    """Every dotted key of the schema."""
    return list(flat(Run()))


def run_id(run: Run) -> str:
    """`cifar10_lt-if100-focal-g1-b0.9999-s0-1a2b3c4d`: readable, then a hash of all that can change the result."""
    seed = f"s{run.seed}" + (f".{run.dataset.subset_seed}" if run.dataset.subset_seed else "")
    return f"{_readable(run)}-{seed}-{_digest(_departures(run))}"


def cell(run: Run) -> str:
    """As `run_id` without the two seeds: runs of one cell may be averaged, others never."""
    departures = {k: v for k, v in _departures(run).items() if k not in ("seed", "dataset.subset_seed")}
    return f"{_readable(run)}-{_digest(departures)}"


def model_name(run: Run) -> str:
    return f"resnet{run.model.depth}"  # of the family that the data set has by default, else `overrides` tells it


def overrides(run: Run) -> list[str]:
    """`["recipe.drop=0.1", ...]`: departures from the defaults that no column of runs.csv tells."""
    return [f"{k}={json.dumps(v, separators=(',', ':'))}" for k, v in _departures(run).items() if k not in _TOLD]


def changes(run: Run, other: Run) -> list[str]:
    """`["recipe.epochs=50", ...]`: how `run` differs from `other` in what can change the result, seeds left out."""
    mine, others, values = _departures(run), _departures(other), flat(run)
    keys = [k for k in values if k not in ("seed", "dataset.subset_seed") and mine.get(k, k) != others.get(k, k)]
    return [f"{k}={hydra_word(values[k])}" for k in keys]


def hydra_word(value: Any) -> str:
    """`value` as Hydra's command line takes it; a text in quotes unless it is a plain word."""
    if not isinstance(value, str):
        return json.dumps(value, separators=(",", ":"))
    if re.fullmatch(r"[\w./-]+", value, re.ASCII) and not _is_a_value(value):
        return value
    # there a backslash stands for itself, but before a quotation mark
    return '"' + re.sub(r'(\\*)("|\Z)', lambda found: 2 * found[1] + ('\\"' if found[2] else ""), value) + '"'


def _is_a_value(word: str) -> bool:
    """Whether Hydra takes `word` for a number, a truth value or null."""
    with contextlib.suppress(ValueError):
        float(word)
        return True
    return word.lower() in ("true", "false", "null")


def _readable(run: Run) -> str:
    factor = run.dataset.imbalance_factor
    parts = [run.dataset.name, "asis" if factor is None else f"if{factor:g}", run.loss.kind]
    if run.dataset.name in LARGE:
        parts[1] = f"{model_name(run)}-{run.dataset.image_size}"
    if run.loss.kind == "focal":
        parts.append(f"g{run.loss.gamma:g}")
    return "-".join([*parts, f"b{run.loss.beta!r}" if run.loss.beta % 1 else f"b{run.loss.beta:g}"])


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def _departures(run: Run) -> dict[str, Any]:
    """What differs from the schema's defaults and can change the result; keys that do not apply are left out.

    The defaults are those of the same data set, imbalance factor and loss, so a key whose default follows from
    these (`recipe.drop`, `model.prior_bias`) departs only when it is set to something else.
    """
    dataset = Dataset(name=run.dataset.name, imbalance_factor=run.dataset.imbalance_factor)
    default = flat(_resolve(Run(dataset=dataset, loss=Loss(kind=run.loss.kind))))
    default |= {"dataset.name": Dataset.name, "dataset.imbalance_factor": 100.0, "loss.kind": Loss.kind}
    skipped = set(_NOT_IDENTITY)
    if run.dataset.name in LARGE:
        default |= official_large(run.dataset.name, run.loss.kind)
        skipped |= {"dataset.subset_seed", "dataset.shift", "dataset.flip"}  # all images, another augmentation
    else:
        skipped |= {"dataset.on_damaged", "engine.micro_batch", "engine.sync_bn"}
    if run.model.name == "resnet_imagenet":
        skipped |= {"model.shortcut", "model.init"}
    if run.loss.kind != "focal":
        skipped.add("loss.gamma")
    if run.loss.beta == 0:
        skipped.add("loss.reduction")  # all weights are 1: both divide by the batch size
    same = {"official", "everything"}
    if run.loss.kind == "softmax" and {run.recipe.decay_scope, default["recipe.decay_scope"]} == same:
        skipped.add("recipe.decay_scope")  # the official code exempts the last bias for the other losses alone
    if run.dataset.name == "folder":
        skipped.discard("dataset.root")  # there it says which images
    elif run.dataset.name not in LARGE:
        skipped.add("dataset.image_size")
    return {
        key: value
        for key, value in flat(run).items()
        if key not in skipped and not key.startswith("tracking.") and value != default[key]
    }


def _resolve(run: Run) -> Run:
    """The run with every None that means "as the official code" replaced by its value."""
    digits = run.dataset.name == "digits_lt"
    shift = (1 if digits else 4) if run.dataset.shift is None else run.dataset.shift
    flip = (not digits) if run.dataset.flip is None else run.dataset.flip
    # all images are kept, whatever the seed: several would be so many copies of one run
    factor = run.dataset.imbalance_factor
    whole = factor is None or (factor == 1 and run.dataset.name.startswith("cifar"))
    drop = run.recipe.drop
    if drop is None:
        drop = 0.1 if run.dataset.imbalance_factor == 1 or run.dataset.name in LARGE else 0.01
    root = os.path.expanduser(run.dataset.root)  # a shell leaves the ~ of key=~/folder alone
    bias = (run.loss.kind != "softmax") if run.model.prior_bias is None else run.model.prior_bias
    return dataclasses.replace(
        run,
        dataset=dataclasses.replace(
            run.dataset,
            shift=shift,
            flip=flip,
            subset_seed=0 if whole else run.dataset.subset_seed,
            # part of the name: one, however it is spelled
            root=os.path.normpath(root) if run.dataset.name == "folder" else root,
        ),
        model=dataclasses.replace(run.model, prior_bias=bias),
        recipe=dataclasses.replace(run.recipe, drop=drop),
        output_dir=os.path.expanduser(run.output_dir),
    )


def _build(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    if not isinstance(values, Mapping):
        raise UserError(f"'{prefix.rstrip('.')}' takes a group of keys, not {values!r}.")
    hints = typing.get_type_hints(cls)
    given = {}
    for key, value in values.items():
        if key not in hints:
            raise UserError(f"Unknown key '{prefix}{key}'{nearest(str(key), hints)}")
        hint = hints[key]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            given[key] = _build(hint, value, f"{prefix}{key}.")
        else:
            given[key] = _cast(hint, value, f"{prefix}{key}")
    return cls(**given)


def _cast(hint: Any, value: Any, key: str) -> Any:
    """`value` as the type that `hint` names; only an int may stand for a float, nothing else is converted."""
    if isinstance(hint, types.UnionType):  # X | None
        return None if value is None else _cast(typing.get_args(hint)[0], value, key)
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise UserError(f"{key} is '{value}'{nearest(str(value), choices)}")
        return value
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{key} takes a list such as [160,180], not {value!r}.")
        return tuple(_cast(typing.get_args(hint)[0], item, key) for item in value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return value + 0.0  # a float; and -0.0 becomes 0.0, so that equal runs have one name
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        raise UserError(f"{key} takes {names[hint]}, not {value!r}.")
    return value


def _check(run: Run) -> None:
    """Ranges, and settings that contradict each other."""

    def need(holds: bool, key: str, value: Any, what: str) -> None:
        if not holds:
            raise UserError(f"{key} is {value}, but {what}.")

    d, m, loss, r = run.dataset, run.model, run.loss, run.recipe
    for key, value in flat(run).items():
        if isinstance(value, float):
            need(math.isfinite(value), key, value, "it must be finite")
        if key in _AT_LEAST and value is not None:
            need(value >= _AT_LEAST[key], key, value, f"it must be {_AT_LEAST[key]} or more")
    factor = d.imbalance_factor
    if factor is None:
        as_it_is = d.name == "folder" or d.name in LARGE
        rule = "only dataset=folder can be taken as it is, as the large sets always are"
        need(as_it_is, "dataset.imbalance_factor", "null", rule)
    elif factor < 1:
        hint = f"; write {1 / factor:g} for what other code calls {factor:g}" if factor > 0 else ""
        need(
            False, "dataset.imbalance_factor", f"{factor:g}", f"it is largest class / smallest and so at least 1{hint}"
        )
    else:
        need(d.name not in LARGE, "dataset.imbalance_factor", f"{factor:g}", f"{d.name} is taken as it is: write null")
    for key, seed in (("seed", run.seed), ("dataset.subset_seed", d.subset_seed)):
        need(0 <= seed < 2**32, key, seed, "seeds are whole numbers from 0 to 2^32 - 1")
    need(d.shift is None or d.shift >= 0, "dataset.shift", d.shift, "a shift is 0 pixels or more")
    if d.name in LARGE:  # resolved, both have the value that they have elsewhere
        need(d.shift in (None, 4), "dataset.shift", d.shift, f"crops of {d.name} are of random size: leave it out")
        need(d.flip is not False, "dataset.flip", "false", f"images of {d.name} are always flipped: leave it out")
    skips = d.on_damaged == "skip" and d.name == "folder"
    need(
        not skips,
        "dataset.on_damaged",
        "skip",
        "of your own images none is left out: replace or remove what is damaged",
    )
    need(d.image_size >= 4, "dataset.image_size", d.image_size, "images need at least 4 pixels a side")
    if m.name == "resnet_imagenet":
        need(d.name in LARGE, "model.name", m.name, f"it is for the large sets: {d.name} takes model=resnet32")
        need(m.depth in (50, 101, 152), "model.depth", m.depth, "of resnet_imagenet it must be 50, 101 or 152")
    else:
        low = max(8, m.depth - (m.depth - 2) % 6)
        choice = f"it must be 6n + 2, for example {low} or {low + 6}"
        need(m.depth >= 8 and m.depth % 6 == 2, "model.depth", m.depth, choice)
        unable = run.engine.sync_bn and d.name in LARGE
        need(not unable, "engine.sync_bn", "true", "it needs model=resnet50, resnet101 or resnet152")
    both = run.engine.deterministic and run.engine.fused
    need(not both, "engine.deterministic", "true", "the fused kernels add in any order: set engine.fused=false")
    both = run.engine.compile and run.engine.fused
    need(not both, "engine.compile", "true", "the fused kernels are compiled already: set engine.fused=false")
    need(0 <= loss.beta <= 1, "loss.beta", loss.beta, "it must be in [0, 1], for example 0.9999")
    need(r.learning_rate > 0, "recipe.learning_rate", r.learning_rate, "it must be above 0")
    need(0 <= r.momentum < 1, "recipe.momentum", r.momentum, "it must be in [0, 1)")
    need(r.momentum > 0 or not r.nesterov, "recipe.nesterov", "true", "it needs recipe.momentum above 0")
    need(all(map(math.isfinite, r.milestones)), "recipe.milestones", list(r.milestones), "epochs must be finite")
    need(list(r.milestones) == sorted(r.milestones), "recipe.milestones", list(r.milestones), "epochs must ascend")
    official = r.image_order == "official_stream" and d.name in LARGE
    need(not official, "recipe.image_order", "official_stream", "it is not known of the large sets: take shuffle")
    need(r.drop is None or 0 < r.drop <= 1, "recipe.drop", r.drop, "it must be in (0, 1]")
