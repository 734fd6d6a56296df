"""One choice on each axis of memory: what computes, and what holds weights, states and activations.

A policy says in which precision a training computes. A plan adds what the training keeps, and how:

    weights x states     the stores of the optimizer (``optim``)
    gradients            kept until the step, or used up and released during backward
    activations          rules: which modules recompute, offload or compress what they save
    loss                 logits as one tensor, or in chunks that never exist together
    micro_batches        into how many parts one batch of the recipe is split

A precision name is a named point in that space. Plans are values and need no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from narrowcast.errors import UnknownName, UsageError
from narrowcast.policy import ALIASES, POLICIES, Policy

__all__ = [
    "AUTO_BLOCKS",
    "EVERYWHERE",
    "LEVERS",
    "PLANS",
    "STATES",
    "WEIGHTS",
    "ActivationRule",
    "Plan",
    "plan_named",
]

Lever = Literal["checkpoint", "remake", "offload", "int8", "e4m3", "narrow_norm"]
Gradients = Literal["keep", "release"]
Loss = Literal["whole", "chunked", "auto"]

LEVERS: tuple[str, ...] = get_args(Lever)
OWN = "own"
"""The recipe's optimizer as it is."""
WEIGHTS = (OWN, "fp32", "split16", "split8", "stochastic")
STATES = (OWN, "fp32", "bf16", "int8", "int4")
AUTO_BLOCKS = "auto"
"""The repeated blocks of the model, found by ``activations.repeated_blocks``."""
EVERYWHERE = "*"
"""All modules of the model that a lever is for, however few."""
# A folder is called after recipe, plan and seed, in file systems that allow 255 bytes.
_LONGEST_NAME = 120


@dataclass(frozen=True, kw_only=True)
class ActivationRule:
    """What the modules that match a glob on dotted names do with the tensors that they save."""

    modules: str
    lever: Lever

    def __post_init__(self) -> None:
        if self.lever not in LEVERS:
            raise UnknownName.of("activation lever", self.lever, LEVERS)
        if not isinstance(self.modules, str) or not self.modules.strip():
            raise UsageError(
                f"{self.modules!r} names no module",
                hint=f"give a glob on module names, such as 'blocks.*', or {AUTO_BLOCKS!r}",
            )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One choice on each axis. Raises UsageError for two choices that exclude each other."""

    name: str
    policy: Policy
    weights: str = OWN
    """Weight store of the optimizer; ``own`` leaves the recipe's optimizer as it is."""
    states: str = OWN
    """State store of the optimizer."""
    gradients: Gradients = "keep"
    activations: tuple[ActivationRule, ...] = ()
    loss: Loss = "whole"
    """``chunked``: logits never exist together; ``auto``: so where the model has a known head."""
    micro_batches: int = 1

    def __post_init__(self) -> None:
        for what, value, known in (
            ("weight store", self.weights, WEIGHTS),
            ("state store", self.states, STATES),
            ("choice for gradients", self.gradients, get_args(Gradients)),
            ("choice for the loss", self.loss, get_args(Loss)),
        ):
            if value not in known:
                raise UnknownName.of(what, value, known)
        _require_name(self.name)
        self.policy.require_label("plan", self.name)
        object.__setattr__(self, "activations", tuple(self.activations))
        if not isinstance(self.micro_batches, int) or self.micro_batches < 1:
            raise UsageError(f"micro_batches is {self.micro_batches!r}", hint="1 or more")
        if (self.weights == OWN) != (self.states == OWN):
            raise UsageError(
                f"plan {self.name!r} has weights={self.weights!r} and states={self.states!r}: one "
                "of them is the recipe's own and the other is not",
                hint="choose a store for both, or neither",
            )
        self._require_stores_fit()
        self._require_release_fits()

    def _require_stores_fit(self) -> None:
        narrow = self.weights in ("split16", "split8", "stochastic")
        if narrow and self.policy.param != "bf16":
            raise UsageError(
                f"plan {self.name!r} stores weights as {self.weights} (bf16), and policy "
                f"{self.policy.name!r} keeps them in {self.policy.param}",
                hint="use a policy with param='bf16', or weights='fp32'",
            )
        if self.weights == "fp32" and self.policy.param != "fp32":
            raise UsageError(
                f"plan {self.name!r} stores weights as fp32, and policy {self.policy.name!r} keeps "
                f"them in {self.policy.param}",
                hint="use weights='split16', which holds the fp32 master beside bf16 weights",
            )

    def _require_release_fits(self) -> None:
        if self.gradients != "release":
            return
        if self.weights == OWN:
            raise UsageError(
                f"plan {self.name!r} releases gradients, and the recipe's own optimizer cannot "
                "step during backward",
                hint="choose stores, such as weights='split16', states='int8'",
            )
        if self.micro_batches > 1:
            raise UsageError(
                f"plan {self.name!r} releases gradients and accumulates {self.micro_batches} "
                "micro-batches: a gradient that is used up cannot be summed",
                hint="micro_batches=1, or gradients='keep'",
            )
        if self.policy.scaling != "none":
            raise UsageError(
                f"plan {self.name!r} releases gradients under policy {self.policy.name!r}, which "
                "scales the loss: whether a step must be skipped is known only after backward",
                hint="use a bf16 policy, or gradients='keep'",
            )

    def with_policy(self, policy: Policy) -> Plan:
        """Return this plan with another policy."""
        return replace(self, policy=policy)


def _require_name(name: str) -> None:
    """Raise UsageError for a name that could not be a folder's, as it is in a comparison."""
    is_path = name in (".", "..") or any(c in "/\\" or not c.isprintable() for c in name)
    if is_path or not name.strip() or len(name.encode()) > _LONGEST_NAME:
        shown = name if len(name) <= _LONGEST_NAME else f"{name[:20]}... ({len(name)} characters)"
        raise UsageError(
            f"{shown!r} is no name for a plan",
            hint=f"a word without slashes, of at most {_LONGEST_NAME} bytes in UTF-8",
        )


_BF16_WEIGHTS = Policy(name="bf16-split", param="bf16", compute="bf16")
# The statistics of norms are fp32 whatever the device; CPUs keep them in the weights' format.
_NORMS = ActivationRule(modules=EVERYWHERE, lever="narrow_norm")

PLANS: dict[str, Plan] = {name: Plan(name=name, policy=policy) for name, policy in POLICIES.items()}
PLANS |= {
    p.name: p
    for p in (
        Plan(
            name="bf16-split",
            policy=_BF16_WEIGHTS,
            weights="split16",
            states="int8",
            activations=(_NORMS,),
        ),
        Plan(
            name="lean",
            policy=replace(_BF16_WEIGHTS, name="lean"),
            weights="split8",
            states="int4",
            activations=(
                ActivationRule(modules=AUTO_BLOCKS, lever="checkpoint"),
                ActivationRule(modules=EVERYWHERE, lever="remake"),
                _NORMS,
            ),
            loss="auto",
        ),
    )
}
# fp8 saves no memory by itself: the stores do, and the two are one plan.
for _policy in (
    replace(_BF16_WEIGHTS, name="fp8-split", linears="fp8"),
    replace(_BF16_WEIGHTS, name="fp8-split-emulated", linears="fp8-emulated"),
):
    PLANS[_policy.name] = replace(PLANS["bf16-split"], name=_policy.name, policy=_policy)


def plan_named(name: str) -> Plan:
    """Return the plan of this name, or the plain plan of the policy of this name or alias.

    ``auto`` needs a device (``precision.device``). Raises UnknownName with the nearest match.
    """
    canonical = ALIASES.get(name, name)
    if canonical not in PLANS:
        raise UnknownName.of("precision", name, [*PLANS, *ALIASES, "auto"])
    return PLANS[canonical]
