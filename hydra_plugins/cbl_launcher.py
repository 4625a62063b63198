"""Hydra's side of a run: the schema it composes over, and the launcher that trains a whole sweep in one call.

Hydra finds launchers in this package and nowhere else. `resident` is the default for -m: it composes every job of the
sweep first and trains all of them in this process, so that imports, data and compilation are paid once and a GPU can be
shared.
"""

import copy
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from cbl import config, disk
from cbl.engine.train import exit_status, train
from cbl.errors import UserError


def to_run(composed: DictConfig) -> config.Run:
    """The checked run of what Hydra composed; raises `UserError`."""
    values = OmegaConf.to_container(composed, resolve=True)
    return config.from_mapping({key: value for key, value in values.items() if key != "hydra"})


def compose_jobs(
    compose: Callable[[list[str]], DictConfig], jobs: Iterable[Sequence[str]]
) -> Iterator[tuple[Sequence[str], config.Run | UserError]]:
    """The run of each job's overrides, or what is wrong with it.

    Hydra takes tenths of a second to compose, a sweep has hundreds of jobs: so each choice of group options is
    composed once, and the plain values (`loss.beta=0.9`), which Hydra applies last in any case, are set on a copy, one
    for all jobs that set the same keys.
    """
    parser, plain, composed, copies = OverridesParser.create(), set(config.keys()), {}, {}
    parse = functools.cache(lambda word: parser.parse_overrides([word])[0])  # the same few words over and over
    for job in jobs:
        parsed = [parse(word) for word in job]
        values = [o for o in parsed if o.key_or_group in plain and o.type == OverrideType.CHANGE]
        choices = tuple(o.input_line for o in parsed if o not in values)
        if choices not in composed:
            composed[choices] = compose(list(choices))
        keys = choices, *(o.key_or_group for o in values)
        if keys not in copies:
            copies[keys] = copy.deepcopy(composed[choices])
        run = copies[keys]
        for override in values:
            OmegaConf.update(run, override.key_or_group, override.value())
        try:
            yield job, to_run(run)
        except UserError as error:
            yield job, error


class ResidentLauncher(Launcher):
    """`train` on all jobs of a sweep."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config
        folder = Path(config.hydra.sweep.dir)  # in which Hydra writes next, and would fail with a page of its own code
        with disk.writing(folder, "choose another output_dir"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "multirun.yaml").touch()

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        def compose(overrides: list[str]) -> DictConfig:
            return self.hydra_context.config_loader.load_sweep_config(self.config, overrides)

        runs, refused = {}, 0
        for overrides, run in compose_jobs(compose, job_overrides):
            if isinstance(run, UserError):
                print(f"{' '.join(overrides)}: {run}", file=sys.stderr)
                refused += 1
            elif runs.setdefault(config.run_id(run), run) != run:
                print(f"{' '.join(overrides)}: the same run as another of this sweep, trained once.", file=sys.stderr)
        ended = train(list(runs.values()))
        from cbl.report import sweep  # pandas is wanted only now

        if os.environ.get("RANK", "0") == "0":  # of torchrun's processes one alone
            print("".join(f"{line}\n" for line in sweep.lines(ended)), end="")
        if refused or exit_status(ended):
            raise SystemExit(1)
        return [JobReturn(overrides=o, status=JobStatus.COMPLETED) for o in job_overrides]


@dataclass
class ResidentLauncherConf:
    _target_: str = "hydra_plugins.cbl_launcher.ResidentLauncher"


OmegaConf.register_new_resolver("cbl_home", os.path.expanduser, replace=True)  # of output_dir=~/…, in configs/
ConfigStore.instance().store("resident", node=ResidentLauncherConf, group="hydra/launcher", provider="cbl")
# All keys with their defaults, so that a yaml only has to name what it sets. Hydra loads this in every application
# of the environment: a plain "schema" would replace theirs.
ConfigStore.instance().store("cbl_schema", node=dataclasses.asdict(config.Run()), provider="cbl")
