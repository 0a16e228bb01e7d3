"""`secure-cnn forget`: people leave the data of a run, and its model."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from secure_cnn.archive import (
    AnyIdentity,
    AnyRecipient,
    Identity,
    KeyEncryptionKey,
    Passphrase,
    Signer,
    Verifier,
    verify_certificate,
)
from secure_cnn.checkpoint import Sealing, Unlocking
from secure_cnn.cli.keys import (
    IdentityFile,
    Kek,
    PassphraseFile,
    Recipients,
    Trusted,
    identity_from,
    recipients_from,
    signer_from,
    trusted_from,
    verifiers_from,
)
from secure_cnn.cli.network import ModelOptions, own_network
from secure_cnn.cli.options import INTERRUPTED, message
from secure_cnn.engine import keep_freed_memory
from secure_cnn.errors import RunError
from secure_cnn.interruption import Stopped, stop_on_signals
from secure_cnn.pages import summary_table, write_certificate_page
from secure_cnn.printable import Terminal
from secure_cnn.unlearning import HEURISTICS, METHODS, Case, Forgetting, Forgotten, certify, forget
from secure_cnn.unlearning.certificate import earlier_certificate
from secure_cnn.unlearning.oracles import Beside, beside_oracles, check_oracles

__all__ = ["forget_command"]

_ORACLES = 3
_LONGEST_LINE = 200
"""Of a public key: one of ML-DSA-65 is thousands of letters."""
_POINTS, _MUCH = 100.0, 10.0
"""Of accuracy: all, and so many fewer than before that it is said."""
_STILL_THERE = (
    "the images themselves, and the old run, are still there: delete the images, and destroy the "
    "old model and its stages or sums (secure-cnn archive shred, where they are sealed)"
)
_UNCHANGED = (
    "the images themselves are still there: delete them; the model is unchanged and stays, here "
    "and in the old run"
)
_USUAL = Forgetting(run=Path("run"), ids=Path("ids"), out=Path("out"))


def forget_command(
    *,
    run: Annotated[Path, typer.Argument(help="The folder of a run that is complete.")],
    ids: Annotated[
        Path | None,
        typer.Option(help="Who leaves: a CSV file with the column path, index or person."),
    ] = None,
    missing_leave: Annotated[
        bool,
        typer.Option(
            "--missing-leave",
            help="Training images that were deleted before leave too, with or without --ids: the "
            "inventory of the run says which.",
        ),
    ] = False,
    out: Annotated[Path, typer.Option(help="The folder of the new run; it must not exist.")],
    signer: Annotated[
        Path, typer.Option(help="Signs the certificate, and the new run if it is sealed.")
    ],
    method: Annotated[
        str,
        typer.Option(
            help=f"auto takes the cheapest whose guarantee holds, of {', '.join(METHODS)}."
        ),
    ] = _USUAL.method,
    largest_epsilon: Annotated[
        float,
        typer.Option(help="Of group-privacy: what it may promise all who have left, at most."),
    ] = _USUAL.largest_epsilon,
    no_guarantee: Annotated[
        bool,
        typer.Option(
            "--no-guarantee",
            help=f"Allow a method that has none: {', '.join(HEURISTICS)}.",
        ),
    ] = False,
    data: Annotated[
        str | None, typer.Option(help="Where its images are now, if elsewhere than they were.")
    ] = None,
    recipient: Recipients = None,
    identity: IdentityFile = None,
    passphrase_file: PassphraseFile = None,
    kek: Kek = None,
    trusted: Trusted = None,
    unsigned: Annotated[
        bool,
        typer.Option(
            "--unsigned",
            help="The old run is sealed and signed by nobody: without this it must be signed by "
            "--signer, or by one of --trusted.",
        ),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(help="What makes the network if it is one of your own, as in its training."),
    ] = None,
    model_option: ModelOptions = None,
    received: Annotated[str, typer.Option(help="When it was asked, as 2026-11-30T12:00:00Z.")] = "",
    identity_confirmed: Annotated[
        str, typer.Option(help="When it was sure who asks, in the same form.")
    ] = "",
    deadline: Annotated[str, typer.Option(help="Until when, in the same form.")] = "",
    ground: Annotated[str, typer.Option(help="Why, in a sentence.")] = "",
    oracles: Annotated[
        int | None,
        typer.Option(
            help="Train so many models without them, and say how far this one is from those; by "
            "default 3 for a method without a guarantee, else none."
        ),
    ] = None,
    margin: Annotated[
        float, typer.Option(help="Points of accuracy between it and them that do not matter.")
    ] = 1.0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with one that was interrupted, in --out.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a run that is in --out.")] = False,
) -> None:
    """Take people out of a run and its model, and write a signed certificate of it.

    As in: secure-cnn forget runs/1 --ids leaving.csv --out runs/2 --signer signer.key
    """
    keep_freed_memory()
    case = Case(
        received=received, identity_confirmed=identity_confirmed, deadline=deadline, ground=ground
    )
    check_oracles(oracles or 0, margin)
    signing = signer_from(signer)
    assert signing is not None, "a path was given"
    verifiers = (signing.verifier, *verifiers_from(trusted or []))
    if resume and (out / "certificate.json").exists():
        raise RunError(f"{out}: is complete, with its certificate; there is nothing to resume")
    opens = identity_from(identity, passphrase_file, kek)
    earlier = earlier_certificate(run, trusted=verifiers)
    found = forget(
        Forgetting(
            run=run,
            ids=ids,
            out=out,
            method=method,
            data=data,
            largest_epsilon=largest_epsilon,
            no_guarantee=no_guarantee,
            unsigned=unsigned,
            missing_leave=missing_leave,
        ),
        network=own_network(model, model_option or []) if model else None,
        sealing=_sealing(recipient or [], opens, signing),
        unlocking=None
        if opens is None
        else Unlocking(identity=opens, trusted=trusted_from(trusted)),
        resume=resume,
        force=force,
    )
    if found.run.model is None:
        message("interrupted; hint: the same command with --resume goes on")
        raise typer.Exit(INTERRUPTED)
    beside = _beside(found, oracles, margin)
    path = certify(found, signer=signing, case=case, earlier=earlier, beside=beside)
    page = path.with_suffix(".html")
    write_certificate_page(verify_certificate(path, trusted=[signing.verifier]), page)
    _tell(found, beside, path, page, signing.verifier)


def _beside(found: Forgotten, oracles: int | None, margin: float) -> Beside | None:
    """The model beside those trained without them, where that was asked for or is due."""
    count = (0 if found.method.guarantee.holds else _ORACLES) if oracles is None else oracles
    if not count:
        return None
    if not found.request.rows:
        message("note: no image of who left is there to be asked about, by --oracles neither")
        return None
    with stop_on_signals() as stop:
        try:
            return beside_oracles(found, oracles=count, margin=margin, stop=stop)
        except Stopped as stopped:
            message("interrupted; hint: the same command with --resume goes on")
            raise typer.Exit(INTERRUPTED) from stopped


def _sealing(recipients: list[str], opens: AnyIdentity | None, signing: Signer) -> Sealing | None:
    """To whom the new run is sealed: those named, else to what opens the old one."""
    who: list[AnyRecipient] = recipients_from(recipients, None, None)
    if not who and opens is not None:
        if isinstance(opens, Identity):
            who = [opens.recipient]
        elif isinstance(opens, Passphrase | KeyEncryptionKey):
            who = [opens]
    return Sealing(recipients=who, signer=signing) if who else None


def _images(count: int) -> str:
    return "one image" if count == 1 else f"{count} images"


def _tell(
    found: Forgotten, beside: Beside | None, path: Path, page: Path, verifier: Verifier
) -> None:
    """What was done, on stdout; where it is and what is left to do, on stderr."""
    request, method = found.request, found.method
    out = Terminal()
    people = _images(request.people)
    if request.persons:
        people = "one person" if request.people == 1 else f"{request.people} persons"
    out.print(f"left: {people}; {_images(len(request.left))} of the training")
    if request.missing:
        out.print(
            f"{len(request.missing)} of these were not there any more: the inventory of the run "
            "knows them by their digests"
        )
    if request.tested:
        out.print(f"with them: {_images(len(request.tested))} of the test images")
    if request.copies:
        out.print(f"{request.copies} of these are copies of an image of theirs")
    out.print(f"method: {method.name}, since {method.why}")
    out.print(f"guarantee: {method.guarantee.says}")
    if found.work is not None:
        share = 100 * found.work.images / found.work.all_images
        out.print(
            f"trained again: {found.work.trained} of {found.work.stages} stages, {share:.1f} % of "
            "a full training"
        )
    out.print(f"change of the weights: {found.weight_change:.4g}")
    if beside is not None:
        out.print(_found_beside(beside))
    out.print(summary_table(found.run.record))
    _tell_places(found, path, page, verifier)


def _found_beside(beside: Beside) -> str:
    gap, (low, high) = beside.gap, beside.gap.average_gap_interval
    told = (
        f"beside models trained without them: verdict: {gap.verdict} ({gap.forget.margin:g} points "
        f"do not matter); direction: {gap.direction}; average gap {gap.average_gap:.2f} points "
        f"({low:.2f} to {min(_POINTS, high):.2f})"
    )
    again = beside.relearning
    if again is None:
        return told
    sooner = "sooner than by any of them" if again.faster else "no sooner than by one of them"
    return f"{told}; who left is known again {sooner}"


def _worse(found: Forgotten) -> str:
    """That the new model finds much less on test images than the old one did, or nothing."""
    variant = found.source.recipe.variant.name
    before, after = (
        _POINTS * next((e.accuracy for e in record.results if e.variant == variant), 0.0)
        for record in (found.source.record, found.run.record)
    )
    if before - after <= _MUCH:
        return ""
    return (
        f"accuracy on test images fell from {before:.1f} to {after:.1f} %: look whether the new "
        "model is still of use, or take another method"
    )


def _tell_places(found: Forgotten, path: Path, page: Path, verifier: Verifier) -> None:
    messages = Terminal(stderr=True)
    others = found.source.there.others
    if others:
        messages.print(
            f"note: {others} images of the data were not in the run: they left "
            "before, or came later"
        )
    lost = found.lost_stages
    if lost:
        messages.print(
            f"note: {lost} stages that had seen none of them were trained again too: the old run "
            "has no file of them, or one that was changed"
        )
    worse = _worse(found)
    if worse:
        messages.print(f"note: {worse}")
    left = _UNCHANGED if found.method.name == "group-privacy" else _STILL_THERE
    messages.print(f"note: {left}")
    messages.print(f"model: {found.run.folder.model}")
    messages.print(f"certificate: {path}, as a page: {page}; signed by {verifier!r}")
    public = verifier.to_text()
    if len(public) > _LONGEST_LINE:
        public = "FILE, with the public key that keygen printed"
    messages.print(
        f"verify it with: secure-cnn certificate verify {shlex.quote(str(path))} --trusted {public}"
    )
