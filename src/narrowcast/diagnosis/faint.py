"""Rules for gradients that are lost to zero, and for a loss scale that serves no step for long.

fp16 ends at 6e-8. What a parameter's gradient has lost there shows in its zeros: those that fp32
does not have, on the same weights and data, are lost. Whether a higher scale would have kept them
without an overflow tells the two causes apart: a scale that is too low, or gradients that need more
range than the format has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from narrowcast.diagnosis.evidence import Evidence, lost_share, parent
from narrowcast.diagnosis.silent import MOST
from narrowcast.records.diagnosis import ExecutedOp, Finding
from narrowcast.replay.step import StepTrace

__all__ = ["Lost", "lost_by_module", "scale_too_high", "underflows"]


@dataclass(frozen=True, kw_only=True)
class Lost:
    """The gradients of one module's own parameters."""

    elements: int
    """Those that are not 0 in fp32."""
    lost: float
    """Those of them that are 0 in low precision."""
    largest: float
    """Largest gradient in fp32."""

    @property
    def share(self) -> float:
        return self.lost / self.elements if self.elements else 0.0


def lost_by_module(low: StepTrace, reference: StepTrace) -> dict[str, Lost]:
    """Count the gradient elements that only fp32 has, by the module that holds the parameter."""
    found: dict[str, Lost] = {}
    for name, wanted in reference.gradients.items():
        elements = wanted.numel - wanted.zeros
        got = low.gradients.get(name)
        share = lost_share(got, wanted) if got is not None else float(elements > 0)
        before = found.get(parent(name), Lost(elements=0, lost=0.0, largest=0.0))
        found[parent(name)] = Lost(
            elements=before.elements + elements,
            lost=before.lost + share * elements,
            largest=max(before.largest, wanted.amax),
        )
    return found


def underflows(evidence: Evidence) -> tuple[Finding, ...]:
    """Accuse modules that lose most of their gradient to zero, nearest the loss first.

    One finding, "scale too low", where most of all gradients are lost and a higher scale keeps
    them.
    """
    if not evidence.has_short_range or evidence.is_loud:
        return ()
    modules = lost_by_module(evidence.low, evidence.reference)
    accused = {name: lost for name, lost in modules.items() if lost.share >= MOST}
    if not accused:
        return ()
    keeping = _keeping(evidence, accused)
    overall = sum(m.lost for m in modules.values()) / sum(m.elements for m in modules.values())
    if keeping is not None and overall >= MOST:
        return (_scale_too_low(evidence, overall, keeping),)
    order = _arrivals(evidence.low.events)
    nearest = sorted(accused, key=lambda name: order.get(name, len(order)))
    return tuple(_underflow(evidence, name, accused[name], keeping) for name in nearest)


def scale_too_high(evidence: Evidence) -> Finding | None:
    """Accuse the loss scale of a step that overflows at it, and at a lower one loses little.

    Only the training's own choice can be too high: a scale that never moves, or a floor above 1.
    """
    best, high = evidence.best, evidence.low.scale
    if not evidence.is_loud or best is None or best.scale >= high:
        return None
    if any(lost.share >= MOST for lost in lost_by_module(best, evidence.reference).values()):
        return None
    broken = sum(not values.is_finite for values in evidence.low.gradients.values())
    return Finding(
        kind="scale too high",
        phase="backward",
        explanation=(
            f"at a loss scale of {high:g}, the lowest that this training allows, the gradients of "
            f"{broken} of {len(evidence.low.gradients)} parameters overflow in {evidence.compute}; "
            f"at {best.scale:g} none does, and no module loses most of its own to zero."
        ),
        figures={
            "loss scale": high,
            "parameters that overflow": float(broken),
            "scale that keeps them": best.scale,
        },
    )


def _keeping(evidence: Evidence, accused: Mapping[str, Lost]) -> StepTrace | None:
    """Return the replay at a higher scale, if it keeps what the accused modules lose."""
    best = evidence.best
    if best is None or best.scale <= evidence.low.scale:
        return None
    there = lost_by_module(best, evidence.reference)
    return best if all(there[name].share < MOST for name in accused) else None


def _arrivals(events: tuple[ExecutedOp, ...]) -> dict[str, int]:
    """Map each module to its place in the order in which gradients were complete."""
    names = [parent(result) for op in events for result in op.results if result != "loss"]
    return {name: place for place, name in enumerate(dict.fromkeys(names))}


def _scale_too_low(evidence: Evidence, share: float, keeping: StepTrace) -> Finding:
    low = evidence.low.scale
    return Finding(
        kind="scale too low",
        phase="backward",
        explanation=(
            f"at a loss scale of {low:g}, {share:.0%} of the gradient elements that are not 0 in "
            f"fp32 are 0 in {evidence.compute}; at {keeping.scale:g} nothing overflows, and they "
            "are kept."
        ),
        figures={"lost": share, "loss scale": low, "scale that keeps them": keeping.scale},
    )


def _underflow(evidence: Evidence, module: str, lost: Lost, keeping: StepTrace | None) -> Finding:
    last = next(
        (
            op
            for op in evidence.low.events
            if op.phase == "backward" and op.module == module and op.line
        ),
        None,
    )
    scale = f"at a loss scale of {evidence.low.scale:g}, "
    if keeping is not None:
        cure = f"a scale of {keeping.scale:g} keeps them."
    elif evidence.best is not None:
        cure = (
            f"at {evidence.best.scale:g}, the largest scale that does not overflow elsewhere, they "
            "are lost as well: no scale serves both."
        )
    else:
        cure = "no higher scale was tried."
    return Finding(
        kind="backward underflow",
        module=module,
        op=last.op if last else "",
        phase="backward",
        file=last.file if last else "",
        line=last.line if last else 0,
        code=last.code if last else "",
        explanation=(
            f"{scale}{lost.share:.0%} of the {lost.elements} gradient elements of "
            f"{module or 'the model'!r} that are not 0 in fp32 (the largest is {lost.largest:.1e}) "
            f"are 0 in {evidence.compute}; {cure}"
        ),
        figures={
            "lost": lost.share,
            "elements": float(lost.elements),
            "largest gradient in fp32": lost.largest,
            "loss scale": evidence.low.scale,
            **({"scale that keeps them": keeping.scale} if keeping else {}),
        },
        evidence=(last,) if last else (),
    )
