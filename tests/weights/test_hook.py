"""The hook form does what `torch.nn.utils.spectral_norm` does, and does right what torch does not.

What both drop-ins promise is in `test_drop_in`. Tests with a `form` run on torch itself as well:
what they demand is torch's behaviour.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsn
from fastsn.checkpoints import convert
from helpers.torch_peers import (
    FASTSN_HOOK,
    TORCH_HOOK,
    each_hook_form,
    normalized,
    slow_linear,
    start,
    steps_taken,
    twins,
)


def vectors(module, name="weight"):
    return FASTSN_HOOK.vectors(module, name)


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
def test_versions_of_weight_and_bias_are_kept_apart(form):
    module = form.spectral_norm(form.spectral_norm(nn.Linear(5, 7)), "bias")
    assert module.bias_u.shape == (7,) and module.bias_v.shape == (1,)
    metadata = module.state_dict()._metadata[""]["spectral_norm"]
    assert metadata == {"weight.version": 1, "bias.version": 1}
    form.remove(module, "bias")
    assert "bias" in module._parameters and "weight_orig" in module._parameters
    assert module.state_dict()._metadata[""]["spectral_norm"] == {"weight.version": 1}


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


def test_eval_before_any_training_forward():
    """pytorch#51800, Lightning#9571: torch takes sigma from random vectors, which may be next to
    nothing. Here they are iterated, and stay what torch has drawn until a forward in training."""
    expected, actual = twins(lambda: nn.Linear(9, 7).eval(), TORCH_HOOK, FASTSN_HOOK)
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
def test_weight_is_a_plain_non_leaf_attribute(form):
    module = form.spectral_norm(nn.Linear(5, 7))
    module(torch.randn(1, 5))
    assert module.weight.grad_fn is not None and not isinstance(module.weight, nn.Parameter)
    assert "weight" in module.__dict__
    with torch.no_grad():
        module(torch.randn(1, 5))
    assert not module.weight.requires_grad


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


# Gradient


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
