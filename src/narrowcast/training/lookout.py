"""The watch over one run: what it adds to the record, and what it says when the training fails.

A training that gives up says where its last step first went wrong, and the command that finds out
why. One whose loss has risen above its beginning, or is not fp32's, goes on, and says so once.
"""

from __future__ import annotations

import shlex
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from narrowcast import recipes
from narrowcast.plan import PLANS, Plan
from narrowcast.recipes import BUILTIN
from narrowcast.records.diagnosis import ModuleRange
from narrowcast.records.ranges import BorderRange
from narrowcast.records.run import RunRecord
from narrowcast.training.assembly import Assembly, TrainOptions
from narrowcast.training.step import StepTaken
from narrowcast.watch.locate import first_bad_border
from narrowcast.watch.watch import Watch

__all__ = ["Lookout", "NoLookout", "diagnose_command", "lookout_for"]


# Symptoms of a run that goes on; each is told once.
_TOLD = ("loss above its beginning", "loss far off fp32")


class NoLookout:
    """Watches nothing."""

    notes: tuple[str, ...] = ()

    def around(self, part: Any, *, sample: bool) -> AbstractContextManager[object]:
        return nullcontext()

    def after(self, taken: StepTaken) -> str:
        return ""

    def add_to(self, record: RunRecord) -> RunRecord:
        return record


class Lookout:
    """Watches the steps of one run."""

    def __init__(self, parts: Assembly, options: TrainOptions) -> None:
        self._parts, self._options = parts, options
        shadow = parts.recipe.compute_loss if options.shadow else None
        self._watch = Watch(parts.engine, every=options.watch, shadow=shadow)
        self._told: set[str] = set()
        self.notes = self._watch.notes

    def around(self, part: Any, *, sample: bool) -> AbstractContextManager[object]:
        """Return what a micro-batch passes through; its values are left alone without `sample`."""
        return self._watch.passing(part, sample=sample)

    def after(self, taken: StepTaken) -> str:
        """Look at how a step ended; return what is to be told of it.

        An error that ends the run gets the place where the step went wrong into its hint.
        """
        failure = self._watch.after(taken.report, loss=taken.loss)
        if taken.error is not None:
            command = diagnose_command(self._parts, self._options, steps=taken.report.step)
            next_step = f"`{command}` finds the operation, and tries cures"
            said = (taken.error.hint, self._place(), next_step)
            taken.error.hint = "; ".join(part for part in said if part)
            return ""
        if failure is None or failure.symptom not in _TOLD or failure.symptom in self._told:
            return ""
        self._told.add(failure.symptom)
        command = diagnose_command(self._parts, self._options, steps=failure.step)
        return f"{failure.words}: `{command}` tells whether the precision is why"

    def add_to(self, record: RunRecord) -> RunRecord:
        """Return the record with the newest values that were looked at; may read the device."""
        if not self._watch.sampled_at:
            return record
        seen = tuple(map(_in_short, self._watch.ranges))
        return replace(record, watched_at=self._watch.sampled_at, watched=seen)

    def _place(self) -> str:
        """Say where the last step first went wrong; '' where it does not show at a border.

        Of shards a rank cannot take a step again by itself.
        """
        if self._parts.peers.cuts:
            return ""
        failure = self._watch.failure
        for moment in failure.moments if failure is not None else ():
            try:
                found = first_bad_border(
                    self._parts.engine, self._parts.recipe.compute_loss, moment
                )
            except Exception as problem:  # noqa: BLE001 -- the run's own error goes before any of it
                return f"the step could not be taken again to look closer ({problem!s:.80})"
            if found is not None:
                return found.words
        return ""


def lookout_for(parts: Assembly, options: TrainOptions) -> Lookout | NoLookout:
    """Return the watch that the options ask for."""
    return Lookout(parts, options) if options.watch else NoLookout()


def diagnose_command(parts: Assembly, options: TrainOptions, *, steps: int) -> str:
    """Return the command that finds out why a training fails within so many steps."""
    recipe = parts.recipe
    builtin = recipe.name in BUILTIN and recipe.path.parent == Path(recipes.__file__).parent
    words = ["narrowcast", "diagnose", recipe.name if builtin else str(recipe.path)]
    words += [*_asking_for(parts.engine.plan), "--steps", str(steps)]
    words += ["--seed", str(options.seed)] if options.seed else []
    for name, value in recipe.overrides.items():
        words += ["--set", f"{name}={'none' if value is None else value}"]
    return shlex.join(words)


def _asking_for(plan: Plan) -> list[str]:
    """Return the options that ask for a plan; ``--policy FILE`` where no name stands for it."""
    named = PLANS.get(plan.name)
    if named is None:
        return ["--policy", "FILE"]
    kept, rules = plan.policy.keep_fp32, plan.policy.autocast_rules
    asked = replace(named.policy, keep_fp32=kept, autocast_rules=rules)
    if named.with_policy(asked) != plan:
        return ["--policy", "FILE"]
    words = ["--precision", plan.name]
    for entry in kept:
        words += ["--keep-fp32", entry] if entry not in named.policy.keep_fp32 else []
    return words if rules == named.policy.autocast_rules else [*words, "--autocast-rules", rules]


def _in_short(one: ModuleRange) -> BorderRange:
    values = one.values
    return BorderRange(
        module=one.module,
        phase="forward" if one.phase == "forward" else "backward",
        dtype=values.dtype,
        numel=values.numel,
        zeros=values.zeros,
        nonfinite=values.nans + values.infs,
        amax=values.amax,
        amin=values.amin,
        rms=values.rms,
    )
