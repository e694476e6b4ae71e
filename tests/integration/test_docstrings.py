"""Every public function and class has an example, and every example does what it shows."""

import doctest
import importlib
import pkgutil

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

import fastsn

PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in (fastsn, fastsn.nn, fastsn.functional, fastsn.parametrizations, fastsn.hooks)
    for name in module.__all__
    if getattr(getattr(module, name), "__module__", "").startswith("fastsn")
}
# It is all in its name.
WITHOUT = {"fastsn.current_backend"}


def modules():
    for found in pkgutil.walk_packages(fastsn.__path__, "fastsn."):
        if not found.name.startswith(("fastsn.triton.", "fastsn._C", "fastsn.__main__")):
            yield importlib.import_module(found.name)


EXAMPLES = {
    found.name: found
    for module in modules()
    for found in doctest.DocTestFinder().find(module)
    if found.examples
}


class Checker(doctest.OutputChecker):
    """Says nothing about what is printed where the docstring does not show it."""

    def check_output(self, want, got, optionflags):
        return not want or super().check_output(want, got, optionflags)


class Discriminator(nn.Module):
    def __init__(self, normalize=lambda layer: layer):
        super().__init__()
        self.conv1 = normalize(nn.Conv2d(3, 8, 3, padding=1))
        self.conv2 = normalize(nn.Conv2d(8, 4, 3, padding=1))
        self.embed = normalize(nn.Embedding(4, 4))

    def forward(self, x):
        features = self.conv2(torch.relu(self.conv1(x))).sum((2, 3))
        return (features * self.embed.weight[0]).sum(1)


class BigGanLayer(nn.Linear):
    """By its buffers."""

    def __init__(self):
        super().__init__(4, 3)
        self.register_buffer("u0", nn.functional.normalize(torch.randn(1, 3)))
        self.register_buffer("sv0", torch.ones(1))


def names(example, tmp_path):
    """What an example finds before its first line."""
    yield "torch", torch
    yield "nn", nn
    yield "parametrize", parametrize
    yield "fastsn", fastsn
    sn = torch.nn.utils.parametrizations.spectral_norm
    normalized = example not in {"fastsn.model.apply.apply"}
    discriminator = Discriminator(sn if normalized else lambda layer: layer)
    if normalized:
        fastsn.accelerate(discriminator)
    x = torch.randn(2, 3, 8, 8)
    discriminator(x).sum().backward()
    for name in ("model", "discriminator", "critic", "generator"):
        yield name, discriminator
    yield "x", x
    yield "lr", 0.1
    yield "batches", [x, x]
    yield "loader", [x, x]
    yield "train", lambda model, batch: model(batch)
    if "SigmaLogger" in example:
        yield "SummaryWriter", pytest.importorskip("torch.utils.tensorboard").SummaryWriter
    if "convert_state_dict" in example:
        torch.save({f"0.{k}": x for k, x in BigGanLayer().state_dict().items()}, "biggan.pth")
        yield "model", nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(4, 3)))
    if "unnormalized" in example or "resync" in example or "sync" in example:
        store = dist.FileStore(str(tmp_path / "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        from torch.distributed.tensor.parallel import (
            ColwiseParallel,
            RowwiseParallel,
            parallelize_module,
        )

        yield "mesh", init_device_mesh("cpu", (1,))
        yield "DistributedDataParallel", DistributedDataParallel
        for own in (ColwiseParallel, RowwiseParallel, parallelize_module):
            yield own.__name__, own


@pytest.mark.filterwarnings("ignore:`broadcast_buffers` is deprecated:FutureWarning")
@pytest.mark.parametrize("example", sorted(EXAMPLES))
def test_an_example_runs(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = fastsn.current_backend()
    test = EXAMPLES[example]
    try:
        test.globs = dict(names(example, tmp_path))
        said = []
        failed, tried = doctest.DocTestRunner(Checker(), verbose=False).run(test, out=said.append)
    finally:
        fastsn.use_backend(before)
        if dist.is_initialized():
            dist.destroy_process_group()
    assert tried and not failed, "".join(said)


@pytest.mark.parametrize("name", sorted(set(PUBLIC) - WITHOUT))
def test_what_is_public_has_an_example(name):
    own = PUBLIC[name]
    assert f"{own.__module__}.{own.__qualname__}" in EXAMPLES


def test_a_wrong_example_would_fail():
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    assert doctest.DocTestRunner(Checker(), verbose=False).run(test, out=lambda _: None).failed == 1
