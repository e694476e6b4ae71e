"""How many steps optimizers have done, for the update policy "step"."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastsn import ops
from fastsn.torch_internals import fsdp

_done = 0
_counting: Any = None


def _count(*_: Any) -> None:
    global _done
    _done += 1


def state_of(weight: Tensor) -> tuple[int | None, int]:
    """What tells most changes of a weight: its version, and where it lies."""
    return ops.states_of([weight])[0]


def stamp(weight: Tensor) -> object:
    """Differs from that of before once any optimizer has done a step, or the weight is seen
    to be another.

    The first call begins to count. A change that is not seen costs accuracy of u and v and nothing
    else: sigma is always that of the present weight.
    """
    global _counting
    if _counting is None:
        _counting = register_optimizer_step_post_hook(_count)
    # FSDP2 gathers a weight into other memory each time.
    return _done, *state_of(weight)[: 1 if fsdp.is_sharding() else 2]
