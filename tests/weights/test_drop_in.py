"""What both drop-ins promise: the hook and the parametrization do what torch's functions do.

Tests with a `form` run on torch itself as well: what they demand is torch's behaviour. What only
one form has is in `test_hook` and `test_parametrization`.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from helpers.torch_peers import (
    FASTSN_HOOK,
    FASTSN_PARAMETRIZED,
    FORMS,
    HOOKS,
    LAYERS,
    PARAMETRIZED,
    TORCH_HOOK,
    TORCH_PARAMETRIZED,
    Holder,
    as_matrix,
    combined,
    each_form,
    each_layer,
    each_pair,
    iterate,
    normalized,
    raised,
    slow_linear,
    steps_taken,
    twins,
)

double = pytest.mark.usefixtures("double")


# Registration


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@each_layer
@pytest.mark.parametrize(
    "peer, ours, dtype",
    [
        (TORCH_HOOK, FASTSN_HOOK, torch.float32),
        (TORCH_HOOK, FASTSN_HOOK, torch.float64),
        (TORCH_HOOK, FASTSN_HOOK, torch.bfloat16),
        (TORCH_PARAMETRIZED, FASTSN_PARAMETRIZED, torch.float32),
        (TORCH_PARAMETRIZED, FASTSN_PARAMETRIZED, torch.float64),
        (TORCH_PARAMETRIZED, FASTSN_PARAMETRIZED, torch.complex128),
    ],
)
def test_registration_draws_what_torch_draws(layer, peer, ours, dtype):
    original = layer.build().to(dtype)
    modules, random_states = [], []
    for form in (peer, ours):
        torch.manual_seed(5)
        modules.append(form.spectral_norm(copy.deepcopy(original), layer.name))
        random_states.append(torch.get_rng_state())
    assert torch.equal(*random_states)
    expected, actual = (module.state_dict() for module in modules)
    assert list(actual) == list(expected)
    # What the hook draws is normalized, and nothing else is done with it.
    exact = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 0} if ours is FASTSN_HOOK else {}
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, **exact)


@each_form
@pytest.mark.parametrize(
    "build, dim, expected",
    [
        (lambda: nn.Conv2d(3, 4, (5, 6)), None, 0),
        (lambda: nn.ConvTranspose1d(3, 4, 5), None, 1),
        (lambda: nn.ConvTranspose2d(3, 4, (5, 6)), None, 1),
        (lambda: nn.ConvTranspose3d(3, 4, 5), None, 1),
        (lambda: nn.ConvTranspose2d(3, 4, (5, 6)), 0, 0),
        (lambda: nn.Conv2d(3, 4, (5, 6)), 2, 2),
        (lambda: nn.Embedding(9, 4), 1, 1),
    ],
)
def test_dim(form, build, dim, expected):
    weight, u, v = form.vectors(form.spectral_norm(build(), dim=dim))
    assert u.shape == (weight.shape[expected],)
    assert v.shape == (weight.numel() // len(u),)


@each_form
def test_weight_and_bias_of_one_module(form):
    module = form.spectral_norm(form.spectral_norm(nn.Linear(5, 7)), "bias")
    form.read(module, "bias")
    torch.testing.assert_close(module.bias.norm(), torch.tensor(1.0))
    form.remove(module, "bias")
    assert "bias" in module._parameters and "weight" not in module._parameters
    assert form.vectors(module)[1].shape == (7,)
    form.remove(module)
    assert type(module) is nn.Linear and {*module.state_dict()} == {"weight", "bias"}


# What is wrong, and the error of the hook and of the parametrization; None: that is none there.
ERRORS = {
    "unknown name": (lambda: nn.Linear(2, 3), {"name": "foo"}, KeyError, ValueError),
    "a buffer": (lambda: nn.BatchNorm1d(3), {"name": "running_mean"}, KeyError, None),
    "a sub-module": (lambda: nn.Sequential(nn.Linear(2, 3)), {"name": "0"}, KeyError, ValueError),
    "None": (lambda: nn.Linear(2, 3, bias=False), {"name": "bias"}, ValueError, ValueError),
    "lazy": (lambda: nn.LazyLinear(3), {}, ValueError, RuntimeError),
    "no iterations": (lambda: nn.Linear(2, 3), {"n_power_iterations": 0}, ValueError, ValueError),
    "minus one iteration": (
        lambda: nn.Linear(2, 3), {"n_power_iterations": -1}, ValueError, ValueError,
    ),
    "no iterations of a vector": (
        lambda: Holder(torch.ones(3)), {"n_power_iterations": -1}, ValueError, ValueError,
    ),
    "dim too large": (lambda: nn.Linear(2, 3), {"dim": 2}, RuntimeError, IndexError),
    "negative dim": (lambda: nn.Linear(2, 3), {"dim": -1}, RuntimeError, None),
    "dim too small": (lambda: nn.Linear(2, 3), {"dim": -3}, RuntimeError, IndexError),
    "dim of a vector": (lambda: Holder(torch.ones(3)), {"dim": 1}, RuntimeError, IndexError),
    "a scalar": (lambda: Holder(torch.tensor(2.0)), {}, None, IndexError),
    "both dim and iterations": (
        lambda: nn.Linear(2, 3), {"dim": 2, "n_power_iterations": 0}, ValueError, IndexError,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "peer, ours, build, arguments, error",
    [
        pytest.param(*pair, build, arguments, error, id=f"{form}-{name}")
        for name, (build, arguments, *errors) in ERRORS.items()
        for form, pair, error in (
            ("hook", (TORCH_HOOK, FASTSN_HOOK), errors[0]),
            ("parametrized", (TORCH_PARAMETRIZED, FASTSN_PARAMETRIZED), errors[1]),
        )
        if error is not None
    ],
)
def test_registration_errors_are_torchs_and_leave_the_module_alone(
    peer, ours, build, arguments, error
):
    module = build()
    expected = raised(lambda: peer.spectral_norm(build(), **arguments))
    kind, keys, random_state = type(module), list(module.state_dict()), torch.get_rng_state()
    hooks = list(module._forward_pre_hooks)
    actual = raised(lambda: ours.spectral_norm(module, **arguments))
    assert type(actual) is type(expected) is error
    assert str(actual) == str(expected)
    assert type(module) is kind and list(module.state_dict()) == keys
    assert torch.equal(torch.get_rng_state(), random_state)
    assert list(module._forward_pre_hooks) == hooks


@each_form
def test_integer_weight(form):
    module = Holder(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(RuntimeError):
        form.spectral_norm(module)
    assert type(module) is Holder and list(module.state_dict()) == ["weight"]
    assert not module._forward_pre_hooks


# Forward


# A parametrized LSTM reads its weight more than once in a forward.
@combined("form, kind", (HOOKS, list(LAYERS)), (PARAMETRIZED, [k for k in LAYERS if k != "lstm"]))
@pytest.mark.parametrize("n_power_iterations", [1, 3])
@double
def test_forward_iterates_in_its_order(form, kind, n_power_iterations):
    layer = LAYERS[kind]
    plain = layer.build()
    module = form.spectral_norm(copy.deepcopy(plain), layer.name, n_power_iterations)
    weight, inputs = getattr(plain, layer.name), layer.example()
    if weight.ndim == 1 and not form.v_first:
        output = layer.call(module, inputs)
        expected = F.normalize(weight, dim=0)
    else:
        dim = int(isinstance(plain, nn.modules.conv._ConvTransposeNd))
        _, u, v = form.vectors(module, layer.name)
        new = iterate(
            as_matrix(weight, dim), u.clone(), v.clone(), steps=n_power_iterations,
            v_first=form.v_first,
        )  # fmt: skip
        output = layer.call(module, inputs)
        torch.testing.assert_close((u, v), new)
        expected = normalized(weight, *new, dim)
    if form.v_first:
        torch.testing.assert_close(getattr(module, layer.name), expected)
    weight.data.copy_(expected)
    torch.testing.assert_close(output, layer.call(plain, inputs))


@each_form
@pytest.mark.parametrize("scale", [1e-3, 0.3, 3.0])
def test_eps_bounds_the_norms_of_u_and_v_only(form, scale):
    module = slow_linear()
    module.weight.data.mul_(scale)
    form.spectral_norm(module, eps=0.5)
    weight, u, v = form.vectors(module)
    for vector in (u, v):
        vector.copy_(F.normalize(torch.randn_like(vector), dim=0))
    expected = iterate(as_matrix(weight), u.clone(), v.clone(), eps=0.5, v_first=form.v_first)
    torch.testing.assert_close(form.read(module), normalized(weight, *expected))
    torch.testing.assert_close((u, v), expected)


@combined("form, dim", (FORMS, [0, 1, 2, 3]), (PARAMETRIZED, [-1, -3]))
@double
def test_forward_of_a_chosen_dim(form, dim):
    module = form.spectral_norm(nn.Conv2d(3, 4, (2, 5)), dim=dim)
    weight, u, v = form.vectors(module)
    expected = iterate(as_matrix(weight, dim), u.clone(), v.clone(), v_first=form.v_first)
    torch.testing.assert_close(form.read(module), normalized(weight, *expected, dim))
    torch.testing.assert_close((u, v), expected)


@each_form
def test_eval_repeats_the_last_training_forward(form):
    module = form.spectral_norm(nn.Linear(5, 7))
    x = torch.randn(2, 5)
    module(x)
    last = module(x)
    kept = [vector.clone() for vector in form.vectors(module)]
    module.eval()
    torch.testing.assert_close(module(x), last)
    torch.testing.assert_close(module(x), last)
    assert all(torch.equal(*pair) for pair in zip(kept, form.vectors(module), strict=True))


@each_form
def test_u_and_v_are_updated_in_place(form):
    module = form.spectral_norm(nn.Conv2d(3, 4, 2), n_power_iterations=3)
    x = torch.randn(1, 3, 5, 5)
    _, u, v = form.vectors(module)
    pointers, versions = (u.data_ptr(), v.data_ptr()), (u._version, v._version)
    module(x)
    assert form.vectors(module)[1] is u and form.vectors(module)[2] is v
    assert (u.data_ptr(), v.data_ptr()) == pointers
    assert u._version > versions[0] and v._version > versions[1]
    versions = (u._version, v._version)
    module.eval()(x)
    assert (u._version, v._version) == versions


@each_form
def test_vectors_given_from_outside_are_used(form):
    """Of the two the one that an iteration starts from."""
    module = form.spectral_norm(slow_linear())
    owner, prefix, names = form.place(module)
    name, size = (names[0], 6) if form.v_first else (names[1], 5)
    for assign in (
        lambda given: getattr(owner, name).data.copy_(given),
        lambda given: setattr(owner, name, given.clone()),
        lambda given: module.load_state_dict(
            {prefix + name: given.clone()}, strict=False, assign=True
        ),
    ):
        form.read(module)
        given = F.normalize(torch.randn(size, dtype=torch.float64), dim=0)
        assign(given)
        form.read(module)
        assert steps_taken(form, module, given) == 1


@each_form
def test_a_changed_weight_is_seen_in_eval(form):
    module = form.spectral_norm(nn.Linear(5, 7))
    original, x = form.vectors(module)[0], torch.randn(2, 5)
    module(x), module.eval()(x)
    for reach in (lambda: original.data, original.detach):
        reach().copy_(torch.randn(7, 5))
        torch.testing.assert_close(form.read(module), normalized(*form.vectors(module)))


@each_pair
@pytest.mark.parametrize("build", [lambda: nn.Conv2d(8, 4, 3), lambda: nn.Linear(6, 5)])
def test_strides_of_the_weight_are_kept(build, peer, ours):
    module = build()
    last_first = list(range(module.weight.dim()))[::-1]
    module.weight.data = module.weight.data.permute(last_first).contiguous().permute(last_first)
    expected, actual = twins(lambda: module, peer, ours)
    torch.testing.assert_close(ours.read(actual), peer.read(expected))
    x = torch.randn(2, 8, 5, 5) if module.weight.dim() == 4 else torch.randn(2, 6)
    torch.testing.assert_close(actual(x), expected(x))
    assert actual.weight.stride() == expected.weight.stride() == module.weight.stride()


@each_form
def test_zero_weight_gives_nan(form):
    """pytorch#20192: eps guards u and v, not sigma."""
    module = nn.Linear(3, 4)
    nn.init.zeros_(module.weight)
    assert form.read(form.spectral_norm(module)).isnan().all()


@each_form
def test_meta_device(form):
    with torch.device("meta"):
        module = form.spectral_norm(nn.Linear(3, 4))
    assert {tensor.device.type for tensor in module.state_dict().values()} == {"meta"}
    source = form.spectral_norm(nn.Linear(3, 4))
    module.to_empty(device="cpu").load_state_dict(source.state_dict())
    x = torch.randn(2, 3)
    torch.testing.assert_close(module(x), source(x))


# Gradient


@combined("form, dtype", (FORMS, [torch.float64]), (PARAMETRIZED, [torch.complex128]))
@pytest.mark.parametrize("training", [True, False])
def test_gradient_holds_u_and_v_constant(form, training, dtype):
    module = form.spectral_norm(Holder(torch.randn(6, 5, dtype=dtype)))
    form.read(module)
    used = form.read(module.train(training))
    weight, u, v = form.vectors(module)
    seed = torch.randn_like(weight)
    (actual,) = torch.autograd.grad(used, weight, seed)
    constant = normalized(weight, u.clone(), v.clone())
    (expected,) = torch.autograd.grad(constant, weight, seed)
    torch.testing.assert_close(actual, expected)
    assert not torch.allclose(actual, seed * (constant / weight).mean())


@each_form
@pytest.mark.parametrize("modes", [(True, True), (True, False, True, False)])
@double
def test_gradcheck_of_several_forwards(form, modes):
    module = form.spectral_norm(nn.Linear(3, 4))
    vectors = form.vectors(module)[1:]
    kept = [vector.clone() for vector in vectors]

    def forwards(x):
        for vector, before in zip(vectors, kept, strict=True):
            vector.data.copy_(before)
        return sum(module.train(mode)(x) for mode in modes)

    x = torch.randn(2, 3, requires_grad=True)
    assert gradcheck(forwards, (x,), check_batched_grad=len(modes) > 2)


@combined("form, dtype", (FORMS, [torch.float64]), (PARAMETRIZED, [torch.complex128]))
def test_gradcheck_of_the_original_in_eval(form, dtype):
    module = form.spectral_norm(nn.Linear(3, 4, dtype=dtype))
    x, original = torch.randn(2, 3, dtype=dtype), form.vectors(module)[0]
    module(x), module.eval()
    # gradcheck moves the parameter through `.data`: no version counter tells of it.
    assert gradcheck(lambda _: module(x), (original,), check_batched_grad=True)
    assert gradgradcheck(lambda _: module(x), (original,))


@combined(
    "form, modes",
    # torch's hook keeps the live u and v of a forward in eval mode: see test_hook.
    (FORMS, [[True, True]]),
    (
        {name: form for name, form in FORMS.items() if form is not TORCH_HOOK},
        [[False, True], [True, False, True]],
    ),
)
@double
def test_several_forwards_before_one_backward(form, modes):
    """The loss D(real) - D(fake): each forward keeps the u and v that it used. Also after one in
    eval mode (pytorch#66363, #68327)."""
    module = form.spectral_norm(slow_linear())
    x = torch.randn(2, 5)
    module(x)
    uses = []
    for mode in modes:
        output = module.train(mode)(x)
        uses.append((output, *(vector.clone() for vector in form.vectors(module)[1:])))
    # As different as real and fake, and squared, so that no gradient is that of another forward.
    sum(k * output.square().sum() for k, (output, _, _) in enumerate(uses, 1)).backward()
    weight = form.vectors(module)[0]
    free = weight.detach().requires_grad_()
    outputs = [F.linear(x, normalized(free, u, v), module.bias) for _, u, v in uses]
    loss = sum(k * output.square().sum() for k, output in enumerate(outputs, 1))
    torch.testing.assert_close(weight.grad, torch.autograd.grad(loss, free)[0])
