"""Accelerated models that are changed, copied, replicated, and made of unusual layers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import parametrize

import fastsn
from helpers.accelerated import assert_same_steps, calls_of, chain, chain_input, fused, pair, step
from helpers.torch_peers import (
    FASTSN_HOOK,
    FASTSN_PARAMETRIZED,
    TORCH_HOOK,
    TORCH_PARAMETRIZED,
    each_form,
    each_hook_form,
    each_parametrized_form,
)

double = pytest.mark.usefixtures("double")


# Changes after acceleration


def remove(form, module):
    if form.v_first:
        form.remove(module)
    else:
        parametrize.remove_parametrizations(module, "weight")


@double
@each_form
def test_removal_and_registration_afterwards(form):
    plain, fast = pair(chain, form)
    x = chain_input()
    assert_same_steps(plain, fast, x, steps=1)
    for model in (plain, fast):
        remove(form, model[3])
    assert calls_of(lambda: fast(x)) == fused(2)
    plain(x)
    assert_same_steps(plain, fast, x, steps=1)
    for model in (plain, fast):
        torch.manual_seed(3)
        form.spectral_norm(model[3])
    assert_same_steps(plain, fast, x, steps=1)
    fastsn.accelerate(fast)
    assert calls_of(lambda: fast(x)) == fused(3)
    plain(x)
    assert_same_steps(plain, fast, x, steps=1)


@double
@each_parametrized_form
def test_another_parametrization_afterwards(form):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = form.spectral_norm(nn.Linear(5, 5))

        def forward(self, x):
            return self.layer(torch.tanh(self.layer(x)))

    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    plain, fast = pair(Twice)
    x = torch.randn(3, 5)
    for model in (plain, fast):
        parametrize.register_parametrization(model.layer, "weight", Doubled())
    assert_same_steps(plain, fast, x)
    fastsn.accelerate(fast)
    assert_same_steps(plain, fast, x)


@each_form
def test_casting_afterwards(form):
    plain, fast = pair(chain, form)
    x = chain_input()
    plain(x), fast(x)
    fast.load_state_dict(plain.state_dict())
    plain.double(), fast.double()
    assert_same_steps(plain, fast, x.double())
    assert calls_of(lambda: fast.bfloat16()(x.bfloat16())) == fused(3)
    # u and v stay in what fits sigma, which is fp32 at least.
    state = fast.state_dict()
    vectors = [value for name, value in state.items() if name.endswith(("_u", "_v"))]
    assert {vector.dtype for vector in vectors} <= {torch.float32, torch.float64}


@double
@each_form
def test_loading_by_assignment(form):
    plain, fast = pair(chain, form)
    fast(chain_input())
    torch.manual_seed(5)
    other = chain(form)
    state = other.state_dict()
    for model in (plain, fast):
        model.load_state_dict(copy.deepcopy(state), assign=True)
    assert calls_of(lambda: fast(chain_input())) == fused(3)
    plain(chain_input())
    assert_same_steps(plain, fast, chain_input())


@double
@each_form
def test_substituted_parameters(form):
    plain, fast = pair(chain, form)
    x = chain_input()
    values = {name: torch.randn_like(p) for name, p in plain.named_parameters()}
    results = [functional_call(model, values, (x,)) for model in (plain, fast)]
    torch.testing.assert_close(results[1], results[0])
    assert_same_steps(plain, fast, x)


@double
@each_parametrized_form
def test_cached(form):
    plain, fast = pair(chain, form)
    x = chain_input()
    results = []
    for model in (plain, fast):
        with parametrize.cached():
            results.append([model[3].weight, model(x), model(x), model[3].weight])
        assert results[-1][0] is results[-1][-1]
    torch.testing.assert_close(results[1], results[0])
    assert_same_steps(plain, fast, x)


# Copies


def nn_chain():
    layers = fastsn.nn.SNConv1d(2, 3, 2), fastsn.nn.BSNLinear(9, 6), fastsn.nn.SNLinear(6, 5)
    return nn.Sequential(layers[0], nn.Tanh(), nn.Flatten(), layers[1], nn.Tanh(), layers[2])


COPIED = {
    "torch-hook": lambda: chain(TORCH_HOOK),
    "torch-parametrized": lambda: chain(TORCH_PARAMETRIZED),
    "fastsn-hook": lambda: chain(FASTSN_HOOK),
    "fastsn-parametrized": lambda: chain(FASTSN_PARAMETRIZED),
    "fastsn-nn": nn_chain,
}
COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@double
@pytest.mark.parametrize(
    "build, make_copy",
    [
        pytest.param(build, make_copy, id=f"{name}-{how}")
        for name, build in COPIED.items()
        for how, make_copy in COPIES.items()
        if how == "deepcopy" or "parametrized" not in name
    ],
)
@pytest.mark.parametrize("after_forward", [False, True])
def test_copies_are_accelerated_and_independent(build, make_copy, after_forward):
    plain, fast = pair(build)
    x = chain_input()
    if after_forward:
        plain(x), fast(x)
    twin = make_copy(fast)
    assert calls_of(lambda: twin(x)) == fused(3)
    state = copy.deepcopy(twin.state_dict())
    assert_same_steps(plain, fast, x)
    assert calls_of(lambda: fast(x)) == fused(3)
    torch.testing.assert_close(twin.state_dict(), state, rtol=0, atol=0)
    plain.load_state_dict(state)
    assert_same_steps(plain, twin, x)


def replicate(module):
    """A replica as DataParallel makes one, on the same device."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        setattr(replica, name, replicate(child))
    for name, parameter in module._parameters.items():
        setattr(replica, name, parameter.clone())
    return replica


@double
@each_form
def test_replicas(form):
    """Replicas serve themselves; that of the first device updates the buffers of the original."""
    plain, fast = pair(chain, form)
    x = chain_input()
    for _ in range(2):
        for model in (plain, fast):
            model.zero_grad()
            replicate(model)(x).square().sum().backward()
        assert all(p.grad is not None for p in fast.parameters())
        for expected, actual in zip(plain.parameters(), fast.parameters(), strict=True):
            torch.testing.assert_close(actual.grad, expected.grad)
        torch.testing.assert_close(fast.state_dict(), plain.state_dict())
    assert_same_steps(plain, fast, x)


@double
@each_form
@pytest.mark.parametrize("wrapper_is_root", [False, True])
@pytest.mark.filterwarnings("ignore:.*DataParallel.*")
def test_data_parallel_without_devices(form, wrapper_is_root):
    plain, fast = (model(chain(form)) for model in (DataParallel, DataParallel))
    fast.load_state_dict(plain.state_dict())
    fastsn.accelerate(fast if wrapper_is_root else fast.module)
    assert_same_steps(plain, fast, chain_input())


@pytest.fixture
def process_group(tmp_path):
    rendezvous = (tmp_path / "rendezvous").as_uri()
    dist.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@double
@each_form
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("wrapper_is_root", [False, True])
def test_distributed_data_parallel(process_group, form, wrapper_is_root):
    plain, fast = (DistributedDataParallel(chain(form)) for _ in range(2))
    fast.load_state_dict(plain.state_dict())
    fastsn.accelerate(fast if wrapper_is_root else fast.module)
    assert calls_of(lambda: fast(chain_input())) == fused(3)
    plain(chain_input())
    assert_same_steps(plain, fast, chain_input())


# Layers of other kinds


@double
@each_form
def test_recurrent_weights(form):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(3, 4)
            form.spectral_norm(self.lstm, "weight_ih_l0")
            form.spectral_norm(self.lstm, "weight_hh_l0")
            self.head = form.spectral_norm(nn.Linear(4, 2))

        def forward(self, x):
            return self.head(self.lstm(x)[0])

    assert_same_steps(*pair(Recurrent), torch.randn(5, 2, 3), steps=3)


@double
@each_parametrized_form
def test_attention(form):
    """Both read the output projection's weight, without a forward of that layer."""

    def build():
        attention = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        form.spectral_norm(attention.self_attn.out_proj)
        form.spectral_norm(attention.self_attn, "in_proj_weight")
        form.spectral_norm(attention.linear1)
        return attention

    assert_same_steps(*pair(build), torch.randn(3, 2, 4))


@double
@each_hook_form
@pytest.mark.filterwarnings("ignore:MultiheadAttention reads out_proj")
def test_attention_works_with_the_hook(form):
    """torch never runs the hook of out_proj; the grouped call serves it all the same."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2)
            form.spectral_norm(self.attention.out_proj)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    model = fastsn.accelerate(Attention())
    # Within another root it is served once as well.
    fastsn.accelerate(model.attention)
    projection = model.attention.out_proj
    x = torch.randn(3, 2, 6)
    assert calls_of(lambda: model(x)) == fused(1)
    for _ in range(200):
        model(x)
    largest = torch.linalg.matrix_norm(projection.weight_orig, 2).detach()
    torch.testing.assert_close(projection.weight, projection.weight_orig / largest)
    record = step(model, x)
    assert record["attention.out_proj.weight_orig.grad"].any()

    model.eval()
    with torch.no_grad():
        projection.weight_orig.copy_(projection.weight_orig.flip(0))
    model(x)
    sigma = projection.weight_u @ projection.weight_orig @ projection.weight_v
    torch.testing.assert_close(projection.weight, projection.weight_orig / sigma)


@double
@each_form
def test_vectors_are_normalized_too(form):
    def build():
        model = chain(form)
        form.spectral_norm(model[3], "bias")
        return model

    assert_same_steps(*pair(build), chain_input())


@each_parametrized_form
def test_complex_weights(form):
    def build():
        layers = [nn.Linear(5, 6, dtype=torch.complex128), nn.Linear(6, 4, dtype=torch.complex128)]
        return nn.Sequential(*map(form.spectral_norm, layers))

    plain, fast = pair(build)
    x = torch.randn(3, 5, dtype=torch.complex128)
    for _ in range(2):
        for model in (plain, fast):
            model.zero_grad()
            model.output = model(x)
            model.output.abs().square().sum().backward()
        torch.testing.assert_close(fast.output, plain.output)
        for expected, actual in zip(plain.parameters(), fast.parameters(), strict=True):
            torch.testing.assert_close(actual.grad, expected.grad)
    torch.testing.assert_close(fast.state_dict(), plain.state_dict())


def test_classes_derived_from_those_of_torch_are_left_alone():
    class Hook(TORCH_HOOK.SpectralNorm):
        def compute_weight(self, module, do_power_iteration):
            return 2 * super().compute_weight(module, do_power_iteration)

    class Parametrization(TORCH_PARAMETRIZED.SpectralNorm):
        def forward(self, weight):
            return 2 * super().forward(weight)

    def build():
        first, second = nn.Linear(5, 5), nn.Linear(5, 5)
        Hook.apply(first, "weight", 1, 0, 1e-12).__class__ = Hook
        parametrize.register_parametrization(second, "weight", Parametrization(second.weight))
        return nn.Sequential(first, second, TORCH_HOOK.spectral_norm(nn.Linear(5, 5)))

    plain, fast = pair(build)
    assert_same_steps(plain, fast, torch.randn(3, 5))
    assert calls_of(lambda: fast(torch.randn(3, 5))) == fused(1)


@double
@each_form
def test_forward_after_an_interrupted_one(form):
    """KeyboardInterrupt ends a forward without torch's calling any hook."""

    class Interrupted(nn.Sequential):
        interrupts = False

        def forward(self, x):
            if self.interrupts:
                raise KeyboardInterrupt
            return super().forward(x)

    def build(form):
        return Interrupted(*chain(form))

    plain, fast = pair(build, form)
    x = chain_input()
    fast.interrupts = True
    with pytest.raises(KeyboardInterrupt):
        fast(x)
    fast.interrupts = False
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.add_(torch.randn_like(parameter))
    # The interrupted forward iterated; from here on both start from the same.
    plain.load_state_dict(fast.state_dict())
    assert_same_steps(plain, fast, x)
