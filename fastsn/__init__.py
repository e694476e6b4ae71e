"""Spectral normalization for PyTorch, all layers of a model in one fused call."""

from fastsn import functional, hooks, nn, parametrizations
from fastsn.backends import current_backend, use_backend
from fastsn.hooks import remove_spectral_norm, spectral_norm
from fastsn.model import accelerate, apply, fold, refresh, sigmas

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
