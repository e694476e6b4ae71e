"""Means over the batches of several processes: the numbers of one process with all batches."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastsn
from fastsn.nn import msn
from helpers import rank_fixtures
from helpers.msn_cases import drawn, weights_of

RANKS = 3
# Uneven batches, and one that is empty: of all ranks, and of a group of the first and the last.
SIZES = {"world": (3, 0, 1), "sub-group": (2, None, 3)}
FORMS = {"folded": 1e9, "direct": 0.0}
LAYERS = {
    "conv": lambda **options: fastsn.nn.MSNConv2d(3, 4, 3, 2, 1, gain=True, **options),
    "transposed": lambda **options: fastsn.nn.MSNConvTranspose2d(3, 2, 2, gain=True, **options),
    "linear": lambda **options: fastsn.nn.MSNLinear(5, 4, gain=True, **options),
    "mean-only": lambda **options: fastsn.nn.MeanOnlyBatchNorm2d(3, gain=True, **options),
}
CASES = [
    *((layer, "folded", group) for layer in LAYERS for group in SIZES),
    # Which is not taken then: shapes decide, and those of the ranks may differ.
    *(("conv", "direct", group) for group in SIZES),
]


def build(name: str, group: object = None) -> nn.Module:
    torch.manual_seed(5)
    return drawn(LAYERS[name](process_group=group, dtype=torch.float64))


def joined(name: str, samples: int) -> tuple[Tensor, Tensor]:
    """The batches of all ranks in one, and the weights of what comes out in the loss."""
    torch.manual_seed(samples)
    shape = (5,) if name == "linear" else (3, 4, 5)
    x = 1 + torch.randn(samples, *shape, dtype=torch.float64)
    with torch.no_grad():
        return x, weights_of(build(name)(x))


def own_part(whole: Tensor, sizes: tuple[int | None, ...], rank: int) -> Tensor:
    return whole.split([size or 0 for size in sizes])[rank]


def train(layer: nn.Module, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """A step with a gradient penalty, one without gradients of the input, one in eval mode."""
    x = x.clone().requires_grad_()
    y = layer(x).tanh()
    loss = (y * weights).sum()
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + slope.square().sum()).backward()
    with torch.no_grad():
        second = layer(x * 2)
        evaluated = layer.eval()(x)
    return {
        "output": y.detach(), "second": second, "evaluated": evaluated,
        "slope": slope.detach(), "input.grad": x.grad,
        **{f"{name}.grad": p.grad for name, p in layer.named_parameters()},
        **layer.state_dict(),
    }  # fmt: skip


SUMMED = ("weight.original.grad", "bias.grad", "gain.grad")
SPLIT = ("output", "second", "evaluated", "slope", "input.grad")


def network(group: object = None) -> nn.Module:
    torch.manual_seed(5)
    options = {"process_group": group, "dtype": torch.float64}
    layers = fastsn.nn.MSNConv2d(3, 4, 3, **options), fastsn.nn.MSNLinear(24, 2, **options)
    return fastsn.accelerate(nn.Sequential(layers[0], nn.Tanh(), nn.Flatten(), layers[1]))


def images(step: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(step)
    return torch.randn(6, 3, 4, 5, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)


PARALLEL_SIZES = (3, 1, 2)


def optimize(model: nn.Module, rate: float, part) -> None:
    """A few steps of a GAN-like loss: two forwards before one backward."""
    optimizer = torch.optim.SGD(model.parameters(), rate)
    for step in range(3):
        (real, weights), (fake, _) = images(step), images(step + 10)
        optimizer.zero_grad()
        y = model(part(real)).tanh() - model(part(fake)).square()
        (y * part(weights)).sum().backward()
        optimizer.step()


def train_everything() -> dict:
    """What one rank gets."""
    rank = dist.get_rank()
    groups = {"world": "world", "sub-group": dist.new_group([0, 2])}
    sent: list[int] = []
    send = dist.all_reduce

    def record(tensor: Tensor, *args: object, **kwargs: object):
        sent.append(tensor.numel())
        return send(tensor, *args, **kwargs)

    dist.all_reduce = record
    results = {}
    for name, form, group in CASES:
        sizes = SIZES[group]
        if sizes[rank] is None:
            continue
        msn._DIRECT = FORMS[form]
        sent.clear()
        whole = joined(name, sum(size or 0 for size in sizes))
        parts = [own_part(tensor, sizes, rank) for tensor in whole]
        results[name, form, group] = {
            **train(build(name, groups[group]), *parts), "sent": torch.tensor(sent)
        }  # fmt: skip
    model = network("world")
    optimize(
        DistributedDataParallel(model), 0.1, lambda tensor: own_part(tensor, PARALLEL_SIZES, rank)
    )
    results["parallel"] = model.state_dict()
    return results


started = rank_fixtures.started


@pytest.fixture(scope="module")
def results(started):
    """What each rank has got."""
    return started(RANKS)(train_everything)


each_case = pytest.mark.parametrize("name, form, group", CASES)


@each_case
def test_ranks_together_are_one_process(name, form, group, results):
    """Outputs, running means and counts, all gradients, and those of a gradient penalty."""
    ranks = [found[name, form, group] for found in results if (name, form, group) in found]
    assert len(ranks) == (RANKS if group == "world" else 2)
    layer = build(name)
    expected = train(layer, *joined(name, sum(size or 0 for size in SIZES[group])))
    assert set(expected) == set(ranks[0]) - {"sent"}
    for key, value in expected.items():
        found = [rank[key] for rank in ranks]
        if key in SPLIT:
            torch.testing.assert_close(torch.cat(found), value, msg=key)
        elif key.endswith(SUMMED):
            torch.testing.assert_close(torch.stack(found).sum(0), value, msg=key)
        else:
            for own in found:
                torch.testing.assert_close(own, value, msg=key)
                torch.testing.assert_close(own, found[0], rtol=0, atol=0, msg=key)
    assert expected["num_batches_tracked"] == 2 and expected["running_mean"].all()


@each_case
def test_what_is_sent_is_small(name, form, group, results):
    """The patch, or of a layer without weight the mean, and a count; nothing in eval mode."""
    layer = build(name)
    size = layer.running_mean.numel()
    if name != "mean-only":
        size = layer.weight.select(int(name == "transposed"), 0).numel()
    for found in results:
        if (name, form, group) in found:
            # Two forwards, the backward twice for the penalty, and its own backward.
            assert found[name, form, group]["sent"].tolist() == [size + 1] * 5


def test_data_parallel(results):
    """The mean of the ranks' gradients: one process with a rate to match; and one model."""
    model = network()
    optimize(model, 0.1 / RANKS, lambda tensor: tensor)
    for found in results:
        torch.testing.assert_close(dict(found["parallel"]), dict(model.state_dict()))
        torch.testing.assert_close(found["parallel"], results[0]["parallel"], rtol=0, atol=0)
    assert model[0].bias.abs().min() > 1e-3  # which was 0: there was something to learn
