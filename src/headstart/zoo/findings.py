"""What an audit saw: findings in order, some wrong, some of those allowed by name."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from headstart.core.validate import one_of

from .keys import ALLOWED


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing the audit looked at; `allowed` when the user named it as an exception."""

    name: str
    ok: bool
    detail: str
    allowed: bool = False


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Everything one audit looked at, in order."""

    findings: tuple[Finding, ...]

    @property
    def failures(self) -> tuple[Finding, ...]:
        """Findings that are wrong and not allowed."""
        return tuple(finding for finding in self.findings if not (finding.ok or finding.allowed))

    @property
    def passed(self) -> bool:
        """Whether every finding is right or allowed."""
        return not self.failures


def findings_of(rows: Sequence[tuple[str, bool, str]], allow: Collection[str]) -> Audit:
    """Rows of (name, ok, detail) as an audit; `allow` names the findings that may fail."""
    for name in allow:
        one_of("allow", name, ALLOWED)
    return Audit(findings=tuple(Finding(name=n, ok=bool(ok), detail=d, allowed=n in allow) for n, ok, d in rows))
