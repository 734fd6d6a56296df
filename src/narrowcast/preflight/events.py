"""What a call in a training script does: backward, unscale, clip, step, update, save and so on.

A region is a function (or the module's own lines) with the functions that it calls written out in
their place; its events are its calls in the order in which they stand. Rules look at that order.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from narrowcast.preflight.casts import Autocast
from narrowcast.preflight.definitions import Scope
from narrowcast.preflight.guards import Guard, compatible, merged

__all__ = ["Event", "Kind", "Region", "Scaler", "rarer"]

Kind = Literal[
    "call",
    "scale",
    "backward",
    "unscale",
    "scaled step",
    "update",
    "get_scale",
    "escape",
    "step",
    "scheduler",
    "clip",
    "gradient norm",
    "zero_grad",
    "eval mode",
]


@dataclass(frozen=True, eq=False, kw_only=True)
class Scaler:
    """A gradient scaler by the name that the script gives it."""

    key: str
    line: int = 0
    """Where it is made; 0 where that is in another file."""
    guard: Guard
    """What must hold for it to be on."""
    off: bool = False


@dataclass(frozen=True, eq=False, kw_only=True)
class Event:
    """One call, with all that is known of when it happens."""

    kind: Kind
    node: ast.Call
    name: str
    """The full name of a library's function, or the text of what is called."""
    scope: Scope
    subject: str = ""
    """The optimizer, the scheduler, or whatever the call is about."""
    scaler: str = ""
    """The scaler that is asked, or that the loss was scaled by."""
    is_certain: bool = True
    """False for a loss that comes from out of sight, and may have been scaled there."""
    guard: Guard
    loops: tuple[int, ...] = ()
    varying: frozenset[str] = frozenset()
    """The variables that those loops set."""
    casts: tuple[Autocast, ...] = ()
    """The autocasts that it stands in, the innermost last."""
    depth: int = 0
    """0 for the region's own lines, 1 for those of a function that it calls."""
    is_statement: bool = False
    """Whether nothing is made of what the call returns."""
    text: Callable[[ast.AST], str]
    """How an expression reads with the caller's names in the place of parameters."""

    @property
    def line(self) -> int:
        return self.node.lineno

    @property
    def cast(self) -> Autocast | None:
        """The autocast that is in force, if one certainly is where its own condition holds."""
        inner = self.casts[-1] if self.casts else None
        if inner is None or not inner.is_known or inner.off:
            return None
        return inner if compatible(inner.guard, self.guard) else None

    @property
    def is_of_each(self) -> bool:
        """Whether it is about another object in each iteration, as in ``for opt in optimizers``."""
        return not self.varying.isdisjoint(re.findall(r"\w+", self.subject))

    def fits(self, other: Event) -> bool:
        """Whether both may happen in one run."""
        return compatible(self.guard, other.guard)


@dataclass(frozen=True, eq=False)
class Region:
    """One function, or the module's own lines, and what happens in it in order."""

    name: str
    node: ast.AST
    events: tuple[Event, ...]

    def before(self, event: Event) -> Iterator[Event]:
        """Yield what may have happened before an event in one run, the latest first."""
        place = self.events.index(event)
        yield from (e for e in reversed(self.events[:place]) if e.fits(event))

    def after(self, event: Event) -> Iterator[Event]:
        """Yield what may happen after an event in one run."""
        place = self.events.index(event)
        yield from (e for e in self.events[place + 1 :] if e.fits(event))

    def of(self, *kinds: Kind) -> Iterator[Event]:
        """Yield the events of some kinds."""
        yield from (e for e in self.events if e.kind in kinds)


def rarer(one: Event, other: Event) -> bool:
    """Whether `one` happens only in some of the iterations in which `other` does.

    That is so outside of an inner loop, and behind a test of a step count that the other lacks.
    """
    if one.loops != other.loops:
        return len(one.loops) < len(other.loops) and other.loops[: len(one.loops)] == one.loops
    both = merged(other.guard, one.guard)
    return any("%" in name for name in both if name not in other.guard)
