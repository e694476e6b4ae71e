"""torch and fastsn side by side through training, and inside the rest of torch, in both forms."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize, stateless

from helpers.torch_peers import (
    FASTSN_HOOK,
    FASTSN_PARAMETRIZED,
    TORCH_HOOK,
    TORCH_PARAMETRIZED,
    as_matrix,
    assert_no_worse,
    copy_double,
    each_form,
    each_layer,
    each_pair,
    each_parametrized_form,
    iterate,
    normalized,
    slow_linear,
    twins,
)
from helpers.trajectories import Band

# Training, step by step


class Gain(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 2.0, size))

    def forward(self, x):
        return self.weight * x


class Critic(nn.Module):
    """A projection discriminator of every kind of weight, smooth because kinks amplify rounding."""

    normalized = {
        "conv": "weight",
        "up": "weight",
        "rnn": "weight_hh_l0",
        "gain": "weight",
        "head": "weight",
        "embed": "weight",
    }

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=2)
        self.up = nn.ConvTranspose2d(4, 3, 3)
        self.rnn = nn.LSTM(25, 6, batch_first=True)
        self.gain = Gain(6)
        self.head = nn.Linear(6, 4)
        self.embed = nn.Embedding(5, 4)

    def forward(self, image, label):
        features = torch.tanh(self.up(torch.tanh(self.conv(image))))
        features = self.gain(self.rnn(features.flatten(2))[0][:, -1])
        features = self.head(features)
        return features.sum(1) + (self.embed(label) * features).sum(1)


def normalize_critic(form, critic, options):
    for child, name in Critic.normalized.items():
        module = getattr(critic, child)
        is_vector = getattr(module, name).ndim == 1
        form.spectral_norm(module, name, **({} if is_vector else options))
    return critic


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.5),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.005, betas=(0.5, 0.9), eps=1e-3),
}


def snapshot(losses, **models):
    """The losses, and every gradient, parameter and buffer."""
    record = dict(losses)
    for label, model in models.items():
        record |= {f"{label}.{key}": value for key, value in model.state_dict().items()}
        record |= {f"{label}.{key}.grad": p.grad for key, p in model.named_parameters()}
    return {key: value.detach().clone() for key, value in record.items()}


def train(form, dtype, optimizer, options, state, nudge=None, steps=20):
    """The snapshots after every step of a small GAN; its critic starts from `state`."""
    torch.manual_seed(7)
    critic = normalize_critic(form, Critic(), options)
    critic.load_state_dict(state)
    critic.to(dtype)
    generator = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Unflatten(1, (1, 8, 8))).to(dtype)
    of_critic, of_generator = (OPTIMIZERS[optimizer](m.parameters()) for m in (critic, generator))
    history = []
    for _ in range(steps):
        if nudge is not None:
            nudge([*critic.parameters(), *generator.parameters()])
        real = torch.rand(6, 1, 8, 8).to(dtype).requires_grad_()
        noise = torch.randn(6, 4).to(dtype)
        label = torch.randint(5, (6,))

        of_critic.zero_grad()
        score = critic(real, label)
        (slope,) = torch.autograd.grad(score.sum(), real, create_graph=True)
        loss = F.softplus(-score).mean() + F.softplus(critic(generator(noise), label)).mean()
        loss = loss + 0.1 * slope.square().sum()
        loss.backward()
        of_critic.step()

        with torch.no_grad():
            watched = critic.eval()(real, label)
        critic.train()

        of_generator.zero_grad()
        deceived = -critic(generator(noise), label).mean()
        deceived.backward()
        of_generator.step()

        losses = {"loss": loss, "watched": watched, "deceived": deceived}
        history.append(snapshot(losses, critic=critic, generator=generator))
    return history


@each_pair
@pytest.mark.parametrize(
    "optimizer, options",
    [
        ("sgd", {}),
        ("adam", {}),
        ("sgd", {"n_power_iterations": 3}),
        ("adam", {"eps": 0.5}),
        ("sgd", {"dim": 1}),
    ],
)
def test_training_agrees_with_torch_at_every_step(peer, ours, optimizer, options):
    state = normalize_critic(peer, Critic(), options).state_dict()
    band = Band(lambda nudge: train(peer, torch.float64, optimizer, options, state, nudge))
    for dtype in (torch.float32, torch.float64):
        band.check(train(ours, dtype, optimizer, options, state), dtype)


@each_pair
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_small_error_of_sigma_does_not_agree(peer, ours, optimizer):
    """A hundred thousandth of it; `scale` stands in for an error."""
    state = normalize_critic(peer, Critic(), {}).state_dict()
    band = Band(lambda nudge: train(peer, torch.float64, optimizer, {}, state, nudge))
    wrong = train(ours, torch.float32, optimizer, {"scale": 1 + 1e-5}, state)
    with pytest.raises(AssertionError, match="float32: (?s:.*) over"):
        band.check(wrong, torch.float32)


@each_pair
@each_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision(peer, ours, layer, dtype):
    """One forward from the same u and v."""
    modules = twins(lambda: layer.build().to(dtype), peer, ours, layer.name)
    weight = getattr(modules[0], layer.name)
    if weight.ndim == 1 and not peer.v_first:
        exact = [F.normalize(copy_double(modules[0].parametrizations[layer.name].original), dim=0)]
        results = [[getattr(module, layer.name)] for module in modules]
    else:
        dim = int(isinstance(modules[0], nn.modules.conv._ConvTransposeNd))
        modules[1].load_state_dict(modules[0].state_dict())
        original, u, v = map(copy_double, peer.vectors(modules[0], layer.name))
        exact = [*iterate(as_matrix(original, dim), u, v, v_first=peer.v_first)]
        exact.append(normalized(original, *exact, dim))
        results = []
        for form, module in zip((peer, ours), modules, strict=True):
            if form.v_first:
                next(iter(module._forward_pre_hooks.values()))(module, ())
            used = getattr(module, layer.name)
            results.append([*form.vectors(module, layer.name)[1:], used])
        # Its u and v do not follow the weight into half precision.
        assert {x.dtype for x in results[1][:-1]} == {torch.float32}
        results[1][:-1] = [x.to(dtype) for x in results[1][:-1]]
    for torchs, actual, true in zip(*results, exact, strict=True):
        assert_no_worse(actual, torchs, true)


@each_form
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_casting_widens_u_and_v_but_never_narrows_them(form, dtype):
    """torch's follow the weight into half precision, and sigma with them."""
    module = form.spectral_norm(nn.LSTM(3, 4), "weight_hh_l0")
    module(torch.randn(2, 1, 3))
    module.to(dtype)
    assert module(torch.randn(2, 1, 3, dtype=dtype))[0].dtype == dtype
    weight, *vectors = form.vectors(module, "weight_hh_l0")
    is_torchs = form in (TORCH_HOOK, TORCH_PARAMETRIZED)
    wide = dtype if is_torchs else torch.promote_types(dtype, torch.float32)
    assert weight.dtype == dtype and {vector.dtype for vector in vectors} == {wide}


# Parametrizations beside it


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).T


class Bjorck(nn.Module):
    """The orthogonalization step that deel-torchlip puts after spectral normalization."""

    def forward(self, weight):
        return 1.5 * weight - 0.5 * weight @ weight.T @ weight


@pytest.mark.parametrize(
    "before, after",
    [
        ([Symmetric], []),
        ([], [Bjorck]),
        ([Symmetric], [Bjorck, Bjorck]),
        ([parametrizations.weight_norm], []),
        ([parametrizations.orthogonal], []),
    ],
)
@pytest.mark.usefixtures("double")
def test_stacks_with_other_parametrizations(before, after):
    def add(module, others):
        for other in others:
            if isinstance(other, type):
                parametrize.register_parametrization(module, "weight", other())
            else:
                other(module)

    linear = nn.Linear(6, 6)
    modules = []
    for form in (TORCH_PARAMETRIZED, FASTSN_PARAMETRIZED):
        torch.manual_seed(1)
        module = copy.deepcopy(linear)
        add(module, before)
        form.spectral_norm(module)
        add(module, after)
        modules.append(module)
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in modules]
    x = torch.randn(4, 6)
    for mode in (True, True, False, True):
        outputs = [module.train(mode)(x) for module in modules]
        torch.testing.assert_close(outputs[1], outputs[0])
        for output, optimizer in zip(outputs, optimizers, strict=True):
            output.square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(modules[1].state_dict(), modules[0].state_dict())
    for module in modules:
        parametrize.remove_parametrizations(module, "weight")
    torch.testing.assert_close(modules[1].weight, modules[0].weight)


# Swapped tensors


@pytest.fixture(params=[True, False], ids=["swap", "no_swap"])
def swap_tensors(request):
    future = torch.__future__
    before = future.get_swap_module_params_on_conversion()
    future.set_swap_module_params_on_conversion(request.param)
    yield
    future.set_swap_module_params_on_conversion(before)


@each_pair
@pytest.mark.usefixtures("swap_tensors")
def test_swapped_tensors(peer, ours):
    """Conversion, loading and removal while parameters are swapped, not assigned."""
    results = []
    for form in (peer, ours):
        torch.manual_seed(1)
        module = form.spectral_norm(nn.Linear(3, 4))
        original = form.vectors(module)[0]
        x = torch.randn(2, 3)
        module(x).sum().backward()
        module.zero_grad()
        state = copy.deepcopy(module.state_dict())
        module.load_state_dict(state)
        module.to(torch.float64)
        assert form.vectors(module)[0] is original and original.dtype == torch.float64
        outputs = [module(x.double()).detach()]
        module.eval()
        outputs.append(module(x.double()).detach())
        if form.v_first:
            form.remove(module)
        else:
            parametrize.remove_parametrizations(module, "weight")
            assert module.weight is original
        outputs.append(module(x.double()).detach())
        outputs.append(form.spectral_norm(module.train())(x.double()).detach())
        results.append(outputs)
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


# Stateless calls


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l1 = nn.Linear(1, 1)
        self.register_buffer("buffer", torch.ones(1))

    def forward(self, x):
        return self.l1(x) + self.buffer


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.stateless.functional_call` is deprecated")
@each_parametrized_form
@pytest.mark.parametrize("call", [functional_call, stateless.functional_call])
def test_functional_call_replaces_the_original(form, call):
    module = Tiny()
    form.spectral_norm(module.l1)
    before = module.l1.weight.clone()
    values = {
        "l1.parametrizations.weight.original": nn.Parameter(torch.tensor([[1.0]])),
        "l1.bias": torch.tensor([0.0]),
        "buffer": torch.tensor([0.0]),
    }
    x = torch.rand(1, 1)
    torch.testing.assert_close(call(module, values, x), x)
    assert torch.equal(module.l1.weight, before)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        call(module, values, torch.rand(4, 5))
    assert "l1.parametrizations.weight.original" in dict(module.named_parameters())
    assert torch.equal(module.l1.weight, before)


def function_of(form, training):
    module = form.spectral_norm(slow_linear())
    module(torch.zeros(1, 5, dtype=torch.float64))  # whose random u and v are no estimate
    module.train(training)
    name = next(n for n, p in module.named_parameters() if p is form.vectors(module)[0])
    parameter = dict(module.named_parameters())[name]

    def loss(value, x):
        buffers = {key: buffer.clone() for key, buffer in module.named_buffers()}
        return functional_call(module, {name: value, **buffers}, (x,)).square().sum()

    return loss, parameter


@each_form
@pytest.mark.parametrize("training", [True, False])
def test_func_grad_and_vmap_over_examples(form, training):
    loss, parameter = function_of(form, training)
    batch = torch.randn(3, 5, dtype=torch.float64)
    expected = [torch.autograd.grad(loss(parameter, x), parameter)[0] for x in batch]
    torch.testing.assert_close(torch.func.grad(loss)(parameter, batch[0]), expected[0])
    actual = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameter, batch)
    torch.testing.assert_close(actual, torch.stack(expected))


@each_form
def test_vmap_over_weights_in_eval(form):
    loss, parameter = function_of(form, training=False)
    batch = torch.randn(3, 5, dtype=torch.float64)
    weights = torch.stack([parameter.detach() * scale for scale in (1.0, -2.0, 3.0)])
    actual = torch.vmap(torch.func.grad(loss))(weights, batch)
    expected = [torch.func.grad(loss)(*pair) for pair in zip(weights, batch, strict=True)]
    torch.testing.assert_close(actual, torch.stack(expected))


@pytest.mark.filterwarnings("ignore:`torch.jit.[a-z_]+` is (deprecated|not supported)")
@each_form
def test_forward_mode_in_eval(form):
    loss, parameter = function_of(form, training=False)
    value, x = parameter.detach(), torch.randn(5, dtype=torch.float64)
    tangent = torch.randn_like(value)
    _, actual = torch.func.jvp(lambda weight: loss(weight, x), (value,), (tangent,))
    torch.testing.assert_close(actual, (torch.func.grad(loss)(value, x) * tangent).sum())
    hessian = torch.func.hessian(loss)(value, x).reshape(30, 30)
    torch.testing.assert_close(hessian, hessian.T)


# Compiled and exported


@each_form
def test_compiled_with_a_full_graph(form):
    """Outputs, gradients, u and v are those of eager mode, while training and in eval."""

    def build():
        convolution = form.spectral_norm(nn.Conv2d(1, 2, 3), n_power_iterations=2)
        linear = form.spectral_norm(nn.Linear(8, 3))
        return nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), linear).double()

    eager, twin = build(), build()
    twin.load_state_dict(eager.state_dict())
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    for mode in (True, True, False, True):
        eager.train(mode), twin.train(mode)
        outputs = [model(x) for model in (eager, compiled)]
        torch.testing.assert_close(outputs[1], outputs[0])
        for output in outputs:
            output.square().sum().backward()
        for expected, actual in zip(eager.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(actual.grad, expected.grad)
        torch.testing.assert_close(twin.state_dict(), eager.state_dict())


@each_form
def test_two_compiled_forwards_before_one_backward(form):
    modules = [form.spectral_norm(slow_linear()), form.spectral_norm(slow_linear())]
    modules[1].load_state_dict(modules[0].state_dict())

    def difference(module, real, fake):
        return (module(real).square() - module(fake).square()).sum()

    torch._dynamo.reset()
    compiled = torch.compile(difference, fullgraph=True, backend="aot_eager")
    pair = torch.randn(2, 4, 5, dtype=torch.float64)
    for module, call in zip(modules, (difference, compiled), strict=True):
        call(module, *pair).backward()
    for expected, actual in zip(*(form.vectors(m) for m in modules), strict=True):
        torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(form.vectors(module)[0].grad for module in modules))


@pytest.mark.filterwarnings("ignore:The tensor attribute self.weight was assigned during export")
@each_form
def test_exported_in_eval(form):
    module = form.spectral_norm(nn.ConvTranspose2d(2, 3, 2))
    x = torch.randn(2, 2, 4, 4)
    module(x), module.eval()  # random u and v are no estimate
    program = torch.export.export(module, (x,))
    torch.testing.assert_close(program.module()(x), module(x))


# Processes


def data_parallel_worker(rank, forms, rendezvous, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    for label, form in forms.items():
        torch.manual_seed(rank)
        model = nn.Sequential(form.spectral_norm(nn.Conv1d(2, 3, 2)), nn.Flatten())
        model.append(form.spectral_norm(nn.Linear(9, 1)))
        parallel = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
        for _ in range(3):
            real, fake = torch.randn(2, 4, 2, 4)
            optimizer.zero_grad()
            (parallel(real) - parallel(fake)).square().sum().backward()
            optimizer.step()
        torch.save(model.state_dict(), results / f"{label}-{rank}.pt")
    # Neither rank takes gloo's threads down while the other is still talking to them.
    del parallel
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_distributed_data_parallel(tmp_path):
    """Two ranks with their own data and seeds: one model, and the one that torch gets."""
    forms = {
        "hook-torch": TORCH_HOOK,
        "hook-fastsn": FASTSN_HOOK,
        "parametrized-torch": TORCH_PARAMETRIZED,
        "parametrized-fastsn": FASTSN_PARAMETRIZED,
    }
    rendezvous = (tmp_path / "rendezvous").as_uri()
    mp.spawn(data_parallel_worker, args=(forms, rendezvous, tmp_path), nprocs=2)
    for kind in ("hook", "parametrized"):
        states = [
            torch.load(tmp_path / f"{kind}-{name}-{rank}.pt")
            for name in ("torch", "fastsn")
            for rank in range(2)
        ]
        for key, expected in states[0].items():
            torch.testing.assert_close(states[1][key], expected, rtol=0, atol=0)
            torch.testing.assert_close(states[2][key], expected)
            torch.testing.assert_close(states[3][key], states[2][key], rtol=0, atol=0)
