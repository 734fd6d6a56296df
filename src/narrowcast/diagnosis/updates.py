"""The rule for weights in 16 bits that no longer move: updates that are rounded away.

How much of an update arrives is measured on real steps, as <change, update> / <update, update>: a
store that rounds at random keeps all of it on average though most elements stand still, and is not
accused. Nor is a norm's weight of 1.0 for standing still by itself: a share of all elements counts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from narrowcast.diagnosis.evidence import parent
from narrowcast.diagnosis.silent import MOST
from narrowcast.ranges.meter import WeightUpdates
from narrowcast.records.diagnosis import Finding

__all__ = ["holding_matrices", "lost_updates"]

# A part of the model is accused by itself where it hardly moves at all, and holds a matrix: weights
# of 1.0 in norms, which no usual step moves in bf16, are no part that a training hangs on.
_HARDLY = 0.9


@dataclass(frozen=True, kw_only=True)
class _Moved:
    """Elements of one module's weights, over several steps."""

    updated: int = 0
    lost: int = 0
    stored: str = ""
    ratio: float = 0.0

    @property
    def share(self) -> float:
        return self.lost / self.updated if self.updated else 0.0


def lost_updates(
    steps: Sequence[Sequence[WeightUpdates]], matrices: Collection[str]
) -> tuple[Finding, ...]:
    """Accuse modules whose updates are mostly rounded away in the steps that were metered.

    The model as a whole, where most of all updates are, and in more than half of its modules.
    `matrices` are the modules that hold a parameter of two dimensions or more.
    """
    modules = _by_module([each for step in steps for each in step])
    updated = sum(m.updated for m in modules.values())
    if not updated:
        return ()
    overall = sum(m.lost for m in modules.values()) / updated
    standing = {name: m for name, m in modules.items() if m.share >= MOST}
    if overall >= MOST:
        if len(standing) > len(modules) / 2:
            return (_finding("", _sum(modules), overall), *_each(standing))
        return _each(standing)
    return _each(
        {name: m for name, m in standing.items() if m.share >= _HARDLY and name in matrices}
    )


def holding_matrices(model: nn.Module) -> frozenset[str]:
    """Name the modules that hold a parameter of two dimensions or more."""
    return frozenset(parent(name) for name, p in model.named_parameters() if p.dim() > 1)


def _by_module(updates: Sequence[WeightUpdates]) -> dict[str, _Moved]:
    found: dict[str, _Moved] = {}
    for each in updates:
        name, loss = parent(each.name), each.weight
        before = found.get(name, _Moved())
        # Rounding at random loses nothing on average, which a step of a small module cannot show.
        at_random = each.stored.endswith("(stochastic)")
        arrives = at_random or (loss.carried is not None and loss.carried >= MOST)
        found[name] = _Moved(
            updated=before.updated + loss.updated,
            lost=before.lost + (0 if arrives else loss.lost),
            stored=each.stored,
            ratio=max(before.ratio, loss.ratio),
        )
    return found


def _sum(modules: Mapping[str, _Moved]) -> _Moved:
    return _Moved(
        updated=sum(m.updated for m in modules.values()),
        lost=sum(m.lost for m in modules.values()),
        stored=next(iter(modules.values())).stored,
        ratio=max(m.ratio for m in modules.values()),
    )


def _each(modules: Mapping[str, _Moved]) -> tuple[Finding, ...]:
    ranked = sorted(modules.items(), key=lambda item: -item[1].lost)
    return tuple(_finding(name, moved, moved.share) for name, moved in ranked)


def _finding(name: str, moved: _Moved, share: float) -> Finding:
    whose = f"module {name!r}" if name else "the model"
    return Finding(
        kind="lost updates",
        module=name,
        phase="update",
        explanation=(
            f"of {moved.updated} updates of the weights of {whose}, which are stored as "
            f"{moved.stored}, {share:.1%} changed nothing: they are smaller than half the distance "
            f"to the next number. (Updates are at most {moved.ratio:.1e} of a parameter's size.)"
        ),
        figures={"lost": share, "updates": float(moved.updated), "update to weight": moved.ratio},
    )
