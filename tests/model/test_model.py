"""The calls on whole models: apply, refresh, sigmas, fold, and the back-end that serves them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import fastsn
from helpers.accelerated import assert_same_steps, calls_of, chain, chain_input, fused, pair, step
from helpers.torch_peers import (
    FASTSN_HOOK,
    FASTSN_PARAMETRIZED,
    TORCH_HOOK,
    TORCH_PARAMETRIZED,
    as_matrix,
    each_form,
    each_parametrized_form,
)

double = pytest.mark.usefixtures("double")
ITERATIONS = 1000  # enough for every matrix here


def is_normalized(module):
    return parametrize.is_parametrized(module, "weight")


# apply


class Net(nn.Module):
    """Every kind of layer, by name."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.block = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4, bias=False))
        self.embed = nn.Embedding(6, 4)
        self.mixed = nn.Bilinear(4, 4, 2)
        self.rnn = nn.GRU(2, 3)

    def forward(self, image, label):
        features = self.block(self.up(self.norm(self.conv(image))).sum((2, 3)))
        return self.rnn(self.mixed(features, self.embed(label)))[0]


NET_WEIGHTS = ["conv", "up", "block.0", "block.2", "embed", "mixed"]


def net_input():
    return torch.randn(3, 2, 4, 4), torch.tensor([0, 5, 1])


@double
@pytest.mark.parametrize("method", ["sn", "bsn"])
def test_apply_normalizes_and_accelerates(method):
    model = Net()
    originals = {name: model.get_submodule(name).weight for name in NET_WEIGHTS}
    report = fastsn.apply(model, method)
    assert report.touched == [f"{name}.weight" for name in NET_WEIGHTS]
    assert report.skipped.keys() == {"norm", "rnn"}
    for name, weight in originals.items():
        assert model.get_submodule(name).parametrizations.weight.original is weight
    x = net_input()
    assert calls_of(lambda: model(*x)) == fused(6)
    step(model, *x)
    for _ in range(ITERATIONS):
        weights = fastsn.refresh(model)
    for name, original in originals.items():
        dims = {int(name == "up")}
        if method == "bsn" and original.ndim > 2:
            dims = {0, 1}
        sigmas = [torch.linalg.matrix_norm(as_matrix(original, dim), 2) for dim in dims]
        sigma = torch.stack(sigmas).mean()
        torch.testing.assert_close(weights[f"{name}.weight"], original / sigma)


@double
def test_apply_is_the_parametrization_of_every_layer():
    models = []
    for how in ("by hand", "apply"):
        torch.manual_seed(1)
        model = Net()
        options = {"n_power_iterations": 2, "eps": 1e-6, "scale": 1.2, "zero_guard": True}
        if how == "apply":
            fastsn.apply(model, "bsn", **options)
        else:
            for name in NET_WEIGHTS:
                layer = model.get_submodule(name)
                FASTSN_PARAMETRIZED.spectral_norm(layer, norm="bidirectional", **options)
        models.append(model)
    torch.testing.assert_close(models[1].state_dict(), models[0].state_dict(), rtol=0, atol=0)
    assert_same_steps(*models, *net_input())
    bounded = Net()
    fastsn.apply(bounded, bound=True, scale=1e6)
    assert torch.equal(bounded.conv.weight, bounded.conv.parametrizations.weight.original)


def test_the_report_names_what_was_touched_and_what_was_not_and_why():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        TORCH_PARAMETRIZED.spectral_norm(nn.Linear(4, 4)),
        TORCH_HOOK.spectral_norm(nn.Linear(4, 4)),
        fastsn.nn.SNLinear(4, 4),
        nn.LazyLinear(3),
        nn.Linear(4, 4),
    )
    report = fastsn.apply(model, filter=lambda name, module: name != "7")
    assert report.touched == ["0.weight"]
    reasons = {
        "1": "BatchNorm2d",
        "3": "already",
        "4": "already",
        "5": "already",
        "6": "not initialized",
        "7": "filter",
    }
    assert report.skipped.keys() == reasons.keys()
    for name, part in reasons.items():
        assert part in report.skipped[name]
    text = str(report).splitlines()
    assert text[0] == "sn applied to 1 weights, 6 skipped"
    assert "+ 0.weight" in text[1] and len(text) == 8
    for name, reason in report.skipped.items():
        assert any(name in line and reason in line for line in text[2:])


@double
def test_apply_to_a_single_layer():
    layer = nn.Linear(3, 4)
    assert fastsn.apply(layer).touched == ["weight"]
    assert calls_of(lambda: layer(torch.randn(2, 3))) == fused(1)


@pytest.mark.filterwarnings("ignore:fastsn.accelerate found no layer")
def test_the_filter_gets_names_and_modules():
    model, seen = Net(), {}
    report = fastsn.apply(model, filter=lambda name, module: seen.setdefault(name, module) is None)
    assert not report.touched and list(seen) == NET_WEIGHTS
    for name, module in seen.items():
        assert module is model.get_submodule(name)


@double
def test_apply_twice_touches_nothing_the_second_time():
    model = Net()
    fastsn.apply(model)
    keys = list(model.state_dict())
    report = fastsn.apply(model, "bsn")
    assert not report.touched and set(NET_WEIGHTS) <= report.skipped.keys()
    assert list(model.state_dict()) == keys
    assert calls_of(lambda: model(*net_input())) == fused(6)


@double
def test_apply_to_the_rest():
    """Layers added, or left out, at first."""
    model = Net()
    fastsn.apply(model, "sn", lambda name, module: name == "conv")
    report = fastsn.apply(model, "bsn", lambda name, module: name in ("conv", "up"))
    assert report.touched == ["up.weight"]
    assert calls_of(lambda: model(*net_input())) == fused(2)


@double
def test_apply_to_tied_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, label):
            return self.head(self.embed(label))

    model = Tied()
    weight = model.embed.weight
    assert fastsn.apply(model).touched == ["embed.weight", "head.weight"]
    assert model.embed.parametrizations.weight.original is weight
    assert model.head.parametrizations.weight.original is weight
    assert len(list(model.parameters())) == 1
    label = torch.tensor([1, 2])
    output = model(label)
    embed, head = (
        (norm._u @ weight @ norm._v)
        for norm in (model.embed.parametrizations.weight[0], model.head.parametrizations.weight[0])
    )
    torch.testing.assert_close(output, weight[label] / embed @ weight.T / head)


def test_weights_that_cannot_be_normalized_are_skipped():
    class Quantized(nn.Linear):
        """As quantization tools leave it: integers in a buffer."""

        def __init__(self):
            super().__init__(3, 3)
            del self.weight
            self.register_buffer("weight", torch.ones(3, 3, dtype=torch.int8))

    integers = nn.Linear(3, 3)
    integers.weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int32), requires_grad=False)
    sparse = nn.Linear(3, 3)
    sparse.weight = nn.Parameter(torch.eye(3).to_sparse())
    model = nn.Sequential(Quantized(), integers, sparse, nn.LazyConv2d(3, 3), nn.Linear(3, 3))
    report = fastsn.apply(model)
    assert report.touched == ["4.weight"]
    assert "no parameter" in report.skipped["0"] and "torch.int32" in report.skipped["1"]
    assert "sparse" in report.skipped["2"] and "not initialized" in report.skipped["3"]


def test_apply_to_attention():
    model = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0)
    report = fastsn.apply(model)
    assert report.touched == ["self_attn.out_proj.weight", "linear1.weight", "linear2.weight"]
    assert "self_attn" in report.skipped
    model(torch.randn(3, 2, 4)).square().sum().backward()
    assert model.self_attn.out_proj.parametrizations.weight.original.grad.any()


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        (("batch",), {}, "method must be one of .*'batch'"),
        (("sn",), {"scale": -1.0}, "scale must be .*-1.0"),
        (("sn",), {"n_power_iterations": 0}, "n_power_iterations=0"),
        (("sn", lambda name, module: {}[name]), {}, "conv"),
    ],
)
def test_errors_leave_the_model_unchanged(arguments, options, message):
    model = Net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((ValueError, KeyError), match=message):
        fastsn.apply(model, *arguments, **options)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert type(model.conv) is nn.Conv2d and not model._forward_pre_hooks


# refresh


@double
@each_form
def test_refresh_is_the_grouped_call(form):
    plain, fast = pair(chain, form)
    x = chain_input()
    for mode in (True, False, True):
        plain.train(mode), fast.train(mode)
        weights = []

        def refreshed(weights=weights):
            weights.append(fastsn.refresh(fast))

        operator = "power_" if mode else "estimate"
        assert calls_of(refreshed) == [(operator, 3), ("scale", 3)]
        assert list(weights[0]) == ["0.weight", "3.weight", "5.weight"]
        plain(x)
        for name, weight in weights[0].items():
            layer = plain[int(name[0])]
            original, u, v = form.vectors(layer)
            sigma = u @ original.flatten(1) @ v
            torch.testing.assert_close(weight, original / sigma)
        torch.testing.assert_close(fast.state_dict(), plain.state_dict())


@double
@each_form
def test_refresh_has_a_graph(form):
    plain, fast = pair(chain, form)
    plain(chain_input())
    penalty = sum(weight.pow(4).sum() for weight in fastsn.refresh(fast).values())
    penalty.backward()
    for index in (0, 3, 5):
        original, u, v = form.vectors(plain[index])
        expected = original / (u @ original.flatten(1) @ v)
        (gradient,) = torch.autograd.grad(expected.pow(4).sum(), original)
        torch.testing.assert_close(form.vectors(fast[index])[0].grad, gradient)


@double
@each_form
def test_refresh_leaves_nothing_for_the_next_forward(form):
    plain, fast = pair(chain, form)
    fastsn.refresh(fast)
    plain(chain_input())
    assert_same_steps(plain, fast, chain_input())


@double
def test_refresh_passes_through_later_parametrizations():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    layer = fastsn.nn.SNLinear(4, 5).eval()
    single = layer.weight
    parametrize.register_parametrization(layer, "weight", Doubled())
    torch.testing.assert_close(fastsn.refresh(layer)["weight"], 2 * single)


@pytest.mark.parametrize("call", [fastsn.refresh, fastsn.sigmas])
def test_a_model_without_layers_has_nothing(call):
    assert call(nn.Linear(3, 3)) == {}


# sigmas


@double
@each_form
def test_sigmas_are_the_largest_singular_values(form):
    model = fastsn.accelerate(chain(form))
    for _ in range(ITERATIONS):
        model(chain_input())
    before = copy.deepcopy(model.state_dict())
    sigmas = fastsn.sigmas(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert list(sigmas) == ["0.weight", "3.weight", "5.weight"]
    for name, sigma in sigmas.items():
        weight = form.vectors(model[int(name[0])])[0]
        assert sigma.shape == () and not sigma.requires_grad
        torch.testing.assert_close(sigma, torch.linalg.svdvals(weight.detach().flatten(1))[0])


@double
@each_form
def test_sigmas_are_what_eval_divides_by(form):
    model = fastsn.accelerate(chain(form))
    model(chain_input())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    sigmas = fastsn.sigmas(model)
    for name, weight in fastsn.refresh(model.eval()).items():
        original = form.vectors(model[int(name[0])])[0]
        torch.testing.assert_close(weight * sigmas[name], original)


@double
@pytest.mark.parametrize("form", [FASTSN_HOOK, FASTSN_PARAMETRIZED], ids=["hook", "parametrized"])
def test_sigmas_of_bidirectional_layers_are_means(form):
    layer = form.spectral_norm(nn.Conv2d(2, 3, 4), norm="bidirectional", scale=3.0)
    model = fastsn.accelerate(nn.Sequential(layer))
    for _ in range(ITERATIONS):
        model(torch.randn(1, 2, 4, 4))
    weight = form.vectors(layer)[0]
    norms = [torch.linalg.matrix_norm(as_matrix(weight, dim), 2) for dim in (0, 1)]
    torch.testing.assert_close(fastsn.sigmas(model)["0.weight"], torch.stack(norms).mean())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sigmas_are_float32_at_least(dtype):
    model = nn.Sequential(fastsn.nn.SNLinear(6, 5), fastsn.nn.SNConv1d(2, 3, 4)).to(dtype)
    sigmas = fastsn.sigmas(model)
    assert {sigma.dtype for sigma in sigmas.values()} == {torch.float32}


# fold


class Subclass(fastsn.nn.SNConv1d):
    def forward(self, x):
        return 2 * super().forward(x)


class Shift(nn.Module):
    def forward(self, tensor):
        return tensor + 1


def with_shifted_bias(layer):
    parametrize.register_parametrization(layer, "bias", Shift())
    return layer


def with_normalized_bias(form):
    return form.spectral_norm(form.spectral_norm(nn.Conv1d(2, 3, 2)), "bias")


def shifted_first(form):
    layer = nn.Conv1d(2, 3, 2)
    parametrize.register_parametrization(layer, "weight", Shift())
    return form.spectral_norm(layer)


def tied(form):
    layers = [nn.Conv1d(2, 2, 1), nn.Conv1d(2, 2, 1), nn.Conv1d(2, 2, 1)]
    for layer in layers[1:]:
        layer.weight = layers[0].weight
    for layer in layers[:2]:
        form.spectral_norm(layer)
    return nn.Sequential(*layers)


CONVOLUTIONS = {
    "torch-hook": lambda: TORCH_HOOK.spectral_norm(nn.Conv1d(2, 3, 2)),
    "torch-parametrized": lambda: TORCH_PARAMETRIZED.spectral_norm(nn.Conv1d(2, 3, 2)),
    "fastsn-hook": lambda: FASTSN_HOOK.spectral_norm(nn.Conv1d(2, 3, 2)),
    "fastsn-parametrized": lambda: FASTSN_PARAMETRIZED.spectral_norm(nn.Conv1d(2, 3, 2)),
    "bidirectional-hook": lambda: FASTSN_HOOK.spectral_norm(
        nn.Conv1d(2, 3, 2), norm="bidirectional", scale=1.3
    ),
    "bidirectional": lambda: fastsn.nn.BSNConv1d(2, 3, 2, scale=1.3, bias=False),
    "transposed": lambda: fastsn.nn.SNConvTranspose1d(2, 3, 2, padding=1),
    "subclass": lambda: Subclass(2, 3, 2),
    "shifted-bias": lambda: with_shifted_bias(fastsn.nn.SNConv1d(2, 3, 2)),
    "normalized-bias": lambda: with_normalized_bias(FASTSN_PARAMETRIZED),
    "normalized-bias-hook": lambda: with_normalized_bias(FASTSN_HOOK),
    "shifted-first": lambda: shifted_first(FASTSN_PARAMETRIZED),
    "tied": lambda: tied(FASTSN_PARAMETRIZED),
    "tied-hook": lambda: tied(FASTSN_HOOK),
}
each_convolution = pytest.mark.parametrize("build", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())


@double
@each_convolution
@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.filterwarnings("ignore:fastsn.accelerate found no layer")
def test_fold(build, accelerated):
    """Equal in eval, plain in every mode, and the model itself as it was."""
    model = nn.Sequential(build(), nn.Tanh())
    if accelerated:
        fastsn.accelerate(model)
    x = chain_input()
    with torch.no_grad():
        model(x)
    state = copy.deepcopy(model.state_dict())
    folded = fastsn.fold(model)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert not any(name.endswith(("_u", "_v", "_orig")) for name in folded.state_dict())
    assert not any(isinstance(m, TORCH_PARAMETRIZED.SpectralNorm) for m in folded.modules())
    expected = model.eval()(x)
    for mode in (True, False):
        assert calls_of(lambda mode=mode: folded.train(mode)(x)) == []
        torch.testing.assert_close(folded(x), expected)
    model.train()
    before = copy.deepcopy(folded.state_dict())
    step(model, x)
    assert all(p.grad is not None for p in model.parameters())
    torch.testing.assert_close(folded.state_dict(), before, rtol=0, atol=0)
    step(folded, x)


@double
@each_form
def test_folded_layers_are_those_of_torch(form):
    model = chain(form)
    folded = fastsn.fold(fastsn.accelerate(model))
    assert [type(m) for m in folded] == [type(m) for m in chain_of_torch()]
    folded.load_state_dict(chain_of_torch().state_dict())
    for module in folded.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks
        assert not module._load_state_dict_pre_hooks and not module._state_dict_hooks
    modules = nn.Sequential(fastsn.nn.SNLinear(3, 4), fastsn.nn.BSNEmbedding(4, 3))
    assert [type(m) for m in fastsn.fold(modules)] == [nn.Linear, nn.Embedding]


def chain_of_torch():
    layers = nn.Conv1d(2, 3, 2), nn.Linear(9, 6), nn.Linear(6, 5)
    return nn.Sequential(layers[0], nn.Tanh(), nn.Flatten(), layers[1], nn.Tanh(), layers[2])


@double
@each_form
@pytest.mark.parametrize("training", [True, False])
def test_fold_keeps_modes_and_what_requires_a_gradient(form, training):
    model = fastsn.accelerate(chain(form))
    model.train(training)
    model[4].train(not training)
    model[3].requires_grad_(False)
    modes = [model[index].training for index in range(6)]
    folded = fastsn.fold(model)
    assert [module.training for module in folded] == modes
    for index in (0, 3, 5):
        for parameter in folded[index].parameters():
            assert type(parameter) is nn.Parameter and parameter.requires_grad is (index != 3)


@double
@each_form
def test_fold_of_a_copy_and_copy_of_a_fold(form):
    model = fastsn.accelerate(chain(form))
    x = chain_input()
    model(x)
    twin = copy.deepcopy(model)
    folded = copy.deepcopy(fastsn.fold(twin))
    expected = model.eval()(x)
    torch.testing.assert_close(folded(x), expected)
    torch.testing.assert_close(twin.eval()(x), expected)
    assert calls_of(lambda: model.train()(x)) == fused(3)
    assert calls_of(lambda: twin.train()(x)) == fused(3)


@each_form
@pytest.mark.filterwarnings("ignore:The tensor attributes .* were assigned during export")
def test_folded_graphs_hold_no_trace_of_normalization(form):
    model = fastsn.accelerate(chain(form)).eval()
    x = chain_input()

    def operators(module):
        graph = torch.export.export(module, (x,)).graph
        return [str(node.target) for node in graph.nodes if node.op == "call_function"]

    found = operators(fastsn.fold(model))
    assert not [name for name in found if "fastsn" in name or "div" in name or "mv" in name]
    assert found == operators(chain_of_torch().eval())
    assert any("fastsn" in name for name in operators(model))


@double
@each_parametrized_form
def test_fold_leaves_other_parametrizations_elsewhere(form):
    layer = nn.Linear(4, 4)
    nn.utils.parametrizations.orthogonal(layer)
    model = nn.Sequential(form.spectral_norm(nn.Linear(4, 4)), layer)
    x = torch.randn(2, 4)
    folded = fastsn.fold(fastsn.accelerate(model))
    assert not is_normalized(folded[0]) and is_normalized(folded[1])
    torch.testing.assert_close(folded(x), model.eval()(x))


# Back-ends


@double
@each_form
def test_every_call_gives_the_same_with_the_reference(form):
    results = []
    for backend in ("cpp", "reference"):
        with fastsn.use_backend(backend):
            torch.manual_seed(1)
            model = fastsn.accelerate(chain(form))
            x = chain_input()
            steps = [step(model, x), step(model, x), step(model.eval(), x)]
            weights = fastsn.refresh(model.train())
            results.append([*steps, weights, fastsn.sigmas(model), fastsn.fold(model)(x)])
            assert (calls_of(lambda model=model, x=x: model(x)) == []) == (backend == "reference")
    torch.testing.assert_close(results[1], results[0])


@double
@pytest.mark.parametrize("method", ["sn", "bsn"])
def test_apply_gives_the_same_with_the_reference(method):
    results = []
    for backend in ("cpp", "reference"):
        with fastsn.use_backend(backend):
            torch.manual_seed(1)
            model = Net()
            fastsn.apply(model, method, scale=1.5)
            x = net_input()
            results.append([step(model, *x), step(model, *x), fastsn.sigmas(model)])
    torch.testing.assert_close(results[1], results[0])
