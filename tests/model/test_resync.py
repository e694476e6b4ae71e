"""u and v of several ranks that have drifted apart become one rank's."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastsn
from helpers import rank_fixtures
from helpers.biggan import Conv, Linear
from helpers.torch_peers import FASTSN_HOOK, FASTSN_PARAMETRIZED, TORCH_HOOK, TORCH_PARAMETRIZED

RANKS = 3


def drifting(kind: str) -> nn.Module:
    """A model with vectors of its own in every process."""
    torch.manual_seed(dist.get_rank())
    if kind == "biggan":
        return fastsn.accelerate(nn.Sequential(Conv(2, 3, 3), Linear(4, 5, transpose=True)))
    if kind == "complex":
        layers = nn.Linear(4, 3, dtype=torch.complex64), nn.Linear(3, 2, dtype=torch.complex128)
        return nn.Sequential(*(FASTSN_PARAMETRIZED.spectral_norm(layer) for layer in layers))
    if kind == "half":
        layers = [FASTSN_HOOK.spectral_norm(nn.Linear(4, 4).bfloat16()) for _ in range(2)]
        if dist.get_rank() == 1:
            layers[0](torch.ones(1, 4).bfloat16())
        return nn.Sequential(*layers)
    if kind == "torch":
        peers = TORCH_HOOK, TORCH_PARAMETRIZED
        return nn.Sequential(*(peer.spectral_norm(nn.Linear(4, 4)) for peer in peers))
    layers = FASTSN_HOOK.spectral_norm(nn.Conv1d(2, 3, 2), norm="bidirectional"), nn.Flatten()
    layers += (FASTSN_PARAMETRIZED.spectral_norm(nn.Linear(9, 4), norm="bidirectional"),)
    layers += (fastsn.nn.BSNConv1d(2, 3, 3), fastsn.nn.MSNLinear(3, 2).double())
    layers += (FASTSN_PARAMETRIZED.spectral_norm(nn.Linear(4, 4), "bias"), nn.BatchNorm1d(4))
    return fastsn.accelerate(nn.Sequential(*layers))


KINDS = ("all forms", "biggan", "complex", "half", "torch")


def recorded(calls: list[tuple[str, int]], name: str) -> None:
    """Notes each use of a collective, and the number of elements that it is given."""
    original = getattr(dist, name)

    def record(tensor: Tensor, *args: object, **options: object) -> object:
        calls.append((name, tensor.numel()))
        return original(tensor, *args, **options)

    setattr(dist, name, record)


def resynced(kind: str, group: object, src: int, calls: list[tuple[str, int]]) -> dict:
    model = drifting(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    places = {name: (value.data_ptr(), value._version) for name, value in model.named_buffers()}
    calls.clear()
    if group != dist.GroupMember.NON_GROUP_MEMBER:
        assert fastsn.resync(DistributedDataParallel(model, init_sync=False), group, src) is None
    made = list(calls)
    moved = {
        name: value.data_ptr() == places[name][0] and value._version > places[name][1]
        for name, value in model.named_buffers()
    }
    return {"before": before, "after": model.state_dict(), "calls": made, "moved": moved}


def between_forward_and_backward() -> tuple[Tensor, Tensor]:
    """The same gradient with u and v exchanged in between, and without."""
    gradients = []
    for exchanged in (False, True):
        torch.manual_seed(dist.get_rank())
        layer = fastsn.spectral_norm(nn.Linear(4, 3))
        loss = layer(torch.ones(2, 4)).sum() + layer.eval()(torch.ones(2, 4)).sum()
        if exchanged:
            fastsn.resync(layer, src=1)
        loss.backward()
        gradients.append(layer.weight_orig.grad)
    return gradients[0], gradients[1]


def refused(make, **options: object) -> tuple[str, bool]:
    """The error, and whether all is as it was."""
    model = make()
    before = [value.clone() for value in model.state_dict().values()]
    try:
        fastsn.resync(model, **options)
    except (RuntimeError, ValueError) as error:
        pairs = zip(model.state_dict().values(), before, strict=True)
        same = all(value.is_meta or value.equal(old) for value, old in pairs)
        return f"{type(error).__name__}: {error}", same
    return "", False


def refusals(pair: object) -> dict[str, tuple[str, bool]]:
    def linear(*args, **options):
        return fastsn.nn.SNLinear(*args, **options)

    rank = dist.get_rank()
    return {
        "shapes": refused(lambda: linear(4, 3 if rank else 5)),
        "names": refused(lambda: nn.ModuleDict({"b" if rank else "a": linear(3, 3)})),
        "numbers": refused(lambda: nn.Sequential(*(linear(3, 3) for _ in range(rank)))),
        "types": refused(lambda: linear(3, 3, dtype=torch.float64 if rank == 2 else None)),
        "none": refused(lambda: nn.Linear(3, 3)),
        "meta": refused(lambda: linear(3, 3, device="meta")),
        "half meta": refused(lambda: linear(3, 3, device="meta" if rank else None)),
        "src": refused(lambda: linear(3, 3), src=RANKS),
        "group": refused(lambda: linear(3, 3), group="all"),
        "member": refused(lambda: linear(3, 3), group=pair, src=2),
    }


def resync_everything() -> dict:
    """What one rank gets."""
    pair = dist.new_group([0, 1])
    calls: list[tuple[str, int]] = []
    for name in ("broadcast", "all_reduce"):
        recorded(calls, name)
    results: dict = {("resync", kind): resynced(kind, None, 1, calls) for kind in KINDS}
    results["resync", "pair"] = resynced("all forms", pair, 1, calls)
    results["between"] = between_forward_and_backward()
    results["refused"] = refusals(pair)
    return results


started = rank_fixtures.started


@pytest.fixture(scope="module")
def results(started):
    """What each rank has got."""
    return started(RANKS)(resync_everything)


def is_vector(name: str) -> bool:
    last = name.rsplit(".", 1)[-1]
    return last.endswith(("_u", "_v", "_u2", "_v2")) or last in ("u0", "sv0")


@pytest.mark.parametrize("kind", [*KINDS, "pair"])
def test_resync(kind, results):
    """u and v become those of one rank, in place; weights and statistics stay."""
    found = [rank["resync", kind] for rank in results]
    right = found[1]["before"]
    for rank, own in enumerate(found):
        takes_part = kind != "pair" or rank < 2
        for name, value in own["after"].items():
            expected = right[name] if takes_part and is_vector(name) else own["before"][name]
            torch.testing.assert_close(value, expected, rtol=0, atol=0, check_dtype=False, msg=name)
        vectors = [name for name in right if is_vector(name)]
        assert any(not own["before"][name].equal(right[name]) for name in vectors) or rank == 1
        if takes_part and kind != "half":  # those of narrow layers are made anew, and wider
            assert all(own["moved"][name] for name in vectors)


def test_what_a_resync_sends(results):
    """A check of two numbers, and one buffer for each type, whatever the number of layers."""
    types = {"all forms": 2, "biggan": 1, "complex": 2, "half": 1, "torch": 1}
    for rank in results:
        for kind, count in types.items():
            right = rank["resync", kind]["before"]
            size = sum(value.numel() for name, value in right.items() if is_vector(name))
            calls = rank["resync", kind]["calls"]
            assert [name for name, _ in calls] == ["all_reduce"] + ["broadcast"] * count
            assert calls[0][1] == 2 and sum(numel for _, numel in calls[1:]) == size
    assert results[2]["resync", "pair"]["calls"] == []


def test_resync_between_forward_and_backward(results):
    for rank in results:
        torch.testing.assert_close(*rank["between"], rtol=0, atol=0)


def test_models_that_differ_are_refused_by_all_ranks(results):
    """None waits for another, and nothing is changed."""
    expected = {
        "shapes": "RuntimeError: expected the same spectrally normalized weights",
        "names": "RuntimeError: expected the same spectrally normalized weights",
        "numbers": "RuntimeError: expected the same spectrally normalized weights",
        "types": "RuntimeError: expected the same spectrally normalized weights",
        "half meta": "RuntimeError: expected the same spectrally normalized weights",
        "none": "ValueError: expected a model with u and v, got Linear without any",
        "meta": "on the meta device",
        "src": "ValueError: src must be one of the group's ranks [0, 1, 2], got 3",
        "group": "ValueError: group must be None or a process group that this process",
    }
    for index, rank in enumerate(results):
        members = "ranks [0, 1], got 2" if index < 2 else "that this process is a member of, got"
        for name, message in {**expected, "member": members}.items():
            error, unchanged = rank["refused"][name]
            assert message in error, name
            assert unchanged, name


def test_resync_without_processes():
    layer = fastsn.spectral_norm(nn.Linear(3, 2))
    u = layer.weight_u.clone()
    with pytest.raises(RuntimeError, match="init_process_group before fastsn.resync"):
        fastsn.resync(layer)
    assert layer.weight_u.equal(u)
