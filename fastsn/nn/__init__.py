"""Modules with spectrally normalized weights."""

from fastsn.nn.convert import convert_batchnorm
from fastsn.nn.mean_only import MeanOnlyBatchNorm1d, MeanOnlyBatchNorm2d, MeanOnlyBatchNorm3d
from fastsn.nn.modules import (
    BSNConv1d,
    BSNConv2d,
    BSNConv3d,
    BSNConvTranspose1d,
    BSNConvTranspose2d,
    BSNConvTranspose3d,
    BSNEmbedding,
    BSNLinear,
    SNConv1d,
    SNConv2d,
    SNConv3d,
    SNConvTranspose1d,
    SNConvTranspose2d,
    SNConvTranspose3d,
    SNEmbedding,
    SNLinear,
)
from fastsn.nn.msn import (
    MSNConv1d,
    MSNConv2d,
    MSNConv3d,
    MSNConvTranspose1d,
    MSNConvTranspose2d,
    MSNConvTranspose3d,
    MSNLinear,
)
from fastsn.nn.sync import convert_sync_batchnorm

__all__ = [
    "BSNConv1d",
    "BSNConv2d",
    "BSNConv3d",
    "BSNConvTranspose1d",
    "BSNConvTranspose2d",
    "BSNConvTranspose3d",
    "BSNEmbedding",
    "BSNLinear",
    "MSNConv1d",
    "MSNConv2d",
    "MSNConv3d",
    "MSNConvTranspose1d",
    "MSNConvTranspose2d",
    "MSNConvTranspose3d",
    "MSNLinear",
    "MeanOnlyBatchNorm1d",
    "MeanOnlyBatchNorm2d",
    "MeanOnlyBatchNorm3d",
    "SNConv1d",
    "SNConv2d",
    "SNConv3d",
    "SNConvTranspose1d",
    "SNConvTranspose2d",
    "SNConvTranspose3d",
    "SNEmbedding",
    "SNLinear",
    "convert_batchnorm",
    "convert_sync_batchnorm",
]
