"""Evaluation normalizes each weight once, and again when anything has changed."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerated import chain, chain_input
from torch import nn
from torch_peers import FASTSN_HOOK, FASTSN_PARAMETRIZED

import fastsn
from fastsn import functional

MODELS = {
    "hook": lambda: chain(FASTSN_HOOK),
    "parametrization": lambda: chain(FASTSN_PARAMETRIZED),
    "bsn": lambda: nn.Sequential(fastsn.nn.BSNConv1d(2, 3, 2), nn.Flatten(), nn.Linear(9, 5)),
    "msn": lambda: nn.Sequential(fastsn.nn.MSNConv1d(2, 3, 2), nn.Flatten(), nn.Linear(9, 5)),
}
each_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
each_grouping = pytest.mark.parametrize("grouped", [False, True], ids=["alone", "grouped"])


@pytest.fixture
def computed(monkeypatch):
    """The calls that compute anything, by their numbers of weights."""
    calls = []
    for name in ("normalize", "scale"):
        original = getattr(functional, name)

        def counting(call, weights, *args, _original=original, **kwargs):
            calls.append(len(weights))
            return _original(call, weights, *args, **kwargs)

        monkeypatch.setattr(functional, name, counting)
    return calls


def evaluated(build, grouped):
    torch.manual_seed(4)
    model = build()
    model = fastsn.accelerate(model) if grouped else model
    model(chain_input())
    return model.eval().requires_grad_(True)


def computes(model, computed, x=None):
    del computed[:]
    model(chain_input() if x is None else x)
    return bool(computed)


def weight_of(model):
    return max(model.parameters(), key=lambda p: p.ndim)


@each_grouping
@each_model
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_computes_once(build, grouped, context, computed):
    model, x = evaluated(build, grouped), chain_input()
    with context():
        first = model(x)
        assert not computes(model, computed) and not computes(model, computed)
        torch.testing.assert_close(model(x), first, rtol=0, atol=0)


@each_grouping
@each_model
def test_weights_without_gradients_need_no_context(build, grouped, computed):
    model = evaluated(build, grouped).requires_grad_(False)
    assert computes(model, computed) and not computes(model, computed)


@each_grouping
@pytest.mark.parametrize("name", ["hook", "parametrization"])
def test_with_gradients_it_is_computed_every_time(name, grouped, computed):
    model = evaluated(MODELS[name], grouped)
    assert computes(model, computed) and computes(model, computed)
    model(chain_input()).sum().backward()
    assert weight_of(model).grad.any()
    with torch.no_grad():
        model(chain_input())
    assert computes(model, computed)
    model.zero_grad()
    model(chain_input()).sum().backward()
    assert weight_of(model).grad.any()


CHANGES = {
    "in place": lambda model, w: w.mul_(3.0),
    "detached": lambda model, w: w.detach().mul_(-3.0),
    "other data": lambda model, w: setattr(w, "data", -3 * w.data),
    "transposed data": lambda model, w: setattr(w, "data", w.data.flip(0)),
    "load": lambda model, w: model.load_state_dict(other_state(model)),
    "assign": lambda model, w: model.load_state_dict(other_state(model), assign=True),
    "vectors": lambda model, w: [b.copy_(b.flip(0)) for b in model.buffers() if b.ndim == 1],
    "training": lambda model, w: (model.train()(chain_input()), model.eval()),
    "double": lambda model, w: model.double(),
    "half": lambda model, w: model.bfloat16(),
    "a write into data, and a step": lambda model, w: (
        w.data.mul_(-3.0),
        torch.optim.SGD([nn.Parameter(torch.ones(1))], 1.0).step(),
    ),
    "a write into data, and eval": lambda model, w: (w.data.mul_(-3.0), model.eval()),
}


def other_state(model):
    return {name: -2 * x if x.ndim > 1 else x.clone() for name, x in model.state_dict().items()}


@each_grouping
@pytest.mark.parametrize(
    "name, change",
    [
        (name, change)
        for name in ("hook", "parametrization", "bsn")
        for change in CHANGES
        # A module with a hook is torch's, whose eval() tells nobody.
        if (name, change) != ("hook", "a write into data, and eval")
    ],
)
@torch.no_grad()
def test_changes_are_noticed(name, change, grouped):
    model = evaluated(MODELS[name], grouped)
    model(chain_input())
    CHANGES[change](model, weight_of(model))
    x = chain_input().to(weight_of(model).dtype)
    fresh = copy.deepcopy(model)
    torch.testing.assert_close(model(x), fresh(x), rtol=0, atol=0)


@each_grouping
def test_optimizers_are_noticed(grouped):
    """A fused one writes to weights and leaves their version counters."""
    model = evaluated(MODELS["parametrization"], grouped)
    x = chain_input()
    steps = torch.optim.Adam(model.parameters(), 0.1, fused=True)
    model(x).sum().backward()
    with torch.no_grad():
        model(x)
        steps.step()
        torch.testing.assert_close(model(x), copy.deepcopy(model)(x), rtol=0, atol=0)


@torch.no_grad()
def test_a_result_that_a_user_has_written_to_is_not_used_again():
    layer = fastsn.parametrizations.spectral_norm(nn.Linear(4, 4)).eval()
    expected = layer.weight.clone()
    layer.weight.zero_()
    torch.testing.assert_close(layer.weight, expected)


def test_inference_mode_and_gradients_in_turn():
    model, x = evaluated(MODELS["parametrization"], True), chain_input().requires_grad_()
    with torch.inference_mode():
        model(x)
    model.requires_grad_(False)
    model(x).sum().backward()
    assert x.grad.any()
    with torch.inference_mode():
        made_within = fastsn.nn.SNLinear(3, 3).eval()
        torch.testing.assert_close(made_within.weight, made_within.weight)


def test_threads_share_a_memory_but_never_a_result():
    """As the replicas of DataParallel do: each has tensors of its own, on its own device."""
    layer = fastsn.parametrizations.spectral_norm(nn.Linear(8, 8)).eval()
    norm = layer.parametrizations.weight[0]
    weights = [torch.randn(8, 8) for _ in range(4)]
    expected = [norm(weight) for weight in weights]

    @torch.no_grad()
    def use(index):
        return all(torch.equal(norm(weights[index]), expected[index]) for _ in range(300))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(use, range(4)))


@each_grouping
@torch.no_grad()
def test_autocast_gets_its_own(grouped):
    model, x = evaluated(MODELS["parametrization"], grouped), chain_input()
    full = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(x)
        torch.testing.assert_close(model(x), half, rtol=0, atol=0)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(model(x), full, rtol=0, atol=0)


@torch.no_grad()
def test_functional_call_does_not_meet_the_weight_of_before():
    layer = fastsn.parametrizations.spectral_norm(nn.Linear(4, 4)).eval()
    x = torch.randn(2, 4)
    expected = layer(x)
    other = layer.parametrizations.weight.original.flip(0)
    key = "parametrizations.weight.original"
    actual = torch.func.functional_call(layer, {key: other}, x)
    u, v = layer.buffers()
    torch.testing.assert_close(actual, x @ (other / (u @ other @ v)).T + layer.bias)
    torch.testing.assert_close(layer(x), expected)


@torch.no_grad()
def test_copies_and_files_hold_no_result(tmp_path):
    model = evaluated(MODELS["hook"], True)
    model(chain_input())
    hooks = [*copy.deepcopy(model)[0]._forward_pre_hooks.values()]
    (hook,) = (h for h in hooks if isinstance(h, fastsn.hooks.SpectralNorm))
    assert hook.memory._last is None
    layer = evaluated(MODELS["parametrization"], False)
    layer(chain_input())
    assert copy.deepcopy(layer)[0].parametrizations.weight[0].memory._last is None
    torch.save(fastsn.nn.SNLinear(300, 300), tmp_path / "fresh")
    used = fastsn.nn.SNLinear(300, 300).eval()
    assert used.weight is not None
    torch.save(used, tmp_path / "used")
    sizes = [(tmp_path / name).stat().st_size for name in ("fresh", "used")]
    assert abs(sizes[0] - sizes[1]) < 1000


@pytest.mark.parametrize("name", ["hook", "parametrization"])
def test_training_keeps_no_result(name):
    model = evaluated(MODELS[name], True)
    with torch.no_grad():
        model(chain_input())
    memories = [m for batch, _ in fastsn.grouping._batches_of(model) for m in (batch.memory,)]
    assert all(memory._last.normalized for memory in memories)
    model.train()(chain_input())
    assert not any(memory._last for memory in memories)


@torch.no_grad()
def test_tracing_bakes_in_no_result():
    model = evaluated(MODELS["parametrization"], True)
    x = chain_input()
    model(x)
    weight = weight_of(model)
    for traced in (
        torch.compile(model, backend="aot_eager"),
        torch.export.export(model, (x,)).module(),
    ):
        torch.testing.assert_close(traced(x), model(x))
        if traced is not model and hasattr(traced, "_orig_mod"):
            weight.mul_(-1.0)
            torch.testing.assert_close(traced(x), model(x))
