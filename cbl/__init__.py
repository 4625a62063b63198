"""Class-balanced loss (Cui et al., CVPR 2019): the loss and the long-tailed data sets, to use in your own code.

These names need torch and numpy alone; configs, training and reports live in the subpackages and are imported there.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cbl.longtail import class_counts, draw_subset
    from cbl.losses import ClassBalancedLoss, class_balanced_weights, effective_number

__all__ = ["ClassBalancedLoss", "class_balanced_weights", "class_counts", "draw_subset", "effective_number"]
__version__ = "0.1.0"

_HOME = {name: "cbl.longtail" if name in ("class_counts", "draw_subset") else "cbl.losses" for name in __all__}


def __getattr__(name: str) -> Any:
    """Imported when first asked for: torch takes seconds, and what reads a command line can do without."""
    if name in ("longtail", "losses", "models"):
        return importlib.import_module(f"cbl.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'cbl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
