"""State dicts, removal and copies of both forms: files and models pass between torch and fastsn."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

from helpers.torch_peers import (
    FASTSN_HOOK,
    FASTSN_PARAMETRIZED,
    TORCH_HOOK,
    TORCH_PARAMETRIZED,
    Layer,
    each_form,
    each_hook_form,
    each_layer,
    each_pair,
    each_parametrized_form,
    iterate,
    normalized,
    raised,
    slow_linear,
)


def forwards(module, x, modes=(False, True, True, False)):
    with torch.no_grad():
        return [module.train(mode)(x) for mode in modes]


def trained(form, count=2):
    module = form.spectral_norm(nn.Linear(3, 4))
    for _ in range(count):
        module(torch.randn(2, 3)).sum().backward()
    return module


# Layout


@each_hook_form
def test_hook_keys_and_metadata(form):
    state = trained(form).state_dict()
    assert list(state) == ["bias", "weight_orig", "weight_u", "weight_v"]
    assert state._metadata == {"": {"version": 1, "spectral_norm": {"weight.version": 1}}}


@each_hook_form
def test_hook_metadata_key_may_not_be_there_yet(form):
    module = form.spectral_norm(nn.Linear(3, 4))
    hook = next(iter(module._forward_pre_hooks.values()))
    module._register_state_dict_hook(form.StateDictHook(hook))
    with pytest.raises(RuntimeError, match=r"Unexpected key in metadata\['spectral_norm'\]: weig"):
        module.state_dict()


@each_parametrized_form
def test_parametrized_keys_and_metadata(form):
    state = trained(form).state_dict()
    prefix = "parametrizations.weight"
    assert list(state) == ["bias", f"{prefix}.original", f"{prefix}.0._u", f"{prefix}.0._v"]
    names = ("", "parametrizations", prefix, f"{prefix}.0")
    assert state._metadata == {name: {"version": 1} for name in names}


@each_parametrized_form
def test_parametrized_vector_has_no_buffers(form):
    state = form.spectral_norm(nn.Linear(3, 4), "bias").state_dict()
    assert list(state) == ["weight", "parametrizations.bias.original"]


# Loading


@each_pair
@each_layer
@pytest.mark.parametrize("towards_torch", [False, True], ids=["to_fastsn", "to_torch"])
def test_strict_loads_between_torch_and_fastsn(peer, ours, layer: Layer, towards_torch):
    writer, reader = (ours, peer) if towards_torch else (peer, ours)
    source = writer.spectral_norm(layer.build(), layer.name, n_power_iterations=2)
    target = reader.spectral_norm(layer.build(), layer.name, n_power_iterations=2)
    inputs = layer.example()
    layer.call(source, inputs)
    result = target.load_state_dict(source.state_dict(), strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    for mode in (False, True, True, False):
        expected, actual = (layer.call(m.train(mode), inputs) for m in (source, target))
        torch.testing.assert_close(actual, expected)
    pair = (source.state_dict(), target.state_dict())
    assert list(pair[0]) == list(pair[1])
    for key, value in pair[0].items():
        torch.testing.assert_close(pair[1][key], value)


@each_form
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("forwards_before", [1, 3])
def test_removing_and_adding_again_does_not_matter(form, assign, forwards_before):
    module = trained(form, forwards_before)
    state = copy.deepcopy(module.state_dict())
    x = torch.randn(2, 3)
    expected = forwards(module, x)
    remove(form, module)
    form.spectral_norm(module)
    assert any(not torch.equal(value, state[key]) for key, value in module.state_dict().items())
    module.load_state_dict(copy.deepcopy(state), assign=assign)
    for actual, wanted in zip(forwards(module, x), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@each_form
def test_loads_in_place(form):
    module = trained(form)
    pointers = [tensor.data_ptr() for tensor in form.vectors(module)]
    module.load_state_dict(trained(form).state_dict())
    assert [tensor.data_ptr() for tensor in form.vectors(module)] == pointers


@each_form
def test_partial_dicts_load_when_not_strict(form):
    module = trained(form)
    weight, u, v = (
        next(key for key, value in module.state_dict(keep_vars=True).items() if value is tensor)
        for tensor in form.vectors(module)
    )
    state = copy.deepcopy(module.state_dict())
    metadata = state._metadata["" if form.v_first else "parametrizations.weight.0"]
    state["nonsense"] = "nonsense"
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "nonsense"'):
        module.load_state_dict(state, strict=True)
    for change in (
        lambda: None,
        lambda: state.pop(weight),
        lambda: state.pop(u),
        lambda: state.pop(v),
        lambda: state.update(weight=module.weight.detach().clone()),
        lambda: metadata.clear(),
        lambda: state.pop("weight"),
        lambda: state.pop("bias"),
    ):
        change()
        kept = [tensor.clone() for tensor in form.vectors(module)]
        module.load_state_dict(copy.deepcopy(state), strict=False)
        if "weight" in state and form in (FASTSN_HOOK, FASTSN_PARAMETRIZED):
            # A plain weight, which torch's forms do not know: it is loaded.
            assert torch.equal(form.vectors(module)[0], state["weight"])
            continue
        for before, now in zip(kept, form.vectors(module), strict=True):
            assert torch.equal(before, now)


def version_none(module):
    """The state dict that torch wrote before `weight_v` was a buffer."""
    state = copy.deepcopy(module.state_dict())
    for metadata in state._metadata.values():
        metadata.pop("spectral_norm", None)
    for key in [key for key in state if key.endswith("weight_v")]:
        del state[key]
        prefix = key.removesuffix("weight_v")
        state[prefix + "weight"] = module.get_submodule(prefix.rstrip(".")).weight.detach().clone()
    return state


@each_hook_form
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.usefixtures("double")
def test_version_none_solves_for_v(form, nested):
    module = trained(form, 3)
    target = form.spectral_norm(nn.Linear(3, 4))
    wrap = nn.Sequential if nested else (lambda layer: layer)
    state = version_none(wrap(module))
    wrap(target).load_state_dict(state)
    assert torch.equal(target.weight_u, module.weight_u)
    x = torch.randn(2, 3)
    for actual, expected in zip(forwards(target, x), forwards(module, x), strict=True):
        torch.testing.assert_close(actual, expected)


@each_hook_form
def test_version_none_of_a_module_never_used_loads(form):
    module = form.spectral_norm(nn.Linear(3, 4))
    state = version_none(module)
    form.spectral_norm(nn.Linear(3, 4)).load_state_dict(state)


@each_hook_form
def test_new_layout_without_metadata_is_new(form):
    module = trained(form)
    plain = dict(module.state_dict())
    target = form.spectral_norm(nn.Linear(3, 4))
    target.load_state_dict(plain)
    for actual, expected in zip(form.vectors(target), form.vectors(module), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("missing", ["weight_orig", "weight", "weight_u"])
def test_version_none_with_a_key_missing(missing):
    state = version_none(trained(TORCH_HOOK))
    del state[missing]
    errors = []
    for form in (TORCH_HOOK, FASTSN_HOOK):
        module = form.spectral_norm(nn.Linear(3, 4))
        module.load_state_dict(copy.deepcopy(state), strict=False)
        errors.append(raised(lambda m=module: m.load_state_dict(copy.deepcopy(state))))
    assert type(errors[0]) is type(errors[1]) is RuntimeError
    assert str(errors[0]) == str(errors[1]) and f'"{missing}"' in str(errors[1])


# Removal


def remove(form, module, name="weight"):
    """Takes the normalization off without an iteration."""
    if form.v_first:
        return form.remove(module, name)
    was_training = module.training
    return parametrize.remove_parametrizations(module.eval(), name).train(was_training)


@each_form
@pytest.mark.parametrize("requires_grad", [True, False])
def test_removal_bakes_the_last_weight_in(form, requires_grad):
    module = nn.Linear(3, 4)
    weight = module.weight.requires_grad_(requires_grad)
    form.spectral_norm(module)
    x = torch.randn(2, 3)
    for _ in range(3):
        last = module(x).detach()
    remove(form, module)
    assert type(module) is nn.Linear and module.training
    torch.testing.assert_close(module(x), last)
    assert set(module.state_dict()) == {"weight", "bias"}
    assert "spectral_norm" not in module.state_dict()._metadata[""]
    assert not module._forward_pre_hooks and not module._buffers
    assert not hasattr(module, "weight_orig") and not hasattr(module, "parametrizations")
    if form.v_first:
        assert module.weight is not weight and module.weight.requires_grad
    else:
        assert module.weight is weight and module.weight.requires_grad is requires_grad
    form.spectral_norm(module)(x)


@each_hook_form
def test_hook_removal_does_not_iterate(form):
    module = form.spectral_norm(slow_linear())
    module(torch.randn(1, 5, dtype=torch.float64))
    expected = module.weight.detach().clone()
    weight = form.remove(module).weight
    assert isinstance(weight, nn.Parameter)
    torch.testing.assert_close(weight.detach(), expected)


@each_parametrized_form
@pytest.mark.parametrize("training, steps", [(True, 2), (False, 0)])
def test_parametrized_removal_reads_the_weight_once(form, training, steps):
    module = form.spectral_norm(slow_linear(), n_power_iterations=2).train(training)
    original, u, v = (tensor.detach().clone() for tensor in form.vectors(module))
    parametrize.remove_parametrizations(module, "weight")
    u, v = iterate(original, u, v, steps=steps, v_first=False)
    torch.testing.assert_close(module.weight.detach(), normalized(original, u, v))


@each_parametrized_form
def test_parametrized_removal_can_restore_the_original(form):
    module = nn.Linear(3, 4)
    weight, values = module.weight, module.weight.detach().clone()
    form.spectral_norm(module)
    module(torch.randn(2, 3))
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    assert module.weight is weight and torch.equal(weight, values)
    assert type(module) is nn.Linear


@each_hook_form
@pytest.mark.parametrize("other", [TORCH_HOOK, FASTSN_HOOK], ids=["torch", "fastsn"])
def test_hook_removal_of_the_other_implementation(form, other):
    """Code that mixes the two implementations works, so imports can be changed one by one."""
    module = trained(form)
    expected = forwards(module, torch.ones(1, 3), (False,))
    assert other.remove(module) is module
    torch.testing.assert_close(forwards(module, torch.ones(1, 3), (False,)), expected)
    assert set(module.state_dict()) == {"weight", "bias"}
    assert not module._forward_pre_hooks and not module._state_dict_hooks


def test_plain_weights_load_after_hook_removal():
    """torch 2.13 leaves its load hook behind, which then asks for `weight_orig` and `weight_u`."""
    module = FASTSN_HOOK.spectral_norm(trained(FASTSN_HOOK), "bias")
    state = nn.Linear(3, 4).state_dict()
    FASTSN_HOOK.remove(FASTSN_HOOK.remove(module, "bias"))
    module.load_state_dict(state)
    assert torch.equal(module.weight, state["weight"]) and torch.equal(module.bias, state["bias"])
    assert not module._load_state_dict_pre_hooks


@pytest.mark.parametrize("name", ["weight", "foo"])
def test_hook_removal_where_there_is_none(name):
    module = nn.Linear(2, 3)
    actual = raised(lambda: FASTSN_HOOK.remove(module, name))
    expected = raised(lambda: TORCH_HOOK.remove(module, name))
    assert type(actual) is type(expected) is ValueError
    assert str(actual) == str(expected) == f"spectral_norm of '{name}' not found in {module}"


# Copies


@pytest.mark.parametrize("after_a_forward", [False, True])
@each_form
def test_deepcopy(form, after_a_forward):
    """pytorch#28594, #102981: after a forward torch's hook form holds a non-leaf `weight`."""
    module = trained(form, int(after_a_forward))
    if form is TORCH_HOOK and after_a_forward:
        with pytest.raises(RuntimeError, match="deepcopy"):
            copy.deepcopy(module)
        return
    twin = copy.deepcopy(nn.Sequential(module, nn.ReLU()))[0]
    pointers = [{t.data_ptr() for t in form.vectors(m)} for m in (module, twin)]
    assert len(pointers[0] | pointers[1]) == 6
    x = torch.randn(2, 3)
    for expected, actual in zip(forwards(module, x), forwards(twin, x), strict=True):
        torch.testing.assert_close(actual, expected)
    kept = [tensor.clone() for tensor in form.vectors(module)]
    twin.train()(x).sum().backward()
    assert all(torch.equal(*pair) for pair in zip(kept, form.vectors(module), strict=True))
    assert form.vectors(twin)[0].grad is not None


@each_hook_form
@pytest.mark.parametrize("after_a_forward", [False, True])
def test_hook_form_pickles(form, after_a_forward):
    module = trained(form, int(after_a_forward))
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    copies = torch.load(buffer, weights_only=False), pickle.loads(pickle.dumps(module))
    x = torch.randn(2, 3)
    expected = forwards(module, x)
    for other in copies:
        assert type(other) is nn.Linear
        torch.testing.assert_close(forwards(other, x), expected)
        assert other.state_dict()._metadata == module.state_dict()._metadata
        form.remove(other)


@each_form
@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_model(form, use_buffers):
    """With buffers, u and v are averaged like any other; the hook form must copy at all.

    What sigma becomes then, tests/weights/test_averages.py tells.
    """
    module = form.spectral_norm(slow_linear())
    average = AveragedModel(module, use_buffers=use_buffers)
    x = torch.randn(4, 5, dtype=torch.float64)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    history = []
    for _ in range(3):
        module(x).square().mean().backward()
        optimizer.step()
        average.update_parameters(module)
        history.append([tensor.detach().clone() for tensor in form.vectors(module)])
    weights, *buffers = (torch.stack(values) for values in zip(*history, strict=True))
    expected = [weights.mean(0), *(b.mean(0) if use_buffers else b[-1] for b in buffers)]
    for actual, wanted in zip(form.vectors(average.module), expected, strict=True):
        torch.testing.assert_close(actual, wanted)
    average.eval()(x)
    if form in (TORCH_HOOK, TORCH_PARAMETRIZED) or not use_buffers:
        used = average.module.weight
        torch.testing.assert_close(used, normalized(*form.vectors(average.module)))


@pytest.mark.parametrize("form", [FASTSN_HOOK, FASTSN_PARAMETRIZED], ids=["hook", "parametrized"])
def test_averaging_a_model_in_use(form):
    module = trained(form)
    average = AveragedModel(module)
    x = torch.randn(2, 3)
    torch.testing.assert_close(average.eval()(x), module.eval()(x))
