"""A predicted ledger is the measured one: same bytes, same modules, same timeline."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from narrowcast.engine.engine import Engine
from narrowcast.engine.stores import planned_optimizer
from narrowcast.loss.cross_entropy import linear_cross_entropy
from narrowcast.memory.measure import MemoryLedger
from narrowcast.plan import ActivationRule, Plan, plan_named
from narrowcast.policy import policy_named
from narrowcast.prediction.predict import predict_memory, predict_step_memory
from narrowcast.profiling import measure_recipe
from narrowcast.recipes.load import load_recipe
from narrowcast.records.memory import MemoryRecord

CPU = torch.device("cpu")
RECIPES = Path(__file__).parents[1] / "recipes"
EXACT = ("parameters", "master_weights", "gradients", "optimizer_state")

Loss = Callable[[nn.Module, Any], Tensor]


def bare(record: MemoryRecord) -> MemoryRecord:
    """Leave out what a prediction says of itself."""
    return replace(record, predicted=False, assumptions=(), break_even=None)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "bf16-true"])
@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("tabular", ["batch_size=7"]),
        ("fashion", ["batch_size=16"]),
        ("fashion", ["model=vit", "batch_size=3"]),
        # Convolutions in fp16 take 290 times as long on this CPU: two images.
        ("fashion", ["model=resnet", "batch_size=2"]),
        ("austen", ["batch_size=2", "context=33"]),
        ("austen", ["batch_size=1", "context=16", "dropout=0.1"]),
        (RECIPES / "image.py", []),
        (RECIPES / "regression.py", []),
    ],
    ids=str,
)
def test_the_whole_record_of_a_recipe_is_equal(
    recipe: str | Path, options: list[str], precision: str
) -> None:
    """Every line, module and point of the timeline, for every precision: no difference at all."""
    loaded = load_recipe(recipe, options)

    predicted = predict_memory(loaded, precision, break_even=False)

    measured = measure_recipe(loaded, policy_named(precision), CPU, break_even=False)
    assert predicted.predicted
    assert bare(predicted) == measured


@pytest.mark.parametrize("recipe", ["tabular", "austen"])
def test_cudas_cast_lists_are_followed_as_in_a_rehearsal(recipe: str) -> None:
    """--autocast-rules cuda means the same to a prediction and to a measurement."""
    policy = replace(policy_named("bf16"), autocast_rules="cuda")
    loaded = load_recipe(recipe, ["batch_size=2"])

    predicted = predict_memory(loaded, policy, break_even=False)

    assert bare(predicted) == measure_recipe(loaded, policy, CPU, break_even=False)


def test_islands_and_micro_batches_are_predicted_too() -> None:
    """What a plan adds to a policy reaches the trace."""
    policy = replace(policy_named("bf16"), keep_fp32=("4",))
    plan = Plan(name="islands", policy=policy, micro_batches=4)
    loaded = load_recipe("tabular", ["batch_size=64"])

    predicted = predict_memory(loaded, plan, break_even=False)

    measured = measure_recipe(loaded, plan, CPU, break_even=False)
    assert bare(predicted) == measured


def plans() -> list[Plan]:
    """One of each weight store, each state store and each lever, and the named plans."""
    split, bf16 = plan_named("bf16-split"), plan_named("bf16")
    stores = [("split16", "fp32"), ("split8", "bf16"), ("stochastic", "int4"), ("split16", "int8")]
    levers = ("checkpoint", "int8", "e4m3")
    return [
        split,
        plan_named("lean"),
        replace(plan_named("fp32"), name="fp32 with int8", weights="fp32", states="int8"),
        *(replace(split, name=f"{w} with {s}", weights=w, states=s) for w, s in stores),
        replace(split, name="release", gradients="release"),
        replace(bf16, name="chunked", loss="chunked"),
        replace(bf16, name="parts", micro_batches=2),
        *(
            replace(bf16, name=lever, activations=(ActivationRule(modules="auto", lever=lever),))
            for lever in levers
        ),
        replace(
            bf16,
            name="norms",
            activations=(ActivationRule(modules="*norm*", lever="narrow_norm"),),
        ),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("plan", plans(), ids=lambda plan: plan.name)
@pytest.mark.parametrize(
    ("recipe", "options"),
    [("austen", ["batch_size=4"]), ("fashion", ["model=vit", "batch_size=4"])],
)
def test_every_store_and_lever_is_predicted_to_the_byte(
    recipe: str, options: list[str], plan: Plan
) -> None:
    """The timeline has fewer points: of alike ranges of weights the trace updates one."""
    loaded = load_recipe(recipe, options)

    predicted = predict_memory(loaded, plan, break_even=False)

    measured = measure_recipe(loaded, plan, CPU, break_even=False)
    assert replace(bare(predicted), timeline=()) == replace(measured, timeline=())
    highest = max(point.bytes for point in predicted.timeline)
    assert highest == predicted.total_peak_bytes


def measured_step(
    make: Callable[[], nn.Module],
    optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    loss: Loss,
    batch: Any,
    precision: str,
) -> MemoryRecord:
    """Run three steps and return the ledger of the last."""
    model, plan = make(), plan_named(precision)
    optimizer_ = planned_optimizer(optimizer(model), model, plan)
    engine = Engine(model, optimizer_, plan, device="cpu")

    def step() -> None:
        model.train()
        with engine.forward():
            value = loss(model, batch)
        engine.backward(value)
        assert engine.step().applied

    for _ in range(2):
        step()
    ledger = MemoryLedger(model, optimizer_)
    with ledger:
        ledger.inputs(batch)
        step()
    return ledger.record(recipe="step", precision=precision, batch_size=len(batch[0]))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), fused=True)


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    inputs, targets = batch
    return F.cross_entropy(model(inputs), targets)


def next_token(model: nn.Module, batch: Any) -> Tensor:
    (tokens,) = batch
    return F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.layers = kind(16, 24, num_layers=2, batch_first=True, **options)
        self.head = nn.Linear(48 if options.get("bidirectional") else 24, 50)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(tokens))[0])


class Encoder(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=dropout, batch_first=True)
        self.embed = nn.Embedding(50, 32)
        self.layers = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, 50)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(tokens)))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


class Bags(nn.Sequential):
    def __init__(self, mode: str) -> None:
        super().__init__(nn.EmbeddingBag(50, 16, mode=mode), nn.Linear(16, 10))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.SiLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, groups=4, padding=1),
        nn.BatchNorm2d(16),
        nn.LeakyReLU(),
        nn.ConvTranspose2d(16, 8, 2, stride=2),
        nn.InstanceNorm2d(8, affine=True),
        nn.Upsample(scale_factor=2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 32))


def against(function: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    return lambda model, batch: function(model(batch[0]), batch[1])


TOKENS = (torch.arange(36).reshape(3, 12) * 7 % 50,)
LABELS = torch.tensor([1, 2, 3])
PAIR = (torch.linspace(-1, 1, 192).reshape(6, 32), torch.linspace(0, 1, 192).reshape(6, 32))
IMAGES = (torch.linspace(-1, 1, 3 * 3 * 256).reshape(3, 3, 16, 16), LABELS)
MODULES: dict[str, tuple[Callable[[], nn.Module], Loss, Any]] = {
    "lstm": (lambda: Recurrent(nn.LSTM, bidirectional=True), next_token, TOKENS),
    "gru": (lambda: Recurrent(nn.GRU, dropout=0.1), next_token, TOKENS),
    "encoder": (lambda: Encoder(0.0), next_token, TOKENS),
    "encoder with dropout": (lambda: Encoder(0.1), next_token, TOKENS),
    "checkpointing": (Checkpointed, against(F.mse_loss), PAIR),
    "sum of bags": (lambda: Bags("sum"), cross_entropy, (TOKENS[0], LABELS)),
    "mean of bags": (lambda: Bags("mean"), cross_entropy, (TOKENS[0], LABELS)),
    "convolutions": (convolutions, cross_entropy, IMAGES),
    "mse": (mlp, against(F.mse_loss), PAIR),
    "smooth l1": (mlp, against(F.smooth_l1_loss), PAIR),
    "huber": (mlp, against(F.huber_loss), PAIR),
    "l1": (mlp, against(F.l1_loss), PAIR),
    "logits": (mlp, against(F.binary_cross_entropy_with_logits), PAIR),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-true"])
@pytest.mark.parametrize("name", MODULES)
def test_any_model_is_predicted_to_the_byte(name: str, precision: str) -> None:
    """Made without memory by a function, or copied from a model with its optimizer: the same."""
    make, loss, batch = MODULES[name]
    model = make()

    made = predict_step_memory(make, adamw, loss, batch, precision, break_even=False)
    copied = predict_step_memory(model, adamw(model), loss, batch, precision, break_even=False)

    measured = measured_step(make, adamw, loss, batch, precision)
    assert bare(made).lines == measured.lines
    assert replace(bare(made), notes=measured.notes) == measured
    assert replace(bare(copied), notes=measured.notes) == measured


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "AdamW": lambda m: torch.optim.AdamW(m.parameters()),
    "AdamW foreach": lambda m: torch.optim.AdamW(m.parameters(), foreach=True),
    "AMSGrad": lambda m: torch.optim.Adam(m.parameters(), amsgrad=True),
    "SGD": lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9, nesterov=True),
    "RMSprop": lambda m: torch.optim.RMSprop(m.parameters()),
    "Adagrad": lambda m: torch.optim.Adagrad(m.parameters()),
    "Adafactor": lambda m: torch.optim.Adafactor(m.parameters()),
    "NAdam": lambda m: torch.optim.NAdam(m.parameters()),
    "RAdam": lambda m: torch.optim.RAdam(m.parameters()),
    "Adamax": lambda m: torch.optim.Adamax(m.parameters()),
    "Rprop": lambda m: torch.optim.Rprop(m.parameters()),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_and_the_temporaries_of_an_optimizer_are_predicted(name: str) -> None:
    """Step counts are read as one half, which no optimizer here takes another way for."""
    optimizer = OPTIMIZERS[name]

    predicted = predict_step_memory(mlp, optimizer, against(F.mse_loss), PAIR, break_even=False)

    measured = measured_step(mlp, optimizer, against(F.mse_loss), PAIR, "fp32")
    assert replace(bare(predicted), notes=measured.notes) == measured


def test_a_model_that_looks_whether_it_is_traced_stays_close() -> None:
    """transformers keeps a mask of fake tokens that it drops after looking at real ones: 1.04 %.

    The mask is one byte for each pair of 32 positions, for each of 16 samples, in the float that
    attention wants; nothing else differs, and what outlives the step is equal.
    """
    pytest.importorskip("transformers")
    loaded = load_recipe(RECIPES / "transformers_gpt2.py")

    predicted = predict_memory(loaded, "fp32", break_even=False)

    measured = measure_recipe(loaded, policy_named("fp32"), CPU, break_even=False)
    sizes = [{line.category: line.bytes for line in r.lines} for r in (predicted, measured)]
    assert all(sizes[0][name] == sizes[1][name] for name in EXACT)
    assert 0 <= predicted.total_peak_bytes - measured.total_peak_bytes <= 65_536


class Tied(nn.Module):
    """An embedding that is the head too; its logits are cut into many tiles."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, 32)
        self.inner = nn.Linear(32, 32)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(self.embed(tokens))


def in_tiles(model: nn.Module, batch: Any) -> Tensor:
    (tokens,) = batch
    weight = model.embed.weight
    return linear_cross_entropy(model(tokens).to(weight.dtype), weight, tokens, chunk_bytes=2**16)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-split"])
def test_of_many_tiles_of_logits_a_few_are_enough(precision: str) -> None:
    """The first, the second and the last of each loop: nothing but the timeline is shorter."""
    tokens = (torch.arange(6 * 64).reshape(6, 64) * 7 % 1000,)

    predicted = predict_step_memory(Tied, adamw, in_tiles, tokens, precision, break_even=False)

    measured = measured_step(Tied, adamw, in_tiles, tokens, precision)
    parts = {"timeline": (), "notes": ()}
    assert replace(bare(predicted), **parts) == replace(measured, **parts)
    assert predicted.timeline[-1].index < measured.timeline[-1].index / 2


_GPT2 = """
import json, resource, sys
from narrowcast.prediction.predict import predict_memory
record = predict_memory("austen", sys.argv[1], options=["size=gpt2"], device=sys.argv[2])
used = resource.getrusage(resource.RUSAGE_SELF)
# ru_maxrss holds that of the process which forked this one; the kernel's own mark does not.
lines = open("/proc/self/status").read().splitlines()
most = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
print(json.dumps([record.total_peak_bytes, most, used.ru_utime + used.ru_stime]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "device", "least"), [("bf16", "cpu", 5 * 2**30), ("lean", "h200", 2**29)]
)
def test_gpt2_is_predicted_in_seconds_and_a_fraction_of_its_memory(
    precision: str, device: str, least: int
) -> None:
    """124M parameters and 4 x 1024 tokens: below 1.5 GB and 10 processor seconds, all included."""
    done = subprocess.run(
        [sys.executable, "-c", _GPT2, precision, device],
        capture_output=True,
        text=True,
        check=True,
        timeout=170,
    )

    peak, resident_kib, processor_s = json.loads(done.stdout.splitlines()[-1])
    assert peak > least
    assert resident_kib * 1024 < 1.5e9
    assert processor_s < 10
