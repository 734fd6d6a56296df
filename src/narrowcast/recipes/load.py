"""From a name or a path to a recipe: find the file, run it, see that nothing is missing.

A recipe is a Python file that need not know of narrowcast:

    @dataclass
    class Options: ...                      every field with a default; batch_size, steps and lr
                                            are understood, all others are the recipe's own
    def model(options): ...                 -> nn.Module
    def data(options): ...                  -> (training dataset, evaluation dataset)
    def loss(model, batch): ...             -> tensor that holds one float
    def metrics(model, batch): ...          -> {name: value per sample, or one number}
    HIGHER_IS_BETTER = {"accuracy": True}   optional, needed to compare on that metric
    def optimizer(model, options): ...      optional, else AdamW(lr=options.lr, fused=True)
    def scheduler(optimizer, options, steps): ...   optional
    def collate(samples): ...               optional, else torch's default_collate

Built-in recipes are read in the same way, from the files beside this one.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from narrowcast.errors import RecipeError, UnknownName, UsageError
from narrowcast.recipes import BUILTIN
from narrowcast.recipes.imported import hash_sources, noting_imports
from narrowcast.recipes.options import (
    OptionDescription,
    OptionValue,
    describe_options,
    parse_overrides,
    recorded_overrides,
)
from narrowcast.recipes.recipe import Recipe
from narrowcast.user_code import user_code

__all__ = [
    "Recipe",
    "RecipeDescription",
    "builtin_recipes",
    "load_again",
    "load_recipe",
    "option_values",
]

Overrides = Sequence[str] | Mapping[str, OptionValue]
"""``name=value`` as typed, or the values of a record."""

_REQUIRED = {
    "model": ("options",),
    "data": ("options",),
    "loss": ("model", "batch"),
    "metrics": ("model", "batch"),
}
_OPTIONAL = {
    "optimizer": ("model", "options"),
    "scheduler": ("optimizer", "options", "steps"),
    "collate": ("samples",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeDescription:
    """A recipe as a list of recipes shows it."""

    name: str
    summary: str
    options: tuple[OptionDescription, ...]


def load_recipe(name_or_path: str | Path, overrides: Overrides = ()) -> Recipe:
    """Load a built-in recipe by name, or any recipe file by path, with some options overridden.

    `overrides` are texts such as ``"lr=0.1"``, or a mapping of values as ``run.json`` holds it.

    Loading runs the file, as importing it would. Its directory is added to the end of ``sys.path``,
    so that it can import its neighbours. They are executed anew, and hashed with the file; a module
    that is imported only within a function, or was imported before by other code, is not.

    Raises UnknownName for an unknown recipe, option or choice; UsageError for a value that its
    option cannot have, or a file that does not exist; RecipeError for one that is incomplete or
    raises.
    """
    path = _locate(str(name_or_path))
    source = _read(path)
    with noting_imports(path) as imported:
        module = _run(path, source)
    _check_parts(path, module)
    with user_code(path, "Options"):
        described = describe_options(module.Options, source.decode())
        if isinstance(overrides, Mapping):
            chosen = recorded_overrides(module.Options, overrides)
        else:
            chosen = parse_overrides(module.Options, overrides)
        options = module.Options(**chosen)
    recipe = Recipe(
        name=path.stem,
        path=path,
        options=options,
        source_hash=hash_sources(source, imported),
        module=module,
        overrides=chosen,
    )
    _check_values(recipe, {d.name for d in described})
    return recipe


def load_again(recipe: Recipe) -> Recipe:
    """Load the same recipe with the same options as a fresh module, its globals as at the start.

    Raises what `load_recipe` raises, and RecipeError if the file is another one by now.
    """
    fresh = load_recipe(recipe.path, recipe.overrides)
    if fresh.source_hash != recipe.source_hash:
        raise RecipeError(
            f"{recipe.path} or a module that it imports was edited since it was loaded",
            hint="undo the edit to go on, or begin anew",
        )
    return fresh


def option_values(recipe: Recipe) -> dict[str, OptionValue]:
    """Return the options that a recipe will run with, in the order of their declaration."""
    return {f.name: getattr(recipe.options, f.name) for f in dataclasses.fields(recipe.options)}


def builtin_recipes() -> tuple[RecipeDescription, ...]:
    """Describe every built-in recipe with its options."""
    described = []
    for name, summary in BUILTIN.items():
        path = _locate(name)
        source = _read(path)
        options = describe_options(_run(path, source).Options, source.decode())
        described.append(RecipeDescription(name=name, summary=summary, options=options))
    return tuple(described)


def _locate(name_or_path: str) -> Path:
    if name_or_path in BUILTIN:
        return Path(__file__).parent / f"{name_or_path}.py"
    path = Path(name_or_path).expanduser()
    if path.suffix != ".py" and os.sep not in name_or_path:
        unknown = UnknownName.of("recipe", name_or_path, BUILTIN)
        unknown.hint += ", or the path of a recipe file (*.py)"
        raise unknown
    if not path.is_file():
        others = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, others, n=1, cutoff=0.5)
        guess = f"did you mean {path.parent / near[0]}? " if near else ""
        raise UsageError(
            f"there is no recipe file {name_or_path}",
            hint=f"{guess}`narrowcast recipes new {path}` writes one to start from",
        )
    return path.resolve()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RecipeError(
            f"cannot read {path}: {error.strerror}", hint="check the file's permissions"
        ) from None


def _run(path: Path, source: bytes) -> ModuleType:
    """Execute a recipe file as a fresh module; no bytecode is cached, so edits always count.

    The module is registered under ``recipe_<stem>``, which dataclasses need to resolve their types.
    """
    module = ModuleType(f"recipe_{path.stem}")
    module.__file__ = str(path)
    if path.parent != Path(__file__).parent and str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    sys.modules[module.__name__] = module
    with user_code(path, "loading the file"):
        exec(compile(source, str(path), "exec"), module.__dict__)  # noqa: S102 -- what was asked
    return module


def _check_parts(path: Path, module: ModuleType) -> None:
    """Raise RecipeError for whatever the contract wants and the file lacks, all at once."""
    missing = [
        f"def {name}({', '.join(parameters)})"
        for name, parameters in _REQUIRED.items()
        if not callable(getattr(module, name, None))
    ]
    options = getattr(module, "Options", None)
    if not (isinstance(options, type) and dataclasses.is_dataclass(options)):
        missing.insert(0, "a dataclass Options")
    if missing:
        raise RecipeError(
            f"{path.name} lacks {', '.join(missing)}",
            hint="`narrowcast recipes new my_recipe.py` writes a complete recipe to start from",
        )
    for name, parameters in (_REQUIRED | _OPTIONAL).items():
        if hasattr(module, name):
            _check_call(path, name, getattr(module, name), parameters)
    declared: Any = getattr(module, "HIGHER_IS_BETTER", {})
    if not isinstance(declared, dict) or not all(isinstance(v, bool) for v in declared.values()):
        raise RecipeError(
            f"{path.name}: HIGHER_IS_BETTER is {declared!r}",
            hint='write a dict of bools, such as HIGHER_IS_BETTER = {"accuracy": True}',
        )


def _check_call(path: Path, name: str, part: Any, parameters: tuple[str, ...]) -> None:
    try:
        signature = inspect.signature(part)
    except (TypeError, ValueError):  # written in C: it cannot be asked
        return
    try:
        signature.bind(*parameters)
    except TypeError as error:
        raise RecipeError(
            f"{path.name}: {name}{signature} cannot be called as {name}({', '.join(parameters)}): "
            f"{error}",
            hint=f"define it as def {name}({', '.join(parameters)})",
        ) from None


def _check_values(recipe: Recipe, declared: set[str]) -> None:
    for name in ("batch_size", "steps"):
        value = getattr(recipe.options, name, 1)
        if name in declared and (not isinstance(value, int) or value < 1):
            raise UsageError(
                f"option {name} is {value!r}", hint=f"{name} is a whole number, at least 1"
            )
