"""Read the data sets of an installed R package without R, so that the data files can be remade.

An R package keeps its data in a lazy-load database: ``Rdata.rdx`` is an index (a gzipped R
object that maps each name to an offset and a length) and ``Rdata.rdb`` is the blocks one after
the other. A block is a 4-byte big-endian length of the uncompressed data, optionally one letter
for the compression, and the compressed R object.

An R object is written in R's XDR serialization (R Internals, section 1.8): big-endian, each item
led by a 32-bit word whose low 8 bits are the type, bit 9 "has attributes", bit 10 "has a tag".
Only the types that data frames and character vectors are made of are understood; any other one
is an error.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SYMBOL, _PAIRS, _CHARS, _LOGICAL, _INTEGER = 1, 2, 9, 10, 13
_REAL, _STRINGS, _LIST, _NULL, _REFERENCE = 14, 16, 19, 254, 255


@dataclass
class RObject:
    """An R vector and its attributes: `value` is an array, a list of str, or a list of RObject."""

    value: Any
    attributes: dict[str, Any] = field(default_factory=dict)

    def columns(self) -> dict[str, RObject]:
        """The named items of a list; a data frame is such a list."""
        return dict(zip(self.attributes["names"].value, self.value, strict=True))


class _Reader:
    def __init__(self, data: bytes) -> None:
        if data[:2] != b"X\n":
            raise ValueError(f"not R's XDR serialization: starts with {data[:2]!r}")
        self.data, self.position = data, 2
        self.symbols: list[str] = []
        version = self.word()
        self.word(), self.word()  # the R that wrote it, and the oldest that can read it
        if version == 3:
            self.take(self.word())  # name of the native encoding
        elif version != 2:
            raise ValueError(f"R serialization version {version}; 2 and 3 are known")

    def take(self, size: int) -> bytes:
        self.position += size
        return self.data[self.position - size : self.position]

    def word(self) -> int:
        return int(struct.unpack(">i", self.take(4))[0])

    def array(self, kind: str) -> NDArray[Any]:
        size = self.word()
        return np.frombuffer(self.take(size * np.dtype(kind).itemsize), kind)

    def item(self) -> Any:
        flags = self.word()
        kind, has_attributes, has_tag = flags & 0xFF, flags & 0x200, flags & 0x400
        if kind == _NULL:
            return None
        if kind == _REFERENCE:
            return self.symbols[(flags >> 8) - 1]
        if kind == _SYMBOL:
            self.symbols.append(self.item())
            return self.symbols[-1]
        if kind == _CHARS:
            size = self.word()
            return None if size == -1 else self.take(size).decode()
        if kind == _PAIRS:
            return self.pairs(bool(has_attributes), bool(has_tag))
        result = RObject(self.vector(kind))
        if has_attributes:
            result.attributes = self.item()
        return result

    def pairs(self, has_attributes: bool, has_tag: bool) -> dict[str, Any]:
        """A pairlist as a dict; the tail is written as the next item."""
        if has_attributes:
            self.item()
        tag = self.item() if has_tag else ""
        head = {tag: self.item()}
        return head | (self.item() or {})

    def vector(self, kind: int) -> Any:
        if kind in (_LOGICAL, _INTEGER):
            return self.array(">i4")
        if kind == _REAL:
            return self.array(">f8")
        if kind in (_STRINGS, _LIST):
            return [self.item() for _ in range(self.word())]
        raise ValueError(f"R type {kind} at byte {self.position} is not understood")


def _uncompress(block: bytes) -> bytes:
    """Undo R's compression of one block: a letter after the length means bzip2 (2) or xz (Z)."""
    size, letter = struct.unpack(">I", block[:4])[0], block[4:5]
    if letter == b"2":
        data = bz2.decompress(block[5:])
    elif letter == b"Z":
        data = lzma.decompress(
            block[5:], format=lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9}]
        )
    else:
        data = zlib.decompress(block[4:])
    if len(data) != size:
        raise ValueError(f"block announces {size} bytes and holds {len(data)}")
    return data


def read_rdata(directory: Path) -> dict[str, RObject]:
    """Read every data set of ``directory/Rdata.rdx`` and ``Rdata.rdb``, by name."""
    index = _Reader(gzip.decompress((directory / "Rdata.rdx").read_bytes())).item()
    blocks = (directory / "Rdata.rdb").read_bytes()
    found = {}
    for name, place in index.columns()["variables"].columns().items():
        offset, length = (int(n) for n in place.value)
        found[name] = _Reader(_uncompress(blocks[offset : offset + length])).item()
    return found
