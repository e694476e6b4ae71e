"""Runs the CUDA kernels on small shapes, for ``compute-sanitizer``:

``compute-sanitizer --report-api-errors no --error-exitcode 9 python tests/gpu_sanitize.py``

(what torch asks of the driver in vain is no error of ours) with this repository on ``PYTHONPATH``,
and with ``PYTORCH_NO_CUDA_MEMORY_CACHING=1``, so that every tensor is an allocation of its own and
has bounds. All else is done on the CPU: hardly a kernel runs but fastsn's. The results are compared
with the reference in fp64, so a run in which the kernels do nothing fails.
"""

from __future__ import annotations

import argparse
from random import Random

import torch
from torch import Tensor

import fastsn
from fastsn import ops, reference
from helpers.calls import ALL_TYPES, LAYOUTS, Call, Results, gradients_for, make_call, random
from helpers.gpu_tensors import call_on_device, on_device
from helpers.means_calls import make_channels_last, random_geometry

SHAPES = [(1,), (5, 4, 3), (27, 3, 3, 3), (3, 40, 1, 1), (130, 70), (7, 1100), (1100, 7), (0, 3)]


def calls(quick: bool) -> list[tuple[str, Call]]:
    """Small calls: all types, both orders, SN and BSN, odd sizes, and memory of every layout."""
    found = []
    for v_first in (False, True):
        for dtype in ALL_TYPES:
            weights = [random(*shape, dtype=dtype) for shape in SHAPES]
            iterations = [i % 3 for i in range(len(weights))]
            for norm in ("matrix", "bidirectional"):
                call = make_call(weights, 0, norm, iterations, v_first=v_first, zero_guard=True)
                found.append((f"{dtype}, {norm}, {v_first=}", call))
        weights = [layout(random(6, 5, 3, 12)) for layout in LAYOUTS.values()]
        for dim in (0, 1):
            found.append((f"layouts, {dim=}, {v_first=}", make_call(weights, dim, v_first=v_first)))
        mixed = [random(9, 70, dtype=dtype) for dtype in ALL_TYPES[1:]] * 40
        found.append((f"many and mixed, {v_first=}", make_call(mixed, v_first=v_first)))
        if not quick:
            large = [random(300, 2500), random(40, 30, 60), random(2, 30_000)]
            call = make_call(large, [0, 1, 0], "bidirectional", 2, v_first=v_first)
            found.append((f"many tiles, {v_first=}", call))
    return found


def run_on(call: Call, grads: list[Tensor], device: str) -> Results:
    """One step there, all tensors moved by copies alone."""
    there = call_on_device(call, device)
    moved_grads = [on_device(g, device) for g in grads]
    ops.estimate(*there.estimates())
    snapshot = there.power()
    normalized = there.scale(snapshot)
    gradients = there.scale_backward(moved_grads, snapshot)
    if call.weights[0].dtype != torch.float64:
        for dtype in ALL_TYPES[1:]:
            ops.scale(there.weights, snapshot, *there.constraint(), dtype)
    vectors = [x.cpu() for x in (*there.u, *there.v)]
    sigmas = list(snapshot.cpu()[-len(call.layers) :].unbind())
    return Results(vectors, [x.cpu() for x in normalized], [x.cpu() for x in gradients], sigmas)


def compare(call: Call, grads: list[Tensor], actual: Results) -> None:
    """Roughly: exact comparison is what the tests are for."""
    wide = call.copy(torch.float64)
    expected = wide.run([g.double() for g in grads], reference)
    tolerance = 40 * max(torch.finfo(w.dtype).eps for w in call.weights)
    vectors = expected.vectors[: len(actual.vectors)]
    for own, wanted in (
        (actual.vectors, vectors),
        (actual.normalized, expected.normalized),
        (actual.gradients, expected.gradients),
        (actual.sigmas, expected.sigmas),
    ):
        for a, e in zip(own, wanted, strict=True):
            if e.numel():
                error, size = (a.double() - e).norm(), e.norm()
                assert error <= tolerance * size + 1e-6, f"{error=}, {size=}"


def compare_means(device: str, count: int) -> None:
    """The operators of MSN, for random convolutions of every type and memory format."""
    rng = Random(0)
    for i in range(count):
        geometry, dtype = random_geometry(rng), ALL_TYPES[i % len(ALL_TYPES)]
        wide = torch.promote_types(dtype, torch.float32)
        x = random(*geometry.input_size, dtype=dtype)
        x = make_channels_last(x) if i % 2 else x
        patches = random(geometry.input_size[1], *geometry.kernel_size, dtype=wide)
        weight = random(*geometry.weight_shape, dtype=dtype)
        beta = random(geometry.out_channels, dtype=dtype)
        calls = {
            "patch_mean": geometry.mean_args(x),
            "patch_mean_backward": geometry.backward_args(patches, dtype, bool(i % 2)),
            "mean_bias": (weight, patches, beta, beta, geometry.groups, geometry.transposed),
        }
        for name, args in calls.items():
            there = [on_device(a, device) if isinstance(a, Tensor) else a for a in args]
            actual, expected = getattr(ops, name)(*there), getattr(reference, name)(*args)
            if isinstance(expected, tuple):
                actual, expected = actual[1], expected[1]
            error, size = (actual.cpu().double() - expected.double()).norm(), expected.norm()
            # Terms of the size 1 may cancel.
            tolerance = 40 * torch.finfo(expected.dtype).eps * (size + args[0].numel() ** 0.5)
            assert error <= tolerance, f"{name}, {geometry}: {error=}, {size=}"
    print("ok: means", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--quick", action="store_true", help="leave out the larger shapes")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with fastsn.use_backend(options.backend):
        for name, call in calls(options.quick):
            grads = gradients_for(call)
            actual = run_on(call, grads, options.device)
            compare(call, grads, actual)
            print(f"ok: {name}", flush=True)
        compare_means(options.device, 40 if options.quick else 200)
    print("sanitize: all calls agree with the reference")


if __name__ == "__main__":
    main()
