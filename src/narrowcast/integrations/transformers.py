"""Transformers: one of our precisions on a Trainer, and a callback that reports, watches, measures.

    trainer = Trainer(model, TrainingArguments(..., fp16=True), train_dataset=data)
    callback = attach(trainer, "fp16", optimizer="adamw", chunked_loss=True)
    trainer.train()
    callback.skips, callback.memory, callback.watch.ranges

The Trainer's loop stays as it is: its Accelerator gets our scaler, its optimizer the plan's stores
(or is one of ours, by name), its model what the plan puts on it. The logs get the number of skipped
steps and the loss scale; one step is measured by the memory ledger; every hundredth is looked at.
Its checkpoints hold all that a resumed training needs.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from narrowcast.dropin.grad_scaler import GradScaler
from narrowcast.errors import UnknownName, UsageError
from narrowcast.files import write_atomically
from narrowcast.integrations import accelerate
from narrowcast.integrations.accelerate import AttachedPrecision
from narrowcast.integrations.host_plan import Precision, plan_for
from narrowcast.integrations.host_watch import HostWatch
from narrowcast.integrations.hosts import host_module, mixed_class
from narrowcast.memory.measure import MemoryLedger
from narrowcast.optim.adamw import AdamW
from narrowcast.optim.lion import Lion
from narrowcast.optim.sgd import SGD
from narrowcast.plan import OWN, Plan
from narrowcast.records.codec import to_json
from narrowcast.records.memory import MemoryRecord
from narrowcast.records.run import SkippedStep
from narrowcast.scaling.skips import SkipLimit, StepOutcome
from narrowcast.watch.watch import EVERY

__all__ = ["OPTIMIZERS", "attach"]

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"adamw": AdamW, "lion": Lion, "sgd": SGD}
"""What `optimizer=` may name."""

LEDGER_AT = 2
"""The first step makes the optimizer's states; the second looks like all the others."""
_MEMORY = "narrowcast_memory.json"
_STATE = "narrowcast"
"""Our place among the states of callbacks in ``trainer_state.json``."""


def attach(
    trainer: Any,
    precision: Precision,
    *,
    optimizer: str | None = None,
    optimizer_options: Mapping[str, Any] | None = None,
    chunked_loss: bool = False,
    watch_every: int = EVERY,
    ledger_at: int = LEDGER_AT,
    scaler: GradScaler | None = None,
    max_consecutive_skips: SkipLimit = "auto",
) -> Any:
    """Put a precision on a Trainer, before ``train()``; returns the callback that it added.

    `precision` is a Plan, a Policy, a name or a JSON file; TrainingArguments say ``fp16=True`` or
    ``bf16=True`` where the policy autocasts. `optimizer` is one of `OPTIMIZERS`, with the learning
    rate, betas and decay of the arguments, or as `optimizer_options` say; without it the Trainer's
    own is given the plan's stores. `chunked_loss` never makes the logits of a causal LM whole.
    `watch_every` and `ledger_at` are steps, 0 for never.
    """
    host = host_module("transformers", package="transformers[torch]")
    if not isinstance(trainer, host.Trainer):
        raise UsageError(
            f"attach() was given a {type(trainer).__name__}",
            hint="pass the transformers.Trainer, before its train()",
        )
    arguments = trainer.args
    if arguments.n_gpu > 1:
        raise UsageError(
            f"the Trainer would replicate the model on {arguments.n_gpu} GPUs at each step",
            hint="start one process a GPU with torchrun, or make one visible",
        )
    plan, _ = plan_for(trainer.accelerator.device, precision)
    if chunked_loss:
        plan = replace(plan, loss="chunked")
    attached = accelerate.attach(
        trainer.accelerator, plan, scaler=scaler, max_consecutive_skips=max_consecutive_skips
    )
    before = trainer.optimizer, trainer.optimizer_cls_and_kwargs
    try:
        attached.host_plan.require_narrow_sums(
            arguments.gradient_accumulation_steps, setting="gradient_accumulation_steps"
        )
        watch = HostWatch(trainer.model, attached.scaler, watch_every)
        if optimizer is not None:
            chosen = _named(optimizer, plan, trainer, optimizer_options)
            trainer.optimizer_cls_and_kwargs = chosen
        _, trainer.optimizer = attached.prepare_own(trainer.model, trainer.create_optimizer())
    except BaseException:  # so that it can be tried again otherwise
        attached.detach()
        trainer.optimizer, trainer.optimizer_cls_and_kwargs = before
        raise
    kind = mixed_class("NarrowcastCallback", _CallbackHooks, host.TrainerCallback)
    callback = kind(attached, watch, ledger_at)
    trainer.add_callback(callback)
    # First, so that what it adds to the logs is there when others print them.
    callbacks = trainer.callback_handler.callbacks
    callbacks.insert(0, callbacks.pop())
    return callback


def _named(
    name: str, plan: Plan, trainer: Any, options: Mapping[str, Any] | None
) -> tuple[type, dict[str, Any]]:
    """Return what the Trainer makes its optimizer from."""
    if name not in OPTIMIZERS:
        raise UnknownName.of("optimizer", name, OPTIMIZERS)
    if trainer.optimizer is not None:
        raise UsageError(
            f"optimizer={name!r} was asked for, and the Trainer has an optimizer already "
            f"({type(trainer.optimizer).__name__})",
            hint="leave one of them out; the Trainer's own is given the plan's stores",
        )
    arguments = trainer.args
    chosen: dict[str, Any] = {"lr": arguments.learning_rate}
    if name == "adamw":
        chosen |= {
            "betas": (arguments.adam_beta1, arguments.adam_beta2),
            "eps": arguments.adam_epsilon,
        }
    if plan.weights != OWN:
        chosen |= {"weights": plan.weights, "states": plan.states}
    return OPTIMIZERS[name], chosen | dict(options or {})


class _CallbackHooks:
    """Reports, watches and measures the steps of a Trainer."""

    def __init__(self, attached: AttachedPrecision, watch: HostWatch, ledger_at: int) -> None:
        self.precision = attached
        self._scaler = attached.scaler
        self.watch = watch
        self.memory: MemoryRecord | None = None
        """Where the peak of one step went; None before it was measured."""
        self._ledger_at = ledger_at
        self._begun = 0
        """Steps that this process has begun; a resumed training is measured, too."""
        self._ledger: MemoryLedger | None = None
        self._rounds = False
        """Whether a lever rounds, and where its stream of roundings stands changes every step."""

    @property
    def skips(self) -> tuple[SkippedStep, ...]:
        """All steps that were skipped, also those before a resumed checkpoint."""
        return self.precision.skips

    @property
    def last_outcome(self) -> StepOutcome | None:
        """What became of the newest step; None before the first."""
        return self.precision.last_outcome

    @property
    def notes(self) -> tuple[str, ...]:
        """What the plan did beside the obvious, and what executed otherwise than asked."""
        return (*self.precision.notes, *self.watch.notes)

    # Named parts take half the time of a dict of them, four times a step: hence the signatures.

    def on_step_begin(
        self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any,
        processing_class: Any = None, lr_scheduler: Any = None, train_dataloader: Any = None,
        eval_dataloader: Any = None, **_: Any,
    ) -> None:  # fmt: skip
        self._begun += 1
        if self._begun == self._ledger_at:
            self._ledger = MemoryLedger(model, getattr(optimizer, "optimizer", optimizer))
            self._ledger.__enter__()
        self.watch.begin(state.global_step + 1)

    @staticmethod
    def on_pre_optimizer_step(
        args: Any, state: Any, control: Any, *, model: Any, optimizer: Any,
        processing_class: Any = None, lr_scheduler: Any = None, train_dataloader: Any = None,
        eval_dataloader: Any = None, **_: Any,
    ) -> None:  # fmt: skip
        """Do nothing, sooner than the host's own."""

    on_step_end = on_pre_optimizer_step

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any,
        processing_class: Any = None, lr_scheduler: Any = None, train_dataloader: Any = None,
        eval_dataloader: Any = None, **_: Any,
    ) -> None:  # fmt: skip
        outcome = self._scaler.last_outcome
        if outcome is not None and (said := self.watch.after(outcome)):
            warnings.warn(said, stacklevel=2)
        if self._rounds:
            self._keep_state(state)
        if self._ledger is not None:
            self._record_memory(args, state, self._ledger)

    def _record_memory(self, args: Any, state: Any, ledger: MemoryLedger) -> None:
        self.close()
        self.memory = ledger.record(
            precision=self.precision.host_plan.plan.name, batch_size=args.train_batch_size
        )
        if state.is_world_process_zero:
            path = Path(args.output_dir) / _MEMORY
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(to_json(self.memory), indent=1) + "\n")

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any], **parts: Any
    ) -> None:
        """Add skipped steps and the loss scale to a line of the log of training."""
        if "loss" not in logs:
            return
        added: dict[str, Any] = {"skipped_steps": len(self.skips)}
        if self.precision.host_plan.policy.scaling != "none":
            added["loss_scale"] = self._scaler.get_scale()
        for line in (logs, state.log_history[-1]):
            line.update(added)
        if said := self.watch.heard(float(logs["loss"])):
            warnings.warn(said, stacklevel=2)

    def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Go on from a checkpoint's plan, if the training is a resumed one."""
        saved = state.stateful_callbacks.get(_STATE)
        if saved and state.global_step:
            self.precision.load_state_dict(saved)
        self._keep_state(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        self.close()
        for said in self.precision.host_plan.without_effect():
            warnings.warn(said, stacklevel=2)

    def _keep_state(self, state: Any) -> None:
        """Leave the plan where the Trainer saves it with every checkpoint."""
        kept = self.precision.state_dict()
        self._rounds = any(kept["roundings"])
        state.stateful_callbacks[_STATE] = kept

    def close(self) -> None:
        """End what is open: the ledger of a step, the watching of one. After an exception, too."""
        self.watch.close()
        if self._ledger is not None:
            self._ledger.__exit__(None, None, None)
            self._ledger = None
