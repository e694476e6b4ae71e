"""One small model with its layers normalized by every library whose checkpoints are known.

BigGAN-PyTorch's and mimicry's layers are made from those projects' public behaviour: u as a buffer
of shape (1, rows), the last sigma in another, v first, and one iteration in eval mode that is not
kept.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import spectral_norm as torch_hook

import fastsn


class KeepsU:
    """A mixin before a layer of torch."""

    names: tuple[str, str]

    def start(self):
        u, sigma = self.names
        self.register_buffer(u, torch.randn(1, self.weight.shape[0]))
        self.register_buffer(sigma, torch.ones(1))

    def W_(self):
        matrix = self.weight.flatten(1)
        u, sigma = (getattr(self, name) for name in self.names)
        with torch.no_grad():
            v = F.normalize(u @ matrix)
            new = F.normalize(v @ matrix.T)
        norm = (new @ matrix @ v.T).squeeze()
        if self.training:
            u.copy_(new)
            sigma.copy_(norm.detach())
        return self.weight / norm

    def forward(self, x):
        if isinstance(self, nn.Conv2d):
            return self._conv_forward(x, self.W_(), self.bias)
        if isinstance(self, nn.Embedding):
            return F.embedding(x, self.W_())
        return F.linear(x, self.W_(), self.bias)


class BigGan(KeepsU):
    names = ("u0", "sv0")
    num_svs, num_itrs, transpose, eps = 1, 1, False, 1e-12


class Mimicry(KeepsU):
    names = ("sn_u", "sn_sigma")


class BigGanConv2d(BigGan, nn.Conv2d):
    pass


class BigGanLinear(BigGan, nn.Linear):
    pass


class BigGanEmbedding(BigGan, nn.Embedding):
    pass


class MimicryConv2d(Mimicry, nn.Conv2d):
    pass


class MimicryLinear(Mimicry, nn.Linear):
    pass


class MimicryEmbedding(Mimicry, nn.Embedding):
    pass


def keeping_u(conv, linear, embedding):
    classes = {nn.Conv2d: conv, nn.Linear: linear, nn.Embedding: embedding}

    def normalize(layer):
        layer.__class__ = classes[type(layer)]
        layer.start()
        return layer

    return normalize


def as_module(layer):
    """fastsn's layer in the place of a plain one."""
    if isinstance(layer, nn.Conv2d):
        return fastsn.nn.SNConv2d(layer.in_channels, layer.out_channels, layer.kernel_size)
    if isinstance(layer, nn.Linear):
        return fastsn.nn.SNLinear(layer.in_features, layer.out_features)
    return fastsn.nn.SNEmbedding(layer.num_embeddings, layer.embedding_dim)


biggan = keeping_u(BigGanConv2d, BigGanLinear, BigGanEmbedding)
mimicry = keeping_u(MimicryConv2d, MimicryLinear, MimicryEmbedding)

#: What each library does to a layer, by the form of its checkpoints.
PEERS = {
    "hook": torch_hook,
    "parametrization": torch_parametrizations.spectral_norm,
    "biggan": biggan,
    "mimicry": mimicry,
    "plain": lambda layer: layer,
}
OURS = {
    "hook": fastsn.spectral_norm,
    "parametrization": fastsn.parametrizations.spectral_norm,
    "module": as_module,
}


class Net(nn.Module):
    """Layers at several depths, and one that is not normalized.

    The first singular value of each weight is far above the others: after some 20 steps u and v
    have converged to rounding, after two they have not.
    """

    def __init__(self, normalize):
        super().__init__()

        def stretched(layer):
            with torch.no_grad():
                matrix = layer.weight.flatten(1)
                u, s, v = torch.linalg.svd(matrix, full_matrices=False)
                layer.weight += (2 * s[0] * torch.outer(u[:, 0], v[0])).view_as(layer.weight)
            return normalize(layer)

        self.conv = stretched(nn.Conv2d(3, 6, 3))
        self.norm = nn.BatchNorm2d(6)
        self.body = nn.ModuleDict({"skip": stretched(nn.Conv2d(6, 8, 1))})
        self.linear = stretched(nn.Linear(8, 5))
        self.embed = stretched(nn.Embedding(4, 5))

    def forward(self, image, label):
        features = self.body["skip"](torch.tanh(self.norm(self.conv(image)))).sum((2, 3))
        return (self.linear(features) * self.embed(label)).sum(1)


def example():
    return torch.randn(3, 3, 5, 4), torch.tensor([0, 3, 1])


def used(model, steps=2):
    """The model after so many forwards in training mode, then in eval mode."""
    torch.manual_seed(1)
    with torch.no_grad():
        for _ in range(steps):
            model.train()(*example())
    return model.eval()


def output(model):
    """What the model computes in eval mode, of the same input each time."""
    torch.manual_seed(3)
    with torch.no_grad():
        return model.eval()(*example())


def entries(state):
    """The keys and shapes of a state dict."""
    return {key: tuple(value.shape) for key, value in state.items()}


def assert_same_state(actual, expected):
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value)


def version_none(model):
    """The state dict of the hook form that torch wrote before `weight_v` was a buffer."""
    state = copy.deepcopy(model.state_dict())
    for metadata in state._metadata.values():
        metadata.pop("spectral_norm", None)
    for key in [key for key in state if key.endswith("weight_v")]:
        del state[key]
        path = key.removesuffix("weight_v")
        state[path + "weight"] = model.get_submodule(path.rstrip(".")).weight.detach().clone()
    return state


def accelerated(form):
    return fastsn.accelerate(Net(PEERS[form]))


#: Models that load every form.
TARGETS = {
    **{name: (lambda name=name: Net(OURS[name])) for name in OURS},
    **{f"accelerated-{form}": (lambda form=form: accelerated(form)) for form in list(PEERS)[:3]},
    "accelerated-module": lambda: fastsn.accelerate(Net(OURS["module"])),
}
SOURCES = {
    **{name: (lambda name=name: Net(PEERS[name])) for name in PEERS},
    "own-hook": lambda: Net(OURS["hook"]),
    "own-module": lambda: Net(OURS["module"]),
    "accelerated-hook": lambda: accelerated("hook"),
    "accelerated-parametrization": lambda: accelerated("parametrization"),
    "accelerated-biggan": lambda: accelerated("biggan"),
}
