"""The identity of a run, and how it is resumed: only from a state of its own.

A run's number and its data's fingerprint are bound into every state of its training. A digest of
the data is exact, so it tells two data sets apart that differ in one example, which no epsilon
covers. That of a private run is therefore keyed with a secret of the run: nobody without the key
can try data sets out. Who may read the key is decided elsewhere.

The record is written before anything of a step can be seen, and the state after it, so the record
knows at least as much as the state. It is not signed: of what it says only the number of released
steps has a consequence, and that can only make epsilon larger than the state alone would. Who puts
an older state back and lowers that number to match is not noticed (SECURITY.md).
"""

import hmac
import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import privacy
from secure_cnn import archive
from secure_cnn.checkpoint import Sealing, Unlocking, read_state
from secure_cnn.data import ImageData
from secure_cnn.errors import RunError
from secure_cnn.recipe import defaults
from secure_cnn.recipe.folder import RunFolder
from secure_cnn.recipe.settings import Recipe
from secure_cnn.record import EpochRecord, ModelRecord, RunRecord

__all__ = ["KEYED", "RunIdentity", "Start", "keyed_fingerprint", "released_by", "resume"]

KEYED = "hmac-sha256:"
"""The prefix of a fingerprint that only holders of its key can compute."""
_UNCOUNTED = (
    "{uncounted} noised steps were released after the state from which the run was resumed. They "
    "count as spent, so as many fewer were taken afterwards."
)


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """A run's number, drawn when it begins, and the key of its data's fingerprint.

    Both are hexadecimal, of 32 and 64 digits. The key is secret; it is empty where the fingerprint
    is no secret.
    """

    id: str
    key: str = field(repr=False, default="")

    def __post_init__(self) -> None:
        if not _is_hex(self.id, 32) or not (self.key == "" or _is_hex(self.key, 64)):
            raise RunError(
                "checkpoint: expected the number of its run, got none: an earlier version wrote "
                "it; finish the run with that version, or start it anew with --force"
            )

    @classmethod
    def draw(cls, *, private: bool) -> "RunIdentity":
        """Draws the number of a new run, and a key if it is private."""
        return cls(id=secrets.token_hex(16), key=secrets.token_hex(32) if private else "")

    def fingerprint(self, data: ImageData) -> str:
        """The data's digest as everybody may see it."""
        return keyed_fingerprint(data.fingerprint, self.key) if self.key else data.fingerprint

    def heap_fingerprints(self, data: ImageData) -> dict[str, str]:
        """The same, by name, of its images as a heap: all of them, and those of the training."""
        found = {
            "pool_fingerprint": data.pool_fingerprint,
            "train_fingerprint": data.train_fingerprint,
        }
        keyed = {
            name: keyed_fingerprint(each, self.key) for name, each in found.items() if self.key
        }
        return keyed or found

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the secret key among them."""
        return {"id": self.id, "key": self.key}

    @classmethod
    def from_dict(cls, values: object) -> "RunIdentity":
        """Reads back what `to_dict` gave."""
        found: dict[str, Any] = values if isinstance(values, dict) else {}
        return cls(id=found.get("id", ""), key=found.get("key", "none"))


def keyed_fingerprint(fingerprint: str, key: str) -> str:
    """A digest of data under a key, as the claims of a private model have it.

    The key is among the private claims of the model's sealed file.
    """
    if not _is_hex(key, 64):
        raise RunError("data_fingerprint_key: expected 64 hexadecimal digits")
    return KEYED + hmac.digest(bytes.fromhex(key), fingerprint.encode(), "sha256").hex()


def _is_hex(value: object, digits: int) -> bool:
    return isinstance(value, str) and re.fullmatch(f"[0-9a-f]{{{digits}}}", value) is not None


@dataclass(frozen=True, kw_only=True)
class Start:
    """The point from which a run goes on: its beginning, or the training under way.

    `uncounted` are noised steps that were released after the state was taken.
    """

    record: RunRecord
    identity: RunIdentity
    state: Mapping[str, Any] | None = None
    uncounted: int = 0


def resume(
    recipe: Recipe,
    folder: RunFolder,
    fresh: RunRecord,
    data: ImageData,
    *,
    sealing: Sealing | None,
    unlocking: Unlocking | None,
) -> Start:
    """Reads the run in a folder, once it is sure that it is this recipe's and may go on.

    Refused are a complete run, other settings or data, checkpoints that are sealed or signed
    otherwise, and a state of another run or from before what was released. `fresh` is the record of
    a run of this recipe that has not begun; by default the signer's own signature counts.
    """
    record = folder.recorded()
    if record.status == "complete":
        raise RunError(f"{folder.root}: the run is complete; there is nothing to resume")
    defaults.check_same(record.settings, str(folder.root))
    _check_asked(recipe, folder, record, fresh)
    changed = f"{folder.root}: the data changed since the run began: {recipe.data}"
    # A keyed fingerprint is compared further below: its key is in the state.
    told = fresh.data.fingerprint if recipe.epsilon is None else record.data.fingerprint
    if record.data != replace(fresh.data, fingerprint=told):
        raise RunError(changed)
    _check_sealing(folder, record, sealing, unlocking)
    state = _state_of(recipe, folder, sealing, unlocking)
    identity = RunIdentity.from_dict(state.get("run"))
    if identity.id != record.run_id or (identity.key != "") != (recipe.epsilon is not None):
        raise RunError(
            f"{folder.training}: is the state of another run; put this run's own state back, or "
            "start anew with --force"
        )
    if not identity.fingerprint(data) == record.data.fingerprint == state.get("fingerprint"):
        raise RunError(changed)
    uncounted = _uncounted(
        recipe, folder, record, state, fresh.privacy.steps if fresh.privacy else 0
    )
    notes = (_UNCOUNTED.format(uncounted=uncounted),) if uncounted else ()
    going_on = replace(
        fresh,
        created=record.created,
        seconds=record.seconds,
        run_id=record.run_id,
        data=record.data,
        released=record.released,
        chosen=record.chosen,
        epochs=_epochs(record, state),
        results=record.results,
        notes=tuple(dict.fromkeys((*record.notes, *notes))),
    )
    return Start(record=going_on, identity=identity, state=state, uncounted=uncounted)


def released_by(state: Mapping[str, Any]) -> int:
    """How many noised steps a state of a training knows of."""
    private = state.get("private")
    if not isinstance(private, Mapping):
        return 0
    return privacy.Ledger.from_list(private.get("ledger")).steps


def _check_asked(recipe: Recipe, folder: RunFolder, record: RunRecord, fresh: RunRecord) -> None:
    """Settings, weights to start from and the network are those that the run began with."""
    other = recipe.changed_from(record.settings)
    if other:
        raise RunError(
            f"{folder.root}: the run has other settings: {', '.join(other)}; resume with its own"
        )
    if record.model.weights != fresh.model.weights:
        raise RunError(
            f"{folder.root}: the weights changed since the run began: {recipe.weights}; put the "
            "file back that it started from"
        )
    _check_network(folder, record.model, fresh.model)


def _check_network(folder: RunFolder, began: ModelRecord, now: ModelRecord) -> None:
    """A network of one's own is written as it was; a record of an earlier version does not say."""
    what = {"source": "the file that makes it", "structure": "names or shapes of its tensors"}
    other = [
        told for name, told in what.items() if getattr(began, name) not in ("", getattr(now, name))
    ]
    if other:
        raise RunError(
            f"{folder.root}: the network {now.name} changed since the run began: "
            f"{' and '.join(other)}; put the code back as it was, or start anew in another folder"
        )


def _check_sealing(
    folder: RunFolder, record: RunRecord, sealing: Sealing | None, unlocking: Unlocking | None
) -> None:
    """A run goes on as it began: sealed or plain, signed or not."""
    sealed = folder.sealed
    if replace(folder, sealed=not sealed).training.exists():
        raise RunError(
            f"{folder.root}: the run's checkpoints are {'plain' if sealed else 'sealed'}, "
            "and it goes on as it began; "
            + ("name no recipient" if sealed else "name its recipients and signer again")
        )
    if not folder.training.exists():
        raise RunError(
            f"{folder.training}: the state of the training is missing, and only it says what was "
            "done; put it back, or start the run anew with --force"
        )
    if not sealed:
        return
    if unlocking is None:
        raise RunError(
            f"{folder.training}: is sealed; give the identity or the passphrase that opens it"
        )
    signed = record.signer or archive.inspect(folder.training).signer is not None
    if signed and (sealing is None or sealing.signer is None):
        raise RunError(
            f"{folder.root}: the run is signed, and it goes on as it began; name its signer again"
        )


def _state_of(
    recipe: Recipe, folder: RunFolder, sealing: Sealing | None, unlocking: Unlocking | None
) -> dict[str, Any]:
    """The state of the training under way; of a signed run only one whose signer counts."""
    path = folder.training
    if folder.sealed and unlocking is not None:
        signer = None if sealing is None else sealing.signer
        if unlocking.trusted is None and signer is not None:
            # Anybody can seal to a public key: the signature says who took the state.
            unlocking = replace(unlocking, trusted=(signer.verifier,))
        try:
            state = read_state(path, unlocking=unlocking)
        except archive.UntrustedSigner as error:
            raise archive.UntrustedSigner(
                f"{path}: a signed run goes on from states that its own signer signed, and this is "
                "none; put the run's own state back, or name whose states count with --trusted"
            ) from error
    else:
        state = read_state(path, unlocking=None)
    names = [variant.name for variant in recipe.variants]
    step = state.get("step")
    if type(step) is not int or step < 0 or state.get("variant") not in names:
        raise RunError(
            f"{path}: expected a training of {' or '.join(names)} under way, got another file; "
            "start the run anew with --force"
        )
    # The record's settings are signed by nobody; the state's are bound to its weights.
    if isinstance(state.get("settings"), Mapping):
        recipe.check_unchanged(state["settings"])
    return state


def _uncounted(
    recipe: Recipe, folder: RunFolder, record: RunRecord, state: Mapping[str, Any], planned: int
) -> int:
    """The noised steps that the record knows of and the state does not, if that can have been."""
    name = recipe.variant.name
    known = max(record.released, *(e.step for e in record.epochs if e.variant == name), 0)
    counted = released_by(state)
    if state["variant"] == name and planned and counted != state["step"] + _skipped(state):
        raise RunError(
            f"{folder.training}: its ledger knows of {counted} noised steps, but it is the state "
            f"of step {state['step']}; this was not written by a run"
        )
    if not planned:
        return 0
    where = f"{folder.root}: the record knows of {known} released steps, the state of {counted}"
    if known < counted:
        raise RunError(
            f"{where}; the record is written first, so an older one was put in its place: put the "
            "newest one back"
        )
    distance = math.ceil(planned / recipe.epochs)
    if known - counted > distance:
        raise RunError(
            f"{where}, and a checkpoint is taken every {distance}: an older state was put in its "
            "place, and epsilon would not cover what was released since; put the newest one back. "
            "Whoever starts anew spends its epsilon on top"
        )
    return known - counted


def _skipped(state: Mapping[str, Any]) -> int:
    """Steps of the schedule that were not taken, since as many were released by an earlier try."""
    skipped = state.get("skipped")
    return skipped if type(skipped) is int and skipped >= 0 else -1


def _epochs(record: RunRecord, state: Mapping[str, Any]) -> tuple[EpochRecord, ...]:
    """The epochs of finished variants, and of the one under way those that the state has."""
    finished = {result.variant for result in record.results}
    return tuple(
        epoch
        for epoch in record.epochs
        if (epoch.variant == state["variant"] and epoch.step <= state["step"])
        or (epoch.variant in finished and epoch.variant != state["variant"])
    )
