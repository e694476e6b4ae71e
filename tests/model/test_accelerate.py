"""An accelerated model computes what it computed before, with one fused call for all its layers."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsn
from helpers.accelerated import (
    Calls,
    assert_same_steps,
    calls_of,
    chain,
    chain_input,
    fused,
    pair,
    step,
)
from helpers.torch_peers import (
    FASTSN_HOOK,
    FASTSN_PARAMETRIZED,
    TORCH_HOOK,
    TORCH_PARAMETRIZED,
    each_form,
    each_hook_form,
    each_pair,
    each_parametrized_form,
)
from helpers.trajectories import Band

double = pytest.mark.usefixtures("double")


# Training


@pytest.fixture
def one_thread():
    """A second thread gains nothing at these sizes, and loses much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Block(nn.Module):
    def __init__(self, normalize, inputs, outputs):
        super().__init__()
        self.conv = normalize(nn.Conv2d(inputs, outputs, 3, padding=1))
        self.skip = normalize(nn.Conv2d(inputs, outputs, 1))

    def forward(self, x):
        return F.avg_pool2d(torch.tanh(self.conv(x)) + self.skip(x), 2)


class Critic(nn.Module):
    """Smooth, because kinks amplify rounding without bound."""

    def __init__(self, normalize):
        super().__init__()
        self.blocks = nn.Sequential(Block(normalize, 1, 4), Block(normalize, 4, 6))
        self.up = normalize(nn.ConvTranspose2d(6, 5, 2))
        self.features = normalize(nn.Linear(45, 8))
        self.embed = normalize(nn.Embedding(4, 8))
        self.score = normalize(nn.Linear(8, 1))

    def forward(self, image, label):
        features = self.features(torch.tanh(self.up(self.blocks(image))).flatten(1))
        return self.score(features).squeeze(1) + (self.embed(label) * features).sum(1)


def in_turn(*normalizers):
    """Each layer by the next one."""
    cycle = itertools.cycle(normalizers)
    return lambda module: next(cycle)(module)


def using(form, **options):
    return lambda module: form.spectral_norm(module, **options)


def options_of_torch(form):
    return in_turn(using(form, dim=1), using(form, eps=0.5), using(form, n_power_iterations=3))


def variants(form):
    return in_turn(
        using(form, norm="bidirectional"),
        using(form, scale=0.7),
        using(form, norm="bidirectional", scale=1.4, zero_guard=True),
        using(form, bound=True),
    )


NORMALIZERS = {
    "torch-hook": lambda: using(TORCH_HOOK),
    "torch-parametrized": lambda: using(TORCH_PARAMETRIZED),
    "fastsn-hook": lambda: using(FASTSN_HOOK),
    "fastsn-parametrized": lambda: using(FASTSN_PARAMETRIZED),
    "torch-hook-options": lambda: options_of_torch(TORCH_HOOK),
    "torch-parametrized-options": lambda: options_of_torch(TORCH_PARAMETRIZED),
    "fastsn-hook-variants": lambda: variants(FASTSN_HOOK),
    "fastsn-parametrized-variants": lambda: variants(FASTSN_PARAMETRIZED),
    "mixed": lambda: in_turn(
        *map(using, (TORCH_HOOK, FASTSN_PARAMETRIZED, TORCH_PARAMETRIZED, FASTSN_HOOK))
    ),
}


def train(normalizer, dtype, accelerated, nudge=None, steps=12):
    """What is in critic and generator, their gradients and the losses, after every step."""
    torch.manual_seed(7)
    critic = Critic(normalizer()).to(dtype)
    if accelerated:
        fastsn.accelerate(critic)
    generator = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Unflatten(1, (1, 8, 8))).to(dtype)
    # Where the summands of a gradient cancel, Adam multiplies their rounding by up to lr / eps. The
    # nudges of a band, which are of parameters, do not show that: it must not exceed one.
    optimizers = [torch.optim.Adam(m.parameters(), 0.01, eps=0.03) for m in (critic, generator)]
    history = []
    for _ in range(steps):
        if nudge is not None:
            nudge([*critic.parameters(), *generator.parameters()])
        real, noise = torch.rand(6, 1, 8, 8).to(dtype), torch.randn(6, 4).to(dtype)
        label = torch.randint(4, (6,))
        real.requires_grad_()

        optimizers[0].zero_grad()
        score = critic(real, label)
        (slope,) = torch.autograd.grad(score.sum(), real, create_graph=True)
        fake = critic(generator(noise), label)
        of_critic = F.softplus(1 - score).mean() + F.softplus(1 + fake).mean()
        (of_critic + slope.square().sum()).backward()
        optimizers[0].step()

        watched = critic.eval()(real, label)
        critic.train()

        optimizers[1].zero_grad()
        of_generator = -critic(generator(noise), label).mean()
        of_generator.backward()
        optimizers[1].step()

        record = {"critic": of_critic, "watched": watched, "generator": of_generator}
        for model in (critic, generator):
            prefix = type(model).__name__
            record |= {f"{prefix}.{key}": value for key, value in model.state_dict().items()}
            record |= {f"{prefix}.{key}.grad": p.grad for key, p in model.named_parameters()}
        history.append({k: v.detach().to(torch.float64, copy=True) for k, v in record.items()})
    return history


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("normalizer", NORMALIZERS.values(), ids=NORMALIZERS.keys())
def test_training_is_unchanged(normalizer):
    band = Band(lambda nudge: train(normalizer, torch.float64, False, nudge))
    for dtype in (torch.float32, torch.float64):
        band.check(train(normalizer, dtype, accelerated=True), dtype)


@pytest.mark.usefixtures("one_thread")
@each_pair
def test_a_small_error_of_sigma_is_a_change(peer, ours):
    """A hundred thousandth of it; `scale` stands in for an error."""
    band = Band(lambda nudge: train(lambda: using(peer), torch.float64, False, nudge))
    wrong = train(lambda: using(ours, scale=1 + 1e-5), torch.float32, accelerated=True)
    with pytest.raises(AssertionError, match="float32: (?s:.*) over"):
        band.check(wrong, torch.float32)


@pytest.mark.parametrize("normalizer", NORMALIZERS.values(), ids=NORMALIZERS.keys())
def test_takes_over_in_place(normalizer):
    model = Critic(normalizer())
    parts = {
        "modules": list(map(id, model.modules())),
        "parameters": [(name, id(p)) for name, p in model.named_parameters()],
        "buffers": [(name, id(b), b.data_ptr()) for name, b in model.named_buffers()],
    }
    values = {key: value.clone() for key, value in model.state_dict().items()}
    metadata = model.state_dict()._metadata
    random = torch.get_rng_state()
    assert fastsn.accelerate(model) is model
    assert torch.equal(torch.get_rng_state(), random)
    assert parts == {
        "modules": list(map(id, model.modules())),
        "parameters": [(name, id(p)) for name, p in model.named_parameters()],
        "buffers": [(name, id(b), b.data_ptr()) for name, b in model.named_buffers()],
    }
    state = model.state_dict()
    assert list(state) == list(values) and state._metadata == metadata
    torch.testing.assert_close(dict(state), values, rtol=0, atol=0)


@double
@each_form
def test_checkpoints_load_both_ways(form):
    plain, fast = pair(chain, form)
    x = chain_input()
    for model in (plain, fast):
        model(x)
    for source, target in ((plain, fast), (fast, plain)):
        source(x)
        target.load_state_dict(source.state_dict())
        torch.testing.assert_close(target.eval()(x), source.eval()(x))
        plain.train(), fast.train()


# One call


@each_form
def test_one_call_per_forward_and_backward(form):
    model = fastsn.accelerate(chain(form))
    x = chain_input()
    with Calls() as calls:
        output = model(x)
        assert calls.seen == fused(3)
        output.sum().backward()
        assert calls.seen == [*fused(3), ("scale_backward", 3)]
    assert calls_of(lambda: model.eval()(x)) == [("estimate", 3), ("scale", 3)]


def test_as_many_calls_as_the_constants_need():
    """Within a call dimensions, scales and iterations may differ, the others may not."""
    layers = [
        TORCH_PARAMETRIZED.spectral_norm(nn.Linear(4, 4), n_power_iterations=3),
        TORCH_PARAMETRIZED.spectral_norm(nn.Linear(4, 4), dim=1),
        FASTSN_PARAMETRIZED.spectral_norm(nn.Linear(4, 4), scale=2.0),
        FASTSN_PARAMETRIZED.spectral_norm(nn.Linear(4, 4), norm="bidirectional"),
        FASTSN_PARAMETRIZED.spectral_norm(nn.Linear(4, 4), eps=1e-6),
        FASTSN_PARAMETRIZED.spectral_norm(nn.Linear(4, 4), bound=True),
        FASTSN_PARAMETRIZED.spectral_norm(nn.Linear(4, 4), zero_guard=True),
        TORCH_HOOK.spectral_norm(nn.Linear(4, 4)),
        FASTSN_HOOK.spectral_norm(nn.Linear(4, 4)),
    ]
    model = fastsn.accelerate(nn.Sequential(*layers))
    assert calls_of(lambda: model(torch.randn(1, 4))) == fused(4, 1, 1, 1, 2)


@double
@each_form
def test_layers_of_several_types(form):
    class Casting(nn.Module):
        def __init__(self):
            super().__init__()
            dtypes = (torch.bfloat16, torch.float64, torch.float32)
            layers = (form.spectral_norm(nn.Linear(6, 6, dtype=dtype)) for dtype in dtypes)
            self.layers = nn.ModuleList(layers)

        def forward(self, x):
            for layer in self.layers:
                x = torch.tanh(layer(x.to(layer.bias.dtype)))
            return x

    plain, fast = pair(Casting)
    x = torch.randn(3, 6)
    # fastsn iterates bf16 weights in fp32, torch in bf16: compare with fastsn's own, one by one.
    fastsn.accelerate(nn.ModuleList([plain]))
    assert calls_of(lambda: fast(x)) == fused(2, 1)
    assert calls_of(lambda: plain(x)) == fused(1, 1, 1)
    assert_same_steps(plain, fast, x)


# Which mode a layer is in


@double
@each_form
def test_modes(form):
    plain, fast = pair(chain, form)
    x = chain_input()
    for mode in (True, False, True, True, False):
        plain.train(mode), fast.train(mode)
        assert_same_steps(plain, fast, x, steps=1)


@double
@each_form
def test_a_part_in_eval_does_not_iterate(form):
    plain, fast = pair(chain, form)
    before = [vector.clone() for vector in form.vectors(fast[3])]
    for model in (plain, fast):
        model[3].eval()
    assert calls_of(lambda: fast(chain_input())) == fused(3)
    assert all(map(torch.equal, form.vectors(fast[3]), before))
    plain(chain_input())
    assert_same_steps(plain, fast, chain_input())


@double
@each_form
def test_frozen_weights(form):
    plain, fast = pair(chain, form)
    for model in (plain, fast):
        form.vectors(model[3])[0].requires_grad_(False)
    assert_same_steps(plain, fast, chain_input())
    for model in (plain, fast):
        model.requires_grad_(False)
    x = chain_input().requires_grad_()
    gradients = [torch.autograd.grad(model(x).square().sum(), x)[0] for model in (plain, fast)]
    torch.testing.assert_close(gradients[1], gradients[0])


@double
@each_form
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_autograd(form, context):
    plain, fast = pair(chain, form)
    x = chain_input()
    with context():
        torch.testing.assert_close(fast(x), plain(x))
    assert_same_steps(plain, fast, x)


@double
@each_form
def test_autocast(form):
    plain, fast = pair(lambda form: chain(form).float(), form)
    x = chain_input().float()
    for mode in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = [model.train(mode)(x) for model in (plain, fast)]
        assert outputs[1].dtype == torch.bfloat16
        torch.testing.assert_close(outputs[1], outputs[0])


# What else reads a weight


@double
@each_parametrized_form
def test_a_read_outside_of_the_forward_iterates(form):
    plain, fast = pair(chain, form)
    x = chain_input()
    for _ in range(2):
        torch.testing.assert_close(fast[0].weight, plain[0].weight)
        torch.testing.assert_close(fast(x), plain(x))
        torch.testing.assert_close(fast[3].weight, plain[3].weight)
    torch.testing.assert_close(fast.state_dict(), plain.state_dict())


@double
@each_hook_form
def test_the_attribute_of_a_hook_is_the_weight_of_the_last_forward(form):
    plain, fast = pair(chain, form)
    x = chain_input()
    for model in (plain, fast):
        model(x)
    torch.testing.assert_close(fast[3].weight, plain[3].weight)
    torch.testing.assert_close(fast[3].weight, plain[3].weight)


@double
@each_form
def test_a_part_called_on_its_own_iterates_on_its_own(form):
    plain, fast = pair(chain, form)
    x = torch.randn(4, 9)
    assert calls_of(lambda: fast[3:](x)) == fused(1, 1)
    plain[3:](x)
    assert_same_steps(plain, fast, chain_input())
    assert_same_steps(plain[3], fast[3], x)


class Twice(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.a = form.spectral_norm(nn.Linear(5, 5))
        self.b = form.spectral_norm(nn.Linear(5, 5))

    def forward(self, x):
        return self.a(torch.tanh(self.b(torch.tanh(self.a(x)))))


@double
@each_form
def test_a_layer_used_twice_iterates_for_each_use(form):
    plain, fast = pair(Twice, form)
    assert calls_of(lambda: fast(torch.randn(3, 5))) == fused(2, 1)
    plain(torch.randn(3, 5))
    assert_same_steps(plain, fast, torch.randn(3, 5))


@double
@each_form
def test_shared_weights_have_vectors_each(form):
    def build():
        layers = [nn.Linear(5, 5), nn.Linear(5, 5)]
        layers[1].weight = layers[0].weight
        return nn.Sequential(*map(form.spectral_norm, layers))

    plain, fast = pair(build)
    assert form.vectors(fast[0])[0] is form.vectors(fast[1])[0]
    assert calls_of(lambda: fast(torch.randn(3, 5))) == fused(2)
    plain(torch.randn(3, 5))
    assert_same_steps(plain, fast, torch.randn(3, 5))


def change(weight):
    """Makes it another matrix, one that normalization does not lead back to the first."""
    with torch.no_grad():
        weight.copy_(weight.flip(0))


class Switch(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.a = form.spectral_norm(nn.Linear(5, 5))
        self.b = form.spectral_norm(nn.Linear(5, 5))

    def forward(self, x, use_b):
        return self.b(self.a(x)) if use_b else self.a(x)


@double
@each_form
def test_an_unused_layer_iterates_and_keeps_nothing(form):
    plain, fast = pair(Switch, form)
    x = torch.randn(3, 5)
    expected = step(plain, x, False)
    actual = step(fast, x, False)
    moved = [key for key in expected if key.startswith("b.") and key.endswith(("_u", "_v"))]
    assert len(moved) == 2
    for key in moved:
        assert not torch.equal(actual.pop(key), expected.pop(key))
    # No gradient, as without acceleration, and not zeros: optimizers tell them apart.
    torch.testing.assert_close(actual, expected)

    fast.load_state_dict(plain.state_dict())
    fast(x, False)
    plain.load_state_dict(fast.state_dict())
    for model in (plain, fast):
        change(form.vectors(model.b)[0])
    torch.testing.assert_close(fast.b(x), plain.b(x))
    assert_same_steps(plain, fast, x, True)


@double
@each_form
def test_a_forward_that_fails_leaves_no_stale_weight(form):
    plain, fast = pair(chain, form)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fast(torch.randn(4, 2, 3))
    plain.load_state_dict(fast.state_dict())
    for model in (plain, fast):
        change(form.vectors(model[5])[0])
    x = torch.randn(3, 6)
    torch.testing.assert_close(fast[5](x), plain[5](x))
    assert_same_steps(plain, fast, chain_input())


class Recursive(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.a = form.spectral_norm(nn.Linear(5, 5))
        self.b = form.spectral_norm(nn.Linear(5, 5))

    def forward(self, x, depth=2):
        x = torch.tanh(self.a(x))
        return self.b(self(x, depth - 1) if depth else x)


@double
@each_form
def test_a_root_that_calls_itself(form):
    plain, fast = pair(Recursive, form)
    assert_same_steps(plain, fast, torch.randn(3, 5))


@double
@each_form
def test_branches_with_a_backward_each(form):
    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = form.spectral_norm(nn.Linear(5, 5))
            self.b = form.spectral_norm(nn.Linear(5, 5))

        def forward(self, x):
            return self.a(x), self.b(x)

    plain, fast = pair(Towers)
    x = torch.randn(3, 5)
    for model in (plain, fast):
        for output in model(x):
            output.square().sum().backward()
    gradients = [[p.grad for p in model.parameters()] for model in (plain, fast)]
    torch.testing.assert_close(gradients[1], gradients[0])


@each_form
def test_a_weight_that_changes_before_the_backward_is_an_error(form):
    for model in pair(chain, form):
        loss = model(chain_input()).sum()
        change(form.vectors(model[3])[0])
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# Roots


@double
@each_form
def test_accelerating_twice(form):
    plain, fast = pair(chain, form)
    hooks = len(fast._forward_pre_hooks), len(fast._forward_hooks)
    assert fastsn.accelerate(fast) is fast
    assert (len(fast._forward_pre_hooks), len(fast._forward_hooks)) == hooks
    assert calls_of(lambda: fast(chain_input())) == fused(3)
    plain(chain_input())
    assert_same_steps(plain, fast, chain_input())


class Nested(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.first = form.spectral_norm(nn.Linear(5, 5))
        self.inner = Switch(form)

    def forward(self, x):
        return self.inner(torch.tanh(self.inner(torch.tanh(self.first(x)), True)), True)


@double
@each_form
@pytest.mark.parametrize("inner_first", [True, False])
def test_a_root_within_a_root(form, inner_first):
    plain, fast = pair(Nested, form)
    fastsn.accelerate(fast.inner)
    if inner_first:
        fastsn.accelerate(fast)
    x = torch.randn(3, 5)
    # Each weight is served by the root that was accelerated last.
    alone = [(name, 1) for _ in range(2) for name in ("power_", "scale")]
    if inner_first:
        assert calls_of(lambda: fast(x)) == fused(3) + alone
    else:
        assert calls_of(lambda: fast(x)) == fused(1, 2, 2)
    plain(x)
    assert calls_of(lambda: fast.inner(x, True)) == (alone if inner_first else fused(2))
    plain.inner(x, True)
    assert_same_steps(plain, fast, x)
    assert_same_steps(plain.inner, fast.inner, x, True)
    assert_same_steps(plain, fast, x)


@double
@each_form
def test_a_root_that_is_a_normalized_layer(form):
    plain, fast = pair(lambda: form.spectral_norm(nn.Linear(5, 4)))
    assert calls_of(lambda: fast(torch.randn(3, 5))) == fused(1)
    plain(torch.randn(3, 5))
    assert_same_steps(plain, fast, torch.randn(3, 5))


def test_a_model_without_layers_warns():
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.warns(UserWarning, match="no layer with spectral norm in Sequential"):
        assert fastsn.accelerate(model) is model
    assert model(torch.randn(2, 3)).shape == (2, 3)


def test_a_copy_can_be_accelerated_while_the_original_stays_torchs():
    original = nn.Sequential(torch.nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)))
    fast = fastsn.accelerate(copy.deepcopy(original))
    x = torch.randn(2, 3)
    for _ in range(2):
        torch.testing.assert_close(fast(x), original(x))
    torch.testing.assert_close(fast[0].weight, original[0].weight)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_part_of_a_model():
    normalized = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 8))
    model = fastsn.accelerate(nn.Sequential(normalized, torch.jit.script(nn.BatchNorm1d(8))))
    fastsn.set_update_policy(model, "step")
    assert list(fastsn.sigmas(model)) == list(fastsn.refresh(model)) == ["0.weight"]
    assert model(torch.randn(3, 4)).shape == (3, 8)
