"""The pictures and the table of ``benchmarks/msn_study.py``, which defines what they show."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from benchmarks.charts import MSN_COLORS, Row

CNN = "3-layer CNN"
NETWORKS = (CNN, "VGG7")
VARIANTS = ("none", "bn", "sn", "msn")
#: The accuracy whose first epoch the table tells.
MARK = 0.9


class Line(NamedTuple):
    """A curve over the epochs: mean, least and largest of the seeds."""

    epochs: list[int]
    mean: list[float]
    least: list[float]
    largest: list[float]


def line(rows: Sequence[Row], column: str) -> Line:
    by_epoch: dict[int, list[float]] = {}
    for row in rows:
        by_epoch.setdefault(row["epoch"], []).append(row[column])
    values = list(by_epoch.values())
    return Line(
        list(by_epoch), [*map(statistics.fmean, values)], [*map(min, values)], [*map(max, values)]
    )


def select(rows: Sequence[Row], **wanted: object) -> list[Row]:
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def plot(
    path: Path, network: str, epochs: Sequence[Row], layers: Sequence[Row], caption: str
) -> None:
    """Accuracy and loss of the variants; below, for each variant, drift and sparsity by layer."""
    figure = Figure(figsize=(13, 11), layout="constrained")
    panels = figure.subplot_mosaic("AABB;abcd;efgh")
    for panel, column in (("A", "accuracy"), ("B", "train_loss")):
        for variant in VARIANTS:
            rows = select(epochs, network=network, variant=variant)
            draw(panels[panel], rows, column, variant, MSN_COLORS[variant])
    panels["A"].set(title="accuracy on held-out images", xlabel="epoch")
    panels["B"].set(title="training loss", xlabel="epoch", yscale="log")
    panels["A"].legend(loc="lower right")
    for places, column in (("abcd", "drift"), ("efgh", "sparsity")):
        for place, variant in zip(places, VARIANTS, strict=True):
            rows = select(layers, network=network, variant=variant)
            rows = [row for row in rows if column in row]
            for i, layer in enumerate(dict.fromkeys(row["layer"] for row in rows)):
                draw(panels[place], select(rows, layer=layer), column, layer, f"C{i}")
            panels[place].sharey(panels[places[0]])
            panels[place].set(title=f"{variant}: {column}", xlabel="epoch")
    panels["a"].set_yscale("log")
    panels["a"].set_ylabel("drift of the means before activations")
    panels["e"].set_ylim(-0.02, max(0.2, panels["e"].get_ylim()[1]))
    panels["e"].set_ylabel("share of exact zeros in weights' gradients")
    handles, labels = panels["e"].get_legend_handles_labels()
    figure.legend(handles, labels, title="layer", loc="outside right lower")
    for axes in panels.values():
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.supxlabel(caption, fontsize=8)
    figure.suptitle(f"{network}: mean of the seeds, and their range")
    figure.savefig(path, dpi=110)


def draw(axes: Axes, rows: Sequence[Row], column: str, label: str, color: str) -> None:
    curve = line(rows, column)
    axes.plot(curve.epochs, curve.mean, label=label, color=color)
    axes.fill_between(curve.epochs, curve.least, curve.largest, color=color, alpha=0.2, linewidth=0)


def relative_drift(row: Row) -> float:
    """In standard deviations; a layer that gives the same for every image has none."""
    return row["drift"] / row["std"] if row["std"] else math.nan


def summary(epochs: Sequence[Row], layers: Sequence[Row]) -> list[Row]:
    """A row for each network and variant, of the last epoch unless said otherwise."""
    rows = []
    last = epochs[-1]["epoch"]
    for network, variant in product(NETWORKS, VARIANTS):
        mine = select(epochs, network=network, variant=variant)
        final = [row["accuracy"] for row in select(mine, epoch=last)]
        inner = select(layers, network=network, variant=variant, epoch=last)
        moved = [row for row in inner if "drift" in row]
        curve = line(mine, "accuracy")
        reached = [e for e, value in zip(curve.epochs, curve.mean, strict=True) if value >= MARK]
        rows.append(
            {
                "network": network,
                "variant": variant,
                "accuracy": statistics.fmean(final),
                "least": min(final),
                "largest": max(final),
                f"first epoch >= {MARK:.0%}": reached[0] if reached else "-",
                "train loss": line(mine, "train_loss").mean[-1],
                "drift": statistics.fmean(row["drift"] for row in moved),
                "drift / std": statistics.fmean(map(relative_drift, moved)),
                "sparsity": statistics.fmean(row["sparsity"] for row in inner),
            }
        )
    return rows


def as_table(rows: Sequence[Row]) -> Table:
    table = Table(padding=(0, 1))
    for column in rows[0]:
        table.add_column(column, justify="left" if column in ("network", "variant") else "right")
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    return table
