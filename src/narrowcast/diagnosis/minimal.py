"""The smallest set of modules, then of single functions, to keep in fp32 so that a training works.

    1. modules     the likeliest first (what the evidence accuses, then what comes nearest to the
                   format's end), then all others from the inside out; `search.smallest_set` asks
                   the replayed steps
    2. less        of each module in the set: are modules inside it enough, or single functions?
    3. later       a training with the set: where another step breaks, the search is made again on
                   both kinds of steps
    4. proof       each member dropped alone, with what the replayed steps gave; and short trainings
                   under other seeds with the set as it is, which decide nothing and are reported

The oracle is `trials.Stage`: the kept steps under a plan, judged by the rules that accused the
training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode  # the only way to see functions that are no modules
from torch.utils._pytree import tree_leaves

from narrowcast.diagnosis.cures import can_be_island
from narrowcast.diagnosis.examine import Examined, examine
from narrowcast.diagnosis.gather import on_its_own
from narrowcast.diagnosis.subject import Subject
from narrowcast.diagnosis.trials import Outcome, Stage
from narrowcast.errors import NarrowcastError
from narrowcast.formats import float_format
from narrowcast.plan import Plan
from narrowcast.records.diagnosis import DroppedModule, Finding, MinimalFp32, ModuleRange, Trial
from narrowcast.replay.step import replay_step
from narrowcast.search import SearchResult, lies_in, smallest_set

__all__ = ["Clues", "kept_in", "minimal_fp32"]

Observe = Callable[[str], None]
# As many trainings as tell a lucky one from a rule, at a price that a laptop can pay.
_TRAININGS = 3
# Steps that a training takes beyond the one that failed.
_BEYOND = 20
# Searches, each on the steps of the one before and on what then broke later.
_MOST_ROUNDS = 4


@dataclass(frozen=True, kw_only=True)
class Clues:
    """What ranks the candidates: findings, and what crossed the borders of the modules."""

    findings: Sequence[Finding]
    ranges: Sequence[ModuleRange]


def minimal_fp32(
    stage: Stage,
    plan: Plan,
    clues: Clues,
    *,
    under_seed: Callable[[int], Subject],
    steps: int,
    failed_at: int | None = None,
    observe: Observe = lambda words: None,
) -> MinimalFp32 | None:
    """Return the smallest set, or None if the training fails with every module in fp32 as well.

    `under_seed` makes the subject again for the short trainings; they take `steps` steps, or some
    beyond `failed_at`.
    """
    length = steps if failed_at is None else min(steps, failed_at + _BEYOND)
    for remaining in reversed(range(_MOST_ROUNDS)):
        found = _search(stage, plan, clues, observe)
        if found is None:
            return None
        observe("training with the smallest set")
        later = examine(stage.subject, found.plan, length, lambda words: None)
        if not later.is_curable or not remaining:
            return _recorded(
                found,
                plan,
                stage.subject,
                steps=length,
                later=later,
                under_seed=under_seed,
                observe=observe,
            )
        # What broke later has to work as well: both kinds of steps are searched on together.
        stage = stage.with_more(later.snapshots)
        clues = replace(clues, findings=(*clues.findings, *later.findings))
    raise AssertionError("the last round returns")


def _recorded(
    found: _Found,
    plan: Plan,
    subject: Subject,
    *,
    steps: int,
    later: Examined,
    under_seed: Callable[[int], Subject],
    observe: Observe,
) -> MinimalFp32:
    """Put the record together, and train under further seeds."""
    first = _trial(subject.seed, steps, later)
    return MinimalFp32(
        modules=found.modules,
        operations=found.operations,
        keep_fp32=found.plan.policy.keep_fp32[len(plan.policy.keep_fp32) :],
        oracle_calls=found.calls,
        candidates=found.candidates,
        unique=found.result.unique,
        alternatives=found.result.alternatives,
        memory_bytes=_price(subject, plan, found.plan),
        dropped=found.dropped,
        trainings=(first, *_trainings(under_seed, found.plan, first.seed + 1, steps, observe)),
    )


@dataclass(frozen=True, kw_only=True)
class _Found:
    """A set with which the kept steps work."""

    plan: Plan
    modules: tuple[str, ...]
    operations: tuple[str, ...]
    dropped: tuple[DroppedModule, ...]
    result: SearchResult
    candidates: int
    calls: int


def _search(stage: Stage, plan: Plan, clues: Clues, observe: Observe) -> _Found | None:
    """Search on the stage's steps; None if they fail with every module in fp32 as well."""
    model = stage.subject.rig(plan).engine.model
    names = _candidates(model, clues, plan.policy.compute)
    oracle = _Oracle(stage, plan, observe)
    result = smallest_set(names, oracle.passes)
    if result is None:
        return None
    modules = _inside(result, names, oracle)
    keep, operations = _functions(modules, model, stage, plan, oracle)
    calls = stage.calls  # those that ranked the candidates count as well
    return _Found(
        plan=kept_in(plan, keep),
        modules=tuple(modules),
        operations=operations,
        dropped=tuple(oracle.without(name, keep) for name in keep),
        result=result,
        candidates=len(names),
        calls=calls,
    )


def kept_in(plan: Plan, names: Sequence[str]) -> Plan:
    """Return the plan with these modules and functions in fp32 too, under a name of its own."""
    entries = tuple(name or "*" for name in names)
    return replace(
        plan,
        name=f"{plan.name}-minimal",
        policy=replace(plan.policy.keeping_fp32(*entries), name=f"{plan.policy.name}-minimal"),
    )


class _Oracle:
    """Tells whether the kept steps work with a set in fp32, and remembers what they gave."""

    def __init__(self, stage: Stage, plan: Plan, observe: Observe) -> None:
        self._stage = stage
        self._plan = plan
        self._observe = observe
        self._outcomes: dict[frozenset[str], Outcome] = {}

    def passes(self, names: frozenset[str]) -> bool:
        return self.outcome(names).works

    def outcome(self, names: frozenset[str]) -> Outcome:
        if names not in self._outcomes:
            self._observe(f"searching the smallest set: {len(self._outcomes) + 1} tries")
            plan = kept_in(self._plan, sorted(names)) if names else self._plan
            self._outcomes[names] = self._stage.try_plan(plan)
        return self._outcomes[names]

    def without(self, name: str, kept: Sequence[str]) -> DroppedModule:
        outcome = self.outcome(frozenset(kept) - {name})
        return DroppedModule(module=name, failed=not outcome.works, outcome=outcome.words)


def _candidates(model: nn.Module, clues: Clues, compute: str) -> list[str]:
    """List the modules that can be kept: the accused first, leaves by peril, then containers."""
    names = [name for name, _ in model.named_modules() if can_be_island(name, model)]
    peril = _peril(clues.ranges, compute)
    accused = [finding.module for finding in clues.findings]
    leaves = [name for name in names if not any(model.get_submodule(name).children())]
    leaves.sort(key=lambda name: -peril.get(name, 0.0))
    containers = sorted(set(names) - set(leaves), key=lambda name: (-name.count("."), name))
    first = [name for name in accused if name in names]
    return [*dict.fromkeys((*first, *leaves, *containers)), ""]


def _peril(ranges: Sequence[ModuleRange], compute: str) -> dict[str, float]:
    """Return how near each module's values come to the end of the format, in either pass."""
    peril: dict[str, float] = {}
    for each in ranges:
        values = each.values
        near = values.amax / float_format(compute).max if values.is_finite else float("inf")
        peril[each.module] = max(near, peril.get(each.module, 0.0))
    return peril


def _inside(found: SearchResult, names: Sequence[str], oracle: _Oracle) -> list[str]:
    """Replace each container that the evidence put first by modules inside it, if they do."""
    kept = list(found.kept)
    for name in found.kept:
        inner = [other for other in names if other != name and lies_in(other, name)]
        if inner and found.fails_without[name]:
            smaller = _with_others(inner, [k for k in kept if k != name], oracle)
            if smaller is not None:
                kept = [k for k in kept if k != name] + list(smaller.kept)
    return kept


def _with_others(
    names: Sequence[str], others: Sequence[str], oracle: _Oracle
) -> SearchResult | None:
    """Search the smallest set of `names` that works together with `others`."""
    return smallest_set(names, lambda some: oracle.passes(some | frozenset(others)))


def _functions(
    modules: Sequence[str], model: nn.Module, stage: Stage, plan: Plan, oracle: _Oracle
) -> tuple[list[str], tuple[str, ...]]:
    """Replace modules by single functions of theirs where these are enough.

    Not where the module writes into buffers that stay 16-bit: what is computed in fp32 would be
    rounded when it is stored. Returns all that is kept, and the functions among it.
    """
    kept = list(modules)
    functions: list[str] = []
    called = functions_called(stage, plan, modules)
    for name in modules:
        single = [f"{name or '*'}:{function}" for function in called[name]]
        others = [other for other in kept if other != name]
        stores_narrow = not plan.policy.keeps_master and _has_buffers(model.get_submodule(name))
        if len(single) < 2 or stores_narrow or oracle.passes(frozenset(others)):
            continue
        smaller = _with_others(single, others, oracle)
        if smaller is not None:
            kept = [*others, *smaller.kept]
            functions += smaller.kept
    return kept, tuple(functions)


def _has_buffers(module: nn.Module) -> bool:
    return any(buffer.is_floating_point() for buffer in module.buffers())


def functions_called(stage: Stage, plan: Plan, modules: Sequence[str]) -> dict[str, list[str]]:
    """Map modules to the functions that they and their children call on floating-point tensors.

    Functions that only look at a tensor in another way compute nothing, and are left out.
    """
    snapshot = stage.snapshots[0]
    engine = on_its_own(stage.subject, plan, snapshot).engine
    watched = {name: _Calls() for name in modules}
    hooks = []
    for name, calls in watched.items():
        module = engine.model.get_submodule(name)
        hooks.append(module.register_forward_pre_hook(calls.enter))
        hooks.append(module.register_forward_hook(calls.leave, always_call=True))
    try:
        replay_step(engine, stage.subject.compute_loss, snapshot.moments[0], ranges=None)
    except NarrowcastError:
        pass  # a step that breaks has called what it has called
    finally:
        for hook in hooks:
            hook.remove()
    return {name: list(calls.names) for name, calls in watched.items()}


class _Calls(TorchFunctionMode):
    """The names of the functions that were called, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, None] = {}

    def enter(self, module: nn.Module, args: Any) -> None:
        self.__enter__()  # type: ignore[no-untyped-call]

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if _computes(result, tree_leaves((args, kwargs))) and name.strip("_").isidentifier():
            self.names.setdefault(name.strip("_"))
        return result


def _computes(result: Any, given: Sequence[Any]) -> bool:
    """Whether floating-point numbers came out that are not simply those that went in."""
    made = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.is_floating_point()]
    read = [t for t in given if isinstance(t, Tensor) and t.is_floating_point()]
    return bool(made and read) and not any(_same_storage(a, b) for a in made for b in read)


def _same_storage(a: Tensor, b: Tensor) -> bool:
    if a.layout is not torch.strided or b.layout is not torch.strided:
        return False
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _price(subject: Subject, plan: Plan, chosen: Plan) -> int | None:
    before, after = subject.peak(plan), subject.peak(chosen)
    return None if before is None or after is None else after - before


def _trainings(
    under_seed: Callable[[int], Subject], plan: Plan, first: int, steps: int, observe: Observe
) -> Iterator[Trial]:
    """Train for a short time under further seeds, and say what a diagnosis says of each."""
    for seed in range(first, first + _TRAININGS - 1):
        observe(f"training with the smallest set, seed {seed}")
        yield _trial(seed, steps, examine(under_seed(seed), plan, steps, lambda words: None))


def _trial(seed: int, steps: int, found: Examined) -> Trial:
    finding = found.findings[0]
    return Trial(
        seed=seed,
        steps=steps,
        works=finding.kind == "fine",
        outcome=f"{finding.kind}: {finding.explanation}",
    )
