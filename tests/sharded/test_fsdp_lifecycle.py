"""Models under FSDP2 in use: checkpoints, removal, recomputation, evaluation, errors."""

from __future__ import annotations

import os
import re
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import fastsn
from helpers import rank_fixtures
from helpers.rank_processes import RankFailed, start
from helpers.sharded_models import (
    Critic,
    assert_same,
    build,
    contents,
    full,
    images,
    mesh,
    normalize,
    shard,
    train,
)

started, two = rank_fixtures.started, rank_fixtures.two


def saved(form: str) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    model = build(form, "BSN", "after", True)
    train(model, images, 1)
    options = StateDictOptions(full_state_dict=True)
    state = {
        name: full(value) for name, value in get_model_state_dict(model, options=options).items()
    }
    expected = torch.stack(list(fastsn.sigmas(model).values()))
    train(model, images, 1)  # to something else
    set_model_state_dict(model, {k: v.clone() for k, v in state.items()}, options=options)
    back = torch.stack(list(fastsn.sigmas(model).values()))
    return state, contents(model), torch.stack([expected, back])


@pytest.mark.parametrize("form", ["hook", "parametrization"])
def test_checkpoints_are_those_of_one_process(two, form):
    """Through torch.distributed.checkpoint's state dicts, strictly, there and back."""
    model = build(form, "BSN", "after", True)
    for state, back, sigmas in two(saved, form):
        model.load_state_dict(state, strict=True)
        found = torch.stack(list(fastsn.sigmas(model).values()))
        torch.testing.assert_close(sigmas, found.expand_as(sigmas))
        for name, value in state.items():
            assert torch.equal(back[name], value), name


def removed(form: str) -> dict[str, Tensor]:
    model = build(form, "SN", "after", False)
    train(model, images, 1)
    for layer in (model.features[0], model.mlp[2]):
        if form == "hook":
            fastsn.remove_spectral_norm(layer)
        else:
            parametrize.remove_parametrizations(layer, "weight")
    return train(model, images, 1)


@pytest.mark.parametrize("form", ["hook", "parametrization"])
def test_removing(two, form):
    """The parameter holds the normalized weight, and FSDP2 knows where it is."""
    assert_same(two(removed, form), removed(form))


def remove_gathered() -> None:
    model = build("hook", "SN", "after", False)
    state = contents(model)
    model.unshard()
    assert not isinstance(model.head.weight_orig, DTensor)
    with pytest.raises(RuntimeError, match=re.escape("call reshard()")):
        fastsn.remove_spectral_norm(model.head)
    model.reshard()
    torch.testing.assert_close(contents(model), state, rtol=0, atol=0)
    fastsn.remove_spectral_norm(model.head)
    model(images(0))


def test_removing_from_a_gathered_parameter(two):
    two(remove_gathered)


def applied() -> dict[str, Tensor]:
    torch.manual_seed(1)
    model = Critic().double()
    shard(model)
    torch.manual_seed(2)
    report = fastsn.apply(model, "bsn")
    assert len(report.touched) == 5
    return train(model, images)


def test_apply(two):
    assert_same(two(applied), applied())


def fold_sharded() -> None:
    with pytest.raises(AssertionError, match="state dict"):
        fastsn.fold(build("parametrization", "SN", "after", True))


def test_fold_needs_a_whole_model(two):
    """FSDP2 says so: it lets nobody copy what it shards."""
    two(fold_sharded)


def attend() -> None:
    model = nn.MultiheadAttention(4, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fastsn.spectral_norm(model.out_proj)
    block = fastsn.accelerate(nn.Sequential(model))
    block.forward = lambda x: model(x, x, x)[0]
    fully_shard(model, mesh=mesh())
    fully_shard(block, mesh=mesh())
    x = torch.randn(3, 1, 4)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="weight of .*Linear is sharded by fully_shard"):
            block(x)


def test_hook_of_attention(two):
    """Nobody would set the weight: out_proj is read without a call, and gathered too late."""
    two(attend)


class Checkpointed(Critic):
    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.features, x, use_reentrant=False)
        return self.head(checkpoint(self.mlp, x, use_reentrant=False).tanh())


def recomputed(form: str, accelerated: bool, cls: type[Critic]) -> dict[str, Tensor]:
    torch.manual_seed(1)
    model = cls().double()
    normalize(model, form, "BSN")
    shard(model)
    return train(fastsn.accelerate(model) if accelerated else model, images)


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("form", ["hook", "parametrization"])
def test_recomputation(two, form, accelerated):
    """Activation checkpoints change nothing."""
    expected = recomputed(form, accelerated, Critic)
    assert_same(two(recomputed, form, accelerated, Checkpointed), expected)


def evaluated(accelerated: bool) -> dict[str, Tensor]:
    """Outputs in eval mode before and after the parameters get other values, as an average's."""
    model = build("parametrization", "SN", "after", accelerated).eval()
    outputs = []
    with torch.no_grad():
        for _ in range(3):
            outputs.append(full(model(images(0)).sum()))
            model.reshard() if dist.is_initialized() else None
            for parameter in model.parameters():
                parameter.copy_(parameter * 0.5 + 0.1)
    summed = torch.stack(outputs)
    if dist.is_initialized():
        dist.all_reduce(summed)
    return {"outputs": summed}


@pytest.mark.parametrize("accelerated", [False, True])
def test_evaluation_sees_new_parameters(two, accelerated):
    """FSDP2 gathers them into the same memory, unseen by version counters."""
    assert_same(two(evaluated, accelerated), evaluated(accelerated))


def once_per_step(accelerated: bool) -> dict[str, Tensor]:
    model = build("parametrization", "SN", "after", accelerated)
    fastsn.set_update_policy(model, "step")
    return train(model, images)


@pytest.mark.parametrize("accelerated", [False, True])
def test_once_per_optimizer_step(two, accelerated):
    assert_same(two(once_per_step, accelerated), once_per_step(accelerated))


def deferred(accelerated: bool) -> dict[str, Tensor]:
    """Built on the meta device and sharded there, with values for the parameters alone."""
    with torch.device("meta"):
        model = Critic().double()
        normalize(model, "parametrization", "BSN")
    shard(model)
    model.to_empty(device="cpu")
    torch.manual_seed(1)
    for parameter in model.parameters():
        value = torch.randn(parameter.shape, dtype=torch.float64)
        if isinstance(parameter, DTensor):
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
        with torch.no_grad():
            parameter.copy_(value)
    return train(fastsn.accelerate(model) if accelerated else model, images)


@pytest.mark.parametrize("accelerated", [False, True])
def test_deferred_initialization(two, accelerated):
    """u and v get values, the same on all ranks, in the first forward."""
    assert_same(two(deferred, accelerated), deferred(accelerated))


def normalize_with_unknown_torch() -> None:
    from torch.distributed.fsdp._fully_shard import _fsdp_state

    layer = nn.Linear(3, 4)
    fully_shard(layer, mesh=mesh())
    before = fastsn.parametrizations.spectral_norm(nn.Linear(3, 4))
    fully_shard(before, mesh=mesh())
    x = torch.ones(1, 3)
    before(x)
    hooks = list(layer._forward_pre_hooks)
    original = _fsdp_state.FSDPState
    del _fsdp_state.FSDPState
    try:
        for function in (fastsn.spectral_norm, fastsn.parametrizations.spectral_norm):
            with pytest.raises(RuntimeError, match="call spectral_norm before fully_shard"):
                function(layer)
        with torch.no_grad():  # nothing is kept then, as nobody can tell when a weight changes
            assert torch.equal(before.eval()(x), before(x))
    finally:
        _fsdp_state.FSDPState = original
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert list(layer._forward_pre_hooks) == hooks
    layer(torch.ones(1, 3))


def test_other_versions_of_torch_are_told(two):
    two(normalize_with_unknown_torch)


def read_without_others() -> list[str]:
    """The errors when another rank has died, and when there is no process group any more."""
    model = build("parametrization", "SN", "after", False)
    norm = model.features[0].parametrizations.weight[0]
    before = [vector.clone() for vector in norm.buffers()]
    if dist.get_rank() == 1:
        os._exit(1)
    errors = []
    for end in (lambda: None, dist.destroy_process_group):
        end()
        with pytest.raises(RuntimeError) as caught:
            _ = model.features[0].weight
        errors.append(str(caught.value))
    for vector, old in zip(norm.buffers(), before, strict=True):
        assert torch.equal(vector, old)
    return errors


def test_dead_ranks_and_groups(tmp_path):
    """An error, and u, v as they were; no rank waits for ever."""
    with start(2, tmp_path, timeout=20) as ranks:
        errors, ended = ranks.outcomes(read_without_others)
    assert isinstance(ended, RankFailed)
    assert len(errors) == 2 and all("power iteration" in error for error in errors)
