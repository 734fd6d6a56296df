"""`narrowcast recipes`: the list, as a table and as JSON, and a file to start from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from narrowcast.cli import recipes
from narrowcast.errors import NarrowcastError, RunDirectoryError, UsageError
from narrowcast.recipes import BUILTIN
from narrowcast.recipes.load import load_recipe


def invoke(*arguments: str) -> str:
    """Run the verb in an application of its own and return what it writes to stdout."""
    app = typer.Typer()
    recipes.register(app)
    app.command()(lambda: None)  # with a second verb, typer expects the name of one
    result = CliRunner().invoke(app, ["recipes", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: str) -> NarrowcastError:
    with pytest.raises(NarrowcastError) as caught:
        invoke(*arguments)
    return caught.value


def test_the_list_shows_every_recipe_and_option() -> None:
    """Names, defaults and types of all options of all built-in recipes."""
    text = invoke()

    for name in BUILTIN:
        assert name in text
    for word in ("mlp | vit | resnet", "evaluation_bytes", "32768", "int | none", "0.002"):
        assert word in text


def test_the_json_holds_what_the_list_shows() -> None:
    """stdout carries one JSON document and nothing else."""
    found = json.loads(invoke("--json", "-"))["recipes"]

    assert [r["name"] for r in found] == list(BUILTIN)
    assert [r["summary"] for r in found] == list(BUILTIN.values())
    model = found[0]["options"][0]
    assert (model["name"], model["default"], model["choices"]) == (
        "model",
        "mlp",
        ["mlp", "vit", "resnet"],
    )


def test_the_json_can_go_to_a_file(tmp_path: Path) -> None:
    """With a path the list is still shown."""
    path = tmp_path / "recipes.json"
    text = invoke("--json", str(path))

    assert len(json.loads(path.read_text())["recipes"]) == len(BUILTIN)
    assert "fashion" in text


@pytest.mark.parametrize("kind", ["image", "text", "regression"])
def test_new_writes_a_recipe_that_loads(tmp_path: Path, kind: str) -> None:
    """The written file names itself in its instructions."""
    path = tmp_path / "mine.py"
    invoke("new", str(path), "--kind", kind)

    assert load_recipe(path).name == "mine"
    assert f"narrowcast train {path}" in path.read_text()


def test_new_starts_with_images_by_default(tmp_path: Path) -> None:
    """The commonest case needs no option."""
    invoke("new", str(tmp_path / "mine.py"))

    assert "accuracy" in load_recipe(tmp_path / "mine.py").module.HIGHER_IS_BETTER


def test_new_overwrites_nothing(tmp_path: Path) -> None:
    """A file of that name, whatever is in it, is left as it is."""
    path = tmp_path / "mine.py"
    path.write_text("precious")

    error = refused("new", str(path))

    assert isinstance(error, UsageError)
    assert path.read_text() == "precious"


def test_new_writes_python_files_only(tmp_path: Path) -> None:
    """A name that could not be loaded again is refused, with the one that could."""
    error = refused("new", str(tmp_path / "mine"))

    assert isinstance(error, UsageError)
    assert "mine.py" in error.hint
    assert list(tmp_path.iterdir()) == []


def test_new_into_a_missing_directory_is_an_error(tmp_path: Path) -> None:
    """A slip in the directory does not make a new one."""
    error = refused("new", str(tmp_path / "no" / "mine.py"))

    assert isinstance(error, RunDirectoryError)
