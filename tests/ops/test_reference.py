"""The specification in float64: against singular values, torch's implementations, and formulas."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as torch_hook_spectral_norm

from fastsn import reference
from fastsn.functional import estimate_dims, init_vectors

pytestmark = pytest.mark.usefixtures("double")

each_order = pytest.mark.parametrize("v_first", [False, True], ids=["u-first", "v-first"])
each_norm = pytest.mark.parametrize("norm", ["matrix", "bidirectional"])
each_guard = pytest.mark.parametrize("zero_guard", [False, True], ids=["plain", "zero_guard"])
each_bound = pytest.mark.parametrize("bound", [False, True], ids=["equality", "bound"])


def assert_close(actual, expected):
    """Two ways to the same float64 number lie some hundreds of roundings apart."""
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


def with_singular_values(rows, cols, values):
    """A matrix of this shape whose largest singular values are these, the others 0."""
    left, _ = torch.linalg.qr(torch.randn(rows, len(values)))
    right, _ = torch.linalg.qr(torch.randn(cols, len(values)))
    return left @ torch.diag(torch.tensor(values)) @ right.mT


def one_matrix(weight, u, v, dim=0, n=1, eps=1e-12, v_first=False, zero_guard=False):
    """`power_` on one weight with one estimate."""
    return reference.power_([weight], [u], [v], [0], [dim], [n], eps, v_first, zero_guard)


def start(weight, norm="matrix", dim=0):
    """(u, v, layers, dims) for one weight."""
    dims = estimate_dims(weight.shape, dim, norm)
    u, v = init_vectors(weight, dim=dim, norm=norm)
    return u, v, [0] * len(dims), list(dims)


def scaled(weight, snapshot, layers, dims, scale=1.0, bound=False, zero_guard=False):
    return reference.scale([weight], snapshot, layers, dims, [scale], bound, zero_guard)[0]


# The matrix


@pytest.mark.parametrize(
    "shape, dim",
    [((5,), 0), ((3, 4), 1), ((3, 4, 2, 5), 0), ((3, 4, 2, 5), 1), ((3, 4, 2), 2), ((0, 3), 0)],
)
def test_rows_of_the_matrix_are_slices_along_dim(shape, dim):
    weight = torch.randn(shape)
    matrix = reference.to_matrix(weight, dim)
    assert matrix.shape == (shape[dim], torch.Size(shape[:dim] + shape[dim + 1 :]).numel())
    for row, part in zip(matrix, weight.unbind(dim), strict=True):
        assert torch.equal(row, part.flatten())
    assert torch.equal(reference.from_matrix(matrix, weight.shape, dim), weight)


def test_matrix_without_columns():
    assert reference.to_matrix(torch.empty(3, 0, 2), 0).shape == (3, 0)


# Sigma


@each_order
@pytest.mark.parametrize("rows, cols", [(5, 5), (4, 9), (9, 4), (1, 6), (6, 1)])
def test_sigma_converges_to_the_largest_singular_value(rows, cols, v_first):
    weight = with_singular_values(rows, cols, [3.0, 1.5, 1.0, 0.5][: min(rows, cols)])
    (u,), (v,) = init_vectors(weight)
    # The error of u and v at least halves with every iteration.
    sigma = one_matrix(weight, u, v, n=50, v_first=v_first)[-1]
    assert_close(sigma, torch.linalg.svdvals(weight)[0])
    assert_close(weight @ v, sigma * u)
    assert_close(weight.mT @ u, sigma * v)


def test_sigma_of_a_complex_matrix_converges_to_its_largest_singular_value():
    weight = torch.randn(3, 4, dtype=torch.complex128)
    (u,), (v,) = init_vectors(weight)
    sigma = one_matrix(weight, u, v, n=1000)[-1]
    assert_close(sigma, torch.linalg.svdvals(weight)[0].to(sigma.dtype))


@each_order
def test_sigma_of_bsn_is_the_mean_over_both_matricizations(v_first):
    weight = torch.randn(4, 3, 2, 2)
    u, v, layers, dims = start(weight, "bidirectional")
    snapshot = reference.power_([weight], u, v, layers, dims, [2000], 1e-12, v_first, False)
    rows_out = torch.linalg.svdvals(weight.reshape(4, 12))[0]
    rows_in = torch.linalg.svdvals(weight.transpose(0, 1).reshape(3, 16))[0]
    (sigma,) = reference.sigmas_of(snapshot, layers)
    assert_close(snapshot[-2:], torch.stack([rows_out, rows_in]))
    assert_close(sigma, (rows_out + rows_in) / 2)


def test_sigmas_of_many_layers():
    snapshot = torch.tensor([9.0, 9.0, 9.0, 1.0, 2.0, 4.0, 7.0])
    assert reference.sigmas_of(snapshot, [0, 1, 1, 2]) == [1.0, 3.0, 7.0]


# Iteration


def unit(x):
    return x / x.norm()


@pytest.mark.parametrize("transposed", [False, True])
@each_order
def test_bsn_iterates_its_two_matrices_in_opposite_orders(v_first, transposed):
    weight = torch.randn(4, 3, 2, 5)
    u, v, layers, dims = start(weight, "bidirectional", dim=int(transposed))
    out, inp = weight.flatten(1), weight.transpose(0, 1).flatten(1)
    first, second = (inp, out) if transposed else (out, inp)
    (u1, u2), (v1, v2) = u, v
    for _ in range(3):
        if v_first:
            v1, u2 = unit(first.mT @ u1), unit(second @ v2)
            u1, v2 = unit(first @ v1), unit(second.mT @ u2)
        else:
            u1, v2 = unit(first @ v1), unit(second.mT @ u2)
            v1, u2 = unit(first.mT @ u1), unit(second @ v2)
    sigmas = torch.stack([u1 @ first @ v1, u2 @ second @ v2])
    u_live, v_live = [x.clone() for x in u], [x.clone() for x in v]
    snapshot = reference.power_([weight], u_live, v_live, layers, dims, [3], 1e-12, v_first, False)
    assert_close(snapshot, torch.cat([u1, v1, u2, v2, sigmas]))
    assert_close(torch.cat([*u_live, *v_live]), torch.cat([u1, u2, v1, v2]))
    assert_close(scaled(weight, snapshot, layers, dims), weight / sigmas.mean())


@pytest.mark.parametrize("eps", [1e-12, 5.0], ids=["tiny-eps", "large-eps"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])
@pytest.mark.parametrize("layer_type, dim", [(nn.Conv2d, 0), (nn.ConvTranspose2d, 1)])
def test_u_first_is_torchs_parametrization(layer_type, dim, dtype, eps):
    layer = parametrizations.spectral_norm(layer_type(3, 4, (2, 3), dtype=dtype), eps=eps)
    original, torchs = layer.parametrizations.weight.original, layer.parametrizations.weight[0]
    u, v = torchs._u.clone(), torchs._v.clone()
    for _ in range(4):
        snapshot = one_matrix(original, u, v, dim=dim, eps=eps)
        ours = scaled(original, snapshot, [0], [dim])
        theirs = layer.weight
        assert_close((ours, u, v), (theirs, torchs._u, torchs._v))
        direction = torch.randn_like(theirs)
        assert_close(*(torch.autograd.grad(w, original, direction) for w in (ours, theirs)))
        with torch.no_grad():
            original += 0.1 * torch.randn_like(original)


@pytest.mark.parametrize("eps", [1e-12, 5.0], ids=["tiny-eps", "large-eps"])
@pytest.mark.parametrize("layer_type, dim", [(nn.Conv2d, 0), (nn.ConvTranspose2d, 1)])
def test_v_first_is_torchs_hook(layer_type, dim, eps):
    layer = torch_hook_spectral_norm(layer_type(3, 4, (2, 3)), eps=eps)
    (hook,) = layer._forward_pre_hooks.values()
    original = layer.weight_orig
    u, v = layer.weight_u.clone(), layer.weight_v.clone()
    for _ in range(4):
        snapshot = one_matrix(original, u, v, dim=dim, eps=eps, v_first=True)
        ours = scaled(original, snapshot, [0], [dim])
        hook(layer, None)
        assert_close((ours, u, v), (layer.weight, layer.weight_u, layer.weight_v))
        direction = torch.randn_like(ours)
        assert_close(*(torch.autograd.grad(w, original, direction) for w in (ours, layer.weight)))
        with torch.no_grad():
            original += 0.1 * torch.randn_like(original)


def test_each_layer_iterates_as_often_as_asked():
    weights = [torch.randn(4, 3), torch.randn(2, 5), torch.randn(3, 3)]
    vectors = [init_vectors(w) for w in weights]
    u, v = ([x.clone() for (x,) in side] for side in zip(*vectors, strict=True))
    snapshot = reference.power_(weights, u, v, [0, 1, 2], [0, 0, 0], [2, 0, 3], 1e-12, False, False)
    parts = reference.vectors_of(weights, snapshot, [0, 1, 2], [0, 0, 0])
    for e, (n, (part_u, part_v)) in enumerate(zip([2, 0, 3], parts, strict=True)):
        ((own_u,), (own_v,)) = vectors[e]
        sigma = one_matrix(weights[e], own_u, own_v, n=n)[-1]
        assert torch.equal(u[e], own_u) and torch.equal(v[e], own_v)
        assert_close((part_u, part_v), (own_u, own_v))
        assert snapshot[e - 3] == sigma


@each_norm
@pytest.mark.parametrize("length", [0.3, 1.0, 2.0, 1e-300, 1e300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])
def test_at_rest_u_and_v_are_directions(norm, length, dtype):
    weight = torch.randn(4, 3, 2, dtype=dtype)
    units, others, layers, dims = start(weight, norm)
    u, v = [length * x for x in units], [0.5 * length * x for x in others]
    before = [x.clone() for x in u + v]
    snapshot = reference.estimate([weight], u, v, layers, dims)
    assert all(torch.equal(a, b) for a, b in zip(before, u + v, strict=True))
    for e, (part_u, part_v) in enumerate(reference.vectors_of([weight], snapshot, layers, dims)):
        assert_close((part_u, part_v), (units[e], others[e]))
        matrix = weight.movedim(dims[e], 0).flatten(1)
        assert_close(snapshot[e - len(layers)], units[e].conj() @ matrix @ others[e])
    same = reference.power_([weight], u, v, layers, dims, [0], 7.0, True, True)
    assert torch.equal(same, snapshot)


def test_resting_layers_beside_one_that_iterates():
    weights = [torch.randn(4, 3) for _ in range(3)]
    vectors = [init_vectors(w) for w in weights]
    u, v = ([x.clone() for (x,) in side] for side in zip(*vectors, strict=True))
    u[0] *= 0.3
    v[2] *= 2
    kept = [x.clone() for x in (u[0], v[0], u[2], v[2])]
    snapshot = reference.power_(weights, u, v, [0, 1, 2], [0, 0, 0], [0, 1, 0], 1e-12, False, False)
    assert all(map(torch.equal, (u[0], v[0], u[2], v[2]), kept))
    for e, (w, ((own_u,), (own_v,))) in enumerate(zip(weights, vectors, strict=True)):
        if e == 1:
            one_matrix(w, own_u, own_v)
        assert_close(snapshot[e - 3], own_u @ w @ own_v)


@pytest.mark.parametrize("other", [0.0, 2.0])
def test_at_rest_a_vector_without_length_stays_and_sigma_is_0(other):
    weight, u, v = torch.randn(4, 3), torch.zeros(4), torch.full((3,), other)
    snapshot = reference.estimate([weight], [u], [v], [0], [0])
    assert torch.equal(snapshot[:4], u) and snapshot[-1] == 0
    assert_close(snapshot[4:7], v / max(v.norm().item(), 1))
    assert scaled(weight, snapshot, [0], [0]).isinf().all()


def test_at_rest_nan_reaches_everything():
    u = torch.tensor([1.0, torch.nan, 0.0])
    snapshot = reference.estimate([torch.randn(3, 2)], [u], [torch.ones(2)], [0], [0])
    assert snapshot[:3].isnan().all() and snapshot[-1].isnan()


def test_vectors_and_sigma_carry_no_gradient():
    weight = torch.randn(4, 3, requires_grad=True)
    (u,), (v,) = init_vectors(weight)
    assert not one_matrix(weight, u, v).requires_grad
    assert not u.requires_grad and not v.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_narrow_weights_are_computed_in_float32(dtype):
    weight = torch.randn(6, 5, dtype=torch.float32).to(dtype)
    (u,), (v,) = init_vectors(weight)
    wide_u, wide_v = u.float(), v.float()
    snapshot = one_matrix(weight, u, v)
    wide = one_matrix(weight.float(), wide_u, wide_v)
    assert snapshot.dtype == torch.float32 and torch.equal(snapshot, wide)
    assert torch.equal(u, wide_u.to(dtype)) and torch.equal(v, wide_v.to(dtype))
    normalized = scaled(weight, snapshot, [0], [0])
    assert torch.equal(normalized, (weight.float() / wide[-1]).to(dtype))


# The constraint


@each_norm
@pytest.mark.parametrize("factor", [0.5, 1.0, 2.5])
def test_scale_multiplies_the_normalized_weight(norm, factor):
    weight = torch.randn(4, 3, 2)
    u, v, layers, dims = start(weight, norm)
    snapshot = reference.power_([weight], u, v, layers, dims, [5], 1e-12, False, False)
    (sigma,) = reference.sigmas_of(snapshot, layers)
    assert_close(scaled(weight, snapshot, layers, dims, factor), factor * weight / sigma)


@pytest.mark.parametrize("limit", [0.5, 1.0, 4.0])
def test_bound_only_shrinks(limit):
    weight = with_singular_values(4, 3, [2.0, 0.5])
    (u,), (v,) = init_vectors(weight)
    snapshot = one_matrix(weight, u, v, n=50)
    bounded = scaled(weight, snapshot, [0], [0], limit, bound=True)
    assert_close(bounded, min(1.0, limit / 2.0) * weight)
    assert_close(torch.linalg.svdvals(bounded)[0], torch.tensor(min(limit, 2.0)))


def test_zero_weight_is_nan_and_its_vectors_die():
    u, v = torch.ones(4), torch.ones(3)
    snapshot = one_matrix(torch.zeros(4, 3), u, v)
    assert snapshot[-1] == 0 and not u.any() and not v.any()
    assert scaled(torch.zeros(4, 3), snapshot, [0], [0]).isnan().all()


@each_order
def test_zero_guard_keeps_a_zero_weight_and_its_vectors(v_first):
    weights = [torch.zeros(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)]
    u, v = [torch.ones(4), torch.ones(4)], [torch.ones(3), torch.ones(3)]
    call = [0, 1], [0, 0]
    snapshot = reference.power_(weights, u, v, *call, [2, 2], 1e-12, v_first, True)
    assert torch.equal(u[0], torch.ones(4)) and torch.equal(v[0], torch.ones(3))
    assert not torch.equal(u[1], torch.ones(4)) and not torch.equal(v[1], torch.ones(3))
    zero, other = reference.scale(weights, snapshot, *call, [2.0, 1.0], False, True)
    assert torch.equal(zero, torch.zeros(4, 3))
    assert_close(other, weights[1] / snapshot[-1])
    direction = torch.randn(4, 3)
    (gradient,) = torch.autograd.grad(zero, weights[:1], direction)
    assert_close(gradient, 2 * direction)


@each_guard
def test_zero_weight_under_a_bound_stays_with_its_gradient(zero_guard):
    weight = torch.zeros(4, 3, requires_grad=True)
    snapshot = one_matrix(weight, torch.ones(4), torch.ones(3), zero_guard=zero_guard)
    bounded = scaled(weight, snapshot, [0], [0], bound=True, zero_guard=zero_guard)
    direction = torch.randn(4, 3)
    (gradient,) = torch.autograd.grad(bounded, weight, direction)
    assert torch.equal(bounded, weight)
    assert_close(gradient, direction)


def test_empty_weight_gives_an_empty_weight_and_sigma_0():
    weight, u, v = torch.empty(0, 3), torch.empty(0), torch.ones(3)
    snapshot = one_matrix(weight, u, v)
    assert snapshot[-1] == 0
    assert scaled(weight, snapshot, [0], [0]).shape == (0, 3)


# Gradients


def test_gradient_is_the_formula_of_the_paper():
    weight = torch.randn(4, 3, requires_grad=True)
    (u,), (v,) = init_vectors(weight)
    snapshot = one_matrix(weight, u, v)
    sigma = snapshot[-1]
    normalized = scaled(weight, snapshot, [0], [0])
    direction = torch.randn(4, 3)
    (gradient,) = torch.autograd.grad(normalized, weight, direction)
    slope = torch.outer(u, v)
    assert_close(gradient, (direction - (direction * normalized).sum() * slope) / sigma)


@each_norm
@each_bound
@each_guard
@pytest.mark.parametrize("n", [0, 1, 10])
def test_scale_backward_is_autograd_through_scale(norm, bound, zero_guard, n):
    weights = [torch.randn(shape, requires_grad=True) for shape in [(4, 3, 2), (5, 3), (2, 3, 1)]]
    # Under a bound one weight is above it and one below, and sigma is negative for some u and v.
    scales = [0.5, 100.0, 0.7]
    dims_of = [estimate_dims(w.shape, dim, norm) for w, dim in zip(weights, [0, 1, 1], strict=True)]
    layers = [layer for layer, own in enumerate(dims_of) for _ in own]
    dims = [dim for own in dims_of for dim in own]
    vectors = [
        init_vectors(weights[layer], dim=dim) for layer, dim in zip(layers, dims, strict=True)
    ]
    u, v = ([x for (x,) in side] for side in zip(*vectors, strict=True))
    call = layers, dims, scales, bound, zero_guard
    snapshot = reference.power_(weights, u, v, layers, dims, [n] * 3, 1e-12, False, zero_guard)
    outputs = reference.scale(weights, snapshot, *call)
    directions = [torch.randn_like(w) for w in weights]
    expected = torch.autograd.grad(outputs, weights, directions)
    detached = [w.detach() for w in weights]
    assert_close(reference.scale_backward(directions, detached, snapshot, *call), list(expected))


@pytest.mark.parametrize("sigma", [0.0, -2.0], ids=["zero", "negative"])
@each_bound
@each_guard
def test_scale_backward_is_autograd_where_sigma_is_not_positive(sigma, bound, zero_guard):
    weight = torch.zeros(3, 2)
    weight[0, 0] = sigma
    weight.requires_grad_()
    snapshot = reference.estimate([weight], [torch.eye(3)[0]], [torch.eye(2)[0]], [0], [0])
    call = [0], [0], [1.5], bound, zero_guard
    assert snapshot[-1] == sigma
    direction = torch.randn(3, 2)
    expected = torch.autograd.grad(reference.scale([weight], snapshot, *call), weight, direction)
    actual = reference.scale_backward([direction], [weight.detach()], snapshot, *call)
    torch.testing.assert_close(actual, list(expected), equal_nan=True)


@each_norm
@pytest.mark.parametrize("kwargs", [{}, {"scale": 0.5, "bound": True}, {"zero_guard": True}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=["real", "complex"])
def test_gradients_of_scale_can_be_differentiated_again(norm, kwargs, dtype):
    weight = torch.randn(3, 2, 2, dtype=dtype, requires_grad=True)
    u, v, layers, dims = start(weight, norm)
    snapshot = reference.power_([weight], u, v, layers, dims, [20], 1e-12, False, False)
    assert gradcheck(lambda w: scaled(w, snapshot, layers, dims, **kwargs), weight)
    assert gradgradcheck(lambda w: scaled(w, snapshot, layers, dims, **kwargs), weight)
