"""The command line is a contract: a verb or an option appears or goes only on purpose."""

from __future__ import annotations

from pathlib import Path

import typer.main

from narrowcast.cli.app import app

GOLDEN = Path(__file__).parents[1] / "golden" / "cli_options.txt"


def test_verbs_and_options_equal_the_golden_list() -> None:
    """Whoever changes the command line changes tests/golden/cli_options.txt in the same commit."""
    command = typer.main.get_command(app)
    lines = []
    for verb, sub in sorted(command.commands.items()):  # type: ignore[attr-defined]
        names = [verb] if not hasattr(sub, "commands") else [verb, *sorted(sub.commands)]
        groups = [sub, *(sub.commands[name] for name in names[1:])]
        for name, group in zip([verb, *(f"{verb} {n}" for n in names[1:])], groups, strict=True):
            for parameter in group.params:
                options = [*parameter.opts, *parameter.secondary_opts]
                lines.append(f"{name}: {' '.join(options)}")

    assert GOLDEN.read_text().splitlines() == sorted(lines)
