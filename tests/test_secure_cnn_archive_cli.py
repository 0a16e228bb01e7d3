"""`secure-cnn archive`, verb by verb: data on standard output, words on standard error."""

import getpass
import io
import json
import stat
import sys
from functools import partial

import pytest
import safetensors.torch
import torch
from rich.console import Console

from secure_cnn import archive

SOMEBODY = "age1zvkyg2lqzraa2lnjvqej32nkuu0ues2s82hzrye869xeexvn73equnujwj"
STATE = {"layer.weight": torch.arange(6.0), "layer.bias": torch.ones(2)}


@pytest.fixture
def cli(cli):
    """Runs `secure-cnn archive`; exit code, standard output and error."""
    return partial(cli, "archive")


@pytest.fixture
def room(cli, tmp_path):
    """A folder with keys of two readers and a maker, a shared key, and a plain file."""
    for name, options in (
        ("reader", ()),
        ("second", ()),
        ("maker", ("--signer",)),
        ("shared", ("--kek",)),
    ):
        code, public, _ = cli("keygen", tmp_path / f"{name}.key", *options)
        assert code == 0
        (tmp_path / f"{name}.pub").write_text(public)
        assert stat.S_IMODE((tmp_path / f"{name}.key").stat().st_mode) == 0o600
    safetensors.torch.save_file(STATE, tmp_path / "plain")
    return tmp_path


@pytest.fixture
def sealed(cli, room):
    """A file for the reader, signed by the maker."""
    words = ("--recipient", room / "reader.pub", "--signer", room / "maker.key")
    claims = ("--claim", "epsilon=3.0", "--claim", "data=digits", "--private-claim", 'who=["acme"]')
    code, out, err = cli("seal", room / "plain", room / "m", *words, *claims, "--name", "run 7")
    assert (code, out) == (0, ""), err
    assert "plain file is still there" in err
    return room / "m"


def opens(room, name="reader", path=None):
    """Whether a key file opens the file."""
    identity = archive.read_identity(room / f"{name}.key")
    try:
        state = archive.load(path or room / "m", identity=identity)
    except archive.WrongKey:
        return False
    return torch.equal(state["layer.weight"], STATE["layer.weight"])


def test_keys_of_every_kind(cli, tmp_path):
    """The options say what is made; only the public half is printed."""
    made = {
        ("--classical",): "secure-cnn-recipient-1-",
        ("--signer", "--post-quantum"): "secure-cnn-verifier-1-",
    }
    for number, (options, start) in enumerate(made.items()):
        code, out, err = cli("keygen", tmp_path / str(number), *options)
        assert (code, out.startswith(start)) == (0, True)
        assert "secret" not in out
        assert "secret key" in err
    code, out, _ = cli("keygen", tmp_path / "kek", "--kek")
    assert out.strip() == archive.read_kek(tmp_path / "kek").key_id.hex()
    signer = archive.read_signer(tmp_path / "1")
    assert signer.verifier.algorithm == "ed25519+ml-dsa-65"


def test_a_file_is_sealed_and_shown_and_opened(cli, room, sealed):
    """Seal, inspect, verify, deep verify, open."""
    assert opens(room)
    code, out, _ = cli("inspect", sealed)
    assert (code, out.splitlines()[0].startswith("UNVERIFIED")) == (0, True)
    assert '"run 7"' in out
    assert "acme" not in out
    assert json.loads(cli("inspect", sealed, "--json")[1]) == {"epsilon": 3.0, "data": "digits"}
    trusted = ("--trusted", room / "maker.pub")
    code, out, _ = cli("verify", sealed, *trusted, "--identity", room / "reader.key")
    assert (code, out.startswith("VERIFIED")) == (0, True)
    assert cli("verify", sealed, *trusted, "--identity", room / "second.key")[0] == 6
    words = ("open", sealed, "--out", room / "out", *trusted)
    code, out, err = cli(*words)
    assert (code, out) == (6, "")
    assert err.startswith("error: expected --identity")
    assert "\nhint: name what opens the file" in err
    assert cli(*words, "--identity", room / "reader.key")[:2] == (0, "")
    assert torch.equal(safetensors.torch.load_file(room / "out")["layer.bias"], torch.ones(2))


def test_recipients_come_and_go(cli, room, sealed):
    """List, add, remove; the payload and the signature stay."""
    code, out, _ = cli("recipients", "list", sealed)
    mine = out.split()[1]
    assert (code, out.split()[0]) == (0, "hybrid")
    size = sealed.stat().st_size
    add = ("recipients", "add", sealed, "--identity", room / "reader.key")
    assert cli(*add, "--recipient", room / "second.pub")[:2] == (0, "")
    assert opens(room, "second")
    assert "(added later)" in cli("recipients", "list", sealed)[1]
    remove = ("recipients", "remove", sealed)
    code, _, err = cli(*remove, mine, "--identity", room / "second.key")
    assert (code, "hint: " in err, "rotate" in err) == (0, True, True)
    assert (opens(room), opens(room, "second")) == (False, True)
    assert sealed.stat().st_size == size
    assert cli("verify", sealed, "--trusted", room / "maker.pub")[0] == 0
    assert cli(*add)[0] == 6
    assert cli(*add, "--recipient", room / "reader.pub")[0] == 6
    assert cli(*remove, mine, "--identity", room / "second.key")[0] == 6


def test_a_shared_key_comes_from_where_it_is_kept(cli, room, monkeypatch):
    """A file, the environment, a command; a missing one is an error of ours."""
    code, _, err = cli("seal", room / "plain", room / "m", "--kek", room / "shared.key")
    assert code == 0, err
    text = archive.read_kek(room / "shared.key").to_text()
    monkeypatch.setenv("SHARED", text)
    sources = [room / "shared.key", "env:SHARED", f"command:grep secret-1 {room / 'shared.key'}"]
    for number, source in enumerate(sources):
        code, _, err = cli("open", room / "m", "--out", room / f"out{number}", "--kek", source)
        assert code == 0, err
    missing = ["env:NONE", "command:", "command:'", "command:false", "keyring:a/b", room / "none"]
    for source in missing:
        code, _, err = cli("open", room / "m", "--out", room / "out", "--kek", source)
        assert (code, text in err) == (6, False)


def test_a_passphrase_is_asked_for_twice_when_sealing(cli, room, monkeypatch):
    """Two different answers seal nothing; opening asks once."""
    inner = archive.Passphrase
    cost = archive.INSECURE_TEST_COST
    monkeypatch.setattr(archive, "Passphrase", lambda text: inner(text, cost=cost))
    answers = iter(["one", "two", "one", "one", "one"])
    monkeypatch.setattr(getpass, "getpass", lambda prompt: next(answers))
    words = ("seal", room / "plain", room / "m", "--passphrase-file", "-")
    code, _, err = cli(*words)
    assert (code, "twice" in err) == (6, True)
    assert not (room / "m").exists()
    assert cli(*words)[0] == 0
    assert cli("open", room / "m", "--out", room / "out", "--passphrase-file", "-")[0] == 0
    assert next(answers, None) is None


def test_a_file_gets_a_new_key(cli, room, sealed):
    """Rotate needs the signer of a signed file; only who is named can open it then."""
    before = archive.inspect(sealed)
    words = (
        "rotate",
        sealed,
        "--identity",
        room / "reader.key",
        "--recipient",
        room / "second.pub",
    )
    code, _, err = cli(*words)
    assert (code, "is signed" in err) == (6, True)
    assert cli(*words, "--signer", room / "maker.key")[:2] == (0, "")
    assert (opens(room), opens(room, "second")) == (False, True)
    after = archive.inspect(sealed)
    assert (after.claims, after.file_id == before.file_id) == (before.claims, False)


def test_shredding_asks_first(cli, room, sealed, monkeypatch):
    """Without --yes and an answer nothing happens; then file and keys are gone."""
    for answer in ("n\n", ""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
        code, out, err = cli("shred", sealed)
        assert (code, out, "for everyone?" in err, "hint: " in err) == (1, "", True, True)
        assert opens(room)
    words = ("--certificate", room / "c", "--signer", room / "maker.key", "--yes")
    code, out, _ = cli("shred", sealed, *words)
    assert (code, "not known" in out) == (0, True)
    assert not sealed.exists()
    maker = archive.read_signer(room / "maker.key").verifier
    assert archive.read_certificate(room / "c", trusted=[maker]).file == "m"
    assert cli("shred", room / "plain", "--yes")[0] == 6
    assert (room / "plain").exists()


def test_files_of_other_tools_come_in_and_go_out(cli, room, sealed):
    """Import of a torch file, export of one tensor, of all, and for age."""
    torch.save({"model": STATE, "epoch": 3}, room / "m.pt")
    words = ("--recipient", room / "reader.pub")
    code, _, err = cli("import", room / "m.pt", room / "imported", *words)
    assert code == 0, err
    identity = archive.read_identity(room / "reader.key")
    assert archive.load(room / "imported", identity=identity)["epoch"] == 3
    reader = ("--identity", room / "reader.key")
    assert cli("export", sealed, room / "one", "--only", "layer.bias", *reader)[0] == 0
    assert safetensors.torch.load_file(room / "one").keys() == {"layer.bias"}
    assert cli("export", sealed, room / "all", *reader)[0] == 0
    assert safetensors.torch.load_file(room / "all").keys() == STATE.keys()
    theirs = "age1zvkyg2lqzraa2lnjvqej32nkuu0ues2s82hzrye869xeexvn73equnujwj"
    assert cli("export", sealed, room / "m.age", "--age", theirs, *reader)[0] == 0
    assert (room / "m.age").read_bytes().startswith(b"age-encryption.org/v1\n-> X25519 ")
    assert cli("export", sealed, room / "x", "--age", "age1nobody", *reader)[0] == 6
    both = ("--age", theirs, "--only", "layer.bias")
    assert cli("export", sealed, room / "x", *both, *reader)[0] == 2
    assert not (room / "x").exists()


def test_a_folder_of_checkpoints_is_listed_and_pruned(cli, room):
    """One line a checkpoint; a rule must be given; the newest stays."""
    maker = archive.read_signer(room / "maker.key")
    recipient = archive.read_identity(room / "reader.key").recipient
    with archive.CheckpointStore(room / "s", recipients=[recipient], signer=maker) as store:
        for step in range(3):
            store.save(STATE, step=step, metric=float(step == 1))
    listing = ("ls", room / "s", "--trusted", room / "maker.pub")
    code, out, err = cli(*listing, "--deep")
    assert code == 0, err
    assert [line.split()[2] for line in out.splitlines()] == ["0", "1", "2"]
    prune = ("prune", room / "s", "--signer", room / "maker.key")
    assert cli(*prune)[0] == 2
    code, out, err = cli(*prune, "--keep-last", "1", "--keep-best", "1")
    assert (code, out, "removed 1, kept 2" in err) == (0, "", True)
    assert [line.split()[2] for line in cli(*listing)[1].splitlines()] == ["1", "2"]
    stranger = ("--trusted", archive.generate_signer().verifier.to_text())
    assert cli("ls", room / "s", *stranger)[0] == 6


def test_bad_words_are_wrong_usage(cli, room):
    """A claim without a name, and a command without its options, end in 2 with no file."""
    words = ("seal", room / "plain", room / "x", "--recipient", room / "reader.pub")
    for bad in (
        ("epsilon",),
        ("=3",),
        ("epsilon=3", "epsilon=30"),
        ("accuracy=0,93",),
        ("accuracy=93%",),
        ("private=True",),
        ("who=[acme]",),
        ("note=",),
    ):
        options = [word for claim in bad for word in ("--claim", claim)]
        assert cli(*words, *options)[0] == 2
    code, _, err = cli("seal", room / "plain", room / "x")
    assert code == 6
    assert "name one with --recipient, --passphrase-file or --kek" in err
    assert cli("verify", room / "plain")[0] == 2
    assert not (room / "x").exists()


def test_the_wrong_half_of_a_key_is_told_which_half_to_give(cli, room, sealed):
    """A secret one where a public one belongs, and the reverse, whatever its mode is."""
    code, _, err = cli("verify", sealed, "--trusted", room / "maker.key")
    assert code == 6
    assert "which is a secret one" in err
    assert "give the .pub file" in err
    secret = (room / "maker.key").read_text().splitlines()[-1]
    code, _, err = cli("verify", sealed, "--trusted", secret)
    assert code == 6
    assert "make a new pair" in err
    assert secret not in err
    for mode in (0o644, 0o600):
        (room / "reader.pub").chmod(mode)
        code, _, err = cli("open", sealed, "--out", room / "o", "--identity", room / "reader.pub")
        assert code == 6
        assert "holds the public half" in err
        assert "chmod" not in err
    code, _, err = cli("rotate", sealed, "--identity", room / "reader.key")
    assert code == 6
    assert "--new-passphrase-file" in err


def test_a_folder_that_is_not_there_is_said_so(cli, room):
    """By the command, and by a store that is opened to read."""
    code, _, err = cli("ls", room / "nowhere", "--trusted", room / "maker.pub")
    assert code == 6
    assert "no such folder" in err
    trusted = [archive.read_signer(room / "maker.key").verifier]
    store = archive.CheckpointStore(
        room / "nowhere", trusted=trusted, identity=archive.read_identity(room / "reader.key")
    )
    with pytest.raises(archive.StorageError, match="there is no such folder"):
        store.load()


def test_key_options_that_do_not_go_together_make_no_key(cli, tmp_path):
    """A flag that would be passed over in silence is wrong usage."""
    for options in (
        ("--signer", "--kek"),
        ("--classical", "--signer"),
        ("--classical", "--kek"),
        ("--post-quantum",),
        ("--post-quantum", "--kek"),
    ):
        assert cli("keygen", tmp_path / "key", *options)[:2] == (2, "")
    assert not (tmp_path / "key").exists()


def test_who_can_open_it_is_named_well_or_refused(cli, room):
    """A missing file, a folder, another kind of key: each is said, no secret is repeated."""
    (room / "folder").mkdir()
    secret = (room / "reader.key").read_text().splitlines()[-1]
    for given, said in (
        (room / "nowhere.pub", "no such file"),
        (room / "folder", "folder"),
        (room / "maker.pub", "got a secure-cnn-verifier-1"),
        (room / "reader.key", "got a secure-cnn-identity-secret-1"),
        (secret, "got a secure-cnn-identity-secret-1"),
    ):
        code, out, err = cli("seal", room / "plain", room / "x", "--recipient", given)
        assert (code, out, said in err, "hint: " in err) == (6, "", True, True), err
        assert secret not in err
    assert not (room / "x").exists()


def test_a_file_that_names_nobody_is_refused_wherever_keys_are_read(cli, room, sealed):
    """Recipients and verifiers alike; nothing is written, and nobody else's key makes up for it."""
    before, empty = sealed.read_bytes(), room / "empty.pub"
    empty.write_text("# nobody yet\n")
    reader = ("--identity", room / "reader.key")
    also = ("--recipient", room / "reader.pub", "--recipient", empty)
    trusted = ("--trusted", room / "maker.pub", "--trusted", empty)
    for words in (
        ("seal", room / "plain", room / "x", *also),
        ("import", room / "plain", room / "x", *also),
        ("rotate", sealed, *reader, *also),
        ("recipients", "add", sealed, *reader, *also),
        ("rotate", sealed, *reader, *also[:2], *trusted),
        ("open", sealed, "--out", room / "x", *reader, *trusted),
        ("export", sealed, room / "x", *reader, *trusted),
        ("export", sealed, room / "x", "--card", *trusted),
        ("verify", sealed, *trusted),
        ("ls", room, *trusted),
    ):
        code, out, err = cli(*words)
        assert (code, out, "hint: " in err) == (6, "", True), err
        assert f"{empty}: expected a public key, found none" in err, words
    assert not (room / "x").exists()
    assert sealed.read_bytes() == before


def test_what_opens_is_one_thing(cli, room, sealed):
    """Two keys where one is needed are refused, rather than one passed over."""
    words = ("--identity", room / "reader.key", "--kek", room / "shared.key")
    code, out, err = cli("open", sealed, "--out", room / "x", *words)
    assert (code, out, "hint: " in err) == (6, "", True)
    assert not (room / "x").exists()


def test_hints_are_for_the_command_line(cli, room, sealed):
    """What to do next can be done here: no Python, and no option that the verb does not have."""
    reader, to = ("--identity", room / "reader.key"), ("--recipient", room / "reader.pub")
    assert cli("seal", room / "plain", room / "unsigned", *to)[0] == 0
    torch.save(STATE, room / "torch.pt")
    passphrase = room / "passphrase"
    passphrase.write_text("secret\n")
    passphrase.chmod(0o600)
    for words, said in (
        (("open", sealed, "--out", room / "plain", *reader), "choose another path"),
        (("verify", room / "unsigned", "--trusted", room / "maker.pub"), "is not signed"),
        (("export", sealed, room / "x", "--only", "layer.wieght", *reader), "'layer.weight'"),
        (("seal", room / "torch.pt", room / "x", *to), "import"),
        (("seal", sealed, room / "x", *to), "open it first"),
        (("open", sealed, "--out", room / "x", "--passphrase-file", passphrase), "no passphrase"),
        (("open", sealed, "--out", room / "x", "--passphrase-file", room), "got a folder"),
    ):
        code, out, err = cli(*words)
        assert (code, out, said in err, "hint: " in err) == (6, "", True, True), err
        assert "=True" not in err
        assert "=None" not in err
        assert "Errno" not in err


def test_a_folder_without_checkpoints_is_an_error(cli, room):
    """A missing sequence is not a whole one, and looking for it makes nothing."""
    (room / "empty").mkdir()
    for folder in (room / "nowhere", room / "empty"):
        listed = cli("ls", folder, "--trusted", room / "maker.pub")
        pruned = cli("prune", folder, "--signer", room / "maker.key", "--keep-last", "1")
        for code, out, err in (listed, pruned):
            assert (code, out, "hint: " in err) == (6, "", True), err
    assert not (room / "nowhere").exists()
    assert not list((room / "empty").iterdir())


def test_a_recipient_may_be_given_as_text(cli, room):
    """A hybrid key is longer than a file's name may be, and is no file's name."""
    text = (room / "reader.pub").read_text().strip()
    code, _, err = cli("seal", room / "plain", room / "m", "--recipient", text)
    assert code == 0, err
    assert opens(room)


def test_claims_are_told_as_a_card(cli, room, sealed):
    """Without any key; one thing at a time."""
    code, _, err = cli("export", sealed, room / "card.md", "--card")
    assert code == 0, err
    assert "epsilon" in (room / "card.md").read_text()
    assert cli("export", sealed, room / "both", "--card", "--bom")[0] == 2


@pytest.fixture
def watched(monkeypatch):
    """A terminal in place of standard error for the bars, and nobody who waits for them."""
    drawn = io.StringIO()
    console = Console(file=drawn, force_terminal=True, width=120, legacy_windows=False)
    monkeypatch.setattr("secure_cnn.progress.Terminal", lambda **_: console)
    monkeypatch.setattr("secure_cnn.progress._PATIENCE", 0.0)
    return drawn


def test_long_work_on_a_file_shows_how_far_it_is(cli, room, watched):
    """A bar of its own for every command that reads all of a file; none for the others."""
    reader, out = ("--identity", room / "reader.key"), room / "out"
    trusted = ("--trusted", cli("keygen", room / "maker2.key", "--signer")[1].strip())
    to = ("--recipient", room / "reader.pub", "--signer", room / "maker2.key")
    for words, shown in (
        (("seal", room / "plain", room / "m", *to), "sealing"),
        (("verify", room / "m", *trusted), "verifying"),
        (("verify", room / "m", *trusted, *reader), "verifying"),
        (("inspect", room / "m"), ""),
        (("open", room / "m", "--out", out, *reader), "opening"),
        (("export", room / "m", room / "e", *reader), "exporting"),
        (("export", room / "m", room / "age", *reader, "--age", SOMEBODY), "exporting"),
        (("export", room / "m", room / "card", "--card"), ""),
        (("rotate", room / "m", *reader, *to), "rotating"),
        (("import", out, room / "i", *to), "sealing"),
    ):
        watched.truncate(watched.seek(0))
        code, _, err = cli(*words)
        assert code == 0, err
        assert shown in watched.getvalue()
        assert ("bytes" in watched.getvalue()) == bool(shown)


def test_a_log_file_gets_no_bar(cli, room, monkeypatch):
    """Where standard error is no terminal it holds the messages alone, however long it takes."""
    monkeypatch.setattr("secure_cnn.progress._PATIENCE", 0.0)
    _, out, err = cli("seal", room / "plain", room / "m", "--recipient", room / "reader.pub")
    assert out == ""
    assert err.splitlines() == [f"sealed file: {room / 'm'}; the plain file is still there"]
