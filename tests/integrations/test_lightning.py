"""Lightning's Trainer with our plugin: the engine's bits, clipping, skips, schedulers, resume."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import narrowcast
from integrations.lightning_case import STEPS, Classifier, X, Y, fitted, loader, pl, trainer
from narrowcast.engine.stores import planned_optimizer
from narrowcast.errors import CheckpointError, PrecisionError, UnsupportedPrecision, UsageError
from narrowcast.integrations.lightning import trainer_precision
from narrowcast.plan import plan_named
from narrowcast.policy import POLICIES, Policy

pytestmark = [
    pytest.mark.slow,  # for what Lightning's import takes
    pytest.mark.filterwarnings("ignore", "error:policy .*"),  # of Lightning's own making
]
PLANS = ["fp32", "16-mixed", "bf16", "bf16-true", "bf16-split", "lean"]
CLIP = 0.5


def by_engine(precision: str, epochs: int = 1) -> dict[str, Tensor]:
    """Train the same network on the same batches with an Engine; returns its fp32 weights."""
    model: nn.Module = Classifier().net
    plan = plan_named(precision)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = planned_optimizer(adam, model, plan)
    engine = narrowcast.Engine(model, optimizer, plan, clip_norm=CLIP, device="cpu")
    for _ in range(epochs):
        for inputs, targets in zip(X.split(8), Y.split(8), strict=True):
            with engine.forward():
                loss = F.cross_entropy(model(inputs), targets)
            engine.backward(loss)
            engine.step()
    return engine.weights()


def full_weights(model: Classifier, optimizer: Any) -> dict[str, Tensor]:
    """Return the fp32 weights of the network, from the optimizer where it keeps them."""
    master = getattr(optimizer, "master", None)
    return {
        name: p.detach() if master is None or p.dtype is torch.float32 else master(p)
        for name, p in model.net.named_parameters()
    }


@pytest.mark.parametrize("precision", PLANS)
def test_the_trainer_trains_what_the_engine_trains(precision: str) -> None:
    """Same weights bit for bit after an epoch with clipping, in every kind of plan."""
    model = Classifier()
    made = fitted(model, trainer_precision(precision, device="cpu"), gradient_clip_val=CLIP)

    expected = by_engine(precision)
    found = full_weights(model, made.optimizers[0])
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name].float(), found[name].float()) for name in found)


def test_16_mixed_on_a_cpu_is_16_bit() -> None:
    """Lightning's own precision="16-mixed" becomes bf16 on a CPU; the plugin computes in fp16."""
    plugin = trainer_precision("16-mixed", device="cpu")

    fitted(Classifier(), plugin)

    executed = plugin.host_plan.first_pass.executed["matmul"]
    assert set(executed) == {"fp16"}
    assert plugin.notes == ()
    assert plugin.precision == "16-mixed"


def test_a_network_that_computes_in_fp32_all_the_same_ends_the_training() -> None:
    """The label fp16 on a model that switches autocast off is an error before the first step."""

    class Stubborn(Classifier):
        def training_step(self, batch: Any, index: int) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return super().training_step(batch, index)

    model = Stubborn()
    before = [p.detach().clone() for p in model.parameters()]

    with pytest.raises(
        UnsupportedPrecision, match="nothing of the first pass did: 5 matmul in fp32"
    ):
        fitted(model, trainer_precision("fp16", device="cpu"))

    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("fused", [False, True])
def test_hooks_and_clipping_see_gradients_at_their_own_scale(fused: bool) -> None:
    """What on_before_optimizer_step sees at scale 65,536 is what fp32 shows, fused or not."""
    norms = []
    for precision in ("fp32", "fp16"):
        model = Classifier(make=torch.optim.AdamW, fused=fused)
        fitted(model, trainer_precision(precision, device="cpu"), gradient_clip_val=CLIP)
        norms.append(model.seen)

    # fp16 rounds each of a few thousand products by at most 2^-11; norms average over them.
    assert norms[0] == pytest.approx(norms[1], rel=2**-8)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "bf16-split"])
def test_a_skipped_step_moves_nothing_and_is_told(precision: str) -> None:
    """In every precision: weights and scheduler stay where they are, and the ledger names it."""
    factor = 1e36 if precision == "fp16" else math.inf
    model = Classifier(scheduled=True, overflow_at=2, factor=factor)
    plugin = trainer_precision(precision, device="cpu")

    made = fitted(model, plugin)

    reason = "gradient overflow" if precision == "fp16" else "non-finite loss"
    assert [(skip.step, skip.reason) for skip in plugin.skips] == [(3, reason)]
    assert "net.3.bias" in plugin.skips[0].parameters
    assert made.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-2 / STEPS)
    assert made.lr_scheduler_configs[0].frequency == 1
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_hopeless_row_of_skips_ends_the_training() -> None:
    """Eight losses that are not finite: a PrecisionError with the parameters, not silence."""

    class Hopeless(Classifier):
        def training_step(self, batch: Any, index: int) -> Tensor:
            return super().training_step(batch, index) * math.nan

    with pytest.raises(PrecisionError, match="8 optimizer steps in a row were skipped"):
        fitted(Hopeless(), trainer_precision("bf16", device="cpu"), max_epochs=3)


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-split", "lean"])
def test_a_resumed_training_is_the_uninterrupted_one(precision: str, tmp_path: Path) -> None:
    """Bit for bit, with dropout, shuffling, a scheduler and a skip before the checkpoint."""

    def model() -> Classifier:
        return Classifier(dropout=0.3, scheduled=True, overflow_at=1)

    def plugin() -> Any:
        return trainer_precision(precision, device="cpu")

    pl.seed_everything(5, verbose=False)
    whole, its_plugin = model(), plugin()
    made = fitted(whole, its_plugin, shuffle=True, max_epochs=3)

    pl.seed_everything(5, verbose=False)
    first = fitted(model(), plugin(), shuffle=True, max_epochs=2)
    first.save_checkpoint(tmp_path / "two.ckpt")
    pl.seed_everything(6, verbose=False)
    second, resumed_plugin = model(), plugin()
    resumed = trainer(resumed_plugin, max_epochs=3)
    resumed.fit(second, loader(shuffle=True), ckpt_path=tmp_path / "two.ckpt")

    a, b = full_weights(whole, made.optimizers[0]), full_weights(second, resumed.optimizers[0])
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert resumed_plugin.skips == its_plugin.skips
    assert resumed_plugin.scaler.state_dict() == its_plugin.scaler.state_dict()


def test_the_checkpoint_of_another_precision_is_refused(tmp_path: Path) -> None:
    """Going on in another precision is not going on."""
    fitted(Classifier(), trainer_precision("bf16", device="cpu")).save_checkpoint(tmp_path / "a")

    with pytest.raises(CheckpointError, match="of another precision"):
        trainer(trainer_precision("fp32", device="cpu"), max_epochs=2).fit(
            Classifier(), loader(), ckpt_path=tmp_path / "a"
        )


def test_accumulation_in_fp32_weights_is_the_trainers() -> None:
    """Two micro-batches make one step, unscaled once; skips count steps and not batches."""
    plugin = trainer_precision("fp16", device="cpu")

    made = fitted(Classifier(overflow_at=1), plugin, accumulate_grad_batches=2)

    assert made.global_step == STEPS // 2
    assert [skip.step for skip in plugin.skips] == [2]


def test_a_schedule_of_accumulation_is_held_against_the_plan_too() -> None:
    """Its largest number counts, whenever it comes."""
    schedule = pl.callbacks.GradientAccumulationScheduler({0: 1, 4: 3})

    with pytest.raises(UsageError, match="accumulate_grad_batches=3 sums gradients"):
        fitted(Classifier(), trainer_precision("bf16-split", device="cpu"), callbacks=[schedule])
    fitted(Classifier(), trainer_precision("fp16", device="cpu"), callbacks=[schedule])


def test_sums_of_micro_batches_in_16_bits_are_refused_or_accepted_by_name() -> None:
    """A policy that sums in fp32 is not carried out by a trainer that sums in bf16."""
    with pytest.raises(UsageError, match="accumulate_grad_batches=2 sums gradients"):
        fitted(
            Classifier(), trainer_precision("bf16-true", device="cpu"), accumulate_grad_batches=2
        )

    accepted = Policy(name="narrow sums", param="bf16", compute="bf16", reduce="bf16")
    fitted(Classifier(), trainer_precision(accepted, device="cpu"), accumulate_grad_batches=2)


class Manual(Classifier):
    """Two optimizers, both backward passes before both steps, clipped by hand."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False
        self.outcomes: list[bool] = []
        self.clipped: list[float] = []

    def configure_optimizers(self) -> Any:
        layers = self.net[0], self.net[3]
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in layers]

    def training_step(self, batch: Any, index: int) -> None:
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.manual_backward(loss * 1e36 if index == self._overflow_at else loss)
        for optimizer in optimizers:
            self.clip_gradients(optimizer, CLIP, "norm")
            self.outcomes.append(bool(optimizer.step()))


def test_manual_optimization_of_two_optimizers_shares_one_scale() -> None:
    """An overflow skips both, lowers the scale once, and each step's outcome is returned."""
    plugin = trainer_precision("fp16", device="cpu")
    model = Manual(overflow_at=0)

    fitted(model, plugin)

    assert model.outcomes == [False, False] + [True] * (2 * STEPS - 2)
    assert plugin.scaler.get_scale() == 2.0**15


def test_manual_optimization_clips_unscaled_gradients() -> None:
    """self.clip_gradients limits the gradients themselves, not 65,536 times them."""

    class Small(Manual):
        def clip_gradients(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            super().clip_gradients(optimizer, *args, **kwargs)
            for group in optimizer.param_groups:
                norms = [p.grad.norm() for p in group["params"]]
                self.clipped.append(torch.stack(norms).norm().item())

    model = Small()
    fitted(model, trainer_precision("fp16", device="cpu"))

    # A coefficient below 1 is rounded once, and so are product and norm: 3 roundings of 2^-24.
    assert max(model.clipped) == pytest.approx(CLIP, rel=2**-22 + 1e-6 / CLIP)


def test_fp32_islands_and_inputs_of_16_bit_weights_are_cast_at_the_network() -> None:
    """The LightningModule is never called: its network gets bf16 and returns fp32."""
    seen: dict[str, torch.dtype] = {}

    class Looking(Classifier):
        def training_step(self, batch: Any, index: int) -> Tensor:
            logits = self.net(batch[0])
            seen["logits"] = logits.dtype
            return F.cross_entropy(logits, batch[1])

    model = Looking()
    for name in ("0", "3"):
        model.net.get_submodule(name).register_forward_pre_hook(
            lambda _m, args, name=name: seen.update({name: args[0].dtype})
        )
    policy = POLICIES["bf16-true"].keeping_fp32("net.3")

    fitted(model, trainer_precision(policy, device="cpu"))

    assert seen == {"0": torch.bfloat16, "3": torch.float32, "logits": torch.float32}
    assert model.net[0].weight.dtype is torch.bfloat16
    assert model.net[3].weight.dtype is torch.float32


def test_evaluation_after_training_uses_the_prepared_model() -> None:
    """fit, then validate with the same plugin: the model is prepared again and the same."""

    class Validated(Classifier):
        def validation_step(self, batch: Any, index: int) -> None:
            self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    model = Validated()
    made = fitted(model, trainer_precision("bf16-split", device="cpu"))
    before = [p.detach().clone() for p in model.parameters()]

    (found,) = made.validate(model, loader(), verbose=False)

    assert 0 <= found["accuracy"] <= 1
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: trainer_precision("bf16", scaler=narrowcast.GradScaler("cpu")), "needs none"),
        (lambda: trainer_precision("fp16", scaler=torch.amp.GradScaler("cpu")), "takes a narrow"),
        (lambda: trainer_precision("fp17"), "unknown precision"),
    ],
)
def test_what_cannot_be_set_up_is_said_at_once(make: Any, message: str) -> None:
    """A scaler that does not fit, a name that is none."""
    with pytest.raises(UsageError, match=message):
        make()


def test_lbfgs_is_refused() -> None:
    """An optimizer that calls the model itself is refused before the first step."""
    with pytest.raises(UsageError, match="LBFGS calls the model several times"):
        fitted(Classifier(make=torch.optim.LBFGS), trainer_precision("bf16", device="cpu"))


def test_cudas_cast_rules_are_rehearsed() -> None:
    """On a CPU softmax returns fp32 under CUDA's rules, in the Trainer's steps as elsewhere."""
    seen: list[torch.dtype] = []

    class Looking(Classifier):
        def training_step(self, batch: Any, index: int) -> Tensor:
            chances = self.net(batch[0]).softmax(-1)
            seen.append(chances.dtype)
            return F.nll_loss(chances.log(), batch[1])

    policy = Policy(name="bf16", compute="bf16", autocast_rules="cuda")
    fitted(Looking(), trainer_precision(policy, device="cpu"), max_steps=1)
    fitted(Looking(), trainer_precision("bf16", device="cpu"), max_steps=1)

    assert seen == [torch.float32, torch.bfloat16]


OTHER_NAME = """
import torchvision_on_cpu, warnings; warnings.simplefilter("ignore")
import pytorch_lightning as pl, torch, torch.nn.functional as F
from torch.utils.data import DataLoader
from narrowcast.integrations.lightning import trainer_precision

class Line(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(4, 1)
    def training_step(self, batch, index):
        return self.net(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

plugin = trainer_precision("16-mixed", device="cpu")
trainer = pl.Trainer(plugins=[plugin], accelerator="cpu", max_epochs=1, logger=False,
                     enable_checkpointing=False, enable_progress_bar=False)
trainer.fit(Line(), DataLoader(torch.randn(8, 4), batch_size=4))
print("executed", plugin.host_plan.first_pass.executed["matmul"])
"""


def test_lightning_under_its_other_name_works_too() -> None:
    """`import pytorch_lightning` has classes of its own; the one that is in use is taken."""
    pytest.importorskip("pytorch_lightning")
    recipes = Path(__file__).parents[1] / "recipes"
    environment = {**os.environ, "PYTHONPATH": str(recipes)}

    out = subprocess.run(
        [sys.executable, "-c", OTHER_NAME],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )

    assert "executed {'fp16': 2}" in out.stdout
