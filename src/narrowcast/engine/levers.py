"""What a plan changes in a model beside its formats: activation levers, chunked logits, fp8 layers.

A named plan asks for "the repeated blocks", "all norms" and "the head" of whatever model it is
given. Where a model has none, that part of the plan is left out and said so: the notes are printed
and recorded.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from narrowcast.activations.blocks import repeated_blocks
from narrowcast.activations.norms import narrow_norms
from narrowcast.activations.rules import apply_rules, remove_rules, unused_levers
from narrowcast.errors import UsageError
from narrowcast.loss.heads import ChunkedLogits, chunked_logits, known_head
from narrowcast.plan import AUTO_BLOCKS, EVERYWHERE, ActivationRule, Plan
from narrowcast.precision.float8 import convert_linears, restore_linears

__all__ = ["Levers", "apply_levers", "remove_levers"]

_WHATEVER_THERE_IS = (AUTO_BLOCKS, EVERYWHERE)
"""Rules that ask for no module in particular."""

_CHUNKED: weakref.WeakKeyDictionary[nn.Module, ChunkedLogits] = weakref.WeakKeyDictionary()
"""The handle of each model whose logits an engine defers."""


@dataclass(frozen=True, kw_only=True)
class Levers:
    """What was put on a model, and what was decided on the way."""

    model: nn.Module
    rules: tuple[ActivationRule, ...] = ()
    chunked: ChunkedLogits | None = None
    notes: tuple[str, ...] = ()

    def widened_products(self) -> int:
        """Count the products of 16-bit factors that the chunked loss has made in fp32 so far."""
        return 0 if self.chunked is None else self.chunked.widened_products

    def without_effect(self) -> tuple[str, ...]:
        """Say which levers did nothing in the steps so far, and why that is; after a step."""
        return tuple(self._without_effect())

    def _without_effect(self) -> Iterator[str]:
        if self.rules:
            for name, levers in unused_levers(self.model).items():
                where = repr(name) if name else "the whole model"
                yield f"{', '.join(levers)} on {where} did nothing: the module was not called"
        handle = self.chunked
        if handle is None:
            return
        if handle.materialised:
            operations = ", ".join(sorted(set(handle.materialised)))
            yield f"the logits of {handle.head!r} were computed whole, for {operations}"
        elif not handle.chunked_calls:
            yield f"chunked loss did nothing: no cross-entropy of the logits of {handle.head!r}"


def apply_levers(model: nn.Module, plan: Plan) -> Levers:
    """Put the plan's levers on the model, in place of those of an earlier plan.

    Raises UsageError for rules that match nothing or exclude each other.
    """
    remove_levers(model)
    converted = convert_linears(model, plan.policy, head=known_head(model))
    rules, notes = _rules_for(model, plan)
    applied = apply_rules(model, rules, plan.policy)
    notes += [
        f"{each.rule.lever}: {_listed(each.modules)}"
        for each in applied.rules
        if each.rule.modules in _WHATEVER_THERE_IS
    ]
    chunked = None
    if plan.loss != "whole":
        try:
            chunked = _CHUNKED[model] = chunked_logits(model)
            notes.append(f"loss: in chunks, from the inputs of {chunked.head!r}")
        except UsageError as error:
            if plan.loss == "chunked":
                raise
            notes.append(f"loss: whole, since {error.message}")
    return Levers(model=model, rules=rules, chunked=chunked, notes=(*converted, *notes))


def remove_levers(model: nn.Module) -> None:
    """Take off what an earlier engine put on."""
    restore_linears(model)
    remove_rules(model)
    handle = _CHUNKED.pop(model, None)
    if handle is not None:
        handle.remove()


def _rules_for(model: nn.Module, plan: Plan) -> tuple[tuple[ActivationRule, ...], list[str]]:
    """Return the rules that this model can have; the others become notes."""
    rules: list[ActivationRule] = []
    left_out: dict[str, list[str]] = {}
    for rule in plan.activations:
        try:
            if rule.modules == AUTO_BLOCKS:
                repeated_blocks(model)
            if rule.modules == EVERYWHERE and rule.lever == "narrow_norm":
                narrow_norms(model, rule, set(model.modules()))
            rules.append(rule)
        except UsageError as error:
            left_out.setdefault(error.message, []).append(rule.lever)
    notes = [f"without {', '.join(sorted(set(e)))}: {why}" for why, e in left_out.items()]
    return tuple(rules), notes


def _listed(names: tuple[str, ...], most: int = 4) -> str:
    if not names:
        return "no module, as all of them are fp32 islands"
    shown = [name or "the whole model" for name in names[:most]]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")
