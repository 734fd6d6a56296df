"""Optimizers and clipping choose on fake CPU tensors as they choose on CUDA: foreach by default.

torch.optim takes the ``foreach`` implementation, which holds temporaries of the size of all
parameters, where every parameter is a plain tensor on CUDA (``_default_to_fused_or_foreach``).
On a CPU it loops over the parameters, and fake tensors are not plain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.optim.optimizer as optimizer_module
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _foreach_utils

__all__ = ["optimizers_of_cuda"]

# The name under which torch.optim asks where foreach is the default.
_DEVICES = "_get_foreach_kernels_supported_devices"


@contextmanager
def optimizers_of_cuda() -> Iterator[None]:
    """Make ``foreach=None`` mean on fake CPU tensors what it means on CUDA."""
    devices: Callable[[], list[str]] = getattr(optimizer_module, _DEVICES)
    types = (optimizer_module._foreach_supported_types, _foreach_utils._foreach_supported_types)
    setattr(optimizer_module, _DEVICES, lambda: [*devices(), "cpu"])
    for known in types:
        known.append(FakeTensor)
    try:
        yield
    finally:
        setattr(optimizer_module, _DEVICES, devices)
        for known in types:
            known.remove(FakeTensor)
