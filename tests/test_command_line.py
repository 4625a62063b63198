"""scripts/train.py as people type it: what is wrong is one line, and a sweep trains what is right."""

import contextlib
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import command_line
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from cbl import records, store

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "train.py"
DIGITS = ["experiment=digits", "tracking=off", "engine.device=cpu", "engine.threads=1", "engine.max_steps=2"]
Train = Callable[..., tuple[int, str, str]]  # arguments -> exit status, stdout, stderr


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Train:
    """Runs the command in this process, in an empty folder."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        capsys.readouterr()
        status: int | str | None = 0
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as left:
            status = left.code
        finally:
            GlobalHydra.instance().clear()
        assert isinstance(status, int | None)
        return status or 0, *capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # the script sets it; what it was comes back after the test
    return run


WRONG = [
    # keys
    ("loss.bta=0.9", r"Unknown key 'loss.bta'; did you mean 'loss.beta'\?"),
    ("epochs=10", r"Unknown key 'epochs'; did you mean 'recipe.epochs'\?"),
    ("+sead=1", r"Unknown key 'sead'; did you mean 'seed'\?"),
    ("++loss.gama=1", r"Unknown key 'loss.gama'; did you mean 'gamma'\?"),
    # options of a group
    ("loss=focl", r"Unknown loss 'focl'; did you mean 'focal'\?"),
    ("dataset=mnist", r"Unknown dataset 'mnist'; valid are cifar100_lt, .*"),
    # values
    ("loss.beta=2", r"loss.beta is 2.0, but it must be in \[0, 1\], for example 0.9999\."),
    ("loss.beta=high", r"loss.beta takes a number, not 'high'\."),
    (
        "dataset.imbalance_factor=0.01",
        r"dataset.imbalance_factor is 0.01, but .*; write 100 for what other code calls .*",
    ),
    ("loss=[1", r"Hydra reads loss=\[1 only with its value in quotes: .*"),
    (
        "dataset.root=~/images",
        r"Hydra reads dataset.root=~/images only with its value in quotes: 'dataset.root=\"~/images\"'\.",
    ),
    ("output_dir=/a=b", r"Hydra reads output_dir=/a=b only with its value in quotes: 'output_dir=\"/a=b\"'\."),
    ("output_dir=/x(1)", r"Hydra reads output_dir=/x\(1\) only with its value in quotes: .*"),
    ("loss.beta=range()", r".*missing a required argument: 'start'.*"),
    ("output_dir=it's", r"Hydra reads output_dir=it's only with its value in quotes: 'output_dir=\"it'\"'\"'s\"'\."),
    ("hydra/launcher=submitit_local", r"hydra/launcher=submitit_local takes effect in a sweep alone: add -m\."),
    ("output_dir=/größe", r"Hydra reads output_dir=/größe only with its value in quotes: .*"),
    ("sweep=beta,imbalance", r"sweep=beta,imbalance names several sweeps: give a command one, such as sweep=beta\."),
    ("loss.beta", r".*'loss.beta'.*"),
    ("seed=0,1", r"Ambiguous value for argument 'seed=0,1' .*--multirun.*"),
    # options that Hydra takes for numbers, and a group that is no part of a run
    ("model=32", r"Unknown model '32'; valid are resnet101, .*resnet32, .*"),
    ("loss=2", r"Unknown loss '2'; valid are focal, .*"),
    ("dataset=10", r"Unknown dataset '10'; valid are cifar100_lt, .*"),
    ("sweep=null", r"Unknown sweep 'null'; valid are beta, .*"),
    ("table=digits", r"A table is no setting of a run: make reproduce-table TABLE=digits .*"),
    ("+table=2", r"A table is no setting of a run: .*"),
    # flags
    ("--resolve", r"The --resolve flag can only be used in conjunction with --cfg or --help"),
]


@pytest.mark.parametrize(("argument", "message"), WRONG)
def test_a_wrong_argument_is_one_line(train: Train, tmp_path: Path, argument: str, message: str) -> None:
    status, out, err = train(argument, "tracking=off")
    assert status == 2 and out == ""
    assert re.fullmatch(message + r"\n", err)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_argument_of_a_sweep_stops_it_before_it_begins(train: Train, tmp_path: Path) -> None:
    for wrong in ("loss.bta=1", "loss=softmax,focl", "model=resnet8,32"):
        status, out, err = train("-m", *DIGITS, "seed=0,1", wrong)
        assert status == 2 and out == "" and err.startswith("Unknown ") and err.count("\n") == 1
    assert not list(tmp_path.glob("outputs/runs/*-*"))


def test_a_sweep_cannot_be_previewed_as_one_configuration(train: Train, tmp_path: Path) -> None:
    for flag in ("--cfg", "--info"):
        status, out, err = train("-m", "seed=0,1", flag, {"--cfg": "job", "--info": "all"}[flag])
        assert status == 2 and out == "" and err.count("\n") == 1 and "to preview a job of a sweep" in err
    assert list(tmp_path.iterdir()) == []


def test_any_other_plain_error_keeps_its_trace() -> None:
    for error in (ValueError("Only one"), RuntimeError("CUDA error")):
        with pytest.raises(type(error), match=str(error)), command_line.one_line():
            raise error


@pytest.mark.parametrize(
    ("job", "argument", "last"),
    [(sys.exit, "run: failed. No data.", "run: failed. No data."), (math.sqrt, -1, "ValueError: math domain error")],
)
def test_a_failed_job_of_submitit_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    job: Callable,
    argument: object,
    last: str,
) -> None:
    submitit = pytest.importorskip("submitit")
    monkeypatch.setattr(submitit.Job, "_results_timeout_s", 0)  # how long it looks for what a dead job has not left
    submitted = submitit.LocalExecutor(tmp_path).submit(job, argument)
    with pytest.raises(SystemExit) as left, command_line.one_line():
        submitted.result()
    log = submitted.paths.folder
    assert left.value.code == 1
    assert capsys.readouterr().err == f"A job of the sweep failed (its log is in {log}); it last said: {last}\n"


def test_a_config_of_another_application_named_schema_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(
        "import hydra\n"
        "from hydra.core.config_store import ConfigStore\n"
        "ConfigStore.instance().store('schema', node={'mine': 1})\n"
        "hydra.main(version_base='1.3', config_path=None, config_name='schema')(lambda found: print(dict(found)))()\n"
    )
    environment = os.environ | {
        "PYTHONPATH": str(SCRIPT.parent.parent)
    }  # where Hydra finds our plugin, installed or not
    command = [sys.executable, "app.py", "hydra.run.dir=."]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "{'mine': 1}\n"


def test_missing_data_is_one_line_and_leaves_no_folder(train: Train, tmp_path: Path) -> None:
    for arguments in (["dataset.download=false"], ["dataset=folder"]):
        status, out, err = train("dataset.root=nowhere", "tracking=off", "engine.device=cpu", *arguments)
        assert status == 1 and out == "" and err.count("\n") == 1
        assert re.match(r"\w+-\w+-softmax-b0-s0-[0-9a-f]{8}: failed\. .*nowhere.*", err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_one_line(train: Train, tmp_path: Path) -> None:
    status, out, err = train("experiment=digits", "tracking=off", "engine.device=cuda")
    assert status == 1 and out == "" and err.count("\n") == 1
    assert "failed. engine.device is 'cuda', but torch" in err
    assert list(tmp_path.iterdir()) == []


def test_help_names_groups_and_keys(train: Train, tmp_path: Path) -> None:
    status, out, err = train("--help")
    assert status == 0 and err == ""
    assert "loss: focal, focal_g0.5, focal_g1, focal_g2, sigmoid, softmax" in out
    assert "(but table: make reproduce-table TABLE=digits)" in out
    assert "imbalance_factor: 100" in out and "--cfg job" in out
    assert list(tmp_path.iterdir()) == []


def test_the_result_can_be_shown_without_training(train: Train, tmp_path: Path) -> None:
    status, out, err = train("--cfg", "job", "loss=focal_g2", "recipe.epochs=7")
    assert status == 0 and err == ""
    assert "gamma: 2.0" in out and "epochs: 7" in out and "hydra:" not in out
    assert list(tmp_path.iterdir()) == []


def test_a_run_and_the_same_again(train: Train, tmp_path: Path) -> None:
    status, out, err = train(*DIGITS)
    assert status == 0 and out == ""
    (folder,) = (tmp_path / "outputs" / "runs").iterdir()
    assert records.is_done(folder)
    assert "class counts      124     74" in err and "class weights  1.0000" in err
    assert re.search(rf"^{folder.name}: error [\d.]+ % after the last step, best [\d.]+ %, ", err, re.M)
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["runs"]  # Hydra leaves none of its own
    status, _, err = train(*DIGITS)
    assert status == 0
    assert re.fullmatch(rf"{folder.name}: error [\d.]+ % after the last step, best [\d.]+ % \(done before\)\n", err)


def test_the_command_itself_and_a_sweep_with_a_bad_job(tmp_path: Path) -> None:
    """A process of its own, as typed; the flag may stand anywhere."""
    command = [sys.executable, str(SCRIPT), *DIGITS, "loss=focal_g1", "loss.beta=0,2,0.9", "-m"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    first, *cells = done.stdout.splitlines()  # what the sweep comes to
    assert first.startswith("Test error after the last step, %: ") and len(cells) == 2
    assert [len(re.findall(r"\(1\)", line)) for line in sorted(cells)] == [1, 2]  # its error; at beta 0.9 its gain too
    assert re.search(r"^.*loss=focal_g1 loss.beta=2.*: loss.beta is 2.0, but it must be in \[0, 1\]", done.stderr, re.M)
    folders = list((tmp_path / "outputs" / "runs").glob("*-*"))
    assert len(folders) == 2 and all(records.is_done(folder) for folder in folders)
    found = store.read_folders([tmp_path / "outputs" / "runs"])  # passes Hydra's own folder over
    assert len(found.runs) == 2 and found.warnings == []
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["runs"]
    assert {records.read_record(folder)["beta"] for folder in folders} == {0.0, 0.9}
    assert re.search(r"^\[2/2\] ", done.stderr, re.M)


def test_of_the_processes_of_a_sweep_one_says_where_pages_go(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "-m", *DIGITS, "tracking=wandb", "seed=0,1,2"]
    command.remove("tracking=off")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment |= {"OMP_NUM_THREADS": "1", "HOME": str(tmp_path), "WANDB_MODE": "online"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stderr.count("W&B: ") == 1, done.stderr


def test_a_sweep_writes_where_its_runs_are_and_nowhere_else(train: Train, tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("a file, in which no folder can be made")
    words = ["-m", "dataset=folder", "dataset.root=nowhere", "tracking=off", "engine.device=cpu"]
    status, out, err = train(*words, "output_dir=elsewhere/runs")
    assert status == 1 and out == "" and err.count("\n") == 1 and "nowhere/train: dataset=folder needs" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "outputs"]
    status, out, err = train(*words, "output_dir=outputs/runs")
    assert status == 2 and out == ""
    assert err == "outputs/runs/.sweeps cannot be written to (Not a directory): choose another output_dir.\n"


def test_a_tilde_is_home(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert train(*DIGITS, 'output_dir="~/größe"')[0] == 0
    assert train("-m", *DIGITS, 'output_dir="~/größe"', "seed=1,2")[0] == 0
    assert len(list((tmp_path / "home/größe").glob("*/done"))) == 3 and not (tmp_path / "~").exists()


def test_jobs_of_a_sweep_that_are_one_run_are_said(train: Train, tmp_path: Path) -> None:
    status, _, said = train("-m", *DIGITS, "engine.checkpoint_seconds=10,20", f"output_dir={tmp_path / 'runs'}")
    assert status == 0 and len(list((tmp_path / "runs").glob("*/done"))) == 1
    assert len(re.findall(r"checkpoint_seconds=20 .*: the same run as another of this sweep, trained once", said)) == 1


def test_a_wrong_command_line_is_answered_without_torch() -> None:
    """Which takes seconds to import; and Hydra imports our launcher in other people's applications too."""
    code = "import sys; sys.modules['fcntl'] = None; import hydra_plugins.cbl_launcher; del sys.modules['fcntl']; "
    code += "import cbl.config, cbl.records, cbl.store, cbl.tracking; assert 'torch' not in sys.modules; "
    code += "import cbl; assert cbl.ClassBalancedLoss is cbl.losses.ClassBalancedLoss and 'class_counts' in dir(cbl) "
    code += "and cbl.models.resnet_cifar and cbl.longtail"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=SCRIPT.parent.parent)


@pytest.mark.parametrize("lines", [0, 1])
def test_who_reads_no_further_sees_no_trace(tmp_path: Path, lines: int) -> None:
    """As `| head -1`."""
    figures = ["fig3", "fig4", "fig6"][: 1 + 2 * lines]
    command = [sys.executable, "scripts/figures.py", *figures, "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=SCRIPT.parent.parent, env=environment, **pipes) as drawn:
        for _ in range(lines):
            assert drawn.stdout.readline().startswith("fig3: ")
        drawn.stdout.close()
        assert drawn.stderr.read() == "" and drawn.wait() == 141


def test_the_bench_runs_without_hydra() -> None:
    """As on a machine that is lent for an hour and has torch alone."""
    code = (
        "import sys; sys.modules |= dict.fromkeys(['hydra', 'omegaconf', 'wandb']); import benchmark\n"
        "with benchmark.one_line(): benchmark.main(['--threads', '0'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=SCRIPT.parent, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "--threads is 0: it must be 1 or more.\n")


def test_scripts_take_the_checkout_they_are_in(tmp_path: Path) -> None:
    """And not a `cbl` that is installed as well, or lies before it on the path."""
    (tmp_path / "cbl").mkdir()
    (tmp_path / "cbl/__init__.py").write_text("raise SystemExit('another one')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    for script in sorted(SCRIPT.parent.glob("*.py")):
        command = [
            sys.executable,
            str(script),
            *(["--help"] if "ArgumentParser" in script.read_text() else ["--info", "x"]),
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert "another one" not in done.stderr and "Traceback" not in done.stderr, script


@pytest.mark.skipif(
    not Path("/proc/self/cmdline").exists() or len(os.sched_getaffinity(0)) < 2, reason="needs Linux and two cores"
)
def test_the_processes_of_a_sweep_leave_ctrl_c_to_their_parent_from_their_beginning(tmp_path: Path) -> None:
    """A terminal sends it to all; here to them alone, on and on, while they import torch and while they train."""
    command = [sys.executable, str(SCRIPT), "-m", *DIGITS, "seed=0,1"]
    sweep = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    sent: set[int] = set()
    while sweep.poll() is None:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            pid = int(path.parent.name)
            with contextlib.suppress(OSError):
                if b"spawn_main" in path.read_bytes() and os.getpgid(pid) == sweep.pid:
                    os.kill(pid, signal.SIGINT)
                    sent.add(pid)
        time.sleep(0.05)
    _, err = sweep.communicate()
    assert len(sent) >= 2 and sweep.returncode == 0 and "Traceback" not in err
    assert len(list(tmp_path.glob("outputs/runs/*/done"))) == 2


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    settings = [*DIGITS[:-1], "recipe.epochs=100000", "engine.checkpoint_seconds=0"]
    command = [sys.executable, str(SCRIPT), *settings]
    # a shell starts what it puts in the background with Ctrl-C ignored, these tests perhaps, and a child inherits that
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        training = subprocess.Popen(
            command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True
        )
    finally:
        signal.signal(signal.SIGINT, ours)
    try:
        late = time.monotonic() + 120
        while training.poll() is None and not list(tmp_path.glob("outputs/runs/*/checkpoint.pt")):
            assert time.monotonic() < late, "no checkpoint"
            time.sleep(0.02)
        training.send_signal(signal.SIGINT)
        _, err = training.communicate(timeout=60)
    finally:
        training.kill()  # it would train for hours
    assert training.returncode == 130 and "Traceback" not in err
    assert err.splitlines()[-1] == "Interrupted; to go on give the same command again."
    (folder,) = (tmp_path / "outputs" / "runs").iterdir()
    assert (folder / "checkpoint.pt").exists() and records.read_record(folder)["status"] == "running"
