"""Sealed checkpoints: encrypted to recipients, signed by their maker, carrying their own claims.

A sealed file is an envelope of ours around FLOE around one valid safetensors file; `docs/format.md`
is normative. Format version 0 may change. Loading runs no code: there is no pickle here. Sequences
of checkpoints, key services and exports are not here yet.
"""

from secure_cnn.archive.claims import JSON
from secure_cnn.archive.errors import (
    ArchiveError,
    ClaimMismatch,
    InvalidKey,
    KeyFileError,
    LimitExceeded,
    NotSealed,
    StateError,
    StorageError,
    Tampered,
    Truncated,
    UnsupportedVersion,
    UntrustedSigner,
    WrongKey,
)
from secure_cnn.archive.info import ArchiveInfo
from secure_cnn.archive.keys import (
    Identity,
    Recipient,
    SlotReader,
    SlotWriter,
    generate_identity,
    read_identity,
    write_identity,
)
from secure_cnn.archive.passphrase import INSECURE_TEST_COST, Argon2Cost, Passphrase
from secure_cnn.archive.plain import load_plain, save_plain
from secure_cnn.archive.sealed import decrypt, inspect, load, save, verify
from secure_cnn.archive.signatures import (
    Signer,
    Verifier,
    generate_signer,
    read_signer,
    write_signer,
)
from secure_cnn.archive.state import State

__all__ = [
    "INSECURE_TEST_COST",
    "JSON",
    "ArchiveError",
    "ArchiveInfo",
    "Argon2Cost",
    "ClaimMismatch",
    "Identity",
    "InvalidKey",
    "KeyFileError",
    "LimitExceeded",
    "NotSealed",
    "Passphrase",
    "Recipient",
    "Signer",
    "SlotReader",
    "SlotWriter",
    "State",
    "StateError",
    "StorageError",
    "Tampered",
    "Truncated",
    "UnsupportedVersion",
    "UntrustedSigner",
    "Verifier",
    "WrongKey",
    "decrypt",
    "generate_identity",
    "generate_signer",
    "inspect",
    "load",
    "load_plain",
    "read_identity",
    "read_signer",
    "save",
    "save_plain",
    "verify",
    "write_identity",
    "write_signer",
]
