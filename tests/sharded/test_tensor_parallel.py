"""Tensor parallel, before and after normalizing: the numbers of one process."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.utils import parametrize

import fastsn
from helpers import rank_fixtures
from helpers.answers import answers
from helpers.sharded_models import (
    CountedReductions,
    assert_same,
    contents,
    full,
    mesh,
    normalize,
    train,
)

started, ranks, two = rank_fixtures.started, rank_fixtures.ranks, rank_fixtures.two


class Net(nn.Module):
    """A feed-forward block as in transformers, between an embedding and a layer that is whole."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        layers = fastsn.nn if kind else nn
        embedding, linear = (getattr(layers, kind + name) for name in ("Embedding", "Linear"))
        self.embed = embedding(11, 6)
        self.up = linear(6, 12)
        self.down = linear(12, 5)
        self.head = linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(self.up(self.embed(x)).tanh()).tanh())


def plan(*names: str) -> dict[str, object]:
    styles = {
        "embed": RowwiseParallel(input_layouts=Replicate()),
        "up": ColwiseParallel(),
        "down": RowwiseParallel(),
    }
    return {name: styles[name] for name in names or styles}


def parallelize(model: nn.Module, *names: str) -> nn.Module:
    if not dist.is_initialized():
        return model
    with fastsn.unnormalized(model):
        return parallelize_module(model, mesh(), plan(*names))


def batch(step: int) -> Tensor:
    return torch.randint(11, (7,), generator=torch.Generator().manual_seed(step))


def build(form: str, order: str, accelerated: bool) -> nn.Module:
    """`order`: of parallelize_module, before or after normalizing."""
    torch.manual_seed(1)
    model = Net("BSN" if form == "module" else "").double()
    if order == "before":
        parallelize(model)
    torch.manual_seed(2)
    if form != "module":
        normalize(model, form, "BSN")
    if order == "after":
        parallelize(model)
    return fastsn.accelerate(model) if accelerated else model


def trained(form: str, order: str, accelerated: bool) -> dict[str, Tensor]:
    model = build(form, order, accelerated)
    found = train(model, batch)
    found["refreshed"] = torch.stack([full(w).norm() for w in fastsn.refresh(model).values()])
    found["sigmas"] = torch.stack(list(fastsn.sigmas(model).values()))
    return found


CASES = [
    (form, order, accelerated)
    for form, order in [
        ("hook", "before"), ("parametrization", "before"), ("parametrization", "after"),
        ("module", "after"), ("hook", "after"),
    ]
    for accelerated in (False, True)
]  # fmt: skip


@pytest.mark.parametrize("form, order, accelerated", CASES)
def test_ranks_train_as_one_process(ranks, form, order, accelerated):
    expected = trained(form, order, accelerated)
    assert_same(ranks(trained, form, order, accelerated), expected)
    assert expected["losses"].diff().abs().min() > 1e-3  # there was something to learn


def trained_hooks(accelerated: bool) -> dict[str, Tensor]:
    torch.manual_seed(1)
    model = Net().double()
    normalize(model, "hook", "SN")
    if dist.is_initialized():
        parallelize_module(model.up, mesh(), ColwiseParallel(output_layouts=Replicate()))
    found = train(fastsn.accelerate(model) if accelerated else model, batch)
    assert not any(isinstance(buffer, DTensor) for buffer in model.buffers())
    return found


@pytest.mark.parametrize("accelerated", [False, True])
def test_hooks_and_then_columns(two, accelerated):
    assert_same(two(trained_hooks, accelerated), trained_hooks(accelerated))


def parallelize_normalized(form: str, name: str) -> None:
    model = Net()
    normalize(model, form, "SN")
    before = contents(model)
    error = (RuntimeError, "expected a plain layer to distribute, got ParametrizedLinear, whose")
    if name == "down":  # torch's: it reads the normalized weight, which is no parameter
        error = (RuntimeError, "should be used to distribute leaf tensors")
    if form == "hook":  # torch's: the attribute that the hook keeps is in the way
        error = (KeyError, "attribute 'weight' already exists")
    with pytest.raises(error[0], match=error[1]):
        parallelize_module(model, mesh(), plan(name))
    if name == "up":
        torch.testing.assert_close(contents(model), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "form, name", [("hook", "down"), ("parametrization", "up"), ("parametrization", "down")]
)
def test_normalized_layers_are_not_distributed_in_silence(two, form, name):
    two(parallelize_normalized, form, name)


def types_under_autocast() -> list[torch.dtype]:
    model = Net()
    normalize(model, "parametrization", "SN")
    fastsn.accelerate(parallelize(model))
    found = []

    def forward(x: None) -> None:
        found.append(model.up.weight.dtype)
        with torch.autocast("cpu", enabled=False):
            found.append(model.down.weight.dtype)

    model.forward = forward
    with torch.autocast("cpu", torch.bfloat16):
        model(None)
    return found


def test_autocast(two):
    """A weight comes in the type that it is to be used in."""
    assert two(types_under_autocast) == [[torch.bfloat16, torch.float32]] * 2


def normalized_and_parallel(function, order: str, name: str) -> Tensor:
    torch.manual_seed(1)
    model = Net().double()
    if order == "before":
        parallelize(model, "up", "down")
    function(getattr(model, name))
    if order == "after":
        parallelize(model, "up", "down")
    return full(model(batch(0)))


def check_answer(two, function, order: str, name: str) -> None:
    expected = normalized_and_parallel(function, "neither", name)
    for output in two(normalized_and_parallel, function, order, name):
        torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("name", ["up", "down"])
@answers("torchtitan#2133")
def test_normalizing_a_parallel_layer(two, normalize, name):
    check_answer(two, normalize, "before", name)


@pytest.mark.parametrize("name", ["up", "down"])
@answers("torchtitan#2133", forms=("parametrization",))
def test_parallelizing_a_normalized_layer(two, normalize, name):
    check_answer(two, normalize, "after", name)


def counted(blocks: int, kinds: tuple[str, ...]) -> tuple[list[int], list[int]]:
    """All-reduces by fastsn in a forward and in its backward."""
    model = nn.Sequential(
        *(nn.ModuleDict({kind: nn.Linear(6, 6) for kind in kinds}) for _ in range(blocks))
    )
    normalize(model, "parametrization", "SN")
    styles = {"col": ColwiseParallel(), "row": RowwiseParallel()}
    for block in model:
        for kind in kinds:
            with fastsn.unnormalized(block[kind]):
                parallelize_module(block[kind], mesh(), styles[kind])
    model.forward = lambda x: sum(
        full_sum(layer.weight) for block in model for layer in block.values()
    )
    fastsn.accelerate(model)
    with CountedReductions() as forward:
        output = model(None)
    with CountedReductions() as backward:
        output.backward()
    return forward, backward


def full_sum(weight: DTensor) -> Tensor:
    return weight.to_local().square().sum()


@pytest.mark.parametrize("blocks", [1, 4])
def test_communication_of_all_layers_at_once(ranks, blocks):
    """u and v of all layers in one all-reduce, one scalar per layer in the backward's."""
    for forward, backward in ranks(counted, blocks, ("col",)):
        assert forward == [blocks * 12] and backward == [blocks]
    for forward, backward in ranks(counted, blocks, ("col", "row")):
        assert len(forward) == 2 and backward == [2 * blocks]


def keep_contents() -> None:
    torch.manual_seed(1)
    model = Net()
    normalize(model, "parametrization", "SN")
    modules = list(model.named_modules())
    before = contents(model)
    norms = [layer.parametrizations.weight for layer in (model.up, model.down)]
    state = torch.get_rng_state()
    parallelize(model)
    assert list(model.named_modules()) == modules
    assert [layer.parametrizations.weight for layer in (model.up, model.down)] == norms
    after = contents(model)
    assert list(after) == list(before) and torch.equal(torch.get_rng_state(), state)
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    for norm, shard in zip(norms, (Shard(0), Shard(1)), strict=True):
        assert norm.original.placements == (shard,) and isinstance(norm.original, nn.Parameter)
        assert norm.original.requires_grad
        assert not any(isinstance(buffer, DTensor) for buffer in norm.buffers())
    parametrize.remove_parametrizations(model.up, "weight")
    assert type(model.up) is nn.Linear and isinstance(model.up.weight, DTensor)


def test_parallelizing_keeps_everything_else(two):
    """No u or v moves, no name, no module and no random number changes."""
    two(keep_contents)


def fail_to_partition() -> None:
    layer = fastsn.parametrizations.spectral_norm(nn.Linear(4, 6))
    before = contents(layer)

    def fails(name: str, module: nn.Module, device_mesh: object) -> None:
        assert type(module) is nn.Linear and isinstance(module.weight, nn.Parameter)
        raise ArithmeticError("stop")

    with pytest.raises(ArithmeticError), fastsn.unnormalized(layer):
        distribute_module(layer, mesh(), fails)
    torch.testing.assert_close(contents(layer), before, rtol=0, atol=0)
    assert parametrize.is_parametrized(layer, "weight")
    layer(torch.ones(1, 4))


def test_a_partition_that_fails_leaves_the_layer_normalized(two):
    two(fail_to_partition)


def parallelize_copy(accelerated: bool) -> dict[str, Tensor]:
    torch.manual_seed(1)
    model = Net().double()
    torch.nn.utils.parametrizations.spectral_norm(model.up)
    normalize(model.down, "parametrization", "SN")
    if accelerated:
        fastsn.accelerate(model)  # takes over torch's
    else:
        fastsn.grouping.take_over(model)
    model = parallelize(copy.deepcopy(model))
    return train(model, batch)


@pytest.mark.parametrize("accelerated", [False, True])
def test_copies_and_layers_taken_over(two, accelerated):
    assert_same(two(parallelize_copy, accelerated), parallelize_copy(accelerated))


def folded() -> tuple[Tensor, Tensor]:
    model = build("parametrization", "after", True).eval()
    plain = fastsn.fold(model)
    assert type(plain.up) is nn.Linear and isinstance(plain.up.weight, DTensor)
    return full(model(batch(0))), full(plain(batch(0)))


def test_fold(two):
    """Plain layers with sharded weights."""
    expected = build("parametrization", "after", True).eval()(batch(0))
    for normalized, plain in two(folded):
        torch.testing.assert_close(normalized, expected.detach())
        torch.testing.assert_close(plain, expected.detach())


def place(*placements: object, shape: tuple[int, ...] = (1, 2)) -> nn.Linear:
    layer = nn.Linear(4, 6)
    device_mesh = init_device_mesh("cpu", shape)
    if any(isinstance(placement, Partial) for placement in placements):
        weight = DTensor.from_local(layer.weight.detach(), device_mesh, placements)
    else:
        weight = distribute_tensor(layer.weight.detach(), device_mesh, placements)
    layer.weight = nn.Parameter(weight)
    return layer


def refuse_placements() -> None:
    layer = place(Partial(), shape=(2,))
    for function in (fastsn.spectral_norm, fastsn.parametrizations.spectral_norm):
        state = torch.get_rng_state()
        with pytest.raises(ValueError, match="weight of Linear is placed") as caught:
            function(layer)
        assert "Partial" in str(caught.value) and "supported are" in str(caught.value)
        assert type(layer) is nn.Linear and list(layer.state_dict()) == ["weight", "bias"]
        assert torch.equal(torch.get_rng_state(), state) and not layer._forward_pre_hooks


def test_unsupported_placements(two):
    two(refuse_placements)


def train_on_two_meshes(accelerated: bool) -> dict[str, Tensor]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6)).double()
    if dist.is_initialized():
        for layer, shape, placements in (
            (model[0], (2,), [Shard(0)]),
            (model[1], (2, 1), [Shard(1), Replicate()]),
        ):
            on = init_device_mesh("cpu", shape)
            layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), on, placements))
    torch.manual_seed(2)
    normalize(model, "parametrization", "SN")

    def weights(x: Tensor) -> Tensor:
        return torch.stack([full_of(layer.weight).mul(x).sum() for layer in model])

    model.forward = weights
    return train(
        fastsn.accelerate(model) if accelerated else model, lambda step: torch.tensor(step + 1.0)
    )


def full_of(weight: Tensor) -> Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


@pytest.mark.parametrize("accelerated", [False, True])
def test_several_meshes_in_a_model(two, accelerated):
    assert_same(two(train_on_two_meshes, accelerated), train_on_two_meshes(accelerated))


def train_in_two_dimensions(accelerated: bool) -> dict[str, Tensor]:
    """FSDP2 over pairs of ranks, tensor parallel within them."""
    torch.manual_seed(1)
    model = Net().double()
    normalize(model, "parametrization", "SN")
    if dist.is_initialized():
        both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        with fastsn.unnormalized(model):
            parallelize_module(model, both["tensor"], plan("up", "down"))
        fully_shard(model, mesh=both["data"])
    if accelerated:
        fastsn.accelerate(model)
    found = train(model, batch)
    if dist.is_initialized():
        with pytest.raises(ValueError, match="up.weight is placed"):
            fastsn.sigmas(model)
        with pytest.raises(ValueError, match="placed"):
            _ = model.up.weight
    return found


@pytest.mark.parametrize("accelerated", [False, True])
def test_fully_sharded_and_parallel(started, accelerated):
    """In forwards FSDP2 leaves one dimension, which works; outside there are two: an error."""
    expected = train_in_two_dimensions(accelerated)
    assert_same(started(4)(train_in_two_dimensions, accelerated), expected)
