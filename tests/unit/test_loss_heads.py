"""chunked_logits on models that know nothing of it: recipes, peers' models, under ledgers."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from narrowcast.errors import UsageError
from narrowcast.loss.deferred import DeferredLogits
from narrowcast.loss.heads import chunked_logits
from narrowcast.memory.measure import MemoryLedger
from narrowcast.memory.storages import storages_of
from narrowcast.policy import policy_named
from narrowcast.precision.cast import forward_context, prepare_model
from narrowcast.precision.executed import ExecutedDtypes
from narrowcast.recipes import austen

BF16 = torch.bfloat16


def gpt(vocabulary: int = 1_000) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    model = austen.model(austen.Options(vocabulary=vocabulary, context=32))
    return model, (torch.randint(0, 256, (4, 33), dtype=torch.uint8),)


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def apart(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest relative distance of two gradients, parameter by parameter."""
    assert len(found) == len(expected) > 0
    pairs = zip(found, expected, strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("policy_name", ["fp32", "bf16", "fp16", "bf16-true"])
def test_the_built_in_gpt_trains_the_same(policy_name: str) -> None:
    """A recipe with a tied head, `flatten(0, 1)`, autocast and our hooks on it, unchanged.

    fp32: roundings of some 1,000 terms, 2^-24 x 1,000 at worst. 16 bits: the whole version rounds
    logits and their gradients to 2^-9, which the chunked one does not, and backward carries that.
    """
    policy = policy_named(policy_name)
    losses, found = [], []
    for chunked in (False, True):
        model, batch = gpt()
        prepare_model(model, policy, "cpu")
        handle = chunked_logits(model, chunk_bytes=100_000) if chunked else None
        with forward_context(policy, "cpu"):
            loss = austen.loss(model, batch)
        loss.backward()
        losses.append(loss.detach())
        found.append([g.float() for g in gradients(model)])

    assert handle is not None
    assert (handle.head, handle.chunked_calls, handle.materialised) == ("head", 1, [])
    narrow = policy_name != "fp32"
    assert apart(found[1], found[0]) < (2**-5 if narrow else 1e-4)
    torch.testing.assert_close(losses[1], losses[0].float(), rtol=2**-9 if narrow else 1e-6, atol=0)


def test_an_island_round_the_head_is_one_still() -> None:
    """keep_fp32 on the head: its product is fp32, hooks made before or after the deferral."""
    policy = replace(policy_named("bf16"), keep_fp32=("head",))
    for late in (False, True):
        model, batch = gpt()
        if not late:
            prepare_model(model, policy, "cpu")
        handle = chunked_logits(model)
        if late:
            prepare_model(model, policy, "cpu")
        with forward_context(policy, "cpu"):
            logits = model(batch[0].long()[:, :-1])

        assert isinstance(logits, DeferredLogits)
        assert logits._form.compute == torch.float32
        assert handle.materialised == []


def test_the_ledger_sees_what_is_saved() -> None:
    """Where logits (4 x 256 x 2,000 in fp32) are most of a step, the peak falls by two of them.

    Logits, their log-softmax and its gradient go; the weight's gradient and a chunk come earlier.
    """
    peaks = []
    for chunked in (False, True):
        torch.manual_seed(0)
        model = austen.model(austen.Options(vocabulary=2_000, context=256))
        batch = (torch.randint(0, 256, (4, 257), dtype=torch.uint8),)
        if chunked:
            chunked_logits(model, chunk_bytes=100_000)
        with MemoryLedger(model) as ledger:
            austen.loss(model, batch).backward()
        peaks.append(ledger.record().total_peak_bytes)

    assert peaks[0] - peaks[1] > 2 * 4 * 4 * 256 * 2_000


def test_deferred_logits_have_no_memory_of_their_own() -> None:
    """The storages under a stand-in are those of hidden states and head."""
    model, batch = gpt()
    chunked_logits(model)
    logits = model(batch[0].long()[:, :-1])

    found = {storage._cdata for storage in storages_of(logits)}

    parts = (logits.hidden, model.get_parameter("head.weight"))
    assert found == {part.untyped_storage()._cdata for part in parts}


@pytest.mark.parametrize("chunk_bytes", [100_000, 2**25])
def test_what_executed_is_told(chunk_bytes: int) -> None:
    """On a CPU, bf16 factors are multiplied in fp32: handle and watch count the same."""
    model, batch = gpt()
    policy = policy_named("bf16")
    prepare_model(model, policy, "cpu")
    with chunked_logits(model, chunk_bytes=chunk_bytes) as handle, ExecutedDtypes() as executed:
        with forward_context(policy, "cpu"):
            loss = austen.loss(model, batch)
        loss.backward()

    assert executed.counts["matmul"]["fp32"] == handle.widened_products > 0


def test_products_in_the_format_of_the_policy_are_not_counted_as_widened() -> None:
    """In fp32 there is nothing to widen."""
    model, batch = gpt()
    with chunked_logits(model) as handle:
        austen.loss(model, batch).backward()

    assert handle.widened_products == 0


def test_a_fake_step_has_the_bytes_of_a_real_one() -> None:
    """The peak of a chunked step on fake tensors is that of real ones, to the byte."""

    def peak() -> int:
        model, batch = gpt(vocabulary=3_000)
        chunked_logits(model, chunk_bytes=100_000)
        with MemoryLedger(model) as ledger:
            austen.loss(model, batch).backward()
        return ledger.record().total_peak_bytes

    with FakeTensorMode():
        traced = peak()

    assert traced == peak()


def test_evaluation_is_left_alone() -> None:
    """In eval mode, under no_grad, and after remove(), the head returns a plain tensor."""
    model, batch = gpt()
    tokens = batch[0].long()[:, :-1]
    handle = chunked_logits(model)

    with torch.no_grad():
        assert type(model(tokens)) is Tensor
    assert type(model.eval()(tokens)) is Tensor
    assert austen.metrics(model, batch)["bits_per_byte"].shape == (4,)
    assert type(model.train()(tokens)) is DeferredLogits
    handle.remove()
    assert type(model(tokens)) is Tensor
    assert handle.deferred_calls == 1


def test_a_model_with_a_deferred_head_is_pickled_whole() -> None:
    """The hook travels with it."""
    model, batch = gpt()
    chunked_logits(model)

    twin = pickle.loads(pickle.dumps(model))

    assert type(twin(batch[0].long()[:, :-1])) is DeferredLogits


def test_counts_start_again_when_asked() -> None:
    """A handle says of each step whether the lever had an effect."""
    model, batch = gpt()
    with chunked_logits(model) as handle:
        austen.loss(model, batch)
        model(batch[0].long()[:, :-1]).argmax(-1)
        assert (handle.chunked_calls, handle.deferred_calls) == (1, 2)
        assert handle.materialised == ["torch.Tensor.argmax"]

        handle.reset()

        assert (handle.chunked_calls, handle.deferred_calls, handle.materialised) == (0, 0, [])


def test_the_input_may_be_a_keyword() -> None:
    """head(input=x) is deferred as head(x) is."""
    head = nn.Linear(4, 9)
    with chunked_logits(nn.ModuleDict({"head": head})) as handle:
        loss = F.cross_entropy(head(input=torch.randn(3, 4)), torch.tensor([1, 2, 3]))

    assert loss.requires_grad
    assert handle.chunked_calls == 1


@pytest.mark.parametrize("early", [True, False])
def test_other_hooks_on_the_head_see_logits(early: bool) -> None:
    """A hook that changes what the head returns gets its change, made before or after us."""
    model, batch = gpt()
    expected = austen.loss(model, batch)
    halve = lambda _module, _args, output: output / 2  # noqa: E731
    if early:
        model.get_submodule("head").register_forward_hook(halve)
    handle = chunked_logits(model)
    if not early:
        model.get_submodule("head").register_forward_hook(halve)

    halved = austen.loss(model, batch)

    handle.remove()
    assert handle.materialised == ["torch.Tensor.div"]
    assert torch.equal(halved, austen.loss(model, batch))
    assert not torch.equal(halved, expected)


def test_a_head_that_raises_leaves_nothing_behind() -> None:
    """After an error inside the head, F.linear with its weight is a product again."""
    model, _ = gpt()
    head = model.get_submodule("head")
    chunked_logits(model)

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        head(torch.randn(3, 5))

    assert type(F.linear(torch.randn(2, 128), model.get_parameter("head.weight"))) is Tensor


@pytest.mark.slow
def test_a_compiled_model_computes_its_logits() -> None:
    """Under torch.compile the head is left alone, and the handle says that nothing was chunked."""
    model, batch = gpt()
    handle = chunked_logits(model)
    compiled = torch.compile(model, backend="eager")

    logits = compiled(batch[0].long()[:, :-1])

    assert type(logits) is Tensor
    assert handle.deferred_calls == 0


class WithEmbeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.odd_name = nn.Linear(3, 50)
        self.head = nn.Linear(3, 2)

    def get_output_embeddings(self) -> nn.Module:
        return self.odd_name


FOUND: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "transformers' method": (WithEmbeddings, "odd_name"),
    "of a wrapped model": (lambda: nn.Sequential(WithEmbeddings()), "0.odd_name"),
    "a name that heads have": (
        lambda: nn.ModuleDict({"fc": nn.Linear(3, 9), "lm_head": nn.Linear(3, 5)}),
        "lm_head",
    ),
}


@pytest.mark.parametrize("how", FOUND)
def test_heads_are_found(how: str) -> None:
    """By what the model says, or by the usual names."""
    make, name = FOUND[how]

    assert chunked_logits(make()).head == name


REFUSED: dict[str, tuple[Any, Any, str, str]] = {
    "no name that heads have": (
        nn.Sequential(nn.Linear(3, 9), nn.Linear(9, 40)),
        None,
        "0 layers of this Sequential look like its head",
        r"linear layers: '1' \(40 wide\), '0' \(9 wide\)",
    ),
    "two of them": (
        nn.ModuleDict({"head": nn.Linear(3, 9), "decoder": nn.Linear(3, 9)}),
        None,
        "2 layers .*: head, decoder",
        "name it",
    ),
    "a name that is not there": (nn.Sequential(nn.Linear(3, 9)), "lm_head", "is no module", "'0'"),
    "another kind of layer": (
        nn.Sequential(nn.Linear(3, 9), nn.ReLU()),
        "1",
        "'1' is a ReLU",
        "'0'",
    ),
    "another model's layer": (nn.Sequential(nn.Linear(3, 9)), nn.Linear(2, 2), "no module", "'0'"),
    "no layer at all": (nn.ReLU(), None, "0 layers", "no linear layer"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_heads_that_are_not_found_are_an_error_with_candidates(what: str) -> None:
    """The hint lists the widest linear layers by name."""
    model, head, message, hint = REFUSED[what]

    with pytest.raises(UsageError, match=message) as caught:
        chunked_logits(model, head)
    with pytest.raises(UsageError, match=hint):
        raise caught.value


def test_two_handles_on_one_head_are_refused() -> None:
    """Each would count the other's calls; after remove() there may be another."""
    model, _ = gpt()
    handle = chunked_logits(model)

    with pytest.raises(UsageError, match="deferred already"):
        chunked_logits(model)
    handle.remove()
    chunked_logits(model)


def peers(name: str) -> nn.Module:
    sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
    import torchvision_on_cpu  # noqa: F401 -- before transformers, which imports torchvision

    transformers = pytest.importorskip("transformers")
    plain = {"vocab_size": 500, "bos_token_id": None, "eos_token_id": None, "use_cache": False}
    if name == "gpt2":
        config = transformers.GPT2Config(
            n_positions=32, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0, **plain,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config)  # type: ignore[no-any-return]
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, **plain,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_causal_models_of_transformers_train_the_same(
    name: str, *, autocast: bool, checkpointed: bool
) -> None:
    """`model(input_ids=..., labels=...)`, unchanged: a chunked loss, no logits, same gradients."""
    torch.manual_seed(0)
    model = peers(name)
    model.train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    tokens = torch.randint(0, 500, (3, 32))

    def step() -> Any:
        model.zero_grad()
        with torch.autocast("cpu", BF16, enabled=autocast):
            output = model(input_ids=tokens, labels=tokens)
        output.loss.backward()
        return output

    whole = step()
    expected = gradients(model)
    with chunked_logits(model, chunk_bytes=100_000) as handle:
        chunked = step()

    assert (handle.head, handle.chunked_calls, handle.materialised) == ("lm_head", 1, [])
    assert apart(gradients(model), expected) < (2**-5 if autocast else 1e-4)
    torch.testing.assert_close(chunked.loss, whole.loss, rtol=1e-3 if autocast else 1e-6, atol=0)
    assert torch.equal(chunked.logits.argmax(-1), whole.logits.argmax(-1))
    assert handle.materialised == ["torch.Tensor.argmax"]
