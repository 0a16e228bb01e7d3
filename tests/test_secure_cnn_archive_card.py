"""Model cards and bills of materials: all claims, each with its conditions, none of it obeyed."""

import json
import re

import pytest

from secure_cnn import archive
from secure_cnn.archive.card import (
    bill_of_materials,
    export_bill_of_materials,
    export_card,
    model_card,
)
from secure_cnn.archive.errors import MissingExtra

ME = archive.generate_identity(post_quantum=False)
SIGNER = archive.generate_signer()
CLAIMS = {
    "variant": "private-robust",
    "accuracy": 0.91,
    "macro_recall": 0.9,
    "architecture": {"name": "compact", "classes": 10},
    "data": {"name": "digits", "fingerprint": "ab12", "train": 1500},
    "privacy": {"epsilon": 3.0, "delta": 1e-5, "relation": "add-remove", "steps": 300},
    "robustness": {
        "norm": "linf",
        "eps": 0.1,
        "robust_accuracy": 0.5,
        "interval": [0.45, 0.55],
        "attacks": {"pgd": 0.5},
    },
}
NASTY = "`|\n# Owned\n\x1b[31m<script>alert(1)</script>\u202e\"'[x](javascript:1)"


def sealed(folder, claims=CLAIMS, **settings):
    """A file with claims."""
    settings = {"recipients": [ME.recipient], "signer": SIGNER, "name": "digits", **settings}
    archive.save(folder / "m", {}, claims=claims, overwrite=True, **settings)
    return folder / "m"


def verified(folder, claims=CLAIMS, **settings):
    """What it says, verified."""
    return archive.verify(sealed(folder, claims, **settings), trusted=[SIGNER.verifier])


def leaves(claims, path=""):
    """Every value of claims, by dotted path."""
    for key, value in claims.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def rows(card):
    """Names and values in the tables of a card, read back from their code spans."""
    found = re.findall(r"^\| `([^`|]*)` \| `([^`|]*)` \|$", card, flags=re.MULTILINE)
    return [(json.loads(name), json.loads(value)) for name, value in found]


def test_a_card_holds_every_claim_and_its_caveats(tmp_path):
    """And says by whom, of what, and what the numbers do not say."""
    info = verified(tmp_path)
    card = model_card(info)
    told = rows(card)
    for path, value in leaves(CLAIMS):
        name = path.partition(".")[2] or path
        assert (name, value) in told
    assert ("core", info.core_hash) in told
    assert ("signer", repr(SIGNER.verifier)) in told
    assert "**Verified.**" in card
    assert "UNVERIFIED" not in card
    assert "adds up" in card
    assert "a stronger attack may leave less" in card
    assert f"x25519 {ME.recipient.key_id.hex()}" in card


def test_a_card_that_nobody_vouches_for_says_so(tmp_path):
    """From `inspect` it is unverified, whatever the file says; caveats come with claims only."""
    card = model_card(archive.inspect(sealed(tmp_path, {"verified": True})))
    assert "**UNVERIFIED.**" in card
    assert "**Verified.**" not in card
    assert "adds up" not in card


def test_a_card_does_not_obey_the_file(tmp_path):
    """Names and values cannot leave their code span, start a line or colour a terminal."""
    claims = {NASTY: NASTY, "nested": {NASTY: [NASTY]}, f"{NASTY} ": {NASTY: 1}}
    card = model_card(verified(tmp_path, claims, name=NASTY))
    assert (NASTY, NASTY) in rows(card)
    assert ("name", NASTY) in rows(card)
    assert card.isascii()
    assert card.replace("\n", "").isprintable()
    for line in card.splitlines():
        assert not line.startswith("# Owned")
        outside = re.sub(r"`[^`]*`", "", line)
        assert "<" not in outside
        assert "[" not in outside


def test_a_card_is_the_same_each_time_and_the_place_in_a_sequence_is_told(tmp_path):
    """No clock, no chance."""
    lineage = archive.Lineage(run="digits", step=100, generation=4, previous="ab" * 32)
    info = verified(tmp_path, lineage=lineage)
    assert model_card(info) == model_card(info)
    assert {("run", "digits"), ("step", 100), ("generation", 4)} <= set(
        pair for pair in rows(model_card(info)) if not isinstance(pair[1], list)
    )


def test_cards_are_written_whole_and_checked_first(tmp_path):
    """A stranger's signature or a file in the way ends it."""
    path = sealed(tmp_path)
    export_card(path, tmp_path / "card.md", trusted=[SIGNER.verifier])
    assert "**Verified.**" in (tmp_path / "card.md").read_text()
    with pytest.raises(archive.StorageError, match="already there"):
        export_card(path, tmp_path / "card.md")
    export_card(path, tmp_path / "card.md", overwrite=True)
    assert "**UNVERIFIED.**" in (tmp_path / "card.md").read_text()
    for export in (export_card, export_bill_of_materials):
        with pytest.raises(archive.UntrustedSigner):
            export(path, tmp_path / "no", trusted=[archive.generate_signer().verifier])
    assert not (tmp_path / "no").exists()


def test_without_its_library_the_extra_is_named(tmp_path, monkeypatch):
    """Not an ImportError."""
    monkeypatch.setitem(__import__("sys").modules, "cyclonedx.model", None)
    with pytest.raises(MissingExtra, match=r"secure-cnn\[bom\]"):
        bill_of_materials(archive.inspect(sealed(tmp_path)))


@pytest.fixture
def validate():
    """The library's own check against the schema of CycloneDX 1.6."""
    pytest.importorskip("cyclonedx", reason="cyclonedx-python-lib is not installed")
    pytest.importorskip("jsonschema", reason="cyclonedx-python-lib without json-validation")
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    return JsonStrictValidator(SchemaVersion.V1_6).validate_str


@pytest.mark.parametrize(
    "claims",
    [
        CLAIMS,
        {},
        {NASTY: NASTY, "accuracy": NASTY, "data": {"name": NASTY}},
        {"data": [], "privacy": 3, "robustness": {"robust_accuracy": {}, "interval": [1]}},
        {"architecture": {"name": 3}, "robustness": {"robust_accuracy": 1, "interval": [{}, []]}},
    ],
)
def test_a_bill_is_valid_whatever_is_claimed(tmp_path, validate, claims):
    """Against the strict schema; a field too many is caught."""
    bill = bill_of_materials(verified(tmp_path, claims))
    assert validate(bill) is None
    wrong = json.loads(bill)
    wrong["metadata"]["component"]["modelCard"]["surprise"] = 1
    assert validate(json.dumps(wrong)) is not None


def test_a_bill_holds_every_claim_with_its_conditions(tmp_path, validate):
    """ε never without δ, robust accuracy never without its threat; the same bill each time."""
    info = verified(tmp_path)
    text = bill_of_materials(info)
    assert text == bill_of_materials(info)
    model = json.loads(text)["metadata"]["component"]
    told = {pair["name"]: pair["value"] for pair in model["properties"]}
    for path, value in leaves(CLAIMS):
        assert json.loads(told[f"secure-cnn:claim:{path}"]) == value
    assert told["secure-cnn:verified"] == "true"
    assert told["secure-cnn:core-hash"] == model["bom-ref"] == info.core_hash
    assert archive.Verifier.from_text(told["secure-cnn:signer"]) == SIGNER.verifier
    card = model["modelCard"]
    metrics = {m["type"]: m for m in card["quantitativeAnalysis"]["performanceMetrics"]}
    assert set(metrics) == {"accuracy", "macro_recall", "robust_accuracy", "epsilon"}
    assert json.loads(metrics["epsilon"]["slice"])["delta"] == 1e-5
    assert json.loads(metrics["robust_accuracy"]["slice"])["eps"] == 0.1
    interval = metrics["robust_accuracy"]["confidenceInterval"]
    assert interval == {"lowerBound": "0.45", "upperBound": "0.55"}
    assert card["modelParameters"]["modelArchitecture"] == "compact"
    assert card["modelParameters"]["datasets"][0]["name"] == "digits"
    assert len(card["considerations"]["technicalLimitations"]) == 2


def test_a_bill_of_a_file_without_name_or_time(tmp_path, validate):
    """No name is a name; no time is an error of ours."""
    info = verified(tmp_path, name="")
    assert json.loads(bill_of_materials(info))["metadata"]["component"]["name"] == "unnamed"
    import dataclasses

    with pytest.raises(archive.StateError, match="created"):
        bill_of_materials(dataclasses.replace(info, created="yesterday"))
