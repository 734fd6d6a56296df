"""Where an operation comes from: the phase, the innermost module, the line of the user's own code.

Forward, both are on Python's stack. In backward there is nothing but the autograd node that is
running, and its number: autograd numbers nodes in the order of creation, and a node is made just
before its forward operation runs. So each forward operation is filed under the next number, and
the node k belongs to the last one that is filed at or below k + 1.
"""

from __future__ import annotations

import sys
import sysconfig
import threading
from bisect import bisect_right
from dataclasses import dataclass, replace
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

import narrowcast
from narrowcast.memory.modules import OUTSIDE, ModuleTrace
from narrowcast.records.diagnosis import Phase

__all__ = ["Place", "Places", "innermost_line"]

# Private, but the only view of the counter; torch.fx and AOTAutograd read it in the same way.
_next_node_number = torch._C._autograd._get_sequence_nr


@dataclass(frozen=True, slots=True)
class Place:
    """The origin of one operation."""

    phase: Phase
    module: str = ""
    file: str = ""
    line: int = 0
    recomputed: bool = False


class _Numbers:
    """The places of one thread's forward operations, by the number of the next autograd node."""

    __slots__ = ("_places", "_starts")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._places: list[Place] = []

    def file(self, place: Place) -> None:
        """File an operation; of several under one number the first is the one with the node."""
        number = _next_node_number()
        if not self._starts or self._starts[-1] < number:
            self._starts.append(number)
            self._places.append(place)

    def maker_of(self, number: int) -> Place | None:
        found = bisect_right(self._starts, number + 1) - 1
        return self._places[found] if found >= 0 else None


class Places:
    """Tells the place of each operation while entered."""

    def __init__(self, model: nn.Module) -> None:
        self._trace = ModuleTrace(model, on_call=_ignore, on_new=_ignore)
        self._numbers: dict[int, _Numbers] = {}
        self._forward_thread = threading.get_ident()
        self._outer_graph = -1
        self._last = Place("backward")
        self._modules: dict[tuple[str, int], str] = {}
        """The module that ran a line last, for what is computed again outside of modules."""

    def __enter__(self) -> Places:
        self._trace.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._trace.__exit__(*error)

    def here(self) -> Place:
        """Return the place of the operation that is about to run; call it below autograd."""
        graph = torch._C._current_graph_task_id()
        if graph == -1:
            self._outer_graph = -1
            self._forward_thread = threading.get_ident()
            file, line = innermost_line(sys._getframe(1))
            place = Place("forward", self._module(), file, line)
            self._modules[file, line] = place.module
            self._file(place)
            return place
        if self._outer_graph == -1:
            self._outer_graph = graph
            self._trace.backward_starts()
        file, line, is_checkpoint = _line_in_backward(sys._getframe(1))
        recomputing = self._trace.recomputing()
        if is_checkpoint or recomputing:
            module = self._module() if recomputing else self._modules.get((file, line), "")
            place = Place("forward", module, file, line, recomputed=True)
        else:
            place = self._of_node(graph)
            if line:  # the user's own backward of a custom function
                place = replace(place, file=file, line=line)
        self._file(place)
        return place

    def _module(self) -> str:
        name = self._trace.current(backward=False)
        return "" if name == OUTSIDE else name

    def _file(self, place: Place) -> None:
        self._numbers.setdefault(threading.get_ident(), _Numbers()).file(place)

    def _of_node(self, graph: int) -> Place:
        node: Any = torch._C._current_autograd_node()
        if node is None:  # between two nodes: a hook, or a sum of gradients
            return self._last
        variable = getattr(node, "variable", None)  # AccumulateGrad has one, and no number
        if variable is not None:
            owner = self._trace.owner_of(variable)
            self._last = Place("backward", "" if owner == OUTSIDE else owner)
            return self._last
        # A graph inside the graph (reentrant checkpointing) was built by the thread that runs it.
        nested = graph != self._outer_graph
        numbers = self._numbers.get(threading.get_ident() if nested else self._forward_thread)
        made = numbers.maker_of(node._sequence_nr()) if numbers is not None else None
        if made is not None:
            self._last = Place("backward", made.module, made.file, made.line)
        return self._last


def _ignore(*_: Any, **__: Any) -> None:
    pass


_SKIPPED, _USERS, _CHECKPOINT, _ENGINE = range(4)
_TORCH = str(Path(torch.__file__).parent)
_OURS = str(Path(narrowcast.__file__).parent)
# A built-in recipe is a user's code in all but its place.
_RECIPES = str(Path(_OURS, "recipes"))
_STANDARD = sysconfig.get_path("stdlib")
_INSTALLED = (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))

_KINDS: dict[CodeType, int] = {}
"""What each function on the stack is to us."""


def _kind_of(code: CodeType) -> int:
    kind = _KINDS.get(code)
    if kind is None:
        kind = _KINDS[code] = _classify(code.co_filename, code.co_name)
    return kind


def _classify(file: str, function: str) -> int:
    if _is_in(file, _TORCH):
        below = file[len(_TORCH) + 1 :].replace("\\", "/")
        if below == "utils/checkpoint.py":
            return _CHECKPOINT
        return _ENGINE if (below, function) in _ENGINES else _SKIPPED
    if file.startswith("<frozen") or (_is_in(file, _OURS) and not _is_in(file, _RECIPES)):
        return _SKIPPED
    if _is_in(file, _STANDARD) and not any(_is_in(file, place) for place in _INSTALLED):
        return _SKIPPED
    return _USERS


# Where a backward pass begins; callers of it are no part of it.
_ENGINES = (("autograd/graph.py", "_engine_run_backward"), ("autograd/__init__.py", "backward"))


def _is_in(file: str, folder: str) -> bool:
    return file.startswith(folder) and file[len(folder) : len(folder) + 1] in ("/", "\\")


def innermost_line(frame: FrameType | None) -> tuple[str, int]:
    """Return file and line of the innermost frame that is the user's."""
    while frame is not None:
        code = frame.f_code
        if _kind_of(code) == _USERS:
            return code.co_filename, frame.f_lineno
        frame = frame.f_back
    return "", 0


def _line_in_backward(frame: FrameType | None) -> tuple[str, int, bool]:
    """Return the innermost line of the user's within backward, and whether a checkpoint is near.

    ('', 0, ...) for autograd's own operations, of which Python knows nothing.
    """
    file, line = "", 0
    while frame is not None:
        kind = _kind_of(frame.f_code)
        if kind == _ENGINE:
            break
        if kind == _CHECKPOINT:
            return file, line, True
        if kind == _USERS and not line:
            file, line = frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back
    return file, line, False
