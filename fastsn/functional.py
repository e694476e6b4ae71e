"""Spectral normalization without modules: explicit state in, normalized weights out.

A method is a norm times a constraint, the same names at every layer of the package:

======================  ============================================================================
``norm``                estimate of sigma
======================  ============================================================================
``"matrix"``            SN: the norm of W as a matrix of shape (out, in * k)
``"bidirectional"``     BSN: the mean of that and of the norm of W as (in, out * k)
======================  ============================================================================

The weight used is ``scale * W / sigma``, or with ``bound`` ``min(1, scale / sigma) * W``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsn import backends, ops, reference

NORMS = ("matrix", "bidirectional")


class Method(NamedTuple):
    """What is done to a weight: a norm and a constraint, validated by :func:`check_method`."""

    norm: str = "matrix"
    scale: float = 1.0
    bound: bool = False
    zero_guard: bool = False


SN = Method()


def check_method(
    norm: str = "matrix", scale: float = 1.0, bound: bool = False, zero_guard: bool = False
) -> Method:
    """The arguments as a :class:`Method`.

    Raises:
        ValueError: ``norm`` is not one of ``NORMS``, or ``scale`` is not finite and positive.
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {NORMS}, got {norm!r}")
    if not (isinstance(scale, int | float) and math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be a finite positive number, got {scale!r}")
    return Method(norm, float(scale), bool(bound), bool(zero_guard))


def estimate_dims(shape: Sequence[int], dim: int, norm: str) -> tuple[int, ...]:
    """The dimensions along which a weight of this shape is matricized, one per estimate.

    ``dim`` for SN; ``dim`` and the other of the first two for BSN, unless the weight is a matrix or
    a 1x1 convolution: both matricizations are then each other's transposes, and BSN is SN.
    """
    if norm == "matrix" or len(shape) < 3 or math.prod(shape[2:]) == 1:
        return (dim,)
    return (dim, 1 if dim == 0 else 0)


class Call(NamedTuple):
    """The constants of one call for many weights (see :mod:`fastsn.reference`)."""

    layers: list[int]
    dims: list[int]
    scales: list[float]
    eps: float
    v_first: bool
    bound: bool
    zero_guard: bool


def make_call(
    dims: Sequence[Sequence[int]],
    scales: Sequence[float],
    eps: float,
    v_first: bool,
    bound: bool,
    zero_guard: bool,
) -> Call:
    """The :class:`Call` for weights with these ``estimate_dims`` and scales."""
    layers = [layer for layer, own in enumerate(dims) for _ in own]
    flat = [dim for own in dims for dim in own]
    return Call(layers, flat, list(scales), eps, v_first, bound, zero_guard)


#: What is done with u and v that do not move, but may be averages of those of several models: such
#: are shorter than units, sigma would come out too small, and the average of models would blow up.
#: As they are; made units; made units and iterated WARM_UP times, without being written back.
AT_REST = ("as they are", "units", "iterated")
# A larger one may be what made a vector shorter than a unit, and it stays so then.
_SMALL_EPS = 1e-3
#: Iterations where u and v start anew, as many as torch does at registration.
WARM_UP = 15


def look_at(call: Call, u: Sequence[Tensor], v: Sequence[Tensor]) -> str:
    """The member of ``AT_REST`` that these need. Waits for their device."""
    if call.eps > _SMALL_EPS or u[0].is_meta:
        return "as they are"
    lengths = torch.stack([torch.linalg.vector_norm(x).to(torch.float32) for x in (*u, *v)])
    return "iterated" if bool((lengths < 0.999).any()) else "as they are"


def _resting(
    call: Call, weights: Sequence[Tensor], vectors: Sequence[Tensor], iterations: Sequence[int]
) -> list[Tensor]:
    """The vectors of a call, those that do not move made units where they are shorter."""
    if call.eps > _SMALL_EPS:
        return list(vectors)
    resting = [not iterations[layer] for layer in call.layers]
    wide = reference.accumulate_type(weights[0])
    chosen = [x.to(wide) for x, rests in zip(vectors, resting, strict=True) if rests]
    if not chosen:
        return list(vectors)
    tiny = torch.finfo(wide).tiny
    if backends.select(weights) is reference:
        units = [x / torch.linalg.vector_norm(x).clamp(tiny, 1.0) for x in chosen]
    else:
        norms = torch._foreach_clamp_min(torch._foreach_norm(chosen), tiny)
        units = list(torch._foreach_div(chosen, torch._foreach_clamp_max(norms, 1)))
    rest = iter(units)
    return [next(rest) if rests else x for x, rests in zip(vectors, resting, strict=True)]


def iterate(
    call: Call,
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    n_power_iterations: Sequence[int],
    at_rest: str = "units",
) -> Tensor:
    """The snapshot after that many iterations of each weight. Nothing is validated here.

    ``at_rest``, one of ``AT_REST``, is for the weights that do not iterate.
    """
    backend = backends.select(weights)
    if at_rest != "as they are":
        u = _resting(call, weights, u, n_power_iterations)
        v = _resting(call, weights, v, n_power_iterations)
    if not any(n_power_iterations):
        if at_rest != "iterated":
            return backend.estimate(weights, u, v, call.layers, call.dims)
        u, v = ([x.clone() for x in vectors] for vectors in (u, v))
        n_power_iterations = [WARM_UP] * len(weights)
    return backend.power_(
        weights,
        u,
        v,
        call.layers,
        call.dims,
        n_power_iterations,
        call.eps,
        call.v_first,
        call.zero_guard,
    )


def normalize(
    call: Call,
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    n_power_iterations: Sequence[int],
    dtype: torch.dtype | None = None,
    at_rest: str = "units",
) -> tuple[list[Tensor], Tensor]:
    """The one path of every variant: (normalized weights, snapshot). Nothing is validated here."""
    if (
        backends.select(weights) is ops
        and (at_rest == "as they are" or all(n_power_iterations))
        and not torch.compiler.is_compiling()
        and not torch.overrides.has_torch_function(weights)
    ):
        # Both operators by one call, which passes the lists once.
        return ops.normalize(
            weights, u, v, call.layers, call.dims, n_power_iterations, call.scales, call.eps,
            call.v_first, call.bound, call.zero_guard, dtype,
        )  # fmt: skip
    snapshot = iterate(call, weights, u, v, n_power_iterations, at_rest)
    return scale(call, weights, snapshot, dtype), snapshot


def scale(
    call: Call, weights: Sequence[Tensor], snapshot: Tensor, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """The normalized weights out of a snapshot. Nothing is validated here."""
    return backends.select(weights).scale(
        weights, snapshot, call.layers, call.dims, call.scales, call.bound, call.zero_guard, dtype
    )


def normalize_vector(weight: Tensor, eps: float, method: Method) -> Tensor:
    """A 1-D weight, whose norm needs no estimate: ``scale * w / max(|w|, eps)``."""
    if not method.bound:
        unit = F.normalize(weight, dim=0, eps=eps)
        return unit if method.scale == 1 else unit * method.scale
    norm = torch.linalg.vector_norm(weight).clamp_min(eps)
    return weight * (method.scale / norm).clamp_max(1)


_DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.complex128,
)


def _as_list(value: Tensor | Sequence[Tensor], name: str) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple) and all(isinstance(item, Tensor) for item in value):
        return list(value)
    raise TypeError(f"{name} must be a Tensor or a list of Tensors, got {value!r}")


def _check_weight(weight: Tensor, dim: int, where: str) -> int:
    if not isinstance(weight, Tensor):
        raise TypeError(f"{where} must be a Tensor, got {weight!r}")
    if isinstance(weight, torch.nn.UninitializedParameter | torch.nn.UninitializedBuffer):
        raise ValueError(f"{where} must be initialized, got an uninitialized parameter")
    if weight.dtype not in _DTYPES:
        raise TypeError(f"{where} must have one of the types {_DTYPES}, got {weight.dtype}")
    if weight.layout != torch.strided:
        raise TypeError(f"{where} must be dense (torch.strided), got {weight.layout}")
    if weight.ndim == 0 or not -weight.ndim <= dim < weight.ndim:
        raise IndexError(
            "Dimension out of range (expected to be in range of "
            f"[{-weight.ndim}, {weight.ndim - 1}] but got {dim})"
        )
    return dim % weight.ndim


def _check_vector(vector: Tensor, name: str, length: int, weight: Tensor) -> None:
    if tuple(vector.shape) != (length,):
        raise ValueError(f"{name} must have shape ({length},), got {tuple(vector.shape)}")
    if vector.device != weight.device:
        raise ValueError(f"{name} must be on {weight.device}, got {vector.device}")
    wanted = {weight.dtype, reference.accumulate_type(weight)}
    if vector.dtype not in wanted:
        raise TypeError(
            f"{name} must have one of the types {sorted(map(str, wanted))}, got {vector.dtype}"
        )


def spectral_norm(
    weight: Tensor | Sequence[Tensor],
    u: Tensor | Sequence[Tensor],
    v: Tensor | Sequence[Tensor],
    *,
    dim: int | Sequence[int] = 0,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    norm: str = "matrix",
    scale: float = 1.0,
    bound: bool = False,
    zero_guard: bool = False,
    v_first: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor | list[Tensor], Tensor | list[Tensor]]:
    r"""Spectrally normalizes one weight, or many in one call.

    .. math::
        W_{SN} = s \, W / \sigma, \quad \sigma = u^T M v

    where M is W as a matrix (for ``norm="bidirectional"``: sigma is the mean over two matrices) and
    u, v come from ``n_power_iterations`` steps of power iteration: u = normalize(M v), then
    v = normalize(M^T u), with normalize(x) = x / max(\|x\|, eps). Gradients reach the weight
    through W and through sigma, with u and v constant (Miyato et al. 2018); they can be
    differentiated again.

    Args:
        weight: a tensor of any shape (d_0, d_1, ...), or a list of them; fp64, fp32, bf16, fp16 or
            complex. Iteration and sigma are computed in fp32 or wider.
        u: one vector of shape (rows,) per matrix: one for SN, two for the BSN of a convolution, in
            a flat list over all weights. **Updated in place.** In the weight's type, or fp32.
        v: likewise, of shape (cols,).
        dim: the output dimension, one for all weights or one each: rows of M are slices along it.
        n_power_iterations: steps; 0 leaves u and v as they are, and takes those that are shorter
            than units, as averages of u and v are, for the units in their direction.
        eps: least norm that a product is divided by.
        norm: ``"matrix"`` or ``"bidirectional"``.
        scale: s above.
        bound: use ``min(1, s / sigma) W`` instead: a weight whose norm is below s stays.
        zero_guard: a weight with sigma = 0 becomes ``s W`` (zeros) instead of NaN, its gradient s
            times the incoming one, and its u and v stay.
        v_first: iterate v first, then u (the order of ``torch.nn.utils.spectral_norm``).
        dtype: the type of the normalized weights, rounded to once; default: each weight's own.
            Gradients come back in the weight's type.

    Returns:
        (normalized, sigma): of the weight's shape, in its type or ``dtype``; a 0-d tensor in fp32
        or wider without gradient. Lists where ``weight`` is a list.

    Raises:
        ValueError: ``n_power_iterations`` < 0, an unknown norm, a scale that is not finite and
            positive, vectors of the wrong number, shape or device, an uninitialized weight.
        TypeError: an integer or sparse weight, a vector of another type, or a ``dtype`` that is not
            among those of weights or loses the imaginary part.
        IndexError: ``dim`` out of range.
        Nothing is changed then.

    Example::

        >>> w = torch.randn(64, 32, 3, 3, requires_grad=True)
        >>> u, v = fastsn.functional.init_vectors(w)
        >>> normalized, sigma = fastsn.functional.spectral_norm(w, u, v, n_power_iterations=500)
        >>> print(f"{torch.linalg.matrix_norm(normalized.flatten(1), 2):.3f}")
        1.000

    Source: Miyato et al., ICLR 2018 (arXiv 1802.05957); bidirectional and scaled: Lin, Sekar,
    Fanti, NeurIPS 2021 (arXiv 2009.02773).
    """
    method = check_method(norm, scale, bound, zero_guard)
    if not isinstance(n_power_iterations, int):
        raise TypeError(f"n_power_iterations must be an int, got {n_power_iterations!r}")
    if n_power_iterations < 0:
        raise ValueError(
            f"Expected n_power_iterations to be non-negative, but got {n_power_iterations=}"
        )
    weights, us, vs = _as_list(weight, "weight"), _as_list(u, "u"), _as_list(v, "v")
    per_weight: list[int] = list(dim) if isinstance(dim, list | tuple) else [dim] * len(weights)  # type: ignore[list-item]
    if not all(isinstance(d, int) for d in per_weight):
        raise TypeError(f"dim must be an int or a list of ints, got {dim!r}")
    if not weights or len(per_weight) != len(weights):
        raise ValueError(
            f"expected at least one weight and one dim per weight, got {len(weights)} weights and "
            f"{len(per_weight)} dims"
        )
    dims = []
    for i, (w, d) in enumerate(zip(weights, per_weight, strict=True)):
        checked = _check_weight(w, d, f"weight[{i}]")
        if (w.device, w.is_complex(), reference.accumulate_type(w)) != (
            weights[0].device,
            weights[0].is_complex(),
            reference.accumulate_type(weights[0]),
        ):
            raise ValueError(
                "weights of one call must share their device and, fp32 and narrower counting as "
                f"one, their type, got {weights[0].dtype} on {weights[0].device} and {w.dtype} on "
                f"{w.device}"
            )
        dims.append(estimate_dims(w.shape, checked, norm))
    if dtype is not None and (dtype not in _DTYPES or dtype.is_complex != weights[0].is_complex()):
        possible = [t for t in _DTYPES if t.is_complex == weights[0].is_complex()]
        raise TypeError(f"dtype must be None or one of {possible}, got {dtype!r}")
    call = make_call(dims, [method.scale] * len(weights), eps, v_first, bound, zero_guard)
    if not len(us) == len(vs) == len(call.layers):
        raise ValueError(
            f"expected {len(call.layers)} u and v, one per matrix, got {len(us)} and {len(vs)}"
        )
    for e, (layer, d) in enumerate(zip(call.layers, call.dims, strict=True)):
        rows, cols = reference.matrix_shape(weights[layer].shape, d)
        _check_vector(us[e], f"u[{e}]", rows, weights[layer])
        _check_vector(vs[e], f"v[{e}]", cols, weights[layer])

    iterations = [n_power_iterations] * len(weights)
    normalized, snapshot = normalize(call, weights, us, vs, iterations, dtype)
    sigmas = reference.sigmas_of(snapshot, call.layers)
    if isinstance(weight, Tensor):
        return normalized[0], sigmas[0]
    return normalized, sigmas


def init_vectors(
    weight: Tensor,
    *,
    dim: int = 0,
    norm: str = "matrix",
    eps: float = 1e-12,
    generator: torch.Generator | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Random unit vectors (u, v) for :func:`spectral_norm`, one of each per matrix.

    u is drawn before v, for each matrix in turn, in the weight's type and on its device, as torch
    does.

    Example::

        >>> u, v = fastsn.functional.init_vectors(torch.empty(8, 4, 3, 3), norm="bidirectional")
        >>> [len(x) for x in u + v]
        [8, 4, 36, 72]
    """
    check_method(norm)
    dim = _check_weight(weight, dim, "weight")
    u: list[Tensor] = []
    v: list[Tensor] = []
    for d in estimate_dims(weight.shape, dim, norm):
        for length, vectors in zip(reference.matrix_shape(weight.shape, d), (u, v), strict=True):
            drawn = weight.detach().new_empty(length).normal_(0, 1, generator=generator)
            vectors.append(F.normalize(drawn, dim=0, eps=eps))
    return u, v
