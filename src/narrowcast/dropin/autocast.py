"""A `torch.autocast` that never quietly does nothing.

torch's own, asked for a device that is absent or a dtype that it does not cast to, warns once and
runs the region in fp32; the run is then labelled with a precision in which nothing was computed.
Here that is an error with a way out. All else is torch's: this is a subclass, so code that asks
`isinstance(context, torch.autocast)` accepts it, and casting itself is not touched.
"""

from __future__ import annotations

from typing import Any, TypedDict, Unpack

import torch
from torch.cuda.amp.common import amp_definitely_not_available

from narrowcast.errors import UnknownName, UnsupportedPrecision
from narrowcast.precision.device import device_at_hand

__all__ = ["autocast", "bind_positional", "require_amp_device"]

_TORCH_AMP = ("device_type", "dtype", "enabled", "cache_enabled")
# `torch.cuda.amp.autocast`, deprecated and in every tutorial, begins with `enabled`.
_CUDA_AMP = ("enabled", "dtype", "cache_enabled")
_CAST_TO = (torch.float16, torch.bfloat16)


class _Options(TypedDict, total=False):
    device_type: str
    dtype: torch.dtype | None
    enabled: bool
    cache_enabled: bool | None


def bind_positional(
    caller: str, names: tuple[str, ...], values: tuple[Any, ...], by_name: dict[str, Any]
) -> dict[str, Any]:
    """Give positional `values` their `names`, beside those passed `by_name`.

    Raises TypeError as a plain call does: for too many, or for one given twice.
    """
    if len(values) > len(names):
        raise TypeError(f"{caller} takes at most {len(names)} positional arguments: {names}")
    bound = dict(zip(names, values, strict=False))
    if twice := bound.keys() & by_name.keys():
        raise TypeError(f"{caller} got multiple values for {', '.join(sorted(twice))}")
    return bound | by_name


def require_amp_device(caller: str, device_type: str) -> None:
    """Raise UnsupportedPrecision when no device of this type is present, UnknownName when none is.

    `torch_xla` counts as CUDA, as it does for torch.
    """
    try:
        known = torch.amp.is_autocast_available(device_type)
    except RuntimeError:
        known = False
    if not known:
        raise UnknownName.of("device type of autocast", device_type, ("cpu", "cuda", "mps", "xpu"))
    kind = device_type.partition(":")[0]
    if not _is_present(kind):
        raise UnsupportedPrecision(
            f"{caller} was asked for {device_type!r}, but torch {torch.__version__} finds no such "
            "device here; torch's own would warn and do nothing",
            hint=f"leave the device out, which takes the one at hand ({device_at_hand().type}), or "
            "pass enabled=False for a region without mixed precision",
        )


def _is_present(kind: str) -> bool:
    if kind == "cuda":
        return not amp_definitely_not_available()  # type: ignore[no-untyped-call]
    try:
        return bool(torch.get_device_module(kind).is_available())
    except (RuntimeError, AttributeError):  # a backend that is not built in, or never can be
        return False


def _require_castable(device_type: str, dtype: torch.dtype) -> None:
    """Refuse a dtype that autocast would not cast to, and bf16 where the GPU has none."""
    if dtype not in _CAST_TO and device_type in ("cpu", "cuda"):
        raise UnsupportedPrecision(
            f"autocast was asked for {dtype}, but on {device_type} it casts to "
            f"{' or '.join(str(d) for d in _CAST_TO)} only",
            hint="pass enabled=False to compute in the dtype of weights and inputs",
        )
    if device_type == "cuda" and dtype is torch.bfloat16 and not torch.cuda.is_bf16_supported():
        raise UnsupportedPrecision(
            f"autocast was asked for bfloat16, but {torch.cuda.get_device_name()} has no bf16",
            hint="use dtype=torch.float16 together with narrowcast.GradScaler",
        )


class autocast(torch.autocast):  # noqa: N801 -- a drop-in keeps the name
    """A context manager and decorator: `torch.autocast`, which raises where that one gives up.

    Called as `torch.amp.autocast(device_type, dtype, enabled, cache_enabled)`, or as the
    deprecated `torch.cuda.amp.autocast(enabled, dtype, cache_enabled)`; without a device, the one
    at hand. Without a dtype, the one that torch sets for the device: fp16 on CUDA, bf16 on a CPU.

    Raises UnsupportedPrecision when enabled for an absent device or a dtype that is not cast to,
    UnknownName for a device type that torch does not know.
    """

    def __init__(self, *args: Any, **options: Unpack[_Options]) -> None:
        names = _CUDA_AMP if args and isinstance(args[0], bool) else _TORCH_AMP
        settings = bind_positional("autocast()", names, args, dict(options))
        if settings.get("device_type") is None:
            settings["device_type"] = device_at_hand().type
        device_type = settings["device_type"]
        if isinstance(device_type, str) and settings.get("enabled", True):
            require_amp_device("autocast", device_type)
            wanted = settings.get("dtype") or torch.get_autocast_dtype(device_type)
            _require_castable(device_type.partition(":")[0], wanted)
        super().__init__(**settings)
        if settings.get("enabled", True) and not self._enabled:
            # Devices other than these two know by themselves which dtypes they cast to, and warn.
            raise UnsupportedPrecision(
                f"autocast on {device_type!r} to {self.fast_dtype} would do nothing",
                hint="choose another dtype, or pass enabled=False",
            )
