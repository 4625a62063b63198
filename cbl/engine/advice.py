"""What is said of runs before they are trained: that they will take long, or not do what was asked."""

from collections.abc import Callable, Sequence

import torch

from cbl import config
from cbl.engine.device import on_cpu

AS_IT_IS = {"engine.lanes": 1, "engine.workers": 0}  # where lanes and workers have no effect


def advise(runs: Sequence[config.Run], say: Callable[[str], None]) -> None:
    """Says each thing once, for however many of `runs` it holds."""
    _emulated(runs, say)
    _never_dropped(runs, say)
    _without_effect(runs, say)


def _emulated(runs: Sequence[config.Run], say: Callable[[str], None]) -> None:
    """Says once that bf16 is slow here, where one of `runs` would be computed in it without instructions for it.

    That is so on a processor with AVX2 and no more. ResNet-32 at batch 128, two cores of such an EPYC: 8.2 s forward
    and backward, and 0.5 s in fp32.
    """
    if torch.backends.cpu.get_cpu_capability() == "AVX2" and any(
        run.engine.dtype == "bf16" and on_cpu(run.engine) for run in runs
    ):
        say("This processor has no instructions for bf16: a step takes many times as long as with engine.dtype=fp32.")


def _never_dropped(runs: Sequence[config.Run], say: Callable[[str], None]) -> None:
    """Says once that the learning rate of one of `runs` is high to the end, as when `recipe.epochs` alone is lower."""
    for run in runs:
        milestones, epochs = run.recipe.milestones, run.recipe.epochs
        if run.recipe.drop < 1 and milestones and milestones[0] >= epochs and run.engine.max_steps is None:
            official = ",".join(f"{epochs * share:g}" for share in (0.8, 0.9))
            say(
                f"The learning rate never drops: recipe.milestones begin at epoch {milestones[0]:g}, recipe.epochs is "
                f"{epochs}. The paper's drops, at 0.8 and 0.9 of the epochs, are recipe.milestones=[{official}] here."
            )
            return


def _without_effect(runs: Sequence[config.Run], say: Callable[[str], None]) -> None:
    """Says which settings do nothing on a run's data set, network or device, though they were asked for.

    Not said: what is so in any case (`AS_IT_IS`, or `engine.capture=false`), what the product of a sweep cannot leave
    out (`loss.gamma` of softmax), and `dataset.subset_seed` where all images are kept, which a `Run` has as 0.
    """
    default, said = config.flat(config.Run()), set()
    for run in runs:
        name, values = run.dataset.name, config.flat(run)
        where: dict[str, str] = {}
        if on_cpu(run.engine):
            where |= dict.fromkeys(("engine.fused", "engine.lanes"), "the CPU")
            if run.engine.dtype == "tf32":
                where["engine.dtype"] = "the CPU"  # where it is fp32, and recorded as tf32
        if name in config.LARGE:
            where |= dict.fromkeys(("engine.fused", "engine.lanes"), name)
        else:
            keys = ("dataset.on_damaged", "engine.micro_batch", "engine.sync_bn", "engine.workers")
            where |= dict.fromkeys(keys, name)
            if name != "folder":
                where["dataset.image_size"] = name
        if run.model.name == "resnet_imagenet":
            where |= dict.fromkeys(("model.shortcut", "model.init"), run.model.name)
        for key, place in where.items():
            if values[key] not in (default[key], AS_IT_IS.get(key)):
                said.add(f"{key}={config.hydra_word(values[key])} has no effect on {place}: leave it out.")
    for sentence in sorted(said):
        say(sentence)
