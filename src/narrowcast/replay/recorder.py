"""Records a step operation by operation, below autocast, where each shows what it computes in.

    with OpRecorder(model, ranges="all") as ops:
        loss = loss_function(model(inputs), targets)
        loss.backward()
        ops.mark(loss, "loss")
    ops.events

No tensor is kept: of each there stay counts by exponent, and of its storage a weak reference, by
which the next operation that reads it knows who wrote it.
"""

from __future__ import annotations

import linecache
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode  # the only way to see below autocast

from narrowcast.errors import UnknownName, UsageError
from narrowcast.precision.cast import format_name
from narrowcast.ranges.histogram import Counted, read
from narrowcast.records.diagnosis import ExecutedOp
from narrowcast.records.ranges import TensorRange
from narrowcast.replay.fidelity import Call, Fidelity, fidelity_of
from narrowcast.replay.flow import Flow, Known, numbers_in, real_parts
from narrowcast.replay.places import Place, Places
from narrowcast.replay.traits import traits_of

__all__ = ["OpRecorder", "Ranges"]

Ranges = Literal["all", "suspects", "none"]
"""Whose values are counted: every operation's, those of operations whose result is not finite, or
nobody's."""

# Counts that wait to be read: 2 KB each, and one wait for the device.
_UNREAD = 512


class _Seen:
    """One operation, until its event is made."""

    __slots__ = (
        "dtype",
        "fidelity",
        "infinite",
        "inputs",
        "keeps",
        "op",
        "outputs",
        "place",
        "results",
        "sources",
        "writers",
    )

    def __init__(self, op: str, place: Place, read: Sequence[Known]) -> None:
        self.op = op
        self.place = place
        self.writers = [known.writers for known in read]
        self.sources = [known.source for known in read]
        self.inputs: Sequence[int] = ()
        """Places of its inputs' ranges among all that were counted."""
        self.outputs: Sequence[int] = ()
        self.dtype = ""
        self.fidelity: Fidelity | None = None
        self.infinite = False
        self.keeps = ""
        self.results: list[str] = []


class OpRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operation that makes floating-point values, while entered, in ``events``.

    Views, and tensors that hold no values yet, are no operations. With `errors` each 16-bit
    operation is done again in fp32 (see `fidelity`). `batch` is the nest of tensors that events are
    to call so. Ranges of a CPU are counted at once; elsewhere nothing waits for the device but
    ``suspects`` and `errors`, once an operation or more.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        ranges: Ranges = "all",
        errors: bool = False,
        batch: Any = None,
    ) -> None:
        if ranges not in get_args(Ranges):
            raise UnknownName.of("choice of ranges", ranges, get_args(Ranges))
        super().__init__()  # type: ignore[no-untyped-call]
        self._places = Places(model)
        self._ranges = ranges
        self._errors = errors
        self._flow = Flow()
        self._flow.name(batch, "batch")
        self._model = model
        self._held: dict[str, Known] = {}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self._flow.name(tensor, name)
            self._held[name] = self._flow.of(tensor)
        self._seen: list[_Seen] = []
        self._unread: list[Counted] = []
        self._read: list[TensorRange] = []
        self._numbers: dict[int, tuple[Counted, int]] = {}
        """By id, while they wait: counts that several operations share, and their numbers."""
        self._events: tuple[ExecutedOp, ...] | None = None
        self._is_paused = False

    def __enter__(self) -> OpRecorder:
        if self._seen:
            raise UsageError("a recorder was entered a second time", hint="make one for each step")
        self._places.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._places.__exit__(*error)
        self._flow = Flow()

    @property
    def events(self) -> tuple[ExecutedOp, ...]:
        """All operations in the order of execution; ask when the recorder has been left."""
        if self._events is None or len(self._events) != len(self._seen):
            self._read_counts()
            self._events = tuple(self._event(index) for index in range(len(self._seen)))
        return self._events

    def mark(self, tensor: Tensor, result: str) -> None:
        """Say what a tensor is to the step: ``loss``, or the parameter that it is the gradient of.

        Call it inside the recorder.
        """
        for index in self._flow.of(tensor).writers[-1:]:
            self._seen[index].results.append(result)

    def kept(self) -> None:
        """Note which results stand in the place of buffers and weights: after the forward pass."""
        for name, tensor in (*self._model.named_parameters(), *self._model.named_buffers()):
            known = self._flow.of(tensor)
            if known is not self._held.get(name):
                for index in known.writers[-1:]:
                    self._seen[index].keeps = name

    def name(self, tensor: Tensor, source: str) -> None:
        """Say what a tensor is that no recorded operation wrote, for `ExecutedOp.sources`."""
        self._flow.name(tensor, source)

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Let what is none of the step's business go by unrecorded."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Wrapper subclasses (deferred logits, DTensor) come apart first; their parts are seen here.
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented
        kwargs = kwargs or {}
        if self._is_paused:
            return func(*args, **kwargs)
        traits = traits_of(func)
        place = self._places.here()  # of views as well, which have autograd nodes too
        if traits is None or not traits.is_seen:
            return func(*args, **kwargs)
        call = Call(func, traits, tuple(args), kwargs)
        inputs = list(call.numbers())[0 if traits.reads_first else 1 :]
        seen = _Seen(traits.name, place, [self._flow.of(tensor) for tensor in inputs])
        if self._ranges == "all" or (self._ranges == "suspects" and traits.is_in_place):
            seen.inputs = self._count(inputs)
        if self._errors:
            call = call.with_copies()
        result = func(*args, **kwargs)
        outputs = list(numbers_in((result,)))
        if outputs:
            self._note(seen, inputs, outputs)
            seen.infinite = call.has_infinite_constant
            if self._errors:
                seen.fidelity = fidelity_of(call, outputs, self._flow)
        return result

    def _note(self, seen: _Seen, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        index = len(self._seen)
        self._seen.append(seen)
        seen.dtype = format_name(outputs[0].dtype)
        for tensor in outputs:
            self._flow.wrote(tensor, index)
        if self._ranges == "suspects":
            if any(map(_is_broken, outputs)):
                seen.inputs = seen.inputs or self._count(inputs)
                seen.outputs = self._count(outputs)
            else:
                seen.inputs = ()
        elif self._ranges == "all":
            seen.outputs = self._count(outputs)

    def _count(self, tensors: Iterable[Tensor]) -> list[int]:
        """Count tensors; returns the numbers under which their ranges will be found."""
        numbers = []
        for tensor in tensors:
            counted = self._flow.count(tensor)
            known = self._numbers.get(id(counted))
            if known is None:
                number = len(self._read) + len(self._unread)
                self._unread.append(counted)
                known = self._numbers[id(counted)] = (counted, number)
            numbers.append(known[1])
        if len(self._unread) >= _UNREAD:
            self._read_counts()
        return numbers

    def _read_counts(self) -> None:
        self._read += read(self._unread)
        self._unread.clear()
        self._numbers.clear()

    def _event(self, index: int) -> ExecutedOp:
        seen = self._seen[index]
        place = seen.place
        inputs = tuple(self._read[number] for number in seen.inputs)
        fed_by = [
            self._writer(writers, inputs[i] if inputs else None)
            for i, writers in enumerate(seen.writers)
        ]
        return ExecutedOp(
            index=index,
            phase=place.phase,
            op=seen.op,
            module=place.module,
            file=place.file,
            line=place.line,
            code=linecache.getline(place.file, place.line).strip() if place.line else "",
            inputs=inputs,
            outputs=tuple(self._read[number] for number in seen.outputs),
            dtype=seen.dtype,
            recomputed=place.recomputed,
            fed_by=tuple(fed_by),
            sources=tuple(
                source if writer < 0 else ""
                for source, writer in zip(seen.sources, fed_by, strict=True)
            ),
            results=tuple(seen.results),
            keeps=seen.keeps,
            infinite_constant=seen.infinite,
            **({} if seen.fidelity is None else vars(seen.fidelity)),
        )

    def _writer(self, writers: tuple[int, ...], values: TensorRange | None) -> int:
        """Choose among those who wrote parts of a tensor: of a broken one, who broke it."""
        if not writers:
            return -1
        if values is None or values.is_finite:
            return writers[-1]
        broken = [w for w in writers if not self._is_finite(w)]
        return broken[-1] if broken else -1 if len(writers) > 1 else writers[0]

    def _is_finite(self, index: int) -> bool:
        return all(self._read[number].is_finite for number in self._seen[index].outputs)


def _is_broken(tensor: Tensor) -> bool:
    """Whether an element is NaN or infinite; reads the device."""
    values = real_parts(tensor)
    if values.layout is not torch.strided:
        values = values._values()
    if values.numel() == 0:
        return False
    return not math.isfinite(torch.linalg.vector_norm(values, math.inf).item())
