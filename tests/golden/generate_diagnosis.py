"""Make the diagnosis that the report's tests read: `python tests/golden/generate_diagnosis.py`.

It is a real one, of the small T5 with one block, with the machine and the times taken out.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from narrowcast.diagnosis.diagnose import diagnose
from narrowcast.records.codec import dumps
from narrowcast.records.diagnosis import DiagnosisRecord, Finding
from narrowcast.records.run import Environment

HERE = Path(__file__).parent
RECIPE = HERE.parent / "recipes" / "t5_like_overflow.py"


def anonymous(record: DiagnosisRecord) -> DiagnosisRecord:
    """Take out what differs from machine to machine."""
    here, there = str(RECIPE), "t5_like_overflow.py"

    def placed(finding: Finding) -> Finding:
        evidence = tuple(replace(op, file=op.file.replace(here, there)) for op in finding.evidence)
        return replace(finding, file=finding.file.replace(here, there), evidence=evidence)

    return replace(
        record,
        recipe_path=there,
        typed=record.typed.replace(here, there),
        finding=placed(record.finding),
        others=tuple(map(placed, record.others)),
        remedies=tuple(
            replace(cure, how=cure.how.replace(here, there), time_ratio=1.0)
            for cure in record.remedies
        ),
        ranges=tuple(replace(each, file=each.file.replace(here, there)) for each in record.ranges),
        lines=tuple(replace(line, file=line.file.replace(here, there)) for line in record.lines),
        environment=Environment(
            device="cpu", device_name="some CPU", threads=1, platform="Linux", python="3.11",
            torch="2.13.0", narrowcast="0.1.0",
        ),
        started="2026-11-26T05:00:00+00:00",
        seconds=12.0,
        command="narrowcast diagnose t5_like_overflow.py --precision fp16 --minimal-fp32",
    )  # fmt: skip


if __name__ == "__main__":
    found = diagnose(RECIPE, "fp16", ["depth=2", "large=last"], steps=10, minimal_fp32=True)
    (HERE / "diagnosis.json").write_text(dumps(anonymous(found), indent=1) + "\n")
