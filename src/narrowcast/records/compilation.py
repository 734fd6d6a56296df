"""What torch.compile made of a model in one training: how often, and where it had to give up."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Compilation"]


@dataclass(frozen=True, kw_only=True)
class Compilation:
    """A model that was compiled, as counted in the process that ended the run."""

    backend: str
    """torch's name of the compiler."""
    graphs: int = 0
    """Graphs that were compiled, recompiles among them; 0: the model itself was never called."""
    recompiles: int = 0
    """Graphs made anew for code that had one: for another shape, or for an evaluation."""
    graph_breaks: dict[str, int] = field(default_factory=dict)
    """Reason -> how often a graph had to end there, and Python go on; as torch counts."""
    fell_back: bool = False
    """Whether there were more recompiles than torch allows, and calls went on uncompiled."""

    @property
    def words(self) -> str:
        """Say it in one line."""
        if not self.graphs:
            return f"{self.backend}: nothing was compiled, as the model itself was not called"
        breaks = sum(self.graph_breaks.values())
        counted = (
            _count(self.graphs, "graph"),
            _count(self.recompiles, "recompile"),
            _count(breaks, "graph break"),
        )
        rest = "; further shapes ran uncompiled" if self.fell_back else ""
        return f"{self.backend}: {', '.join(counted)}{rest}"


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"
