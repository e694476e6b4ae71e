"""The pictures of the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Row = dict[str, Any]

COLORS = {
    "torch": "dimgray",
    "torch hook": "darkgray",
    "torch.compile": "tab:orange",
    "fastsn ungrouped": "lightskyblue",
    "fastsn": "tab:blue",
    "copy": "tab:green",
}
MSN_COLORS = {
    "none": "dimgray",
    "bn": "tab:orange",
    "bn + conv bias": "navajowhite",
    "sn": "tab:green",
    "msn two-step": "lightskyblue",
    "msn": "tab:blue",
    "fold(msn)": "midnightblue",
}


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


def draw_msn(axes: Axes, rows: Sequence[Row]) -> None:
    """Bars from 1, the time of bare convolutions; whiskers from the 20th to the 80th percentile."""
    networks = list(dict.fromkeys(row["network"] for row in rows))
    variants = [variant for variant in MSN_COLORS if variant != "none"]
    width = 0.85 / len(variants)
    for i, variant in enumerate(variants):
        bars = [row for row in rows if row["variant"] == variant]
        places = [networks.index(row["network"]) + width * (i + 0.5) - 0.425 for row in bars]
        p20, p50, p80 = (
            np.array([row[f"times_bare_{percentile}"] for row in bars])
            for percentile in ("p20", "p50", "p80")
        )
        drawn = axes.bar(
            places, p50 - 1, width, bottom=1, color=MSN_COLORS[variant], label=variant,
            yerr=(p50 - p20, p80 - p50), error_kw={"elinewidth": 0.8},
        )  # fmt: skip
        axes.bar_label(drawn, [f"{times:.2f}" for times in p50], fontsize=7, padding=2)
    axes.axhline(1, color=MSN_COLORS["none"], linewidth=1)
    axes.set_xticks(range(len(networks)), networks, fontsize=8)
    axes.margins(y=0.15)


class Chart(NamedTuple):
    """The tables that a picture shows: of each, what draws a panel and the label of its axis."""

    title: str
    tables: dict[str, tuple[Callable[[Axes, Sequence[Row]], None], str]]


CHARTS = {
    "chart.png": Chart(
        "Computing all normalized weights of a network: speed over torch's parametrization (1x)",
        {
            "weights": (draw_weights, "times faster than torch"),
            "training": (draw_training, "overhead over none (ms)"),
        },
    ),
    "msn.png": Chart(
        "Networks with normalized convolutions: time as a multiple of bare convolutions' (1)",
        {"msn": (draw_msn, "multiple of none's time")},
    ),
}


def draw_chart(path: Path, chart: Chart, tables: Mapping[str, Sequence[Row]], caption: str) -> None:
    """A panel for each mode (rows) and number of threads (columns)."""
    modes = [
        (mode, rows, *chart.tables[name])
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
    labelled = [panel.get_legend_handles_labels() for panel in panels.flat]
    legend = {label: handle for pair in labelled for handle, label in zip(*pair, strict=True)}
    figure.legend(
        legend.values(), legend.keys(), title=chart.title, loc="outside upper center",
        ncols=min(len(legend), 4 * len(threads)),
    )  # fmt: skip
    figure.supxlabel(caption, fontsize=8)
    figure.savefig(path, dpi=120)
