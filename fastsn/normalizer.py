"""What decides for one weight whether u and v move, and where they start."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsn import functional, placements
from fastsn.functional import Call
from fastsn.memory import Memory, version_of, watch

#: When a forward in training mode iterates.
POLICIES = ("forward", "step", "frozen")

NARROW = (torch.bfloat16, torch.float16)

# u and v, one of each per estimate, and a number of power iterations.
State = tuple[list[Tensor], list[Tensor], int]


class Normalizer:
    """A mixin of every form of layer."""

    # Class attributes: objects of torch's classes become ones with this by changing their class.
    policy = "forward"
    # u and v came without values, from the meta device, and nobody has seen any in them yet.
    was_meta = False

    _memory: Memory | None = None

    @property
    def memory(self) -> Memory:
        return self._memory or self.prepare()

    def prepare(self) -> Memory:
        """Makes the memory, before the first forward: the compiler sees what an object has."""
        return self.__dict__.setdefault("_memory", Memory())

    def iterations(self, weight: Tensor, training: bool, n_power_iterations: int) -> int:
        """How many steps the forward that comes now does, unless it is one that is repeated."""
        if not training or (self._memory is not None and self._memory.frozen):
            return 0
        if self.policy == "forward":
            return n_power_iterations
        if self.policy == "step":
            if torch.compiler.is_compiling():
                raise RuntimeError(
                    "expected update policy 'forward' or 'frozen' under torch.compile, got 'step': "
                    "a compiled graph cannot tell whether a weight has changed. Compile the layers "
                    "of a model that fastsn.accelerate serves, or use fastsn.frozen"
                )
            watch(weight)
            version = version_of(weight)
            if version is not None and version == self.memory.seen:
                return 0
            self.memory.seen = version
            return n_power_iterations
        return 0

    def settle(self, call: Call, weight: Tensor, u: list[Tensor], v: list[Tensor]) -> None:
        """Gives u and v values where those that came from the meta device have none.

        The same ones in every process: no random number of the user's is spent on them.
        """
        if weight.is_meta:
            return
        if not are_units(u + v):
            restart(call, weight, u, v, torch.Generator(weight.device).manual_seed(0))
        # A weight that has no values yet either would spoil them.
        sigma = functional.iterate(call, [weight.detach()], u, v, [0])[-1]
        self.was_meta = not bool(sigma.isfinite())


@torch.no_grad()
def restart(
    call: Call,
    weight: Tensor,
    u: list[Tensor],
    v: list[Tensor],
    generator: torch.Generator | None = None,
) -> None:
    """Draws u and v anew, in place, and iterates them for the weight.

    For a weight that is not finite they stay as drawn: a first value must not spoil all later ones.
    """
    drawn: list[list[Tensor]] = [[], []]
    like = placements.stand_in(weight)
    for dim in call.dims:
        own = functional.init_vectors(like, dim=dim, eps=call.eps, generator=generator)
        for all_of, new in zip(drawn, own, strict=True):
            all_of += new
    placements.agree(weight, drawn[0] + drawn[1])
    _write(u + v, drawn[0] + drawn[1])
    functional.iterate(call, [weight], u, v, [functional.WARM_UP])
    if not are_units(u + v):
        _write(u + v, drawn[0] + drawn[1])


def _write(vectors: list[Tensor], values: list[Tensor]) -> None:
    for vector, value in zip(vectors, values, strict=True):
        vector.copy_(value)


def are_units(vectors: list[Tensor]) -> bool:
    """Whether these are u and v of some weight, and not what memory happened to hold."""
    norms = torch.stack([torch.linalg.vector_norm(vector.detach()) for vector in vectors])
    return bool(((norms - 1).abs() < 1e-2).all())


def is_usable(vector: Tensor) -> bool:
    """Whether the operators can work on it as it is, without rounding."""
    return type(vector) is Tensor and vector.element_size() >= 4


def vectors_in(buffers: dict[str, Any], name: str) -> tuple[list[Tensor], list[Tensor]]:
    """(u, v) of the weight, one of each per estimate, widened to fp32 where they are narrower.

    The weight's type shall not round them, and sigma with them.
    """
    u, v = name + "_u", name + "_v"
    names = [u, v, u + "2", v + "2"] if u + "2" in buffers else [u, v]
    vectors = [buffers[own] for own in names]
    for i, vector in enumerate(vectors):
        if not is_usable(vector):
            vector = placements.plain(vector)  # distribute_module makes DTensors of buffers
            wide = torch.promote_types(vector.dtype, torch.float32)
            vectors[i] = buffers[names[i]] = vector.to(wide)
    return vectors[::2], vectors[1::2]
