"""The device that a run is computed on: chosen, set up and named."""

import ctypes
import os
import platform
import shutil
import sys
from pathlib import Path

import torch

from cbl import config
from cbl.errors import UserError

# Hardware queues that streams are spread over, 8 unless asked for before CUDA starts: lanes beyond that would wait.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


def choose_device(engine: config.Engine) -> torch.device:
    """The device of `engine.device`, set up for `engine.threads` and `engine.deterministic`.

    Raises `UserError` for a device that this machine does not have.
    """
    name = engine.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"engine.device is '{name}': write auto, cpu, cuda or cuda:N.") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"engine.device is '{name}': only cpu and cuda are supported.")
    if device.type == "cuda":
        found = torch.cuda.device_count()
        if (device.index or 0) >= found:
            raise UserError(f"engine.device is '{name}', but torch {torch.__version__} sees {found} CUDA devices here.")
        if device.index is not None:
            torch.cuda.set_device(device)  # streams and graphs are made on the current one
    if device.type == "cpu":
        keep_freed_memory()
    if engine.threads is not None:
        torch.set_num_threads(engine.threads)
    if engine.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(engine.deterministic)
    return device


def on_cpu(engine: config.Engine) -> bool:
    """Whether `engine.device` is the CPU here."""
    kind = engine.device.partition(":")[0]
    return kind == "cpu" or (kind == "auto" and not torch.cuda.is_available())


def require_compiler(device: torch.device) -> None:
    """Raises `UserError` where torch.compile would not find the compiler that it calls, on a GPU through Triton."""
    if device.type == "cuda":
        names = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    else:
        names = [os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")]
    if not any(map(shutil.which, names)):
        raise UserError(f"engine.compile=true needs a compiler, and there is no {' or '.join(names)}: leave it out.")


def device_name(device: torch.device) -> str:
    """`NVIDIA H200`, or the processor with the instructions torch takes there and the threads in use.

    Processors of one name can differ in the instructions, and then round differently.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    threads = torch.get_num_threads()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}, {threads} thread{'s' if threads > 1 else ''}"


def keep_freed_memory() -> None:
    """Has glibc keep what tensors leave behind for the next ones, and not give it back to be asked for anew.

    The activations of a step come and go with it, and each page that the system has taken back costs a fault and a
    clearing: of ResNet-32 in fp32 on one core some percent of a step and almost half of an evaluation. The price is
    memory: the process stays as large as it ever was. Elsewhere than on glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD in malloc.h: bytes
        mallopt(-4, 0)  # M_MMAP_MAX: allocations that are mapped on their own
