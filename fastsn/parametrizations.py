"""Drop-in for ``torch.nn.utils.parametrizations.spectral_norm``.

Signature, buffers, iteration order, warm-up, random numbers, checkpoints and errors are torch's.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastsn import engine
from fastsn.checkpoints import convert
from fastsn.sharded import placements
from fastsn.torch_internals import fsdp
from fastsn.weights import classes
from fastsn.weights.parametrized import _SpectralNorm, default_dim

__all__ = ["_SpectralNorm", "spectral_norm"]


def spectral_norm(
    module: nn.Module,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
    *,
    norm: str = "matrix",
    scale: float = 1.0,
    bound: bool = False,
    zero_guard: bool = False,
) -> nn.Module:
    r"""Normalizes a weight spectrally, as ``torch.nn.utils.parametrizations.spectral_norm`` does.

    .. math::
        W_{SN} = s \, W / \sigma(W), \quad \sigma \approx u^T W v

    with W as a matrix of shape (d_dim, product of the others); a 1-D weight becomes
    ``s * w / max(|w|, eps)`` exactly. With the defaults every number, buffer, checkpoint key,
    random draw and error is torch's, to rounding.

    In training mode **every read** of ``module.<name>`` performs ``n_power_iterations`` steps (u,
    then v) and updates the buffers ``_u`` and ``_v`` in place; in eval mode none. 15 steps are done
    at registration. Gradients flow through W and sigma, with u and v constant. Checkpoints of every
    form load, see :func:`fastsn.convert_state_dict`.

    Unlike torch's: u and v stay in fp32 where the weight is narrower; a forward that activation
    checkpointing repeats does not iterate and sees the weight of the first; where u and v do not
    move they are directions, whose lengths do not count, so that averages of models have no sigma
    that is too small.

    The weight may be sharded, before or after this call, by FSDP2 (``fully_shard``) or tensor
    parallel (``parallelize_module``): a DTensor is normalized where its parts lie, which all ranks
    must do together, and gives a DTensor. u and v are whole and equal on every rank.

    Args:
        module: the module that holds the parameter.
        name: the parameter.
        n_power_iterations: steps per read in training mode, at least 1.
        eps: least norm that u and v are divided by.
        dim: the dimension that counts outputs; default 0, and 1 for transposed convolutions.
        norm: ``"matrix"`` for SN, ``"bidirectional"`` for BSN (sigma is the mean over the weight as
            (out, in * k) and as (in, out * k), with buffers ``_u2`` and ``_v2`` for the second).
        scale: s above; other than 1: SSN and BSSN. The bias is not scaled.
        bound: use ``min(1, s / sigma) W`` instead, which leaves a weight of norm below s alone.
        zero_guard: a weight with sigma = 0 stays zero, and so do not u and v; torch and the default
            make it NaN.

    Returns:
        The module itself, its class now ``Parametrized...`` as with every parametrization.

    Raises:
        ValueError: no parameter or buffer of that name, ``n_power_iterations`` < 1, an unknown norm
            or a scale that is not finite and positive; a DTensor that is not replicated or split
            along one dimension of its mesh.
        IndexError: ``dim`` out of range.
        RuntimeError: a weight of ``fully_shard`` in a version of torch that keeps them in another
            way than those known here: normalize before.
        The module is unchanged then.

    Example::

        >>> conv = fastsn.parametrizations.spectral_norm(nn.Conv2d(3, 64, 3), norm="bidirectional")
        >>> conv.weight.shape
        torch.Size([64, 3, 3, 3])

    Source: Miyato et al., ICLR 2018 (arXiv 1802.05957); Lin, Sekar, Fanti, NeurIPS 2021
    (arXiv 2009.02773).
    """
    method = engine.check_method(norm, scale, bound, zero_guard)
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"Module '{module}' has no parameter or buffer with name '{name}'")
    if dim is None:
        dim = default_dim(module)
    placements.check(weight, f"{name} of {type(module).__name__}")
    owner = fsdp.owner_of(weight)
    parametrize.register_parametrization(
        module, name, _SpectralNorm(weight, n_power_iterations, dim, eps, method)
    )
    fsdp.moved(owner, (module, name), (module.parametrizations[name], "original"))  # type: ignore
    classes.teach(module)
    convert.install(module)
    return module
