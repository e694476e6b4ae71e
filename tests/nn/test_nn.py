"""The modules of `fastsn.nn`: torch's layers, with a normalized weight."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fastsn
from helpers.torch_peers import as_matrix, iterate

KINDS = ("Linear", "Conv1d", "Conv2d", "Conv3d", "Embedding") + tuple(
    f"ConvTranspose{n}d" for n in (1, 2, 3)
)
FUNCTIONS = {
    **{f"Conv{n}d": getattr(F, f"conv{n}d") for n in (1, 2, 3)},
    **{f"ConvTranspose{n}d": getattr(F, f"conv_transpose{n}d") for n in (1, 2, 3)},
}
SIZES = {"Linear": (5, 7), "Embedding": (9, 4)}
double = pytest.mark.usefixtures("double")
each_norm = pytest.mark.parametrize("prefix", ["SN", "BSN"])
each_kind = pytest.mark.parametrize("kind", KINDS)


def arguments(kind: str) -> tuple[int, ...]:
    return SIZES.get(kind, (2, 3, 2))


def make(prefix: str, kind: str, *args, **kwargs) -> nn.Module:
    return getattr(fastsn.nn, prefix + kind)(*(args or arguments(kind)), **kwargs)


def example(kind: str) -> Tensor:
    if kind == "Embedding":
        return torch.randint(9, (3, 2))
    if kind == "Linear":
        return torch.randn(3, 5)
    return torch.randn(2, 2, *[5] * int(kind[-2]))


def dim_of(kind: str) -> int:
    return int("Transpose" in kind)


def sigma_of(layer: nn.Module, kind: str) -> Tensor:
    """The mean over the layer's matrices of u^T M v, differentiable in the weight."""
    weight, norm = layer.parametrizations.weight.original, layer.parametrizations.weight[0]
    vectors = [(norm._u, norm._v, dim_of(kind))]
    if hasattr(norm, "_u2"):
        vectors.append((norm._u2, norm._v2, 1 - dim_of(kind)))
    sigmas = [u @ weight.movedim(dim, 0).flatten(1) @ v for u, v, dim in vectors]
    return torch.stack(sigmas).mean()


def test_all_of_them_are_public():
    names = {prefix + kind for prefix in ("SN", "BSN") for kind in KINDS}
    assert names <= set(fastsn.nn.__all__)
    for name in names:
        assert issubclass(getattr(fastsn.nn, name), getattr(nn, name.removeprefix("B")[2:]))


@each_norm
@each_kind
def test_reset_parameters_draws_those_of_the_plain_layer(prefix, kind):
    layer = make(prefix, kind)
    torch.manual_seed(1)
    layer.reset_parameters()
    weight = layer.parametrizations.weight.original
    torch.manual_seed(1)
    plain = getattr(nn, kind)(*arguments(kind))
    assert torch.equal(weight, plain.weight)
    # 15 iterations for the new weight: u and v of the old one would be far off.
    norms = torch.linalg.matrix_norm(weight.movedim(dim_of(kind), 0).flatten(1), 2)
    u, v = layer.parametrizations.weight[0]._u, layer.parametrizations.weight[0]._v
    estimate = u @ weight.movedim(dim_of(kind), 0).flatten(1) @ v
    torch.testing.assert_close(estimate, norms, rtol=0.02, atol=0)


# Numbers


@double
@each_kind
@each_norm
def test_forward_and_gradient_follow_the_definition(prefix, kind):
    layer = make(prefix, kind, scale=1.5)
    weight = layer.parametrizations.weight.original
    x = example(kind)
    output = layer(x)
    used = 1.5 * weight / sigma_of(layer, kind)
    if kind == "Embedding":
        expected = F.embedding(x, used)
    else:
        expected = FUNCTIONS.get(kind, F.linear)(x, used, layer.bias)
    torch.testing.assert_close(output, expected)
    gradients = [torch.autograd.grad(y.square().sum(), weight)[0] for y in (output, expected)]
    torch.testing.assert_close(*gradients)


@double
@each_kind
@each_norm
def test_iterations(prefix, kind):
    """One step per forward in training mode, u first, and v first for the second matrix."""
    layer = make(prefix, kind, n_power_iterations=2)
    norm = layer.parametrizations.weight[0]
    weight = layer.parametrizations.weight.original
    before = {key: value.clone() for key, value in norm.named_buffers()}
    layer(example(kind))
    for index, suffix in enumerate(("", "2")[: len(before) // 2]):
        matrix = as_matrix(weight, abs(dim_of(kind) - index))
        u, v = (before[f"_{letter}{suffix}"] for letter in "uv")
        expected = iterate(matrix, u, v, steps=2, v_first=index == 1)
        actual = [getattr(norm, f"_{letter}{suffix}") for letter in "uv"]
        torch.testing.assert_close(actual, list(expected))
    after = copy.deepcopy(norm.state_dict())
    layer.eval()(example(kind))
    torch.testing.assert_close(norm.state_dict(), after, rtol=0, atol=0)


@double
@each_kind
@each_norm
def test_sigma_is_that_of_the_singular_values(prefix, kind):
    layer = make(prefix, kind, n_power_iterations=1000)
    weight = layer.parametrizations.weight.original.detach()
    dims = (0, 1) if prefix == "BSN" else (dim_of(kind),)
    norms = [torch.linalg.matrix_norm(as_matrix(weight, dim), 2) for dim in dims]
    torch.testing.assert_close(layer.weight, weight / torch.stack(norms).mean())


@double
@pytest.mark.parametrize(
    "kind, args",
    [
        ("Linear", (5, 7)),
        ("Embedding", (9, 4)),
        ("Conv1d", (4, 6, 1)),
        ("Conv2d", (4, 6, 1)),
        ("ConvTranspose3d", (4, 6, 1)),
    ],
)
def test_bidirectional_is_plain_where_both_matrices_are_one(kind, args):
    layers = []
    for prefix in ("SN", "BSN"):
        torch.manual_seed(1)
        layers.append(make(prefix, kind, *args))
    assert list(layers[0].state_dict()) == list(layers[1].state_dict())
    assert torch.equal(layers[0].weight, layers[1].weight)


@double
@each_norm
def test_options(prefix):
    def weight(**options):
        torch.manual_seed(1)
        layer = make(prefix, "Conv2d", 3, 4, 3, **options)
        return layer.parametrizations.weight.original, layer.weight

    _, plain = weight()
    original, scaled = weight(scale=0.25)
    torch.testing.assert_close(scaled, 0.25 * plain)
    _, slack = weight(scale=100.0, bound=True)
    assert torch.equal(slack, original)
    _, tight = weight(scale=0.25, bound=True)
    torch.testing.assert_close(tight, scaled)
    # Both norms of each product are below this eps, which sigma then shows.
    assert not torch.allclose(weight(eps=10.0)[1], plain)
    assert not torch.equal(weight(n_power_iterations=2)[1], plain)


@each_kind
@each_norm
def test_zero_guard(prefix, kind):
    layer = make(prefix, kind, zero_guard=True)
    with torch.no_grad():
        layer.parametrizations.weight.original.zero_()
    vectors = copy.deepcopy(dict(layer.named_buffers()))
    layer(example(kind)).sum().backward()
    assert not layer.weight.any()
    assert layer.parametrizations.weight.original.grad.isfinite().all()
    torch.testing.assert_close(dict(layer.named_buffers()), vectors, rtol=0, atol=0)


@double
def test_variance_of_the_weights():
    """At most 1 / max(m, n) for an m x n matrix; 4 / (sqrt(fan_in) + sqrt(fan_out))^2 for BSN."""
    for outputs, inputs, kernel in ((40, 10, 1), (10, 40, 1), (24, 8, 3), (8, 24, 3)):
        bounds = {
            "SN": 1 / max(outputs, inputs * kernel),
            "BSN": 4 / ((inputs * kernel) ** 0.5 + (outputs * kernel) ** 0.5) ** 2,
        }
        for prefix, bound in bounds.items():
            layer = make(prefix, "Conv1d", inputs, outputs, kernel, n_power_iterations=200)
            nn.init.normal_(layer.parametrizations.weight.original)
            assert layer.weight.square().mean() <= bound


# Constructors

CONSTRUCTORS = [
    ("Linear", (5, 7), {"bias": False}),
    ("Linear", (5, 7), {"dtype": torch.float64}),
    ("Linear", (5, 7), {"device": "cpu", "dtype": torch.bfloat16}),
    ("Embedding", (9, 4), {"padding_idx": 3}),
    ("Embedding", (9, 4), {"scale_grad_by_freq": True}),
    ("Embedding", (9, 4), {"sparse": True}),
    *[
        (f"Conv{n}d", (4, 6, 3), options)
        for n in (1, 2, 3)
        for options in (
            {"stride": 2, "padding": 1},
            {"padding": "same", "padding_mode": "circular"},
            {"padding": 1, "padding_mode": "reflect", "bias": False},
            {"groups": 2, "dilation": 2, "padding": "valid"},
        )
    ],
    *[
        (f"ConvTranspose{n}d", (4, 6, 3), options)
        for n in (1, 2, 3)
        for options in (
            {"stride": 2, "padding": 1, "output_padding": 1},
            {"groups": 2, "bias": False},
            {"dilation": 2},
        )
    ],
]


@pytest.mark.parametrize("kind, args, options", CONSTRUCTORS)
@each_norm
def test_arguments_of_torch_pass_through(prefix, kind, args, options):
    """With weight and sigma taken out of the way, the layer is torch's."""
    torch.manual_seed(1)
    plain = getattr(nn, kind)(*args, **options)
    torch.manual_seed(1)
    layer = make(prefix, kind, *args, scale=1e6, bound=True, **options)
    assert torch.equal(layer.parametrizations.weight.original, plain.weight)
    x = torch.randn(2, 4, *[8] * int(kind[-2])) if "Conv" in kind else example(kind)
    if x.is_floating_point():
        x = x.to(plain.weight.dtype).requires_grad_()
    outputs = [module(x) for module in (plain, layer)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    gradient = layer.parametrizations.weight.original.grad
    expected = plain.weight.grad.to_dense() if plain.weight.grad.is_sparse else plain.weight.grad
    torch.testing.assert_close(gradient, expected)


@each_norm
def test_meta_device(prefix):
    layer = make(prefix, "Conv2d", device="meta")
    assert {value.device.type for value in layer.state_dict().values()} == {"meta"}
    assert layer(torch.randn(2, 2, 5, 5, device="meta")).shape == (2, 3, 4, 4)


@each_norm
def test_embedding_from_pretrained(prefix):
    table = torch.randn(9, 4)
    layer = getattr(fastsn.nn, f"{prefix}Embedding").from_pretrained(table, freeze=True)
    assert torch.equal(layer.parametrizations.weight.original, table)
    assert not layer.parametrizations.weight.original.requires_grad
    direction = layer.weight / layer.weight.norm()
    torch.testing.assert_close(direction, table / table.norm())


@pytest.mark.parametrize(
    "options, error",
    [
        ({"n_power_iterations": 0}, ValueError),
        ({"scale": 0.0}, ValueError),
        ({"scale": float("inf")}, ValueError),
        ({"scale": "1"}, ValueError),
        ({"no_such_option": 1}, TypeError),
    ],
)
@each_norm
def test_bad_arguments(prefix, options, error):
    with pytest.raises(error):
        make(prefix, "Linear", **options)


# Checkpoints


@double
@each_kind
def test_checkpoints_are_those_of_torch(kind):
    layer = make("SN", kind)
    torchs = parametrizations.spectral_norm(getattr(nn, kind)(*arguments(kind)))
    x = example(kind)
    assert list(layer.state_dict()) == list(torchs.state_dict())
    for source, target in ((layer, torchs), (torchs, layer)):
        source.train()(x)
        target.load_state_dict(source.state_dict())
        torch.testing.assert_close(target.eval()(x), source.eval()(x))
        torch.testing.assert_close(target.train()(x), source.train()(x))


@each_kind
def test_checkpoints_with_a_second_matrix(kind):
    layer = make("BSN", kind)
    keys = {f"parametrizations.weight.{key}" for key in ("original", "0._u", "0._v")}
    if "Conv" in kind:
        keys |= {f"parametrizations.weight.0.{key}" for key in ("_u2", "_v2")}
    assert set(layer.state_dict()) - {"bias"} == keys
    twin = make("BSN", kind)
    twin.load_state_dict(layer.state_dict())
    x = example(kind)
    assert torch.equal(twin.eval()(x), layer.eval()(x))


# Representations


def test_repr():
    assert repr(fastsn.nn.SNLinear(5, 7)) == (
        "SNLinear(in_features=5, out_features=7, bias=True, dim=0, eps=1e-12, n_power_iterations=1)"
    )
    options = {"n_power_iterations": 3, "scale": 0.5, "bound": True, "zero_guard": True}
    text = repr(fastsn.nn.BSNConvTranspose2d(2, 3, 4, stride=2, **options))
    assert text.startswith("BSNConvTranspose2d(2, 3, kernel_size=(4, 4), stride=(2, 2), dim=1, ")
    for shown in ("n_power_iterations=3", "norm='bidirectional'", "scale=0.5", "bound=True"):
        assert shown in text
    assert "zero_guard=True" in text and "\n" not in text


@double
@each_kind
@each_norm
def test_repr_and_extra_repr_do_not_iterate(prefix, kind):
    layer = make(prefix, kind)
    before = copy.deepcopy(layer.state_dict())
    assert repr(layer).startswith(f"{prefix}{kind}(") and layer.extra_repr() in repr(layer)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


# Copies


def through_a_file(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


each_copy = pytest.mark.parametrize(
    "make_copy",
    [
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(lambda module: pickle.loads(pickle.dumps(module)), id="pickle"),
        pytest.param(through_a_file, id="save"),
    ],
)


@double
@each_copy
@each_kind
@each_norm
def test_copies(prefix, kind, make_copy):
    """A copy is equal and independent; to make it runs nothing."""
    layer = make(prefix, kind, scale=0.5)
    x = example(kind)
    layer(x).sum().backward()
    state = copy.deepcopy(layer.state_dict())
    twin = make_copy(layer)
    assert repr(twin) == repr(layer) and isinstance(twin, getattr(fastsn.nn, prefix + kind))
    torch.testing.assert_close(twin.state_dict(), state, rtol=0, atol=0)
    for expected, actual in zip(layer.parameters(), twin.parameters(), strict=True):
        assert actual is not expected and type(actual) is nn.Parameter
    assert torch.equal(twin(x), layer(x))

    state = copy.deepcopy(layer.state_dict())
    with torch.no_grad():
        twin.parametrizations.weight.original.mul_(2)
    twin(x)
    torch.testing.assert_close(layer.state_dict(), state, rtol=0, atol=0)


@double
@each_copy
@pytest.mark.parametrize("of_the_copy", [True, False])
def test_removal_leaves_the_other_alone(make_copy, of_the_copy):
    layer = fastsn.nn.BSNConv2d(2, 3, 2)
    twin = make_copy(layer)
    removed, other = (twin, layer) if of_the_copy else (layer, twin)
    x = example("Conv2d")
    expected = other.eval()(x)
    removed.eval()
    parametrize.remove_parametrizations(removed, "weight")
    torch.testing.assert_close(removed(x), expected)
    torch.testing.assert_close(other(x), expected)
    assert parametrize.is_parametrized(other, "weight")
    assert not parametrize.is_parametrized(removed)


@each_copy
@pytest.mark.parametrize("layer_trains", [True, False])
@pytest.mark.parametrize("norm_trains", [True, False])
def test_copies_keep_every_mode(make_copy, layer_trains, norm_trains):
    layer = fastsn.nn.SNLinear(5, 7).train(layer_trains)
    layer.parametrizations.weight[0].train(norm_trains)
    modes = [module.training for module in layer.modules()]
    assert [module.training for module in make_copy(layer).modules()] == modes


class Doubled(nn.Module):
    def forward(self, tensor):
        return 2 * tensor


@double
@each_copy
def test_copies_keep_other_parametrizations(make_copy):
    layer = fastsn.nn.SNLinear(5, 7)
    parametrize.register_parametrization(layer, "weight", Doubled())
    parametrize.register_parametrization(layer, "bias", Doubled())
    twin = make_copy(layer)
    x = example("Linear")
    torch.testing.assert_close(twin(x), layer(x))
    assert list(twin.state_dict()) == list(layer.state_dict())


@double
def test_a_shallow_copy_shares_and_both_work():
    layer = fastsn.nn.SNLinear(5, 7).eval()
    x = example("Linear")
    expected = layer(x)
    twin = copy.copy(layer)
    assert torch.equal(twin(x), expected) and torch.equal(layer(x), expected)
    assert twin.parametrizations.weight.original is layer.parametrizations.weight.original


class Custom(fastsn.nn.SNLinear):
    def __init__(self, size):
        super().__init__(size, size, n_power_iterations=2)
        self.gain = nn.Parameter(torch.tensor(3.0))

    def forward(self, x):
        return self.gain * super().forward(x)


@double
@each_copy
def test_subclasses(make_copy):
    layer = Custom(4)
    x = torch.randn(2, 4)
    twin = make_copy(layer)
    assert isinstance(twin, Custom) and repr(twin).startswith("Custom(in_features=4")
    assert torch.equal(twin(x), layer(x))


# Removal


@double
@each_kind
@each_norm
def test_removal(prefix, kind):
    layer = make(prefix, kind).eval()
    original = layer.parametrizations.weight.original
    x = example(kind)
    expected = layer(x)
    parametrize.remove_parametrizations(layer, "weight")
    assert layer.weight is original
    assert type(layer) is getattr(fastsn.nn, prefix + kind)
    plain = getattr(nn, kind)(*arguments(kind))
    plain.load_state_dict(layer.state_dict())
    for module in (layer, plain, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(module(x), expected)
    assert layer.extra_repr() == plain.extra_repr()


@double
@each_norm
def test_casting(prefix):
    layer = make(prefix, "Conv2d").float()
    assert {value.dtype for value in layer.state_dict().values()} == {torch.float32}
    assert layer(example("Conv2d").float()).dtype == torch.float32
