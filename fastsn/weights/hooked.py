"""The form of ``torch.nn.utils.spectral_norm``: a forward pre-hook that sets the weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.spectral_norm import SpectralNorm as TorchHook
from torch.nn.utils.spectral_norm import SpectralNormLoadStateDictPreHook

from fastsn import engine, recompute
from fastsn.engine import Method
from fastsn.sharded import placements
from fastsn.torch_internals import fsdp, modes
from fastsn.weights import normalizer
from fastsn.weights.gathering import Unscaled
from fastsn.weights.normalizer import Left, Normalizer


class SpectralNorm(Normalizer, TorchHook):
    """The forward pre-hook: sets ``module.<name>`` to the normalized weight before each forward.

    It *is* a torch ``SpectralNorm`` with the arithmetic replaced. A subclass may override
    :meth:`compute_weight`, :meth:`reshape_weight_to_matrix` or :meth:`apply`, as those of torch's
    class do. :func:`fastsn.accelerate` groups objects of this very class; those of subclasses serve
    themselves.

    Example::

        >>> class Doubled(fastsn.hooks.SpectralNorm):
        ...     def compute_weight(self, module, do_power_iteration):
        ...         return 2 * super().compute_weight(module, do_power_iteration)
        >>> layer = nn.Linear(20, 40)
        >>> hook = Doubled.apply(layer, "weight", n_power_iterations=1, dim=0, eps=1e-12)
        >>> layer(torch.randn(3, 20)).shape
        torch.Size([3, 40])
    """

    form = "hook"
    v_first = True

    @classmethod
    def apply(
        cls,
        module: nn.Module,
        name: str,
        n_power_iterations: int,
        dim: int,
        eps: float,
        method: Method = engine.SN,
    ) -> SpectralNorm:
        """Registers the hook; see :func:`fastsn.spectral_norm` for what can go wrong."""
        owner = fsdp.owner_of(module._parameters.get(name))
        with placements.drawable(module, name):
            hook: Any = TorchHook.apply(module, name, n_power_iterations, dim, eps)
        fsdp.moved(owner, (module, name), (module, f"{name}_orig"))
        hook.__class__ = cls
        hook.method = method
        weight = getattr(module, f"{name}_orig")
        for other in engine.estimate_dims(weight.shape, dim, method.norm)[1:]:
            (u,), (v,) = engine.init_vectors(placements.stand_in(weight), [other], eps)
            module.register_buffer(f"{name}_u2", u)
            module.register_buffer(f"{name}_v2", v)
        names = [name + suffix for suffix in ("_u", "_u2", "_v", "_v2")]
        drawn = [module._buffers[own] for own in names if own in module._buffers]
        placements.agree(weight, drawn)  # type: ignore[arg-type]
        hook.was_meta = weight.is_meta
        hook.drawn = None if weight.is_meta else [x.clone() for x in drawn]  # type: ignore
        hook.prepare()
        _let_pickle(type(module))
        return hook

    def vectors(self, holder: Any) -> tuple[list[Tensor], list[Tensor]]:
        return normalizer.vectors_in(holder._buffers, self.name)

    def source(self, module: Any, name: str) -> Tensor | None:
        if self not in module._forward_pre_hooks.values():
            return None
        original = module._parameters.get(f"{name}_orig")
        return module._buffers.get(f"{name}_orig") if original is None else original

    def put(self, module: Any, left: Left, thread: int) -> None:
        # As an attribute, so that MultiheadAttention finds it too: it reads the weight of its
        # out_proj without calling it, and no hook runs.
        if not isinstance(left.normalized, Unscaled):
            _set(module, self.name, left.normalized)
        elif isinstance(module, NonDynamicallyQuantizableLinear):
            raise RuntimeError(
                f"{self.name} of {type(module).__name__} is sharded by fully_shard, and "
                "MultiheadAttention reads it without running hooks: use "
                "fastsn.parametrizations.spectral_norm instead"
            )
        super().put(module, left, thread)

    def compute_weight(self, module: nn.Module, do_power_iteration: bool) -> Tensor:
        """The normalized weight, after ``n_power_iterations`` steps (v, then u) if asked for.

        u and v are updated in place, in the buffers' own storage: ``DataParallel`` relies on it.
        """
        weight = self._original(module)
        if self._has_own_matrix():
            # Only torch's formula knows no more than that.
            moves = do_power_iteration and not recompute.is_repeating()
            state = self.state(module, weight, moves, *self.vectors(module))
            return super().compute_weight(module, state[2] > 0)
        if do_power_iteration == module.training:
            return self.read(module, weight)
        return self._compute(module, weight, do_power_iteration)

    def _has_own_matrix(self) -> bool:
        return type(self).reshape_weight_to_matrix is not TorchHook.reshape_weight_to_matrix

    @torch.no_grad()
    def converge(self, holder: Any, weight: Tensor, n_power_iterations: int) -> None:
        if not self._has_own_matrix():
            super().converge(holder, weight, n_power_iterations)
            return
        for _ in range(-(-n_power_iterations // self.n_power_iterations)):
            TorchHook.compute_weight(self, holder, do_power_iteration=True)

    def _original(self, module: nn.Module) -> Tensor:
        name = f"{self.name}_orig"
        weight = module._parameters.get(name)
        if weight is None:  # not a parameter of its own, or not there
            weight = getattr(module, name, None)
        if weight is None:
            raise RuntimeError(
                f"expected {name} in {type(module).__name__}: this hook was moved to another "
                "module, as quantize_dynamic does. Quantize fastsn.fold(model)"
            )
        return weight

    def remove(self, module: nn.Module) -> None:
        """Replaces the hook's attributes by a plain parameter that holds the normalized weight."""
        weight = getattr(module, f"{self.name}_orig")
        owner = fsdp.owner_of(weight)
        fsdp.check_is_sharded(owner, weight)
        super().remove(module)
        fsdp.moved(owner, (module, f"{self.name}_orig"), (module, self.name))
        fsdp.put_back(owner)
        for suffix in ("_u2", "_v2"):
            module._buffers.pop(self.name + suffix, None)
        # torch looks for this hook but not within the wrapper that registration puts around it;
        # left behind, it would demand the old keys of every checkpoint.
        for key, registered in list(module._load_state_dict_pre_hooks.items()):
            hook = getattr(registered, "hook", registered)
            if isinstance(hook, SpectralNormLoadStateDictPreHook) and hook.fn is self:
                del module._load_state_dict_pre_hooks[key]

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        weight = self.compute_weight(module, do_power_iteration=module.training)
        _set(module, self.name, weight)
        if not modes.is_read_by_dynamo():
            _let_pickle(type(module))  # of a module that comes out of a pickle


def _set(module: nn.Module, name: str, weight: Tensor) -> None:
    """setattr, but for the search that torch's makes before it does this with a plain attribute."""
    is_torchs = type(module).__setattr__ is nn.Module.__setattr__
    if is_torchs and not modes.is_read_by_dynamo() and name in module.__dict__:
        module.__dict__[name] = weight
    else:
        setattr(module, name, weight)


def _let_pickle(cls: Any) -> None:
    """Lets modules of a class be copied and pickled that have this form.

    After a forward such a module has its weight with a graph behind it, which refuses to be copied
    or to be sent to another process. What copies and pickles get is the value. All else is as the
    class, and those it is derived from, had it; an attribute of the module would be copied along
    with its ``__dict__`` and speak of another module then.
    """
    before = getattr(cls, "__getstate__", None)  # none before Python 3.11, but for a class's own
    if getattr(before, "_is_fastsn", False):
        return

    def __getstate__(self: Any) -> Any:
        state = self.__dict__ if before is None else before(self)
        hooks = [h for h in self._forward_pre_hooks.values() if isinstance(h, SpectralNorm)]
        if not hooks or not isinstance(state, dict):
            return state
        state, values = dict(state), {}
        for hook in hooks:
            if isinstance(state.get(hook.name), Tensor):
                normalized = state[hook.name]
                state[hook.name] = values[id(normalized)] = normalized.detach()
        if "_flat_weights" in state:  # of an RNN, which holds them twice
            flat = state["_flat_weights"]
            state["_flat_weights"] = [values.get(id(weight), weight) for weight in flat]
        return state

    __getstate__._is_fastsn = True  # type: ignore[attr-defined]
    cls.__getstate__ = __getstate__


def adopt(module: nn.Module) -> None:
    """Makes the hooks of torch's class that a module has those of fastsn's, in place."""
    for hook in module._forward_pre_hooks.values():
        if type(hook) is TorchHook:
            own: Any = hook
            own.__class__ = SpectralNorm
            own.was_meta = getattr(module, f"{hook.name}_u").is_meta
            own.prepare()
            _let_pickle(type(module))
