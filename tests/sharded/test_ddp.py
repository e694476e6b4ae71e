"""DistributedDataParallel on several ranks: the numbers of one process, and u and v that agree."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastsn
from helpers import rank_fixtures
from helpers.answers import answers
from helpers.torch_peers import FASTSN_HOOK, FASTSN_PARAMETRIZED

RANKS = 3
SAMPLES = 2  # of each rank
STEPS = 3
FORMS = {"hook": FASTSN_HOOK.spectral_norm, "parametrized": FASTSN_PARAMETRIZED.spectral_norm}
double = pytest.mark.usefixtures("double")
#: torch 2.13 has another option beside it, which older ones do not know.
buffers_may_stay = pytest.mark.filterwarnings("ignore:`broadcast_buffers` is deprecated")


class Critic(nn.Module):
    def __init__(self, normalize, **options):
        super().__init__()
        self.first = normalize(nn.Conv1d(2, 3, 2), **options)
        self.second = normalize(nn.Linear(9, 6), **options)
        self.last = normalize(nn.Linear(6, 2), **options)
        self.spare = normalize(nn.Linear(2, 3), **options)
        self.uses_spare = True

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(torch.tanh(self.second(torch.tanh(self.first(x)).flatten(1))))
        return y + self.spare(x[:, :, 0]).square().sum(1, keepdim=True) if self.uses_spare else y


class Case(NamedTuple):
    """A model, the wrapper's options, and the loss of a step."""

    loss: str = "difference"
    accelerated: str | None = None  # before or after it was wrapped
    normalize: dict[str, object] = {}
    wrapper: dict[str, object] = {}
    unused: tuple[str, ...] = ()

    def model(self, form: str) -> Critic:
        torch.manual_seed(7)
        model = Critic(FORMS[form], **self.normalize).double()
        model.uses_spare = not self.unused
        return fastsn.accelerate(model) if self.accelerated == "before" else model


BUFFERS = {"broadcast_buffers": False}
CASES = {
    "plain": Case(),
    "buffers stay": Case(wrapper=BUFFERS),
    "accelerated before": Case(accelerated="before", wrapper=BUFFERS),
    "accelerated after": Case(accelerated="after", wrapper=BUFFERS),
    "accelerated, buffers are sent": Case(accelerated="before"),
    "bidirectional": Case(
        accelerated="after",
        normalize={"norm": "bidirectional", "n_power_iterations": 2},
        wrapper=BUFFERS,
    ),
    "penalty": Case("penalty"),
    "penalty, accelerated": Case("penalty", accelerated="before", wrapper=BUFFERS),
    "evaluated first": Case("evaluated first"),
    "evaluated first, accelerated": Case("evaluated first", accelerated="after"),
    "no_sync": Case("accumulated", wrapper=BUFFERS),
    "no_sync, accelerated": Case("accumulated", accelerated="before"),
    "unused": Case(wrapper={"find_unused_parameters": True, **BUFFERS}, unused=("spare",)),
    "unused, accelerated": Case(
        accelerated="before", wrapper={"find_unused_parameters": True}, unused=("spare",)
    ),
    "static graph": Case(wrapper={"static_graph": True}),
    # With gradients of gradients this option is wrong for every model.
    "static graph, accelerated": Case(
        accelerated="before", wrapper={"static_graph": True, **BUFFERS}
    ),
}
each_case = pytest.mark.parametrize(
    "form, case", [(form, case) for form in FORMS for case in CASES], ids=str
)


def difference(critic, real, fake):
    """Two forwards before one backward."""
    (critic(real).square() - critic(fake).tanh()).sum().backward()


def penalty(critic, real, fake):
    """With the slopes at both, differentiated again."""
    x = (real + fake).requires_grad_()
    y = critic(x)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (y.square().sum() + slope.square().sum()).backward()


def evaluated_first(critic, real, fake):
    critic.eval()
    evaluated = critic(real)
    critic.train()
    (evaluated.square() - critic(fake).tanh()).sum().backward()


def accumulated(critic, real, fake):
    """Gradients of two backwards, which only the second one exchanges."""
    parallel = isinstance(critic, DistributedDataParallel)
    with critic.no_sync() if parallel else contextlib.nullcontext():
        difference(critic, real, fake)
    difference(critic, fake, real)


LOSSES = {
    "difference": difference,
    "penalty": penalty,
    "evaluated first": evaluated_first,
    "accumulated": accumulated,
}


def train(case: Case, model: nn.Module, ranks: int, part: slice, rate: float) -> None:
    """Steps on a part of each batch."""
    optimizer = torch.optim.SGD(model.parameters(), rate)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        shape = (2, ranks * SAMPLES, 2, 4)
        real, fake = torch.randn(shape, generator=generator, dtype=torch.float64)[:, part]
        optimizer.zero_grad()
        LOSSES[case.loss](model, real, fake)
        optimizer.step()


RATE = 0.05


def train_in_parallel(case: Case, form: str, group: object, rank: int, ranks: int) -> dict:
    model = case.model(form)
    wrapped = DistributedDataParallel(model, process_group=group, **case.wrapper)
    if case.accelerated == "after":
        fastsn.accelerate(wrapped)
    part = slice(rank * SAMPLES, (rank + 1) * SAMPLES)
    train(case, wrapped, ranks, part, ranks * RATE)  # of the mean over the ranks
    return model.state_dict()


def train_everything() -> dict:
    """What one rank gets."""
    rank = dist.get_rank()
    pair = dist.new_group([0, 1])
    results = {}
    for form in FORMS:
        for name, case in CASES.items():
            results[form, name, RANKS] = train_in_parallel(case, form, None, rank, RANKS)
            if rank < 2:
                results[form, name, 2] = train_in_parallel(case, form, pair, rank, 2)
    return results


started = rank_fixtures.started


@pytest.fixture(scope="module")
def results(started):
    """What each rank has got."""
    return started(RANKS)(train_everything)


@each_case
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_together_are_one_process(form, case, ranks, results):
    """Weights, u and v are those of one process with the joined batch, and those of all ranks."""
    found = [results[rank][form, case, ranks] for rank in range(ranks)]
    model = CASES[case].model(form)
    if CASES[case].accelerated == "after":
        fastsn.accelerate(model)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    train(CASES[case], model, ranks, slice(None), RATE)
    for own in found:
        torch.testing.assert_close(dict(own), dict(model.state_dict()))
        torch.testing.assert_close(own, found[0], rtol=0, atol=0)
    for name, value in start.items():
        # What is not used learns nothing; its u and v move where a grouped call serves it.
        assert not value.equal(found[0][name]) or name.startswith(CASES[case].unused), name


# Where torch's spectral norm fails under DistributedDataParallel


@pytest.fixture
def process_group(tmp_path):
    rendezvous = (tmp_path / "rendezvous").as_uri()
    dist.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@double
@buffers_may_stay
@answers("pytorch#66363", "pytorch#68327", forms=("hook",))
@pytest.mark.parametrize("wrapper", [{}, BUFFERS], ids=["", "buffers stay"])
def test_a_forward_in_eval_mode_before_one_in_training_mode(normalize, wrapper, process_group):
    critic = DistributedDataParallel(Critic(normalize), **wrapper)
    evaluated_first(critic, *torch.randn(2, 2, 2, 4))
    assert all(parameter.grad.abs().sum() for parameter in critic.parameters())


class Attention(nn.Module):
    def __init__(self, normalize):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)
        normalize(self.attention.out_proj)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


@answers("pytorch#78109", forms=("hook",))
@pytest.mark.filterwarnings("ignore:MultiheadAttention reads out_proj")
def test_the_output_projection_of_attention(normalize, process_group):
    """Its hook is never called: with torch the weight has no gradient, which the wrapper awaits."""
    model = Attention(normalize)
    if normalize is fastsn.spectral_norm:
        fastsn.accelerate(model)
    parallel = DistributedDataParallel(model)
    for _ in range(2):
        parallel(torch.randn(3, 2, 4)).square().sum().backward()
    assert model.attention.out_proj.weight_orig.grad.any()
