"""`load_state_dict` of fastsn's layers: the form of a checkpoint is detected, strict or not."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize
from torch.nn.utils import spectral_norm as torch_hook
from torch.nn.utils.spectral_norm import SpectralNorm

import fastsn
from fastsn.checkpoints import convert
from helpers.answers import answers
from helpers.checkpoint_forms import (
    OURS,
    PEERS,
    SOURCES,
    TARGETS,
    Net,
    assert_same_state,
    entries,
    output,
    used,
    version_none,
)

pytestmark = pytest.mark.usefixtures("double")


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


each_target = pytest.mark.parametrize("target", TARGETS)
each_source = pytest.mark.parametrize("source", SOURCES)


@each_target
@each_source
def test_every_model_loads_every_form(source, target):
    model, other = used(SOURCES[source](), 20), TARGETS[target]()
    expected = output(model)
    if source == "plain":
        with torch.no_grad():
            for module in (model.conv, model.body["skip"], model.linear, model.embed):
                module.weight /= torch.linalg.matrix_norm(module.weight.flatten(1), 2)
        expected = output(model)
    before = entries(other.state_dict())
    output(other)  # what is kept of this must not outlive it
    result = other.load_state_dict(saved(model.state_dict()), strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    torch.testing.assert_close(output(other), expected)
    assert entries(other.state_dict()) == before
    # And in training, from the next step on.
    if source != "plain":
        torch.testing.assert_close(output(used(other, 1)), output(used(model, 1)))


@each_target
@each_source
def test_loading_is_converting(source, target):
    """However far u and v are: what a layer loads is what `convert_state_dict` makes."""
    state = used(SOURCES[source]()).state_dict()
    other = TARGETS[target]()
    other.load_state_dict(state)
    form = next(form for form in PEERS if form in target.replace("module", "parametrization"))
    model = other if source == "plain" else None
    assert_same_state(other.state_dict(), fastsn.convert_state_dict(state, form, model=model))


# Layers that were registered, that torch itself copies, saves, or has registered before.


@answers("pytorch#25092", "pytorch#21251")
def test_old_and_new_checkpoints_load_into_each_other(normalize):
    for form in ("hook", "parametrization"):
        source = PEERS[form](nn.Linear(4, 3))
        x = torch.randn(2, 4)
        source(x)
        layer = normalize(nn.Linear(4, 3))
        layer.load_state_dict(source.state_dict())
        torch.testing.assert_close(layer.eval()(x), source.eval()(x))


def test_torch_refuses_for_that_reason():
    hook, parametrized = (PEERS[form](nn.Linear(4, 3)) for form in ("hook", "parametrization"))
    with pytest.raises(RuntimeError, match='Missing key.*"parametrizations.weight.original"'):
        parametrized.load_state_dict(hook.state_dict())
    with pytest.raises(RuntimeError, match='Missing key.*"weight_orig"'):
        hook.load_state_dict(parametrized.state_dict())


HOW = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "nested": lambda model: nn.Sequential(nn.Identity(), model),
    "DataParallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
}


@each_target
@pytest.mark.parametrize("how", HOW)
def test_the_loading_goes_along(target, how):
    model = HOW[how](TARGETS[target]())
    source = used(Net(PEERS["biggan" if "biggan" not in target else "hook"]), 20)
    state = source.state_dict()
    path = {"nested": "1.", "DataParallel": "module.", "compiled": "_orig_mod."}.get(how, "")
    model.load_state_dict({path + key: value for key, value in state.items()})
    inner = model if not path else model.get_submodule(path[:-1])
    torch.testing.assert_close(output(inner), output(source))


def test_a_copy_does_not_load_into_its_original():
    model = Net(OURS["parametrization"])
    before = copy.deepcopy(model.state_dict())
    copy.deepcopy(model).load_state_dict(Net(PEERS["plain"]).state_dict())
    assert_same_state(model.state_dict(), before)


@each_target
def test_the_state_dict_itself_stays(target):
    state = used(Net(PEERS["mimicry"])).state_dict()
    before = dict(state)
    values = {key: value.clone() for key, value in state.items()}
    TARGETS[target]().load_state_dict(state)
    assert list(state) == list(before) and all(state[key] is before[key] for key in before)
    assert_same_state(state, values)


@pytest.mark.parametrize("form", ["hook", "parametrization"])
def test_a_layer_that_is_normalized_no_more_loads_plain_weights(form):
    layer = OURS[form](nn.Linear(4, 3))
    if form == "hook":
        fastsn.remove_spectral_norm(layer)
        assert not layer._load_state_dict_pre_hooks
    else:
        parametrize.remove_parametrizations(layer, "weight")
    state = nn.Linear(4, 3).state_dict()
    layer.load_state_dict(state)
    assert_same_state(layer.state_dict(), state)
    with pytest.raises(RuntimeError, match='Unexpected key.*"weight_orig"'):
        layer.load_state_dict(torch_hook(nn.Linear(4, 3)).state_dict())
    other = "hook" if form == "parametrization" else "parametrization"
    OURS[other](layer).load_state_dict(PEERS[form](nn.Linear(4, 3)).state_dict())


@pytest.mark.parametrize("target", ["hook", "parametrization", "module", "accelerated-biggan"])
def test_a_folded_model_knows_nothing_of_it(target):
    folded = fastsn.fold(TARGETS[target]())
    assert all(
        getattr(hook, "hook", None) is not convert.load
        for module in folded.modules()
        for hook in module._load_state_dict_pre_hooks.values()
    )
    folded.load_state_dict(Net(PEERS["plain"]).state_dict())


def test_two_weights_of_a_module():
    def build(normalize):
        model = nn.LSTM(3, 4)
        for name in ("weight_hh_l0", "weight_ih_l0"):
            normalize(model, name)
        return model

    x = torch.randn(2, 5, 3)
    for source in ("hook", "parametrization"):
        model = build(PEERS[source])
        with torch.no_grad():
            model(x), model.eval()
            for target in ("hook", "parametrization"):
                other = build(OURS[target])
                own = [hook for hook in loads(other) if hook.hook is convert.load]
                assert len(own) == 1
                other.load_state_dict(model.state_dict())
                torch.testing.assert_close(other.eval()(x)[0], model(x)[0])


def loads(module):
    return module._load_state_dict_pre_hooks.values()


@pytest.mark.parametrize("target", ["hook", "parametrization"])
@pytest.mark.parametrize("source", ["hook", "parametrization"])
def test_vectors_as_weights(source, target):
    """Their norm is exact: one form keeps u and v, the other does not."""
    layer, other = PEERS[source](nn.LayerNorm(5)), OURS[target](nn.LayerNorm(5))
    x = torch.randn(2, 5)
    nn.init.normal_(next(iter(layer.parameters())))
    layer(x)
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other.eval()(x), layer.eval()(x))


@pytest.mark.parametrize("form", ["hook", "parametrization"])
@pytest.mark.parametrize("source", ["hook", "parametrization", "plain"])
@pytest.mark.parametrize("channels", [(3, 5), (4, 4)])
def test_transposed_convolutions(source, form, channels):
    layer = PEERS[source](nn.ConvTranspose2d(*channels, 3))
    other = OURS[form](nn.ConvTranspose2d(*channels, 3))
    x = torch.randn(2, channels[0], 4, 4)
    layer(x)
    other.load_state_dict(layer.state_dict())
    if source == "plain":
        matrix = layer.weight.detach().transpose(0, 1).flatten(1)
        sigma = torch.linalg.matrix_norm(matrix, 2)
        other.eval()(x)
        torch.testing.assert_close(other.weight, layer.weight / sigma, rtol=1e-3, atol=0)
    else:
        torch.testing.assert_close(other.eval()(x), layer.eval()(x))


def test_bsn_layers_load_sn_and_bsn():
    layer = fastsn.nn.BSNConv2d(3, 4, 3)
    x = torch.randn(2, 3, 5, 5)
    for source in (fastsn.spectral_norm, fastsn.parametrizations.spectral_norm):
        model = source(nn.Conv2d(3, 4, 3), norm="bidirectional")
        model(x)
        layer.load_state_dict(model.state_dict())
        torch.testing.assert_close(layer.eval()(x), model.eval()(x))
    source = torch_parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))
    layer.load_state_dict(source.state_dict())
    norm, state = layer.parametrizations.weight[0], source.state_dict()
    assert torch.equal(norm._u, state["parametrizations.weight.0._u"])
    matrix = source.parametrizations.weight.original.detach().transpose(0, 1).flatten(1)
    sigma = torch.linalg.matrix_norm(matrix, 2)
    torch.testing.assert_close(norm._u2 @ matrix @ norm._v2, sigma, rtol=1e-3, atol=0)
    # The other way round something would be lost.
    for other in (fastsn.nn.SNConv2d(3, 4, 3), fastsn.spectral_norm(nn.Conv2d(3, 4, 3))):
        with pytest.raises(RuntimeError, match='Unexpected key.*_u2"'):
            other.load_state_dict(fastsn.nn.BSNConv2d(3, 4, 3).state_dict())
        with pytest.raises(RuntimeError, match='Unexpected key.*_u2"'):
            other.load_state_dict(model.state_dict())


def test_an_accelerated_biggan_layer_refuses_bsn():
    layer = nn.Sequential(PEERS["biggan"](nn.Conv2d(3, 4, 3)))
    fastsn.accelerate(layer)
    model = nn.Sequential(fastsn.nn.BSNConv2d(3, 4, 3))
    with pytest.raises(RuntimeError, match='Missing key.*"0.u0"'):
        layer.load_state_dict(model.state_dict())


# Kinds of files and of loading


@each_target
@pytest.mark.parametrize("metadata", [True, False])
def test_the_hook_form_of_old(target, metadata):
    source = used(Net(PEERS["hook"]), 20)
    state = version_none(source)
    other = TARGETS[target]()
    other.load_state_dict(state if metadata else dict(state))
    torch.testing.assert_close(output(other), output(source))


@pytest.mark.parametrize("size", [(3, 7), (7, 3), (5, 5)])
@pytest.mark.parametrize("target", ["hook", "parametrization"])
def test_the_hook_form_of_old_before_it_has_converged(target, size):
    source, other = torch_hook(nn.Linear(*size)), OURS[target](nn.Linear(*size))
    x = torch.randn(2, size[0])
    source(x)
    other.load_state_dict(version_none(source))
    torch.testing.assert_close(other.eval()(x), source.eval()(x))


@each_target
@each_source
def test_assign(source, target):
    model, other = used(SOURCES[source]()), TARGETS[target]()
    state = model.state_dict()
    expected = TARGETS[target]()
    expected.load_state_dict(state)
    other.load_state_dict(state, assign=True)
    assert_same_state(other.state_dict(), expected.state_dict())
    torch.testing.assert_close(output(other), output(expected))
    weight = next(
        value for key, value in state.items() if key.startswith("conv.") and value.ndim > 3
    )
    assert any(p.data_ptr() == weight.data_ptr() for p in other.parameters())


@pytest.mark.parametrize("source", PEERS)
@pytest.mark.parametrize("target", OURS)
def test_into_a_model_on_the_meta_device(source, target):
    model = used(Net(PEERS[source]), 20)
    with torch.device("meta"):
        other = Net(OURS[target])
    other.load_state_dict(model.state_dict(), assign=True)
    assert not any(tensor.is_meta for tensor in other.state_dict().values())
    expected = Net(OURS[target])
    expected.load_state_dict(model.state_dict())
    torch.testing.assert_close(output(other), output(expected))
    assert_same_state(other.state_dict(), expected.state_dict())


@each_target
@pytest.mark.parametrize("source", PEERS)
def test_partial_files_load_when_not_strict(source, target):
    model, other = used(Net(PEERS[source])), TARGETS[target]()
    state = model.state_dict()
    partial = {key: value for key, value in state.items() if not key.startswith("linear")}
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(RuntimeError, match='Missing key.*"linear'):
        other.load_state_dict(partial)
    other.load_state_dict(before)
    result = other.load_state_dict({**partial, "nonsense": torch.ones(1)}, strict=False)
    assert result.unexpected_keys == ["nonsense"]
    assert all(key.startswith("linear") for key in result.missing_keys)
    expected = TARGETS[target]()
    expected.load_state_dict(state)
    for key, value in other.state_dict().items():
        source_of = before if key.startswith("linear") else expected.state_dict()
        assert torch.equal(value, source_of[key]), key


@pytest.mark.parametrize("target", OURS)
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("source", PEERS)
def test_half_precision_files(source, target, assign, dtype):
    """u and v are as wide as they are computed in; weights are as torch's rules say."""
    torch.set_default_dtype(torch.float32)
    state = used(Net(PEERS[source])).to(dtype).state_dict()
    other = Net(OURS[target])
    other.load_state_dict(state, assign=assign)
    for key, value in other.state_dict().items():
        if key.endswith(("_u", "_v")):
            assert value.dtype == torch.float32
        elif value.is_floating_point():
            assert value.dtype == (dtype if assign else torch.float32)
    weights = {key: value for key, value in state.items() if value.ndim > 1 and "u" not in key[-3:]}
    for value in weights.values():
        assert any(torch.equal(p, value.to(p.dtype)) for p in other.parameters())


@each_target
@pytest.mark.parametrize("source", PEERS)
def test_what_does_not_fit_is_reported_by_torch(source, target):
    model, other = Net(PEERS[source]), TARGETS[target]()
    wide = nn.Linear(9, 5)
    model.linear = PEERS[source](wide)
    name = {"h": "weight_orig", "b": "weight"}.get(target.split("-")[-1][0], "original")
    with pytest.raises(RuntimeError, match=rf"size mismatch for linear\S*{name}: ") as error:
        other.load_state_dict(model.state_dict())
    assert "Missing" not in str(error.value) and "Unexpected" not in str(error.value)
    if source == "plain":
        assert str(error.value).count("size mismatch") == 1


@each_target
@pytest.mark.parametrize("form", ["biggan", "mimicry"])
def test_a_u_of_another_weight_is_reported_by_torch(form, target):
    state = Net(PEERS[form]).state_dict()
    key = {"biggan": "conv.u0", "mimicry": "conv.sn_u"}[form]
    state[key] = torch.ones(1, 3)
    with pytest.raises(RuntimeError, match=r"size mismatch for conv\S*u0?: ") as error:
        TARGETS[target]().load_state_dict(state)
    assert str(error.value).count("size mismatch") == 1


@pytest.mark.parametrize("target", OURS)
def test_a_weight_with_other_dimensions_is_reported_by_torch(target):
    layer = OURS[target](nn.Conv2d(3, 4, 3))
    for other in (nn.Conv1d(3, 4, 3), nn.LayerNorm(4)):
        with pytest.raises(RuntimeError, match=r"size mismatch for \S*(weight_orig|original): "):
            layer.load_state_dict(other.state_dict())


@pytest.mark.parametrize("target", OURS)
def test_what_is_not_whole_is_reported_by_torch(target):
    for source, missing in (
        ("hook", "weight_u"),
        ("parametrization", "original"),
        ("biggan", "u0"),
    ):
        layer, other = PEERS[source](nn.Linear(4, 3)), OURS[target](nn.Linear(4, 3))
        state = {key: value for key, value in layer.state_dict().items() if missing not in key}
        with pytest.raises(RuntimeError, match="key"):
            other.load_state_dict(state)


def test_unknown_parametrizations_are_left_to_torch():
    source = torch_parametrizations.spectral_norm(nn.Linear(4, 4))
    parametrize.register_parametrization(source, "weight", nn.Linear(4, 4))
    with pytest.raises(RuntimeError, match='Unexpected key.*"parametrizations.weight.1.weight"'):
        fastsn.spectral_norm(nn.Linear(4, 4)).load_state_dict(source.state_dict())
    own = fastsn.parametrizations.spectral_norm(nn.Linear(4, 4))
    parametrize.register_parametrization(own, "weight", nn.Linear(4, 4))
    own.load_state_dict(source.state_dict())
    x = torch.randn(2, 4)
    torch.testing.assert_close(own.eval()(x), source.eval()(x))


def test_torch_subclasses_stay_as_they_are():
    class Own(SpectralNorm):
        """As diffusers has one."""

    model = nn.Sequential(nn.Linear(4, 4), torch_hook(nn.Linear(4, 4)))
    Own.apply(model[0], "weight", 1, 0, 1e-12).__class__ = Own
    fastsn.accelerate(model)
    with pytest.raises(RuntimeError, match='Missing key.*"0.weight_orig"') as error:
        model.load_state_dict(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).state_dict())
    assert '"1.weight_orig"' not in str(error.value)
