"""The page of a certificate of erasure: its guarantee first, then what was done, and what not."""

from collections.abc import Sequence
from pathlib import Path

from secure_cnn.archive import Erasure, Verified
from secure_cnn.archive.certificates import Artefact, Evidence
from secure_cnn.errors import RunError
from secure_cnn.pages.template import Fact, Table, fill
from secure_cnn.record import wording
from secure_cnn.record.document import write_text

__all__ = ["render_certificate", "write_certificate_page"]

_SHOWN_REQUESTS = 50
_STATES = {
    "destroyed": "good",
    "re-trained": "good",
    "changed by the method": "good",
    "not known": "bad",
}


def write_certificate_page(found: Verified, path: str | Path) -> None:
    """Writes the page of a verified certificate of erasure, whole or not at all."""
    write_text(Path(path), render_certificate(found))


def render_certificate(found: Verified) -> str:
    """The page of a certificate of erasure as text; it needs no network and runs no script.

    Raises:
        RunError: It is a certificate of another kind.
    """
    done = found.value
    if not isinstance(done, Erasure):
        raise RunError(
            f"expected a certificate of erasure, got one of {found.kind}, which has no page; it is "
            "printed whole"
        )
    values = {
        "it": done,
        "found": found,
        "promised": done.exact or done.epsilon is not None,
        "facts": _facts(done),
        "times": _times(done),
        "artefacts": [(each, _state(each)) for each in done.artefacts],
        "states": _states_of(done),
        "evidence": _evidence(done.evidence),
        "requests": done.requests[:_SHOWN_REQUESTS],
        "signatures": _signatures(found),
    }
    return fill("certificate.html.jinja", values)


def _facts(it: Erasure) -> list[Fact]:
    images = "one image" if it.images == 1 else f"{it.images} images"
    so_far = "" if it.cumulative.people == it.people else f"; {it.cumulative.people} so far"
    before, after = it.data_before.leaves, it.data_after.leaves
    when = wording.date(it.done)
    limit = "no deadline is told"
    if it.deadline:
        limit = f"{'after' if it.late else 'before'} the deadline, {wording.date(it.deadline)}"
    return [
        Fact(name="People", value=str(it.people), detail=f"left, with {images}{so_far}"),
        _guarantee(it),
        Fact(
            name="Proven absent",
            value=f"{len(it.absence)}",
            detail=f"of the data without them: {after} digests, before {before}",
        ),
        Fact(
            name="Done", value=when.partition(",")[0], detail=f"{when.partition(', ')[2]}; {limit}"
        ),
    ]


def _guarantee(it: Erasure) -> Fact:
    if it.exact:
        return Fact(name="Guarantee", value="exact", detail=f"by the method {it.method}")
    if it.epsilon is None or it.delta is None:
        return Fact(name="Guarantee", value="none", detail=f"by the method {it.method}")
    so_far = it.cumulative
    told = f"at δ = {wording.delta(it.delta)}, by the method {it.method}"
    if so_far.epsilon is not None and so_far.epsilon > it.epsilon:
        told += f"; ε ≤ {wording.epsilon(so_far.epsilon)} so far"
    return Fact(name="Guarantee", value=f"ε ≤ {wording.epsilon(it.epsilon)}", detail=told)


def _times(it: Erasure) -> list[tuple[str, str]]:
    told = {
        "request received": it.received,
        "identity confirmed": it.identity_confirmed,
        "deadline": it.deadline,
        "done": it.done,
    }
    rows = [(name, wording.date(time) if time else "not told") for name, time in told.items()]
    return [*rows, ("ground", it.ground or "not told")]


def _state(artefact: Artefact) -> str:
    """The class of an action: what is gone, and what nobody knows, is told from afar."""
    return _STATES.get(artefact.action, "")


def _states_of(it: Erasure) -> Table:
    rows = [
        ("run", it.run_before.run, it.run_after.run),
        ("folder", it.run_before.name, it.run_after.name),
        ("weights", it.run_before.digest, it.run_after.digest),
        ("data, root", it.data_before.root, it.data_after.root),
        ("data, digests", str(it.data_before.leaves), str(it.data_after.leaves)),
    ]
    return ("", "before", "after"), rows


def _evidence(rows: Sequence[Evidence]) -> Table:
    found = [
        (
            each.name,
            wording.figure(each.value),
            "–"
            if each.low is None
            else f"{wording.figure(each.low)} to {wording.figure(each.high)}",
            str(each.n),
        )
        for each in rows
    ]
    return ("measured", "value", "interval", "n"), found


def _signatures(found: Verified) -> list[tuple[str, str, str]]:
    """Role, key and what it counts for, of each."""
    return [
        ("did it", repr(found.made_by), "trusted by who made this page"),
        *(("checked it", repr(each), "trusted by who made this page") for each in found.checked_by),
        *(
            ("checked it", repr(each), "not trusted: it vouches for nothing")
            for each in found.others
        ),
    ]
