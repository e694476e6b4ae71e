"""Checkpoints of every form through safetensors, which wants tensors that share nothing."""

from __future__ import annotations

import pytest
import torch

import fastsn
from helpers.checkpoint_forms import PEERS, SOURCES, TARGETS, Net, assert_same_state, output, used

safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors")
pytestmark = pytest.mark.usefixtures("double")


@pytest.mark.parametrize("source", SOURCES)
def test_safetensors_files(source, tmp_path):
    model = used(SOURCES[source]())
    path = tmp_path / "model.safetensors"
    safetensors.save_file(model.state_dict(), path)
    state = safetensors.load_file(path)
    assert_same_state(state, model.state_dict())
    same = SOURCES[source]()
    same.load_state_dict(state)
    torch.testing.assert_close(output(same), output(model))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", [*PEERS, "accelerated-biggan"])
def test_safetensors_models(source, target, tmp_path):
    model, other = used(SOURCES[source](), 20), TARGETS[target]()
    path = str(tmp_path / "model.safetensors")
    safetensors.save_model(model, path)
    safetensors.load_model(other, path)
    expected = TARGETS[target]()
    expected.load_state_dict(model.state_dict())
    assert_same_state(other.state_dict(), expected.state_dict())
    # And what it holds then can be saved.
    safetensors.save_model(used(other), path)
    again = TARGETS[target]()
    safetensors.load_model(again, path)
    assert_same_state(again.state_dict(), other.state_dict())


@pytest.mark.parametrize("form", PEERS)
def test_safetensors_of_converted_files(form, tmp_path):
    path = tmp_path / "model.safetensors"
    for source in list(PEERS)[:-1]:
        state = fastsn.convert_state_dict(used(Net(PEERS[source])).state_dict(), form)
        safetensors.save_file(state, path)
        assert_same_state(safetensors.load_file(path), state)
