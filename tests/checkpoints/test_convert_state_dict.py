"""`fastsn.convert_state_dict`: each form of a checkpoint from each other, checked by its owner."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import prune
from torch.nn.utils import spectral_norm as torch_hook

import fastsn
from fastsn import convert_state_dict
from helpers.checkpoint_forms import (
    OURS,
    PEERS,
    BigGanLinear,
    Net,
    assert_same_state,
    entries,
    mimicry,
    output,
    used,
    version_none,
)

pytestmark = pytest.mark.usefixtures("double")

FORMS = list(PEERS)
KEEPING_V = ["hook", "parametrization"]
each_way = pytest.mark.parametrize(
    "source, target", [(a, b) for a in FORMS for b in FORMS if a != "plain"]
)


# What a model computes stays, and its owner loads it strictly


@each_way
def test_the_owner_of_the_form_loads_it(source, target):
    # BigGAN and mimicry do one step more than the others in eval mode: where u and v have converged
    # that is none. Everywhere else the numbers stay however far they are.
    converges = source in KEEPING_V and target in ("biggan", "mimicry")
    model = used(Net(PEERS[source]), 20 if converges else 2)
    state = model.state_dict()
    other = Net(PEERS[target])
    new = convert_state_dict(state, target)
    other.load_state_dict(new)
    torch.testing.assert_close(output(other), output(model))
    assert entries(new) == entries(other.state_dict())
    assert dict(new._metadata) == dict(other.state_dict()._metadata)


@pytest.mark.parametrize("source", FORMS[:-1])
@pytest.mark.parametrize("target", FORMS[:-1])
def test_training_goes_on(source, target):
    """u and v are the start of the next step in each order."""
    model, other = used(Net(PEERS[source]), 400), Net(PEERS[target])
    other.load_state_dict(convert_state_dict(model.state_dict(), target))
    for net in (model, other):
        used(net, 1)
    torch.testing.assert_close(output(other), output(model))


@pytest.mark.parametrize("target", FORMS)
@pytest.mark.parametrize("known", FORMS[:-1])
def test_plain_weights(target, known):
    """A model in any form says which they are. Their norm is that of an SVD."""
    plain = Net(PEERS["plain"])
    state = plain.state_dict()
    new = convert_state_dict(state, target, model=Net(PEERS[known]))
    other = Net(PEERS[target])
    other.load_state_dict(new)
    if target != "plain":
        with torch.no_grad():
            for module in (plain.conv, plain.body["skip"], plain.linear, plain.embed):
                module.weight /= torch.linalg.matrix_norm(module.weight.flatten(1), 2)
    torch.testing.assert_close(output(other), output(plain))


def test_plain_weights_of_a_large_layer():
    """Random and square, where power iteration is slowest: 15 steps would be 2% off."""
    layer = nn.Linear(512, 512)
    state = convert_state_dict(layer.state_dict(), model=torch_hook(nn.Linear(512, 512)))
    u, v = (state[f"parametrizations.weight.0._{name}"] for name in "uv")
    sigma = torch.linalg.matrix_norm(layer.weight.detach(), 2)
    torch.testing.assert_close(u @ layer.weight.detach() @ v, sigma, rtol=2e-3, atol=0)


def test_plain_weights_get_the_same_vectors_each_time():
    state = Net(PEERS["plain"]).state_dict()
    models = Net(PEERS["hook"]), used(Net(PEERS["parametrization"]))
    with torch.device("meta"):
        models += (Net(PEERS["hook"]),)
    before = torch.get_rng_state()
    first, *rest = (convert_state_dict(state, model=model) for model in models)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.device("meta"):  # as a default it must not matter
        rest.append(convert_state_dict(state, model=models[0]))
    for other in rest:
        assert_same_state(other, first)


@pytest.mark.parametrize("source", FORMS[:-1])
@pytest.mark.parametrize("target", FORMS[:-1])
def test_there_and_back(source, target):
    """The weights to the bit; u and v as well between the forms that keep both."""
    state = used(Net(PEERS[source]), 300).state_dict()
    back = convert_state_dict(convert_state_dict(state, target), source)
    assert back.keys() == state.keys() and dict(back._metadata) == dict(state._metadata)
    exact = source == target or {source, target} == set(KEEPING_V) or target not in KEEPING_V
    for key, value in state.items():
        if "weight" in key and "_" not in key.rsplit("weight")[-1].removesuffix("_orig"):
            assert torch.equal(back[key], value)
        if exact and source in KEEPING_V and target in KEEPING_V:
            assert torch.equal(back[key], value)
        torch.testing.assert_close(back[key], value)


def test_several_forms_in_one_file():
    layers = [PEERS[form](nn.Linear(4, 4)) for form in FORMS[:-1]]
    model = nn.Sequential(*layers, nn.Linear(4, 4))
    x = torch.randn(2, 4)
    model(x), model.eval()
    state = model.state_dict()
    for target in KEEPING_V:
        other = nn.Sequential(*(PEERS[target](nn.Linear(4, 4)) for _ in layers), nn.Linear(4, 4))
        other.load_state_dict(convert_state_dict(state, target))
        torch.testing.assert_close(other.eval()(x), model(x))


def test_nothing_is_changed_and_nothing_copied_without_need():
    model = used(Net(PEERS["hook"]))
    state = model.state_dict()
    before, metadata = dict(state), copy.deepcopy(state._metadata)
    values = {key: value.clone() for key, value in state.items()}
    for target in FORMS:
        convert_state_dict(state, target)
    assert list(state) == list(before) and all(state[key] is before[key] for key in before)
    assert state._metadata == metadata
    assert all(torch.equal(value, values[key]) for key, value in state.items())
    new = convert_state_dict(state)
    assert new["conv.parametrizations.weight.original"] is state["conv.weight_orig"]
    assert new["conv.parametrizations.weight.0._u"] is state["conv.weight_u"]
    assert new["norm.running_mean"] is state["norm.running_mean"]


@pytest.mark.parametrize("source", FORMS[:-1])
def test_files_without_metadata(source):
    """As safetensors reads them."""
    model = used(Net(PEERS[source]), 400)
    for target in FORMS:
        other = Net(PEERS[target])
        new = convert_state_dict(dict(model.state_dict()), target)
        assert not hasattr(new, "_metadata")
        other.load_state_dict(new)
        torch.testing.assert_close(output(other), output(model))


# Names


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [nn.DataParallel, compiled, nn.Sequential])
@pytest.mark.parametrize("source", FORMS)
def test_prefixes_stay(wrap, source):
    model = used(Net(PEERS[source]))
    state = wrap(model).state_dict()
    path = next(iter(state)).removesuffix(next(iter(model.state_dict())))
    assert path in ("module.", "_orig_mod.", "0.")
    # The model that says what plain weights are need not be wrapped alike.
    known = Net(PEERS["hook"]) if path != "0." else nn.Sequential(Net(PEERS["hook"]))
    known = known if source == "plain" else None
    new = convert_state_dict(state, "parametrization", model=known)
    assert "parametrizations.weight.0" in " ".join(new)
    assert all(key.startswith(path) for key in new)
    other = Net(PEERS["parametrization"])
    wrap(other).load_state_dict(new)
    if source != "plain":
        torch.testing.assert_close(output(other), output(model))


def test_a_wrapped_model_knows_unwrapped_weights():
    state = Net(PEERS["plain"]).state_dict()
    expected = convert_state_dict(state, model=Net(PEERS["hook"]))
    wrapped = nn.DataParallel(compiled(Net(PEERS["hook"])))
    assert_same_state(convert_state_dict(state, model=wrapped), expected)


def rnn(normalize):
    model = nn.LSTM(3, 4, num_layers=2)
    for name in ("weight_hh_l0", "weight_ih_l1"):
        normalize(model, name)
    return model


def attention(normalize):
    model = nn.MultiheadAttention(4, 2, batch_first=True)
    normalize(model, "in_proj_weight")
    return model


@pytest.mark.parametrize("build", [rnn, attention])
@pytest.mark.parametrize("source, target", [KEEPING_V, KEEPING_V[::-1]])
def test_other_names_and_several_of_a_module(build, source, target):
    model, other = build(PEERS[source]), build(PEERS[target])
    x = torch.randn(2, 5, 3 if build is rnn else 4)
    inputs = (x,) if build is rnn else (x, x, x)
    with torch.no_grad():
        model(*inputs), model.eval()
        new = convert_state_dict(model.state_dict(), target)
        other.load_state_dict(new)
        torch.testing.assert_close(other.eval()(*inputs)[0], model(*inputs)[0])
    assert dict(new._metadata) == dict(other.state_dict()._metadata)
    assert_same_state(convert_state_dict(new, source), model.state_dict())


def test_other_parameters_stay():
    """Pruned ones, other parametrizations, and those that merely have such names."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)), torch_hook(nn.Linear(4, 4)))
    prune.random_unstructured(model[0], "weight", 0.5)
    torch_parametrizations.weight_norm(model[1])
    torch_parametrizations.orthogonal(model[2])
    model[3].register_buffer("u0", torch.ones(2))
    model[3].register_buffer("weight_u", torch.ones(2))
    state = model.state_dict()
    for target in FORMS:
        new = convert_state_dict(state, target)
        kept = [key for key in state if not key.startswith("4.")]
        assert [key for key in new if not key.startswith("4.")] == kept
        assert all(new[key] is state[key] for key in kept)


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    for layer in model:
        torch_hook(layer)
    new = convert_state_dict(model.state_dict())
    keys = [f"{i}.parametrizations.weight.original" for i in range(2)]
    assert new[keys[0]].data_ptr() == new[keys[1]].data_ptr()


def test_one_module_at_two_places():
    layer = nn.Linear(4, 4)
    known = torch_hook(nn.Linear(4, 4))
    new = convert_state_dict(
        nn.Sequential(layer, layer).state_dict(), model=nn.Sequential(known, known)
    )
    other = torch_parametrizations.spectral_norm(nn.Linear(4, 4))
    nn.Sequential(other, other).load_state_dict(new)


# Norms


@pytest.mark.parametrize("source, target", [KEEPING_V, KEEPING_V[::-1]])
@pytest.mark.parametrize("shape", [(3, 4, 3), (4, 4, 3)])
def test_second_vectors(source, target, shape):
    def build(form, options):
        layer = OURS[form](nn.Conv2d(*shape), norm="bidirectional", **options)
        layer(x), layer.eval()
        return layer

    x = torch.randn(2, shape[0], 5, 5)
    for options in ({}, {"scale": 1.5}, {"bound": True, "scale": 0.7}):
        model, other = build(source, options), build(target, options)
        new = convert_state_dict(model.state_dict(), target)
        other.load_state_dict(new)
        torch.testing.assert_close(other(x), model(x))
        plain = nn.Conv2d(*shape)
        known = model if options else None  # the file does not tell scale and bound
        plain.load_state_dict(convert_state_dict(new, "plain", model=known))
        torch.testing.assert_close(plain(x), model(x))
        for form in ("biggan", "mimicry"):
            with pytest.raises(ValueError, match=f"'{form}' has no place for BSN.*weight_?o?"):
                convert_state_dict(new, form)
    plain = nn.Conv2d(*shape)
    other.load_state_dict(convert_state_dict(plain.state_dict(), target, model=model))


@pytest.mark.parametrize("target", ["plain", "biggan", "mimicry"])
@pytest.mark.parametrize("source", KEEPING_V)
@pytest.mark.parametrize("channels", [(3, 5), (4, 4)])
def test_the_dimension_is_found(source, target, channels):
    """Of a square transposed convolution u fits two: u and v tell which one is meant."""
    layer = PEERS[source](nn.ConvTranspose2d(*channels, 3))
    x = torch.randn(2, channels[0], 4, 4)
    layer(x)
    expected = layer.eval()(x)
    weight = next(p for p in layer.parameters() if p.ndim == 4).detach()
    new = convert_state_dict(layer.state_dict(), target)
    if target == "plain":
        plain = nn.ConvTranspose2d(*channels, 3)
        plain.load_state_dict(new)
        torch.testing.assert_close(plain(x), expected)
    else:
        sigma = new[{"biggan": "sv0", "mimicry": "sn_sigma"}[target]]
        torch.testing.assert_close(weight / sigma, layer.weight.detach())


def test_the_model_says_the_dimension():
    """A square linear layer of BigGAN's, transposed: nothing in the file tells."""

    def build():
        layer = BigGanLinear(4, 4)
        layer.transpose = True
        layer.start()
        return layer

    layer = build()
    u = layer.u0[0]
    matrix = layer.weight.detach().T
    v = torch.nn.functional.normalize(matrix.T @ u, dim=0)
    sigma = torch.linalg.vector_norm(matrix @ v)
    plain = convert_state_dict(layer.state_dict(), "plain", model=build())["weight"]
    torch.testing.assert_close(plain, layer.weight.detach() / sigma)
    other = torch_hook(nn.Linear(4, 4), dim=0)
    other.load_state_dict(convert_state_dict(layer.state_dict(), "hook"))
    matrix = matrix.T
    v = torch.nn.functional.normalize(matrix.T @ u, dim=0)
    torch.testing.assert_close(other.weight_v, v)


def test_further_singular_values_are_left_out():
    layer = PEERS["biggan"](nn.Linear(4, 3))
    state = layer.state_dict()
    expected = convert_state_dict(state)
    state |= {"u1": torch.randn(1, 3), "sv1": torch.ones(1), "u2": torch.ones(1, 3)}
    assert_same_state(convert_state_dict(state), expected)


@pytest.mark.parametrize("size", [(3, 7), (7, 3), (5, 5), (5, 1), (1, 5)])
def test_the_hook_form_of_old(size):
    """Without v, and with what was computed last: its sigma is kept."""
    model = nn.Sequential(torch_hook(nn.Linear(*size)))
    x = torch.randn(2, size[0])
    model(x)
    state = version_none(model)
    expected = model.eval()(x)
    for target in KEEPING_V:
        other = nn.Sequential(PEERS[target](nn.Linear(*size)))
        new = convert_state_dict(state, target)
        other.load_state_dict(new)
        torch.testing.assert_close(other.eval()(x), expected)
        (v,) = (value for key, value in new.items() if key.endswith("_v"))
        torch.testing.assert_close(torch.linalg.vector_norm(v), torch.ones(()))
    plain = nn.Sequential(nn.Linear(*size))
    plain.load_state_dict(convert_state_dict(state, "plain"))
    torch.testing.assert_close(plain(x), expected)


@pytest.mark.parametrize("known", [None, *KEEPING_V])
@pytest.mark.parametrize("source", KEEPING_V)
def test_vectors_as_weights(source, known):
    """Their norm is exact, and the parametrization keeps no u and v: only a model tells of it."""

    def build(form):
        return PEERS[form](nn.LayerNorm(6), "weight")

    model = build(source)
    nn.init.normal_(next(iter(model.parameters())))
    x = torch.randn(2, 6)
    expected = model.train()(x)
    model.eval()
    for target in (*KEEPING_V, "plain"):
        if (source, known) == ("parametrization", None) and target != "plain":
            with pytest.raises(ValueError, match="got none"):
                convert_state_dict(model.state_dict(), target)
            continue
        other = nn.LayerNorm(6) if target == "plain" else build(target)
        new = convert_state_dict(model.state_dict(), target, model=known and build(known))
        if (source, known) != ("parametrization", None):
            other.load_state_dict(new)
            torch.testing.assert_close(other.eval()(x), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("source", FORMS[:-1])
def test_types(source, dtype):
    """Weights keep theirs; what is computed is computed in fp32 or wider."""
    layer = PEERS[source](nn.Linear(6, 5)).to(torch.float32)
    layer(torch.randn(2, 6, dtype=torch.float32))
    state = layer.to(dtype).state_dict()
    for target in FORMS:
        new = convert_state_dict(state, target)
        for key, value in new.items():
            if "weight" in key and not key.endswith(("_u", "_v")):
                assert value.dtype == dtype
        if target == "plain":
            wide = convert_state_dict({k: v.double() for k, v in state.items()}, "plain")
            error = (new["weight"].double() - wide["weight"]).abs().max()
            assert error <= 2 * torch.finfo(dtype).eps * wide["weight"].abs().max()


def test_complex_weights():
    layer = torch_parametrizations.spectral_norm(nn.Linear(4, 5, dtype=torch.complex128))
    x = torch.randn(2, 4, dtype=torch.complex128)
    expected = layer.eval()(x)
    plain = nn.Linear(4, 5, dtype=torch.complex128)
    plain.load_state_dict(convert_state_dict(layer.state_dict(), "plain"))
    torch.testing.assert_close(plain(x), expected)


def test_a_weight_of_zeros_can_still_be_trained():
    state = {"weight": torch.zeros(3, 4), "bias": torch.zeros(3)}
    new = convert_state_dict(state, model=torch_hook(nn.Linear(4, 3)))
    for name in "uv":
        vector = new[f"parametrizations.weight.0._{name}"]
        torch.testing.assert_close(torch.linalg.vector_norm(vector), torch.ones(()))


def test_on_the_meta_device():
    state = {"weight": torch.empty(3, 4, device="meta")}
    new = convert_state_dict(state, "hook", model=torch_hook(nn.Linear(4, 3)))
    assert {key: value.device.type for key, value in new.items()} == dict.fromkeys(new, "meta")


def test_the_default_is_the_parametrization():
    state = torch_hook(nn.Linear(4, 3)).state_dict()
    torch_parametrizations.spectral_norm(nn.Linear(4, 3)).load_state_dict(convert_state_dict(state))


def test_a_plain_file_is_plain():
    state = nn.Linear(4, 3).state_dict()
    assert_same_state(convert_state_dict(state, "plain"), state)


def test_mimicry_and_biggan_rename():
    """Both keep the same things, so nothing is computed."""
    layer = mimicry(nn.Linear(4, 3))
    state = layer.state_dict()
    new = convert_state_dict(state, "biggan")
    assert torch.equal(new["u0"], state["sn_u"]) and torch.equal(new["sv0"], state["sn_sigma"])
    assert_same_state(convert_state_dict(new, "mimicry"), state)
    assert fastsn.convert_state_dict is convert_state_dict
