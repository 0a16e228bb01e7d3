"""The record: what is written is read back equal, and what claims too much is refused."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.run_records import (
    PROTECTED,
    make_epoch,
    make_record,
    make_result,
    number,
)

from secure_cnn import pages
from secure_cnn.errors import RunError
from secure_cnn.record import Measurements, RunRecord, document, hardware, versions

share = st.floats(0, 1)
plain_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(0, 9) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@st.composite
def records(draw):
    names = tuple(draw(st.lists(st.text(), min_size=2, max_size=4)))
    epochs = [
        make_epoch(variant, n + 1, test_loss=draw(number), test_accuracy=draw(share))
        for variant in ("plain", PROTECTED)
        for n in range(draw(st.integers(0, 3)))
    ]
    return make_record(
        names=names,
        epochs=epochs,
        settings=draw(st.dictionaries(st.text(), plain_json, max_size=3)),
        claims=draw(st.dictionaries(st.text(), plain_json, max_size=3)),
        status=draw(st.sampled_from(["running", "complete", "interrupted"])),
        notes=draw(st.lists(st.text(), max_size=2)),
    )


@given(record=records())
@settings(deadline=None, derandomize=True, max_examples=40)
def test_a_record_survives_json(tmp_path_factory, record):
    """What is written is strict JSON and is read back equal, whatever the text and the numbers."""
    path = tmp_path_factory.mktemp("record") / "run.json"
    record.write(path)
    assert RunRecord.read(path) == record
    assert RunRecord.from_dict(record.to_dict()) == record
    json.loads(path.read_bytes(), parse_constant=pytest.fail)


def test_a_record_keeps_what_json_lacks(tmp_path):
    """A diverged loss and a class name that is no UTF-8 do not cost the record."""
    epoch = make_epoch("plain", 1, test_loss=math.nan, train_loss=-math.inf)
    record = make_record(names=("cat", os.fsdecode(b"d\xffg")), epochs=[epoch])
    record.write(tmp_path / "run.json")
    again = RunRecord.read(tmp_path / "run.json")
    assert math.isnan(again.epochs[0].test_loss)
    assert again.epochs[0].train_loss == -math.inf
    assert again.data.classes == record.data.classes
    pages.write_page(again, None, tmp_path / "report.html")


def test_the_file_has_thedocumented_shape(tmp_path):
    """The names in the file are those that other programs rely on."""
    make_record().write(tmp_path / "run.json")
    content = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert set(content) == {
        *("schema", "kind", "status", "created", "seconds", "settings", "versions", "hardware"),
        *("data", "model", "privacy", "threat", "epochs", "results", "cost", "claims"),
        *("checkpoints", "notes"),
    }
    assert (content["schema"], content["kind"]) == (1, "run")
    assert content["epochs"][-1]["train_loss"] is None
    assert set(content["cost"][0]) == {
        *("case", "variant", "metric", "median", "low", "high", "unit", "n")
    }


@pytest.mark.parametrize("schema", [0, 2, "1", True, None, 1.0])
def test_an_unknown_schema_is_refused(schema):
    """Only schema 1, the number, is read; a newer file is not half understood."""
    with pytest.raises(RunError, match="schema: expected 1"):
        RunRecord.from_dict(make_record().to_dict() | {"schema": schema})
    with pytest.raises(RunError, match="schema: expected 1"):
        Measurements.from_dict({"schema": schema, "rows": []})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(extra=1), "got 'extra'"),
        (lambda d: d.pop("threat"), "expected 'threat'"),
        (lambda d: d.update(kind="bench"), "kind: expected 'run'"),
        (lambda d: d.update(status="done"), "'running', 'complete', 'interrupted'"),
        (lambda d: d.update(created="yesterday"), "ISO 8601"),
        (lambda d: d["epochs"][1].update(step="9"), r"epochs\[1\].step: .*type int"),
        (lambda d: d["epochs"][0].update(epoch=True), r"epochs\[0\].epoch: .*type int"),
        (lambda d: d["data"].update(shape=[8, 8]), "data.shape: expected 3 values, got 2"),
        (lambda d: d["results"][0].update(accuracy=1.5), r"a share in \[0, 1\]"),
        (lambda d: d["results"][0]["confusion"].pop(), "3 rows of 3"),
        (lambda d: d["results"][0].update(robust_low=None), "all or none"),
        (lambda d: d["results"].append(d["results"][0]), "one for each variant"),
        (lambda d: d.update(checkpoints=["../secret"]), "inside the run's folder"),
        (lambda d: d.update(checkpoints=["/etc/passwd"]), "inside the run's folder"),
        (lambda d: d["cost"][0].update(low=9.0), "low <= median <= high"),
    ],
)
def test_a_wrong_record_is_refused_by_name(change, message):
    """The message names the entry that is wrong."""
    content = make_record().to_dict()
    change(content)
    with pytest.raises(RunError, match=message):
        RunRecord.from_dict(content)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"privacy": None}, "the conditions of epsilon"),
        ({"threat": None}, "the conditions of robust_accuracy"),
        ({"settings": {"out": Path("x")}}, "settings.out: expected plain JSON"),
        ({"settings": {1: "x"}}, "text keys"),
    ],
)
def test_a_claim_needs_its_conditions(fields, message):
    """No epsilon without a plan, no robust accuracy without a threat model, no objects."""
    with pytest.raises(RunError, match=message):
        make_record(**fields)


def test_epsilon_is_never_claimed_for_what_it_does_not_cover():
    """Not for a plain result, and not beside an exact training loss."""
    with pytest.raises(RunError, match="epsilon of plain"):
        make_record(results=[make_result("plain", 3, epsilon=1.0)])
    with pytest.raises(RunError, match="does not cover"):
        make_epoch(PROTECTED, 1, train_loss=0.5)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b"[" * 100_000, b'{"schema": 1, "schema": 1}', b"NaN"],
    ids=["empty", "cut", "no text", "list", "deep", "twice", "NaN"],
)
def test_a_damaged_file_is_one_error_that_names_it(tmp_path, content):
    """No traceback from inside the JSON reader."""
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"run\.json: "):
        RunRecord.read(path)


def test_a_huge_file_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    """The size limit holds for the file, not for what it turns into."""
    monkeypatch.setattr(document, "MAX_BYTES", 100)
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("parsed"))
    (tmp_path / "run.json").write_bytes(b" " * 101)
    with pytest.raises(RunError, match="expected at most 100 bytes"):
        RunRecord.read(tmp_path / "run.json")


def test_writing_is_atomic(tmp_path, monkeypatch):
    """Until all is on the disk the old record stands; a failure leaves it and nothing else."""
    path = tmp_path / "run.json"
    old = make_record(notes=["old"])
    old.write(path)
    seen = []

    def interrupted(descriptor):
        seen.append(RunRecord.read(path))
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_record(notes=["new"]).write(path)
    monkeypatch.undo()
    assert seen == [old]
    assert RunRecord.read(path) == old
    assert os.listdir(tmp_path) == ["run.json"]
    make_record(notes=["new"]).write(path)
    assert RunRecord.read(path).notes == ("new",)


@pytest.mark.parametrize("place", ["missing/run.json", "file/run.json"])
def test_a_place_that_cannot_be_written_to_is_one_error(tmp_path, place):
    """The message names the file and says that nothing was lost."""
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="nothing was overwritten"):
        make_record().write(tmp_path / place)


def test_measurements_survive_json(tmp_path):
    """A benchmark's document has the same shape for everyone."""
    rows = make_record().cost
    document = Measurements(
        created="2025-11-03", hardware=hardware(), versions=versions(), rows=rows
    )
    document.write(tmp_path / "bench.json")
    assert Measurements.read(tmp_path / "bench.json") == document
    content = json.loads((tmp_path / "bench.json").read_bytes())
    assert set(content) == {"schema", "created", "hardware", "versions", "rows"}


def test_provenance_names_what_numbers_depend_on():
    """Versions and hardware are collected, and no host or user name with them."""
    assert versions()["torch"].startswith(torch.__version__.split("+")[0])
    assert set(versions()) == {
        *("python", "torch", "opacus", "torchattacks", "cryptography", "safetensors"),
        "secure-cnn",
    }
    assert set(hardware()) == {"cpu", "cores", "threads", "memory", "device"}
