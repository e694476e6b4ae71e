"""How far a result may lie from the exact one, derived from how it is computed."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_sum_no_worse(
    actual: Tensor,
    peer: Tensor,
    exact: Tensor,
    *,
    length: int,
    computed_in: torch.dtype,
    largest_term: float = 0.0,
) -> None:
    """`actual`, made of sums of `length` terms, is about as exact as `peer`, made of the same.

    Its error is at most twice that of `peer`, plus what chance does to sums in another order (the
    roundings of n terms add up like a random walk, so to sqrt(n) of them), plus the rounding of the
    result to its own type. `largest_term` counts where the result is smaller, as terms cancel.
    """
    assert (actual.dtype, actual.shape) == (peer.dtype, peer.shape)
    if actual.numel() == 0:
        return
    largest = exact.abs().max().item()
    walk = 2 * length**0.5 * torch.finfo(computed_in).eps
    allowed = walk * max(largest, largest_term) + torch.finfo(actual.dtype).eps * largest
    error, peer_error = ((x.double() - exact).abs().max().item() for x in (actual, peer))
    # Written so that NaN fails.
    assert error <= 2 * peer_error + allowed, f"{error=:.3g}, {peer_error=:.3g}"
