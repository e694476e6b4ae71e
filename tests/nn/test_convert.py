"""`convert_batchnorm`: which layers and norms of a model become one."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils import spectral_norm as torch_hook
from torch.nn.utils.parametrizations import weight_norm

import fastsn
from fastsn.nn import convert_batchnorm
from helpers.convertible import (
    RESNET_PAIRS,
    Block,
    Deciding,
    Dense,
    ResNet,
    Uses,
    assert_pairs,
    chain,
    classes,
    images,
    no_batch_norm,
)

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
