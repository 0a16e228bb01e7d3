"""Sealed checkpoints under Lightning's own trainer: saved, resumed, refused."""

import sys

import pytest
import torch
from torch import nn

from secure_cnn import archive
from secure_cnn.archive.adapters import lightning as adapter
from secure_cnn.archive.errors import MissingExtra

ME = archive.generate_identity(post_quantum=False)
SIGNER = archive.generate_signer()

# Lightning and what it imports warn of each other's old age while they load.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def lightning():
    """Lightning itself."""
    if adapter.CheckpointIO is object:
        pytest.skip("lightning is not installed")
    import lightning.pytorch

    return lightning.pytorch


def plugin(**settings):
    """A plug-in that signs."""
    settings = {"recipients": [ME.recipient], "signer": SIGNER, "identity": ME, **settings}
    return adapter.SealedCheckpointIO(**settings)


def module_of(lightning):
    """A small model with momentum, a schedule and hyperparameters."""

    class Module(lightning.LightningModule):
        def __init__(self, secret_width=4):
            super().__init__()
            self.save_hyperparameters()
            self.layer = nn.Linear(3, secret_width)

        def training_step(self, batch, index):
            loss = self.layer(batch[0]).square().mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    return Module()


def trainer_of(lightning, folder, epochs, *plugins):
    """A trainer that keeps the best and the last checkpoint."""
    keep = lightning.callbacks.ModelCheckpoint(
        dirpath=folder, filename="{epoch}", monitor="loss", save_top_k=1, save_last=True
    )
    return lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=[keep],
        plugins=list(plugins),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


def batches():
    """Eight examples."""
    images = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images), batch_size=4)


def test_the_trainer_saves_sealed_files_and_resumes_from_them(lightning, tmp_path):
    """A training in two halves ends where one in one piece does: everything came back."""
    start = module_of(lightning)
    weights = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    trainer_of(lightning, tmp_path / "a", 2, plugin()).fit(start, batches())
    files = sorted((tmp_path / "a").glob("*.ckpt"))
    assert len(files) == 2
    for path in files:
        assert archive.verify(path, trusted=[SIGNER.verifier]).verified
        assert b"secret_width" not in path.read_bytes()
    second = module_of(lightning)
    trainer = trainer_of(lightning, tmp_path / "a", 4, plugin())
    trainer.fit(second, batches(), ckpt_path=str(tmp_path / "a" / "last.ckpt"))
    assert trainer.current_epoch == 4

    whole = module_of(lightning)
    whole.load_state_dict(weights)
    trainer_of(lightning, tmp_path / "b", 4, plugin()).fit(whole, batches())
    assert torch.equal(second.layer.weight, whole.layer.weight)


def test_a_plain_checkpoint_is_refused(lightning, tmp_path):
    """Of Lightning's own plug-in, by the trainer."""
    trainer_of(lightning, tmp_path, 1).fit(module_of(lightning), batches())
    trainer = trainer_of(lightning, tmp_path, 2, plugin())
    with pytest.raises(archive.NotSealed):
        trainer.fit(module_of(lightning), batches(), ckpt_path=str(tmp_path / "last.ckpt"))


def test_what_is_loaded_must_be_trusted(lightning, tmp_path):
    """The signer's own files by default, and the claims that are expected."""
    path = tmp_path / "deep" / "a.ckpt"
    plugin(signer=archive.generate_signer()).save_checkpoint({"epoch": 1}, path)
    with pytest.raises(archive.UntrustedSigner):
        plugin().load_checkpoint(path)
    plugin(claims={"epsilon": 3.0}).save_checkpoint({"epoch": 2}, path)
    assert plugin(expect={"epsilon": 3.0}).load_checkpoint(path) == {"epoch": 2}
    with pytest.raises(archive.ClaimMismatch):
        plugin(expect={"epsilon": 1.0}).load_checkpoint(path)
    with pytest.raises(archive.StateError, match="identity"):
        plugin(identity=None).load_checkpoint(path)


def test_what_it_cannot_do_is_refused(lightning, tmp_path):
    """Options, other devices, code in a checkpoint, and states that are none."""
    path = tmp_path / "a.ckpt"
    with pytest.raises(archive.StateError, match="storage_options"):
        plugin().save_checkpoint({}, path, storage_options={"a": 1})
    with pytest.raises(archive.StateError, match=r"state\.callbacks\.mine"):
        plugin().save_checkpoint({"callbacks": {"mine": print}}, path)
    assert not path.exists()
    archive.save(path, [1], recipients=[ME.recipient], signer=SIGNER)
    with pytest.raises(archive.StateError, match="Lightning"):
        plugin().load_checkpoint(path)
    with pytest.raises(archive.StateError, match="map_location"):
        plugin().load_checkpoint(path, map_location="cuda")


def test_a_checkpoint_is_removed_once(lightning, tmp_path):
    """And what is gone already is no error; a folder is."""
    path = tmp_path / "a.ckpt"
    plugin().save_checkpoint({"epoch": 1}, path)
    plugin().remove_checkpoint(path)
    plugin().remove_checkpoint(str(path))
    assert not path.exists()
    with pytest.raises(archive.StorageError):
        plugin().remove_checkpoint(tmp_path)


def test_without_lightning_the_extra_is_named(monkeypatch):
    """Importing the adapter works; using it says what to install."""
    monkeypatch.setattr(adapter, "CheckpointIO", object)
    with pytest.raises(MissingExtra, match=r"secure-cnn\[lightning\]"):
        plugin()


def test_the_package_does_not_import_it():
    """Who does not ask for an adapter does not pay for its library."""
    import subprocess

    code = (
        "import sys, secure_cnn.archive, secure_cnn.archive.card\n"
        "import secure_cnn.archive.adapters.pretrained\n"
        "heavy = {'lightning', 'cyclonedx', 'huggingface_hub', 'transformers'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
