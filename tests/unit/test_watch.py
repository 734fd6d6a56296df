"""A training looked at while it runs: the same bits, the last batches, the values, the symptoms."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from narrowcast.engine.engine import Engine
from narrowcast.errors import PrecisionError, UsageError
from narrowcast.ranges.histogram import measure
from narrowcast.records.diagnosis import ModuleRange
from narrowcast.records.ranges import TensorRange
from narrowcast.replay.step import replay_step
from narrowcast.scaling.scales import DynamicScale
from narrowcast.watch import watch as watch_module
from narrowcast.watch.boundaries import Boundaries
from narrowcast.watch.failure import LossLevel, is_far_off, skip_symptom
from narrowcast.watch.locate import first_bad_border
from narrowcast.watch.snapshots import Snapshots
from narrowcast.watch.watch import Watch
from small_training import OVERFLOW, X, Y, sgd, small_model, train_step


def engine_of(policy: str = "fp32", model: nn.Module | None = None, **options: Any) -> Engine:
    model = small_model() if model is None else model
    return Engine(model, sgd(model), policy, **options)


def watched_step(watch: Watch, i: int, factor: float = 1.0) -> None:
    with watch.step((X[i], Y[i])):
        train_step(watch.engine, i, factor)


def values_of(ranges: tuple[ModuleRange, ...], phase: str) -> dict[str, TensorRange]:
    return {one.module: one.values for one in ranges if one.phase == phase}


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]).float(), batch[1])


def loss_of_thousands(model: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(model(batch[0]).float(), F.one_hot(batch[1], 4).float() / 8)


class Drawing(nn.Module):
    """A model that draws from every generator, and keeps running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.norm = nn.BatchNorm1d(16)
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.relu(self.norm(self.first(x))), 0.3, self.training)
        factor = random.random() + float(np.random.random())  # noqa: NPY002 -- as users do
        out: Tensor = self.last(x) * factor
        return out


def trained(policy: str, watch_of: Callable[[Engine], Watch | None]) -> tuple[Any, ...]:
    """Train six steps; return weights, buffers, losses and all random states."""
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(11)
    engine = engine_of(policy, Drawing())
    watch = watch_of(engine)
    losses = []
    for i in range(6):
        if watch is not None:
            watch.batch((X[i], Y[i]))
        with engine.forward():
            loss = F.cross_entropy(engine.model(X[i]).float(), Y[i])
        engine.backward(loss)
        report = engine.step()
        losses.append(loss.item())
        if watch is not None:
            watch.after(report, loss=losses[-1])
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    return list(engine.model.state_dict().values()), losses, state


@pytest.mark.parametrize("policy", ["fp32", "bf16", "fp16", "bf16-true"])
def test_a_watched_training_is_the_same_bit_for_bit(policy: str) -> None:
    """Weights, running statistics, losses and every random stream, with each step looked at."""
    plain = trained(policy, lambda engine: None)
    watched = trained(policy, lambda engine: Watch(engine, every=1))

    assert all(torch.equal(a, b) for a, b in zip(plain[0], watched[0], strict=True))
    assert plain[1:] == watched[1:]


def test_a_step_that_is_not_sampled_has_no_hook_to_call() -> None:
    """Hooks are on from the beginning of a sampled pass to its end, and on no other step."""
    engine = engine_of()
    watch = Watch(engine, every=3)
    hooks = []
    for i in range(8):
        watch.batch((X[i], Y[i]))
        hooks.append(sum(len(module._forward_hooks) for module in engine.model.modules()))
        watch.after(train_step(engine, i))

    # Four modules: the Sequential and its three; sampled are the fourth step and every third.
    assert hooks == [0, 0, 0, 4, 0, 0, 4, 0]
    assert watch.sampled_at == 7
    assert all(not module._forward_hooks for module in engine.model.modules())


def test_the_hooks_of_a_pass_are_off_before_the_optimizer_steps() -> None:
    """What is copied or pickled in a step, such as an average of the model, holds no watch."""
    engine = engine_of()
    watch = Watch(engine, every=1)
    for i in range(5):
        with watch.passing((X[i], Y[i])):
            with engine.forward():
                loss = F.cross_entropy(engine.model(X[i]), Y[i])
            engine.backward(loss)
        assert all(not module._forward_hooks for module in engine.model.modules())
        engine.step()


def test_ranges_are_those_of_outputs_and_their_gradients() -> None:
    """Each module's output and gradient, against tensors that were kept; in the order crossed."""
    engine = engine_of("bf16")
    model = engine.model
    watch = Watch(engine, every=1)
    for i in range(3):
        watched_step(watch, i)
    assert watch.sampled_at == 0
    kept: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    with watch.step((X[3], Y[3])):
        with engine.forward():
            x = X[3]
            for name, module in model.named_children():
                x = module(x)
                kept[name] = x
                x.register_hook(lambda g, name=name: gradients.__setitem__(name, g.clone()))
            loss = F.cross_entropy(x, Y[3])
        engine.backward(loss)
        engine.step()

    assert values_of(watch.ranges, "forward") == {n: measure(t) for n, t in kept.items()}
    assert values_of(watch.ranges, "backward") == {n: measure(t) for n, t in gradients.items()}
    assert [one.module for one in watch.ranges] == ["0", "1", "2", "2", "1", "0"]
    assert watch.ranges[0].values.dtype == "bf16"


@pytest.mark.parametrize("scale", [None, 256.0, 1000.0])
def test_gradients_are_unscaled(scale: float | None) -> None:
    """By a power of two exactly, by another scale but for a rounding; in fp16 and by its policy."""
    plain, scaled = engine_of(), engine_of("fp16", scale=scale)
    with Boundaries(plain.model) as border:
        train_step(plain, 0)
    watch = Watch(scaled, every=1)
    watch._step = watch_module._FIRST_SAMPLE - 1
    scaled._lane(None).progress.tried = watch_module._FIRST_SAMPLE - 1
    watched_step(watch, 0)

    true, found = (values_of(r, "backward") for r in (border.ranges(), watch.ranges))
    assert true.keys() == found.keys() == {"", "0", "1", "2"}
    for name in true:
        # A handful of fp16 roundings, 2^-11 each, in a product of 16.
        assert found[name].rms == pytest.approx(true[name].rms, rel=0.01)
        assert found[name].amax == pytest.approx(true[name].amax, rel=0.01)


def test_gradients_of_losses_with_different_scales_are_left_out() -> None:
    """At which scale a gradient stands is then not known at a border; outputs are counted."""
    engine = engine_of("fp16", scale={"a": 2.0, "b": 4.0})
    watch = Watch(engine, every=1)
    for i in range(4):
        with watch.step((X[i], Y[i])):
            with engine.forward():
                loss = F.cross_entropy(engine.model(X[i]), Y[i])
            engine.backward(loss, "a", retain_graph=True)
            engine.backward(loss, "b")
            engine.step()

    assert watch.sampled_at == 4
    assert values_of(watch.ranges, "forward").keys() == {"", "0", "1", "2"}
    assert values_of(watch.ranges, "backward") == {}


class Nested(nn.Module):
    """Outputs in a dict, a module that is called twice, and a block under checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)
        self.block = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
        self.head = nn.Linear(16, 4)
        self.use_reentrant = False

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = self.inner(self.inner(x))
        x = checkpoint(self.block, x, use_reentrant=self.use_reentrant)
        return {"logits": self.head(x), "more": [x, None, 3]}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_nests_shared_modules_and_recomputations_are_counted_once(use_reentrant: bool) -> None:
    """Calls of a shared module are counted together; what checkpointing runs again is not."""
    model = Nested()
    model.use_reentrant = use_reentrant
    with Boundaries(model) as border:
        out = model(X[0].clone().requires_grad_())
        F.cross_entropy(out["logits"], Y[0]).backward()

    forward, backward = (values_of(border.ranges(), p) for p in ("forward", "backward"))
    assert forward["inner"].numel == 2 * 8 * 16
    assert forward["block.0"].numel == forward["block.1"].numel == 8 * 16
    assert forward[""].numel == 8 * 4 + 8 * 16
    assert backward.keys() >= {"inner", "block.0", "head"}
    assert backward["block.0"].numel == 8 * 16


def test_values_are_those_before_what_changes_them_in_place() -> None:
    """An output that the next module overwrites was counted as the module gave it."""
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(inplace=True))
    with Boundaries(model) as border:
        model(X[0]).sum().backward()

    forward = values_of(border.ranges(), "forward")
    assert forward["0"].zeros == 0
    assert forward["1"].zeros > 0
    assert forward["1"] == forward[""]


@pytest.mark.parametrize("inplace", [False, True])
def test_a_layer_in_place_has_a_gradient_of_its_own(*, inplace: bool) -> None:
    """That of its output is not that of what it overwrote, though both are one tensor."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(inplace=inplace), nn.Linear(32, 4))
    with Boundaries(model) as borders:
        model(X[0]).sum().backward()
    found = values_of(borders.ranges(), "backward")

    assert found["1"].zeros == 0
    assert found["0"].zeros > 50


def test_what_is_transformed_or_no_plain_tensor_is_left_alone() -> None:
    """Inside torch.func there are no values to count, and counting there would raise."""
    model = small_model()
    parameters = dict(model.named_parameters())

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, weights, (x[None],))
        return F.cross_entropy(logits, y[None])

    with Boundaries(model) as border:
        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, X[0], Y[0])
    assert border.ranges() == ()
    assert each["0.weight"].shape == (8, 16, 16)

    same = nn.Identity()
    with Boundaries(same) as border:
        same(torch.zeros(2, 3, device="meta"))
        same(torch.zeros(2, 3).long())
        same(torch.zeros(2, 3).to_sparse())
    assert border.ranges() == ()


def test_a_compiled_model_is_not_looked_into_and_that_is_said() -> None:
    """Compiled code calls no hooks: batches and symptoms are watched, and a note says so."""
    model = small_model()
    model.compile(backend="eager")
    engine = engine_of(model=model)
    watch = Watch(engine, every=1)
    for i in range(5):
        watched_step(watch, i)
    watched_step(watch, 5, math.nan)

    assert "compiled" in watch.notes[0]
    assert watch.sampled_at == 0
    assert watch.ranges == ()
    assert watch.failure is not None
    assert Watch(engine_of(), every=1).notes == Watch(engine, every=0).notes == ()


def test_the_last_steps_are_kept_by_reference() -> None:
    """`keep` steps, the newest last; every micro-batch of each has its place."""
    engine = engine_of(accumulate=2)
    watch = Watch(engine, keep=2)
    batches = [(X[i], Y[i]) for i in range(8)]
    for i, batch in enumerate(batches):
        watch.batch(batch)
        watch.after(train_step(engine, i))

    assert [(m.step, m.micro_batch) for m in watch.moments] == [(3, 0), (3, 1), (4, 0), (4, 1)]
    assert [m.batch for m in watch.moments] == batches[4:]
    assert all(m.batch is b for m, b in zip(watch.moments, batches[4:], strict=True))


def test_large_batches_are_let_go_but_for_the_newest() -> None:
    """Beyond 16 MiB of past batches the oldest go, and the one in use never does."""
    engine = engine_of()
    watch = Watch(engine, keep=10)
    for i in range(4):
        extra = {"x": torch.zeros(7 << 18), "note": "7 MiB"}
        watch.batch(extra)
        watch.after(train_step(engine, i))
    assert [m.step for m in watch.moments] == [2, 3, 4]
    watch.batch(torch.zeros(20 << 18))
    watch.after(train_step(engine, 4))
    assert [m.step for m in watch.moments] == [3, 4, 5]
    watch.batch((X[0], Y[0]))

    assert [m.step for m in watch.moments] == [6]


def test_a_moment_takes_its_step_again() -> None:
    """The kept random states give the loss bit for bit, wherever the model draws from."""
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002
    engine = engine_of(model=Drawing())
    watch = Watch(engine, keep=1)
    for i in range(6):
        weights = {n: p.detach().clone() for n, p in engine.model.state_dict().items()}
        watch.batch((X[i], Y[i]))
        with engine.forward():
            loss = F.cross_entropy(engine.model(X[i]), Y[i])
        engine.backward(loss)
        watch.after(engine.step())
        random.random()  # what a data loader does between the steps
    engine.model.load_state_dict(weights)
    (moment,) = watch.moments
    with moment.at(engine.model):
        again = F.cross_entropy(engine.model(moment.batch[0]), moment.batch[1])

    assert torch.equal(loss, again)


def test_generators_that_no_step_moves_are_read_only_on_probed_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """numpy's state takes long to read, and most steps never draw from it."""
    reads = []
    real = np.random.get_state
    monkeypatch.setattr(np.random, "get_state", lambda **k: reads.append(1) or real(**k))
    snapshots = Snapshots()
    for step in range(10):
        snapshots.take(probe=step < 2)
        torch.rand(1)
        snapshots.end()
        random.random()  # between the steps
    assert len(reads) == 4
    snapshots.take(probe=True)
    np.random.rand()  # noqa: NPY002
    snapshots.end()
    before = len(reads)
    for _ in range(5):
        snapshots.take(probe=False)
        snapshots.end()

    assert len(reads) - before == 5


def test_a_loss_that_is_not_finite_is_a_failure_at_once() -> None:
    """In any precision, with the batch that did it; the next healthy step is none."""
    watch = Watch(engine_of("fp16", scale=DynamicScale(scale=8.0)))
    watched_step(watch, 0)
    assert watch.failure is None
    watched_step(watch, 1, math.nan)
    failure = watch.failure
    assert failure is not None
    assert (failure.step, failure.symptom) == (2, "non-finite loss")
    assert failure.moment.batch[0] is watch.moments[-1].batch[0]
    assert torch.equal(failure.moment.batch[0], X[1])
    assert "non-finite loss at step 2" in failure.words
    watched_step(watch, 2)

    assert watch.failure is None


def test_a_gradient_that_is_not_finite_is_a_failure_without_a_scale_only() -> None:
    """fp32 has no scale to lower; in fp16 one overflow is how a scale is found."""
    wide, narrow = Watch(engine_of()), Watch(engine_of("fp16"))

    watched_step(wide, 0, 1e38)
    wide.engine.model[0].weight.data.mul_(1e20)  # type: ignore[index, union-attr, operator]
    watched_step(wide, 1, 1e38)
    assert wide.failure is not None
    assert wide.failure.symptom in ("non-finite gradient", "non-finite loss")
    watched_step(narrow, 0, OVERFLOW)
    assert narrow.engine.skips[-1].reason == "gradient overflow"
    assert narrow.failure is None


def test_eight_skips_in_a_row_are_a_failure_and_an_applied_step_ends_the_row() -> None:
    """Each further one too, until a step is applied."""
    watch = Watch(engine_of("fp16", scale=DynamicScale(scale=2.0**60)))
    found = []
    for i in range(10):
        watched_step(watch, i, OVERFLOW)
        found.append(watch.failure.symptom if watch.failure else None)

    assert found == [None] * 7 + ["skips in a row"] * 3


def test_an_overflow_at_the_floor_is_a_failure() -> None:
    """The scale can come down no further; a scale that never moves has no floor."""
    low = DynamicScale(scale=256.0, floor=128.0)
    watch, still = Watch(engine_of("fp16", scale=low)), Watch(engine_of("fp16", scale=128.0))
    watched_step(watch, 0, OVERFLOW)
    assert watch.failure is None
    watched_step(watch, 1, OVERFLOW)
    watched_step(still, 0, OVERFLOW)

    assert watch.failure is not None
    assert watch.failure.symptom == "scale at its floor"
    assert "loss scale 128" in watch.failure.words
    assert still.failure is None


def test_a_step_that_raises_is_looked_at_as_well() -> None:
    """The engine gives up with a PrecisionError: the failure and its batch are there."""
    watch = Watch(engine_of(max_consecutive_skips=1))
    with pytest.raises(PrecisionError):
        watched_step(watch, 0, math.nan)

    assert watch.failure is not None
    assert watch.failure.step == 1


def test_an_unfinished_accumulation_is_no_step() -> None:
    """A bad micro-batch shows when its step is closed, among all the micro-batches of it."""
    engine = engine_of(accumulate=3)
    watch = Watch(engine)
    for i in range(3):
        watched_step(watch, i, math.nan if i == 0 else 1.0)
        assert (watch.failure is None) == (i < 2)

    assert watch.failure is not None
    assert [m.micro_batch for m in watch.failure.moments] == [0, 1, 2]


def test_a_report_says_the_same_as_the_engine_when_asked() -> None:
    """With or without `engine.step`'s report the symptoms are equal, step by step."""
    told, asking = (Watch(engine_of("fp16", scale=DynamicScale(scale=2.0**20))) for _ in range(2))
    factors = [1, OVERFLOW, 1, math.nan, 1, *[OVERFLOW] * 12]
    found: list[list[Any]] = [[], []]
    for i, factor in enumerate(factors):
        told.batch((X[i], Y[i]))
        told.after(train_step(told.engine, i, factor))
        watched_step(asking, i, factor)
        for watch, into in zip((told, asking), found, strict=True):
            into.append(watch.failure and (watch.failure.step, watch.failure.words))

    assert found[0] == found[1]
    assert sum(one is not None for one in found[0]) == 6  # NaN, then the 8th skip and four more


def test_one_of_several_optimizers_is_watched_by_name() -> None:
    """Steps are those of the optimizer that is named; without a name the engine asks which."""
    model = nn.ModuleDict({"g": nn.Linear(16, 4), "d": nn.Linear(16, 4)})
    engine = Engine(model, {n: sgd(m) for n, m in model.items()}, "fp32")
    with pytest.raises(UsageError, match="which optimizer"):
        Watch(engine)
    watch = Watch(engine, optimizer="g")
    for i in range(2):
        for name in ("d", "g"):
            if name == "g":
                watch.batch((X[i], Y[i]))
            with engine.forward():
                loss = F.cross_entropy(model[name](X[i]), Y[i])
            engine.backward(loss, name)
            report = engine.step(name)
        watch.after(report)

    assert [m.step for m in watch.moments] == [1, 2]


@pytest.mark.parametrize(
    "options", [{"every": -1}, {"every": 1.5}, {"keep": 0}, {"keep": "all"}], ids=str
)
def test_numbers_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    """How often and how many are whole numbers."""
    with pytest.raises(UsageError, match="Watch"):
        Watch(engine_of(), **options)


def test_a_level_above_the_beginning_is_told_after_the_model_had_learned() -> None:
    """Falling, then above all of the first sixteen for sixteen steps; not before."""
    losses = [2.0 - i / 20 for i in range(40)] + [3.0] * 20
    level = LossLevel()
    found = [level.add(loss) for loss in losses]

    assert found.index(True) == 40 + 15
    assert "3 to 3" in level.words
    assert "1.25 to 2" in level.words


@pytest.mark.parametrize(
    "losses",
    [
        [2.0] * 200,
        [1.0 + (i % 7) / 3 for i in range(300)],
        [1.0 + i / 100 for i in range(300)],  # rises from the start: it never learned
        [2.0 - i / 100 for i in range(190)],
        [2.0] * 40 + [50.0] * 15 + [1.0] * 50,  # a spike that ends
        [-5.0 - i for i in range(100)],
        [math.nan, *[2.0] * 100],
    ],
    ids=["flat", "noisy", "rising", "falling", "spike", "negative", "nan"],
)
def test_ordinary_losses_are_no_symptom(losses: list[float]) -> None:
    """Noise, spikes, a loss that never fell: none of them is a training that broke."""
    level = LossLevel()

    assert not any(level.add(loss) for loss in losses)


def test_noise_round_a_level_is_no_symptom() -> None:
    """Sixteen above the largest of sixteen: of equal distributions in one case in 6e8."""
    generator = torch.Generator().manual_seed(0)
    level = LossLevel()

    assert not any(level.add(x) for x in torch.randn(20000, generator=generator).tolist())


def test_a_loss_far_off_fp32_is_a_failure() -> None:
    """A tenth is no rounding; one that only one side has as a number is far off."""
    assert is_far_off(1.2, 1.0)
    assert is_far_off(math.inf, 1.0)
    assert is_far_off(1.0, math.nan)
    assert not is_far_off(1.05, 1.0)
    assert not is_far_off(math.nan, math.inf)
    assert not is_far_off(0.0, 0.0)
    watch = Watch(engine_of())
    watch.batch((X[0], Y[0]))
    failure = watch.after(train_step(watch.engine, 0), loss=2.0, shadow=1.5)

    assert failure is not None
    assert failure.symptom == "loss far off fp32"


@pytest.mark.parametrize("policy", ["fp32", "bf16", "bf16-true", "fp16"])
def test_the_shadow_is_what_fp32_gives_on_the_same_weights_and_random_numbers(policy: str) -> None:
    """Dropout, running statistics and generators are those of the step."""
    engine = engine_of(policy, Drawing())
    watch = Watch(engine, every=1, shadow=cross_entropy)
    for i in range(3):  # the first look is at the fourth step
        watch.batch((X[i], Y[i]))
        train_step(engine, i)
    watch.batch((X[3], Y[3]))
    watch.end_pass()
    expected = replay_step(engine, cross_entropy, watch.moments[-1], policy_reference=True)

    assert watch._shadows == [expected.loss]


@pytest.mark.parametrize("policy", ["fp32", "bf16", "fp16", "bf16-true"])
def test_a_shadow_changes_no_bit(policy: str) -> None:
    """Weights, running statistics, losses and every random stream."""
    plain = trained(policy, lambda engine: None)
    shadowed = trained(policy, lambda engine: Watch(engine, every=1, shadow=cross_entropy))

    assert all(torch.equal(a, b) for a, b in zip(plain[0], shadowed[0], strict=True))
    assert plain[1:] == shadowed[1:]


class Drowned(nn.Module):
    """Adds a large number to its inputs and takes it off again: 16 bits keep nothing of them."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(x)
        return (x + 1e5) - 1e5


@pytest.mark.parametrize(("policy", "expected"), [("bf16", "loss far off fp32"), ("fp32", None)])
def test_a_loss_that_is_not_fp32s_is_told_by_the_watch_itself(
    policy: str, expected: str | None
) -> None:
    """With micro-batches the mean of the step is held against the mean in fp32."""
    engine = engine_of(policy, Drowned(), accumulate=2)
    watch = Watch(engine, every=1, shadow=loss_of_thousands)
    found = []
    for i in range(5):
        losses = []
        for part in (X[i] * 4, X[i + 1] * 4):
            watch.batch((part, Y[i]))
            with engine.forward():
                loss = loss_of_thousands(engine.model, (part, Y[i]))
            engine.backward(loss)
            report = engine.step()
            losses.append(loss.item())
        failure = watch.after(report, loss=sum(losses) / 2)
        found.append(failure.symptom if failure else None)

    assert found == [None, None, None, expected, expected]


def test_a_shadow_is_not_taken_of_steps_that_are_not_looked_at() -> None:
    """Nor of a step that is measured."""
    calls = []

    def counted(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        return cross_entropy(model, batch)

    watch = Watch(engine_of(), every=3, shadow=counted)
    for i in range(9):
        watch.batch((X[i], Y[i]), sample=i != 6)
        watch.after(train_step(watch.engine, i), loss=1.0)

    assert len(calls) == 1  # the fourth; the seventh was measured


def test_which_skip_is_a_symptom_of_what() -> None:
    """What no scale can cure, at once; what a lower one may, after eight."""
    ask = skip_symptom
    assert ask("non-finite loss", row=1, scale=8, floor=1) == "non-finite loss"
    assert ask("non-finite gradient", row=1, scale=1, floor=None) == "non-finite gradient"
    assert ask("gradient overflow", row=1, scale=1, floor=1) == "scale at its floor"
    assert ask("gradient overflow", row=7, scale=2, floor=1) is None
    assert ask("gradient overflow", row=8, scale=2, floor=1) == "skips in a row"
    assert ask("gradient overflow", row=8, scale=2, floor=None) == "skips in a row"


class Breaking(nn.Module):
    """Overflows in `middle`, forward or backward, on batches whose first element is large."""

    def __init__(self, phase: str) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.middle = Middle(phase)
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(16)
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.norm(self.drop(self.middle(self.first(x)))))
        return out


class Middle(nn.Module):
    def __init__(self, phase: str) -> None:
        super().__init__()
        self.phase = phase

    def forward(self, x: Tensor) -> Tensor:
        if self.phase == "forward":
            return x / (x - x)
        return x * 1 + (x - x).abs().sqrt() if self.phase == "backward" else x


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]).float(), batch[1])


@pytest.mark.parametrize("policy", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("phase", "module"), [("forward", "middle"), ("backward", "first"), ("nowhere", None)]
)
def test_the_first_border_that_is_not_finite_is_found(
    policy: str, phase: str, module: str | None
) -> None:
    """Forward it is the module that made it; backward the one whose output's gradient is bad."""
    model = Breaking(phase)
    engine = engine_of(policy, model)
    watch = Watch(engine)
    with watch.step((X[0], Y[0])):
        with engine.forward():
            loss = loss_of(model, (X[0], Y[0]))
        engine.backward(loss)
        engine.step()

    found = first_bad_border(engine, loss_of, watch.moments[-1])
    crossed = found and (found.crossed.phase, found.crossed.module)
    assert crossed == (module and (phase, module))
    assert found is None or f"module {module!r}" in found.words


def test_looking_for_the_first_border_leaves_no_trace() -> None:
    """Weights, buffers, gradients, counters, random states and hooks are what they were."""
    model = Breaking("backward")
    engine = engine_of(model=model)
    watch = Watch(engine)
    watch.batch((X[0], Y[0]))
    before = [t.clone() for t in model.state_dict().values()]
    state = torch.get_rng_state()

    first_bad_border(engine, loss_of, watch.moments[-1])
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert all(not module._forward_hooks for module in model.modules())
    assert not engine._lane(None).has_forwarded
    assert engine.skips == ()
