"""The layers of a whole model in one call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastsn import engine, layout, ops, recompute
from fastsn.engine import Call, Pass, State
from fastsn.sharded import placements
from fastsn.torch_internals import calls, parametrized
from fastsn.weights import autocast, cache, find, normalizer
from fastsn.weights.find import Weight
from fastsn.weights.gathering import Gathering

Vectors = tuple[list[Tensor], list[Tensor]]


class Batch(NamedTuple):
    """Weights that one pass serves, and its constants."""

    weights: list[Weight]
    call: Call
    dtype: torch.dtype | None  # of the normalized weights, if not their own
    owner: tuple[Any, ...]  # all normalizers: the batch, whoever plans it
    keeps_sigma: bool

    def run(self, originals: Sequence[Tensor], vectors: Sequence[Vectors]) -> list[Any]:
        """What each layer gets; iterates as their modes say."""
        repeats = recompute.is_repeating()
        states = self._states(originals, vectors, repeats)
        work = Pass.of(self.call, originals, states, self.dtype)
        first = self._moves_on if repeats else None
        if placements.is_distributed(originals[0]):
            snapshot = normalizer.iterate(self.owner, work, self._trains(), first)
            # Sharded now, and perhaps whole when they are read.
            results: list[Any] = list(Gathering(self.call, originals, snapshot, self.dtype).parts())
        else:
            results, snapshot = normalizer.normalize(self.owner, work, self._trains(), first)
        if self.keeps_sigma:
            sigmas = layout.sigmas_of(snapshot, self.call.layers)
            for weight, sigma in zip(self.weights, sigmas, strict=True):
                weight.norm.keep_sigma(weight.holder, sigma)
        return results

    def sigmas(self, originals: Sequence[Tensor]) -> list[Tensor]:
        """The sigma of every layer that a forward in eval mode would use; changes nothing."""
        vectors = [weight.vectors() for weight in self.weights]
        states = self._states(originals, vectors, rests=True)
        snapshot = engine.iterate(Pass.of(self.call, originals, states))
        return layout.sigmas_of(snapshot, self.call.layers)

    def _states(
        self, originals: Sequence[Tensor], vectors: Sequence[Vectors], rests: bool
    ) -> list[State]:
        return [
            norm.state(holder, original, not rests and holder.training, u, v)
            for (_, _, _, _, norm, holder), original, (u, v) in zip(
                self.weights, originals, vectors, strict=True
            )
        ]

    def _trains(self) -> bool:
        return any([weight.holder.training for weight in self.weights])

    def _moves_on(self) -> bool:
        return any(weight.norm.moves_on(weight.holder.training) for weight in self.weights)


def plan(weights: Iterable[Weight], low: torch.dtype | None = None) -> list[Batch]:
    """The weights sorted into as few passes as their devices, types and constants allow.

    Those that autocast would cast are computed in its type ``low``.
    """
    found: dict[tuple[Any, ...], list[tuple[Weight, Call]]] = {}
    for weight in weights:
        original, norm = weight.original(), weight.norm
        call = norm.call(weight.holder, original.shape)
        kind = (original.device, layout.accumulate_type(original), placements.ranks_of(original))
        may_cast = low is not None and original.dtype == torch.float32
        dtype = low if may_cast and norm.casts(weight.module, weight.tensor_name) else None
        key = (*kind, call.eps, call.v_first, call.bound, call.zero_guard, dtype)
        found.setdefault(key, []).append((weight, call))
    return [
        _batch([w for w, _ in own], [call for _, call in own], key[-1])
        for key, own in found.items()
    ]


def _batch(weights: list[Weight], each: list[Call], dtype: torch.dtype | None) -> Batch:
    norms = tuple(weight.norm for weight in weights)
    keeps_sigma = any(norm.keeps_sigma for norm in norms)
    return Batch(weights, engine.joined(each), dtype, norms, keeps_sigma)


Kind = tuple[torch.device, torch.dtype, Any, float]
# The passes, and the kinds of their weights.
Planned = tuple[list[Batch], list[Kind | None]]


def _kind(weight: Weight, original: Tensor | None) -> Kind | None:
    if original is None:
        return None
    eps = (weight.holder if weight.form == "biggan" else weight.norm).eps
    if type(original) is nn.Parameter:
        return original.device, original.dtype, None, eps
    return original.device, original.dtype, placements.of(original), eps


def _planned(weights: list[Weight], low: torch.dtype | None) -> Planned:
    # Those that are split in a way which no call can serve may be gathered when they are read.
    served = [weight for weight in weights if placements.is_supported(weight.original())]
    batches = plan(served, low)
    return batches, [_kind(w, w.original()) for batch in batches for w in batch.weights]


def _links(root: nn.Module, weights: list[Weight]) -> list[tuple[dict[str, Any], str, nn.Module]]:
    """Where the layers of these weights, and what they are in, hang in the model."""
    paths = set()
    for weight in weights:
        names = weight.path.split(".")
        paths |= {".".join(names[:i]) for i in range(1, len(names))}
    links = []
    for prefix, module in root.named_modules():
        for key, child in module._modules.items():
            if child is not None and (f"{prefix}.{key}" if prefix else key) in paths:
                links.append((module._modules, key, child))
    return links


class Group:
    """All weights below one root module. As hooks of the root it serves each of its forwards.

    A weight has one group: of roots within one another the one that was accelerated last.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        for weight in find.weights(root):
            if weight.is_ours:
                weight.norm.transient.server = None
        self._find()

    def _find(self) -> None:
        weights = [
            weight
            for weight in find.weights(self.root)
            if find.is_groupable(weight) and weight.norm.transient.server in (None, self)
        ]
        for weight in weights:
            weight.norm.transient.server = self
        # The attributes last, and whole: other threads may be looking.
        plans: dict[torch.dtype | None, Planned] = {None: _planned(weights, None)}
        self.weights, self._links, self._plans = weights, _links(self.root, weights), plans

    def _plan(self, low: torch.dtype | None) -> Planned:
        plans = self._plans
        if low not in plans:
            plans[low] = _planned(self.weights, low)
        return plans[low]

    # A copy has weights of its own, which it finds when they are all there.
    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "weights": [], "_links": [], "_plans": {None: ([], [None])}}

    def _are_linked(self) -> bool:
        for table, key, module in self._links:
            if table.get(key) is not module:
                return False
        return True

    def _ahead(self, batches: list[Batch]) -> list[tuple[Batch, list[Tensor | None]]]:
        return [
            (batch, [w.ahead() if w.norm.transient.server is self else None for w in batch.weights])
            for batch in batches
        ]

    def batches(self, low: torch.dtype | None = None) -> list[tuple[Batch, list[Tensor]]]:
        """The passes to make and their weights, planned anew when layers came, went or changed."""
        batches, kinds = self._plan(low)
        planned = self._ahead(batches)
        found = [
            _kind(w, x) for batch, xs in planned for w, x in zip(batch.weights, xs, strict=True)
        ]
        if found != kinds or not self._are_linked():
            self._find()
            planned = self._ahead(self._plan(low)[0])
        return planned  # type: ignore[return-value]  # a weight that is None changes the kinds

    def _low(self) -> torch.dtype | None:
        """The type that autocast would cast the weights of this forward to, if it is on."""
        # The compiler fuses the cast.
        if torch.compiler.is_compiling() or not self.weights:
            return None
        device = next((kind[0] for kind in self._plans[None][1] if kind is not None), None)
        return None if device is None else autocast.current(device)

    def before(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook of the root: computes all weights and hands them to the layers."""
        # A replica of DataParallel shares this hook but not its layers; they serve themselves, as
        # they do where a user has asked that what they have read be remembered.
        if module is not self.root or parametrized.is_cached():
            return
        if self._has_left():
            if not torch.compiler.is_compiling() and calls.is_called_within_itself(module):
                return  # the outer call has served the layers
            # Left by a forward that was interrupted, or that failed in a graph: no hook has heard.
            self.after(module, args, None)
        for batch, originals in self.batches(self._low()):
            vectors = [norm.vectors(holder) for _, _, _, _, norm, holder in batch.weights]
            if not placements.is_distributed(originals[0]) and not torch.compiler.is_compiling():
                batch, originals, vectors = _present(batch, originals, vectors)
                if not originals:
                    continue
            left = normalizer.left_of(batch.run(originals, vectors), originals)
            thread = normalizer.this_thread()
            for weight, own in zip(batch.weights, left, strict=True):
                weight.norm.put(weight.module, own, thread)

    def _has_left(self) -> bool:
        thread = normalizer.this_thread()
        for weight in self.weights:
            if thread in weight.norm.transient.pending:
                return True
        return False

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the root: a weight that nothing has read must not be read later."""
        if module is self.root:
            for weight in self.weights:
                if weight.norm.transient.pending:
                    weight.norm.drop()


def _present(
    batch: Batch, originals: list[Tensor], vectors: list[Vectors]
) -> tuple[Batch, list[Tensor], list[Vectors]]:
    """Those of a batch that are here: not to come with the layer's own forward, not remembered."""
    u = [x for own, _ in vectors for x in own]
    v = [x for _, own in vectors for x in own]
    here = ops.present(originals, u, v, batch.call.layers, batch.call.dims)
    if cache.remembered() is not None:
        here = [h and cache.of(w.norm) is None for h, w in zip(here, batch.weights, strict=True)]
    if all(here):
        return batch, originals, vectors
    chosen = [i for i, is_here in enumerate(here) if is_here]
    if not chosen:
        return batch, [], []
    weights = [batch.weights[i] for i in chosen]
    part = _batch(weights, [weight.call() for weight in weights], batch.dtype)
    return part, [originals[i] for i in chosen], [vectors[i] for i in chosen]


def of(module: nn.Module) -> list[tuple[dict[int, Any], int, Group]]:
    """The groups hooked to this very module, each with the dictionary and key of its hook."""
    found = []
    registered: dict[int, Any]
    for registered in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in registered.items():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, Group):
                found.append((registered, key, owner))
    return found


def remove(module: nn.Module) -> None:
    """Takes back what ``accelerate`` did to this very module: its layers serve themselves."""
    for registered, key, group in of(module):
        del registered[key]
        module._forward_hooks_always_called.pop(key, None)
        for weight in group.weights:
            if weight.norm.transient.server is group:
                weight.norm.transient.server = None


def batches_of(model: nn.Module) -> list[tuple[Batch, list[Tensor]]]:
    """The passes over all weights of a model, for calls outside of its forward.

    Raises:
        ValueError: a weight is distributed in a way that is not supported.
    """
    weights = [weight for weight in find.weights(model) if find.is_alone(weight)]
    for weight in weights:
        placements.check(weight.original(), weight.name)
    return [(batch, [w.original() for w in batch.weights]) for batch in plan(weights)]
