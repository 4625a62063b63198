"""What all tests share: no W&B unless a test asks for it, and why a marked test is skipped."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from stand_in_gpu import stand_in  # noqa: F401  # a fixture

ROOT = Path(__file__).resolve().parent.parent
CIFAR = Path(os.environ.get("CBL_DATA", ROOT / "data"))

os.environ["WANDB_MODE"] = "disabled"
settings.register_profile("any speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any speed")  # a test that fails on a busy machine says nothing
torch.set_num_threads(1)  # the tests run in parallel processes


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = config.getoption("-m")
    slow = os.environ.get("RUN_SLOW") or "slow" in asked
    whole = all((CIFAR / name).is_dir() for name in ("cifar-10-batches-py", "cifar-100-python"))
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if "slow" in item.keywords and not slow:
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow or RUN_SLOW=1"))
        if "data" in item.keywords and not whole:
            item.add_marker(pytest.mark.skip(reason=f"needs the official CIFAR files under {CIFAR}"))
