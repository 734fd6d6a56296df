"""Choosing among plans whose peaks and speeds are known: values in, values out, no torch.

The fastest that fits is chosen; of those that are as fast but for the noise of the measurement, the
one that changes the result least, and then the one that takes fewer choices to explain. Where no
step can be timed, stores that round are chosen only where none that round less fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from narrowcast.plan import Plan
from narrowcast.records.plan import SpeedSource, name_of
from narrowcast.units import format_bytes, format_duration

__all__ = ["LEAST_NOISE", "Candidate", "Setup", "choose", "frontier", "leagues", "worth_a_look"]

LEAST_NOISE = 0.05
"""Two medians of a few steps that differ by less say nothing, however still the machine was."""


@dataclass(frozen=True)
class Setup:
    """What there is to choose: a plan, and the way in which ranks share a training by it."""

    plan: Plan
    parallel: str = ""
    """One of ``parallel.together.KINDS``; "" for a process that is alone."""

    @property
    def name(self) -> str:
        """What the user is told: the plan's name, and on ranks the way to share."""
        return name_of(self.plan.name, self.parallel)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A plan with what is known of it."""

    plan: Plan
    parallel: str = ""
    """How ranks share the training; "" for a process that is alone."""
    bytes: int
    traced: bool
    seconds: float
    speed: SpeedSource
    loss: int
    """How lossy it is (``axes.loss_of``); 0 is exact."""
    levers: int
    """How many axes it changes; ddp is how ranks share anyway, and fsdp2 is one more."""
    stores_loss: int = 0
    """How lossy its stores alone are."""
    spread: float = 0.0
    measured_bytes: int | None = None

    @property
    def setup(self) -> Setup:
        """What of it can be chosen."""
        return Setup(self.plan, self.parallel)

    @property
    def need(self) -> int:
        """What it takes: the prediction, or the peak of a step that took more."""
        return max(self.bytes, self.measured_bytes or 0)


def choose(finalists: Sequence[Candidate]) -> tuple[Candidate, float, str]:
    """Return the choice among plans that fit, the noise that was allowed for, and the reason."""
    fastest = min(finalists, key=lambda c: c.seconds)
    noise = max(LEAST_NOISE, fastest.spread)
    near = [c for c in finalists if c.seconds <= fastest.seconds * (1 + noise)]
    chosen = min(near, key=lambda c: (c.loss, c.levers, c.seconds))
    return chosen, noise, _why(chosen, fastest, finalists, noise)


def _why(
    chosen: Candidate, fastest: Candidate, finalists: Sequence[Candidate], noise: float
) -> str:
    count = f"of {len(finalists)} that fit and were compared" if len(finalists) > 1 else "that fits"
    if len(finalists) > 1 and chosen.speed == "roofline":  # see `leagues`
        count += " (stores that round more than they must were not)"
    took = f"{format_duration(chosen.seconds)} a step ({chosen.speed})"
    if chosen is fastest:
        return f"the fastest {count}: {took}, {format_bytes(chosen.bytes)} at the peak"
    reason = "changes the result less" if chosen.loss < fastest.loss else "needs fewer changes"
    return (
        f"as fast as the fastest {count} within the noise of {noise:.0%} ({fastest.setup.name}, "
        f"{format_duration(fastest.seconds)}), and {reason}: {took}, {format_bytes(chosen.bytes)} "
        "at the peak"
    )


def frontier(found: Iterable[Candidate]) -> list[Candidate]:
    """Return the plans that no other beats in both memory and speed, the fastest first."""
    ranked = sorted(found, key=lambda c: (c.seconds, c.bytes, c.loss, c.levers))
    kept: list[Candidate] = []
    for candidate in ranked:
        if not kept or candidate.bytes < kept[-1].bytes:
            kept.append(candidate)
    return kept


def leagues(ranked: Sequence[Candidate]) -> list[list[Candidate]]:
    """Group candidates so that one is considered only where nothing of an earlier group fits.

    Where steps are timed, all are one group. A roofline counts bytes, so that whatever holds fewer
    looks faster: by that alone no store that rounds is chosen while one that rounds less fits.
    """
    if any(c.speed != "roofline" for c in ranked):
        return [list(ranked)]
    levels = sorted({c.stores_loss for c in ranked})
    return [[c for c in ranked if c.stores_loss == level] for level in levels]


def worth_a_look(
    ranked: Iterable[Candidate],
    fits: Callable[[Candidate], Candidate | None],
    *,
    most: int,
    slack: float,
) -> list[Candidate]:
    """Return up to `most` plans that fit, from the fastest on; `fits` settles a plan's peak.

    A plan that is not more accurate than a faster one, by more than estimates can err (`slack`),
    can never be chosen and is passed over, its peak unsettled; so is all that is slower than the
    fastest that fits by `slack`, since only speed and then accuracy count.
    """
    found: list[Candidate] = []
    for candidate in ranked:
        if len(found) >= most:
            break
        if found and candidate.seconds > found[0].seconds * (1 + slack):
            break
        if any(_is_beaten(candidate, by=other, slack=slack / 2) for other in found):
            continue
        settled = fits(candidate)
        if settled is not None:
            found.append(settled)
    return found


def _is_beaten(candidate: Candidate, *, by: Candidate, slack: float) -> bool:
    return by.loss <= candidate.loss and by.seconds * (1 + slack) <= candidate.seconds
