"""What a model was given, before its inputs were cast to the format that it computes in.

The batch is the caller's, who holds it until the step is done. Its 16-bit copy is nobody's but the
model's: whoever can cast again need not keep it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves  # torch's only walker of nests

from narrowcast.precision.islands import CastInputs

__all__ = ["entry_casts", "forget_entries", "note_entries", "tensors_in"]


class _Note:
    """Forward pre-hook: remembers the tensors that pass, and keeps none alive."""

    def __init__(self) -> None:
        self.seen: list[weakref.ref[Tensor]] = []

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.seen = [weakref.ref(tensor) for tensor in tensors_in((args, kwargs))]

    def __reduce__(self) -> Any:
        return type(self), ()  # a copy of a model remembers nothing


def tensors_in(nest: Any) -> list[Tensor]:
    """List the tensors of a nest of tuples, lists and dicts."""
    return [leaf for leaf in tree_leaves(nest) if isinstance(leaf, Tensor)]


def note_entries(module: nn.Module) -> None:
    """Remember what the module's inputs were before and after their cast; if they are cast."""
    hooks = module._forward_pre_hooks
    first = next(iter(hooks), None)
    if first is None or not isinstance(hooks[first], CastInputs):
        return
    others = [key for key in hooks if key != first]
    before, after = (
        module.register_forward_pre_hook(_Note(), with_kwargs=True).id for _ in range(2)
    )
    arranged = {key: hooks[key] for key in (before, first, after, *others)}
    hooks.clear()
    hooks.update(arranged)


def forget_entries(module: nn.Module) -> None:
    """Undo `note_entries`; without effect where there is nothing to undo."""
    hooks = module._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, _Note)]:
        del hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)


def entry_casts(module: nn.Module, given: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pair tensors that a module is given with what they were before its entry's cast.

    Those only that are the very results of that cast, whatever other hooks made of the inputs.
    """
    before, cast, after = [*module._forward_pre_hooks.values(), None, None, None][:3]
    if not (isinstance(before, _Note) and isinstance(cast, CastInputs)):
        return
    assert isinstance(after, _Note), "they are put round the cast together"
    arrived = {id(tensor): tensor for tensor in given}
    for source, made in ((a(), b()) for a, b in zip(before.seen, after.seen, strict=True)):
        is_given = made is not None and id(made) in arrived and made._version == 0
        if is_given and source is not None and source is not made and not source.requires_grad:
            yield source, arrived[id(made)]
