"""What the calls that change a whole model tell about it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Report:
    """What was touched, and what was skipped with the reason; print it.

    Attributes:
        method: what was applied.
        touched: names of weights, or of modules and what became of them.
        skipped: names of modules, and why.
        notes: what else there is to know.
        kind: what ``touched`` counts.
    """

    method: str
    touched: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    kind: str = "weights"

    def __str__(self) -> str:
        lines = [
            f"{self.method} applied to {len(self.touched)} {self.kind}, {len(self.skipped)} skipped"
        ]
        lines += [f"  + {name}" for name in self.touched]
        lines += [f"  - {name}: {reason}" for name, reason in self.skipped.items()]
        lines += [f"  ! {note}" for note in self.notes]
        return "\n".join(lines)
