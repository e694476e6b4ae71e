"""Models exported, traced and compiled ahead of time, folded and as they are."""

from __future__ import annotations

import copy
import io
import shutil

import pytest
import torch
from torch import nn

import fastsn
from helpers import normalized
from helpers.accelerated import chain, chain_input, step
from helpers.answers import answers
from helpers.normalized import double
from helpers.torch_peers import TORCH_HOOK, TORCH_PARAMETRIZED

OURS = {**normalized.MODELS, "MSN": lambda: normalized.modules("MSN", gain=True)}
MODELS = {
    "torch-hook": lambda: chain(TORCH_HOOK),
    "torch-parametrized": lambda: chain(TORCH_PARAMETRIZED),
    **OURS,
}
each_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())
each_of_ours = pytest.mark.parametrize("build", OURS.values(), ids=OURS.keys())

pytestmark = [
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    # A hook sets its module's weight.
    pytest.mark.filterwarnings("ignore:The tensor attributes? .* w.* assigned during export"),
    pytest.mark.filterwarnings("ignore:`torch.jit.[a-z_]+` is (deprecated|not supported)"),
    # The check of a trace calls the model again, which has other u and v then; shapes are fixed.
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


def trained(build):
    """A model whose u, v and running means are no longer those of its construction."""
    model = build()
    for _ in range(3):
        step(model, chain_input())
    return model


def size(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


# torch.export


@double
@each_model
def test_the_program_of_a_folded_model_is_that_of_plain_layers(build):
    model = trained(build)
    x = chain_input()
    folded = fastsn.fold(model).eval()
    programs = [torch.export.export(m, (x,)) for m in (folded, normalized.plain().eval())]
    operators, plain = [
        [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
        for program in programs
    ]
    assert operators == plain
    assert sorted(programs[0].state_dict) == sorted(programs[1].state_dict)
    assert size(programs[0].state_dict.values()) == size(programs[1].state_dict.values())
    assert not programs[0].constants

    file = io.BytesIO()
    torch.export.save(programs[0], file)
    file.seek(0)
    expected = model.eval()(x)
    torch.testing.assert_close(torch.export.load(file).module()(x), expected)


@double
@each_of_ours
def test_a_program_exported_in_training_mode_goes_on_training(build):
    """Each call advances u and v once, in buffers of its own, and has the gradients of eager."""
    model = trained(build)
    x = chain_input()
    program = torch.export.export(copy.deepcopy(model), (x,)).module()
    for _ in range(2):
        expected, actual = step(model, x), step(program, x)
        torch.testing.assert_close(actual, expected)


# torch.jit


@double
@answers("pytorch#49643", "pytorch#59302", "pytorch#57289")
def test_traced_in_training_mode(normalize):
    model = nn.Sequential(normalize(nn.Conv1d(2, 3, 2)), nn.Flatten(), normalize(nn.Linear(9, 4)))
    assert_traces(model, torch.jit.trace(model, (chain_input(),)))


@double
@pytest.mark.parametrize("name", [name for name in OURS if name != "MSN"])
def test_a_trace_in_training_mode_goes_on_training(name):
    model = trained(OURS[name])
    assert_traces(model, torch.jit.trace(model, (chain_input(),)))


def assert_traces(model, traced):
    """Each call of the trace advances u and v, which are the model's own, as eager mode does."""
    buffers = dict(model.named_buffers())
    assert all(b.data_ptr() == buffers[name].data_ptr() for name, b in traced.named_buffers())
    eager = fastsn.accelerate(copy.deepcopy(model))
    for size in (4, 7):
        x = torch.randn(size, 2, 4)
        expected, actual = step(eager, x), step(traced, x)
        torch.testing.assert_close(actual, {name: expected[name] for name in actual})


EXPORTERS = {
    "export": lambda model, x: torch.export.export(model, (x,)).module(),
    "trace": lambda model, x: torch.jit.trace(model, (x,)),
    "compile": lambda model, x: torch.compile(model, fullgraph=True, backend="aot_eager"),
}


@double
@each_of_ours
@pytest.mark.parametrize("make", EXPORTERS.values(), ids=EXPORTERS.keys())
@pytest.mark.parametrize("needs_grad", [True, False], ids=["grad", "no_grad"])
def test_what_evaluation_remembers_is_no_constant(build, make, needs_grad):
    """A graph made after an evaluation computes weights from the parameters."""
    torch._dynamo.reset()
    model, other = trained(build).eval(), trained(build).eval()
    x = chain_input()
    with torch.set_grad_enabled(needs_grad):
        model(x), model(x)
        made = make(model, x)
        torch.testing.assert_close(made(x), model(x))
        for program in (getattr(made, "_orig_mod", made), model):
            program.load_state_dict(other.state_dict())
        torch.testing.assert_close(made(x), other(x))
        torch.testing.assert_close(model(x), other(x))


@double
@each_model
@pytest.mark.parametrize("compiler", ["trace", "script"])
def test_folded_models_become_torchscript(build, compiler):
    model = trained(build)
    x = chain_input()
    folded = fastsn.fold(model).eval()
    scripted = torch.jit.trace(folded, (x,)) if compiler == "trace" else torch.jit.script(folded)
    assert not [n.kind() for n in scripted.inlined_graph.nodes() if "fastsn" in n.kind()]
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), model.eval()(x))


# ONNX


@pytest.fixture
def onnx():
    """torch.onnx.export, checked, as (operators, {initializer: shape}, function)."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")

    def export(model, x):
        program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
        file = program.model_proto.SerializeToString()
        proto = onnx.load_from_string(file)
        onnx.checker.check_model(proto, full_check=True)
        session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
        (name,) = (entry.name for entry in session.get_inputs())

        def call(x):
            return torch.from_numpy(session.run(None, {name: x.numpy()})[0])

        operators = [node.op_type for node in proto.graph.node]
        return operators, {i.name: list(i.dims) for i in proto.graph.initializer}, call

    return export


@pytest.mark.parametrize("name", ["torch-hook", "accelerated-torch-parametrized", "BSN", "MSN"])
def test_onnx_of_a_folded_model_is_that_of_plain_layers(onnx, name):
    model = trained(MODELS[name])
    x = chain_input()
    folded = fastsn.fold(model).eval()
    operators, initializers, call = onnx(folded, x)
    assert (operators, initializers) == onnx(normalized.plain().eval(), x)[:2]
    torch.testing.assert_close(call(x), model.eval()(x).detach())


@pytest.mark.parametrize("name", ["hook", "parametrized", "accelerated-torch-parametrized", "BSN"])
def test_onnx_of_a_model_as_it_is(onnx, name):
    """As with torch's functions: made of ONNX's operators, which know none of fastsn's."""
    model = trained(MODELS[name]).eval()
    x = chain_input()
    torch.testing.assert_close(onnx(model, x)[2](x), model(x).detach(), rtol=1e-5, atol=1e-5)


# Ahead of time


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor compiles with g++")
def test_compiled_ahead_of_time(tmp_path):
    model = trained(MODELS["accelerated-torch-parametrized"])
    x = chain_input()
    program = torch.export.export(fastsn.fold(model).eval(), (x,))
    path = str(tmp_path / "model.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=path)
    package = torch._inductor.aoti_load_package(path)
    assert not [n for n in package.get_constant_fqns() if "parametrizations" in n]
    torch.testing.assert_close(package(x), model.eval()(x))
