"""Training loops of Lightning and Accelerate: the numbers of a plain loop, also after a restart."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastsn
from helpers.torch_peers import TORCH_HOOK, TORCH_PARAMETRIZED

pytestmark = pytest.mark.usefixtures("double")

NOISE = 4
each_form = pytest.mark.parametrize(
    "form", [TORCH_HOOK, TORCH_PARAMETRIZED], ids=["hook", "parametrized"]
)


def make_critic(form):
    torch.manual_seed(1)
    return nn.Sequential(
        form.spectral_norm(nn.Conv2d(1, 4, 3)),
        nn.LeakyReLU(0.1),
        nn.Flatten(),
        form.spectral_norm(nn.Linear(144, 1)),
    )


def make_generator():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(NOISE, 64), nn.Tanh(), nn.Unflatten(1, (1, 8, 8)))


def make_optimizers(critic, generator):
    return [torch.optim.Adam(m.parameters(), 0.01, eps=1e-3) for m in (critic, generator)]


def make_loader():
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(12, 1, 8, 8, generator=generator)
    noise = torch.randn(12, NOISE, generator=generator)
    return DataLoader(TensorDataset(images, noise), batch_size=4)


def critic_loss(critic, real, fake):
    return F.softplus(1 - critic(real)).mean() + F.softplus(1 + critic(fake)).mean()


def train_plainly(form, epochs):
    critic, generator = make_critic(form), make_generator()
    of_critic, of_generator = make_optimizers(critic, generator)
    for _ in range(epochs):
        for real, noise in make_loader():
            of_critic.zero_grad()
            critic_loss(critic, real, generator(noise).detach()).backward()
            of_critic.step()
            of_generator.zero_grad()
            (-critic(generator(noise)).mean()).backward()
            of_generator.step()
    return critic, generator


def assert_same(models, form, epochs):
    for model, expected in zip(models, train_plainly(form, epochs), strict=True):
        torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()))


# Lightning


@pytest.fixture
def gan(form):
    """A LightningModule in the making: gan() gives a new one of the same random state."""
    lightning = pytest.importorskip("lightning", reason="needs lightning")

    class GAN(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False  # two optimizers
            self.critic = fastsn.accelerate(make_critic(form))
            self.generator = make_generator()

        def configure_optimizers(self):
            return make_optimizers(self.critic, self.generator)

        def training_step(self, batch, index):
            real, noise = batch
            of_critic, of_generator = self.optimizers()

            self.toggle_optimizer(of_critic)
            of_critic.zero_grad()
            self.manual_backward(critic_loss(self.critic, real, self.generator(noise).detach()))
            of_critic.step()
            self.untoggle_optimizer(of_critic)

            self.toggle_optimizer(of_generator)
            of_generator.zero_grad()
            self.manual_backward(-self.critic(self.generator(noise)).mean())
            of_generator.step()
            self.untoggle_optimizer(of_generator)

    return GAN


@pytest.fixture
def make_trainer(tmp_path):
    lightning = pytest.importorskip("lightning", reason="needs lightning")

    def make(epochs):
        return lightning.Trainer(
            accelerator="cpu", devices=1, max_epochs=epochs, default_root_dir=tmp_path,
            logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, precision="64-true",
        )  # fmt: skip

    return make


@each_form
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_lightning(form, gan, make_trainer, tmp_path):
    model, trainer = gan(), make_trainer(1)
    trainer.fit(model, make_loader())
    assert_same((model.critic, model.generator), form, 1)
    trainer.save_checkpoint(tmp_path / "model.ckpt")

    resumed = gan()
    make_trainer(2).fit(resumed, make_loader(), ckpt_path=tmp_path / "model.ckpt")
    assert_same((resumed.critic, resumed.generator), form, 2)


# Accelerate


@pytest.fixture
def accelerator():
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    yield accelerate.Accelerator(cpu=True)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def prepare(accelerator, form):
    critic = fastsn.accelerate(make_critic(form))
    generator = make_generator()
    return accelerator.prepare(
        critic, generator, *make_optimizers(critic, generator), make_loader()
    )


def train(accelerator, critic, generator, of_critic, of_generator, loader):
    for real, noise in loader:
        of_critic.zero_grad()
        accelerator.backward(critic_loss(critic, real, generator(noise).detach()))
        of_critic.step()
        of_generator.zero_grad()
        accelerator.backward(-critic(generator(noise)).mean())
        of_generator.step()


@each_form
def test_accelerate(form, accelerator, tmp_path):
    prepared = prepare(accelerator, form)
    train(accelerator, *prepared)
    assert_same(prepared[:2], form, 1)
    accelerator.save_state(tmp_path)

    accelerator.free_memory()
    resumed = prepare(accelerator, form)
    accelerator.load_state(tmp_path)
    train(accelerator, *resumed)
    assert_same(map(accelerator.unwrap_model, resumed[:2]), form, 2)
