"""What each choice of a plan does to the result: exact, or lossy and how much.

Exact means that the step computes what fp32 training computes, but for the order of sums. The
planner prefers exact choices where speed does not decide, and every plan it hands out says, in
these words, what it changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from narrowcast.plan import AUTO_BLOCKS, EVERYWHERE, OWN, PLANS, ActivationRule, Plan
from narrowcast.policy import Policy
from narrowcast.records.plan import AxisEffect

__all__ = [
    "NORMS",
    "anonymous",
    "effects_of",
    "is_exact",
    "loss_of",
    "named",
    "short",
    "stores_loss_of",
]

NORMS = PLANS["bf16-split"].activations
"""What bf16 weights always have, so that the statistics of norms are fp32 on CPUs too."""

# The order in which lossy choices of one axis are preferred, and what is said of each.
_COMPUTE = {
    "fp32": (0, "computes in fp32"),
    "tf32": (1, "rounds the factors of matrix products to 10 bits; sums stay fp32"),
    "fp16": (2, "rounds products to fp16 under autocast; weights stay fp32, the loss is scaled"),
    "bf16": (2, "rounds products to bf16 under autocast; weights stay fp32"),
}
_LINEARS = {
    "fp8": (2, "rounds the factors of linear layers' products to fp8, with a scale for each"),
    "fp8-emulated": (2, "rounds as fp8 would, and takes longer than bf16: for results, not speed"),
}
_BF16_WEIGHTS = (3, "computes on bf16 weights, with bf16 activations and gradients")
_WEIGHTS = {
    "fp32": (0, "keeps fp32 weights"),
    "split16": (0, "keeps the fp32 master of each weight exactly, as bf16 and 16 bits beside it"),
    "split8": (1, "keeps 24 of the master's 32 bits"),
    "stochastic": (2, "keeps no master: bf16 weights, rounded at random without bias"),
}
_STATES = {
    "fp32": (0, "keeps the optimizer's moments in fp32"),
    "bf16": (1, "rounds the optimizer's moments to bf16"),
    "int8": (2, "keeps the optimizer's moments as 8-bit codes, block by block"),
    "int4": (3, "keeps the optimizer's moments as 4-bit codes, block by block"),
}
_LEVERS = {
    "checkpoint": (
        0,
        "computes blocks again in backward instead of keeping what is inside",
    ),
    "offload": (0, "keeps what backward needs in the host's memory"),
    "int8": (2, "keeps what backward needs as 8-bit codes"),
    "e4m3": (3, "keeps what backward needs in 8-bit floats"),
    "remake": (0, "makes again in backward what is cheap to make, for the same bits"),
    "narrow_norm": (1, "lets norms read and write 16 bits; their statistics stay fp32"),
}

_SHARING = {
    "ddp": "lets each rank hold the whole model and compute its part of a batch, and adds up the "
    "gradients",
    "fsdp2": "lets each rank hold its rows of each weight and state and compute its part of a "
    "batch, and adds up the gradients",
}
_SPLIT_STATISTICS = 2
"""How lossy batch norms are that see parts of a batch."""


def effects_of(
    plan: Plan, *, batch_norm: bool, parallel: str = "", world: int = 1
) -> tuple[AxisEffect, ...]:
    """Say what a plan changes, axis by axis; `batch_norm`: the model's statistics see the batch.

    `parallel` is how `world` ranks share the training, if they do.
    """
    effects = [effect for effect, _ in _effects(plan, batch_norm=batch_norm)]
    if parallel:
        effects.append(_sharing(parallel, world, batch_norm=batch_norm)[0])
    return tuple(effects)


def is_exact(plan: Plan, *, batch_norm: bool) -> bool:
    """Whether every choice of a plan is exact."""
    return loss_of(plan, batch_norm=batch_norm) == 0


def loss_of(plan: Plan, *, batch_norm: bool, parallel: str = "") -> int:
    """Return how lossy a plan is, for ranking alone: the sum over its choices; 0 is exact."""
    own = sum(loss for _, loss in _effects(plan, batch_norm=batch_norm))
    return own + (_sharing(parallel, 1, batch_norm=batch_norm)[1] if parallel else 0)


def stores_loss_of(plan: Plan) -> int:
    """Return how lossy a plan's stores of weights and states are; 0 is exact."""
    effects = _effects(plan, batch_norm=False)
    return sum(loss for effect, loss in effects if effect.axis in ("weights", "states"))


def _effects(plan: Plan, *, batch_norm: bool) -> Iterator[tuple[AxisEffect, int]]:
    policy = plan.policy
    narrow = policy.param == policy.compute != "fp32"
    loss, says = _BF16_WEIGHTS if narrow else _COMPUTE[policy.compute]
    if loss:
        choice = f"{policy.compute} weights" if narrow else f"{policy.compute} autocast"
        yield _effect("precision", choice, loss, says)
    if policy.linears != "compute":
        yield _effect("linear layers", policy.linears, *_LINEARS[policy.linears])
    if plan.weights not in (OWN, "fp32"):
        yield _effect("weights", plan.weights, *_WEIGHTS[plan.weights])
    elif narrow:
        yield _effect("weights", policy.param, 3, "keeps no master: small updates are lost")
    if plan.states not in (OWN, "fp32"):
        yield _effect("states", plan.states, *_STATES[plan.states])
    if plan.gradients == "release":
        yield _effect("gradients", "release", 0, "uses each gradient up during backward")
    for lever, modules in _rules(plan).items():
        loss, says = _LEVERS[lever]
        yield _effect("activations", f"{lever} on {modules}", loss, says)
    if plan.loss != "whole":
        yield _effect("loss", plan.loss, 0, "computes the logits in chunks that never coexist")
    if plan.micro_batches > 1:
        yield _micro_batches(plan.micro_batches, batch_norm=batch_norm)


def _micro_batches(parts: int, *, batch_norm: bool) -> tuple[AxisEffect, int]:
    says = "sums the gradients of parts of the batch"
    if batch_norm:
        says += ", but batch norm sees the statistics of a part and not of the whole batch"
    return _effect("micro-batches", str(parts), _SPLIT_STATISTICS if batch_norm else 0, says)


def _sharing(parallel: str, world: int, *, batch_norm: bool) -> tuple[AxisEffect, int]:
    says = _SHARING[parallel]
    if batch_norm:
        says += "; batch norm sees the statistics of a rank's part and not of the whole batch"
    choice = f"{parallel} on {world} ranks"
    return _effect("parallel", choice, _SPLIT_STATISTICS if batch_norm else 0, says)


def _effect(axis: str, choice: str, loss: int, says: str) -> tuple[AxisEffect, int]:
    return AxisEffect(axis=axis, choice=choice, exact=loss == 0, says=says), loss


def _rules(plan: Plan) -> dict[str, str]:
    """Map each lever to the modules that it is on, in words."""
    found: dict[str, list[str]] = {}
    for rule in plan.activations:
        modules = {AUTO_BLOCKS: "all blocks", EVERYWHERE: "all modules"}.get(rule.modules)
        found.setdefault(rule.lever, []).append(modules or rule.modules)
    return {lever: ", ".join(modules) for lever, modules in found.items()}


def named(plan: Plan) -> Plan:
    """Return the plan under the name of a known one that equals it, or one made of its choices.

    The policy takes the plan's name, by which evaluations in the training precision are told.
    """
    for known in PLANS.values():
        if anonymous(known) == anonymous(plan):
            return known
    name = short(plan)
    return replace(plan, name=name, policy=replace(plan.policy, name=name))


def anonymous(plan: Plan) -> Plan:
    """Return the plan under no name of its own: names change neither a byte nor a second.

    The policy is called after its formats, by which a user knows it.
    """
    formats = _formats(plan.policy)
    policy = replace(plan.policy, name=formats)
    return replace(plan, name=f"candidate {formats}", policy=policy)


def _formats(policy: Policy) -> str:
    """Write in one word what is computed in, and whether weights are in it too."""
    computes = policy.compute if policy.linears == "compute" else policy.linears
    return f"{computes}w" if policy.param == policy.compute != "fp32" else computes


def short(plan: Plan) -> str:
    """Write a plan's choices in one word: 'bf16w-split16-int8-checkpoint-chunked-x4'.

    The norms that bf16 weights always have are no choice.
    """
    parts = [_formats(plan.policy)]
    if plan.weights != OWN:
        parts += [part for part in (plan.weights, plan.states) if part != "fp32"] or ["fp32"]
    if plan.gradients == "release":
        parts.append("release")
    parts += _short_rules(plan)
    if plan.loss != "whole":
        parts.append(plan.loss)
    if plan.micro_batches > 1:
        parts.append(f"x{plan.micro_batches}")
    return "-".join(parts)


def _short_rules(plan: Plan) -> Iterator[str]:
    usual = NORMS if plan.policy.param == "bf16" else ()
    found: dict[str, list[ActivationRule]] = {}
    for rule in plan.activations:
        if rule not in usual:
            found.setdefault(rule.lever, []).append(rule)
    for lever, rules in found.items():
        is_all = any(rule.modules in (AUTO_BLOCKS, EVERYWHERE) for rule in rules)
        yield lever if is_all else f"{lever}{len(rules)}"
