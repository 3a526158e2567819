"""One line of what the doctor says."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

# fails: no worker can serve here. warns: it can, but slower or less safely than this machine allows.
Status = Literal["ok", "warns", "fails", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    section: str
    name: str
    status: Status = "ok"
    detail: str
    remedy: str = ""
    gb_s: float | None = None


def table(findings: Sequence[Finding]) -> str:
    widths = [max(len(row[column]) for row in map(_cells, findings)) for column in range(3)]
    lines: list[str] = []
    section = ""
    for finding in findings:
        shown, name, mark = _cells(finding)
        shown, section = ("" if finding.section == section else shown), finding.section
        text = f"{finding.detail}: {finding.remedy}" if finding.remedy else finding.detail
        lines.append(f"{shown:{widths[0]}}  {name:{widths[1]}}  {mark:{widths[2]}}  {text}")
    return "\n".join(lines)


def can_serve(findings: Sequence[Finding]) -> bool:
    return all(finding.status != "fails" for finding in findings)


def to_json(findings: Sequence[Finding]) -> dict[str, Any]:
    return {"can_serve": can_serve(findings), "findings": [asdict(finding) for finding in findings]}


def _cells(finding: Finding) -> tuple[str, str, str]:
    return finding.section, finding.name, "-" if finding.status == "none" else finding.status
