"""The one place that imports torchvision.

torchvision from PyPI is built against CUDA torch. Beside a CPU-only torch its compiled operators do not load, and
`import torchvision` fails where it describes the first of them, `torchvision::nms`, to torch. Datasets and transforms
use no such operator, so declaring the missing names is enough for them; calling one still fails, as it must.
"""

import sys
from types import ModuleType

import torch

MISSING = ("nms", "qnms")  # the operators that torchvision describes at import, both with this signature
SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declarations: list[torch.library.Library] = []  # a Library takes its declarations back when it is collected


def import_torchvision() -> ModuleType:
    """Return torchvision with `torchvision.datasets` and `torchvision.transforms.v2` loaded.

    Raises:
        ImportError: torchvision is not installed, or does not import for another reason than the missing operator.
    """
    try:
        import torchvision.datasets
        import torchvision.transforms.v2
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise ImportError(f"torchvision does not import: {error}") from error
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for operator in MISSING:
            library.define(operator + SIGNATURE)
        _declarations.append(library)
        import torchvision.datasets
        import torchvision.transforms.v2
    return torchvision
