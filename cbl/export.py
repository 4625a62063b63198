"""Weights to publish: one safetensors file that says itself what it is, and a model card beside it.

    exports/<run_id>/
        model.safetensors   the final weights; in its header, under the one key `cbl`, the facts as JSON
        README.md           the model card, made of the facts alone

The facts are what the run's record (cbl/records.py) says, under the same names, without folders of the machine that
trained (but dataset=folder, whose root is its name), and what lets the weights be used without training images:
`architecture`, a function of cbl.models and its arguments, and `input`, the size and scaling of the images.
"""

import dataclasses
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from cbl import config, data, disk, records
from cbl.data import augment
from cbl.errors import UserError
from cbl.models import resnet_cifar, resnet_imagenet

WEIGHTS, CARD = "model.safetensors", "README.md"
MODELS: dict[str, Callable[..., nn.Module]] = {"resnet_cifar": resnet_cifar, "resnet_imagenet": resnet_imagenet}
# Kept of the record, besides the columns of runs.csv.
KEPT = (
    "class_names", "class_counts", "class_weights", "per_class_error", "group_classes", "parameters", "processes",
    "micro_batch", "versions", "content_hash",
)  # fmt: skip
LISTED = 100  # classes up to which the card names each

_CIFAR = (
    "CIFAR states no licence; its images were collected from the web for the 80 Million Tiny Images, which their "
    "authors withdrew in 2020."
)
_INATURALIST = (
    "the terms of the competition allow non-commercial research and education only and forbid passing the images on; "
    "each image also has the licence that its photographer chose."
)
# name -> (what the card calls it, what is known of the images' licence)
DATASETS = {
    "cifar10_lt": ("CIFAR-10", _CIFAR),
    "cifar20_lt": ("CIFAR-20 (CIFAR-100 under its 20 coarse labels)", _CIFAR),
    "cifar100_lt": ("CIFAR-100", _CIFAR),
    "digits_lt": (
        "the handwritten digits in scikit-learn",
        "Optical Recognition of Handwritten Digits (Alpaydin and Kaynak, UCI Machine Learning Repository), CC BY 4.0.",
    ),
    "folder": ("a folder of images", "to be filled in by whoever publishes these weights."),
    "inaturalist2017": ("iNaturalist 2017", _INATURALIST),
    "inaturalist2018": ("iNaturalist 2018", _INATURALIST),
    "imagenet": (
        "ILSVRC 2012 (ImageNet)",
        "ImageNet does not own their copyright and hands them out for non-commercial research and education only.",
    ),
}


# -- from a run to two files -------------------------------------------------------------------------------------------


def write(folder: Path, out: Path, data_root: str | None = None) -> dict[str, Any]:
    """Writes weights and card of the done run in `folder` to `out`, and returns the facts.

    The same run gives the same bytes; files that are there already must be equal. `data_root` is where the training
    images are if not where the record says, for runs scaled by the mean and deviation of their own images.
    Raises `UserError` for a run that is not done, files that differ, and weights or images that are not the run's.
    """
    if folder.is_file():
        raise UserError(f"{folder} is no run folder but a file: give a folder such as outputs/runs/<run_id>.")
    record = records.read_record(folder)
    if not records.is_done(folder):
        raise UserError(f"{folder} is not done (status: {record.get('status')}): finish the run, then export it.")
    # contiguous: on the way out of training they lie in channels_last order, which the format does not know
    tensors = {name: value.contiguous() for name, value in read_weights(folder / "model.pt").items()}
    facts = describe(record, data_root)
    try:
        build(facts, tensors)
    except RuntimeError:
        raise UserError(f"{folder / 'model.pt'} does not fit the network that result.json beside it says.") from None
    # one key, because safetensors keeps no order of several
    header = {"cbl": json.dumps(facts, ensure_ascii=False, allow_nan=False)}
    files = {WEIGHTS: safetensors.torch.save(tensors, header), CARD: card(facts).encode()}
    with disk.writing(out, "choose another folder"):
        for name, content in files.items():
            if (out / name).exists() and (out / name).read_bytes() != content:
                raise UserError(f"{out / name} is there already and is another: remove it, or choose another folder.")
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            disk.write(out / name, content)
    return facts


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a run's `model.pt`, read without running code; raises `UserError` when there is none."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        reason = "it is no state dict"
    except OSError as error:
        tensors, reason = None, error.strerror
    except Exception:  # of many kinds, with a page about the options of torch.load
        tensors, reason = None, "torch.save did not write it, or it is damaged"
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(
            f"{path} holds no weights that can be read ({reason}): copy it again from where the run was trained, or "
            f"delete {path.parent} and train the run again."
        )
    return tensors


def describe(record: dict[str, Any], data_root: str | None = None) -> dict[str, Any]:
    """The facts, of a done run's record; `data_root` and `UserError` as for `write`."""
    run = config.from_mapping(record["config"])
    kept = config.to_mapping(run)
    del kept["tracking"], kept["output_dir"]
    if run.dataset.name != "folder":
        del kept["dataset"]["root"]
    classes = len(record["class_names"])
    size, channels = {"digits_lt": (8, 1)}.get(run.dataset.name, (32, 3))
    if run.dataset.name in ("folder", *config.LARGE):
        size = run.dataset.image_size
    if run.model.name == "resnet_imagenet":
        architecture = {"function": "resnet_imagenet", "arguments": {"depth": run.model.depth, "num_classes": classes}}
    else:
        arguments = {"depth": run.model.depth, "num_classes": classes, "in_channels": channels}
        architecture = {"function": "resnet_cifar", "arguments": arguments | {"shortcut": run.model.shortcut}}
    mean, std = None, None
    if run.recipe.input_scaling == "mean_std":
        mean, std = _statistics(run, record, data_root)
    return {
        **records.row(record),
        **{name: record[name] for name in KEPT if name in record},
        "architecture": architecture,
        "input": {"size": size, "channels": channels, "scaling": run.recipe.input_scaling, "mean": mean, "std": std},
        "config": kept,
    }


def _statistics(run: config.Run, record: dict[str, Any], data_root: str | None) -> tuple[list[float], list[float]]:
    """Mean and deviation of x/255 per channel that the run scaled its images by."""
    if run.dataset.name in config.LARGE:
        from cbl.data import streaming  # here, because only the large sets need Pillow

        known = streaming.STATISTICS[run.dataset.name]
        return list(known[0]), list(known[1])
    dataset = run.dataset
    if data_root is not None:  # nothing is to be downloaded to where somebody says that the data is
        dataset = dataclasses.replace(dataset, root=data_root, download=False)
    images = data.load(dataset)
    same = images.subset_hash == record["subset_hash"] and list(images.class_names) == record["class_names"]
    if not same or images.content != record.get("content_hash", images.content):
        raise UserError(
            f"The images under {dataset.root} are not those that {record['run_id']} was trained on, whose mean and "
            "deviation belong to its weights: give them with --data."
        )
    mean, std = augment.channel_statistics(images.train_images[images.subset])
    return mean.tolist(), std.tolist()


# -- and back ----------------------------------------------------------------------------------------------------------


def load(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """The network of an exported file, on the CPU and in evaluation mode, and the facts; raises `UserError`."""
    facts, tensors = read(path)
    return build(facts, tensors), facts


def scale(images: Tensor, facts: dict[str, Any]) -> Tensor:
    """(B, H, W, C) uint8 → (B, C, H, W) float32, as the network of these facts takes them."""
    statistics = (facts["input"][name] for name in ("mean", "std"))
    return augment.scale(images, *(None if s is None else torch.tensor(s, device=images.device) for s in statistics))


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Facts and weights of an exported file; raises `UserError` for one that is none."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            facts = _facts((file.metadata() or {}).get("cbl", ""))
            if not {"architecture", "input", "config"} <= facts.keys():
                raise UserError(f"{path} was not written by scripts/export.py: its header does not describe a run.")
            return facts, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} cannot be read as weights ({error}).") from None


def _facts(header: str) -> dict[str, Any]:
    try:
        facts = json.loads(header)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def build(facts: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    """The network of the facts with these weights, in evaluation mode; RuntimeError when they do not fit."""
    architecture = facts["architecture"]
    model = MODELS[architecture["function"]](**architecture["arguments"], seed=0)
    model.load_state_dict(tensors)
    return model.eval()


# -- the model card ----------------------------------------------------------------------------------------------------


def card(facts: dict[str, Any]) -> str:
    """`README.md`, Markdown; the head is what model hubs read."""
    run = config.from_mapping(facts["config"])
    front = (
        "---\nlibrary_name: pytorch\npipeline_tag: image-classification\nlicense: other\n"
        "tags: [long-tailed-recognition, class-imbalance, class-balanced-loss]\n---"
    )
    dataset, licence = DATASETS[run.dataset.name]
    parts = [
        front,
        f"# ResNet-{run.model.depth} on {dataset}, imbalance factor {_imbalance(facts)}: {_loss(run)}",
        "One network of a reproduction of *Class-Balanced Loss Based on Effective Number of Samples* (Cui et al., CVPR "
        f"2019, [arXiv 1901.05555](https://arxiv.org/abs/1901.05555)). The header of `{WEIGHTS}` holds all that is "
        "said here, and more, as JSON under the key `cbl`.",
        _what_it_is(run, facts, dataset),
        "## Test error",
        *_errors(facts),
        "## Use",
        *_use(run, facts),
        "## Limits",
        _limits(run, facts, licence),
        "## How it was made",
        _commit(facts),
        _code(
            "sh",
            command(run, facts.get("processes", 1)),
            f"python scripts/export.py run=outputs/runs/{facts['run_id']}",
        ),
        "## Citation",
        "A draft: who publishes the weights fills in author, year and address.",
        _code("bibtex", CITATION % facts["run_id"]),
    ]
    return "\n\n".join(parts) + "\n"


CITATION = """@inproceedings{cui2019class,
  title     = {Class-Balanced Loss Based on Effective Number of Samples},
  author    = {Cui, Yin and Jia, Menglin and Lin, Tsung-Yi and Song, Yang and Belongie, Serge},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2019},
  url       = {https://arxiv.org/abs/1901.05555}
}

@misc{cbl-weights,
  title  = {Weights of the run %s of a reproduction of class-balanced loss},
  author = {to be filled in},
  year   = {to be filled in},
  url    = {to be filled in}
}"""


def command(run: config.Run, processes: int = 1) -> str:
    """What trains the same run again: each setting without which it would have another name.

    No file under configs/ is named, so this still holds when they have changed.
    """
    values, standards, told = config.flat(run), config.flat(config.Run()), []
    for key, standard in standards.items():
        if values[key] == standard:
            continue
        *group, name = key.split(".")
        other: dict[str, Any] = config.to_mapping(run)
        (other[group[0]] if group else other)[name] = standard
        try:
            if config.run_id(config.from_mapping(other)) == config.run_id(run):
                continue
        except UserError:  # the standard value does not go with the other settings
            pass
        told.append(shlex.quote(f"{key}={config.hydra_word(values[key])}"))
    start = "python" if processes == 1 else f"torchrun --nproc-per-node={processes}"
    return " ".join([start, "scripts/train.py", *told])


def _commit(facts: dict[str, Any]) -> str:
    if facts["commit"] is None:  # trained outside a checkout
        return "At an unknown commit:"
    return f"At commit `{facts['commit']}` (a + means: with changes that were not committed):"


def _what_it_is(run: config.Run, facts: dict[str, Any], dataset: str) -> str:
    counts, recipe = facts["class_counts"], run.recipe
    family = (
        "torchvision's" if run.model.name == "resnet_imagenet" else "for small images (He et al. 2016, section 4.2)"
    )
    drawn = "" if run.dataset.imbalance_factor is None else f"; subset seed {run.dataset.subset_seed}"
    rows = [
        ("run", f"`{facts['run_id']}`"),
        ("network", f"ResNet-{run.model.depth}, {family}, {facts['parameters']:,} parameters"),
        (
            "training images",
            f"{dataset}, {facts['n_train']:,} images of {len(counts):,} classes, {_span(counts)} each: "
            f"imbalance factor {_imbalance(facts)}{drawn}",
        ),
        ("loss", _loss(run)),
        (
            "training",
            f"{recipe.epochs} epochs, batches of {recipe.batch_size:,}, seed {run.seed}, {run.engine.dtype}, "
            f"{facts['device']}, torch {facts['torch']}",
        ),
        ("other departures from the authors' recipe", f"`{facts['overrides']}`" if facts["overrides"] else "none"),
        ("input", _input(run, facts)),
        ("output", f"logits (B, {len(counts)}); the largest is the prediction"),
    ]
    return _table(("", ""), rows)


def _errors(facts: dict[str, Any]) -> list[str]:
    counts, errors = facts["class_counts"], facts["per_class_error"]
    top5 = "" if facts["error_top5"] is None else f", top-5 {_percent(facts['error_top5'])} %,"
    groups = [
        (name, f"{len(classes):,}", _span([counts[c] for c in classes]), _percent(facts[f"error_{name}"]))
        for name, classes in facts["group_classes"].items()
        if classes
    ]
    if len(counts) > LISTED:
        each = f"Of each class: `class_names`, `class_counts` and `per_class_error` (%) in the header of `{WEIGHTS}`."
    else:
        names = [name.replace("|", "\\|") for name in facts["class_names"]]
        rows = zip(range(len(counts)), names, counts, map(_percent, errors), strict=True)
        each = _table(("", "class", "training images", "error %"), list(rows))
    return [
        f"**{_percent(facts['error_last'])} %**{top5} of {facts['n_test']:,} test images, after the last step. The "
        f"lowest of all evaluations was {_percent(facts['error_best'])} %, but that is chosen on the test images.",
        _table(("training images", "classes", "each with", "mean error %"), groups),
        each,
    ]


def _use(run: config.Run, facts: dict[str, Any]) -> list[str]:
    classes = len(facts["class_names"])
    parts = [
        "With this project and `safetensors` installed, in this folder; "
        f"`images` are a (B, {_shape(facts)}) uint8 tensor:",
        _code(
            "python",
            "from cbl import export",
            f'model, facts = export.load("{WEIGHTS}")  # on the CPU, in evaluation mode',
            f"logits = model(export.scale(images, facts))  # (B, {classes})",
            'names = [facts["class_names"][c] for c in logits.argmax(1)]',
        ),
    ]
    if run.model.name == "resnet_imagenet":
        mean, std = facts["input"]["mean"], facts["input"]["std"]
        scaling = ["x = images.permute(0, 3, 1, 2) / 128 - 1"]
        if mean is not None:
            scaling = [
                f"mean, std = torch.tensor({mean}), torch.tensor({std})",
                "x = (images.permute(0, 3, 1, 2) / 255 - mean[:, None, None]) / std[:, None, None]",
            ]
        parts += [
            "With torchvision alone:",
            _code(
                "python",
                "import torch",
                "import torchvision",
                "from safetensors.torch import load_file",
                f"model = torchvision.models.resnet{run.model.depth}(num_classes={classes}).eval()",
                f'model.load_state_dict(load_file("{WEIGHTS}"))',
                *scaling,
                f"logits = model(x)  # (B, {classes})",
            ),
        ]
    return [
        *parts,
        "The error above is measured again by `python scripts/evaluate.py run=THIS/FOLDER --data ROOT`, where ROOT "
        "holds the data set.",
    ]


def _limits(run: config.Run, facts: dict[str, Any], licence: str) -> str:
    untrained = "" if run.loss.kind == "softmax" else f", and {run.loss.kind} does not train it to be one"
    limits = [
        "Made to compare losses, not to be relied on: one run of one seed, measured on the test images of its own data "
        "set alone.",
        f"The softmax of its logits is no probability: {_percent(facts['ece'])} % expected calibration error on the "
        f"test images{untrained}.",
        f"Licence of the images: {licence}",
        "Licence of the weights: for their publisher to say, within the terms of the images. That of the code is MIT.",
    ]
    if max(facts["class_counts"]) > min(facts["class_counts"]):
        limits.insert(1, "Trained on few images of some classes: how poorly it recognises those, the tables above say.")
    return "\n".join(f"- {limit}" for limit in limits)


def _imbalance(facts: dict[str, Any]) -> str:
    """Largest class / smallest: as asked for, else as the images are."""
    if facts["imbalance_factor"] is not None:
        return f"{facts['imbalance_factor']:g}"
    return f"{max(facts['class_counts']) / min(facts['class_counts']):.2f}"


def _loss(run: config.Run) -> str:
    gamma = f" (γ = {run.loss.gamma:g})" if run.loss.kind == "focal" else ""
    balanced = f"class-balanced with β = {run.loss.beta!r}" if run.loss.beta else "not class-balanced (β = 0)"
    return f"{run.loss.kind}{gamma}, {balanced}"


def _input(run: config.Run, facts: dict[str, Any]) -> str:
    scaling, made = "x/128 − 1", ""
    if facts["input"]["mean"] is not None:
        mean, std = (", ".join(f"{value:.4g}" for value in facts["input"][name]) for name in ("mean", "std"))
        scaling = f"(x/255 − mean) / deviation, mean {mean} and deviation {std}"
    if run.dataset.name in config.LARGE:
        from cbl.data import streaming

        share = streaming.centre_box(1000, 1000, run.dataset.image_size)[2] / 10
        made = f": the central square of {share:g} % of the short side, resized (bicubic, antialiased)"
    elif run.dataset.name == "folder":
        made = ": the short side resized (bicubic), the centre cropped"
    elif run.dataset.name == "digits_lt":
        made = ": scikit-learn's 0 to 16 stretched to 0 to 255 and rounded"
    colours = "RGB" if facts["input"]["channels"] == 3 else "grey"
    return f"({_shape(facts)}) uint8, {colours}{made}; scaled to {scaling}"


def _shape(facts: dict[str, Any]) -> str:
    """`32, 32, 3`."""
    return "{size}, {size}, {channels}".format(**facts["input"])


def _code(language: str, *lines: str) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _span(counts: Sequence[int]) -> str:
    """`20 to 94`."""
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
