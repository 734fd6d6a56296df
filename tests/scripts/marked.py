"""Scripts in a few lines, with the rules that are to fire marked at the lines where they must."""

from __future__ import annotations

import re
from pathlib import Path

from narrowcast.preflight.catalogue import SOURCE_RULES
from narrowcast.preflight.script import read_script

PREAMBLE = """
import torch
from torch import nn, optim
import torch.nn.functional as F
from torch.amp import GradScaler, autocast
model = nn.Linear(8, 8).cuda()
optimizer = optim.AdamW(model.parameters(), lr=1e-3)
scaler = GradScaler("cuda")
"""


def marks(text: str) -> list[tuple[str, int]]:
    """List (code, line) of every `# !CODE` in a script."""
    return sorted(
        (code, number)
        for number, line in enumerate(text.splitlines(), 1)
        for code in re.findall(r"!(NC\d+)", line)
    )


def fired(path: Path) -> list[tuple[str, int]]:
    """List (code, line) of what the rules on the source find in a file."""
    script = read_script(path)
    found = [f for rule in SOURCE_RULES for f in rule.findings(script)]
    return sorted((f.rule.split()[0], f.line) for f in found)


def check_marks(folder: Path, body: str, preamble: str = PREAMBLE) -> None:
    """Assert that the rules fire exactly where a script says."""
    path = folder / "script.py"
    path.write_text(preamble + body)
    found, expected = fired(path), marks(path.read_text())
    assert found == expected, f"found {found}, expected {expected}"
