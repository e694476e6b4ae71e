"""Sigmas in TensorBoard and other logs, as one call that waits for no device."""

from __future__ import annotations

import csv

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastsn
from fastsn.model import sigma_logger
from helpers.accelerated import chain, chain_input
from helpers.torch_peers import FASTSN_HOOK, FASTSN_PARAMETRIZED, TORCH_PARAMETRIZED

MODELS = {
    "hook": lambda: chain(FASTSN_HOOK),
    "parametrized": lambda: chain(FASTSN_PARAMETRIZED),
    "accelerated": lambda: fastsn.accelerate(chain(TORCH_PARAMETRIZED)),
    "modules": lambda: nn.Sequential(fastsn.nn.BSNConv1d(2, 3, 2), fastsn.nn.MSNLinear(3, 4)),
}
each_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())


def trained(model, log, steps=3):
    """What the log has to hold: the sigmas after each step."""
    expected = {}
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for step in range(steps):
        optimizer.zero_grad()
        model(chain_input()).square().sum().backward()
        optimizer.step()
        log(model, step)
        expected[step] = {
            f"sigma/{name}": float(value) for name, value in fastsn.sigmas(model).items()
        }
    assert len(expected[0]) == 3 and expected[0] != expected[2]
    return expected


def by_name(expected):
    names = expected[0]
    return {name: [(step, expected[step][name]) for step in expected] for name in names}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard(tmp_path):
    """One scalar per layer, all in one file, under the names of the weights."""
    tensorboard = pytest.importorskip("torch.utils.tensorboard", exc_type=ImportError)
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with tensorboard.SummaryWriter(tmp_path) as writer, fastsn.SigmaLogger(writer) as log:
        expected = by_name(trained(MODELS["accelerated"](), log))
    assert len(list(tmp_path.rglob("*tfevents*"))) == 1
    found = events.EventAccumulator(str(tmp_path))
    found.Reload()
    assert set(found.Tags()["scalars"]) == set(expected)
    for name, values in expected.items():
        written = [(event.step, event.value) for event in found.Scalars(name)]
        assert written == values  # sigmas are fp32, and so is the file


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_dictionary_in_tensorboard(tmp_path):
    """What `sigmas` returns is also what `add_scalars` takes; that waits, and makes many files."""
    tensorboard = pytest.importorskip("torch.utils.tensorboard", exc_type=ImportError)
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    sigmas = fastsn.sigmas(MODELS["hook"]())
    with tensorboard.SummaryWriter(tmp_path) as writer:
        writer.add_scalars("sigma", sigmas, 4)
    for name, value in sigmas.items():
        found = events.EventAccumulator(str(tmp_path / f"sigma_{name}"))
        found.Reload()
        assert [(e.step, e.value) for e in found.Scalars("sigma")] == [(4, float(value))]


@pytest.mark.parametrize("build", [MODELS["hook"], MODELS["parametrized"]])
def test_a_function(build):
    """As of W&B: all names of a step at once."""
    written = {}

    def write(values, step):
        assert step not in written
        written[step] = values

    with fastsn.SigmaLogger(write) as log:
        expected = trained(build(), log)
    assert written == expected
    assert all(type(value) is float for values in written.values() for value in values.values())


def test_csv(tmp_path):
    path = tmp_path / "sigmas.csv"
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        log = fastsn.SigmaLogger(
            lambda values, step: rows.writerows([step, *item] for item in values.items()), tag="s"
        )
        log(MODELS["hook"](), 5)
    with open(path, newline="") as file:
        assert [row[:2] for row in csv.reader(file)] == [
            ["5", "s/0.weight"], ["5", "s/3.weight"], ["5", "s/5.weight"]
        ]  # fmt: skip


class Waits(Exception):
    pass


class NoWaiting(TorchDispatchMode):
    """Whatever a GPU would have to be waited for raises."""

    WAITING = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "_unique2", "masked_select")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.WAITING:
            raise Waits(func)
        return func(*args, **(kwargs or {}))


@each_model
@pytest.mark.parametrize("training", [True, False])
def test_sigmas_wait_for_no_device(build, training):
    model = build().train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(Waits), NoWaiting():
        float(model[0].bias.sum())  # so that the next block could fail
    with NoWaiting():
        first, second = fastsn.sigmas(model), fastsn.sigmas(model)
    assert len(first) == sum(name.endswith("_u") for name in before)
    for name, sigma in first.items():
        assert sigma.shape == () and not sigma.requires_grad and sigma.equal(second[name])
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


class SlowEvent:
    """Has happened when it is waited for, or asked for the second time."""

    def __init__(self):
        self.asked = 0

    def query(self):
        self.asked += 1
        return self.asked > 1

    def synchronize(self):
        self.asked = 2


def test_values_that_arrive_late(monkeypatch):
    """Written by a later call, in order, under the step that they belong to."""

    class Late(sigma_logger._Arrival):
        def __init__(self, values):
            super().__init__(values)
            self.event = SlowEvent()

    monkeypatch.setattr(sigma_logger, "_Arrival", Late)
    written = []
    log = fastsn.SigmaLogger(lambda values, step: written.append((step, values)))
    model = MODELS["accelerated"]()
    log(model, 0)
    first = {f"sigma/{name}": float(value) for name, value in fastsn.sigmas(model).items()}
    assert written == []
    model(chain_input())
    log(model, 1)
    assert written == [(0, first)]
    log(model, 2), log.flush()
    assert [step for step, _ in written] == [0, 1, 2]
    assert written[1][1] == written[2][1] != first
    log.flush()
    assert len(written) == 3


def test_one_transfer_for_all_layers(monkeypatch):
    sizes = []

    class Counted(sigma_logger._Arrival):
        def __init__(self, values):
            super().__init__(values)
            sizes.append(values.shape)

    monkeypatch.setattr(sigma_logger, "_Arrival", Counted)
    fastsn.SigmaLogger(lambda values, step: None)(MODELS["accelerated"](), 0)
    assert sizes == [(3,)]


def test_models_of_several_types():
    model = nn.Sequential(fastsn.nn.SNLinear(3, 3), fastsn.nn.SNLinear(3, 3).double())
    written = []
    fastsn.SigmaLogger(lambda values, step: written.append(values))(model, 0)
    assert list(written[0]) == ["sigma/0.weight", "sigma/1.weight"]
    assert written[0]["sigma/1.weight"] == float(fastsn.sigmas(model)["1.weight"])


def test_what_cannot_be_written_to():
    with pytest.raises(TypeError, match="write must be a SummaryWriter or a function.*got 'runs'"):
        fastsn.SigmaLogger("runs")
