"""What programs do to batch norms, done to layers with a running mean as well."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, replace_all_batch_norm_modules_, stack_module_state, vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.parametrizations import spectral_norm as torch_spectral_norm
from torch.optim.swa_utils import AveragedModel, update_bn

import fastsn

double = pytest.mark.usefixtures("double")


def batch_norm(gain: bool) -> nn.Module:
    conv = fastsn.nn.SNConv2d(3, 4, 3, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 2, 1))


def mean_only(gain: bool) -> nn.Module:
    conv = fastsn.nn.SNConv2d(3, 4, 3, bias=False)
    norm = fastsn.nn.MeanOnlyBatchNorm2d(4, gain=gain)
    return nn.Sequential(conv, norm, nn.Tanh(), nn.Conv2d(4, 2, 1))


def msn(gain: bool) -> nn.Module:
    conv = fastsn.nn.MSNConv2d(3, 4, 3, gain=gain)
    return nn.Sequential(conv, nn.Identity(), nn.Tanh(), nn.Conv2d(4, 2, 1))


OURS = {"mean-only": mean_only, "msn": msn}
ours = pytest.mark.parametrize("build", OURS.values(), ids=OURS.keys())
ours_and_torchs = pytest.mark.parametrize(
    "build", [batch_norm, mean_only, msn], ids=["batch-norm", *OURS]
)
each_gain = pytest.mark.parametrize("gain", [False, True], ids=["without-gain", "with-gain"])
WITHOUT = "has no gain, and what is done with its weight has no effect"


def layer_of(model: nn.Module) -> nn.Module:
    """The one with the running mean."""
    return next(m for m in model if getattr(m, "running_mean", None) is not None)


def norms_of(model: nn.Module) -> list[nn.Module]:
    """As programs find them."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm)]


def batches(count: int = 3) -> list[Tensor]:
    return [torch.randn(5, 3, 6, 6) + i for i in range(count)]


# Initialization


def dcgan(module: nn.Module) -> None:
    name = type(module).__name__
    if name.find("BatchNorm") != -1:
        nn.init.normal_(module.weight.data, 1.0, 0.02)
        nn.init.constant_(module.bias.data, 0)


def by_type(module: nn.Module) -> None:
    if isinstance(module, _BatchNorm):
        module.weight.data.normal_(1.0, 0.02)
        module.bias.data.zero_()


each_initialization = pytest.mark.parametrize("initialize", [dcgan, by_type])


@each_initialization
@ours_and_torchs
def test_initialization_draws_the_gain(build, initialize):
    model = build(True)
    layer = layer_of(model)
    nn.init.ones_(layer.bias)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(3)
    model.apply(initialize)
    torch.manual_seed(3)
    gain = "gain" if hasattr(layer, "gain") else "weight"
    assert torch.equal(getattr(layer, gain), nn.init.normal_(torch.empty(4), 1.0, 0.02))
    assert not layer.bias.any()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert {key.split(".")[-1] for key in changed} == {gain, "bias"}


@each_initialization
@ours
def test_without_a_gain_initialization_says_that_there_is_none(build, initialize):
    model = build(False)
    layer = layer_of(model)
    nn.init.ones_(layer.bias)
    with pytest.warns(UserWarning, match=WITHOUT) as told:
        model.apply(initialize)
    assert told[0].filename == __file__
    assert not layer.bias.any()
    torch.testing.assert_close(layer.running_mean, torch.zeros(4), rtol=0, atol=0)


@each_initialization
def test_an_msn_layer_without_bias_is_initialized(initialize):
    """As convolutions before batch norms mostly are."""
    layer = fastsn.nn.MSNConv2d(3, 4, 3, bias=False, gain=True)
    with pytest.warns(UserWarning, match="has no bias, and what is done with its bias"):
        layer.apply(initialize)
    assert layer.bias is None and "bias" not in layer.state_dict() and not (layer.gain == 1).all()


def test_layers_that_have_nothing_to_initialize_are_as_those_of_torch():
    for norm in (nn.BatchNorm2d(3, affine=False), fastsn.nn.MeanOnlyBatchNorm2d(3, affine=False)):
        assert norm.affine is False and norm.bias is None
    with pytest.warns(UserWarning, match=WITHOUT), pytest.raises(AttributeError, match="NoneType"):
        norm.apply(dcgan)


CONVOLUTIONS = {
    "torch": lambda: torch_spectral_norm(nn.Conv2d(3, 4, 3)),
    "sn": lambda: fastsn.nn.SNConv2d(3, 4, 3),
    "msn": lambda: fastsn.nn.MSNConv2d(3, 4, 3),
}


@double
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_writes_to_a_computed_weight_are_lost_as_in_torch(name, training):
    """The parameter is another one, and the layer goes on with that."""
    torch.manual_seed(1)
    layer = CONVOLUTIONS[name]().train(training)
    original = layer.parametrizations.weight.original.detach().clone()
    twin = copy.deepcopy(layer)
    nn.init.normal_(layer.weight.data, 0, 0.02)
    _ = twin.weight  # a read iterates in training
    assert torch.equal(layer.parametrizations.weight.original, original)
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(layer(x), twin(x))


@double
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_parameter_and_the_weight_itself_can_be_set(name):
    torch.manual_seed(1)
    layer = CONVOLUTIONS[name]()
    nn.init.normal_(layer.parametrizations.weight.original, 0, 0.02)
    assert layer.parametrizations.weight.original.std() < 0.04
    new = nn.init.normal_(torch.empty(4, 3, 3, 3), 0, 5.0)
    layer.weight = new
    assert torch.equal(layer.parametrizations.weight.original, new)


# Statistics


@double
@each_gain
@ours
def test_update_bn_gives_the_means_of_all_batches(build, gain):
    model, reference = build(gain), batch_norm(gain)
    state = layer_of(model).state_dict() if build is msn else model[0].state_dict()
    reference[0].load_state_dict({k: v for k, v in state.items() if k.startswith("param")})
    for each in (model, reference):
        for x in batches(2):
            each(x)
    loader = [[x, None] for x in batches()]
    for each in (model, reference):
        each.eval()
        with fastsn.frozen(each):
            update_bn(loader, each)
        assert not each.training and layer_of(each).momentum == 0.1
    # Their vectors have moved alike.
    torch.testing.assert_close(layer_of(model).running_mean, layer_of(reference).running_mean)
    assert layer_of(model).num_batches_tracked == len(loader)
    x = batches(1)[0]
    for each in (model, reference):
        each.train()(x)
    torch.testing.assert_close(layer_of(model).running_mean, layer_of(reference).running_mean)


@double
@ours
def test_averaged_models_get_their_means(build):
    model = build(True)
    averaged = AveragedModel(model)
    for x in batches(2):
        model(x).sum().backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
        averaged.update_parameters(model)
    loader = batches()
    kept = layer_of(model).running_mean.clone()
    with fastsn.frozen(averaged):
        update_bn(loader, averaged)
    layer = layer_of(averaged.module)
    weight = averaged.module[0].eval().weight
    expected = sum(nn.functional.conv2d(x, weight).mean((0, 2, 3)) for x in loader) / len(loader)
    torch.testing.assert_close(layer.running_mean, expected)
    assert torch.equal(layer_of(model).running_mean, kept)


@double
@ours_and_torchs
def test_statistics_can_be_reset_by_hand(build):
    """As lightning's StochasticWeightAveraging does."""
    model = build(True)
    for x in batches():
        model(x)
    for module in norms_of(model):
        module.running_mean = torch.zeros_like(module.running_mean)
        module.running_var = torch.ones_like(module.running_var)
        module.momentum = None
        module.num_batches_tracked *= 0
    layer, state = layer_of(model), model.state_dict()
    assert layer.momentum is None
    assert not layer.running_mean.any() and not layer.num_batches_tracked
    assert any(value is layer.running_mean for value in layer._buffers.values())
    x = batches(1)[0]
    model(x)
    assert layer.num_batches_tracked == 1 and layer.running_mean.any()
    assert model.state_dict().keys() == state.keys()


@double
@ours_and_torchs
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_running_statistics_can_be_taken_away_for_vmap(build):
    models = [build(True) for _ in range(2)]
    for model in models:
        replace_all_batch_norm_modules_(model)
        assert not any(key.endswith(("mean", "var")) for key in model.state_dict())
    models = [model.eval() for model in models]  # u and v cannot move under vmap
    parameters, buffers = stack_module_state(models)
    base, x = copy.deepcopy(models[0]).to("meta"), batches(1)[0]
    outputs = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(outputs, torch.stack([model(x) for model in models]))


# Freezing


def freeze_by_type(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
            module.weight.requires_grad_(False)
            module.bias.requires_grad_(False)


def freeze_by_name(model: nn.Module) -> None:
    def freeze(module: nn.Module) -> None:
        if type(module).__name__.find("BatchNorm") != -1:
            module.eval()
            module.weight.requires_grad = False
            module.bias.requires_grad = False

    model.apply(freeze)


@double
@pytest.mark.parametrize("freeze", [freeze_by_type, freeze_by_name])
@ours_and_torchs
def test_frozen_norms_stay_while_the_rest_trains(build, freeze):
    model = build(True)
    for x in batches():
        model(x)
    freeze(model.train())
    layer = layer_of(model)
    kept = {k: v.clone() for k, v in layer.state_dict().items() if not k.startswith("param")}
    u = model[0].parametrizations.weight[0]._u.clone()
    x = 10 + batches(1)[0]
    y = model(x)
    y.sum().backward()
    for key, value in kept.items():
        assert torch.equal(layer.state_dict()[key], value)
    assert layer.bias.grad is None and model[3].bias.grad is not None
    assert not torch.equal(model[0].parametrizations.weight[0]._u, u)
    torch.testing.assert_close(model.eval()(x), y)
    # A single value is enough for a mean that is known.
    model.train()
    freeze(model)
    assert model(x[:1, :, :3, :3]).shape == (1, 2, 1, 1)
    model.train()(x)
    assert layer.num_batches_tracked == kept["num_batches_tracked"] + 1


@ours
def test_freezing_without_a_gain(build):
    model = build(False)
    with pytest.warns(UserWarning, match=WITHOUT):
        freeze_by_type(model)
    layer = layer_of(model)
    model(batches(1)[0])
    assert not layer.bias.requires_grad and not layer.num_batches_tracked


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@ours
def test_freezing_of_compiled_models(build):
    model = build(True)
    x = batches(1)[0]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(x)
    freeze_by_type(model)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(compiled(x), twin(x))
    assert layer_of(model).num_batches_tracked == 1
    model.train()
    compiled(x)
    assert layer_of(model).num_batches_tracked == 2


def test_the_mode_of_a_norm_stays_when_it_becomes_part_of_a_layer():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    freeze_by_type(model)
    fastsn.nn.convert_batchnorm(model)
    model(batches(1)[0])
    assert not model[0].num_batches_tracked
    model.train()(batches(1)[0])
    assert model[0].num_batches_tracked == 1
    model = nn.Sequential(nn.Conv2d(3, 4, 3).eval(), nn.BatchNorm2d(4))
    fastsn.nn.convert_batchnorm(model)
    model(batches(1)[0])
    assert model[0].num_batches_tracked == 1


@pytest.mark.parametrize("build", [batch_norm, mean_only], ids=["batch-norm", "mean-only"])
def test_exclusion_from_weight_decay_by_type(build):
    model = build(True)
    excluded = {p for m in norms_of(model) for p in m.parameters()}
    assert excluded == set(layer_of(model).parameters()) and len(excluded) == 2


# Conversion


@ours
def test_conversion_to_sync_batch_norm_is_refused(build):
    model = build(True)
    before = dict(model.named_modules())
    with pytest.raises(AttributeError, match="no eps.*call fastsn.nn.convert_sync_batchnorm"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert dict(model.named_modules()) == before
    assert not hasattr(norms_of(model)[0], "eps")


def test_fusion_is_refused():
    conv, norm = nn.Conv2d(3, 4, 3).eval(), fastsn.nn.MeanOnlyBatchNorm2d(4, gain=True).eval()
    with pytest.raises(AttributeError, match="can neither be fused"):
        fuse_conv_bn_eval(conv, norm)


@pytest.mark.parametrize("group", ["world", object()], ids=["world", "group"])
def test_all_norms_of_a_model_are_synchronized(group):
    model = nn.Sequential(msn(True), mean_only(False), batch_norm(True))
    before = dict(model.named_modules())
    state = model.state_dict()
    assert fastsn.nn.convert_sync_batchnorm(model, group) is model
    assert layer_of(model[0]).process_group is group
    assert layer_of(model[1]).process_group is group
    norm = model[2][1]
    assert type(norm) is nn.SyncBatchNorm
    assert norm.process_group is (None if group == "world" else group)
    after = dict(model.named_modules())
    assert {name for name in after if after[name] is not before[name]} == {"2.1"}
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


def test_single_layers_are_synchronized():
    for layer in (fastsn.nn.MSNLinear(3, 4), fastsn.nn.MeanOnlyBatchNorm1d(4)):
        assert fastsn.nn.convert_sync_batchnorm(layer) is layer
        assert layer.process_group == "world"
    norm = nn.BatchNorm1d(4)
    synchronized = fastsn.nn.convert_sync_batchnorm(norm)
    assert type(synchronized) is nn.SyncBatchNorm and synchronized.weight is norm.weight
    other = nn.ReLU()
    assert fastsn.nn.convert_sync_batchnorm(other) is other


@pytest.mark.parametrize("group", [None, "all"])
def test_groups_that_are_none(group):
    model = nn.Sequential(nn.BatchNorm1d(4), fastsn.nn.MSNLinear(4, 4))
    with pytest.raises(ValueError, match=f'must be "world" or a group, got {group!r}'):
        fastsn.nn.convert_sync_batchnorm(model, group)
    assert type(model[0]) is nn.BatchNorm1d and model[1].process_group is None


def test_norms_without_variance_are_not_converted_again():
    model = nn.Sequential(msn(False), mean_only(False))
    before = dict(model.named_modules())
    report = fastsn.nn.convert_batchnorm(model)
    assert dict(model.named_modules()) == before
    assert "there is no batch norm" in str(report)


# The batch norm within an MSN layer


def save_and_load(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "save": save_and_load,
    "types": lambda model: model.half().float(),
    "empty": lambda model: model.to("meta").to_empty(device="cpu"),
}


@pytest.mark.parametrize("how", COPIES)
def test_the_batch_norm_of_a_copy_is_that_of_the_copy(how):
    original = fastsn.nn.MSNConv2d(3, 4, 3, momentum=0.3, gain=True)
    layer = COPIES[how](original)
    norm = layer.batch_norm
    for name in ("bias", "gain", "running_mean", "num_batches_tracked"):
        assert getattr(norm, name) is getattr(layer, name)
    assert norm.weight is layer.gain and norm.momentum == layer.momentum == 0.3
    norm.momentum = None
    assert layer.momentum is None
    layer.momentum = 0.2
    assert norm.momentum == 0.2 and (layer is original or original.momentum == 0.3)
    nn.init.ones_(layer.running_mean)
    norm.reset_running_stats()
    assert not layer.running_mean.any()


def test_it_has_no_entries_in_state_dicts():
    layer = fastsn.nn.MSNConv2d(3, 4, 3, gain=True)
    state = layer.state_dict()
    assert not [key for key in state if "batch_norm" in key]
    assert len(list(layer.parameters())) == 3 and len(list(layer.buffers())) == 4
    assert not list(layer.batch_norm.parameters()) and not list(layer.batch_norm.buffers())
    layer.load_state_dict(dict(state))  # without versions of modules
    assert "BatchNorm" not in repr(layer)


@each_gain
@ours
def test_parameters_of_all_modules_can_be_reset(build, gain):
    model = build(gain)
    model(batches(1)[0])
    layer = layer_of(model)
    for parameter in (layer.bias, layer.gain):
        if parameter is not None:
            nn.init.constant_(parameter, 7)
    for module in norms_of(model):
        module.reset_parameters()
    assert not layer.bias.any() and not layer.running_mean.any() and not layer.num_batches_tracked
    assert not gain or (layer.gain == 1).all()


def test_without_running_mean():
    for layer in (
        fastsn.nn.MSNConv2d(3, 4, 3, track_running_stats=False, gain=True),
        fastsn.nn.MeanOnlyBatchNorm2d(3, track_running_stats=False, gain=True),
    ):
        model, x = nn.Sequential(layer), batches(1)[0]
        (norm,) = norms_of(model)
        assert norm.running_var is None and norm.affine
        update_bn([x], model)
        assert layer.running_mean is None and layer.num_batches_tracked is None
        norm.eval()
        torch.testing.assert_close(model(x).mean((0, 2, 3)), layer.bias, rtol=0, atol=1e-5)


def test_a_folded_layer_has_none():
    layer = fastsn.nn.MSNConv2d(3, 4, 3)
    assert not norms_of(fastsn.fold(layer)) and norms_of(layer) == [layer.batch_norm]
