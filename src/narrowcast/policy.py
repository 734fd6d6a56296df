"""What a precision means: which dtype holds, computes, reduces and leaves, and how loss is scaled.

A policy is a value. It says nothing about how it is carried out (``cast``, ``scaling``, ``engine``)
nor whether a device can (``device``), and needs no torch, so the command line can list, compare
and refuse precisions before anything heavy is loaded.

    fp32       everything in IEEE fp32; TF32 is switched off, since it has 10 mantissa bits
    tf32       fp32 storage; CUDA matrix products read their inputs rounded to TF32
    fp16       autocast to fp16, fp32 weights as the master copy, dynamic loss scaling
    bf16       autocast to bf16, fp32 weights as the master copy, no scaling needed
    bf16-true  weights, gradients and optimizer state in bf16: no master copy, updates get lost
    fp8        bf16, and the three products of linear layers in fp8, on hardware that has it
    fp8-emulated  the same roundings on any device: slower than bf16, and no measure of speed
    auto       one of the above but fp8, chosen for the device, with the reason
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal, get_args

from narrowcast.errors import UnknownName, UsageError
from narrowcast.formats import float_format

__all__ = ["ALIASES", "POLICIES", "Policy", "policy_named"]

Scaling = Literal["none", "dynamic"]
AutocastRules = Literal["native", "cuda"]
Linears = Literal["compute", "fp8", "fp8-emulated"]

_EMULATED = "emulated"
"""Stands in the name of every policy and plan that emulates, and so in all that is told of it."""

_CLASS_PREFIX = "class:"


def _as_pattern(entry: str | type) -> str:
    """Turn a class into ``class:package.module.Name``; a glob stays as it is.

    Raises UsageError for anything else, and for an empty name, which is that of the whole model.
    """
    if isinstance(entry, type):
        return f"{_CLASS_PREFIX}{entry.__module__}.{entry.__qualname__}"
    if not isinstance(entry, str) or not entry.strip():
        raise UsageError(
            f"{entry!r} names no module to keep in fp32",
            hint="give a glob on module names, such as 'head' or 'blocks.*.norm', or a class",
        )
    if not entry.startswith(_CLASS_PREFIX) and ":" in entry:
        _require_function(entry)
    return entry


def _require_function(entry: str) -> None:
    """Raise UsageError for an entry that names no function that could be kept in fp32."""
    function = entry.partition(":")[2]
    if not function.isidentifier():
        raise UsageError(
            f"{entry!r} names no function to keep in fp32",
            hint="give module and function, such as 'blocks.*.attention:softmax'",
        )
    if function.endswith("_"):
        raise UsageError(
            f"{entry!r}: a function that writes into its argument cannot be computed in fp32",
            hint="keep the module in fp32, or call the function that returns a new tensor",
        )


@dataclass(frozen=True, kw_only=True)
class Policy:
    """One precision. All dtypes are names from ``formats.FORMATS``.

    Autocast is in force exactly when weights are kept in another format than the one computed
    in (``param != compute``) and that format is a 16-bit one.
    """

    name: str
    param: str = "fp32"
    """Format of weights (the master copy under autocast), gradients and optimizer state."""
    compute: str = "fp32"
    """Format in which matrix products and convolutions execute."""
    reduce: str = "fp32"
    """Format in which gradients are summed over micro-batches and over ranks."""
    output: str = "fp32"
    """Format in which the model's outputs reach the loss, where the policy casts them."""
    scaling: Scaling = "none"
    keep_fp32: tuple[str, ...] = ()
    """What stays in fp32: modules, by globs on their names or as ``class:module.Name``, and single
    functions of modules, as ``glob:function`` (``blocks.*.attention:softmax``)."""
    autocast_rules: AutocastRules = "native"
    """``cuda`` rehearses CUDA's cast lists on a CPU; ``native`` follows the device's own."""
    linears: Linears = "compute"
    """What linear layers multiply in: the compute format, fp8, or an emulation of fp8."""

    def __post_init__(self) -> None:
        for field in (self.param, self.compute, self.reduce, self.output):
            float_format(field)
        for what, value, known in (
            ("autocast rules", self.autocast_rules, get_args(AutocastRules)),
            ("format of linear layers", self.linears, get_args(Linears)),
        ):
            if value not in known:
                raise UnknownName.of(what, value, known)
        self._require_fp8_fits()
        entries: tuple[str | type, ...] = tuple(self.keep_fp32)
        object.__setattr__(self, "keep_fp32", tuple(_as_pattern(e) for e in entries))
        if self.compute == "fp16" and self.scaling == "none":
            raise UsageError(
                f"policy {self.name!r} computes in fp16 without loss scaling: "
                f"gradients below {float_format('fp16').smallest_subnormal:.1e} become zero",
                hint="set scaling='dynamic', or compute in bf16, which needs none",
            )
        if self.param == "fp16":
            raise UsageError(
                f"policy {self.name!r} keeps weights in fp16: their gradients cannot be unscaled "
                "and small updates are lost",
                hint="use param='fp32' (policy fp16) or bf16 weights (policy bf16-true)",
            )

    def _require_fp8_fits(self) -> None:
        if self.linears == "compute":
            return
        if self.compute != "bf16":
            raise UsageError(
                f"policy {self.name!r} multiplies linear layers in {self.linears} and computes "
                f"all else in {self.compute}",
                hint="fp8 goes with compute='bf16', which has the range that is left around it",
            )
        self.require_label("policy", self.name)

    def require_label(self, kind: str, name: str) -> None:
        """Raise UsageError for the name of a policy or plan that emulates and does not say so."""
        if self.emulates and _EMULATED not in name:
            raise UsageError(
                f"{kind} {name!r} emulates fp8, and its name does not say so",
                hint=f"put {_EMULATED!r} into the name: figures of an emulation are known by it",
            )

    @property
    def emulates(self) -> bool:
        """Whether products are computed in another format than the one they are rounded for."""
        return self.linears == "fp8-emulated"

    @property
    def autocasts(self) -> bool:
        """Whether the forward pass runs under autocast."""
        return self.compute in ("fp16", "bf16") and self.param != self.compute

    @property
    def keeps_master(self) -> bool:
        """Whether the weights that the optimizer updates are fp32."""
        return self.param == "fp32"

    def keeping_fp32(self, *entries: str | type) -> Policy:
        """Return this policy with more modules kept in fp32 (globs on names, or classes)."""
        return replace(self, keep_fp32=(*self.keep_fp32, *(_as_pattern(e) for e in entries)))

    def keeps(self, module_name: str, classes: tuple[str, ...]) -> bool:
        """Whether a module with this dotted name and these qualified class names stays in fp32."""
        return any(
            entry.removeprefix(_CLASS_PREFIX) in classes
            if entry.startswith(_CLASS_PREFIX)
            else fnmatchcase(module_name, entry)
            for entry in self.keep_fp32
        )

    def functions_kept(self, module_name: str) -> dict[str, str]:
        """Map the functions that a module of this dotted name calls in fp32 to their entries."""
        return {
            function: entry
            for entry in self.keep_fp32
            if not entry.startswith(_CLASS_PREFIX)
            for glob, colon, function in (entry.partition(":"),)
            if colon and fnmatchcase(module_name, glob)
        }


POLICIES: dict[str, Policy] = {
    p.name: p
    for p in (
        Policy(name="fp32"),
        Policy(name="tf32", compute="tf32"),
        Policy(name="fp16", compute="fp16", scaling="dynamic"),
        Policy(name="bf16", compute="bf16"),
        Policy(name="bf16-true", param="bf16", compute="bf16"),
        Policy(name="fp8", compute="bf16", linears="fp8"),
        Policy(name="fp8-emulated", compute="bf16", linears="fp8-emulated"),
    )
}

# The names that users of Lightning and Accelerate already type.
ALIASES: dict[str, str] = {
    "32-true": "fp32",
    "32": "fp32",
    "no": "fp32",
    "float32": "fp32",
    "16-mixed": "fp16",
    "16": "fp16",
    "fp16-mixed": "fp16",
    "float16": "fp16",
    "bf16-mixed": "bf16",
    "bfloat16": "bf16",
}


def policy_named(name: str) -> Policy:
    """Return the policy of this name or alias.

    ``auto`` is not a policy but a request to choose one, which needs a device: see
    ``narrowcast.precision.device.choose_policy``. Raises UnknownName with the nearest match.
    """
    canonical = ALIASES.get(name, name)
    if canonical not in POLICIES:
        error = UnknownName.of("precision", name, [*POLICIES, *ALIASES, "auto"])
        error.hint += "; plans, such as lean, are not policies: narrowcast.plan.plan_named"
        raise error
    return POLICIES[canonical]
