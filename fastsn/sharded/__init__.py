"""Weights whose parts are on several ranks (DTensors): FSDP2 and tensor parallel.

``placements`` asks where a weight lies, ``shares`` says which part of it a rank has, ``power`` and
``scale`` are the operators, ``operators`` all of them for :mod:`fastsn.engine`. torch.distributed
is imported only when a weight belongs to it.
"""
