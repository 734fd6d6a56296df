"""The failure that is an exception: a constant which torch refuses to convert to 16 bits.

``scores.masked_fill(mask, -1e9)`` works in fp32 and raises in fp16, "value cannot be converted to
type c10::Half without overflow". That is a precision problem, with a line and a module of its own.
"""

from __future__ import annotations

import linecache
import re
import traceback

from torch import nn

from narrowcast.errors import RecipeError
from narrowcast.records.diagnosis import Finding
from narrowcast.replay.places import innermost_line

__all__ = ["constant_that_raised"]

_REFUSED = re.compile(r"cannot be converted to type .+ without overflow")


def constant_that_raised(error: RecipeError, model: nn.Module, compute: str) -> Finding | None:
    """Return a finding if the recipe's code failed for a number that the format does not hold."""
    cause = error.__cause__
    if cause is None or not _REFUSED.search(str(cause)):
        return None
    names = {id(module): name for name, module in model.named_modules()}
    frames = [frame for frame, _ in traceback.walk_tb(cause.__traceback__)]
    selves = [frame.f_locals.get("self") for frame in frames]
    module = next((names[id(own)] for own in reversed(selves) if id(own) in names), "")
    file, line = innermost_line(frames[-1]) if frames else ("", 0)
    return Finding(
        kind="constant out of range",
        module=module,
        phase="forward",
        file=file,
        line=line,
        code=linecache.getline(file, line).strip() if line else "",
        explanation=(
            f"torch refuses to convert a number of this line to {compute}: {cause}. In fp32 it is "
            "held."
        ),
    )
