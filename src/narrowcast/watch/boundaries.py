"""What passes the borders of a model's modules in one pass: outputs, and their gradients.

Forward hooks see outputs, and hooks on these tensors their gradients. All are put on for one pass
and taken off after it: a pass that is not looked at has no hook to call. Nothing is written and
nothing returned, so what is computed is the same bit for bit.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves  # torch's only walker of nests

from narrowcast.ranges.histogram import Counted, count, read
from narrowcast.ranges.what_if import merged, scaled
from narrowcast.records.diagnosis import ModuleRange, Phase
from narrowcast.records.ranges import TensorRange

__all__ = ["Boundaries"]


@dataclass(frozen=True, eq=False)
class _Seen:
    """A tensor that crossed the borders of several modules, as of a block and its last layer."""

    names: list[str]
    counted: Counted


class Boundaries:
    """Counts, while entered, what crosses the borders of a model's modules.

    `scale` is what gradients are multiplied by, and is taken out of them again; None leaves them
    out. Outputs of the recomputation that checkpointing does inside backward are not counted again,
    and what is no plain dense tensor (subclasses, the insides of ``torch.func``) not at all.
    """

    def __init__(self, model: nn.Module, scale: float | None = 1.0) -> None:
        self._model = model
        self._scale = scale
        self._hooks: list[Any] = []
        self._seen: dict[Phase, list[_Seen]] = {"forward": [], "backward": []}
        self._last: tuple[weakref.ref[Tensor], int, _Seen] | None = None
        self._last_gradients: tuple[weakref.ref[Tensor], int, list[str]] | None = None

    def __enter__(self) -> Self:
        self._hooks = [
            module.register_forward_hook(partial(self._leave, name))
            for name, module in self._model.named_modules()
        ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the hooks off; what was counted stays."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def ranges(self) -> tuple[ModuleRange, ...]:
        """Return the values of each module: outputs, and the unscaled gradients of outputs.

        In the order in which borders were first crossed, forward and then backward. Reads the
        device once.
        """
        seen = [(phase, one) for phase, each in self._seen.items() for one in each]
        found: dict[tuple[Phase, str], list[TensorRange]] = {}
        values = read([one.counted for _, one in seen])
        for (phase, one), value in zip(seen, values, strict=True):
            for name in one.names:
                found.setdefault((phase, name), []).append(self._unscaled(phase, value))
        return tuple(
            ModuleRange(module=name, phase=phase, values=merged(parts))
            for (phase, name), parts in found.items()
        )

    def _unscaled(self, phase: Phase, value: TensorRange) -> TensorRange:
        if phase == "forward" or self._scale is None or not _is_power_of_two(self._scale):
            return value
        return scaled(value, 1 / self._scale)

    def _leave(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        # What is compiled, traced or transformed has no values here that could be counted.
        traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
        if traced or torch._C._are_functorch_transforms_active():
            return
        for leaf in tree_leaves(output):
            if _is_countable(leaf):
                if not _is_in_backward():
                    self._note_output(name, leaf)
                if leaf.requires_grad and self._scale is not None:
                    self._await_gradient(name, leaf)

    def _note_output(self, name: str, output: Tensor) -> None:
        if self._last is not None:
            last, version, seen = self._last
            if last() is output and version == _version(output):
                seen.names.append(name)
                return
        seen = _Seen([name], count(output))
        self._seen["forward"].append(seen)
        self._last = weakref.ref(output), _version(output), seen

    def _await_gradient(self, name: str, output: Tensor) -> None:
        if self._last_gradients is not None:
            last, version, names = self._last_gradients
            # Written into since, as by ReLU(inplace=True), it has a gradient of its own.
            if last() is output and version == _version(output):
                names.append(name)
                return
        names = [name]
        hook = output.register_hook(self._gradient_hook(names))  # type: ignore[no-untyped-call]
        self._hooks.append(hook)
        self._last_gradients = weakref.ref(output), _version(output), names

    def _gradient_hook(self, names: list[str]) -> Callable[[Tensor], None]:
        scale = 1.0 if self._scale is None else self._scale

        def arrived(gradient: Tensor) -> None:
            if not _is_countable(gradient):
                return
            # A power of two is taken out of the counts, where it costs nothing.
            true = gradient if _is_power_of_two(scale) else gradient.float() / scale
            self._seen["backward"].append(_Seen(names, count(true)))

        return arrived


def _is_power_of_two(scale: float) -> bool:
    return math.frexp(scale)[0] == 0.5


def _is_countable(leaf: object) -> bool:
    """Whether it is a plain dense tensor of floats: subclasses answer for themselves."""
    if type(leaf) is not Tensor and type(leaf) is not nn.Parameter:
        return False
    return leaf.is_floating_point() and leaf.layout is torch.strided and not leaf.is_meta


def _is_in_backward() -> bool:
    """Whether autograd executes a graph in this thread: forward code is then a recomputation."""
    return torch._C._current_graph_task_id() != -1


def _version(tensor: Tensor) -> int:
    """Return how often it was written into; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version
