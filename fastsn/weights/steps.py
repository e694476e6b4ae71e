"""How many steps optimizers have done, for the update policy "step"."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastsn.torch_internals import fsdp

_done = 0
_counting: Any = None


def _count(*_: Any) -> None:
    global _done
    _done += 1


def stamp(weight: Tensor) -> object:
    """Differs from that of before once any optimizer has done a step, or the weight is seen
    to be another.

    The first call begins to count. A change that is not seen costs accuracy of u and v and nothing
    else: sigma is always that of the present weight.
    """
    global _counting
    if _counting is None:
        _counting = register_optimizer_step_post_hook(_count)
    version = None if weight.is_inference() else weight._version
    is_plain = type(weight) in (Tensor, nn.Parameter)
    # FSDP2 gathers a weight into other memory each time.
    place = weight.data_ptr() if is_plain and not fsdp.is_sharding() else 0
    return _done, version, place
