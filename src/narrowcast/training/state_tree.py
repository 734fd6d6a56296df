"""Nested state (dicts, sequences, numbers, tensors) as JSON plus named tensors, and back, exactly.

Pickle would do this too, but a pickle is a program: loading one from a stranger runs his code. Here
only the kinds of value below exist, so that a file can hold wrong numbers but never an action. A
value of any other kind is refused when it is saved, not discovered when it is needed.

    None bool int str     themselves
    float                 itself; {"float": "nan"} for what JSON lacks
    list                  a JSON list
    tuple                 {"tuple": [...]}
    dict, Counter         {"dict": [[key, value], ...]}, {"counter": ...}: int keys and order stay
    tensor                {"tensor": name}, with {"stride": [...]} where it is not row-major
    numpy scalar, array   {"scalar": [dtype, value]}, {"array": {"tensor": ...}}
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from narrowcast.errors import CheckpointError

__all__ = ["leaves", "pack", "unpack"]


def pack(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """Split `tree` into plain JSON values and the tensors that they name.

    The tensors are dense, on the CPU, each with its own storage, in the dtype that they had. Two
    places that hold one tensor name it once. Raises CheckpointError, naming the place, for a value
    of a kind that cannot be stored.
    """
    packer = _Packer()
    return packer.encode(tree, ""), packer.tensors


def unpack(data: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Rebuild the tree from `pack`'s output; tensors are as given, or copies with their strides.

    Raises CheckpointError for anything that `pack` does not write.
    """
    try:
        return _decode(data, tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"the stored state is malformed: {error!r}") from None


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """List every number, string and tensor of a tree under its dotted path, in order."""
    if isinstance(tree, Mapping):
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, (list, tuple)):
        items = [(str(index), value) for index, value in enumerate(tree)]
    else:
        return {path: tree}
    found: dict[str, Any] = {}
    for key, value in items:
        found.update(leaves(value, _join(path, key)))
    return found


class _Packer:
    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[tuple[Any, ...], str] = {}
        # Keeps every tensor alive while its address serves as its identity.
        self._kept: list[Tensor] = []
        self._storages: set[int] = set()

    def encode(self, value: Any, path: str) -> Any:
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else {"float": str(value)}
        if isinstance(value, Tensor):
            return self._encode_tensor(value, path)
        if kind is list:
            return [self.encode(item, _join(path, i)) for i, item in enumerate(value)]
        if kind in (tuple, torch.Size):
            return {"tuple": [self.encode(item, _join(path, i)) for i, item in enumerate(value)]}
        if kind in (dict, OrderedDict, Counter):
            pairs = [
                [_key(key, path), self.encode(item, _join(path, key))]
                for key, item in value.items()
            ]
            return {"counter" if kind is Counter else "dict": pairs}
        return self._encode_numpy(value, path)

    def _encode_numpy(self, value: Any, path: str) -> Any:
        if isinstance(value, np.generic) and value.dtype.kind in "biuf":
            return {"scalar": [value.dtype.name, self.encode(value.item(), path)]}
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            return {"array": self._encode_tensor(torch.from_numpy(value.copy()), path)}
        raise CheckpointError(
            f"the state holds a {type(value).__module__}.{type(value).__qualname__} at {path!r}, "
            "which cannot be stored without pickle",
            hint="keep numbers, strings, lists, dicts and tensors in state_dict()",
        )

    def _encode_tensor(self, value: Tensor, path: str) -> Any:
        if value.layout != torch.strided or value.is_quantized or value.is_complex():
            raise CheckpointError(
                f"the state holds a {value.dtype} tensor of layout {value.layout} at {path!r}, "
                "which cannot be stored",
                hint="keep dense real tensors in state_dict()",
            )
        identity = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        name = self._names.get(identity) if value.numel() else None
        if name is None:
            name = self._unused(path)
            self._names[identity] = name
            self._kept.append(value)
            self.tensors[name] = self._own_storage(value)
        reference: dict[str, Any] = {"tensor": name}
        if not value.is_contiguous() and _is_dense(value):
            reference["stride"] = list(value.stride())
        return reference

    def _own_storage(self, value: Tensor) -> Tensor:
        """Return a row-major CPU tensor, a copy only if its memory holds anything else."""
        plain = value.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        alone = storage.nbytes() == plain.nbytes and storage.data_ptr() not in self._storages
        if not alone:
            plain = plain.clone()
        self._storages.add(plain.untyped_storage().data_ptr())
        return plain

    def _unused(self, path: str) -> str:
        name, count = path or "state", 1
        while name in self.tensors:
            count += 1
            name = f"{path}#{count}"
        return name


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _key(key: Any, path: str) -> Any:
    if type(key) in (str, int):
        return key
    raise CheckpointError(
        f"the state has the key {key!r} in {path!r}; only strings and integers can be stored",
        hint="name the entries of state_dict() by strings",
    )


def _is_dense(value: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlap, in any order."""
    expected = 1
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _decode(data: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(data, list):
        return [_decode(item, tensors) for item in data]
    if not isinstance(data, dict):
        return data
    tag = next(iter(data), "")
    return _DECODERS[tag](data, tensors)


def _decode_tensor(data: dict[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    value = tensors[data["tensor"]]
    if "stride" not in data:
        return value
    # Kernels may take another path, with other rounding, for another memory order.
    return torch.empty_strided(value.shape, data["stride"], dtype=value.dtype).copy_(value)


_Decoder = Callable[[dict[str, Any], Mapping[str, Tensor]], Any]
_DECODERS: dict[str, _Decoder] = {
    "float": lambda data, _: float(data["float"]),
    "tuple": lambda data, tensors: tuple(_decode(data["tuple"], tensors)),
    "dict": lambda data, tensors: {key: _decode(v, tensors) for key, v in data["dict"]},
    "counter": lambda data, tensors: Counter({k: _decode(v, tensors) for k, v in data["counter"]}),
    "tensor": _decode_tensor,
    "scalar": lambda data, tensors: np.dtype(data["scalar"][0]).type(
        _decode(data["scalar"][1], tensors)
    ),
    "array": lambda data, tensors: _decode(data["array"], tensors).numpy(),
}
