"""State dicts that load into layers with a running mean, and copies of such layers and models."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import spectral_norm as torch_hook

import fastsn
from fastsn.nn import convert_batchnorm
from helpers.checkpoint_forms import PEERS

LAYERS = {
    "Linear": ((5, 6), (7, 5)),
    "Conv1d": ((3, 6, 3), (4, 3, 8)),
    "Conv2d": ((4, 6, 3, 2, 1, 1, 2), (4, 4, 7, 6)),
    "Conv3d": ((2, 3, 2), (2, 2, 3, 4, 3)),
    "ConvTranspose1d": ((3, 6, 3), (4, 3, 8)),
    "ConvTranspose2d": ((4, 6, 4, 2, 1, 0, 2), (4, 4, 3, 5)),
    "ConvTranspose3d": ((2, 3, 2), (2, 2, 3, 4, 3)),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


def msn(name, **options):
    arguments, shape = LAYERS[name]
    return getattr(fastsn.nn, f"MSN{name}")(*arguments, **options), torch.randn(shape)


def plain(name, **options):
    return getattr(nn, name)(*LAYERS[name][0], **options)


def moved(layer):
    """The layer with statistics that are not those of the start."""
    for tensor in (layer.running_mean, layer.gain, layer.bias):
        if tensor is not None:
            nn.init.normal_(tensor)
    layer.num_batches_tracked.fill_(7)
    return layer


def forms(conv):
    """The same layer as plain one, and normalized in each form."""
    return {
        "plain": conv,
        "torch-hook": torch_hook(copy.deepcopy(conv)),
        "torch-parametrized": torch_parametrizations.spectral_norm(copy.deepcopy(conv)),
        "hook": fastsn.spectral_norm(copy.deepcopy(conv)),
        "parametrized": fastsn.parametrizations.spectral_norm(copy.deepcopy(conv)),
    }


FORMS = list(forms(nn.Linear(2, 2)))


def exact_sigma(weight, dim=0):
    matrix = weight.detach().movedim(dim, 0).flatten(1)
    return torch.linalg.matrix_norm(matrix.double(), 2)


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)


# Layers


@each_layer
@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("norm", ["matrix", "bidirectional"])
def test_round_trips(name, gain, norm):
    layer, x = msn(name, gain=gain, norm=norm)
    layer(x)
    other, _ = msn(name, gain=gain, norm=norm)
    other.load_state_dict(saved(layer.state_dict()))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = [
        other,
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(file, weights_only=False),
    ]
    for training in (False, True, True, False):
        expected = layer.train(training)(x)
        for twin in copies:
            assert torch.equal(twin.train(training)(x), expected)
            torch.testing.assert_close(twin.state_dict(), layer.state_dict(), rtol=0, atol=0)


@each_layer
@pytest.mark.parametrize("form", FORMS)
def test_layers_without_a_norm_load(name, form):
    source = forms(plain(name))[form]
    source(torch.randn(LAYERS[name][1]))
    layer, x = msn(name, gain=True)
    moved(layer).load_state_dict(saved(source.state_dict()))
    original = layer.parametrizations.weight.original
    state = source.state_dict()
    for key, value in state.items():
        if key.endswith(("weight", "weight_orig", "original")):
            assert torch.equal(original, value)
        for vector in ("_u", "_v"):
            if key.endswith(vector):
                assert torch.equal(getattr(layer.parametrizations.weight[0], vector), value)
    assert torch.equal(layer.bias, source.bias)
    assert not layer.running_mean.any() and not layer.num_batches_tracked and layer.gain.eq(1).all()
    layer.eval()
    if form != "plain":
        source.eval()(x)
        torch.testing.assert_close(layer.weight, source.weight)


@each_layer
@pytest.mark.usefixtures("double")
def test_vectors_are_iterated_for_a_plain_weight(name):
    """Whatever those of the layer were: the same file gives the same model."""
    layer, _ = msn(name)
    other, _ = msn(name)
    source = plain(name)
    nn.init.normal_(source.weight)
    state = torch.get_rng_state()
    for each in (layer, other):
        each.load_state_dict(source.state_dict())
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(layer.state_dict(), other.state_dict(), rtol=0, atol=0)
    sigma = exact_sigma(layer.eval().weight, layer.parametrizations.weight[0].dim)
    # The first singular values of these weights lie some percent apart: 100 steps do.
    torch.testing.assert_close(float(sigma), 1.0, rtol=0, atol=1e-3)


@pytest.mark.usefixtures("double")
def test_the_hook_form_of_old():
    """Without v, and with what was computed last."""
    source = torch_hook(nn.Conv2d(3, 4, 3))
    source(torch.randn(1, 3, 4, 4))
    state = dict(source.state_dict(), weight=source.weight.detach())
    del state["weight_v"]
    layer = fastsn.nn.MSNConv2d(3, 4, 3)
    layer.load_state_dict(state)
    assert torch.equal(layer.parametrizations.weight.original, source.weight_orig)
    torch.testing.assert_close(layer.eval().weight, source.weight)


@pytest.mark.parametrize("name", ["Linear", "Conv2d"])
@pytest.mark.parametrize("form", ["biggan", "mimicry"])
@pytest.mark.usefixtures("double")
def test_layers_that_keep_no_v_load(name, form):
    source = PEERS[form](plain(name))
    layer, x = msn(name)
    source(x)
    moved(layer).load_state_dict(saved(source.state_dict()))
    assert not layer.running_mean.any() and not layer.num_batches_tracked
    torch.testing.assert_close(layer.eval()(x), source.eval()(x))


def test_second_vectors_of_bsn():
    source = fastsn.nn.SNConv2d(3, 4, 3)
    layer = fastsn.nn.MSNConv2d(3, 4, 3, norm="bidirectional")
    layer.load_state_dict(source.state_dict())
    norm = layer.parametrizations.weight[0]
    assert torch.equal(norm._u, source.parametrizations.weight[0]._u)
    matrix = source.parametrizations.weight.original.detach().movedim(1, 0).flatten(1)
    sigma = norm._u2 @ matrix @ norm._v2
    torch.testing.assert_close(sigma, torch.linalg.matrix_norm(matrix, 2), rtol=0.05, atol=0)


def test_a_weight_without_bias_starts_at_zero():
    layer = moved(fastsn.nn.MSNConv2d(3, 4, 3))
    layer.load_state_dict(nn.Conv2d(3, 4, 3, bias=False).state_dict())
    assert not layer.bias.any()
    # The other way round the mean would take the bias away.
    layer = fastsn.nn.MSNConv2d(3, 4, 3, bias=False)
    layer.load_state_dict(nn.Conv2d(3, 4, 3).state_dict())


def test_own_checkpoints_must_be_whole():
    layer = moved(fastsn.nn.MSNConv2d(3, 4, 3, gain=True))
    state = layer.state_dict()
    for name in ("running_mean", "num_batches_tracked", "gain", "bias"):
        partial = {key: value.clone() for key, value in state.items() if key != name}
        other = moved(fastsn.nn.MSNConv2d(3, 4, 3, gain=True))
        before = getattr(other, name).detach().clone()
        with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
            other.load_state_dict(partial)
        other.load_state_dict(partial, strict=False)
        assert torch.equal(getattr(other, name), before)
    with pytest.raises(RuntimeError, match="Missing key.*original"):
        layer.load_state_dict({"bias": state["bias"]})
    with pytest.raises(RuntimeError, match='Unexpected key.*"nonsense"'):
        layer.load_state_dict({**state, "nonsense": torch.zeros(())})
    with pytest.raises(RuntimeError, match="size mismatch for parametrizations.weight.original"):
        layer.load_state_dict(nn.Conv2d(3, 4, 5).state_dict())


def test_the_state_dict_itself_stays():
    layer, state = fastsn.nn.MSNLinear(3, 4), nn.Linear(3, 4).state_dict()
    before = dict(state)
    layer.load_state_dict(state)
    assert state == before
    norm, state = fastsn.nn.MeanOnlyBatchNorm1d(4), nn.BatchNorm1d(4).state_dict()
    norm.load_state_dict(state)
    assert len(state) == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("assign", [False, True])
def test_types_of_checkpoints(dtype, assign):
    source = nn.Conv2d(3, 4, 3, dtype=dtype)
    layer = fastsn.nn.MSNConv2d(3, 4, 3)
    layer.load_state_dict(source.state_dict(), assign=assign)
    original = layer.parametrizations.weight.original
    assert original.dtype == (dtype if assign else torch.float32)
    assert torch.equal(original, source.weight.to(original.dtype))
    torch.testing.assert_close(float(exact_sigma(layer.eval().weight)), 1.0, rtol=0, atol=0.2)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("counts", [False, True])
def test_batch_norms_load(dims, gain, affine, counts):
    norm = getattr(nn, f"BatchNorm{dims}d")(3, affine=affine)
    x = 3 * torch.randn(6, 3, *(2,) * dims) + 1
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 2)
    norm(x)
    state = norm.state_dict()
    if not counts:
        del state["num_batches_tracked"]
    layer = getattr(fastsn.nn, f"MeanOnlyBatchNorm{dims}d")(3, affine=affine, gain=gain)
    layer.load_state_dict(saved(state))
    assert torch.equal(layer.running_mean, norm.running_mean)
    assert int(layer.num_batches_tracked) == counts
    assert not affine or torch.equal(layer.bias, norm.bias)
    if affine and gain:
        torch.testing.assert_close(layer.eval()(x), norm.eval()(x))
    own = saved(layer.state_dict())
    other = copy.deepcopy(layer)
    other.reset_running_stats()
    other.load_state_dict(own)
    torch.testing.assert_close(other.state_dict(), own, rtol=0, atol=0)


# Converted models


class Net(nn.Module):
    """A convolution without and a linear layer with a bias, and a norm that stands alone."""

    def __init__(self, wrap=lambda layer: layer, **options):
        super().__init__()
        self.conv = wrap(nn.Conv2d(3, 6, 3, bias=False))
        self.bn = nn.BatchNorm2d(6, **options)
        self.alone = nn.BatchNorm2d(6, **options)
        self.up = wrap(nn.ConvTranspose2d(6, 4, 3))
        self.up_bn = nn.BatchNorm2d(4, **options)
        self.fc = wrap(nn.Linear(4, 5))
        self.fc_bn = nn.BatchNorm1d(5, **options)

    def forward(self, x):
        x = self.alone(self.bn(self.conv(x)).relu())
        return self.fc_bn(self.fc(self.up_bn(self.up(x)).relu().mean((2, 3))))


def trained(model):
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for parameter in module.parameters(recurse=False):
                nn.init.uniform_(parameter, 0.5, 2)
    with torch.no_grad():
        for _ in range(4):
            model(2 * torch.randn(8, 3, 6, 6) + 1)
    return model.eval()


WRAPS = {
    "plain": lambda layer: layer,
    "torch-hook": torch_hook,
    "torch-parametrized": torch_parametrizations.spectral_norm,
    "hook": fastsn.spectral_norm,
    "parametrized": fastsn.parametrizations.spectral_norm,
}
each_wrap = pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS.keys())


@each_wrap
@pytest.mark.parametrize("options", [{}, {"eps": 0.1}, {"affine": False}], ids=str)
def test_checkpoints_of_the_original_load(wrap, options, double):
    source = trained(Net(wrap, **options))
    model = Net(**options).eval()
    convert_batchnorm(model, gain=True)
    x = torch.randn(2, 3, 6, 6)
    model.load_state_dict(saved(source.state_dict()))
    with torch.no_grad():
        torch.testing.assert_close(model(x), source(x), rtol=1e-11, atol=1e-11)


@each_wrap
@pytest.mark.parametrize("gain", [False, True])
def test_loading_is_converting(wrap, gain, double):
    """Where the vectors are the same, the numbers are too."""
    source = trained(Net(wrap))
    state = saved(source.state_dict())
    convert_batchnorm(source, gain=gain)
    model = Net()
    convert_batchnorm(model, gain=gain)
    model.load_state_dict(state)
    expected = source.state_dict()
    # A plain weight has no vectors to carry over: 15 steps from others end close by.
    close = {"rtol": 0.2, "atol": 0} if wrap is WRAPS["plain"] else {"rtol": 0, "atol": 0}
    for key, value in model.state_dict().items():
        if not key.endswith(("_u", "_v")) or not close["rtol"]:
            torch.testing.assert_close(value, expected[key], **close)


def test_own_checkpoints_of_converted_models_load():
    model = trained(Net())
    convert_batchnorm(model, gain=True)
    state = saved(model.state_dict())
    other = Net()
    convert_batchnorm(other, gain=True)
    other.load_state_dict(state)
    torch.testing.assert_close(other.state_dict(), state, rtol=0, atol=0)
    other.load_state_dict(state, assign=True)
    torch.testing.assert_close(other.state_dict(), state, rtol=0, atol=0)
    del state["conv.running_mean"]
    with pytest.raises(RuntimeError, match='Missing key.*"conv.running_mean"'):
        other.load_state_dict(state)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save", "inside"])
def test_the_loading_goes_along(how, double):
    source = trained(Net())
    model = Net().eval()
    convert_batchnorm(model, gain=True)
    state, x = source.state_dict(), torch.randn(2, 3, 6, 6)
    if how == "deepcopy":
        model = copy.deepcopy(model)
    elif how == "pickle":
        model = pickle.loads(pickle.dumps(model))
    elif how == "save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        model = torch.load(file, weights_only=False)
    else:
        model = nn.Sequential(nn.Identity(), model)
        state = nn.Sequential(nn.Identity(), source).state_dict()
    model.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(model(x), source(x), rtol=1e-11, atol=1e-11)


def test_a_copy_does_not_load_into_its_original():
    model = Net()
    convert_batchnorm(model)
    before = copy.deepcopy(model.state_dict())
    copy.deepcopy(model).load_state_dict(trained(Net()).state_dict())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_synchronized_norms_are_pickled():
    model = nn.Sequential(nn.ReLU(), nn.SyncBatchNorm(3))
    convert_batchnorm(model)
    x = torch.randn(2, 3)
    assert torch.equal(pickle.loads(pickle.dumps(model.eval()))(x), model(x))


def test_other_widths_are_refused_in_the_words_of_torch():
    source = Net()
    source.conv = nn.Conv2d(3, 8, 3, bias=False)
    model = Net()
    convert_batchnorm(model, gain=True)
    with pytest.raises(RuntimeError, match="size mismatch for conv.parametrizations.*original"):
        model.load_state_dict(source.state_dict())


def test_checkpoints_after_folding():
    model = trained(Net())
    convert_batchnorm(model, gain=True)
    folded = fastsn.fold(model).eval()
    x = torch.randn(2, 3, 6, 6)
    other = fastsn.fold(model)
    for parameter in other.parameters():
        nn.init.zeros_(parameter.data)
    other.load_state_dict(folded.state_dict())
    assert torch.equal(other.eval()(x), folded(x))
    with pytest.raises(RuntimeError, match='Unexpected key.*"bn.running_var"'):
        other.load_state_dict(Net().state_dict())
