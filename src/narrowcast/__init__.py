"""Narrowcast: mixed precision training for PyTorch that fits, is proved, and explains itself.

Public names load on first use (PEP 562), so that ``import narrowcast`` costs nothing and the
command line answers before torch is loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from narrowcast.diagnosis.diagnose import diagnose as diagnose
    from narrowcast.diagnosis.diagnose import diagnose_training as diagnose_training
    from narrowcast.dropin.autocast import autocast as autocast
    from narrowcast.dropin.grad_scaler import GradScaler as GradScaler
    from narrowcast.engine.engine import Engine as Engine
    from narrowcast.engine.engine import StepReport as StepReport
    from narrowcast.errors import NarrowcastError as NarrowcastError
    from narrowcast.errors import PrecisionError as PrecisionError
    from narrowcast.loss.cross_entropy import linear_cross_entropy as linear_cross_entropy
    from narrowcast.loss.heads import chunked_logits as chunked_logits
    from narrowcast.memory.measure import MemoryLedger as MemoryLedger
    from narrowcast.optim.adamw import AdamW as AdamW
    from narrowcast.optim.lion import Lion as Lion
    from narrowcast.optim.sgd import SGD as SGD
    from narrowcast.plan import ActivationRule as ActivationRule
    from narrowcast.plan import Plan as Plan
    from narrowcast.plan import plan_named as plan_named
    from narrowcast.policy import Policy as Policy
    from narrowcast.policy import policy_named as policy_named
    from narrowcast.prediction.predict import predict_memory as predict_memory
    from narrowcast.prediction.predict import predict_step_memory as predict_step_memory
    from narrowcast.preflight.check import check as check
    from narrowcast.watch.watch import Watch as Watch

__version__ = "0.1.0"

_HOMES = {
    "ActivationRule": "narrowcast.plan",
    "AdamW": "narrowcast.optim.adamw",
    "Engine": "narrowcast.engine.engine",
    "GradScaler": "narrowcast.dropin.grad_scaler",
    "Lion": "narrowcast.optim.lion",
    "MemoryLedger": "narrowcast.memory.measure",
    "NarrowcastError": "narrowcast.errors",
    "Plan": "narrowcast.plan",
    "Policy": "narrowcast.policy",
    "PrecisionError": "narrowcast.errors",
    "SGD": "narrowcast.optim.sgd",
    "StepReport": "narrowcast.engine.engine",
    "Watch": "narrowcast.watch.watch",
    "autocast": "narrowcast.dropin.autocast",
    "check": "narrowcast.preflight.check",
    "chunked_logits": "narrowcast.loss.heads",
    "diagnose": "narrowcast.diagnosis.diagnose",
    "diagnose_training": "narrowcast.diagnosis.diagnose",
    "linear_cross_entropy": "narrowcast.loss.cross_entropy",
    "plan_named": "narrowcast.plan",
    "policy_named": "narrowcast.policy",
    "predict_memory": "narrowcast.prediction.predict",
    "predict_step_memory": "narrowcast.prediction.predict",
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
