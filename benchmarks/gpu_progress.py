"""What is done of a step of a GPU session: a line for each test or task, on disk at once.

The session may be killed at any moment, and a test may take the process with it. What began and did
not end is known from these lines, and so is what need not run again.
"""

from __future__ import annotations

import csv
import io
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

#: Names the place of the lines to the programs of a session.
VARIABLE = "FASTSN_GPU_PROGRESS"
#: Exit statuses: time was up before all was done; the device is unusable to this process.
LEFT, LOST = 75, 76

STARTED, PASSED, SKIPPED, FAILED, DIED = "started", "passed", "skipped", "failed", "died"
COLUMNS = ("step", "item", "outcome", "seconds", "at", "sources")


@dataclass(frozen=True)
class Line:
    """An item began, or this came of it."""

    item: str
    outcome: str
    seconds: float
    at: float
    sources: str


@dataclass(frozen=True)
class Progress:
    """The lines of one step.

    Attributes:
        path: the file, which all steps share.
        step: the name of the step.
        sources: the digest of the sources that run: a failure counts until they change.
        deadline: nothing begins after it, in seconds since the epoch.
    """

    path: str
    step: str
    sources: str = ""
    deadline: float = float("inf")

    @classmethod
    def of_environment(cls) -> Progress | None:
        """The one that the session has named, if there is one."""
        given = os.environ.get(VARIABLE)
        return cls(**json.loads(given)) if given else None

    def environment(self) -> dict[str, str]:
        return {VARIABLE: json.dumps(asdict(self))}

    @property
    def is_late(self) -> bool:
        return time.time() > self.deadline

    def add(self, item: str, outcome: str, seconds: float = 0.0) -> None:
        """Append a line, in one write: several processes share the file."""
        text = io.StringIO()
        row = (self.step, item, outcome, f"{seconds:.2f}", f"{time.time():.1f}", self.sources)
        csv.writer(text, lineterminator="\n").writerow(row)
        with open(self.path, "ab", buffering=0) as file:
            file.write(text.getvalue().encode())

    def lines(self) -> Iterator[Line]:
        if not Path(self.path).exists():
            return
        with open(self.path, newline="", errors="replace") as file:
            for row in csv.reader(file):
                # The last one may be torn.
                if len(row) == len(COLUMNS) and row[0] == self.step:
                    try:
                        yield Line(row[1], row[2], float(row[3]), float(row[4]), row[5])
                    except ValueError:
                        continue

    def last(self) -> dict[str, Line]:
        """The last line of every item; failures of other sources do not count."""
        found: dict[str, Line] = {}
        for line in self.lines():
            if line.outcome in (FAILED, DIED) and line.sources != self.sources:
                found.pop(line.item, None)
            else:
                found[line.item] = line
        return found

    def settled(self) -> dict[str, str]:
        """The outcome of each item that need not run again."""
        last = self.last()
        return {item: line.outcome for item, line in last.items() if line.outcome != STARTED}

    def begun(self, since: float = 0.0) -> list[Line]:
        """The items that began, not before ``since``, and did not end."""
        return [
            line
            for line in self.last().values()
            if line.outcome == STARTED and line.at >= since - 0.1
        ]
