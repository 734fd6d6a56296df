"""What a ledger on a device would not see of what a trace sees.

A trace shows all that is allocated, since the allocator needs all. A ledger on a real device sees
the results of operations: not the workspaces and the scratch memory of kernels, and not what lies
in host memory.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

from narrowcast.memory.attribution import Moment
from narrowcast.memory.measure import MemoryLedger
from narrowcast.memory.storages import Holding

__all__ = ["leave_out", "taken_beside"]


def taken_beside(kernels: Any, ledger: MemoryLedger) -> set[Holding]:
    """Return a set that fills with what kernels take beside their results, once they take it."""
    found: set[Holding] = set()

    def noting(take: Callable[..., None]) -> Callable[..., None]:
        def taken(*arguments: Any) -> None:
            before = len(ledger.events())
            take(*arguments)
            found.update(holding for holding, _ in ledger.events()[before:])

        return taken

    for name in ("scratch", "workspace"):
        if hasattr(kernels, name):
            setattr(kernels, name, noting(getattr(kernels, name)))
    return found


def leave_out(ledger: MemoryLedger, hidden: Set[Holding]) -> None:
    """Take holdings out of a closed ledger, as if they had never been."""
    if not hidden:
        return
    log, moments = ledger._book.log, ledger._watch.moments
    kept: list[tuple[Holding, int]] = []
    # Of each prefix of the log: how many of its events stay, and the bytes of those that do not.
    stays, hides = [0], [0]
    for holding, change in log:
        is_hidden = holding in hidden
        if not is_hidden:
            kept.append((holding, change))
        stays.append(len(kept))
        hides.append(hides[-1] + (change if is_hidden else 0))
    log[:] = kept
    moments[:] = [
        Moment(stays[m.logged], m.phase, m.module, m.bytes - hides[m.logged]) for m in moments
    ]
