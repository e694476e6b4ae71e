"""Copies and pickles of normalized layers and of models of them."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fastsn
from helpers.accelerated import chain_input, step
from helpers.answers import answers
from helpers.normalized import MODELS, double, each_model
from helpers.torch_peers import FASTSN_PARAMETRIZED, each_form, each_parametrized_form


def through_a_file(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "save": through_a_file,
}
each_copy = pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES.keys())
each_pickle = pytest.mark.parametrize("how", ["pickle", "save"])


def assert_independent(module, twin, *inputs):
    """Both go the same way, and neither moves what is in the other."""
    state = copy.deepcopy(twin.state_dict())
    torch.testing.assert_close(state, module.state_dict(), rtol=0, atol=0)
    expected = step(module, *inputs)
    torch.testing.assert_close(twin.state_dict(), state, rtol=0, atol=0)
    torch.testing.assert_close(step(twin, *inputs), expected, rtol=0, atol=0)


# Copies and pickles


@double
@each_pickle
@answers("pytorch#137409", "ray#23894", forms=("parametrization",))
def test_pickles(normalize, how):
    model = nn.Sequential(normalize(nn.Conv2d(2, 3, 2)), nn.Flatten(), normalize(nn.Linear(12, 4)))
    x = torch.randn(2, 2, 3, 3)
    model(x)
    twin = COPIES[how](model)
    assert [type(module).__name__ for module in twin] == [type(module).__name__ for module in model]
    assert_independent(model, twin, x)


@double
@answers("pytorch#28594", "pytorch#102981", forms=("hook",))
def test_copied_after_a_forward(normalize):
    layer = normalize(nn.Linear(4, 4))
    x = torch.randn(2, 4)
    layer(x)
    assert_independent(layer, copy.deepcopy(layer), x)


@double
@each_copy
@each_model
def test_evaluation_leaves_nothing_to_copy(build, make_copy):
    model = build()
    x = chain_input()
    model(x)
    size = len(pickle.dumps(model))
    model.eval()(x), model(x)
    assert len(pickle.dumps(model)) <= size
    twin = make_copy(model)
    expected = model(x)
    torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert not torch.allclose(twin(x), expected)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert_independent(model.train(), make_copy(model), x)


class Recurrent(nn.Module):
    def __init__(self, kind, normalize):
        super().__init__()
        self.layer = kind(3, 4)
        normalize(self.layer, "weight_ih_l0")
        normalize(self.layer, "weight_hh_l0")

    def forward(self, x):
        return self.layer(x)[0]


@double
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@answers("pytorch#28594")
def test_recurrent_layers_copied_after_a_forward(normalize, kind):
    """Such a layer holds on to the weights of its last forward."""
    model = Recurrent(kind, normalize)
    x = torch.randn(5, 2, 3)
    model(x)
    assert_independent(model, copy.deepcopy(model), x)


@double
@each_form
def test_recurrent_layers_folded_after_a_forward(form):
    model = Recurrent(nn.LSTM, form.spectral_norm)
    x = torch.randn(5, 2, 3)
    model(x)
    folded = fastsn.fold(model)
    assert type(folded.layer) is nn.LSTM
    assert sorted(folded.layer.state_dict()) == sorted(nn.LSTM(3, 4).state_dict())
    torch.testing.assert_close(folded(x), model.eval()(x))


@double
@each_parametrized_form
@each_copy
def test_accelerated_recurrent_layers(form, make_copy):
    model = fastsn.accelerate(Recurrent(nn.LSTM, form.spectral_norm))
    x = torch.randn(5, 2, 3)
    for training in (True, False):
        model.train(training)(x)
        state = copy.deepcopy(model.state_dict())
        twin = make_copy(model)
        torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
        assert_independent(model, twin, x)


@double
@each_copy
def test_layers_taken_over_from_torch(make_copy):
    """Those too that a grouped call leaves alone."""
    layers = [nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)]
    parametrizations.spectral_norm(layers[0])
    parametrizations.spectral_norm(layers[1], "bias")
    parametrizations.orthogonal(layers[2])
    parametrizations.spectral_norm(layers[2])
    model = fastsn.accelerate(nn.Sequential(*layers))
    x = torch.randn(2, 4)
    model(x)
    assert_independent(model, make_copy(model), x)


@double
@each_copy
@each_parametrized_form
@pytest.mark.parametrize("of_the_copy", [True, False])
def test_removal_leaves_the_other_alone(form, make_copy, of_the_copy):
    model = fastsn.accelerate(form.spectral_norm(nn.Conv1d(2, 3, 2)))
    twin = make_copy(model)
    removed, other = (twin, model) if of_the_copy else (model, twin)
    x = chain_input()
    expected = other.eval()(x)
    parametrize.remove_parametrizations(removed.eval(), "weight")
    torch.testing.assert_close(removed(x), expected)
    torch.testing.assert_close(other(x), expected)
    assert type(removed) is nn.Conv1d and parametrize.is_parametrized(other, "weight")


@double
def test_a_shallow_copy_shares_and_both_work():
    layer = FASTSN_PARAMETRIZED.spectral_norm(nn.Linear(5, 7)).eval()
    twin = copy.copy(layer)
    x = torch.randn(2, 5)
    torch.testing.assert_close(twin(x), layer(x), rtol=0, atol=0)
    assert twin.parametrizations.weight.original is layer.parametrizations.weight.original


class Counted(nn.Linear):
    """A layer that says itself what is in a pickle of it."""

    pickled = 0

    def __getstate__(self):
        return {**super().__getstate__(), "pickled": self.pickled + 1}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.restored = True


class Uncopied(nn.Linear):
    def __deepcopy__(self, memo):
        return self


class Named(nn.Linear):
    def __reduce__(self):
        return str, ("a layer",)


def test_classes_keep_their_own_ways():
    normalize = FASTSN_PARAMETRIZED.spectral_norm
    layer = normalize(Counted(3, 3))
    for make_copy in COPIES.values():
        twin = make_copy(layer)
        assert (twin.pickled, twin.restored) == (1, True)
        assert isinstance(twin, Counted) and type(twin) is not type(layer)
    uncopied = normalize(Uncopied(3, 3))
    assert copy.deepcopy(uncopied) is uncopied
    assert type(pickle.loads(pickle.dumps(uncopied))).__bases__ == (Uncopied,)
    assert pickle.loads(pickle.dumps(normalize(Named(3, 3)))) == "a layer"


def test_a_class_derived_from_a_parametrized_one():
    layer = FASTSN_PARAMETRIZED.spectral_norm(nn.Linear(3, 3))
    layer.__class__ = type("Derived", (type(layer),), {})
    for make_copy in COPIES.values():
        with pytest.raises(TypeError, match="expected a parametrized module, got a Derived"):
            make_copy(layer)


@double
@each_copy
def test_other_parametrizations_and_modes_stay(make_copy):
    layer = nn.RNN(3, 4)
    parametrizations.orthogonal(layer, "weight_hh_l0")
    FASTSN_PARAMETRIZED.spectral_norm(layer, "weight_ih_l0", norm="bidirectional", scale=0.5)
    layer.parametrizations.weight_ih_l0.eval()
    twin = make_copy(layer)
    assert [m.training for m in twin.modules()] == [m.training for m in layer.modules()]
    assert repr(twin) == repr(layer)
    torch.testing.assert_close(twin.state_dict(), layer.state_dict(), rtol=0, atol=0)
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(twin(x)[0], layer(x)[0], rtol=0, atol=0)


def continue_elsewhere(_, models, x, folder):
    """In a process that has imported nothing: what it was sent, and what is in files."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    for name, sent in models.items():
        loaded = torch.load(folder / f"{name}.pt", weights_only=False)
        torch.save([step(sent, x), step(loaded, x)], folder / f"{name}-elsewhere.pt")


@double
def test_another_process_goes_on_in_the_same_way(tmp_path):
    models = {name: build() for name, build in MODELS.items()}
    x = chain_input()
    for name, model in models.items():
        model(x)
        torch.save(model, tmp_path / f"{name}.pt")
    # What is sent shares its memory.
    twins = copy.deepcopy(models)
    mp.spawn(continue_elsewhere, args=(twins, x, tmp_path), nprocs=1)
    for name, model in models.items():
        expected = step(model, x)
        for actual in torch.load(tmp_path / f"{name}-elsewhere.pt"):
            torch.testing.assert_close(actual, expected)
