"""``fastsn.nn.convert_sync_batchnorm``: statistics of all processes, for norms of every kind."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastsn.means import Group
from fastsn.nn.batch_norms import MSNBatchNorm
from fastsn.nn.mean_only import MeanOnly

__all__ = ["convert_sync_batchnorm"]


def convert_sync_batchnorm(module: nn.Module, process_group: Group = "world") -> Any:
    """Synchronizes all batch norms of a model, those of MSN and mean-only layers in place.

    In training the batches of all processes then count as one, ``mean = sum of x over all of them /
    their number``; eval mode does not change. Every other batch norm becomes a
    ``nn.SyncBatchNorm``, by ``nn.SyncBatchNorm.convert_sync_batchnorm``, which refuses models with
    MSN or mean-only layers: it would give them a variance.

    Args:
        module: a model, or a single layer. Convert before wrapping it in
            ``DistributedDataParallel``.
        process_group: ``"world"`` for the default group, which need not exist yet, or a group.

    Returns:
        The module itself; where it is a batch norm with a variance, the ``nn.SyncBatchNorm``.

    Raises:
        ValueError: another ``process_group``. Nothing is changed then.

    Example::

        >>> model = nn.Sequential(fastsn.nn.MSNConv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8))
        >>> model = fastsn.nn.convert_sync_batchnorm(model)
        >>> model[0].process_group, type(model[2]).__name__
        ('world', 'SyncBatchNorm')
    """
    if process_group is None or (isinstance(process_group, str) and process_group != "world"):
        raise ValueError(f'process_group must be "world" or a group, got {process_group!r}')
    if isinstance(module, MeanOnly):
        module.process_group = process_group
    elif isinstance(module, _BatchNorm):
        group = None if process_group == "world" else process_group
        return nn.SyncBatchNorm.convert_sync_batchnorm(module, group)
    for name, child in module.named_children():
        if not isinstance(child, MSNBatchNorm):
            module.add_module(name, convert_sync_batchnorm(child, process_group))
    return module
