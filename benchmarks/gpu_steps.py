"""The steps of a GPU session, in the order of what they are worth, and how each is judged."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.gpu_runner import Step, status_judge
from benchmarks.gpu_tools import find_tool


@dataclass(frozen=True)
class Target:
    """What the session is about.

    Attributes:
        own: the back-end that must run; nothing is done without it.
        other: the one that comes after it.
        small, large: the networks that are measured first.
        tests: those of a back-end, what may go wrong in silence first.
        shares: processes that run them side by side.
        selected, slow: ``-k`` for the tests, and for those that torch.compile makes slow.
        environment: of the tests.
        tools: of compute-sanitizer.
        patience: by how much the limits of the steps are longer.
    """

    own: str = "cuda"
    other: str = "triton"
    is_gpu: bool = True
    small: str = "SNDCGAN D"
    large: str = "BigGAN-128 D"
    training: tuple[str, ...] = (
        *("training SNDCGAN, fp32", "msn VGG7, fp32"),
        *("training SNDCGAN, bf16 autocast", "msn VGG7, bf16 autocast"),
        *("training BigGAN-128 D, fp32", "training BigGAN-128 D, bf16 autocast"),
    )
    rest: tuple[str, ...] = (
        *("weights", "training", "autocast", "bsn", "backends", "launches", "compiled"),
    )
    tests: tuple[str, ...] = tuple(
        f"tests/gpu/test_{part}.py" for part in ("operators", "streams", "means", "state", "models")
    )
    shares: int = 4
    selected: str = "not compiled and not reduce_overhead"
    slow: str = "compiled or reduce_overhead"
    environment: dict[str, str] = field(default_factory=dict)
    tools: tuple[str, ...] = ("memcheck", "racecheck", "initcheck", "synccheck")
    patience: float = 1.0


GPU = Target()
#: The CPU in its place, on tiny networks: proves that the session runs.
REHEARSAL = Target(
    own="cpp",
    other="reference",
    is_gpu=False,
    small="small SNDCGAN D",
    large="small BigGAN D",
    training=("training small SNDCGAN, fp32", "msn small VGG7, fp32"),
    rest=("autocast small SNDCGAN D", "bsn small SNDCGAN D", "launches small SNDCGAN D"),
    tests=("tests/gpu/test_models.py", "tests/gpu/test_state.py"),
    shares=1,
    selected="two_forwards or once_per_step",
    slow="function_transforms",
    environment={"FASTSN_TEST_DEVICE": "cpu"},
    tools=("memcheck", "racecheck"),
    patience=5.0,
)


@dataclass(frozen=True)
class Plan:
    """What is done: first of all there must be an extension, and it must be able to run.

    Each of the stages is done after the other, its steps side by side.
    """

    extension: Step
    build: Step
    info: Step
    stages: Sequence[Sequence[Step]]


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def plan(target: Target, out: Path, prebuilt: bool) -> Plan:
    build = Step(
        "build",
        python("setup.py", "build_ext", "--inplace", "--force"),
        240,
        environment={"FASTSN_CUDA": "1", "MAX_JOBS": str(os.cpu_count() or 1)},
        always=True,
    )
    carried = Step(
        "prebuilt",
        python("-m", "benchmarks.gpu_prebuild", "install" if target.is_gpu else "check"),
        60,
        always=True,
    )
    info = Step(
        "info",
        python("-m", "fastsn", "info"),
        60,
        judge=lambda status, output: judge_info(status, output, target.own),
        always=True,
    )
    small, large = target.small, target.large
    pdl = {"FASTSN_CUDA_PDL": "1"}
    overlap = [f"overlap {small}", f"overlap {large}"]

    def timings(name: str, seconds: float, *tasks: str, **environment: str) -> list[Step]:
        return [benchmark_step(target, out, name, seconds, tasks, environment)]

    stages = [
        test_steps(target, target.own, 170),
        timings("timings, spectral norm", 90, f"weights {small}", f"weights {large}"),
        timings("timings, training", 110, *target.training),
        timings("timings, kernels", 50, f"kernels {small}", f"kernels {large}"),
        [counters_step(target, out)],
        timings("timings, launches apart", 50, "empty", *overlap),
        timings("timings, launches overlapped", 50, *overlap, **pdl),
        test_steps(target, target.other, 150),
        timings("timings, back-ends", 90, f"backends {small}", f"backends {large}"),
        [sanitizer_step(target, tool) for tool in target.tools],
        timings("timings, the rest", 240, *target.rest),
        [test_step(target, "tests, compiled", target.own, 150, target.slow)],
    ]
    stages = [
        [replace(step, seconds=target.patience * step.seconds) for step in stage]
        for stage in stages
    ]
    return Plan(carried if prebuilt or not target.is_gpu else build, build, info, stages)


def test_steps(target: Target, backend: str, seconds: float) -> list[Step]:
    """All tests but the slow ones, in shares, side by side: nothing is timed."""
    return [
        test_step(
            target,
            f"tests, {backend}, {i} of {target.shares}",
            backend,
            seconds,
            target.selected,
            *("--share", f"{i}/{target.shares}"),
        )
        for i in range(1, target.shares + 1)
    ]


def test_step(
    target: Target, name: str, backend: str, seconds: float, selected: str, *arguments: str
) -> Step:
    options = ["-v", "--durations=15", "-p", "no:cacheprovider", "--color=no"]
    return Step(
        name,
        python(
            *("-m", "pytest", "-p", "benchmarks.gpu_pytest", *target.tests, *options),
            *("-k", selected, *arguments),
        ),
        seconds,
        least=30,
        environment={"FASTSN_TEST_BACKENDS": backend, **target.environment},
        has_items=True,
    )


def benchmark_step(
    target: Target,
    out: Path,
    name: str,
    seconds: float,
    tasks: Sequence[str],
    environment: dict[str, str],
) -> Step:
    options = [] if target.is_gpu else ["--quick", "--device", "cpu"]
    command = python("-m", "benchmarks.gpu", "--out", str(out), "--append", *options)
    return Step(
        name,
        [*command, "--only", *tasks],
        seconds,
        least=30,
        environment=environment,
        has_items=True,
    )


def counters_step(target: Target, out: Path) -> Step:
    """The hardware's counters; without a GPU, the program that they are of."""
    network = target.small
    command = (
        python("-m", "benchmarks.gpu_ncu", network, str(out / "ncu.csv"))
        if target.is_gpu
        else python("-m", "benchmarks.gpu_kernels", network, "--device", "cpu")
    )
    return Step("counters by ncu", command, 120, least=30)


def sanitizer_step(target: Target, tool: str) -> Step:
    program = find_tool("compute-sanitizer") or "compute-sanitizer"
    # What torch's libraries ask of the driver, and are refused, is not what is looked for.
    options = ["--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
    options += ["--report-api-errors", "no"] if tool == "memcheck" else []
    # The two that follow shared memory are slow.
    quick = ["--quick"] if tool in ("racecheck", "synccheck") or not target.is_gpu else []
    command = python("tests/gpu_sanitize.py", *quick)
    return Step(
        f"compute-sanitizer {tool}",
        [program, *options, *command]
        if target.is_gpu
        else [*command, "--device", "cpu", "--backend", target.own],
        150,
        least=60,
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        judge=judge_sanitizer if target.is_gpu else status_judge,
    )


def judge_info(status: int, output: str, backend: str) -> str | None:
    """The back-end must be able to run: everything after this is about it."""
    if status:
        return f"exit status {status}"
    for line in output.splitlines():
        if line.split()[:1] == [backend]:
            return " ".join(line.split())[:200] if "cannot run" in line else None
    return f"it says nothing of the back-end {backend}"


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
