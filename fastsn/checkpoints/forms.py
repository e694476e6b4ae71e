"""The forms in which state dicts hold a normalized weight, and the way from each to each.

===================  =============================================================================
form                 keys of a parameter ``weight``
===================  =============================================================================
``hook``             ``weight_orig``, ``weight_u``, ``weight_v``: ``torch.nn.utils.spectral_norm``
                     (of old: ``weight``, the normalized weight, in place of ``weight_v``)
``parametrization``  ``parametrizations.weight.original``, ``parametrizations.weight.0._u``, ``_v``
``biggan``           ``weight``, ``u0`` (1, rows), ``sv0`` (1): BigGAN-PyTorch, which keeps no v
``mimicry``          ``weight``, ``sn_u`` (1, rows), ``sn_sigma`` (1): mimicry, which keeps no v
``plain``            ``weight``
===================  =============================================================================

The first two have ``u2`` and ``v2`` besides, where BSN has a second matrix. In this module a weight
is a dictionary of its *roles*: ``weight``, ``u``, ``v``, ``u2``, ``v2`` and ``sigma``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count, takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsn import engine, layout
from fastsn.engine import Method, Pass
from fastsn.weights import find

_LIST = "parametrizations.{}."
KEYS: dict[str, dict[str, str]] = {
    "hook": {"weight": "{}_orig", "u": "{}_u", "v": "{}_v", "u2": "{}_u2", "v2": "{}_v2"},
    "parametrization": {
        "weight": _LIST + "original",
        **{role: f"{_LIST}0._{role}" for role in ("u", "v", "u2", "v2")},
    },
    "biggan": {"weight": "{}", "u": "u0", "sigma": "sv0"},
    "mimicry": {"weight": "{}", "u": "sn_u", "sigma": "sn_sigma"},
    "plain": {"weight": "{}"},
}
WITHOUT_V = ("biggan", "mimicry")
VECTORS = ("u", "v", "u2", "v2")
# For a weight that comes without vectors. A large random matrix is the slowest there is: 15 steps,
# as at registration, leave its sigma 2% too small; these, 0.1%.
_STEPS = 100

Roles = dict[str, Tensor]


class Norm(NamedTuple):
    """How a weight is normalized, as far as it is known."""

    name: str
    form: str | None = None
    dim: int | None = None
    method: Method = engine.SN
    eps: float = 1e-12
    shape: torch.Size | None = None
    is_ours: bool = False


class Entry(NamedTuple):
    """A weight of a state dict: the form it has, its roles, and all keys that belong to it."""

    prefix: str
    name: str
    form: str
    roles: Roles
    keys: list[str]


def norms(module: Any) -> Iterator[Norm]:
    """How the weights of this very module are normalized, by fastsn, torch, BigGAN or mimicry."""
    for weight in find.of_module(module):
        if not weight.is_first:
            continue
        norm, shape = weight.norm, weight.original().shape
        if weight.form == "biggan":
            dim = 1 if module.transpose else 0
            yield Norm("weight", "biggan", dim, eps=module.eps, shape=shape, is_ours=weight.is_ours)
        elif weight.form == "mimicry":
            yield Norm("weight", "mimicry", 0, shape=shape)
        else:
            method = getattr(norm, "method", None) or engine.SN
            name, form, is_ours = weight.tensor_name, weight.form, weight.is_ours
            yield Norm(name, form, norm.dim, method, norm.eps, shape, is_ours)


# State dicts


def keys_of(form: str, prefix: str, name: str) -> dict[str, str]:
    return {role: prefix + key.format(name) for role, key in KEYS[form].items()}


def look(state: Mapping[str, Any], form: str, prefix: str, name: str) -> Entry:
    """What there is of a weight in one form."""
    keys = {role: key for role, key in keys_of(form, prefix, name).items() if key in state}
    roles = {role: state[key] for role, key in keys.items()}
    taken = list(keys.values())
    if form in WITHOUT_V:
        roles |= {role: roles[role].flatten() for role in ("u", "sigma") if role in roles}
    if form == "biggan":
        # Further singular values, which are kept for the log only.
        for start in ("u", "sv"):
            further = (f"{prefix}{start}{i}" for i in count(1))
            taken += takewhile(state.__contains__, further)
    if form == "hook" and roles.keys() == {"weight", "u"} and prefix + name in state:
        taken.append(prefix + name)
        roles["sigma"] = _sigma_of_old(roles["weight"], state[prefix + name])
    return Entry(prefix, name, form, roles, taken)


def missing(found: Entry) -> list[str]:
    """The keys without which a form is not whole."""
    form, roles = found.form, found.roles
    needed = set(KEYS[form]) - {"u2", "v2"}
    if roles.keys() & {"u2", "v2"}:
        needed |= {"u2", "v2"}
    if form == "hook" and "sigma" in roles:
        needed.remove("v")
    if form == "parametrization" and "weight" in roles and roles["weight"].ndim == 1:
        needed = {"weight"}  # whose norm is exact
    keys = keys_of(form, found.prefix, found.name)
    return [key for role, key in keys.items() if role in needed and role not in roles]


def others(state: Mapping[str, Any], found: Entry) -> list[str]:
    """The keys of parametrizations besides the spectral norm."""
    if found.form != "parametrization":
        return []
    start = found.prefix + _LIST.format(found.name)
    return [key for key in state if key.startswith(start) and key not in found.keys]


def read(state: Mapping[str, Any], prefix: str, name: str) -> Entry | None:
    """The weight ``name`` of the module ``prefix`` in whatever form a state dict holds it.

    None if it is not there, or not all of it.
    """
    for form in KEYS:
        if form in WITHOUT_V and name != "weight":
            continue
        if form == "plain" and any(f"{prefix}{name}_{role}" in state for role in ("orig", "u")):
            continue
        found = look(state, form, prefix, name)
        if "weight" in found.roles and not missing(found) and not others(state, found):
            return found
    return None


def written(form: str, prefix: str, name: str, roles: Roles) -> Roles:
    """The entries of a state dict for a weight in one form."""
    if form in WITHOUT_V:
        roles = roles | {"u": roles["u"].reshape(1, -1), "sigma": roles["sigma"].reshape(1)}
    keys = keys_of(form, prefix, name)
    return {key: roles[role] for role, key in keys.items() if role in roles}


# From one form to another


def misfit(found: Entry, norm: Norm) -> str | None:
    """The role whose shape is not that of the others, or of the model."""
    roles, shape = found.roles, found.roles["weight"].shape
    if norm.shape is not None and shape != norm.shape:
        return "weight"
    dims = range(len(shape)) if norm.dim is None else [norm.dim]
    if "u" in roles and all(roles["u"].shape != (shape[dim],) for dim in dims):
        return "u"
    for u, v in (("u", "v"), ("u2", "v2")):
        if v in roles and (roles[v].ndim != 1 or len(roles[u]) * len(roles[v]) != shape.numel()):
            return v
    return None


def widened(vector: Tensor, weight: Tensor) -> Tensor:
    """A vector of u and v, in fp32 where it is narrower."""
    return vector.to(torch.promote_types(vector.dtype, layout.accumulate_type(weight)))


def _call(norm: Norm, dims: list[int]) -> engine.Call:
    return engine.make_call([dims], norm.method, norm.eps, True)


def _vectors(roles: Roles) -> tuple[list[Tensor], list[Tensor]]:
    u, v = (
        [widened(roles[role], roles["weight"]) for role in pair if role in roles]
        for pair in (("u", "u2"), ("v", "v2"))
    )
    return u, v


def _sigma(norm: Norm, dims: list[int], roles: Roles) -> Tensor:
    """The absolute value of the estimate that vectors give."""
    call, u, v = _call(norm, dims), *_vectors(roles)
    weight = roles["weight"].detach()
    snapshot = engine.iterate(Pass(call, [weight], u[: len(dims)], v[: len(dims)], [0]))
    return layout.sigmas_of(snapshot, call.layers)[0].abs()


def _dims(norm: Norm, roles: Roles) -> list[int]:
    """The dimensions that count the rows of each matrix.

    Where nobody says so, one whose length u has. Of several, the one for which u and v are singular
    vectors: the others leave next to nothing of sigma. Without a v to tell by, the first.
    """
    shape, dim = roles["weight"].shape, norm.dim
    if dim is None:
        fitting = [d for d, length in enumerate(shape) if roles["u"].shape == (length,)]
        dim = fitting[0]
        if len(fitting) > 1 and "v" in roles:
            dim = max(fitting, key=lambda d: float(_sigma(norm, [d], roles)))
    kind = "bidirectional" if "u2" in roles else norm.method.norm
    return list(engine.estimate_dims(shape, dim, kind))


def _iterated(
    weight: Tensor, dim: int, eps: float, u: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """u and v of a weight that came without them, or with u alone.

    From u, one step, as the forms that keep no v do in eval mode. From nothing, many steps from
    vectors that depend on the shape only.
    """
    weight = weight.detach()
    wide = layout.accumulate_type(weight)
    generator = torch.Generator("cpu").manual_seed(0)
    rows = weight.shape[dim]
    start = []
    for length in (rows, weight.numel() // max(rows, 1)):
        drawn = torch.randn(length, generator=generator, dtype=wide, device="cpu")
        start.append((drawn / torch.linalg.vector_norm(drawn)).to(weight.device))
    if u is not None:
        start[0] = u.detach().to(weight.device, wide, copy=True)
    # zero_guard: a weight of zeros keeps vectors that another weight can use.
    call = engine.make_call([(dim,)], Method(zero_guard=True), eps, True)
    engine.iterate(Pass(call, [weight], start[:1], start[1:], [_STEPS if u is None else 1]))
    return start[0], start[1]


def _sigma_of_old(weight: Tensor, normalized: Tensor) -> Tensor:
    wide = layout.accumulate_type(weight)
    norm = torch.linalg.vector_norm(weight.detach(), dtype=wide)
    return norm / torch.linalg.vector_norm(normalized.detach(), dtype=wide)


def _v_of_old(norm: Norm, dim: int, roles: Roles) -> Tensor:
    """A unit v with u^T W v = sigma, for the hook form of old, which kept u and W / sigma.

    W^T u gives at least sigma: v leans away from it by as much as is needed.
    """
    _, v = _iterated(roles["weight"], dim, norm.eps, roles["u"])
    largest = _sigma(norm, [dim], roles | {"v": v})
    cosine = (roles["sigma"] / largest).clamp_max(1)
    away = torch.zeros_like(v)
    away[v.abs().argmin()] = 1
    away = away - torch.vdot(v, away) * v
    length = torch.linalg.vector_norm(away).clamp_min(torch.finfo(v.dtype).tiny)
    return cosine * v + (1 - cosine * cosine).sqrt() * away / length


def _completed(found: Entry, norm: Norm) -> Roles:
    """The roles with a u and a v for every matrix; those that were there stay as they are."""
    roles = dict(found.roles)
    dims = _dims(norm, roles)
    if found.form == "hook" and "v" not in roles:
        roles["v"] = _v_of_old(norm, dims[0], roles)
    elif "v" not in roles:
        roles["u"], roles["v"] = _iterated(roles["weight"], dims[0], norm.eps, roles.get("u"))
    if len(dims) > 1 and "u2" not in roles:
        roles["u2"], roles["v2"] = _iterated(roles["weight"], dims[1], norm.eps)
    return roles


@torch.no_grad()
def converted(found: Entry, form: str, norm: Norm) -> Roles:
    """The roles of a weight in another form."""
    weight = found.roles["weight"]
    if found.form == form == "plain" or {found.form, form} <= set(WITHOUT_V):
        return found.roles
    if weight.ndim == 1 and form == "parametrization":
        return {"weight": weight}
    if weight.ndim == 1 and (found.form, form) == ("parametrization", "plain"):
        return {"weight": engine.normalize_vector(weight.detach(), norm.eps, norm.method)}
    roles = _completed(found, norm)
    if form == "plain":
        call, u, v = _call(norm, _dims(norm, roles)), *_vectors(roles)
        return {"weight": engine.normalize(Pass(call, [weight.detach()], u, v, [0]))[0][0]}
    if form in WITHOUT_V:
        roles["sigma"] = _sigma(norm, _dims(norm, roles), roles)
    return roles
