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

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsn import engine, layout
from fastsn.engine import NORMS, Method, check_method, estimate_dims

__all__ = ["NORMS", "Method", "check_method", "estimate_dims", "init_vectors", "spectral_norm"]

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
    wanted = {weight.dtype, layout.accumulate_type(weight)}
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
        n_power_iterations: steps; 0 leaves u and v as they are, and takes them for directions: they
            need not be units.
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
        if (w.device, w.is_complex(), layout.accumulate_type(w)) != (
            weights[0].device,
            weights[0].is_complex(),
            layout.accumulate_type(weights[0]),
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
    call = engine.make_call(dims, method, eps, v_first)
    if not len(us) == len(vs) == len(call.layers):
        raise ValueError(
            f"expected {len(call.layers)} u and v, one per matrix, got {len(us)} and {len(vs)}"
        )
    for e, (layer, d) in enumerate(zip(call.layers, call.dims, strict=True)):
        rows, cols = layout.matrix_shape(weights[layer].shape, d)
        _check_vector(us[e], f"u[{e}]", rows, weights[layer])
        _check_vector(vs[e], f"v[{e}]", cols, weights[layer])

    iterations = [n_power_iterations] * len(weights)
    normalized, snapshot = engine.normalize(engine.Pass(call, weights, us, vs, iterations, dtype))
    sigmas = layout.sigmas_of(snapshot, call.layers)
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
    return engine.init_vectors(weight, estimate_dims(weight.shape, dim, norm), eps, generator)
