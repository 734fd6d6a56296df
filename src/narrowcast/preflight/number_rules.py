"""Rules on numbers that 16 bits cannot hold: small updates and eps, large masks, saturated logs."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator

from narrowcast.formats import FORMATS
from narrowcast.preflight.casts import argument
from narrowcast.preflight.definitions import Scope
from narrowcast.preflight.events import Event, Region
from narrowcast.preflight.products import is_narrow
from narrowcast.preflight.rule import Found, Rule, at
from narrowcast.preflight.script import Script
from narrowcast.preflight.weights import NarrowWeights, narrow_weights

__all__ = ["NUMBER_RULES", "lost_share"]

_TYPICAL_WEIGHT = 0.02
"""The standard deviation that transformers initialise with, and that trained layers stay near."""

_ADAMS = {"Adam": 1e-3, "AdamW": 1e-3, "NAdam": 2e-3, "RAdam": 1e-3, "Adamax": 2e-3}
"""torch's default learning rates; their eps is 1e-8."""

_ADAM_EPS = 1e-8
_LARGEST_LOSS_UNSAID = 0.1
"""Shares of lost updates up to this are left unsaid."""

_MANY_MICRO_BATCHES = 8
_FP16 = FORMATS["fp16"]
"""Half the smallest subnormal and less rounds to 0."""


def lost_share(lr: float, format_: str) -> float:
    """Return the share of weights of N(0, 0.02) that an update of size `lr` leaves as they are.

    An update is lost below half the spacing of the weight's binade: |w| >= 2^e with
    2^e eps / 2 > lr. Sign-like updates (Adam's) have about that size.
    """
    exponent = math.floor(math.log2(2 * lr / FORMATS[format_].eps)) + 1
    return math.erfc(2.0**exponent / _TYPICAL_WEIGHT / math.sqrt(2))


def _number(node: ast.expr | None, scope: Scope, script: Script) -> float | None:
    """Return the number that an expression certainly is."""
    if node is None:
        return None
    values = {_literal(a.value) for a in script.definitions.alternatives(node, scope)}
    return values.pop() if len(values) == 1 else None


def _literal(node: ast.expr) -> float | None:
    match node:
        case ast.Constant(value=bool()):
            return None
        case ast.Constant(value=int() | float() as value):
            return float(value)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            positive = _literal(operand)
            return -positive if positive is not None else None
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            base, power = _literal(left), _literal(right)
            return base**power if base is not None and power is not None else None
        case _:
            return None


def _alone(script: Script) -> Iterator[NarrowWeights]:
    """Yield the 16-bit weights that no scaler steps: those are refused before they get so far."""
    steps = {e.subject for e in script.events if e.kind == "scaled step"}
    for weights in narrow_weights(script):
        if weights.format != "fp16" or weights.optimizer not in steps:
            yield weights


def _adam_eps(script: Script) -> Iterator[Found]:
    for weights in _alone(script):
        name = weights.optimizer_class.rpartition(".")[2]
        given = argument(weights.made, 3, "eps")
        eps = _number(given, weights.scope, script) if given is not None else _ADAM_EPS
        if weights.format != "fp16" or name not in _ADAMS or eps is None:
            continue
        if eps <= _FP16.smallest_subnormal / 2:
            yield at(
                weights.made,
                f"{name} with eps={eps:g} on the fp16 weights of {weights.model} (line "
                f"{weights.line}): eps rounds to 0 in fp16, and the first weight without a "
                "gradient becomes 0/0 = NaN",
            )


def _lost_updates(script: Script) -> Iterator[Found]:
    for weights in _alone(script):
        name = weights.optimizer_class.rpartition(".")[2]
        given = argument(weights.made, 1, "lr")
        lr = _number(given, weights.scope, script) if given is not None else _ADAMS.get(name)
        if lr is None or name not in _ADAMS or lr <= 0:
            continue
        share = lost_share(lr, weights.format)
        if share > _LARGEST_LOSS_UNSAID:
            yield at(
                weights.made,
                f"{name} at lr={lr:g} on the {weights.format} weights of {weights.model} (line "
                f"{weights.line}): of weights around {_TYPICAL_WEIGHT}, {share:.0%} do not change "
                "in a step, since the update rounds away",
            )


def _accumulated_narrow(script: Script) -> Iterator[Found]:
    for weights in narrow_weights(script):
        for region in script.regions:
            for step in region.of("step"):
                if step.subject != weights.optimizer or not step.loops:
                    continue
                count = _micro_batches(step, script)
                backward = next((e for e in region.before(step) if e.kind == "backward"), None)
                if backward is not None and count is not None and count >= _MANY_MICRO_BATCHES:
                    yield at(
                        backward.node,
                        f"adds the gradients of {count:g} micro-batches in {weights.format}, which "
                        f"{weights.model}'s weights have (line {weights.line}): with "
                        f"{FORMATS[weights.format].mantissa_bits + 1} bits, the later ones round "
                        "away",
                    )


def _micro_batches(step: Event, script: Script) -> float | None:
    """Return the N of a step behind ``if (i + 1) % N == 0``."""
    for test in step.guard:
        if "%" not in test or "==" not in test:
            continue
        tree = ast.parse(test.removesuffix("==").strip(), mode="eval").body
        for node in ast.walk(tree):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod):
                return _number(node.right, step.scope, script)
    return None


def _mask(script: Script) -> Iterator[Found]:
    fp16 = [c for c in script.autocasts if "fp16" in c.formats]
    narrow = [w for w in narrow_weights(script) if w.format == "fp16"]
    if not fp16 and not narrow:
        return
    line = fp16[0].line if fp16 else narrow[0].line
    for event in script.events:
        func = event.node.func
        if not isinstance(func, ast.Attribute) or func.attr not in ("masked_fill", "masked_fill_"):
            continue
        constant = argument(event.node, 1, "value")
        value = _mask_value(constant, event, script)
        if value is None or math.isinf(value) or value >= -_FP16.max:
            continue
        if is_narrow(func.value, event, script):
            yield at(
                event.node,
                f"fills products with {value:g}, below the lowest number of fp16, -65504 (autocast "
                f"or half() in line {line}): RuntimeError 'value cannot be converted to type "
                "c10::Half without overflow'",
            )


def _mask_value(node: ast.expr | None, event: Event, script: Script) -> float | None:
    if isinstance(node, ast.Attribute) and node.attr == "min" and isinstance(node.value, ast.Call):
        call = node.value
        is_finfo = script.imports.qualified(call.func) == "torch.finfo"
        formats = script.reader.formats(call.args[0], event.scope) if call.args else frozenset()
        if is_finfo and len(formats) == 1:
            return -FORMATS[next(iter(formats))].max
    return _number(node, event.scope, script)


def _saturated_log(script: Script) -> Iterator[Found]:
    for region in script.regions:
        for event in region.of("call"):
            cast = event.cast
            if cast is None or not cast.formats or cast.formats == {"fp32"}:
                continue
            inside = _logged(event)
            if inside is None or not _has_sigmoid(inside, event, region, script):
                continue
            yield at(
                event.node,
                f"takes the log of a sigmoid that autocast (line {cast.line}) leaves in 16 bits: "
                "it is exactly 1 from about 8 on in fp16 (6 in bf16) and 0 below -17 in fp16, and "
                "the log of 0 is -inf",
            )


def _logged(event: Event) -> ast.expr | None:
    """Return what a call takes the logarithm of; None if it takes none."""
    last = event.name.rpartition(".")[2]
    if event.name.startswith("torch.") and last in ("log", "log2", "log10") and event.node.args:
        return event.node.args[0]
    match event.node:
        case ast.Call(func=ast.Attribute(value=value, attr="log" | "log2" | "log10"), args=[]):
            return value
        case _:
            return None


def _has_sigmoid(node: ast.expr, event: Event, region: Region, script: Script) -> bool:
    """Whether an expression is a bare sigmoid, or 1 minus one, with no eps that fp16 can hold."""
    match node:
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            eps = _number(right, event.scope, script)
            is_lost = eps is not None and 0 < eps <= _FP16.smallest_subnormal / 2
            return is_lost and _has_sigmoid(left, event, region, script)
        case ast.BinOp(left=ast.Constant(value=1 | 1.0), op=ast.Sub(), right=right):
            return _has_sigmoid(right, event, region, script)
        case ast.Call(func=func):
            name = script.imports.qualified(func)
            is_method = isinstance(func, ast.Attribute) and func.attr == "sigmoid"
            is_wide = any(w in ast.unparse(node) for w in (".float(", ".double(", "float32"))
            return (is_method or name.rpartition(".")[2] == "sigmoid") and not is_wide
        case ast.Name():
            options = script.definitions.alternatives(node, event.scope)
            return len(options) == 1 and (
                isinstance(options[0].value, ast.Call)
                and _has_sigmoid(options[0].value, event, region, script)
                and _is_made_in_same_cast(options[0].value, event, region)
            )
        case _:
            return False


def _is_made_in_same_cast(node: ast.expr, event: Event, region: Region) -> bool:
    return any(e.node is node and e.cast is event.cast for e in region.events)


_NUMERICS = "https://docs.pytorch.org/docs/stable/notes/numerical_accuracy.html"

NUMBER_RULES = (
    Rule(
        code="NC301",
        name="adam-eps-in-fp16",
        severity="error",
        fix="keep the weights in fp32 and use autocast; or eps=1e-4 at least",
        source="https://github.com/keras-team/keras/issues/11860",
        find=_adam_eps,
    ),
    Rule(
        code="NC302",
        name="lost-updates",
        severity="warning",
        fix="keep fp32 weights under autocast, or split masters (narrowcast: bf16-split)",
        source="https://github.com/pytorch/torchtune/issues/2254",
        find=_lost_updates,
    ),
    Rule(
        code="NC303",
        name="mask-below-fp16",
        severity="error",
        fix="fill with torch.finfo(scores.dtype).min, or with float('-inf') where no row is empty",
        source="https://github.com/huggingface/transformers/pull/17306",
        find=_mask,
    ),
    Rule(
        code="NC304",
        name="log-of-narrow-sigmoid",
        severity="warning",
        fix="use F.logsigmoid(x) and F.logsigmoid(-x), or a loss that takes logits",
        source="https://github.com/pytorch/pytorch/issues/40497",
        find=_saturated_log,
    ),
    Rule(
        code="NC305",
        name="accumulation-in-16-bits",
        severity="warning",
        fix="accumulate in fp32: keep fp32 weights under autocast",
        source="https://github.com/linkedin/Liger-Kernel/pull/830",
        find=_accumulated_narrow,
    ),
)
