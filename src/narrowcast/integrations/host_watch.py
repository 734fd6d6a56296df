"""A training in a foreign trainer looked at while it runs, from what its callbacks can know.

`narrowcast.watch.Watch` keeps batches, so that a step can be taken again; a trainer hands out none.
What is left needs only the model and the outcome of each step: every N steps what crosses the
borders of modules, the symptoms of failing, and, in the step after one that was skipped, the first
border at which numbers stop being finite.
"""

from __future__ import annotations

from torch import nn

from narrowcast.compiling import is_compiled
from narrowcast.dropin.grad_scaler import GradScaler
from narrowcast.errors import UsageError
from narrowcast.integrations.finite_check import FiniteCheck
from narrowcast.records.diagnosis import ModuleRange
from narrowcast.scaling.scales import DynamicScale
from narrowcast.scaling.skips import StepOutcome
from narrowcast.watch.boundaries import Boundaries
from narrowcast.watch.failure import LossLevel, Symptom, skip_symptom
from narrowcast.watch.locate import BadBorder

__all__ = ["HostWatch"]


class HostWatch:
    """Watches the steps of one model; looks at values every `every` steps, never with 0."""

    def __init__(self, model: nn.Module, scaler: GradScaler | FiniteCheck, every: int) -> None:
        if not isinstance(every, int) or every < 0:
            raise UsageError(f"watch_every={every!r}", hint="a number of steps, 0 for never")
        self.sampled_at = 0
        """The newest step whose values were looked at; 0 before the first."""
        self.ranges: tuple[ModuleRange, ...] = ()
        """What crossed the modules' borders in that step."""
        self.failures: tuple[str, ...] = ()
        """What the training showed of failing so far, each kind once."""
        self.notes: tuple[str, ...] = ()
        """Why nothing is looked at, where it was asked for."""
        self._model, self._scaler = model, scaler
        self._every = every
        if every and is_compiled(model):
            self._every = 0
            self.notes = ("values at borders are not watched: a compiled module calls no hooks",)
        self._open: Boundaries | None = None
        self._row = 0
        self._step = 0
        self._level = LossLevel()
        self._told: set[Symptom | str] = set()

    def begin(self, step: int) -> None:
        """Note that a step begins, from 1; look at its values if it is time."""
        if self._open is not None:
            self.close()
        self._step = step
        if self._every and (self._row or step % self._every == 0):
            self._open = Boundaries(self._model, self._scaler.get_scale())
            self._open.__enter__()

    def close(self) -> None:
        """Take off what the step was watched with: forward and backward are over."""
        if self._open is not None:
            self._open.close()
            self.ranges, self._open = self._open.ranges(), None
            self.sampled_at = self._step

    def after(self, outcome: StepOutcome) -> str:
        """Look at how the step ended; return a symptom that is new, in words, or ''."""
        if self._open is not None:
            self.close()
        skip = outcome.skip
        if skip is None:
            self._row = 0
            return ""
        self._row += 1
        value = self._scaler.value
        floor = value.floor if isinstance(value, DynamicScale) else None
        symptom = skip_symptom(skip.reason, row=self._row, scale=skip.loss_scale, floor=floor)
        if symptom is None:
            return ""
        where = self._first_bad() if self.sampled_at == self._step else ""
        named = f" in {', '.join(skip.parameters)}" if skip.parameters else ""
        said = f"{symptom} at step {self._step}{named}"
        return self._new(f"{symptom} {bool(where)}", f"{said}: {where}" if where else said)

    def heard(self, loss: float) -> str:
        """Follow the level of a loss; return words when it is above where it began, once."""
        if not self._level.add(loss):
            return ""
        return self._new("level", f"at step {self._step} {self._level.words}")

    def _new(self, kind: str, words: str) -> str:
        if kind in self._told:
            return ""
        self._told.add(kind)
        self.failures += (words,)
        return words

    def _first_bad(self) -> str:
        """Name the first border of the step whose values are not finite."""
        for phase in ("forward", "backward"):
            for one in self.ranges:
                if one.phase == phase and not one.values.is_finite:
                    return BadBorder(crossed=one).words
        return ""
