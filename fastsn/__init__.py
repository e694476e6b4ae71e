"""Spectral normalization for PyTorch, all layers of a model in one fused call."""

from fastsn import functional, hooks, nn, parametrizations
from fastsn.backends import current_backend, use_backend
from fastsn.checkpoints.convert import convert_state_dict
from fastsn.grouping import accelerate, refresh, sigmas
from fastsn.hooks import remove_spectral_norm, spectral_norm
from fastsn.model.apply import apply
from fastsn.model.fold import fold
from fastsn.model.policy import (
    advance,
    cached,
    converge,
    frozen,
    reset_parameters,
    set_update_policy,
)
from fastsn.model.resync import resync
from fastsn.model.sigma_logger import SigmaLogger
from fastsn.model.unnormalized import unnormalized

__version__ = "0.1.0"

__all__ = [
    "SigmaLogger",
    "accelerate",
    "advance",
    "apply",
    "cached",
    "converge",
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
    "unnormalized",
    "use_backend",
]
