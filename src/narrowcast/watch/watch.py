"""Watches a training at next to no cost, so that a step that fails can be looked at afterwards.

Three things are kept while steps go by: the last batches with the random states before them, which
is what a step needs to be taken again; every N steps what crossed the borders of the modules; and
the symptoms of failing, from figures that each step leaves behind. Nothing of it changes a bit.

    watch = Watch(engine)
    for batch in batches:
        with watch.step(batch):
            with engine.forward():
                loss = loss_function(model, batch)
            engine.backward(loss)
            engine.step()
        if watch.failure:
            print(watch.failure.words)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import fmean
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves  # torch's only walker of nests

from narrowcast.compiling import is_compiled
from narrowcast.engine.engine import Engine, StepReport
from narrowcast.errors import UsageError
from narrowcast.records.diagnosis import ModuleRange
from narrowcast.replay.moment import Moment
from narrowcast.replay.step import reference_loss
from narrowcast.scaling.scales import DynamicScale
from narrowcast.watch.boundaries import Boundaries
from narrowcast.watch.failure import Failure, LossLevel, Symptom, is_far_off, skip_symptom
from narrowcast.watch.snapshots import Snapshots

__all__ = ["EVERY", "KEEP", "Watch"]

EVERY = 100
"""A sampled step takes twice a plain one (docs/watch.md); a hundredth of them costs 1 %."""
KEEP = 4
"""Steps whose batches are kept."""

_COMPILED = (
    "the model is compiled: the watch sees its losses, skipped steps and batches, but no values "
    "inside"
)

# Batches but the newest, which is in use anyway, are let go beyond this.
_PAST_BYTES = 16 << 20
# The first step makes states, and a training measures the next two itself.
_FIRST_SAMPLE = 4
# Steps at the beginning that are asked which random generators they move.
_PROBED = 3


class Watch:
    """Watches the steps that `engine` takes; `every` steps the values, 0 never.

    The last `keep` steps can be replayed: their batches are held by reference, those before the
    newest only up to 16 MiB. `optimizer` names one where the engine has several. A compiled model
    is not looked into, which `notes` says.

    With `shadow`, ``compute_loss(model, batch)``, each step whose values are looked at is preceded
    by a forward pass in fp32 on the same weights, batch and random numbers, and `after` holds the
    loss that it is given against that one.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        every: int = EVERY,
        keep: int = KEEP,
        optimizer: str | None = None,
        shadow: Callable[[nn.Module, Any], Tensor] | None = None,
    ) -> None:
        for name, value, least in (("every", every, 0), ("keep", keep, 1)):
            if not isinstance(value, int) or value < least:
                raise UsageError(
                    f"Watch({name}={value!r})", hint=f"it is a number of steps, {least} or more"
                )
        self.engine = engine
        self.failure: Failure | None = None
        """What the newest step was a symptom of; None for a healthy one."""
        self.sampled_at = 0
        """The newest step whose values were looked at; 0 before the first."""
        self.notes = (_COMPILED,) if every and is_compiled(engine.model) else ()
        self._every, self._keep, self._name = every, keep, optimizer
        self._shadow = shadow
        self._shadows: list[float] = []
        """What fp32 gave for each micro-batch of the step under way."""
        self._rounds = bool(Moment.of(engine, None, 0, name=optimizer).roundings)
        self._snapshots = Snapshots()
        self._moments: deque[Moment] = deque()
        self._sizes: deque[int] = deque()
        self._held_bytes = 0
        """Of all batches but the newest."""
        self._step = 0
        self._seen_steps = 0
        self._skipped = 0
        """Skipped steps before the one under way."""
        self._row = 0
        self._level = LossLevel()
        self._open: Boundaries | None = None
        self._sampled: Boundaries | None = None
        self._ranges: tuple[ModuleRange, ...] | None = ()
        self._pass = _Pass(self)

    def batch(self, batch: Any, *, sample: bool = True) -> None:
        """Note a micro-batch, just before its forward pass; `sample` False leaves values alone."""
        self.end_pass()
        engine, name = self.engine, self._name
        tried = engine.tried_steps(name)
        scales = engine.loss_scales(name)
        is_first = self._step != tried + 1
        if is_first:
            self._step = tried + 1
            self._seen_steps += 1
            self._skipped = tried - engine.applied_steps(name)
        samples = sample and is_first and self._is_due()
        random = self._snapshots.take(probe=samples or (is_first and self._seen_steps <= _PROBED))
        place = 0 if is_first else self._moments[-1].micro_batch + 1
        if self._rounds or not scales:
            moment = Moment.of(
                engine, batch, self._step, random=random, name=name, micro_batch=place
            )
        else:
            moment = Moment(
                step=self._step, batch=batch, random=random, scales=scales, micro_batch=place
            )
        self._hold(moment)
        if is_first:
            self._shadows = []
        if sample and self._shadow is not None and self._is_due():
            self._shadows.append(reference_loss(engine, self._shadow, moment))
        if samples:
            self._open = Boundaries(engine.model, _common(moment.scales))
            self._open.__enter__()

    def passing(self, batch: Any, *, sample: bool = True) -> _Pass:
        """Return what the forward and backward pass of a micro-batch run under."""
        self.batch(batch, sample=sample)
        return self._pass

    def end_pass(self) -> None:
        """Take off what a sampled pass was watched with; the next call of any kind does so too."""
        self._snapshots.end()
        if self._open is not None:
            self._open.close()
            self.sampled_at = self._step
            self._sampled, self._ranges, self._open = self._open, None, None

    def after(
        self,
        report: StepReport | None = None,
        *,
        loss: float | None = None,
        shadow: float | None = None,
    ) -> Failure | None:
        """Look at how a step ended; return what it is a symptom of, as `failure` does.

        `report` is `engine.step`'s; without it the engine is asked whether the step was skipped.
        With `loss`, on the host (of all micro-batches the mean), its level is followed; with
        `shadow`, the loss that fp32 gave on the same batch and weights, the two are compared. It is
        taken by itself where the watch was made with a function for it.
        """
        if report is not None and not report.complete:
            return None
        self.end_pass()
        report = report or self._last_report()
        if report is None or not self._moments:
            return None
        self._row = 0 if report.applied else self._row + 1
        if shadow is None and self._shadows:
            shadow = fmean(self._shadows)
        symptom, words = self._symptom(report, loss, shadow)
        self.failure = None
        if symptom is not None:
            moments = tuple(moment for moment in self._moments if moment.step == self._step)
            self.failure = Failure(step=self._step, symptom=symptom, words=words, moments=moments)
        return self.failure

    @contextmanager
    def step(self, batch: Any) -> Iterator[None]:
        """Watch a micro-batch from its forward pass to ``engine.step()``, also one that raises."""
        self.batch(batch)
        try:
            yield
        finally:
            self.end_pass()
            self.after()

    @property
    def moments(self) -> tuple[Moment, ...]:
        """The last micro-batches, the newest last, as `replay` takes them."""
        return tuple(self._moments)

    @property
    def ranges(self) -> tuple[ModuleRange, ...]:
        """What crossed the modules' borders in the newest sampled step; may read the device."""
        if self._ranges is None and self._sampled is not None:
            self._ranges, self._sampled = self._sampled.ranges(), None
        return self._ranges or ()

    def _is_due(self) -> bool:
        """Whether to look at the values of the step that begins."""
        since = self._step - _FIRST_SAMPLE
        is_time = self._every > 0 and since >= 0 and since % self._every == 0
        return is_time and not is_compiled(self.engine.model)

    def _hold(self, moment: Moment) -> None:
        """Keep a moment, and let go of old ones: beyond `keep` steps, or too large together."""
        if self._sizes:
            self._held_bytes += self._sizes[-1]
        self._moments.append(moment)
        self._sizes.append(_nbytes(moment.batch))
        while len(self._moments) > 1 and (
            self._moments[0].step <= moment.step - self._keep or self._held_bytes > _PAST_BYTES
        ):
            self._moments.popleft()
            self._held_bytes -= self._sizes.popleft()

    def _last_report(self) -> StepReport | None:
        """Reconstruct how the step under way ended; None while it has not."""
        engine, name = self.engine, self._name
        tried = engine.tried_steps(name)
        if tried < self._step:
            return None
        if tried - engine.applied_steps(name) == self._skipped:
            return StepReport(applied=True, step=tried, loss_scale=1.0)
        skip = engine.skips[-1]
        return StepReport(
            reason=skip.reason,
            step=skip.step,
            loss_scale=skip.loss_scale,
            parameters=skip.parameters,
        )

    def _symptom(
        self, report: StepReport, loss: float | None, shadow: float | None
    ) -> tuple[Symptom | None, str]:
        if not report.applied:
            floor = self._floor(report)
            symptom = skip_symptom(
                report.reason, row=self._row, scale=report.loss_scale, floor=floor
            )
            row = "" if self._row == 1 else f", the skip number {self._row} in a row"
            return symptom, (
                f"{report.reason} at step {report.step}, at loss scale {report.loss_scale:g}{row}"
            )
        if loss is not None and shadow is not None and is_far_off(loss, shadow):
            return "loss far off fp32", (
                f"the loss is {loss:.6g} at step {report.step}, and {shadow:.6g} in fp32"
            )
        if loss is not None and self._level.add(loss):
            return "loss above its beginning", f"at step {report.step} {self._level.words}"
        return None, ""

    def _floor(self, report: StepReport) -> float | None:
        """Return what the scale of a skipped step's loss can come down to."""
        scales = self.engine._lane(self._name).scales
        known = scales.get(report.loss) or next(iter(scales.values()), None)
        return known.floor if isinstance(known, DynamicScale) else None


class _Pass:
    """The context of one forward and backward pass: made once, as a step may take 150 us."""

    __slots__ = ("_watch",)

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._watch.end_pass()


def _common(scales: Mapping[str, float]) -> float | None:
    """Return the scale of all losses; None if they differ, and a gradient could be any's."""
    values = set(scales.values())
    return values.pop() if len(values) == 1 else None


def _nbytes(batch: Any) -> int:
    leaves = batch if isinstance(batch, (tuple, list)) else tree_leaves(batch)
    if not all(isinstance(leaf, Tensor) for leaf in leaves):
        leaves = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    return sum(leaf.nbytes for leaf in leaves)
