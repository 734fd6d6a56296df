"""The ways to train one model that are timed beside each other: by hand, by us, with the peers.

Every arm starts from a copy of the same weights and takes whole steps on the same batch. The hand
written loop is the one that everybody copies, with fused AdamW; a peer's optimizer takes the place
of AdamW in it. Ours is the engine with the plan's own stores, as ``narrowcast train`` runs it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from narrowcast.data import to_device
from narrowcast.plan import Plan, plan_named
from narrowcast.policy import Policy, policy_named
from narrowcast.profiling import Bench
from narrowcast.recipes.load import Recipe

__all__ = ["Arm", "Subject", "hand", "ours", "peers"]

Step = Callable[[], object]
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A recipe's model with its first weights on the CPU, and one batch."""

    recipe: Recipe
    model: nn.Module
    data: Any
    batch: Any
    device: torch.device

    def fresh(self) -> nn.Module:
        return copy.deepcopy(self.model)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train: `build` returns a function that takes a step."""

    name: str
    kind: str
    policy: Policy
    build: Callable[[Subject], Step]
    plan: Plan | None = None


def hand(precision: str, *, make: Callable[[Any], Optimizer] | None = None, name: str = "") -> Arm:
    """Return the torch.amp loop written out, with the recipe's fused AdamW or another optimizer."""
    dtype = _AUTOCAST.get(precision)

    def build(subject: Subject) -> Step:
        device = subject.device.type
        model = subject.fresh().to(subject.device).train()
        batch = to_device(subject.batch, subject.device)
        loss_of = subject.recipe.module.loss
        with warnings.catch_warnings(action="ignore"):
            optimizer = make(model.parameters()) if make else subject.recipe.build_optimizer(model)
        scaler = torch.amp.GradScaler(device, enabled=precision == "fp16")

        def step() -> None:
            with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
                loss = loss_of(model, batch)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

        return step

    policy = policy_named(precision)
    return Arm(
        name=name or f"torch.amp {precision}",
        kind="peer" if make else "torch.amp",
        policy=policy,
        build=build,
    )


def ours(plan: Plan | str, *, name: str = "") -> Arm:
    """Return our engine with a plan."""
    plan = plan_named(plan) if isinstance(plan, str) else plan

    def build(subject: Subject) -> Step:
        bench = Bench.of(
            subject.recipe,
            plan,
            subject.device,
            data=subject.data,
            batch=subject.batch,
            model=subject.fresh(),
        )
        return bench.step

    return Arm(
        name=name or f"narrowcast {plan.name}",
        kind="narrowcast",
        policy=plan.policy,
        plan=plan,
        build=build,
    )


def peers() -> Iterator[Arm]:
    """Yield the hand-written bf16 loop with each peer's optimizer; one that is absent says so."""

    def torchao(name: str) -> Callable[[Any], Optimizer]:
        def make(parameters: Any) -> Optimizer:
            import torchao.optim

            return getattr(torchao.optim, name)(parameters, lr=1e-4)

        return make

    def bitsandbytes(parameters: Any) -> Optimizer:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, lr=1e-4)

    yield hand("bf16", make=torchao("AdamW8bit"), name="torch.amp bf16, torchao AdamW8bit")
    yield hand("bf16", make=torchao("AdamW4bit"), name="torch.amp bf16, torchao AdamW4bit")
    yield hand("bf16", make=bitsandbytes, name="torch.amp bf16, bitsandbytes AdamW8bit")
    yield _flashoptim()


def _flashoptim() -> Arm:
    """Return FlashOptim's own way: bf16 weights, whose rest it keeps in 8 bits, and no autocast."""

    def build(subject: Subject) -> Step:
        import flashoptim

        model = subject.fresh().to(subject.device, torch.bfloat16).train()
        optimizer = flashoptim.FlashAdamW(list(model.parameters()), lr=1e-4)
        moved: Sequence[Any] = to_device(subject.batch, subject.device)
        batch = [t.bfloat16() if t.is_floating_point() else t for t in moved]
        loss_of = subject.recipe.module.loss

        def step() -> None:
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    return Arm(
        name="bf16 weights, FlashOptim AdamW", kind="peer", policy=policy_named("bf16"), build=build
    )
