"""What the planner says of its choice: of the plan, of what it passed over, of what is impossible.

Values in, words out; without torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from narrowcast.errors import UsageError
from narrowcast.planning.choice import Candidate
from narrowcast.records.codec import to_json
from narrowcast.records.plan import PlanPoint
from narrowcast.units import format_bytes, format_duration

__all__ = ["impossible", "less_room", "other_way", "passed_over", "point_of"]


def point_of(candidate: Candidate) -> PlanPoint:
    """Return a candidate as a record has it."""
    return PlanPoint(
        name=candidate.plan.name,
        plan=to_json(candidate.plan),
        exact=candidate.loss == 0,
        predicted_bytes=candidate.bytes,
        traced=candidate.traced,
        seconds=candidate.seconds,
        speed=candidate.speed,
        spread=candidate.spread,
        measured_bytes=candidate.measured_bytes,
        parallel=candidate.parallel,
    )


def less_room(budget: int, room: int, device: str) -> Iterator[str]:
    """Say that a GPU has less to give than the budget allows."""
    if room < budget:
        yield (
            f"of a budget of {format_bytes(budget)} about {format_bytes(room)} can be used on one "
            f"{device}: what was chosen fits into that"
        )


def passed_over(chosen: Candidate, fitting: Iterable[Candidate]) -> Iterator[str]:
    """Name the plan that a roofline calls the fastest, if that was no reason to choose it."""
    fastest = min((chosen, *fitting), key=lambda c: c.seconds)
    if fastest.speed == "roofline" and fastest.stores_loss > chosen.stores_loss:
        yield (
            f"{fastest.setup.name} would take {format_duration(fastest.seconds)} by the "
            "roofline; its stores round more, and a bound alone is no reason to choose them"
        )


def other_way(kind: str, best: Candidate | None, least_bytes: int, budget: int) -> str:
    """Say what was found of a way to share that was not chosen; `least_bytes` is a guess."""
    if best is not None:
        took = f"{format_duration(best.seconds)} a step ({best.speed})"
        return f"by {kind} the fastest that fits is {best.plan.name}: {took}"
    if least_bytes <= budget:
        return f"by {kind} nothing was found that fits"
    return f"by {kind} nothing fits: the least is about {format_bytes(least_bytes)}"


def impossible(
    least: Candidate,
    budget: int,
    *,
    recipe: str,
    batch_size: int,
    world: int,
    keep_batch: bool,
    all_of: str,
) -> UsageError:
    """Return the error for a budget that nothing fits into; it names the least that does.

    `all_of` is the GPU of which the budget is all that can be used, if it is.
    """
    room = format_bytes(budget) + (f" (all that can be used of one {all_of})" if all_of else "")
    batch = " while the batch is kept whole" if keep_batch else ""
    ranks = f" on each of {world} ranks" if world > 1 else ""
    known = "predicted" if least.measured_bytes is None else "measured"
    if least.need > least.bytes:
        known += f" where {least.bytes:,} were predicted"
    return UsageError(
        f"nothing trains {recipe} (batch {batch_size}) in {room}{ranks}{batch}: "
        f"the least that fits is {format_bytes(least.need)} ({least.need:,} bytes, {known}), "
        f"with {least.setup.name}",
        hint="allow that much, or choose a smaller model or batch with --set"
        + (", or leave --keep-batch out" if keep_batch else ""),
    )
