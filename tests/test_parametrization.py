"""The parametrization does what `torch.nn.utils.parametrizations.spectral_norm` does.

Tests with a `form` run on torch itself as well: what they demand is torch's behaviour.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils import parametrize
from torch_peers import (
    FASTSN_PARAMETRIZED,
    LAYERS,
    TORCH_PARAMETRIZED,
    Holder,
    as_matrix,
    each_layer,
    each_parametrized_form,
    iterate,
    normalized,
    raised,
    slow_linear,
    start,
    steps_taken,
    twins,
)


def vectors(module, name="weight"):
    return FASTSN_PARAMETRIZED.vectors(module, name)


def parametrized_twins(build, *args, **kwargs):
    return twins(build, TORCH_PARAMETRIZED, FASTSN_PARAMETRIZED, *args, **kwargs)


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


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@each_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
def test_registration_draws_what_torch_draws(layer, dtype):
    states = []
    original = layer.build().to(dtype)
    modules = []
    for form in (TORCH_PARAMETRIZED, FASTSN_PARAMETRIZED):
        torch.manual_seed(5)
        modules.append(form.spectral_norm(copy.deepcopy(original), layer.name))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    states = [module.state_dict() for module in modules]
    assert list(states[0]) == list(states[1])
    for key, expected in states[0].items():
        torch.testing.assert_close(states[1][key], expected)


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
        (lambda: nn.Conv2d(3, 4, (5, 6)), None, 0),
        (lambda: nn.ConvTranspose1d(3, 4, 5), None, 1),
        (lambda: nn.ConvTranspose2d(3, 4, (5, 6)), None, 1),
        (lambda: nn.ConvTranspose3d(3, 4, 5), None, 1),
        (lambda: nn.ConvTranspose2d(3, 4, (5, 6)), 0, 0),
        (lambda: nn.Conv2d(3, 4, (5, 6)), -2, 2),
        (lambda: nn.Embedding(9, 4), 1, 1),
        (lambda: nn.Embedding(9, 4), -2, 0),
    ],
)
def test_dim(form, build, dim, expected):
    module = form.spectral_norm(build(), dim=dim)
    weight, u, v = vectors(module)
    assert module.parametrizations.weight[0].dim == expected
    assert u.shape == (weight.shape[expected],) and v.numel() == weight.numel() // u.numel()


REGISTRATION_ERRORS = {
    "unknown name": (lambda: nn.Linear(2, 3), {"name": "foo"}, ValueError),
    "a sub-module": (lambda: nn.Sequential(nn.Linear(2, 3)), {"name": "0"}, ValueError),
    "None": (lambda: nn.Linear(2, 3, bias=False), {"name": "bias"}, ValueError),
    "lazy": (lambda: nn.LazyLinear(3), {}, RuntimeError),
    "no iterations": (lambda: nn.Linear(2, 3), {"n_power_iterations": 0}, ValueError),
    "no iterations of a vector": (lambda: Holder(torch.ones(3)), {"n_power_iterations": -1}, None),
    "dim too large": (lambda: nn.Linear(2, 3), {"dim": 2}, IndexError),
    "dim too small": (lambda: nn.Linear(2, 3), {"dim": -3}, IndexError),
    "dim of a vector": (lambda: Holder(torch.ones(3)), {"dim": 1}, IndexError),
    "a scalar": (lambda: Holder(torch.tensor(2.0)), {}, IndexError),
    "dim before iterations": (
        lambda: nn.Linear(2, 3),
        {"dim": 2, "n_power_iterations": 0},
        IndexError,
    ),
}


@pytest.mark.parametrize(
    "build, arguments, error", REGISTRATION_ERRORS.values(), ids=REGISTRATION_ERRORS.keys()
)
def test_registration_errors_are_torchs_and_leave_the_module_alone(build, arguments, error):
    module = build()
    expected = raised(lambda: TORCH_PARAMETRIZED.spectral_norm(build(), **arguments))
    kind, keys, random_state = type(module), list(module.state_dict()), torch.get_rng_state()
    actual = raised(lambda: FASTSN_PARAMETRIZED.spectral_norm(module, **arguments))
    assert type(actual) is type(expected) is (error or ValueError)
    assert str(actual) == str(expected)
    assert type(module) is kind and list(module.state_dict()) == keys
    assert torch.equal(torch.get_rng_state(), random_state)


@each_parametrized_form
def test_messages(form):
    with pytest.raises(IndexError, match=r"expected to be in range of \[-2, 1\] but got 2\)"):
        form.spectral_norm(nn.Linear(2, 3), dim=2)
    with pytest.raises(ValueError, match=r"Module 'Linear\(.*' has no parameter or buffer with na"):
        form.spectral_norm(nn.Linear(2, 3), "foo")
    with pytest.raises(ValueError, match="positive, but got n_power_iterations=0"):
        form.spectral_norm(nn.Linear(2, 3), n_power_iterations=0)


@each_parametrized_form
def test_integer_weight(form):
    module = Holder(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(RuntimeError):
        form.spectral_norm(module)
    assert type(module) is Holder and list(module.state_dict()) == ["weight"]


@each_parametrized_form
def test_buffer(form):
    module = nn.Module()
    module.register_buffer("kernel", torch.randn(4, 3))
    form.spectral_norm(module, "kernel")
    assert "original" in module.parametrizations.kernel._buffers
    torch.testing.assert_close(module.kernel, normalized(*vectors(module, "kernel")))


# Reading the weight


@each_parametrized_form
@pytest.mark.parametrize("kind", [kind for kind in LAYERS if kind != "lstm"])
@pytest.mark.parametrize("n_power_iterations", [1, 3])
@pytest.mark.usefixtures("double")
def test_forward_iterates_u_first(form, kind, n_power_iterations):
    layer = LAYERS[kind]
    plain = layer.build()
    module = form.spectral_norm(copy.deepcopy(plain), layer.name, n_power_iterations)
    weight = getattr(plain, layer.name)
    if weight.ndim == 1:
        expected = F.normalize(weight, dim=0)
    else:
        dim = int(isinstance(plain, nn.modules.conv._ConvTransposeNd))
        _, u, v = vectors(module, layer.name)
        new = iterate(as_matrix(weight, dim), u, v.clone(), steps=n_power_iterations, v_first=False)
        expected = normalized(weight, *new, dim)
    inputs = layer.example()
    output = layer.call(module, inputs)
    if weight.ndim > 1:
        torch.testing.assert_close((u, v), new)
    weight.data.copy_(expected)
    torch.testing.assert_close(output, layer.call(plain, inputs))


@each_parametrized_form
@pytest.mark.parametrize("scale", [1e-3, 0.3, 3.0])
def test_eps_bounds_the_norms_of_u_and_v_only(form, scale):
    module = slow_linear()
    module.weight.data.mul_(scale)
    form.spectral_norm(module, eps=0.5)
    weight, u, v = vectors(module)
    for vector in (u, v):
        vector.copy_(F.normalize(torch.randn_like(vector), dim=0))
    expected = iterate(as_matrix(weight), u, v.clone(), eps=0.5, v_first=False)
    torch.testing.assert_close(module.weight, normalized(weight, *expected))
    torch.testing.assert_close((u, v), expected)


@each_parametrized_form
@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1, -3])
@pytest.mark.usefixtures("double")
def test_forward_of_a_chosen_dim(form, dim):
    module = form.spectral_norm(nn.Conv2d(3, 4, (2, 5)), dim=dim)
    weight, u, v = vectors(module)
    expected = iterate(as_matrix(weight, dim), u, v.clone(), v_first=False)
    torch.testing.assert_close(module.weight, normalized(weight, *expected, dim))
    torch.testing.assert_close((u, v), expected)


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
def test_weight_and_bias_of_one_module(form):
    module = form.spectral_norm(form.spectral_norm(nn.Linear(5, 7)), "bias")
    torch.testing.assert_close(module.bias.norm(), torch.tensor(1.0))
    parametrize.remove_parametrizations(module, "bias")
    assert "bias" in module._parameters and parametrize.is_parametrized(module, "weight")
    parametrize.remove_parametrizations(module, "weight")
    assert type(module) is nn.Linear and not hasattr(module, "parametrizations")


@each_parametrized_form
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


@each_parametrized_form
def test_eval_before_any_training_forward_is_already_right(form):
    """pytorch#51800: the warm-up is what makes this true."""
    module = form.spectral_norm(nn.Linear(9, 7).eval())
    assert 0.95 < torch.linalg.matrix_norm(module.weight, 2) < 1.1


@each_parametrized_form
def test_u_and_v_are_updated_in_place(form):
    module = form.spectral_norm(nn.Conv2d(3, 4, 2), n_power_iterations=3)
    inner = module.parametrizations.weight[0]
    u, v = inner._u, inner._v
    pointers, versions = (u.data_ptr(), v.data_ptr()), (u._version, v._version)
    module(torch.randn(1, 3, 5, 5))
    assert inner._u is u and inner._v is v and (u.data_ptr(), v.data_ptr()) == pointers
    assert u._version > versions[0] and v._version > versions[1]
    versions = (u._version, v._version)
    module.eval()(torch.randn(1, 3, 5, 5))
    assert (u._version, v._version) == versions


@each_parametrized_form
def test_a_replica_updates_the_vectors_of_its_source(form):
    """pytorch#12671: DataParallel replicas share the buffers' storage, and nothing else."""
    module = form.spectral_norm(slow_linear())
    weight = module.parametrizations.weight.original.detach().clone()
    replica = module.parametrizations.weight[0]._replicate_for_data_parallel()
    assert steps(form, module, lambda: replica(weight)) == 1


@each_parametrized_form
def test_vectors_given_from_outside_are_used(form):
    module = form.spectral_norm(slow_linear())
    inner = module.parametrizations.weight[0]
    key = "parametrizations.weight.0._v"
    for assign in (
        lambda v: inner._v.data.copy_(v),
        lambda v: setattr(inner, "_v", v.clone()),
        lambda v: module.load_state_dict({key: v.clone()}, strict=False, assign=True),
    ):
        module.weight  # noqa: B018  (a read iterates)
        given = F.normalize(torch.randn(5, dtype=torch.float64), dim=0)
        assign(given)
        module.weight  # noqa: B018
        assert steps_taken(form, module, given) == 1


@each_parametrized_form
def test_assigning_the_weight_sets_the_original(form):
    module = form.spectral_norm(slow_linear())
    original = module.parametrizations.weight.original
    value = torch.randn(6, 5, dtype=torch.float64)
    module.weight = value
    assert module.parametrizations.weight.original is original and torch.equal(original, value)
    torch.testing.assert_close(module.weight, normalized(*vectors(module)))


@each_parametrized_form
def test_a_changed_weight_is_seen_in_eval(form):
    module = form.spectral_norm(nn.Linear(5, 7)).eval()
    original = module.parametrizations.weight.original
    module(torch.randn(2, 5))
    for reach in (lambda: original.data, original.detach):
        reach().copy_(torch.randn(7, 5))
        torch.testing.assert_close(module.weight, normalized(*vectors(module)))


@pytest.mark.parametrize("build", [lambda: nn.Conv2d(8, 4, 3), lambda: nn.Linear(6, 5)])
def test_strides_of_the_weight_are_kept(build):
    module = build()
    last_first = list(range(module.weight.dim()))[::-1]
    module.weight.data = module.weight.data.permute(last_first).contiguous().permute(last_first)
    expected, actual = parametrized_twins(lambda: module)
    torch.testing.assert_close(actual.weight, expected.weight)
    assert actual.weight.stride() == expected.weight.stride() == module.weight.stride()


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
def test_zero_weight_gives_nan(form):
    """pytorch#20192: eps guards u and v, not sigma."""
    module = form.spectral_norm(Holder(torch.zeros(4, 3)))
    assert module.weight.isnan().all()


@each_parametrized_form
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)])
def test_empty_weight(form, shape):
    assert form.spectral_norm(Holder(torch.empty(shape))).weight.shape == shape


@each_parametrized_form
def test_meta_device(form):
    with torch.device("meta"):
        module = form.spectral_norm(nn.Linear(3, 4))
    assert {tensor.device.type for tensor in module.state_dict().values()} == {"meta"}
    source = form.spectral_norm(nn.Linear(3, 4))
    module.to_empty(device="cpu").load_state_dict(source.state_dict())
    x = torch.randn(2, 3)
    torch.testing.assert_close(module(x), source(x))


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


# Gradient


@each_parametrized_form
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_gradient_holds_u_and_v_constant(form, training, dtype):
    module = form.spectral_norm(Holder(torch.randn(6, 5, dtype=dtype))).train(training)
    used = module.weight
    weight, u, v = vectors(module)
    seed = torch.randn_like(weight)
    (actual,) = torch.autograd.grad(used, weight, seed)
    constant = normalized(weight, u.clone(), v.clone())
    (expected,) = torch.autograd.grad(constant, weight, seed)
    torch.testing.assert_close(actual, expected)
    assert not torch.allclose(actual, seed * (constant / weight).mean())


@each_parametrized_form
@pytest.mark.parametrize("modes", [(True, True), (True, False, True, False)])
@pytest.mark.usefixtures("double")
def test_gradcheck_of_several_forwards(form, modes):
    module = form.spectral_norm(nn.Linear(3, 4))
    inner = module.parametrizations.weight[0]
    kept = [inner._u.clone(), inner._v.clone()]

    def forwards(x):
        inner._u.data.copy_(kept[0])
        inner._v.data.copy_(kept[1])
        return sum(module.train(mode)(x) for mode in modes)

    x = torch.randn(2, 3, requires_grad=True)
    assert gradcheck(forwards, (x,), check_batched_grad=len(modes) > 2)


@each_parametrized_form
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_gradcheck_of_the_original_in_eval(form, dtype):
    module = form.spectral_norm(nn.Linear(3, 4, dtype=dtype)).eval()
    x, original = torch.randn(2, 3, dtype=dtype), module.parametrizations.weight.original
    # gradcheck moves the parameter through `.data`: no version counter tells of it.
    assert gradcheck(lambda _: module(x), (original,), check_batched_grad=True)
    assert gradgradcheck(lambda _: module(x), (original,))


@each_parametrized_form
@pytest.mark.parametrize("modes", [(True, True), (False, True), (True, False, True)])
def test_several_forwards_before_one_backward(form, modes):
    """The loss D(real) - D(fake), also after an eval forward (pytorch#66363)."""
    module = form.spectral_norm(slow_linear())
    x = torch.randn(2, 5, dtype=torch.float64)
    uses = []
    for mode in modes:
        uses.append((module.train(mode)(x), *(vector.clone() for vector in vectors(module)[1:])))
    sum(k * output.square().sum() for k, (output, _, _) in enumerate(uses, 1)).backward()
    weight = module.parametrizations.weight.original
    free = weight.detach().requires_grad_()
    outputs = [F.linear(x, normalized(free, u, v), module.bias) for _, u, v in uses]
    loss = sum(k * output.square().sum() for k, output in enumerate(outputs, 1))
    torch.testing.assert_close(weight.grad, torch.autograd.grad(loss, free)[0])
