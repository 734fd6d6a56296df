"""The optimizer around a rule: parameter groups, stores, steps, and the fp32 master of a weight.

A true ``torch.optim.Optimizer``: schedulers, hooks, closures, groups and state dicts work as ever.
An fp32 parameter that is given to a narrow weight store becomes bf16 in place, and what it loses
goes into its state, so that the master is the number that it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT, StateDict

from narrowcast.errors import UsageError
from narrowcast.optim.dispatch import Kind, advance, can_defer, repeat
from narrowcast.optim.layout import Layout, layout_of
from narrowcast.optim.loading import KEEP_FP32, LAYOUT, STEP, adapted, in_order, shield, store_of
from narrowcast.optim.masters import read_master, write_master
from narrowcast.optim.rule import Rule
from narrowcast.optim.states import Blocks, Moment, StateStore, fitted, state_store
from narrowcast.optim.step import Item, Numbers, chunk_for
from narrowcast.optim.weights import REMAINDER, WeightStore

__all__ = ["Held", "NarrowOptimizer", "refuse", "require_storable"]

_REFUSED = {
    "amsgrad": "the running maximum of a rounded moment would only ever grow",
    "capturable": "the numbers of a step are computed on the host",
    "differentiable": "weights and moments are rounded in place",
    "foreach": "it needs temporaries as large as the model; a step here needs at most 16 MiB",
    "fused": "the step is fused by our own kernels where the device has them",
}


def refuse(rule: str, others: Mapping[str, object]) -> None:
    """Raise for arguments that torch's optimizers take and ours do not; None and False pass."""
    for name, value in others.items():
        if name not in _REFUSED:
            raise TypeError(f"{rule}() got an unexpected keyword argument {name!r}")
        if value:
            raise UsageError(f"{rule}({name}={value!r}): {_REFUSED[name]}", hint="leave it out")


@dataclass(frozen=True, kw_only=True)
class Held:
    """What one parameter holds at this moment."""

    group: int
    name: str | None
    """As given in ``named_parameters()``, where the optimizer was built from them."""
    shape: tuple[int, ...]
    weights: str
    states: str
    """The store in use: fp32 for small tensors, whatever was asked for."""
    nbytes: int


@dataclass(frozen=True)
class _Plan:
    """A step that can be repeated while groups, stores and parameters are what they were."""

    kinds: list[Kind]
    shapes: list[tuple[Any, ...]]
    idle: list[Tensor]
    """Parameters without a gradient."""

    @classmethod
    def of(cls, groups: list[dict[str, Any]], kinds: list[Kind]) -> _Plan:
        idle = [p for group in groups for p in group["params"] if p.grad is None]
        return cls(kinds, [_shape(group) for group in groups], idle)

    def holds(self, groups: list[dict[str, Any]]) -> bool:
        return self.shapes == [_shape(group) for group in groups] and all(
            parameter.grad is None for parameter in self.idle
        )


def _shape(group: dict[str, Any]) -> tuple[Any, ...]:
    """Return what of a group decides how its parameters are stored and which they are."""
    moments = group.get("momentum", 0) != 0
    return id(group["params"]), len(group["params"]), group["weights"], group["states"], moments


def _require_no_capture() -> None:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise UsageError(
            "a step is being captured into a CUDA graph: its numbers, which change every time, "
            "would be frozen",
            hint="capture forward and backward, and step outside of the graph",
        )


class NarrowOptimizer(Optimizer):
    """An update rule on a weight store and a state store. The rule is the subclass's."""

    rule: ClassVar[Rule]
    _plan: _Plan | None = None
    """What the last step left to repeat; not part of a copy."""

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        weights: str,
        states: str,
        *,
        generator: torch.Generator | None,
    ) -> None:
        seed = torch.initial_seed()
        if generator is not None:
            top = 2**63 - 1
            seed = int(torch.randint(top, (), generator=generator, device=generator.device))
        super().__init__(params, {**defaults, "weights": weights, "states": states, "seed": seed})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, and put its parameters into its weight store."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            state_store(group["states"])
            self.rule.require_sound(group)
            for position, parameter in enumerate(group["params"]):
                require_storable(parameter, store_of(group, position))
        except Exception:
            self.param_groups.pop()
            raise
        for position, parameter in enumerate(group["params"]):
            self._adopt(parameter, store_of(group, position))

    @torch.no_grad()
    def _adopt(self, parameter: Tensor, store: WeightStore) -> None:
        master = parameter.detach()
        if parameter.dtype is not store.dtype:
            parameter.data = torch.empty_like(master, dtype=store.dtype)
        parts = store.zeros(parameter)
        if parts:
            self.state[parameter].update(parts)
        if master.dtype is not store.dtype:
            write_master(store, master, parameter.detach(), parts.get(REMAINDER))

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient; returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_all()
        return loss

    @torch.no_grad()
    def _step_all(self) -> None:
        """Step every parameter that has a gradient; repeats the last step by kernels if it can."""
        _require_no_capture()
        plan = self._plan
        if plan and plan.holds(self.param_groups) and repeat(self.rule, plan.kinds, self.state):
            return
        owned = [p for group in self.param_groups for p in group["params"]]
        kinds = advance(self.rule, self._items({p for p in owned if p.grad is not None}))
        self._plan = None if kinds is None else _Plan.of(self.param_groups, kinds)

    @torch.no_grad()
    def step_parameters(
        self, parameters: Iterable[Tensor], *, if_finite: Tensor | None = None
    ) -> None:
        """Step those of these parameters that have a gradient. No hooks are called.

        `if_finite`, a bool of shape () on the device, decides there whether anything changes; only
        where `defers` says so. The step is counted either way: see `uncount_step`.
        """
        _require_no_capture()
        chosen = {p for p in parameters if p.grad is not None}
        advance(self.rule, self._items(chosen), if_finite)

    def defers(self, parameter: Tensor) -> bool:
        """Whether the device can decide if this parameter steps, without the host waiting."""
        return can_defer(self.rule, parameter)

    def uncount_step(self, parameter: Tensor) -> None:
        """Take back the count of a step that the device decided not to make."""
        state = self.state[parameter]
        state[STEP] -= 1
        if state[STEP] == 0:  # the moments were made for nothing, and the next ones are the first
            for key in [key for key in state if key != REMAINDER]:
                del state[key]

    def _items(self, chosen: set[Tensor]) -> list[Item]:
        """Return what is to be stepped, counted as stepped; raises before anything is counted."""
        items = list(self._prepared(chosen))
        for item in items:
            item.state[STEP] = item.numbers.step
        return items

    def _prepared(self, chosen: set[Tensor]) -> Iterator[Item]:
        ordinal = -1
        chunk = chunk_for(sum(p.numel() for group in self.param_groups for p in group["params"]))
        for group in self.param_groups:
            known: dict[tuple[int, bool, bool, str], Numbers] = {}
            asked, moments = state_store(group["states"]), self.rule.moments(group)
            for position, parameter in enumerate(group["params"]):
                ordinal += 1
                if parameter not in chosen:
                    continue
                weights = store_of(group, position)
                gradient = _gradient(parameter)
                state = self.state[parameter]
                states = fitted(asked, parameter.numel())
                layout = layout_of(parameter)
                is_fresh = _prepare(state, parameter, states, moments, layout)
                step = state.get(STEP, 0) + 1
                key = step, is_fresh, states is asked, weights.name
                if key not in known:
                    known[key] = Numbers(
                        weights=weights,
                        states=states,
                        moments=moments,
                        coefficients=self.rule.coefficients(group, step, is_fresh=is_fresh),
                        maximize=group["maximize"],
                        seed=group["seed"],
                        step=step,
                        chunk=chunk,
                    )
                numbers = known[key]
                yield Item(parameter, gradient, state, group, numbers, layout, ordinal)

    def master(self, parameter: Tensor) -> Tensor:
        """Return the fp32 number that each element stands for, in the parameter's shape.

        A new tensor, but for fp32 parameters, which are their own master; do not write into it.
        """
        store = self._store_for(parameter)
        return read_master(store, parameter.detach(), self._remainder(parameter))

    @torch.no_grad()
    def set_master(self, parameter: Tensor, value: Tensor) -> None:
        """Make fp32 `value` what the parameter stands for; narrower stores round to nearest."""
        store = self._store_for(parameter)
        if value.dtype is not torch.float32 or value.shape != parameter.shape:
            raise UsageError(
                f"a master of {value.dtype} and shape {tuple(value.shape)} for a parameter of "
                f"shape {tuple(parameter.shape)}",
                hint="pass an fp32 tensor of the parameter's shape",
            )
        value = value.detach().to(parameter.device)
        write_master(store, value, parameter.detach(), self._remainder(parameter))

    @torch.no_grad()
    def keep_fp32(self, parameters: Iterable[Tensor]) -> None:
        """Move parameters into the fp32 store, in place and exactly; their states stay."""
        chosen = set(parameters)
        for group in self.param_groups:
            for position, parameter in enumerate(group["params"]):
                if parameter in chosen and parameter.dtype is not torch.float32:
                    parameter.data = self.master(parameter)
                    self.state[parameter].pop(REMAINDER, None)
                    group[KEEP_FP32] = (*group.get(KEEP_FP32, ()), position)

    def nbytes(self) -> int:
        """Return the bytes held now by weights, remainders and states.

        States come into being with a parameter's first step; `sizes` tells what there will be.
        """
        return sum(held.nbytes for held in self.describe())

    def describe(self) -> list[Held]:
        """List what each parameter holds, in the order of the groups."""
        return [
            Held(
                group=index,
                name=names[position] if (names := group.get("param_names")) else None,
                shape=tuple(p.shape),
                weights=store_of(group, position).name,
                states=fitted(state_store(group["states"]), p.numel()).name,
                nbytes=p.nbytes
                + sum(t.nbytes for t in self.state.get(p, {}).values() if isinstance(t, Tensor)),
            )
            for index, group in enumerate(self.param_groups)
            for position, p in enumerate(group["params"])
        ]

    def state_dict(self) -> StateDict:
        """Return torch's state dict, its entries in the order of the parameters."""
        return in_order(super().state_dict())

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load hyperparameters and states; the stores stay as they are.

        A state saved from another store is converted where that is exact and refused otherwise:
        `convert.rounded_state` converts it on purpose. Weights are loaded by the model.
        """
        # torch casts every loaded tensor to the parameter's dtype, which would ruin codes. Our hook
        # comes after the user's, and what it wraps passes through unseen.
        handle = self.register_load_state_dict_pre_hook(shield)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a loaded or an unpickled state."""
        before = self.__dict__.get("state", {})
        groups = self.__dict__.get("param_groups", [])
        self._plan = None
        super().__setstate__(adapted(self.rule, groups, before, state))

    def _remainder(self, parameter: Tensor) -> Tensor | None:
        found = self.state.get(parameter, {}).get(REMAINDER)
        assert found is None or isinstance(found, Tensor)
        return found

    def _store_for(self, parameter: Tensor) -> WeightStore:
        for group in self.param_groups:
            for position, candidate in enumerate(group["params"]):
                if candidate is parameter:
                    return store_of(group, position)
        raise UsageError(
            f"a tensor of shape {tuple(parameter.shape)} is none of the optimizer's parameters",
            hint="pass one of the tensors that the optimizer was built from",
        )


def require_storable(parameter: Tensor, store: WeightStore) -> None:
    """Raise UsageError unless the store can hold the parameter."""
    shown = f"a parameter of shape {tuple(parameter.shape)}"
    if parameter.dtype is torch.float16:
        raise UsageError(
            f"{shown} is fp16: its gradients lose what is below 6e-8 before an optimizer sees "
            "them, and a remainder cannot bring that back",
            hint="keep fp32 weights and compute in fp16 by autocast, or use bf16 weights",
        )
    if parameter.dtype not in (torch.float32, torch.bfloat16):
        raise UsageError(
            f"{shown} is {parameter.dtype}: steps are computed in fp32",
            hint="train fp32 or bf16 parameters, or this one with an optimizer of torch.optim",
        )
    if parameter.dtype is torch.bfloat16 and store.dtype is torch.float32:
        raise UsageError(
            f"{shown} is bf16, and weights={store.name!r} holds fp32",
            hint="use weights='split16', or build the optimizer before the model becomes bf16",
        )
    if parameter.dtype is not store.dtype and parameter.grad is not None:
        raise UsageError(
            f"{shown} has a gradient, which would keep {parameter.dtype} while the parameter "
            f"becomes {store.dtype}",
            hint="build the optimizer before the first backward pass, or clear the gradients",
        )
    if parameter.layout is not torch.strided or (0 in parameter.stride() and parameter.numel() > 1):
        raise UsageError(
            f"{shown} has elements that share memory or none of their own",
            hint="make it a dense tensor: parameter.data = parameter.data.clone()",
        )


def _gradient(parameter: Tensor) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None
    if gradient.layout is not torch.strided:
        raise UsageError(
            f"the gradient of a parameter of shape {tuple(parameter.shape)} is "
            f"{gradient.layout}".replace("torch.", ""),
            hint="build the embedding with sparse=False",
        )
    return gradient


def _prepare(
    state: dict[str, Any],
    parameter: Tensor,
    states: StateStore,
    moments: tuple[Moment, ...],
    layout: Layout,
) -> bool:
    """Make the moments that there are not, and lay out all as the parameter; True if one is new."""
    is_fresh = False
    for moment in moments:
        if states.part_keys(moment)[0] not in state:
            is_fresh = True
            state.update(states.zeros(parameter, moment))
            if layout and isinstance(states, Blocks):
                state[LAYOUT] = layout
    if isinstance(states, Blocks) and moments and tuple(state.get(LAYOUT, ())) != layout:
        raise UsageError(
            f"a parameter of shape {tuple(parameter.shape)} changed its memory format after its "
            f"{states.name} states were made",
            hint="bring the model into its memory format before the first step",
        )
    for key, part in state.items():
        is_alike = isinstance(part, Tensor) and part.dim() > 1 and part.shape == parameter.shape
        if is_alike and layout_of(part) != layout:
            state[key] = torch.empty_like(parameter, dtype=part.dtype).copy_(part)
    return is_fresh
