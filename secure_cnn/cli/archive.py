"""`secure-cnn archive`: keys, sealed files, and who can open them.

Data goes to standard output, messages to standard error; no secret is ever an argument. Folders of
checkpoints are in `sequence`.
"""

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn, TypeAlias

import typer

from secure_cnn import archive
from secure_cnn.archive.storage import Path as AnyPath
from secure_cnn.cli import sequence
from secure_cnn.cli.claims import claims_from
from secure_cnn.cli.keys import (
    IdentityFile,
    Kek,
    PassphraseFile,
    Recipients,
    SignerFile,
    Trusted,
    Verifiers,
    identity_from,
    needed,
    recipients_from,
    signer_from,
    somebody,
    trusted_from,
    verifiers_from,
)
from secure_cnn.cli.options import message
from secure_cnn.cli.streams import source, target
from secure_cnn.printable import printable
from secure_cnn.progress import file_progress

__all__ = [
    "add",
    "app",
    "export",
    "inspect",
    "keygen",
    "list_",
    "open_",
    "remove",
    "rotate",
    "shred",
    "verify",
]

_STDIN = "- is standard input."
_STDOUT = "- is standard output."
_File: TypeAlias = Annotated[Path, typer.Argument(help="A sealed file.")]
_AnyFile: TypeAlias = Annotated[Path, typer.Argument(help=f"A sealed file. {_STDIN}")]
_NewFile: TypeAlias = Annotated[
    Path, typer.Argument(help=f"The file to make; it must not exist. {_STDOUT}")
]
_Claims: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--claim", help="NAME=JSON or NAME=word, for everyone to read; repeatable."),
]
_PrivateClaims: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--private-claim", help="NAME=JSON or NAME=word, for recipients only."),
]
_NewPassphraseFile: TypeAlias = Annotated[
    Path | None, typer.Option(help="A passphrase that opens it then; - asks.")
]
_NewKek: TypeAlias = Annotated[
    str | None, typer.Option(help="A key-encryption key that opens it then; as --kek.")
]
_Name: TypeAlias = Annotated[str, typer.Option(help="A logical name, for everyone to read.")]

app = typer.Typer(help="Keys, sealed files, and who can open them.", no_args_is_help=True)
_recipients = typer.Typer(help="Who can open a file: list, add, remove.", no_args_is_help=True)


@app.callback()
def _tidy(context: typer.Context) -> None:
    """Keys, sealed files, and who can open them."""

    def stop(number: int, _: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    # Where files cannot be without a name, what was half written must not stay.
    before = signal.signal(signal.SIGTERM, stop)
    context.call_on_close(lambda: signal.signal(signal.SIGTERM, before))


app.add_typer(_recipients, name="recipients")
app.command("ls")(sequence.ls)
app.command("prune")(sequence.prune)


@app.command()
def keygen(
    out: Annotated[
        Path, typer.Argument(help="The secret key's file; it must not exist. Mode 0600.")
    ],
    signer: Annotated[
        bool, typer.Option("--signer", help="Make a signing key, not an identity.")
    ] = False,
    kek: Annotated[
        bool, typer.Option("--kek", help="Make a key-encryption key, not an identity.")
    ] = False,
    classical: Annotated[
        bool, typer.Option("--classical", help="An identity of X25519 alone: a short text.")
    ] = False,
    post_quantum: Annotated[
        bool, typer.Option("--post-quantum", help="A signing key of Ed25519 with ML-DSA-65.")
    ] = False,
) -> None:
    """Make a key; the public half is printed."""
    if signer + kek + classical > 1 or (post_quantum and not signer):
        raise typer.BadParameter(
            "expected one of --signer, --kek and --classical, and --post-quantum with --signer only"
        )
    key: archive.Signer | archive.KeyEncryptionKey | archive.Identity
    if signer:
        key = archive.generate_signer(post_quantum=post_quantum)
        public = key.verifier.to_text()
    elif kek:
        key = archive.generate_kek()
        public = key.key_id.hex()
    else:
        key = archive.generate_identity(post_quantum=not classical)
        public = key.recipient.to_text()
    archive.write_key(out, key)
    typer.echo(public)
    message(f"secret key: {out}; keep it where the sealed files are not")


def _sealing(
    read: Callable[[AnyPath], archive.State], metavar: str, what: str
) -> Callable[..., None]:
    """A command that seals what is read of a plain file of one kind."""

    def seal(
        plain: Annotated[Path, typer.Argument(metavar=metavar, help=f"{what} {_STDIN}")],
        out: _NewFile,
        recipient: Recipients = None,
        passphrase_file: PassphraseFile = None,
        kek: Kek = None,
        signer: SignerFile = None,
        claim: _Claims = None,
        private_claim: _PrivateClaims = None,
        name: _Name = "",
    ) -> None:
        who = somebody(recipients_from(recipient or [], passphrase_file, kek), "--")
        with (
            source(plain, passphrase_file) as found,
            target(out) as made,
            file_progress("sealing") as progress,
        ):
            archive.save(
                made,
                read(found),
                recipients=who,
                signer=signer_from(signer),
                claims=claims_from(claim),
                private_claims=claims_from(private_claim),
                name=name,
                progress=progress,
            )
        message(
            f"sealed file: {made}" + ("; the plain file is still there" if found == plain else "")
        )

    return seal


app.command("seal", help="Encrypt a plain safetensors file to recipients; the plain one stays.")(
    _sealing(archive.load_plain, "plain", "A plain safetensors file.")
)
app.command(
    "import",
    help="Seal another tool's file; of a torch file only tensors and plain data, and no code runs.",
)(_sealing(archive.import_, "source", "A file of torch.save, or a safetensors file."))


@app.command()
def inspect(
    file: _File,
    as_json: Annotated[bool, typer.Option("--json", help="Print the claims as JSON.")] = False,
) -> None:
    """Show what a file says of itself; needs no key, checks no signature."""
    info = archive.inspect(file)
    typer.echo(json.dumps(info.claims, indent=1, sort_keys=True) if as_json else str(info))


@app.command()
def verify(
    file: _File,
    trusted: Verifiers,
    identity: IdentityFile = None,
    passphrase_file: PassphraseFile = None,
    kek: Kek = None,
) -> None:
    """Check the signature over claims and content; with a key, that it opens as well."""
    deep = identity_from(identity, passphrase_file, kek)
    with file_progress("verifying") as progress:
        info = archive.verify(file, trusted=verifiers_from(trusted), deep=deep, progress=progress)
    typer.echo(str(info))


@app.command("open")
def open_(
    file: _AnyFile,
    out: Annotated[
        Path,
        typer.Option(help=f"Where the plain safetensors file goes; it must not exist. {_STDOUT}"),
    ],
    identity: IdentityFile = None,
    passphrase_file: PassphraseFile = None,
    kek: Kek = None,
    trusted: Trusted = None,
) -> None:
    """Decrypt a file to plain safetensors."""
    opens = needed(identity, passphrase_file, kek)
    signers = trusted_from(trusted)
    with (
        source(file, passphrase_file) as found,
        target(out) as made,
        file_progress("opening") as progress,
    ):
        archive.decrypt(found, made, identity=opens, trusted=signers, progress=progress)
    message(f"plain file: {made}")


@app.command()
def export(
    file: _AnyFile,
    out: _NewFile,
    only: Annotated[
        list[str] | None, typer.Option(help="The name of a tensor; repeatable. All without.")
    ] = None,
    age: Annotated[
        list[str] | None, typer.Option(help="age1…: encrypt to these instead of plain.")
    ] = None,
    card: Annotated[bool, typer.Option("--card", help="A model card of the claims.")] = False,
    bom: Annotated[bool, typer.Option("--bom", help="A CycloneDX ML-BOM of the claims.")] = False,
    identity: IdentityFile = None,
    passphrase_file: PassphraseFile = None,
    kek: Kek = None,
    trusted: Trusted = None,
) -> None:
    """Give all tensors or some to another tool, as safetensors or an age file.

    Or the claims, as a card or a bill of materials, which needs no key.
    """
    signers = trusted_from(trusted)
    if sum(map(bool, (age, only, card, bom))) > 1:
        raise typer.BadParameter("give one of --only, --age, --card and --bom")
    if card or bom:
        write = archive.export_card if card else archive.export_bill_of_materials
        with source(file) as found, target(out) as made:
            write(found, made, trusted=signers)
        message(f"{'model card' if card else 'bill of materials'}: {made}")
        return
    opens = needed(identity, passphrase_file, kek)
    with (
        source(file, passphrase_file) as found,
        target(out) as made,
        file_progress("exporting") as progress,
    ):
        if only:
            archive.save_plain(
                made, archive.load(found, identity=opens, trusted=signers, only=only)
            )
        elif age:
            archive.export_age(
                found, made, identity=opens, recipients=age, trusted=signers, progress=progress
            )
        else:
            archive.decrypt(found, made, identity=opens, trusted=signers, progress=progress)
    message(f"{'age' if age else 'plain'} file: {made}")


@app.command()
def rotate(
    file: _File,
    recipient: Recipients = None,
    new_passphrase_file: _NewPassphraseFile = None,
    new_kek: _NewKek = None,
    identity: IdentityFile = None,
    passphrase_file: PassphraseFile = None,
    kek: Kek = None,
    signer: SignerFile = None,
    trusted: Trusted = None,
) -> None:
    """Encrypt a file anew, under a new file key, to the recipients named here and no others."""
    opens = needed(identity, passphrase_file, kek)
    who = somebody(recipients_from(recipient or [], new_passphrase_file, new_kek), "--new-")
    with file_progress("rotating") as progress:
        archive.rotate(
            file,
            identity=opens,
            recipients=who,
            signer=signer_from(signer),
            trusted=trusted_from(trusted),
            progress=progress,
        )
    message(f"new file key: {file}; copies of the old file still open with the old one")


@app.command()
def shred(
    file: _File,
    certificate: Annotated[
        Path | None, typer.Option(help="Where a certificate goes; it must not exist.")
    ] = None,
    signer: SignerFile = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Destroy the keys of a file and remove it. This cannot be undone."""
    if not yes:
        # Not typer's own question, which prints a space to standard output.
        typer.echo(f"destroy {printable(file)} for everyone? [y/N]: ", err=True, nl=False)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            message("\nnothing was destroyed\nhint: with --yes it does not ask")
            raise typer.Exit(1)
    typer.echo(str(archive.shred(file, certificate=certificate, signer=signer_from(signer))))


@_recipients.command("list")
def list_(file: _File) -> None:
    """Print kind and key id of each, one a line; needs no key, and nothing vouches for it."""
    for slot in archive.inspect(file).slots:
        typer.echo(str(slot))


@_recipients.command()
def add(
    file: _File,
    recipient: Recipients = None,
    new_passphrase_file: _NewPassphraseFile = None,
    new_kek: _NewKek = None,
    identity: IdentityFile = None,
    passphrase_file: PassphraseFile = None,
    kek: Kek = None,
) -> None:
    """Let more people open a file."""
    who = recipients_from(recipient or [], new_passphrase_file, new_kek)
    if not who:
        raise archive.InvalidKey("expected somebody to add, got nobody; name one with --recipient")
    opens = needed(identity, passphrase_file, kek)
    archive.change_recipients(file, identity=opens, add=who)
    message(f"added {len(who)} to {file}")


@_recipients.command()
def remove(
    file: _File,
    key_id: Annotated[list[str], typer.Argument(help="Key ids, as `list` prints them.")],
    identity: IdentityFile = None,
    passphrase_file: PassphraseFile = None,
    kek: Kek = None,
) -> None:
    """Take people's slots away; who kept the file key can still read this file."""
    opens = needed(identity, passphrase_file, kek)
    archive.change_recipients(file, identity=opens, remove=key_id)
    message(f"removed {len(key_id)} from {file}")
    message("hint: whoever read it before may have kept the file key; to shut them out, rotate")
