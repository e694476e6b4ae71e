"""The functions of :mod:`fastsn.reference` for sharded weights."""

from fastsn.sharded.power import estimate, power_
from fastsn.sharded.scale import scale

__all__ = ["estimate", "power_", "scale"]
