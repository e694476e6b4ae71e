"""Layers written as in BigGAN-PyTorch, from that project's public behaviour.

A method `W_` normalizes, u is a buffer of shape (1, rows) per singular value, the last sigma is in
another; v comes first, and iterations in eval mode are not kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def deflated(x, found):
    """x without its parts along the vectors found before."""
    for vector in found:
        x = x - (x @ vector.T) * vector
    return x


class Normalizing:
    """The mixin: call `init_norm` after the constructor of the layer."""

    def init_norm(self, rows, *, num_svs=1, num_itrs=1, transpose=False, eps=1e-12):
        self.num_svs, self.num_itrs, self.transpose, self.eps = num_svs, num_itrs, transpose, eps
        for index in range(num_svs):
            self.register_buffer(f"u{index}", torch.randn(1, rows))
            self.register_buffer(f"sv{index}", torch.ones(1))

    def W_(self):
        matrix = self.weight.flatten(1).T if self.transpose else self.weight.flatten(1)
        for _ in range(self.num_itrs):
            us, vs, sigmas = [], [], []
            for index in range(self.num_svs):
                kept = getattr(self, f"u{index}")
                with torch.no_grad():
                    vs.append(F.normalize(deflated(kept @ matrix, vs), eps=self.eps))
                    us.append(F.normalize(deflated(vs[-1] @ matrix.T, us), eps=self.eps))
                    if self.training:
                        kept.copy_(us[-1])
                sigmas.append((vs[-1] @ matrix.T @ us[-1].T).squeeze())
        if self.training:
            for index, sigma in enumerate(sigmas):
                getattr(self, f"sv{index}").copy_(sigma.detach())
        return self.weight / sigmas[0]


class Conv(Normalizing, nn.Conv2d):
    def __init__(self, inputs, outputs, kernel, **options):
        nn.Conv2d.__init__(self, inputs, outputs, kernel, padding=kernel // 2)
        self.init_norm(outputs, **options)

    def forward(self, x):
        return F.conv2d(x, self.W_(), self.bias, padding=self.padding)


class Linear(Normalizing, nn.Linear):
    def __init__(self, inputs, outputs, transpose=False, **options):
        nn.Linear.__init__(self, inputs, outputs)
        self.init_norm(inputs if transpose else outputs, transpose=transpose, **options)

    def forward(self, x):
        return F.linear(x, self.W_(), self.bias)


class Embedding(Normalizing, nn.Embedding):
    def __init__(self, count, size, **options):
        nn.Embedding.__init__(self, count, size)
        self.init_norm(count, **options)

    def forward(self, label):
        return F.embedding(label, self.W_())
