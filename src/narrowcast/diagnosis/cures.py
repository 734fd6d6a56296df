"""What might cure a training, as a plan each: from its verdict to the changes worth trying.

A cure that cannot be carried out by us (another epsilon in the model's code, a clamp) is no cure
here: what is listed has been tried.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn

from narrowcast.plan import OWN, PLANS, Plan
from narrowcast.policy import POLICIES, Policy
from narrowcast.records.diagnosis import Finding

__all__ = ["Cure", "can_be_island", "cures_for", "island"]


@dataclass(frozen=True, kw_only=True)
class Cure:
    """One change, before it was tried."""

    name: str
    words: str
    options: str
    """How the command line says it."""
    code: str
    """How Python says it."""
    plan: Plan
    scale: float | None = None
    """The loss scale to begin with, where that is the change."""


def cures_for(finding: Finding, plan: Plan, *, on_cpu: bool) -> Iterator[Cure]:
    """Yield what may cure a finding under a plan, but for modules in fp32; fp32 comes last."""
    if finding.kind == "lost updates":
        yield from _stores(plan)
    if "scale that keeps them" in finding.figures:
        is_lower = finding.kind == "scale too high"
        yield _initial_scale(plan, finding.figures["scale that keeps them"], is_lower=is_lower)
    serves = finding.figures.get("scale that serves")
    if serves is not None:
        yield _steady_scale(plan, serves)
    policy = plan.policy
    if serves is None and policy.autocasts and policy.autocast_rules == "native" and on_cpu:
        yield Cure(
            name="CUDA's autocast rules",
            words="compute in fp32 what autocast on CUDA computes in fp32: norms, softmax, sums",
            options=f"--precision {plan.name} --autocast-rules cuda",
            code="replace(policy, autocast_rules='cuda')",
            plan=plan.with_policy(replace(policy, autocast_rules="cuda")),
        )
    if policy.compute == "fp16":
        yield _other_format(plan, "bf16", "has the range of fp32, and 3 bits less to compute with")
    elif policy.compute == "bf16" and finding.kind != "lost updates":
        yield _other_format(plan, "fp16", "has 3 bits more to compute with, and a shorter range")
    yield Cure(
        name="fp32",
        words="compute everything in fp32",
        options="--precision fp32",
        code="Engine(model, optimizer, 'fp32')",
        plan=PLANS["fp32"],
    )


def _stores(plan: Plan) -> Iterator[Cure]:
    """Yield what keeps the part of an update that bf16 cannot take."""
    policy = plan.policy
    states = "fp32" if plan.states == OWN else plan.states
    for weights, words in (
        (
            "stochastic",
            "round updates at random: what one step loses, another gains; scratch in the step",
        ),
        ("split16", "keep the lower 16 bits of each fp32 weight beside bf16: 2 B a weight"),
    ):
        yield Cure(
            name=f"weights as {weights}",
            words=words,
            options="",
            code=f"AdamW(..., weights={weights!r}, states={states!r}); SGD and Lion likewise",
            plan=replace(plan, name=f"{plan.name} {weights}", weights=weights, states=states),
        )
    yield Cure(
        name="fp32 masters",
        words="keep weights in fp32, and compute in bf16 under autocast",
        options="--precision bf16",
        code="Engine(model, optimizer, 'bf16')",
        plan=Plan(name="bf16", policy=replace(POLICIES["bf16"], keep_fp32=policy.keep_fp32)),
    )


def _initial_scale(plan: Plan, scale: float, *, is_lower: bool) -> Cure:
    lower = "a lower" if is_lower else "a"
    return Cure(
        name=f"{lower} loss scale of {scale:.0f}",
        words=f"begin with a loss scale of {scale:.0f}, at which nothing overflows",
        options="",
        code=f"Engine(..., {plan.name!r}, scale=DynamicScale(scale={scale:.0f}))",
        plan=plan,
        scale=scale,
    )


def _steady_scale(plan: Plan, scale: float) -> Cure:
    return Cure(
        name="slower growth",
        words=f"begin with a loss scale of {scale:.0f} and raise it after 2000 steps, not sooner",
        options="",
        code=f"Engine(..., {plan.name!r}, scale=DynamicScale(scale={scale:.0f}, interval=2000))",
        plan=plan,
        scale=scale,
    )


def island(modules: Sequence[str], plan: Plan) -> Cure:
    """Return the cure that keeps these modules in fp32."""
    listed = ", ".join(modules)
    options = " ".join(f"--keep-fp32 {name}" for name in modules)
    return Cure(
        name=f"{listed} in fp32",
        words=f"keep {listed} in fp32",
        options=f"--precision {plan.name} {options}",
        code=f"policy.keeping_fp32({', '.join(map(repr, modules))})",
        plan=plan.with_policy(plan.policy.keeping_fp32(*modules)),
    )


def can_be_island(name: str, model: nn.Module) -> bool:
    """Whether a module of this name is there and is called itself, as a list of modules is not."""
    if not name:
        return False
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return False
    return not isinstance(module, (nn.ModuleList, nn.ModuleDict))


def _other_format(plan: Plan, name: str, why: str) -> Cure:
    """Return the same plan under autocast to another 16-bit format, from fp32 weights."""
    policy: Policy = replace(
        POLICIES[name],
        keep_fp32=plan.policy.keep_fp32,
        autocast_rules=plan.policy.autocast_rules,
    )
    own = plan if plan.policy.param == "fp32" else PLANS[name]
    return Cure(
        name=name,
        words=f"compute in {name}, which {why}",
        options=f"--precision {name}",
        code=f"Engine(model, optimizer, {name!r})",
        plan=replace(own, name=name, policy=policy),
    )
