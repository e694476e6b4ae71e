"""Streams and graphs on a GPU, what is launched there, and a compiled model."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsn
from benchmarks import networks
from benchmarks.gpu_device import count_launches
from helpers import gpu_fixtures
from helpers.accelerated import chain, chain_input
from helpers.calls import Results, assert_same, make_call, random
from helpers.gpu_fixtures import (
    DEVICE,
    contents,
    device_gradients,
    double,
    mixed_call,
    moved,
    needs_gpu,
    operators,
    twin_models,
)
from helpers.torch_peers import TORCH_PARAMETRIZED

ROOT = Path(__file__).parents[2]

gpu_fixtures.skip_without_gpu()
pytestmark = gpu_fixtures.pytestmark
backend, exact_products = gpu_fixtures.backend, gpu_fixtures.exact_products


@contextmanager
def one_stream():
    """All work on a new stream: a graph cannot be captured on the default one, and gradients must
    be accumulated on the stream of the capture."""
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        yield stream
    torch.cuda.synchronize()


def captured(run, stream) -> torch.cuda.CUDAGraph:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph


def accelerated_discriminator(seed: int = 0, norm: str = "matrix") -> nn.Module:
    torch.manual_seed(seed)
    with DEVICE:
        model = networks.SNDCGANDiscriminator(width=1 / 4)

        def normalize(layer):
            fastsn.parametrizations.spectral_norm(layer, norm=norm)

        return fastsn.accelerate(networks.normalize_with(model, normalize))


def move_weights(model: nn.Module, step: int) -> None:
    """What an optimizer does between two forwards: in place, and the same for all copies."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 0.01 * (step + 1))


@needs_gpu
@pytest.mark.parametrize("norm", ["matrix", "bidirectional"])
def test_graph_replays_what_eager_computes(norm):
    """Bit for bit: u and v advance, weights changed between replays are read anew."""
    eager = accelerated_discriminator(norm=norm)
    model = copy.deepcopy(eager)
    with one_stream() as stream:
        parameters = [p for p in model.parameters() if p.ndim > 1]
        gradients = [torch.randn_like(p) for p in parameters]
        outputs = []

        def run(model=model, outputs=outputs):
            model.zero_grad(set_to_none=True)
            outputs[:] = fastsn.refresh(model).values()
            torch.autograd.backward(outputs, gradients)

        expected = []
        for _ in range(3):
            run()
            run(eager, expected)
        outputs.clear()
        graph = captured(run, stream)
        for step in range(5):
            move_weights(model, step)
            move_weights(eager, step)
            for x in outputs:
                x.detach().fill_(torch.nan)
            graph.replay()
            run(eager, expected)
            torch.cuda.synchronize()
            assert all(map(torch.equal, outputs, expected))
            own, wanted = contents(model), contents(eager)
            assert own.keys() == wanted.keys() and len(own) > 24
            for name in own:
                assert torch.equal(own[name], wanted[name]), name


@needs_gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_graph_of_a_whole_training_step(dtype):
    eager = accelerated_discriminator()
    model = copy.deepcopy(eager)
    images = torch.randn(8, 3, 32, 32, device=DEVICE)
    with one_stream() as stream:
        runs = []
        for one in (eager, model):
            optimizer = torch.optim.SGD(one.parameters(), 1e-2, momentum=0.9, foreach=True)

            def run(one=one, optimizer=optimizer):
                optimizer.zero_grad(set_to_none=True)
                with torch.autocast("cuda", dtype=dtype or torch.float16, enabled=bool(dtype)):
                    loss = F.softplus(one(images)).mean() - one(images.flip(0)).mean()
                loss.backward()
                optimizer.step()

            runs.append(run)
        for run in runs:
            for _ in range(3):
                run()
        graph = captured(runs[1], stream)
        for step in range(5):
            images.normal_(generator=torch.Generator(DEVICE).manual_seed(step))
            runs[0]()
            graph.replay()
        torch.cuda.synchronize()
        # cuDNN may choose otherwise during a capture.
        tolerance = {"rtol": 1e-3, "atol": 1e-3} if dtype is None else {"rtol": 5e-2, "atol": 5e-2}
        torch.testing.assert_close(model.state_dict(), eager.state_dict(), **tolerance)


@needs_gpu
@double
def test_graphed_callables():
    """torch wants no hooks on what it graphs, so the accelerated root sits inside a module."""
    eager = fastsn.accelerate(twin_models(TORCH_PARAMETRIZED)[0])
    model = copy.deepcopy(eager)
    before = copy.deepcopy(model.state_dict())
    sample = torch.randn(4, 3, 8, 8, device=DEVICE)
    with one_stream():
        graphed = torch.cuda.make_graphed_callables(nn.Sequential(model), (sample,))
        model.load_state_dict(before)  # what the warm-up did
        for step in range(4):
            x = torch.randn(4, 3, 8, 8, device=DEVICE)
            outputs = []
            for run, one in ((graphed, model), (eager, eager)):
                one.zero_grad(set_to_none=True)
                output = run(x)
                output.square().sum().backward()
                outputs.append(output.detach().clone())
                move_weights(one, step)
            torch.cuda.synchronize()
            torch.testing.assert_close(*outputs)
            torch.testing.assert_close(contents(model), contents(eager))


@needs_gpu
def test_two_streams_at_once(backend):
    """Each as if it were alone: nothing that calls keep for themselves is shared by accident."""
    own = operators(backend)
    calls = [mixed_call(v_first) for v_first in (False, True)]
    grads = [device_gradients(call) for call in calls]
    expected = [call.run(g, own) for call, g in zip(calls, grads, strict=True)]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    results: list[list[Results]] = [[], []]
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # until all is issued, then both run side by side
    for _ in range(10):
        for call, g, stream, found in zip(calls, grads, streams, results, strict=True):
            with torch.cuda.stream(stream):
                found.append(call.run(g, own))
    torch.cuda.synchronize()
    for found, wanted in zip(results, expected, strict=True):
        for result in found:
            assert_same(result, wanted)


@needs_gpu
def test_two_threads_with_a_stream_each():
    models = [accelerated_discriminator(seed) for seed in (1, 2)]
    copies = [copy.deepcopy(model) for model in models]

    def work(model):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            weights = list(fastsn.refresh(model).values())
            gradients = [torch.ones_like(w) for w in weights]
            for _ in range(10):
                model.zero_grad(set_to_none=True)
                weights = list(fastsn.refresh(model).values())
                torch.autograd.backward(weights, gradients)
            stream.synchronize()

    torch.cuda.synchronize()
    for model in models:
        work(model)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, copies))
    for model, copied in zip(models, copies, strict=True):
        own, wanted = contents(copied), contents(model)
        assert all(torch.equal(own[name], wanted[name]) for name in wanted)


@needs_gpu
def test_work_is_on_the_current_stream():
    """What comes before on the stream has happened, however long it takes."""
    model = accelerated_discriminator()
    twin = copy.deepcopy(model)
    fastsn.refresh(copy.deepcopy(model))
    move_weights(twin, 7)
    expected = fastsn.refresh(twin)
    with one_stream():
        torch.cuda._sleep(50_000_000)
        move_weights(model, 7)
        weights = fastsn.refresh(model)
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name])


@needs_gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("norm", ["matrix", "bidirectional"])
def test_nothing_waits_for_the_device(norm):
    model = accelerated_discriminator(norm=norm)
    images = torch.randn(4, 3, 32, 32, device=DEVICE)

    def work():
        loss = model(images).mean()
        loss.backward()
        fastsn.sigmas(model)
        with torch.no_grad():
            model.eval()(images)
            model.train()

    work()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("network", ["SNDCGAN D", "SN-ResNet D", "48 x 64x64"])
def test_launches(backend, network, record_property):
    """Whatever the number of layers, as few as DESIGN.md plans."""
    with DEVICE:
        plain = networks.NETWORKS[network]()
    form = fastsn.parametrizations.spectral_norm
    model = fastsn.accelerate(networks.normalize_with(plain, form))
    weights = list(fastsn.refresh(model).values())
    gradients = [torch.randn_like(w) for w in weights]
    torch.autograd.backward(weights, gradients)
    model.zero_grad(set_to_none=True)
    weights = []

    forward = count_launches(lambda: weights.extend(fastsn.refresh(model).values()))
    backward = count_launches(lambda: torch.autograd.backward(weights, gradients))
    if forward is None or backward is None:
        pytest.skip("the profiler saw no kernels")
    record_property("forward", str(forward))
    record_property("backward", str(backward))
    print(f"{backend}, {network}: {forward=} {backward=}")
    own_forward, own_backward = (
        sum(n for name, n in counts.items() if not re.match("Mem|void at::", name))
        for counts in (forward, backward)
    )
    if backend == "cuda":
        assert 1 <= own_forward <= 3 and 1 <= own_backward <= 2, (forward, backward)
    else:
        assert own_forward > 0 and own_backward > 0, (forward, backward)


@needs_gpu
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_capture_of_shapes_never_seen(backend):
    """What a call needs is there, or a clear error says what to do; never a wrong number."""

    def new_call(rows):
        return moved(make_call([random(rows, 2 * rows), random(rows, 3, 3, 3)]))

    own = operators(backend)
    small, large = new_call(31), new_call(977)
    grads = device_gradients(large)
    small.run(device_gradients(small), own)
    expected = large.run(grads, own)
    fresh = new_call(983)
    fresh_grads = device_gradients(fresh)
    with one_stream() as stream:
        results = []

        def run():
            results.append(fresh.run(fresh_grads, own))

        try:
            graph = captured(run, stream)
        except RuntimeError as error:
            assert "captur" in str(error).lower()
        else:
            graph.replay()
            torch.cuda.synchronize()
            assert_same(results[0], fresh.run(fresh_grads, own))
    # And nothing is broken for what follows.
    assert_same(large.run(grads, own), expected)


FIRST_USE = """
import torch
import torch.nn.functional as F
from fastsn import ops, reference

weight = torch.randn(64, 48, device="cuda")
u, v = (F.normalize(torch.randn(n, device="cuda"), dim=0) for n in weight.shape)
vectors = [[x.clone()] for x in (u, v)]
how = [0], [0], [1], 1e-12, False, False
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    snapshot = ops.power_([weight], *vectors, *how)
    (result,) = ops.scale([weight], snapshot, [0], [0], [1.0], False, False)
graph.replay()
torch.cuda.synchronize()
expected = reference.power_([weight], [u], [v], *how)
torch.testing.assert_close(snapshot, expected)
torch.testing.assert_close(result, weight / expected[-1])
print("as expected")
"""


@needs_gpu
def test_first_use_within_a_capture():
    """Kernels whose code the device has not had yet: none of them has run in this process."""
    if not fastsn.ops._C.cuda_architectures:
        pytest.skip("built without CUDA kernels")
    done = subprocess.run(
        [sys.executable, "-c", FIRST_USE], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0 and "as expected" in done.stdout, done.stdout + done.stderr


# Last, as it takes longest


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_model(backend):
    if backend == "reference":
        backend = "auto"  # the compiler sees the operators, whoever is behind them
    torch._dynamo.reset()
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        with DEVICE:
            models.append(fastsn.accelerate(chain(TORCH_PARAMETRIZED)))
    eager, twin = models
    with fastsn.use_backend(backend):
        compiled = torch.compile(twin, fullgraph=True)
        for _ in range(3):
            x = chain_input().to(DEVICE)
            outputs = []
            for model, run in ((eager, eager), (twin, compiled)):
                model.zero_grad()
                output = run(x)
                output.square().sum().backward()
                outputs.append(output.detach())
            torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(contents(twin), contents(eager), rtol=1e-4, atol=1e-5)
