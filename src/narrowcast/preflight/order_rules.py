"""Rules on the order of a scaled step: backward, unscale, clip, step, update, scheduler."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from narrowcast.preflight.casts import argument
from narrowcast.preflight.events import Event, Kind, Region, rarer
from narrowcast.preflight.rule import Found, Rule, at
from narrowcast.preflight.script import Script

__all__ = ["ORDER_RULES"]

_SKIP_WORDS = ("scale", "skip", "overflow", "found_inf")


def _gradients_before(region: Region, event: Event) -> tuple[Literal["scaled", "other"], Event]:
    """Say whether the gradients that an event sees are certainly still multiplied by the scale."""
    for earlier in region.before(event):
        match earlier.kind:
            case "backward":
                return ("scaled" if earlier.scaler else "other"), earlier
            case "unscale" | "scaled step" | "escape":
                return "other", earlier
    return "other", event


def _is_stepped_later(region: Region, event: Event, scaler: str) -> bool:
    return any(
        e.kind == "step" or (e.kind == "scaled step" and e.scaler == scaler)
        for e in region.after(event)
    )


def _clip_before_unscale(script: Script) -> Iterator[Found]:
    yield from _uses_of_scaled(
        script,
        "clip",
        "clips gradients that are still multiplied by the loss scale: at a scale of 65536 a limit "
        "of 1.0 acts as one of 0.000015, and almost nothing is learned",
    )


def _norm_of_scaled(script: Script) -> Iterator[Found]:
    yield from _uses_of_scaled(
        script,
        "gradient norm",
        "takes the norm of gradients that are still multiplied by the loss scale: the figure is up "
        "to 65536 times too large, and jumps whenever the scale changes",
    )


def _clip_after_step(script: Script) -> Iterator[Found]:
    for region in script.regions:
        for clip in region.of("clip"):
            step = _step_just_before(region, clip)
            if step is None or _is_endless(clip) or not any(_zeroes_after(region, step)):
                continue
            # Another optimizer may be about to use them, here or out of sight.
            if not any(e.kind in ("step", "scaled step", "escape") for e in region.after(clip)):
                yield at(
                    clip.node,
                    f"clips gradients that the step in line {step.line} has used already, and that "
                    "are thrown away before the next one: nothing is clipped",
                )


def _step_just_before(region: Region, clip: Event) -> Event | None:
    """Return the step that certainly used the gradients that are clipped."""
    for earlier in region.before(clip):
        if earlier.kind in ("backward", "escape", "scale", "unscale"):
            return None
        if earlier.kind in ("step", "scaled step"):
            is_as_often = earlier.loops == clip.loops and not rarer(earlier, clip)
            return earlier if is_as_often else None
    return None


def _zeroes_after(region: Region, step: Event) -> Iterator[bool]:
    """Yield whether gradients are zeroed between the step and the next backward pass."""
    backward = next((e for e in region.before(step) if e.kind == "backward"), None)
    if backward is not None:
        inside = slice(region.events.index(backward), region.events.index(step))
        kept = region.events[inside]
        yield from (e not in kept for e in region.of("zero_grad") if e.fits(step))


def _is_endless(clip: Event) -> bool:
    """Whether the limit is infinite, as where only the norm is wanted."""
    limit = argument(clip.node, 1, "max_norm")
    return limit is not None and "inf" in clip.text(limit)


def _uses_of_scaled(script: Script, kind: Kind, words: str) -> Iterator[Found]:
    """Accuse what is done to gradients between backward and unscaling."""
    for region in script.regions:
        for use in region.of(kind):
            state, cause = _gradients_before(region, use)
            if state == "scaled" and _is_stepped_later(region, use, cause.scaler):
                yield at(use.node, words)


def _unscaled_twice(script: Script) -> Iterator[Found]:
    for region in script.regions:
        for unscale in region.of("unscale"):
            earlier = _since_update(region, unscale)
            if earlier is None:
                yield from _more_often_than_update(region, unscale, "unscale_()")
            elif earlier.kind == "unscale":
                yield at(
                    unscale.node,
                    f"unscales the gradients of {unscale.subject} a second time since line "
                    f"{earlier.line}: RuntimeError 'unscale_() has already been called'",
                )
            else:
                yield at(
                    unscale.node,
                    f"unscales after step() (line {earlier.line}): RuntimeError 'unscale_() is "
                    "being called after step()'",
                )


def _since_update(region: Region, event: Event) -> Event | None:
    """Return the last unscale or step of the same optimizer since the scaler's update."""
    for earlier in region.before(event):
        if earlier.scaler != event.scaler:
            continue
        if earlier.kind in ("update", "escape"):
            return None
        if earlier.kind in ("unscale", "scaled step") and earlier.subject == event.subject:
            # One line of a helper that is called twice: its callers may know that it runs once.
            return earlier if earlier.node is not event.node else None
    return None


def _more_often_than_update(region: Region, event: Event, what: str) -> Iterator[Found]:
    updates = [e for e in region.of("update") if e.scaler == event.scaler and e.fits(event)]
    if updates and not event.is_of_each and all(rarer(update, event) for update in updates):
        yield at(
            event.node,
            f"calls {what} in every micro-batch, and update() (line {updates[0].line}) only once "
            f"for several: RuntimeError '{what} has already been called since the last update()'",
        )


def _stepped_twice(script: Script) -> Iterator[Found]:
    for region in script.regions:
        for step in region.of("scaled step"):
            yield from _more_often_than_update(region, step, "step()")


def _update_every_micro_batch(script: Script) -> Iterator[Found]:
    for region in script.regions:
        for update in region.of("update"):
            if not script.roles.is_scaler(update.scaler):
                continue
            steps = [
                e
                for e in region.of("scaled step", "escape")
                if e.scaler == update.scaler and e.fits(update)
            ]
            if steps and all(rarer(step, update) for step in steps):
                yield at(
                    update.node,
                    f"calls update() in every micro-batch, and step() (line {steps[0].line}) only "
                    "once for several: AssertionError 'No inf checks were recorded prior to "
                    "update', or a scale that changes while gradients accumulate",
                )


def _step_bypasses_scaler(script: Script) -> Iterator[Found]:
    for region in script.regions:
        for step in region.of("step"):
            state, cause = _gradients_before(region, step)
            if state == "scaled" and cause.is_certain:
                yield at(
                    step.node,
                    f"steps with gradients of a loss that {cause.scaler} multiplied (line "
                    f"{cause.line}): they are 65536 times too large, and inf or NaN among them "
                    "goes into the weights",
                )


def _step_of_unscaled(script: Script) -> Iterator[Found]:
    for region in script.regions:
        for step in region.of("scaled step"):
            before = [e for e in region.before(step) if e.kind in ("backward", "escape", "scale")]
            backward = next((e for e in before if e.kind == "backward"), None)
            if backward is None or backward.scaler or not backward.is_certain:
                continue
            other = any(e.scaler and not (e.kind == "scale" and e.is_statement) for e in before)
            if not other:
                yield at(
                    step.node,
                    f"divides by the scale gradients that were never multiplied by it (backward in "
                    f"line {backward.line}): they come out 65536 times too small",
                )


def _update_between(script: Script) -> Iterator[Found]:
    for region in script.regions:
        for step in region.of("scaled step"):
            update = _update_just_before(region, step)
            if update is None or update.loops != step.loops:
                continue
            backward = next((e for e in region.before(update) if e.kind == "backward"), None)
            is_same = backward is not None and backward.loops == step.loops
            if backward is not None and backward.scaler == step.scaler and is_same:
                if any("%" in name for name in update.guard if name not in step.guard):
                    continue
                yield at(
                    step.node,
                    f"steps {step.subject} after update() (line {update.line}): whenever that "
                    "changes the scale, its gradients are divided by another scale than they were "
                    "multiplied by, and inf among them is divided too",
                )


def _update_just_before(region: Region, step: Event) -> Event | None:
    """Return the update that came since the backward pass whose gradients a step uses."""
    for earlier in region.before(step):
        if earlier.kind == "backward" or earlier.kind == "escape":
            return None
        if earlier.scaler == step.scaler and earlier.kind == "update":
            return earlier
        if earlier.kind in ("unscale", "scaled step") and earlier.subject == step.subject:
            return None
    return None


def _scheduler_first(script: Script) -> Iterator[Found]:
    for region in script.regions:
        for scheduler in region.of("scheduler"):
            if not script.roles.made_by(scheduler.subject, "torch.optim.lr_scheduler."):
                continue
            if scheduler.node.args or not scheduler.loops:
                continue
            steps = [
                e
                for e in region.of("scaled step")
                if e.loops == scheduler.loops and e.fits(scheduler)
            ]
            place = region.events.index
            if steps and all(place(e) > place(scheduler) for e in steps):
                yield at(
                    scheduler.node,
                    f"advances the schedule before the optimizer's step (line {steps[0].line}): "
                    "the first learning rate of the schedule is never used, and torch warns",
                )


def _scheduler_ignores_skips(script: Script) -> Iterator[Found]:
    for region in script.regions:
        if any(True for _ in region.of("get_scale")):
            continue
        for scheduler in region.of("scheduler"):
            if scheduler.node.args or scheduler.node.keywords or not scheduler.is_statement:
                continue
            if any(word in name for name in scheduler.guard for word in _SKIP_WORDS):
                continue
            steps = [e for e in region.before(scheduler) if e.kind == "scaled step"]
            if any(e.loops == scheduler.loops for e in steps):
                yield at(
                    scheduler.node,
                    "advances the schedule whether or not the scaler skipped the optimizer's step: "
                    "each overflow, of which the first steps have several, moves the learning rate "
                    "on without a step",
                )


_DOCS = "https://docs.pytorch.org/docs/stable/notes/amp_examples.html"
_ISSUE = "https://github.com/pytorch/pytorch/issues/"

ORDER_RULES = (
    Rule(
        code="NC101",
        name="clip-before-unscale",
        severity="error",
        fix="call scaler.unscale_(optimizer) between backward and the clipping",
        source=f"{_DOCS}#gradient-clipping",
        find=_clip_before_unscale,
    ),
    Rule(
        code="NC102",
        name="unscale-twice",
        severity="error",
        fix="unscale once, after the last backward and before step(); then update()",
        source=f"{_DOCS}#gradient-accumulation",
        find=_unscaled_twice,
    ),
    Rule(
        code="NC103",
        name="step-bypasses-scaler",
        severity="error",
        fix="step with scaler.step(optimizer), which unscales and skips what is not finite",
        source=_DOCS,
        find=_step_bypasses_scaler,
    ),
    Rule(
        code="NC104",
        name="step-of-unscaled-gradients",
        severity="error",
        fix="take the gradients of scaler.scale(loss): scaler.scale(loss).backward()",
        source=_DOCS,
        find=_step_of_unscaled,
    ),
    Rule(
        code="NC105",
        name="scale-changes-before-step",
        severity="error",
        fix="call update() once, after the steps of all optimizers",
        source=f"{_DOCS}#working-with-multiple-models-losses-and-optimizers",
        find=_update_between,
    ),
    Rule(
        code="NC106",
        name="update-in-every-micro-batch",
        severity="error",
        fix="call update() beside step(), under the same condition",
        source=f"{_DOCS}#gradient-accumulation",
        find=_update_every_micro_batch,
    ),
    Rule(
        code="NC107",
        name="step-twice-before-update",
        severity="error",
        fix="call update() after each step(), under the same condition",
        source=f"{_DOCS}#gradient-accumulation",
        find=_stepped_twice,
    ),
    Rule(
        code="NC110",
        name="scheduler-before-optimizer",
        severity="warning",
        fix="call scheduler.step() after scaler.step(optimizer) and scaler.update()",
        source=f"{_ISSUE}44511",
        find=_scheduler_first,
    ),
    Rule(
        code="NC111",
        name="scheduler-ignores-skips",
        severity="notice",
        fix="advance the schedule only if the step was taken: scale = scaler.get_scale(); "
        "scaler.update(); if scaler.get_scale() >= scale: scheduler.step()",
        source=f"{_ISSUE}55585",
        find=_scheduler_ignores_skips,
        once=True,
    ),
    Rule(
        code="NC118",
        name="norm-of-scaled-gradients",
        severity="warning",
        fix="call scaler.unscale_(optimizer) before gradients are read",
        source="https://github.com/facebookresearch/fairseq/issues/4555",
        find=_norm_of_scaled,
    ),
    Rule(
        code="NC122",
        name="clip-after-step",
        severity="error",
        fix="clip between scaler.unscale_(optimizer) and scaler.step(optimizer)",
        source=f"{_DOCS}#gradient-clipping",
        find=_clip_after_step,
    ),
)
