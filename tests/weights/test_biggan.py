"""Layers written as in BigGAN-PyTorch keep their numbers, buffers and checkpoints when accelerated.

The layers here are made from that project's public behaviour: a method `W_` that normalizes, u as a
buffer of shape (1, rows) per singular value, the last sigma in another, v first, and iterations in
eval mode that are not kept.
"""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsn
from helpers.accelerated import assert_same_steps, calls_of, fused, pair, step
from helpers.biggan import Conv, Embedding, Linear, Normalizing

double = pytest.mark.usefixtures("double")


class Discriminator(nn.Module):
    def __init__(self, transpose=False, **options):
        super().__init__()
        self.conv1 = Conv(3, 6, 3, **options)
        self.conv2 = Conv(6, 8, 1, **options)
        self.linear = Linear(8, 5, transpose=transpose, **options)
        self.embed = Embedding(4, 5, **options)

    def forward(self, image, label):
        features = self.conv2(torch.tanh(self.conv1(image))).sum((2, 3))
        return (self.linear(features) * self.embed(label)).sum(1)


def example():
    return torch.randn(3, 3, 4, 4), torch.tensor([0, 3, 1])


OPTIONS = [{}, {"num_itrs": 3}, {"transpose": True}, {"eps": 5.0}]
each_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


@double
@each_option
def test_numbers_and_buffers_are_unchanged(options):
    plain, fast = pair(lambda: Discriminator(**options))
    for mode in (True, True, False, False, True):
        plain.train(mode), fast.train(mode)
        assert_same_steps(plain, fast, *example(), steps=1)


@double
@each_option
def test_evaluation_iterates_and_keeps_nothing(options):
    plain, fast = pair(lambda: Discriminator(**options))
    before = copy.deepcopy(fast.state_dict())
    x = example()
    outputs = [model.eval()(*x) for model in (plain, fast, fast)]
    torch.testing.assert_close(outputs[1], outputs[0])
    assert torch.equal(outputs[2], outputs[1])
    torch.testing.assert_close(fast.state_dict(), before, rtol=0, atol=0)


@double
def test_two_forwards_before_one_backward():
    plain, fast = pair(Discriminator)
    real, fake = example(), example()
    for model in (plain, fast):
        for _ in range(2):
            (model(*real).square() - model(*fake).square()).sum().backward()
    for expected, actual in zip(plain.parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad)
    torch.testing.assert_close(fast.state_dict(), plain.state_dict())


@double
def test_gradient_penalty():
    plain, fast = pair(Discriminator)
    image, label = example()
    image.requires_grad_()
    for model in (plain, fast):
        (slope,) = torch.autograd.grad(model(image, label).sum(), image, create_graph=True)
        slope.square().sum().backward()
    # The biases of the last layers have no share in the penalty.
    gradients = [
        {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        for model in (plain, fast)
    ]
    assert len(gradients[0]) > 4
    torch.testing.assert_close(gradients[1], gradients[0])


@double
def test_one_call_per_forward():
    model = fastsn.accelerate(Discriminator())
    x = example()
    assert calls_of(lambda: model(*x)) == fused(4)
    assert calls_of(lambda: model.eval()(*x)) == fused(4)
    assert calls_of(lambda: model.linear(torch.randn(2, 8))) == fused(1)


@double
def test_beside_other_forms():
    def build():
        layers = [Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 6)]
        nn.utils.parametrizations.spectral_norm(layers[1])
        nn.utils.spectral_norm(layers[2])
        return nn.Sequential(*layers)

    plain, fast = pair(build)
    # The hook iterates v first too, and shares the call.
    assert sorted(calls_of(lambda: fast(torch.randn(2, 5)))) == sorted(fused(2, 1))
    plain(torch.randn(2, 5))
    assert_same_steps(plain, fast, torch.randn(2, 5))


@double
def test_checkpoints_load_both_ways():
    plain, fast = pair(Discriminator)
    x = example()
    assert list(fast.state_dict()) == list(plain.state_dict())
    for source, target in ((plain, fast), (fast, plain)):
        source.train()(*x)
        target.load_state_dict(source.state_dict())
        torch.testing.assert_close(target.eval()(*x), source.eval()(*x))


@double
def test_reads_outside_of_the_forward():
    plain, fast = pair(Discriminator)
    x = example()
    for _ in range(2):
        torch.testing.assert_close(fast.conv1.W_(), plain.conv1.W_())
        torch.testing.assert_close(fast(*x), plain(*x))
    torch.testing.assert_close(fast.state_dict(), plain.state_dict())


@double
def test_a_layer_used_twice_iterates_for_each_use():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Linear(5, 5)

        def forward(self, x):
            return self.layer(torch.tanh(self.layer(x)))

    assert_same_steps(*pair(Twice), torch.randn(3, 5))


@double
@pytest.mark.filterwarnings("ignore:fastsn.accelerate found no layer")
@pytest.mark.parametrize(
    "build", [lambda: Linear(6, 5, num_svs=2), lambda: Conv(2, 18, 3, transpose=True)]
)
def test_what_has_no_counterpart_is_left_alone(build):
    """Several singular values, and a transposed matrix of a convolution."""

    def root():
        return nn.Sequential(build())

    plain, fast = pair(root)
    assert "W_" not in vars(fast[0])
    x = torch.randn(3, 2, 4, 4) if isinstance(fast[0], nn.Conv2d) else torch.randn(3, 6)
    assert calls_of(lambda: fast(x)) == []
    plain(x)
    assert_same_steps(plain, fast, x)


@double
@pytest.mark.parametrize(
    "make_copy", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_copies_are_accelerated_and_independent(make_copy):
    plain, fast = pair(Discriminator)
    x = example()
    plain(*x), fast(*x)
    twin = make_copy(fast)
    state = copy.deepcopy(twin.state_dict())
    assert calls_of(lambda: fast(*x)) == fused(4)
    torch.testing.assert_close(twin.state_dict(), state, rtol=0, atol=0)
    assert calls_of(lambda: twin(*x)) == fused(4)
    plain(*x)
    assert_same_steps(plain, twin, *x)


@double
@pytest.mark.parametrize("folded", [False, True])
def test_pickles_work_in_another_process(monkeypatch, folded):
    """There nothing has been accelerated yet."""
    plain, fast = pair(Discriminator)
    pickled = pickle.dumps(fastsn.fold(fast) if folded else fast)
    monkeypatch.setattr(Normalizing, "W_", inspect.unwrap(Normalizing.W_))
    twin = pickle.loads(pickled)
    x = example()
    if folded:
        torch.testing.assert_close(twin(*x), plain.eval()(*x))
    else:
        assert_same_steps(plain, twin, *x)


@double
def test_replicas_use_their_own_tensors():
    """A replica of DataParallel has weight and u on another device."""
    plain, fast = pair(lambda: nn.Sequential(Linear(5, 6)))
    outputs = []
    for model in (plain, fast):
        torch.manual_seed(2)
        replica = model[0]._replicate_for_data_parallel()
        replica.weight = torch.randn(6, 5)
        replica.u0 = torch.randn(1, 6)
        outputs.append([replica.W_(), replica.u0, model[0].u0])
    torch.testing.assert_close(outputs[1], outputs[0])


# The compiler looks at `grad` of every input, and hides the warning that this may raise.
@double
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_with_a_full_graph():
    plain, fast = pair(Discriminator)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    for mode in (True, True, False, True):
        plain.train(mode), fast.train(mode)
        x = example()
        torch.testing.assert_close(step(fast, *x, forward=compiled), step(plain, *x))


# Calls on the whole model


@double
@each_option
def test_refresh(options):
    plain, fast = pair(lambda: Discriminator(**options))
    layers = {name: layer for name, layer in plain.named_modules() if hasattr(layer, "W_")}
    for mode in (True, False):
        plain.train(mode), fast.train(mode)
        weights = fastsn.refresh(fast)
        assert weights.keys() == {f"{name}.weight" for name in layers}
        for name, layer in layers.items():
            torch.testing.assert_close(weights[f"{name}.weight"], layer.W_())
    torch.testing.assert_close(fast.state_dict(), plain.state_dict())


@double
@pytest.mark.usefixtures("poisoned_memory")
def test_sigmas():
    model = fastsn.accelerate(Discriminator())
    for _ in range(300):
        model(*example())
    before = copy.deepcopy(model.state_dict())
    sigmas = fastsn.sigmas(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    for name, weight in model.named_parameters():
        if name.endswith("weight"):
            largest = torch.linalg.matrix_norm(weight.detach().flatten(1), 2)
            torch.testing.assert_close(sigmas.pop(name), largest)
    assert not sigmas


@double
@each_option
def test_fold(options):
    model = fastsn.accelerate(Discriminator(**options))
    x = example()
    model(*x)
    before = step(model.eval(), *x)
    folded = fastsn.fold(model)
    assert calls_of(lambda: folded(*x)) == []
    torch.testing.assert_close(folded(*x), before["output"])
    torch.testing.assert_close(step(model, *x), before, rtol=0, atol=0)
    weight = folded.conv1.weight
    assert isinstance(weight, nn.Parameter) and weight is not model.conv1.weight
    torch.testing.assert_close(weight, model.conv1.W_())
    folded.train()
    torch.testing.assert_close(folded(*x), before["output"])


@double
def test_fold_of_shared_weights():
    model = nn.Sequential(Linear(5, 5), nn.Tanh(), Linear(5, 5))
    model[2].weight = model[0].weight
    fastsn.accelerate(model).eval()
    x = torch.randn(3, 5)
    torch.testing.assert_close(fastsn.fold(model)(x), model(x))


def test_apply_does_not_normalize_them_again():
    model = nn.Sequential(Linear(5, 6), nn.Linear(6, 2))
    keys = list(model[0].state_dict())
    report = fastsn.apply(model)
    assert report.touched == ["1.weight"]
    assert "normalized" in report.skipped["0"]
    assert list(model[0].state_dict()) == keys
    assert calls_of(lambda: model(torch.randn(2, 5))).count(("scale", 1)) == 2


@double
def test_the_reference_computes_the_same():
    plain, fast = pair(Discriminator)
    with fastsn.use_backend("reference"):
        assert calls_of(lambda: fast(*example())) == []
        plain(*example())
        assert_same_steps(plain, fast, *example())


class Gained(Linear):
    """A gain of its own, which is 1 when the layer is made."""

    def init_norm(self, rows, **options):
        super().init_norm(rows, **options)
        self.gain = nn.Parameter(torch.ones(()))

    def W_(self):
        return self.gain * super().W_()


@double
@pytest.mark.parametrize("on_meta", [False, True])
def test_a_layer_that_does_more_than_normalize_is_left_alone(on_meta):
    layer = Gained(5, 4)
    values = copy.deepcopy(layer.state_dict())
    model = nn.Sequential(layer, Linear(4, 3))
    model = model.to("meta") if on_meta else model
    fastsn.accelerate(model)
    assert [name for name in fastsn.sigmas(model)] == ["1.weight"]
    model = model.to_empty(device="cpu") if on_meta else model
    layer.load_state_dict(values)
    with torch.no_grad():
        layer.gain.fill_(3.0)
    x = torch.randn(2, 5)
    torch.testing.assert_close(
        layer.eval()(x) - layer.bias, 3 * F.linear(x, Linear.W_(layer)), rtol=1e-9, atol=0
    )


def resting(layer):
    """W_ of this layer in eval mode by its own formula, from the u0 that it has."""
    plain = Linear(layer.in_features, layer.out_features)
    plain.load_state_dict(layer.state_dict())
    return plain.eval().W_()


@double
@pytest.mark.parametrize("inference", [False, True])
def test_v_that_was_kept_belongs_to_the_u_that_is_there(inference):
    """Of policy "step"; a version tells that of most, and none that of inference mode."""
    with torch.inference_mode(inference):
        layer = Linear(5, 7)
        model = fastsn.accelerate(nn.Sequential(layer))
        fastsn.set_update_policy(model, "step")
        x = torch.randn(2, 5)
        model(x), model(x)
        with torch.no_grad():
            layer.u0.copy_(F.normalize(torch.randn(1, 7), eps=1e-12))
        torch.testing.assert_close(model(x), F.linear(x, resting(layer), layer.bias))


@double
def test_compiled_and_frozen_after_policy_step():
    layer = Linear(5, 7)
    model = fastsn.accelerate(nn.Sequential(layer))
    fastsn.set_update_policy(model, "step")
    x = torch.randn(2, 5)
    model(x)
    expected = F.linear(x, resting(layer), layer.bias)
    with fastsn.frozen(model):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)
