"""The pages of JSON and of runs name every key that a record has, and none that no record has."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from narrowcast.recipes.load import RecipeDescription
from narrowcast.records.check import CheckRecord
from narrowcast.records.comparison import ComparisonRecord
from narrowcast.records.device import DeviceRecord
from narrowcast.records.diagnosis import DiagnosisRecord
from narrowcast.records.evaluation import EvaluationRecord
from narrowcast.records.memory import MemoryRecord
from narrowcast.records.plan import PlanRecord
from narrowcast.records.run import Environment, Evaluation, RunRecord, StepPoint
from narrowcast.records.verify import VerifyRecord

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "json.md"
RUNS = ROOT / "docs" / "runs.md"
SECTIONS: dict[str, tuple[type, ...]] = {
    "train": (RunRecord, StepPoint),
    "compare": (ComparisonRecord,),
    "memory and predict": (MemoryRecord,),
    "plan": (PlanRecord,),
    "diagnose": (DiagnosisRecord,),
    "check": (CheckRecord,),
    "evaluate": (EvaluationRecord,),
    "verify-resume": (VerifyRecord,),
    "doctor": (DeviceRecord,),
    "recipes": (RecipeDescription,),
}
ELSEWHERE: dict[str, set[type]] = {name: {Environment, MemoryRecord} for name in SECTIONS} | {
    "train": {MemoryRecord},
    "memory and predict": set(),
}
"""What a section leaves to another one."""


def sections() -> dict[str, str]:
    parts = re.split(r"^## (.*)$", PAGE.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def named(text: str) -> set[str]:
    """Everything between backticks that can be a key: its last part, with its brackets."""
    words = re.findall(r"`([a-z0-9_.]+(?:\[\]|\{\})?)`", text)
    return {word.rpartition(".")[2] for word in words}


def classes_in(kind: Any) -> Iterator[type]:
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        yield kind
    for argument in get_args(kind):
        yield from classes_in(argument)


def parts_of(root: type, left_out: set[type]) -> dict[type, dict[str, Any]]:
    """A record's class and those of its parts, each with its fields and their types."""
    found: dict[type, dict[str, Any]] = {}
    waiting = [root]
    while waiting:
        kind = waiting.pop()
        if kind in found or (kind in left_out and kind is not root):
            continue
        hints = get_type_hints(kind)
        found[kind] = {field.name: hints[field.name] for field in dataclasses.fields(kind)}
        waiting += [part for hint in found[kind].values() for part in classes_in(hint)]
    return found


def fields_of(section: str) -> dict[str, list[Any]]:
    """Each key of a section's records, with the types that it has in them."""
    keys: dict[str, list[Any]] = {}
    for root in SECTIONS[section]:
        for fields in parts_of(root, ELSEWHERE[section]).values():
            for name, hint in fields.items():
                keys.setdefault(name, []).append(hint)
    return keys


def brackets(hint: Any) -> set[str]:
    """How the page may end the name of such a field; an interval is one value."""
    kinds = [hint, *get_args(hint)] if get_origin(hint) not in (tuple, dict) else [hint]
    origins = {get_origin(kind) for kind in kinds}
    if dict in origins:
        return {"{}"}
    pairs = [k for k in kinds if get_origin(k) is tuple and Ellipsis not in get_args(k)]
    return ({"[]"} | ({""} if pairs else set())) if tuple in origins else {""}


def test_every_verb_has_a_section() -> None:
    """In the order of the page."""
    assert list(sections()) == list(SECTIONS)


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_of_a_record_is_on_the_page(section: str) -> None:
    """Whoever adds a field says there what it means; lists end in [], objects of any name in {}."""
    words = named(sections()[section])
    missing = {
        name: hints
        for name, hints in fields_of(section).items()
        if not {name + end for hint in hints for end in brackets(hint)} & words
    }

    assert sorted(missing) == []


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_on_the_page_is_of_a_record(section: str) -> None:
    """The first column of a table names fields, with the brackets that their values have."""
    cells = re.findall(r"^\| ([^|]*) \|", sections()[section], re.MULTILINE)
    keys = fields_of(section)
    allowed = {name + end for name, hints in keys.items() for h in hints for end in brackets(h)}

    assert sorted(set().union(*map(named, cells)) - allowed) == []


@pytest.mark.parametrize("kind", [StepPoint, Evaluation])
def test_every_key_of_a_line_of_metrics_is_on_the_page_of_runs(kind: type) -> None:
    """Whoever follows metrics.jsonl finds each key explained."""
    fields = {field.name for field in dataclasses.fields(kind)} - {"kind"}

    assert sorted(fields - named(RUNS.read_text())) == []


def test_every_option_of_train_is_on_the_page_of_runs() -> None:
    """Of a switch, the side that is not the default is enough."""
    page = RUNS.read_text()
    golden = (ROOT / "tests" / "golden" / "cli_options.txt").read_text().splitlines()
    options = [line.removeprefix("train: ").split() for line in golden if line[:7] == "train: "]
    listed = [names for names in options if any(name.startswith("--") for name in names)]

    assert [names for names in listed if not any(f"`{name}" in page for name in names)] == []
