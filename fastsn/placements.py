"""Where the parts of a weight are: FSDP2, tensor parallel, and what they must know of fastsn.

Everything that looks into ``fully_shard`` or ``distribute_module`` is here. torch.distributed is
imported only when a weight belongs to it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastsn import autocast, functional
from fastsn.backends import is_distributed
from fastsn.functional import Call

__all__ = ["agree", "install", "is_distributed", "moved", "owner_of", "plain", "stand_in"]


def ranks_of(weight: Any) -> Any:
    """What the weights of one call share: None where they are whole, else their mesh and the
    dimension of it along which ranks have different parts.
    """
    if not is_distributed(weight):
        return None
    from fastsn import shares

    return shares.shares_of([weight])[:2]


def of(weight: Any) -> Any:
    """The mesh and the placements of a weight, or None where it is whole."""
    return (weight.device_mesh, weight.placements) if is_distributed(weight) else None


def check(weight: Any, name: str) -> None:
    """Whether a weight lies where it can be normalized.

    Raises:
        ValueError: it is distributed in a way that is not supported; the message has the name.
    """
    if is_distributed(weight):
        from fastsn import shares

        shares.shares_of([weight], [name])


def is_supported(weight: Any) -> bool:
    """Whether :func:`check` finds nothing."""
    try:
        check(weight, "")
    except ValueError:
        return False
    return True


def plain(tensor: Tensor) -> Tensor:
    """A buffer that is whole on this rank, in its own storage.

    ``distribute_module`` makes replicated DTensors of all buffers.
    """
    return tensor.to_local() if is_distributed(tensor) else tensor  # type: ignore[attr-defined]


def stand_in(weight: Tensor) -> Tensor:
    """A plain tensor of the weight's shape, type and device, to draw vectors like; no numbers."""
    if not is_distributed(weight):
        return weight
    local: Tensor = weight.detach().to_local()  # type: ignore[attr-defined]
    return local.new_empty(()).expand(weight.shape)


@contextmanager
def drawable(module: nn.Module, name: str) -> Iterator[None]:
    """Within the block a parameter that is distributed is a plain one without numbers."""
    weight = module._parameters.get(name)
    if weight is None or not is_distributed(weight):
        yield
        return
    plain_one = module._parameters[name] = nn.Parameter(stand_in(weight), weight.requires_grad)
    try:
        yield
    finally:
        for key, parameter in module._parameters.items():
            if parameter is plain_one:
                module._parameters[key] = weight
        if name in module.__dict__:
            module.__dict__[name] = weight.data


@torch.no_grad()
def agree(weight: Tensor, vectors: list[Tensor]) -> None:
    """Makes plain vectors, drawn by every rank for itself, those of the mesh's first rank."""
    if not is_distributed(weight):
        return
    import torch.distributed as dist

    mesh = weight.device_mesh  # type: ignore[attr-defined]
    joined = torch.cat(vectors)
    for group in mesh.get_all_groups():
        dist.broadcast(joined, dist.get_global_rank(group, 0), group)
    for vector, part in zip(vectors, joined.split([len(v) for v in vectors]), strict=True):
        vector.copy_(part)


def _owners() -> Iterator[Any]:
    """The FSDPParam of every parameter that ``fully_shard`` manages in this process."""
    if "torch.distributed.fsdp._fully_shard" not in sys.modules:
        return
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

    for reference in list(_module_state_mapping.values()):
        state = reference()
        if isinstance(state, FSDPState):
            groups = getattr(state, "_fsdp_param_groups", None)
            if groups is None:  # one per module, up to torch 2.10 or so
                group = state._fsdp_param_group
                groups = [] if group is None else [group]
            for group in groups:
                yield from group.fsdp_params


def owner_of(weight: Tensor | None) -> Any | None:
    """The FSDPParam that puts this parameter into its module, or None: nothing manages None.

    Raises:
        RuntimeError: this version of torch does not keep them as those do that are known here.
    """
    try:
        for owner in _owners():
            if weight is owner.sharded_param or weight is getattr(owner, "_unsharded_param", None):
                assert owner._module_info.param_name
                return owner
    except (AttributeError, ImportError) as error:
        raise RuntimeError(
            f"the insides of fully_shard in torch {torch.__version__} are not those that fastsn "
            f"knows ({error}): call spectral_norm before fully_shard, not after it"
        ) from error
    return None


def is_sharding() -> bool:
    """Whether ``fully_shard`` manages anything in this process."""
    module = sys.modules.get("torch.distributed._composable_state")
    return module is not None and len(module._module_state_mapping) > 0


def sources_of(tensors: Sequence[Tensor]) -> list[Tensor] | None:
    """The sharded parameter for each tensor that FSDP2 has gathered, and every other itself.

    FSDP2 writes gathered weights below autograd's version counter: only the source tells changes.
    None where this version of torch does not say which that is.
    """
    if not is_sharding():
        return list(tensors)
    try:
        gathered = {
            id(getattr(owner, "_unsharded_param", None)): owner.sharded_param for owner in _owners()
        }
    except (AttributeError, ImportError):
        return None
    return [gathered.get(id(tensor), tensor) for tensor in tensors]


def moved(owner: Any | None, old: tuple[nn.Module, str], new: tuple[nn.Module, str]) -> None:
    """Tells FSDP2 that the parameter of this :func:`owner_of` is now that of another module.

    It sets its parameters, whole or sharded, into the modules where it found them.
    """
    if owner is None:
        return
    info = owner._module_info
    if (info.module, info.param_name) == old:
        info.module, info.param_name = new
    else:  # a weight that several layers share
        shared = list(zip(info.shared_modules, info.shared_param_names, strict=True))
        i = shared.index(old)
        info.shared_modules[i], info.shared_param_names[i] = new


def check_is_sharded(owner: Any | None, weight: Tensor) -> None:
    """Whether the parameter can be replaced: FSDP2 must not hold it gathered.

    Raises:
        RuntimeError: it does.
    """
    if owner is not None and weight is not owner.sharded_param:
        raise RuntimeError(
            f"the parameter {owner._module_info.param_name!r} of shape {tuple(weight.shape)} is "
            "gathered at present, and what is done to it would be lost: call reshard() of the "
            "module that fully_shard was called for, then try again"
        )


def parametrized_class(module: nn.Module) -> Any:
    """The class that torch has made for a parametrized module.

    ``fully_shard`` derives another one from that, of which ``FSDPModule`` is the first base.
    """
    return next(cls for cls in type(module).__mro__ if issubclass(cls.__bases__[0], nn.Module))


def install(module: nn.Module) -> None:
    """Teaches the class that torch has made for a parametrized module about sharding.

    ``distribute_module`` and what is built on it (``ColwiseParallel``, ``RowwiseParallel``) find a
    plain module with a plain ``weight`` to shard, and put the parts where that parameter was.
    ``remove_parametrizations`` tells FSDP2 where the parameter is then.
    """
    cls = parametrized_class(module)
    before = cls.__bases__[0]

    def named_modules(
        self: nn.Module, memo: Any = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        # The compiler knows no frames, and distributes no module.
        if not torch.compiler.is_compiling() and _is_distributed_by(sys._getframe(1)):
            with _bare(self):
                yield from before.named_modules(self, memo, prefix, remove_duplicate)
        else:
            yield from before.named_modules(self, memo, prefix, remove_duplicate)

    def register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        before.register_parameter(self, name, param)
        owner = owner_of(param)
        if param is not None and owner is not None:
            check_is_sharded(owner, param)
            info = owner._module_info
            if info.shared_modules:
                raise RuntimeError(f"{name} belongs to several layers: remove before fully_shard")
            info.module, info.param_name = self, name
            owner.reset_sharded_param()

    cls.named_modules = named_modules
    cls.register_parameter = register_parameter


def _is_distributed_by(frame: FrameType | None) -> bool:
    """Whether it is torch's ``distribute_module`` that goes through the modules."""
    while frame is not None and frame.f_code.co_name in ("named_modules", "modules"):
        frame = frame.f_back
    return (
        frame is not None
        and frame.f_code.co_name == "distribute_module"
        and frame.f_globals.get("__name__") == "torch.distributed.tensor._api"
    )


@contextmanager
def _bare(module: Any) -> Iterator[None]:
    """Within the block the module is what it was before it was parametrized."""
    parametrized, lists = type(module), module._modules["parametrizations"]
    if not all(own.is_tensor for own in lists.values()):
        yield  # some other parametrization, in terms of several tensors
        return
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module._modules["parametrizations"]
    kinds = {}
    for name, own in lists.items():
        kind = kinds[name] = "_parameters" if "original" in own._parameters else "_buffers"
        getattr(module, kind)[name] = getattr(own, kind).pop("original")
    try:
        yield
    finally:
        for name, own in lists.items():
            getattr(own, kinds[name])["original"] = getattr(module, kinds[name]).pop(name)
        module.__class__ = parametrized
        module._modules["parametrizations"] = lists


class Gathering:
    """The snapshot of a grouped call for weights that were sharded when it was made.

    FSDP2 gathers a weight just before its layer's forward: then it is scaled as a whole, which
    needs no communication in the backward. Those that remain sharded, as in tensor parallel, are
    scaled together, so that their backward communicates once.
    """

    def __init__(
        self, call: Call, weights: list[Tensor], snapshot: Tensor, dtype: torch.dtype | None
    ) -> None:
        self.call, self.weights, self.snapshot, self.dtype = call, weights, snapshot, dtype
        self._needs_graph = torch.is_grad_enabled()
        self._scaled: list[Tensor] | None = None
        self._estimates: list[list[int]] = [[] for _ in weights]  # of every layer
        self._starts = [0]  # of u and v of every estimate, and their end
        for e, (layer, dim) in enumerate(zip(call.layers, call.dims, strict=True)):
            self._estimates[layer].append(e)
            rows = weights[layer].shape[dim]
            columns = math.prod(weights[layer].shape[:dim] + weights[layer].shape[dim + 1 :])
            self._starts.append(self._starts[-1] + rows + columns)

    def parts(self) -> list[Unscaled]:
        """What each layer gets."""
        return [Unscaled(self, layer) for layer in range(len(self.weights))]

    def sharded(self, layer: int) -> Tensor:
        """The normalized weight of a layer that is still sharded."""
        if self._scaled is None:
            with torch.set_grad_enabled(self._needs_graph):
                self._scaled = functional.scale(self.call, self.weights, self.snapshot, self.dtype)
        return self._scaled[layer]

    def whole(self, layer: int, weight: Tensor) -> Tensor:
        """The normalized weight of a layer that has been gathered since."""
        own, sigmas = self._estimates[layer], self._starts[-1]
        call = self.call._replace(
            layers=[0] * len(own),
            dims=[self.call.dims[e] for e in own],
            scales=[self.call.scales[layer]],
        )
        first, end = own[0], own[-1] + 1
        snapshot = torch.cat(
            [
                self.snapshot[self._starts[first] : self._starts[end]],
                self.snapshot[sigmas + first : sigmas + end],
            ]
        )
        dtype = self.dtype if self.dtype == autocast.current(weight.device) else None
        return functional.scale(call, [weight], snapshot, dtype)[0]


class Unscaled:
    """Stands for the normalized weight of one layer of a :class:`Gathering`."""

    dtype = None  # that of a weight which is not there yet

    def __init__(self, gathering: Gathering, layer: int) -> None:
        self._gathering, self._layer = gathering, layer

    def normalized(self, weight: Tensor) -> Tensor:
        """Made from the weight as the layer has it now."""
        if weight is self._gathering.weights[self._layer]:
            return self._gathering.sharded(self._layer)
        return self._gathering.whole(self._layer, weight)
