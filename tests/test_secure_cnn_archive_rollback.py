"""A store put back by one generation is noticed, whichever of its files were touched."""

import itertools
import shutil

import pytest
import torch

from secure_cnn import archive
from secure_cnn.archive import CheckpointStore, RolledBack, Tampered

ME = archive.generate_identity(post_quantum=False)
SIGNER = archive.generate_signer()
LATEST, LOG, MARK = "latest.json", "log.jsonl", "high-water.json"


def writer(folder, **settings):
    """A store that writes."""
    return CheckpointStore(folder, recipients=[ME.recipient], signer=SIGNER, **settings)


def reader(folder, **settings):
    """A store that reads."""
    return CheckpointStore(folder, identity=ME, trusted=[SIGNER.verifier], **settings)


def save(folder, step, **settings):
    """One checkpoint more."""
    with writer(folder, **settings) as store:
        store.save({"step": step}, step=step)


@pytest.fixture(params=[1, 2, 3])
def generations(tmp_path, request):
    """The folder after one generation more than its copy, and the name of that one's file."""
    folder, number = tmp_path / "store", request.param
    folder.mkdir()
    for step in range(1, number):
        save(folder, step)
    shutil.copytree(folder, tmp_path / "before")
    save(folder, number)
    return folder, tmp_path / "before", f"checkpoint-{number:08}.sealed"


def put_back(folder, before, names):
    """Some files as they were; those that were not there go."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
        if (before / name).exists():
            shutil.copy(before / name, folder / name)


@pytest.mark.parametrize("touched", range(1, 4))
def test_whichever_files_are_put_back_it_is_noticed(generations, tmp_path, touched):
    """`latest` with any others of the commit: the one that is left tells. By reader and writer."""
    folder, before, newest = generations
    for others in itertools.combinations((LOG, newest, MARK), touched - 1):
        for mark_gone in {MARK in others, False}:
            copy = tmp_path / "-".join(("copy", *others, str(mark_gone)))
            shutil.copytree(folder, copy)
            put_back(copy, before, (LATEST, *others))
            if mark_gone:
                (copy / MARK).unlink(missing_ok=True)
            for opening in (reader, writer):
                with pytest.raises((RolledBack, Tampered)):
                    opening(copy)


def test_all_of_it_put_back_is_seen_from_outside_alone(generations, tmp_path):
    """Control: everything as before is what nobody inside can tell, as the class says."""
    folder, before, newest = generations
    mark = tmp_path / "mark.json"
    with reader(folder, high_water=mark):
        pass
    put_back(folder, before, (LATEST, LOG, MARK, newest))
    assert len(reader(folder).list()) == len(list(before.glob("checkpoint-*")))
    with pytest.raises(RolledBack):
        reader(folder, high_water=mark)


def test_a_store_that_had_a_mark_is_refused_without_it(tmp_path):
    """Until somebody says that they know; the next save leaves one again."""
    save(tmp_path, 1)
    (tmp_path / MARK).unlink()
    for opening in (reader, writer):
        with pytest.raises(RolledBack, match="accept_missing_mark=True"):
            opening(tmp_path)
    assert reader(tmp_path, accept_missing_mark=True).load() == {"step": 1}
    save(tmp_path, 2, accept_missing_mark=True)
    assert reader(tmp_path).load() == {"step": 2}


def test_a_mark_outside_counts_beside_the_one_inside(tmp_path):
    """With a mark elsewhere that saw the run, the one inside may be gone; without, it is asked."""
    mark = tmp_path / "mark.json"
    save(tmp_path / "s", 1, high_water=mark)
    (tmp_path / "s" / MARK).unlink()
    assert reader(tmp_path / "s", high_water=mark).load() == {"step": 1}
    with pytest.raises(RolledBack, match="is missing"):
        reader(tmp_path / "s", high_water=tmp_path / "new.json")


@pytest.mark.parametrize("where", ["sealed", "logged", "committed", "marked"])
def test_a_crash_between_two_steps_of_a_commit_is_no_rollback(tmp_path, monkeypatch, where):
    """After each the store opens, for readers and writers, and the next save goes through."""
    from secure_cnn.archive.store import sequence

    save(tmp_path, 1)
    call = {
        "sealed": (sequence, "append_at"),
        "logged": (sequence, "write_file"),
        "committed": (sequence.SequenceFolder, "_raise"),
        "marked": (sequence.SequenceFolder, "clear"),
    }[where]

    def dies(*_, **__):
        raise KeyboardInterrupt

    store = writer(tmp_path)
    with monkeypatch.context() as patch:
        if where == "marked":  # the call after the commit, not the one before it
            calls = []
            dying = lambda *_: calls.append(1) or (calls[1:] and dies())  # noqa: E731
            patch.setattr(*call, dying)
        else:
            patch.setattr(*call, dies)
        store.save({"step": 2}, step=2)
        with pytest.raises(KeyboardInterrupt):
            store.close()
    found = 2 if where in ("committed", "marked") else 1
    assert reader(tmp_path).load() == {"step": found}
    assert len(reader(tmp_path).verify(deep=True)) == found
    save(tmp_path, found + 1)
    assert reader(tmp_path).load() == {"step": found + 1}
    assert not list(tmp_path.glob("*.pending"))


def test_a_reader_beside_a_writer_never_takes_its_work_for_a_rollback(tmp_path):
    """Two hundred looks while generations come."""
    save(tmp_path, 0)
    store, looking = writer(tmp_path, keep_last=2), reader(tmp_path)
    with store:
        for step in range(1, 41):
            store.save({"w": torch.ones(3), "step": step}, step=step)
            for _ in range(5):
                assert looking.list()
                assert looking.load()["step"] in (step - 1, step) or step == 1
