"""A sequence of checkpoints: what it gives back, what it refuses, and who may write it."""

import json
import math
import os
import shutil
import sys
import threading
from datetime import UTC, datetime, timedelta
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.processes import printed_by

from secure_cnn import archive
from secure_cnn.archive.errors import (
    ArchiveError,
    InvalidKey,
    RolledBack,
    StateError,
    StorageError,
    Tampered,
    UntrustedSigner,
    WrongKey,
)
from secure_cnn.archive.store import store as store_module
from secure_cnn.archive.store.log import Checkpoint, Log, Retention
from secure_cnn.archive.store.store import CheckpointStore

ME = archive.generate_identity(post_quantum=False)
SIGNER = archive.generate_signer()
TRUSTED = [SIGNER.verifier]


def writer(folder, **settings):
    """A store that can do everything."""
    settings = {"recipients": [ME.recipient], "signer": SIGNER, "identity": ME, **settings}
    return CheckpointStore(folder, **settings)


def reader(folder, **settings):
    """A store that only reads."""
    return CheckpointStore(folder, identity=ME, trusted=TRUSTED, **settings)


def state(number):
    """A state that differs for each number."""
    return {"weight": torch.full((3,), float(number)), "step": number}


def fill(folder, count, **settings):
    """Saves generations 1 … count at steps 10, 20, …; the metric is 1/generation."""
    with writer(folder, **settings) as store:
        for number in range(1, count + 1):
            store.save(state(number), step=10 * number, metric=1 / number)


def holds(loaded, number):
    """Whether a loaded state is that of a number."""
    return loaded["step"] == number and torch.equal(loaded["weight"], state(number)["weight"])


@pytest.fixture
def folder(tmp_path):
    """Where a store goes; three generations are in it."""
    fill(tmp_path / "store", 3)
    return tmp_path / "store"


def test_each_checkpoint_comes_back(folder):
    """By generation, as the newest and as the best; also for a reader in the same process."""
    store = reader(folder)
    assert [it.generation for it in store.list()] == [1, 2, 3]
    assert [it.step for it in store.list()] == [10, 20, 30]
    assert all(holds(store.load(number), number) for number in (1, 2, 3))
    assert holds(store.load(), 3)
    assert holds(store.load("best"), 1)
    assert store.verify(deep=True) == store.list()


def test_a_checkpoint_is_decrypted_into_tensors_that_are_there(folder):
    """Any of them, by the same memory; for a reader and for the writer."""
    model = state(0)
    memory = model["weight"]
    with writer(folder) as store:
        for which, number in ((2, 2), ("best", 1), ("latest", 3)):
            loaded = store.load_into(model, which)
            assert holds(loaded, number)
            assert loaded["weight"].data_ptr() == memory.data_ptr()
    assert holds(reader(folder).load_into(model, 1), 1)
    assert torch.equal(memory, state(1)["weight"])


def test_loading_into_checks_what_loading_checks(folder):
    """An exchanged file, another signer, no identity, another shape: the tensors are as before."""
    model = {"weight": torch.full((3,), 5.0), "step": 0}
    with pytest.raises(StorageError, match="no checkpoint for 4"):
        reader(folder).load_into(model, 4)
    with pytest.raises(StateError, match="weight"):
        reader(folder).load_into({"weight": torch.ones(4), "step": 0})
    with pytest.raises(WrongKey, match="identity"):
        CheckpointStore(folder, trusted=TRUSTED).load_into(model)
    stranger = archive.generate_identity(post_quantum=False)
    with pytest.raises(WrongKey):
        CheckpointStore(folder, identity=stranger, trusted=TRUSTED).load_into(model)
    shutil.copy(folder / "checkpoint-00000001.sealed", folder / "checkpoint-00000003.sealed")
    with pytest.raises(RolledBack):
        reader(folder).load_into(model)
    assert (model["weight"] == 5).all()


def test_a_checkpoint_is_not_rotated_where_it_is(folder, tmp_path):
    """The log names its hash: refused, untouched; a new checkpoint and pruning do what is meant."""
    you = archive.generate_identity(post_quantum=False)
    keys = {"identity": ME, "recipients": [you.recipient], "signer": SIGNER}
    path = folder / "checkpoint-00000002.sealed"
    raw = path.read_bytes()
    (tmp_path / "link").symlink_to(path)
    for name in (path, tmp_path / "link"):
        with pytest.raises(StorageError, match=r"next checkpoint.*copy"):
            archive.rotate(name, **keys)
    assert path.read_bytes() == raw
    assert len(reader(folder).verify(deep=True)) == 3
    shutil.copy(path, tmp_path / "copy")
    archive.rotate(tmp_path / "copy", **keys)
    assert holds(archive.load(tmp_path / "copy", identity=you, trusted=TRUSTED), 2)
    with writer(folder, recipients=[you.recipient], keep_last=1) as store:
        store.save(store.load(), step=40)
    renewed = CheckpointStore(folder, identity=you, trusted=TRUSTED)
    assert [it.generation for it in renewed.verify(deep=True)] == [4]
    assert holds(renewed.load(), 3)


def test_a_file_that_only_looks_like_a_checkpoint_is_rotated(folder):
    """Control: one that was put beside the checkpoints is nobody's but its owner's."""
    archive.save(folder / "model.sealed", state(1), recipients=[ME.recipient])
    archive.rotate(folder / "model.sealed", identity=ME, recipients=[ME.recipient])
    assert holds(archive.load(folder / "model.sealed", identity=ME), 1)


def test_a_sequence_goes_on_where_it_ended(folder):
    """A second run of the writer counts on; each file names its place and the file before it."""
    with writer(folder) as store:
        assert store.save(state(4), step=40) == 4
        assert holds(store.load(), 4)
        places = [archive.inspect(folder / it.name) for it in store.list()]
    assert [it.lineage.generation for it in places] == [1, 2, 3, 4]
    assert [it.lineage.step for it in places] == [10, 20, 30, 40]
    assert len({it.lineage.run for it in places}) == 1
    assert [it.lineage.previous for it in places] == [None] + [it.core_hash for it in places[:-1]]


def test_what_is_not_there_is_said(folder):
    """An empty store, an unknown generation, a best where nothing was measured."""
    for which in (4, 0, -1):
        with pytest.raises(StorageError, match=f"no checkpoint for {which}"):
            reader(folder).load(which)
    with pytest.raises(StorageError, match="no checkpoint for 'latest'"):
        reader(folder / "nowhere").load()
    with writer(folder / "other") as store:
        store.save(state(1), step=1)
        with pytest.raises(StorageError, match="best"):
            store.load("best")


@pytest.mark.parametrize("which", [True, 1.0, np.int64(1), None, torch.tensor(1), (1,)])
def test_what_is_no_generation_is_refused_by_name(folder, which):
    """True and 1.0 are equal to 1; each call that takes a generation says so."""
    store = reader(folder)
    for ask in (store.load, store.find, partial(store.load_into, {})):
        with pytest.raises(StateError, match=r"which: expected 'latest', .*, got \w+ "):
            ask(which)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"metric": "0.5"}, "metric: expected a number, got str '0.5'"),
        ({"metric": True}, "metric: expected a number, got bool True"),
        ({"metric": torch.ones(2)}, "metric: expected a number, got Tensor"),
        ({"metric": 10**400}, "metric: expected a number, got int 1000"),
        ({"metric": math.nan}, "metric: expected a finite"),
        ({"claims": 5}, "claims: expected a dict, got int"),
        ({"claims": "ab"}, "claims: expected a dict, got str"),
        ({"claims": {"a": {1}}}, "claims.a: expected plain JSON"),
    ],
)
def test_what_is_said_wrongly_of_a_checkpoint_is_refused_at_once(tmp_path, said, message):
    """Not by the background save, when the step that was to be saved is long gone."""
    with writer(tmp_path) as store:
        with pytest.raises(StateError, match=message):
            store.save(state(1), step=1, **said)
        assert store.list() == ()


def test_claims_may_change_after_a_save(tmp_path):
    """Like the state; also what is nested in them."""
    claims = {"tried": [1]}
    with writer(tmp_path) as store:
        store.save(state(1), step=1, claims=claims)
        claims["tried"].append(2)
    (path,) = tmp_path.glob("*.sealed")
    assert archive.inspect(path).claims == {"tried": [1]}


def test_keys_are_asked_for():
    """Nobody to trust, nobody to read, a signer who is not trusted, no identity to load with."""
    with pytest.raises(InvalidKey, match="trust"):
        CheckpointStore("nowhere")
    with pytest.raises(InvalidKey, match="among the trusted"):
        CheckpointStore("nowhere", signer=SIGNER, trusted=[archive.generate_signer().verifier])
    with pytest.raises(WrongKey, match="without an identity"):
        CheckpointStore("nowhere", trusted=TRUSTED).load()
    assert not os.path.exists("nowhere")


def test_recipients_are_needed_to_save_only(folder):
    """Who tidies up has nobody to encrypt to; a save without is refused at once."""
    with writer(folder / "other") as store:
        for step in range(3):
            store.save(state(step), step=step)
    with writer(folder / "other", recipients=[], keep_last=1) as store:
        with pytest.raises(InvalidKey, match="recipient"):
            store.save(state(9), step=9)
        assert [it.generation for it in store.prune()] == [3]


def test_who_trains_need_not_be_able_to_read(folder):
    """A writer without identity goes on with a sequence; somebody else's identity opens nothing."""
    with writer(folder, identity=None) as store:
        store.save(state(4), step=40)
        with pytest.raises(WrongKey):
            store.load()
    assert holds(reader(folder).load(), 4)
    other = archive.generate_identity(post_quantum=False)
    with pytest.raises(WrongKey):
        CheckpointStore(folder, identity=other, trusted=TRUSTED).load()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"step": -1}, "step"),
        ({"step": 1.5}, "step"),
        ({"step": 1, "metric": float("nan")}, "metric"),
    ],
)
def test_bad_values_are_refused_at_once(folder, settings, match):
    """Before anything is copied or written."""
    with writer(folder) as store:
        with pytest.raises(StateError, match=match):
            store.save(state(4), **settings)
        with pytest.raises(StateError, match="Event"):
            store.save({"x": threading.Event()}, step=1)
        assert len(store.list()) == 3


def test_a_reader_does_not_write(folder):
    """No save, no prune, and not a byte of the folder changed."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with reader(folder) as store:
        store.load()
        for call in (lambda: store.save(state(4), step=4), store.prune):
            with pytest.raises(StorageError, match="open for reading"):
                call()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_signer_against_quantum_computers_will_do(tmp_path):
    """Its keys and signatures are a hundred times as long."""
    signer = archive.generate_signer(post_quantum=True)
    fill(tmp_path / "s", 2, signer=signer)
    store = CheckpointStore(tmp_path / "s", identity=ME, trusted=[*TRUSTED, signer.verifier])
    assert holds(store.load(), 2)
    with pytest.raises(UntrustedSigner):
        reader(tmp_path / "s")


# Beside the training loop


@pytest.fixture
def gate(monkeypatch):
    """Lets saves pass only once it is set."""
    event, save = threading.Event(), store_module.save

    def waiting(*arguments, **settings):
        assert event.wait(600)
        save(*arguments, **settings)

    monkeypatch.setattr(store_module, "save", waiting)
    return event


def test_the_loop_goes_on_while_a_save_is_under_way(tmp_path, gate):
    """Save returns before the file is there, and what the loop then changes is not in it."""
    with writer(tmp_path / "s") as store:
        model = state(1)
        store.save(model, step=1)
        model["weight"].fill_(99)
        model["step"] = 99
        assert not list((tmp_path / "s").glob("*.sealed"))
        gate.set()
        store.wait()
        assert holds(store.load(), 1)


def test_only_one_save_is_under_way(tmp_path, gate):
    """The second waits for the first."""
    with writer(tmp_path / "s") as store:
        store.save(state(1), step=1)
        timer = threading.Timer(0.2, gate.set)
        timer.start()
        store.save(state(2), step=2)
        assert gate.is_set()
        store.wait()
        timer.join()
    assert [it.generation for it in reader(tmp_path / "s").list()] == [1, 2]


@pytest.mark.parametrize("call", ["save", "wait", "list", "load", "prune", "close", "verify"])
def test_an_error_surfaces_at_the_next_call(folder, monkeypatch, call):
    """Once; the generation is then given to the next save, and the old ones are whole."""
    with writer(folder) as store, monkeypatch.context() as patch:
        patch.setattr(store_module, "save", _refuse)
        assert store.save(state(4), step=4) == 4
        arguments = {"save": ({"state": state(5), "step": 5})}.get(call, {})
        with pytest.raises(StorageError, match="as planned"):
            getattr(store, call)(**arguments)
        patch.undo()
        if call != "close":
            assert holds(store.load(), 3)
            assert store.save(state(6), step=6) == 4
            assert holds(store.load(), 6)
    assert holds(reader(folder).load(), 3 if call == "close" else 6)


def _refuse(*_, **__):
    raise StorageError("refused, as planned")


def test_leaving_the_block_waits_and_raises(folder, monkeypatch):
    """The last save's error is not lost."""
    monkeypatch.setattr(store_module, "save", _refuse)
    store = writer(folder)
    with pytest.raises(StorageError, match="as planned"), store:
        store.save(state(4), step=4)
    writer(folder).close()


# What stays


NUMBERS = st.none() | st.integers(1, 5)


@given(st.lists(st.none() | st.floats(-1, 1), max_size=12), NUMBERS, NUMBERS, NUMBERS, st.data())
def test_retention_keeps_what_any_rule_wants(metrics, keep_last, keep_best, every, data):
    """Against the rules said one by one; what is kept stays kept when asked again."""
    saved = [
        Checkpoint(generation=i + 1, step=i, metric=m, created="", core_hash="0" * 64)
        for i, m in enumerate(metrics)
    ]
    saved = [it for it in saved if data.draw(st.booleans())]
    rule = Retention(keep_last=keep_last, keep_best=keep_best, every=every)
    gone = rule.superfluous(saved)
    kept = [it for it in saved if it not in gone]
    if keep_last is keep_best is every is None:
        assert gone == ()
    for index, it in enumerate(saved):
        measured = [other for other in saved if other.metric is not None]
        better = it.metric is not None and sum(
            (other.metric, other.generation) > (it.metric, it.generation) for other in measured
        )
        newest = index == len(saved) - 1
        wanted = (
            newest
            or (keep_last is not None and index >= len(saved) - keep_last)
            or (keep_best is not None and it.metric is not None and better < keep_best)
            or (every is not None and it.generation % every == 0)
            or keep_last is keep_best is every is None
        )
        assert wanted == (it in kept)
    assert rule.superfluous(kept) == ()


def test_superfluous_checkpoints_go_by_themselves(tmp_path):
    """The rules of the store hold after each save; what is pruned is no longer found."""
    folder = tmp_path / "s"
    fill(folder, 7, keep_last=2, keep_best=1, every=3)
    names = sorted(path.name for path in folder.glob("*.sealed"))
    assert names == [f"checkpoint-{number:08}.sealed" for number in (1, 3, 6, 7)]
    store = reader(folder)
    assert [it.generation for it in store.verify(deep=True)] == [1, 3, 6, 7]
    with pytest.raises(StorageError, match="no checkpoint for 2"):
        store.load(2)
    with writer(folder, keep_last=1) as again:
        assert [it.generation for it in again.prune()] == [7]
    assert [path.name for path in folder.glob("*.sealed")] == ["checkpoint-00000007.sealed"]


def test_what_a_dead_writer_left_is_cleared_away(folder):
    """Half-written and pruned files go when the next writer comes; nobody else's do."""
    with writer(folder, keep_last=1):
        pass
    log, latest = (folder / "log.jsonl").read_bytes(), (folder / "latest.json").read_bytes()
    one = (folder / "checkpoint-00000001.sealed").read_bytes()
    with writer(folder, keep_last=1) as store:
        store.prune()
    assert (log, latest) != ((folder / "log.jsonl").read_bytes(), latest)
    (folder / "checkpoint-00000001.sealed").write_bytes(one)
    (folder / f".checkpoint-00000004.sealed.{'0' * 16}.tmp").write_bytes(b"half")
    (folder / f".latest.json.{'0' * 16}.tmp").write_bytes(b"half")
    (folder / "mine.tmp").write_bytes(b"mine")
    writer(folder).close()
    names = {path.name for path in folder.iterdir()}
    kept = {"checkpoint-00000003.sealed", "mine.tmp"}
    assert names == {*kept, "latest.json", "log.jsonl", "lock", "high-water.json"}


# Rolled back, missing, swapped


def test_a_missing_checkpoint_is_noticed(folder):
    """When it is loaded, and by verify, for any of them."""
    (folder / "checkpoint-00000002.sealed").unlink()
    with pytest.raises(Tampered, match="is missing"):
        reader(folder).load(2)
    with pytest.raises(Tampered, match="is missing"):
        reader(folder).verify()
    assert holds(reader(folder).load(), 3)


@pytest.mark.parametrize(("of", "at"), [(1, 3), (3, 1), (2, 3)])
def test_a_checkpoint_of_another_generation_is_refused(folder, of, at):
    """Genuine, signed, of the same run, and in the wrong place: older or newer."""
    shutil.copy(folder / f"checkpoint-{of:08}.sealed", folder / f"checkpoint-{at:08}.sealed")
    for call in (lambda: reader(folder).load(at), reader(folder).verify):
        with pytest.raises(RolledBack, match=f"generation {of}"):
            call()


def test_a_checkpoint_of_another_run_is_refused(folder, tmp_path):
    """Genuine, signed by the same signer, of the same generation."""
    fill(tmp_path / "other", 3)
    shutil.copy(tmp_path / "other/checkpoint-00000003.sealed", folder)
    with pytest.raises(Tampered, match="not the file that was saved"):
        reader(folder).load()


@pytest.mark.parametrize("at", [60, 300, -200, -1])
def test_a_changed_byte_of_a_checkpoint_is_noticed(folder, at):
    """In its head and in its payload, when it is loaded and by a deep look."""
    path = folder / "checkpoint-00000003.sealed"
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ArchiveError):
        reader(folder).load()
    with pytest.raises(ArchiveError):
        reader(folder).verify(deep=True)


def small_files(folder):
    """`latest` and log."""
    return {name: (folder / name).read_bytes() for name in ("latest.json", "log.jsonl")}


def put_back(folder, files):
    """Writes files over those that are there."""
    for name, raw in files.items():
        (folder / name).write_bytes(raw)


def test_an_older_latest_is_noticed(folder):
    """By the mark in the folder; without it by the files; by an object that saw the newer one."""
    before, watching = small_files(folder), reader(folder)
    fill(folder, 2)
    assert watching.find("latest").generation == 5
    put_back(folder, before)
    for opening in (reader, writer):
        with pytest.raises(RolledBack, match="generation 5 was seen"):
            opening(folder)
    (folder / "high-water.json").unlink()
    for opening in (reader, writer):
        with pytest.raises(RolledBack, match="a file of generation 5"):
            opening(folder)
    (folder / "checkpoint-00000005.sealed").unlink()
    with pytest.raises(RolledBack, match="generation 5 was seen"):
        watching.load()


def test_a_whole_folder_put_back_needs_a_mark_outside(folder, tmp_path):
    """With a mark outside it is noticed. Control: without one it is not, as the class says."""
    mark = tmp_path / "elsewhere" / "mark.json"
    mark.parent.mkdir()
    shutil.copytree(folder, tmp_path / "old")
    fill(folder, 1, high_water=mark)
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "old", folder)
    for opening in (reader, writer):
        with pytest.raises(RolledBack, match="generation 4 was seen"):
            opening(folder, high_water=mark)
    assert reader(folder).find("latest").generation == 3
    shutil.rmtree(folder)
    with pytest.raises(RolledBack, match="there is none"):
        writer(folder, high_water=mark)


def test_a_reader_remembers_what_it_saw(folder, tmp_path):
    """Its own mark outside goes up as it reads, and never down."""
    mark = tmp_path / "mark.json"
    shutil.copytree(folder, tmp_path / "old")
    fill(folder, 1)
    assert holds(reader(folder, high_water=mark).load(), 1)
    with pytest.raises(RolledBack):
        reader(tmp_path / "old", high_water=mark)
    assert json.loads(mark.read_text())["seen"][SIGNER.verifier.to_text()][0] == 4


def test_another_run_and_a_second_history_are_refused(folder, tmp_path):
    """Genuine folders of the same signer: another run, and a copy that somebody wrote on."""
    mark = tmp_path / "mark.json"
    reader(folder, high_water=mark)
    fill(tmp_path / "other", 4)
    with pytest.raises(Tampered, match="expected run"):
        reader(tmp_path / "other", high_water=mark)
    shutil.copytree(folder, tmp_path / "copy")
    fill(tmp_path / "copy", 1)
    fill(folder, 1, high_water=mark)
    with pytest.raises(Tampered, match="not the one seen before"):
        reader(tmp_path / "copy", high_water=mark)


def test_the_mark_of_a_signer_counts_while_it_is_trusted(tmp_path):
    """A stolen key that signed far ahead does not lock out its successor."""
    mark, stolen = tmp_path / "mark.json", archive.generate_signer()
    fill(tmp_path / "ahead", 5, signer=stolen, trusted=[stolen.verifier], high_water=mark)
    with writer(tmp_path / "s", trusted=TRUSTED, high_water=mark) as store:
        store.save(state(1), step=1)
        assert holds(store.load(), 1)
    both = [*TRUSTED, stolen.verifier]
    with pytest.raises(ArchiveError):
        CheckpointStore(tmp_path / "s", trusted=both, high_water=mark)


def test_only_a_trusted_signer_says_what_is_latest(folder, tmp_path):
    """Somebody who can write the folder but not sign gets nothing accepted."""
    other = archive.generate_signer()
    fill(tmp_path / "other", 4, signer=other)
    put_back(folder, small_files(tmp_path / "other"))
    with pytest.raises(UntrustedSigner):
        reader(folder)


@pytest.mark.parametrize("name", ["latest.json", "log.jsonl"])
def test_every_changed_byte_of_latest_and_log_is_noticed(folder, name):
    """Each byte in turn, and each length that is shorter."""
    whole = (folder / name).read_bytes()
    for at in range(len(whole)):
        for raw in (whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], whole[:at]):
            (folder / name).write_bytes(raw)
            with pytest.raises(ArchiveError):
                reader(folder)
    (folder / name).write_bytes(whole)
    assert holds(reader(folder).load(), 3)


def test_lines_that_were_never_signed_do_not_count(folder):
    """What a crash left behind the end of the log is passed over, then written over."""
    with (folder / "log.jsonl").open("ab") as log:
        log.write(b'{"saved": "half a li')
    assert holds(reader(folder).load(), 3)
    fill(folder, 1)
    assert [it.generation for it in reader(folder).list()] == [1, 2, 3, 4]
    assert b"half a li" not in (folder / "log.jsonl").read_bytes()


def test_a_log_tells_only_what_can_have_happened():
    """A chain that holds, around entries that cannot be."""
    run = "00" * 16
    it = {"generation": 1, "step": 0, "metric": None, "created": "", "core_hash": "1" * 64}
    for entry in (
        {"saved": {**it, "generation": 2}},
        {"saved": {**it, "generation": True}},
        {"saved": {**it, "metric": 1}},
        {"saved": {**it, "extra": 1}},
        {"saved": []},
        {"saved": {**it, "core_hash": "1" * 63 + "G"}},
        {"pruned": [1]},
        {"pruned": {"1": 1}},
        {"burnt": [1]},
        {},
    ):
        line = json.dumps({**entry, "previous": Log.empty(run).head}).encode() + b"\n"
        with pytest.raises(Tampered, match="line 1"):
            Log.replay(run, line)
    first, log = Log.empty(run).saved(Checkpoint(**it))
    newest, _ = log.pruned([Checkpoint(**it)])
    with pytest.raises(Tampered, match="line 2"):
        Log.replay(run, first + newest)


# One writer


def test_two_runs_cannot_write_one_store(folder):
    """The second is told who has it; a reader is not kept out; after a close it may."""
    with writer(folder) as store:
        with pytest.raises(StorageError, match=f"process {os.getpid()} on"):
            writer(folder)
        assert holds(reader(folder).load(), 3)
        store.close()
        store.close()
        with pytest.raises(StorageError, match="not open for writing"):
            store.save(state(4), step=4)
        writer(folder).close()


def test_a_removed_lock_is_noticed(folder):
    """Before the writer does more; else there might be two."""
    with writer(folder) as store:
        (folder / "lock").unlink()
        with pytest.raises(StorageError, match="was removed or exchanged"):
            store.save(state(4), step=4)
    assert holds(reader(folder).load(), 3)


def test_another_hand_in_the_folder_is_noticed(folder):
    """A `latest` that is not as the writer left it, though genuine."""
    before = small_files(folder)
    with writer(folder) as store:
        store.save(state(4), step=4)
        store.wait()
        put_back(folder, before)
        (folder / "high-water.json").unlink()
        store.save(state(5), step=5)
        with pytest.raises(Tampered, match="not as this process left it"):
            store.wait()


FORK = """
import os, sys, torch
from secure_cnn import archive
from secure_cnn.archive.store import store as module
from secure_cnn.archive.errors import StorageError
import threading

folder = sys.argv[1]
me, signer = archive.generate_identity(post_quantum=False), archive.generate_signer()
gate, save = threading.Event(), module.save
def waiting(*arguments, **settings):
    assert gate.wait(600)
    save(*arguments, **settings)
module.save = waiting
def opened():
    return module.CheckpointStore(folder, recipients=[me.recipient], signer=signer, identity=me)
store = opened()
store.save({"w": torch.ones(3)}, step=1)
child = os.fork()
if child == 0:
    code = 1
    try:
        store.save({"w": torch.zeros(3)}, step=2)
    except StorageError as error:
        code = 0 if "fork" in str(error) else 2
    store.close()
    try:
        opened()
        code = 3
    except StorageError:
        pass
    os._exit(code)
assert os.waitpid(child, 0)[1] == 0
gate.set()
store.close()
sleeper = None
store = opened()
sleeper = os.fork()
if sleeper == 0:
    import time
    time.sleep(600)
    os._exit(0)
store.close()
store = opened()  # the sleeping child does not hold the lock
assert torch.equal(store.load()["w"], torch.ones(3))
assert [it.generation for it in store.list()] == [1]
store.close()
os.kill(sleeper, 9)
os.waitpid(sleeper, 0)
print("held")
"""


def test_a_fork_while_saving_harms_nothing(tmp_path):
    """The child is refused and does not keep the lock; the parent's save is whole."""
    assert printed_by(sys.executable, "-c", FORK, tmp_path / "store") == "held\n"


# What else the world does


def test_a_clock_set_back_changes_nothing(tmp_path):
    """The newest is the newest by its generation; the log says what the clock said."""
    times = iter([datetime(2026, 1, 1, tzinfo=UTC) - timedelta(days=n) for n in range(9)])
    with writer(tmp_path / "s", keep_last=2, clock=lambda: next(times)) as store:
        for number in (1, 2, 3):
            store.save(state(number), step=number)
        assert holds(store.load(), 3)
        kept = store.list()
    assert [it.generation for it in kept] == [2, 3]
    assert kept[0].created > kept[1].created


@pytest.mark.parametrize(
    "name",
    ["checkpoint-00000004.sealed.pending", "latest.json", "log.jsonl", "high-water.json", "lock"],
)
def test_a_symbolic_link_is_never_written_through(folder, tmp_path, name):
    """Whatever it leads to stays as it was, and so does the store."""
    precious = tmp_path / "precious"
    original = (folder / name).read_bytes() if (folder / name).exists() else b"precious"
    precious.write_bytes(original)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(precious)
    with pytest.raises(StorageError, match="link"), writer(folder) as store:
        store.save(state(4), step=4)
    assert precious.read_bytes() == original
    (folder / name).unlink()
    if name != "checkpoint-00000004.sealed.pending":
        (folder / name).write_bytes(original)
    assert holds(reader(folder).load(), 3)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(folder):
    """A clear error for the writer; a reader needs no permission to write."""
    folder.chmod(0o500)
    try:
        with pytest.raises(StorageError, match="Permission denied"):
            writer(folder)
        assert holds(reader(folder).load(), 3)
    finally:
        folder.chmod(0o700)
