"""Transformers' Trainer with our precision: one training from its start to its resumption."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import narrowcast
from integrations.trainer_case import STEPS, AcceleratorState, TrainerCallback, model, trainer
from narrowcast.engine.stores import planned_optimizer
from narrowcast.errors import CheckpointError, PrecisionError, UnknownName, UsageError
from narrowcast.integrations.transformers import OPTIMIZERS, attach
from narrowcast.plan import plan_named
from narrowcast.policy import Policy
from narrowcast.records.codec import from_json
from narrowcast.records.memory import MemoryRecord

pytestmark = [
    pytest.mark.slow,  # for what transformers' import takes
    pytest.mark.filterwarnings("ignore", "error:policy .*", "error:the logits .*"),
]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    """An Accelerator keeps its state in the class."""
    AcceleratorState._reset_state(reset_partial_state=True)


def trained(folder: Path, precision: str, *, net: Any = None, **options: Any) -> tuple[Any, Any]:
    """Train; returns the trainer and the callback. Options of `attach` come in `put`."""
    put = options.pop("put", {})
    AcceleratorState._reset_state(reset_partial_state=True)
    made = trainer(folder, precision, net=net, **options)
    callback = attach(made, precision, **put)
    made.train()
    return made, callback


def losses(made: Any) -> list[float]:
    return [line["loss"] for line in made.state.log_history if "loss" in line]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_trainer_trains_what_the_engine_trains(precision: str, tmp_path: Path) -> None:
    """The same weights bit for bit, with clipping and a linear schedule; the label is true."""
    net, calls = model(), []
    net.register_forward_pre_hook(lambda _m, _a, kw: calls.append(kw), with_kwargs=True)
    made, callback = trained(tmp_path, precision, net=net, max_grad_norm=0.5)

    own = model()
    optimizer = torch.optim.AdamW(own.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: (STEPS - n) / STEPS)
    engine = narrowcast.Engine(own, optimizer, precision, scheduler=scheduler, clip_norm=0.5)
    for call in calls:
        with engine.forward():
            loss = own(**call).loss
        engine.backward(loss)
        engine.step()

    assert len(calls) == STEPS
    assert all(map(torch.equal, own.parameters(), made.model.parameters()))
    assert set(callback.precision.host_plan.first_pass.executed["matmul"]) == {precision}


def test_logs_ledger_and_watch_are_there(tmp_path: Path) -> None:
    """Skips and scale in each line of the log, the peak of a step as a file, values at borders."""
    made, callback = trained(tmp_path, "fp16", put={"watch_every": 3})

    lines = [line for line in made.state.log_history if "loss" in line]
    assert {(line["skipped_steps"], line["loss_scale"]) for line in lines} == {(0, 65536.0)}
    written = from_json(MemoryRecord, json.loads((tmp_path / "narrowcast_memory.json").read_text()))
    assert written == callback.memory
    assert sum(line.bytes for line in written.lines) == written.total_peak_bytes
    assert callback.watch.sampled_at == STEPS
    assert {"", "lm_head"} <= {one.module for one in callback.watch.ranges}
    assert callback.watch.failures == ()


def test_measuring_and_watching_change_no_bit(tmp_path: Path) -> None:
    """With the ledger, the watch and the log, or without: the same losses and weights."""
    looked, _ = trained(tmp_path, "bf16", put={"watch_every": 1})
    blind, _ = trained(tmp_path, "bf16", put={"watch_every": 0, "ledger_at": 0})

    assert losses(looked) == losses(blind)
    assert all(map(torch.equal, looked.model.parameters(), blind.model.parameters()))


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
@pytest.mark.parametrize("precision", ["bf16", "bf16-split"])
def test_optimizers_go_by_name(name: str, precision: str, tmp_path: Path) -> None:
    """Each with the plan's stores, the arguments' learning rate and decay, and the schedule."""
    made, _ = trained(tmp_path, precision, put={"optimizer": name}, weight_decay=0.1, max_steps=2)

    optimizer = made.optimizer.optimizer
    plan = plan_named(precision)
    stores = {(g["weights"], g["states"]) for g in optimizer.param_groups}
    assert type(optimizer) is OPTIMIZERS[name]
    assert stores == {("split16", "int8") if plan.weights == "split16" else ("fp32", "fp32")}
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    assert made.lr_scheduler.get_last_lr() == [0.0, 0.0]


def test_the_chunked_loss_takes_less_and_learns_the_same(tmp_path: Path) -> None:
    """Logits never whole: losses agree to fp32 rounding, and the ledger shows the difference."""
    classes = 4000
    whole, its_ledger = trained(tmp_path, "fp32", net=model(classes=classes))
    chunked, own_ledger = trained(
        tmp_path, "fp32", net=model(classes=classes), put={"chunked_loss": True}
    )

    # Sums over 4,000 classes and 120 tokens in another order; six steps of 1e-3 carry it on.
    assert losses(chunked) == pytest.approx(losses(whole), rel=1e-5)
    logits = 8 * 16 * classes * 4
    assert its_ledger.memory.total_peak_bytes - own_ledger.memory.total_peak_bytes >= logits
    assert own_ledger.precision.host_plan.without_effect() == ()


def test_a_chunked_loss_that_has_no_effect_is_said(tmp_path: Path) -> None:
    """Label smoothing takes the logits whole, in the Trainer's own code; the lever says so."""
    with pytest.warns(UserWarning, match="the logits of 'lm_head' were computed whole"):
        trained(
            tmp_path, "fp32", put={"chunked_loss": True}, label_smoothing_factor=0.1, max_steps=1
        )


def breaking(factor: float, steps: set[int], *, dropout: float = 0.0) -> Any:
    """Return a model whose loss is multiplied by `factor` in these steps, counted from 1."""
    net = model(dropout=dropout)
    calls = 0

    def multiplied(_module: Any, _args: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls in steps:
            output["loss"] = output["loss"] * factor
        return output

    net.register_forward_hook(multiplied)
    return net


@pytest.mark.parametrize(
    ("precision", "factor", "reason"),
    [
        ("fp16", 1e36, "gradient overflow"),
        ("bf16", math.inf, "non-finite loss"),
        ("bf16-split", math.nan, "non-finite loss"),
    ],
)
def test_a_skipped_step_is_logged_and_holds_the_schedule(
    precision: str, factor: float, reason: str, tmp_path: Path
) -> None:
    """In every precision: the scheduler waits, weights stay finite, the log counts it."""
    made, callback = trained(tmp_path, precision, net=breaking(factor, {3}))

    counts = [line["skipped_steps"] for line in made.state.log_history if "loss" in line]
    assert counts == [0, 0, 1, 1, 1, 1]
    assert [(skip.step, skip.reason) for skip in callback.skips] == [(3, reason)]
    assert callback.skips[0].parameters[0].startswith("transformer.")
    assert made.lr_scheduler.last_epoch == STEPS - 1
    assert all(p.isfinite().all() for p in made.model.parameters())


def test_a_hopeless_training_ends_and_says_where_it_broke(tmp_path: Path) -> None:
    """The step after a skip is looked at: its first border that is not finite is named."""
    net = model()
    block = net.transformer.h[1].mlp
    block.register_forward_hook(lambda _m, _a, output: output * math.inf)
    AcceleratorState._reset_state(reset_partial_state=True)
    made = trainer(tmp_path, "bf16", net=net, max_steps=20)
    callback = attach(made, "bf16")

    with pytest.raises(PrecisionError, match="8 optimizer steps in a row were skipped"):
        made.train()

    assert "'transformer.h.1.mlp' is the first that is not finite" in callback.watch.failures[1]


@pytest.mark.parametrize("precision", ["fp16", "bf16-split", "lean"])
def test_a_resumed_training_is_the_uninterrupted_one(precision: str, tmp_path: Path) -> None:
    """Bit for bit from the Trainer's own checkpoint, with dropout and a skip before it."""

    factor = 1e36 if precision == "fp16" else math.inf
    whole, its_callback = trained(
        tmp_path / "whole",
        precision,
        net=breaking(factor, {2}, dropout=0.2),
        save_strategy="steps",
        save_steps=3,
        put={"ledger_at": 0},
    )

    AcceleratorState._reset_state(reset_partial_state=True)
    resumed_from = str(tmp_path / "whole" / "checkpoint-3")
    made = trainer(tmp_path / "second", precision, net=model(dropout=0.2))
    callback = attach(made, precision, ledger_at=0)
    made.train(resume_from_checkpoint=resumed_from)

    assert losses(made) == losses(whole)
    assert all(map(torch.equal, whole.model.parameters(), made.model.parameters()))
    assert callback.skips == its_callback.skips
    assert callback.precision.scaler.state_dict() == its_callback.precision.scaler.state_dict()


def test_the_checkpoint_of_another_plan_is_refused(tmp_path: Path) -> None:
    """A plan is kept in trainer_state.json and held against the one that is to go on."""
    trained(tmp_path, "fp32", save_strategy="steps", save_steps=3, max_steps=3)
    AcceleratorState._reset_state(reset_partial_state=True)
    made = trainer(tmp_path, "fp32")
    attach(made, Policy(name="another fp32"))

    with pytest.raises(CheckpointError, match="of another precision"):
        made.train(resume_from_checkpoint=True)


def test_without_us_fp16_on_a_cpu_is_fp32(tmp_path: Path) -> None:
    """Why this adapter checks: TrainingArguments(fp16=True) alone trains in fp32."""
    made = trainer(tmp_path, "fp16", max_steps=1)
    formats: list[torch.dtype] = []
    made.model.lm_head.register_forward_hook(lambda _m, _a, out: formats.append(out.dtype))

    made.train()

    assert formats == [torch.float32]


def test_a_policys_islands_are_kept(tmp_path: Path) -> None:
    """keep_fp32 works by the model's own names."""
    seen: list[torch.dtype] = []
    AcceleratorState._reset_state(reset_partial_state=True)
    made = trainer(tmp_path, "bf16", max_steps=1)
    made.model.transformer.h[1].mlp.c_proj.register_forward_hook(
        lambda _m, _a, out: seen.append(out.dtype)
    )
    attach(made, plan_named("bf16").policy.keeping_fp32("transformer.h.1.mlp"))

    made.train()

    assert seen == [torch.float32]


@pytest.mark.parametrize(
    ("words", "options", "error", "message"),
    [
        ("fp32", {"precision": "fp16"}, UsageError, "in TrainingArguments fp16=True"),
        ("fp16", {"precision": "bf16-split"}, UsageError, "neither fp16 nor bf16"),
        ("fp32", {"precision": "fp32", "optimizer": "adam"}, UnknownName, "did you mean 'adamw'"),
        ("fp32", {"precision": "fp32", "watch_every": -1}, UsageError, "watch_every=-1"),
    ],
)
def test_what_does_not_fit_is_refused(
    words: str, options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    """Arguments that say something else, names that are none."""
    made = trainer(tmp_path, words)

    with pytest.raises(error, match=message):
        attach(made, **options)


def test_two_optimizers_or_two_precisions_for_one_trainer_are_refused(tmp_path: Path) -> None:
    """Whichever was meant, the other would be ignored."""
    made = trainer(tmp_path)
    made.create_optimizer()

    with pytest.raises(UsageError, match="has an optimizer already"):
        attach(made, "fp32", optimizer="lion")
    made = trainer(tmp_path)
    attach(made, "fp32")
    with pytest.raises(UsageError, match="has a precision of ours already"):
        attach(made, "fp32")


def test_after_a_refusal_it_can_be_tried_again(tmp_path: Path) -> None:
    """A plan's stores do not fit Adafactor; the same Trainer then takes an optimizer of ours."""
    made = trainer(tmp_path, optim="adafactor", max_steps=1)

    with pytest.raises(UsageError, match="Adafactor cannot be narrowed"):
        attach(made, "lean")
    assert made.accelerator.scaler is None
    attach(made, "lean", optimizer="adamw")
    made.train()

    assert type(made.optimizer.optimizer) is narrowcast.AdamW


def test_checkpointing_of_the_trainer_and_of_a_plan_go_together(tmp_path: Path) -> None:
    """Whoever recomputes, the training is the same bit for bit, and no block runs a third time."""
    ends, calls = [], []
    for options in ({}, {"gradient_checkpointing": True}):
        net, entered = model(dropout=0.2), []
        net.transformer.h[0].ln_1.register_forward_pre_hook(lambda *_, seen=entered: seen.append(1))
        made, _ = trained(tmp_path, "lean", net=net, put={"ledger_at": 0}, **options)
        ends.append(made.model)
        calls.append(len(entered))

    assert all(map(torch.equal, *(end.parameters() for end in ends)))
    assert calls == [2 * STEPS, 2 * STEPS]


@pytest.mark.parametrize("precision", ["fp16", "lean"])
def test_evaluating_between_steps_changes_no_bit(precision: str, tmp_path: Path) -> None:
    """And the evaluation is of the prepared model, without a word of training in it."""
    plain, _ = trained(tmp_path, precision, net=model(dropout=0.0))
    AcceleratorState._reset_state(reset_partial_state=True)
    made = trainer(tmp_path, precision, net=model(dropout=0.0))
    callback = attach(made, precision)
    made.eval_dataset = made.train_dataset
    made.add_callback(Evaluating())
    made.train()

    found = [line["eval_loss"] for line in made.state.log_history if "eval_loss" in line]
    assert len(found) == STEPS
    assert found == sorted(found, reverse=True)
    assert losses(made) == losses(plain)
    assert all(map(torch.equal, plain.model.parameters(), made.model.parameters()))
    assert callback.skips == ()


class Evaluating(TrainerCallback):
    """Asks for an evaluation after each step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_evaluate = True


def test_sums_of_micro_batches_in_16_bits_are_refused(tmp_path: Path) -> None:
    """The Trainer accumulates by itself, in the weights' format."""
    made = trainer(tmp_path, gradient_accumulation_steps=2)

    with pytest.raises(UsageError, match="gradient_accumulation_steps=2 sums gradients"):
        attach(made, "bf16-split")


def test_masters_begin_as_the_fp32_weights(tmp_path: Path) -> None:
    """The optimizer takes the model's fp32 weights over before they become bf16."""
    made = trainer(tmp_path)
    attach(made, "bf16-split")

    masters: dict[str, Tensor] = {
        name: made.optimizer.master(p) for name, p in made.model.named_parameters()
    }
    assert all(torch.equal(masters[name], p) for name, p in model().named_parameters())
    assert isinstance(
        planned_optimizer(made.optimizer, made.model, plan_named("bf16-split")), narrowcast.AdamW
    )
