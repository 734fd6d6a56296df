"""The rule for a loss scale that never settles: overflows that come again and again.

A scale comes down a few times in every fp16 training. It thrashes where no scale would do: at the
largest one that overflows in none of the kept steps, a module's gradients are lost to zero. Or
where gradients outgrow it step by step, or it is raised so eagerly that it overflows each time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from narrowcast.diagnosis.broken import told
from narrowcast.diagnosis.course import Course
from narrowcast.records.diagnosis import Finding
from narrowcast.replay.culprit import first_bad
from narrowcast.replay.step import StepTrace

__all__ = ["is_restless", "thrashing"]

# Rows of skips after the first applied step: one or two are the rest of the calibration.
_EPISODES = 3
# Of the steps after the first applied one. numerics.md section 5: one in twenty asks for a look.
_SHARE = 0.05
# A scale that only comes down is lowered by gradients that are larger than all before. Of n numbers
# drawn by chance, ln n + 0.577 are (Renyi 1962, on records); twice that is another process.
_EULER = 0.5772


def is_restless(course: Course) -> bool:
    """Whether overflows came often enough, after a scale had been found, to ask for a reason."""
    skipped, of = _late_skips(course)
    return course.episodes >= _EPISODES and skipped >= _SHARE * of


def _late_skips(course: Course) -> tuple[int, int]:
    """Count the skipped steps since the first applied one, and all steps since then."""
    flags = [point.applied for point in course.points]
    later = flags[flags.index(True) :] if True in flags else []
    return later.count(False), len(later)


def thrashing(
    course: Course, lost: Sequence[Finding], overflowing: StepTrace | None, scale: float
) -> Finding | None:
    """Accuse the scale, if nothing that is constant serves.

    `lost` is what a typical step is accused of at `scale`, the largest one that overflows nowhere;
    `overflowing` is a skipped step at the scale at which it was skipped.
    """
    raised = sum(b.scale > a.scale for a, b in zip(course.points, course.points[1:], strict=False))
    often = f"{course.episodes} times after the scale had been found, steps overflowed"
    figures = {"episodes": float(course.episodes), "times raised": float(raised)}
    bad = first_bad(overflowing.events) if overflowing is not None else None
    if lost:
        first = lost[0]
        return Finding(
            kind="scale thrashing",
            explanation=(
                f"{often}; at {scale:g}, where none does, {first.explanation} No scale serves all "
                "steps: the gradients' range is wider than the format's."
            ),
            figures={**figures, **first.figures},
            evidence=bad.evidence if bad else (),
            **(told(bad.op) if bad else {"module": first.module, "phase": "backward"}),
        )
    skipped, of = _late_skips(course)
    if raised < _EPISODES - 1 and skipped >= 2 * (math.log(of) + _EULER):
        return Finding(
            kind="scale thrashing",
            explanation=(
                f"{often}: {skipped} of the {of} steps since then were thrown away while the scale "
                f"came down to {course.points[-1].scale:g}. Gradients that vary by chance alone "
                f"would have cost about {math.log(of) + _EULER:.0f}: these outgrow the scale."
            ),
            figures={**figures, "skipped": float(skipped), "scale that serves": scale},
            phase="backward",
            evidence=bad.evidence if bad else (),
        )
    if raised >= _EPISODES - 1:
        return Finding(
            kind="scale thrashing",
            explanation=(
                f"{often}, and {raised} times in between the scale was raised again: the interval "
                "of growth is too short. A longer one would leave it where it serves."
            ),
            figures={**figures, "scale that serves": scale},
            phase="backward",
            evidence=bad.evidence if bad else (),
        )
    return None
