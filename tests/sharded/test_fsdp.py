"""FSDP2 (fully_shard), before and after normalizing: the numbers of one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import fastsn
from helpers import rank_fixtures
from helpers.answers import answers
from helpers.biggan import Conv, Linear
from helpers.sharded_models import (
    NORMS,
    CountedReductions,
    assert_same,
    build,
    contents,
    full,
    images,
    mesh,
    normalize,
    train,
)

started, ranks, two = rank_fixtures.started, rank_fixtures.ranks, rank_fixtures.two


def trained(form: str, norm: str, order: str, accelerated: bool) -> dict[str, Tensor]:
    model = build(form, norm, order, accelerated)
    found = train(model, images)
    if form != "hook":  # hooks run in forwards alone
        for layer in (model.features[0], model.head):
            found[f"{layer}.weight outside"] = full(layer.weight)
    found["outside"] = torch.stack([full(w).norm() for w in fastsn.refresh(model).values()])
    found["sigmas"] = torch.stack(list(fastsn.sigmas(model).values()))
    return found


CASES = [
    (form, norm, order, accelerated)
    for form in ("hook", "parametrization", "module")
    for norm in NORMS
    for order in ("before", "after")
    for accelerated in (False, True)
    if (form, order) != ("module", "before")
]


@pytest.mark.parametrize("form, norm, order, accelerated", CASES)
def test_ranks_train_as_one_process(ranks, form, norm, order, accelerated):
    """`order`: of fully_shard, before or after normalizing."""
    case = form, norm, order, accelerated
    expected = trained(*case)
    assert_same(ranks(trained, *case), expected)
    assert expected["losses"].diff().abs().min() > 1e-3  # there was something to learn


def normalize_linear(function, order: str) -> Tensor:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).double()
    if order == "before":
        fully_shard(model, mesh=mesh())
    function(model[0])
    if order == "after":
        fully_shard(model, mesh=mesh())
    return model


def read_outside(function) -> Tensor:
    return full(normalize_linear(function, "after")[0].weight)


@answers("minLoRA#3", forms=("parametrization",))
def test_reading_a_sharded_weight(two, normalize):
    torch.manual_seed(1)
    layer = normalize(nn.Linear(5, 7).double())
    expected = layer.weight
    for weight in two(read_outside, normalize):
        torch.testing.assert_close(weight, expected.detach())


def forward_of_sharded_first(function) -> Tensor:
    model = normalize_linear(function, "before")
    return model(torch.ones(2, 5, dtype=torch.float64)).detach()


@answers("minLoRA#3")
def test_normalizing_sharded_weights(two, normalize):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).double()
    expected = normalize(model[0]) and model(torch.ones(2, 5, dtype=torch.float64))
    for output in two(forward_of_sharded_first, normalize):
        torch.testing.assert_close(output, expected.detach())


def chain(layers: int) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(layers)))


def counted(form: str, layers: int) -> tuple[list[int], list[int], list[int]]:
    """All-reduces of a forward, its backward, and two forwards in eval mode."""
    model = chain(layers)
    normalize(model, form, "BSN")
    for layer in model:
        fully_shard(layer, mesh=mesh())
    fully_shard(model, mesh=mesh())
    fastsn.accelerate(model)
    x = torch.randn(2, 4, 5, 5)
    with CountedReductions() as forward:
        output = model(x)
    with CountedReductions() as backward:
        output.sum().backward()
    with torch.no_grad(), CountedReductions() as evaluation:
        model.eval()(x)
        model(x)
    return forward, backward, evaluation


@pytest.mark.parametrize("layers", [1, 5])
def test_one_all_reduce_serves_all_layers(ranks, layers):
    """As long as u and v of them together; none in the backward, whose weights are whole."""
    vectors = 2 * (4 + 4 * 9)  # of one layer: (out, in * k) and (in, out * k)
    for forward, backward, evaluation in ranks(counted, "parametrization", layers):
        assert forward == [layers * vectors]
        assert backward == []
        assert evaluation == [layers * 2] * 2  # the scalars u^T M v, for each


def test_hooks_need_a_second_all_reduce(two):
    """v comes first, and the rows are split: M^T u must be whole before M v."""
    for forward, backward, _ in two(counted, "hook", 5):
        assert len(forward) == 2 and sum(forward) <= 2 * 5 * 80 and backward == []


def draw(order: str) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(1)
    layer = nn.Conv2d(3, 5, 2).double()
    if order == "before":
        fully_shard(layer, mesh=mesh())
    torch.manual_seed(2)
    fastsn.parametrizations.spectral_norm(layer, norm="bidirectional")
    return torch.randn(3), contents(layer)


def test_random_numbers_are_those_of_one_process(ranks):
    torch.manual_seed(1)
    layer = nn.Conv2d(3, 5, 2).double()
    torch.manual_seed(2)
    fastsn.parametrizations.spectral_norm(layer, norm="bidirectional")
    expected = torch.randn(3), contents(layer)
    for next_numbers, found in ranks(draw, "before"):
        assert torch.equal(next_numbers, expected[0])
        torch.testing.assert_close(found, expected[1])


class Watched(nn.Linear):
    """Keeps the weight that its forward has used."""

    casts_weight = True  # what fastsn asks the classes of others
    seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.weight
        return nn.functional.linear(x, self.seen, self.bias)


def watched() -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(Watched(40, 30), Watched(30, 20))
    normalize(model, "parametrization", "SN")
    return model


def low_precision(accelerated: bool) -> dict[str, Tensor]:
    """The weights that forwards use, and u, v; the parameters are float32."""
    model = watched()
    for layer in model:
        fully_shard(layer, mesh=mesh(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    fully_shard(model, mesh=mesh(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    if accelerated:
        fastsn.accelerate(model)
    model(torch.randn(2, 40)).sum().backward()
    return {f"{i}.seen": layer.seen.detach() for i, layer in enumerate(model)} | contents(model)


@pytest.mark.parametrize("accelerated", [False, True])
def test_mixed_precision(two, accelerated):
    """Weights are bfloat16 in forwards; u, v, and accelerated also what iterates them, are not."""
    model = watched()
    originals = [layer.parametrizations.weight.original.detach() for layer in model]
    for layer in model:
        if not accelerated:
            original = layer.parametrizations.weight.original
            original.data = original.data.bfloat16()
        _ = layer.weight  # iterates
    for found in two(low_precision, accelerated):
        for i, (layer, original) in enumerate(zip(model, originals, strict=True)):
            norm = layer.parametrizations.weight[0]
            assert found[f"{i}.parametrizations.weight.0._u"].dtype == torch.float32
            torch.testing.assert_close(found[f"{i}.parametrizations.weight.0._u"], norm._u)
            torch.testing.assert_close(found[f"{i}.parametrizations.weight.0._v"], norm._v)
            weight = found[f"{i}.seen"]
            assert weight.dtype == torch.bfloat16
            low = original.bfloat16().double()
            expected = low / (norm._u.double() @ low @ norm._v.double())
            torch.testing.assert_close(weight.double(), expected, rtol=2**-7, atol=0)
            assert found[f"{i}.parametrizations.weight.original.grad"].dtype == torch.float32


def autocast_weights() -> list[Tensor]:
    """Those that a forward under autocast uses, and one within it where autocast is off."""
    model = watched()
    for layer in model:
        fully_shard(layer, mesh=mesh())
    fully_shard(model, mesh=mesh())
    fastsn.accelerate(model)
    inside = model[1].forward

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return inside(x.float())

    model[1].forward = forward
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 40)).sum().backward()
    return [layer.seen.detach() for layer in model]


def test_autocast(two):
    """A gathered weight comes in the type that it is to be used in, rounded to once."""
    model = watched()
    expected = [layer.weight.detach() for layer in model]
    for low, whole in two(autocast_weights):
        assert low.dtype == torch.bfloat16
        torch.testing.assert_close(low.float(), expected[0], rtol=2**-8, atol=0)
        torch.testing.assert_close(whole, expected[1])


def biggan(accelerated: bool) -> dict[str, Tensor]:
    """The layers of BigGAN-PyTorch, in two blocks."""
    torch.manual_seed(1)
    model = nn.Sequential(Conv(3, 5, 3), nn.Flatten(), Linear(5 * 49, 4))
    model = model.double()
    if dist.is_initialized():
        for block in (model[0], model[2], model):
            fully_shard(block, mesh=mesh())
    fastsn.accelerate(model) if accelerated else fastsn.grouping.take_over(model)
    return train(model, images)


@pytest.mark.parametrize("accelerated", [False, True])
def test_biggan_layers(two, accelerated):
    assert_same(two(biggan, accelerated), biggan(accelerated))
