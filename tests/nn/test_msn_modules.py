"""MSN layers as modules: arguments, state, types, copies and folding."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn

import fastsn
from fastsn.nn import msn
from helpers.msn_cases import KINDS, assert_same_state, small, small_input, state_of

double = pytest.mark.usefixtures("double")
each_kind = pytest.mark.parametrize("kind", KINDS)
ORIGINAL = "parametrizations.weight.original"
STATE = [
    "bias",
    "running_mean",
    "num_batches_tracked",
    ORIGINAL,
    "parametrizations.weight.0._u",
    "parametrizations.weight.0._v",
]


def make(kind: str, *args, **options) -> nn.Module:
    return getattr(fastsn.nn, f"MSN{kind}")(*args, **options)


# Constructors


def test_all_of_them_are_public():
    names = {f"MSN{kind}" for kind in KINDS} | {f"MeanOnlyBatchNorm{n}d" for n in (1, 2, 3)}
    assert names <= set(fastsn.nn.__all__)
    for kind in KINDS:
        assert issubclass(getattr(fastsn.nn, f"MSN{kind}"), getattr(nn, kind))


@each_kind
def test_every_argument_of_torch_passes_through(kind):
    """By position and by keyword; each with a value that is not the default."""
    values = {
        "in_features": 4, "out_features": 6, "in_channels": 4, "out_channels": 6, "kernel_size": 3,
        "stride": 2, "padding": 1, "output_padding": 1, "groups": 2, "bias": False, "dilation": 3,
        "padding_mode": "zeros" if "Transpose" in kind else "circular", "device": "meta",
        "dtype": torch.float64,
    }  # fmt: skip
    parameters = inspect.signature(getattr(nn, kind)).parameters
    arguments = {name: values[name] for name in parameters}
    plain = getattr(nn, kind)(**arguments)
    for layer in (make(kind, **arguments), make(kind, *arguments.values())):
        assert {p.device.type for p in layer.parameters()} == {"meta"}
        assert {p.dtype for p in layer.parameters()} == {torch.float64}
        for name in set(plain.__constants__) - {"padding_mode"} | {"bias"}:
            assert getattr(layer, name) == getattr(plain, name), name
        assert layer.weight.shape == plain.weight.shape
        assert repr(plain).removesuffix(")") in repr(layer).replace("MSN", "")


@each_kind
def test_one_trainable_bias_per_channel(kind):
    sizes = (5, 4) if kind == "Linear" else (2, 3, 2)
    layer, without = make(kind, *sizes), make(kind, *sizes, bias=False)
    channels = sizes[1]
    assert {n: p.shape for n, p in layer.named_parameters() if n != ORIGINAL} == {
        "bias": (channels,)
    }
    assert not layer.bias.any()
    assert [name for name, _ in without.named_parameters()] == [ORIGINAL]
    gained = make(kind, *sizes, gain=True)
    assert gained.gain.shape == (channels,) and (gained.gain == 1).all()
    assert layer.gain is None and without.bias is None


def test_state_dict():
    assert sorted(small("Conv2d", gain=False).state_dict()) == sorted(STATE)
    assert sorted(small("Conv2d").state_dict()) == sorted([*STATE, "gain"])
    stateless = small("Conv2d", track_running_stats=False, gain=False).state_dict()
    assert sorted(stateless) == sorted(set(STATE) - {"running_mean", "num_batches_tracked"})
    second = {f"parametrizations.weight.0.{name}" for name in ("_u2", "_v2")}
    state = small("Conv2d", norm="bidirectional").state_dict()
    assert set(state) == {*STATE, "gain"} | second
    assert state["running_mean"].shape == (3,) and state["num_batches_tracked"].shape == ()
    assert state["num_batches_tracked"].dtype == torch.long


@double
@each_kind
def test_checkpoints(kind):
    layer, twin = small(kind), small(kind)
    for _ in range(2):
        layer(small_input(kind))
    twin.load_state_dict(layer.state_dict())
    x = small_input(kind)
    for training in (False, True, False):
        assert torch.equal(twin.train(training)(x), layer.train(training)(x))
    assert_same_state(twin, layer.state_dict())


def test_repr():
    assert repr(fastsn.nn.MSNLinear(5, 7)) == (
        "MSNLinear(in_features=5, out_features=7, bias=True, dim=0, eps=1e-12, "
        "n_power_iterations=1, momentum=0.1)"
    )
    layer = fastsn.nn.MSNConv2d(
        2, 3, 4, stride=2, momentum=None, gain=True, track_running_stats=False, scale=0.5,
        norm="bidirectional", process_group="world",
    )  # fmt: skip
    before = state_of(layer)
    text = repr(layer)
    assert text.startswith("MSNConv2d(2, 3, kernel_size=(4, 4), stride=(2, 2), ")
    for shown in ("momentum=None", "gain=True", "track_running_stats=False", "scale=0.5"):
        assert shown in text
    assert "norm='bidirectional'" in text and "process_group='world'" in text
    assert_same_state(layer, before)


# Resets


@each_kind
def test_reset_running_stats(kind):
    layer = small(kind)
    layer(small_input(kind))
    assert layer.running_mean.all() and layer.num_batches_tracked == 1
    before = state_of(layer)
    layer.reset_running_stats()
    changed = {"running_mean", "num_batches_tracked"}
    assert_same_state(layer, before | {name: torch.zeros_like(before[name]) for name in changed})
    small(kind, track_running_stats=False).reset_running_stats()


@each_kind
def test_reset_parameters(kind):
    """All parameters as a new layer has them, and no statistics."""
    layer = small(kind)
    layer(small_input(kind))
    original = layer.parametrizations.weight.original
    before = original.detach().clone()
    layer.reset_parameters()
    assert layer.parametrizations.weight.original is original
    assert not (original == before).any()
    assert not layer.bias.any() and (layer.gain == 1).all()
    assert not layer.running_mean.any() and layer.num_batches_tracked == 0


# Types and devices


@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
def test_statistics_keep_their_precision(kind, cast):
    layer = small(kind, momentum=1)
    layer(small_input(kind))
    mean = layer.running_mean.clone()
    getattr(layer, cast)()
    dtype = {"half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}
    assert {p.dtype for p in layer.parameters()} == {dtype.get(cast, torch.float32)}
    wide = torch.float64 if cast == "double" else torch.float32
    assert torch.equal(layer.running_mean, mean.to(wide)) and layer.running_mean.dtype == wide
    assert layer.num_batches_tracked.dtype == torch.long
    x = small_input(kind).to(layer.bias.dtype)
    for training in (True, False):
        assert layer.train(training)(x).dtype == layer.bias.dtype
    assert layer.running_mean.dtype == wide and "running_mean" in layer.state_dict()
    assert layer.to(torch.float32).running_mean.dtype == torch.float32


@each_kind
def test_layers_of_low_precision_from_the_start(kind):
    sizes = (5, 4) if kind == "Linear" else (2, 3, 2)
    layer = make(kind, *sizes, dtype=torch.bfloat16, gain=True)
    assert layer.running_mean.dtype == torch.float32
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    layer(small_input(kind).bfloat16()).sum().backward()
    assert {p.grad.dtype for p in layer.parameters()} == {torch.bfloat16}


@each_kind
def test_meta_device(kind):
    sizes = (5, 4) if kind == "Linear" else (2, 3, 2)
    layer = small(kind)
    y = layer(small_input(kind))
    for moved in (copy.deepcopy(layer).to("meta"), make(kind, *sizes, device="meta")):
        assert {value.device.type for value in moved.state_dict().values()} == {"meta"}
        x = small_input(kind, device="meta")
        assert layer.to("meta")(x).shape == y.shape == layer.eval()(x).shape
    back = copy.deepcopy(moved).bfloat16().to_empty(device="cpu")
    assert back.running_mean.dtype == torch.float32 and back.running_mean.device.type == "cpu"


@pytest.mark.parametrize("kind", ["Conv2d", "ConvTranspose2d"])
@pytest.mark.parametrize("threshold", [0.0, float("inf")], ids=["direct", "folded"])
def test_memory_format(kind, threshold, monkeypatch):
    monkeypatch.setattr(msn, "_DIRECT", threshold)
    layer = fastsn.nn.__dict__[f"MSN{kind}"](8, 6, 3, gain=True)
    for memory_format in (torch.channels_last, torch.contiguous_format):
        layer.to(memory_format=memory_format)
        for training in (True, False):
            x = torch.randn(2, 8, 5, 5).to(memory_format=memory_format).requires_grad_()
            y = layer.train(training)(x)
            assert y.is_contiguous(memory_format=memory_format)
            y.square().sum().backward()
            assert x.grad.is_contiguous(memory_format=memory_format)


# Copies


def through_a_file(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "save": through_a_file,
}
each_copy = pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES.keys())


@double
@each_copy
@each_kind
@pytest.mark.parametrize("group", [None, "world"])
def test_copies(kind, make_copy, group):
    """A copy is equal and independent; to make it runs nothing."""
    layer = small(kind, momentum=0.3, norm="bidirectional", process_group=None)
    layer(small_input(kind)).sum().backward()
    layer.process_group = group
    before = state_of(layer)
    twin = make_copy(layer)
    assert repr(twin) == repr(layer) and isinstance(twin, getattr(fastsn.nn, f"MSN{kind}"))
    assert twin.process_group == group
    assert_same_state(twin, before), assert_same_state(layer, before)
    layer.process_group = twin.process_group = None
    x = small_input(kind)
    for training in (True, False):
        assert torch.equal(twin.train(training)(x), layer.train(training)(x))
    before = state_of(layer)
    twin.train()(x)
    assert_same_state(layer, before)
    assert not torch.equal(twin.running_mean, layer.running_mean)


# Folding


@double
@each_kind
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gain", [True, False])
def test_fold(kind, bias, gain):
    layer = small(kind, bias=bias, gain=gain)
    for _ in range(3):
        layer(small_input(kind))
    before = state_of(layer)
    plain = fastsn.fold(layer)
    assert type(plain) is getattr(nn, kind)
    assert sorted(plain.state_dict()) == ["bias", "weight"]
    assert {n for n, _ in plain.named_parameters()} == {"bias", "weight"}
    assert set(vars(plain)) == set(vars(getattr(nn, kind)(*([2] * (2 + (kind != "Linear"))))))
    x = small_input(kind)
    torch.testing.assert_close(plain(x), layer.eval()(x))
    torch.testing.assert_close(plain.train()(x), layer(x))
    assert_same_state(layer, before)
    copied = pickle.loads(pickle.dumps(plain))
    assert torch.equal(copied(x), plain(x))


@double
def test_fold_of_a_network():
    model = nn.Sequential(
        small("Conv2d"), nn.ReLU(), nn.Flatten(), fastsn.nn.MSNLinear(27, 4), nn.Linear(4, 2)
    )
    fastsn.accelerate(model)
    for _ in range(3):
        model(small_input("Conv2d"))
    x = small_input("Conv2d")
    plain = fastsn.fold(model)
    torch.testing.assert_close(plain(x), model.eval()(x))
    assert [type(m) for m in plain if list(m.parameters())] == [nn.Conv2d, nn.Linear, nn.Linear]
    assert len(plain.state_dict()) == 6


def test_fold_needs_a_mean():
    model = nn.Sequential(nn.Linear(3, 3), fastsn.nn.MSNLinear(3, 2, track_running_stats=False))
    before = state_of(model)
    with pytest.raises(ValueError, match="track_running_stats=True, got 1 without"):
        fastsn.fold(model)
    assert_same_state(model, before)
