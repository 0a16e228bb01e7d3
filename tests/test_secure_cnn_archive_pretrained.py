"""One sealed file in the place of Hugging Face's folder: configuration and weights, both hidden."""

import pytest
import torch
from torch import nn

from secure_cnn import archive
from secure_cnn.archive.adapters.pretrained import from_pretrained, save_pretrained

ME = archive.generate_identity(post_quantum=False)
SIGNER = archive.generate_signer()


class Network(nn.Module):
    """Tied weights, a buffer, and a shape that its configuration decides."""

    def __init__(self, hidden_width, labels):
        super().__init__()
        self.embed = nn.Embedding(10, hidden_width)
        self.head = nn.Linear(hidden_width, 10, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.tensor(len(labels)))


CONFIG = {"hidden_width": 3, "labels": {0: "cat", 1: "dog"}}


def build(config):
    return Network(**config)


def test_a_model_comes_back_with_its_configuration(tmp_path):
    """Weights bit by bit, tied ones still tied, nothing of it in clear."""
    path, model = tmp_path / "m.sealed", Network(**CONFIG)
    save_pretrained(
        path,
        model,
        config=CONFIG,
        recipients=[ME.recipient],
        signer=SIGNER,
        claims={"epsilon": 3.0},
        name="pets",
    )
    asked = []
    again = from_pretrained(
        path,
        lambda config: asked.append(config) or build(config),
        identity=ME,
        trusted=[SIGNER.verifier],
        expect={"epsilon": 3.0},
    )
    assert asked == [CONFIG]
    assert again.embed.weight is again.head.weight
    assert not again.training
    assert all(
        torch.equal(left, right)
        for left, right in zip(
            model.state_dict().values(), again.state_dict().values(), strict=True
        )
    )
    raw = path.read_bytes()
    assert b"hidden_width" not in raw
    assert b"embed" not in raw
    assert archive.inspect(path).name == "pets"


def test_another_file_or_key_or_signer_is_refused(tmp_path):
    """As `load` does, before anything is built."""
    path = tmp_path / "m"
    save_pretrained(path, Network(**CONFIG), config=CONFIG, recipients=[ME.recipient])
    stranger = archive.generate_identity(post_quantum=False)

    def never(config):
        raise AssertionError(config)

    for error, settings in (
        (archive.WrongKey, {"identity": stranger}),
        (archive.UntrustedSigner, {"identity": ME, "trusted": [SIGNER.verifier]}),
        (archive.ClaimMismatch, {"identity": ME, "expect": {"epsilon": 1.0}}),
        (archive.RolledBack, {"identity": ME, "core_hash": "0" * 64}),
    ):
        with pytest.raises(error):
            from_pretrained(path, never, **settings)
    for number, state in enumerate(
        ({"a": torch.ones(1)}, {"config": 3, "weights": {}}, {"config": {}, "weights": {"a": 1}})
    ):
        archive.save(tmp_path / f"{number}", state, recipients=[ME.recipient])
        with pytest.raises(archive.StateError):
            from_pretrained(tmp_path / f"{number}", never, identity=ME)
    archive.save_plain(tmp_path / "plain", {"config": {}, "weights": {}})
    with pytest.raises(archive.NotSealed):
        from_pretrained(tmp_path / "plain", never, identity=ME)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    """In our words, not in a traceback of torch."""
    save_pretrained(tmp_path / "m", Network(**CONFIG), config=CONFIG, recipients=[ME.recipient])
    with pytest.raises(archive.StateError, match="do not fit Network"):
        from_pretrained(
            tmp_path / "m", lambda config: build({**config, "hidden_width": 4}), identity=ME
        )


def test_a_configuration_that_is_no_plain_data_is_refused(tmp_path):
    """With the path of what is wrong."""
    with pytest.raises(archive.StateError, match=r"config\.activation"):
        save_pretrained(
            tmp_path / "m",
            nn.Linear(1, 1),
            config={"activation": nn.ReLU},
            recipients=[ME.recipient],
        )


def test_with_a_model_of_the_hub(tmp_path):
    """A model with `PyTorchModelHubMixin`: the configuration is what it was built with."""
    hub = pytest.importorskip(
        "huggingface_hub", reason="huggingface_hub is not installed", exc_type=ImportError
    )

    class HubNetwork(Network, hub.PyTorchModelHubMixin):
        pass

    model = HubNetwork(**CONFIG)
    # What the hub writes itself: the configuration, and all names of tensors, in clear.
    model.save_pretrained(tmp_path / "hub")
    assert "hidden_width" in (tmp_path / "hub" / "config.json").read_text()
    save_pretrained(
        tmp_path / "m", model, config=model._hub_mixin_config, recipients=[ME.recipient]
    )
    again = from_pretrained(tmp_path / "m", lambda config: HubNetwork(**config), identity=ME)
    assert torch.equal(again.embed.weight, model.embed.weight)
    assert b"hidden_width" not in (tmp_path / "m").read_bytes()


def test_with_a_model_of_transformers(tmp_path):
    """A small BERT: the same outputs, and its configuration from the file alone."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed", exc_type=ImportError
    )
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    model = transformers.BertModel(config).eval()
    save_pretrained(tmp_path / "m", model, config=config.to_dict(), recipients=[ME.recipient])
    again = from_pretrained(
        tmp_path / "m",
        lambda told: transformers.BertModel(transformers.BertConfig.from_dict(told)),
        identity=ME,
    )
    words = torch.arange(6)[None]
    with torch.no_grad():
        left, right = model(words).last_hidden_state, again(words).last_hidden_state
    assert torch.equal(left, right)
