"""`secure-cnn certificate`: verify one of any kind, sign for having checked it, make a page."""

import pytest
from support.erasures import following, make_erasure

from secure_cnn import archive


@pytest.fixture
def room(tmp_path):
    """A folder with keys of who made a certificate and who checks it, and the certificate."""
    for name in ("maker", "checker"):
        signer = archive.generate_signer()
        archive.write_key(tmp_path / f"{name}.key", signer)
        (tmp_path / f"{name}.pub").write_text(signer.verifier.to_text() + "\n")
    maker = archive.read_signer(tmp_path / "maker.key")
    archive.write_certificate(tmp_path / "c", make_erasure(), signer=maker)
    return tmp_path


def test_a_certificate_is_verified(cli, room):
    """What it says on standard output; a changed byte is exit code 6."""
    words = ("certificate", "verify", room / "c", "--trusted", room / "maker.pub")
    code, out, err = cli(*words)
    assert (code, err) == (0, "")
    for words_of_it in (
        "received        2026-11-01T09:00:00Z",
        "ground          Art. 17(1)(b), consent withdrawn",
        "people          2, with 6 images",
        "method          sharded training (exact)",
        "guarantee       The model is, bit for bit",
        "evidence        test accuracy, gap to re-training: 0.1 (-0.4 to 0.6), n = 5",
        "evidence        seconds: 12, n = 1",
        "not known       Copies of data and model",
        "checked by      nobody",
    ):
        assert words_of_it in out
    raw = (room / "c").read_bytes()
    (room / "c").write_bytes(raw.replace(b"consent", b"Consent"))
    code, out, err = cli(*words)
    assert (code, out) == (6, "")
    assert "hint: " in err
    (room / "c").write_bytes(raw)
    assert cli(*words[:-1], room / "checker.pub")[0] == 6
    assert cli(*words[:-2])[0] == 2


def test_who_signed_is_told_in_one_form(cli, room):
    """That of `archive verify`, in the certificate, on its page and of a sealed file."""
    maker, me = archive.read_signer(room / "maker.key"), archive.generate_identity()
    archive.save(room / "m", {}, recipients=[me.recipient], signer=maker)
    form = repr(maker.verifier)
    trusted = ("--trusted", room / "maker.pub")
    assert f"signed by {form}" in cli("archive", "verify", room / "m", *trusted)[1]
    told = cli("certificate", "verify", room / "c", *trusted, "--page", room / "c.html")[1]
    assert f"made by         {form}" in told
    assert form in (room / "c.html").read_text()


def test_a_second_person_signs(cli, room):
    """Whoever trusts them sees it; they do not sign twice, nor who made it."""
    check = ("certificate", "check", room / "c", "--trusted", room / "maker.pub", "--signer")
    assert cli(*check, room / "maker.key")[0] == 6
    code, out, err = cli(*check, room / "checker.key")
    assert (code, "checked by" in out, "signed as checked" in err) == (0, True, True)
    assert cli(*check, room / "checker.key")[0] == 6
    verify = ("certificate", "verify", room / "c", "--trusted", room / "maker.pub")
    assert "not trusted" in cli(*verify)[1]
    assert "checked by" in cli(*verify, "--trusted", room / "checker.pub")[1]


def test_a_chain_is_followed(cli, room):
    """Only where the one before is named; else it is said that it was not."""
    maker = archive.read_signer(room / "maker.key")
    first = archive.verify_certificate(room / "c", trusted=[maker.verifier])
    archive.write_certificate(room / "2", following(first.value, first.digest), signer=maker)
    words = ("certificate", "verify", room / "2", "--trusted", room / "maker.pub")
    code, _, err = cli(*words)
    assert (code, "was not checked" in err) == (0, True)
    code, _, err = cli(*words, "--previous", room / "c")
    assert (code, err) == (0, "")
    assert cli(*words, "--previous", room / "2")[0] == 6


def test_a_page_is_written(cli, room):
    """Of what was verified, and of nothing else."""
    words = ("certificate", "verify", room / "c", "--page", room / "c.html", "--trusted")
    assert cli(*words, room / "checker.pub")[0] == 6
    assert not (room / "c.html").exists()
    code, _, err = cli(*words, room / "maker.pub")
    assert (code, "page: " in err) == (0, True)
    assert "Certificate of erasure" in (room / "c.html").read_text()


def test_a_certificate_of_destruction_is_verified_by_the_same_command(cli, room):
    """It has no page."""
    me, maker = archive.generate_identity(), archive.read_signer(room / "maker.key")
    archive.save(room / "m", {}, recipients=[me.recipient])
    archive.shred(room / "m", certificate=room / "d", signer=maker)
    words = ("certificate", "verify", room / "d", "--trusted", room / "maker.pub")
    code, out, _ = cli(*words)
    assert (code, "destruction" in out, "not known" in out) == (0, True, True)
    assert cli(*words, "--page", room / "d.html")[0] == 3
