"""Halves of keys in each other's place: every entry point says which half it wants."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch

from secure_cnn import archive
from secure_cnn.archive import CheckpointStore, InvalidKey, StateError
from secure_cnn.archive.adapters import lightning as lightning_adapter
from secure_cnn.archive.adapters.distributed import SealedWriter
from secure_cnn.archive.format.slots import Slot, SlotKind
from secure_cnn.archive.keys.identity import HYBRID, X25519
from secure_cnn.archive.keys.passphrase import ARGON2ID

ME = archive.generate_identity(post_quantum=False)
YOU = archive.generate_identity(post_quantum=False)
SIGNER = archive.generate_signer()
STATE = {"w": torch.ones(2)}


class Reversing:
    """A key service, which is no recipient by itself."""

    def wrap(self, key, context):
        return key[::-1]

    def unwrap(self, wrapped, context):
        return wrapped[::-1]


MINE = SlotKind(
    number=900, name="MINE", body_lengths=range(32, 33), label="X25519", alone="it is weak"
)


class Homemade:
    """A recipient of somebody else's making, who wraps nothing."""

    def __init__(self, kind=MINE, key_id=b"k" * 16):
        self.kind, self.key_id = kind, key_id

    def wrap(self, file_key, core_hash):
        return Slot(kind=900, key_id=b"k" * 16, body=file_key)


RECIPIENTS = [
    ([ME], r"recipients\[0\].*got Identity; give identity.recipient"),
    (ME, "recipients: expected a list.*give identity.recipient"),
    (ME.recipient, r"recipients: expected a list.*put it in a list, recipients=\[...\]"),
    (["me.pub"], "got text; give Recipient.from_text"),
    ("me.pub", "expected a list.*got text"),
    ([SIGNER], "Signer; signers sign"),
    ([Reversing()], r"ServiceKey\(service, name\)"),
    ([None], "got NoneType"),
    (None, "got NoneType"),
    ([archive.Recipient], "got type"),
    (
        [ME.recipient, Homemade()],
        r"recipients\[1\].kind: expected a reg.* got number 900, which is.*register\(kind\) first",
    ),
    ([Homemade(replace(MINE))], r"register\(kind\) first"),
    (
        [Homemade(replace(HYBRID, label=""))],
        "recipients.*got another of number 1 than HYBRID; give",
    ),
    (
        [archive.Recipient(replace(X25519, label=""), ME.recipient.public)],
        "recipients.*got another of number 2 than X25519; give",
    ),
    (
        [Homemade(kind=1)],
        r"kind: expected a registered SlotKind, got int; .*register\(kind\) first",
    ),
    ([Homemade(kind=None)], "kind: expected a registered SlotKind, got NoneType"),
    ([Homemade(kind=SlotKind)], "kind: expected a registered SlotKind, got type"),
    ([Homemade(HYBRID, key_id="k" * 16)], r"recipients\[0\].key_id: expected 16 bytes, got str"),
    ([Homemade(HYBRID, key_id=b"k")], r"recipients\[0\].key_id: expected 16 bytes, got 1;"),
    ([Homemade(ARGON2ID)], "key_id of zeros, got another, since its kind names nobody"),
]
IDENTITIES = [
    (ME.recipient, "identity: expected an Identity.*Recipient; a recipient seals"),
    ("me.key", "got text; give read_identity"),
    ([ME], "got list; give the one identity"),
    (Reversing(), "ServiceKey"),
    (None, "got NoneType"),
    (SIGNER.verifier, "Verifier; verifiers check"),
]
TRUSTED = [
    (SIGNER.verifier, r"trusted: expected a list.*put it in a list, trusted=\[...\]"),
    ("maker.pub", r"trusted: expected a list.*got text; give Verifier.from_text"),
    ([SIGNER], r"trusted\[0\]: expected a Verifier, got Signer; give signer.verifier"),
    (SIGNER, "give signer.verifier"),
    (["maker.pub"], "got text; give Verifier.from_text"),
    ([ME], "Identity; identities open"),
    ([None], "got NoneType"),
]
SIGNERS = [
    (SIGNER.verifier, "signer: expected a Signer or None, got Verifier; a verifier signs nothing"),
    ("maker.key", "got text; give read_signer"),
    (ME, "Identity; identities open"),
]


@pytest.fixture
def file(tmp_path):
    """A sealed, signed file."""
    archive.save(tmp_path / "m", STATE, recipients=[ME.recipient], signer=SIGNER)
    return tmp_path / "m"


@pytest.mark.parametrize(("wrong", "words"), RECIPIENTS)
def test_who_cannot_be_sealed_to_is_refused(monkeypatch, file, wrong, words):
    """By each entry point that seals, before anything is written."""
    monkeypatch.setattr(lightning_adapter, "CheckpointIO", None)  # as if it were installed
    folder, content = file.parent, file.read_bytes()
    for call in (
        lambda: archive.save(folder / "new", STATE, recipients=wrong),
        lambda: archive.check(STATE, recipients=wrong),
        lambda: CheckpointStore(folder / "store", recipients=wrong, signer=SIGNER),
        lambda: archive.rotate(file, identity=ME, recipients=wrong, signer=SIGNER),
        lambda: archive.save_pretrained(
            folder / "new", torch.nn.Linear(1, 1), config={}, recipients=wrong
        ),
        lambda: SealedWriter(folder / "new", recipients=wrong),
        lambda: lightning_adapter.SealedCheckpointIO(recipients=wrong),
    ):
        with pytest.raises(InvalidKey, match=words):
            call()
    with pytest.raises(InvalidKey, match=words.replace("recipients", "add")):
        archive.change_recipients(file, identity=ME, add=wrong)
    assert [each.name for each in folder.iterdir()] == ["m"]
    assert file.read_bytes() == content


@pytest.mark.parametrize(("wrong", "words"), IDENTITIES)
def test_who_opens_nothing_is_refused(file, wrong, words):
    """By each entry point that opens."""
    for call in (
        lambda: archive.load(file, identity=wrong),
        lambda: archive.load(file, identity=wrong, only=["w"]),
        lambda: archive.load_into({"w": torch.zeros(2)}, file, identity=wrong),
        lambda: archive.open_lazy(file, identity=wrong),
        lambda: archive.decrypt(file, file.parent / "out", identity=wrong),
        lambda: archive.change_recipients(file, identity=wrong),
        lambda: archive.rotate(file, identity=wrong, recipients=[ME.recipient], signer=SIGNER),
    ):
        with pytest.raises(InvalidKey, match=words):
            call()
    if wrong is not None:
        for call in (
            lambda: archive.verify(file, trusted=[SIGNER.verifier], deep=wrong),
            lambda: CheckpointStore(file.parent / "s", identity=wrong, trusted=[SIGNER.verifier]),
        ):
            with pytest.raises(InvalidKey, match=words):
                call()


@pytest.mark.parametrize(("wrong", "words"), TRUSTED)
def test_trust_in_what_is_no_verifier_reads_as_a_mistake(file, wrong, words):
    """And not as an attack."""
    for call in (
        lambda: archive.load(file, identity=ME, trusted=wrong),
        lambda: archive.verify(file, trusted=wrong),
        lambda: archive.rotate(
            file, identity=ME, recipients=[ME.recipient], signer=SIGNER, trusted=wrong
        ),
        lambda: archive.read_certificate(file, trusted=wrong),
        lambda: archive.export_card(file, file.parent / "card", trusted=wrong),
        lambda: CheckpointStore(file.parent / "s", identity=ME, trusted=wrong),
        lambda: CheckpointStore(file.parent / "s", signer=SIGNER, trusted=wrong),
    ):
        with pytest.raises(InvalidKey, match=words):
            call()


@pytest.mark.parametrize(("wrong", "words"), SIGNERS)
def test_who_cannot_sign_is_refused(file, wrong, words):
    """Before anything is written or destroyed."""
    to = [ME.recipient]
    for call in (
        lambda: archive.save(file, STATE, recipients=to, signer=wrong, overwrite=True),
        lambda: archive.rotate(file, identity=ME, recipients=to, signer=wrong),
        lambda: archive.shred(file, certificate=file.parent / "c", signer=wrong),
        lambda: CheckpointStore(file.parent / "s", recipients=to, signer=wrong),
    ):
        with pytest.raises(InvalidKey, match=words):
            call()
    assert archive.load(file, identity=ME, trusted=[SIGNER.verifier])["w"].tolist() == [1, 1]


def test_no_message_shows_a_text():
    """It may be a secret, pasted into the wrong place."""
    for call in (
        lambda: archive.check(recipients=[ME.to_text()]),
        lambda: archive.load("nowhere", identity=ME.to_text()),
    ):
        with pytest.raises(archive.ArchiveError) as found:
            call()
        assert ME.to_text() not in str(found.value)


def test_expectations_that_no_file_can_meet_are_refused(file):
    """A list of claims, a hash in bytes, one name for a list of names."""
    with pytest.raises(StateError, match=r"expect: expected a dict.*got list"):
        archive.load(file, identity=ME, expect=["epsilon"])
    with pytest.raises(StateError, match=r"core_hash: expected 64 hexadecimal"):
        archive.load(file, identity=ME, core_hash=bytes(32))
    with pytest.raises(StateError, match=r"only: expected a list of names, got str"):
        archive.load(file, identity=ME, only="w")


def test_a_recipient_is_removed_by_itself_or_by_its_id(file):
    """An identity is told which half of it to give, and so is one that is in no list."""
    archive.change_recipients(file, identity=ME, add=[YOU.recipient])
    with pytest.raises(InvalidKey, match=r"remove\[0\].*give identity.recipient"):
        archive.change_recipients(file, identity=ME, remove=[YOU])
    for one in (YOU.recipient, YOU.recipient.key_id.hex()):
        with pytest.raises(InvalidKey, match=r"put it in a list, remove=\[...\]"):
            archive.change_recipients(file, identity=ME, remove=one)
    archive.change_recipients(file, identity=ME, remove=[YOU.recipient])
    assert len(archive.inspect(file).slots) == 1


@pytest.mark.parametrize("key_id", ["k" * 16, None, b"k"])
def test_who_is_to_be_removed_has_an_id(file, key_id):
    """Of 16 bytes, else the mistake is named."""
    with pytest.raises(InvalidKey, match=r"remove\[0\].key_id: expected 16 bytes, got"):
        archive.change_recipients(file, identity=ME, remove=[Homemade(key_id=key_id)])


@pytest.mark.parametrize("post_quantum", [True, False])
def test_a_copy_of_a_recipient_is_as_good(tmp_path, post_quantum):
    """One that was copied, or pickled for another process, still has the registered kind."""
    me = archive.generate_identity(post_quantum=post_quantum)
    for number, to in enumerate(
        (
            copy.copy(me.recipient),
            copy.deepcopy(me.recipient),
            pickle.loads(pickle.dumps(me.recipient)),
            pickle.loads(pickle.dumps(me.recipient, protocol=0)),
        )
    ):
        assert to == me.recipient
        assert to.kind is me.recipient.kind
        archive.save(tmp_path / str(number), STATE, recipients=[to])
        assert archive.load(tmp_path / str(number), identity=me)["w"].tolist() == [1, 1]
    for unknown in (copy.deepcopy(MINE), replace(HYBRID, label="")):
        with pytest.raises(InvalidKey, match="registered"):
            archive.check(recipients=[Homemade(pickle.loads(pickle.dumps(unknown)))])


def test_an_iterator_of_recipients_is_as_good_as_a_list(tmp_path):
    """Though it can be read once only."""
    archive.save(tmp_path / "m", STATE, recipients=iter([ME.recipient]))
    assert archive.load(tmp_path / "m", identity=ME)["w"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("value", "words"),
    [(float("nan"), "float nan"), ({1, 2}, r"set \{1, 2\}"), (1 + 2j, r"complex \(1\+2j\)")],
)
def test_a_claim_that_is_no_json_is_shown(value, words):
    """With its path."""
    with pytest.raises(StateError, match=f"claims.a.b: expected plain JSON.*got {words}"):
        archive.check(claims={"a": {"b": value}})


@pytest.mark.parametrize("state", [None, 5, "text", torch.ones(2)])
def test_a_single_value_is_a_state_too(tmp_path, state):
    """As the format has it: a file of it gives it back."""
    with CheckpointStore(tmp_path, recipients=[ME.recipient], signer=SIGNER, identity=ME) as store:
        assert store.save(state, step=0) == 1
        found = store.load()
    assert torch.equal(found, state) if isinstance(state, torch.Tensor) else found == state
