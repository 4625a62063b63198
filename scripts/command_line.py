"""What the scripts share: a wrong command line is answered with one sentence, what Hydra says of it included."""

import contextlib
import dataclasses
import os
import re
import select
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import checkout  # noqa: F401

from cbl import config
from cbl.errors import UserError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
INTERRUPTED = threading.Event()  # by SIGTERM; a library may swallow the exception, so that long loops look here too
TABLE = "A table is no setting of a run: make reproduce-table TABLE=digits trains what it lacks and shows it."


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """A user's mistake is printed as one sentence, exit status 2; any other error keeps its trace."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its exceptions on instead of printing them
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except UserError as error:
        _leave(str(error))
    except _of_hydra() as error:
        _leave(_sentence(error))
    except RuntimeError as error:
        submitit = sys.modules.get("submitit")
        if submitit and isinstance(error, submitit.core.utils.UncompletedJobError):
            _leave(_failed_job(str(error)), status=1)
        if "srun" not in str(error):  # submitit's, on a machine without Slurm
            raise
        _leave("No srun found: hydra/launcher=slurm wants a Slurm cluster; leave it out to train on this machine.")
    except ValueError as error:  # Hydra raises a few plain ones
        if not (sentence := _of_plain_error(str(error))):
            raise
        _leave(sentence)
    except BrokenPipeError:
        if not _nobody_reads():  # it was another pipe
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to be written fails no more
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        _leave("Interrupted; to go on give the same command again.", status=130)


def interrupt(signum: int, frame: FrameType | None) -> None:
    """SIGTERM as Ctrl-C, for scripts that still have to write what they measured."""
    INTERRUPTED.set()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `timeout` sends two
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch raises in it for a DataLoader's processes, ended with ours
    raise KeyboardInterrupt


def _nobody_reads() -> bool:
    """Whether stdout is a pipe whose other end is closed, as by `head`."""
    pipe = select.poll()
    pipe.register(sys.stdout.fileno(), 0)
    return any(events & select.POLLERR for _, events in pipe.poll(0))


def flags_first() -> None:
    """Lets -m stand anywhere in the command; Hydra's parser wants all overrides on one side of it.

    Refuses several named sweeps, of which Hydra would run none, and a launcher without -m, which it would not ask.
    """
    asks = ("-m", "--multirun", "sweep=", "+sweep=", "hydra.mode=", "-c", "--cfg", "-i", "--info")  # for a launcher
    for argument in sys.argv[1:]:
        if argument.startswith("hydra/launcher=") and not any(word.startswith(asks) for word in sys.argv[1:]):
            raise UserError(f"{argument} takes effect in a sweep alone: add -m.")
        if argument.startswith("sweep=") and "," in argument:
            one, *_ = argument.removeprefix("sweep=").split(",")
            raise UserError(f"{argument} names several sweeps: give a command one, such as sweep={one}.")
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda argument: argument not in ("-m", "--multirun"))


def results_folder(path: Path) -> Path:
    """`path`, when published runs are in it; raises `UserError` otherwise."""
    if not (path / "runs.csv").is_file():
        raise UserError(f"{path} has no runs.csv: give --results the folder that scripts/collect.py publishes into.")
    return path


def output_folder(path: Path) -> Path:
    """`path`, made when it is not there; raises `UserError` where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be a folder ({error.strerror}): choose another to write to.") from None
    return path


def _of_hydra() -> tuple[type[Exception], ...]:
    """What Hydra and OmegaConf raise, where a script uses them: the bench runs without."""
    names = {"hydra.errors": "HydraException", "omegaconf.errors": "OmegaConfBaseException"}
    return tuple(getattr(sys.modules[module], name) for module, name in names.items() if module in sys.modules)


def _sentence(error: Exception) -> str:
    text = str(error)
    if found := re.search(r"Could not override '([\w.@/]+)'", text):
        key = found[1]
        if key == "table":
            return TABLE
        groups = [field.name for field in dataclasses.fields(config.Run)]
        return f"Unknown key '{key}'{config.nearest(key, [*groups, *config.keys()])}"
    if found := re.search(r"Could not find '([\w./]+)'\s+Available options in '([\w/]+)':((?:\n\t.*)+)", text):
        group, option = found[2], found[1].removeprefix(found[2] + "/")
        return f"Unknown {group} '{option}'{config.nearest(option, found[3].split())}"
    key, given, value = str(getattr(error, "override", None) or "").partition("=")
    # it cannot be parsed: a path with (, [, = or ' in it, not a wrong call of Hydra's range() or a key with a blank
    if given and re.fullmatch(r"[\w.@/+~]+", key) and not re.match(r"\w+\(.*\)$", value):
        quoted = shlex.quote(f"{key}={config.hydra_word(value)}")
        return f"Hydra reads {key}={value} only with its value in quotes: {quoted}."
    return " ".join(text.split())


def _of_plain_error(text: str) -> str | None:
    """Of the ValueErrors that a command line makes Hydra raise; None for any other."""
    if text.startswith("Only one of --run, --multirun, --cfg"):
        return (
            "--run, -m, --cfg and --info exclude each other: to preview a job of a sweep with --cfg job, leave -m out "
            "and give one value for each comma list."
        )
    if text.startswith("The --resolve flag"):
        return text
    if text.startswith("Config group override must be a string"):  # it does not say which
        for argument in sys.argv[1:]:
            group, _, values = argument.lstrip("+").partition("=")
            if group == "table":
                return TABLE
            options = sorted(path.stem for path in CONFIGS.glob(f"{group}/*.yaml")) if group.isidentifier() else []
            for value in values.split(","):
                if options and value not in options:
                    return f"Unknown {group} '{value}'{config.nearest(value, options)}"
    return None


def _failed_job(text: str) -> str:
    """Of submitit's account of a job: where its log is, and the last line of it."""
    folder = re.search(r"(/.+)/[^/\n]+_(?:result\.pkl|log\.err)", text)
    said = [line for line in text.partition("You can check full logs")[0].splitlines() if line.strip("- ")]
    return f"A job of the sweep failed (its log is in {folder and folder[1]}); it last said: {said[-1].strip()}"


def _leave(text: str, status: int = 2) -> None:
    print(text, file=sys.stderr)
    sys.exit(status)
