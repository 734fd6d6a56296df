"""The recipes and the batches on a CUDA device."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import Subset, TensorDataset

from narrowcast.data import BatchStream, to_device
from narrowcast.recipes.load import load_recipe
from plain_loop import evaluated, run

pytestmark = pytest.mark.gpu

RECIPES = [
    ("fashion", "model=mlp"),
    ("fashion", "model=vit"),
    ("fashion", "model=resnet"),
    ("austen", "size=tiny"),
    ("tabular", "layers=3"),
]


@pytest.mark.parametrize(("name", "override"), RECIPES)
def test_a_built_in_recipe_learns_on_the_gpu(name: str, override: str) -> None:
    """Nothing in a recipe is tied to the CPU: the loss falls and every metric can be computed."""
    recipe = load_recipe(name, [override])
    model, losses = run(recipe, 40, device="cuda")

    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert all(torch.tensor(list(evaluated(recipe, model, device="cuda").values())).isfinite())


def test_gpt2_takes_a_step_in_bf16() -> None:
    """The 124M model runs forward and backward under CUDA's autocast; the first loss is plausible.

    It knows nothing of 50,304 tokens yet: the loss is near ln 50304 = 10.8.
    """
    recipe = load_recipe("austen", ["size=gpt2", "batch_size=2"])
    torch.manual_seed(0)
    model = recipe.build_model().cuda()
    optimizer = recipe.build_optimizer(model)
    _, batch = next(BatchStream(recipe.load_data()[0], recipe.batch_size, seed=0))
    with torch.autocast("cuda", torch.bfloat16):
        loss = recipe.compute_loss(model, to_device(batch, "cuda"))
    loss.backward()
    optimizer.step()

    assert 10 < loss.item() < 12
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_moving_a_batch_reaches_the_device() -> None:
    """Every tensor of a nest, and a batch that is on the device already stays the same object."""
    batch = {"x": [torch.ones(2), (torch.zeros(1, dtype=torch.int64), None)]}
    moved = to_device(batch, "cuda")

    assert moved["x"][0].is_cuda
    assert moved["x"][1][0].is_cuda
    assert to_device(moved, "cuda")["x"][0] is moved["x"][0]


def test_data_that_live_on_the_device_are_read_there() -> None:
    """A TensorDataset of CUDA tensors, or a subset of one, gives CUDA batches of equal values."""
    x = torch.arange(10.0)
    for on_cpu, on_gpu in (
        (TensorDataset(x), TensorDataset(x.cuda())),
        (Subset(TensorDataset(x), [7, 1, 4]), Subset(TensorDataset(x.cuda()), [7, 1, 4])),
    ):
        _, expected = next(BatchStream(on_cpu, 3, seed=0))
        _, batch = next(BatchStream(on_gpu, 3, seed=0))

        assert batch[0].is_cuda
        assert torch.equal(batch[0].cpu(), expected[0])
