"""Models that are trained on one process and on several ranks, to the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import fastsn

LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.Embedding)
NORMS = {"SN": "matrix", "BSN": "bidirectional"}


def mesh() -> DeviceMesh:
    """All ranks in one dimension."""
    return init_device_mesh("cpu", (dist.get_world_size(),))


def ranks_count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def own(whole: Tensor) -> Tensor:
    """This rank's part of a batch."""
    return whole.chunk(ranks_count())[dist.get_rank()] if dist.is_initialized() else whole


def full(tensor: Tensor) -> Tensor:
    """A copy in one piece."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().clone()


def normalize(model: nn.Module, form: str, norm: str) -> None:
    """Normalizes every layer, in one of fastsn's two forms."""
    function = fastsn.spectral_norm if form == "hook" else fastsn.parametrizations.spectral_norm
    for module in list(model.modules()):
        if isinstance(module, LAYERS):
            function(module, norm=NORMS[norm])


def train(model: nn.Module, batches: Callable[[int], Tensor], steps: int = 3) -> dict[str, Any]:
    """Steps with two forwards before one backward; all that a model consists of after that."""
    optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        real, fake = batches(2 * step), batches(2 * step + 1)
        loss = model(real).square().mean() - model(fake).tanh().mean()
        loss.backward()
        optimizer.step()
        losses.append(mean_of_ranks(loss))
    return {"losses": torch.stack(losses), **contents(model)}


def mean_of_ranks(loss: Tensor) -> Tensor:
    loss = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(loss)
    return loss / ranks_count()


def contents(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, u and v, and gradients, by the names of the state dict, in one piece each."""
    gradients = {f"{name}.grad": p.grad for name, p in model.named_parameters()}
    return {
        name: full(value)
        for name, value in [*model.state_dict().items(), *gradients.items()]
        if value is not None
    }


def assert_same(outcomes: list[dict[str, Tensor]], expected: dict[str, Tensor]) -> None:
    """Every rank has got what one process gets, to the rounding of float64."""
    for found in outcomes:
        assert set(found) == set(expected), set(found) ^ set(expected)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=name)
    for found in outcomes[1:]:
        for name, value in found.items():
            if name.endswith(("_u", "_v", "_u2", "_v2")):
                assert torch.equal(value, outcomes[0][name]), name


class CountedReductions:
    """Within this context: the sizes of the all-reduces of this process, in order."""

    def __enter__(self) -> list[int]:
        self._original = dist.all_reduce
        sizes: list[int] = []

        def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            sizes.append(tensor.numel())
            return self._original(tensor, *args, **kwargs)

        dist.all_reduce = counted
        return sizes

    def __exit__(self, *exc_info: object) -> None:
        dist.all_reduce = self._original


class Critic(nn.Module):
    """Two blocks and a layer of the root's own; sizes that ranks share unevenly, or not at all."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        layers = fastsn.nn if kind else nn
        conv, transposed, linear = (
            getattr(layers, kind + name) for name in ("Conv2d", "ConvTranspose2d", "Linear")
        )
        self.features = nn.Sequential(
            conv(3, 5, 3), nn.Tanh(), transposed(5, 2, 2), nn.Tanh(), nn.Flatten()
        )
        self.mlp = nn.Sequential(linear(72, 7), nn.Tanh(), linear(7, 6))
        self.head = linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mlp(self.features(x)).tanh())


def shard(model: nn.Module, **options: object) -> None:
    """fully_shard for the blocks of a :class:`Critic` and itself, where there are ranks."""
    if dist.is_initialized():
        options["mesh"] = mesh()
        for block in (model.features, model.mlp, model):
            fully_shard(block, **options)


def images(step: int) -> Tensor:
    """This rank's part of a batch."""
    generator = torch.Generator().manual_seed(step)
    return own(torch.randn(6, 3, 7, 7, dtype=torch.float64, generator=generator))


def build(form: str, norm: str, order: str, accelerated: bool) -> nn.Module:
    """`order`: of fully_shard, before or after normalizing."""
    torch.manual_seed(1)
    model = Critic(norm if form == "module" else "").double()
    if order == "before":
        shard(model)
    if form != "module":
        # Every rank draws u and v of its own; those of the first one are taken.
        torch.manual_seed(dist.get_rank() if dist.is_initialized() and order == "before" else 0)
        normalize(model, form, norm)
    if order == "after":
        shard(model)
    return fastsn.accelerate(model) if accelerated else model
