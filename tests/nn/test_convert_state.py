"""`convert_batchnorm` and `apply(model, "msn")`: what carries over, what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import spectral_norm as torch_hook

import fastsn
from fastsn.checkpoints import convert
from fastsn.nn import convert_batchnorm
from helpers.convertible import (
    RESNET_PAIRS,
    ResNet,
    Uses,
    classes,
    each_model,
    images,
    no_batch_norm,
    trained,
)

# What carries over


@each_model
def test_gain_preserves_what_eval_mode_does(build, double):
    model = trained(build()).eval()
    x = images()
    with torch.no_grad():
        expected = model(x)
        convert_batchnorm(model, gain=True)
        assert no_batch_norm(model)
        actual = model(x)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"norm": "bidirectional", "scale": 2.5},
        {"bound": True, "scale": 0.3},
        {"bound": True, "scale": 1e6},
        {"zero_guard": True, "n_power_iterations": 3},
    ],
    ids=str,
)
def test_gain_preserves_with_every_method(options, double):
    model = trained(ResNet()).eval()
    x = images()
    with torch.no_grad():
        expected = model(x)
        convert_batchnorm(model, gain=True, **options)
        torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-11)
    norm = model.stem.parametrizations.weight[0]
    assert norm.n_power_iterations == options.get("n_power_iterations", 1)
    assert norm.method.scale == options.get("scale", 1.0)
    assert model.stem.norm == norm.method.norm == options.get("norm", "matrix")


def test_gain_preserves_in_single_precision():
    model = trained(ResNet()).eval()
    x = images()
    with torch.no_grad():
        expected = model(x)
        convert_batchnorm(model, gain=True)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def normalized_layers():
    def conv():
        return nn.Conv2d(3, 6, 3)

    return {
        "torch-hook": torch_hook(conv(), n_power_iterations=2),
        "torch-parametrized": torch_parametrizations.spectral_norm(conv(), n_power_iterations=2),
        "hook": fastsn.spectral_norm(conv(), n_power_iterations=2, scale=3.0),
        "hook-bsn": fastsn.spectral_norm(conv(), n_power_iterations=2, norm="bidirectional"),
        "parametrized": fastsn.parametrizations.spectral_norm(conv(), n_power_iterations=2),
        "module": fastsn.nn.SNConv2d(3, 6, 3, n_power_iterations=2),
        "module-bsn": fastsn.nn.BSNConv2d(3, 6, 3, n_power_iterations=2, scale=0.5),
    }


@pytest.mark.parametrize("name", normalized_layers())
@pytest.mark.parametrize("accelerated", [False, True])
def test_spectral_norms_carry_over(name, accelerated, double):
    layer = normalized_layers()[name]
    model = trained(nn.Sequential(layer, nn.BatchNorm2d(6)))
    if accelerated:
        fastsn.accelerate(model)
    model.eval()
    state = {k.replace("weight_orig", "original"): v.clone() for k, v in model.state_dict().items()}
    x = images()
    with torch.no_grad():
        expected = model(x)
        before = torch.get_rng_state()
        report = convert_batchnorm(model, gain=True, scale=7.0)
        actual = model(x)
    assert "hook" in name or torch.equal(torch.get_rng_state(), before)
    assert report.touched == ["0 + 1 -> MSNConv2d"]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert layer is model[0] and not hasattr(layer, "weight_orig") and not layer._state_dict_hooks
    assert not layer._forward_pre_hooks
    loading = {hook.hook for hook in layer._load_state_dict_pre_hooks.values()}
    assert loading <= {convert.load}  # and not that of the hook form, which would want its keys
    norm = layer.parametrizations.weight[0]
    assert norm.n_power_iterations == 2 and layer.norm == norm.method.norm
    vectors = [vector for pair in norm.vectors(norm) for vector in pair]
    kept = [v for k, v in state.items() if k.endswith(("_u", "_v", "_u2", "_v2"))]
    assert len(vectors) == len(kept) == (4 if "bsn" in name else 2)
    assert all(any(torch.equal(a, b) for b in kept) for a in vectors)
    iterates = norm._u.clone()
    model.train()(images())
    assert not torch.equal(iterates, norm._u)


def test_without_gain_mean_and_bias_carry_over():
    conv, bn = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, momentum=0.3)
    model = trained(nn.Sequential(conv, bn))
    weight, conv_bias, bias = conv.weight, conv.bias, bn.bias
    mean, count = bn.running_mean.clone(), bn.num_batches_tracked.clone()
    convert_batchnorm(model)
    assert conv.parametrizations.weight.original is weight and conv.bias is bias
    assert conv.gain is None and conv.momentum == 0.3 and conv.num_batches_tracked == count == 3
    assert conv.running_mean.dtype == torch.float32
    factor = (conv.eval().weight / weight).mean()
    torch.testing.assert_close(conv.running_mean, (mean - conv_bias) * factor)
    assert not list(bn.parameters()) + list(bn.buffers())
    assert vars(bn).keys() == vars(nn.Identity()).keys()
    assert {n for n, _ in conv.named_parameters()} == {"bias", "parametrizations.weight.original"}


def test_running_mean_is_that_of_training(double):
    """What the converted layer would have tracked itself, on the same batches."""
    conv, bn = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, momentum=None)
    model = nn.Sequential(conv, bn)
    batches = [images(6, 6) for _ in range(3)]
    with torch.no_grad():
        for batch in batches:
            model(batch)
        convert_batchnorm(model)
        carried = conv.running_mean.clone()
        conv.reset_running_stats()
        conv.parametrizations.eval()
        for batch in batches:
            model(batch)
    torch.testing.assert_close(carried, conv.running_mean, rtol=1e-12, atol=1e-12)


def test_alone_mean_and_bias_carry_over():
    bn = trained(nn.BatchNorm2d(3, momentum=None))
    bias, mean = bn.bias, bn.running_mean.clone()
    report = convert_batchnorm(bn)
    assert type(bn) is fastsn.nn.MeanOnlyBatchNorm2d and report.touched[0].startswith("the model")
    assert bn.bias is bias and bn.gain is None and bn.momentum is None
    assert torch.equal(bn.running_mean, mean) and bn.num_batches_tracked == 3
    assert dict(bn.named_buffers()).keys() == {"running_mean", "num_batches_tracked"}
    x = images()
    expected = x - mean.view(3, 1, 1) + bias.view(3, 1, 1)
    torch.testing.assert_close(bn.eval()(x), expected)


@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("track", [False, True])
def test_settings_of_the_norm(gain, affine, track):
    model = Uses(lambda m, x: m.bn2(F.relu(m.bn1(m.conv1(x)))))
    for name in ("bn1", "bn2"):
        setattr(model, name, nn.BatchNorm2d(3, affine=affine, track_running_stats=track))
    trained(model).eval()
    x = images()
    with torch.no_grad():
        expected = model(x)
        convert_batchnorm(model, gain=gain)
        actual = model(x)
    for layer in (model.conv1, model.bn2):
        assert (layer.bias is not None) is affine and (layer.gain is not None) is gain
        assert layer.track_running_stats is track and (layer.running_mean is not None) is track
        assert "gain" not in repr(layer) or gain
    if gain and track:
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_old_and_new_modes():
    """A frozen norm makes a layer that does not use its batch, but still iterates."""
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), steps=1)
    model[1].eval()
    convert_batchnorm(model)
    conv = model[0]
    assert not conv.training and conv.parametrizations.weight[0].training and model.training
    before = conv.num_batches_tracked.clone()
    model(images())
    assert conv.num_batches_tracked == before
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    convert_batchnorm(model)
    assert not any(module.training for module in model.modules())


def test_requires_grad_and_types_stay():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).to(torch.bfloat16)
    model[0].weight.requires_grad_(False)
    model[1].weight.requires_grad_(False)
    convert_batchnorm(model, gain=True)
    conv = model[0]
    assert not conv.parametrizations.weight.original.requires_grad and conv.bias.requires_grad
    assert not conv.gain.requires_grad
    assert conv.gain.dtype == conv.bias.dtype == torch.bfloat16
    assert conv.running_mean.dtype == torch.float32
    assert model(images().bfloat16()).dtype == torch.bfloat16


def test_zero_weight():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    nn.init.zeros_(model[0].weight)
    model(images())
    convert_batchnorm(model, gain=True, zero_guard=True)
    assert not model[0].running_mean.any() and model[0].gain.isfinite().all()
    assert model.eval()(images()).isfinite().all()


def test_optimizer_from_before_still_trains():
    model = ResNet()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    x, target = images(), torch.randint(3, (4,))

    def step():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    step()
    convert_batchnorm(model, gain=True)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in model.parameters()} <= held
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = [step() for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and not torch.equal(parameter, before[name]), name


def test_is_accelerated():
    model = ResNet()
    convert_batchnorm(model)
    assert set(fastsn.sigmas(model)) == {f"{layer}.weight" for layer in RESNET_PAIRS}
    assert len(model._forward_pre_hooks) == 1


def test_training_output_has_no_mean(double):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4))
    nn.init.normal_(model[1].bias)
    bias = model[1].bias
    convert_batchnorm(model)
    torch.testing.assert_close(model(images(7, 5)).mean((0, 2, 3)), bias)


@pytest.mark.parametrize("given", [None, "other"])
def test_synchronized_norms(given):
    group = object()
    model = Uses(
        lambda m, x: m.bn2(m.bn1(m.conv1(x))),
        bn1=nn.SyncBatchNorm(3),
        bn2=nn.SyncBatchNorm(3, process_group=group),
    )
    convert_batchnorm(model, process_group=given)
    assert model.conv1.process_group == (given or "world")
    assert model.bn2.process_group is (given or group)
    assert classes(model)["bn2"] == "MeanOnlyBatchNorm"
    for x in (torch.randn(2, 3), torch.randn(2, 3, 4), images(), images(2, 2, 2)):
        assert model.bn2.eval()(x).shape == x.shape
    with pytest.raises(RuntimeError, match="init_process_group"):
        model.conv1.train()(images())


# Errors


@pytest.mark.parametrize(
    "options, message",
    [
        ({"pairs": {"stemm": "norm"}}, "got 'stemm'; there are norm, stem"),
        ({"pairs": {"stem": "norm2"}}, "got 'norm2'"),
        ({"pairs": {"norm": "stem"}}, "got 'norm': 'stem'"),
        ({"pairs": {"stem": "head"}}, "Linear is none of BatchNorm1d"),
        ({"pairs": {"stem": "blocks.1.bn1"}}, "4 outputs, and blocks.1.bn1 has 8 features"),
        ({"pairs": {"stem": "norm", "blocks.0.conv1": "norm"}}, "every norm once"),
        ({"norm": "max"}, "norm must be .*'max'"),
        ({"scale": 0.0}, "scale must be .*0.0"),
        ({"n_power_iterations": 0}, "n_power_iterations=0"),
        pytest.param({"filter": lambda name, module: {}[name]}, "norm", id="filter"),
    ],
    ids=str,
)
def test_errors_leave_the_model_unchanged(options, message):
    model = ResNet()
    before, kinds = copy.deepcopy(model.state_dict()), classes(model)
    with pytest.raises((ValueError, KeyError), match=message):
        convert_batchnorm(model, **options)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert classes(model) == kinds and not model._forward_pre_hooks
    assert not model._load_state_dict_pre_hooks


def test_distributed_models_are_refused():
    model = nn.parallel.DistributedDataParallel
    with pytest.raises(ValueError, match="DistributedDataParallel.*convert first"):
        convert_batchnorm(model.__new__(model))


def test_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    convert_batchnorm(model, gain=True)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    convert_batchnorm(trained(other), gain=True)
    model.load_state_dict(other.state_dict(), assign=True)
    x = images()
    assert torch.equal(model.eval()(x), other.eval()(x))


# apply


def test_apply():
    model = ResNet()
    model.embed = nn.Embedding(3, 4)
    model.eval()
    model.blocks[0].conv1 = torch_hook(model.blocks[0].conv1)
    bias = model.stem.bias
    report = fastsn.apply(model, "msn", lambda name, m: name != "head", momentum=None, gain=True)
    assert classes(model)["stem"] == classes(model)["blocks.0.conv1"] == "MSNConv2d"
    assert type(model.head) is nn.Linear and type(model.norm) is nn.BatchNorm2d
    assert model.stem.bias is bias and model.stem.momentum is None and model.stem.gain.all()
    assert report.touched == [f"{layer}.weight" for layer in RESNET_PAIRS]
    assert report.skipped["embed"] == "Embedding is no convolution or linear layer"
    assert report.skipped["head"] == "the filter left it out"
    assert "no convolution or linear layer" in report.skipped["norm"]
    assert not any(module.training for module in model.modules())
    assert model.train()(images()).isfinite().all() and model.stem.running_mean.any()
    again = fastsn.apply(model, "msn", lambda name, module: name != "head")
    assert not again.touched and again.skipped["stem"] == "it is an MSN layer already"


@pytest.mark.parametrize(
    "method, options, message",
    [
        ("sn", {"gain": True}, "for method 'msn', got .*gain=True"),
        ("bsn", {"momentum": None}, "momentum=None"),
        ("sn", {"process_group": "world"}, "process_group='world'"),
        ("msn", {"momentum": 2.0}, "momentum must be None or in"),
        ("msn", {"scale": -1.0}, "scale must be"),
    ],
)
def test_apply_errors(method, options, message):
    model = ResNet()
    kinds = classes(model)
    with pytest.raises(ValueError, match=message):
        fastsn.apply(model, method, **options)
    assert classes(model) == kinds
