"""`narrowcast recipes`: what can be trained as it is, and a file to start one's own from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from narrowcast.cli.common import JsonOption, console, emit_json, result_console
from narrowcast.errors import UsageError
from narrowcast.files import cannot_write

if TYPE_CHECKING:
    from narrowcast.recipes.load import RecipeDescription

__all__ = ["register"]

_STARTERS = Path(__file__).parents[1] / "recipes"

group = typer.Typer(
    invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]}
)


def register(app: typer.Typer) -> None:
    """Add the verb to the application."""
    app.add_typer(group, name="recipes")


@group.callback()
def recipes(context: typer.Context, json: JsonOption = None) -> None:
    """List the built-in recipes and their options; `recipes new` starts one of your own."""
    if context.invoked_subcommand is not None:
        return
    from narrowcast.recipes.load import builtin_recipes

    described = builtin_recipes()
    emit_json({"recipes": described}, json)
    if json != "-":
        _print(described, result_console(json))


@group.command()
def new(
    path: Annotated[Path, typer.Argument(help="The file to write; an existing one is left alone.")],
    kind: Annotated[
        Literal["image", "text", "regression"],
        typer.Option("--kind", "-k", help="What the recipe learns from."),
    ] = "image",
) -> None:
    """Write a complete recipe that trains as it stands, to be changed into your own."""
    if path.suffix != ".py":
        raise UsageError(
            f"a recipe is a Python file, and {path} is not named like one",
            hint=f"narrowcast recipes new {path.with_suffix('.py')} --kind {kind}",
        )
    starter = (_STARTERS / f"starter_{kind}.py").read_text()
    try:
        with path.open("x") as file:
            file.write(starter.replace("THIS_FILE", path.as_posix()))
    except FileExistsError:
        raise UsageError(
            f"{path} exists and was left as it is", hint="choose another name for the new recipe"
        ) from None
    except OSError as error:
        raise cannot_write(path, error) from None
    console().print(f"wrote {path}; try: narrowcast train {path}", markup=False, highlight=False)


def _print(described: tuple[RecipeDescription, ...], out: Console) -> None:
    for recipe in described:
        out.print(Text.assemble((recipe.name, "bold"), f"  {recipe.summary}"))
        table = Table("option", "default", "type", "", box=None, header_style="dim")
        for option in recipe.options:
            default = "none" if option.default is None else f"{option.default}"
            table.add_row(
                Text(option.name, no_wrap=True),
                Text(default, no_wrap=True, style="bold"),
                Text(option.type, style="cyan"),
                Text(option.note),
            )
        out.print(table)
        out.print()
    out.print("narrowcast train RECIPE --precision bf16 --set NAME=VALUE", highlight=False)
    out.print("narrowcast recipes new my_recipe.py --kind image | text | regression", markup=False)
