"""What programs do between the start of an accelerated forward and a layer's read in it."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastsn
from fastsn.weights import find
from helpers.accelerated import chain, chain_input
from helpers.biggan import Linear as BigGanLinear
from helpers.torch_peers import FASTSN_HOOK, FASTSN_PARAMETRIZED, TORCH_HOOK, TORCH_PARAMETRIZED

FORMS = {
    "hook": (FASTSN_HOOK, TORCH_HOOK),
    "parametrization": (FASTSN_PARAMETRIZED, TORCH_PARAMETRIZED),
}
each = pytest.mark.parametrize("ours, theirs", FORMS.values(), ids=FORMS)
double = pytest.mark.usefixtures("double")


class Net(nn.Module):
    """Two layers, and something that happens before the second is reached."""

    def __init__(self, form, between=lambda self: None):
        super().__init__()
        self.a = form.spectral_norm(nn.Linear(6, 6))
        self.b = form.spectral_norm(nn.Linear(6, 6))
        self.between = between

    def forward(self, x):
        x = torch.tanh(self.a(x))
        self.between(self)
        return self.b(x)


def pair(ours, theirs, between=lambda self: None):
    """(fastsn's accelerated, torch's) after a forward, in eval mode."""
    torch.manual_seed(3)
    fast, plain = fastsn.accelerate(Net(ours)), Net(theirs)
    plain.load_state_dict(fast.state_dict())
    x = torch.randn(4, 6)
    fast(x), plain(x)
    fast.between = plain.between = between
    return fast.eval(), plain.eval(), x


def original(layer):
    return max(layer.parameters(), key=lambda p: p.ndim)


CHANGES = {
    "in place": lambda net: torch.no_grad()(original(net.b).mul_)(-2),
    "data": lambda net: setattr(original(net.b), "data", original(net.b).data.flip(0)),
    "load": lambda net: net.b.load_state_dict(
        {k: v.flip(0) for k, v in net.b.state_dict().items()}
    ),
    "other parameter": lambda net: _replace(net.b),
}


def _replace(layer, by=lambda weight: weight.detach().roll(1, 0) * 3):
    holder, name = next(
        (m, n) for m in layer.modules() for n, p in m._parameters.items() if p is original(layer)
    )
    holder._parameters[name] = nn.Parameter(by(original(layer)))


@double
@each
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("where", ["forward", "pre-hook"])
def test_a_weight_that_changes_before_it_is_read(ours, theirs, change, where):
    def run(module, args):
        change(module)

    fast, plain, x = pair(ours, theirs)
    with torch.no_grad():
        for model in (fast, plain):
            if where == "forward":
                model.between = change
            else:
                model.register_forward_pre_hook(run)
        torch.testing.assert_close(fast(x), plain(x))
        torch.testing.assert_close(fast(x), plain(x))
    # In training mode u and v have moved for the weight of before as well, and the weight that is
    # used is made of the present one.
    seen = []
    fast.b.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    fast.train()(x)
    _, u, v = ours.vectors(fast.b)
    weight = original(fast.b)
    used = weight / (u @ weight @ v)
    torch.testing.assert_close(seen[0][1], seen[0][0] @ used.T + fast.b.bias)


def around_the_same_memory(net):
    """Another parameter for the second layer, of the same version and place as the first one."""
    _replace(net.b, torch.Tensor.detach)


@double
@each
def test_gradients_reach_the_parameter_that_is_there(ours, theirs):
    *models, x = pair(ours, theirs, around_the_same_memory)
    found = []
    for model in models:
        model(x).sum().backward()
        found.append(original(model.b).grad)
    assert found[1] is not None
    torch.testing.assert_close(*found)


@double
@each
def test_inference_mode_ends_within_a_forward(ours, theirs):
    class Ending(Net):
        def forward(self, x):
            x = torch.tanh(self.a(x))
            with torch.inference_mode(False), torch.no_grad():
                outputs = self.b(torch.ones(1, 6))
                assert not self.b.weight.is_inference()
            return outputs

    model = fastsn.accelerate(Ending(ours)).eval()
    model(torch.ones(4, 6))
    expected = model(torch.ones(4, 6))
    with torch.inference_mode():
        torch.testing.assert_close(model(torch.ones(4, 6)), expected)


@double
@each
def test_a_reentrant_checkpoint_of_frozen_weights_within_a_grouped_forward(ours, theirs):
    class Part(Net):
        def forward(self, x):
            x = torch.tanh(self.a(x))
            return checkpoint(self.b, x, use_reentrant=True) if self.between else self.b(x)

    torch.manual_seed(3)
    model = fastsn.accelerate(Part(ours)).requires_grad_(False)
    plain = copy.deepcopy(model)
    plain.between = None
    found = []
    for own in (model, plain):
        x = torch.linspace(-1, 1, 24).view(4, 6).requires_grad_()
        own(x).square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(*found)
    for name, vector in model.named_buffers():  # which the repetition has not moved
        torch.testing.assert_close(vector, plain.get_buffer(name))


@double
@each
def test_other_parameters_for_a_layer_within_a_forward(ours, theirs):
    """As meta-learning and hypernetworks do."""

    def between(net):
        net.seen = torch.func.functional_call(net.b, net.fast, (torch.ones(1, 6),))

    fast, plain, x = pair(ours, theirs)
    name = next(n for n, p in fast.b.named_parameters() if p is original(fast.b))
    other = {name: torch.randn(6, 6, requires_grad=True)}
    for model in (fast, plain):
        model.between, model.fast = between, other
        model(x)
    torch.testing.assert_close(fast.seen, plain.seen)
    gradients = [
        torch.autograd.grad(model.seen.sum(), list(other.values())) for model in (fast, plain)
    ]
    torch.testing.assert_close(*gradients)


@double
@each
@torch.no_grad()
def test_a_forward_that_is_interrupted(ours, theirs):
    """No hook hears of it; the weights change, and a layer is read by itself."""

    def interrupt(net):
        raise KeyboardInterrupt

    fast, plain, x = pair(ours, theirs, interrupt)
    for model in (fast, plain):
        with pytest.raises(KeyboardInterrupt):
            model(x)
        for p in model.parameters():
            p.mul_(-3)
    torch.testing.assert_close(fast.b(x), plain.b(x))
    for model in (fast, plain):
        model.between = lambda net: None
    torch.testing.assert_close(fast(x), plain(x))


@double
@each
@pytest.mark.parametrize("outer", [torch.no_grad, torch.inference_mode])
def test_gradients_within_a_forward_without(ours, theirs, outer):
    class Forces(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body

        def forward(self, x):
            with torch.inference_mode(False), torch.enable_grad():
                return torch.autograd.grad(self.body(x.clone()).sum(), list(self.parameters()))

    fast, plain, x = pair(ours, theirs)
    found = []
    for model in (fastsn.accelerate(Forces(fast)), Forces(plain)):
        with outer():
            found.append(model(x))
    torch.testing.assert_close(*found)


@double
@each
def test_a_compiled_forward_that_fails_leaves_nothing_behind(ours, theirs):
    class Picky(Net):
        def forward(self, x):
            x = self.a(x)
            if x.shape[0] == 2:
                raise ValueError
            return self.b(x)

    torch.manual_seed(1)
    model = Picky(ours)
    x = torch.randn(4, 6)
    model(x)
    model = fastsn.accelerate(model.eval())
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        compiled(x)
        with pytest.raises(ValueError):
            compiled(x[:2])
        model.load_state_dict({k: v.flip(0) for k, v in model.state_dict().items()})
        torch.testing.assert_close(compiled(x), copy.deepcopy(model)(x))


# Models whose parts change


@double
@each
def test_a_layer_that_is_swapped_out_stays_as_it_is(ours, theirs):
    fast, _, x = pair(ours, theirs)
    old = fast.b
    fast.train()(x)
    before = [buffer.clone() for buffer in old.buffers()]
    fast.b = ours.spectral_norm(nn.Linear(6, 6))
    moved = [buffer.clone() for buffer in fast.b.buffers()]
    fast(x)
    torch.testing.assert_close(list(old.buffers()), before, rtol=0, atol=0)
    assert not any(map(torch.equal, fast.b.buffers(), moved))
    held = nn.ModuleDict({"body": fast})
    fast = fastsn.accelerate(nn.Sequential(held["body"]))
    fast[0] = nn.Identity()
    before = [buffer.clone() for buffer in held.buffers()]
    fast(x)
    torch.testing.assert_close(list(held.buffers()), before, rtol=0, atol=0)


@each
def test_first_forwards_of_a_copy_from_several_threads(ours, theirs):
    source = fastsn.accelerate(
        nn.Sequential(*(ours.spectral_norm(nn.Linear(4, 4)) for _ in range(40)))
    )
    x, errors = torch.randn(2, 4), []
    source(x)
    source.eval()
    with torch.no_grad():
        expected = source(x)
    for _ in range(10):
        model, barrier = copy.deepcopy(source), threading.Barrier(4)

        def run(model=model, barrier=barrier):
            try:
                barrier.wait()
                with torch.no_grad():
                    torch.testing.assert_close(model(x), expected)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors


# Copies


def test_a_copy_by_hand_is_a_copy_of_its_own():
    """By a module's `__dict__`, before or after a forward: pickles are of the copy."""
    layer = FASTSN_HOOK.spectral_norm(nn.Linear(4, 3))
    layer(torch.ones(1, 4)).sum().backward()
    other = nn.Linear(4, 3)
    other.__dict__.update(layer.__dict__)
    other._parameters = {
        k: nn.Parameter(torch.full_like(p, 7.0)) for k, p in layer._parameters.items()
    }
    for made in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        assert (made.bias == 7).all() and (made.weight_orig == 7).all()
    assert copy.deepcopy(nn.Linear(2, 2)).weight.shape == (2, 2)


# Matrices, methods and models of the user's


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    "form", [FASTSN_HOOK, FASTSN_PARAMETRIZED], ids=["hook", "parametrization"]
)
def test_new_u_and_v_are_those_of_the_users_own_matrix(form):
    """Of the weight's size, so that nothing but the numbers tells."""

    def rearranged(weight):
        return weight.reshape(weight.shape[1], -1).T.reshape(weight.shape[0], -1).contiguous()

    class Hook(fastsn.hooks.SpectralNorm):
        def reshape_weight_to_matrix(self, weight):
            return rearranged(weight)

    class Parametrization(fastsn.parametrizations._SpectralNorm):
        def _reshape_weight_to_matrix(self, weight):
            return rearranged(weight)

    torch.manual_seed(0)
    layer = nn.Linear(6, 6)
    if form is FASTSN_HOOK:
        Hook.apply(layer, "weight", 1, 0, 1e-12)
    else:
        own = Parametrization(layer.weight)
        nn.utils.parametrize.register_parametrization(layer, "weight", own)
    for call in (
        lambda: fastsn.converge(layer, 300),
        lambda: fastsn.converge(fastsn.reset_parameters(layer), 300),
    ):
        call()
        layer.eval()(torch.ones(1, 6))
        norm = torch.linalg.matrix_norm(rearranged(layer.weight.detach()), 2)
        assert abs(norm - 1) < 1e-6


def test_a_method_that_does_something_else_stays():
    class Scaled(BigGanLinear):
        def W_(self):
            return 3 * super().W_()

    torch.manual_seed(0)
    layer, same = Scaled(6, 5), BigGanLinear(6, 5)
    expected = copy.deepcopy(layer).eval()(torch.ones(1, 6))
    model = fastsn.accelerate(nn.Sequential(nn.ModuleDict({"a": layer, "b": same})))
    torch.testing.assert_close(layer.eval()(torch.ones(1, 6)), expected)
    assert len(find.normalizers(model)) == 1


@pytest.mark.usefixtures("double")
def test_transforms_within_cached():
    model, x = chain(FASTSN_PARAMETRIZED).eval(), chain_input()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    expected = torch.func.grad(loss)(parameters)
    with fastsn.cached(model):
        for _ in range(2):
            torch.testing.assert_close(torch.func.grad(loss)(parameters), expected)
        model(x)
        others = {name: 2 * p for name, p in parameters.items()}
        cached = torch.func.functional_call(model, others, (x,))
    torch.testing.assert_close(cached, torch.func.functional_call(model, others, (x,)))


def test_sigmas_of_layers_that_somebody_watches():
    model = fastsn.accelerate(chain(FASTSN_PARAMETRIZED))
    names = set(fastsn.sigmas(model))
    model[3].register_forward_pre_hook(lambda module, args: None)
    assert set(fastsn.sigmas(model)) == names == set(fastsn.refresh(model))


def test_frozen_says_whom_it_does_not_reach():
    model = nn.Sequential(
        FASTSN_HOOK.spectral_norm(nn.Linear(2, 2)), TORCH_HOOK.spectral_norm(nn.Linear(2, 2))
    )
    with pytest.warns(UserWarning, match=r"not those of \['1.weight'\]"), fastsn.frozen(model):
        pass


@double
@each
def test_a_compiled_part_sees_the_weight_as_it_is(ours, theirs):
    class Part(Net):
        def forward(self, x):
            self.between(self)
            return self.__dict__.get("part", self.b)(x)

    torch.manual_seed(3)
    fast, plain = fastsn.accelerate(Part(ours)), Part(theirs)
    plain.load_state_dict(fast.state_dict())
    x = torch.randn(4, 6)
    fast(x), plain(x)
    fast.__dict__["part"] = torch.compile(fast.eval().b, backend="eager")
    plain.eval()
    add = torch.no_grad()(torch.Tensor.add_)
    for factor in (-2, 0.5):
        for net in (fast, plain):
            net.between = lambda self, by=factor: add(original(self.b), by * torch.eye(6))
        torch.testing.assert_close(fast(x), plain(x))


@double
@each
@pytest.mark.parametrize("on", [False, True])
def test_gradients_that_are_switched_for_a_layer_within_a_forward(ours, theirs, on):
    fast, plain, x = pair(ours, theirs, lambda net: net.b.requires_grad_(on))
    slopes = []
    for net in (fast.train(), plain.train()):
        net.b.requires_grad_(not on)
        net(x).square().sum().backward()
        slopes.append(original(net.b).grad)
    assert (slopes[1] is not None) == on
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("cached", ["torch's", "fastsn's"])
def test_a_cache_that_is_opened_within_a_forward(cached):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.b = FASTSN_PARAMETRIZED.spectral_norm(nn.Linear(6, 6))

        def forward(self, x):
            own = nn.utils.parametrize.cached() if cached == "torch's" else fastsn.cached(self)
            with own:
                assert self.b.weight is self.b.weight
            return self.b(x)

    torch.manual_seed(0)
    fast = fastsn.accelerate(Twice())
    alone = copy.deepcopy(fast)
    fastsn.accelerate(nn.Sequential(alone.b))  # which is not called: the layer serves itself
    x = torch.randn(3, 6)
    torch.testing.assert_close(fast(x), alone(x))
    torch.testing.assert_close(fast.state_dict(), alone.state_dict())


def test_an_export_leaves_a_layer_as_untrained_as_it_was():
    torch.manual_seed(0)
    model = fastsn.accelerate(nn.Sequential(fastsn.spectral_norm(nn.Linear(40, 40))))
    x = torch.randn(3, 40)
    expected = copy.deepcopy(model).eval()(x)
    torch.func.functional_call(
        model.train(), {k: v.clone() for k, v in model.state_dict().items()}, x
    )
    torch.testing.assert_close(model.eval()(x), expected)


@double
@each
def test_an_eps_that_changes(ours, theirs):
    fast, plain, x = pair(ours, theirs)
    for net in (fast.train(), plain.train()):
        for module in net.modules():
            for holder in (module, *module._forward_pre_hooks.values()):
                if hasattr(holder, "n_power_iterations"):
                    holder.eps = 0.9
    torch.testing.assert_close(fast(x), plain(x))


@double
@each
def test_a_repeated_forward_that_moved_nothing(ours, theirs):
    """Of update policy "step": u and v have moved by the time that it is repeated."""
    fast, _, x = pair(ours, theirs)
    fastsn.set_update_policy(fast.train(), "step")
    optimizer = torch.optim.SGD(fast.parameters(), 0.0)
    fast(x)
    x.requires_grad_()
    first = checkpoint(fast, x, use_reentrant=True)
    optimizer.step()
    fast(x)
    again = []
    fast.b.register_forward_hook(lambda module, args, output: again.append(output.detach()))
    first.square().sum().backward()
    assert torch.equal(again[0], first)


@double
def test_u_and_v_of_biggan_belong_together():
    torch.manual_seed(0)
    model = fastsn.accelerate(nn.Sequential(BigGanLinear(6, 6)))
    fastsn.set_update_policy(model, "step")
    x = torch.randn(2, 6)
    model(x)
    fastsn.converge(model, 200)
    model(x)
    true = torch.linalg.matrix_norm(model[0].weight, 2)
    torch.testing.assert_close(model[0].sv0[0], true.detach())
    model.load_state_dict({"0.u0": -model[0].u0}, strict=False)
    model(x)
    torch.testing.assert_close(model[0].sv0[0], true.detach())
    model[0].u0.copy_(-model[0].u0)  # as averages, broadcasts and the like do
    model(x)
    torch.testing.assert_close(model[0].sv0[0], true.detach())
    fastsn.reset_parameters(model)
    model(x)


@pytest.mark.parametrize(
    "own",
    [
        lambda self, weight: weight.detach() + 0 * weight,
        lambda self, weight: nn.functional.dropout(weight, 0.5, self.training),
        lambda self, weight: weight[torch.arange(len(weight)).flip(0)],
    ],
    ids=["gradient", "training mode", "order"],
)
def test_layers_of_biggans_kind_that_do_something_else_stay(own):
    class Other(BigGanLinear):
        def W_(self):
            return own(self, super().W_())

    with pytest.warns(UserWarning, match="no layer"):
        fastsn.accelerate(nn.Sequential(Other(6, 6)))


@double
def test_inference_weights_that_change_within_a_forward():
    """They have no versions."""
    with torch.inference_mode():
        model = fastsn.accelerate(Net(FASTSN_PARAMETRIZED))
        x = torch.randn(4, 6)
        model(x)
        model.eval().between = lambda net: original(net.b).copy_(original(net.b).flip(0) * 3)
        outputs = model(x)
        expected = model.b(torch.tanh(model.a(x)))
    torch.testing.assert_close(outputs, expected)


@double
@pytest.mark.parametrize("normalize", [fastsn.spectral_norm, torch.nn.utils.spectral_norm])
def test_a_class_that_keeps_what_is_made_of_its_weight(normalize):
    class Packed(nn.Linear):
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if name == "weight":
                object.__setattr__(self, "packed", 2 * value)

        def forward(self, x):
            return x @ self.packed.T

    torch.manual_seed(3)
    model = nn.Sequential(normalize(Packed(6, 6)))
    plain = nn.Sequential(torch.nn.utils.spectral_norm(Packed(6, 6)))
    plain.load_state_dict(model.state_dict())
    fast = copy.deepcopy(model)
    x = torch.randn(4, 6)
    for own in (model, fastsn.accelerate(fast)):
        twin = copy.deepcopy(plain)
        for _ in range(3):
            torch.testing.assert_close(own(x), twin(x))
