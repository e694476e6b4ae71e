"""`convert_batchnorm` and `apply(model, "msn")`: models that change in place."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize, prune
from torch.nn.utils import spectral_norm as torch_hook
from torch.nn.utils.parametrizations import weight_norm

import fastsn
from fastsn.nn import convert_batchnorm


def chain():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 4, stride=2, padding=1),
        nn.BatchNorm2d(4, momentum=None),
        nn.Flatten(),
        nn.Linear(4 * 64, 5),
        nn.BatchNorm1d(5, affine=False),
        nn.Linear(5, 2),
    )


class Block(nn.Module):
    def __init__(self, channels, out, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = None
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nn.Module):
    """Attributes, skip connections, and a scale of its own in the root."""

    def __init__(self):
        super().__init__()
        # The names are in another order than the calls.
        self.norm = nn.BatchNorm2d(4)
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.ModuleList([Block(4, 4), Block(4, 8, 2)])
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3))) * self.scale


RESNET_PAIRS = {
    "stem": "norm",
    "blocks.0.conv1": "blocks.0.bn1",
    "blocks.0.conv2": "blocks.0.bn2",
    "blocks.1.conv1": "blocks.1.bn1",
    "blocks.1.conv2": "blocks.1.bn2",
    "blocks.1.shortcut.0": "blocks.1.shortcut.1",
}


class Dense(nn.Module):
    """Pre-activation as in DenseNet: norms before convolutions, of what was joined."""

    def __init__(self):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(7), nn.Conv2d(7, 2, 1)

    def forward(self, x):
        x = torch.cat([x, self.conv1(F.relu(self.norm1(x)))], 1)
        return self.conv2(F.relu(self.norm2(x)))


class Deciding(nn.Module):
    """A forward that depends on numbers, blocks whose forward does not, and one whose does."""

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.bn(self.conv(x))
            return y if y.sum() > 0 else -y

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.block = Block(4, 4)
        self.part = Deciding.Part()
        self.rest = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), Deciding.Part())

    def forward(self, x):
        x = self.bn(self.conv(x))
        if x.sum() > 0:
            x = self.block(x)
        return self.rest(self.part(x))


def images(*shape):
    return torch.randn(4, 3, *(shape or (4, 4)))


def trained(model, x=images, steps=3):
    """With running statistics, scales and shifts that are not those of the start."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                nn.init.uniform_(parameter, 0.5, 2.0)
            elif name == "bias":
                nn.init.normal_(parameter)
    with torch.no_grad():
        for _ in range(steps):
            model(2 * x() + 1)
    return model


MODELS = {"chain": chain, "resnet": ResNet, "dense": Dense, "deciding": Deciding}
each_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())


def classes(model):
    return {
        name: type(module).__name__.removeprefix("Parametrized")
        for name, module in model.named_modules()
        if "parametrizations" not in name
    }


def no_batch_norm(model):
    return not any(isinstance(m, nn.modules.batchnorm._NormBase) for m in model.modules())


def assert_pairs(model, report, pairs):
    kinds = classes(model)
    joined = [line.split(" -> ")[0] for line in report.touched if " + " in line]
    assert sorted(joined) == sorted(f"{layer} + {norm}" for layer, norm in pairs.items())
    for layer, norm in pairs.items():
        assert kinds[layer].startswith("MSN") and kinds[norm] == "Identity"
    assert sum(kind.startswith("MSN") for kind in kinds.values()) == len(pairs)


# Which pairs


def test_sequential():
    model = chain()
    report = convert_batchnorm(model)
    assert list(classes(model).values()) == [
        "Sequential", "MSNConv2d", "Identity", "ReLU", "MSNConvTranspose2d", "Identity", "Flatten",
        "MSNLinear", "Identity", "Linear",
    ]  # fmt: skip
    assert str(report).splitlines() == [
        "msn applied to 3 layers, 0 skipped",
        "  + 0 + 1 -> MSNConv2d",
        "  + 3 + 4 -> MSNConvTranspose2d",
        "  + 6 + 7 -> MSNLinear",
        "  ! variances are no longer normalized: outputs change by a factor per channel, unless "
        "gain=True",
    ]


def test_attributes_and_skip_connections():
    model = ResNet()
    report = convert_batchnorm(model, gain=True)
    assert_pairs(model, report, RESNET_PAIRS)
    assert no_batch_norm(model) and not report.skipped and not report.notes


def test_norms_in_front_stand_alone():
    model = Dense()
    report = convert_batchnorm(model)
    kinds = classes(model)
    assert kinds["norm1"] == kinds["norm2"] == "MeanOnlyBatchNorm2d"
    assert kinds["conv1"] == kinds["conv2"] == "Conv2d"
    assert report.touched[0] == "norm1 -> MeanOnlyBatchNorm2d" and not report.skipped
    # No layer has a spectral norm: nothing to accelerate, and no warning about that.
    assert not model._forward_pre_hooks


def test_what_cannot_be_traced_is_traced_in_parts():
    model = Deciding()
    report = convert_batchnorm(model, gain=True)
    assert_pairs(
        model,
        report,
        {"block.conv1": "block.bn1", "block.conv2": "block.bn2", "rest.0": "rest.1"},
    )
    assert no_batch_norm(model)
    assert [note.split(" cannot")[0] for note in report.notes] == ["Deciding", "part", "rest.2"]
    for norm, note in zip(("bn", "part.bn", "rest.2.bn"), report.notes, strict=True):
        assert (
            "control flow" in note and f"what comes before {norm} is" in note and "pairs=" in note
        )
        assert "\n" not in note


def test_pairs_can_be_named():
    model = Deciding()
    named = {"conv": "bn", "part.conv": "part.bn"}
    report = convert_batchnorm(model, pairs=named)
    found = {"block.conv1": "block.bn1", "block.conv2": "block.bn2", "rest.0": "rest.1"}
    assert_pairs(model, report, named | found)
    assert model(images()).isfinite().all()


def test_named_pairs_go_first():
    model = Uses(plain_use)
    named = {"conv1": "bn2"}
    report = convert_batchnorm(model, pairs=named, filter=lambda name, module: name != "bn2")
    assert_pairs(model, report, named)
    assert report.skipped == {"conv1": "no pair with bn1: pairs names another norm for it"}


class Uses(nn.Module):
    """Two convolutions and two norms, used as `how` says."""

    def __init__(self, how, **layers):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.how = how

    def forward(self, x):
        return self.how(self, x)


class OwnConv(nn.Conv2d):
    pass


class OwnNorm(nn.BatchNorm2d):
    pass


def plain_use(m, x):
    return m.bn2(m.conv2(m.bn1(m.conv1(x))))


def twice(layer):
    """With something behind its spectral norm."""
    fastsn.parametrizations.spectral_norm(layer)
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    return layer


@pytest.mark.parametrize(
    "how, layers, reason",
    [
        (lambda m, x: m.bn2(m.conv2(m.conv1(m.bn1(m.conv1(x))))), {}, "conv1 is called 2 times"),
        (lambda m, x: m.bn2(m.conv2(m.bn1(m.bn1(m.conv1(x))))), {}, "bn1 is called 2 times"),
        (
            lambda m, x: m.bn2(m.conv2(x + m.bn1(y) + y)) if (y := m.conv1(x)) is not None else x,
            {},
            "the output of conv1 is used elsewhere too",
        ),
        (
            lambda m, x: plain_use(m, x) + m.bn1.weight.sum(),
            {},
            "a parameter of bn1 is used elsewhere too",
        ),
        (plain_use, {"conv1": weight_norm(nn.Conv2d(3, 3, 1))}, "something else than one spectral"),
        (plain_use, {"conv1": weight_norm(nn.Conv2d(3, 3, 1), "bias", None)}, "something else"),
        (plain_use, {"conv1": torch_hook(nn.Conv2d(3, 3, 1), "bias", dim=0)}, "something else"),
        (plain_use, {"conv1": twice(nn.Conv2d(3, 3, 1))}, "something else than one spectral"),
        (plain_use, {"conv1": prune.identity(nn.Conv2d(3, 3, 1), "weight")}, "something else"),
        (plain_use, {"conv1": prune.identity(nn.Conv2d(3, 3, 1), "bias")}, "its bias is no param"),
        (plain_use, {"conv1": OwnConv(3, 3, 1)}, "OwnConv is a subclass"),
        (plain_use, {"bn1": nn.BatchNorm1d(3)}, "bn1 is a BatchNorm1d"),
        (plain_use, {"bn1": nn.BatchNorm2d(4)}, "it has 3 outputs, and bn1 has 4 features"),
        (plain_use, {"conv1": nn.LazyConv2d(3, 1)}, "not initialized"),
        (plain_use, {"conv1": nn.Conv2d(3, 3, 1, dtype=torch.complex64)}, "torch.complex64"),
    ],
)
def test_layers_that_make_no_pair(how, layers, reason):
    model = Uses(how, **layers)
    report = convert_batchnorm(model)
    assert report.skipped.keys() == {"conv1"}
    assert reason in report.skipped["conv1"]
    assert report.skipped["conv1"].startswith("no pair with bn1: ")
    kinds = classes(model)
    assert not kinds["conv1"].startswith("MSN") and kinds["bn1"].startswith("MeanOnly")
    assert kinds["conv2"] == "MSNConv2d" and kinds["bn2"] == "Identity"


def test_one_norm_behind_two_layers():
    model = Uses(lambda m, x: m.bn1(m.conv2(m.bn1(m.conv1(x)))))
    del model.bn2
    report = convert_batchnorm(model)
    assert report.skipped == {"conv1": "no pair with bn1: bn1 is called 2 times"}
    assert model(images()).isfinite().all()
    assert int(model.bn1.num_batches_tracked) == 2


def test_one_layer_in_front_of_two_norms():
    model = Uses(lambda m, x: m.bn1(y := m.conv1(x)) + m.bn2(y))
    report = convert_batchnorm(model)
    reason = "the output of conv1 is used elsewhere too"
    assert report.skipped == {"conv1": f"no pair with bn1, bn2: {reason}"}


def test_norms_that_this_mode_does_not_call():
    model = Uses(lambda m, x: m.bn2(m.conv2(m.bn1(m.conv1(x)))) if m.training else m.conv2(x))
    report = convert_batchnorm(model.eval())
    assert classes(model)["bn1"] == classes(model)["bn2"] == "MeanOnlyBatchNorm2d"
    called = "is not called in the mode that the model is in"
    assert report.notes[:2] == [f"bn1 {called}", f"bn2 {called}"]


class Listed(nn.ModuleList):
    """A list with a forward of its own."""

    def forward(self, x):
        for module in self:
            x = module(x)
        return x


class Parent(nn.Module):
    """Nothing of it can be traced but what it holds."""

    def __init__(self, child):
        super().__init__()
        self.child = child

    def forward(self, x):
        return self.child(x) if x.sum() else x


def test_containers_with_a_forward():
    model = Parent(Listed([nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)]))
    assert convert_batchnorm(model).touched == ["child.0 + child.1 -> MSNConv2d"]
    model = nn.DataParallel(chain())
    assert len(convert_batchnorm(model, gain=True).touched) == 3
    assert classes(model)["module.0"] == "MSNConv2d"


def test_a_failure_of_a_part_is_undone():
    """What a forward called before it failed is not counted twice."""

    class Failing(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block(3, 3)

        def forward(self, x):
            y = self.block(x)
            return y if y.sum() > 0 else self.block(y)

    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), Failing())
    report = convert_batchnorm(model, gain=True)
    assert_pairs(
        model,
        report,
        {"0": "1", "2.block.conv1": "2.block.bn1", "2.block.conv2": "2.block.bn2"},
    )
    assert not report.notes and not report.skipped


def test_process_groups_do_not_stop_the_tracing():
    group = torch.distributed.ProcessGroup(0, 1)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4, process_group=group))
    assert convert_batchnorm(model).touched == ["0 + 1 -> MSNConv2d"]
    assert model[0].process_group is group


def test_models_that_cannot_be_copied():
    model = chain()
    model.generator = (i for i in range(3))
    report = convert_batchnorm(model, pairs={"0": "1"})
    assert classes(model)["0"] == "MSNConv2d" and classes(model)["4"] == "MeanOnlyBatchNorm2d"
    assert report.notes[0].startswith("Sequential cannot be traced (TypeError: cannot pickle")
    assert "before 4, 7 is not known" in report.notes[0]


@pytest.mark.parametrize(
    "norm, reason",
    [
        (OwnNorm(3), "OwnNorm is none of BatchNorm1d"),
        (nn.InstanceNorm2d(3), "InstanceNorm2d is none of"),
        (nn.LazyBatchNorm2d(), "not initialized"),
    ],
)
def test_norms_that_stay(norm, reason):
    model = Uses(plain_use, bn1=norm)
    kind = type(norm)
    report = convert_batchnorm(model)
    assert reason in report.skipped["bn1"]
    assert type(model.bn1) is kind and type(model.conv1) is nn.Conv2d


def test_filter():
    model = Uses(plain_use)
    seen = []
    report = convert_batchnorm(
        model, filter=lambda name, module: seen.append(module) or "2" in name
    )
    assert seen == [model.bn1, model.bn2]
    assert report.skipped == {"bn1": "the filter left it out"}
    assert type(model.bn1) is nn.BatchNorm2d and type(model.conv1) is nn.Conv2d
    assert classes(model)["conv2"] == "MSNConv2d"


def test_gamma_of_two_norms_cannot_be_a_gain():
    model = Uses(plain_use)
    model.bn2.weight = model.bn1.weight
    report = convert_batchnorm(model, gain=True)
    assert not report.touched and "of another module too" in report.skipped["bn1"]
    assert len(convert_batchnorm(model).touched) == 2


def test_twice_does_nothing():
    model = ResNet()
    convert_batchnorm(model)
    before = copy.deepcopy(model.state_dict())
    hooks = len(model._load_state_dict_pre_hooks)
    report = convert_batchnorm(model)
    assert str(report).splitlines() == [
        "msn applied to 0 layers, 0 skipped",
        "  ! nothing to do: there is no batch norm",
    ]
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert len(model._load_state_dict_pre_hooks) == hooks


class Careless(nn.Module):
    """A forward that leaves traces wherever it can."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = torch_hook(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3)
        self.register_buffer("calls", torch.zeros(()))
        self.count, self.outputs, self.plain = 0, [], torch.zeros(())

    def forward(self, x):
        self.calls += 1
        self.plain += 1
        self.count += 1
        y = self.bn(self.conv(x + torch.randn(3, 1, 1) * random.random()))
        self.outputs.append(y)
        return y


@pytest.mark.parametrize("training", [True, False])
def test_tracing_leaves_no_traces(training):
    model = nn.Sequential(Careless(), Deciding.Part(), nn.Identity()).train(training)
    inner = model[0]
    model[0].register_forward_pre_hook(lambda *_: pytest.fail("a hook was called"))
    inner.conv(images())  # the weight has a graph now, and cannot be copied
    before = copy.deepcopy(inner.state_dict())
    states = torch.get_rng_state(), random.getstate()
    report = convert_batchnorm(model, filter=lambda name, module: False)
    report = convert_batchnorm(model, filter=lambda name, module: name.startswith("1"))
    assert "1.bn" in report.notes[0]
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    torch.testing.assert_close(inner.state_dict(), before, rtol=0, atol=0)
    assert inner.count == 0 and not inner.outputs and not inner.plain.any()
    assert all(module.training is training for module in model.modules())
    report = convert_batchnorm(model)
    assert "0.conv + 0.bn -> MSNConv2d" in report.touched


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
    assert not layer._forward_pre_hooks and not layer._load_state_dict_pre_hooks
    norm = layer.parametrizations.weight[0]
    assert norm.n_power_iterations == 2 and layer.norm == norm.method.norm
    vectors = [vector for pair in norm.vectors() for vector in pair]
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
        ({"filter": lambda name, module: {}[name]}, "norm"),
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
