"""The process-wide switches behind "the same run twice gives the same bits", set and given back."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.deterministic

from narrowcast.errors import RecipeError

__all__ = ["deterministic"]

# A module that replaces itself by an object with a property, which no type checker follows.
_MEMORY: Any = torch.utils.deterministic
_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_CUBLAS_FIXED = ":4096:8"  # NVIDIA, cuBLAS documentation, "Results reproducibility"
_REFUSAL = re.compile("deterministic implementation|Deterministic behavior was enabled")


@contextmanager
def deterministic() -> Iterator[None]:
    """Let only deterministic kernels run in the block.

    An operation that has none raises RecipeError when it is called, which names it; nothing runs in
    another way than asked. cuBLAS gets the workspace setting that it needs, and cuDNN does not
    choose kernels by timing them.
    """
    mode = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    filling, timing = _MEMORY.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    workspace = os.environ.get(_CUBLAS)
    try:
        torch.use_deterministic_algorithms(True)
        # Filling new memory with NaN finds reads of uninitialised memory; it also costs a pass
        # over every result, and we neither look for that nor want to time it.
        _MEMORY.fill_uninitialized_memory = False
        torch.backends.cudnn.benchmark = False
        os.environ.setdefault(_CUBLAS, _CUBLAS_FIXED)
        yield
    except (RuntimeError, RecipeError) as error:
        if not _REFUSAL.search(str(error)):
            raise
        raise _no_deterministic_kernel(error) from error
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warns)
        _MEMORY.fill_uninitialized_memory = filling
        torch.backends.cudnn.benchmark = timing
        if workspace is None:
            os.environ.pop(_CUBLAS, None)


def _no_deterministic_kernel(error: RuntimeError | RecipeError) -> RecipeError:
    said = error.message if isinstance(error, RecipeError) else str(error).partition(". ")[0]
    return RecipeError(
        f"the recipe cannot be trained reproducibly: {said}",
        hint="replace that operation, or allow it with --no-deterministic, which gives up exact "
        "resume",
    )
