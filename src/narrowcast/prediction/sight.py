"""What a ledger on a device would not see of what a trace sees.

A trace shows all that is allocated, since the allocator needs all. A ledger on a real device sees
the results of operations: not the workspaces and the scratch memory of kernels, and not what lies
in host memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from narrowcast.memory.measure import MemoryLedger
from narrowcast.memory.storages import Holding

__all__ = ["taken_beside"]


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
