"""All rules on the evidence of one step, in the order of cause and effect.

The same function judges the training, each remedy and each set of modules that is tried in fp32:
what was accused is cured when it is accused no more, and nothing else is instead.
"""

from __future__ import annotations

from narrowcast.diagnosis.broken import broken_findings, hidden_overflows
from narrowcast.diagnosis.evidence import Evidence
from narrowcast.diagnosis.faint import underflows
from narrowcast.diagnosis.silent import accumulations, collapses
from narrowcast.records.diagnosis import Finding

__all__ = ["findings_of"]


def findings_of(evidence: Evidence) -> tuple[Finding, ...]:
    """Return what one step is accused of: what breaks it, or else what is lost in it silently."""
    if evidence.is_loud:
        return broken_findings(evidence)
    faint = underflows(evidence)
    hidden = hidden_overflows(evidence) if faint else ()
    return (*hidden, *collapses(evidence), *accumulations(evidence), *faint)
