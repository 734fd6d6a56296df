"""A state of which every rank has a part: taken apart for a checkpoint, and put together again.

In the tree of the checkpoint a tensor that is cut is a place instead: what it is called in the
shards, and of what it is a part. It is put together for as many ranks as go on, one included:

    rows        weights, remainders, fp32 and bf16 states: exact for any number of ranks
    codes       int8 and int4 states: each rank's blocks by themselves, see ``optim.recut``
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from narrowcast.blockwise import BlockCode
from narrowcast.engine.engine import Engine
from narrowcast.errors import CheckpointError
from narrowcast.optim.narrow import NarrowOptimizer
from narrowcast.optim.parts import whole_numel
from narrowcast.optim.recut import CodedPart, recut
from narrowcast.optim.states import Blocks, fitted, state_store
from narrowcast.parallel.shards import Piece, Shards, is_shared, rows_of
from narrowcast.training.shard_files import DAMAGED, read_shards, verify_shards, write_files

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["SHARDS", "cut", "own_part", "whole", "write_shards"]

SHARDS = "shards"
"""Key of a sharded state's digests and number of ranks."""

# No state dict of anybody else has such a key.
_CUT = "narrowcast: cut into"
_DTYPES = {
    str(dtype): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
    )
}

Place = dict[str, Any]


def write_shards(
    state: dict[str, Any], path: Path, engine: Engine, shards: Shards
) -> dict[str, Any]:
    """Write this rank's parts beside `path`, and return the state with places in their stead.

    Every rank has to call it; what is written counts once `path` itself is there.
    """
    placed, own = _placed(state, engine, shards)
    digests = write_files(path, own, shards.ranks)
    return {**placed, SHARDS: {"ranks": shards.ranks.size, "files": digests}}


def whole(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return a state with everything in it whole, as one process has it.

    Verifies the shards first; raises CheckpointError for missing or damaged ones.
    """
    if SHARDS not in state:
        return state
    verify_shards(path, state[SHARDS]["files"])
    return _put_together(state, path, None)


def own_part(state: dict[str, Any], path: Path, engine: Engine, shards: Shards) -> dict[str, Any]:
    """Return what of a state is this rank's, however many ranks wrote it, or none.

    Raises CheckpointError on every rank if one of them finds damaged shards.
    """
    ranks = shards.ranks
    if SHARDS not in state:
        return cut(state, engine, shards)
    problem: CheckpointError | None = None
    try:
        verify_shards(path, state[SHARDS]["files"], rank=ranks.rank, size=ranks.size)
    except CheckpointError as error:
        problem = error
    said = [text for text in ranks.gather(None if problem is None else problem.message) if text]
    if said:
        raise problem or CheckpointError(said[0], hint=DAMAGED)
    found = _put_together(state, path, shards)
    return {**found, "model": _as_model_has_it(found["model"], shards)}


def cut(state: dict[str, Any], engine: Engine, shards: Shards) -> dict[str, Any]:
    """Return this rank's part of a state that one process or DDP has saved."""

    def rows(_: str, piece: Piece, value: Tensor) -> Tensor:
        return value.narrow(0, piece.first, piece.own.shape[0]).contiguous()

    def codes(_: str, piece: Piece, pair: tuple[Tensor, Tensor], code: BlockCode) -> Pair:
        numel = piece.shape.numel()
        all_of_it = CodedPart(start=0, count=numel, codes=pair[0], scales=pair[1])
        return recut(code, [all_of_it], piece.start, piece.own.numel())

    found = _replaced(state, engine, shards, rows, codes)
    return {**found, "model": _as_model_has_it(found["model"], shards)}


Pair = tuple[Any, Any]
Rows = Callable[[str, Piece, Tensor], Any]
Codes = Callable[[str, Piece, tuple[Tensor, Tensor], BlockCode], Pair]


def _replaced(
    state: dict[str, Any], engine: Engine, shards: Shards, rows: Rows, codes: Codes
) -> dict[str, Any]:
    """Return a state with something else in the place of each tensor that is, or is to be, cut.

    `rows` and `codes` get a name that is the tensor's own, and the piece that it belongs to.
    """
    named = shards.named
    model = {
        name: rows(f"model.{named[name].name}", named[name], value) if name in named else value
        for name, value in state["model"].items()
    }
    lanes = dict(state["engine"]["lanes"])
    for lane, optimizer in engine.optimizers.items():
        saved = dict(lanes[lane]["optimizer"])
        entries = dict(saved["state"])
        for index, piece, moments in _numbered(optimizer, shards):
            entry = entries.get(index)
            if entry is None:
                continue
            new = dict(entry)
            in_blocks = {key for keys, _ in moments for key in keys}
            for key, value in entry.items():
                if key not in in_blocks and _has_rows(value, piece):
                    new[key] = rows(f"{lane}.{index}.{key}", piece, value)
            for keys, code in moments:
                if keys[0] in entry:
                    pair = (entry[keys[0]], entry[keys[1]])
                    name = f"{lane}.{index}.{keys[0]}"
                    new[keys[0]], new[keys[1]] = codes(name, piece, pair, code)
            entries[index] = new
        lanes[lane] = {**lanes[lane], "optimizer": {**saved, "state": entries}}
    return {**state, "model": model, "engine": {**state["engine"], "lanes": lanes}}


def _has_rows(value: Any, piece: Piece) -> bool:
    return isinstance(value, Tensor) and value.shape in (piece.shape, piece.own.shape)


def _numbered(
    optimizer: Optimizer, shards: Shards
) -> Iterator[tuple[int, Piece, list[tuple[tuple[str, str], BlockCode]]]]:
    """Yield what is cut as an optimizer's state dict numbers it; keys and codes of its moments."""
    pieces = {id(piece.own): piece for piece in shards.pieces}
    index = -1
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            index += 1
            piece = pieces.get(id(parameter))
            if piece is None:
                continue
            moments = []
            if isinstance(optimizer, NarrowOptimizer):
                store = fitted(state_store(group["states"]), whole_numel(parameter))
                if isinstance(store, Blocks):
                    for moment in optimizer.rule.moments(group):
                        codes, scales = store.part_keys(moment)
                        moments.append(((codes, scales), store.code(moment)))
            yield index, piece, moments


def _as_model_has_it(model: Mapping[str, Any], shards: Shards) -> dict[str, Any]:
    """Return this rank's part of a model's state as its ``load_state_dict`` takes it."""
    return {
        name: shards.as_shared(shards.named[name].shape, value) if name in shards.named else value
        for name, value in model.items()
    }


def _placed(
    state: dict[str, Any], engine: Engine, shards: Shards
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a state with places for what is cut, and that by name, for dcp."""
    written: dict[str, Tensor] = {}

    def rows(name: str, piece: Piece, value: Tensor) -> Place:
        own = cast("DTensor", value).to_local() if is_shared(value) else value
        if own.numel():  # of an empty part nothing has to be found again
            written[name] = shards.as_shared(piece.shape, own)
        shape = list(piece.shape)
        return {_CUT: "rows", "name": name, "shape": shape, "dtype": str(own.dtype)}

    def codes(name: str, piece: Piece, pair: tuple[Tensor, Tensor], code: BlockCode) -> Pair:
        place = {_CUT: "codes", "name": name, "shape": list(piece.shape), "code": asdict(code)}
        for part, tensor in enumerate(pair):
            if tensor.numel():
                written[_coded(name, part, shards.ranks.rank)] = tensor
        return {**place, "part": 0}, {**place, "part": 1}

    return _replaced(state, engine, shards, rows, codes), written


def _coded(name: str, part: int, rank: int) -> str:
    """Name codes (0) or scales (1) of one rank in the shards."""
    return f"{name}.{part}@{rank}"


def _put_together(state: dict[str, Any], path: Path, shards: Shards | None) -> dict[str, Any]:
    """Return a state with tensors in its places: this rank's parts, or without shards the whole."""
    finder = _Finder(state[SHARDS]["ranks"], shards)
    _walk(state, finder.want)
    read_shards(path, finder.room)
    found: dict[str, Any] = _walk({k: v for k, v in state.items() if k != SHARDS}, finder.found)
    return found


class _Finder:
    """Which tensors of the shards make up one rank's part, and that part from them."""

    def __init__(self, saved_ranks: int, shards: Shards | None) -> None:
        self._saved_ranks = saved_ranks
        self._shards = shards
        self.room: dict[str, Tensor] = {}
        """What is to be read, by name."""
        self._coded: dict[str, tuple[Tensor, Tensor]] = {}

    def want(self, place: Place) -> None:
        """Make room for what a place needs."""
        name, shape = place["name"], torch.Size(place["shape"])
        if place[_CUT] == "rows":
            if name not in self.room and self._own_rows(shape)[1]:
                self.room[name] = self._space(shape, _DTYPES[place["dtype"]])
            return
        start, stop = self._own_range(shape)
        for rank in range(self._saved_ranks):
            first, count = _elements(shape, rank, self._saved_ranks)
            if count and first < stop and first + count > start:
                parts = BlockCode(**place["code"]).zeros(count, torch.device("cpu"))
                self.room[_coded(name, place["part"], rank)] = parts[place["part"]]

    def found(self, place: Place) -> Tensor:
        """Return this rank's part of what a place stands for; of one place the same tensor."""
        name, shape = place["name"], torch.Size(place["shape"])
        if place[_CUT] == "rows":
            if name not in self.room:  # an empty part
                self.room[name] = torch.empty((0, *shape[1:]), dtype=_DTYPES[place["dtype"]])
            value = self.room[name]
            return cast("DTensor", value).to_local() if is_shared(value) else value
        if name not in self._coded:
            start, stop = self._own_range(shape)
            code = BlockCode(**place["code"])
            self._coded[name] = recut(code, list(self._parts(name, shape)), start, stop - start)
        return self._coded[name][place["part"]]

    def _parts(self, name: str, shape: torch.Size) -> Iterator[CodedPart]:
        for rank in range(self._saved_ranks):
            codes, scales = (self.room.get(_coded(name, part, rank)) for part in (0, 1))
            if codes is not None and scales is not None:
                start, count = _elements(shape, rank, self._saved_ranks)
                yield CodedPart(start=start, count=count, codes=codes, scales=scales)

    def _own_rows(self, shape: torch.Size) -> tuple[int, int]:
        if self._shards is None:
            return 0, shape[0]
        ranks = self._shards.ranks
        return rows_of(shape[0], ranks.rank, ranks.size)

    def _own_range(self, shape: torch.Size) -> tuple[int, int]:
        """Return the first element and the one behind the last."""
        first, count = self._own_rows(shape)
        width = shape[1:].numel()
        return first * width, (first + count) * width

    def _space(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if self._shards is None:
            return torch.empty(shape, dtype=dtype)
        own = (self._own_rows(shape)[1], *shape[1:])
        return self._shards.as_shared(shape, torch.empty(own, dtype=dtype))


def _elements(shape: torch.Size, rank: int, size: int) -> tuple[int, int]:
    """Return the first element of a rank's rows, and their number."""
    first, count = rows_of(shape[0], rank, size)
    width = shape[1:].numel()
    return first * width, count * width


def _walk(tree: Any, at_place: Callable[[Place], Any]) -> Any:
    """Return a tree with what a function returns in the stead of its places."""
    if isinstance(tree, dict):
        if _CUT in tree:
            return at_place(tree)
        return type(tree)({key: _walk(value, at_place) for key, value in tree.items()})
    if isinstance(tree, (list, tuple)):
        return type(tree)(_walk(value, at_place) for value in tree)
    return tree
