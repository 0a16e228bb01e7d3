"""`secure-cnn forget`: the certificate, what is refused, and a process that is killed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from secure_cnn import Recipe, archive, run
from secure_cnn.archive.certificates import keyed_digest
from secure_cnn.checkpoint import Sealing, Unlocking, read_state
from secure_cnn.data import load_data
from secure_cnn.files import locked_folder
from secure_cnn.record import RunRecord
from secure_cnn.unlearning import forget, run_sharded
from secure_cnn.unlearning.inventory import Inventory
from secure_cnn.unlearning.shards import image_bytes


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    me, signer = archive.generate_identity(), archive.generate_signer()
    archive.write_key(folder / "me.key", me)
    archive.write_key(folder / "signer.key", signer)
    return folder, me, signer


@pytest.fixture(scope="module")
def sharded(keys, shapes, tmp_path_factory):
    """A sealed and signed run in shards, which no test changes."""
    _, me, signer = keys
    out = tmp_path_factory.mktemp("runs") / "before"
    recipe = Recipe(out=out, data=shapes, model="compact", epochs=2, shards=2, slices=2)
    run_sharded(recipe, sealing=Sealing(recipients=[me.recipient], signer=signer))
    return out


@pytest.fixture
def command(cli):
    """What a command prints, on stdout and stderr together."""

    def call(*words, code=0):
        found, out, err = cli(*words)
        assert found == code, out + err
        return " ".join((out + err).split())

    return call


def ids_in(folder, *rows, column="index"):
    path = Path(folder) / f"ids-{'-'.join(map(str, rows)).replace('/', ' ')}.csv"
    path.write_text("\n".join([column, *map(str, rows)]) + "\n")
    return path


def opened(keys):
    folder, *_ = keys
    return ["--signer", folder / "signer.key", "--identity", folder / "me.key"]


def test_who_leaves_is_told_by_a_certificate_that_others_can_check(
    command, sharded, keys, shapes, tmp_path
):
    _, me, signer = keys
    out = tmp_path / "after"
    told = command("forget", sharded, "--ids", ids_in(tmp_path, 3, 9), "--out", out, *opened(keys),
                   "--ground", "asked by letter", "--received", "2026-11-01T00:00:00Z")  # fmt: skip
    assert "method: sharded" in told
    assert "bit for bit" in told
    assert f"signed by {signer.verifier!r}" in told
    found = archive.verify_certificate(out / "certificate.json", trusted=[signer.verifier])
    value = found.value
    before, after = (RunRecord.read(each / "run.json") for each in (sharded, out))
    assert (value.people, value.images, value.exact) == (2, 2, True)
    assert (value.run_before.digest, value.run_after.digest) == (
        before.model_digest,
        after.model_digest,
    )
    assert value.ground == "asked by letter"
    assert "bit for bit" in (out / "certificate.html").read_text()
    assert value.data_before.leaves - value.data_after.leaves == 2
    # Nothing is in either folder of which the certificate does not speak.
    names = {each.name for each in value.artefacts}
    for folder, which in ((sharded, "old"), (out, "new")):
        files = {path.name for path in folder.rglob("*.*") if path.is_file()}
        for name in sorted(files):
            if not name.startswith(("certificate.", "shard-")):
                assert f"{name}, {which} run" in names
    # Who has the key can show that an image is in it.
    unlocking = Unlocking(identity=me)
    inventory = Inventory.from_state(
        read_state(out / "shards/inventory.sealed", unlocking=unlocking)
    )
    data = load_data(shapes)
    digests = {
        keyed_digest(inventory.key, "image", image_bytes(data.train, r)).hex() for r in (3, 9)
    }
    assert set(value.requests) == digests
    # The next one goes on from it.
    last = tmp_path / "last"
    command("forget", out, "--ids", ids_in(tmp_path, 20), "--out", last, *opened(keys))
    chained = archive.verify_certificate(
        last / "certificate.json", trusted=[signer.verifier], previous=out / "certificate.json"
    )
    assert chained.value.cumulative.people == 3
    with pytest.raises(archive.ArchiveError):
        archive.verify_certificate(
            last / "certificate.json",
            trusted=[signer.verifier],
            previous=last / "certificate.json",
        )


def test_what_they_left_is_evaluated_on_its_own_images(command, keys, quick, tmp_path):
    """Of a folder of photographs, from which the others' are split otherwise once some are gone."""
    folder, *_ = keys
    pets = photographs(tmp_path / "pets", 24)
    run(Recipe(out=tmp_path / "before", data=pets, model="compact", epochs=1))
    path = load_data(str(pets)).train.ids[0]
    command("forget", tmp_path / "before", "--ids", ids_in(tmp_path, path, column="path"), "--out",
            tmp_path / "after", "--signer", folder / "signer.key")  # fmt: skip
    for gone in (False, True):
        if gone:
            (pets / path).unlink()
        assert "note" not in command("evaluate", tmp_path / "after", "--json", tmp_path / "found")
        found = json.loads((tmp_path / "found").read_text())["clean"]
        told = RunRecord.read(tmp_path / "after/run.json").epochs[-1]
        assert (found["accuracy"], found["loss"]) == (
            told.test_accuracy,
            pytest.approx(told.test_loss),
        )
    # What leaks is measured of them too: it gets as far as the pool.
    told = command("leakage", tmp_path / "after", "--require", "tpr@0.001<=1", code=3)
    assert "expected a pool" in told
    # The control: the run before finds that an image of its own is gone.
    assert "is not the data" in command("evaluate", tmp_path / "before")
    # And images of others are said to be others.
    assert "is not the data" in command("evaluate", tmp_path / "after", "--data",
                                        photographs(tmp_path / "others", 8, seed=1))  # fmt: skip


def photographs(root, count, *, seed=0):
    """A folder of images of two classes, no two alike."""
    random = np.random.default_rng(seed)
    for number in range(count):
        path = root / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    return root


def test_a_run_that_people_left_is_compared_with_the_one_before(command, sharded, keys, tmp_path):
    """Beside each other they show what leaving cost; other runs on other data are refused."""
    out, more = tmp_path / "after", tmp_path / "more"
    command("forget", sharded, "--ids", ids_in(tmp_path, 3), "--out", out, *opened(keys))
    command("forget", out, "--ids", ids_in(tmp_path, 9), "--out", more, *opened(keys))
    for pair in ((sharded, out), (more, sharded)):
        told = command("compare", *pair, "--out", tmp_path / "page")
        assert all(f"{each.name}: plain" in told for each in pair)
        assert "it was trained on 6" in told
        assert "same test images" in told
    page = (tmp_path / "page/compare.html").read_text()
    assert "training images" in page
    told = (sharded / "report.html").read_text()
    assert "Stages: 4: 2 shards of 2 slices, 1 epoch a stage" in told
    assert "No epoch has been recorded" not in told
    # Two trainings without epochs on record are two, whatever they find.
    record, before = (RunRecord.read(each / "run.json") for each in (out, sharded))
    replace(record, results=before.results).write(out / "run.json")
    assert "after: plain" in command("compare", sharded, out)
    replace(record, follows=()).write(out / "run.json")
    assert "expected the data of before" in command("compare", sharded, out, code=3)


def test_what_cannot_be_done_changes_nothing(command, sharded, keys, tmp_path):
    folder, *_ = keys
    out = tmp_path / "after"
    before = {path: path.read_bytes() for path in sharded.rglob("*") if path.is_file()}
    archive.write_key(tmp_path / "stranger.key", archive.generate_signer())
    ids = ids_in(tmp_path, 3)
    stranger = ["--signer", tmp_path / "stranger.key", "--identity", folder / "me.key"]
    cases = [
        (["--ids", ids_in(tmp_path, 999), *opened(keys)], 3, "not in it"),
        (["--ids", ids, "--signer", folder / "signer.key"], 6, "is sealed"),
        (["--ids", ids, *stranger], 6, "signed"),
        (["--ids", ids, *opened(keys), "--method", "group-privacy"], 3, "a private run"),
        (["--ids", ids, *opened(keys), "--method", "magic"], 3, "sharded, rewind"),
        (["--ids", ids, *opened(keys), "--data", "digits"], 3, "without"),
        (["--ids", tmp_path / "none.csv", *opened(keys)], 3, "No such file"),
    ]
    for words, code, message in cases:
        assert message in command("forget", sharded, "--out", out, *words, code=code)
        assert not out.exists()
    with locked_folder(sharded):
        told = command("forget", sharded, "--out", out, "--ids", ids, *opened(keys), code=3)
    assert "under way" in told
    assert {path: path.read_bytes() for path in sharded.rglob("*") if path.is_file()} == before


def test_a_forged_certificate_of_before_is_refused_before_anything_is_done(
    command, sharded, keys, tmp_path
):
    forged = tmp_path / "run"
    shutil.copytree(sharded, forged)
    command("forget", sharded, "--ids", ids_in(tmp_path, 3), "--out", tmp_path / "b", *opened(keys))
    text = (tmp_path / "b/certificate.json").read_text()
    (forged / "certificate.json").write_text(text.replace('people\\":1', 'people\\":2', 1))
    told = command("forget", forged, "--ids", ids_in(tmp_path, 9), "--out", tmp_path / "c",
                   *opened(keys), code=6)  # fmt: skip
    assert "does not hold" in told
    assert not (tmp_path / "c").exists()


def test_the_certificate_of_another_model_is_refused(command, sharded, keys, tmp_path):
    other = tmp_path / "run"
    shutil.copytree(sharded, other)
    command("forget", sharded, "--ids", ids_in(tmp_path, 3), "--out", tmp_path / "b", *opened(keys))
    shutil.copy(tmp_path / "b/certificate.json", other)
    told = command("forget", other, "--ids", ids_in(tmp_path, 9), "--out", tmp_path / "c",
                   *opened(keys), code=3)  # fmt: skip
    assert "left this model before" in told
    # And a certified run is neither replaced nor resumed.
    words = ["forget", sharded, "--ids", ids_in(tmp_path, 9), "--out", tmp_path / "b"]
    assert "certificate.json" in command(*words, *opened(keys), "--force", code=3)
    assert "nothing to resume" in command(*words, *opened(keys), "--resume", code=3)


@pytest.mark.parametrize(("before", "after", "said"), [(0.95, 0.84, True), (0.95, 0.86, False)])
def test_a_model_that_is_much_worse_than_before_is_told(
    command, sharded, keys, tmp_path, monkeypatch, before, after, said
):
    def with_accuracy(record, accuracy):
        return replace(record, results=(replace(record.results[-1], accuracy=accuracy),))

    def forgetting(*args, **named):
        found = forget(*args, **named)
        source = replace(found.source, record=with_accuracy(found.source.record, before))
        record = with_accuracy(found.run.record, after)
        return replace(found, source=source, run=replace(found.run, record=record))

    monkeypatch.setattr("secure_cnn.cli.forget.forget", forgetting)
    words = ["--ids", ids_in(tmp_path, 3), "--out", tmp_path / "new", *opened(keys)]
    told = command("forget", sharded, *words)
    assert ("accuracy on test images fell from 95.0 to 84.0 %" in told) == said
    assert "destroy the old model" in told


def test_of_an_unchanged_model_the_images_alone_are_to_be_deleted(command, keys, shapes, tmp_path):
    recipe = Recipe(out=tmp_path / "run", data=shapes, epochs=1, batch_size=64, model="compact",
                    epsilon=1.0, baseline=False)  # fmt: skip
    run(recipe)
    told = command("forget", tmp_path / "run", "--ids", ids_in(tmp_path, 3), "--out",
                   tmp_path / "new", "--signer", keys[0] / "signer.key")  # fmt: skip
    assert "method: group-privacy" in told
    assert "the model is unchanged and stays" in told
    assert "destroy the old model" not in told


def test_a_killed_command_goes_on_to_the_same_model(command, sharded, keys, shapes, tmp_path):
    ids, out = ids_in(tmp_path, 3, 4, 5, 6), tmp_path / "after"
    words = ["forget", sharded, "--ids", ids, "--out", out, *opened(keys)]
    running = subprocess.Popen(
        [sys.executable, "-m", "secure_cnn", *map(str, words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while running.poll() is None and not list(out.glob("shards/shard-*")):
        time.sleep(0.01)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    assert not (out / "certificate.json").exists()
    command(*words, "--resume")
    whole = tmp_path / "whole"
    command("forget", sharded, "--ids", ids, "--out", whole, *opened(keys))
    first, second = (RunRecord.read(each / "run.json") for each in (out, whole))
    assert first.model_digest == second.model_digest
    # Killed before its certificate, a finished one is certified; with others it is not.
    (out / "certificate.json").unlink()
    other = ["forget", sharded, "--ids", ids_in(tmp_path, 8), "--out", out, *opened(keys)]
    assert "others left" in command(*other, "--resume", code=3)
    command(*words, "--resume")
    assert (out / "certificate.json").is_file()


def test_a_method_without_a_guarantee_is_held_against_models_without_them(
    command, keys, shapes, tmp_path
):
    folder, _, signer = keys
    run(Recipe(out=tmp_path / "run", data=shapes, model="compact", epochs=6))
    ids = ids_in(tmp_path, 3, 8, 20, 31)
    words = ["forget", tmp_path / "run", "--ids", ids, "--out", tmp_path / "new",
             "--signer", folder / "signer.key", "--method", "neggrad+"]  # fmt: skip
    assert "has no guarantee" in command(*words, code=3)
    told = command(*words, "--no-guarantee", "--oracles", "2", "--margin", "5")
    assert "beside models trained without them: verdict: " in told
    assert "; direction: " in told
    # Of four images and two oracles next to nothing is known, but no share is above 100.
    assert float(re.search(r" points \([\d.]+ to ([\d.]+)\)", told)[1]) <= 100
    path = tmp_path / "new/certificate.json"
    value = archive.verify_certificate(path, trusted=[signer.verifier]).value
    assert "no guarantee" in value.guarantee
    gaps = [each for each in value.evidence if "in points" in each.name]
    assert [each.n for each in gaps] == [2] * 4
    again = next(each for each in value.evidence if "known again" in each.name)
    assert (again.n, again.value >= 0) == (2, True)
    assert "who left is known again" in told
    # By another method it is not certified.
    path.unlink()
    assert "another method" in command(*words[:-2], "--resume", code=3)
    other = [*words[:-1], "ssd", "--no-guarantee", "--resume"]
    assert "another method" in command(*other, code=3)
