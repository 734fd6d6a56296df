"""The memory ledger: where the peak of a training step goes, to the byte.

    with MemoryLedger(model, optimizer) as ledger:
        ledger.inputs(batch)
        ...one training step, any loop...
    record = ledger.record(precision="bf16")

It watches every operation below autograd and follows storages, not tensors. The total counts what
``torch.distributed._tools.mem_tracker.MemTracker`` counts, at the same moments (after each
operation), so that on a CPU both give the same number; the categories are finer: weight copies
made by autocast, saved activations, optimizer temporaries and inputs stand apart.

Cost: a few microseconds an operation. Phases, modules and roles are found by the ledger itself.
Limitations are in docs/memory-ledger.md.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from narrowcast.compiling import eagerly, is_compiled
from narrowcast.errors import UsageError
from narrowcast.memory.attribution import (
    Moment,
    held_at,
    lines_of,
    modules_of,
    peak_of,
    timeline_of,
    without,
)
from narrowcast.memory.gradients import GradientWatch
from narrowcast.memory.modules import OUTSIDE, ModuleTrace, in_backward
from narrowcast.memory.storages import Holding, Role, StorageBook, tensors_in
from narrowcast.memory.watch import FORWARD, OPTIMIZER, Watch
from narrowcast.records.memory import MemoryRecord
from narrowcast.units import format_bytes

__all__ = ["MemoryLedger"]

# A timeline is drawn, not computed with; more points than pixels say nothing more.
_MOST_POINTS = 500

_OPEN = threading.local()
"""Has `ledger` while one is open on this thread."""


class MemoryLedger:
    """Context manager round one or more training steps on one device; measures once.

    `optimizer` may be one, several (a mapping or a sequence), or None: one that steps without
    having been named here is found when it steps, its state counted only from then on.
    `device` is that of the model's first parameter if not given. Works on fake tensors too.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        optimizer: Optimizer | Mapping[str, Optimizer] | Iterable[Optimizer] | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        self._model = model
        self._optimizers = list(_optimizers_in(optimizer))
        self.device = _device_of(model, device)
        self._book = StorageBook(self.device)
        self._trace = ModuleTrace(model, on_call=self._module_called, on_new=self._claim_new_module)
        self._watch = Watch(self._book, self._trace)
        self._gradients = GradientWatch(self._book, self._trace)
        self._open = ExitStack()
        self._allocator: dict[str, int] = {}
        self._state = "new"

    def inputs(self, batch: Any) -> None:
        """Register the tensors in a batch (any nest of them) as inputs.

        Of a view into something larger, such as the data set, what it covers counts.
        """
        for tensor in tensors_in(batch):
            self._book.claim_part(tensor, Role.INPUT, "(inputs)")

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Draw a batch inside: the data set that it comes from is no part of the step.

        Nothing that is read or made is noted; announce the batch with `inputs` afterwards.
        """
        self._book.forget_parts()
        self._watch.is_paused = True
        try:
            yield
        finally:
            self._watch.is_paused = False

    def gradients(self, tensors: Iterable[Tensor]) -> None:
        """Register what gradients lie in that no parameter shows between two steps: buckets."""
        for tensor in tensors:
            self._book.claim(tensor, Role.GRADIENT, "(buckets)")

    def __enter__(self) -> MemoryLedger:
        if self._state != "new":
            raise UsageError("this MemoryLedger has measured already", hint="make a new one")
        if getattr(_OPEN, "ledger", None) is not None:
            raise UsageError(
                "a MemoryLedger was entered inside another one on the same thread: each would "
                "count what the other does",
                hint="close the outer one first; one ledger can hold several optimizers",
            )
        self._state = "open"
        self._claim_state()
        if self.device.type == "cuda" and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats(self.device)
        with ExitStack() as stack:
            if self._model is not None:
                # The hooks of all modules (in ModuleTrace) do not show keyword arguments.
                called = self._model.register_forward_pre_hook(self._called, with_kwargs=True)
                stack.callback(called.remove)
                stack.enter_context(eagerly(self._model))
            stack.enter_context(_observed_resizes(self._resized))
            stack.enter_context(self._trace)
            stack.enter_context(self._gradients)
            pre = register_optimizer_step_pre_hook(self._before_optimizer)
            stack.callback(pre.remove)
            post = register_optimizer_step_post_hook(self._after_optimizer)
            stack.callback(post.remove)
            stack.enter_context(
                torch.autograd.graph.saved_tensors_hooks(self._watch.pack, self._watch.unpack)
            )
            stack.enter_context(self._watch)
            self._open = stack.pop_all()
        _OPEN.ledger = self
        self._watch.mark(OUTSIDE)
        return self

    def __exit__(self, *_: object) -> None:
        _OPEN.ledger = None
        self._open.close()
        self._watch.mark(OUTSIDE)  # what has been let go since the last operation shows here
        self._allocator = _allocator_peaks(self.device)
        self._claim_state()
        self._book.close()
        self._state = "closed"

    def record(self, *, recipe: str = "", precision: str = "", batch_size: int = 0) -> MemoryRecord:
        """Return the ledger of the peak; raises UsageError before the context has been left."""
        moments = self._moments()
        peak = moments[peak_of(moments)]
        held = held_at(self._book.log, peak)
        return MemoryRecord(
            recipe=recipe,
            precision=precision,
            device=self.device.type,
            batch_size=batch_size,
            total_peak_bytes=peak.bytes,
            peak_phase=peak.phase,
            peak_module=peak.module,
            lines=lines_of(held),
            modules=modules_of(held),
            timeline=timeline_of(self._book.log, moments, _MOST_POINTS),
            requested_bytes=self._allocator.get("requested"),
            allocated_bytes=self._allocator.get("allocated"),
            reserved_bytes=self._allocator.get("reserved"),
            notes=tuple(self._notes(held, peak)),
        )

    def events(self) -> Sequence[tuple[Holding, int]]:
        """Return every change of a storage's bytes so far, in order; it grows while open."""
        return self._book.log

    @property
    def peak_bytes(self) -> int:
        """The highest total, as in the record."""
        return max(moment.bytes for moment in self._moments())

    @property
    def peak_seen_bytes(self) -> int:
        """The highest total that anything that watches operations sees, as torch's MemTracker.

        It is above the peak where that is a sum of two gradients, which autograd makes in place
        while nothing watches.
        """
        return self._watch.highest

    def begin_here(self) -> None:
        """Drop the moments so far: peak and timeline are of what follows. Events stay."""
        self._watch.forget()

    def leave_out(self, hidden: Set[Holding]) -> None:
        """Take holdings out of a closed ledger, as if they had never been."""
        if hidden:
            self._book.log[:], self._watch.moments[:] = without(
                hidden, self._book.log, self._moments()
            )

    def peak_lines(self, *phases: str) -> dict[str, int]:
        """Return bytes by category at the highest moment of these phases; they must have run."""
        moments = [moment for moment in self._moments() if moment.phase in phases]
        return self._lines_at(moments[peak_of(moments)])

    def first_lines(self, phase: str) -> dict[str, int]:
        """Return bytes by category after the first operation of a phase, which must have run."""
        return self._lines_at(next(m for m in self._moments() if m.phase == phase))

    def last_lines(self) -> dict[str, int]:
        """Return bytes by category as they were when the context was left."""
        return self._lines_at(self._moments()[-1])

    def _lines_at(self, moment: Moment) -> dict[str, int]:
        return {line.category: line.bytes for line in lines_of(held_at(self._book.log, moment))}

    def _moments(self) -> list[Moment]:
        if self._state != "closed":
            raise UsageError(
                "the MemoryLedger has nothing to report yet",
                hint="run a training step inside `with ledger:` and ask after the block",
            )
        return self._watch.moments

    def _claim_state(self) -> None:
        """Give their roles to everything that outlives a step: on entry, and again on exit."""
        if self._model is not None:
            self._claim_module(self._model)
        for optimizer in self._optimizers:
            self._claim_optimizer(optimizer)

    def _claim_new_module(self, module: nn.Module) -> None:
        if not self._watch.is_paused:
            self._claim_module(module)

    def _claim_module(self, model: nn.Module) -> None:
        for module in model.modules():
            name = self._trace.name_of(module)
            for parameter in module.parameters(recurse=False):
                self._book.claim(parameter, Role.PARAMETER, name)
                self._gradients.follow(parameter)
            for buffer in module.buffers(recurse=False):
                self._book.claim(buffer, Role.BUFFER, name)

    def _claim_optimizer(self, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                owner = self._trace.owner_of(parameter)
                # What the optimizer updates and no module holds is a separate master copy.
                self._book.claim(parameter, Role.MASTER, owner)
                self._gradients.follow(parameter)
                for tensor in tensors_in(optimizer.state.get(parameter, {})):
                    self._book.claim(tensor, Role.OPTIMIZER, owner)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        self._book.resized(storage, self._trace.current(backward=in_backward()))

    def _module_called(
        self, arguments: Any, *, outermost: bool, module: nn.Module | None = None
    ) -> None:
        if self._watch.is_paused:  # a module of the data set's: a transformation
            return
        if module is not None:  # FSDP2 has put whole weights in the place of shards
            for parameter in module.parameters(recurse=False):
                self._book.claim(parameter, Role.PARAMETER, self._trace.name_of(module))
        if in_backward():
            return
        self._watch.phase = FORWARD
        if outermost:
            for tensor in tensors_in(arguments):
                self._claim_as_input(tensor)

    def _called(self, _: nn.Module, arguments: Any, named: dict[str, Any]) -> None:
        self._module_called((arguments, named), outermost=True)

    def _claim_as_input(self, tensor: Tensor) -> None:
        """Take what enters the model from outside for the batch, unless a module produced it."""
        if tensor.requires_grad or tensor.device != self.device:
            return
        holding = self._book.find(tensor)
        if holding is None or holding.module == OUTSIDE:
            self._book.claim(tensor, Role.INPUT, "(inputs)")

    def _before_optimizer(self, optimizer: Optimizer, *_: object) -> None:
        self._watch.phase = OPTIMIZER
        if optimizer not in self._optimizers:
            self._optimizers.append(optimizer)
            self._claim_optimizer(optimizer)

    def _after_optimizer(self, optimizer: Optimizer, *_: object) -> None:
        self._claim_optimizer(optimizer)

    def _notes(self, held: dict[Holding, int], peak: Moment) -> Iterator[str]:
        if self._model is not None and is_compiled(self._model):
            yield (
                "the model is compiled, and ran uncompiled while it was measured: compiled code "
                "allocates where no ledger looks, and takes another amount"
            )
        if self._allocator:
            beyond = self._allocator["allocated"] - peak.bytes
            yield (
                f"the allocator held {format_bytes(beyond)} more at its own peak than the tensors "
                "counted here: blocks rounded up to 512 B, workspaces of cuBLAS and cuDNN, and "
                "tensors of this process outside the step"
            )
        foreign = [h for h in held if h.role == Role.UNATTRIBUTED]
        if foreign:
            yield (
                f"the line 'unattributed' was there before the step and belongs to nothing that "
                f"the ledger was told of; first used in {foreign[0].module}"
            )
        if self._book.only_read:
            size = sum(count for count, _ in self._book.only_read)
            yield (
                f"{format_bytes(size)} from before the step were only read and are not counted, "
                f"first in {self._book.only_read[0][1]}: the data set, or a batch that was not "
                "passed to ledger.inputs()"
            )


@contextmanager
def _observed_resizes(note: Callable[[torch.UntypedStorage], None]) -> Iterator[None]:
    """Note ``UntypedStorage.resize_``, which frees and regrows memory without any operation."""
    original = torch.UntypedStorage.resize_

    @wraps(original)
    def resize_(storage: torch.UntypedStorage, size: int) -> None:
        original(storage, size)
        note(storage)

    torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = original  # type: ignore[method-assign]


def _optimizers_in(
    optimizer: Optimizer | Mapping[str, Optimizer] | Iterable[Optimizer] | None,
) -> Iterable[Optimizer]:
    if optimizer is None:
        return ()
    if isinstance(optimizer, Optimizer):
        return (optimizer,)
    return optimizer.values() if isinstance(optimizer, Mapping) else optimizer


def _device_of(model: nn.Module | None, device: torch.device | str | None) -> torch.device:
    if device is not None:
        named = torch.device(device)
        # Tensors carry an index, and "cuda" does not equal "cuda:0".
        return torch.empty(0, device=named).device if named.type == "cuda" else named
    first = next(model.parameters(), None) if model is not None else None
    return first.device if first is not None else torch.device("cpu")


def _allocator_peaks(device: torch.device) -> dict[str, int]:
    """Return CUDA's requested, allocated and reserved bytes, each at its own peak; {} elsewhere."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return {}
    stats = torch.cuda.memory_stats(device)
    names = ("requested", "allocated", "reserved")
    return {name: stats[f"{name}_bytes.all.peak"] for name in names}
