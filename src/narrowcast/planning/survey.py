"""What a recipe has to choose from, less the levers that save nothing on it."""

from __future__ import annotations

from dataclasses import replace

from narrowcast.plan import Plan
from narrowcast.planning.peaks import Peaks, model_without_contents
from narrowcast.planning.space import REMAKE, Space, plain_plan, space_of
from narrowcast.policy import Policy
from narrowcast.prediction.trace import Stage
from narrowcast.recipes.load import Recipe

__all__ = ["survey"]

# A lever that saves less of the peak is not worth the plans that it doubles.
_WORTH = 0.01


def survey(
    recipe: Recipe,
    peaks: Peaks,
    policies: tuple[Policy, ...],
    *,
    keep_batch: bool,
    release: bool,
    offload: bool,
) -> Space:
    """Return the choices on each axis, and notes on what is left out."""
    stage = Stage()
    model = model_without_contents(recipe, stage)
    with stage:
        space = space_of(
            recipe,
            model,
            policies,
            batch_size=peaks.share,
            keep_batch=keep_batch,
            release=release,
            offload=offload,
        )
    return _without_idle_loss(_without_idle_remaking(space, peaks), peaks)


def _without_idle_remaking(space: Space, peaks: Peaks) -> Space:
    """Leave remaking out where it saves nothing beside what else is done about activations."""
    kept = []
    for rules in space.activations:
        others = tuple(rule for rule in rules if rule not in REMAKE)
        if others == rules or _saves(plain_plan(space, rules), plain_plan(space, others), peaks):
            kept.append(rules)
    if REMAKE in kept or REMAKE not in space.activations:
        return replace(space, activations=tuple(kept))
    said = "remaking saves nothing here: little of what is kept is cheap to make"
    return replace(space, activations=tuple(kept), notes=(*space.notes, said))


def _without_idle_loss(space: Space, peaks: Peaks) -> Space:
    """Leave the chunked loss out where it saves nothing, with all activations or the fewest."""
    ends = [plain_plan(space, space.activations[i]) for i in (0, -1)]
    if len(space.losses) == 1 or any(
        _saves(replace(plan, loss="chunked"), plan, peaks) for plan in ends
    ):
        return space
    said = "chunked loss saves nothing here: the logits are a small part"
    return replace(space, losses=space.losses[:1], notes=(*space.notes, said))


def _saves(changed: Plan, plan: Plan, peaks: Peaks) -> bool:
    return peaks.guess(changed, (1,)) < (1 - _WORTH) * peaks.guess(plan, (1,))
