"""Checkpoints of every spectral norm: detected when they are loaded, or converted as a whole.

``forms`` knows a single weight, ``convert`` modules and state dicts.
"""
