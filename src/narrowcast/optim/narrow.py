"""The optimizer around a rule: parameter groups, stores, steps, and the fp32 master of a weight.

A true ``torch.optim.Optimizer``: schedulers, hooks, closures, groups and state dicts work as ever.
An fp32 parameter that is given to a narrow weight store becomes bf16 in place, and what it loses
goes into its state, so that the master is the number that it was.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT, StateDict

from narrowcast.errors import UsageError
from narrowcast.optim.dispatch import Routine, advance, can_defer, repeat
from narrowcast.optim.layout import Layout, layout_of
from narrowcast.optim.loading import KEEP_FP32, LAYOUT, STEP, adapted, in_order, shield, store_of
from narrowcast.optim.masters import read_master, write_master
from narrowcast.optim.parts import whole_numel
from narrowcast.optim.ranks import agree, are_several
from narrowcast.optim.rule import Rule
from narrowcast.optim.soundness import (
    dense_gradient,
    require_distinct,
    require_held,
    require_storable,
    write_mark,
)
from narrowcast.optim.states import Blocks, Moment, StateStore, fitted, state_store
from narrowcast.optim.step import Item, Numbers, chunk_for
from narrowcast.optim.weights import REMAINDER, WeightStore

__all__ = ["Held", "NarrowOptimizer"]

_REFUSED = {
    "amsgrad": "the running maximum of a rounded moment would only ever grow",
    "capturable": "the numbers of a step are computed on the host",
    "differentiable": "weights and moments are rounded in place",
    "foreach": "it needs temporaries as large as the model; a step here needs at most 16 MiB",
    "fused": "the step is fused by our own kernels where the device has them",
}


def _refuse(rule: str, others: Mapping[str, object]) -> None:
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


def _require_no_capture() -> None:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise UsageError(
            "a step is being captured into a CUDA graph: its numbers, which change every time, "
            "would be frozen",
            hint="capture forward and backward, and step outside of the graph",
        )


_ALIVE: weakref.WeakSet[NarrowOptimizer] = weakref.WeakSet()
"""All optimizers, so that a new one finds who holds the remainder of a parameter."""


def _holder(parameter: Tensor) -> NarrowOptimizer | None:
    """Return the optimizer that holds the remainder of a bf16 parameter as it is now."""
    if parameter.dtype is not torch.bfloat16:
        return None
    return next((o for o in _ALIVE if o._is_current(parameter)), None)


class NarrowOptimizer(Optimizer):
    """An update rule on a weight store and a state store. The rule is the subclass's."""

    rule: ClassVar[Rule]
    _routine: Routine | None = None
    """What the last step left to repeat; not part of a copy."""
    _adopts: bool = True
    """Whether a group that is added changes at once; not while others may yet be refused."""
    _has_agreed: bool = False
    """Whether the ranks of a distributed training have exchanged seeds."""

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        weights: str,
        states: str,
        generator: torch.Generator | None,
        others: Mapping[str, object],
    ) -> None:
        _refuse(self.rule.name, others)
        seed = torch.initial_seed()
        if generator is not None:
            top = 2**63 - 1
            seed = int(torch.randint(top, (), generator=generator, device=generator.device))
        self._adopts = False
        self._versions: dict[Tensor, tuple[int, int, int]] = {}
        super().__init__(params, {**defaults, "weights": weights, "states": states, "seed": seed})
        self._adopts = True
        for group in self.param_groups:
            self._adopt_all(group)
        _ALIVE.add(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, and put its parameters into its weight store."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            state_store(group["states"])
            self.rule.require_sound(group)
            require_distinct(group["params"])
            for position, parameter in enumerate(group["params"]):
                require_storable(parameter, store_of(group, position))
        except Exception:
            self.param_groups.pop()
            raise
        if self._adopts:
            self._adopt_all(group)

    @torch.no_grad()
    def _adopt_all(self, group: dict[str, Any]) -> None:
        self._has_agreed = False
        for position, parameter in enumerate(group["params"]):
            self._adopt(parameter, store_of(group, position))
        self._note_versions(group["params"])

    def _note_versions(self, parameters: Iterable[Tensor]) -> None:
        """Remember that weights and remainders belong together as they are."""
        self._versions.update((parameter, write_mark(parameter)) for parameter in parameters)

    def _is_current(self, parameter: Tensor) -> bool:
        """Whether there is a remainder, and the weight is as it was when the two were noted."""
        has_remainder = self._remainder(parameter) is not None
        return has_remainder and self._versions.get(parameter) == write_mark(parameter)

    def _adopt(self, parameter: Tensor, store: WeightStore) -> None:
        """Put a parameter into its store; an earlier optimizer hands its remainder over."""
        before = _holder(parameter)
        master = parameter.detach() if before is None else before.master(parameter)
        if parameter.dtype is not store.dtype:
            parameter.data = torch.empty_like(master, dtype=store.dtype)
        parts = store.zeros(parameter)
        if parts:
            self.state[parameter].update(parts)
        if master.dtype is not store.dtype:
            write_master(store, master, parameter.detach(), parts.get(REMAINDER))
        if before is not None:
            del before.state[parameter][REMAINDER]

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
        self._require_ready()
        known = self._routine
        if known and known.holds(self.param_groups) and repeat(self.rule, known.kinds, self.state):
            return
        chosen = {p for group in self.param_groups for p in group["params"] if p.grad is not None}
        kinds = advance(self.rule, self._items(chosen))
        self._note_versions(chosen)
        self._routine = None if kinds is None else Routine.of(self.param_groups, kinds)

    @torch.no_grad()
    def step_parameters(
        self, parameters: Iterable[Tensor], *, if_finite: Tensor | None = None
    ) -> None:
        """Step those of these parameters that have a gradient. No hooks are called.

        `if_finite`, a bool of shape () on the device, decides there whether anything changes; only
        where `defers` says so. The step is counted either way: see `uncount_step`.
        """
        self._require_ready()
        chosen = {p for p in parameters if p.grad is not None}
        advance(self.rule, self._items(chosen), if_finite)
        self._note_versions(chosen)

    def _require_ready(self) -> None:
        """See that a step may be taken here and now, on all ranks if there are several."""
        _require_no_capture()
        if self._has_agreed or not are_several():
            return
        stores = {group[key] for group in self.param_groups for key in ("weights", "states")}
        if stores != {"fp32"}:
            agree(self.param_groups, self.state)
        self._has_agreed = True

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
                gradient = dense_gradient(parameter)
                state = self.state[parameter]
                states = fitted(asked, whole_numel(parameter))
                layout = layout_of(parameter)
                require_held(parameter, state, weights, states, moments)
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
        require_held(parameter, self.state.get(parameter, {}), store)
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
        require_held(parameter, self.state.get(parameter, {}), store)
        value = value.detach().to(parameter.device)
        write_master(store, value, parameter.detach(), self._remainder(parameter))
        self._note_versions([parameter])

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
                states=fitted(state_store(group["states"]), whole_numel(p)).name,
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
        self._routine = None
        self._has_agreed = False
        super().__setstate__(adapted(self.rule, groups, before, state))
        self._versions = {}
        for group in self.param_groups:
            self._note_versions(group["params"])
        _ALIVE.add(self)

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
