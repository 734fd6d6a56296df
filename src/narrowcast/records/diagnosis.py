"""What `diagnose` found: a verdict, its evidence, the remedies tried, and the smallest fp32 set.

A verdict is a word from `Kind` with the module and the operation that it accuses. Whatever is said
in words carries the figures that it was read from, so that a report can be rendered anew.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from narrowcast.records.ranges import TensorRange
from narrowcast.records.run import AxisValue, Environment, OptionValue

__all__ = [
    "DiagnosisRecord",
    "DroppedModule",
    "ExecutedOp",
    "Finding",
    "Kind",
    "LostConstant",
    "MinimalFp32",
    "ModuleRange",
    "Phase",
    "Remedy",
    "SourceLine",
    "Trial",
]

Phase = Literal["forward", "backward", "update"]
Kind = Literal[
    "fine",
    "forward overflow",
    "backward overflow",
    "backward underflow",
    "lost updates",
    "constant out of range",
    "positions collapse",
    "low-precision accumulation",
    "scale thrashing",
    "scale too low",
    "scale too high",
    "not a precision problem",
    "nothing to diagnose",
    "not reproducible",
    "inconclusive",
]


@dataclass(frozen=True, kw_only=True)
class LostConstant:
    """A Python number that a format does not hold."""

    value: float
    becomes: float
    """0, or an infinity."""


@dataclass(frozen=True, kw_only=True)
class ExecutedOp:
    """One operation of a replayed step, as it executed below autocast."""

    index: int
    """Place in the order of execution, from 0."""
    phase: Phase
    op: str
    """ATen's name, such as ``aten.addmm.default``."""
    module: str
    """Dotted name of the innermost module; of the forward operation's, in backward. '' outside."""
    file: str = ""
    line: int = 0
    code: str = ""
    """The innermost line of the user's own code (or of the model's library) that called it."""
    inputs: tuple[TensorRange, ...] = ()
    """Of its floating-point inputs, before it ran; empty where values were not looked at."""
    outputs: tuple[TensorRange, ...] = ()
    dtype: str = ""
    """Format name of its first floating-point output."""
    recomputed: bool = False
    """Whether it ran again inside backward, as checkpointing has it; its phase is ``forward``."""
    fed_by: tuple[int, ...] = ()
    """For each floating-point input, the operation that wrote it; -1 for what was there before."""
    sources: tuple[str, ...] = ()
    """For each floating-point input that no operation wrote: the parameter's or buffer's name,
    ``batch``, or ``outside``; '' for one that an operation wrote."""
    results: tuple[str, ...] = ()
    """``loss``, or the parameters whose gradients this operation wrote last."""
    keeps: str = ""
    """The buffer or weight in whose place a forward pass leaves this result, as a new tensor; ''
    where it leaves none, and where it writes in place."""
    constants: tuple[LostConstant, ...] = ()
    """Its Python numbers that become 0 or infinite in its output's format."""
    infinite_constant: bool = False
    """Whether one of its Python numbers is infinite, as in ``masked_fill(mask, -inf)``."""
    local_error: float | None = None
    """rms of its result's difference from the same operation in fp32 on the same inputs, over the
    rms of the latter; None where that was not computed."""
    absorbed: float | None = None
    """Of a 16-bit sum of two tensors, a running sum, an average (``lerp``) or wider numbers written
    over 16-bit ones: the share of non-zero addends that changed nothing."""
    swallowed: float | None = None
    """Of a 16-bit sum of a tensor and a constant: the share of the elements that are not 0 beside
    which nothing but the constant is left."""
    collapsed: float | None = None
    """Where integers become 16-bit numbers: the share of distinct values that were lost; None for
    other inputs."""

    @property
    def result(self) -> str:
        """The first of `results`; '' for an operation in the middle of the step."""
        return self.results[0] if self.results else ""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One cause, the place that it is at, and the figures that speak for it."""

    kind: Kind
    module: str = ""
    op: str = ""
    phase: Phase | None = None
    file: str = ""
    line: int = 0
    code: str = ""
    explanation: str
    """One or two sentences with the figures in them."""
    figures: dict[str, float] = field(default_factory=dict)
    evidence: tuple[ExecutedOp, ...] = ()
    """The operation itself, and those that fed it."""


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """One cure: what it is, what it costs, and what became of the replayed step under it."""

    name: str
    words: str
    how: str
    """The command, or the line of code, that applies it."""
    memory_bytes: int | None = None
    """Change of the step's peak; None where it was not found out."""
    time_ratio: float | None = None
    """Seconds of a step over those without the cure."""
    works: bool
    outcome: str
    """What the replayed step gave, with figures."""


@dataclass(frozen=True, kw_only=True)
class ModuleRange:
    """The values that passed one module's boundary in the replayed step, taken in fp32."""

    module: str
    phase: Phase
    """``forward``: its outputs; ``backward``: the gradients of its outputs, unscaled."""
    file: str = ""
    line: int = 0
    code: str = ""
    """The line that called the module."""
    values: TensorRange


@dataclass(frozen=True, kw_only=True)
class SourceLine:
    """A line of the model's source, and the values that the replayed step gave on it.

    Where a line ran several times (a block that is repeated) its runs are counted together.
    """

    file: str
    line: int
    code: str
    """As it stands in the file, with its indentation."""
    module: str = ""
    """The module whose run of this line had the largest values."""
    forward: TensorRange | None = None
    """Results of its operations; None for a line on which nothing was computed."""
    backward: TensorRange | None = None
    """Gradients that its operations passed on, with the loss scale in them."""
    accused: bool = False


@dataclass(frozen=True, kw_only=True)
class DroppedModule:
    """A module of the minimal set that was given back to low precision, alone, and what broke."""

    module: str
    failed: bool
    outcome: str


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A short training with the minimal set, under one seed."""

    seed: int
    steps: int
    works: bool
    outcome: str


@dataclass(frozen=True, kw_only=True)
class MinimalFp32:
    """The smallest set of modules (and operations) to keep in fp32 such that the training works."""

    modules: tuple[str, ...]
    operations: tuple[str, ...] = ()
    """``module:function``, where less than the module is enough."""
    keep_fp32: tuple[str, ...]
    """The set as a policy takes it."""
    policy_file: str = ""
    oracle_calls: int
    candidates: int
    """Modules that were searched among."""
    unique: bool | None
    """Whether no other set of that size works; None where that was not decided."""
    alternatives: tuple[tuple[str, ...], ...] = ()
    memory_bytes: int | None = None
    """What the set adds to the step's peak."""
    dropped: tuple[DroppedModule, ...] = ()
    trainings: tuple[Trial, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DiagnosisRecord:
    """A diagnosis from its first step to its last word."""

    kind: Literal["diagnosis"] = "diagnosis"
    schema: int = 1
    recipe: str
    recipe_path: str = ""
    typed: str = ""
    """How the command line calls the recipe, options included; '' for what it cannot call."""
    options: dict[str, OptionValue] = field(default_factory=dict)
    precision: str
    plan: dict[str, AxisValue] = field(default_factory=dict)
    compute: str = ""
    """Format name of what it computes in."""
    seed: int
    steps: int
    """Steps that were allowed."""
    failed_at: int | None = None
    """The first step that showed the failure, from 1."""
    symptom: str = ""
    """What was seen from outside: 'loss is NaN at step 7', '8 skipped steps in a row'."""
    verdict: Kind
    finding: Finding
    """The first cause."""
    others: tuple[Finding, ...] = ()
    """Further causes, the likeliest first."""
    reference: str = ""
    """What the same steps gave in fp32."""
    remedies: tuple[Remedy, ...] = ()
    """By price, the cheapest first."""
    minimal_fp32: MinimalFp32 | None = None
    ranges: tuple[ModuleRange, ...] = ()
    lines: tuple[SourceLine, ...] = ()
    """The source of what ran in the replayed step, file by file."""
    scale: float = 1.0
    """The loss scale of the replayed step."""
    notes: tuple[str, ...] = ()
    environment: Environment
    started: str = ""
    seconds: float = 0.0
    command: str = ""
