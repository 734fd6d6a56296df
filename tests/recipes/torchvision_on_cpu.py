"""Lets torchvision load beside a CPU build of torch; a neighbour that recipes import first.

The torchvision that pip installs is built for CUDA. Beside a CPU build of torch its import stops at
operators that its library, which cannot be loaded there, should have declared. Declaring the two
lets it load; calling them still fails, and a classifier or a language model calls neither. Both
timm and transformers import torchvision where they find it.
"""

import importlib.util

import torch

if importlib.util.find_spec("torchvision"):
    try:
        import torchvision  # noqa: F401 -- only to see whether it loads
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
