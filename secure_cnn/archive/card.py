"""What a sealed file claims, told to people and to tools: a model card, and a bill of materials.

Both are made of what `inspect` or `verify` gave, and of nothing else, so the same file gives the
same text. Every text of the file is written as JSON that neither Markdown nor a terminal obeys.
"""

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from secure_cnn.archive.errors import MissingExtra, StateError
from secure_cnn.archive.format.claims import JSON
from secure_cnn.archive.info import ArchiveInfo, inspect, verify
from secure_cnn.archive.keys.signatures import Verifier
from secure_cnn.archive.storage import Path, write_file

__all__ = ["bill_of_materials", "export_bill_of_materials", "export_card", "model_card"]

_UNVERIFIED = (
    "**UNVERIFIED.** Anyone may have written this. Check it with the verifier of whoever made the "
    "file before you rely on a line of it."
)
_VERIFIED = (
    "**Verified.** The signer named below vouches for every line but the recipients. Whether the "
    "numbers are true is the signer's word."
)
# What a number does not say, beside the claims that hold one.
_CAVEATS = {
    "privacy": (
        "ε holds for the training of this model alone, under the relation, accountant and δ given. "
        "It adds up with everything else that was released from the same data, tuning included."
    ),
    "robustness": (
        "The robust accuracy is what these attacks left within this threat model, an upper bound: "
        "a stronger attack may leave less, and other changes of the input were not tried."
    ),
}


def model_card(info: ArchiveInfo) -> str:
    """A model card in Markdown: what the file is, what it claims, and what the claims do not say.

    It says whether `info` is from `verify` or from `inspect`.

    Source: Mitchell et al., Model Cards for Model Reporting (2019), arXiv:1810.03993.

    Example:
        >>> import secure_cnn.archive as archive
        >>> me = archive.generate_identity()
        >>> archive.save("m", {}, recipients=[me.recipient], claims={"privacy": {"epsilon": 3.0}})
        >>> print(model_card(archive.inspect("m")))
        # Model card
        ...
        | `"epsilon"` | `3.0` |
        ...
    """
    scalars = {key: value for key, value in info.claims.items() if not isinstance(value, dict)}
    parts = [
        "# Model card",
        _VERIFIED if info.verified else _UNVERIFIED,
        _table(_facts(info)),
        *(["## Claims", _table(_flat(scalars))] if scalars else []),
    ]
    for key, value in sorted(info.claims.items()):
        if isinstance(value, dict):
            known = key in _CAVEATS
            parts += [f"## {key if known else _code(key)}", _table(_flat(value))]
            parts += [_CAVEATS[key]] if known else []
    recipients = [(slot.kind, f"`{slot}`") for slot in info.slots]
    parts += ["## Recipients", "Not covered by any signature.", _rows(recipients)]
    return "\n\n".join(parts) + "\n"


def bill_of_materials(info: ArchiveInfo) -> str:
    """An ML-BOM: CycloneDX 1.6 in JSON, with the model as its subject and the claims in its card.

    Needs the extra ``bom``. Whether `info` is from `verify` or from `inspect` stands in the
    property ``secure-cnn:verified``.

    Source: ECMA-424 (CycloneDX 1.6, 2024).

    Example:
        >>> import secure_cnn.archive as archive
        >>> archive.save("m", {}, recipients=[archive.generate_identity().recipient])
        >>> try:
        ...     bill = json.loads(bill_of_materials(archive.inspect("m")))
        ... except MissingExtra:
        ...     bill = None
    """
    try:
        from cyclonedx.model import Property  # type: ignore[import-not-found,unused-ignore]
        from cyclonedx.model.bom import Bom, BomMetaData  # type: ignore[import-not-found,unused-ignore]
        from cyclonedx.model.component import Component, ComponentType  # type: ignore[import-not-found,unused-ignore]
        from cyclonedx.output.json import JsonV1Dot6  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise MissingExtra("a bill of materials", "bom") from None
    properties = [Property(name=name, value=value) for name, value in _properties(info)]
    model = Component(
        name=info.name or "unnamed",
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref=info.core_hash,
        version=str(info.lineage.generation) if info.lineage else None,
        properties=properties,
    )
    document = Bom(
        # Random and clock would make two bills of one file differ.
        serial_number=uuid.uuid5(uuid.NAMESPACE_OID, info.core_hash),
        metadata=BomMetaData(component=model, timestamp=_time(info.created)),
    )
    bill = json.loads(JsonV1Dot6(document).output_as_string())
    # The library has no model cards yet; the standard does.
    bill["metadata"]["component"]["modelCard"] = _model_card(info.claims)
    return json.dumps(bill, indent=2, sort_keys=True) + "\n"


def export_card(
    path: Path, out: Path, *, trusted: Sequence[Verifier] | None = None, overwrite: bool = False
) -> None:
    """Writes the model card of a sealed file, whole or not at all; needs no decryption key.

    Args:
        trusted: Whose signatures count; None checks none, and the card says so.

    Example:
        >>> import pathlib, secure_cnn.archive as archive
        >>> archive.save("m", {}, recipients=[archive.generate_identity().recipient])
        >>> export_card("m", "m.md")
        >>> pathlib.Path("m.md").read_text()[:12]
        '# Model card'
    """
    write_file(out, model_card(_info(path, trusted)).encode(), overwrite=overwrite)


def export_bill_of_materials(
    path: Path, out: Path, *, trusted: Sequence[Verifier] | None = None, overwrite: bool = False
) -> None:
    """Writes the ML-BOM of a sealed file, whole or not at all; needs no decryption key.

    All arguments are as for `export_card`; the bill says too whether a signature was checked. Needs
    the extra ``bom``.

    Example:
        >>> export_bill_of_materials("nowhere", "bom.json")
        Traceback (most recent call last):
        secure_cnn.archive.errors.StorageError: nowhere: cannot read: ...
    """
    write_file(out, bill_of_materials(_info(path, trusted)).encode(), overwrite=overwrite)


def _info(path: Path, trusted: Sequence[Verifier] | None) -> ArchiveInfo:
    return inspect(path) if trusted is None else verify(path, trusted=trusted)


def _facts(info: ArchiveInfo) -> Iterator[tuple[str, JSON]]:
    yield "name", info.name
    yield "created", info.created
    if info.lineage is not None:
        yield "run", info.lineage.run
        yield "step", info.lineage.step
        yield "generation", info.lineage.generation
        yield "previous core", info.lineage.previous
    yield "core", info.core_hash
    yield "signer", repr(info.signer) if info.signer else None
    yield "bytes inside", info.plaintext_length


def _flat(claims: Mapping[str, JSON], path: str = "") -> Iterator[tuple[str, JSON]]:
    """The claims without nesting, by dotted path."""
    for key, value in sorted(claims.items()):
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _code(value: JSON) -> str:
    """A value as JSON in a code span that it cannot leave."""
    # Outside of its strings JSON has neither of the two, so the escapes are JSON as well.
    text = json.dumps(value).replace("`", "\\u0060").replace("|", "\\u007c")
    return f"`{text}`"


def _table(rows: Iterator[tuple[str, JSON]]) -> str:
    return _rows([(_code(name), _code(value)) for name, value in rows])


def _rows(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {left} | {right} |" for left, right in rows)])


def _properties(info: ArchiveInfo) -> Iterator[tuple[str, str]]:
    """Names and values for CycloneDX, where all values are texts."""
    yield "secure-cnn:verified", json.dumps(info.verified)
    yield "secure-cnn:file-id", info.file_id
    yield "secure-cnn:core-hash", info.core_hash
    if info.signer is not None:
        yield "secure-cnn:signer", info.signer.to_text()
    if info.lineage is not None:
        yield "secure-cnn:run", info.lineage.run
        yield "secure-cnn:step", str(info.lineage.step)
        yield "secure-cnn:previous-core-hash", info.lineage.previous or ""
    for name, value in _flat(info.claims):
        yield f"secure-cnn:claim:{name}", json.dumps(value)


def _model_card(claims: Mapping[str, JSON]) -> dict[str, Any]:
    """CycloneDX's model card, of the claims that it has a place for."""
    card: dict[str, Any] = {"quantitativeAnalysis": {"performanceMetrics": [*_metrics(claims)]}}
    data, architecture = claims.get("data"), claims.get("architecture")
    parameters: dict[str, Any] = {}
    if isinstance(architecture, dict) and isinstance(architecture.get("name"), str):
        parameters["modelArchitecture"] = architecture["name"]
    if isinstance(data, dict) and isinstance(data.get("name"), str):
        properties = [
            {"name": f"secure-cnn:{key}", "value": json.dumps(value)} for key, value in _flat(data)
        ]
        parameters["datasets"] = [
            {"type": "dataset", "name": data["name"], "contents": {"properties": properties}}
        ]
    limits = [text for key, text in sorted(_CAVEATS.items()) if key in claims]
    return {
        **card,
        **({"modelParameters": parameters} if parameters else {}),
        **({"considerations": {"technicalLimitations": limits}} if limits else {}),
    }


def _metrics(claims: Mapping[str, JSON]) -> Iterator[dict[str, Any]]:
    """The figures that are claimed, each with what it was measured under."""
    for name in ("accuracy", "macro_recall"):
        if name in claims:
            yield {"type": name, "value": json.dumps(claims[name])}
    robustness, privacy = claims.get("robustness"), claims.get("privacy")
    if isinstance(robustness, dict) and "robust_accuracy" in robustness:
        metric = _metric("robust_accuracy", robustness)
        interval = robustness.get("interval")
        if isinstance(interval, list) and len(interval) == 2:
            low, high = map(json.dumps, interval)
            metric["confidenceInterval"] = {"lowerBound": low, "upperBound": high}
        yield metric
    if isinstance(privacy, dict) and "epsilon" in privacy:
        yield _metric("epsilon", privacy)


def _metric(name: str, claims: Mapping[str, JSON]) -> dict[str, Any]:
    conditions = {key: value for key, value in claims.items() if key != name}
    return {
        "type": name,
        "value": json.dumps(claims[name]),
        "slice": json.dumps(conditions, sort_keys=True),
    }


def _time(created: str) -> datetime:
    try:
        return datetime.fromisoformat(created).astimezone(UTC)
    except (ValueError, OverflowError):
        raise StateError(
            f"created: expected a time in ISO 8601, got {created[:40]!r}; seal the file again"
        ) from None
