"""From the CSV of the GPU benchmarks: the project's targets, met or missed, and two charts.

``python -m benchmarks.gpu_report DIR`` prints the former and draws the latter.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, str]

COLORS = {
    "torch hook": "darkgray",
    "torch.compile": "tab:orange",
    "fastsn cuda": "tab:blue",
    "fastsn triton": "tab:purple",
    "fastsn cpp": "tab:blue",
    "fastsn reference": "lightskyblue",
    "torch": "dimgray",
    "fastsn": "tab:blue",
}


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def find(rows: Sequence[Row], **wanted: str) -> Row | None:
    """The last row with these values that holds a measurement."""
    found = [
        row
        for row in rows
        if row["metric"] != "failed" and all(row[key] == value for key, value in wanted.items())
    ]
    return found[-1] if found else None


def number(rows: Sequence[Row], column: str, **wanted: str) -> float | None:
    row = find(rows, **wanted)
    return float(row[column]) if row is not None and row[column] else None


@dataclass(frozen=True)
class Target:
    """A figure to reach. ``limit`` is the least that meets it, or the most if ``most``."""

    text: str
    limit: float
    most: bool
    unit: str
    value: Callable[[Sequence[Row]], float | None]

    def line(self, rows: Sequence[Row]) -> str:
        sign = "<=" if self.most else ">="
        goal = f"{sign} {self.limit:g}{self.unit}"
        value = self.value(rows)
        if value is None:
            return f"{self.text:<58} {goal:>10} {'-':>10}  not measured"
        is_met = value <= self.limit if self.most else value >= self.limit
        got = f"{value:.3g}{self.unit}"
        return f"{self.text:<58} {goal:>10} {got:>10}  {'met' if is_met else 'MISSED'}"


def ratio(
    network: str, mode: str, metric: str, column: str, variant: str, part: str = "weights"
) -> Callable[[Sequence[Row]], float | None]:
    return lambda rows: number(
        rows, column, part=part, network=network, mode=mode, variant=variant, metric=metric
    )


def targets(backend: str, trainings: Sequence[str], precisions: Sequence[str]) -> list[Target]:
    """All targets, for fastsn by this back-end."""
    own = f"fastsn {backend}"
    small, large = "SNDCGAN D", "BigGAN-128 D"
    found = []
    for mode, least in (("forward", 30), ("forward + backward", 10)):
        value = ratio(small, mode, "wall", "faster_than_baseline", own)
        found.append(Target(f"SNDCGAN, {mode}, eager wall, vs torch", least, False, "x", value))
    for mode in ("forward", "forward + backward"):
        value = ratio(small, mode, "graph", "faster_than_baseline", own)
        found.append(Target(f"SNDCGAN, {mode}, both in CUDA graphs", 10, False, "x", value))
    found += [
        Target(
            "BigGAN-128, forward, device time over one read + one write",
            *(1.6, True, " floor"),
            ratio(large, "forward", "device", "times_floor", own),
        ),
        Target(
            "BigGAN-128, forward, device time, vs torch",
            *(1.6, False, "x"),
            ratio(large, "forward", "device", "faster_than_baseline", own),
        ),
        Target(
            "BigGAN-128, backward, device time, vs torch",
            *(4, False, "x"),
            ratio(large, "backward", "device", "faster_than_baseline", own),
        ),
    ]
    for variant, words in (("operators", "the operators"), (own, "fastsn.refresh")):
        value = ratio("SN-ResNet D", "forward", "host", "median_us", variant)
        found.append(Target(f"host time, 11 layers, forward: {words}", 20, True, " us", value))
    for network in (small, large):
        value = ratio(
            network, "forward", "device", "faster_than_baseline", "fastsn bf16", "autocast"
        )
        found.append(
            Target(f"{network}, bf16 under autocast vs fp32, device", 1, False, "x", value)
        )
    for training in trainings:
        for precision in precisions:
            for way in ("eager", "captured"):
                mode = f"{precision}, {way}"
                value = ratio(training, mode, "wall", "overhead_percent", "fastsn", "training")
                found.append(Target(f"{training} step, {mode}: overhead", 5, True, " %", value))
    for precision in precisions:
        for way in ("eager", "captured"):
            mode = f"{precision}, {way}"
            value = faster_than_bn("VGG7", mode)
            found.append(Target(f"VGG7 step with MSN, {mode}, vs bn", 1.16, False, "x", value))
    return found


def faster_than_bn(network: str, mode: str) -> Callable[[Sequence[Row]], float | None]:
    """The time of a step with batch norm over that with MSN."""

    def value(rows: Sequence[Row]) -> float | None:
        bn, msn = (
            ratio(network, mode, "wall", "median_us", variant, "msn")(rows)
            for variant in ("bn", "msn")
        )
        return None if bn is None or msn is None else bn / msn

    return value


def launches(rows: Sequence[Row]) -> list[str]:
    """A line for each count of launches."""
    return [
        f"launches, {row['network']}, {row['mode']}, {row['variant']}: {float(row['value']):.0f}"
        for row in rows
        if row["part"] == "launches" and row["value"]
    ]


def kernels(rows: Sequence[Row]) -> list[str]:
    """A line for each mode of each network whose kernels were timed, and for the empty launch."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row["part"] in ("kernels", "overlap", "empty") and row["median_us"]:
            words = (row["part"], row["network"], row["mode"], row["variant"])
            name = ", ".join(filter(None, words))
            speed = f" ({float(row['gb_per_second']):.0f} GB/s)" if row["gb_per_second"] else ""
            kernel = row["note"] or row["metric"]
            found.setdefault(name, []).append(f"{kernel} {float(row['median_us']):.3g} us{speed}")
    return [f"{name}: {', '.join(values)}" for name, values in found.items()]


def failures(rows: Sequence[Row]) -> list[str]:
    """In words, what has failed and was not measured since."""
    places = ("part", "network", "mode", "variant")
    last = {tuple(row[place] for place in places): row for row in rows}
    failed = [row for row in last.values() if row["metric"] == "failed"]
    return [", ".join(row[word] for word in (*places, "note") if row[word]) for row in failed]


def summary(rows: Sequence[Row], of: Sequence[Target], failed: Sequence[str]) -> str:
    """The short table: what was measured, the targets, and what failed."""
    bandwidth = number(rows, "gb_per_second", part="copy")
    lines = [caption(rows)]
    if bandwidth is not None:
        lines.append(f"copy, bytes read and written: {bandwidth:.0f} GB/s")
    lines += [target.line(rows) for target in of]
    lines += [*kernels(rows), *launches(rows)]
    lines += [f"FAILED {failure}" for failure in failed]
    return "\n".join(lines)


def caption(rows: Sequence[Row]) -> str:
    """Where the numbers come from, in one line."""
    if not rows:
        return "nothing was measured"
    row = rows[-1]
    dirty = " (with changes)" if row["dirty"] == "true" else ""
    return (
        f"{row['gpu']}, driver {row['driver']}; torch {row['torch']}, triton {row['triton']}, "
        f"nvcc {row['nvcc']}; commit {row['commit']}{dirty}, {row['date']}"
    )


def _bars(
    axes: Axes, groups: Sequence[str], values: Mapping[str, Mapping[str, float]], base: float
) -> None:
    """A group of bars for each of ``groups``, one of them for each name of ``values``."""
    width = 0.8 / max(1, len(values))
    for i, (name, heights) in enumerate(values.items()):
        places = [groups.index(g) + width * (i + 0.5) - 0.4 for g in heights]
        drawn = axes.bar(
            places,
            [h - base for h in heights.values()],
            width,
            bottom=base,
            label=name,
            color=COLORS.get(name),
        )
        axes.bar_label(drawn, [f"{h:.2g}" for h in heights.values()], fontsize=7)
    axes.axhline(base, color="black", linewidth=0.8)
    axes.set_xticks(range(len(groups)), groups, fontsize=8)
    axes.margins(y=0.15)


def _select(
    rows: Sequence[Row], column: str, group: str, **wanted: str
) -> dict[str, dict[str, float]]:
    """``{variant: {group: value}}`` of the rows that match."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row[column] and all(row[key] == value for key, value in wanted.items()):
            found.setdefault(row["variant"], {})[row[group]] = float(row[column])
    return found


def draw_weights(path: Path, rows: Sequence[Row]) -> None:
    """Speed over torch (eager wall time, and both captured), and device time over the floor."""
    panels = [
        ("wall", "faster_than_baseline", "eager wall time: times faster than torch"),
        ("graph", "faster_than_baseline", "CUDA graph replay: times faster than torch's"),
        ("device", "times_floor", "device time over the bytes floor"),
    ]
    from matplotlib.figure import Figure

    modes = ("forward", "forward + backward")
    figure = Figure(figsize=(15, 11), layout="constrained")
    grid = figure.subplots(len(panels), len(modes), squeeze=False)
    for i, (metric, column, title) in enumerate(panels):
        for j, mode in enumerate(modes):
            axes = grid[i, j]
            # Where a variant is in both, that which was measured beside all others.
            values = {
                name: heights
                for part in ("backends", "weights")
                for name, heights in _select(
                    rows, column, "network", part=part, mode=mode, metric=metric
                ).items()
            }
            values = {
                name: heights
                for name, heights in values.items()
                if name != "operators" and (name != "torch" or column == "times_floor")
            }
            groups = list(dict.fromkeys(g for heights in values.values() for g in heights))
            if groups:
                _bars(axes, groups, values, 1.0)
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter("{x:g}x")
                axes.yaxis.set_minor_formatter("")
            axes.set_title(f"{mode}: {title}", fontsize=10)
    handles, labels = grid[2, 0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=len(handles))
    figure.supxlabel(caption(rows), fontsize=8)
    figure.savefig(path, dpi=110)


def draw_training(path: Path, rows: Sequence[Row]) -> None:
    """Overhead of a whole training step over the same step with no normalization."""
    from matplotlib.figure import Figure

    training = [row for row in rows if row["part"] == "training" and row["variant"] != "none"]
    modes = list(dict.fromkeys(row["mode"] for row in training))
    figure = Figure(figsize=(13, 8), layout="constrained")
    grid = figure.subplots(2, max(1, (len(modes) + 1) // 2), squeeze=False)
    for axes, mode in zip(grid.T.flat, modes, strict=False):
        values = _select(training, "overhead_percent", "network", mode=mode, metric="wall")
        groups = list(dict.fromkeys(g for heights in values.values() for g in heights))
        if groups:
            _bars(axes, groups, values, 0.0)
        axes.axhline(5, color="tab:green", linewidth=0.8, linestyle="--")
        axes.set_title(mode, fontsize=10)
        axes.set_ylabel("overhead over none (%)", fontsize=8)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    if handles:
        title = "A whole training step, discriminator and generator; dashed: the target"
        figure.legend(handles, labels, title=title, loc="outside upper center", ncols=2)
    figure.supxlabel(caption(rows), fontsize=8)
    figure.savefig(path, dpi=110)


CHARTS = {"weights.png": draw_weights, "training.png": draw_training}


def report(out: Path, of: Sequence[Target]) -> tuple[str, list[str]]:
    """Draw the charts; return the summary of what the CSV file holds by now, and what could not be
    drawn."""
    rows = read(out / "measurements.csv")
    missing = []
    for name, draw in CHARTS.items():
        try:
            draw(out / name, rows)
        except Exception as error:  # the numbers are there without the picture
            missing.append(f"{name}: {type(error).__name__}: {error}")
    return summary(rows, of, [*failures(rows), *missing]), missing


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report", description=__doc__)
    parser.add_argument("out", type=Path, help="the folder of the results")
    parser.add_argument("--backend", default="cuda", help="whose targets; none: no targets")
    options = parser.parse_args(arguments)

    of = []
    if options.backend != "none":
        from benchmarks.gpu_training import JOBS, PRECISIONS

        of = targets(options.backend, list(JOBS), list(PRECISIONS))
    text, missing = report(options.out, of)
    print(text)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
