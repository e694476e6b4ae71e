"""Which batch norm follows which layer: found by tracing a model symbolically."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from fastsn.weights import autocast

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)


@dataclass
class Traced:
    """What tracing found; all names are those of ``named_modules``.

    Attributes:
        pairs: norms, and the layer whose only output is all that the norm sees.
        near: norms that see the output of a layer and are no pair with it: the layer, and why.
        seen: all modules that were called.
        failed: modules that cannot be traced, and why; those within are traced on their own.
    """

    pairs: dict[str, str] = field(default_factory=dict)
    near: dict[str, tuple[str, str]] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)


class _Tracer(fx.Tracer):
    """Traces through all modules but those of torch and fastsn, and those that cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.failed: dict[nn.Module, Exception] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_leaf(m) or m in self.failed  # to try again could go otherwise

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        name = self.path_of_module(m)
        if not self.is_leaf_module(m, name):
            before = len(self.graph.nodes)
            try:
                return forward(*args, **kwargs)
            except Exception as error:  # whatever a model may raise that meets a proxy
                self.failed[m] = error
                for node in reversed(list(self.graph.nodes)[before:]):
                    self.graph.erase_node(node)
        return self.create_proxy("call_module", name, args, kwargs)


def _is_leaf(module: nn.Module) -> bool:
    if isinstance(module, (*autocast.LAYERS, _NormBase)):
        return True  # also where it is of a class of the user's
    is_ours = type(module).__module__.startswith(("torch.nn.", "torch.ao.nn.", "fastsn."))
    return is_ours and not isinstance(module, (nn.Sequential, *_CONTAINERS))


def find(model: nn.Module, norms: Iterable[str]) -> Traced:
    """Looks for the layers that the norms of these names follow. The model stays as it is."""
    found = Traced()
    python = random.getstate()
    try:
        shell = _shell(model)
        names = {module: name for name, module in shell.named_modules()}
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            calls = _Calls()
            _trace(shell, names, calls, found.failed)
    except Exception as error:
        found.failed[""] = _one_line(error)
        return found
    finally:
        random.setstate(python)
    modules = {name: module for module, name in names.items()}
    for norm in norms:
        nodes = calls.of.get(norm, [])
        layer = _before(nodes, calls, modules)
        if layer is None:
            continue
        reason = _why_not(layer, norm, calls)
        if reason is None:
            found.pairs[norm] = layer
        else:
            found.near[norm] = layer, reason
    found.seen = set(calls.of)
    return found


@dataclass
class _Calls:
    """The calls of every module, the module of every call, and modules read without a call."""

    of: dict[str, list[fx.Node]] = field(default_factory=dict)
    by: dict[fx.Node, str] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)


def _trace(
    root: nn.Module, names: dict[nn.Module, str], calls: _Calls, failed: dict[str, str]
) -> None:
    """Traces a module, or where that fails those within it."""
    tracer = _Tracer()
    if type(root) in _CONTAINERS:  # one without a forward
        untraced: list[nn.Module] = [root]
    else:
        try:
            graph = tracer.trace(root)
        except Exception as error:
            tracer.failed = {root: error}
        else:
            for node in graph.nodes:
                _note(node, root, names, calls)
        untraced = list(tracer.failed)
        failed.update({names[module]: _one_line(error) for module, error in tracer.failed.items()})
    for module in untraced:
        for child in module.children():
            if not _is_leaf(child):
                _trace(child, names, calls, failed)


def _note(node: fx.Node, root: nn.Module, names: dict[nn.Module, str], calls: _Calls) -> None:
    if node.op == "call_module":
        name = names[root.get_submodule(str(node.target))]
        calls.of.setdefault(name, []).append(node)
        calls.by[node] = name
    elif node.op == "get_attr":
        owner = root.get_submodule(str(node.target).rpartition(".")[0])
        if owner in names:
            calls.read.add(names[owner])


def _before(nodes: list[fx.Node], calls: _Calls, modules: dict[str, nn.Module]) -> str | None:
    """The convolution or linear layer whose output the first of a norm's calls gets, if any."""
    for node in nodes[:1]:
        source = node.args[0] if node.args else node.kwargs.get("input")
        name = calls.by.get(source) if isinstance(source, fx.Node) else None
        if name is not None and isinstance(modules[name], autocast.LAYERS):
            return name
    return None


def _why_not(layer: str, norm: str, calls: _Calls) -> str | None:
    for name in (layer, norm):
        if len(calls.of[name]) > 1:
            return f"{name} is called {len(calls.of[name])} times"
        if name in calls.read:
            return f"a parameter of {name} is used elsewhere too"
    if len(calls.of[layer][0].users) > 1:
        return f"the output of {layer} is used elsewhere too"
    return None


def _one_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _shell(model: nn.Module) -> nn.Module:
    """A copy to trace: with the same parameters, without hooks, so that no code but forwards runs.

    A forward may count its calls, or keep what it sees.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for key, value in _attributes(module):
            if key.endswith("_hooks"):
                memo[id(value)] = OrderedDict()
            elif isinstance(value, nn.Parameter) or _cannot_be_copied(value):
                memo[id(value)] = value
    return copy.deepcopy(model, memo)


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from module.__dict__.items()
    yield from module._parameters.items()


def _cannot_be_copied(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_leaf
    return dist.is_available() and isinstance(value, dist.ProcessGroup)
