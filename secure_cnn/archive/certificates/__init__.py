"""One family of signed records of what was done, and one verifier for all of them.

A destroyed file and an erased person are kinds of statement; `statement` is the envelope in which
each is signed by who did it, and by who checked it. To verify needs no network and no data.
"""

from secure_cnn.archive.certificates.artefact import (
    ARTEFACT_ACTIONS,
    ARTEFACT_KINDS,
    Artefact,
    whole_inventory,
)
from secure_cnn.archive.certificates.destruction import Certificate
from secure_cnn.archive.certificates.erasure import NO_GUARANTEE, NOT_KNOWN, Erasure
from secure_cnn.archive.certificates.figures import Cumulative, Evidence, RunState
from secure_cnn.archive.certificates.merkle import (
    Absence,
    DataRoot,
    MerkleTree,
    Neighbour,
    keyed_digest,
    verify_absence,
)
from secure_cnn.archive.certificates.verifying import (
    Verified,
    check_certificate,
    read_certificate,
    verify_certificate,
    write_certificate,
)

__all__ = [
    "ARTEFACT_ACTIONS",
    "ARTEFACT_KINDS",
    "NOT_KNOWN",
    "NO_GUARANTEE",
    "Absence",
    "Artefact",
    "Certificate",
    "Cumulative",
    "DataRoot",
    "Erasure",
    "Evidence",
    "MerkleTree",
    "Neighbour",
    "RunState",
    "Verified",
    "check_certificate",
    "keyed_digest",
    "read_certificate",
    "verify_absence",
    "verify_certificate",
    "whole_inventory",
    "write_certificate",
]
