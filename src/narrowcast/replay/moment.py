"""What a step needs to be taken again, and the promise that taking it again leaves no trace.

A training goes on after a replay as if there had been none, bit for bit, so everything that a
forward and a backward pass write is given back: random states, buffers (running statistics),
gradients, the mode of each module. Steps that are skipped leave the weights alone, so the model of
a failing step is the live one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves  # torch's only walker of nests

from narrowcast.activations.rules import load_rounding_state, rounding_state
from narrowcast.engine.engine import Engine
from narrowcast.errors import UsageError
from narrowcast.memory.storages import storages_of
from narrowcast.randomness import random_state, restore_random_state

__all__ = ["Moment", "untouched"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Moment:
    """One micro-batch of a step, just before its forward pass.

    The batch is held by reference: whoever writes into it afterwards replays something else. The
    weights are not held at all.
    """

    step: int
    """From 1."""
    batch: Any
    """What `compute_loss` gets, on the device."""
    random: Mapping[str, Any]
    """As `randomness.random_state` returns it."""
    scales: Mapping[str, float] = field(default_factory=dict)
    """The scale of each loss."""
    roundings: Mapping[str, int] = field(default_factory=dict)
    """Where the stream of roundings of lossy activation levers stood; empty without one."""
    micro_batch: int = 0
    """Its place among the micro-batches of the step."""

    @classmethod
    def of(
        cls,
        engine: Engine,
        batch: Any,
        step: int,
        *,
        random: Mapping[str, Any] | None = None,
        name: str | None = None,
        micro_batch: int = 0,
    ) -> Moment:
        """Note the moment before a forward pass; `random` where the states were read already.

        `name` is the optimizer's, where the engine has several.
        """
        scales = engine.loss_scales(name)
        if not scales:  # they begin with the first backward pass; whatever the loss will be called
            scales = {"loss": engine._lane(name)._first_scale("loss").scale}
        return cls(
            step=step,
            batch=batch,
            random=random_state() if random is None else random,
            scales=scales,
            roundings=rounding_state(engine.model),
            micro_batch=micro_batch,
        )

    @contextmanager
    def at(self, model: nn.Module) -> Iterator[None]:
        """Stand at this moment: its random states, no gradients, and nothing of it afterwards."""
        with untouched(model, self.batch):
            restore_random_state(dict(self.random))
            load_rounding_state(model, dict(self.roundings))
            yield


@contextmanager
def untouched(model: nn.Module, batch: Any = None) -> Iterator[None]:
    """Give back what passes through a model write, whatever becomes of the block.

    Random states, buffers, gradients (of the model and of the batch), the mode of each module, the
    stream of roundings, and frozen weights that follow the trained ones, as a target network's do;
    hooks that wait for complete gradients, such as those that step during backward, are not called.
    Copies the buffers, and frozen weights that are no larger together than the trained ones. What a
    model keeps in plain attributes is out of reach. Raises UsageError if the model has written into
    another weight, other than rows that an embedding brings down to its ``max_norm``.
    """
    states, roundings = random_state(), rounding_state(model)
    modes = [(module, module.training) for module in model.modules()]
    buffers = _Buffers(model)
    weights = _Weights(model)
    leaves = [*model.parameters(), *_leaves_of(batch)]
    gradients = [(leaf, leaf.grad) for leaf in leaves]
    hooks = [(held, dict(held)) for leaf in leaves if (held := _hooks_of(leaf))]
    try:
        for leaf in leaves:
            leaf.grad = None
        for held, _ in hooks:
            held.clear()
        yield
    finally:
        for held, kept in hooks:
            held.update(kept)
        for leaf, gradient in gradients:
            leaf.grad = gradient
        buffers.give_back()
        weights.give_back()
        for module, mode in modes:
            module.training = mode
        load_rounding_state(model, roundings)
        restore_random_state(states)
    weights.require_unwritten()


def _leaves_of(batch: Any) -> list[Tensor]:
    """List the tensors of a batch that a backward pass would leave gradients on."""
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    return [tensor for tensor in tensors if tensor.is_leaf and tensor.requires_grad]


def _hooks_of(leaf: Tensor) -> dict[int, Any] | None:
    """Return the live table of the hooks that are called when a gradient is complete."""
    held: dict[int, Any] | None = leaf._post_accumulate_grad_hooks
    return held


class _Buffers:
    """The buffers of a model, with copies of what is in them."""

    def __init__(self, model: nn.Module) -> None:
        self._slots = [(module, dict(module._buffers)) for module in model.modules()]
        held = {id(b): b for _, slots in self._slots for b in slots.values() if b is not None}
        self._copies = [(b, b.detach().clone()) for b in held.values() if _is_writable(b)]

    def give_back(self) -> None:
        """Put every buffer in its place, with the values that it had."""
        for module, slots in self._slots:
            for name in module._buffers.keys() - slots.keys():  # made by the forward pass
                del module._buffers[name]
            module._buffers.update(slots)
        for buffer, copy in self._copies:
            _write(buffer, copy)


class _Weights:
    """The weights of a model: copies of those that its own forward pass may write into."""

    def __init__(self, model: nn.Module) -> None:
        limited = [
            module.weight
            for module in model.modules()
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None
        ]
        written: dict[int, Tensor] = {
            id(weight): weight for weight in (*limited, *_following(model))
        }
        self._copies = [(weight, weight.detach().clone()) for weight in written.values()]
        everything: list[Tensor] = list(model.parameters())
        self._places = [(weight, weight.data, _storages(weight)) for weight in everything]
        copied = set(written)
        self._versions = [
            (name, weight, weight._version)
            for name, weight in model.named_parameters()
            if id(weight) not in copied and not weight.is_inference()
        ]

    def give_back(self) -> None:
        for weight, data, storages in self._places:
            if _storages(weight) != storages:  # `weight.data = ...` has put another tensor there
                weight.data = data
        for weight, copy in self._copies:
            _write(weight, copy)

    def require_unwritten(self) -> None:
        written = [name for name, weight, version in self._versions if weight._version != version]
        if written:
            raise UsageError(
                f"the model wrote into its weight {written[0]!r} while a step was replayed, and it "
                "keeps what was written",
                hint="keep in a buffer what a forward pass writes: buffers are given back",
            )


def _storages(tensor: Tensor) -> tuple[int, ...]:
    return tuple(storage._cdata for storage in storages_of(tensor))


def _following(model: nn.Module) -> list[Tensor]:
    """List the frozen weights, where they may be an average of the trained ones.

    A frozen base under small adapters is larger than these, never written, and too large to copy.
    """
    frozen: list[Tensor] = [w for w in model.parameters() if not w.requires_grad]
    trained = sum(w.nbytes for w in model.parameters() if w.requires_grad)
    return frozen if sum(w.nbytes for w in frozen) <= trained else []


def _is_writable(tensor: Tensor) -> bool:
    """Whether its elements are places of their own: nothing writes into an expanded tensor."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return all(stride or size < 2 for size, stride in pairs)


def _write(tensor: Tensor, copy: Tensor) -> None:
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.copy_(copy)
