"""The hook form does what `torch.nn.utils.spectral_norm` does, and does right what torch does not.

Tests with a `form` run on torch itself as well: what they demand is torch's behaviour.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch_peers import (
    FASTSN_HOOK,
    TORCH_HOOK,
    Holder,
    as_matrix,
    each_hook_form,
    each_layer,
    iterate,
    normalized,
    raised,
    slow_linear,
    start,
    steps_taken,
    twins,
)

import fastsn
from fastsn.checkpoints import convert


def vectors(module, name="weight"):
    return FASTSN_HOOK.vectors(module, name)


def hook_twins(build, *args, **kwargs):
    return twins(build, TORCH_HOOK, FASTSN_HOOK, *args, **kwargs)


# Registration


@each_hook_form
@pytest.mark.parametrize("requires_grad", [True, False])
def test_registration_layout(form, requires_grad):
    module = nn.Linear(5, 7)
    weight = module.weight.requires_grad_(requires_grad)
    assert form.spectral_norm(module) is module
    assert type(module) is nn.Linear
    assert module._parameters["weight_orig"] is weight
    assert weight.requires_grad is requires_grad
    assert list(module._parameters) == ["bias", "weight_orig"]
    assert list(module._buffers) == ["weight_u", "weight_v"]
    assert module.weight_u.shape == (7,) and module.weight_v.shape == (5,)
    for vector in (module.weight_u, module.weight_v):
        torch.testing.assert_close(vector.norm(), torch.tensor(1.0))
        assert not vector.requires_grad
    assert not isinstance(module.weight, nn.Parameter)
    assert module.weight.data_ptr() == weight.data_ptr()
    assert module.weight.stride() == weight.stride() and not module.weight.requires_grad
    assert [type(hook) for hook in module._forward_pre_hooks.values()] == [form.SpectralNorm]
    assert [type(hook) for hook in module._state_dict_hooks.values()] == [form.StateDictHook]
    own = [convert.load] if form is FASTSN_HOOK else []
    loading = [hook.hook for hook in module._load_state_dict_pre_hooks.values()]
    assert loading[:-1] == own and isinstance(loading[-1], form.LoadStateDictPreHook)


@each_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_registration_draws_what_torch_draws(layer, dtype):
    states = []
    original = layer.build().to(dtype)
    modules = []
    for form in (TORCH_HOOK, FASTSN_HOOK):
        torch.manual_seed(5)
        modules.append(form.spectral_norm(copy.deepcopy(original), layer.name))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    for expected, actual in zip(*(vectors(m, layer.name) for m in modules), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


@each_hook_form
def test_registration_does_not_warm_up(form):
    module = slow_linear()
    torch.manual_seed(3)
    u = F.normalize(torch.randn(6, dtype=torch.float64), dim=0)
    v = F.normalize(torch.randn(5, dtype=torch.float64), dim=0)
    torch.manual_seed(3)
    form.spectral_norm(module)
    torch.testing.assert_close(module.weight_u, u)
    torch.testing.assert_close(module.weight_v, v)


@each_hook_form
def test_init_of_the_plain_weight_reaches_the_original(form):
    module = form.spectral_norm(nn.Linear(3, 4))
    nn.init.constant_(module.weight, 0.5)
    assert torch.equal(module.weight_orig, torch.full((4, 3), 0.5))


@each_hook_form
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
    module = form.spectral_norm(build(), dim=dim)
    size = module.weight_orig.shape[expected]
    assert module.weight_u.shape == (size,)
    assert module.weight_v.shape == (module.weight_orig.numel() // size,)


@each_hook_form
def test_weight_and_bias_of_one_module(form):
    module = form.spectral_norm(form.spectral_norm(nn.Linear(5, 7)), "bias")
    assert module.bias_u.shape == (7,) and module.bias_v.shape == (1,)
    module(torch.randn(2, 5))
    torch.testing.assert_close(module.bias.norm(), torch.tensor(1.0))
    metadata = module.state_dict()._metadata[""]["spectral_norm"]
    assert metadata == {"weight.version": 1, "bias.version": 1}
    form.remove(module, "bias")
    assert "bias" in module._parameters and "weight_orig" in module._parameters
    assert module.state_dict()._metadata[""]["spectral_norm"] == {"weight.version": 1}


REGISTRATION_ERRORS = {
    "unknown name": (lambda: nn.Linear(2, 3), {"name": "foo"}, KeyError),
    "a buffer": (lambda: nn.BatchNorm1d(3), {"name": "running_mean"}, KeyError),
    "a sub-module": (lambda: nn.Sequential(nn.Linear(2, 3)), {"name": "0"}, KeyError),
    "None": (lambda: nn.Linear(2, 3, bias=False), {"name": "bias"}, ValueError),
    "lazy": (lambda: nn.LazyLinear(3), {}, ValueError),
    "no iterations": (lambda: nn.Linear(2, 3), {"n_power_iterations": 0}, ValueError),
    "minus one iteration": (lambda: nn.Linear(2, 3), {"n_power_iterations": -1}, ValueError),
    "dim too large": (lambda: nn.Linear(2, 3), {"dim": 2}, RuntimeError),
    "negative dim": (lambda: nn.Linear(2, 3), {"dim": -1}, RuntimeError),
    "dim of a vector": (lambda: Holder(torch.ones(3)), {"dim": 1}, RuntimeError),
    "iterations before dim": (
        lambda: nn.Linear(2, 3),
        {"dim": 2, "n_power_iterations": 0},
        ValueError,
    ),
}


@pytest.mark.parametrize(
    "build, arguments, error", REGISTRATION_ERRORS.values(), ids=REGISTRATION_ERRORS.keys()
)
def test_registration_errors_are_torchs_and_leave_the_module_alone(build, arguments, error):
    module = build()
    expected = raised(lambda: TORCH_HOOK.spectral_norm(build(), **arguments))
    keys, random_state = list(module.state_dict()), torch.get_rng_state()
    hooks = list(module._forward_pre_hooks)
    actual = raised(lambda: FASTSN_HOOK.spectral_norm(module, **arguments))
    assert type(actual) is type(expected) is error
    assert str(actual) == str(expected)
    assert list(module.state_dict()) == keys and torch.equal(torch.get_rng_state(), random_state)
    assert list(module._forward_pre_hooks) == hooks


@each_hook_form
def test_integer_weight(form):
    module = Holder(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(RuntimeError):
        form.spectral_norm(module)
    assert list(module.state_dict()) == ["weight"] and not module._forward_pre_hooks


@pytest.mark.parametrize("first", [TORCH_HOOK, FASTSN_HOOK], ids=["torch", "fastsn"])
@each_hook_form
def test_registering_twice(form, first):
    module = first.spectral_norm(nn.Linear(2, 3))
    message = "Cannot register two spectral_norm hooks on the same parameter weight"
    with pytest.raises(RuntimeError, match=message):
        form.spectral_norm(module)
    assert len(module._forward_pre_hooks) == 1 and module(torch.randn(1, 2)).shape == (1, 3)


# Forward


@each_hook_form
@each_layer
@pytest.mark.parametrize("n_power_iterations", [1, 3])
@pytest.mark.usefixtures("double")
def test_forward_iterates_v_first(form, layer, n_power_iterations):
    module = form.spectral_norm(layer.build(), layer.name, n_power_iterations)
    weight, u, v = vectors(module, layer.name)
    dim = int(isinstance(module, nn.modules.conv._ConvTransposeNd))
    matrix = as_matrix(weight, dim)
    expected_u, expected_v = iterate(
        matrix, u.clone(), v.clone(), steps=n_power_iterations, v_first=True
    )
    inputs = layer.example()
    output = layer.call(module, inputs)
    torch.testing.assert_close(u, expected_u)
    torch.testing.assert_close(v, expected_v)
    used = getattr(module, layer.name)
    torch.testing.assert_close(used, normalized(weight, u, v, dim))

    plain = layer.build()
    plain.load_state_dict({key: getattr(module, key).detach() for key in plain.state_dict()})
    torch.testing.assert_close(output, layer.call(plain, inputs))


@each_hook_form
@pytest.mark.parametrize("scale", [1e-3, 0.3, 3.0])
def test_eps_bounds_the_norms_of_u_and_v_only(form, scale):
    module = slow_linear()
    module.weight.data.mul_(scale)
    form.spectral_norm(module, eps=0.5)
    weight, u, v = vectors(module)
    expected_u, expected_v = iterate(as_matrix(weight), u.clone(), v, eps=0.5, v_first=True)
    module(torch.randn(1, 5, dtype=torch.float64))
    torch.testing.assert_close(u, expected_u)
    torch.testing.assert_close(v, expected_v)
    torch.testing.assert_close(module.weight, normalized(weight, u, v))


@each_hook_form
@pytest.mark.parametrize("dim", [0, 1, 2, 3])
@pytest.mark.usefixtures("double")
def test_forward_of_a_chosen_dim(form, dim):
    module = form.spectral_norm(nn.Conv2d(3, 4, (2, 5)), dim=dim)
    weight, u, v = vectors(module)
    expected_u, _ = iterate(as_matrix(weight, dim), u.clone(), v, v_first=True)
    module(torch.randn(1, 3, 6, 7))
    torch.testing.assert_close(u, expected_u)
    torch.testing.assert_close(module.weight, normalized(weight, u, v, dim))


@each_hook_form
def test_iterates_in_training_mode_only(form):
    module = form.spectral_norm(slow_linear(), n_power_iterations=2)
    x = torch.randn(2, 5, dtype=torch.float64)

    def steps(call):
        before = start(form, module)
        call()
        return steps_taken(form, module, before)

    assert steps(lambda: module(x)) == 2
    with torch.no_grad():
        assert steps(lambda: module(x)) == 2
    module.weight_orig.requires_grad_(False)
    assert steps(lambda: module(x)) == 2
    assert steps(lambda: module.weight.sum() and module.state_dict() and repr(module)) == 0
    module.eval()
    assert steps(lambda: module(x)) == 0
    module.train()
    next(iter(module._forward_pre_hooks.values())).n_power_iterations = 3
    assert steps(lambda: module(x)) == 3


@each_hook_form
def test_eval_repeats_the_last_training_forward(form):
    module = form.spectral_norm(nn.Linear(5, 7))
    x = torch.randn(2, 5)
    module(x)
    last = module(x)
    kept = [vector.clone() for vector in vectors(module)]
    module.eval()
    torch.testing.assert_close(module(x), last)
    torch.testing.assert_close(module(x), last)
    assert all(torch.equal(*pair) for pair in zip(kept, vectors(module), strict=True))


def test_eval_before_any_training_forward():
    """pytorch#51800, Lightning#9571: torch takes sigma from random vectors, which may be next to
    nothing. Here they are iterated, and stay what torch has drawn until a forward in training."""
    expected, actual = hook_twins(lambda: nn.Linear(9, 7).eval())
    x = torch.randn(2, 9)
    before = [vector.clone() for vector in vectors(actual)[1:]]
    actual(x), expected(x)
    assert torch.linalg.matrix_norm(expected.weight, 2) > 1.5
    assert (torch.linalg.matrix_norm(actual.weight, 2) - 1).abs() < 0.05
    torch.testing.assert_close(list(vectors(actual)[1:]), before, rtol=0, atol=0)
    torch.testing.assert_close(before, list(vectors(expected)[1:]))
    for mode in (True, False, True, False):
        torch.testing.assert_close(actual.train(mode)(x), expected.train(mode)(x))


@torch.no_grad()
@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("narrow", [False, True])
def test_evaluation_of_a_deep_net_before_any_training_is_finite(group, narrow):
    torch.manual_seed(0)
    net = nn.Sequential(*(FASTSN_HOOK.spectral_norm(nn.Linear(12, 12)) for _ in range(60))).eval()
    net = fastsn.accelerate(net) if group else net
    net = net.bfloat16() if narrow else net
    weights = []
    for module in (net, copy.deepcopy(net)):
        module(torch.randn(2, 12, dtype=net[0].weight_orig.dtype))
        weights += [layer.weight.float() for layer in module]
    norms = torch.stack([torch.linalg.matrix_norm(weight, 2) for weight in weights])
    assert ((norms > 0.95) & (norms < 1.2)).all()


@each_hook_form
@torch.no_grad()
def test_vectors_that_were_brought_from_elsewhere_are_used_as_they_are(form):
    """By whatever way, also where the module itself has never been trained."""
    source = form.spectral_norm(nn.Linear(9, 7))
    x = torch.randn(2, 9)
    for bring in (
        lambda target: target.load_state_dict(source.state_dict()),
        lambda target: [
            target.state_dict()[k].data.copy_(v.data) for k, v in source.state_dict().items()
        ],
        lambda target: [target.register_buffer(k, v.clone()) for k, v in source.named_buffers()],
    ):
        source.train()(x)
        target = form.spectral_norm(nn.Linear(9, 7)).eval()
        target.weight_orig.copy_(source.weight_orig)
        target.bias.copy_(source.bias)
        bring(target)
        torch.testing.assert_close(target(x), source.eval()(x))


@each_hook_form
def test_u_and_v_are_updated_in_place(form):
    module = form.spectral_norm(nn.Conv2d(3, 4, 2), n_power_iterations=3)
    x = torch.randn(1, 3, 5, 5)
    _, u, v = vectors(module)
    pointers, versions = (u.data_ptr(), v.data_ptr()), (u._version, v._version)
    module(x)
    assert module.weight_u is u and module.weight_v is v
    assert (u.data_ptr(), v.data_ptr()) == pointers
    assert u._version > versions[0] and v._version > versions[1]
    versions = (u._version, v._version)
    module.eval()(x)
    assert (u._version, v._version) == versions


@each_hook_form
def test_a_replica_updates_the_vectors_of_its_source(form):
    """pytorch#12671: DataParallel replicas share the buffers' storage, and nothing else."""
    module = form.spectral_norm(slow_linear())
    replica = module._replicate_for_data_parallel()
    replica.weight_orig = module.weight_orig.detach().clone()
    replica.bias = module.bias.detach().clone()
    before = start(form, module)
    replica(torch.randn(1, 5, dtype=torch.float64))
    assert steps_taken(form, module, before) == 1


@each_hook_form
def test_vectors_given_from_outside_are_used(form):
    module = form.spectral_norm(slow_linear())
    x = torch.randn(1, 5, dtype=torch.float64)
    for assign in (
        lambda u: module.weight_u.data.copy_(u),
        lambda u: setattr(module, "weight_u", u.clone()),
        lambda u: module.load_state_dict({"weight_u": u.clone()}, strict=False, assign=True),
    ):
        module(x)
        given = F.normalize(torch.randn(6, dtype=torch.float64), dim=0)
        assign(given)
        module(x)
        assert steps_taken(form, module, given) == 1


@each_hook_form
def test_weight_is_a_plain_non_leaf_attribute(form):
    module = form.spectral_norm(nn.Linear(5, 7))
    module(torch.randn(1, 5))
    assert module.weight.grad_fn is not None and not isinstance(module.weight, nn.Parameter)
    assert "weight" in module.__dict__
    with torch.no_grad():
        module(torch.randn(1, 5))
    assert not module.weight.requires_grad


@each_hook_form
def test_a_changed_weight_is_seen_in_eval(form):
    module = form.spectral_norm(nn.Linear(5, 7))
    x = torch.randn(2, 5)
    module(x), module.eval()(x)
    for reach in (lambda: module.weight_orig.data, lambda: module.weight_orig.detach()):
        reach().copy_(torch.randn(7, 5))
        module(x)
        torch.testing.assert_close(module.weight, normalized(*vectors(module)))


@pytest.mark.parametrize("build", [lambda: nn.Conv2d(8, 4, 3), lambda: nn.Linear(6, 5)])
def test_strides_of_the_weight_are_kept(build):
    module = build()
    last_first = list(range(module.weight.dim()))[::-1]
    module.weight.data = module.weight.data.permute(last_first).contiguous().permute(last_first)
    expected, actual = hook_twins(lambda: module)
    x = torch.randn(2, 8, 5, 5) if module.weight.dim() == 4 else torch.randn(2, 6)
    torch.testing.assert_close(actual(x), expected(x))
    assert actual.weight.stride() == expected.weight.stride() == module.weight.stride()


@each_hook_form
def test_zero_weight_gives_nan(form):
    """pytorch#20192: eps guards u and v, not sigma."""
    module = nn.Linear(3, 4)
    nn.init.zeros_(module.weight)
    form.spectral_norm(module)(torch.randn(1, 3))
    assert module.weight.isnan().all()


@each_hook_form
def test_lstm_output_depends_on_the_original_through_sigma(form):
    """pytorch#26714, #39311: spectral norm inside a recurrent layer is effective."""
    module = form.spectral_norm(nn.LSTM(3, 4), "weight_hh_l0").eval()
    x = torch.randn(5, 2, 3)
    output = module(x)[0]
    (gradient,) = torch.autograd.grad(output.sum(), module.weight_hh_l0_orig)
    assert gradient.abs().max() > 0
    with torch.no_grad():
        module.weight_hh_l0_orig.mul_(10)
    torch.testing.assert_close(module(x)[0], output)


@each_hook_form
def test_meta_device(form):
    with torch.device("meta"):
        module = form.spectral_norm(nn.Linear(3, 4))
    assert {tensor.device.type for tensor in module.state_dict().values()} == {"meta"}
    source = form.spectral_norm(nn.Linear(3, 4))
    module.to_empty(device="cpu").load_state_dict(source.state_dict())
    x = torch.randn(2, 3)
    torch.testing.assert_close(module(x), source(x))


# Gradient


@each_hook_form
@pytest.mark.parametrize("training", [True, False])
def test_gradient_holds_u_and_v_constant(form, training):
    module = form.spectral_norm(slow_linear())
    module(torch.randn(1, 5, dtype=torch.float64))
    module.train(training)(torch.randn(1, 5, dtype=torch.float64))
    weight, u, v = vectors(module)
    seed = torch.randn_like(weight)
    (actual,) = torch.autograd.grad(module.weight, weight, seed)
    constant = normalized(weight, u.clone(), v.clone())
    (expected,) = torch.autograd.grad(constant, weight, seed)
    torch.testing.assert_close(actual, expected)
    assert not torch.allclose(actual, seed * (constant / weight).mean())


@each_hook_form
@pytest.mark.parametrize("modes", [(True, True), (True, False, True, False)])
@pytest.mark.usefixtures("double")
def test_gradcheck_of_several_forwards(form, modes):
    module = form.spectral_norm(nn.Linear(3, 4))
    kept = [vector.clone() for vector in vectors(module)[1:]]

    def forwards(x):
        module.weight_u.data.copy_(kept[0])
        module.weight_v.data.copy_(kept[1])
        return sum(module.train(mode)(x) for mode in modes)

    x = torch.randn(2, 3, requires_grad=True)
    assert gradcheck(forwards, (x,), check_batched_grad=len(modes) > 2)


@each_hook_form
@pytest.mark.usefixtures("double")
def test_gradcheck_of_the_original_in_eval(form):
    module = form.spectral_norm(nn.Linear(3, 4))
    x = torch.randn(2, 3)
    module(x), module.eval()
    # gradcheck moves the parameter through `.data`: no version counter tells of it.
    assert gradcheck(lambda _: module(x), (module.weight_orig,), check_batched_grad=True)
    assert gradgradcheck(lambda _: module(x), (module.weight_orig,))


@each_hook_form
@pytest.mark.usefixtures("double")
def test_two_training_forwards_before_one_backward(form):
    """The loss D(real) - D(fake): each forward keeps the u and v that it used."""
    module = form.spectral_norm(slow_linear())
    x = torch.randn(2, 5)
    uses = []
    for _ in range(2):
        uses.append((module(x), *(vector.clone() for vector in vectors(module)[1:])))
    (uses[0][0] - 3 * uses[1][0]).square().sum().backward()
    weight = module.weight_orig.detach().requires_grad_()
    real, fake = (F.linear(x, normalized(weight, u, v), module.bias) for _, u, v in uses)
    (expected,) = torch.autograd.grad((real - 3 * fake).square().sum(), weight)
    torch.testing.assert_close(module.weight_orig.grad, expected)


def eval_then_train_gradient(form):
    torch.manual_seed(0)
    module = form.spectral_norm(slow_linear())
    x = torch.randn(2, 5, dtype=torch.float64)
    module(x)
    output = module.eval()(x)
    kept = [vector.clone() for vector in vectors(module)[1:]]
    (output + module.train()(x)).sum().backward()
    weight = module.weight_orig.detach().requires_grad_()
    used = normalized(weight, *kept) + normalized(weight, *vectors(module)[1:])
    (expected,) = torch.autograd.grad(F.linear(x, used).sum(), weight)
    torch.testing.assert_close(module.weight_orig.grad, expected)


def test_eval_forward_then_training_forward_then_backward():
    """pytorch#66363, #68327: torch's eval forward keeps the live u and v."""
    eval_then_train_gradient(FASTSN_HOOK)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        eval_then_train_gradient(TORCH_HOOK)


# Classes


@each_hook_form
def test_methods_of_the_hook(form):
    module = slow_linear()
    hook = form.SpectralNorm.apply(module, "weight", 2, 0, 1e-12)
    assert type(hook) is form.SpectralNorm and isinstance(hook, TORCH_HOOK.SpectralNorm)
    assert (hook.name, hook.n_power_iterations, hook.dim, hook.eps) == ("weight", 2, 0, 1e-12)
    assert form.SpectralNorm._version == 1
    assert hook.reshape_weight_to_matrix(torch.ones(2, 3, 4)).shape == (2, 12)
    plain, before = module.weight, start(form, module)
    weight = hook.compute_weight(module, do_power_iteration=True)
    assert steps_taken(form, module, before) == 2 and module.weight is plain
    weight = hook.compute_weight(module, do_power_iteration=False)
    assert steps_taken(form, module, before) == 2
    torch.testing.assert_close(weight, normalized(*vectors(module)))
    hook(module, ())
    assert steps_taken(form, module, before) == 4 and module.weight is not plain
    moved = form.SpectralNorm("weight", dim=2)
    assert moved.reshape_weight_to_matrix(torch.ones(2, 3, 4)).shape == (4, 6)


@each_hook_form
def test_hooks_class_checks_the_number_of_iterations(form):
    with pytest.raises(ValueError, match="Expected n_power_iterations to be positive, but got"):
        form.SpectralNorm("weight", 0)


def soft_bound(form):
    """A subclass as DUE and iResNet write it: own constraint, own registration."""

    class SoftBound(form.SpectralNorm):
        def compute_weight(self, module, do_power_iteration):
            weight, u, v = form.vectors(module, self.name)
            matrix = self.reshape_weight_to_matrix(weight)
            if do_power_iteration:
                with torch.no_grad():
                    for _ in range(self.n_power_iterations):
                        v = F.normalize(matrix.t() @ u, dim=0, eps=self.eps, out=v)
                        u = F.normalize(matrix @ v, dim=0, eps=self.eps, out=u)
                u, v = u.clone(), v.clone()
            return weight / torch.clamp(u @ matrix @ v / self.coefficient, min=1)

        @staticmethod
        def apply(module, coefficient, name, n_power_iterations, dim, eps):
            hook = SoftBound(name, n_power_iterations, dim, eps)
            hook.coefficient = coefficient
            weight = module._parameters[name]
            height, width = hook.reshape_weight_to_matrix(weight).shape
            delattr(module, name)
            module.register_parameter(name + "_orig", weight)
            setattr(module, name, weight.data)
            module.register_buffer(name + "_u", F.normalize(weight.new_ones(height), dim=0))
            module.register_buffer(name + "_v", F.normalize(weight.new_ones(width), dim=0))
            module.register_forward_pre_hook(hook)
            module._register_state_dict_hook(form.StateDictHook(hook))
            module._register_load_state_dict_pre_hook(form.LoadStateDictPreHook(hook))
            return hook

    return SoftBound


@each_hook_form
@pytest.mark.parametrize("coefficient", [0.5, 100.0])
def test_subclass_with_its_own_constraint_and_apply(form, coefficient):
    module = slow_linear()
    hook = soft_bound(form).apply(module, coefficient, "weight", 3, 0, 1e-12)
    before, x = start(form, module), torch.randn(2, 5, dtype=torch.float64)
    module(x)
    assert steps_taken(form, module, before) == 3
    weight, u, v = vectors(module)
    expected = weight * min(1.0, coefficient / (u @ weight @ v).item())
    torch.testing.assert_close(module.weight, expected)
    state = module.state_dict()
    assert state._metadata[""]["spectral_norm"] == {"weight.version": 1}
    form.remove(module)
    torch.testing.assert_close(module.weight, expected)
    soft_bound(form).apply(module, coefficient, "weight", 3, 0, 1e-12)
    module.load_state_dict(state)
    assert hook.coefficient == coefficient and torch.equal(module.weight_u, u)


@each_hook_form
def test_subclass_with_its_own_matrix(form):
    class Doubled(form.SpectralNorm):
        def reshape_weight_to_matrix(self, weight):
            return 2 * super().reshape_weight_to_matrix(weight)

    module = slow_linear()
    hook = form.SpectralNorm.apply(module, "weight", 1, 0, 1e-12)
    hook.__class__ = Doubled
    module(torch.randn(1, 5, dtype=torch.float64))
    torch.testing.assert_close(module.weight, normalized(*vectors(module)) / 2)


def test_out_proj_of_attention_is_never_a_silent_no_op():
    """pytorch#78109: nn.MultiheadAttention reads out_proj.weight and never calls out_proj."""
    attention = nn.MultiheadAttention(4, 2)
    with pytest.warns(UserWarning) as caught:
        FASTSN_HOOK.spectral_norm(attention.out_proj)
    (message,) = [str(warning.message) for warning in caught]
    assert "fastsn.parametrizations.spectral_norm" in message
    assert "fastsn.accelerate" in message

    silent = nn.MultiheadAttention(4, 2)
    TORCH_HOOK.spectral_norm(silent.out_proj)
    x, u = torch.randn(3, 1, 4), silent.out_proj.weight_u.clone()
    silent(x, x, x)[0].sum().backward()
    assert torch.equal(silent.out_proj.weight_u, u)
    assert silent.out_proj.weight_orig.grad is None


def test_other_layers_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FASTSN_HOOK.spectral_norm(nn.Linear(3, 4))
        FASTSN_HOOK.spectral_norm(nn.MultiheadAttention(4, 2), "in_proj_weight")
        FASTSN_HOOK.spectral_norm(nn.LSTM(3, 4), "weight_hh_l0")(torch.randn(2, 1, 3))
