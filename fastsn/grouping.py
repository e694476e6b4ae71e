"""The layers of a whole model in one call, and the calls that users make for it."""

from __future__ import annotations

import inspect
import types
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastsn import autocast, functional, parametrizations, placements, recompute, reference
from fastsn.functional import Call
from fastsn.layers import Layer, ParametrizedLayer, find, take_over
from fastsn.memory import Memory
from fastsn.normalizer import State

__all__ = ["accelerate", "refresh", "sigmas"]

T_module = TypeVar("T_module", bound=nn.Module)
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


# All u, all v, and the iterations of every layer.
States = tuple[list[Tensor], list[Tensor], list[int]]


class Batch(NamedTuple):
    """Layers that one call of the operators serves, and the constants of that call."""

    layers: list[Layer]
    call: Call
    keeps_sigma: bool
    dtype: torch.dtype | None  # of the normalized weights, if not their own
    memory: Memory

    def run(self, weights: list[Tensor]) -> list[Tensor]:
        """The normalized weights; iterates as the layers' modes say."""
        u, v, iterations = self._states(weights)
        keep = any(layer.norm.policy == "step" for layer in self.layers)
        normalized, snapshot = self.memory.normalize(
            self.call, weights, u, v, iterations, self.dtype, keep
        )
        if self.keeps_sigma:
            self._keep_sigmas(snapshot)
        return normalized

    def _states(self, weights: list[Tensor]) -> States:
        """Those of the layers, for the forward that comes now."""
        return _joined(map(_rest if recompute.is_repeating() else _step, self.layers, weights))

    def gather(self, weights: list[Tensor]) -> list[placements.Unscaled]:
        """As :meth:`run`, for weights that are sharded now and perhaps whole when they are read."""
        u, v, iterations = self._states(weights)
        snapshot = self.memory.snapshot(self.call, weights, u, v, iterations)
        if self.keeps_sigma:
            self._keep_sigmas(snapshot)
        return placements.Gathering(self.call, weights, snapshot, self.dtype).parts()

    def _keep_sigmas(self, snapshot: Tensor) -> None:
        sigmas = reference.sigmas_of(snapshot, self.call.layers)
        for layer, sigma in zip(self.layers, sigmas, strict=True):
            layer.keep_sigma(sigma)

    def sigmas(self, weights: list[Tensor]) -> list[Tensor]:
        """The sigma of every layer that a forward in eval mode would use; changes nothing."""
        u, v, iterations = _joined(map(_rest, self.layers, weights))
        if any(iterations):
            snapshot = functional.iterate(self.call, weights, u, v, iterations)
        else:
            snapshot = self.memory.estimate(self.call, weights, u, v)
        return reference.sigmas_of(snapshot, self.call.layers)


def _step(layer: Layer, weight: Tensor) -> State:
    return layer.step(weight)


def _rest(layer: Layer, weight: Tensor) -> State:
    return layer.rest(weight)


def _joined(states: Iterable[State]) -> States:
    """All u, all v, and the iterations of every layer."""
    u: list[Tensor] = []
    v: list[Tensor] = []
    iterations: list[int] = []
    for own_u, own_v, own_iterations in states:
        u += own_u
        v += own_v
        iterations.append(own_iterations)
    return u, v, iterations


Kind = tuple[torch.device, torch.dtype, Any]
Planned = list[tuple[Batch, list[Tensor]]]


def _plan(layers: Iterable[Layer], low: torch.dtype | None = None) -> list[Batch]:
    """The layers sorted into as few calls as their devices, types and constants allow.

    Weights that autocast would cast are computed in its type ``low``.
    """
    found: dict[tuple[Any, ...], list[tuple[Layer, Call]]] = {}
    for layer in layers:
        call, weight = layer.call(), layer.weight()
        assert weight is not None, "a layer that was just found has its weight"
        kind = (weight.device, reference.accumulate_type(weight), placements.ranks_of(weight))
        dtype = low if weight.dtype == torch.float32 and layer.casts() else None
        key = (*kind, call.eps, call.v_first, call.bound, call.zero_guard, dtype)
        found.setdefault(key, []).append((layer, call))
    batches = []
    for key, members in found.items():
        call = members[0][1]._replace(
            layers=[i for i, (_, own) in enumerate(members) for _ in own.layers],
            dims=[dim for _, own in members for dim in own.dims],
            scales=[scale for _, own in members for scale in own.scales],
        )
        keeps_sigma = any(layer.keeps_sigma for layer, _ in members)
        layers = [layer for layer, _ in members]
        batches.append(Batch(layers, call, keeps_sigma, key[-1], Memory()))
    return batches


class Group:
    """All layers below one root module. As hooks of the root it serves each of its forwards."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self._find()

    def _find(self) -> None:
        self.layers = list(find(self.root))
        self._plans: dict[torch.dtype | None, tuple[list[Batch], list[Kind | None]]] = {}
        for layer in self.layers:
            # The compiler changes no class; the way through torch's property serves as well.
            if isinstance(layer, ParametrizedLayer) and not torch.compiler.is_compiling():
                parametrizations.install_shortcut(layer.module, layer.tensor_name)
        self._plan(None)

    def _plan(self, low: torch.dtype | None) -> tuple[list[Batch], list[Kind | None]]:
        # Those that are split in a way which no call can serve may be gathered when they are read.
        served = [layer for layer in self.layers if placements.is_supported(layer.weight())]
        batches = _plan(served, low)
        kinds = [_kind(layer.weight()) for batch in batches for layer in batch.layers]
        self._plans[low] = batches, kinds
        return batches, kinds

    # A copy has layers of its own, which it finds when they are all there.
    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "layers": [], "_plans": {None: ([], [None])}}

    def batches(self, low: torch.dtype | None = None) -> Planned:
        """The calls to make and their weights, planned anew when layers came, went or changed."""
        batches, kinds = self._plans.get(low) or self._plan(low)
        planned = [(batch, [layer.weight() for layer in batch.layers]) for batch in batches]
        if [_kind(weight) for _, weights in planned for weight in weights] != kinds:
            self._find()
            batches, _ = self._plans.get(low) or self._plan(low)
            planned = [(batch, [layer.weight() for layer in batch.layers]) for batch in batches]
        return planned  # type: ignore[return-value]  # a weight that is None changes the kinds

    def _low(self) -> torch.dtype | None:
        """The type that autocast would cast the weights of this forward to, if it is on."""
        # The compiler fuses the cast; torch's cache of parametrizations outlives autocast.
        if torch.compiler.is_compiling() or parametrize._cache_enabled or not self.layers:
            return None
        weight = self.layers[0].weight()
        return None if weight is None else autocast.current(weight.device)

    def before(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook of the root: computes all weights and hands them to the layers."""
        # A replica of DataParallel shares this hook but not its layers; they serve themselves.
        if module is not self.root:
            return
        if any(layer.pending for layer in self.layers):
            if torch.compiler.is_compiling() or _is_within_a_root():
                return  # that root has served the layers already
            # Left by a forward that was interrupted from outside: no hook has heard of its end.
            self.after(module, args, None)
        for batch, weights in self.batches(self._low()):
            serve = batch.gather if placements.is_distributed(weights[0]) else batch.run
            for layer, weight in zip(batch.layers, serve(weights), strict=True):
                layer.put(weight)

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the root: a weight that nothing has read must not be read later."""
        if module is self.root:
            for layer in self.layers:
                if layer.pending:
                    layer.pending.clear()


def _of_its_own(method: Any) -> Any:
    """The method with a code object of its own: the compiler limits the graphs of each."""
    function = method.__func__
    own = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return types.MethodType(own, method.__self__)


def _is_within_a_root() -> bool:
    """Whether another accelerated root is being called, besides the one whose hook asks."""
    calls = 0
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "_call_impl":
            module = frame.f_locals.get("self")
            calls += isinstance(module, nn.Module) and bool(_groups(module))
        frame = frame.f_back
    return calls > 1


def _kind(weight: Tensor | None) -> Kind | None:
    if type(weight) is nn.Parameter or weight is None:
        return None if weight is None else (weight.device, weight.dtype, None)
    return weight.device, weight.dtype, placements.of(weight)


def _groups(module: nn.Module) -> list[tuple[dict[int, Any], int, Group]]:
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
    """Takes back what :func:`accelerate` did to this very module: its layers serve themselves."""
    for registered, key, _ in _groups(module):
        del registered[key]
        module._forward_hooks_always_called.pop(key, None)


def _batches_of(model: nn.Module) -> Planned:
    group = next((own for _, _, own in _groups(model) if own.root is model), None)
    if group is not None:
        planned = group.batches()
        if sum(len(batch.layers) for batch, _ in planned) == len(group.layers):
            return planned
    layers = group.layers if group is not None else list(find(model))
    for layer in layers:
        placements.check(layer.weight(), layer.name)
    return [
        (batch, [layer.weight() for layer in batch.layers])  # type: ignore[misc]
        for batch in _plan(layers)
    ]


def accelerate(model: T_module) -> T_module:
    """Serves all spectrally normalized weights of a model by one fused call per forward.

    Takes over, in place, the layers that carry ``torch.nn.utils.spectral_norm``,
    ``torch.nn.utils.parametrizations.spectral_norm``, fastsn's own, or a ``W_()`` method as in
    BigGAN-PyTorch. Numbers, buffers, parameters and checkpoint keys stay what they were, to
    rounding.

    Each forward of ``model`` computes the normalized weights of all layers below it at once, one
    power iteration step as configured in training mode, none in eval mode, and the first read of a
    layer's weight in that forward finds it. Every other read computes by itself, as before: a layer
    used a second time in the same forward (torch iterates for each use), a sub-module called on its
    own, a weight read outside. Under autocast, the weights of torch's linear layers and
    convolutions (parametrization form) come in autocast's type at once, which are the numbers that
    autocast would round them to; where a part of the forward turns autocast off, in their own.
    Two forwards before one backward are safe. The one difference from
    torch: a layer that a forward does not use iterates too. Calling ``accelerate`` again takes in
    layers that were added since.

    Args:
        model: the module whose forward is called in training, for example a discriminator. Of a
            ``DataParallel`` or ``DistributedDataParallel``, the module within is accelerated.

    Returns:
        The model itself.

    Warns:
        UserWarning: no layer was found.

    Example::

        >>> from torch.nn.utils.parametrizations import spectral_norm
        >>> model = nn.Sequential(spectral_norm(nn.Conv2d(3, 64, 3)), nn.ReLU(), nn.Flatten(),
        ...                       spectral_norm(nn.Linear(64, 1)))
        >>> model = fastsn.accelerate(model)
    """
    if isinstance(model, _WRAPPERS):
        accelerate(model.module)
        return model
    take_over(model)
    remove(model)
    group = Group(model)
    if not group.layers:
        warnings.warn(
            f"fastsn.accelerate found no layer with spectral norm in {type(model).__name__}",
            stacklevel=2,
        )
    model.register_forward_pre_hook(_of_its_own(group.before), prepend=True)
    model.register_forward_hook(_of_its_own(group.after), always_call=True)
    return model


def refresh(model: nn.Module) -> dict[str, Tensor]:
    """All normalized weights of a model at once, with their graph.

    The call that :func:`accelerate` makes for each forward: in training mode every layer iterates,
    in eval mode none does.

    Returns:
        ``{"conv1.weight": normalized weight, ...}``, for fastsn's layers and those taken over.

    Example::

        >>> weights = fastsn.refresh(model)
        >>> penalty = sum(w.square().sum() for w in weights.values())
    """
    return {
        layer.name: layer.finish(weight)
        for batch, weights in _batches_of(model)
        for layer, weight in zip(batch.layers, batch.run(weights), strict=True)
    }


@torch.no_grad()
def sigmas(model: nn.Module) -> dict[str, Tensor]:
    """The present estimate of sigma of every layer, without iterating or waiting for a device.

    sigma = u^T M v with the present weight and the u, v of the last forward (BSN: the mean over
    both matrices): what a forward in eval mode divides by.

    Returns:
        ``{"conv1.weight": 0-d tensor, ...}`` in fp32 or wider, without gradient.

    Example::

        >>> {name: float(sigma) for name, sigma in fastsn.sigmas(model).items()}
    """
    return {
        layer.name: sigma
        for batch, weights in _batches_of(model)
        for layer, sigma in zip(batch.layers, batch.sigmas(weights), strict=True)
    }
