"""Which plans a recipe can have: the product of its choices on each axis, less what conflicts.

The product is written out, since a reader has to be able to see what was considered. What two
choices say of each other is ``Plan``'s to know: a combination that it refuses is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from torch import nn

from narrowcast.activations.blocks import repeated_blocks
from narrowcast.engine.stores import planned_optimizer
from narrowcast.errors import NarrowcastError, UnsupportedPrecision, UsageError
from narrowcast.loss.heads import chunked_logits
from narrowcast.plan import (
    AUTO_BLOCKS,
    EVERYWHERE,
    OWN,
    STATES,
    WEIGHTS,
    ActivationRule,
    Plan,
    plan_named,
)
from narrowcast.planning.axes import NORMS, named
from narrowcast.policy import Policy
from narrowcast.precision.cast import prepare_model
from narrowcast.precision.float8 import what_it_saves
from narrowcast.prediction.targets import Target
from narrowcast.recipes.load import Recipe

__all__ = ["REMAKE", "Space", "candidates", "plain_plan", "policies_for", "space_of"]

Rules = tuple[ActivationRule, ...]

CHECKPOINT: Rules = (ActivationRule(modules=AUTO_BLOCKS, lever="checkpoint"),)
OFFLOAD: Rules = (ActivationRule(modules=AUTO_BLOCKS, lever="offload"),)
REMAKE: Rules = (ActivationRule(modules=EVERYWHERE, lever="remake"),)
_BY_DEFAULT = ("fp32", "tf32", "bf16", "bf16-split")
# Neighbours in size differ by at least this, so that a batch with many divisors gives few choices.
_WIDEST = 1.5


@dataclass(frozen=True, kw_only=True)
class Space:
    """What there is to choose from, axis by axis. The first of each axis changes nothing."""

    policies: tuple[Policy, ...]
    narrow_stores: bool
    """Whether the optimizer's rule has stores to choose from."""
    activations: tuple[Rules, ...]
    losses: tuple[str, ...]
    micro_batches: tuple[int, ...]
    release: bool
    batch_norm: bool
    """Whether the model's statistics depend on how the batch is split."""
    notes: tuple[str, ...] = ()


def policies_for(target: Target, precisions: Sequence[str]) -> tuple[Policy, ...]:
    """Return the policies of these precisions; ``auto`` is all that the device is good at.

    Raises UsageError for none, UnknownName, and UnsupportedPrecision for one that was asked for by
    its name.
    """
    if not precisions:
        raise UsageError(
            "no precision was named, and one has to be chosen",
            hint="name some, such as --precisions fp32,bf16, or leave it at auto",
        )
    found: dict[tuple[str, str, str], Policy] = {}
    for name in _expanded(target, precisions):
        policy = target.plan(plan_named(name))[0].policy
        found.setdefault((policy.param, policy.compute, policy.linears), policy)
    return tuple(found.values())


def _expanded(target: Target, precisions: Sequence[str]) -> Iterator[str]:
    for name in precisions:
        if name != "auto":
            yield name
            continue
        able = [default for default in _BY_DEFAULT if _can(target, default)]
        # Where a GPU has no bf16, fp16 is what its tensor cores are for; elsewhere bf16 does as
        # well and needs no loss scaling.
        yield from able if "bf16" in able or not _can(target, "fp16") else (*able, "fp16")


def _can(target: Target, name: str) -> bool:
    try:
        target.plan(plan_named(name))
    except UnsupportedPrecision:
        return False
    return True


def space_of(
    recipe: Recipe,
    model: nn.Module,
    policies: tuple[Policy, ...],
    *,
    batch_size: int,
    keep_batch: bool,
    release: bool,
    offload: bool,
) -> Space:
    """Look at what a model has: blocks, a head, batch norm, an optimizer with stores.

    `model` may have no contents. `release` and `offload` say whether these are to be considered.
    """
    notes = [said for said in dict.fromkeys(map(what_it_saves, policies)) if said]
    batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    narrow = _has_stores(recipe, model, notes)
    return Space(
        policies=tuple(p for p in policies if narrow or p.param == "fp32") or policies[:1],
        narrow_stores=narrow,
        activations=tuple(_activations(model, notes, offload=offload)),
        losses=_losses(model, notes),
        micro_batches=(1,) if keep_batch else _divisors(batch_size, least=2 if batch_norm else 1),
        release=release and narrow,
        batch_norm=batch_norm,
        notes=tuple(notes),
    )


def _has_stores(recipe: Recipe, model: nn.Module, notes: list[str]) -> bool:
    """Whether our optimizers can take the place of the recipe's."""
    plan = Plan(name="trial", policy=Policy(name="fp32"), weights="fp32", states="fp32")
    try:
        prepare_model(model, plan.policy, next(model.parameters()).device)
        planned_optimizer(recipe.build_optimizer(model), model, plan)
    except UsageError as error:
        notes.append(f"the optimizer keeps its stores: {error.message}")
        return False
    return True


def _activations(model: nn.Module, notes: list[str], *, offload: bool) -> Iterator[Rules]:
    yield ()
    yield REMAKE
    try:
        blocks = repeated_blocks(model)
    except UsageError as error:
        notes.append(f"no checkpointing: {error.message}")
        return
    if len(blocks) > 2:
        yield tuple(ActivationRule(modules=b, lever="checkpoint") for b in blocks[1::2])
    yield CHECKPOINT
    if offload:
        yield OFFLOAD
        yield (*CHECKPOINT, *OFFLOAD)
    yield (*CHECKPOINT, *REMAKE)


def _losses(model: nn.Module, notes: list[str]) -> tuple[str, ...]:
    try:
        chunked_logits(model).remove()
    except UsageError as error:
        notes.append(f"no chunked loss: {error.message}")
        return ("whole",)
    return ("whole", "chunked")


def _divisors(size: int, *, least: int) -> tuple[int, ...]:
    """Return into how many parts of at least `least` samples a batch can be cut: 1, 2, 4, ..."""
    found = [1]
    for parts in range(2, size // least + 1):
        if size % parts == 0 and parts >= _WIDEST * found[-1]:
            found.append(parts)
    return tuple(found)


def candidates(space: Space) -> list[Plan]:
    """Write out the product: every combination that ``Plan`` accepts, under a name that says it."""
    found: dict[Plan, None] = {}
    for policy, activations, loss, parts in product(
        space.policies, space.activations, space.losses, space.micro_batches
    ):
        for weights, states in _stores(policy, narrow=space.narrow_stores):
            for gradients in _gradients(weights, states, release=space.release):
                changes: dict[str, object] = {
                    "weights": weights,
                    "states": states,
                    "gradients": gradients,
                    "activations": _with_norms(policy, activations),
                    "loss": loss,
                    "micro_batches": parts,
                }
                plan = _plan(policy, changes)
                if plan is not None and plan not in found:
                    found[plan] = None
    return list(found)


def plain_plan(space: Space, rules: Rules = ()) -> Plan:
    """Return the plan of the first policy that changes nothing but its activations."""
    policy = space.policies[0]
    name = f"plain {policy.name}"
    return Plan(name=name, policy=policy, activations=_with_norms(policy, rules))


def _with_norms(policy: Policy, rules: Rules) -> Rules:
    return (*rules, *NORMS) if policy.param == "bf16" else rules


def _plan(policy: Policy, changes: dict[str, object]) -> Plan | None:
    try:
        return named(replace(Plan(name=policy.name, policy=policy), **changes))  # type: ignore[arg-type]
    except NarrowcastError:
        return None


def _gradients(weights: str, states: str, *, release: bool) -> Iterator[str]:
    """Offer fp32 throughout for release alone: the recipe's own optimizer holds the same."""
    if (weights, states) != ("fp32", "fp32"):
        yield "keep"
    if release and weights != OWN:
        yield "release"


def _stores(policy: Policy, *, narrow: bool) -> Iterator[tuple[str, str]]:
    """Pairs of stores that a policy can have; the recipe's own come first."""
    stores = [name for name in WEIGHTS if name != OWN] if narrow else []
    if policy.param == "fp32" or not narrow:
        yield OWN, OWN
        stores = [name for name in stores if name == "fp32"]
    for weights in stores:
        for states in STATES:
            if states != OWN:
                yield weights, states
