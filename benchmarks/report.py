"""From the JSON of a benchmark run: a table in the terminal, CSV files and a chart.

``python -m benchmarks.report run.json`` writes what was measured into
``benchmarks/results/cpu-<cores>-threads``, or where ``--out`` says: ``weights.csv``,
``training.csv`` and ``chart.png``, ``msn.csv`` and ``msn.png``. ``--markdown`` prints the short
tables of the README instead of the long ones.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.charts import CHARTS, Row, draw_chart

PARAMETERS = "trainable parameters"


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


def ratios(over: Row, under: Row) -> list[float]:
    """Of the samples of two variants, round by round."""
    return [a / b for a, b in zip(over["samples"], under["samples"], strict=True)]


def msn_rows(contest: dict[str, Row]) -> list[Row]:
    """Times of ``bench_msn.py``, and their ratios to batch norm and to bare convolutions.

    The ratios are taken between steps of the same round, then their percentiles over the rounds.
    """
    rows = []
    for variant, record in contest.items():
        p20, p50, p80 = percentiles(record["samples"])
        faster = ratios(contest["bn"], record)
        times20, times50, times80 = percentiles(ratios(record, contest["none"]))
        rows.append(
            {
                "network": record["network"],
                "mode": record["mode"],
                "threads": record["threads"],
                "variant": variant,
                "parameters": record["parameters"],
                "rounds": len(record["samples"]),
                "p20_ms": 1e3 * p20,
                "p50_ms": 1e3 * p50,
                "p80_ms": 1e3 * p80,
                "faster_than_bn": statistics.median(faster),
                "times_bare_p20": times20,
                "times_bare_p50": times50,
                "times_bare_p80": times80,
                "error": record["error"],
            }
        )
    return rows


def tables(run: Row) -> dict[str, list[Row]]:
    """The rows of each table of the report: those of "weights", "training", "msn" measured."""
    found: dict[str, list[Row]] = {"weights": [], "training": [], "msn": []}
    for contest in contests(run):
        if "copy" in contest:
            found["weights"] += weight_rows(contest)
        elif "bn" in contest:
            found["msn"] += msn_rows(contest)
        else:
            found["training"] += training_rows(contest)
    return {name: rows for name, rows in found.items() if rows}


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


def msn_cell(row: Row) -> str:
    if row["mode"] == PARAMETERS:
        return str(row["parameters"])
    return f"{row['p50_ms']:.3g} ms ({row['faster_than_bn']:.2f}x, {row['times_bare_p50']:.2f})"


#: Of each table: what a cell of its short form shows, in words and as text.
CELLS = {
    "weights": ("median time (times faster than torch's parametrization)", weights_cell),
    "training": ("median time (overhead over no normalization)", training_cell),
    "msn": ("median time (times faster than bn, multiple of none's time)", msn_cell),
}


def with_parameters(rows: Sequence[Row]) -> list[Row]:
    """The rows, and before those of each network its numbers of trainable parameters."""
    result = []
    for _, network in groupby(rows, lambda row: row["network"]):
        contests = list(network)
        counts = {row["variant"]: row | {"mode": PARAMETERS, "threads": ""} for row in contests}
        result += [*counts.values(), *contests]
    return result


def markdown(rows: Sequence[Row], legend: str, cell: Callable[[Row], str]) -> str:
    """The short form of a table: a line for each contest, a column for each variant."""
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    head = ["network", "mode", "threads", *variants]
    lines = [head, ["---"] * len(head)]
    for contest, group in groupby(rows, contest_of):
        cells = {row["variant"]: cell(row) for row in group}
        lines.append([*map(str, contest), *(cells.get(variant, "") for variant in variants)])
    return "\n".join([f"Each cell: {legend}.", "", *(f"| {' | '.join(line)} |" for line in lines)])


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
    for file, chart in CHARTS.items():
        shown_there = {name: rows for name, rows in measured.items() if name in chart.tables}
        if shown_there:
            draw_chart(out / file, chart, shown_there, caption(origin))

    console = Console(width=140)
    for name, rows in measured.items():
        if options.markdown:
            short = with_parameters(rows) if name == "msn" else rows
            print(markdown(short, *CELLS[name]), end="\n\n")
        else:
            print_tables(console, rows)
    print(caption(origin))


if __name__ == "__main__":
    main()
