"""All rules on the evidence of one step, in the order of cause and effect.

The same function judges the training, each remedy and each set of modules that is tried in fp32:
what was accused is cured when it is accused no more, and nothing else is instead.
"""

from __future__ import annotations

from narrowcast.diagnosis.broken import broken_findings, hidden_overflows
from narrowcast.diagnosis.evidence import Evidence
from narrowcast.diagnosis.faint import scale_too_high, underflows
from narrowcast.diagnosis.silent import accumulations, collapses, swallowed
from narrowcast.records.diagnosis import Finding

__all__ = ["findings_of"]


def findings_of(evidence: Evidence, *, is_off: bool = False) -> tuple[Finding, ...]:
    """Return what one step is accused of: what breaks it, or else what is lost in it silently.

    With `is_off`, where the losses are not fp32's, also what is common and mostly does no harm.
    """
    if evidence.is_loud:
        too_high = scale_too_high(evidence)
        return broken_findings(evidence) if too_high is None else (too_high,)
    faint = underflows(evidence)
    hidden = hidden_overflows(evidence) if faint or is_off else ()
    vanished = swallowed(evidence) if is_off else ()
    return (*hidden, *collapses(evidence), *accumulations(evidence), *vanished, *faint)
