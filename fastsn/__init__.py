"""Spectral normalization for PyTorch, all layers of a model in one fused call."""

from fastsn import functional, hooks, nn, parametrizations
from fastsn.apply import apply
from fastsn.backends import current_backend, use_backend
from fastsn.fold import fold
from fastsn.grouping import accelerate, refresh, sigmas
from fastsn.hooks import remove_spectral_norm, spectral_norm

__version__ = "0.1.0"

__all__ = [
    "accelerate",
    "apply",
    "current_backend",
    "fold",
    "functional",
    "hooks",
    "nn",
    "parametrizations",
    "refresh",
    "remove_spectral_norm",
    "sigmas",
    "spectral_norm",
    "use_backend",
]
