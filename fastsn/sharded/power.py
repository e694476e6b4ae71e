"""The operators for weights whose parts are on several ranks (DTensors).

The same functions with the same arguments as :mod:`fastsn.reference`. u, v and the snapshot are
whole on every rank, plain tensors, equal bit for bit: checkpoints are those of one process, and a
snapshot that was computed from the parts scales whole weights as well. Each rank passes over its
own parts, all of them in one call of the ordinary operators, and what the ranks must tell each
other goes through one all-reduce for all weights.

**Rows.** With M split into blocks of rows M_p, and u iterated first, a rank has s_p = M_p v, which
is its part of s = M v, and at once t_p = M_p^T s_p; their sum is t = M^T s. Out of s and t come u,
v and sigma. So an iteration is one pass over M_p and one all-reduce of s, in which each rank fills
its own part, and t. **Columns** with v iterated first are the mirror image.

The other two combinations need a first product that is whole before anybody can start on the
second: one all-reduce more. It stands before the first iteration; from there on the iterations are
natural ones with the roles exchanged.

Compiled code calls these functions and goes on behind them: a break of the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastsn import backends, layout
from fastsn.sharded.shares import Cut, Shares, constant, cuts, shares_of
from fastsn.torch_internals import foreach

__all__ = ["estimate", "power_"]


@torch.compiler.disable
def power_(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    layers: Sequence[int],
    dims: Sequence[int],
    n_power_iterations: Sequence[int],
    eps: float,
    v_first: bool,
    zero_guard: bool,
) -> Tensor:
    """:func:`fastsn.reference.power_`; u and v are whole and plain, and so is the snapshot.

    All-reduces: one per iteration, and one more if some matrix is split into columns and iterates u
    first, or into rows and iterates v first.

    Raises:
        TypeError, ValueError: see :func:`fastsn.sharded.shares.shares_of`.
        RuntimeError: an all-reduce failed.
        u and v are as they were then.
    """
    shares = shares_of(weights)
    with torch.no_grad(), layout.full_precision(weights[0]):
        local = [weight.to_local() for weight in weights]  # type: ignore[attr-defined]
        wide = layout.accumulate_type(local[0])
        pairs = [x for pair in zip(u, v, strict=True) for x in pair]
        given = torch.cat([x.to(wide) for x in pairs])
        if given.is_meta:
            return given.new_empty(len(given) + len(layers))
        at_rest = [not n_power_iterations[layer] for layer in layers for _ in "uv"]
        if any(at_rest):
            given = _with_units(given, [len(x) for x in pairs], at_rest)
        state = given.clone()
        vectors = state.split([len(x) for x in pairs])
        run = _Run(shares, local, vectors[::2], vectors[1::2], eps, len(layers))
        estimates = _estimates(shares, weights, layers, dims, v_first)
        whole = [e for e in estimates if shares.dims[e.layer] is None]
        if whole:
            run.whole(whole, n_power_iterations, v_first, zero_guard)
        run.split([e for e in estimates if shares.dims[e.layer] is not None], n_power_iterations)
        sigmas = torch.stack(run.sigmas).to(wide)
        if zero_guard:
            # A sigma that is 0 is so from the first iteration on: nothing has moved since.
            sizes = [len(x) + len(y) for x, y in zip(u, v, strict=True)]
            state.copy_(torch.where(_spread(sigmas == 0, sizes), given, state))
        moving = [e.number for e in estimates if n_power_iterations[e.layer]]
        if moving:
            foreach.copy_([u[e] for e in moving], [run.u[e] for e in moving])
            foreach.copy_([v[e] for e in moving], [run.v[e] for e in moving])
        return torch.cat([state, sigmas])


def estimate(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    layers: Sequence[int],
    dims: Sequence[int],
) -> Tensor:
    """:func:`fastsn.reference.estimate`, with one all-reduce of one number per matrix."""
    none = [0] * len(weights)
    return power_(weights, u, v, layers, dims, none, 0.0, False, False)


def _with_units(x: Tensor, sizes: Sequence[int], chosen: Sequence[bool]) -> Tensor:
    """``x`` with :func:`fastsn.reference.unit` of the chosen ones of its parts of these sizes."""
    smallest = torch.finfo(x.dtype).tiny
    lengths = constant(tuple(sizes), torch.int64, x.device)
    largest = torch.segment_reduce(x.abs(), "max", lengths=lengths, unsafe=True, initial=0)
    units = x / _spread(largest.clamp_min(smallest), sizes)
    norms = _sums(units.square(), sizes).sqrt().clamp_min(smallest)
    units = units / _spread(norms, sizes)
    if all(chosen):
        return units
    return torch.where(_spread(constant(tuple(chosen), torch.bool, x.device), sizes), units, x)


class _Estimate(NamedTuple):
    """One matrix, of which this rank has the part that meets these parts of u and v."""

    number: int
    layer: int
    dim: int
    u_part: Cut
    v_part: Cut
    u_first: bool
    is_natural: bool  # an iteration in this order needs one all-reduce


def _estimates(
    shares: Shares,
    weights: Sequence[Tensor],
    layers: Sequence[int],
    dims: Sequence[int],
    v_first: bool,
) -> list[_Estimate]:
    found = []
    rank, ranks = shares.rank(), shares.ranks()
    for e, (layer, dim) in enumerate(zip(layers, dims, strict=True)):
        is_first_of_layer = e == 0 or layers[e - 1] != layer
        u_first = v_first != is_first_of_layer
        split = shares.dims[layer]
        parts = cuts(weights[layer].shape, dim, split, rank, ranks)
        found.append(_Estimate(e, layer, dim, *parts, u_first, u_first == (split == dim)))
    return found


class _Step(NamedTuple):
    """What one estimate does in one round: it iterates this rank's part, in some order.

    The first product is sent to the other ranks, and the second one too if that is of use.
    """

    estimate: _Estimate
    u_first: bool
    sends_second: bool

    def parts(self) -> list[Cut]:
        """Of the products that are sent: what this rank knows of them."""
        u_part, v_part = self.estimate.u_part, self.estimate.v_part
        parts = [u_part, v_part] if self.u_first else [v_part, u_part]
        return parts[: 1 + self.sends_second]


def _step(estimate: _Estimate, iterations: int, round: int) -> _Step | None:
    """What an estimate that iterates so often does in this round, if anything."""
    if estimate.is_natural:
        return _Step(estimate, estimate.u_first, True) if round < iterations else None
    if round == 0:
        return _Step(estimate, estimate.u_first, False)
    if round > iterations:
        return None
    # The first product completes an iteration, the second one begins the next.
    return _Step(estimate, not estimate.u_first, round < iterations)


def _together(steps: list[_Step], v_first: bool) -> list[list[_Step]]:
    """The steps that a call of the operators in this order can do, those of one weight together.

    A weight's first estimate is in the order of the call, its others in the opposite one.
    """
    found: list[list[_Step]] = []
    for step in steps:
        same = found and found[-1][0].estimate.layer == step.estimate.layer
        if same and found[-1][0].u_first != step.u_first:
            found[-1].append(step)
        else:
            found.append([step])
    return [own for own in found if own[0].u_first != v_first]


def _sums(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """The sums of the parts of these sizes that ``x`` consists of."""
    lengths = constant(tuple(sizes), torch.int64, x.device)
    return torch.segment_reduce(x, "sum", lengths=lengths, unsafe=True)


def _spread(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """Each value as often as these sizes say."""
    lengths = constant(tuple(sizes), torch.int64, values.device)
    return torch.repeat_interleave(values, lengths, output_size=sum(sizes))


class _Run:
    """u and v of a call on their way, and the sigmas."""

    def __init__(
        self,
        shares: Shares,
        local: list[Tensor],
        u: Sequence[Tensor],
        v: Sequence[Tensor],
        eps: float,
        count: int,
    ) -> None:
        self.shares, self.local, self.eps = shares, local, eps
        self.u, self.v = u, v
        self.sigmas = [local[0].new_zeros((), dtype=torch.float64)] * count
        self.backend = backends.select(local)

    def whole(
        self, estimates: list[_Estimate], iterations: Sequence[int], v_first: bool, zero_guard: bool
    ) -> None:
        """Iterates matrices that every rank has all of; nothing is sent."""
        chosen = list(dict.fromkeys(e.layer for e in estimates))
        snapshot = self.backend.power_(
            [self.local[layer] for layer in chosen],
            [self.u[e.number] for e in estimates],
            [self.v[e.number] for e in estimates],
            [chosen.index(e.layer) for e in estimates],
            [e.dim for e in estimates],
            [iterations[layer] for layer in chosen],
            self.eps,
            v_first,
            zero_guard,
        )
        self._note(estimates, snapshot[-len(estimates) :])

    def split(self, estimates: list[_Estimate], iterations: Sequence[int]) -> None:
        """Iterates matrices that are split, each as often as its layer says."""
        resting = [e for e in estimates if not iterations[e.layer]]
        moving = [e for e in estimates if iterations[e.layer]]
        rounds = [iterations[e.layer] + (not e.is_natural) for e in moving]
        for round in range(max([int(bool(resting)), *rounds])):
            steps = [_step(e, iterations[e.layer], round) for e in moving]
            self._round([step for step in steps if step], [] if round else resting)

    def _note(self, estimates: list[_Estimate], sigmas: Tensor) -> None:
        for e, sigma in zip(estimates, sigmas.double().unbind(), strict=True):
            self.sigmas[e.number] = sigma

    def _round(self, steps: list[_Step], resting: list[_Estimate]) -> None:
        """One pass over this rank's parts, one all-reduce, new vectors and sigmas.

        What is sent: the two products of every step in turn, and the sigmas of what rests.
        """
        sizes = []
        for step in steps:
            lengths = [part.whole() for part in step.parts()]
            sizes += [lengths[0], sum(lengths[1:])]
        buffer = self.u[0].new_zeros(sum(sizes) + len(resting))
        products, sigmas = buffer.split([sum(sizes), len(resting)])
        parts = products.split(sizes)
        places = {step.estimate: parts[2 * i : 2 * i + 2] for i, step in enumerate(steps)}
        for v_first in (False, True):
            self._multiply(_together(steps, v_first), places, v_first)
        if resting:
            sigmas.copy_(self._rest(resting))
        self.shares.all_reduce(buffer, f"{buffer.numel()} numbers of a power iteration")
        self._note(resting, sigmas)
        if steps:
            self._normalize(steps, products, sizes)

    def _met(self, estimates: list[_Estimate]) -> tuple[Tensor, list[int]]:
        """The parts of u and v that this rank's parts of the weights meet, and their lengths."""
        parts = [
            part.of(x)
            for e in estimates
            for part, x in ((e.u_part, self.u[e.number]), (e.v_part, self.v[e.number]))
        ]
        sizes = [part.numel() for part in parts]
        return torch.cat([part.flatten() for part in parts]), sizes

    def _rest(self, estimates: list[_Estimate]) -> Tensor:
        """What this rank's parts add to every sigma = u^T M v, u and v being unit vectors.

        The operators make unit vectors of the parts of u and v: their lengths, which are the
        products of the parts with these, come back as factors.
        """
        met, sizes = self._met(estimates)
        vectors = met.split(sizes)
        snapshot = self.backend.estimate(
            [self.local[e.layer] for e in estimates],
            vectors[::2],
            vectors[1::2],
            list(range(len(estimates))),
            [e.dim for e in estimates],
        )
        found, sigmas = snapshot.double().split([len(met), len(estimates)])
        lengths = _sums(met * found, sizes)
        return sigmas * lengths[::2] * lengths[1::2]

    def _multiply(
        self,
        entries: list[list[_Step]],
        products: dict[_Estimate, Sequence[Tensor]],
        v_first: bool,
    ) -> None:
        """Puts the products of this rank's parts in their places.

        The operators return u_p = s_p / a with a = max(|s_p|, eps), v_p = t' / b with
        t' = t_p / a, b = max(|t'|, eps) and sigma_p = |t'|^2 / b. That is undone: with eps = 1, so
        that nothing underflows, b = max(sigma_p, 1); and <v, t'> = |s_p|^2 / a, so a is the greater
        of that and 1.
        """
        if not entries:
            return
        ordered = [step for own in entries for step in own]
        estimates = [step.estimate for step in ordered]
        met, sizes = self._met(estimates)
        vectors = met.clone().split(sizes)
        snapshot = self.backend.power_(
            [self.local[own[0].estimate.layer] for own in entries],
            vectors[::2],
            vectors[1::2],
            [i for i, own in enumerate(entries) for _ in own],
            [e.dim for e in estimates],
            [1] * len(entries),
            1.0,
            v_first,
            False,
        )
        found, sigmas = snapshot.double().split([len(met), len(ordered)])
        dots = _sums(met * found, sizes).unbind()
        b = sigmas.clamp_min(1)
        dot = torch.stack([dots[2 * i + step.u_first] for i, step in enumerate(ordered)])
        a = (b * dot).clamp_min(1)
        factors = [
            x
            for step, first, second in zip(ordered, a.unbind(), (a * b).unbind(), strict=True)
            for x in ((first, second) if step.u_first else (second, first))
        ]
        own = (found * _spread(torch.stack(factors), sizes)).split(sizes)
        places, values = [], []
        for i, step in enumerate(ordered):
            pair = own[2 * i : 2 * i + 2]
            in_order = pair if step.u_first else pair[::-1]
            # The second product may not be wanted.
            for part, value, whole in zip(
                step.parts(), in_order, products[step.estimate], strict=False
            ):
                places.append(part.of(whole))
                values.append(value.view(part.sizes()))
        foreach.copy_(places, values)

    def _normalize(self, steps: list[_Step], products: Tensor, sizes: list[int]) -> None:
        """Vectors and sigmas out of the products x, y of every step.

        With a = max(|x|, eps) and y' = y / a the new vectors are x / a and y' / max(|y'|, eps).
        sigma belongs to these two, or where x has completed an iteration to the vector that x is a
        product of and x / a.
        """
        x, y = _sums(products.double().square(), sizes).sqrt().view(-1, 2).unbind(1)
        a = x.clamp_min(self.eps)
        b = (y / a).clamp_min(self.eps)
        units = (products / _spread(torch.stack([a, a * b], 1).flatten(), sizes)).split(sizes)
        places, values = [], []
        for i, step in enumerate(steps):
            vectors = [self.u[step.estimate.number], self.v[step.estimate.number]]
            count = len(step.parts())
            places += (vectors if step.u_first else vectors[::-1])[:count]
            values += units[2 * i : 2 * i + count]
        foreach.copy_(places, values)
        both, first = ((y / a).square() / b).unbind(), (x.square() / a).unbind()
        for i, step in enumerate(steps):
            self.sigmas[step.estimate.number] = (both if step.estimate.is_natural else first)[i]
