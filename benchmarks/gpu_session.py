"""Everything that needs a GPU, in calls that may be short and may be killed: ``make gpu``.

``info`` decides: unless the CUDA back-end can run, nothing else is done. Then, in the order of what
they are worth: the tests of that back-end; timings of spectral norm, of training, and of each
kernel; the hardware's counters; launches overlapped or not, and an empty one; tests and timings of
Triton; compute-sanitizer; and the rest. Nothing runs beside what is timed.

A call takes ``--seconds`` and prints the command that goes on from there; so it does after it was
killed, and a failure is tried again once sources have changed. The folder of the results gets

- ``session.log``: what every step prints, as it prints it,
- ``session.json``: what became of each step, and where all this ran,
- ``progress.csv``: each test and each measurement as it begins and ends,
- ``measurements.csv``, ``weights.png``, ``training.png``, ``ncu.csv``: what was measured.

The machine needs Python with torch, pytest, pytest-benchmark, hypothesis, numpy, matplotlib and the
CUDA toolkit; no network, make, or git (FASTSN_COMMIT names the commit). To bring along: the tree,
``build/prebuilt/`` if it is not to be built there (``python -m benchmarks.gpu_prebuild --help``
says how it is made), and to go on the folder of the results so far, which ``--resume`` names.

Exit status: 0, all passed; 1, something failed; 2, nothing can be run here; 3, all passed so far,
and more is left. ``--rehearse`` goes the same way on the CPU, with tiny networks.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from benchmarks.gpu_prebuild import capability_here
from benchmarks.gpu_progress import DIED, FAILED, Progress
from benchmarks.gpu_runner import CUT, FAIL, ROOT, Outcome, Session, Step, public
from benchmarks.gpu_steps import GPU, REHEARSAL, Plan, plan
from benchmarks.gpu_tools import commit, find_tool, output_of

#: Of the first call: two more fit into a quarter of an hour, after whatever it finds is mended.
SECONDS = 300.0
#: Of them, to draw the charts.
REPORT = 15.0


def carry_out(session: Session, steps: Plan) -> bool:
    """Run what is left, as far as time allows; False if nothing can be run here."""
    if not session.run(steps.extension) and steps.extension is not steps.build:
        session.run(steps.build)
    if not session.run(steps.info):
        print(f"no further step: {session.outcomes[steps.info.name].detail}", flush=True)
        return False
    for stage in steps.stages:
        session.run(*stage)
    return True


def left_in(session: Session, steps: Plan) -> list[Step]:
    return [step for stage in steps.stages for step in stage if not session.is_settled(step)]


def failed_in(session: Session, steps: Plan) -> list[str]:
    """The steps that failed, those with a failure that are not yet at their end included."""
    failed = [name for name, outcome in session.outcomes.items() if outcome.state == FAIL]
    for stage in steps.stages:
        for step in stage:
            progress = Progress(str(session.progress), step.name, session.sources)
            if step.name not in failed and {FAILED, DIED} & set(progress.settled().values()):
                failed.append(step.name)
    return failed


def report(out: Path, backend: str) -> tuple[list[str], bool]:
    """Draw the charts; return the lines of the summary, and whether that went well."""
    if not (out / "measurements.csv").exists():
        return [], True
    command = [sys.executable, "-m", "benchmarks.gpu_report", str(out), "--backend", backend]
    try:
        # A slow machine may take longer: all that counts is on disk by now.
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=4 * REPORT)
    except subprocess.TimeoutExpired:
        return [f"FAILED report: took more than {4 * REPORT:.0f} s"], False
    lines = public(done.stdout).splitlines()
    return (
        (lines, True)
        if done.returncode == 0
        else ([*lines, *public(done.stderr).splitlines()[-3:]], False)
    )


def go_on(options: argparse.Namespace, out: Path) -> str:
    """The command that does what is left."""
    where = out.relative_to(Path.cwd()) if out.is_relative_to(Path.cwd()) else out
    words = ["python", "-m", "benchmarks.gpu_session"]
    words += ["--prebuilt"] * options.prebuilt + ["--rehearse"] * options.rehearse
    words += ["--resume", str(where)]
    words += [] if options.seconds == SECONDS else ["--seconds", f"{options.seconds:g}"]
    return shlex.join(words)


def default_folder() -> Path:
    name = output_of("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    slug = re.sub("[^a-z0-9]+", "-", name[0].lower()).strip("-") if name else "cpu-rehearsal"
    return ROOT / "benchmarks" / "results" / slug


def prepare_environment() -> dict[str, str]:
    """What all steps are to know; returns what ``session.json`` is to hold."""
    # The results change the working tree: what it was before is what is measured.
    identity, dirty = commit()
    if identity != "unknown":
        os.environ["FASTSN_COMMIT"] = identity + ("-dirty" if dirty == "true" else "")
    # nvcc and compute-sanitizer are often installed beside PATH.
    nvcc = find_tool("nvcc")
    if nvcc is not None:
        folders = [os.environ.get("PATH", ""), str(Path(nvcc).parent)]
        os.environ["PATH"] = os.pathsep.join(filter(None, folders))
    capability = capability_here()
    if capability is not None:  # for this GPU alone: that is faster to compile
        os.environ.setdefault("FASTSN_CUDA_ARCHITECTURES", capability)
    return {
        "commit": identity,
        "dirty": dirty,
        "python": sys.version.split()[0],
        "nvidia_smi": output_of("nvidia-smi"),
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_session",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="the folder of the results; default: that of --resume, or else "
        "benchmarks/results/<name of the GPU>, which is begun anew",
    )
    parser.add_argument(
        "--resume", type=Path, metavar="DIR", help="go on with the results that are in DIR"
    )
    parser.add_argument(
        "--prebuilt",
        action="store_true",
        help="use build/prebuilt/; build only if it cannot be used",
    )
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="of this call, all in all (%(default)g)"
    )
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, without a build")
    options = parser.parse_args(arguments)
    if options.resume is not None and not (options.resume / "session.json").exists():
        parser.error(f"--resume: no session.json in {options.resume}, so there is nothing to go on")
    return options


def begin(options: argparse.Namespace, start: float) -> Session:
    """The session, in its folder, which then has the results so far or none."""
    out = (options.out or options.resume or default_folder()).resolve()
    if options.resume is None:
        for name in ("measurements.csv", "weights.png", "training.png", "ncu.csv"):
            (out / name).unlink(missing_ok=True)
    elif options.resume.resolve() != out:
        out.mkdir(parents=True, exist_ok=True)
        for path in filter(Path.is_file, options.resume.iterdir()):
            shutil.copyfile(path, out / path.name)
    budget = options.seconds - REPORT - (time.monotonic() - start)
    return Session(out, budget, resumes=options.resume is not None)


def main(arguments: Sequence[str] | None = None) -> int:
    start = time.monotonic()
    options = parse(arguments)
    if not options.rehearse and not output_of("nvidia-smi", "-L").strip():
        print("make gpu needs a GPU, and nvidia-smi finds none here; nothing was run")
        return 2
    facts = prepare_environment()
    session = begin(options, start)
    session.facts.update(facts)
    target = REHEARSAL if options.rehearse else GPU
    steps = plan(target, session.out, options.prebuilt)
    # Known before anything runs: it holds if this call is killed.
    command = go_on(options, session.out)
    print(
        f"results: {session.out}\nif this call is cut off, the next command is: {command}",
        flush=True,
    )

    def ended(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, ended)
    try:
        can_run = carry_out(session, steps)
    finally:
        signal.signal(signal.SIGTERM, before)
    if not can_run:
        return 2
    summary, is_drawn = report(session.out, "none" if options.rehearse else target.own)
    lines = ["", *map(str, in_order(session, steps)), "", *summary]
    session.facts["summary"] = lines
    session.save()
    left = left_in(session, steps)
    failed = failed_in(session, steps) + ["report"] * (not is_drawn)
    print("\n".join(lines))
    print(f"\n{time.monotonic() - start:.0f} s; results in {session.out}")
    if failed:
        print(f"FAILED: {', '.join(failed)}")
    if left:
        print(f"left: {', '.join(step.name for step in left)}\nthe next command: {command}")
    if not failed and not left:
        print("everything passed")
    return 1 if failed else 3 if left else 0


def in_order(session: Session, steps: Plan) -> list[Outcome]:
    """What became of every step of the plan."""
    names = [steps.extension.name, steps.info.name]
    names += [step.name for stage in steps.stages for step in stage]
    outcomes = session.outcomes
    return [outcomes.get(name, Outcome(name, CUT)) for name in dict.fromkeys([*outcomes, *names])]


if __name__ == "__main__":
    sys.exit(main())
