"""Rules on whether there is a scaler, of what kind, and what it is used with."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from narrowcast.preflight.casts import keyword
from narrowcast.preflight.classify import reads_gradient
from narrowcast.preflight.events import Event, Region, Scaler
from narrowcast.preflight.rule import Found, Rule, at
from narrowcast.preflight.script import Script
from narrowcast.preflight.weights import narrow_weights

__all__ = ["SCALER_RULES"]

_OTHER_SCALING = ("scaler", "accelerat", "fabric", "deepspeed", "apex", "scale_loss", "loss_scale")
"""What in a script tells that something else may scale the loss."""


def _made_here(script: Script) -> list[Scaler]:
    return [s for s in script.scalers.values() if s.line and not s.off]


def _asked(script: Script, *kinds: str) -> list[Event]:
    """Return the events of some kinds that a scaler has, wherever in the file."""
    return [e for e in script.events if e.scaler and e.kind in kinds]


def _update_missing(script: Script) -> Iterator[Found]:
    steps = _asked(script, "scaled step")
    if steps and _made_here(script) and not _asked(script, "update", "escape"):
        yield at(
            steps[0].node,
            "no update() follows: the second step() raises RuntimeError 'step() has already been "
            "called since the last update()'",
        )


def _step_missing(script: Script) -> Iterator[Found]:
    updates = _asked(script, "update")
    stepping = _asked(script, "scaled step", "escape")
    plain = [e for e in script.events if e.kind == "step"]
    if updates and _made_here(script) and not stepping and not plain:
        yield at(
            updates[0].node,
            "update() without step() raises AssertionError 'No inf checks were recorded prior to "
            "update', and no weight changes",
        )


def _made_in_every_step(script: Script) -> Iterator[Found]:
    lines = {s.line for s in _made_here(script)}
    for region in script.regions:
        for made in region.of("call"):
            if made.depth or not made.loops or made.line not in lines:
                continue
            if not made.name.endswith("GradScaler"):
                continue
            if any(e.loops == made.loops for e in region.of("scaled step")):
                yield at(
                    made.node,
                    "makes a new scaler in every step: its scale is always the first one, 65536, "
                    "so that where this overflows every step is skipped, without a word",
                )


def _fp16_without_scaler(script: Script) -> Iterator[Found]:
    if script.mentions(*_OTHER_SCALING) or _unscales_by_hand(script):
        return
    for region in script.regions:
        for backward in region.of("backward"):
            if backward.node.args or backward.name == "torch.autograd.backward":
                continue
            if _is_product(backward.node):
                continue  # (loss * scale).backward(): scaled by hand
            cast = next(
                (
                    e.cast
                    for e in (backward, *region.before(backward))
                    if e.cast is not None and "fp16" in e.cast.formats
                ),
                None,
            )
            if cast is not None:
                may = "is" if cast.formats == {"fp16"} else "may be"
                yield at(
                    backward.node,
                    f"autocast (line {cast.line}) {may} to fp16, and no scaler multiplies the "
                    "loss: gradients below 6e-8 become 0, and the layers that they reach stop "
                    "learning without a word",
                )


def _unscales_by_hand(script: Script) -> bool:
    """Whether gradients are divided by what something was multiplied by: ``p.grad.div_(S)``."""
    divisors: set[str] = set()
    factors: set[str] = set()
    for node in ast.walk(script.tree):
        match node:
            case ast.AugAssign(target=target, op=ast.Div(), value=value):
                divisors |= {ast.unparse(value)} if reads_gradient(target) else set()
            case ast.Call(func=ast.Attribute(value=owner, attr="div_"), args=[value]):
                divisors |= {ast.unparse(value)} if reads_gradient(owner) else set()
            case ast.Call(func=ast.Attribute(attr="mul"), args=[value]):
                factors.add(ast.unparse(value))
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                factors |= {ast.unparse(left), ast.unparse(right)}
    return not divisors.isdisjoint(factors)


def _is_product(call: ast.Call) -> bool:
    """Whether a method is called on a product."""
    receiver = call.func.value if isinstance(call.func, ast.Attribute) else None
    return isinstance(receiver, ast.BinOp) and isinstance(receiver.op, ast.Mult)


def _scaler_with_fp16_weights(script: Script) -> Iterator[Found]:
    steps = _asked(script, "scaled step", "unscale")
    for weights in narrow_weights(script):
        stepped = [s for s in steps if s.subject in ("", weights.optimizer)]
        if weights.format == "fp16" and stepped:
            yield Found(
                line=weights.line,
                message=f"{weights.model} has fp16 weights, and {stepped[0].scaler} steps its "
                "optimizer: ValueError 'Attempting to unscale FP16 gradients'",
            )


def _scaler_in_bf16(script: Script) -> Iterator[Found]:
    casts = script.autocasts
    known = [cast for cast in casts if cast.formats]
    unknown = any(not c.is_known for e in script.events for c in e.casts)
    if not known or len(known) < len(casts) or unknown:
        return
    if any(cast.formats != {"bf16"} for cast in known):
        return
    for event in _asked(script, "backward"):
        yield at(
            event.node,
            "scales the loss of a bf16 autocast: bf16 has the range of fp32, so that the scale "
            "saves no gradient, and costs a read from the device in every step",
        )


def _closure(script: Script) -> Iterator[Found]:
    for step in _asked(script, "scaled step"):
        lbfgs = script.roles.made_by(step.subject, "torch.optim.") == "torch.optim.LBFGS"
        is_starred = any(isinstance(a, ast.Starred) for a in step.node.args)
        if lbfgs:
            yield at(step.node, "LBFGS needs a closure, and a scaler cannot step with one")
        elif keyword(step.node, "closure") or (len(step.node.args) > 1 and not is_starred):
            yield at(
                step.node,
                "gives step() a closure: by name it raises RuntimeError 'Closure use is not "
                "currently supported', by place its gradients are never unscaled",
            )


def _penalty(script: Script) -> Iterator[Found]:
    for region in script.regions:
        handled = any(True for _ in region.of("get_scale", "unscale"))
        for call in region.of("call", "escape"):
            if call.depth or call.name != "torch.autograd.grad" or handled:
                continue
            scaled = [s for s in ast.walk(call.node) if _is_scaling(s, script, call)]
            if scaled and keyword(call.node, "create_graph"):
                yield at(
                    call.node,
                    "takes gradients of the scaled loss for a penalty, and does not divide them by "
                    "the scale: the penalty of squared norms is up to 65536 squared too large",
                )


def _is_scaling(node: ast.AST, script: Script, event: Event) -> bool:
    match node:
        case ast.Call(func=ast.Attribute(value=owner, attr="scale")):
            return script.roles.is_scaler(event.text(owner))
        case _:
            return False


def _clip_raises(script: Script) -> Iterator[Found]:
    for region in script.regions:
        for clip in region.of("clip"):
            wanted = keyword(clip.node, "error_if_nonfinite")
            stepped = any(e.kind == "scaled step" for e in region.after(clip))
            if isinstance(wanted, ast.Constant) and wanted.value and stepped:
                yield at(
                    clip.node,
                    "raises at the first overflow, which the scaler would have skipped: the first "
                    "steps of every run have some, until the scale fits",
                )


def _anomaly(script: Script) -> Iterator[Found]:
    if not _asked(script, "scaled step"):
        return
    for event in script.events:
        on = event.node.args[0] if event.node.args else None
        is_on = on is None or (isinstance(on, ast.Constant) and bool(on.value))
        last = event.name.rpartition(".")[2]
        if (
            event.name.startswith("torch.")
            and is_on
            and last
            in (
                "set_detect_anomaly",
                "detect_anomaly",
            )
        ):
            yield at(
                event.node,
                "raises at a NaN in backward, which overflows of the loss scale make on purpose "
                "until the scale fits; and a step takes some 2.7 times as long",
            )


def _never_cleared(script: Script) -> Iterator[Found]:
    if script.mentions("zero_grad", "clear_grad", "reset_grad"):
        return
    if any(isinstance(n, ast.Attribute) and n.attr == "grad" for n in ast.walk(script.tree)):
        return
    for region in script.regions:
        for step in region.of("step", "scaled step"):
            if step.loops and _is_trained_here(script, region, step):
                yield at(
                    step.node,
                    "no zero_grad() anywhere: each step adds its gradients to those of all steps "
                    "before, until fp16 overflows",
                )
                return


def _is_trained_here(script: Script, region: Region, step: Event) -> bool:
    """Whether the gradients are made here too, and nothing else in sight has the optimizer."""
    passed = any(
        e.text(value) == step.subject
        for e in script.events
        if e.kind in ("call", "escape")
        for value in (*e.node.args, *(k.value for k in e.node.keywords))
    )
    is_plain = not (step.kind == "step" and step.node.args)
    backward = next((e for e in region.before(step) if e.kind == "backward"), None)
    return is_plain and not passed and backward is not None and not backward.node.args


_DOCS = "https://docs.pytorch.org/docs/stable/notes/amp_examples.html"
_AMP = "https://docs.pytorch.org/docs/stable/amp.html"
_ISSUE = "https://github.com/pytorch/pytorch/issues/"

SCALER_RULES = (
    Rule(
        code="NC108",
        name="update-missing",
        severity="error",
        fix="call scaler.update() after scaler.step(optimizer)",
        source=_DOCS,
        find=_update_missing,
    ),
    Rule(
        code="NC109",
        name="update-without-step",
        severity="error",
        fix="call scaler.step(optimizer) before scaler.update()",
        source=_DOCS,
        find=_step_missing,
    ),
    Rule(
        code="NC112",
        name="scaler-in-every-step",
        severity="warning",
        fix="make the scaler once, before the loop",
        source=_DOCS,
        find=_made_in_every_step,
    ),
    Rule(
        code="NC113",
        name="fp16-without-scaler",
        severity="warning",
        fix="use torch.amp.GradScaler('cuda'), or autocast to torch.bfloat16, which needs none",
        source=f"{_AMP}#gradient-scaling",
        find=_fp16_without_scaler,
    ),
    Rule(
        code="NC114",
        name="scaler-with-fp16-weights",
        severity="error",
        fix="keep the weights in fp32 (drop half()) and let autocast cast them",
        source=f"{_ISSUE}74739",
        find=_scaler_with_fp16_weights,
    ),
    Rule(
        code="NC115",
        name="scaler-in-bf16",
        severity="notice",
        fix="use the scaler for fp16 only: GradScaler(enabled=dtype == torch.float16)",
        source=f"{_AMP}#gradient-scaling",
        find=_scaler_in_bf16,
        once=True,
    ),
    Rule(
        code="NC116",
        name="closure-with-scaler",
        severity="error",
        fix="use an optimizer without closures, or train with it in bf16 or fp32, without scaler",
        source=f"{_AMP}#torch.amp.GradScaler.step",
        find=_closure,
    ),
    Rule(
        code="NC117",
        name="penalty-on-scaled-gradients",
        severity="error",
        fix="multiply the gradients by 1 / scaler.get_scale() before the penalty is made",
        source=f"{_DOCS}#gradient-penalty",
        find=_penalty,
    ),
    Rule(
        code="NC119",
        name="clip-raises-on-overflow",
        severity="warning",
        fix="drop error_if_nonfinite: the scaler skips such a step",
        source="https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.clip_grad_norm_.html",
        find=_clip_raises,
    ),
    Rule(
        code="NC120",
        name="anomaly-mode-with-scaler",
        severity="notice",
        fix="switch anomaly mode on only while looking for a NaN that stays at a scale of 1",
        source="https://github.com/Lightning-AI/pytorch-lightning/issues/9799",
        find=_anomaly,
        once=True,
    ),
    Rule(
        code="NC121",
        name="gradients-never-cleared",
        severity="warning",
        fix="call optimizer.zero_grad() once a step",
        source="https://docs.pytorch.org/docs/stable/generated/"
        "torch.optim.Optimizer.zero_grad.html",
        find=_never_cleared,
    ),
)
