"""A compiled model: the same numbers, one graph, and everything else said, counted or refused."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
import torch._dynamo as dynamo
import torch._functorch.config as functorch
import torch.nn.functional as F
from torch import Tensor, nn

from narrowcast.compiling import BACKENDS, backend_named, compiled_call, is_compiled
from narrowcast.engine.engine import Engine
from narrowcast.engine.stores import planned_optimizer
from narrowcast.errors import UnknownName, UsageError
from narrowcast.memory.measure import MemoryLedger
from narrowcast.plan import ActivationRule, Plan, plan_named
from narrowcast.policy import Policy, policy_named
from narrowcast.precision.executed import ExecutedDtypes
from narrowcast.precision.functions import unused_functions
from narrowcast.precision.islands import unused_islands
from narrowcast.replay.moment import Moment
from narrowcast.watch.locate import first_bad_border
from narrowcast.watch.watch import Watch

# Runs a graph's operations one by one, by the kernels of eager code: no bit may differ.
EXACT = "aot_eager"
WIDTH, HEADS, CLASSES = 16, 2, 8
TOKENS = torch.randint(0, CLASSES, (3, 4, 6), generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        self.act = nn.GELU()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm(x)).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in parts)
        y = F.softmax(q @ k.transpose(-1, -2), dim=-1) @ v
        x = x + y.transpose(1, 2).flatten(2)
        out: Tensor = x + self.dropout(self.down(self.act(self.up(x))))
        return out


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens = nn.Embedding(CLASSES, WIDTH)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x))
        return out


def plan_of(policy: Policy | str, *rules: ActivationRule, **axes: Any) -> Plan:
    chosen = policy if isinstance(policy, Policy) else policy_named(policy)
    return Plan(name="plan", policy=chosen, activations=rules, **axes)


def engine_for(
    plan: Plan | str, backend: bool | str = "", model: nn.Module | None = None, **options: Any
) -> Engine:
    torch.manual_seed(0)
    model = Net() if model is None else model
    chosen = plan_named(plan) if isinstance(plan, str) else plan
    optimizer = planned_optimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), model, chosen)
    return Engine(model, optimizer, chosen, compile=backend, **options)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


def steps(engine: Engine, batches: Tensor = TOKENS) -> list[tuple[float, float]]:
    """Train on each batch; returns losses and gradient norms."""
    torch.manual_seed(7)
    found = []
    for tokens in batches:
        with engine.forward():
            loss = loss_of(engine.model, tokens)
        engine.backward(loss)
        found.append((loss.item(), engine.step().gradient_norm))
    return found


def weights(engine: Engine) -> list[Tensor]:
    return [p.detach().clone() for p in engine.model.parameters()]


def gradients(engine: Engine) -> list[Tensor]:
    with engine.forward():
        loss = loss_of(engine.model, TOKENS[0])
    engine.backward(loss)
    return [p.grad.clone() for p in engine.model.parameters() if p.grad is not None]


BF16 = policy_named("bf16")
CHECKPOINT = ActivationRule(modules="auto", lever="checkpoint")
REMAKE = ActivationRule(modules="*", lever="remake")
NORMS = ActivationRule(modules="*", lever="narrow_norm")
PLANS: dict[str, Plan] = {
    **{name: plan_named(name) for name in ("fp32", "bf16", "fp16", "bf16-true", "bf16-split")},
    "island": plan_of(BF16.keeping_fp32("blocks.*.down")),
    "island of all": plan_of(BF16.keeping_fp32("*")),
    "island, bf16 weights": plan_of(policy_named("bf16-true").keeping_fp32("blocks.0")),
    "function": plan_of(BF16.keeping_fp32("blocks.*:softmax")),
    "function, bf16 weights": plan_of(policy_named("bf16-true").keeping_fp32("blocks.*:softmax")),
    "rules of cuda": plan_of(dataclasses.replace(BF16, autocast_rules="cuda")),
    "checkpoint": plan_of(BF16, CHECKPOINT),
    "checkpoint, bf16 weights": plan_of("bf16-true", CHECKPOINT, NORMS),
    "checkpoint round an island": plan_of(BF16.keeping_fp32("blocks.*.down"), CHECKPOINT),
    "checkpoint round a function": plan_of(BF16.keeping_fp32("blocks.*.act:gelu"), CHECKPOINT),
    "remake": plan_of(BF16, REMAKE),
    "norms": plan_of(BF16, NORMS),
    "int4 states": plan_of("bf16-true", weights="split8", states="int4"),
}


USUAL = ("fp32", "bf16-split", "function", "checkpoint round an island")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in USUAL else pytest.mark.slow) for n in PLANS]
)
def test_a_compiled_model_trains_to_the_same_bits_in_one_graph(name: str) -> None:
    """Losses, norms and weights of three steps, where compiled operations are those of eager code.

    No part of ours breaks the graph, and nothing that it remembers makes it compile again.
    """
    plain, compiled = engine_for(PLANS[name]), engine_for(PLANS[name], EXACT)

    assert steps(compiled) == steps(plain)
    assert all(map(torch.equal, weights(compiled), weights(plain)))
    assert compiled.compiled is not None
    record = compiled.compiled.record()
    assert (record.graphs, record.recompiles, record.graph_breaks) == (1, 0, {})


@pytest.mark.slow
def test_dropout_drops_what_it_drops_uncompiled() -> None:
    """In fp32; the compiler's own generator would drop others."""
    plain = engine_for("fp32", model=Net(dropout=0.3))
    compiled = engine_for("fp32", EXACT, model=Net(dropout=0.3))

    assert steps(compiled) == steps(plain)


@pytest.mark.slow
def test_autocast_does_not_leak_into_backward() -> None:
    """An fp32 island has an fp32 backward; as torch compiles by itself, it has one in bf16."""
    plan = PLANS["island"]
    uncompiled, ours, theirs = engine_for(plan), engine_for(plan, EXACT), engine_for(plan)
    theirs.model.compile(backend=EXACT, dynamic=False)
    expected = gradients(uncompiled)

    assert functorch.backward_pass_autocast == "same_as_forward"  # else nothing is shown here
    assert all(map(torch.equal, gradients(ours), expected))
    assert not all(map(torch.equal, gradients(theirs), expected))


@pytest.mark.slow
def test_names_class_and_copies_of_the_model_are_as_before() -> None:
    """No ``_orig_mod.``; a deep copy, as an EMA makes one, is no compiled one of the original."""
    engine = engine_for("bf16", EXACT)
    steps(engine)
    twin = copy.deepcopy(engine.model)

    assert list(engine.weights()) == list(Net().state_dict())
    assert type(engine.model) is Net
    assert not is_compiled(twin)
    assert torch.equal(twin(TOKENS[0]), engine.model(TOKENS[0]))


@pytest.mark.slow
def test_each_shape_is_compiled_once_and_counted() -> None:
    """Two lengths are two graphs, the second a recompile, however often they alternate."""
    engine = engine_for("bf16", EXACT)
    plain = engine_for("bf16")
    batches = [TOKENS[0], TOKENS[1][:2], TOKENS[2], TOKENS[0][:2]]

    found = steps(engine, batches)  # type: ignore[arg-type]

    assert found == steps(plain, batches)  # type: ignore[arg-type]
    assert engine.compiled is not None
    record = engine.compiled.record()
    assert (record.graphs, record.recompiles) == (2, 1)
    assert record.words == "aot_eager: 2 graphs, 1 recompile, no graph breaks"


@pytest.mark.slow
def test_evaluation_in_fp32_is_that_of_the_model_uncompiled() -> None:
    """It compiles nothing, so that its figures can be held against any other run's."""
    engine, plain = engine_for("bf16-split", EXACT), engine_for("bf16-split")
    steps(engine)
    steps(plain)
    with engine.evaluating("fp32"):
        found = engine.model(TOKENS[0])
    with plain.evaluating("fp32"):
        expected = plain.model(TOKENS[0])

    assert torch.equal(found, expected)
    assert engine.compiled is not None
    assert engine.compiled.record().graphs == 1


@pytest.mark.slow
def test_evaluation_in_the_policys_precision_is_compiled() -> None:
    """Without gradients it is another graph, which counts as a recompile."""
    engine, plain = engine_for("bf16", EXACT), engine_for("bf16")
    steps(engine)
    steps(plain)
    with engine.evaluating("training"):
        found = engine.model(TOKENS[0])
    with plain.evaluating("training"):
        expected = plain.model(TOKENS[0])

    assert torch.equal(found, expected)
    assert engine.compiled is not None
    assert engine.compiled.record().recompiles == 1


class Breaking(Net):
    def forward(self, tokens: Tensor) -> Tensor:
        out = super().forward(tokens)
        dynamo.graph_break()
        return out * 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_graph_breaks_in_the_users_code_are_counted_with_their_reason() -> None:
    """And change nothing."""
    engine, plain = (
        engine_for("bf16", EXACT, model=Breaking()),
        engine_for("bf16", model=Breaking()),
    )

    assert steps(engine) == steps(plain)
    assert engine.compiled is not None
    found = engine.compiled.record()
    # As torch counts: once in the function, and once in its caller, which ends there as well.
    assert found.graph_breaks == {"Call to `torch._dynamo.graph_break()`": 2}


@dynamo.config.patch(recompile_limit=2)  # type: ignore[untyped-decorator]
@pytest.mark.slow
def test_more_shapes_than_torch_compiles_are_said_to_run_uncompiled() -> None:
    """They do run, and right."""
    engine, plain = engine_for("fp32", EXACT), engine_for("fp32")
    batches = [TOKENS[0][:, :length] for length in (2, 3, 4, 5)]

    assert steps(engine, batches) == steps(plain, batches)  # type: ignore[arg-type]
    assert engine.compiled is not None
    found = engine.compiled.record()
    assert found.fell_back
    assert found.words.endswith("further shapes ran uncompiled")


@dynamo.config.patch(recompile_limit=2)  # type: ignore[untyped-decorator]
@pytest.mark.slow
def test_models_do_not_share_the_limit() -> None:
    """A process that trains many models, as a comparison does, compiles each of them."""
    for _ in range(3):
        engine = engine_for("fp32", EXACT)
        steps(engine, TOKENS[:1])

        assert engine.compiled is not None
        found = engine.compiled.record()
        assert (found.graphs, found.recompiles, found.fell_back) == (1, 0, False)


def test_a_model_that_is_never_called_itself_is_said_to_be_uncompiled() -> None:
    """As where a loss calls its parts."""
    engine = engine_for("fp32", EXACT)
    with engine.forward():
        loss = engine.model.get_submodule("tokens")(TOKENS[0]).square().mean()
    engine.backward(loss)
    engine.step()

    assert engine.compiled is not None
    assert "nothing was compiled" in engine.compiled.record().words


@pytest.mark.parametrize(
    "name",
    [
        "bf16-split",
        "island",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("fp32", "bf16", "function")),
    ],
)
def test_what_a_graph_executes_is_what_is_executed_uncompiled(name: str) -> None:
    """Products by format, forward and backward, counted before any of them runs compiled."""
    engine, plain = engine_for(PLANS[name], EXACT), engine_for(PLANS[name])
    steps(engine, TOKENS[:1])
    with ExecutedDtypes() as seen:
        gradients(plain)

    assert engine.compiled is not None
    assert engine.compiled.counts["matmul"] == seen.counts["matmul"]
    assert all(engine.compiled.has_read(p) for p in engine.model.parameters())


@pytest.mark.slow
def test_islands_and_functions_are_known_to_have_been_entered() -> None:
    """Compiled code leaves the marks by which those that were kept in vain are found."""
    policy = BF16.keeping_fp32("blocks.*.down", "blocks.?:softmax", "norm:erf")
    engine = engine_for(plan_of(policy), EXACT)
    steps(engine)

    assert engine.compiled is not None
    assert unused_islands(engine.model, engine.compiled.has_read) == {}
    assert unused_functions(engine.model) == {"norm:erf": "norm:erf"}


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (plan_of(BF16, ActivationRule(modules="auto", lever="int8")), "int8"),
        (plan_of(BF16, ActivationRule(modules="auto", lever="e4m3")), "e4m3"),
        (plan_of(BF16, loss="chunked"), "loss='chunked'"),
        (
            plan_of("bf16-true", weights="split16", states="int8", gradients="release"),
            "gradients='release'",
        ),
    ],
)
def test_choices_that_a_compiled_model_cannot_carry_out_are_refused(plan: Plan, said: str) -> None:
    """Before anything is compiled, naming the choice."""
    with pytest.raises(UsageError, match=said) as caught:
        engine_for(plan, EXACT)

    assert caught.value.hint
    engine_for(plan)


@pytest.mark.parametrize("kept", ["*", "blocks.0", "blocks.?:softmax"])
def test_fp32_from_outside_a_checkpoint_is_refused(kept: str) -> None:
    """torch.compile would trace the checkpointed part without it, and say nothing."""
    plan = plan_of(BF16.keeping_fp32(kept), ActivationRule(modules="blocks.?", lever="checkpoint"))
    engine_for(plan)

    with pytest.raises(UsageError, match="cannot be compiled together"):
        engine_for(plan, EXACT)


@pytest.mark.slow
def test_what_is_left_to_the_compiler_is_noted() -> None:
    """The plan `lean` computes logits in chunks and remakes results where there is no compiler."""
    engine = engine_for("lean", EXACT)
    steps(engine)
    notes = "\n".join((*engine.notes, *engine.levers.notes))

    assert "loss: whole, since" in notes
    assert "in chunks" not in notes
    assert "remake: left to the compiler" in notes
    assert engine.levers.without_effect() == ()


def test_true_asks_for_inductor_and_other_names_are_refused() -> None:
    """With the valid ones."""
    assert (backend_named(asked=True), backend_named(asked=False)) == (BACKENDS[0], "")
    with pytest.raises(UnknownName, match="inducter") as caught:
        engine_for("fp32", "inducter")
    assert "did you mean 'inductor'" in caught.value.hint


def test_a_machine_without_a_compiler_is_told_before_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And no step is taken."""
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)

    with pytest.raises(UsageError, match=r"needs a C\+\+ compiler"):
        engine_for("fp32", True)


def test_a_model_that_is_compiled_already_is_refused() -> None:
    """It would be compiled inside of itself."""
    model = Net()
    model.blocks[0].compile(backend=EXACT)

    with pytest.raises(UsageError, match="compiled already"):
        engine_for("fp32", EXACT, model=model)


def test_the_next_engine_takes_the_compiler_off_again() -> None:
    """Unless it compiles too."""
    model = Net()
    engine_for("fp32", EXACT, model=model)
    again = engine_for("fp32", EXACT, model=model)
    assert compiled_call(model) is again.compiled

    plain = engine_for("fp32", model=model)

    assert plain.compiled is None
    assert not is_compiled(model)


def test_a_compiler_that_fails_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """It names the cause at its root."""
    engine = engine_for("fp32", EXACT)

    def fail(*_: Any) -> Any:
        raise RuntimeError("no space left for generated code")

    assert engine.compiled is not None
    monkeypatch.setattr(engine.compiled, "_compiler", fail)

    with pytest.raises(UsageError, match=r"aot_eager could not compile.*no space left"):
        steps(engine)


@pytest.mark.slow
def test_a_failing_step_is_located_in_the_model_uncompiled() -> None:
    """Compiled code has no borders that could be looked at; the replay has."""
    engine = engine_for("fp32", EXACT)
    steps(engine, TOKENS[:1])
    with torch.no_grad():
        engine.model.get_parameter("blocks.1.down.bias")[0] = math.inf
    found = first_bad_border(engine, loss_of, Moment.of(engine, TOKENS[0], 2))

    assert found is not None
    assert found.crossed.module == "blocks.1.down"


def test_the_watch_says_that_it_sees_no_values() -> None:
    """It goes on to see losses and skips."""
    watch = Watch(engine_for("fp32", EXACT), every=1)

    assert watch.notes
    assert "the model is compiled" in watch.notes[0]


def test_the_ledger_measures_the_model_uncompiled_and_says_so() -> None:
    """To the byte what it measures of the same model without compile; and it is compiled after."""
    engine, plain = engine_for("fp32", EXACT), engine_for("fp32")
    found = []
    for each in (engine, plain):
        with MemoryLedger(each.model) as ledger:
            loss_of(each.model, TOKENS[0]).backward()  # type: ignore[no-untyped-call]
        each.zero_grad()
        found.append(ledger.record())
    steps(engine, TOKENS[:1])

    assert found[0].total_peak_bytes == found[1].total_peak_bytes
    assert any("ran uncompiled while it was measured" in note for note in found[0].notes)
    assert not found[1].notes
    assert engine.compiled is not None
    assert engine.compiled.record().graphs == 1


@pytest.mark.slow
def test_after_an_evaluation_in_fp32_steps_are_compiled() -> None:
    """The compiler is off for the evaluation alone."""
    engine = engine_for("fp32", EXACT)
    with engine.evaluating("fp32"):
        engine.model(TOKENS[0])
    steps(engine, TOKENS[:1])

    assert engine.compiled is not None
    assert engine.compiled.record().graphs == 1
