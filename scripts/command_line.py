"""Around a Hydra main: what Hydra says of a wrong command line becomes one sentence with the nearest valid name."""

import contextlib
import dataclasses
import os
import re
import sys
from collections.abc import Iterator

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from cbl import config
from cbl.errors import UserError


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """A user's mistake is printed as one sentence, exit status 2; any other error keeps its trace."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its exceptions on instead of printing them
    try:
        yield
    except UserError as error:
        _leave(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        _leave(_sentence(error))
    except RuntimeError as error:  # submitit's, on a machine without Slurm
        if "srun" not in str(error):
            raise
        _leave("No srun found: hydra/launcher=slurm wants a Slurm cluster; leave it out to train on this machine.")
    except KeyboardInterrupt:
        _leave("Interrupted; the same command goes on from the last checkpoint.", status=130)


def flags_first() -> None:
    """Lets -m stand anywhere in the command; Hydra's parser wants all overrides on one side of it."""
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda argument: argument not in ("-m", "--multirun"))


def _sentence(error: Exception) -> str:
    text = str(error)
    if found := re.search(r"Could not override '([\w.@/]+)'", text):
        key = found[1]
        groups = [field.name for field in dataclasses.fields(config.Run)]
        return f"Unknown key '{key}'{config.nearest(key, [*groups, *config.keys()])}"
    if found := re.search(r"Could not find '([\w./]+)'\s+Available options in '([\w/]+)':((?:\n\t.*)+)", text):
        group, option = found[2], found[1].removeprefix(found[2] + "/")
        return f"Unknown {group} '{option}'{config.nearest(option, found[3].split())}"
    return " ".join(text.split())


def _leave(text: str, status: int = 2) -> None:
    print(text, file=sys.stderr)
    sys.exit(status)
