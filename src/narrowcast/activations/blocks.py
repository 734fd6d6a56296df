"""Which modules of a model are its repeated blocks: what ``modules="auto"`` stands for.

Transformer layers, residual blocks: the parts that a network is a stack of. Between them little is
alive, which is what makes them the right pieces to recompute.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from torch import nn

from narrowcast.errors import UsageError

__all__ = ["repeated_blocks"]

_CONTAINERS = (nn.ModuleList, nn.Sequential)
# Encoder and decoder are both stacks; a stack with a tenth of the largest one's parameters is a
# detail of the model (a convolutional stem, a head).
_WORTH_A_STACK = 0.1
_LISTED = 12  # names in a hint: two lines of a terminal


def repeated_blocks(model: nn.Module) -> list[str]:
    """Return the names of the repeated blocks, in the order of the model.

    A block is a child of a ModuleList or Sequential, has children of its own, and its class occurs
    at least twice. The class with the most parameters is taken, and those that hold a tenth as
    many and overlap with none that is taken. A stage, which only runs a Sequential of such blocks,
    gives way to them. Raises UsageError, saying what to write, if there are none.
    """
    stacks = _stacks(model)
    for kind in [kind for kind in stacks if _is_stage(kind, stacks)]:
        del stacks[kind]
    sizes = {kind: sum(map(_size, blocks)) for kind, blocks in stacks.items()}
    largest = max(sizes.values(), default=0)
    taken: list[nn.Module] = []
    for kind in sorted(stacks, key=lambda kind: -sizes[kind]):
        if sizes[kind] >= _WORTH_A_STACK * largest and not _overlap(taken, stacks[kind]):
            taken += stacks[kind]
    if not taken:
        raise _no_blocks(model)
    return [name for name, module in model.named_modules() if module in taken]


_Stacks = dict[type[nn.Module], list[nn.Module]]


def _stacks(model: nn.Module) -> _Stacks:
    """Group the modules that may be blocks by class; plain Sequentials only if nothing else is."""
    found: _Stacks = defaultdict(list)
    for child in _in_containers(model):
        if next(child.children(), None) is not None and _size(child):
            found[type(child)].append(child)
    several = {kind: blocks for kind, blocks in found.items() if len(blocks) > 1}
    named = {kind: blocks for kind, blocks in several.items() if kind not in _CONTAINERS}
    return named or {kind: blocks for kind, blocks in several.items() if kind is nn.Sequential}


def _in_containers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield each child of a container once, however many hold it."""
    seen: set[nn.Module] = set()
    for parent in model.modules():
        if isinstance(parent, _CONTAINERS):
            yield from (child for child in parent.children() if child not in seen)
            seen.update(parent.children())


def _is_stage(kind: type[nn.Module], stacks: _Stacks) -> bool:
    """Whether at least half of what its modules hold are blocks of another class in Sequentials.

    In a ModuleList they may be experts, of which a block has many and is not made up.
    """
    inside = sum(
        _size(child)
        for module in stacks[kind]
        for parent in module.modules()
        if isinstance(parent, nn.Sequential) and parent is not module
        for child in parent.children()
        if type(child) is not kind and type(child) in stacks
    )
    return 2 * inside >= sum(map(_size, stacks[kind])) > 0


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _overlap(taken: list[nn.Module], blocks: list[nn.Module]) -> bool:
    """Whether a block of the one stack is inside a block of the other."""
    inside_taken = {module for block in taken for module in block.modules()}
    inside_blocks = {module for block in blocks for module in block.modules()}
    return not inside_taken.isdisjoint(blocks) or not inside_blocks.isdisjoint(taken)


def _no_blocks(model: nn.Module) -> UsageError:
    names = [name for name, module in model.named_modules() if name and any(module.children())]
    names = names or [name for name, _ in model.named_modules() if name]
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    listed = f"; modules: {', '.join(names[:_LISTED])}{more}" if names else ""
    return UsageError(
        f"{type(model).__name__} has no repeated blocks: no two children of a ModuleList or "
        "Sequential are of one class and have children themselves",
        hint=f"name the modules by a glob, such as modules='encoder.*'{listed}",
    )
