"""Loading: what a recipe file may look like, and what is said about one that is wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

from narrowcast.errors import (
    DataError,
    NarrowcastError,
    PrecisionError,
    RecipeError,
    UnknownName,
    UsageError,
)
from narrowcast.recipes.load import Recipe, load_again, load_recipe, option_values

PARTS = {
    "head": """
        from dataclasses import dataclass
        import torch
        from torch import nn
        from torch.utils.data import TensorDataset
        """,
    "Options": """
        @dataclass
        class Options:
            width: int = 4
        """,
    "model": """
        def model(options):
            return nn.Linear(3, options.width)
        """,
    "data": """
        def data(options):
            return TensorDataset(torch.ones(8, 3)), TensorDataset(torch.ones(4, 3))
        """,
    "loss": """
        def loss(model, batch):
            return model(batch[0]).square().mean()
        """,
    "metrics": """
        def metrics(model, batch):
            return {"size": model(batch[0]).norm(dim=1)}
        """,
}

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a working recipe in which some parts are replaced, added, or left out (None)."""

    def write(name: str = "mine", **changes: str | None) -> Path:
        parts = [text for text in (PARTS | changes).values() if text is not None]
        path = tmp_path / f"{name}.py"
        path.write_text("\n".join(map(dedent, parts)))
        return path

    return write


def load_error(path: Path, *overrides: str) -> NarrowcastError:
    with pytest.raises(NarrowcastError) as caught:
        load_recipe(str(path), overrides)
    return caught.value


def batch() -> list[torch.Tensor]:
    return [torch.ones(2, 3)]


def test_a_minimal_recipe_has_sensible_parts(write: Write) -> None:
    """Four functions and a dataclass are enough; the rest has defaults, and says so."""
    recipe = load_recipe(write())
    model = recipe.build_model()
    optimizer = recipe.build_optimizer(model)

    assert (recipe.name, recipe.batch_size, recipe.steps) == ("mine", 32, 200)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["lr"] == 1e-3
    choice, why = recipe.optimizer_choice
    assert (choice, "defines no optimizer" in why) == ("AdamW(lr=0.001, fused=True)", True)
    assert recipe.build_scheduler(optimizer, 10) is None
    assert recipe.collate is None
    assert recipe.compute_loss(model, batch()).shape == ()
    assert recipe.compute_metrics(model, batch())["size"].shape == (2,)


def test_every_optional_part_is_used(write: Write) -> None:
    """What the recipe defines is called with what the contract says, and none of it is ignored."""
    recipe = load_recipe(
        write(
            Options="""
        @dataclass
        class Options:
            width: int = 4
            batch_size: int = 5
            steps: int = 7
            lr: float = 0.25
            """,
            more="""
        HIGHER_IS_BETTER = {"size": True, "error": False}
        def optimizer(model, options):
            return torch.optim.SGD(model.parameters(), lr=options.lr)
        def scheduler(optimizer, options, steps):
            return torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=steps)
        def collate(samples):
            return len(samples)
            """,
        ),
        ["lr=0.5"],
    )
    optimizer = recipe.build_optimizer(recipe.build_model())
    scheduler = recipe.build_scheduler(optimizer, 7)

    assert (recipe.batch_size, recipe.steps) == (5, 7)
    assert option_values(recipe) == {"width": 4, "batch_size": 5, "steps": 7, "lr": 0.5}
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["lr"] == 0.5
    assert recipe.optimizer_choice[0] == "the recipe's own"
    assert scheduler.total_iters == 7
    assert recipe.collate is not None
    assert recipe.collate([1, 2, 3]) == 3
    directions = [recipe.metric_direction(name) for name in ("size", "error", "loss")]
    assert directions == ["higher", "lower", "lower"]


def test_the_default_optimizer_takes_the_learning_rate_option(write: Write) -> None:
    """An option called lr means the learning rate even without an optimizer of one's own."""
    path = write(
        Options="""
        @dataclass
        class Options:
            width: int = 4
            lr: float = 0.125
        """
    )
    recipe = load_recipe(path)

    assert recipe.build_optimizer(recipe.build_model()).defaults["lr"] == 0.125
    assert recipe.optimizer_choice[0] == "AdamW(lr=0.125, fused=True)"


def test_frozen_parameters_are_left_out_of_the_default_optimizer(write: Write) -> None:
    """Fine-tuning part of a model holds no moments for the rest."""
    path = write(
        model="""
        def model(options):
            network = nn.Linear(3, 4)
            network.bias.requires_grad_(False)
            return network
        """
    )
    recipe = load_recipe(path)

    (group,) = recipe.build_optimizer(recipe.build_model()).param_groups
    assert [p.shape for p in group["params"]] == [(4, 3)]


def test_weights_follow_from_the_global_seed(write: Write) -> None:
    """The trainer seeds, the recipe draws: equal seeds give equal weights."""
    recipe = load_recipe(write())

    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in recipe.build_model().parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize(
    ("name", "hint"),
    [("fashin", "did you mean 'fashion'?"), ("zebra", "or the path of a recipe file (*.py)")],
)
def test_an_unknown_name_lists_the_built_in_recipes(name: str, hint: str) -> None:
    """The nearest name, and that a path would do as well."""
    with pytest.raises(UnknownName, match=f"unknown recipe {name!r}") as caught:
        load_recipe(name)

    assert hint in caught.value.hint
    assert "austen, fashion, tabular" in caught.value.hint


def test_a_missing_file_names_its_neighbour(write: Write) -> None:
    """A path with a slip in it gets the file that is really there."""
    path = write("my_recipe")

    error = load_error(path.with_name("my_recpie.py"))

    assert isinstance(error, UsageError)
    assert error.message.startswith("there is no recipe file")
    assert f"did you mean {path}?" in error.hint


def test_a_directory_or_a_missing_directory_is_no_recipe(tmp_path: Path) -> None:
    """Neither a folder nor a path into nowhere crashes."""
    assert "there is no recipe file" in load_error(tmp_path).message
    assert "there is no recipe file" in load_error(tmp_path / "no" / "such.py").message


def test_values_of_a_record_are_options_as_they_are(write: Write) -> None:
    """None and a text with blanks come back, which no typed text could say."""
    options = "@dataclass\nclass Options:\n    tag: str | None = 'a'\n    gap: str = ' '\n"
    path = write(Options=options)

    recipe = load_recipe(path, {"tag": None, "gap": "  "})

    assert option_values(recipe) == {"tag": None, "gap": "  "}
    with pytest.raises(UnknownName, match="'old'"):
        load_recipe(path, {"old": 1})


def test_a_recipe_is_loaded_again_with_fresh_globals(write: Write) -> None:
    """The same options, and nothing of what the first one has kept since."""
    path = write()
    first = load_recipe(path, ["width=3"])
    first.module.kept = 1

    again = load_again(first)

    assert option_values(again) == option_values(first)
    assert not hasattr(again.module, "kept")
    path.write_text(path.read_text() + "\n# edited\n")
    with pytest.raises(RecipeError, match="was edited since it was loaded"):
        load_again(first)


@pytest.mark.parametrize("part", ["Options", "model", "data", "loss", "metrics"])
def test_a_missing_part_is_named(write: Write, part: str) -> None:
    """Exactly what is missing, and how to get a complete file."""
    error = load_error(write(**{part: None}))

    assert isinstance(error, RecipeError)
    assert error.exit_code == 4
    expected = "a dataclass Options" if part == "Options" else f"def {part}("
    assert error.message.startswith(f"mine.py lacks {expected}")
    assert error.message.count(",") <= 1
    assert "narrowcast recipes new" in error.hint


def test_all_missing_parts_are_named_at_once(write: Write) -> None:
    """One round of mending, not five."""
    error = load_error(write(Options=None, model=None, data=None, loss=None, metrics=None))

    expected = (
        "mine.py lacks a dataclass Options, def model(options), def data(options), "
        "def loss(model, batch), def metrics(model, batch)"
    )
    assert error.message == expected


def test_a_class_that_is_no_dataclass_is_not_options(write: Write) -> None:
    """Without the decorator there would be no fields to override."""
    path = write(
        Options="""
        class Options:
            width = 4
        """
    )

    assert "lacks a dataclass Options" in load_error(path).message


def test_a_part_with_other_parameters_is_named(write: Write) -> None:
    """The signature as written, the call that it must take, and why it cannot."""
    error = load_error(write(loss="def loss(model, images, labels):\n    pass"))

    assert "loss(model, images, labels) cannot be called as loss(model, batch)" in error.message
    assert "'labels'" in error.message


def test_directions_that_are_no_bools_are_refused(write: Write) -> None:
    """A truthy string would turn a verdict round."""
    error = load_error(write(more="HIGHER_IS_BETTER = {'size': 'no'}"))

    assert "HIGHER_IS_BETTER is {'size': 'no'}" in error.message


def test_a_syntax_error_shows_the_line(write: Write) -> None:
    """The user's line and the place in it, and nothing of ours."""
    error = load_error(write(more="def optimizer(:"))

    assert isinstance(error, RecipeError)
    assert "loading the file raised SyntaxError" in error.message
    assert "def optimizer(:" in error.message
    assert "narrowcast" not in error.message.replace("narrowcast-", "")


def test_an_error_while_loading_shows_the_users_lines_only(write: Write) -> None:
    """An import that fails points at the import and says what to install."""
    error = load_error(write(more="import no_such_package"))

    assert "ModuleNotFoundError: No module named 'no_such_package'" in error.message
    assert "import no_such_package" in error.message
    assert "load.py" not in error.message
    assert "'no_such_package'" in error.hint


def test_a_file_that_calls_exit_does_not_end_us(write: Write) -> None:
    """A script that exits with 0 would look like a finished training."""
    error = load_error(write(more="raise SystemExit(0)"))

    assert "loading the file raised SystemExit: 0" in error.message


@pytest.mark.parametrize(
    ("override", "kind", "message"),
    [
        ("wdith=3", UnknownName, "unknown option 'wdith'"),
        ("width=x", UsageError, "option 'width' is of type int"),
        ("batch_size=3", UnknownName, "unknown option 'batch_size'"),
    ],
)
def test_a_wrong_override_is_a_usage_error(
    write: Write, override: str, kind: type[NarrowcastError], message: str
) -> None:
    """Also an option that would mean something, if the recipe had it."""
    error = load_error(write(), override)

    assert isinstance(error, kind)
    assert message in error.message


@pytest.mark.parametrize("name", ["steps", "batch_size"])
@pytest.mark.parametrize("value", ["0", "-3"])
def test_no_steps_or_no_batch_is_refused(write: Write, name: str, value: str) -> None:
    """Zero steps would train nothing and report it."""
    path = write(
        Options=f"""
        @dataclass
        class Options:
            {name}: int = 4
            width: int = 4
        """
    )
    error = load_error(path, f"{name}={value}")

    assert isinstance(error, UsageError)
    assert error.message == f"option {name} is {value}"


def test_options_may_refuse_values_themselves(write: Write) -> None:
    """What __post_init__ raises arrives with its line."""
    path = write(
        Options="""
        @dataclass
        class Options:
            width: int = 4
            def __post_init__(self):
                if self.width % 2:
                    raise ValueError(f"width {self.width} is odd")
        """
    )
    error = load_error(path, "width=3")

    assert "Options raised ValueError: width 3 is odd" in error.message
    assert load_recipe(path, ["width=6"]).options.width == 6


def test_an_edited_file_is_read_again(write: Write) -> None:
    """Loading caches nothing, also within the same second and with the same length."""
    first = load_recipe(write())
    second = load_recipe(write(Options=PARTS["Options"].replace("4", "5")))

    assert (first.options.width, second.options.width) == (4, 5)
    assert first.source_hash != second.source_hash
    assert not list(first.path.parent.glob("__pycache__"))


def test_a_recipe_may_postpone_its_annotations_and_import_its_neighbours(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """String annotations resolve, and the recipe's directory comes last on the import path."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    head = "from __future__ import annotations\n" + dedent(PARTS["head"])
    path = write(head=head, more="from neighbour_of_mine import answer")
    path.with_name("neighbour_of_mine.py").write_text("answer = 42\n")

    assert load_recipe(path, ["width=9"]).options.width == 9
    assert sys.path[-1] == str(path.parent)


RETURNS = {
    "a Module": ("model", "None", RecipeError, "model(options) returned None"),
    "parameters": ("model", "nn.ReLU()", RecipeError, "has no parameter to train"),
    "sizes": ("model", "nn.LazyLinear(3)", RecipeError, "size of parameter weight is not known"),
    "a pair": ("data", "TensorDataset(torch.ones(3))", RecipeError, "returned a TensorDataset"),
    "a pair, not three": ("data", "[1], [2], [3]", RecipeError, "returned a tuple of 3"),
    "training data": ("data", "[], [1]", DataError, "the training data are empty"),
    "evaluation data": ("data", "[1], []", DataError, "the evaluation data are empty"),
    "wrapped tensors": (
        "data",
        "(torch.ones(3), torch.ones(3)), [1]",
        DataError,
        "the training data are a tuple of 2",
    ),
    "a length": ("data", "iter([1]), [1]", DataError, "has no length"),
}


@pytest.mark.parametrize(("part", "value", "kind", "message"), RETURNS.values(), ids=list(RETURNS))
def test_a_wrong_model_or_wrong_data_are_named(
    write: Write, part: str, value: str, kind: type[NarrowcastError], message: str
) -> None:
    """The part, what it returned, and (in the hint) what it must return."""
    recipe = load_recipe(write(**{part: f"def {part}(options):\n    return {value}"}))

    with pytest.raises(kind) as caught:
        _ = recipe.build_model() if part == "model" else recipe.load_data()

    assert message in caught.value.message
    assert caught.value.message.startswith("mine.py: ")
    assert caught.value.hint


def test_an_iterable_dataset_is_refused(write: Write) -> None:
    """Its position could not be continued exactly, whether it announces a length or not."""

    class Lines(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter([1, 2])

        def __len__(self) -> int:
            return 2

    recipe = load_recipe(write())
    recipe.module.data = lambda _: (Lines(), [1])

    with pytest.raises(DataError, match="cannot be read by index"):
        recipe.load_data()


LOSSES = {
    "no tensor": ("1.0", "returned a float"),
    "several numbers": ("model(batch[0])", r"a Tensor of shape \(2, 4\)"),
    "an integer": ("torch.tensor(1)", "dtype torch.int64"),
    "nothing": ("None", "returned None"),
    "detached": ("model(batch[0]).mean().detach()", "does not depend on the model's parameters"),
}


@pytest.mark.parametrize(("value", "message"), LOSSES.values(), ids=list(LOSSES))
def test_a_wrong_loss_is_named(write: Write, value: str, message: str) -> None:
    """What loss() returned, in shape and dtype, before backward() stumbles over it."""
    recipe = load_recipe(write(loss=f"def loss(model, batch):\n    return {value}"))

    with pytest.raises(RecipeError, match=message):
        recipe.compute_loss(recipe.build_model(), batch())


def test_a_loss_of_shape_one_is_a_loss(write: Write) -> None:
    """One number is one number, and it arrives with shape ()."""
    recipe = load_recipe(
        write(loss="def loss(model, batch):\n    return model(batch[0]).sum().view(1)")
    )

    assert recipe.compute_loss(recipe.build_model(), batch()).shape == ()


def test_without_gradients_a_loss_needs_no_graph(write: Write) -> None:
    """Evaluation calls the same loss under no_grad."""
    recipe = load_recipe(write())
    model = recipe.build_model()

    with torch.no_grad():
        assert not recipe.compute_loss(model, batch()).requires_grad


METRICS = {
    "a list": ("[1.0]", "returned a list of 1"),
    "nothing in it": ("{}", "returned a dict of 0"),
    "a matrix": ("{'size': torch.ones(2, 2)}", r"\['size'\] is a Tensor of shape \(2, 2\)"),
    "a word": ("{'size': 'big'}", r"\['size'\] is a str"),
}


@pytest.mark.parametrize(("value", "message"), METRICS.values(), ids=list(METRICS))
def test_wrong_metrics_are_named(write: Write, value: str, message: str) -> None:
    """Which metric, and what it is instead."""
    recipe = load_recipe(write(metrics=f"def metrics(model, batch):\n    return {value}"))

    with pytest.raises(RecipeError, match=message):
        recipe.compute_metrics(recipe.build_model(), batch())


def test_numbers_are_metrics(write: Write) -> None:
    """Python numbers and bools become tensors of shape (); the order is kept."""
    recipe = load_recipe(
        write(metrics="def metrics(model, batch):\n    return {'b': 1, 'a': True}")
    )

    found = recipe.compute_metrics(recipe.build_model(), batch())

    assert {name: value.item() for name, value in found.items()} == {"b": 1.0, "a": 1.0}
    assert list(found) == ["b", "a"]


def test_an_undeclared_direction_is_asked_for(write: Write) -> None:
    """Guessing that lower is better would call a better accuracy worse."""
    with pytest.raises(RecipeError, match="higher or a lower 'size' is better") as caught:
        load_recipe(write()).metric_direction("size")

    assert "HIGHER_IS_BETTER = {'size': True}" in caught.value.hint


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("None", "optimizer(model, options) returned None"),
        ("torch.optim.SGD([torch.ones(1)], lr=1)", "holds none of the model's parameters"),
        ("torch.optim.LBFGS(model.parameters())", "LBFGS.step() is not complete without"),
    ],
)
def test_a_wrong_optimizer_is_named(write: Write, value: str, message: str) -> None:
    """Also one that would train something else than the model, or calls it several times a step."""
    recipe = load_recipe(write(more=f"def optimizer(model, options):\n    return {value}"))

    with pytest.raises(RecipeError) as caught:
        recipe.build_optimizer(recipe.build_model())

    assert message in caught.value.message


def test_two_optimizers_are_for_an_engine(write: Write) -> None:
    """What docs/recipes.md says of a GAN is the hint."""
    value = "torch.optim.SGD(model.parameters(), lr=1), torch.optim.SGD(model.parameters(), lr=2)"
    recipe = load_recipe(write(more=f"def optimizer(model, options):\n    return {value}"))

    with pytest.raises(RecipeError, match="returned a tuple of 2") as caught:
        recipe.build_optimizer(recipe.build_model())

    assert "a GAN" in caught.value.hint
    assert "narrowcast.Engine" in caught.value.hint


def test_a_scheduler_that_cannot_step_is_named(write: Write) -> None:
    """A list of rates is not a scheduler."""
    recipe = load_recipe(write(more="def scheduler(optimizer, options, steps):\n    return [1.0]"))

    with pytest.raises(RecipeError, match="returned a list of 1"):
        recipe.build_scheduler(recipe.build_optimizer(recipe.build_model()), 3)


CALLS: dict[str, tuple[str, Callable[[Recipe], object]]] = {
    "model": ("model(options)", lambda r: r.build_model()),
    "data": ("data(options)", lambda r: r.load_data()),
    "loss": ("loss(model, batch)", lambda r: r.compute_loss(nn.ReLU(), [])),
    "metrics": ("metrics(model, batch)", lambda r: r.compute_metrics(nn.ReLU(), [])),
    "optimizer": (
        "optimizer(model, options)",
        lambda r: r.build_optimizer(nn.Linear(1, 1)),
    ),
    "scheduler": (
        "scheduler(optimizer, options, steps)",
        lambda r: r.build_scheduler(torch.optim.SGD([torch.ones(1)]), 3),
    ),
    "collate": ("collate(samples)", lambda r: r.collate and r.collate([])),
}


@pytest.mark.parametrize("part", CALLS)
def test_what_a_part_raises_comes_with_the_users_traceback_alone(write: Write, part: str) -> None:
    """The call, the error, and the user's own lines; torch's and our frames are left out."""
    signature, call = CALLS[part]
    body = f"""
        def {signature}:
            return helper()
        def helper():
            return torch.ones(2) @ torch.ones(3)  # the culprit
        """
    recipe = load_recipe(write(**{part: body}))

    with pytest.raises(RecipeError) as caught:
        call(recipe)

    message = caught.value.message
    assert message.startswith(f"mine.py: {signature} raised RuntimeError: ")
    assert message.index("return helper()") < message.index("# the culprit")
    files = [line for line in message.splitlines() if line.startswith('  File "')]
    assert all(str(recipe.path) in line for line in files)
    assert len(files) == 2
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_errors_of_ours_and_ctrl_c_pass_through_a_recipe(write: Write) -> None:
    """A PrecisionError keeps its exit code, and an interruption stays one."""
    recipe = load_recipe(write())
    for error in (PrecisionError("overflow"), KeyboardInterrupt()):
        recipe.module.loss = lambda *_, error=error: (_ for _ in ()).throw(error)

        with pytest.raises(type(error)):
            recipe.compute_loss(nn.ReLU(), [])


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "--set batch_size"),
        (RuntimeError("could not create a primitive descriptor for the LSTM"), "try bf16 or fp32"),
        (RuntimeError("Adam does not support sparse gradients"), "gets AdamW, which takes none"),
        (ValueError("odd"), ""),
    ],
)
def test_failures_that_we_know_say_what_to_do(write: Write, error: Exception, hint: str) -> None:
    """Too little memory, and a layer that the CPU has no low-precision kernel for."""
    recipe = load_recipe(write())

    def loss(*_: object) -> None:
        raise error

    recipe.module.loss = loss
    with pytest.raises(RecipeError) as caught:
        recipe.compute_loss(nn.ReLU(), [])

    assert hint in caught.value.hint
    assert bool(hint) == bool(caught.value.hint)


def test_a_pair_of_plain_lists_is_data(write: Write) -> None:
    """A dataset needs a length and an index, no base class."""
    recipe = load_recipe(write(data="def data(options):\n    return [[1.0]] * 3, [[2.0]]"))

    train, evaluation = recipe.load_data()

    assert (len(train), len(evaluation)) == (3, 1)
    assert not isinstance(train, TensorDataset)
