"""What sealing costs: that the right things are timed, and that rivals give back what they took."""

import json
import re
from dataclasses import replace

import pytest
import torch
from typer import Typer
from typer.testing import CliRunner

from secure_cnn.bench import rivals as rivals_module
from secure_cnn.bench.archive import (
    Turn,
    archive_workload,
    in_turn,
    measure_archive,
    measure_head,
    measure_size,
    measure_stall,
)
from secure_cnn.bench.rivals import ARCHIVE_RIVALS, ArchiveRival, archive_rivals
from secure_cnn.cli import bench
from secure_cnn.errors import RunError
from secure_cnn.record import versions

MADE_BY = {"torch.save": "torch", "fernet": "cryptography"}


class Clock:
    """Seconds that only work moves."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def work(self, seconds):
        self.now += seconds


def test_only_the_call_is_timed():
    """Neither what comes before it nor what comes after; the round for warmth is not counted."""
    clock = Clock()
    turns = {
        name: Turn(
            before=lambda: clock.work(100),
            call=lambda seconds=seconds: clock.work(seconds),
            after=lambda: clock.work(1000),
        )
        for name, seconds in (("a", 1), ("b", 2))
    }
    assert in_turn(turns, rounds=3, clock=clock) == {"a": [1] * 3, "b": [2] * 3}


@pytest.mark.parametrize("name", ARCHIVE_RIVALS)
def test_a_rival_gives_back_what_it_took(name, tmp_path):
    """Also when it saves over a file that is there; one that is not here says why."""
    here, skipped = archive_rivals([name])
    if name in skipped:
        pytest.skip(f"{name}: {skipped[name]}")
    tensors = archive_workload(1, tmp_path).tensors
    for factor in (1, 2):
        scaled = {key: factor * value for key, value in tensors.items()}
        here[name].save(tmp_path / "file", scaled)
        if here[name].load is not None:
            loaded = here[name].load(tmp_path / "file")
            assert loaded.keys() == scaled.keys()
            assert all(torch.equal(loaded[key], scaled[key]) for key in scaled)


def test_an_encrypting_rival_is_told_from_a_plain_one(tmp_path):
    """Control: the plain file holds the tensors' bytes, the encrypted one does not."""
    here, _ = archive_rivals(["safetensors", "fernet"])
    tensors = archive_workload(1, tmp_path).tensors
    needle = next(iter(tensors.values())).numpy().tobytes()[:64]
    found = {}
    for name, rival in here.items():
        rival.save(tmp_path / name, tensors)
        found[name] = needle in (tmp_path / name).read_bytes()
    assert found == {"safetensors": True, "fernet": False}


def test_an_unknown_rival_is_refused():
    with pytest.raises(RunError, match="zip"):
        archive_rivals(["zip"])


def test_ratios_are_ours_to_the_rivals(tmp_path):
    """With a rival of known speed: one that takes forever by the clock."""
    clock = Clock()
    slow = ArchiveRival(
        save=lambda path, tensors: (path.write_bytes(b""), clock.work(10)),
        load=lambda path: clock.work(100) or {"layer0.weight": 5 * torch.ones(2621)},
    )

    def ticking():
        clock.work(0.5)
        return clock.now

    rows = measure_archive(
        archive_workload(1, tmp_path), {"slow.save": slow}, rounds=2, clock=ticking
    )
    found = {(row.variant, row.metric): row.median for row in rows}
    assert found["sealed", "save"] == 0.5
    assert found["slow.save", "save"] == 10.5
    assert found["sealed", "save_vs_slow"] == pytest.approx(0.5 / 10.5)
    assert found["sealed+signed", "load_vs_slow"] == pytest.approx(0.5 / 100.5)
    assert found["sealed", "fresh_load_vs_slow"] == pytest.approx(0.5 / 100.5)
    assert found["sealed", "durable_save_vs_slow"] == pytest.approx(0.5 / 10.5)
    assert found["sealed", "one_tensor_vs_load"] == 1


def test_a_measured_store_and_head_are_left_whole(tmp_path):
    """As many saves and changes as rounds and one for warmth, and no recipient is left over."""
    load = archive_workload(1, tmp_path)
    assert {row.n for row in measure_stall(load, rounds=2)} == {2}
    assert len(list((tmp_path / "store").glob("*.sealed"))) == 1
    assert {row.metric for row in measure_head(load, rounds=2)} >= {"inspect", "add_recipient"}


def test_size_and_memory_are_small(tmp_path):
    """The overhead is a hundredth of a small file at most, as is the memory of a load."""
    found = {
        (row.variant, row.metric): row.median for row in measure_size(archive_workload(8, tmp_path))
    }
    assert 0 < found["sealed", "size_overhead"] < found["sealed+signed", "size_overhead"] < 0.01
    assert found.get(("sealed", "load_memory"), 0) < 16


def test_the_command_prints_and_writes(tmp_path):
    """A table for people, the shape of every benchmark for machines, and who was skipped."""
    app = Typer()
    app.command()(bench.archive_command)
    out = tmp_path / "bench.json"
    options = ["--size", "1", "--rounds", "1", "--folder", str(tmp_path), "--json", str(out)]
    done = CliRunner().invoke(app, [*options, "--rival", "safetensors"])
    assert done.exit_code == 0, done.output
    rows = json.loads(out.read_text())["rows"]
    metrics = {row["metric"] for row in rows if row["variant"].startswith("sealed")}
    assert metrics >= {
        *("save_vs_safetensors", "load_vs_safetensors", "stall_vs_copy", "payload_vs_aesgcm"),
        *("one_tensor_vs_load", "inspect", "add_recipient", "remove_recipient", "size_overhead"),
    }
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


@pytest.mark.parametrize("name", ARCHIVE_RIVALS)
def test_the_version_of_a_rival_is_known(name):
    """Of what does its work, under its own name where it has one."""
    here, skipped = archive_rivals([name])
    if name in skipped:
        pytest.skip(f"{name}: {skipped[name]}")
    known = versions() | here[name].versions
    assert re.match(r"v?\d+\.\d+", known[MADE_BY.get(name, name)])


def test_the_command_writes_the_versions_of_those_it_measured(tmp_path, monkeypatch):
    """Beside our own; of one that is not here there is nothing to tell."""

    def missing():
        raise ImportError("no module named gone")

    plain = archive_rivals(["safetensors"])[0]["safetensors"]
    made = {
        "age": lambda: replace(plain, versions={"age": "9.8"}),
        "tensorizer": lambda: replace(plain, versions={"tensorizer": "7.6"}),
        "cryptotensors": missing,
    }
    monkeypatch.setattr(rivals_module, "_MAKERS", made)
    for measure in ("measure_size", "measure_stall", "measure_head", "measure_cipher"):
        monkeypatch.setattr(bench.archives, measure, lambda *_, **__: [])
    app = Typer()
    app.command()(bench.archive_command)
    out = tmp_path / "bench.json"
    words = ["--size", "1", "--rounds", "1", "--folder", str(tmp_path), "--json", str(out)]
    done = CliRunner().invoke(app, [*words, *(f"--rival={name}" for name in made)])
    assert done.exit_code == 0, done.output
    told = json.loads(out.read_text())["versions"]
    assert told == versions() | {"age": "9.8", "tensorizer": "7.6"}
