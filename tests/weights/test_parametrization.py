"""The parametrization does what `torch.nn.utils.parametrizations.spectral_norm` does.

What both drop-ins promise is in `test_drop_in`. Tests with a `form` run on torch itself as well:
what they demand is torch's behaviour.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from helpers.torch_peers import (
    FASTSN_PARAMETRIZED,
    TORCH_PARAMETRIZED,
    Holder,
    as_matrix,
    each_parametrized_form,
    iterate,
    normalized,
    slow_linear,
    start,
    steps_taken,
)


def vectors(module, name="weight"):
    return FASTSN_PARAMETRIZED.vectors(module, name)


def steps(form, module, call):
    """How many iterations `call` costs."""
    before = start(form, module)
    call()
    return steps_taken(form, module, before)


# Registration


@each_parametrized_form
@pytest.mark.parametrize("requires_grad", [True, False])
def test_registration_layout(form, requires_grad):
    module = nn.Linear(5, 7)
    weight = module.weight.requires_grad_(requires_grad)
    assert form.spectral_norm(module) is module
    assert isinstance(module, nn.Linear) and type(module).__name__ == "ParametrizedLinear"
    assert parametrize.is_parametrized(module, "weight")
    assert module.parametrizations.weight.original is weight
    assert [name for name, _ in module.named_parameters()] == [
        "bias",
        "parametrizations.weight.original",
    ]
    (inner,) = module.parametrizations.weight
    assert type(inner) is form.SpectralNorm and isinstance(inner, TORCH_PARAMETRIZED.SpectralNorm)
    assert list(inner._buffers) == ["_u", "_v"] and inner.n_power_iterations == 1
    assert inner._u.shape == (7,) and inner._v.shape == (5,)
    assert module.weight.shape == weight.shape and module.weight.stride() == weight.stride()
    assert module.weight.requires_grad is requires_grad
    assert "weight" not in module._parameters and "weight" not in module._buffers


@each_parametrized_form
@pytest.mark.parametrize("n_power_iterations", [1, 3])
@pytest.mark.parametrize("training", [True, False])
def test_warm_up(form, n_power_iterations, training):
    module = slow_linear().train(training)
    torch.manual_seed(3)
    drawn = [F.normalize(torch.randn(n, dtype=torch.float64), dim=0) for n in (6, 5)]
    torch.manual_seed(3)
    form.spectral_norm(module, n_power_iterations=n_power_iterations)
    assert steps_taken(form, module, drawn[1]) == 15 + n_power_iterations * training
    assert module.parametrizations.weight[0].training is training


@each_parametrized_form
def test_class_alone_warms_up_fifteen_iterations(form):
    weight = slow_linear().weight
    torch.manual_seed(3)
    u, v = (F.normalize(torch.randn(n, dtype=torch.float64), dim=0) for n in (5, 6))
    torch.manual_seed(3)
    inner = form.SpectralNorm(weight, 2, 1, 1e-12)
    assert (inner.n_power_iterations, inner.dim, inner.eps) == (2, 1, 1e-12)
    u, v = iterate(as_matrix(weight, 1), u, v, steps=15, v_first=False)
    torch.testing.assert_close((inner._u, inner._v), (u, v))
    u, v = iterate(as_matrix(weight, 1), u, v, steps=2, v_first=False)
    torch.testing.assert_close(inner(weight), normalized(weight, u, v, 1))
    assert inner.right_inverse(weight) is weight


@each_parametrized_form
@pytest.mark.parametrize(
    "build, dim, expected",
    [
        (lambda: nn.ConvTranspose2d(3, 4, (5, 6)), None, 1),
        (lambda: nn.Conv2d(3, 4, (5, 6)), -2, 2),
        (lambda: nn.Embedding(9, 4), 1, 1),
        (lambda: nn.Embedding(9, 4), -2, 0),
    ],
)
def test_dim_counts_from_the_end_too_and_is_kept_from_the_start(form, build, dim, expected):
    module = form.spectral_norm(build(), dim=dim)
    weight, u, v = vectors(module)
    assert module.parametrizations.weight[0].dim == expected
    assert u.shape == (weight.shape[expected],) and v.numel() == weight.numel() // u.numel()


@each_parametrized_form
def test_messages(form):
    with pytest.raises(IndexError, match=r"expected to be in range of \[-2, 1\] but got 2\)"):
        form.spectral_norm(nn.Linear(2, 3), dim=2)
    with pytest.raises(ValueError, match=r"Module 'Linear\(.*' has no parameter or buffer with na"):
        form.spectral_norm(nn.Linear(2, 3), "foo")
    with pytest.raises(ValueError, match="positive, but got n_power_iterations=0"):
        form.spectral_norm(nn.Linear(2, 3), n_power_iterations=0)


@each_parametrized_form
def test_buffer(form):
    module = nn.Module()
    module.register_buffer("kernel", torch.randn(4, 3))
    form.spectral_norm(module, "kernel")
    assert "original" in module.parametrizations.kernel._buffers
    torch.testing.assert_close(module.kernel, normalized(*vectors(module, "kernel")))


# Reading the weight


@each_parametrized_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_value_of_a_diagonal_matrix(form, dtype):
    diagonal = torch.tensor([0.2, -0.8]).to(dtype)
    diagonal *= torch.tensor(1j) if dtype.is_complex else 1
    module = nn.Linear(2, 2, dtype=dtype)
    module.weight = nn.Parameter(torch.diag(diagonal))
    form.spectral_norm(module)
    torch.testing.assert_close(module.weight.data, torch.diag(diagonal / 0.8))


@each_parametrized_form
def test_every_read_iterates_in_training_mode(form):
    module = form.spectral_norm(slow_linear(), n_power_iterations=2)
    x = torch.randn(2, 5, dtype=torch.float64)
    assert steps(form, module, lambda: module.weight) == 2
    assert steps(form, module, lambda: module(x)) == 2
    assert steps(form, module, lambda: hasattr(module, "weight")) == 2
    with torch.no_grad():
        assert steps(form, module, lambda: module.weight) == 2
    module.parametrizations.weight.original.requires_grad_(False)
    assert steps(form, module, lambda: module(x)) == 2
    module.parametrizations.weight[0].n_power_iterations = 3
    assert steps(form, module, lambda: module(x)) == 3
    module.eval()
    assert steps(form, module, lambda: (module(x), module.weight)) == 0
    module.parametrizations.weight[0].train()
    assert steps(form, module, lambda: module(x)) == 3


@each_parametrized_form
def test_what_is_no_read_does_not_iterate(form):
    module = form.spectral_norm(slow_linear())
    for call in (
        lambda: repr(module),
        module.state_dict,
        lambda: copy.deepcopy(module),
        lambda: module.to(torch.float64),
        lambda: list(module.named_parameters()),
        module.zero_grad,
        lambda: module.train(),
    ):
        assert steps(form, module, call) == 0


@each_parametrized_form
def test_registering_twice_stacks_and_iterates_the_first(form):
    module = form.spectral_norm(slow_linear())
    before = start(form, module)
    form.spectral_norm(module)
    assert len(module.parametrizations.weight) == 2
    # Once to read the weight that the second one starts from, once to check the stack.
    assert steps_taken(form, module, before) == 2
    first, second = module.parametrizations.weight
    torch.testing.assert_close(module.eval().weight, second(first(vectors(module)[0])))


@each_parametrized_form
def test_eval_before_any_training_forward_is_already_right(form):
    """pytorch#51800: the warm-up is what makes this true."""
    module = form.spectral_norm(nn.Linear(9, 7).eval())
    assert 0.95 < torch.linalg.matrix_norm(module.weight, 2) < 1.1


@each_parametrized_form
def test_a_replica_updates_the_vectors_of_its_source(form):
    """pytorch#12671: DataParallel replicas share the buffers' storage, and nothing else."""
    module = form.spectral_norm(slow_linear())
    weight = module.parametrizations.weight.original.detach().clone()
    replica = module.parametrizations.weight[0]._replicate_for_data_parallel()
    assert steps(form, module, lambda: replica(weight)) == 1


@each_parametrized_form
def test_assigning_the_weight_sets_the_original(form):
    module = form.spectral_norm(slow_linear())
    original = module.parametrizations.weight.original
    value = torch.randn(6, 5, dtype=torch.float64)
    module.weight = value
    assert module.parametrizations.weight.original is original and torch.equal(original, value)
    torch.testing.assert_close(module.weight, normalized(*vectors(module)))


@each_parametrized_form
def test_vector_is_normalized_exactly(form):
    module = form.spectral_norm(Holder(torch.tensor([3.0, -4.0])), n_power_iterations=1)
    inner = module.parametrizations.weight[0]
    assert not inner._buffers and not hasattr(inner, "n_power_iterations")
    torch.testing.assert_close(module.weight, torch.tensor([0.6, -0.8]))
    bounded = form.spectral_norm(Holder(torch.tensor([3.0, -4.0])), eps=10.0, dim=-1)
    torch.testing.assert_close(bounded.weight, torch.tensor([0.3, -0.4]))
    assert torch.equal(form.spectral_norm(Holder(torch.zeros(3))).weight, torch.zeros(3))


@each_parametrized_form
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)])
def test_empty_weight(form, shape):
    assert form.spectral_norm(Holder(torch.empty(shape))).weight.shape == shape


@each_parametrized_form
def test_cached_reads_iterate_once(form):
    module = form.spectral_norm(slow_linear())
    x = torch.randn(2, 5, dtype=torch.float64)

    def reads():
        with parametrize.cached():
            weight = module.weight
            module(x)
            assert module.weight is weight
            weight.sum().backward()
            module.bias.data.add_(1)

    assert steps(form, module, reads) == 1
    assert steps(form, module, reads) == 1
    assert module.weight is not module.weight


@each_parametrized_form
def test_embedding_and_attention(form):
    """pytorch#78109: a parametrization works where a hook on out_proj is never called."""
    embedding = form.spectral_norm(nn.Embedding(9, 4, padding_idx=0, max_norm=None))
    embedding(torch.tensor([0, 3])).sum().backward()
    assert embedding.parametrizations.weight.original.grad.abs().sum() > 0
    attention = nn.MultiheadAttention(4, 2)
    form.spectral_norm(attention.out_proj)
    x, before = torch.randn(3, 1, 4), start(form, attention.out_proj)
    attention(x, x, x)[0].sum().backward()
    original, _, v = vectors(attention.out_proj)
    assert original.grad is not None and not torch.equal(v, before)
