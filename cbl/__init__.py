"""Class-balanced loss (Cui et al., CVPR 2019): the loss and the long-tailed data sets, to use in your own code.

These names need torch and numpy alone; configs, training and reports live in the subpackages and are imported there.
"""

from cbl.longtail import class_counts, draw_subset
from cbl.losses import ClassBalancedLoss, class_balanced_weights, effective_number

__all__ = ["ClassBalancedLoss", "class_balanced_weights", "class_counts", "draw_subset", "effective_number"]
__version__ = "0.1.0"
