"""How many bytes weights and states will take, from the sizes of the parameters alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from narrowcast.errors import UnknownName
from narrowcast.optim.adamw import ADAMW
from narrowcast.optim.lion import LION
from narrowcast.optim.rule import Rule
from narrowcast.optim.sgd import SGD_RULE
from narrowcast.optim.states import fitted, state_store
from narrowcast.optim.weights import weight_store

__all__ = ["RULES", "Bytes", "bytes_for"]

RULES: dict[str, Rule] = {"adamw": ADAMW, "sgd": SGD_RULE, "lion": LION}


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """What parameters hold from the first step on, without gradients."""

    weights: int
    remainders: int
    states: int

    @property
    def total(self) -> int:
        return self.weights + self.remainders + self.states


def bytes_for(
    numels: Iterable[int],
    *,
    rule: str,
    weights: str,
    states: str,
    hyperparameters: Mapping[str, Any] | None = None,
) -> Bytes:
    """Return the bytes of parameters with these numbers of elements, the same as will be held.

    `hyperparameters` matter where a rule keeps nothing without them: SGD needs ``momentum``.
    """
    if rule not in RULES:
        raise UnknownName.of("update rule", rule, RULES)
    store, asked = weight_store(weights), state_store(states)
    moments = RULES[rule].moments({"momentum": 0.0, **(hyperparameters or {})})
    held = [0, 0, 0]
    for numel in numels:
        held[0] += numel * store.dtype.itemsize
        held[1] += store.nbytes(numel) - numel * store.dtype.itemsize
        held[2] += sum(fitted(asked, numel).nbytes(numel, moment) for moment in moments)
    return Bytes(weights=held[0], remainders=held[1], states=held[2])
