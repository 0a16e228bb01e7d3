"""Sealed checkpoints: encrypted to recipients, signed by their maker, carrying their own claims.

A sealed file is an envelope of ours around FLOE around one valid safetensors file; `docs/format.md`
is normative. Loading runs no code: there is no pickle here.
"""

from secure_cnn.archive.adapters.pretrained import from_pretrained, save_pretrained
from secure_cnn.archive.age import export_age
from secure_cnn.archive.card import (
    bill_of_materials,
    export_bill_of_materials,
    export_card,
    model_card,
)
from secure_cnn.archive.certificates.destruction import Certificate
from secure_cnn.archive.certificates.erasure import Erasure
from secure_cnn.archive.certificates.verifying import (
    Verified,
    check_certificate,
    read_certificate,
    verify_certificate,
    write_certificate,
)
from secure_cnn.archive.errors import (
    ArchiveError,
    CertificateError,
    ClaimMismatch,
    InvalidKey,
    KeyFileError,
    KeyServiceError,
    LimitExceeded,
    MissingExtra,
    NotSealed,
    RolledBack,
    SecretKeptError,
    StateError,
    StorageError,
    Tampered,
    Truncated,
    UnsupportedVersion,
    UntrustedSigner,
    WrongKey,
)
from secure_cnn.archive.format.claims import JSON
from secure_cnn.archive.format.core import Lineage
from secure_cnn.archive.format.payload import Progress
from secure_cnn.archive.format.slots import AnyIdentity, AnyRecipient
from secure_cnn.archive.format.state import State
from secure_cnn.archive.info import ArchiveInfo, SlotInfo, inspect, verify
from secure_cnn.archive.keys.identity import Identity, Recipient, generate_identity, read_identity
from secure_cnn.archive.keys.kek import (
    KeyEncryptionKey,
    KeyService,
    ServiceKey,
    generate_kek,
    kek_from_command,
    kek_from_environment,
    kek_from_keyring,
    read_kek,
)
from secure_cnn.archive.keys.keyfile import write_key
from secure_cnn.archive.keys.passphrase import INSECURE_TEST_COST, Argon2Cost, Passphrase
from secure_cnn.archive.keys.signatures import Signer, Verifier, generate_signer, read_signer
from secure_cnn.archive.loading import LazyArchive, load, load_into, open_lazy
from secure_cnn.archive.plain import decrypt, import_, load_plain, save_plain
from secure_cnn.archive.recipients import change_recipients, rotate, shred
from secure_cnn.archive.sealing import check, save
from secure_cnn.archive.store.log import Checkpoint
from secure_cnn.archive.store.store import CheckpointStore

__all__ = [
    "INSECURE_TEST_COST",
    "JSON",
    "AnyIdentity",
    "AnyRecipient",
    "ArchiveError",
    "ArchiveInfo",
    "Argon2Cost",
    "Certificate",
    "CertificateError",
    "Checkpoint",
    "CheckpointStore",
    "ClaimMismatch",
    "Erasure",
    "Identity",
    "InvalidKey",
    "KeyEncryptionKey",
    "KeyFileError",
    "KeyService",
    "KeyServiceError",
    "LazyArchive",
    "LimitExceeded",
    "Lineage",
    "MissingExtra",
    "NotSealed",
    "Passphrase",
    "Progress",
    "Recipient",
    "RolledBack",
    "SecretKeptError",
    "ServiceKey",
    "Signer",
    "SlotInfo",
    "State",
    "StateError",
    "StorageError",
    "Tampered",
    "Truncated",
    "UnsupportedVersion",
    "UntrustedSigner",
    "Verified",
    "Verifier",
    "WrongKey",
    "bill_of_materials",
    "change_recipients",
    "check",
    "check_certificate",
    "decrypt",
    "export_age",
    "export_bill_of_materials",
    "export_card",
    "from_pretrained",
    "generate_identity",
    "generate_kek",
    "generate_signer",
    "import_",
    "inspect",
    "kek_from_command",
    "kek_from_environment",
    "kek_from_keyring",
    "load",
    "load_into",
    "load_plain",
    "model_card",
    "open_lazy",
    "read_certificate",
    "read_identity",
    "read_kek",
    "read_signer",
    "rotate",
    "save",
    "save_plain",
    "save_pretrained",
    "shred",
    "verify",
    "verify_certificate",
    "write_certificate",
    "write_key",
]
