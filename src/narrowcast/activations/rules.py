"""From rules to modules: which levers go where, which exclude each other, and how all come off.

    rule 1: blocks.*      checkpoint          blocks.0   checkpoint > forward
    rule 2: blocks.1      offload       ->    blocks.1   offload > checkpoint > forward
    rule 3: *             narrow_norm         norm       narrow_norm

On one module a lever is put once, whatever rules ask for it, in a fixed order: what handles saved
tensors outside, what makes fewer of them inside.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from narrowcast.activations.blocks import repeated_blocks
from narrowcast.activations.checkpointing import Checkpoint
from narrowcast.activations.compression import Compression
from narrowcast.activations.entries import forget_entries, note_entries
from narrowcast.activations.forward import Lever, levered, put, take_off
from narrowcast.activations.norm_rules import rule_of
from narrowcast.activations.norms import NarrowNorm, narrow_norms, outside_islands, require_narrow
from narrowcast.activations.offload import Offload, require_device
from narrowcast.activations.packing import PACKINGS
from narrowcast.activations.remake import Remake
from narrowcast.activations.rounding_stream import RoundingStream
from narrowcast.errors import UsageError
from narrowcast.plan import AUTO_BLOCKS, EVERYWHERE, ActivationRule
from narrowcast.policy import Policy

__all__ = [
    "Applied",
    "AppliedRule",
    "apply_rules",
    "load_rounding_state",
    "remove_rules",
    "rounding_state",
    "unused_levers",
]

# Outermost first. What handles saved tensors stands outside of what makes fewer of them.
_ORDER = ("offload", "int8", "e4m3", "checkpoint", "remake", "narrow_norm")
_HANDLES_SAVED = ("offload", "int8", "e4m3")
# They hold other modules and are never called themselves.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_LISTED = 12  # module names in a hint: two lines of a terminal

_Placed = dict[nn.Module, dict[str, ActivationRule]]
"""Which levers go on a module, and the rule that asks for each."""


@dataclass(frozen=True, kw_only=True)
class AppliedRule:
    """A rule and the names of the modules that it put its lever on."""

    rule: ActivationRule
    modules: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Applied:
    """What `apply_rules` did, rule by rule, in the order in which they were given."""

    rules: tuple[AppliedRule, ...] = ()


def apply_rules(
    model: nn.Module, rules: Iterable[ActivationRule], policy: Policy, *, seed: int = 0
) -> Applied:
    """Put the levers of `rules` on the modules that they name, in place; replaces an earlier call.

    A rule takes the outermost modules that its glob matches, since these cover what is inside;
    containers are never called and never match. ``narrow_norm`` takes all norms in them, and
    ``remake`` the checkpointed modules in them as well.
    `seed` begins the stream that lossy levers round with (``rounding_state``).

    Raises UsageError for a rule without a match, and for two levers that exclude each other; the
    model is then as it was before.
    """
    matches = [(rule, _matched(model, rule, policy)) for rule in rules]
    placed: _Placed = {}
    for rule, modules in matches:
        for module in modules:
            placed.setdefault(module, {}).setdefault(rule.lever, rule)
    _remake_in_checkpoints(placed)
    names = {module: name for name, module in model.named_modules()}
    for module, levers in placed.items():
        _require_one_handler(names[module], levers)
        _require_nothing_recomputed(names, module, placed)
        _require_exact_inputs(names, module, placed)
        if "offload" in levers:
            require_device(module, names[module])
        if "narrow_norm" in levers:
            require_narrow(model, names[module], policy)
    remove_rules(model)
    stream = RoundingStream(seed)
    for module, levers in placed.items():
        put(module, tuple(_lever(n, module, policy, stream) for n in _ORDER if n in levers))
        if "remake" in levers:
            note_entries(module)
    return Applied(
        rules=tuple(
            AppliedRule(rule=rule, modules=tuple(names[module] for module in modules))
            for rule, modules in matches
        )
    )


def remove_rules(model: nn.Module) -> None:
    """Take all levers off; without effect on a model that has none."""
    for module in model.modules():
        take_off(module)
        forget_entries(module)


def unused_levers(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Map modules that were never called in training to the levers on them, which did nothing.

    Their weights may be used by another module, or a method that is not ``forward``.
    """
    return {
        name: tuple(lever.name for lever in forward.levers)
        for name, module in model.named_modules()
        if (forward := levered(module)) is not None and not forward.was_used
    }


def rounding_state(model: nn.Module) -> dict[str, int]:
    """Return where the stream of roundings of lossy levers stands; {} without such a lever.

    A run that is continued with it rounds as the uninterrupted one would.
    """
    stream = _stream(model)
    return {} if stream is None else stream.state_dict()


def load_rounding_state(model: nn.Module, state: dict[str, int]) -> None:
    """Go on from what `rounding_state` returned; raises UsageError if only one side rounds."""
    stream = _stream(model)
    if (stream is None) != (not state):
        raise UsageError(
            f"the saved state of roundings is {state!r}, and the model has "
            f"{'no lever' if stream is None else 'levers'} that rounds",
            hint="apply the same activation rules as in the run that was saved",
        )
    if stream is not None:
        stream.load_state_dict(state)


def _stream(model: nn.Module) -> RoundingStream | None:
    for module in model.modules():
        forward = levered(module)
        for lever in forward.levers if forward is not None else ():
            if isinstance(lever, Compression):
                return lever.stream
    return None


def _lever(name: str, module: nn.Module, policy: Policy, stream: RoundingStream) -> Lever:
    match name:
        case "checkpoint":
            return Checkpoint(policy)
        case "offload":
            return Offload()
        case "remake":
            return Remake(policy)
        case "narrow_norm":
            rule = rule_of(module)
            assert rule is not None, "narrow_norms chose a module that it does not know"
            return NarrowNorm(rule)
        case _:
            return Compression(PACKINGS[name], stream)


def _matched(model: nn.Module, rule: ActivationRule, policy: Policy) -> list[nn.Module]:
    """Return the modules that a rule puts its lever on, in the order of the model."""
    if rule.modules == AUTO_BLOCKS:
        wanted = set(map(model.get_submodule, repeated_blocks(model)))
    else:
        # Also by the further names of a module that several hold.
        named = model.named_modules(remove_duplicate=False)
        wanted = {module for name, module in named if fnmatchcase(name, rule.modules)}
    if rule.lever == "narrow_norm" and wanted:
        norms = narrow_norms(model, rule, wanted)
        return norms if rule.modules != EVERYWHERE else outside_islands(model, norms, policy)
    outermost = _outermost(model, wanted)
    if not outermost:
        _refuse_unmatched(model, rule)
    if model in outermost and rule.lever == "checkpoint":
        raise UsageError(
            f"the rule {rule.modules!r} checkpoints the whole model: backward would first compute "
            "all of it again, and hold as much as without the rule",
            hint=f"checkpoint its blocks: modules={AUTO_BLOCKS!r}, or a glob such as 'blocks.*'",
        )
    return outermost


def _outermost(module: nn.Module, wanted: set[nn.Module]) -> list[nn.Module]:
    """Return the wanted modules that are in no other wanted one and can be called."""
    found: dict[nn.Module, None] = {}
    stack = [module]
    while stack:
        each = stack.pop()
        if each in wanted and not isinstance(each, _CONTAINERS):
            found[each] = None
        else:
            stack.extend(reversed(list(each.children())))
    covered = {inner for each in found for inner in each.modules() if inner is not each}
    return [each for each in found if each not in covered]


def _require_one_handler(name: str, levers: dict[str, ActivationRule]) -> None:
    handlers = [lever for lever in _HANDLES_SAVED if lever in levers]
    if len(handlers) > 1:
        raise _conflict(
            name, levers[handlers[0]], levers[handlers[1]], "each says where saved tensors go"
        )
    lossy = [lever for lever in handlers if lever in PACKINGS]
    if lossy and "checkpoint" in levers:
        raise _conflict(
            name,
            levers[lossy[0]],
            levers["checkpoint"],
            "a checkpointed module saves its inputs alone, and what is computed again from rounded "
            "inputs has biased gradients",
        )


def _require_nothing_recomputed(
    names: dict[nn.Module, str], module: nn.Module, placed: _Placed
) -> None:
    """Refuse levers on saved tensors inside of a checkpoint, where none outlives the forward."""
    outer = placed[module].get("checkpoint")
    if outer is None:
        return
    for inside in module.modules():
        for lever in _HANDLES_SAVED:
            if inside is not module and lever in placed.get(inside, {}):
                raise _conflict(
                    names[inside],
                    placed[inside][lever],
                    outer,
                    f"it is part of the checkpointed {names[module]!r}, whose saved tensors are "
                    "computed again and not kept",
                )


def _require_exact_inputs(names: dict[nn.Module, str], module: nn.Module, placed: _Placed) -> None:
    """Refuse to remake from what is rounded, where the results go into anything but a product."""
    lossy = [lever for lever in placed[module] if lever in PACKINGS]
    for inside in module.modules() if lossy else ():
        if "remake" in placed.get(inside, {}):
            raise _conflict(
                names[inside],
                placed[module][lossy[0]],
                placed[inside]["remake"],
                "what is made again from rounded inputs has biased gradients",
            )


def _remake_in_checkpoints(placed: _Placed) -> None:
    """Put ``remake`` on checkpointed modules within its own: these run again without the rest."""
    for module, levers in list(placed.items()):
        for inside in module.modules() if "remake" in levers else ():
            if "checkpoint" in placed.get(inside, {}):
                placed[inside].setdefault("remake", levers["remake"])


def _conflict(name: str, one: ActivationRule, other: ActivationRule, reason: str) -> UsageError:
    return UsageError(
        f"levers {one.lever!r} (rule {one.modules!r}) and {other.lever!r} (rule "
        f"{other.modules!r}) exclude each other on {name!r}: {reason}",
        hint="narrow one of the two globs, so that this module keeps one of the levers",
    )


def _refuse_unmatched(model: nn.Module, rule: ActivationRule) -> list[nn.Module]:
    """Raise the error for a rule that matches nothing, with the names that exist."""
    named = {n: m for n, m in model.named_modules(remove_duplicate=False) if n}
    names = [name for name, module in named.items() if not isinstance(module, _CONTAINERS)]
    held = [n for n in named if fnmatchcase(n, rule.modules) and n not in names]
    message = f"the rule {rule.modules!r} (lever {rule.lever!r}) matches no module of the model"
    if held:
        raise UsageError(
            f"{message} that is called: {held[0]!r} is a {type(named[held[0]]).__name__}",
            hint=f"name what is in it, such as {f'{held[0]}.*'!r}",
        )
    near = difflib.get_close_matches(rule.modules, names, n=1, cutoff=0.5)
    guess = f"did you mean {near[0]!r}? " if near else ""
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    raise UsageError(
        message,
        hint=f"{guess}a rule is a glob on dotted module names, or {AUTO_BLOCKS!r}; modules: "
        f"{', '.join(names[:_LISTED])}{more}",
    )
