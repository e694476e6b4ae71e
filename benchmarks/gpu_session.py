"""Everything that needs a GPU, in one call of under eight minutes: ``make gpu``.

Builds the extension with the Python that runs this, says what can run, runs the GPU tests of each
back-end and compute-sanitizer side by side, and then, alone, the benchmarks. A step that fails does
not keep the others from running. The folder of the results gets

- ``session.log``: what every step printed,
- ``session.json``: every step with its outcome, and where all this ran,
- ``measurements.csv``, ``weights.png``, ``training.png``: the benchmarks.

A short table comes last; the exit status is not 0 if anything failed. ``--rehearse`` goes the same
way on the CPU with tiny networks and builds nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.gpu_device import commit, find_tool, output_of

ROOT = Path(__file__).parents[1]
#: Seconds for everything.
BUDGET = 465.0
#: The end of a step's output that is kept, in bytes.
LOG_LIMIT = 1_500_000


@dataclass(frozen=True)
class Step:
    """A command with a time limit.

    Attributes:
        judge: given the exit status and the output, in words what is wrong, or None.
        is_optional: where there is no time for it, or not enough, that is no failure.
    """

    name: str
    command: Sequence[str]
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)
    judge: Callable[[int, str], str | None] = lambda status, output: (
        f"exit status {status}" if status else None
    )
    is_optional: bool = False


@dataclass
class Outcome:
    """What became of a step."""

    name: str
    passed: bool
    seconds: float
    detail: str


class Session:
    """Runs steps, keeps their output in one file, and remembers what became of them."""

    def __init__(self, out: Path, budget: float = BUDGET) -> None:
        self.out = out
        self.log = out / "session.log"
        self.deadline = time.monotonic() + budget
        self.outcomes: list[Outcome] = []
        out.mkdir(parents=True, exist_ok=True)
        self.log.write_text("")

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def run(self, *steps: Step) -> bool:
        """Run the steps side by side; whether all passed."""
        running = []
        for step in steps:
            limit = min(step.seconds, self.seconds_left)
            if limit < min(10.0, step.seconds):
                skipped = Outcome(step.name, step.is_optional, 0.0, "not run: no time was left")
                self.outcomes.append(skipped)
                print(shown(skipped), flush=True)
                continue
            path = self.out / f".{re.sub('[^a-z0-9]+', '-', step.name.lower())}.log"
            running.append((step, path, *self._start(step, path), time.monotonic(), limit))
        passed = True
        for step, path, process, error, start, limit in running:
            outcome = self._finish(step, path, process, error, start, limit)
            passed &= outcome.passed
        return passed and len(running) == len(steps)

    def _start(self, step: Step, path: Path) -> tuple[subprocess.Popen[bytes] | None, str]:
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        own = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        environment = {**os.environ, **own, **step.environment}
        with path.open("wb") as file:
            try:
                process = subprocess.Popen(
                    step.command,
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                return None, str(error)
        return process, ""

    def _finish(
        self,
        step: Step,
        path: Path,
        process: subprocess.Popen[bytes] | None,
        error: str,
        start: float,
        limit: float,
    ) -> Outcome:
        wrong: str | None = error or None
        is_late = False
        if process is not None:
            try:
                status = process.wait(max(0.1, start + limit - time.monotonic()))
            except subprocess.TimeoutExpired:
                wrong = f"stopped after {limit:.0f} s"
                is_late = True
            finally:
                stop(process)
        seconds = time.monotonic() - start
        output = path.read_bytes()[-LOG_LIMIT:].decode(errors="replace")
        path.unlink()
        if wrong is None:
            wrong = step.judge(status, output)
        with self.log.open("a") as log:
            log.write(public(f"\n===== {step.name}: {' '.join(step.command)}\n{output}\n"))
            log.write(f"===== {step.name}: {wrong or 'passed'}, {seconds:.1f} s\n")
        detail = wrong or last_words(output)
        passed = wrong is None or (is_late and step.is_optional)
        outcome = Outcome(step.name, passed, round(seconds, 1), detail)
        self.outcomes.append(outcome)
        print(shown(outcome), flush=True)
        return outcome


def stop(process: subprocess.Popen[bytes]) -> None:
    """End the process and what it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
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


def shown(outcome: Outcome) -> str:
    word = "passed" if outcome.passed else "FAILED"
    return f"{outcome.name:<28} {word}  {outcome.seconds:6.1f} s  {outcome.detail}"


def judge_info(status: int, output: str) -> str | None:
    """The back-ends for GPUs must be able to run: everything after this is about them."""
    if status:
        return f"exit status {status}"
    missing = [
        " ".join(line.split())
        for line in output.splitlines()
        if line.split()[:1] in (["cuda"], ["triton"]) and "cannot run" in line
    ]
    return "; ".join(missing)[:200] or None


def judge_tests(status: int, output: str) -> str | None:
    """Something must have passed, and nothing failed."""
    line = last_words(output)
    if status or not re.search(r"\b[1-9]\d* passed", line):
        return f"exit status {status}: {line}"
    return None


def judge_sanitizer(status: int, output: str) -> str | None:
    """The program must have come to its end, and the tool must say that it found nothing."""
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", output)
    if "all calls agree with the reference" not in output:
        return f"exit status {status}: the program did not come to its end; {found[-1:] or ''}"
    if not found:
        return "the tool gave no summary"
    if status or not re.search(r"SUMMARY: 0 (errors|hazards)", found[-1]):
        return f"exit status {status}: {found[-1]}"
    return None


def build_step(cuda: str) -> Step:
    return Step(
        f"build, FASTSN_CUDA={cuda}",
        [sys.executable, "setup.py", "build_ext", "--inplace", "--force"],
        170,
        {"FASTSN_CUDA": cuda, "MAX_JOBS": str(os.cpu_count() or 1)},
    )


#: In this order: the compiled model at the end of the last takes longest.
TESTS = [f"tests/test_gpu{part}.py" for part in ("", "_models", "_state", "_streams", "_means")]


def test_step(backend: str, seconds: float, *arguments: str, **environment: str) -> Step:
    options = ["-q", "-ra", "--durations=15", "-p", "no:cacheprovider", "--color=no"]
    return Step(
        f"tests, {backend}",
        [
            *(sys.executable, "-m", "pytest", *TESTS, *options),
            *("-o", "faulthandler_timeout=100", *arguments),
        ],
        seconds,
        {"FASTSN_TEST_BACKENDS": backend, **environment},
        judge_tests,
    )


def sanitizer_step(tool: str, seconds: float) -> Step:
    program = find_tool("compute-sanitizer") or "compute-sanitizer"
    options = ["--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
    # The two that follow shared memory are slow.
    quick = ["--quick"] if tool in ("racecheck", "synccheck") else []
    return Step(
        f"compute-sanitizer {tool}",
        [program, *options, sys.executable, "tests/gpu_sanitize.py", *quick],
        seconds,
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        judge_sanitizer,
    )


def benchmark_step(
    session: Session, parts: Sequence[str], seconds: float, *arguments: str, optional: bool = False
) -> Step:
    # What begins within the limit of the program may end a little later.
    seconds = max(1.0, seconds)
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(session.out), "--append"]
    return Step(
        f"benchmarks, {', '.join(dict.fromkeys(part.split()[0] for part in parts))}",
        [*command, "--only", *parts, "--seconds", f"{seconds:.0f}", *arguments],
        seconds + START_AND_END,
        is_optional=optional,
    )


#: Seconds that a benchmark program takes besides its limit: imports, and what it has just begun.
START_AND_END = 18.0
#: The programs of the benchmarks, each with its limit where there is time enough. A process each:
#: what one does to the device does not touch the others, nor does the profiler.
PROGRAMS = [
    (["copy", "weights"], 75.0),
    (["training", "msn"], 90.0),
    (["autocast", "bsn", "launches"], 35.0),
]


def measure_on_gpu(session: Session) -> None:
    """All steps, on a machine with a GPU."""
    if not session.run(build_step("1")):
        # Triton and the reference can still be tested and measured.
        session.run(build_step("0"))
    session.run(Step("info", [sys.executable, "-m", "fastsn", "info"], 60, judge=judge_info))
    tools = ("memcheck", "racecheck", "initcheck", "synccheck")
    session.run(
        *(test_step(backend, 150) for backend in ("cuda", "triton", "reference")),
        *(sanitizer_step(tool, 110) for tool in tools),
    )
    for i, (parts, seconds) in enumerate(PROGRAMS):
        share = seconds / sum(others for _, others in PROGRAMS[i:])
        left = share * session.seconds_left - START_AND_END
        session.run(benchmark_step(session, parts, min(seconds, left)))
    left = session.seconds_left - START_AND_END
    if left > 25:
        session.run(benchmark_step(session, ["compiled"], min(40, left), optional=True))


def rehearse(session: Session) -> None:
    """The same steps on the CPU, small and without a build."""
    session.run(Step("info", [sys.executable, "-m", "fastsn", "info"], 60))
    sanitize = [sys.executable, "tests/gpu_sanitize.py", "--quick"]
    session.run(
        test_step(
            "cpp",
            100,
            "-k",
            "not compiled and not environment and not Numbers or layouts",
            FASTSN_TEST_DEVICE="cpu",
        ),
        Step("sanitize", [*sanitize, "--device", "cpu", "--backend", "cpp"], 60),
    )
    large, small = "small BigGAN D", "small SNDCGAN D"
    parts = ["copy", *(f"{part} {small}" for part in ("weights", "autocast", "launches"))]
    parts.append(f"bsn {large}")
    session.run(benchmark_step(session, parts, 60, "--quick", "--device", "cpu"))


def finish(session: Session, is_rehearsal: bool) -> list[str]:
    """Write ``session.json``; return the lines of the last table."""
    identity, dirty = commit()
    lines = ["", *map(shown, session.outcomes), ""]
    measurements = session.out / "measurements.csv"
    if measurements.exists():
        try:
            from benchmarks import gpu_report
            from benchmarks.gpu import failed_rows, report

            failed = failed_rows(gpu_report.read(measurements))
            summary, _ = report(session.out, is_rehearsal, failed)
            lines += summary.splitlines()
        except Exception as error:  # the table of the steps comes in any case
            outcome = Outcome("report", False, 0.0, f"{type(error).__name__}: {error}")
            session.outcomes.append(outcome)
            lines.append(shown(outcome))
    record = {
        "commit": identity,
        "dirty": dirty,
        "python": sys.version.split()[0],
        "nvidia_smi": output_of("nvidia-smi"),
        "steps": [asdict(outcome) for outcome in session.outcomes],
        "summary": lines,
    }
    (session.out / "session.json").write_text(json.dumps(record, indent=1) + "\n")
    return lines


def default_folder() -> Path:
    name = output_of("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    slug = re.sub("[^a-z0-9]+", "-", name[0].lower()).strip("-") if name else "cpu-rehearsal"
    return ROOT / "benchmarks" / "results" / slug


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_session",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<name of the GPU>")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, without a build")
    options = parser.parse_args(arguments)

    if not options.rehearse and not output_of("nvidia-smi", "-L").strip():
        print("make gpu needs a GPU, and nvidia-smi finds none here; nothing was run")
        return 2
    # The results change the working tree: what it was before is what was measured.
    identity, dirty = commit()
    if identity != "unknown":
        os.environ["FASTSN_COMMIT"] = identity + ("-dirty" if dirty == "true" else "")
    # nvcc and compute-sanitizer are often installed beside PATH.
    nvcc = find_tool("nvcc")
    if nvcc is not None:
        folders = [os.environ.get("PATH", ""), str(Path(nvcc).parent)]
        os.environ["PATH"] = os.pathsep.join(filter(None, folders))
    capability = output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    if re.match(r"\d+\.\d", capability):  # for this GPU alone: that is faster to compile
        os.environ.setdefault(
            "FASTSN_CUDA_ARCHITECTURES", capability.splitlines()[0].strip().replace(".", "")
        )
    out = (options.out or default_folder()).resolve()
    session = Session(out)
    for name in ("measurements.csv", "weights.png", "training.png", "session.json"):
        (out / name).unlink(missing_ok=True)
    start = time.monotonic()
    (rehearse if options.rehearse else measure_on_gpu)(session)
    print("\n".join(finish(session, options.rehearse)))
    failed = [outcome.name for outcome in session.outcomes if not outcome.passed]
    print(f"\n{time.monotonic() - start:.0f} s; results in {out}")
    print(f"FAILED: {', '.join(failed)}" if failed else "everything passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
