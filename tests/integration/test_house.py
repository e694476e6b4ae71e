"""Stateless calls, ensembles, pruning, quantization and layers of other kinds."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.utils import parametrizations, prune

import fastsn
from helpers.accelerated import assert_same_steps, calls_of, chain, chain_input, fused, pair, step
from helpers.answers import answers
from helpers.normalized import double, each_model
from helpers.torch_peers import each_form, each_parametrized_form

# Stateless calls


@double
@each_model
def test_functional_call_moves_the_state_that_it_is_given(build):
    model, other = build(), build()
    x = chain_input()
    for training in (True, False):
        model.train(training)(x), other.train(training)(x)
        before = copy.deepcopy(model.state_dict())
        state = {name: value.clone() for name, value in other.state_dict().items()}
        torch.testing.assert_close(functional_call(model, state, (x,)), other(x))
        torch.testing.assert_close(state, dict(other.state_dict()))
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@double
@each_model
@pytest.mark.parametrize("training", [True, False])
def test_gradients_per_sample(build, training):
    model = build().train(training)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    batch = torch.randn(3, 1, 2, 4)

    def loss(parameters, x):
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        return functional_call(model, (parameters, buffers), (x,)).square().sum()

    actual = vmap(grad(loss), in_dims=(None, 0))(parameters, batch)
    for i, x in enumerate(batch):
        leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
        loss(leaves, x).backward()
        expected = {name: leaf.grad for name, leaf in leaves.items()}
        torch.testing.assert_close({name: g[i] for name, g in actual.items()}, expected)


@double
@each_model
@pytest.mark.parametrize("training", [True, False])
def test_ensembles(build, training):
    """Each member has the output and gradients that it has alone, and its own u and v move."""
    members = [build().train(training) for _ in range(3)]
    parameters, buffers = stack_module_state(members)
    base = copy.deepcopy(members[0]).to("meta")
    xs = torch.randn(3, 4, 2, 4)
    for _ in range(2):
        outputs = vmap(lambda p, b, x: functional_call(base, (p, b), (x,)))(parameters, buffers, xs)
        losses = outputs.flatten(1).square().sum(1)
        gradients = torch.autograd.grad(losses.sum(), list(parameters.values()))
        for i, (member, x) in enumerate(zip(members, xs, strict=True)):
            expected = step(member, x)
            actual = {"output": outputs[i].detach()}
            actual |= {f"{n}.grad": g[i] for n, g in zip(parameters, gradients, strict=True)}
            actual |= {name: p[i].detach() for name, p in parameters.items()}
            actual |= {name: buffer[i] for name, buffer in buffers.items()}
            torch.testing.assert_close(actual, expected)


@answers("no thread: vmap over torch's fails in training mode")
def test_an_ensemble_in_training_mode(normalize):
    members = [nn.Sequential(normalize(nn.Linear(3, 3))) for _ in range(2)]
    stacked = stack_module_state(members)
    u = {name: buffer.clone() for name, buffer in stacked[1].items() if name.endswith("_u")}

    def call(parameters, buffers, x):
        return functional_call(members[0], (parameters, buffers), (x,))

    vmap(call, in_dims=(0, 0, None))(*stacked, torch.randn(2, 3))
    assert not any(torch.equal(stacked[1][name], before) for name, before in u.items())


def test_an_ensemble_of_bare_layers_needs_a_module_around_each():
    """Parametrized layers have a class each, as with torch's own."""
    layers = [fastsn.nn.SNLinear(3, 3) for _ in range(2)]
    with pytest.raises(RuntimeError, match="same class"):
        stack_module_state(layers)
    parameters, _ = stack_module_state([nn.Sequential(layer) for layer in layers])
    assert parameters["0.parametrizations.weight.original"].shape == (2, 3, 3)


# Swapped tensors


@each_model
def test_swapped_tensors(build):
    future = torch.__future__
    plain = build()
    swapped = copy.deepcopy(plain)
    future.set_swap_module_params_on_conversion(True)
    try:
        parameters = list(swapped.parameters())
        swapped.double()
        swapped.load_state_dict(copy.deepcopy(plain.double().state_dict()))
        assert all(a is b for a, b in zip(swapped.parameters(), parameters, strict=True))
    finally:
        future.set_swap_module_params_on_conversion(False)
    assert_same_steps(plain, swapped, chain_input().double())


# Pruning


def prune_original(layer):
    prune.l1_unstructured(layer.parametrizations.weight, "original", 0.5)


@double
@pytest.mark.parametrize("accelerate", ["before", "after"])
@each_parametrized_form
def test_the_original_is_pruned(form, accelerate):
    """The normalized weight keeps the zeros; training and removing the mask work as in torch."""
    torch.manual_seed(1)
    plain = chain(form)
    fast = copy.deepcopy(plain)
    models = [plain, fast]
    if accelerate == "before":
        fastsn.accelerate(fast)
        models[0](chain_input()), models[1](chain_input())
    for model in models:
        prune_original(model[3])
    if accelerate == "after":
        fastsn.accelerate(fast)
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in models]
    for _ in range(3):
        x = chain_input()
        outputs = []
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            outputs.append(model(x))
            outputs[-1].square().sum().backward()
            optimizer.step()
        torch.testing.assert_close(outputs[1], outputs[0])
    for model in models:
        weight = model.eval()[3].weight
        assert (weight == 0).sum() == weight.numel() // 2
        folded = fastsn.fold(model)[3]
        assert type(folded) is nn.Linear and folded.weight.requires_grad
        torch.testing.assert_close(folded.weight, nn.Parameter(weight))
        prune.remove(model[3].parametrizations.weight, "original")
        torch.testing.assert_close(model[3].weight, weight)
        model.train()
    fast.load_state_dict(plain.state_dict())
    assert_same_steps(plain, fastsn.accelerate(fast), chain_input())
    torch.testing.assert_close(fastsn.fold(fast)(x), fast.eval()(x))


@double
@each_parametrized_form
def test_hooks_of_a_parametrization_run_in_accelerated_models(form):
    seen = []
    model = fastsn.accelerate(chain(form))
    model(chain_input())
    norm = model[3].parametrizations.weight[0]
    handle = norm.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    assert calls_of(lambda: model(chain_input())) == fused(2, 1)
    handle.remove()
    torch.testing.assert_close(seen, [fastsn.fold(model)[3].weight.detach()])
    fastsn.accelerate(model.train())
    assert calls_of(lambda: model(chain_input())) == fused(3)


# Quantization


def quantize(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


@each_model
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, .* are deprecated")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.skipif(torch.backends.quantized.engine == "none", reason="no quantized kernels here")
def test_folded_models_are_quantized(build):
    """The layers are those that torch quantizes; the weights are rounded to 8 bits."""
    model = build()
    x = chain_input()
    model(x)
    folded = fastsn.fold(model).eval()
    quantized = quantize(folded)
    dynamic = torch.ao.nn.quantized.dynamic.Linear
    assert [type(m) is dynamic for m in quantized] == [type(m) is nn.Linear for m in folded]
    weight = quantized[3].weight()
    half_a_step = weight.q_scale() * 0.501
    torch.testing.assert_close(weight.dequantize(), folded[3].weight, atol=half_a_step, rtol=0)
    assert quantized(x).shape == folded(x).shape


@each_form
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, .* are deprecated")
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.skipif(torch.backends.quantized.engine == "none", reason="no quantized kernels here")
def test_other_models_are_not_quantized_in_silence(form):
    model = nn.Sequential(form.spectral_norm(nn.Linear(4, 4)))
    with pytest.raises((AssertionError, AttributeError, RuntimeError)):
        quantize(model)(torch.randn(2, 4))


@each_model
@pytest.mark.parametrize("training", [True, False])
def test_folded_after_a_forward(build, training):
    """What forwards leave behind in a model, graphs and all, is no obstacle."""
    model = build().train(training)
    x = chain_input()
    model[1].noted = model(x)
    folded = fastsn.fold(model)
    assert not folded[1].noted.requires_grad and model[1].noted.requires_grad
    torch.testing.assert_close(folded(x), model.eval()(x))


# Layers of other kinds, and layers that share


@double
@each_parametrized_form
@pytest.mark.parametrize("accelerated", [False, True])
def test_the_fast_path_of_an_encoder_reads_normalized_weights(form, accelerated, monkeypatch):
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    for layer in (encoder.linear1, encoder.linear2, encoder.self_attn.out_proj):
        form.spectral_norm(layer)
    form.spectral_norm(encoder.self_attn, "in_proj_weight")
    model = nn.Sequential(encoder)
    if accelerated:
        fastsn.accelerate(model)
    x = torch.randn(2, 3, 8)
    model(x)
    with torch.no_grad():
        for layer in (encoder.linear1, encoder.self_attn.out_proj):
            layer.parametrizations.weight.original.mul_(3)
    calls = []
    fast = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(
        torch, "_transformer_encoder_layer_fwd", lambda *args: calls.append(args) or fast(*args)
    )
    with torch.no_grad():
        actual = model.eval()(x)
    assert len(calls) == 1
    torch.testing.assert_close(actual, model(x).detach())  # with gradients: the slow path
    assert len(calls) == 1
    torch.testing.assert_close(actual, fastsn.fold(model)(x).detach())


@double
@each_form
def test_tied_weights_train_as_in_torch(form):
    def build():
        layers = [nn.Linear(5, 5) for _ in range(3)]
        layers[1].weight = layers[0].weight
        for layer in layers:
            form.spectral_norm(layer)
        return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2], layers[2])

    plain, fast = pair(build)
    assert len(list(fast.parameters())) == 5
    assert_same_steps(plain, fast, torch.randn(3, 5))
    twin = copy.deepcopy(fast)
    assert len(list(twin.parameters())) == 5
    assert_same_steps(fast, twin, torch.randn(3, 5))


@double
@each_form
@pytest.mark.parametrize("first", [True, False])
def test_weight_norm_of_another_parameter(form, first):
    def build():
        layer = nn.GRU(3, 4)
        if first:
            parametrizations.weight_norm(layer, "weight_ih_l0")
        form.spectral_norm(layer, "weight_hh_l0")
        if not first:
            parametrizations.weight_norm(layer, "weight_ih_l0")
        return nn.ModuleList([layer])

    plain, fast = pair(build)
    x = torch.randn(5, 2, 3)
    results = [step(model, x, forward=lambda x, m=model: m[0](x)[0]) for model in (plain, fast)]
    torch.testing.assert_close(results[1], results[0])


@double
@each_form
def test_channels_last(form):
    def build():
        layers = [form.spectral_norm(nn.Conv2d(3, 4, 3)), form.spectral_norm(nn.Conv2d(4, 2, 3))]
        return nn.Sequential(*layers).to(memory_format=torch.channels_last)

    plain, fast = pair(build)
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    assert_same_steps(plain, fast, x)
    originals = [form.vectors(layer)[0] for layer in fast]
    weights = [layer.weight for layer in fast]
    for tensor in originals + weights:
        assert tensor.is_contiguous(memory_format=torch.channels_last)


@double
@each_form
def test_clipped_gradients_and_groups_of_an_optimizer(form):
    models = pair(chain, form)
    for model in models:
        named = dict(model.named_parameters())
        groups = [
            {"params": [p for n, p in named.items() if "orig" in n], "weight_decay": 0.1},
            {"params": [p for n, p in named.items() if "orig" not in n], "lr": 0.01},
        ]
        assert [len(group["params"]) for group in groups] == [3, 3]
        model.optimizer = torch.optim.AdamW(groups, 0.1, eps=1e-3)
    for _ in range(3):
        x = chain_input()
        for model in models:
            model.optimizer.zero_grad()
            model(x).square().sum().backward()
            model.norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            model.optimizer.step()
        torch.testing.assert_close(models[1].norm, models[0].norm)
    torch.testing.assert_close(models[1].state_dict(), models[0].state_dict())


@each_form
def test_lazy_layers_are_normalized_after_their_first_forward(form):
    layer = nn.LazyLinear(3)
    keys = list(layer.state_dict())
    with pytest.raises((ValueError, RuntimeError), match="uninitialized parameter"):
        form.spectral_norm(layer)
    assert list(layer.state_dict()) == keys and type(layer) is nn.LazyLinear
    layer(torch.randn(2, 4))
    assert fastsn.accelerate(form.spectral_norm(layer))(torch.randn(2, 4)).shape == (2, 3)
