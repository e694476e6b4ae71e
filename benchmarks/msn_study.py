"""Does MSN train? Small classifiers, bare and with batch norm, SN and MSN, from the same weights.

``python -m benchmarks.msn_study`` (or ``make study-msn``) trains the 3-layer CNN and VGG7 on the
1797 digits that scikit-learn ships, enlarged from 8x8 by bicubic interpolation to the 28x28 and
32x32 that the networks take, or with ``--cifar10 FOLDER`` on CIFAR-10 (the folder of its Python
pickles); with Adam, cross-entropy and batches of 64, without augmentation. Inputs are standardized
by the mean and the deviation of the training images (CIFAR-10: per channel). A fifth of the digits,
the same for all, is held out; CIFAR-10 has its test batch. A seed decides the weights and the order
of the images, for all variants alike.

What is written down after every epoch, by network, variant and seed (``epochs.csv``):

*train_loss*: mean over the batches of the epoch, in training mode.

*accuracy*: share of the held-out images that are recognized, in eval mode.

By layer as well (``layers.csv``), each from the training batches themselves, meant over the epoch:

*mean*: of an activation's input, after the normalization if there is one: the mean over batch and
positions per channel, its absolute value averaged over the channels.

*drift*: how far the same per-channel means have moved since the first training step, the absolute
values averaged over the channels. The plots of the paper of this name show means of weights.

*std*: the deviation over batch and positions, averaged over the channels (in squares). The unit to
judge mean and drift by: spectrally normalized layers have small activations.

*sparsity*: the share of exactly zero entries in the gradient by the weight that the layer
multiplies with: of W, or of W / sigma. (Sigma depends on all of W, so that the gradient by the
parameter W of an SN or MSN layer has a zero nowhere.)
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pickle
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

import fastsn
from benchmarks.charts import Row
from benchmarks.gpu_tools import commit
from benchmarks.msn_networks import Network, build, cnn, vgg7
from benchmarks.msn_study_report import CNN, NETWORKS, VARIANTS, as_table, plot, summary
from benchmarks.report import write_csv

BATCH = 64
HELD_OUT = 0.2
#: Columns of the table's text file.
WIDTH = 120


@dataclass(frozen=True)
class Settings:
    epochs: int = 20
    seeds: int = 3
    lr: float = 1e-3
    cifar10: Path | None = None
    width: float = 1.0
    #: At most so many training images, and as many to be held out.
    images: int | None = None


class Data(NamedTuple):
    images: Tensor
    labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor

    def standardized(self) -> Data:
        """With mean 0 and deviation 1 per channel of the training images."""
        std, mean = torch.std_mean(self.images, (0, 2, 3), keepdim=True)
        return self._replace(
            images=(self.images - mean) / std, held_out_images=(self.held_out_images - mean) / std
        )

    def first(self, count: int | None) -> Data:
        return Data(*(part[:count] for part in self))


def digits(size: int) -> Data:
    """The digits as (count, 1, size, size), a fifth of them held out."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1)
    images = F.interpolate(images, size=size, mode="bicubic")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held_out, trained = order.tensor_split([round(HELD_OUT * len(order))])
    labels = torch.tensor(found.target)
    return Data(images[trained], labels[trained], images[held_out], labels[held_out])


def cifar10(folder: Path) -> Data:
    """CIFAR-10 as (count, 3, 32, 32), from the pickles that its authors distribute."""

    def read(names: Sequence[str]) -> tuple[Tensor, Tensor]:
        batches = [pickle.loads((folder / name).read_bytes(), encoding="bytes") for name in names]
        images = np.concatenate([batch[b"data"] for batch in batches])
        labels = np.concatenate([batch[b"labels"] for batch in batches])
        return torch.tensor(images).float().view(-1, 3, 32, 32), torch.tensor(labels)

    return Data(*read([f"data_batch_{i}" for i in range(1, 6)]), *read(["test_batch"]))


class Task(NamedTuple):
    """One training."""

    network: str
    variant: str
    seed: int
    settings: Settings

    def load(self) -> tuple[Network, Data]:
        """The network that takes the data's images, and the data."""
        settings = self.settings
        if settings.cifar10 is None:
            data = digits(28 if self.network == CNN else 32)
        else:
            data = cifar10(settings.cifar10)
        _, in_channels, size, _ = data.images.shape
        network: Network = partial(vgg7, in_channels=in_channels, width=settings.width)
        if self.network == CNN:
            network = partial(cnn, in_channels=in_channels, size=size, width=settings.width)
        return network, data.first(settings.images).standardized()

    def names(self) -> Row:
        return {"network": self.network, "variant": self.variant, "seed": self.seed}


class Watch(TorchFunctionMode):
    """Sees, in a forward and its backward, what goes into activations and weights' gradients.

    Attributes:
        means, variances: of every activation's input per channel, in the order of the layers.
        zeros: of the gradient by every layer's weight, the share of exact zeros.
    """

    def __init__(self) -> None:
        super().__init__()
        self.means: list[Tensor] = []
        self.variances: list[Tensor] = []
        self.zeros: list[float] = []
        self._hooks: list[Any] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (F.relu, F.leaky_relu):
            variance, mean = torch.var_mean(args[0].detach(), (0, 2, 3), correction=0)
            self.means.append(mean)
            self.variances.append(variance)
        elif func in (F.conv2d, F.linear):
            self._hooks.append(args[1].register_hook(partial(self._count, len(self.zeros))))
            self.zeros.append(0.0)
        return func(*args, **(kwargs or {}))

    def _count(self, layer: int, gradient: Tensor) -> None:
        self.zeros[layer] = (gradient == 0).float().mean().item()
        # A parameter outlives the step, and would collect the hooks of all steps.
        self._hooks[layer].remove()


def layer_rows(steps: Sequence[Watch], first: Watch) -> Iterator[Row]:
    """What the steps of an epoch saw, layer by layer; ``first`` saw the first step of all."""
    count = len(first.zeros)
    for layer in range(count):
        row: Row = {"layer": f"conv{layer + 1}" if layer < count - 1 else "dense"}
        if layer < len(first.means):
            mean = torch.stack([step.means[layer] for step in steps]).mean(0)
            variance = torch.stack([step.variances[layer] for step in steps])
            row["mean"] = mean.abs().mean().item()
            row["drift"] = (mean - first.means[layer]).abs().mean().item()
            row["std"] = variance.mean().sqrt().item()
        row["sparsity"] = statistics.fmean(step.zeros[layer] for step in steps)
        yield row


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    model.eval()
    batches = zip(
        data.held_out_images.split(8 * BATCH), data.held_out_labels.split(8 * BATCH), strict=True
    )
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches)
    model.train()
    return right / len(data.held_out_labels)


def train(task: Task) -> tuple[list[Row], list[Row]]:
    """The rows of ``epochs.csv`` and of ``layers.csv``."""
    network, data = task.load()
    model = build(network, task.variant, task.seed)
    optimizer = torch.optim.Adam(model.parameters(), task.settings.lr)
    random = torch.Generator().manual_seed(task.seed)
    epochs, layers = [], []
    first = None
    for epoch in range(1, task.settings.epochs + 1):
        losses, steps = [], []
        for chosen in torch.randperm(len(data.images), generator=random).split(BATCH):
            with Watch() as seen:
                loss = F.cross_entropy(model(data.images[chosen]), data.labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            steps.append(seen)
        first = first or steps[0]
        row = {**task.names(), "epoch": epoch}
        scores = {"train_loss": statistics.fmean(losses), "accuracy": accuracy(model, data)}
        epochs.append(row | scores)
        layers += [row | layer for layer in layer_rows(steps, first)]
    return epochs, layers


def train_all(settings: Settings, processes: int) -> tuple[list[Row], list[Row]]:
    """All trainings, each on one thread, so many at a time; the rows in the order of the tasks."""
    tasks = [
        Task(*choice, settings) for choice in product(NETWORKS, VARIANTS, range(settings.seeds))
    ]
    # Not by fork: threads of torch do not live on in a child.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        processes, context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        done = list(tqdm(pool.map(train, tasks), total=len(tasks), unit="training"))
    epochs, layers = ([row for rows in kind for row in rows] for kind in zip(*done, strict=True))
    return epochs, layers


def study(out: Path, settings: Settings, processes: int) -> None:
    """Train all; leave the CSV files, a picture for each network, and the summary in ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    epochs, layers = train_all(settings, processes)
    identity, dirty = commit()
    origin = {
        "data": "digits" if settings.cifar10 is None else "CIFAR-10",
        "lr": settings.lr,
        "batch": BATCH,
        "torch": torch.__version__,
        "fastsn": fastsn.__version__,
        "commit": identity,
        "dirty": dirty,
        "date": f"{date.today()}",
    }
    caption = ", ".join(f"{name} {value}" for name, value in origin.items())
    write_csv(out / "epochs.csv", epochs, origin)
    write_csv(out / "layers.csv", layers, origin)
    for network in NETWORKS:
        file = f"{network.lower().replace(' ', '-')}.png"
        plot(out / file, network, epochs, layers, caption)
    rows = summary(epochs, layers)
    (out / "summary.json").write_text(json.dumps({"origin": origin, "rows": rows}, indent=2) + "\n")
    with (out / "table.txt").open("w", encoding="utf-8") as text:
        for console in (Console(width=WIDTH), Console(file=text, width=WIDTH)):
            console.print(as_table(rows))
            console.print(f"{caption}\nDefinitions: benchmarks/msn_study.py.", highlight=False)
    print(f"In {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train small classifiers bare, with BN, SN, MSN.")
    parser.add_argument("--cifar10", type=Path, help="the folder of CIFAR-10's Python pickles")
    parser.add_argument("--epochs", type=int, default=Settings.epochs)
    parser.add_argument("--seeds", type=int, default=Settings.seeds)
    parser.add_argument("--lr", type=float, default=Settings.lr, help="of Adam")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="at a time")
    parser.add_argument("--out", type=Path, help="folder to write to")
    parser.add_argument("--quick", action="store_true", help="tiny: proves that it runs")
    options = parser.parse_args(arguments)

    settings = Settings(options.epochs, options.seeds, options.lr, options.cifar10)
    if options.quick:
        settings = replace(settings, epochs=2, seeds=2, width=1 / 8, images=2 * BATCH + 2)
    data = "digits" if options.cifar10 is None else "cifar10"
    out = options.out or Path(__file__).parent / "results" / f"msn-study-{data}"
    study(out, settings, options.processes)


if __name__ == "__main__":
    main()
