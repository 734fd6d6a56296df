"""A recipe trained in one precision, from its first step or from its last checkpoint.

This file opens and closes what a run needs: its directory and lock, the random streams, the number
of threads, the determinism switches. The loop itself is in ``loop``.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from narrowcast.errors import CheckpointError, RunDirectoryError
from narrowcast.parallel.peers import ALONE, Peers
from narrowcast.parallel.together import Together
from narrowcast.plan import Plan
from narrowcast.precision.device import environment, require
from narrowcast.precision.speed import thread_count
from narrowcast.randomness import isolated
from narrowcast.recipes.load import Recipe, option_values
from narrowcast.records.codec import RecordError, to_json
from narrowcast.records.run import RunRecord
from narrowcast.training import checkpoint
from narrowcast.training.assembly import Assembly, TrainOptions, assemble, identity_of, steps_of
from narrowcast.training.determinism import deterministic
from narrowcast.training.events import Ended, Notice, Observer, ignore
from narrowcast.training.loop import Run
from narrowcast.training.run_directory import RunDirectory
from narrowcast.training.state_tree import leaves

__all__ = ["TrainOptions", "new_record", "train"]


def train(
    recipe: Recipe,
    plan: Plan,
    options: TrainOptions,
    directory: Path | str,
    *,
    device: torch.device,
    observe: Observer = ignore,
    resume: bool = False,
    stop_at: int | None = None,
    budget_bytes: int | None = None,
    notes: Sequence[str] = (),
    command: str = "",
    together: Together | None = None,
) -> RunRecord:
    """Train, and leave everything in `directory`; returns the record that run.json holds.

    With `resume` the run in the directory goes on from its last checkpoint, or begins if it took
    no step yet; a finished one is left as it is. The first Ctrl-C (or SIGTERM), like `stop_at`,
    ends it after the current step with a checkpoint and status "interrupted"; the second one at
    once. The caller's random states, threads and determinism switches are given back.

    `budget_bytes` is what the peak is to stay within: it is recorded, and a peak above it is told.
    `notes` are told and recorded when the run begins. `together` are the ranks that train with
    this one; rank 0 alone writes, and the others must see its directory to resume.

    A run that fails leaves status "failed" and the reason in run.json, and raises: PrecisionError
    if the numbers broke, RecipeError or DataError for the recipe's mistakes, RunDirectoryError if
    the directory holds another run or cannot be written, CheckpointError if it cannot be continued.
    """
    require(plan.policy, device)
    place = RunDirectory(Path(directory))
    with ExitStack() as stack:
        is_main = together is None or together.is_main
        warnings = stack.enter_context(place.lock()) if is_main else ()
        identity = identity_of(recipe, plan, options, device)
        saved = _saved_state(place, identity, together) if resume else None
        if not resume and is_main:
            place.refuse_another_run()
        peers = stack.enter_context(_met(together, identity, options, saved, device))
        if saved and (finished := _finished(place)):
            observe(Notice(text=f"{place.path} is finished: there is nothing left to do"))
            observe(Ended(record=finished))
            return finished
        stack.enter_context(isolated(options.seed, "training"))
        stack.enter_context(thread_count(saved["threads"] if saved else torch.get_num_threads()))
        if options.deterministic:
            stack.enter_context(deterministic())
        parts = assemble(recipe, plan, options, device, peers)
        run = Run(parts, options, place, identity, observe)
        stack.callback(run.close)
        if saved is None:
            record = replace(new_record(parts, options, command), budget_bytes=budget_bytes)
            run.begin(record, (*warnings, *notes))
            if resume:
                run.notice(f"nothing to resume in {place.path}: the run begins with its first step")
        else:
            run.go_on(saved)
            saved.clear()  # what the run did not take over shall not stay in memory
        return run.to_the_end(stop_at)


def _met(
    together: Together | None,
    identity: dict[str, Any],
    options: TrainOptions,
    saved: dict[str, Any] | None,
    device: torch.device,
) -> AbstractContextManager[Peers]:
    """Meet the other ranks, if there are any, once all want to go on with the same training."""
    if together is None:
        return nullcontext(ALONE)
    wanted = {
        **leaves(identity),
        **asdict(options),
        "python": platform.python_version(),
        "goes on from step": saved["step"] if saved else None,
    }
    return together.meet(wanted, device)


def _saved_state(
    place: RunDirectory, identity: dict[str, Any], together: Together | None
) -> dict[str, Any] | None:
    """Load the newest checkpoint, or None where no run has begun, or none got as far as that."""
    if checkpoint.checkpoints_in(place.checkpoints):
        gather = together is None or not together.cuts
        return checkpoint.load_latest(place.checkpoints, identity=identity, gather=gather)
    if together is not None and not together.is_main:
        return None
    if place.holds_a_run():
        _require_unbegun(place, identity)
    else:
        place.refuse_another_run()
    return None


def _finished(place: RunDirectory) -> RunRecord | None:
    """Return the record of a run that has left all it was to leave."""
    if not place.weights_path.exists():
        return None
    with suppress(RunDirectoryError, RecordError):  # what is lost or damaged is written anew
        record = place.read_record()
        return record if record.status == "finished" else None
    return None


def _require_unbegun(place: RunDirectory, identity: dict[str, Any]) -> None:
    """Raise unless run.json, without any checkpoint, is of this very run and tells of no step.

    The disk that was full when the first checkpoint was due leaves it so: nothing can be lost by
    beginning again.
    """
    record = place.read_record()
    if not place.is_unbegun():
        raise CheckpointError(
            f"{place.checkpoints} holds no checkpoint, and the run has taken steps: they were "
            "deleted",
            hint="restore one, or choose another --output to begin anew",
        )
    here = {
        "recipe": identity["recipe"],
        "recipe source": identity["recipe source"],
        "options": identity["options"],
        "steps": identity["steps"],
        "plan": identity["plan"],
        "seed": identity["seed"],
        "accumulate": identity["accumulate"],
        "clip_norm": identity["clip_norm"],
        "device": identity["device"],
    }
    there = (
        record.recipe,
        record.recipe_digest,
        record.options,
        record.planned_steps,
        record.plan,
        record.seed,
        record.accumulate,
        record.clip_norm,
        record.environment.device,
    )
    differing = [k for (k, v), other in zip(here.items(), there, strict=True) if v != other]
    if differing:
        raise RunDirectoryError(
            f"{place.path} holds another run that took no step: {', '.join(differing)} differ",
            hint="choose another --output, or delete that directory",
        )


def new_record(parts: Assembly, options: TrainOptions, command: str) -> RunRecord:
    """Return the record of a run that begins."""
    engine, recipe = parts.engine, parts.recipe
    return RunRecord(
        recipe=recipe.name,
        recipe_path=str(recipe.path),
        recipe_digest=recipe.source_hash,
        options=option_values(recipe),
        precision=engine.plan.name,
        plan=to_json(engine.plan),
        seed=options.seed,
        planned_steps=steps_of(recipe, options),
        batch_size=parts.stream.batch_size,
        accumulate=options.accumulate,
        clip_norm=options.clip_norm,
        parallel=parts.peers.kind,
        ranks=parts.peers.size,
        deterministic=options.deterministic,
        perturbation=parts.perturbation,
        initial_weights_hash=parts.initial_weights_hash,
        environment=environment(engine.device),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
    )
