"""The user's own modules that a recipe imports: they are part of it as much as its own file.

A recipe whose helper was edited is another recipe, although its file did not change.
"""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["hash_sources", "noting_imports"]

_OURS = Path(__file__).resolve().parents[1]
# Libraries are told by version and not by content; these folders hold nothing else.
_INSTALLED = {"site-packages", "dist-packages"}

# What recipes brought in, in this process: reloaded with the next recipe, so that edits count.
_brought: set[str] = set()


@contextmanager
def noting_imports(recipe: Path) -> Iterator[dict[str, Path]]:
    """Yield a dict that holds, after the block, module name -> file of what the block imported.

    Only the user's own modules count: none of Python, of installed libraries or of narrowcast.
    Those of earlier blocks are forgotten first, so that they are executed anew and noted again.
    """
    for name in _brought:
        sys.modules.pop(name, None)
    _brought.clear()
    found: dict[str, Path] = {}
    before = set(sys.modules)
    try:
        yield found
    finally:
        for name in sorted(set(sys.modules) - before):
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file) != recipe and _is_users(Path(file)):
                found[name] = Path(file)
        _brought.update(found)


def hash_sources(recipe: bytes, imported: dict[str, Path]) -> str:
    """Return the SHA-256 (hex) of a recipe and of the modules it imported, if there are any.

        sha256(recipe)                                            without any
        sha256(sha256(recipe), then (name, sha256(file)) by name) otherwise

    Names and not paths enter, so that a folder may be moved as a whole.
    """
    own = hashlib.sha256(recipe).hexdigest()
    if not imported:
        return own
    lines = [own]
    for name, file in sorted(imported.items()):
        lines.append(f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _is_users(file: Path) -> bool:
    resolved = file.resolve()
    if not resolved.is_file() or _INSTALLED & set(resolved.parts):
        return False
    stdlib = (Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib"))
    return not any(resolved.is_relative_to(place) for place in (_OURS, *stdlib))
