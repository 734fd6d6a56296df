"""Narrowcast: mixed precision training for PyTorch that fits, is proved, and explains itself.

Public names load on first use (PEP 562), so that ``import narrowcast`` costs nothing and the
command line answers before torch is loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from narrowcast.dropin.autocast import autocast as autocast
    from narrowcast.dropin.grad_scaler import GradScaler as GradScaler
    from narrowcast.engine.engine import Engine as Engine
    from narrowcast.engine.engine import StepReport as StepReport
    from narrowcast.errors import NarrowcastError as NarrowcastError
    from narrowcast.errors import PrecisionError as PrecisionError
    from narrowcast.memory.measure import MemoryLedger as MemoryLedger
    from narrowcast.policy import Policy as Policy
    from narrowcast.policy import policy_named as policy_named

__version__ = "0.1.0"

_HOMES = {
    "Engine": "narrowcast.engine.engine",
    "GradScaler": "narrowcast.dropin.grad_scaler",
    "MemoryLedger": "narrowcast.memory.measure",
    "NarrowcastError": "narrowcast.errors",
    "Policy": "narrowcast.policy",
    "PrecisionError": "narrowcast.errors",
    "StepReport": "narrowcast.engine.engine",
    "autocast": "narrowcast.dropin.autocast",
    "policy_named": "narrowcast.policy",
}

__all__ = [  # noqa: PLE0604 -- the table above is the one list of public names
    *_HOMES,
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'narrowcast' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
