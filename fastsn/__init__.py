"""Spectral normalization for PyTorch, all layers of a model in one fused call."""

from fastsn import functional, hooks, nn, parametrizations
from fastsn.apply import apply
from fastsn.backends import current_backend, use_backend
from fastsn.checkpoints import convert_state_dict
from fastsn.distributed import resync
from fastsn.fold import fold
from fastsn.grouping import accelerate, refresh, sigmas
from fastsn.hooks import remove_spectral_norm, spectral_norm
from fastsn.policy import frozen, reset_parameters, set_update_policy
from fastsn.sigma_logger import SigmaLogger

__version__ = "0.1.0"

__all__ = [
    "SigmaLogger",
    "accelerate",
    "apply",
    "convert_state_dict",
    "current_backend",
    "fold",
    "frozen",
    "functional",
    "hooks",
    "nn",
    "parametrizations",
    "refresh",
    "remove_spectral_norm",
    "reset_parameters",
    "resync",
    "set_update_policy",
    "sigmas",
    "spectral_norm",
    "use_backend",
]
