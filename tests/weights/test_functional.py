"""`fastsn.functional`: the documented contract, examples, gradients and bad input."""

from __future__ import annotations

import doctest

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.func import grad, jacrev, jvp, vmap
from torch.nn.utils import parametrizations

import fastsn
from fastsn import functional
from fastsn.functional import init_vectors, spectral_norm

each_backend = pytest.mark.parametrize("backend", ["cpp", "reference"])
each_order = pytest.mark.parametrize("v_first", [False, True], ids=["u-first", "v-first"])


@pytest.fixture
def of_backend(backend):
    with fastsn.use_backend(backend):
        yield


def assert_close(actual, expected):
    """Two ways to the same float64 number."""
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


def double(*shape, requires_grad=False):
    return torch.randn(shape, dtype=torch.float64, requires_grad=requires_grad)


def clones(*lists):
    return tuple([x.clone() for x in vectors] for vectors in lists)


# The contract


def test_examples_in_the_documentation():
    names = {"torch": torch, "fastsn": fastsn}
    outcome = doctest.testmod(functional, optionflags=doctest.ELLIPSIS, extraglobs=names)
    assert outcome.attempted > 0 and outcome.failed == 0


@each_backend
@pytest.mark.usefixtures("of_backend")
def test_one_weight_gives_one_result():
    w, (u,), (v,) = double(4, 3), *init_vectors(double(4, 3))
    before = u.clone(), v.clone()
    normalized, sigma = spectral_norm(w, u, v)
    new_u = F.normalize(w @ before[1], dim=0)
    new_v = F.normalize(w.mT @ new_u, dim=0)
    assert_close((u, v, sigma), (new_u, new_v, new_u @ w @ new_v))
    assert sigma.shape == () and not sigma.requires_grad
    assert_close(normalized, w / sigma)


@each_backend
@pytest.mark.usefixtures("of_backend")
def test_many_weights_give_lists():
    weights = [double(4, 3), double(2, 5, 2), double(3, 3, 1)]
    dims = [0, 1, -2]
    pairs = [
        init_vectors(w, dim=d, norm="bidirectional") for w, d in zip(weights, dims, strict=True)
    ]
    u, v = ([x for own in side for x in own] for side in zip(*pairs, strict=True))
    assert [len(x) for x in u] == [4, 5, 2, 3]
    options = {"norm": "bidirectional", "n_power_iterations": 2, "scale": 0.7, "v_first": True}
    expected = [
        spectral_norm(w, *clones(*pair), dim=d, **options)
        for w, pair, d in zip(weights, pairs, dims, strict=True)
    ]
    normalized, sigmas = spectral_norm(weights, u, v, dim=dims, **options)
    assert isinstance(normalized, list) and isinstance(sigmas, list)
    for got, wanted in zip(zip(normalized, sigmas, strict=True), expected, strict=True):
        assert_close(got, wanted)


def test_types_of_the_results():
    for dtype, wide in [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.complex64, torch.complex64),
    ]:
        w = torch.randn(4, 3, dtype=torch.complex64 if dtype.is_complex else torch.float32).to(
            dtype
        )
        u, v = init_vectors(w)
        assert {x.dtype for x in u + v} == {dtype}
        for vectors in ((u, v), ([x.to(wide) for x in u], [x.to(wide) for x in v])):
            normalized, sigma = spectral_norm(w, *vectors)
            assert (normalized.dtype, sigma.dtype) == (dtype, wide)


@each_backend
@pytest.mark.usefixtures("of_backend")
def test_no_iterations_leave_the_vectors():
    w = double(4, 3)
    u, v = init_vectors(w)
    before = clones(u, v)
    normalized, sigma = spectral_norm(w, u, v, n_power_iterations=0)
    assert torch.equal(u[0], before[0][0]) and torch.equal(v[0], before[1][0])
    assert_close(sigma, u[0] @ w @ v[0])
    assert_close(normalized, w / sigma)


@each_backend
@pytest.mark.usefixtures("of_backend")
@pytest.mark.parametrize("scale", [0.5, 1.0, 5.0])
def test_bound_is_the_smaller_of_both(scale):
    w = F.normalize(double(4, 3), dim=(0, 1)) * 2
    u, v = init_vectors(w)
    bounded, sigma = spectral_norm(w, u, v, scale=scale, bound=True, n_power_iterations=9)
    assert_close(bounded, w * min(1.0, scale / sigma.item()))


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 1, 1)])
def test_bsn_of_a_matrix_is_sn(shape):
    w = double(*shape)
    u, v = init_vectors(w, norm="bidirectional")
    assert len(u) == len(v) == 1
    expected = spectral_norm(w, *clones(u, v))
    assert_close(spectral_norm(w, u, v, norm="bidirectional"), expected)


@pytest.mark.parametrize("dim", [0, 1])
def test_bsn_of_a_convolution(dim):
    w = double(4, 3, 2, 2)
    u, v = init_vectors(w, dim=dim, norm="bidirectional")
    _, sigma = spectral_norm(w, u, v, dim=dim, norm="bidirectional", n_power_iterations=2000)
    norms = [torch.linalg.matrix_norm(x.flatten(1), 2) for x in (w, w.transpose(0, 1))]
    assert_close(sigma, sum(norms) / 2)


def test_vectors_are_drawn_as_torch_draws_them():
    layer = torch.nn.ConvTranspose2d(3, 4, 2)
    torch.manual_seed(3)
    torchs = torch.nn.utils.spectral_norm(layer)
    torch.manual_seed(3)
    (u,), (v,) = init_vectors(layer.weight_orig, dim=1)
    assert torch.equal(u, torchs.weight_u) and torch.equal(v, torchs.weight_v)
    (u,), (v,) = init_vectors(layer.weight_orig, dim=1, generator=torch.manual_seed(3))
    assert torch.equal(u, torchs.weight_u) and torch.equal(v, torchs.weight_v)


def test_a_training_run_is_that_of_torchs_parametrization():
    layer = parametrizations.spectral_norm(torch.nn.Linear(5, 7, dtype=torch.float64))
    original, torchs = layer.parametrizations.weight.original, layer.parametrizations.weight[0]
    w = original.detach().clone().requires_grad_()
    u, v = torchs._u.clone(), torchs._v.clone()
    x = double(20, 5)
    for _ in range(5):
        layer(x).square().mean().backward()
        F.linear(x, spectral_norm(w, u, v)[0], layer.bias.detach()).square().mean().backward()
        for parameter in (original, w):
            with torch.no_grad():
                parameter -= 0.5 * parameter.grad
            parameter.grad = None
        assert_close((w, u, v), (original, torchs._u, torchs._v))


# Gradients


def both_backends(function):
    """The result of `function` with each back-end."""
    results = []
    for backend in ("cpp", "reference"):
        with fastsn.use_backend(backend):
            results.append(function())
    return results


def test_gradient_penalty():
    def gradients():
        (first, second), _ = spectral_norm(weights, *clones(u, v))
        score = (x @ first.mT).tanh() @ second.mT
        (slope,) = torch.autograd.grad(score.sum(), x, create_graph=True)
        loss = (slope.norm(dim=1) - 1).square().mean() + score.mean()
        return torch.autograd.grad(loss, weights)

    weights = [double(6, 4, requires_grad=True), double(1, 6, requires_grad=True)]
    (u, v) = ([*a, *b] for a, b in zip(*(init_vectors(w) for w in weights), strict=True))
    x = double(5, 4, requires_grad=True)
    assert_close(*both_backends(gradients))


@each_order
@pytest.mark.parametrize("norm", ["matrix", "bidirectional"])
def test_two_forwards_before_a_backward(norm, v_first):
    def gradient():
        vectors = clones(u, v)
        real, _ = spectral_norm(w, *vectors, norm=norm, v_first=v_first)
        fake, _ = spectral_norm(w, *vectors, norm=norm, v_first=v_first)
        return torch.autograd.grad((real * a).sum() - (fake * b).sum(), w)

    w, a, b = double(4, 3, 2, requires_grad=True), double(4, 3, 2), double(4, 3, 2)
    u, v = init_vectors(w, norm=norm)
    assert_close(*both_backends(gradient))


def test_a_graph_that_is_kept_gives_the_same_gradient_again():
    w = double(4, 3, requires_grad=True)
    normalized, _ = spectral_norm(w, *init_vectors(w))
    first, again = (
        torch.autograd.grad(normalized.square().sum(), w, retain_graph=True) for _ in range(2)
    )
    assert torch.equal(first[0], again[0])


@pytest.mark.parametrize("order", [[[0], [1], [2]], [[2], [0, 1]], [[1, 2], [0]]], ids=str)
def test_layers_of_one_call_may_be_differentiated_one_after_the_other(order):
    def gradients():
        normalized, _ = spectral_norm(weights, *clones(u, v), norm="bidirectional", scale=0.7)

        def walk(layers):
            sides = (
                [side[layer] for layer in layers] for side in (normalized, weights, directions)
            )
            return torch.autograd.grad(*sides)

        results = [gradient for layers in order for gradient in walk(layers)]
        # Each layer's part of the graph was given up with its own backward.
        for layer in range(3):
            with pytest.raises(RuntimeError, match="backward through the graph a second time"):
                walk([layer])
        return results

    weights = [double(*shape, requires_grad=True) for shape in [(4, 3, 2), (5, 3), (3, 4, 2)]]
    directions = [torch.randn_like(w) for w in weights]
    pairs = (init_vectors(w, norm="bidirectional") for w in weights)
    u, v = ([x for own in side for x in own] for side in zip(*pairs, strict=True))
    assert_close(*both_backends(gradients))


def test_a_weight_changed_before_the_backward_is_an_error():
    w = double(4, 3, requires_grad=True)
    normalized, _ = spectral_norm(w, *init_vectors(w))
    with torch.no_grad():
        w += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        normalized.sum().backward()


@each_backend
@pytest.mark.usefixtures("of_backend")
def test_result_of_a_frozen_weight_needs_no_gradient():
    weights = [double(4, 3, requires_grad=True), double(4, 3)]
    (u, v) = ([*a, *b] for a, b in zip(*(init_vectors(w) for w in weights), strict=True))
    normalized, _ = spectral_norm(weights, u, v)
    assert [w.requires_grad for w in normalized] == [True, False]
    normalized[0].sum().backward()
    assert weights[0].grad is not None


def test_nothing_needs_a_gradient_under_no_grad():
    w = double(4, 3, requires_grad=True)
    u, v = init_vectors(w)
    before = u[0].clone()
    with torch.no_grad():
        normalized, _ = spectral_norm(w, u, v)
    assert not normalized.requires_grad and not torch.equal(u[0], before)


def test_complex_weights_are_torchs():
    layer = torch.nn.Linear(3, 4, dtype=torch.complex128)
    parametrizations.spectral_norm(layer)
    original, torchs = layer.parametrizations.weight.original, layer.parametrizations.weight[0]
    u, v = torchs._u.clone(), torchs._v.clone()
    ours, sigma = spectral_norm(original, u, v)
    theirs = layer.weight
    assert_close((ours, u, v), (theirs, torchs._u, torchs._v))
    assert sigma.is_complex()
    direction = torch.randn_like(theirs)
    assert_close(*(torch.autograd.grad(x, original, direction) for x in (ours, theirs)))


# torch.func


def pure(v_first=False, **kwargs):
    """The normalized weight as a function of weight, u and v that changes nothing."""

    def function(w, u, v):
        return spectral_norm(w, u.clone(), v.clone(), v_first=v_first, **kwargs)[0]

    return function


# torch.func.jvp itself uses torch.jit.script.
@pytest.mark.filterwarnings("ignore:`torch.jit.[a-z_]+` is (deprecated|not supported)")
def test_func_grad_and_jacobians():
    w, (u,), (v,) = double(4, 3), *init_vectors(double(4, 3))
    leaf = w.clone().requires_grad_()
    (expected,) = torch.autograd.grad(pure()(leaf, u, v).pow(3).sum(), leaf)
    assert_close(grad(lambda x: pure()(x, u, v).pow(3).sum())(w), expected)
    jacobian = torch.autograd.functional.jacobian(lambda x: pure()(x, u, v), w)
    assert_close(jacrev(pure())(w, u, v), jacobian)
    tangent = double(4, 3)
    derivative = jvp(lambda x: pure()(x, u, v), (w,), (tangent,))[1]
    assert_close(derivative, torch.tensordot(jacobian, tangent, 2))


@pytest.mark.filterwarnings("ignore:`torch.jit.[a-z_]+` is (deprecated|not supported)")
def test_forward_mode_is_reverse_mode():
    w, (u,), (v,) = double(4, 3), *init_vectors(double(4, 3))
    jacobian = torch.autograd.functional.jacobian(lambda x: pure()(x, u, v), w)
    tangent = double(4, 3)
    with forward_ad.dual_level():
        result = forward_ad.unpack_dual(pure()(forward_ad.make_dual(w, tangent), u, v))
    assert_close(result.tangent, torch.tensordot(jacobian, tangent, 2))


@pytest.mark.parametrize(
    "kwargs", [{}, {"bound": True}, {"zero_guard": True}, {"v_first": True}], ids=str
)
def test_vmap(kwargs):
    w, u, v = double(5, 4, 3), double(5, 4), double(5, 3)
    function = pure(**kwargs)
    expected = [function(*one) for one in zip(w, u, v, strict=True)]
    assert_close(vmap(function)(w, u, v), torch.stack(expected))


def test_vmap_with_one_u_and_v_for_all():
    w, u, v = double(5, 4, 3), double(4), double(3)
    function = pure(n_power_iterations=0)
    expected = torch.stack([function(one, u, v) for one in w])
    assert_close(vmap(function, in_dims=(0, None, None))(w, u, v), expected)


# Weights that are zero, empty, NaN or infinite


@each_order
@each_backend
@pytest.mark.usefixtures("of_backend")
def test_zero_weight_is_nan_as_in_torch(v_first):
    w = torch.zeros(4, 3, requires_grad=True)
    u, v = init_vectors(w.detach() + 1)
    normalized, sigma = spectral_norm(w, u, v, v_first=v_first)
    assert sigma == 0 and normalized.isnan().all()
    assert not u[0].any() and not v[0].any()
    normalized.sum().backward()
    assert w.grad.isnan().all()


@each_order
@each_backend
@pytest.mark.usefixtures("of_backend")
@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("norm", ["matrix", "bidirectional"])
@pytest.mark.parametrize("bound", [False, True])
def test_zero_guard(n, norm, bound, v_first):
    w = torch.zeros(4, 3, 2, requires_grad=True)
    u, v = init_vectors(w.detach(), norm=norm)
    before = clones(u, v)
    options = {"norm": norm, "bound": bound, "n_power_iterations": n, "v_first": v_first}
    normalized, sigma = spectral_norm(w, u, v, scale=2.0, zero_guard=True, **options)
    direction = torch.randn(4, 3, 2)
    (gradient,) = torch.autograd.grad(normalized, w, direction)
    assert sigma == 0 and torch.equal(normalized, w) and torch.equal(gradient, 2 * direction)
    assert all(map(torch.equal, u + v, before[0] + before[1]))


@each_backend
@pytest.mark.usefixtures("of_backend")
def test_zero_guard_changes_nothing_else():
    w = double(4, 3, 2)
    u, v = init_vectors(w, norm="bidirectional")
    guarded = spectral_norm(w, *clones(u, v), norm="bidirectional", zero_guard=True)
    assert_close(guarded, spectral_norm(w, u, v, norm="bidirectional"))


def as_torch(w, u, v, v_first):
    """One iteration and the quotient, written as torch does."""
    for side in "vu" if v_first else "uv":
        if side == "u":
            u = F.normalize(w @ v, dim=0, eps=1e-12)
        else:
            v = F.normalize(w.mT @ u, dim=0, eps=1e-12)
    sigma = torch.vdot(u, w @ v)
    return w / sigma, sigma, u, v


@each_order
@each_backend
@pytest.mark.usefixtures("of_backend")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("zero_guard", [False, True])
@pytest.mark.parametrize("bound", [False, True])
def test_nan_and_infinity_spread_as_in_torch(bad, v_first, zero_guard, bound):
    w = torch.randn(4, 3)
    w[1, 2] = bad
    (u,), (v,) = init_vectors(torch.randn(4, 3))
    expected = as_torch(w, u, v, v_first)
    options = {"v_first": v_first, "zero_guard": zero_guard, "bound": bound}
    actual = (*spectral_norm(w, u, v, **options), u, v)
    torch.testing.assert_close(actual, expected, equal_nan=True)


@each_backend
@pytest.mark.usefixtures("of_backend")
def test_nan_stays_in_its_own_layer():
    good, bad = torch.randn(4, 3), torch.full((4, 3), torch.nan)
    (u,), (v,) = init_vectors(good)
    expected = spectral_norm(good, u.clone(), v.clone())
    vectors = [[x.clone() for _ in range(3)] for x in (u, v)]
    normalized, sigmas = spectral_norm([bad, good, bad], *vectors)
    torch.testing.assert_close((normalized[1], sigmas[1]), expected)
    assert normalized[0].isnan().all() and normalized[2].isnan().all()


@each_order
@each_backend
@pytest.mark.usefixtures("of_backend")
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (2, 0, 3)], ids=str)
def test_empty_weight(shape, v_first):
    w = torch.empty(shape, requires_grad=True)
    u, v = torch.ones(shape[0]), torch.ones(w.shape[1:].numel())
    expected = as_torch(w.detach().flatten(1), u, v, v_first)
    normalized, sigma = spectral_norm(w, u, v, v_first=v_first)
    assert normalized.shape == shape and sigma == 0
    torch.testing.assert_close((u, v), expected[2:])
    normalized.sum().backward()
    assert w.grad.shape == shape


def test_empty_weight_among_others():
    w = torch.randn(4, 3)
    (u,), (v,) = init_vectors(w)
    expected = spectral_norm(w, u.clone(), v.clone())
    normalized, sigmas = spectral_norm(
        [torch.empty(0, 3), w, torch.empty(2, 0)],
        [torch.ones(0), u, torch.ones(2)],
        [torch.ones(3), v, torch.ones(0)],
    )
    assert torch.equal(normalized[1], expected[0]) and torch.equal(sigmas[1], expected[1])


def test_meta_weights_give_shapes():
    w = torch.empty(4, 3, dtype=torch.bfloat16, device="meta")
    normalized, sigma = spectral_norm(w, w[:, 0], w[0])
    assert normalized.is_meta and normalized.shape == (4, 3) and normalized.dtype == w.dtype
    assert sigma.is_meta and sigma.shape == () and sigma.dtype == torch.float32


# Bad input

W, U, V = torch.randn(4, 3), torch.ones(4), torch.ones(3)
BAD = {
    "iterations": ({"n_power_iterations": -1}, ValueError, "non-negative, but got.*-1"),
    "norm": ({"norm": "conv"}, ValueError, "one of .*matrix.*bidirectional.*got 'conv'"),
    "scale": ({"scale": 0.0}, ValueError, "finite positive number, got 0.0"),
    "negative scale": ({"scale": -1}, ValueError, "finite positive number, got -1"),
    "NaN scale": ({"scale": torch.nan}, ValueError, "finite positive number, got nan"),
    "infinite scale": ({"scale": torch.inf}, ValueError, "finite positive number, got inf"),
    "scale of no number": ({"scale": "1"}, ValueError, "finite positive number, got '1'"),
    "dim": ({"dim": 2}, IndexError, r"out of range.*\[-2, 1\] but got 2"),
    "negative dim": ({"dim": -3}, IndexError, r"out of range.*\[-2, 1\] but got -3"),
    "dims": ({"dim": [0, 1]}, ValueError, "1 weights and 2 dims"),
    "scalar": ({"weight": torch.tensor(1.0)}, IndexError, "out of range.*but got 0"),
    "integer": ({"weight": W.int()}, TypeError, "weight.*float32.*complex64.*got torch.int32"),
    "bool": ({"weight": W > 0}, TypeError, "weight.*float32.*complex64.*got torch.bool"),
    "float8": ({"weight": W.to(torch.float8_e5m2)}, TypeError, "got torch.float8_e5m2"),
    "sparse": ({"weight": W.to_sparse()}, TypeError, "torch.strided.*got torch.sparse_coo"),
    "no weights": ({"weight": []}, ValueError, "at least one weight"),
    "weight None": ({"weight": None}, TypeError, "weight must be a Tensor or a list.*got None"),
    "list of None": ({"weight": [None]}, TypeError, r"weight must be.*a list.*got \[None\]"),
    "uninitialized": (
        {"weight": torch.nn.UninitializedParameter()}, ValueError, "weight.*must be initialized",
    ),
    "mixed types": (
        {"weight": [W, W.double()], "u": [U, U.double()], "v": [V, V.double()]},
        ValueError, "share.*got torch.float32 on cpu and torch.float64 on cpu",
    ),
    "mixed devices": (
        {"weight": [W, W.to("meta")], "u": [U, U.to("meta")], "v": [V, V.to("meta")]},
        ValueError, "share.*got torch.float32 on cpu and torch.float32 on meta",
    ),
    "u None": ({"u": None}, TypeError, "u must be a Tensor or a list.*got None"),
    "v of no tensors": ({"v": [1.0]}, TypeError, r"v must be a Tensor or a list.*got \[1.0\]"),
    "u too long": ({"u": torch.ones(5)}, ValueError, r"u\[0\] must have shape \(4,\), got \(5,\)"),
    "v a matrix": ({"v": torch.ones(3, 1)}, ValueError, r"v\[0\].*\(3,\), got \(3, 1\)"),
    "u of another type": ({"u": U.half()}, TypeError, r"u\[0\].*torch.float32.*got torch.float16"),
    "v integer": ({"v": V.int()}, TypeError, r"v\[0\].*torch.float32.*got torch.int32"),
    "v on another device": ({"v": V.to("meta")}, ValueError, r"v\[0\] must be on cpu, got meta"),
    "u missing": ({"u": []}, ValueError, "expected 1 u and v.*got 0 and 1"),
    "one u for BSN": (
        {"weight": torch.randn(4, 3, 2), "v": torch.ones(6), "norm": "bidirectional"},
        ValueError, "expected 2 u and v.*got 1 and 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("changes, error, message", BAD.values(), ids=BAD.keys())
def test_bad_input(changes, error, message):
    arguments = {"weight": W, "u": U, "v": V, **changes}
    tensors = [W, U, V, *(x for x in changes.values() if isinstance(x, torch.Tensor))]
    before = [x._version for x in tensors if x.device.type == "cpu"]
    with pytest.raises(error, match=f"(?s){message}"):
        spectral_norm(**arguments)
    assert [x._version for x in tensors if x.device.type == "cpu"] == before


@pytest.mark.parametrize("position", [0, 1], ids=["first", "last"])
def test_one_bad_vector_leaves_all_of_a_call_unchanged(position):
    u, v = [torch.ones(4), torch.ones(4)], [torch.ones(3), torch.ones(3)]
    v[position] = torch.ones(2)
    with pytest.raises(ValueError, match=rf"v\[{position}\] must have shape \(3,\), got \(2,\)"):
        spectral_norm([torch.randn(4, 3), torch.randn(4, 3)], u, v)
    assert all(x._version == 0 and (x == 1).all() for x in u + v)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"weight": W, "norm": "frobenius"}, ValueError, "got 'frobenius'"),
        ({"weight": W, "dim": 2}, IndexError, "but got 2"),
        ({"weight": W.int()}, TypeError, "got torch.int32"),
        ({"weight": 1.0}, TypeError, "weight must be a Tensor.*got 1.0"),
        ({"weight": torch.nn.UninitializedParameter()}, ValueError, "must be initialized"),
    ],
)  # fmt: skip
def test_bad_input_of_init_vectors(arguments, error, message):
    state = torch.get_rng_state()
    with pytest.raises(error, match=message):
        init_vectors(**arguments)
    assert torch.equal(torch.get_rng_state(), state)


# Results of another type


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_results_of_another_type(dtype):
    w = torch.randn(6, 4, 3, 3, requires_grad=True)
    u, v = init_vectors(w)
    normalized, sigma = spectral_norm(w, u, v, n_power_iterations=0)
    other, other_sigma = spectral_norm(w, u, v, n_power_iterations=0, dtype=dtype)
    assert other.dtype == dtype and torch.equal(other_sigma, sigma)
    torch.testing.assert_close(other, normalized.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7)
    (gradient,) = torch.autograd.grad(other.float().sum(), w)
    (expected,) = torch.autograd.grad(normalized.sum(), w)
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_results_of_a_wider_type_are_not_rounded_before():
    w = torch.randn(5, 4).bfloat16()
    u, v = init_vectors(w)
    normalized, sigma = spectral_norm(w, u, v, n_power_iterations=0, dtype=torch.float32)
    torch.testing.assert_close(normalized, w.float() / sigma)


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, "float16"])
def test_impossible_type_of_results(dtype):
    w = torch.randn(5, 4)
    u, v = init_vectors(w)
    with pytest.raises(TypeError, match=f"dtype must be None or one of .*got {dtype!r}"):
        spectral_norm(w, u, v, dtype=dtype)
    assert u[0]._version == v[0]._version == 0
