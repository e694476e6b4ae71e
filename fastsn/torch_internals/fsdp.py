"""The tables of ``fully_shard`` (FSDP2): which module each parameter is put into."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def is_sharding() -> bool:
    """Whether ``fully_shard`` manages anything in this process."""
    module = sys.modules.get("torch.distributed._composable_state")
    return bool(getattr(module, "_module_state_mapping", None))


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


def put_back(owner: Any | None) -> None:
    """Lets FSDP2 take what is in the module now for its sharded parameter."""
    if owner is not None:
        owner.reset_sharded_param()


def moved_back(module: nn.Module, name: str, param: Tensor | None) -> None:
    """What :func:`moved` and :func:`put_back` do, for a parameter that its module has again.

    Raises:
        RuntimeError: FSDP2 holds it gathered, or several layers share it.
    """
    owner = owner_of(param)
    if param is None or owner is None:
        return
    check_is_sharded(owner, param)
    info = owner._module_info
    if info.shared_modules:
        raise RuntimeError(f"{name} belongs to several layers: remove before fully_shard")
    info.module, info.param_name = module, name
    put_back(owner)


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
