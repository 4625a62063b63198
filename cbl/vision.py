"""torchvision, also beside a CPU build of torch: `from cbl.vision import torchvision, v2` (v2: its transforms).

The torchvision on PyPI is compiled for CUDA. Beside a CPU build of torch its compiled part does not load, and the
import then stops at "operator torchvision::nms does not exist", although neither ResNet nor the transforms need that
part. Declaring the two operators that the import expects is enough. With a torchvision that fits, nothing happens here.
"""

from torch import library

_EXPECTED = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)

try:
    import torchvision
    from torchvision.transforms import v2
except RuntimeError as error:
    if "torchvision::nms" not in str(error):
        raise
    _declared = library.Library("torchvision", "DEF")  # kept: the declarations go with it
    for _schema in _EXPECTED:
        _declared.define(_schema)
    import torchvision
    from torchvision.transforms import v2

__all__ = ["torchvision", "v2"]
