"""Two ranks of a distributed training take the same steps, or are told why they cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

from narrowcast.errors import UsageError
from narrowcast.optim.adamw import AdamW
from narrowcast.optim.narrow import NarrowOptimizer
from narrowcast.optim.ranks import fingerprint
from narrowcast.optim.step import CHUNK

pytestmark = pytest.mark.slow


def same_on_all_ranks(optimizer: NarrowOptimizer) -> bool:
    """Whether masters and states have the bits that they have on rank 0."""
    own = [optimizer.master(p).flatten() for g in optimizer.param_groups for p in g["params"]]
    own += [t.flatten() for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
    mine = torch.cat([t.double() for t in own])
    theirs = mine.clone()
    dist.broadcast(theirs, 0)
    return torch.equal(mine, theirs)


def model_for(rank: int, *, alike: bool) -> nn.Module:
    torch.manual_seed(0 if alike else rank)
    return nn.Sequential(nn.Linear(80, 100), nn.Tanh(), nn.Linear(100, 7))


def train(model: nn.Module, optimizer: NarrowOptimizer, rank: int, steps: int = 5) -> None:
    """Train a copy of DistributedDataParallel on batches that differ from rank to rank."""
    replica = nn.parallel.DistributedDataParallel(model)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(steps):
        x = torch.randn(8, 80, generator=generator)
        y = torch.randint(0, 7, (8,), generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(replica(x).float(), y)
        loss.backward()
        optimizer.step()
        model.zero_grad()


def seeds_that_differ(rank: int) -> None:
    """The ranks are seeded by rank, as for other dropout on each of them."""
    for weights, states in (("split16", "int8"), ("split8", "int4"), ("stochastic", "bf16")):
        model = model_for(rank, alike=True)
        torch.manual_seed(100 + rank)
        optimizer = AdamW(model.parameters(), lr=1e-2, weights=weights, states=states)
        train(model, optimizer, rank)
        assert optimizer.param_groups[0]["seed"] == 100
        assert same_on_all_ranks(optimizer)


def a_group_that_comes_later(rank: int) -> None:
    """Its seed is agreed on as well."""
    model = model_for(rank, alike=True)
    torch.manual_seed(100 + rank)
    optimizer = AdamW(model[0].parameters(), lr=1e-2, weights="split8", states="int8")
    train(model, optimizer, rank, steps=1)
    optimizer.add_param_group({"params": list(model[2].parameters())})
    train(model, optimizer, rank)
    assert same_on_all_ranks(optimizer)


def a_state_that_is_loaded(rank: int) -> None:
    """Each rank loads a state with a seed of its own."""
    model = model_for(rank, alike=True)
    optimizer = AdamW(model.parameters(), lr=1e-2, weights="split16", states="int8")
    saved = optimizer.state_dict()
    saved["param_groups"][0]["seed"] = 7 + rank
    optimizer.load_state_dict(saved)
    train(model, optimizer, rank)
    assert optimizer.param_groups[0]["seed"] == 7
    assert same_on_all_ranks(optimizer)


def an_optimizer_built_before_the_weights_were_shared(rank: int) -> None:
    """DDP shares bf16 weights; what each rank's own fp32 weights left over stays different."""
    model = model_for(rank, alike=False)
    optimizer = AdamW(model.parameters(), lr=1e-2, weights="split16")
    with pytest.raises(UsageError, match="ranks 0 and 1 hold the same weights with different"):
        train(model, optimizer, rank)


def an_optimizer_built_after_they_were_shared(rank: int) -> None:
    """Then weights and remainders are the same, whatever the ranks began with."""
    model = model_for(rank, alike=False)
    nn.parallel.DistributedDataParallel(model)
    optimizer = AdamW(model.parameters(), lr=1e-2, weights="split16", states="int8")
    train(model, optimizer, rank)
    assert same_on_all_ranks(optimizer)


def models_that_are_no_replicas(rank: int) -> None:
    """Stages of a pipeline have other weights, groups and sizes; they may differ in all."""
    weights = [nn.Parameter(torch.randn(10 + rank)) for _ in range(2 + rank)]
    groups: list[dict[str, Any]] = [{"params": [p]} for p in weights]
    optimizer = AdamW(groups, weights="split8", states="int8")
    for p in weights:
        p.grad = torch.ones_like(p)
    optimizer.step()


def stores_that_round_nothing(rank: int) -> None:
    """One rank steps alone: fp32 needs no agreement, and so nothing is waited for."""
    if rank == 0:
        (weight,) = (nn.Parameter(torch.ones(3)),)
        weight.grad = torch.ones(3)
        AdamW([weight]).step()


FACTS = (
    seeds_that_differ,
    a_group_that_comes_later,
    a_state_that_is_loaded,
    an_optimizer_built_before_the_weights_were_shared,
    an_optimizer_built_after_they_were_shared,
    models_that_are_no_replicas,
    stores_that_round_nothing,
)


def run(rank: int, meeting: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    for fact in FACTS:
        fact(rank)
        dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_take_the_same_steps(tmp_path: Path) -> None:
    """Every fact above, on two processes."""
    mp.spawn(run, (str(tmp_path / "meeting"),), nprocs=2)


def test_a_fingerprint_sees_every_element_of_a_tensor() -> None:
    """One bit, anywhere, in any layout; and the shape."""

    def changed(tensor: Tensor, index: int) -> Tensor:
        other = tensor.clone()
        other.view(-1)[index] += 1
        return other

    for dtype in (torch.int8, torch.int16, torch.bfloat16, torch.float32):
        long = torch.zeros(CHUNK + 3, dtype=dtype)
        assert fingerprint([long]) == fingerprint([long.clone()])
        for index in (0, CHUNK - 1, CHUNK, CHUNK + 2):
            assert fingerprint([long]) != fingerprint([changed(long, index)])
    wide = torch.randn(4, 6)
    assert fingerprint([wide]) == fingerprint([wide.t().contiguous().t()])
    assert fingerprint([wide]) != fingerprint([wide.view(6, 4)])
    assert fingerprint([]) != fingerprint([torch.zeros(0)])
