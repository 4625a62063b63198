"""What a killed run goes on from, and the final weights; written beside and renamed, read without running code."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cbl import disk
from cbl.errors import UserError


def save(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`checkpoint.pt`: weights, momentum and the plain numbers in `state`."""
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "state": state}
    _write(folder / "checkpoint.pt", content)


def load(
    folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, images: Mapping[str, str] | None = None
) -> dict[str, Any] | None:
    """Restores model and optimizer in place and returns `state`; None when there is no checkpoint.

    In place, because a captured step holds on to the tensors that were there when it was captured. `images` are the
    hashes of the images now, by their names in `state`. Raises `UserError` for a checkpoint that is damaged, and for
    one of other images.
    """
    path = folder / "checkpoint.pt"
    if not path.exists():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # of many kinds, with a page about the options of torch.load
        raise UserError(f"{path} is damaged: delete {folder} to start the run afresh.") from None
    for key, now in (images or {}).items():  # before the weights, which do not fit when there is another class
        if (before := content["state"].get(key, now)) != now:
            raise UserError(
                f"{folder} was begun on other images ({key} was {before}, now {now}): delete the folder to start the "
                "run afresh."
            )
    model.load_state_dict(content["model"])
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, saved in content["optimizer"]["state"].items():
        optimizer.state[parameters[number]]["momentum_buffer"].copy_(saved["momentum_buffer"])
    return content["state"]


def save_weights(folder: Path, model: torch.nn.Module) -> None:
    """`model.pt`: the state dict alone, on the CPU."""
    _write(folder / "model.pt", {name: value.cpu() for name, value in model.state_dict().items()})


def _write(path: Path, content: dict[str, Any]) -> None:
    with disk.whole(path) as handle:
        try:
            torch.save(content, handle)
        except RuntimeError as error:  # about its zip file; what the disk said stands behind it
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
