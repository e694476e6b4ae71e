"""Train a small SN-GAN on handwritten digits, with torch's spectral norm and with fastsn's.

``python -m benchmarks.demo`` (or ``make demo``) trains the SNDCGAN networks of Miyato et al., 2018,
at a quarter of their width, on the 1797 digits that scikit-learn ships, enlarged from 8x8 to 16x16:

* ``torch SN``: ``torch.nn.utils.parametrizations.spectral_norm`` on every discriminator layer;
* ``fastsn SN``: the same network from the same seed after ``fastsn.accelerate``;
* ``fastsn BSN``, ``fastsn BSSN``: ``fastsn.apply(model, "bsn")``, scale 1 and ``BSSN_SCALE``.

The loss is the standard one, ``softplus(-D(x)) + softplus(D(G(z)))`` and ``softplus(-D(G(z)))``,
by Adam with betas 0.5 and 0.999, one discriminator step per generator step. Samples come from an
exponential moving average of the generator.

What the figures mean:

*difference*: the larger of the differences of both losses between ``torch SN`` and ``fastsn SN`` at
a step. Both compute the same formula and round differently, and GAN training amplifies any
difference. As a yardstick, ``torch SN`` is compared with itself after one weight of its first layer
has moved to the next representable number. The first steps are also trained in fp64, where the
amplification starts from nine digits further back.

*ms per step*: a whole training step.

*ms normalizing*: the normalized weights of one training step alone: all weights forward and
backward twice (the real and the fake batch of the discriminator's step), and forward once more with
frozen parameters (the generator's step).

Both are medians of times taken after the training, the variants in turn, so that all variants see
the same machine.

*Frechet*: the distance ``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`` between the means and
covariances of the digits and of as many samples, both in the first ``COMPONENTS`` principal
components of the digits. Lower is better.

*digit score*: ``exp(mean KL(p(class | sample) || p(class)))`` with the probabilities of a logistic
regression trained on the digits, from 1 (no digit is recognized, or always the same one) to 10.

The row ``digits`` is the yardstick of both: the distance between two halves of the digits, and the
score of the digits themselves.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from tqdm import tqdm

import fastsn
from benchmarks.harness import QUICK_PLAN, Plan, Work, measure
from benchmarks.networks import SNDCGANDiscriminator, SNDCGANGenerator, layers, normalize_with

#: Turns a plain discriminator into a normalized one, in place.
Normalize = Callable[[nn.Module], nn.Module]
#: Figures by variant and column of the table.
Rows = dict[str, dict[str, float]]

SIZE = 16
LATENT = 32
BATCH = 32
LEARNING_RATE = 1e-3
SEED = 0
#: A choice within the range that the authors of BSSN search (0.7 to 1.6), not a tuned value.
BSSN_SCALE = 1.2
#: Weight of the newest generator in the moving average that the samples are drawn from.
AVERAGE_RATE = 0.01
COMPONENTS = 20
SHOWN = 36
#: Steps that a loss is averaged over before it is drawn.
WINDOW = 25
DPI = 110
#: Equal losses have no place on a logarithmic axis; they are drawn here.
SMALLEST = 1e-16
#: The upper end of that axis, which leaves room for the legend.
ABOVE = 1e5
#: Columns of the table's text file.
COLUMNS = 100


@dataclass(frozen=True)
class Settings:
    width: float = 0.25
    steps: int = 1000
    #: The first steps: those whose largest difference is reported, those in fp64, and those of the
    #: yardstick.
    compared: int = 50
    fp64: int = 100
    yardstick: int = 150
    sigma_every: int = 10
    #: How times are measured.
    plan: Plan = Plan()


QUICK = Settings(
    width=1 / 16, steps=8, compared=3, fp64=3, yardstick=5, sigma_every=2, plan=QUICK_PLAN
)


def torch_sn(model: nn.Module) -> nn.Module:
    return normalize_with(model, parametrizations.spectral_norm)


def nudged_torch_sn(model: nn.Module) -> nn.Module:
    first = next(model.parameters()).detach().view(-1)
    first[0] = torch.nextafter(first[0], first.new_tensor(torch.inf))
    return torch_sn(model)


def fastsn_sn(model: nn.Module) -> nn.Module:
    return fastsn.accelerate(torch_sn(model))


def fastsn_bsn(model: nn.Module) -> nn.Module:
    fastsn.apply(model, "bsn")
    return model


def fastsn_bssn(model: nn.Module) -> nn.Module:
    fastsn.apply(model, "bsn", scale=BSSN_SCALE)
    return model


VARIANTS: dict[str, Normalize] = {
    "torch SN": torch_sn,
    "fastsn SN": fastsn_sn,
    "fastsn BSN": fastsn_bsn,
    "fastsn BSSN": fastsn_bssn,
}
NUDGED = "torch SN, torch SN nudged"
FP32 = "torch SN, fastsn SN"
FP64 = "the same in fp64"
DIFFERENCE_LINES: dict[str, dict[str, Any]] = {
    NUDGED: {"color": "#bdbdbd", "linewidth": 4.0},
    FP32: {"color": "#08519c"},
    FP64: {"color": "#41ab5d"},
}
COLOURS = dict(zip(VARIANTS, ("#9ecae1", "#08519c", "#d95f02", "#7570b3"), strict=True))


class Run:
    """One training: its networks, and what it leaves behind.

    Attributes:
        losses: of the discriminator ("D") and of the generator ("G") at each step.
        sigmas: by layer, from every ``sigma_every`` steps; empty for torch, which keeps no sigma.
    """

    def __init__(self, normalize: Normalize, images: Tensor, settings: Settings) -> None:
        """Networks in the dtype of ``images``, from the same start for every variant."""
        torch.manual_seed(SEED)
        self.generator = SNDCGANGenerator(LATENT, 1, SIZE, settings.width).to(images.dtype)
        plain = SNDCGANDiscriminator(1, SIZE, settings.width).to(images.dtype)
        self.discriminator = normalize(plain)
        self.average = copy.deepcopy(self.generator).eval()
        self.g_adam = adam(self.generator)
        self.d_adam = adam(self.discriminator)
        self.images = images
        # Not the global one: normalizing draws from it, and not every variant the same amount.
        self.random = torch.Generator().manual_seed(SEED)
        self.losses: dict[str, list[float]] = {"D": [], "G": []}
        self.sigmas: dict[str, list[float]] = {}

    def batch(self) -> tuple[Tensor, Tensor]:
        """Real images, and latents for the discriminator's and for the generator's step."""
        chosen = torch.randint(len(self.images), (BATCH,), generator=self.random)
        latents = torch.randn(2, BATCH, LATENT, generator=self.random)
        return self.images[chosen], latents.to(self.images.dtype)

    def step(self, real: Tensor, latents: Tensor) -> tuple[float, float]:
        """One step of the discriminator, one of the generator; the losses of both."""
        fake = self.generator(latents[0]).detach()
        on_real = F.softplus(-self.discriminator(real)).mean()
        d_loss = on_real + F.softplus(self.discriminator(fake)).mean()
        self.d_adam.zero_grad()
        d_loss.backward()
        self.d_adam.step()

        self.discriminator.requires_grad_(False)
        g_loss = F.softplus(-self.discriminator(self.generator(latents[1]))).mean()
        self.g_adam.zero_grad()
        g_loss.backward()
        self.g_adam.step()
        self.discriminator.requires_grad_(True)
        return d_loss.item(), g_loss.item()

    @torch.no_grad()
    def update_average(self) -> None:
        averages = self.average.state_dict().values()
        for average, value in zip(averages, self.generator.state_dict().values(), strict=True):
            if average.is_floating_point():
                average.lerp_(value, AVERAGE_RATE)

    @torch.no_grad()
    def samples(self, count: int) -> Tensor:
        random = torch.Generator().manual_seed(SEED + 1)
        return self.average(torch.randn(count, LATENT, generator=random))


def adam(model: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), LEARNING_RATE, betas=(0.5, 0.999))


def digit_images() -> Tensor:
    """The digits as (1797, 1, SIZE, SIZE) in [-1, 1]."""
    images = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    return F.interpolate(images, size=SIZE, mode="bicubic").clamp(-1, 1)


def train(name: str, normalize: Normalize, images: Tensor, steps: int, settings: Settings) -> Run:
    run = Run(normalize, images, settings)
    for step in tqdm(range(steps), desc=f"{name:<11}", unit="step"):
        d_loss, g_loss = run.step(*run.batch())
        run.losses["D"].append(d_loss)
        run.losses["G"].append(g_loss)
        run.update_average()
        if step % settings.sigma_every == 0:
            for layer, sigma in fastsn.sigmas(run.discriminator).items():
                run.sigmas.setdefault(layer, []).append(sigma.item())
    return run


class Comparison(NamedTuple):
    """Two trainings from the same start."""

    one: Run
    other: Run

    def differences(self) -> list[float]:
        """Per step of the shorter one: the larger difference of the two losses."""
        d, g = (
            [abs(a - b) for a, b in zip(self.one.losses[key], self.other.losses[key], strict=False)]
            for key in "DG"
        )
        return [max(pair) for pair in zip(d, g, strict=True)]


def compare(runs: dict[str, Run], images: Tensor, settings: Settings) -> dict[str, Comparison]:
    """``torch SN`` with itself nudged, with ``fastsn SN``, and with ``fastsn SN`` in fp64."""
    fp64 = images.double()
    return {
        NUDGED: Comparison(
            runs["torch SN"],
            train("yardstick", nudged_torch_sn, images, settings.yardstick, settings),
        ),
        FP32: Comparison(runs["torch SN"], runs["fastsn SN"]),
        FP64: Comparison(
            train("torch fp64", torch_sn, fp64, settings.fp64, settings),
            train("fastsn fp64", fastsn_sn, fp64, settings.fp64, settings),
        ),
    }


class Judge:
    """Frechet distance and digit score of images, as the module's docstring defines them."""

    def __init__(self, images: Tensor) -> None:
        digits = images.flatten(1).numpy()
        self.components = PCA(COMPONENTS, random_state=SEED).fit(digits)
        self.classifier = LogisticRegression(C=0.1, max_iter=3000).fit(digits, load_digits().target)
        self.digits = self.components.transform(digits)

    def distance(self, images: Tensor) -> float:
        return frechet(self.components.transform(images.flatten(1).numpy()), self.digits)

    def least_distance(self) -> float:
        return frechet(self.digits[::2], self.digits[1::2])

    def score(self, images: Tensor) -> float:
        log_p = self.classifier.predict_log_proba(images.flatten(1).numpy())
        p = np.exp(log_p)
        return float(np.exp((p * (log_p - np.log(p.mean(0)))).sum(1).mean()))


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    # The eigenvalues of a product of two covariances are real and >= 0, up to rounding.
    root = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b) - 2 * root)


def torch_weights(model: nn.Module) -> list[Tensor]:
    return [layer.weight for layer in layers(model)]


def fastsn_weights(model: nn.Module) -> list[Tensor]:
    return list(fastsn.refresh(model).values())


def normalizing(model: nn.Module, read: Callable[[nn.Module], list[Tensor]]) -> Work:
    """The normalized weights of one training step."""
    gradients = [torch.randn_like(weight) for weight in read(model)]
    frozen = copy.deepcopy(model).requires_grad_(False)

    def run() -> None:
        torch.autograd.backward(read(model), gradients)
        torch.autograd.backward(read(model), gradients)
        read(frozen)

    return Work(run, reset=model.zero_grad)


def times(runs: dict[str, Run], plan: Plan) -> dict[str, dict[str, float]]:
    """By column of the table and variant: median milliseconds. Trains the networks further."""

    def step(run: Run) -> Work:
        return Work(partial(run.step, *run.batch()))

    def weights(name: str, run: Run) -> Work:
        read = torch_weights if name.startswith("torch") else fastsn_weights
        return normalizing(run.discriminator, read)

    columns = {
        "ms per step": {name: step(run) for name, run in runs.items()},
        "ms normalizing": {name: weights(name, run) for name, run in runs.items()},
    }
    return {
        column: {
            name: 1e3 * statistics.median(seconds) for name, seconds in measure(works, plan).items()
        }
        for column, works in columns.items()
    }


def smooth(values: list[float]) -> np.ndarray:
    """Mean of up to ``WINDOW`` values ending at each step."""
    sums = np.cumsum(np.insert(np.asarray(values), 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - WINDOW, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def plot_losses(
    runs: dict[str, Run], comparisons: dict[str, Comparison], compared: int, path: Path
) -> None:
    figure = Figure(figsize=(13, 8), layout="constrained")
    panels = figure.subplot_mosaic("DDDGGG;112233")
    for key, who in (("D", "discriminator"), ("G", "generator")):
        for name, run in runs.items():
            panels[key].plot(smooth(run.losses[key]), label=name, **line(name))
        panels[key].set(title=f"{who} loss, mean of {WINDOW} steps", xlabel="step")

    first = {
        "1": ("fp32", runs["torch SN"], runs["fastsn SN"]),
        "2": ("fp64", *comparisons[FP64]),
    }
    for key, (dtype, torch_run, fastsn_run) in first.items():
        shown = slice(2 * compared)
        panels[key].plot(torch_run.losses["D"][shown], **line("torch SN"))
        panels[key].plot(fastsn_run.losses["D"][shown], **line("fastsn SN"))
        panels[key].set(title=f"discriminator loss, first steps, {dtype}", xlabel="step")

    for label, comparison in comparisons.items():
        values = comparison.differences()[: 3 * compared]
        panels["3"].plot(np.maximum(values, SMALLEST), label=label, **DIFFERENCE_LINES[label])
    panels["3"].set(title="difference of the losses", xlabel="step", yscale="log")
    panels["3"].set_ylim(SMALLEST, ABOVE)
    panels["3"].axvline(
        compared, color="black", linestyle=":", linewidth=1, label=f"step {compared}"
    )
    panels["3"].legend(loc="upper left", fontsize="small", ncols=2)
    figure.legend(*panels["D"].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    figure.savefig(path, dpi=DPI)


def line(name: str) -> dict[str, Any]:
    """torch SN is drawn broad and pale, so that a curve on top of it does not hide it."""
    return {"color": COLOURS[name], "linewidth": 5.0 if name == "torch SN" else 1.3}


def plot_samples(images: Tensor, runs: dict[str, Run], path: Path) -> None:
    random = torch.Generator().manual_seed(SEED)
    panels = {"digits": images[torch.randperm(len(images), generator=random)[:SHOWN]]}
    panels |= {name: run.samples(SHOWN) for name, run in runs.items()}
    figure = Figure(figsize=(3.4 * len(panels), 3.8), layout="constrained")
    for axes, (name, shown) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        axes.imshow(grid(shown), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        axes.set_title(name)
        axes.axis("off")
    figure.savefig(path, dpi=DPI)


def grid(images: Tensor, columns: int = 6, gap: int = 2) -> np.ndarray:
    """Images (count, 1, n, n) as one picture, ``gap`` background pixels between them."""
    cells = F.pad(images[:, 0], (gap, 0, gap, 0), value=0.2)
    rows = cells.unflatten(0, (-1, columns)).transpose(1, 2)
    return F.pad(rows.flatten(0, 1).flatten(1), (0, gap, 0, gap), value=0.2).numpy()


def plot_sigmas(runs: dict[str, Run], every: int, path: Path) -> None:
    shown = {name: run for name, run in runs.items() if run.sigmas}
    figure = Figure(figsize=(4.2 * len(shown), 4.2), layout="constrained")
    all_axes = figure.subplots(1, len(shown), sharey=True)
    for axes, (name, run) in zip(all_axes, shown.items(), strict=True):
        for index, (layer, values) in enumerate(run.sigmas.items()):
            axes.plot(
                np.arange(len(values)) * every,
                values,
                color=f"C{index}",
                label=layer.removesuffix(".weight"),
            )
        axes.set(title=name, xlabel="step")
    all_axes[0].set_ylabel("estimated sigma before normalization")
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=DPI)


def plot_times(rows: Rows, path: Path) -> None:
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, column in zip(panels, ("ms normalizing", "ms per step"), strict=True):
        values = [row[column] for row in rows.values()]
        bars = axes.barh(list(rows), values, color=[COLOURS[name] for name in rows])
        axes.bar_label(bars, fmt="%.2f", padding=3)
        axes.set(title=column, xlim=(0, 1.15 * max(values)))
    panels[0].set_title("ms normalizing per step")
    panels[0].invert_yaxis()
    figure.savefig(path, dpi=DPI)


def results(runs: dict[str, Run], judge: Judge, settings: Settings) -> Rows:
    """The rows of the table, by variant."""
    last = slice(-max(1, settings.steps // 10), None)
    rows = {}
    for name, run in runs.items():
        made = run.samples(len(run.images))
        rows[name] = {
            "D loss": statistics.fmean(run.losses["D"][last]),
            "G loss": statistics.fmean(run.losses["G"][last]),
            "Frechet": judge.distance(made),
            "digit score": judge.score(made),
        }
    for column, milliseconds in times(runs, settings.plan).items():
        for name, value in milliseconds.items():
            rows[name][column] = value
    return rows


def as_table(rows: Rows, least_distance: float, real_score: float) -> Table:
    table = Table("variant", padding=0)
    for column in next(iter(rows.values())):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(f"{value:.2f}" for value in row.values()))
    table.add_row("digits", "", "", f"{least_distance:.2f}", f"{real_score:.2f}", "", "")
    return table


def demo(out: Path, settings: Settings) -> None:
    """Train all variants; leave the pictures, ``results.json`` and the table in ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    images = digit_images()
    runs = {
        name: train(name, normalize, images, settings.steps, settings)
        for name, normalize in VARIANTS.items()
    }
    comparisons = compare(runs, images, settings)
    judge = Judge(images)
    rows = results(runs, judge, settings)

    plot_losses(runs, comparisons, settings.compared, out / "losses.png")
    plot_samples(images, runs, out / "samples.png")
    plot_sigmas(runs, settings.sigma_every, out / "sigmas.png")
    plot_times(rows, out / "times.png")
    largest = {
        label: max(comparison.differences()[: settings.compared])
        for label, comparison in comparisons.items()
    }
    figures = {
        "settings": asdict(settings),
        "torch": torch.__version__,
        "fastsn": fastsn.__version__,
        "variants": rows,
        "largest difference": largest,
    }
    (out / "results.json").write_text(json.dumps(figures, indent=2) + "\n")

    table = as_table(rows, judge.least_distance(), judge.score(images))
    report = [
        f"{settings.steps} steps of {BATCH} of {len(images)} digits; one thread, "
        f"torch {torch.__version__}, fastsn {fastsn.__version__}",
        "One seed: no ranking of the methods. Definitions: benchmarks/demo.py.",
        f"Largest difference of the losses in the first {settings.compared} steps:",
        *(f"  {value:.0e}  {label}" for label, value in largest.items()),
        "Nudged: one weight a rounding step away. Training amplifies any difference.",
    ]
    with (out / "table.txt").open("w", encoding="utf-8") as file:
        for console in (Console(), Console(file=file, width=COLUMNS)):
            console.print(table)
            console.print("\n".join(report), highlight=False)
    print(f"In {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small SN-GAN on digits.")
    parser.add_argument("--out", type=Path, default=Path("demo-results"), help="folder to write to")
    parser.add_argument("--quick", action="store_true", help="a few steps: proves that it runs")
    arguments = parser.parse_args()
    # A second thread gains little at these sizes, and loses much when another process is running.
    torch.set_num_threads(1)
    demo(arguments.out, QUICK if arguments.quick else Settings())


if __name__ == "__main__":
    main()
