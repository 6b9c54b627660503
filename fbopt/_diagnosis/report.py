"""What the checks of a closure found, what they looked at, and what they could not look at."""

from __future__ import annotations

from dataclasses import dataclass, field

ERROR, DOUBT = "error", "doubt"


@dataclass(frozen=True)
class Finding:
    """One mistake, or one doubt.

    Attributes:
        severity: ``"error"``: the numbers are not those of the full batch; ``"doubt"``: they may be
            what is wanted, but seldom are.
        about: which check found it, such as ``"weights"``.
        found: what was measured, beside what was expected.
        cause: what it likely comes from.
        cure: what to do.
    """

    severity: str
    about: str
    found: str
    cause: str
    cure: str

    def __str__(self) -> str:
        """The finding in three parts: what was found, the likely cause, the cure."""
        return f"{self.about}: {self.found}. Likely cause: {self.cause}. Cure: {self.cure}"


@dataclass
class Report:
    """Collects findings while the checks run."""

    findings: list[Finding] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    unchecked: dict[str, str] = field(default_factory=dict)

    def error(self, about: str, found: str, cause: str, cure: str) -> None:
        """Add a mistake."""
        self._add(ERROR, about, found, cause, cure)

    def doubt(self, about: str, found: str, cause: str, cure: str) -> None:
        """Add what is seldom meant."""
        self._add(DOUBT, about, found, cause, cure)

    def note(self, about: str) -> None:
        """Note that a check was made."""
        if about not in self.checked:
            self.checked.append(about)

    def skip(self, about: str, reason: str) -> None:
        """Note why a check could not be made."""
        self.unchecked.setdefault(about, reason)
        self.checked = [name for name in self.checked if name != about]

    def has_errors_about(self, about: str) -> bool:
        """Whether a check found a mistake."""
        return any(f.severity == ERROR and f.about == about for f in self.findings)

    def _add(self, severity: str, about: str, found: str, cause: str, cure: str) -> None:
        self.note(about)
        known = [(f.severity, f.about, f.cause) for f in self.findings]
        if (severity, about, cause) not in known:  # the same in the next chunk says nothing new
            self.findings.append(Finding(severity, about, found, cause, cure))
