"""The operation with which a non-finite loss or gradient began, and those that are innocent of it.

An infinity is no failure in itself: masks are made of it, and softmax turns it into an exact zero.
What counts is whether it arrives. So only operations from which non-finite values lead, operation
by operation, to the loss or to a gradient are looked at, and among them those where it began:

    an operation with finite inputs            it made the first one
    an infinity that is meant                  a number in the program, or in a mask: the operation
                                               that made NaN of it, or let it arrive
    NaN that was there before the step         in the batch, in a weight: no operation's doing
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from narrowcast.records.diagnosis import ExecutedOp, Phase

__all__ = ["BadOp", "Origin", "bad_ops", "fed", "first_bad"]

Origin = Literal["operation", "infinite constant", "outside"]


@dataclass(frozen=True, kw_only=True)
class BadOp:
    """An operation with which non-finite values began that reached the loss or a gradient."""

    op: ExecutedOp
    origin: Origin
    """``operation``: its inputs were finite. ``infinite constant``: it made NaN of an infinity that
    is a number in the program, or let it through. ``outside``: a tensor that was there before the
    step was not finite (`source`)."""
    source: str = ""
    """Of an ``outside`` origin: ``batch``, the name of a weight or buffer, ``outside``."""
    reaches: tuple[str, ...] = ()
    """``loss``, and parameters whose gradients it reached, in the order of execution."""
    evidence: tuple[ExecutedOp, ...] = ()
    """The operations that fed it, and itself."""


@dataclass(frozen=True)
class _Meant:
    """An infinity that somebody put there on purpose."""

    root: int
    """The operation that brought it in."""
    source: str


_FAILED = "failed"
"""State of an operation whose non-finite values are owed to a failure, its own or an earlier."""


def first_bad(events: Sequence[ExecutedOp], phase: Phase | None = None) -> BadOp | None:
    """Return the first of `bad_ops`, in one phase or in all; None if nothing failed."""
    return next((bad for bad in bad_ops(events) if phase in (None, bad.op.phase)), None)


def bad_ops(events: Sequence[ExecutedOp]) -> tuple[BadOp, ...]:
    """Return every operation with which non-finite values began that arrived, in order.

    They arrive where an operation has `results`; if none has, at every operation whose result no
    other reads. `events` are all of a step, with ranges (``suspects`` at least).
    """
    reached = _reached(events)
    states: dict[int, _Meant | str] = {}
    found: dict[int, BadOp] = {}
    for index in sorted(reached):
        op = events[index]
        states[index], bad = _judge(op, states)
        if bad is None and op.results and isinstance(states[index], _Meant):
            meant = states[index]
            assert isinstance(meant, _Meant)
            bad = _accuse(events[meant.root], meant.source)
        if bad is not None and bad.op.index not in found:
            found[bad.op.index] = bad
    return tuple(
        BadOp(
            op=bad.op,
            origin=bad.origin,
            source=bad.source,
            reaches=reached[index],
            evidence=(*fed(bad.op, events), bad.op),
        )
        for index, bad in sorted(found.items())
    )


def fed(op: ExecutedOp, events: Sequence[ExecutedOp]) -> tuple[ExecutedOp, ...]:
    """Return the operations that wrote an operation's inputs, and what wrote those of casts."""
    found: dict[int, ExecutedOp] = {}
    waiting = [op]
    while waiting:
        for index in waiting.pop().fed_by:
            if index >= 0 and index not in found:
                found[index] = events[index]
                if "_to_copy" in events[index].op:
                    waiting.append(events[index])
    return tuple(found[index] for index in sorted(found))


def _is_broken(op: ExecutedOp) -> bool:
    return any(not values.is_finite for values in op.outputs)


def _broken_inputs(op: ExecutedOp) -> Iterator[tuple[int, str, bool]]:
    """Yield writer, source and whether there is NaN, for each input that is not finite."""
    for values, writer, source in zip(op.inputs, op.fed_by, op.sources, strict=False):
        if not values.is_finite:
            yield writer, source, values.nans > 0


def _reached(events: Sequence[ExecutedOp]) -> dict[int, tuple[str, ...]]:
    """Map each operation with non-finite values that arrive to the results that they arrive at."""
    names = [name for op in events for name in op.results]
    read = set() if names else {index for op in events for index in op.fed_by}
    # One bit a result; writers come before readers, so that one pass backwards is enough.
    bits = {name: 1 << place for place, name in enumerate(names)}
    reached: dict[int, int] = {}
    for op in reversed(events):
        if not _is_broken(op):
            continue
        for name in op.results:
            reached[op.index] = reached.get(op.index, 0) | bits[name]
        if not names and op.index not in read:
            reached.setdefault(op.index, 0)
        if op.index in reached:
            for writer, _, _ in _broken_inputs(op):
                if writer >= 0 and _is_broken(events[writer]):
                    reached[writer] = reached.get(writer, 0) | reached[op.index]
    return {i: tuple(n for n in names if mask & bits[n]) for i, mask in reached.items()}


def _judge(op: ExecutedOp, states: dict[int, _Meant | str]) -> tuple[_Meant | str, BadOp | None]:
    """Return what an operation's non-finite values are, and the accusation if they began here."""
    meant = _Meant(op.index, "") if op.infinite_constant else None
    inputs = list(_broken_inputs(op))
    for writer, source, has_nan in inputs:
        state = states.get(writer)
        if state == _FAILED:
            return _FAILED, None
        if isinstance(state, _Meant):
            meant = meant or state
        elif has_nan:
            return _FAILED, _accuse(op, source or "outside")
        else:
            meant = meant or _Meant(op.index, source or "outside")
    if meant is None:
        return _FAILED, BadOp(op=op, origin="operation")
    if any(values.nans for values in op.outputs):
        return _FAILED, _accuse(op, meant.source)
    return meant, None


def _accuse(op: ExecutedOp, source: str) -> BadOp:
    return BadOp(op=op, origin="outside" if source else "infinite constant", source=source)
