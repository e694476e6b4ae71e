"""Drop-in for ``torch.nn.utils.spectral_norm``, the form that works through a forward pre-hook.

The hook class *is* a torch ``SpectralNorm`` with the arithmetic replaced, so that torch's own
functions, checkpoints and subclasses keep working with it.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.spectral_norm import SpectralNorm as TorchHook
from torch.nn.utils.spectral_norm import (
    SpectralNormLoadStateDictPreHook,
    SpectralNormStateDictHook,
)
from torch.nn.utils.spectral_norm import remove_spectral_norm as _torch_remove

from fastsn import checkpoints, functional, normalizer, placements, recompute
from fastsn.functional import Method
from fastsn.normalizer import Normalizer, State
from fastsn.parametrizations import default_dim

__all__ = [
    "SpectralNorm",
    "SpectralNormLoadStateDictPreHook",
    "SpectralNormStateDictHook",
    "remove_spectral_norm",
    "spectral_norm",
]

T_module = TypeVar("T_module", bound=nn.Module)


class SpectralNorm(Normalizer, TorchHook):
    """The forward pre-hook: sets ``module.<name>`` to the normalized weight before each forward.

    Subclasses may override :meth:`compute_weight`, :meth:`reshape_weight_to_matrix` or
    :meth:`apply`, as those of torch's class do.
    """

    # Class attributes: an object of torch's class becomes one of this by changing its class.
    method = functional.SN
    # The weight that this hook has set last.
    _latest: Tensor | None = None
    # Not empty when a grouped call has set the weight for the next forward.
    _pending: list[Any] | tuple[()] = ()

    @classmethod
    def apply(
        cls,
        module: nn.Module,
        name: str,
        n_power_iterations: int,
        dim: int,
        eps: float,
        method: Method = functional.SN,
    ) -> SpectralNorm:
        """Registers the hook; see :func:`spectral_norm` for what can go wrong."""
        owner = placements.owner_of(module._parameters.get(name))
        with placements.drawable(module, name):
            hook: Any = TorchHook.apply(module, name, n_power_iterations, dim, eps)
        placements.moved(owner, (module, name), (module, f"{name}_orig"))
        hook.__class__ = cls
        hook.method = method
        weight = getattr(module, f"{name}_orig")
        for other in functional.estimate_dims(weight.shape, dim, method.norm)[1:]:
            drawn_like = placements.stand_in(weight)
            (u,), (v,) = functional.init_vectors(drawn_like, dim=other, eps=eps)
            module.register_buffer(f"{name}_u2", u)
            module.register_buffer(f"{name}_v2", v)
        if placements.is_distributed(weight):
            u, v = hook.vectors(module)
            placements.agree(weight, u + v)
        hook.was_meta = weight.is_meta
        hook.prepare()
        checkpoints.install(module)
        return hook

    def vectors(self, module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        """(u, v), one of each per estimate, in fp32 also where the module was made narrower."""
        return normalizer.vectors_in(module._buffers, self.name)

    def state(self, module: nn.Module, training: bool) -> State:
        """u, v and the iterations of the forward that comes now."""
        weight = getattr(module, f"{self.name}_orig")
        u, v = self.vectors(module)
        if self.was_meta:
            self.settle(self.call(weight.shape), weight, u, v)
        return u, v, self.iterations(weight, training, self.n_power_iterations)

    def call(self, shape: torch.Size) -> functional.Call:
        """The constants of a call for a weight of this shape."""
        norm, scale, bound, zero_guard = self.method
        dims = functional.estimate_dims(shape, self.dim, norm)
        return functional.make_call([dims], [scale], self.eps, True, bound, zero_guard)

    def compute_weight(self, module: nn.Module, do_power_iteration: bool) -> Tensor:
        """The normalized weight, after ``n_power_iterations`` steps (v, then u) if asked for.

        u and v are updated in place, in the buffers' own storage: ``DataParallel`` relies on it.
        """
        weight = getattr(module, f"{self.name}_orig", None)
        if weight is None:
            raise RuntimeError(
                f"expected {self.name}_orig in {type(module).__name__}: this hook was moved to "
                "another module, as quantize_dynamic does. Quantize fastsn.fold(model)"
            )
        if type(self).reshape_weight_to_matrix is not TorchHook.reshape_weight_to_matrix:
            # A subclass with a matrix of its own: only torch's formula knows no more than that.
            iterates = do_power_iteration and not recompute.is_repeating()
            steps = self.iterations(weight, iterates, self.n_power_iterations)
            return super().compute_weight(module, steps > 0)
        iterates = do_power_iteration and not recompute.is_repeating()
        u, v, iterations = self.state(module, iterates)
        return self.memory.normalize(
            self.call(weight.shape), [weight], u, v, [iterations], keep=self.policy == "step"
        )[0][0]

    def own_pending(self) -> list[Any]:
        """The list by which a grouped call tells that it has set the weight."""
        if not isinstance(self._pending, list):
            self._pending = []
        return self._pending

    def set_weight(self, module: nn.Module, weight: Tensor) -> None:
        """Makes ``weight`` the module's plain attribute ``<name>``."""
        setattr(module, self.name, weight)
        self._latest = weight

    def remove(self, module: nn.Module) -> None:
        """Replaces the hook's attributes by a plain parameter that holds the normalized weight."""
        weight = getattr(module, f"{self.name}_orig")
        owner = placements.owner_of(weight)
        placements.check_is_sharded(owner, weight)
        super().remove(module)
        placements.moved(owner, (module, f"{self.name}_orig"), (module, self.name))
        if owner is not None:
            owner.reset_sharded_param()
        for suffix in ("_u2", "_v2"):
            module._buffers.pop(self.name + suffix, None)

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        weight = recompute.take(self._pending, self, module.training)
        if weight is None:
            weight = self.compute_weight(module, do_power_iteration=module.training)
        elif isinstance(weight, placements.Unscaled):
            weight = weight.normalized(getattr(module, f"{self.name}_orig"))
        self.set_weight(module, weight)

    def __getstate__(self) -> dict[str, Any]:
        passing = ("_latest", "_pending")
        return {k: v for k, v in self.__dict__.items() if k not in passing}

    def __deepcopy__(self, memo: dict[int, Any]) -> SpectralNorm:
        # After a forward the module's weight has a graph behind it and refuses to be copied. The
        # hook is copied before the weight, so it can say here what the copy is: the value.
        if self._latest is not None:
            memo[id(self._latest)] = self._latest.detach().clone()
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return new


def spectral_norm(
    module: T_module,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
    *,
    norm: str = "matrix",
    scale: float = 1.0,
    bound: bool = False,
    zero_guard: bool = False,
) -> T_module:
    r"""Normalizes a weight spectrally before each forward, as ``torch.nn.utils.spectral_norm``
    does.

    .. math::
        W_{SN} = s \, W / \sigma(W), \quad \sigma \approx u^T W v

    with W as a matrix of shape (d_dim, product of the others). With the defaults every number,
    buffer, checkpoint key, random draw and error is torch's, to rounding.

    The parameter moves to ``<name>_orig``; before each forward of ``module``, ``module.<name>``
    becomes the normalized weight, a plain attribute with a graph. In training mode each forward
    performs ``n_power_iterations`` steps (v, then u) and updates the buffers ``<name>_u`` and
    ``<name>_v`` in place; in eval mode none. There is no warm-up. Gradients flow through W and
    sigma, with u and v constant. Unlike torch's, a forward in eval mode followed by one in training
    mode may be followed by the backward of both, and a module can be deep-copied after a forward;
    and what :func:`fastsn.parametrizations.spectral_norm` says of precision, checkpoints, averages
    and evaluation (where ``eval()`` of a module with a hook tells nobody) holds here, too.
    Checkpoints of every form load, see :func:`fastsn.convert_state_dict`.

    Args:
        module: the module that holds the parameter.
        name: the parameter.
        n_power_iterations: steps per forward in training mode, at least 1.
        eps: least norm that u and v are divided by.
        dim: the dimension that counts outputs; default 0, and 1 for transposed convolutions.
        norm, scale, bound, zero_guard: the method, as in
            :func:`fastsn.parametrizations.spectral_norm`; BSN keeps its second pair of vectors in
            ``<name>_u2`` and ``<name>_v2``.

    Returns:
        The module itself.

    Raises:
        KeyError: no parameter of that name.
        ValueError: the parameter is None or uninitialized, ``n_power_iterations`` < 1, an unknown
            norm or a scale that is not finite and positive.
        RuntimeError: the parameter has a spectral norm hook already, or ``dim`` is out of range.
        Sharded weights: as :func:`fastsn.parametrizations.spectral_norm`. ``RowwiseParallel`` must
        come before this call, as the attribute ``<name>`` is in its way.
        The module is unchanged then.

    Warns:
        UserWarning: for the ``out_proj`` of a ``MultiheadAttention``, whose forward never runs, and
            so neither does a hook.

    Example::

        >>> layer = fastsn.spectral_norm(nn.Linear(20, 40))
        >>> layer.weight_u.shape
        torch.Size([40])

    Source: Miyato et al., ICLR 2018 (arXiv 1802.05957); Lin, Sekar, Fanti, NeurIPS 2021
    (arXiv 2009.02773).
    """
    method = functional.check_method(norm, scale, bound, zero_guard)
    if dim is None:
        dim = default_dim(module)
    placements.check(module._parameters.get(name), f"{name} of {type(module).__name__}")
    SpectralNorm.apply(module, name, n_power_iterations, dim, eps, method)
    if isinstance(module, NonDynamicallyQuantizableLinear):
        warnings.warn(
            "MultiheadAttention reads out_proj's weight without calling out_proj, so that this "
            "hook never runs and the weight stays as it is. Use "
            "fastsn.parametrizations.spectral_norm, or fastsn.accelerate on the model, which sets "
            "the weight in every forward.",
            stacklevel=2,
        )
    return module


def remove_spectral_norm(module: T_module, name: str = "weight") -> T_module:
    """Removes the hook of :func:`spectral_norm`, leaving the normalized weight as a new parameter.

    Raises:
        ValueError: there is no such hook.

    Example::

        >>> layer = fastsn.spectral_norm(nn.Linear(40, 10))
        >>> fastsn.remove_spectral_norm(layer)
        Linear(in_features=40, out_features=10, bias=True)
    """
    _torch_remove(module, name)
    # torch looks for this hook but not within the wrapper that registration puts around it; left
    # behind, it would demand the old keys of every checkpoint.
    for key, registered in list(module._load_state_dict_pre_hooks.items()):
        hook = getattr(registered, "hook", registered)
        if isinstance(hook, SpectralNormLoadStateDictPreHook) and hook.fn.name == name:
            del module._load_state_dict_pre_hooks[key]
    checkpoints.uninstall(module)
    return module
