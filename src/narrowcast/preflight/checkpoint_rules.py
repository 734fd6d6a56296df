"""Rules on checkpoints: a training that resumes without its scaler is another training."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from narrowcast.preflight.events import Event
from narrowcast.preflight.rule import Found, Rule, at
from narrowcast.preflight.script import Script

__all__ = ["CHECKPOINT_RULES"]

_SAVES = re.compile(r"(?:.*_)?save(?:_\w+)?\Z")
_SAVING = re.compile(r"save|checkpoint|snapshot", re.IGNORECASE)
_SCALER = re.compile(r"scal(er|e)|amp|precision", re.IGNORECASE)
_NOT_MODEL = re.compile(r"optim|\bopt\b|sched|epoch|step|scaler|amp|_opt\b", re.IGNORECASE)
_OPTIMIZER = re.compile(r"optim|(?<![a-z])opt(?![a-z])", re.IGNORECASE)
_CARRIERS = ("self", "trainer", "state", "checkpoint", "kwargs", "args")
"""Arguments that may hold a scaler among other things."""


def _uses_scaler(script: Script) -> bool:
    return any(
        e.scaler and not script.scalers[e.scaler].off
        for e in script.events
        if e.kind in ("backward", "scaled step", "unscale", "escape")
    ) or any(s.line and not s.off for s in script.scalers.values())


def _not_saved(script: Script) -> Iterator[Found]:
    if not _uses_scaler(script):
        return
    for region in script.regions:
        is_saving = bool(_SAVING.search(region.name))
        for event in region.of("call", "escape"):
            lacking = _saved_without_scaler(event, script)
            if not lacking and is_saving and event.depth == 0:
                lacking = _gathered_without_scaler(event, script)
            if lacking:
                yield at(
                    event.node,
                    f"saves {lacking} and not the scaler: a resumed run begins with the scale "
                    "65536 again, skips its first steps, and is not the run that was saved",
                )


def _saved_without_scaler(event: Event, script: Script) -> str:
    """Say what a call saves if that is an optimizer and no scaler, '' otherwise."""
    last = event.name.rpartition(".")[2]
    if not _SAVES.match(last):
        return ""
    alone = _saved_alone(event, script)
    if alone:
        return alone
    for value in (*event.node.args, *(k.value for k in event.node.keywords)):
        contents = _dict_of(value, event, script)
        if contents is not None:
            return _described(contents, value, script)
    if event.name.startswith("torch.") or _is_own(event, script):
        return ""
    return _passed(event, script)


def _gathered_without_scaler(event: Event, script: Script) -> str:
    """Look at the states that a function which saves puts into an object, such as `Snapshot(...)`.

    A value of its own class is described as a dict with the same keywords would be.
    """
    contents = [(k.arg, k.value) for k in event.node.keywords if k.arg is not None]
    if len(contents) < max(2, len(event.node.keywords)) or _saves_scaler(script):
        return ""
    return _described(contents, event.node, script)


def _saved_alone(event: Event, script: Script) -> str:
    """Name an optimizer whose state has a file of its own, where no scaler's state has one."""
    match event.node.args[:1]:
        case [ast.Call(func=ast.Attribute(value=owner, attr="state_dict"))]:
            key = event.text(owner)
            if script.roles.is_optimizer(key) and not _saves_scaler(script):
                return key
    return ""


def _is_own(event: Event, script: Script) -> bool:
    """Whether the function that saves is in this file, and so has been looked into."""
    last = event.name.rpartition(".")[2]
    return any(f.name == last for f in script.functions)


def _dict_of(value: ast.expr, event: Event, script: Script) -> list[tuple[str, ast.expr]] | None:
    """Return the (key, value) pairs of a dict that is saved; None if it cannot be told whole."""
    for option in script.definitions.alternatives(value, event.scope):
        match option.value:
            case ast.Dict(keys=keys, values=values):
                if any(key is None for key in keys):
                    return None
                return [
                    (ast.unparse(k), v) for k, v in zip(keys, values, strict=True) if k is not None
                ]
            case ast.Call(func=ast.Name(id="dict"), args=[], keywords=words):
                if any(word.arg is None for word in words):
                    return None
                return [(word.arg or "", word.value) for word in words]
    return None


def _described(contents: list[tuple[str, ast.expr]], value: ast.expr, script: Script) -> str:
    texts = [(key, ast.unparse(v)) for key, v in contents]
    states = [(k, t) for k, t in texts if "state_dict()" in t]
    if not any(_OPTIMIZER.search(f"{k} {t}") for k, t in states):
        return ""
    if not any(not _NOT_MODEL.search(k) and not _NOT_MODEL.search(t) for k, t in texts):
        return ""
    if any(_SCALER.search(f"{k} {t}") for k, t in texts) or _added_later(value, script):
        return ""
    return f"model and optimizer ({', '.join(k.strip(chr(39)) for k, _ in texts[:4])}, ...)"


def _added_later(value: ast.expr, script: Script) -> bool:
    """Whether a scaler is put into the saved dict by a line of its own."""
    name = ast.unparse(value)
    for node in ast.walk(script.tree):
        match node:
            case ast.Assign(targets=[ast.Subscript(value=target) as place]):
                text = f"{ast.unparse(place.slice)} {ast.unparse(node.value)}"
                if ast.unparse(target) == name and _SCALER.search(text):
                    return True
            case ast.Call(func=ast.Attribute(value=target, attr="update" | "setdefault")):
                if ast.unparse(target) == name:
                    return True
    return False


def _passed(event: Event, script: Script) -> str:
    """Look at the objects that a function of another file is given to save."""
    values = [*event.node.args, *(k.value for k in event.node.keywords)]
    if any(isinstance(v, ast.Starred) for v in values) or any(
        k.arg is None for k in event.node.keywords
    ):
        return ""
    names = [event.text(v) for v in values]
    words = [k.arg or "" for k in event.node.keywords]
    if any(_SCALER.search(n) for n in (*names, *words)):
        return ""
    if any(name in _CARRIERS and name != "args" for name in names):
        return ""
    optimizers = [n for n in names if script.roles.is_optimizer(n)]
    models = [n for n in names if re.search(r"model|net", n, re.IGNORECASE)]
    return f"{models[0]} and {optimizers[0]}" if optimizers and models else ""


def _not_restored(script: Script) -> Iterator[Found]:
    restored = [e for e in script.events if _restores(e)]
    optimizers = [e for e in restored if script.roles.is_optimizer(_owner(e))]
    if not optimizers or not _uses_scaler(script) or not _saves_scaler(script):
        return
    if any(_SCALER.search(_owner(e)) for e in restored):
        return
    loads = re.compile(r"load|resume|restore", re.IGNORECASE)
    if any(e.kind == "escape" and loads.search(e.name) for e in script.events):
        return
    yield at(
        optimizers[0].node,
        "restores the optimizer and not the scaler, which is in the checkpoint: the resumed run "
        "begins with the scale 65536 again, and skips its first steps",
    )


def _restores(event: Event) -> bool:
    return isinstance(event.node.func, ast.Attribute) and event.node.func.attr == "load_state_dict"


def _owner(event: Event) -> str:
    func = event.node.func
    return event.text(func.value) if isinstance(func, ast.Attribute) else ""


def _saves_scaler(script: Script) -> bool:
    return any(
        isinstance(e.node.func, ast.Attribute)
        and e.node.func.attr == "state_dict"
        and script.roles.is_scaler(_owner(e))
        for e in script.events
    )


CHECKPOINT_RULES = (
    Rule(
        code="NC401",
        name="scaler-not-saved",
        severity="warning",
        fix="save scaler.state_dict() with the model's and the optimizer's",
        source="https://github.com/ultralytics/ultralytics/pull/22189",
        find=_not_saved,
        once=True,
    ),
    Rule(
        code="NC402",
        name="scaler-not-restored",
        severity="warning",
        fix="call scaler.load_state_dict(...) beside the optimizer's",
        source="https://github.com/ultralytics/ultralytics/pull/22189",
        find=_not_restored,
        once=True,
    ),
)
