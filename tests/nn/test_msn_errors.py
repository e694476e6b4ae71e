"""What is no argument, no input or no process group for an MSN layer; and what NaN does to it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastsn
from fastsn.nn import msn
from helpers.msn_cases import KINDS, TwoStep, assert_same_state, small, small_input, state_of

double = pytest.mark.usefixtures("double")
each_kind = pytest.mark.parametrize("kind", KINDS)


def norm_with(group) -> nn.Module:
    return fastsn.nn.MeanOnlyBatchNorm2d(2, process_group=group)


def layer_with(group) -> nn.Module:
    return small("Conv2d", process_group=group)


@pytest.mark.parametrize("momentum", [-0.1, 1.1, "0.1", float("nan")])
@pytest.mark.parametrize(
    "build",
    [
        lambda **options: fastsn.nn.MSNLinear(3, 2, **options),
        lambda **options: fastsn.nn.MeanOnlyBatchNorm2d(3, **options),
    ],
    ids=["MSN", "mean-only"],
)
def test_bad_momentum(build, momentum):
    text = rf"momentum must be None or in \[0, 1\], got {momentum!r}"
    with pytest.raises(ValueError, match=text):
        build(momentum=momentum)


@pytest.mark.parametrize(
    "options, error",
    [
        ({"n_power_iterations": 0}, ValueError),
        ({"scale": 0.0}, ValueError),
        ({"norm": "spectral"}, ValueError),
        ({"no_such_option": 1}, TypeError),
    ],
)
def test_bad_arguments(options, error):
    with pytest.raises(error):
        small("Conv2d", **options)


# Inputs

ONE_VALUE = "Expected more than 1 value per channel when training, got input size"
BAD_INPUTS = {
    "one value": ("Linear", {}, (1, 5), ONE_VALUE),
    "vector": ("Linear", {}, (5,), ONE_VALUE),
    "one output": ("Conv2d", {}, (1, 2, 2, 2), ONE_VALUE),
    "one output, unbatched": ("Conv1d", {}, (2, 2), ONE_VALUE),
    "empty batch": ("Conv2d", {}, (0, 2, 4, 4), ONE_VALUE),
    "channels": ("Conv2d", {}, (3, 1, 4, 4), r"\(N, 2, H, W\) or \(2, H, W\), got \(3, 1, 4, 4\)"),
    "channels, transposed": ("ConvTranspose1d", {}, (3, 4, 2), r"\(N, 2, L\).*got \(3, 4, 2\)"),
    "features": ("Linear", {}, (3, 4), r"\(\*, 5\), got \(3, 4\)"),
    "scalar": ("Linear", {}, (), r"\(\*, 5\), got \(\)"),
    "few dimensions": ("Conv3d", {}, (2, 4, 4), r"\(N, 2, D, H, W\).*got \(2, 4, 4\)"),
    "many dimensions": ("Conv1d", {}, (1, 3, 2, 4), r"\(N, 2, L\).*got \(1, 3, 2, 4\)"),
    "small": ("Conv2d", {"dilation": 4}, (3, 2, 4, 4), "at least one output along each dimension"),
    "small, transposed": (
        "ConvTranspose1d", {"padding": 2}, (3, 2, 1), "at least one output along each dimension",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind, options, shape, text", BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
@pytest.mark.parametrize("threshold", [0.0, float("inf")], ids=["direct", "folded"])
def test_bad_inputs_change_nothing(kind, options, shape, text, threshold, monkeypatch):
    monkeypatch.setattr(msn, "_DIRECT", threshold)
    layer = small(kind, **({"padding": 0} if "Conv" in kind else {}) | options)
    before = state_of(layer)
    x = torch.randn(shape)
    with pytest.raises(ValueError, match=text):
        layer(x)
    assert_same_state(layer, before)
    layer.eval()
    if text is ONE_VALUE:  # which is none where the mean comes from elsewhere
        assert layer(x).isfinite().all()
    else:
        with pytest.raises(ValueError, match=text):
            layer(x)
    assert_same_state(layer, before)


def test_padding_that_does_not_fit_changes_nothing():
    layer = fastsn.nn.MSNConv2d(2, 3, 3, padding=2, padding_mode="reflect")
    before = state_of(layer)
    with pytest.raises(RuntimeError, match="[Pp]adding size should be less"):
        layer(torch.randn(3, 2, 2, 2))
    transposed = fastsn.nn.MSNConvTranspose1d(2, 3, 3, stride=2)
    state = state_of(transposed)
    with pytest.raises(ValueError, match="requested an output size of"):
        transposed(torch.randn(2, 2, 4), output_size=[30])
    assert_same_state(layer, before), assert_same_state(transposed, state)


@pytest.mark.parametrize("threshold", [0.0, float("inf")], ids=["direct", "folded"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_running_means_outlive_nan(bad, momentum, threshold, monkeypatch):
    """It comes out where it should, and the mean of the channels that it meets stays."""
    monkeypatch.setattr(msn, "_DIRECT", threshold)
    layer = fastsn.nn.MSNConv2d(4, 6, 3, groups=2, momentum=momentum)
    layer(torch.randn(2, 4, 5, 5))
    mean = layer.running_mean.clone()
    x = torch.randn(2, 4, 5, 5)
    x[1, 2, 3, 3] = bad
    y = layer(x)
    assert not y[:, 3:].isfinite().any() and y[:, :3].isfinite().all()
    assert torch.equal(layer.running_mean[3:], mean[3:])
    assert not (layer.running_mean[:3] == mean[:3]).any()
    assert layer.num_batches_tracked == 2
    vectors = [value for name, value in layer.named_buffers() if name.endswith(("_u", "_v"))]
    assert all(vector.isfinite().all() for vector in vectors)


@double
@each_kind
def test_eval_before_any_training(kind):
    """The mean is 0: the layer is the plain one with its normalized weight."""
    layer = small(kind, gain=False).eval()
    with torch.no_grad():
        layer.bias.zero_()
    definition = TwoStep(layer)
    x = small_input(kind)
    torch.testing.assert_close(layer(x), definition.plain({"weight": layer.weight}, (x,)))
    assert not layer.running_mean.any() and layer.num_batches_tracked == 0


# Process groups


@pytest.fixture
def world(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group(
        "gloo", init_method=(tmp_path / "rendezvous").as_uri(), rank=0, world_size=1
    )
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("build", [layer_with, norm_with], ids=["MSN", "mean-only"])
def test_a_copy_shares_the_process_group(build, world):
    layer = build(world)
    twin = copy.deepcopy(layer)
    assert twin.process_group is world
    x = small_input("Conv2d")
    assert torch.equal(twin(x), layer(x))


@pytest.mark.parametrize("build", [layer_with, norm_with], ids=["MSN", "mean-only"])
def test_a_process_group_stays_in_its_process(build, world):
    """It means nothing elsewhere, and must not be lost without a word."""
    layer = build(world)
    with pytest.raises((TypeError, pickle.PicklingError), match="[Pp]rocess.?[Gg]roup"):
        pickle.dumps(layer)
    assert layer.process_group is world


@pytest.mark.parametrize("build", [layer_with, norm_with], ids=["MSN", "mean-only"])
@pytest.mark.parametrize("group", ["world", object()], ids=["world", "group"])
def test_a_process_group_that_is_not_initialized(build, group):
    layer = build(group)
    before = state_of(layer)
    x = small_input("Conv2d")
    with pytest.raises(RuntimeError, match="init_process_group first, or use process_group=None"):
        layer(x)
    assert_same_state(layer, before)
    assert layer.eval()(x).isfinite().all()


@pytest.mark.parametrize("build", [layer_with, norm_with], ids=["MSN", "mean-only"])
def test_a_process_group_of_one(build, world):
    """Like none at all."""
    layer, alone = build("world"), build(None)
    alone.load_state_dict(layer.state_dict())
    x = small_input("Conv2d")
    assert torch.equal(layer(x), alone(x))
    assert_same_state(layer, alone.state_dict())
    with pytest.raises(ValueError, match=ONE_VALUE):
        layer(x[:1, :, :1, :1])
