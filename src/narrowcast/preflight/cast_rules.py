"""Rules on what stands inside an autocast, and on what an autocast was asked for."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from narrowcast.preflight.casts import AUTOCASTS, Autocast
from narrowcast.preflight.events import Event, Region
from narrowcast.preflight.imports import key_of
from narrowcast.preflight.rule import Found, Rule, at
from narrowcast.preflight.script import Script
from narrowcast.preflight.weights import trained_model

__all__ = ["CAST_RULES"]

_DEPRECATED = ("torch.cuda.amp.", "torch.cpu.amp.")
_DEPRECATED_NAMES = {"autocast", "GradScaler", "custom_fwd", "custom_bwd"}
_PRODUCTS = {
    "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "linear", "conv1d", "conv2d", "conv3d",
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
}  # fmt: skip
_WITHOUT_GRADIENTS = ("torch.no_grad", "torch.inference_mode")
_EVALUATION = re.compile(r"(?:\A|_)(?:eval|valid|test)", re.IGNORECASE)
_CASTS = {"to", "type_as", "half", "float", "bfloat16", "type"}


def _stale(event: Event) -> Autocast | None:
    """Return the autocast whose weight casts outlive an optimizer's step in a loop inside it."""
    cast = event.cast
    if cast is None or not cast.caches or event.kind not in ("step", "scaled step"):
        return None
    return cast if len(event.loops) > len(cast.loops) else None


def _loop_inside(script: Script) -> Iterator[Found]:
    for region in script.regions:
        for event in region.events:
            cast = _stale(event)
            if cast is not None:
                yield Found(
                    line=cast.line,
                    message="the whole loop runs inside one autocast, which keeps the 16-bit "
                    f"copies of the weights until it is left: after the step in line {event.line} "
                    "the forward pass goes on with the old weights, and the loss does not fall",
                )


def _in_a_stale_cast(region: Region, event: Event) -> bool:
    return any(_stale(e) is event.cast for e in region.events if _stale(e) is not None)


def _backward_inside(script: Script) -> Iterator[Found]:
    for region in script.regions:
        for event in region.of("backward"):
            if event.cast is not None and not _in_a_stale_cast(region, event):
                yield at(
                    event.node,
                    f"runs backward inside autocast (line {event.cast.line}), which torch advises "
                    "against: operations whose dtype autograd does not choose, those of custom "
                    "functions and of double backward, are cast once more",
                )


def _step_inside(script: Script) -> Iterator[Found]:
    for region in script.regions:
        for event in region.of("step", "scaled step"):
            if event.cast is not None and not _in_a_stale_cast(region, event):
                yield at(
                    event.node,
                    f"steps the optimizer inside autocast (line {event.cast.line}): products of "
                    "its update (Muon, Shampoo, LBFGS) run in 16 bits, and a forward pass further "
                    "down in the same block goes on with the old weights",
                )


def _not_entered(script: Script) -> Iterator[Found]:
    for event in script.events:
        if event.is_statement and event.name in AUTOCASTS:
            yield at(
                event.node,
                "makes an autocast and does not enter it: everything goes on in fp32, without a "
                "word",
            )


def _cuda_on_cpu(script: Script) -> Iterator[Found]:
    if not any(e.kind == "backward" for e in script.events) or _may_leave_cpu(script):
        return
    for cast in script.autocasts:
        if cast.device == "cuda":
            yield Found(
                line=cast.line,
                message="asks for CUDA's autocast, and nothing in the script leaves the CPU: all "
                "runs in fp32, and torch only warns",
            )


def _may_leave_cpu(script: Script) -> bool:
    """Whether anything in a script may put tensors on another device than the CPU."""
    if script.mentions("set_default_device", "accelerat", "fabric", "trainer", "device_map"):
        return True
    if not _makes_its_model(script):
        return True
    for event in script.events:
        func = event.node.func
        method = func.attr if isinstance(func, ast.Attribute) else ""
        if method in ("cuda", "to_empty"):
            return True
        values = [k.value for k in event.node.keywords if k.arg == "device"]
        if method == "to":
            values += event.node.args[:1]
        if any(not _is_cpu_or_dtype(value, event, script) for value in values):
            return True
    return False


def _makes_its_model(script: Script) -> bool:
    """Whether the model that an optimizer trains is made of torch's or the file's own classes."""
    own = {n.name for n in ast.walk(script.tree) if isinstance(n, ast.ClassDef)}
    models = {trained_model(e, script) for e in script.events if e.name.startswith("torch.optim.")}
    made = [
        d.value.func
        for model in models - {""}
        for d in script.definitions.of(model)
        if isinstance(d.value, ast.Call)
    ]
    return bool(made) and all(
        script.imports.qualified(func).startswith("torch.nn.") or key_of(func) in own
        for func in made
    )


def _is_cpu_or_dtype(node: ast.expr, event: Event, script: Script) -> bool:
    options = script.definitions.alternatives(node, event.scope)
    return bool(options) and all(_is_cpu(o.value, script) for o in options)


def _is_cpu(node: ast.expr, script: Script) -> bool:
    match node:
        case ast.Constant(value=str(value)):
            return value == "cpu"
        case ast.Call(args=[ast.Constant(value="cpu")]):
            return script.imports.qualified(node.func) == "torch.device"
        case _:
            return script.imports.qualified(node).startswith("torch.")


def _bce(script: Script) -> Iterator[Found]:
    for region in script.regions:
        for event in region.of("call"):
            if event.cast is None or event.cast.device == "cpu":
                continue
            name = event.name
            key = event.text(event.node.func)
            if name == "torch.nn.functional.binary_cross_entropy" or (
                script.roles.made_by(key, "torch.nn.BCELoss") == "torch.nn.BCELoss"
            ):
                yield at(
                    event.node,
                    f"binary cross-entropy of probabilities inside autocast (line "
                    f"{event.cast.line}): on CUDA it raises RuntimeError 'unsafe to autocast', "
                    "also where a run on a CPU went through",
                )


def _custom_function(script: Script) -> Iterator[Found]:
    if not script.mentions("autocast"):
        return
    for node in ast.walk(script.tree):
        if not isinstance(node, ast.ClassDef):
            continue
        if not any(
            script.imports.qualified(base)
            in ("torch.autograd.Function", "torch.autograd.function.Function")
            for base in node.bases
        ):
            continue
        methods = {m.name: m for m in node.body if isinstance(m, ast.FunctionDef)}
        backward, forward = methods.get("backward"), methods.get("forward")
        if backward is None or forward is None:
            continue
        is_wrapped = any(
            "custom_" in ast.unparse(d)
            for method in (forward, backward)
            for d in method.decorator_list
        )
        if not is_wrapped and _multiplies(backward) and not _casts(backward):
            yield at(
                node,
                f"{node.name} multiplies in its backward, which runs outside autocast: fp16 "
                "gradients meet the fp32 tensors that forward saved, RuntimeError 'expected both "
                "to have the same dtype', or the product runs in fp32",
            )


def _multiplies(function: ast.FunctionDef) -> bool:
    return any(
        (isinstance(n, ast.BinOp) and isinstance(n.op, ast.MatMult))
        or (isinstance(n, ast.Call) and _last_name(n.func) in _PRODUCTS)
        for n in ast.walk(function)
    )


def _casts(function: ast.FunctionDef) -> bool:
    return any(isinstance(n, ast.Call) and _last_name(n.func) in _CASTS for n in ast.walk(function))


def _last_name(node: ast.AST) -> str:
    return getattr(node, "attr", "") or getattr(node, "id", "")


def _evaluated_only_cast(script: Script) -> Iterator[Found]:
    if not script.mentions("optimizer", "scaler"):
        return
    for region in script.regions:
        own = [e for e in region.events if e.depth == 0]
        if not _is_evaluation(region, own) or any(e.kind == "backward" for e in region.events):
            continue
        alternatives = _casts_with_other_branch(script, region.node)
        for event in own:
            cast = event.cast
            if cast is not None and cast.line not in alternatives:
                yield Found(
                    line=cast.line,
                    message="evaluates only under autocast: the metrics are those of 16-bit "
                    "products, while the saved weights are fp32 and will be judged in fp32",
                )


def _is_evaluation(region: Region, own: list[Event]) -> bool:
    """Whether a function puts a model in evaluation mode, or is called so and takes no gradient."""
    if any(e.kind == "eval mode" for e in own):
        return True
    without_gradients = any(e.name in _WITHOUT_GRADIENTS for e in own) or any(
        ast.unparse(d).startswith(_WITHOUT_GRADIENTS)
        for d in getattr(region.node, "decorator_list", ())
    )
    return without_gradients and bool(_EVALUATION.search(region.name))


def _casts_with_other_branch(script: Script, node: ast.AST) -> set[int]:
    """Return the lines of `with` blocks in an `if` whose `else` does the same without autocast."""
    return {
        statement.lineno
        for branch in ast.walk(node)
        if isinstance(branch, ast.If) and branch.orelse
        for statement in (*branch.body, *branch.orelse)
        if isinstance(statement, ast.With)
    }


def _deprecated(script: Script) -> Iterator[Found]:
    skipped = {id(n) for a in _annotations(script.tree) for n in ast.walk(a)}
    for node in ast.walk(script.tree):
        if not isinstance(node, (ast.Attribute, ast.Name)) or id(node) in skipped:
            continue
        name = script.imports.qualified(node)
        last = name.rpartition(".")[2]
        if name.startswith(_DEPRECATED) and last in _DEPRECATED_NAMES:
            device = name.split(".")[1]
            new = f"torch.amp.{last}"
            use = f"{new}('{device}', ...)" if last[0] != "c" else f"{new}(device_type='{device}')"
            yield at(node, f"{name} is deprecated since torch 2.4; the same is {use}")


def _annotations(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        for field in ("annotation", "returns"):
            value = getattr(node, field, None)
            if isinstance(value, ast.AST):
                yield value


_AMP = "https://docs.pytorch.org/docs/stable/amp.html"
_DOCS = "https://docs.pytorch.org/docs/stable/notes/amp_examples.html"
_ISSUE = "https://github.com/pytorch/pytorch/issues/"

CAST_RULES = (
    Rule(
        code="NC201",
        name="loop-inside-autocast",
        severity="error",
        fix="enter autocast in every step, round the forward pass and the loss only",
        source=f"{_ISSUE}120376",
        find=_loop_inside,
    ),
    Rule(
        code="NC202",
        name="backward-inside-autocast",
        severity="warning",
        fix="leave autocast before backward",
        source=f"{_AMP}#torch.autocast",
        find=_backward_inside,
    ),
    Rule(
        code="NC203",
        name="step-inside-autocast",
        severity="warning",
        fix="leave autocast before the optimizer steps",
        source=f"{_AMP}#torch.autocast",
        find=_step_inside,
    ),
    Rule(
        code="NC204",
        name="autocast-not-entered",
        severity="error",
        fix="write `with torch.autocast(...):` round the forward pass and the loss",
        source=f"{_AMP}#torch.autocast",
        find=_not_entered,
    ),
    Rule(
        code="NC205",
        name="cuda-autocast-on-cpu",
        severity="warning",
        fix="name the device that the model is on: torch.autocast(device.type, ...)",
        source="https://github.com/karpathy/nanoGPT/pull/698",
        find=_cuda_on_cpu,
    ),
    Rule(
        code="NC206",
        name="bce-under-autocast",
        severity="error",
        fix="drop the sigmoid and use binary_cross_entropy_with_logits (BCEWithLogitsLoss)",
        source=f"{_ISSUE}61098",
        find=_bce,
    ),
    Rule(
        code="NC207",
        name="custom-function-without-custom-fwd",
        severity="warning",
        fix="decorate forward with torch.amp.custom_fwd(device_type=...) and backward with "
        "torch.amp.custom_bwd(device_type=...)",
        source=f"{_DOCS}#autocast-and-custom-autograd-functions",
        find=_custom_function,
    ),
    Rule(
        code="NC208",
        name="evaluated-only-under-autocast",
        severity="notice",
        fix="evaluate in fp32 too, at least once at the end",
        source="https://github.com/facebookresearch/maskrcnn-benchmark/issues/1287",
        find=_evaluated_only_cast,
        once=True,
    ),
    Rule(
        code="NC209",
        name="deprecated-amp",
        severity="notice",
        fix="use torch.amp.autocast('cuda', ...) and torch.amp.GradScaler('cuda', ...)",
        source=f"{_AMP}#torch.cuda.amp.autocast",
        find=_deprecated,
        once=True,
    ),
)
