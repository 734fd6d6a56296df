"""Where a figure comes from: machine, versions, commit, command and date, beside every result."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from narrowcast.files import write_atomically
from narrowcast.precision.device import device_at_hand, environment
from narrowcast.records.codec import to_json

RESULTS = Path(__file__).parent / "results"


def provenance() -> dict[str, Any]:
    """Describe this machine and this moment."""
    return {
        **to_json(environment(device_at_hand(None))),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["python", *sys.argv]),
    }


def write_results(name: str, rows: list[dict[str, Any]], **more: Any) -> Path:
    """Write rows and provenance to benchmarks/results/<name>.json, whole or not at all."""
    path = RESULTS / f"{name}.json"
    write_atomically(path, json.dumps({**provenance(), **more, "rows": rows}, indent=1) + "\n")
    print(f"wrote {path}")
    return path
