"""Certificates of erasure for tests: one that holds, to be changed in one place."""

from dataclasses import replace

from secure_cnn.archive import Verified, generate_signer
from secure_cnn.archive.certificates import (
    Artefact,
    Cumulative,
    Erasure,
    Evidence,
    MerkleTree,
    RunState,
    keyed_digest,
    whole_inventory,
)

KEY = bytes(range(32))
PEOPLE = [f"person {number}".encode() for number in range(40)]
LEFT = PEOPLE[3:5]


def digests(people):
    """Those of people's ids under the controller's key."""
    return [keyed_digest(KEY, "person", each) for each in people]


def make_erasure(**changed):
    """Two of forty people left by a re-training."""
    before = MerkleTree(digests(PEOPLE))
    after = MerkleTree(digests([each for each in PEOPLE if each not in LEFT]))
    requests = digests(LEFT)
    known = [
        Artefact(kind="raw images", name="photos", action="destroyed", detail="by their owner"),
        Artefact(kind="checkpoints", name="model.sealed", action="re-trained", detail="shard 1"),
        Artefact(
            kind="backups", name="", action="retained until 2027-01-31", detail="tape, by law"
        ),
    ]
    fields = {
        "certificate_id": "0123456789abcdef" * 2,
        "received": "2026-11-01T09:00:00Z",
        "identity_confirmed": "2026-11-02T09:00:00Z",
        "deadline": "2026-12-01T09:00:00Z",
        "done": "2026-11-20T10:30:00Z",
        "ground": "Art. 17(1)(b), consent withdrawn",
        "requests": tuple(each.hex() for each in requests),
        "people": 2,
        "images": 6,
        "run_before": RunState(run="run-1", digest="11" * 32, name="faces"),
        "run_after": RunState(run="run-2", digest="22" * 32, name="faces-2"),
        "data_before": before.data,
        "data_after": after.data,
        "absence": tuple(after.absence(each) for each in requests),
        "artefacts": whole_inventory(known),
        "method": "sharded training",
        "guarantee": "The model is, bit for bit, that of a training without these 2 people.",
        "exact": True,
        "assumptions": ("Exact for requests that do not depend on the model's answers.",),
        "cumulative": Cumulative(people=2, epsilon=None, delta=None),
        "weight_change": 1.25,
        "evidence": (
            Evidence(name="test accuracy, gap to re-training", value=0.1, low=-0.4, high=0.6, n=5),
            Evidence(name="seconds", value=12.0, low=None, high=None, n=1),
        ),
        "versions": {"secure-cnn": "0.1.0", "torch": "2.9.0"},
        "hardware": {"cpu": "made up", "cores": 2},
    }
    return Erasure(**{**fields, **changed})


def bounded(epsilon, delta=1e-5, **changed):
    """What changes where the erasure is bounded by epsilon."""
    return make_erasure(
        exact=False,
        epsilon=epsilon,
        delta=delta,
        method="noisy fine-tuning",
        guarantee=f"Within ({epsilon:.3g}, {delta:g}) of a training without these 2 people.",
        cumulative=Cumulative(people=2, epsilon=epsilon, delta=delta),
        **changed,
    )


def following(before, digest):
    """The next erasure of the same model: one more person left."""
    gone = PEOPLE[7:8]
    tree = MerkleTree(digests([each for each in PEOPLE if each not in [*LEFT, *gone]]))
    request = digests(gone)[0]
    return replace(
        before,
        certificate_id="f" * 32,
        done="2026-11-25T10:30:00Z",
        requests=(request.hex(),),
        people=1,
        images=3,
        run_before=before.run_after,
        run_after=RunState(run="run-3", digest="33" * 32, name="faces-3"),
        data_before=before.data_after,
        data_after=tree.data,
        absence=(tree.absence(request),),
        cumulative=Cumulative(people=3, epsilon=None, delta=None),
        previous=digest,
    )


def verified(erasure=None):
    """It, made by one, checked by one whom the reader trusts and by one whom they do not."""
    maker, checker, other = (generate_signer().verifier for _ in range(3))
    return Verified(
        value=erasure or make_erasure(),
        made_by=maker,
        checked_by=(checker,),
        others=(other,),
        digest="ab" * 32,
    )
