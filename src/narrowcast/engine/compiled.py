"""What of a plan a compiled model can carry out, and what it leaves to the compiler."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from narrowcast.activations.checkpointing import Checkpoint
from narrowcast.activations.forward import levered
from narrowcast.compiling import CompiledCall, backend_named, compile_model, leave_uncompiled
from narrowcast.errors import UsageError
from narrowcast.parallel.peers import Peers
from narrowcast.plan import Plan
from narrowcast.precision.functions import EnterFunctions
from narrowcast.precision.islands import EnterIsland

__all__ = ["compiled", "levers_beside"]

_KEPT_OTHERWISE = ("offload", "int8", "e4m3")
"""Levers on tensors that autograd saves one by one: compiled code saves what it chose itself."""


def levers_beside(plan: Plan, asked: bool | str) -> Plan:  # noqa: FBT001 -- True, or a name
    """Return the plan whose levers are to be put on the model.

    Raises UsageError for choices that a compiled model cannot carry out.
    """
    if not backend_named(asked):
        return plan
    refused = [rule.lever for rule in plan.activations if rule.lever in _KEPT_OTHERWISE]
    choices = (
        (", ".join(dict.fromkeys(refused)), "which tensors are saved is the compiler's choice"),
        (
            "gradients='release'" if plan.gradients == "release" else "",
            "a compiled backward pass hands over all gradients at once, at its end",
        ),
        (
            "loss='chunked'" if plan.loss == "chunked" else "",
            "a graph holds the head's product as a whole",
        ),
    )
    for choice, why in choices:
        if choice:
            raise UsageError(
                f"plan {plan.name!r} asks for {choice}, and the model is to be compiled: {why}",
                hint="train without compile, or choose a plan without it",
            )
    return replace(plan, loss="whole")


def compiled(
    model: nn.Module,
    plan: Plan,
    asked: bool | str,  # noqa: FBT001 -- True, or a name
    device: torch.device,
    peers: Peers,
) -> tuple[CompiledCall | None, tuple[str, ...]]:
    """Compile a model that is prepared and has its levers; returns it with what is to be said.

    Unless it is `asked` for, it takes off what an earlier engine put on.
    """
    leave_uncompiled(model)
    backend = backend_named(asked)
    if not backend:
        return None, ()
    if peers.cuts:
        raise UsageError(
            f"{peers.kind} and compile: the model's weights are gathered while it runs, which has "
            "not been tried in a compiled graph",
            hint="train with ddp, or without compile",
        )
    checkpoints = any(rule.lever == "checkpoint" for rule in plan.activations)
    if checkpoints:
        _require_nothing_kept_around(model)
    call = compile_model(model, backend, device_type=device.type, checkpoints=checkpoints)
    return call, tuple(_notes(plan, backend))


def _require_nothing_kept_around(model: nn.Module) -> None:
    """Raise UsageError for fp32 that a checkpointed module is to have from outside of it.

    torch.compile traces the inside of a checkpoint without the modes that are in force around it.
    """
    for name, module in model.named_modules():
        hooks = module._forward_pre_hooks.values()
        if not any(isinstance(hook, (EnterIsland, EnterFunctions)) for hook in hooks):
            continue
        for inner, below in module.named_modules(prefix=name):
            wrapped = levered(below)
            if wrapped and any(isinstance(lever, Checkpoint) for lever in wrapped.levers):
                raise UsageError(
                    f"keep_fp32 on {name or 'the whole model'!r} and lever 'checkpoint' on "
                    f"{inner!r} in it cannot be compiled together: the checkpointed part would "
                    "not be in fp32",
                    hint="keep modules inside of the checkpointed ones, or train without compile",
                )


def _notes(plan: Plan, backend: str) -> Iterator[str]:
    yield f"compiled with {backend}: the first step takes long, and each new shape is compiled"
    if plan.loss == "auto":
        yield "loss: whole, since a compiled graph holds the head's product as a whole"
    if any(rule.lever == "remake" for rule in plan.activations):
        yield "remake: left to the compiler, which computes cheap results again as it sees fit"
