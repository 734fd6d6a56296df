"""Hosts are imported when they are asked for, and a missing one says what to install.

Nothing here needs Lightning, Accelerate or Transformers to be imported; a class of ours that must
be one of theirs is put together on the spot.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from narrowcast.errors import UsageError

__all__ = ["first_host", "host_module", "mixed_class"]


def host_module(name: str, *, package: str) -> Any:
    """Import a module of a host; raises UsageError that says which package brings it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            f"{name} cannot be imported: {error}", hint=f"pip install {package}"
        ) from error


def first_host(names: Sequence[str], *, package: str) -> Any:
    """Return the first of these modules that is in use, else the first that can be imported.

    Lightning comes under two names, whose classes do not know each other: the one that a program
    has imported is the one that it means.
    """
    used = [name for name in names if name in sys.modules]
    for name in (*used, *names[:-1]):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return host_module(names[-1], package=package)


@lru_cache(maxsize=16)
def mixed_class(name: str, ours: type, theirs: type) -> type:
    """Return a class of the host's kind whose methods are ours where there are both."""
    return type(name, (ours, theirs), {"__module__": ours.__module__, "__doc__": ours.__doc__})
