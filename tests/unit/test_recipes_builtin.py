"""The built-in recipes: real data, the announced models, and a loss that falls."""

from __future__ import annotations

import ast
import hashlib
import math
import re
from pathlib import Path

import pytest
import torch

import narrowcast.recipes
from narrowcast.data import BatchStream, evaluation_batches
from narrowcast.recipes import BUILTIN
from narrowcast.recipes.load import builtin_recipes, load_recipe, option_values
from plain_loop import evaluated, run

HOME = Path(narrowcast.recipes.__file__).parent
SMALL = {"austen": ["batch_size=4", "context=32"], "fashion": [], "tabular": []}
CASES = [
    ("fashion", "model=mlp"),
    ("fashion", "model=vit"),
    ("fashion", "model=resnet"),
    ("austen", "size=tiny"),
    ("tabular", "layers=3"),
]


def test_every_built_in_recipe_has_its_file_and_sentence() -> None:
    """The list that needs no torch and the files agree."""
    files = {p.stem for p in HOME.glob("*.py")} - {
        "__init__",
        "imported",
        "load",
        "options",
        "recipe",
    }

    assert {name for name in files if not name.startswith("starter_")} == set(BUILTIN)
    assert [d.name for d in builtin_recipes()] == list(BUILTIN)


@pytest.mark.parametrize("path", sorted(HOME.glob("*.py")), ids=lambda p: p.name)
def test_a_built_in_recipe_knows_nothing_of_us(path: Path) -> None:
    """Recipes and starters import no narrowcast, so that a user's file can be the same."""
    if path.stem in ("__init__", "imported", "load", "options", "recipe"):
        return
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [a.name for a in node.names]
        )
    }

    assert "narrowcast" not in imported


@pytest.mark.parametrize("name", BUILTIN)
def test_every_option_is_explained(name: str) -> None:
    """`narrowcast recipes` has a note for each option."""
    (described,) = (d for d in builtin_recipes() if d.name == name)

    assert [o.name for o in described.options if not o.note] == []


def test_the_data_are_those_that_sources_md_notes() -> None:
    """Each file has the digest, size and licence that stand beside it; under 8 MB in all."""
    text = (HOME / "data" / "SOURCES.md").read_text()
    noted = re.findall(r"\| `([\w.]+)` \| ([\d,]+) \| `([0-9a-f]{64})` \| (.+) \| (.+) \|", text)
    files = [p for p in (HOME / "data").iterdir() if p.suffix != ".md"]

    assert {name for name, *_ in noted} == {p.name for p in files}
    for name, size, digest, source, licence in noted:
        content = (HOME / "data" / name).read_bytes()
        assert (f"{len(content):,}", hashlib.sha256(content).hexdigest()) == (size, digest)
        assert source
        assert licence
    assert sum(p.stat().st_size for p in files) < 8_000_000


@pytest.mark.parametrize("name", BUILTIN)
def test_data_are_the_same_each_time_and_held_out_apart(name: str) -> None:
    """A comparison calls data() once a run; the order of random numbers does not matter to it."""
    recipe = load_recipe(name, SMALL[name])
    torch.manual_seed(1)
    first = recipe.load_data()
    torch.manual_seed(2)
    second = recipe.load_data()

    for one, two in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.tensors, two.tensors, strict=True))


def test_fashion_has_enough_balanced_normalised_images() -> None:
    """At least 10,000 to train on and 2,000 to test on, the same number of each class."""
    train, test = load_recipe("fashion").load_data()

    assert (len(train), len(test)) == (10_000, 3_000)
    for data in (train, test):
        images, labels = data.tensors
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert images.shape[1:] == (1, 28, 28)
        assert torch.bincount(labels).tolist() == [len(data) // 10] * 10
    deviation, mean = torch.std_mean(train.tensors[0])
    # The mean of 7.84 million fp32 values of order 1 is rounded by about 1e-4 at most.
    assert abs(mean.item()) < 1e-4
    assert abs(deviation.item() - 1) < 1e-4


def test_austen_tiles_five_novels_and_holds_out_the_sixth() -> None:
    """Windows overlap in the one byte that is only predicted; Persuasion is not trained on."""
    train, held_out = load_recipe("austen", ["context=63"]).load_data()
    (windows,) = train.tensors
    text = bytes(windows[:, :-1].flatten().tolist())

    assert windows.shape[1] == 64
    assert torch.equal(windows[:-1, -1], windows[1:, 0])
    assert b"It is a truth universally acknowledged" in text
    assert b"Captain Wentworth" not in text
    assert b"Anne Elliot" not in text
    assert b"Anne" in bytes(held_out.tensors[0].flatten().tolist())
    assert len(held_out) == 32_768 // 63


def test_austen_evaluates_on_as_much_text_as_asked_for() -> None:
    """The windows are spread over the novel, at least one and at most all."""
    sizes = [
        len(load_recipe("austen", [f"evaluation_bytes={n}"]).load_data()[1])
        for n in (1, 640, 10**9)
    ]

    assert sizes[:2] == [1, 10]
    assert 466_854 // 64 - 1 <= sizes[2] <= 466_854 // 64


def test_tabular_holds_out_every_tenth_row() -> None:
    """53,940 diamonds of 26 features; measures are standardised, grades are one-hot."""
    train, held_out = load_recipe("tabular").load_data()
    features, target = train.tensors

    assert (len(train), len(held_out)) == (48_546, 5_394)
    assert features.shape[1] == 26
    assert features[:, :6].abs().max() <= 5
    assert features[:, 6:].sum(dim=1).unique().tolist() == [3.0]
    assert abs(target.mean().item()) < 1e-4
    assert math.isclose(target.std().item(), 1.0147, abs_tol=0.01)


@pytest.mark.parametrize(
    ("override", "parameters"),
    [
        ("vocabulary=50257", 124_439_808),
        ("vocabulary=50304", 124_475_904),
    ],
)
def test_gpt2_is_the_published_model(override: str, parameters: int) -> None:
    """12 layers, 768 wide, 1024 positions: 124,439,808 parameters, or a padded vocabulary."""
    recipe = load_recipe("austen", ["size=gpt2", override])

    with torch.device("meta"):
        model = recipe.build_model()

    assert sum(p.numel() for p in model.parameters()) == parameters
    assert option_values(recipe)["context"] == 1024
    assert model.head.weight is model.tokens.weight


def test_gpt2_is_padded_and_small_in_batch_by_default() -> None:
    """Options that depend on the size are recorded as what they came to."""
    found = option_values(load_recipe("austen", ["size=gpt2"]))

    assert found["vocabulary"] == 50_304
    assert found["batch_size"] == 4
    assert found["lr"] == 6e-4


def test_austen_sees_no_future() -> None:
    """Changing a byte changes no prediction before it."""
    torch.manual_seed(0)
    model = load_recipe("austen", ["context=16"]).build_model().eval()
    tokens = torch.randint(256, (1, 16))
    changed = tokens.clone()
    changed[0, 9] = (tokens[0, 9] + 1) % 256

    difference = (model(tokens) - model(changed)).abs().amax(dim=(0, 2))

    # Equal up to the order of sums in the attention kernel: a few ulps of logits of order 1.
    assert difference[:9].max() < 1e-5
    assert difference[9:].min() > 1e-4


def test_austen_starts_at_the_entropy_of_knowing_nothing() -> None:
    """The first loss is near ln 256: the initial weights are of the right size."""
    torch.manual_seed(0)
    recipe = load_recipe("austen")
    model = recipe.build_model()
    _, batch = next(BatchStream(recipe.load_data()[0], 16, seed=0))

    assert abs(recipe.compute_loss(model, batch).item() - math.log(256)) < 0.5


def test_austen_decays_matrices_only() -> None:
    """Biases and norms are in a group without weight decay; nothing is left out or doubled."""
    recipe = load_recipe("austen")
    model = recipe.build_model()
    decayed, kept = recipe.build_optimizer(model).param_groups

    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert all(p.dim() >= 2 for p in decayed["params"])
    assert {id(p) for p in decayed["params"] + kept["params"]} == {
        id(p) for p in model.parameters()
    }


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 1000])
def test_austens_rate_warms_up_and_comes_down(steps: int) -> None:
    """From above zero to the full rate and down to a tenth of it, for short runs too."""
    recipe = load_recipe("austen")
    optimizer = recipe.build_optimizer(recipe.build_model())
    scheduler = recipe.build_scheduler(optimizer, steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"] / 3e-3)
        optimizer.step()
        scheduler.step()

    assert min(rates) > 0
    assert math.isclose(max(rates), 1.0)
    assert optimizer.param_groups[0]["lr"] / 3e-3 < 0.11 or steps == 1


def test_a_vocabulary_without_room_for_bytes_is_refused() -> None:
    """Bytes need 256 rows, and the recipe says so itself."""
    with pytest.raises(narrowcast.errors.RecipeError, match="bytes need at least 256"):
        load_recipe("austen", ["vocabulary=255"])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "override"), CASES)
def test_weights_depend_on_the_seed_and_the_loss_on_nothing_else(name: str, override: str) -> None:
    """Two runs of the same seed have bitwise equal losses."""
    recipe = load_recipe(name, [override])

    assert run(recipe, 3)[1] == run(recipe, 3)[1]


@pytest.mark.parametrize(("name", "override"), CASES)
def test_metrics_are_one_number_a_sample_and_have_a_direction(name: str, override: str) -> None:
    """Every metric can be averaged over samples and compared."""
    recipe = load_recipe(name, [override])
    model = recipe.build_model().eval()
    _, batch = next(evaluation_batches(recipe.load_data()[1], 5))

    found = recipe.compute_metrics(model, batch)

    for metric, value in found.items():
        assert value.shape == (5,), metric
        assert recipe.metric_direction(metric) in ("higher", "lower")


def test_bits_per_byte_is_the_loss_in_another_unit() -> None:
    """Averaged over samples the metric is the loss divided by ln 2."""
    recipe = load_recipe("austen")
    model = recipe.build_model().eval()
    _, batch = next(evaluation_batches(recipe.load_data()[1], 5))

    bits = recipe.compute_metrics(model, batch)["bits_per_byte"].mean().item()

    # Both are fp32 means of 320 numbers of order 10: 1e-5 is ten ulps.
    assert math.isclose(bits * math.log(2), recipe.compute_loss(model, batch).item(), rel_tol=1e-5)


@pytest.mark.slow
def test_the_fashion_mlp_learns_clothes() -> None:
    """A hundred steps from 10 % to well over 70 % of unseen images."""
    recipe = load_recipe("fashion")
    model, losses = run(recipe, 100)

    assert sum(losses[-10:]) < 0.4 * sum(losses[:10])
    assert evaluated(recipe, model)["accuracy"] > 0.7


@pytest.mark.slow
def test_tabular_learns_prices() -> None:
    """A hundred and fifty steps bring the error from about 0.86 to under 0.25 in log price."""
    recipe = load_recipe("tabular")
    model, losses = run(recipe, 150)

    assert sum(losses[-10:]) < 0.1 * sum(losses[:10])
    assert evaluated(recipe, model)["absolute_error"] < 0.25


@pytest.mark.slow
def test_austen_learns_letters() -> None:
    """Forty steps of a tiny GPT get well below the entropy of knowing nothing."""
    recipe = load_recipe("austen", ["context=16", "batch_size=8", "evaluation_bytes=2048"])
    model, losses = run(recipe, 40)

    assert losses[-1] < losses[0] - 2
    assert evaluated(recipe, model)["bits_per_byte"] < 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_the_other_fashion_models_learn_too(name: str) -> None:
    """Forty steps get well beyond guessing, which is 10 %."""
    recipe = load_recipe("fashion", [f"model={name}"])
    model, losses = run(recipe, 40)

    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert evaluated(recipe, model)["accuracy"] > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["image", "text", "regression"])
def test_a_starter_trains_as_it_stands(kind: str) -> None:
    """The file that `recipes new` writes is a recipe; its loss falls within some steps."""
    recipe = load_recipe(HOME / f"starter_{kind}.py")
    model, losses = run(recipe, 60 if kind == "image" else 30)

    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert set(evaluated(recipe, model)) == set(recipe.module.HIGHER_IS_BETTER)


@pytest.mark.slow
def test_the_image_starter_learns_and_still_errs() -> None:
    """Where every run is right on all samples, a comparison of precisions can say nothing."""
    recipe = load_recipe(HOME / "starter_image.py")

    model, _ = run(recipe, recipe.steps)

    assert 1 / 3 + 0.2 < evaluated(recipe, model)["accuracy"] < 0.98


def test_the_text_starter_reads_a_file(tmp_path: Path) -> None:
    """The option that names a text file is accepted and works."""
    (tmp_path / "text.txt").write_text("abc " * 300)
    recipe = load_recipe(HOME / "starter_text.py", [f"text={tmp_path / 'text.txt'}", "context=7"])
    train, held_out = recipe.load_data()

    assert (len(train), len(held_out)) == (135, 15)
    assert bytes(train[0][0].tolist()) == b"abc abc "


def test_the_regression_starter_reads_a_table(tmp_path: Path) -> None:
    """The option that names a CSV file is accepted and works, with its number of columns."""
    rows = "\n".join(f"{i},{i % 7},{2 * i}" for i in range(50))
    (tmp_path / "table.csv").write_text(f"a,b,y\n{rows}\n")
    table = f"table={tmp_path / 'table.csv'}"
    recipe = load_recipe(HOME / "starter_regression.py", [table, "columns=2"])

    _, losses = run(recipe, 5)

    assert len(recipe.load_data()[0]) == 40
    assert all(map(math.isfinite, losses))
