"""Whether a training would work under another plan: asked of its failing step, not of a new run.

A remedy and a set of modules kept in fp32 are tried alike: the kept steps are replayed under the
changed plan, from the same weights, and judged by the rules that accused the training. It works if
nothing is accused any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from narrowcast.diagnosis.evidence import Evidence
from narrowcast.diagnosis.gather import gather, on_its_own, reference_of
from narrowcast.diagnosis.judge import findings_of
from narrowcast.diagnosis.snapshot import Snapshot
from narrowcast.diagnosis.subject import Subject
from narrowcast.diagnosis.updates import holding_matrices, lost_updates
from narrowcast.diagnosis.verdict import in_steps
from narrowcast.errors import NarrowcastError, UsageError
from narrowcast.plan import Plan
from narrowcast.randomness import isolated, restore_random_state
from narrowcast.ranges.meter import UpdateMeter, WeightUpdates
from narrowcast.records.diagnosis import Finding, Kind
from narrowcast.replay.step import StepTrace
from narrowcast.training.step import take_step

__all__ = ["Outcome", "Stage", "metered_step"]

# What shows in loss and gradients alone, without a look at the operations.
_SEEN_FROM_OUTSIDE: tuple[Kind, ...] = (
    "forward overflow",
    "backward overflow",
    "backward underflow",
    "scale too low",
    "scale too high",
    "scale thrashing",
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of the kept steps under a plan."""

    works: bool
    words: str
    findings: tuple[Finding, ...] = ()
    ran: bool = True
    """False where the plan cannot be, or the training raises under it."""


class Stage:
    """The kept steps of a failing training, on which plans are tried; `calls` counts them.

    `accused` is the finding that is to go away; `is_off` as in `judge.findings_of`.
    """

    def __init__(
        self,
        subject: Subject,
        snapshots: Sequence[Snapshot],
        accused: Finding,
        *,
        is_off: bool = False,
    ) -> None:
        self.subject = subject
        self.is_off = is_off
        self.snapshots = tuple(snapshots)
        self.accused = accused
        self.calls = 0
        self._references: dict[int, StepTrace] = {}

    def with_more(self, snapshots: Sequence[Snapshot]) -> Stage:
        """Return a stage on which these steps have to work as well; its calls count on."""
        more = Stage(self.subject, (*self.snapshots, *snapshots), self.accused, is_off=self.is_off)
        more.calls = self.calls
        more._references = self._references
        return more

    def try_plan(self, plan: Plan, *, scale: float | None = None, look: bool = False) -> Outcome:
        """Replay the kept steps under a plan; `scale` replaces the loss scale to begin with.

        Operations are looked at where the accusation needs it, and with `look`, which names what
        fails now in the findings.
        """
        self.calls += 1
        try:
            if self.accused.kind == "lost updates":
                return self._try_updates(plan)
            return self._try_steps(plan, scale, look=look)
        except UsageError as error:
            return Outcome(works=False, words=f"cannot be: {error.message}", ran=False)
        except NarrowcastError as error:
            return Outcome(works=False, words=error.message.partition("\n")[0], ran=False)

    def _try_steps(self, plan: Plan, scale: float | None, *, look: bool) -> Outcome:
        look = look or self.is_off or self.accused.kind not in _SEEN_FROM_OUTSIDE
        evidence = [self._evidence(plan, each, scale, look=look) for each in self.snapshots]
        # One scale has to serve all of them.
        lowest = min(each.low.scale for each in evidence)
        if not any(each.is_loud for each in evidence):
            evidence = [
                each if each.low.scale == lowest else self._evidence(plan, kept, lowest, look=look)
                for each, kept in zip(evidence, self.snapshots, strict=True)
            ]
        return _outcome(evidence, is_off=self.is_off)

    def _evidence(
        self, plan: Plan, snapshot: Snapshot, scale: float | None, *, look: bool
    ) -> Evidence:
        reference = self._references.get(id(snapshot))
        if reference is None:
            reference = self._references[id(snapshot)] = reference_of(self.subject, plan, snapshot)
        return gather(self.subject, plan, snapshot, scale=scale, reference=reference, look=look)

    def _try_updates(self, plan: Plan) -> Outcome:
        metered = [metered_step(self.subject, plan, each) for each in self.snapshots]
        found = lost_updates(metered, holding_matrices(self.subject.rig(plan).engine.model))
        updated = sum(each.weight.updated for step in metered for each in step)
        if found:
            return Outcome(works=False, words=found[0].explanation, findings=found)
        if not updated:
            return Outcome(works=True, words="all weights are stored in fp32: no update is lost")
        arrived = [each.weight.carried for step in metered for each in step if each.weight.carried]
        mean = sum(arrived) / len(arrived) if arrived else 0.0
        over = f"on average over {updated} of them in {in_steps(len(metered))}"
        return Outcome(works=True, words=f"{mean:.0%} of the updates arrive, {over}")


def metered_step(subject: Subject, plan: Plan, snapshot: Snapshot) -> tuple[WeightUpdates, ...]:
    """Take a kept step for real on an engine of its own, and meter its updates."""
    rig = on_its_own(subject, plan, snapshot)
    meter = UpdateMeter(rig.optimizer, rig.engine.model)
    batches = (moment.batch for moment in snapshot.moments)
    with isolated(subject.seed, "training"), meter:
        restore_random_state(dict(snapshot.moments[0].random))
        take_step(rig.engine, subject.compute_loss, lambda: next(batches), path=subject.path)
    return meter.updates


def _outcome(evidence: Sequence[Evidence], *, is_off: bool) -> Outcome:
    """Judge all steps together."""
    loud = next((each for each in evidence if each.is_loud), None)
    findings = tuple(finding for each in evidence for finding in findings_of(each, is_off=is_off))
    if loud is not None:
        return Outcome(works=False, words=_failure(loud), findings=findings)
    if findings:
        return Outcome(works=False, words=findings[0].explanation, findings=findings)
    first = evidence[0]
    scale = f" at a loss scale of {first.low.scale:g}" if first.low.scale != 1 else ""
    return Outcome(
        works=True,
        words=(
            f"loss {first.low.loss:.4g} (fp32: {first.reference.loss:.4g}), all gradients "
            f"finite{scale}"
        ),
    )


def _failure(evidence: Evidence) -> str:
    low = evidence.low
    broken = [name for name, values in low.gradients.items() if not values.is_finite]
    if low.loss - low.loss != 0:
        return f"the loss is {low.loss:g}"
    return (
        f"the gradients of {len(broken)} parameters are not finite at a loss scale of {low.scale:g}"
    )
