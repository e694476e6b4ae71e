"""The normalized weights of sharded weights, and their gradients.

Forward nothing is sent: the snapshot has the sigmas. The gradient (see
:func:`fastsn.reference.scale_backward`) needs <G, W> of the whole weight: one all-reduce of one
number per weight, for all weights of the call at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastsn import backends, layout
from fastsn.sharded.shares import Shares, constant, cuts, shares_of


class _Call(NamedTuple):
    """The arguments of a call but the weights."""

    shares: Shares
    snapshot: Tensor
    layers: Sequence[int]
    dims: Sequence[int]
    scales: Sequence[float]
    bound: bool
    zero_guard: bool
    dtype: torch.dtype | None


@torch.compiler.disable
def scale(
    weights: Sequence[Tensor],
    snapshot: Tensor,
    layers: Sequence[int],
    dims: Sequence[int],
    scales: Sequence[float],
    bound: bool,
    zero_guard: bool,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """:func:`fastsn.reference.scale`; weights, results and gradients have the same placements.

    Every backward through results of one call is one all-reduce of one number per weight of the
    call, reached or not, so all ranks must go backward through the same ones of them. With
    ``create_graph`` it is two numbers per weight, and the gradient's own backward another one.

    Raises:
        TypeError, ValueError: see :func:`fastsn.sharded.shares.shares_of`.
        RuntimeError: in the backward, if the all-reduce failed.
    """
    shares = shares_of(weights)
    call = _Call(shares, snapshot, layers, dims, scales, bound, zero_guard, dtype)
    return list(_Scale.apply(call, *weights))


class _Scale(torch.autograd.Function):
    """One node for all weights, which a graph may go backward through in several parts."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *weights: DTensor) -> tuple[DTensor, ...]:
        # Not as saved tensors: the first of several backwards would free those of all weights.
        ctx.call, ctx.weights, ctx.versions = call, weights, _versions(weights)
        ctx.set_materialize_grads(False)
        local = [weight.to_local() for weight in weights]
        vectors = [part.flatten() for pair in _vectors(call, weights) for part in pair]
        sigmas = call.snapshot[call.snapshot.numel() - len(call.layers) :]
        results = backends.select(local).scale(
            local,
            torch.cat([*vectors, sigmas]),
            call.layers,
            call.dims,
            call.scales,
            call.bound,
            call.zero_guard,
            call.dtype,
        )
        return tuple(map(_to_global, results, weights))

    @staticmethod
    def backward(ctx: Any, *grads: DTensor | None) -> Any:
        versions = zip(grads, ctx.versions, _versions(ctx.weights), strict=True)
        if any(grad is not None and then != now for grad, then, now in versions):
            raise RuntimeError(
                "a weight needed for gradient computation has been modified by an inplace "
                "operation since it was normalized"
            )
        with layout.full_precision(ctx.weights[0]):
            return None, *_gradients(ctx.call, ctx.weights, grads, ctx.needs_input_grad[1:])


def _versions(weights: Sequence[DTensor]) -> list[int | None]:
    return [None if weight.is_inference() else weight._version for weight in weights]


def _vectors(call: _Call, weights: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The parts of every u and v that this rank's parts of the weights meet."""
    found = []
    offset = 0
    rank, ranks = call.shares.rank(), call.shares.ranks()
    for layer, dim in zip(call.layers, call.dims, strict=True):
        parts = cuts(weights[layer].shape, dim, call.shares.dims[layer], rank, ranks)
        u_end = offset + parts[0].whole()
        v_end = u_end + parts[1].whole()
        found.append(
            (parts[0].of(call.snapshot[offset:u_end]), parts[1].of(call.snapshot[u_end:v_end]))
        )
        offset = v_end
    return found


def _slopes(call: _Call, weights: Sequence[Tensor]) -> list[list[tuple[Tensor, Tensor]]]:
    """d sigma / d W of this rank's parts: of every weight the factors u, v of all its estimates.

    Their product, summed over the estimates, broadcasts to the shape of the part.
    """
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in weights]
    counts = Counter(call.layers)
    for layer, dim, (u, v) in zip(call.layers, call.dims, _vectors(call, weights), strict=True):
        shape = weights[layer].shape
        sizes = [*shape[:dim], 1, *shape[dim + 1 :]]
        column = [1] * len(shape)
        column[dim] = -1
        split = call.shares.dims[layer]
        if split is not None and split != dim:
            sizes[split] = v.shape[1]
        found[layer].append((u.reshape(column) / counts[layer], v.reshape(sizes)))
    return found


def _factors(call: _Call, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """What every weight is multiplied with, and the derivative of that by sigma."""
    scales = constant(tuple(call.scales), sigma.dtype, sigma.device)
    # The branch that torch.where leaves out must not divide by zero: its gradient would be NaN.
    is_guarded = call.bound or call.zero_guard
    divisor = torch.where(sigma == 0, torch.ones_like(sigma), sigma) if is_guarded else sigma
    factor = scales / divisor
    derivative = -factor / divisor
    none = torch.zeros_like(sigma)
    if call.bound:
        is_slack = sigma <= scales
        factor = torch.where(is_slack, torch.ones_like(sigma), factor)
        derivative = torch.where(is_slack, none, derivative)
    if call.zero_guard:
        factor = torch.where(sigma == 0, scales, factor)
        derivative = torch.where(sigma == 0, none, derivative)
    return factor, derivative


def _gradients(
    call: _Call,
    weights: Sequence[DTensor],
    grads: Sequence[DTensor | None],
    needed: Sequence[bool],
) -> list[DTensor | None]:
    """``dW = f G + f' <G, W> S`` with f the factor of the weight and S = d sigma / d W.

    Made of operations that torch differentiates. That takes sigma as a function of W where
    somebody may want to (``create_graph``); its value is that of the snapshot in any case.
    """
    wide = call.snapshot.dtype
    slopes = _slopes(call, weights)
    sigma = torch.stack(layout.sigmas_of(call.snapshot, call.layers))
    zero = sigma.new_zeros(())
    parts: dict[int, Tensor] = {}  # of the gradients that there are
    dots, sums = [zero] * len(weights), [zero] * len(weights)
    for i, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
        if grad is None:
            continue
        w = _to_local(weight, weight.placements).to(wide)
        parts[i] = _to_local(grad, weight.placements).to(wide)
        dots[i] = torch.dot(parts[i].flatten(), w.flatten())
        if torch.is_grad_enabled():
            sums[i] = torch.stack([(w * u * v).sum() for u, v in slopes[i]]).sum()
    if torch.is_grad_enabled():
        dot, computed = _sum(call.shares, dots + sums).view(2, -1).unbind()
        sigma = sigma + (computed - computed.detach())
    else:
        dot = _sum(call.shares, dots)
    factor, derivative = _factors(call, sigma)
    factors, along = factor.unbind(), (dot * derivative).unbind()
    result: list[DTensor | None] = [None] * len(weights)
    for i, part in parts.items():
        if needed[i]:
            change = part * factors[i]
            for u, v in slopes[i]:
                change.addcmul_(u * along[i], v)
            result[i] = _to_global(change.to(weights[i].dtype), weights[i])
    return result


def _sum(shares: Shares, values: list[Tensor]) -> Tensor:
    """The sums over the ranks, for numbers of every weight in turn, once or more often.

    Those of whole weights are the same on every rank.
    """
    if shares.mesh_dim is None:
        return torch.stack(values)
    split = [dim is not None for dim in shares.dims] * (len(values) // len(shares.dims))
    chosen = [x for x, is_split in zip(values, split, strict=True) if is_split]
    sums = iter(_AllReduce.apply(torch.stack(chosen), shares).unbind())
    return torch.stack([next(sums) if s else x for x, s in zip(values, split, strict=True)])


class _AllReduce(torch.autograd.Function):
    """The sum over the ranks; a sum is its own transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shares: Shares) -> Tensor:
        ctx.shares = shares
        x = x.clone()
        shares.all_reduce(x, f"{x.numel()} scalar products of gradients")
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _AllReduce.apply(grads[0], ctx.shares), None


def _to_local(tensor: DTensor, placements: Any) -> Tensor:
    """This rank's part of a tensor with these placements."""
    if tensor.placements != placements:
        tensor = tensor.redistribute(placements=placements)
    return _ToLocal.apply(tensor) if torch.is_grad_enabled() else tensor.to_local()


def _to_global(part: Tensor, like: DTensor) -> DTensor:
    """The tensor that is placed like another one and has this part on this rank."""
    return _ToGlobal.apply(part, like.device_mesh, like.placements, like.shape, like.stride())


# DTensor.to_local and from_local are differentiable once, in some versions of torch; these two are
# as often as asked.
class _ToLocal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: DTensor) -> Tensor:
        ctx.like = tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride()
        local = tensor.to_local()
        return local.view_as(local)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _ToGlobal.apply(grads[0], *ctx.like)


class _ToGlobal(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, part: Tensor, mesh: Any, placements: Any, shape: torch.Size, stride: Any
    ) -> DTensor:
        ctx.placements = placements
        return DTensor.from_local(
            part, mesh, placements, run_check=False, shape=shape, stride=stride
        )

    @staticmethod
    def backward(ctx: Any, *grads: DTensor) -> Any:
        return _to_local(grads[0], ctx.placements), None, None, None, None
