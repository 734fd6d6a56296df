"""Evaluation between two training steps: evaluation mode, no gradients, and nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import torch
from torch import nn

from narrowcast.compiling import eagerly
from narrowcast.policy import POLICIES
from narrowcast.precision.cast import numeric_settings
from narrowcast.precision.full_precision import Widen, full_precision

__all__ = ["evaluation", "evaluation_in_fp32"]

Given = TypeVar("Given")


@contextmanager
def evaluation(model: nn.Module, inside: AbstractContextManager[Given]) -> Iterator[Given]:
    """Evaluate a model inside a context, whose value is yielded; each module gets its mode back."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with torch.no_grad(), inside as given:
            yield given
    finally:
        for module in training:
            module.training = True


@contextmanager
def evaluation_in_fp32(model: nn.Module, widen: Widen) -> Iterator[list[str]]:
    """Evaluate in full precision, TF32 off; yields what `full_precision` yields.

    A compiled model is not so meanwhile: the yardstick is the same for all.
    """
    wide = full_precision(model, widen)
    with eagerly(model), numeric_settings(POLICIES["fp32"]), evaluation(model, wide) as rewritten:
        yield rewritten
