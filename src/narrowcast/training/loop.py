"""The only training loop, and the run that it turns.

    while True:
        evaluate, if it is time and was not done        (so a resumed run catches up)
        save a checkpoint, if it is time or we shall stop
        stop, if all steps are taken or somebody asked
        take a step, and append it to metrics.jsonl

A run that is stopped anywhere and resumed passes through the same states as one that is not: every
piece of state is in the checkpoint, and nothing that only observes (evaluation, measurement) can
shift it. What is told on the way goes to an observer; this file prints nothing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import torch

from narrowcast.data import split_batch, to_device
from narrowcast.errors import PrecisionError, RunDirectoryError
from narrowcast.precision.device import warnings_before_run
from narrowcast.randomness import isolated
from narrowcast.records.codec import from_json, to_json
from narrowcast.records.run import RunRecord, Status, StepPoint
from narrowcast.training import checkpoint
from narrowcast.training.assembly import Assembly, TrainOptions, round_apart, steps_of
from narrowcast.training.budget import budget_not_kept
from narrowcast.training.compilation import compiled_in_part, with_compilation
from narrowcast.training.early_steps import EarlySteps, PeakMemory
from narrowcast.training.evaluation import evaluate_model, nonfinite_notes, restored_notes
from narrowcast.training.events import Ended, Notice, Observer, Saved, Started
from narrowcast.training.interruption import Interruption
from narrowcast.training.lookout import lookout_for
from narrowcast.training.model_state import (
    load_model_state,
    made_buffers,
    model_state,
    shapes_of_buffers,
)
from narrowcast.training.progress import Progress
from narrowcast.training.ranks import (
    NoMetrics,
    StepEnd,
    gathered_streams,
    kind_of,
    moved_notes,
    reason_of,
    require_same_weights,
    restore_streams,
    resumed_record,
    shared_notes,
    was_interrupted,
    with_peaks,
)
from narrowcast.training.run_directory import MetricsLog, RunDirectory
from narrowcast.training.step import Watching, take_step

__all__ = ["Run"]

# A run that keeps being interrupted should lose little of itself, and one that is not, little time.
_CHECKPOINTS_A_RUN = 10


class Run:
    """A training under way: the parts that turn, and how far they have."""

    def __init__(
        self,
        parts: Assembly,
        options: TrainOptions,
        place: RunDirectory,
        identity: dict[str, Any],
        observe: Observer,
    ) -> None:
        self.parts = parts
        self.engine = parts.engine
        self.options = options
        self.place = place
        self.identity = identity
        self.observe = observe
        self.steps = steps_of(parts.recipe, options)
        self.save_every = options.checkpoint_every or max(1, self.steps // _CHECKPOINTS_A_RUN)
        self.early = EarlySteps(
            parts.engine,
            parts.optimizer,
            parts.replicas,
            steps=self.steps,
            dtypes=options.measure,
            memory=options.measure,
        )
        self.progress = Progress()
        self.interruption = Interruption()
        self.lookout = lookout_for(parts, options)
        self._built = shapes_of_buffers(parts.engine.model)
        self.step = 0
        self._waiting: list[Any] = []
        """Parts of a batch that the step under way has still to take, the next one last."""
        self.saved: tuple[int, int] | None = None
        """Step and number of evaluations of the newest checkpoint."""
        self.peers = parts.peers
        self._step_end = StepEnd(parts.peers, self.interruption)
        self.stop_is_asked = self._step_end.stop_is_asked
        self.record: RunRecord
        self.peak: PeakMemory
        self.metrics: MetricsLog | NoMetrics

    def begin(self, record: RunRecord, warnings: tuple[str, ...]) -> None:
        """Start at step 0."""
        self.record = record
        self.peak = PeakMemory(self.engine.device, None)
        self.metrics = MetricsLog(self.place.metrics_path) if self.peers.is_main else NoMetrics()
        parts, levers, lookout = self.parts, self.engine.levers, self.lookout
        told = (*parts.notes, *levers.notes, *lookout.notes, *shared_notes(parts))
        for text in (*warnings, *told, *self._cautions()):
            self.notice(text)

    def go_on(self, state: dict[str, Any]) -> None:
        """Start where a checkpoint was written."""
        state = self.parts.own_part(state, self.place.checkpoints)
        load_model_state(self.engine.model, state, self.engine.device)
        self.engine.load_state_dict(state["engine"])
        round_apart(self.engine.model, self.peers.rank)
        self.parts.stream.load_state_dict(state["stream"])
        self.step = state["step"]
        record = from_json(RunRecord, state["record"])
        self.record = resumed_record(record, self.step, self.peers)
        self.saved = (self.step, len(record.evaluations))
        self.peak = PeakMemory(self.engine.device, record.peak_bytes)
        self.metrics = NoMetrics()
        if self.peers.is_main:
            self.metrics = MetricsLog(self.place.metrics_path, position=state["metrics_bytes"])
            self.progress = Progress.of(self.place.read_metrics())
        for text in moved_notes(record.environment, self.engine.device, self.step):
            self.notice(text)
        self._write_record()  # a reader sees at once that it is running again
        told = restore_streams(state, self.peers, seed=self.options.seed, kind=record.parallel)
        if told:
            self.notice(told)

    def to_the_end(self, stop_at: int | None) -> RunRecord:
        """Take the remaining steps, keeping the record true however it ends."""

        def should_stop() -> bool:
            return self.stop_is_asked() or self.step == stop_at

        try:
            with self.peers.failing_together(), self.interruption.listening():
                self._loop(should_stop)
                finished = self.step == self.steps and not self._evaluation_is_due()
                if finished:
                    self._export()
                    self._tell_what_went_wrong()
                self._conclude("finished" if finished else "interrupted")
        except BaseException as error:
            self._conclude_as_well_as_possible(error)
            raise
        # Told when Ctrl-C has its usual meaning again: none that comes while we end gets lost.
        self._tell_end()
        return self.record

    def notice(self, text: str) -> None:
        """Tell and record something that a person should know."""
        self.record = replace(self.record, warnings=(*self.record.warnings, text))
        self.observe(Notice(text=text))

    def close(self) -> None:
        """Let go of the open file."""
        if hasattr(self, "metrics"):
            self.metrics.close()

    def _loop(self, should_stop: Callable[[], bool]) -> None:
        self.engine.model.train()
        self.observe(Started(record=self.record, directory=self.place.path, step=self.step))
        while True:
            if self._evaluation_is_due():
                self._evaluate(should_stop)
            stopping = should_stop() or self.step == self.steps
            if stopping or self.saved is None or self.step % self.save_every == 0:
                self._save()
            if stopping:
                return
            self.take_step()

    def _evaluation_is_due(self) -> bool:
        every = self.options.evaluate_every
        is_time = self.step == self.steps or bool(every and self.step and self.step % every == 0)
        return is_time and all(e.step != self.step for e in self.record.evaluations)

    def _evaluate(self, should_stop: Callable[[], bool]) -> None:
        self.peak.look()
        self.peers.take_from_main(list(self.engine.model.buffers()))
        found = evaluate_model(
            self.parts.recipe,
            self.engine,
            self.parts.evaluation_data,
            step=self.step,
            seed=self.options.seed,
            should_stop=should_stop if self.peers.size == 1 else lambda: False,
            peers=self.peers,
            call=self.parts.measure,
        )
        if self.parts.replicas is not None:
            self.parts.replicas.renew()
        self.peak.forget()
        self.record = replace(self.record, evaluations=(*self.record.evaluations, *found))
        self.metrics.append(*found)
        for evaluation in found:
            self.observe(evaluation)
        for text in restored_notes(self.engine):
            if text not in self.record.warnings:
                self.notice(text)

    def take_step(self) -> None:
        """Take a step, and tell of it."""
        step = self.step + 1
        if self.early.measures(step):
            self.peak.look()  # the ledger resets the allocator's own peak
        rate = float(self.parts.optimizer.param_groups[0]["lr"])
        began = time.perf_counter()
        with self.early.memory(step):
            outcome = take_step(
                self.engine,
                self.parts.compute_loss,
                self.next_micro_batch,
                path=self.parts.recipe.path,
                watching=self._watching(step),
            )
        seconds = time.perf_counter() - began
        outcome = replace(outcome, losses=self._step_end.means(outcome.losses))
        self.step = step
        self._add_measurements(step)
        if step == 1:
            for text in self.engine.levers.without_effect():
                self.notice(text)
        point = StepPoint(
            step=step,
            loss=outcome.loss,
            loss_scale=outcome.report.loss_scale,
            gradient_norm=outcome.report.gradient_norm,
            applied=outcome.report.applied,
            reason=outcome.report.reason,
            seconds=seconds,
            learning_rate=rate,
        )
        self.progress.add(point)
        self.metrics.append(point)
        self.observe(point)
        told = self.lookout.after(outcome)
        if told:
            self.notice(told)
        if outcome.error is not None:
            raise outcome.error

    def _watching(self, step: int) -> Watching:
        """Return what each micro-batch of a step passes through."""

        def watching(part: Any) -> AbstractContextManager[object]:
            self.early.inputs(part)
            if self.early.measures(step):  # what the lookout counts would be counted
                self.lookout.around(part, sample=False)
                return self.early.dtypes(step)
            return self.lookout.around(part, sample=True)

        return watching

    def next_micro_batch(self) -> Any:
        """Return the next part of a batch on the device."""
        if not self._waiting:
            with self.early.drawing():
                batch = next(self.parts.stream)[1]
            self.early.inputs(batch)
            self._waiting = split_batch(batch, self.engine.plan.micro_batches)[::-1]
        return to_device(self._waiting.pop(), self.engine.device)

    def _add_measurements(self, step: int) -> None:
        if not self.early.measures(step):
            return
        known = self.record.precision_honoured
        self.record = self.early.add_to(self.record, step)
        if known is not False and self.record.precision_honoured is False:
            self.notice(
                f"precision {self.record.precision} was not carried out: "
                f"{'; '.join(self.record.precision_notes)}"
            )

    def _cautions(self) -> tuple[str, ...]:
        if not self.options.measure:
            return ()
        with isolated(self.options.seed, "measuring"):
            return warnings_before_run(self.engine.policy, self.engine.device, self.engine.model)

    def _save(self) -> None:
        """Write a checkpoint, unless the newest one holds this state already."""
        self._bring_record_up_to_date()
        state_now = (self.step, len(self.record.evaluations))
        if self.saved != state_now:
            self.peak.look()
            require_same_weights(self.engine.model, self.peers, self.step)
            self.record = with_peaks(self.record, self.peers)
            streams = gathered_streams(self.peers)
            self._write_checkpoint(streams)
            self.peak.forget()
            self.saved = state_now
        self._write_record()

    def _write_checkpoint(self, streams: dict[str, Any]) -> None:
        place = self.place.checkpoints
        if self.peers.is_main or self.peers.cuts:
            state = self.parts.share_out(self._state() | streams, place)
        if self.peers.is_main:
            path = checkpoint.save(place, state, step=self.step, identity=self.identity)
            self.observe(Saved(step=self.step, path=path))

    def _write_record(self) -> None:
        if self.peers.is_main:
            self.place.write_record(self.record)

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            **model_state(self.engine.model),
            "engine": self.engine.state_dict(),
            "stream": self.parts.stream.state_dict(),
            "metrics_bytes": self.metrics.make_durable(),
            "threads": torch.get_num_threads(),
            "record": to_json(self.record),
        }

    def _bring_record_up_to_date(self) -> None:
        skips = self.engine.skips
        record = replace(
            self.record,
            completed_steps=self.step,
            applied_steps=self.engine.applied_steps(),
            skipped=skips,
            skipped_steps=len(skips),
            data_order_hash=self.parts.stream.order_hash,
            **self.progress.summary(samples_a_step=self.record.batch_size * self.record.accumulate),
        )
        record = self.peak.add_to(self.lookout.add_to(record))
        self.record = with_compilation(record, self.engine)

    def _export(self) -> None:
        """Write the final weights; raises PrecisionError if no step ever changed them."""
        if self.engine.applied_steps() == 0:
            last = self.engine.skips[-1]
            raise PrecisionError(
                f"none of the {self.steps} steps was applied, the last one for a {last.reason} "
                f"at loss scale {last.loss_scale:g}",
                hint="train for more steps, so that the loss scale can come down, or in bf16",
            )
        # Of shards all ranks have to give theirs.
        weights = self.engine.weights() if self.peers.is_main or self.peers.cuts else {}
        if not self.peers.is_main:
            return
        checkpoint.save_weights(
            self.place.weights_path,
            weights,
            made=made_buffers(self.engine.model, weights, self._built),
        )

    def _tell_what_went_wrong(self) -> None:
        notes = nonfinite_notes(self.record.evaluations, self.step)
        not_kept = budget_not_kept(self.record), compiled_in_part(self.engine)
        for told in (*notes, *filter(None, not_kept)):
            self.notice(told)

    def _conclude(self, status: Status, error: BaseException | None = None) -> None:
        self._bring_record_up_to_date()
        self.record = replace(
            self.record,
            status=status,
            failure="" if error is None else reason_of(error),
            failure_hint=getattr(error, "hint", ""),
            failure_kind="" if error is None else kind_of(error),
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        self._write_record()

    def _conclude_as_well_as_possible(self, error: BaseException) -> None:
        """Record how the run ended; a disk that is full stays the first error's business."""
        with contextlib.suppress(RunDirectoryError):
            if was_interrupted(error):
                for text in error.args:  # where it was another rank, or broke something off
                    self.notice(text)
                self._conclude("interrupted")
            else:
                self._conclude("failed", error)
            self._tell_end()

    def _tell_end(self) -> None:
        self.observe(Ended(record=self.record, stop_asked=self.interruption.requested))
