"""FSDP2: every rank holds a part of each weight, and has a block whole only while it computes.

torch's `fully_shard` cuts each parameter along its first dimension, gathers a block's before the
block runs, forward and backward. ``cutting`` says where, ``scattering`` adds up gradients.

    module        p: DTensor over all ranks          what autograd, ledger and names know
    optimizer     p: this rank's rows, plain         the same memory, stepped as any tensor

Gradients meet in the policy's reduction format and are added, not averaged, as in ``replicas``.
Every rank holds what is not cut, and the engine adds up its gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from narrowcast.errors import UsageError
from narrowcast.parallel.buffers import SharedBuffers
from narrowcast.parallel.cutting import OfModel, cut_in_units, require_shardable
from narrowcast.parallel.peers import Ranks
from narrowcast.parallel.replicas import LossFunction, Passes
from narrowcast.parallel.scattering import Exchange

# What torch has for this takes a second and 45 MB to import, which a process that is alone saves.
if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["Piece", "Shards", "is_shared", "require_one_order", "rows_of"]

Master = Callable[[Tensor], Tensor]
"""From this rank's part of a parameter to its fp32 values."""


# Its newer name; the older one warns where there is the newer (torch 2.13).
_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def is_shared(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which every rank holds a part."""
    return hasattr(tensor, "device_mesh")


def rows_of(rows: int, rank: int, ranks: int) -> tuple[int, int]:
    """Return first row and number of rows that `fully_shard` gives a rank; late ones may get 0."""
    each = -(-rows // ranks)
    first = min(rank * each, rows)
    return first, min(each, rows - first)


def require_one_order(orders: Iterable[float]) -> None:
    """Raise UsageError if `Shards.order` differs between ranks.

    Blocks of one size would have been put together from rows of different ones, without a word.
    """
    if len(set(orders)) > 1:
        raise UsageError(
            "the blocks of the model run in another order, or more or less often, on some ranks, "
            "and fsdp2 gathers one block on all ranks at a time",
            hint="let the path through the model not depend on the data, or use --parallel ddp",
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """One rank's part of a parameter, as the model and as the optimizer holds it."""

    name: str
    shared: nn.Parameter
    """The model's parameter, a DTensor."""
    own: nn.Parameter
    """The same memory as a plain parameter; the optimizer's."""
    shape: torch.Size
    """Of the whole."""
    first: int
    """Number of its first row."""

    @property
    def start(self) -> int:
        """How many elements of the whole come before it."""
        return self.first * (self.shape.numel() // max(self.shape[0], 1))


Slot = tuple[nn.Module, str, Piece]
"""A place of a parameter: the module, the name there, and the piece."""


class Shards:
    """A model of which every rank holds a part, and the loss whose gradients meet."""

    def __init__(
        self,
        model: nn.Module,
        compute_loss: LossFunction,
        ranks: Ranks,
        *,
        blocks: Collection[str],
        reduce: torch.dtype,
        passes: Passes,
    ) -> None:
        """`blocks` are gathered one at a time; `reduce` is the format of sums of gradients.

        The parameters of the model become others: see `pieces`.
        """
        from torch.distributed.device_mesh import init_device_mesh

        require_shardable(model)
        self.ranks = ranks
        self.reduce = reduce
        """Format in which gradients are added up."""
        self._passes = passes
        self._compute_loss = compute_loss
        self._buffers = SharedBuffers(model, ranks)
        device = next(model.parameters()).device
        self._mesh = init_device_mesh(device.type, (ranks.size,))
        before = dict(model.named_parameters())
        self._root = cut_in_units(model, blocks, self._mesh)
        self._exchange = Exchange(self._mesh.get_group(), device, reduce)
        self.pieces = tuple(self._pieces(model, before))
        by_id = {id(piece.shared): piece for piece in self.pieces}
        self.named = {
            name: by_id[id(p)]
            for name, p in model.named_parameters(remove_duplicate=False)
            if id(p) in by_id
        }
        """Each piece under all the names that the model has for it."""
        self.parts: dict[Tensor, Tensor] = {before[piece.name]: piece.own for piece in self.pieces}
        """From the parameters that the model had to the parts that the optimizer is to have."""
        self.uncut = [(name, p) for name, p in model.named_parameters() if not is_shared(p)]
        """Parameters that every rank holds whole, by name."""
        self.order = 0.0
        """Stands for the order in which units have been called so far; equal on all ranks."""
        self._called: set[str] = set()
        self._called_before: set[str] = set()
        """Units that earlier micro-batches of the same step called."""
        self._heard: set[Tensor] = set()
        """Parts whose gradients are heard of: a weight may be in several units."""
        self._units = tuple(self._cut_units(by_id))
        for number, (unit, slots) in enumerate(self._units):
            unit.register_forward_pre_hook(self._counting(number))
            _at_first_call(unit, partial(self._listen, slots))

    def _cut_units(self, pieces: dict[int, Piece]) -> Iterator[tuple[nn.Module, list[Slot]]]:
        """Yield the modules that are gathered one at a time, and where their parameters are."""
        from torch.distributed.fsdp import FSDPModule

        for module in cast("nn.Module", self._root).modules():
            if isinstance(module, FSDPModule):
                unit = cast("nn.Module", module)
                yield unit, list(_slots(unit, pieces))

    def _listen(self, slots: list[Slot]) -> None:
        """Hear of the gradients of what has just been gathered: the same tensors ever after."""
        for module, leaf, piece in slots:
            whole = module._parameters[leaf]
            if whole is not None and whole.requires_grad and piece.own not in self._heard:
                self._heard.add(piece.own)
                whole.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    partial(_hand_over, self._exchange, piece.own)
                )

    def _counting(self, number: int) -> Callable[..., None]:
        names = {module: name for name, module in self._root.model.named_modules()}

        def note(unit: nn.Module, *_: object) -> None:
            self._called.add(names.get(unit, ""))
            # Numbers alone are hashed, which is the same in every process; fp64 holds 52 bits.
            self.order = float(hash((self.order, number)) & (2**52 - 1))

        return note

    def _pieces(self, model: nn.Module, before: dict[str, nn.Parameter]) -> Iterator[Piece]:
        for name, parameter in model.named_parameters():
            if not is_shared(parameter):
                continue
            own = nn.Parameter(
                cast("DTensor", parameter).to_local().detach(),
                requires_grad=parameter.requires_grad,
            )
            shape = before[name].shape
            first, _ = rows_of(shape[0], self.ranks.rank, self.ranks.size)
            yield Piece(
                name=name,
                shared=parameter,
                own=own,
                shape=shape,
                first=first,
            )

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.ranks.is_main

    def buckets(self) -> list[Tensor]:
        """Return what gradients lie in, other than themselves: nothing."""
        return []

    def compute_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return this rank's loss; its backward pass adds up gradients if it ends a step."""
        meets = self._passes.meets()
        if self._passes.begins():
            self._buffers.share()
        self._called.clear()
        self._exchange.begin(meets=meets)
        loss: Tensor = self._root(self._compute_loss, batch)
        if meets and loss.requires_grad:
            loss.register_hook(self._end_with_backward)  # type: ignore[no-untyped-call]
        self._require_all_again(meets=meets)
        self._require_still_frozen()
        return loss

    def _end_with_backward(self, _: Tensor) -> None:
        torch.autograd.Variable._execution_engine.queue_callback(self._exchange.end)

    def discard(self) -> None:
        """Forget gradients that have not met."""
        self._exchange.discard()

    def _require_still_frozen(self) -> None:
        """Raise UsageError for a parameter that was frozen when it was cut, and is not any more."""
        for piece in self.pieces:
            if piece.shared.requires_grad and not piece.own.requires_grad:
                raise UsageError(
                    f"parameter {piece.name} was frozen when training began and is not any more, "
                    "and fsdp2 has no place for its gradient",
                    hint="let it require gradients from the start, or use --parallel ddp",
                )

    def _require_all_again(self, *, meets: bool) -> None:
        """Raise UsageError if the last micro-batch leaves out a unit that an earlier one called.

        Its gradients are held until a backward pass ends that goes through it (torch 2.13).
        """
        missing = self._called_before - self._called
        self._called_before = set() if meets else self._called_before | self._called
        if meets and missing:
            raise UsageError(
                f"the last micro-batch of a step does not use {', '.join(sorted(missing))}, which "
                "an earlier one used, and fsdp2 exchanges gradients with the last",
                hint="take one micro-batch a step, or use --parallel ddp",
            )

    def measure(self, function: OfModel, model: nn.Module, batch: Any) -> Any:
        """Return what a function of the model gives without gradients; every rank has to ask."""
        try:
            measured = self._root(function, batch)
        finally:
            # What no backward pass follows would stay gathered, and not follow the next step.
            self._root.reshard()
        require_one_order(order for (order,) in self.ranks.each([self.order]))
        return measured

    def whole(self, piece: Piece, own: Tensor) -> Tensor:
        """Return the whole of which every rank passes its own part, on every rank."""
        rows = -(-piece.shape[0] // self.ranks.size)
        padded = own.new_zeros((rows, *piece.shape[1:]))
        padded[: own.shape[0]].copy_(own)
        gathered = own.new_empty((rows * self.ranks.size, *piece.shape[1:]))
        _ALL_GATHER(gathered, padded)
        return gathered[: piece.shape[0]]

    def as_shared(self, shape: torch.Size, own: Tensor) -> DTensor:
        """Return rows of this rank as part of a whole of `shape`."""
        from torch.distributed.tensor import DTensor, Shard

        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            own, self._mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
        )

    @contextmanager
    def widened(self, master: Master) -> Iterator[None]:
        """Let each block compute from its fp32 masters, gathered when it is called.

        Costs the fp32 size of a block beside its own; those of the root as long as it computes.
        """
        handles = []
        for unit, slots in self._units:
            if all(each.own.element_size() >= 4 for _, _, each in slots):
                continue
            wide = _Wide(self, slots, master)
            handles.append(unit.register_forward_pre_hook(wide.enter))
            handles.append(unit.register_forward_hook(wide.leave, prepend=True, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def renew(self) -> None:
        """Nothing has to be done once an evaluation has ended; see ``Replicas.renew``."""


class _Wide:
    """Puts fp32 masters in the place of one unit's gathered weights while it computes."""

    def __init__(self, shards: Shards, slots: list[Slot], master: Master) -> None:
        self._shards = shards
        self._slots = slots
        self._master = master
        self._narrow: list[nn.Parameter | None] = []

    def enter(self, *_: object) -> None:
        self._narrow = [module._parameters[leaf] for module, leaf, _ in self._slots]
        known: dict[int, nn.Parameter] = {}  # a tied weight is gathered once
        for module, leaf, piece in self._slots:
            if id(piece) not in known:
                whole = self._shards.whole(piece, self._master(piece.own))
                known[id(piece)] = nn.Parameter(whole, requires_grad=False)
            module._parameters[leaf] = known[id(piece)]

    def leave(self, *_: object) -> None:
        for slot, narrow in zip(self._slots, self._narrow, strict=False):
            slot[0]._parameters[slot[1]] = narrow
        self._narrow = []


def _slots(unit: nn.Module, pieces: dict[int, Piece]) -> Iterator[Slot]:
    """Yield the places of the parameters that a unit gathers: not those of units inside of it."""
    from torch.distributed.fsdp import FSDPModule

    stack = [unit]
    while stack:
        module = stack.pop()
        for leaf, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in pieces:
                yield module, leaf, pieces[id(parameter)]
        stack.extend(child for child in module.children() if not isinstance(child, FSDPModule))


def _at_first_call(unit: nn.Module, act: Callable[[], None]) -> None:
    """Call something once, when a unit has been gathered for the first time."""

    def once(*_: object) -> None:
        handle.remove()
        act()

    handle = unit.register_forward_pre_hook(once)


def _hand_over(exchange: Exchange, own: nn.Parameter, whole: Tensor) -> None:
    gradient, whole.grad = whole.grad, None
    assert gradient is not None, "autograd has just put it there"
    exchange.take(own, gradient)
