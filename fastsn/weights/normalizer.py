"""What all forms of a normalized weight share: the one read, and whether u and v move for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from fastsn import engine, layout, ops, recompute
from fastsn.engine import WARM_UP, Call, Method, Pass, State
from fastsn.sharded import placements
from fastsn.torch_internals import modes
from fastsn.weights import autocast, cache, steps
from fastsn.weights.gathering import Unscaled

#: When a forward in training mode iterates.
POLICIES = ("forward", "step", "frozen")

NARROW = (torch.bfloat16, torch.float16)


class Left:
    """A normalized weight that a group has left, the weight that it is of, and its state then.

    No state: left by a graph, which reads none; what it changes, it changes behind all of its
    reads. No weight either: left unscaled, to be made of the weight as it is when it is read.
    ``fastsn.ops.take`` reads these attributes.
    """

    __slots__ = ("normalized", "original", "state")

    def __init__(self, normalized: Any, original: Tensor | None, state: Any) -> None:
        self.normalized, self.original, self.state = normalized, original, state

    def is_of(self, weight: Tensor) -> bool:
        """Whether the weight to be read is the one that this is of, as it was."""
        if weight is not self.original:
            return self.original is None
        return self.state is None or self.state == steps.state_of(weight)


def left_of(results: list[Any], originals: list[Tensor]) -> list[Left]:
    """The results of a pass, to be left for reads."""
    if isinstance(results[0], Unscaled):
        return [Left(result, None, None) for result in results]
    if modes.is_read_by_dynamo():
        return [Left(result, x, None) for result, x in zip(results, originals, strict=True)]
    return list(map(Left, results, originals, ops.states_of(originals)))


class Transient:
    """What belongs to a normalizer and its replicas, and to no copy of it."""

    def __init__(self) -> None:
        self.frozen = 0  # the number of `fastsn.frozen` that are open
        self.seen: object = None  # the weight that u and v have last moved for, of policy "step"
        self.server: Any = None  # the group that serves this weight
        # What that has left for the next read, by the thread that is to read it.
        self.pending: dict[int, Left] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Transient, ()


def this_thread() -> int:
    """Under which a weight is left. The compiler knows no threads."""
    return 0 if modes.is_read_by_dynamo() else get_ident()


class Normalizer:
    """A mixin of the objects that normalize one weight.

    The *holder* is the module whose buffers u and v are, and whose mode decides.
    """

    # Class attributes: objects of torch's classes become ones with this by changing their class.
    form: str
    v_first = False
    keeps_sigma = False
    method: Method = engine.SN
    policy = "forward"
    # u and v came without values, from the meta device, and nobody has seen any in them yet.
    was_meta = False
    # The random u and v of a form without warm-up, which nothing can depend on, until others come.
    drawn: list[Tensor] | None = None
    transient: Transient
    dim: int
    eps: float
    n_power_iterations: int

    def prepare(self) -> None:
        """Adds what is not copied; before the first forward: the compiler sees what there is."""
        self.transient = Transient()

    # What a form says

    def vectors(self, holder: Any) -> tuple[list[Tensor], list[Tensor]]:
        """(u, v), one of each per estimate, in fp32 also where the module was made narrower."""
        raise NotImplementedError

    def call(self, holder: Any, shape: torch.Size) -> Call:
        """The constants of a pass for a weight of this shape alone."""
        return engine.call_for(shape, self.dim, self.method, self.eps, self.v_first)

    def source(self, module: Any, name: str) -> Tensor | None:
        """The weight of a layer as a grouped call may read it ahead of the layer's own read.

        None where something might still change it, or where it is normalized no more.
        """
        raise NotImplementedError

    def casts(self, module: Any, name: str) -> bool:
        """Whether the weight may be put in the type that autocast would cast it to."""
        return False

    def put(self, module: Any, left: Left, thread: int) -> None:
        """Leaves a normalized weight for the next read of a thread."""
        self.transient.pending[thread] = left

    def finish(self, module: Any, name: str, weight: Tensor) -> Tensor:
        """What a read of the layer's attribute returns, out of the normalized weight."""
        return weight

    def keep_sigma(self, holder: Any, sigma: Tensor) -> None:
        """Takes note of the sigma of a forward; few forms do, and only in training mode."""

    # What all do

    def read(self, holder: Any, weight: Tensor) -> Tensor:
        """The normalized weight, for one use of it: left by a grouped call, or computed now."""
        training = holder.training
        if not modes.is_read_by_dynamo():
            if cache.remembered() is not None:
                kept = cache.of(self)
                if kept is not None:
                    kind = cache.kind(weight)
                    if kind not in kept or kept[kind][0] is not weight:
                        # What is remembered has moved u and v already.
                        kept[kind] = weight, self._given(holder, weight, training and not kept)
                    return kept[kind][1]
            elif pending := self.transient.pending:
                # By a short look, which is all it takes nearly always.
                normalized = ops.take(pending, weight, training)
                if normalized is not None:
                    return normalized
        return self._given(holder, weight, training)

    def _given(self, holder: Any, weight: Tensor, training: bool) -> Tensor:
        """What a grouped call has left, now or in the forward that is repeated, or a new one."""
        left = self.drop() if self.transient.pending else None
        given: Any = None
        if left is not None and left.state is not None:
            # A graph cannot see whether the weight is as it was when eager code left this, and is
            # not to look at what was left, which may have a graph behind it. Nor can anybody where
            # the weight was made in inference mode.
            if modes.is_read_by_dynamo() or left.state[0] is None:
                return self._compute(holder, weight, training=False)
        repeats = recompute.is_repeating()
        if left is not None and left.is_of(weight):
            given = left.normalized
            recompute.record(self, given, holder.training)
        elif repeats:
            given = recompute.replay(self)
        if given is None:
            return self._compute(holder, weight, training, repeats)
        return self._settled(given, holder, weight)

    def drop(self) -> Left | None:
        """What was left for this thread, or None; is left no more."""
        pending = self.transient.pending
        if modes.is_read_by_dynamo() and len(pending) == 1:  # whose it is must be plain there
            return pending.pop(list(pending)[0])
        return pending.pop(this_thread(), None)

    def _compute(
        self, holder: Any, weight: Tensor, training: bool, repeats: bool | None = None
    ) -> Tensor:
        if repeats is None:
            repeats = recompute.is_repeating()
        state = self.state(holder, weight, training and not repeats, *self.vectors(holder))
        work = Pass(self.call(holder, weight.shape), [weight], *state[:2], [state[2]])
        first = (lambda: self.moves_on(training)) if repeats else None
        normalized, snapshot = normalize((self, "own"), work, holder.training, first)
        if self.keeps_sigma:
            self.keep_sigma(holder, snapshot[-1])
        return normalized[0]

    def _settled(self, given: Tensor | Unscaled, holder: Any, weight: Tensor) -> Tensor:
        """A weight that was left, in the type that is right for its use.

        Where the weight was sharded when the group was served, it is normalized here.
        Where autocast, gradients or inference mode have been switched in between, it is computed
        again with the same u and v.
        """
        if isinstance(given, Unscaled):
            given = given.normalized(weight)
        needs_graph = torch.is_grad_enabled() and weight.requires_grad
        if given.requires_grad and not needs_graph:
            given = given.detach()
        lacks_graph = needs_graph and not given.requires_grad
        if autocast.fits(given, weight) and not lacks_graph and not _is_bound(given):
            return given
        return self._compute(holder, weight, training=False)

    def state(
        self, holder: Any, weight: Tensor, training: bool, u: list[Tensor], v: list[Tensor]
    ) -> State:
        """u, v and the iterations of the forward that comes now, in this mode.

        Where u and v are to stay, the ones given back may be others, for this forward alone.
        """
        if self.was_meta and not modes.is_transformed():  # a transform brings its own
            self._settle(holder, weight, u, v)
        n = self.n_power_iterations if training and self.moves_for(weight) else 0
        # A graph cannot look, and is not to be made anew for it: there it is as in torch.
        if not n and not modes.is_read_by_dynamo() and self.drawn is not None:
            if modes.is_eager() and self._are_drawn(u + v):
                return [x.clone() for x in u], [x.clone() for x in v], WARM_UP
        return u, v, n

    def moves_for(self, weight: Tensor) -> bool:
        """Whether u and v move in this forward in training mode."""
        policy = self.policy
        if policy == "frozen" or self.transient.frozen:
            return False
        return policy == "forward" or self.has_changed(weight)

    def moves_on(self, training: bool) -> bool:
        """Whether u and v may be others in the next forward of the same weight."""
        return training and self.policy == "forward" and not self.transient.frozen

    def has_changed(self, weight: Tensor) -> bool:
        """Whether u and v are to move now, of policy "step"; says so once."""
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "expected update policy 'forward' or 'frozen' under torch.compile, got 'step': "
                "a compiled graph cannot tell whether a weight has changed. Compile the layers "
                "of a model that fastsn.accelerate serves, or use fastsn.frozen"
            )
        before, self.transient.seen = self.transient.seen, steps.stamp(weight)
        return self.transient.seen != before

    def _are_drawn(self, vectors: list[Tensor]) -> bool:
        """Whether u and v are still the random ones; once they are not, nobody asks again."""
        assert self.drawn is not None
        for vector, drawn in zip(vectors, self.drawn, strict=True):
            # Nearly: the module may have been made narrower in between.
            if not torch.allclose(vector.detach().to(drawn), drawn, rtol=0, atol=1e-2):
                self.drawn = None
                return False
        return True

    def _settle(self, holder: Any, weight: Tensor, u: list[Tensor], v: list[Tensor]) -> None:
        """Gives u and v values where those that came from the meta device have none.

        The same ones in every process: no random number of the user's is spent on them.
        """
        if weight.is_meta:
            return
        if not are_units(u + v):
            self.restart(holder, weight, torch.Generator(weight.device).manual_seed(0))
        # A weight that has no values yet either would spoil them.
        values = placements.plain(weight.detach())
        norm = torch.linalg.vector_norm(values, dtype=layout.accumulate_type(values))
        self.was_meta = not bool(norm.isfinite())

    @torch.no_grad()
    def converge(self, holder: Any, weight: Tensor, n_power_iterations: int) -> None:
        """Iterates u and v for a weight, in place."""
        u, v = self.vectors(holder)
        call = self.call(holder, weight.shape)
        engine.iterate(Pass(call, [weight.detach()], u, v, [n_power_iterations]))

    @torch.no_grad()
    def restart(
        self, holder: Any, weight: Tensor, generator: torch.Generator | None = None
    ) -> None:
        """Draws u and v anew, in place, and iterates them for the weight.

        For a weight that is not finite they stay as drawn: a first value must not spoil all later
        ones.
        """
        like = placements.stand_in(weight).detach()
        vectors = [x for pair in zip(*self.vectors(holder), strict=True) for x in pair]
        eps = self.call(holder, weight.shape).eps
        drawn = [engine.draw_vector(like, len(x), eps, generator) for x in vectors]
        placements.agree(weight, drawn)
        _write(vectors, drawn)
        self.converge(holder, weight, WARM_UP)
        if not are_units(vectors):
            _write(vectors, drawn)


# Whether u and v could have moved since the first forward, where it is repeated by this one.
MovesOn = Callable[[], bool] | None


def normalize(
    owner: Any, work: Pass, training: bool, moves_on: MovesOn
) -> tuple[list[Tensor], Tensor]:
    """:func:`fastsn.engine.normalize`, where a forward that is repeated uses the first's snapshot.

    ``training``: whether it is one of training, whose u and v may be others when it is repeated.
    """
    snapshot = _snapshot_of_first(owner, moves_on)
    if snapshot is not None:
        return engine.scale(work.call, work.weights, snapshot, work.dtype), snapshot
    normalized, snapshot = engine.normalize(work)
    recompute.record(owner, snapshot, training)
    return normalized, snapshot


def iterate(owner: Any, work: Pass, training: bool, moves_on: MovesOn) -> Tensor:
    """The snapshot of :func:`normalize` alone, for weights that their layers scale later."""
    snapshot = _snapshot_of_first(owner, moves_on)
    if snapshot is None:
        snapshot = engine.iterate(work)
        recompute.record(owner, snapshot, training)
    return snapshot


def _snapshot_of_first(owner: Any, moves_on: MovesOn) -> Tensor | None:
    """That of the forward that is being repeated, or None where none is or it needs none.

    Raises:
        RuntimeError: u and v may have moved since, and nothing is known of it.
    """
    if moves_on is None:
        return None
    snapshot = recompute.replay(owner, recompute.NOT_FOUND)
    if snapshot is not recompute.NOT_FOUND:
        return snapshot
    if moves_on():
        raise RuntimeError(
            "a forward in training mode runs within a backward, as activation checkpointing does, "
            "and which u and v the first forward used cannot be told: expected a checkpoint of "
            "torch.utils.checkpoint, or u and v that do not move from forward to forward "
            '(fastsn.set_update_policy(model, "step"), fastsn.frozen(model))'
        )
    return None


def _is_bound(given: Tensor) -> bool:
    """Whether a tensor was made in inference mode, and is to be used outside of it."""
    return (
        not modes.is_read_by_dynamo()
        and given.is_inference()
        and not torch.is_inference_mode_enabled()
    )


def _write(vectors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for vector, value in zip(vectors, values, strict=True):
        vector.copy_(value)


def are_units(vectors: list[Tensor]) -> bool:
    """Whether these are u and v of some weight, and not what memory happened to hold."""
    norms = torch.stack([torch.linalg.vector_norm(vector.detach()) for vector in vectors])
    return bool(((norms - 1).abs() < 1e-2).all())


def _is_usable(vector: Tensor) -> bool:
    """Whether the operators can work on it as it is, without rounding."""
    return type(vector) is Tensor and vector.element_size() >= 4


def vectors_in(buffers: dict[str, Any], name: str) -> tuple[list[Tensor], list[Tensor]]:
    """(u, v) of the weight, one of each per estimate, widened to fp32 where they are narrower.

    The weight's type shall not round them, and sigma with them.
    """
    u, v = buffers[name + "_u"], buffers[name + "_v"]
    if name + "_u2" not in buffers and _is_usable(u) and _is_usable(v):
        return [u], [v]
    names = [name + suffix for suffix in ("_u", "_v", "_u2", "_v2") if name + suffix in buffers]
    for own in names:
        if not _is_usable(buffers[own]):
            vector = placements.plain(buffers[own])  # distribute_module makes DTensors of buffers
            buffers[own] = vector.to(torch.promote_types(vector.dtype, torch.float32))
    vectors = [buffers[own] for own in names]
    return vectors[::2], vectors[1::2]
