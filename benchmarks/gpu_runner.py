"""Runs the steps of a GPU session, so that being killed at any moment loses little.

Every line that a step prints is in ``session.log`` as soon as it is printed, and what became of the
steps is in ``session.json``, from which a later call goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu_progress import DIED, FAILED, LEFT, LOST, PASSED, Progress

ROOT = Path(__file__).parents[1]
#: Of what a step prints, in bytes, besides its last lines.
LOG_LIMIT = 1_000_000
LAST_LINES = 200
#: An item that runs for longer than that hangs.
HANGS = 100.0
#: What an item may still take that has just begun when its time is up.
MARGIN = 15.0

#: What became of a step. The last two are to be done by a later call.
PASS, FAIL, CUT, RUNNING = "passed", "FAILED", "left", "running"


def status_judge(status: int, output: str) -> str | None:
    return f"exit status {status}" if status else None


@dataclass(frozen=True)
class Step:
    """A command.

    Attributes:
        seconds: the most that it takes of one call.
        least: with less than that it is not begun.
        judge: given the exit status and the end of the output, in words what is wrong, or None.
        has_items: it notes its tests or tasks, and can be cut short and go on, see gpu_progress.
        always: a call that goes on repeats it: it is about the machine.
    """

    name: str
    command: Sequence[str]
    seconds: float
    least: float = 10.0
    environment: Mapping[str, str] = field(default_factory=dict)
    judge: Callable[[int, str], str | None] = status_judge
    has_items: bool = False
    always: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a step, in how many seconds of all calls, and for which sources."""

    name: str
    state: str
    seconds: float = 0.0
    detail: str = ""
    sources: str = ""

    def __str__(self) -> str:
        return f"{self.name:<32} {self.state:<7} {self.seconds:6.1f} s  {self.detail}"


def digest(*places: str) -> str:
    """Of all sources at these places of the project."""
    found = hashlib.sha256()
    ends = (".py", ".cpp", ".h", ".cu", ".cuh", ".toml")
    for place in places:
        path = ROOT / place
        files = [path] if path.is_file() else sorted(path.rglob("*"))
        for file in files:
            if file.is_file() and file.suffix in ends:
                found.update(f"{file.relative_to(ROOT)}\n".encode())
                found.update(file.read_bytes())
    return found.hexdigest()[:12]


class Session:
    """Runs steps within a budget, and remembers what became of them.

    What an earlier call has left in the folder is gone on with if ``resumes``, and removed if not.
    """

    def __init__(self, out: Path, budget: float, resumes: bool = False) -> None:
        self.out = out
        self.log = out / "session.log"
        self.state = out / "session.json"
        self.progress = out / "progress.csv"
        self.deadline = time.monotonic() + budget
        self.sources = digest("csrc", "fastsn", "benchmarks", "tests", "setup.py", "pyproject.toml")
        self.outcomes: dict[str, Outcome] = {}
        #: What ``session.json`` holds besides the outcomes.
        self.facts: dict[str, Any] = {}
        self.ran: list[str] = []
        self._lock = threading.RLock()
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._stopped = False
        out.mkdir(parents=True, exist_ok=True)
        if resumes and self.state.exists():
            for step in json.loads(self.state.read_text())["steps"]:
                outcome = Outcome(**step)
                if outcome.state == RUNNING:
                    outcome = replace(outcome, state=CUT, detail="the call was cut off")
                self.outcomes[outcome.name] = outcome
        elif not resumes:
            for path in (self.log, self.state, self.progress):
                path.unlink(missing_ok=True)

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def is_settled(self, step: Step) -> bool:
        """Whether a call that goes on need not run it. A failure counts until sources change."""
        outcome = self.outcomes.get(step.name)
        if outcome is None or step.always:
            return False
        return outcome.state == PASS or (outcome.state == FAIL and outcome.sources == self.sources)

    def run(self, *steps: Step) -> bool:
        """Run those that are not settled, side by side; whether all have passed by now."""
        waiting = [step for step in steps if not self.is_settled(step)]
        prefixes = len(waiting) > 1
        with ThreadPoolExecutor(max(1, len(waiting))) as pool:
            runs = [pool.submit(self._run, step, prefixes) for step in waiting]
            try:
                for one in runs:
                    one.result()
            except BaseException:
                self.stop()
                raise
        return all(self.outcomes[step.name].state == PASS for step in steps)

    def stop(self) -> None:
        """End everything that runs."""
        self._stopped = True
        for process in list(self._processes):
            end(process)

    def settle(self, outcome: Outcome) -> None:
        """Remember it, on disk at once."""
        with self._lock:
            self.outcomes[outcome.name] = outcome
            self.save()
        if outcome.state != RUNNING:
            print(outcome, flush=True)

    def save(self) -> None:
        record = {**self.facts, "steps": [asdict(one) for one in self.outcomes.values()]}
        new = self.state.with_suffix(".new")
        new.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(new, self.state)

    def _run(self, step: Step, prefixes: bool) -> None:
        before = self.outcomes.get(step.name, Outcome(step.name, CUT))
        begin = time.monotonic()
        end_of_step = min(begin + step.seconds, self.deadline)

        def settle(state: str, detail: str) -> None:
            seconds = round(before.seconds + time.monotonic() - begin, 1)
            self.settle(Outcome(step.name, state, seconds, detail, self.sources))

        if end_of_step - begin < min(step.least, step.seconds):
            return settle(CUT, "no time was left")
        self.ran.append(step.name)
        settle(RUNNING, "")
        while True:
            left = end_of_step - time.monotonic()
            progress = Progress(
                str(self.progress), step.name, self.sources, time.time() + left - MARGIN
            )
            since = time.time()
            status, output = self._run_once(step, progress, left, prefixes)
            if self._stopped:
                return settle(CUT, "the call was ended")
            if status is None and not step.has_items and end_of_step == self.deadline:
                return settle(CUT, "there was not time enough for it")
            if step.has_items and self._took_an_item(status, progress, since):
                if end_of_step - time.monotonic() >= step.least:
                    continue
                status = LEFT
            return settle(*verdict(step, status, output, progress))

    def _took_an_item(self, status: int | None, progress: Progress, since: float) -> bool:
        """Whether an item took the process, or its device, with it; then that is noted."""
        if status == LEFT:
            return False
        begun = progress.begun(since)
        for line in begun:
            seconds = time.time() - line.at
            if status is not None or seconds > HANGS:
                progress.add(line.item, DIED, seconds)
        return status == LOST or (status is not None and bool(begun))

    def _run_once(
        self, step: Step, progress: Progress, seconds: float, prefixes: bool
    ) -> tuple[int | None, str]:
        """The exit status, None if it was stopped after so many seconds, and the last output."""
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            **(progress.environment() if step.has_items else {}),
            **step.environment,
        }
        self._write(f"\n===== {step.name}: {' '.join(step.command)}\n")
        start = time.monotonic()
        try:
            process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                **own_group(),
            )
        except OSError as error:
            self._write(f"{error}\n")
            return 127, str(error)
        self._processes.add(process)
        last: deque[str] = deque(maxlen=LAST_LINES)
        reader = threading.Thread(
            target=self._copy, args=(process, f"{step.name}| " * prefixes, last), daemon=True
        )
        reader.start()
        try:
            status: int | None = process.wait(max(0.1, seconds))
        except subprocess.TimeoutExpired:
            status = None
        finally:
            end(process)
            self._processes.discard(process)
            reader.join(10)
        words = f"exit status {status}" if status is not None else "stopped"
        self._write(f"===== {step.name}: {words} after {time.monotonic() - start:.1f} s\n")
        return status, "".join(last)

    def _copy(self, process: subprocess.Popen[bytes], prefix: str, last: deque[str]) -> None:
        """What the process prints into the log, line by line, and the end of it into ``last``."""
        assert process.stdout is not None
        written = left_out = 0
        with process.stdout as lines:
            for raw in lines:
                line = public(raw.decode(errors="replace"))
                last.append(line)
                if written < LOG_LIMIT:
                    written += len(raw)
                    self._write(prefix + line)
                else:
                    left_out += 1
        if left_out:
            self._write(f"{prefix}... {left_out} lines, of which the last are:\n")
            self._write("".join(prefix + line for line in list(last)[-left_out:]))

    def _write(self, text: str) -> None:
        with self._lock, self.log.open("a") as log:
            log.write(public(text))


def verdict(step: Step, status: int | None, output: str, progress: Progress) -> tuple[str, str]:
    """The state of a step whose process has ended, and why."""
    if not step.has_items:
        if status is None:
            return FAIL, "took too long and was stopped"
        wrong = step.judge(status, output)
        return (FAIL, wrong) if wrong else (PASS, last_words(output))
    settled = progress.settled()
    counts = Counter(settled.values())
    detail = ", ".join(f"{counts[outcome]} {outcome}" for outcome in sorted(counts))
    bad = [item for item, outcome in settled.items() if outcome in (FAILED, DIED)]
    if bad:
        detail += f": {', '.join(bad[:3])}"[:120]
    if status is None or status == LEFT:
        return CUT, f"{detail or 'nothing done'}; more is left"
    if bad:
        return FAIL, detail
    if status != 0 or not counts[PASSED]:
        return FAIL, f"exit status {status}, {detail or 'nothing ran'}: {last_words(output)}"
    return PASS, detail


def own_group() -> dict[str, Any]:
    """So that what a process has started ends with it, yet not in a session of its own, which
    would outlive whoever is killed along with us."""
    return {"process_group": 0} if sys.version_info >= (3, 11) else {"preexec_fn": os.setpgrp}


def end(process: subprocess.Popen[bytes]) -> None:
    """End the process and what it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    # A process that waits for a GPU that does not answer cannot be ended.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)


def public(text: str) -> str:
    """Without the places of this machine: results are published."""
    places = {sys.executable: "python", str(ROOT): ".", sys.prefix: "<prefix>"}
    for place, name in places.items():
        text = text.replace(place, name)
    return text


def last_words(output: str) -> str:
    lines = [line.strip(" =") for line in output.splitlines() if line.strip(" =")]
    return lines[-1][:90] if lines else ""
