"""Modules with spectrally normalized weights."""

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

__all__ = [
    "BSNConv1d",
    "BSNConv2d",
    "BSNConv3d",
    "BSNConvTranspose1d",
    "BSNConvTranspose2d",
    "BSNConvTranspose3d",
    "BSNEmbedding",
    "BSNLinear",
    "SNConv1d",
    "SNConv2d",
    "SNConv3d",
    "SNConvTranspose1d",
    "SNConvTranspose2d",
    "SNConvTranspose3d",
    "SNEmbedding",
    "SNLinear",
]
