"""From the JSON of a benchmark run: a table in the terminal, CSV files and a chart.

``python -m benchmarks.report run.json`` writes ``weights.csv``, ``training.csv`` and ``chart.png``
into ``benchmarks/results/cpu-<cores>-threads``, or where ``--out`` says. ``--markdown`` prints the
short tables of the README instead of the long ones.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]

COLORS = {
    "torch": "dimgray",
    "torch hook": "darkgray",
    "torch.compile": "tab:orange",
    "fastsn ungrouped": "lightskyblue",
    "fastsn": "tab:blue",
    "copy": "tab:green",
}


def provenance(run: Row) -> Row:
    """What every number carries: the commit, the machine and the versions behind it."""
    machine, commit = run["machine_info"], run["commit_info"]
    return {
        "commit": commit["id"][:12] + ("-dirty" if commit["dirty"] else ""),
        "date": run["datetime"][:10],
        "device": machine["cpu"].get("brand_raw", machine["machine"]),
        "cores": machine["cores"],
        "fastsn": machine["fastsn"],
        "torch": machine["torch"],
        "python": machine["python_version"],
    }


def caption(origin: Row) -> str:
    """:func:`provenance` in one line."""
    return (
        "{device}, {cores} cores; torch {torch}, Python {python}, fastsn {fastsn}; "
        "commit {commit}, {date}"
    ).format(**origin)


def contest_of(row: Row) -> tuple[str, str, int]:
    """What is the same for all variants that were sampled side by side."""
    return row["network"], row["mode"], row["threads"]


def contests(run: Row) -> list[dict[str, Row]]:
    """What the benchmarks recorded, by variant: one dict for all that were sampled side by side."""
    records = [
        benchmark["extra_info"] | {"samples": benchmark["stats"]["data"]}
        for benchmark in run["benchmarks"]
    ]
    groups = groupby(records, contest_of)
    return [{record["variant"]: record for record in group} for _, group in groups]


def percentiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    p20, _, _, p80 = statistics.quantiles(samples, n=5, method="inclusive")
    return p20, statistics.median(samples), p80


def weight_rows(contest: dict[str, Row]) -> list[Row]:
    """Times of ``bench_weights.py``, their ratios to torch and to a copy, and GB/s."""
    torch_p50 = statistics.median(contest["torch"]["samples"])
    copy_p50 = statistics.median(contest["copy"]["samples"])
    rows = []
    for variant, record in contest.items():
        p20, p50, p80 = percentiles(record["samples"])
        rows.append(
            {
                "network": record["network"],
                "mode": record["mode"],
                "threads": record["threads"],
                "variant": variant,
                "rounds": len(record["samples"]),
                "p20_us": 1e6 * p20,
                "p50_us": 1e6 * p50,
                "p80_us": 1e6 * p80,
                "faster_than_torch": torch_p50 / p50,
                "times_a_copy": p50 / copy_p50,
                "floor_bytes": record["floor_bytes"],
                "gb_per_s": record["floor_bytes"] / p50 / 1e9,
                "error": record["error"],
            }
        )
    return rows


def training_rows(contest: dict[str, Row]) -> list[Row]:
    """Times of ``bench_training.py``, and the overhead over no normalization.

    The overhead is taken between steps of the same round, then its percentiles over the rounds.
    """
    plain = contest["none"]["samples"]
    rows = []
    for variant, record in contest.items():
        p20, p50, p80 = percentiles(record["samples"])
        differences = [step - base for step, base in zip(record["samples"], plain, strict=True)]
        over20, over50, over80 = percentiles(differences)
        rows.append(
            {
                "network": record["network"],
                "mode": record["mode"],
                "threads": record["threads"],
                "variant": variant,
                "rounds": len(record["samples"]),
                "p20_ms": 1e3 * p20,
                "p50_ms": 1e3 * p50,
                "p80_ms": 1e3 * p80,
                "overhead_p20_ms": 1e3 * over20,
                "overhead_p50_ms": 1e3 * over50,
                "overhead_p80_ms": 1e3 * over80,
                "overhead_percent": 100 * over50 / statistics.median(plain),
                "error": record["error"],
            }
        )
    return rows


def tables(run: Row) -> dict[str, list[Row]]:
    """The rows of each table of the report: "weights" and "training", whichever were measured."""
    weights, training = [], []
    for contest in contests(run):
        if "copy" in contest:
            weights += weight_rows(contest)
        else:
            training += training_rows(contest)
    return {name: rows for name, rows in (("weights", weights), ("training", training)) if rows}


def shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_csv(path: Path, rows: Sequence[Row], origin: Row) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*rows[0], *origin], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: shown(value) for name, value in (row | origin).items()})


def print_tables(console: Console, rows: Sequence[Row]) -> None:
    """One table for each contest, with the columns of the CSV."""
    for (network, mode, threads), contest in groupby(rows, contest_of):
        lines = [
            {name: row[name] for name in row if name not in ("network", "mode", "threads")}
            for row in contest
        ]
        table = Table(title=f"{network}, {mode}, threads: {threads}", box=SIMPLE_HEAD)
        for name in lines[0]:
            word = name == "variant"
            table.add_column(
                name.replace("_", " "), justify="left" if word else "right", no_wrap=word
            )
        for line in lines:
            table.add_row(*map(shown, line.values()))
        console.print(table)


def weights_cell(row: Row) -> str:
    microseconds = row["p50_us"]
    time = f"{microseconds:.0f} µs" if microseconds < 1e3 else f"{microseconds / 1e3:.1f} ms"
    return f"{time} ({row['faster_than_torch']:.1f}x)"


def training_cell(row: Row) -> str:
    return f"{row['p50_ms']:.0f} ms ({row['overhead_p50_ms']:+.1f} ms)"


#: Of each table: what a cell of its short form shows, in words and as text.
CELLS = {
    "weights": ("median time (times faster than torch's parametrization)", weights_cell),
    "training": ("median time (overhead over no normalization)", training_cell),
}


def markdown(rows: Sequence[Row], legend: str, cell: Callable[[Row], str]) -> str:
    """The short form of a table: a line for each contest, a column for each variant."""
    contests = [list(group) for _, group in groupby(rows, contest_of)]
    head = ["network", "mode", "threads", *(row["variant"] for row in contests[0])]
    lines = [head, ["---"] * len(head)]
    lines += [[*map(str, contest_of(group[0])), *map(cell, group)] for group in contests]
    return "\n".join([f"Each cell: {legend}.", "", *(f"| {' | '.join(line)} |" for line in lines)])


def draw_weights(axes: Axes, rows: Sequence[Row]) -> None:
    """Bars that rise above 1x where faster than torch's parametrization, on a log scale."""
    networks = list(dict.fromkeys(row["network"] for row in rows))
    variants = [variant for variant in COLORS if variant != "torch"]
    width = 0.8 / len(variants)
    for i, variant in enumerate(variants):
        bars = [row for row in rows if row["variant"] == variant]
        places = [networks.index(row["network"]) + width * (i + 0.5) - 0.4 for row in bars]
        speeds = [row["faster_than_torch"] for row in bars]
        heights = [speed - 1 for speed in speeds]
        drawn = axes.bar(places, heights, width, bottom=1, color=COLORS[variant], label=variant)
        axes.bar_label(drawn, [f"{speed:.2g}" for speed in speeds], fontsize=7)
    axes.axhline(1, color=COLORS["torch"], linewidth=1)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}x")
    axes.set_xticks(range(len(networks)), networks, fontsize=8)
    axes.margins(y=0.15)


def draw_training(axes: Axes, rows: Sequence[Row]) -> None:
    """Bars of the overhead over no normalization; whiskers from its 20th to its 80th percentile."""
    normalized = [row for row in rows if row["variant"] != "none"]
    for place, row in enumerate(normalized):
        p20, p50, p80 = (row[f"overhead_{percentile}_ms"] for percentile in ("p20", "p50", "p80"))
        axes.bar(place, p50, 0.3, color=COLORS[row["variant"]])
        axes.errorbar(place, p50, yerr=[[p50 - p20], [p80 - p50]], color="black", capsize=4)
        axes.annotate(f"{p50:.1f} ms", (place + 0.17, p50), va="center", fontsize=8)
    axes.axhline(0, color="black", linewidth=1)
    axes.set_xticks(range(len(normalized)), [row["variant"] for row in normalized])
    axes.set_xlim(-1, len(normalized))


def draw_chart(path: Path, tables: Mapping[str, Sequence[Row]], origin: Row) -> None:
    """A panel for each mode (rows) and number of threads (columns)."""
    draw = {
        "weights": (draw_weights, "times faster than torch"),
        "training": (draw_training, "overhead over none (ms)"),
    }
    modes = [
        (mode, rows, *draw[name])
        for name, rows in tables.items()
        for mode in dict.fromkeys(row["mode"] for row in rows)
    ]
    threads = sorted({row["threads"] for rows in tables.values() for row in rows})
    size = (7 * len(threads), 2.8 * len(modes) + 1)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(modes), len(threads), squeeze=False, sharey="row")
    for i, (mode, rows, draw_panel, label) in enumerate(modes):
        for j, count in enumerate(threads):
            axes = panels[i, j]
            draw_panel(axes, [r for r in rows if (r["mode"], r["threads"]) == (mode, count)])
            axes.set_title(f"{mode}, threads: {count}", fontsize=10)
        panels[i, 0].set_ylabel(label)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    title = "Computing all normalized weights of a network: speed over torch's parametrization (1x)"
    figure.legend(handles, labels, title=title, loc="outside upper center", ncols=len(COLORS))
    figure.supxlabel(caption(origin), fontsize=8)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path, help="what --benchmark-json wrote")
    parser.add_argument("--out", type=Path, help="where the CSV files and the chart go")
    parser.add_argument("--markdown", action="store_true", help="print the tables of the README")
    options = parser.parse_args(arguments)

    run = json.loads(options.json.read_text())
    origin = provenance(run)
    out = options.out or Path(__file__).parent / "results" / f"cpu-{origin['cores']}-threads"
    out.mkdir(parents=True, exist_ok=True)
    measured = tables(run)
    for name, rows in measured.items():
        write_csv(out / f"{name}.csv", rows, origin)
    draw_chart(out / "chart.png", measured, origin)

    console = Console(width=120)
    for name, rows in measured.items():
        if options.markdown:
            print(markdown(rows, *CELLS[name]), end="\n\n")
        else:
            print_tables(console, rows)
    print(caption(origin))


if __name__ == "__main__":
    main()
