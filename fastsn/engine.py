"""The one path of every variant: methods, passes over many weights, and nothing validated.

A method is a norm times a constraint, see :mod:`fastsn.functional`. A :class:`Pass` is one call for
many weights; whatever serves it has the functions of :mod:`fastsn.reference`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsn import backends, layout, ops
from fastsn.sharded import placements
from fastsn.torch_internals import modes

NORMS = ("matrix", "bidirectional")

#: Iterations where u and v start anew, as many as torch does at registration.
WARM_UP = 15


class Method(NamedTuple):
    """What is done to a weight: a norm and a constraint, validated by :func:`check_method`.

    Example::

        >>> fastsn.functional.Method(norm="bidirectional").changed()
        {'norm': 'bidirectional'}
    """

    norm: str = "matrix"
    scale: float = 1.0
    bound: bool = False
    zero_guard: bool = False

    def changed(self) -> dict[str, object]:
        """The fields that differ from plain SN, for representations."""
        return {k: v for k, v in self._asdict().items() if v != self._field_defaults[k]}


SN = Method()


def check_method(
    norm: str = "matrix", scale: float = 1.0, bound: bool = False, zero_guard: bool = False
) -> Method:
    """The arguments as a :class:`Method`.

    Raises:
        ValueError: ``norm`` is not one of ``NORMS``, or ``scale`` is not finite and positive.

    Example::

        >>> fastsn.functional.check_method(scale=2)
        Method(norm='matrix', scale=2.0, bound=False, zero_guard=False)
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

    Example::

        >>> fastsn.functional.estimate_dims((64, 32, 3, 3), 0, "bidirectional")
        (0, 1)
    """
    if norm == "matrix" or len(shape) < 3 or math.prod(shape[2:]) == 1:
        return (dim,)
    return (dim, 1 if dim == 0 else 0)


class Call(NamedTuple):
    """The constants of a pass over many weights (see :mod:`fastsn.reference`)."""

    layers: list[int]
    dims: list[int]
    scales: list[float]
    eps: float
    v_first: bool
    bound: bool
    zero_guard: bool


def make_call(dims: Sequence[Sequence[int]], method: Method, eps: float, v_first: bool) -> Call:
    """The :class:`Call` for weights with these ``estimate_dims`` and one method."""
    layers = [layer for layer, own in enumerate(dims) for _ in own]
    flat = [dim for own in dims for dim in own]
    scales = [method.scale] * len(dims)
    return Call(layers, flat, scales, eps, v_first, method.bound, method.zero_guard)


def call_for(shape: torch.Size, dim: int, method: Method, eps: float, v_first: bool) -> Call:
    """The :class:`Call` for one weight of this shape alone."""
    if modes.is_read_by_dynamo():
        return _call_for(shape, dim, method, eps, v_first)
    try:
        return _kept_call_for(shape, dim, method, eps, v_first)
    except TypeError:  # a shape of symbols cannot be looked up
        return _call_for(shape, dim, method, eps, v_first)


def _call_for(shape: torch.Size, dim: int, method: Method, eps: float, v_first: bool) -> Call:
    return make_call([estimate_dims(shape, dim, method.norm)], method, eps, v_first)


# Who gets a call changes nothing in it.
_kept_call_for = lru_cache(maxsize=4096)(_call_for)


def joined(calls: Sequence[Call]) -> Call:
    """One call for the weights of several that share eps, order and constraint."""
    return calls[0]._replace(
        layers=[i for i, call in enumerate(calls) for _ in call.layers],
        dims=[dim for call in calls for dim in call.dims],
        scales=[scale for call in calls for scale in call.scales],
    )


#: u and v, one of each per estimate, and the number of power iterations of one weight.
State = tuple[list[Tensor], list[Tensor], int]


class Pass(NamedTuple):
    """One pass over many weights: they, their u and v, and how often each iterates.

    Where a weight does not iterate, u and v are directions: their lengths do not count (but where
    eps is so large that it may have made them short), and they are not written. ``dtype``: of the
    normalized weights, if not their own.
    """

    call: Call
    weights: Sequence[Tensor]
    u: Sequence[Tensor]
    v: Sequence[Tensor]
    n_power_iterations: Sequence[int]
    dtype: torch.dtype | None = None

    @classmethod
    def of(
        cls,
        call: Call,
        weights: Sequence[Tensor],
        states: Iterable[State],
        dtype: torch.dtype | None = None,
    ) -> Pass:
        """With the u, v and iterations of every weight."""
        u: list[Tensor] = []
        v: list[Tensor] = []
        iterations: list[int] = []
        for own_u, own_v, own_iterations in states:
            u += own_u
            v += own_v
            iterations.append(own_iterations)
        return cls(call, weights, u, v, iterations, dtype)


def serving(weights: Sequence[Tensor]) -> Any:
    """What serves these weights, which share device and kind of dtype.

    Raises:
        RuntimeError: the forced back-end cannot serve them.
    """
    if placements.is_distributed(weights[0]):
        from fastsn.sharded import operators  # it imports torch.distributed.tensor

        return operators
    return backends.select(weights)


def iterate(work: Pass) -> Tensor:
    """The snapshot after the iterations of each weight."""
    call, weights, u, v, iterations, _ = work
    backend = serving(weights)
    lengths = _lengths(work)
    if any(iterations):
        snapshot = backend.power_(
            weights, u, v, call.layers, call.dims, iterations, call.eps, call.v_first,
            call.zero_guard,
        )  # fmt: skip
    else:
        snapshot = backend.estimate(weights, u, v, call.layers, call.dims)
    return snapshot if lengths is None else snapshot * lengths


# A larger one may be what has made a vector shorter than a unit: then its length is a part of what
# training computes, and evaluation computes the same.
_SMALL_EPS = 1e-3


def _lengths(work: Pass) -> Tensor | None:
    """What a snapshot is to be multiplied with where lengths count; None where they do not."""
    call, weights, u, v, iterations, _ = work
    if call.eps <= _SMALL_EPS or all(iterations):
        return None
    wide = layout.accumulate_type(weights[0])
    factors, sigmas = [], []
    for e, layer in enumerate(call.layers):
        sigma = torch.ones((), dtype=wide, device=u[e].device)
        for x in (u[e], v[e]):
            length = torch.linalg.vector_norm(x.detach(), dtype=wide)
            factor = torch.ones_like(length) if iterations[layer] else length.real.to(wide)
            factors.append(factor.expand(len(x)))
            sigma = sigma * factor
        sigmas.append(sigma)
    return torch.cat([*factors, torch.stack(sigmas)])


def scale(
    call: Call, weights: Sequence[Tensor], snapshot: Tensor, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """The normalized weights out of a snapshot."""
    return serving(weights).scale(
        weights, snapshot, call.layers, call.dims, call.scales, call.bound, call.zero_guard, dtype
    )


def normalize(work: Pass) -> tuple[list[Tensor], Tensor]:
    """The normalized weights, and the snapshot that they are made from."""
    call, weights, u, v, iterations, dtype = work
    if (
        not modes.is_read_by_dynamo()
        and (call.eps <= _SMALL_EPS or all(iterations))
        and serving(weights) is ops
        and not torch.overrides.has_torch_function(weights)
    ):
        # Both operators by one call, which passes the lists once.
        return ops.normalize(
            weights, u, v, call.layers, call.dims, iterations, call.scales, call.eps,
            call.v_first, call.bound, call.zero_guard, dtype,
        )  # fmt: skip
    snapshot = iterate(work)
    return scale(call, weights, snapshot, dtype), snapshot


def normalize_vector(weight: Tensor, eps: float, method: Method) -> Tensor:
    """A 1-D weight, whose norm needs no estimate: ``scale * w / max(|w|, eps)``."""
    if not method.bound:
        unit = F.normalize(weight, dim=0, eps=eps)
        return unit if method.scale == 1 else unit * method.scale
    norm = torch.linalg.vector_norm(weight).clamp_min(eps)
    return weight * (method.scale / norm).clamp_max(1)


def constrain(weight: Tensor, sigma: Tensor, method: Method) -> Tensor:
    """The normalized weight for a sigma that somebody else has found, and that carries a graph."""
    scale = method.scale
    is_guarded = method.bound or method.zero_guard
    # The branch that torch.where leaves out must not divide by zero: its gradient would be NaN.
    divisor = torch.where(sigma == 0, torch.ones_like(sigma), sigma) if is_guarded else sigma
    factor = scale / divisor
    if method.bound:
        factor = torch.where(sigma <= scale, torch.ones_like(factor), factor)
    if method.zero_guard:
        factor = torch.where(sigma == 0, torch.full_like(factor, scale), factor)
    return (weight * factor).to(weight.dtype)


def init_vectors(
    weight: Tensor, dims: Sequence[int], eps: float, generator: torch.Generator | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Random unit vectors u and v, one of each per estimate, drawn in turn as torch does."""
    u: list[Tensor] = []
    v: list[Tensor] = []
    for dim in dims:
        for length, vectors in zip(layout.matrix_shape(weight.shape, dim), (u, v), strict=True):
            vectors.append(draw_vector(weight, length, eps, generator))
    return u, v


def draw_vector(
    like: Tensor, length: int, eps: float, generator: torch.Generator | None = None
) -> Tensor:
    """One random unit vector."""
    drawn = like.detach().new_empty(length).normal_(0, 1, generator=generator)
    return F.normalize(drawn, dim=0, eps=eps)
