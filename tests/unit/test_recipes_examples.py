"""Recipes as users write them: the files in tests/recipes and every one in docs/recipes.md."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from narrowcast.recipes.load import Recipe, load_recipe
from plain_loop import evaluated, run

ROOT = Path(__file__).parents[2]
NEEDS = {"transformers_gpt2": "transformers", "timm_classifier": "timm"}
EXAMPLES = ["image", "language_model", "regression", *NEEDS]


def losses_of(recipe: Recipe, steps: int) -> list[float]:
    """Train and evaluate; only the losses tell something about so short a run."""
    model, losses = run(recipe, steps)
    assert evaluated(recipe, model)
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_model_from_a_library_trains(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers and timm know nothing of us, and their models train as they are."""
    if not find_spec(NEEDS[name]):
        pytest.skip(f"{NEEDS[name]} is not installed (pip install narrowcast[peers])")
    monkeypatch.setattr(sys, "path", [*sys.path])
    losses = losses_of(load_recipe(ROOT / f"tests/recipes/{name}.py"), 40)

    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in EXAMPLES if n not in NEEDS])
def test_a_users_recipe_trains(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain datasets, lists, own collate, dict batches: the loss falls in all of them."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    losses = losses_of(load_recipe(ROOT / f"tests/recipes/{name}.py"), 40)

    assert sum(losses[-8:]) < 0.95 * sum(losses[:8])


DOCUMENTED = re.findall(
    r"### ([^\n]+)\n+```python\n(.*?)```", (ROOT / "docs" / "recipes.md").read_text(), re.DOTALL
)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's directory with the files that the documentation speaks of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    random = np.random.default_rng(0)
    labels = random.integers(0, 10, 300)
    images = random.integers(0, 100, (300, 28, 28))
    images[np.arange(300), 2 * labels] = 255  # a bright row tells the class
    np.save(tmp_path / "images.npy", images.astype(np.uint8))
    np.save(tmp_path / "labels.npy", labels)
    (tmp_path / "corpus.txt").write_text("it was the best of times, it was the worst. " * 400)
    x = random.normal(size=(200, 4))
    table = np.column_stack([x, x.sum(axis=1)])
    np.savetxt(tmp_path / "table.csv", table, delimiter=",", header="a,b,c,d,y", comments="")
    return tmp_path


def test_the_documentation_shows_three_recipes() -> None:
    """An image classifier, a language model, a regression."""
    assert [title for title, _ in DOCUMENTED] == [
        "An image classifier",
        "A language model",
        "A regression",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("title", "code"), DOCUMENTED, ids=[title for title, _ in DOCUMENTED])
def test_a_documented_recipe_trains(files: Path, title: str, code: str) -> None:
    """What a reader copies from the page works: the loss falls within 30 steps."""
    path = files / "my_recipe.py"
    path.write_text(code)
    recipe = load_recipe(path, ["batch_size=16"])

    losses = losses_of(recipe, 30)

    assert sum(losses[-5:]) < 0.9 * sum(losses[:5]), title
    assert recipe.metric_direction(next(iter(recipe.module.HIGHER_IS_BETTER)))
