"""People leave a run: the cut into shards, the request, and what each way of forgetting gives."""

import shutil
from dataclasses import replace
from functools import partial
from itertools import pairwise, permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.leaving import csv_file, data_of, forget_in, some_rows

import privacy
from secure_cnn import Recipe, archive, run
from secure_cnn.checkpoint import Sealing, Unlocking, model_digest, read_model, write_model
from secure_cnn.data import Split, load_data
from secure_cnn.ensemble import Ensemble
from secure_cnn.errors import ModelError, RunError
from secure_cnn.interruption import Stopped
from secure_cnn.leakage import target_of
from secure_cnn.models import Architecture
from secure_cnn.unlearning import Case, Forgetting, certify, forget, requests, run_sharded
from secure_cnn.unlearning import sharded as sharded_module
from secure_cnn.unlearning.inventory import Inventory
from secure_cnn.unlearning.methods import units_of
from secure_cnn.unlearning.shards import epochs_of_a_stage, image_bytes, stages_of

SHARDED = Recipe(out="", shards=2, slices=3, epochs=2, model="compact", shift=1)


def read_request(path, data):
    """Of a run that has all of these images."""
    return requests.read_request(path, Inventory.of(data).recognised(data))


@pytest.fixture
def keys():
    me, signer = archive.generate_identity(), archive.generate_signer()
    return Sealing(recipients=(me.recipient,), signer=signer), Unlocking(identity=me)


# The cut


@settings(max_examples=25, deadline=None)
@given(
    order=st.permutations(range(30)),
    left=st.sets(st.integers(0, 29), max_size=10),
    seed=st.integers(0, 5),
)
def test_where_an_image_is_depends_on_nobody_else(order, left, seed):
    data, recipe = data_of(30), replace(SHARDED, seed=seed)
    rows = [row for row in order if row not in left]
    every, others = stages_of(recipe, data), stages_of(recipe, some_rows(data, rows))
    for of_all, of_others in zip(every, others, strict=True):
        for before, after in zip(of_all, of_others, strict=True):
            assert [row for row in before.rows.tolist() if row not in left] == [
                rows[row] for row in after.rows.tolist()
            ]


def test_every_image_is_in_one_shard_and_each_stage_has_the_ones_before():
    data = data_of(60)
    stages = stages_of(SHARDED, data)
    assert sorted(row for of in stages for row in of[-1].rows.tolist()) == list(range(60))
    for of_shard in stages:
        for before, after in pairwise(of_shard):
            assert after.rows[: len(before.rows)].tolist() == before.rows.tolist()
            assert len(after.rows) > len(before.rows)


def test_another_seed_cuts_otherwise():
    data = data_of(60)
    first, second = (stages_of(replace(SHARDED, seed=seed), data)[0][-1].rows for seed in (0, 1))
    assert first.tolist() != second.tolist()


def test_the_images_of_a_person_are_in_one_slice():
    groups = tuple(f"person {row % 7}" for row in range(60))
    slice_of = {}
    for of_shard in stages_of(SHARDED, data_of(60, groups=groups)):
        for row in of_shard[-1].rows.tolist():
            number = next(stage.slice for stage in of_shard if row in stage.rows.tolist())
            slice_of.setdefault(groups[row], set()).add((of_shard[0].shard, number))
    assert all(len(found) == 1 for found in slice_of.values())
    # The control: rows of nobody known are elsewhere.
    alone = stages_of(SHARDED, data_of(60))
    assert {row for of in alone for row in of[0].rows.tolist()} != {
        row for of in stages_of(SHARDED, data_of(60, groups=groups)) for row in of[0].rows.tolist()
    }


@pytest.mark.parametrize(("epochs", "slices", "expected"), [(20, 1, 20), (20, 3, 10), (1, 50, 1)])
def test_a_shard_takes_about_as_many_epochs(epochs, slices, expected):
    recipe = Recipe(out="", epochs=epochs, shards=2, slices=slices)
    assert epochs_of_a_stage(recipe) == expected


def test_a_shard_without_images_has_no_network_and_training_says_so(tmp_path):
    recipe = replace(SHARDED, out=tmp_path / "run", shards=30, slices=1, epochs=1)
    done = run_sharded(recipe, data=data_of(20))
    filled = [of for of in stages_of(recipe, data_of(20)) if len(of[-1].rows)]
    assert len(read_model(done.folder.model, unlocking=None).model.members) == len(filled) < 20
    stages = {path.stem for path in done.folder.shards.glob("shard-*")}
    assert stages == {of[-1].name for of in filled}
    told = " ".join(done.record.notes)
    assert f"in one network of the {len(filled)}" in told
    single = sum(len(of[-1].rows) == 1 for of in filled)
    assert f"{30 - len(filled)} are without images" in told
    assert f"{single} are of one image alone" in told
    # The control: where the shards are full nothing is said.
    full = run_sharded(replace(SHARDED, out=tmp_path / "full", epochs=1), data=data_of())
    assert "alone" not in " ".join(full.record.notes)


@pytest.mark.parametrize("change", [{"epsilon": 1.0}, {"guard": True, "eps": 0.1}])
def test_what_does_not_go_with_shards_is_refused(change):
    with pytest.raises(RunError, match=r"shards|cut into"):
        replace(SHARDED, **change)


def test_run_itself_takes_no_shards_and_shards_take_no_one_training(tmp_path):
    with pytest.raises(RunError, match="run_sharded"):
        run(replace(SHARDED, out=tmp_path / "run"))
    with pytest.raises(RunError, match="use run"):
        run_sharded(Recipe(out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# The ensemble


def test_the_mean_of_probabilities_answers():
    first, second = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    images = torch.randn(5, 4)
    expected = (first(images).softmax(1) + second(images).softmax(1)) / 2
    both = Ensemble([first, second])
    assert torch.allclose(both(images).exp(), expected, atol=1e-6)
    assert both.votes(images).sum(1).tolist() == [2] * 5


def test_an_architecture_of_members_comes_back_from_plain_values():
    own = Architecture(
        model="compact", channels=1, height=8, width=8, classes=("a", "b"), members=3
    )
    assert Architecture.from_dict(own.to_dict()) == own
    assert len(own.build().members) == len(own.blank().members) == 3
    assert "members" not in own.member.to_dict()
    for members in (0, 257, True, "3"):
        with pytest.raises(ModelError, match="members"):
            Architecture.from_dict({**own.to_dict(), "members": members})


# Training in shards


def test_a_run_in_shards_is_a_run(tmp_path):
    done = run_sharded(replace(SHARDED, out=tmp_path / "run"), data=data_of())
    assert done.record.status == "complete"
    assert done.folder.page.is_file()
    loaded = read_model(done.folder.model, unlocking=None)
    assert model_digest(loaded.model) == done.record.model_digest
    names = {path.name for path in done.folder.shards.iterdir()}
    assert "shard-001-slice-003.safetensors" in names
    assert "inventory.safetensors" in names
    with pytest.raises(RunError, match="is complete"):
        run_sharded(replace(SHARDED, out=tmp_path / "run"), data=data_of(), resume=True)
    again = run_sharded(replace(SHARDED, out=tmp_path / "run"), data=data_of(), force=True)
    assert again.record.model_digest == done.record.model_digest


def test_an_interrupted_run_goes_on_with_the_stages_that_are_done(tmp_path, monkeypatch):
    recipe, data = replace(SHARDED, out=tmp_path / "run"), data_of()
    whole = run_sharded(replace(recipe, out=tmp_path / "whole"), data=data)
    trained, calls = sharded_module.train_once, []

    def cut_short(*arguments, **named):
        calls.append(1)
        if len(calls) == 3:
            raise Stopped
        return trained(*arguments, **named)

    monkeypatch.setattr(sharded_module, "train_once", cut_short)
    stopped = run_sharded(recipe, data=data)
    assert stopped.record.status == "interrupted"
    assert stopped.model is None
    other = data_of(seed=1)
    with pytest.raises(RunError, match="data changed"):
        run_sharded(recipe, data=other, resume=True)
    with pytest.raises(RunError, match="other settings: epochs"):
        run_sharded(replace(recipe, epochs=3), data=data, resume=True)
    calls.clear()
    monkeypatch.setattr(
        sharded_module, "train_once", lambda *a, **n: calls.append(1) or trained(*a, **n)
    )
    done = run_sharded(recipe, data=data, resume=True)
    assert len(calls) == 6 - 2
    assert done.record.model_digest == whole.record.model_digest


def test_a_signed_run_goes_on_from_stages_of_its_signer_alone(tmp_path, keys, monkeypatch, quick):
    """Anybody can seal to a public key: a stage of a stranger is refused, and its own are kept."""
    sealing, unlocking = keys
    data, recipe = data_of(), replace(SHARDED, out=tmp_path / "run")
    stranger = replace(sealing, signer=archive.generate_signer())
    other = run_sharded(replace(recipe, out=tmp_path / "x"), data=data, sealing=stranger)
    trained, calls = sharded_module.train_once, []

    def counted(*arguments, **named):
        calls.append(1)
        if len(calls) == 3:
            raise Stopped
        return trained(*arguments, **named)

    monkeypatch.setattr(sharded_module, "train_once", counted)
    stopped = run_sharded(recipe, data=data, sealing=sealing)
    resume = partial(
        run_sharded, recipe, data=data, sealing=sealing, unlocking=unlocking, resume=True
    )
    stage = stopped.folder.shards / "shard-000-slice-001.sealed"
    own = stage.read_bytes()
    stage.write_bytes((other.folder.shards / stage.name).read_bytes())
    with pytest.raises(archive.UntrustedSigner):
        resume()
    stage.write_bytes(own)
    with pytest.raises(RunError, match="name its signer again"):
        resume(sealing=replace(sealing, signer=None))
    done = resume()
    assert len(calls) == 3 + 4
    assert done.record.model_digest == other.record.model_digest


def test_a_stage_that_was_changed_is_refused_and_one_of_another_training_is_not_taken(tmp_path):
    recipe, data = replace(SHARDED, out=tmp_path / "run"), data_of()
    first = run_sharded(recipe, data=data)
    stage = first.folder.shards / "shard-000-slice-001.safetensors"
    other = run_sharded(replace(recipe, out=tmp_path / "other", seed=9), data=data)
    raw = bytearray(stage.read_bytes())
    raw[-3] ^= 1
    elsewhere = stages_of(recipe, data)[1][0].rows[0].item()
    ids = csv_file(tmp_path / "ids", "index", [elsewhere])
    wanted = Forgetting(run=tmp_path / "run", ids=ids, out=tmp_path / "new")
    stage.write_bytes(raw)
    with pytest.raises(RunError, match="was changed"):
        forget_in(wanted, data)
    stage.write_bytes((other.folder.shards / stage.name).read_bytes())
    found = forget_in(replace(wanted, out=tmp_path / "newer"), data)
    assert found.work.trained == 6  # of the one shard who left, of the other the stage is gone


# Forgetting


@pytest.mark.parametrize("sealed", [False, True])
def test_what_is_left_is_bit_for_bit_a_training_without_them(tmp_path, keys, sealed):
    data = data_of()
    own = dict(zip(("sealing", "unlocking"), keys, strict=True)) if sealed else {}
    sealing = {name: value for name, value in own.items() if name == "sealing"}
    recipe = replace(SHARDED, out=tmp_path / "run")
    before = run_sharded(recipe, data=data, **sealing)
    ids = csv_file(tmp_path / "ids.csv", "index", [3, 17])
    found = forget_in(Forgetting(run=tmp_path / "run", ids=ids, out=tmp_path / "new"), data, **own)
    rows = [row for row in range(40) if row not in (3, 17)]
    oracle = run_sharded(replace(recipe, out=tmp_path / "oracle"), data=some_rows(data, rows))
    assert found.run.record.model_digest == oracle.record.model_digest
    assert before.record.model_digest != oracle.record.model_digest
    assert found.weight_change > 0
    assert 0 < found.work.trained < found.work.stages
    assert found.method.name == "sharded"
    assert found.method.guarantee.exact
    # And from there on, the data as they were or without who left.
    more = csv_file(tmp_path / "more.csv", "index", [5])
    again = forget_in(
        Forgetting(run=tmp_path / "new", ids=more, out=tmp_path / "newer"), data, **own
    )
    assert again.source.there.others == 2
    rows.remove(5)
    oracle = run_sharded(replace(recipe, out=tmp_path / "oracle2"), data=some_rows(data, rows))
    assert again.run.record.model_digest == oracle.record.model_digest


@pytest.mark.parametrize("shards", [2, 4])
def test_a_person_alone_in_a_shard_leaves_with_its_network(tmp_path, shards):
    def crowd(persons):
        return data_of(40, groups=tuple(f"{n}" for n in persons for _ in range(40 // shards)))

    recipe = replace(SHARDED, shards=shards, slices=2, epochs=1, out=tmp_path / "run")
    # So many persons, and one in each shard.
    data = next(each for each in map(crowd, permutations(range(20), shards)) if full(recipe, each))
    before = run_sharded(recipe, data=data)
    assert f"{shards} are of one person alone" in " ".join(before.record.notes)
    leaving = data.groups[0]
    rows = [row for row in range(40) if data.groups[row] != leaving]
    ids = csv_file(tmp_path / "ids.csv", "person", [leaving])
    wanted = Forgetting(run=tmp_path / "run", ids=ids, out=tmp_path / "new")
    found = forget_in(wanted, data)
    oracle = run_sharded(replace(recipe, out=tmp_path / "oracle"), data=some_rows(data, rows))
    assert found.run.record.model_digest == oracle.record.model_digest
    assert (found.work.trained, found.work.stages) == (0, 2 * (shards - 1))
    assert found.lost_stages == 0
    # What the weights lost is in the change, and it can be certified and taken up.
    assert 0 < found.weight_change < float("inf")
    again = forget_in(wanted, data, resume=True)
    assert again.weight_change == found.weight_change
    signer = archive.generate_signer()
    certify(again, signer=signer, case=Case(), earlier=None)
    loaded = read_model(found.run.folder.model, unlocking=None)
    assert model_digest(loaded.model) == found.run.record.model_digest


def full(recipe, data):
    return all(len(of_shard[-1].rows) for of_shard in stages_of(recipe, data))


def test_only_the_stages_from_theirs_on_are_trained_again(tmp_path):
    data, recipe = data_of(), replace(SHARDED, out=tmp_path / "run")
    run_sharded(recipe, data=data)
    for of_shard in stages_of(recipe, data):
        for stage in of_shard:
            row = stage.rows[-1].item()  # the last one is of this very slice
            ids = csv_file(tmp_path / "ids.csv", "index", [row])
            out = tmp_path / stage.name
            found = forget_in(Forgetting(run=tmp_path / "run", ids=ids, out=out), data)
            assert found.work.trained == recipe.slices - stage.slice + 1
            assert found.lost_stages == 0
            expected = (
                sum(len(each.rows) for each in of_shard[stage.slice - 1 :]) - found.work.trained
            )
            assert found.work.images == epochs_of_a_stage(recipe) * expected


def test_one_network_in_slices_goes_back_to_the_state_before_they_were_seen(tmp_path):
    data, recipe = data_of(), replace(SHARDED, shards=1, slices=4, out=tmp_path / "run")
    trained = run_sharded(recipe, data=data)
    assert any("its state before each is kept" in note for note in trained.record.notes)
    last = stages_of(recipe, data)[0][-1]
    row = last.rows[-1].item()
    ids = csv_file(tmp_path / "ids.csv", "index", [row])
    wanted = Forgetting(run=tmp_path / "run", ids=ids, out=tmp_path / "new")
    with pytest.raises(RunError, match="take rewind"):
        forget_in(replace(wanted, method="sharded"), data)
    found = forget_in(wanted, data)
    assert found.method.name == "rewind"
    assert found.method.guarantee.exact
    assert (found.work.trained, found.work.stages) == (1, 4)
    rows = [each for each in range(40) if each != row]
    oracle = run_sharded(replace(recipe, out=tmp_path / "oracle"), data=some_rows(data, rows))
    assert found.run.record.model_digest == oracle.record.model_digest


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, "kept no state from within its first epoch, which shows everybody"),
        ({"epsilon": 5.0, "baseline": False}, "in which step somebody was first drawn"),
        ({"shards": 2}, "take sharded"),
    ],
)
def test_without_states_from_before_nothing_is_rewound(tmp_path, shapes, changed, words):
    recipe = Recipe(out=tmp_path / "run", data=shapes, epochs=1, model="compact", **changed)
    (run_sharded if recipe.is_sharded else run)(recipe)
    ids = csv_file(tmp_path / "ids.csv", "index", [3])
    with pytest.raises(RunError, match=words):
        forget(Forgetting(run=tmp_path / "run", ids=ids, out=tmp_path / "new", method="rewind"))
    assert not (tmp_path / "new").exists()


def test_copies_of_an_image_leave_with_it(tmp_path):
    data = data_of()
    images = data.train.images.clone()
    images[20] = images[3]
    data = replace(data, train=Split(images=images, labels=data.train.labels))
    found = read_request(csv_file(tmp_path / "ids.csv", "index", [3]), data)
    assert (found.rows, found.people, found.copies) == ((3, 20), 1, 1)


def test_a_person_leaves_with_all_images(tmp_path):
    groups = tuple(f"person {row % 8}" for row in range(40))
    found = read_request(
        csv_file(tmp_path / "ids.csv", "person", ["person 1 ", "person 2"]), data_of(groups=groups)
    )
    assert (found.people, found.persons) == (2, ("person 1", "person 2"))
    assert set(found.rows) == {r for r in range(40) if r % 8 in (1, 2)}


@pytest.mark.parametrize(
    "text",
    [
        "index\n3\n17\n",
        "index\r3\r17\r",
        "\ufeffindex\r\n3\r\n17\r\n",
        "when;index;why\n1.2.;3;asked, by letter\n;17;\n;;\n",
        '\ufeff"Index";"why"\r\n"3";"a ""word"""\r\n"17";"two\nlines"\r\n\r\n',
        "why\tindex\na; b, c\t3\n\t 17 \n",
        'index,why\n3,"one, two"\n17,\n3,again\n',
    ],
)
def test_a_request_is_read_as_spreadsheets_write_it(tmp_path, text):
    path = tmp_path / "ids.csv"
    path.write_bytes(text.encode())
    assert read_request(path, data_of()).rows == (3, 17)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("index\n40\n", "of the test images"),
        ("index\n99\n", "an index of noise, got 99, not in it"),
        ("path\ncat/1.jpg\n", "the column index"),
        ("person\nann\n", "whose its images are"),
        ("index\n", "got none"),
        ("x" * 200_000, "got nothing in the first line"),
        ("index\n1\n2,3\n", "line 3: expected as many columns as in the first line, 1, got 2"),
        ("index;note\n1;late, by letter\n;ann\n", "line 3: expected an index, got an empty one"),
        ('index;note\n"1";"a" b\n', "line 2"),
        ("", "got nothing"),
        ("index;x,path\n1;2,3\n", "got index;x, path"),
        ("a,b\n1,2\n", "got a, b"),
        ("path,index\n1,2\n", "got path, index"),
        ("path;index\n1;2\n", "got path, index"),
        ("name;when\n1;2\n", "first line has path, index or person .* got name, when"),
        ("index\n\x00\xff\n", "save it as CSV UTF-8"),
        ("index\n" + "\n".join(str(row) for row in range(0, 40, 2)), "all images of cat"),
    ],
)
def test_requests_that_cannot_be_met_are_one_error(tmp_path, text, words):
    path = tmp_path / "ids.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(RunError, match=words):
        read_request(path, data_of())


def test_a_path_that_is_not_there_is_told_from_where_paths_count(tmp_path):
    data = data_of(20)
    named = [replace(p, ids=tuple(f"cat/{n}.jpg" for n in range(at, at + len(p))))
             for p, at in ((data.train, 0), (data.test, 20))]  # fmt: skip
    data = replace(data, train=named[0], test=named[1])
    ids = csv_file(tmp_path / "ids.csv", "path", ["wards/cat/1.jpg"])
    with pytest.raises(RunError, match="paths count from the data's folder on"):
        read_request(ids, data)
    assert read_request(csv_file(ids, "path", ["cat/1.jpg"]), data).rows == (1,)


def test_what_is_refused_changes_nothing(tmp_path, keys):
    sealing, unlocking = keys
    data = data_of()
    run_sharded(replace(SHARDED, out=tmp_path / "run"), data=data, sealing=sealing)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    ids = csv_file(tmp_path / "ids.csv", "index", [3])
    wanted = Forgetting(run=tmp_path / "run", ids=ids, out=tmp_path / "new")
    stranger = Unlocking(identity=archive.generate_identity())
    other = Sealing(recipients=sealing.recipients, signer=archive.generate_signer())
    for named, error in (
        ({"sealing": sealing}, archive.InvalidKey),
        ({"unlocking": unlocking}, archive.InvalidKey),
        ({"sealing": sealing, "unlocking": stranger}, archive.ArchiveError),
        ({"sealing": other, "unlocking": unlocking}, archive.UntrustedSigner),
    ):
        with pytest.raises(error):
            forget_in(wanted, data, **named)
        assert not (tmp_path / "new").exists()
    (tmp_path / "run/shards/shard-000-slice-002.sealed").unlink()
    found = forget_in(wanted, data, sealing=sealing, unlocking=unlocking)
    assert found.work.trained >= 2
    assert found.lost_stages == 2 - [
        stage.shard for of in stages_of(SHARDED, data) for stage in of[1:] if 3 in stage.rows
    ].count(0)
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert all(before[path] == raw for path, raw in after.items())


def test_a_run_without_shards_is_trained_anew_and_remembers_who_is_left(tmp_path, shapes):
    run(Recipe(out=tmp_path / "run", data=shapes, epochs=1, model="compact"))
    ids = csv_file(tmp_path / "ids.csv", "index", [0, 5])
    found = forget(Forgetting(run=tmp_path / "run", ids=ids, out=tmp_path / "new"))
    data = load_data(shapes)
    rows = [row for row in range(64) if row not in (0, 5)]
    oracle = run(
        Recipe(out=tmp_path / "oracle", data=shapes, epochs=1, model="compact"),
        data=some_rows(data, rows),
    )
    assert found.method.name == "retrain"
    assert found.run.record.model_digest == oracle.record.model_digest
    with pytest.raises(RunError, match="an index of shapes, got 0, 5, not in it"):
        forget(Forgetting(run=tmp_path / "new", ids=ids, out=tmp_path / "newer"))


def test_a_private_run_promised_it_all_along(tmp_path, shapes):
    recipe = Recipe(
        out=tmp_path / "run",
        data=shapes,
        epochs=1,
        batch_size=64,
        model="compact",
        epsilon=1.0,
        baseline=False,
    )
    plan = run(recipe).record.privacy
    steps = privacy.GaussianSteps(
        noise_multiplier=plan.noise_multiplier, sampling_rate=plan.sampling_rate, steps=plan.steps
    )
    bounds = [privacy.group_epsilon([steps], plan.delta, size=size) for size in (2, 3)]
    ids = csv_file(tmp_path / "ids.csv", "index", [0, 5])
    found = forget(Forgetting(run=tmp_path / "run", ids=ids, out=tmp_path / "new"))
    assert found.method.name == "group-privacy"
    assert found.weight_change == 0
    assert found.method.guarantee.epsilon == pytest.approx(bounds[0])
    # Who left before counts, and the limit is of all together.
    ids = csv_file(tmp_path / "more.csv", "index", [7])
    more = Forgetting(
        run=tmp_path / "new", ids=ids, out=tmp_path / "newer", largest_epsilon=bounds[0] * 1.01
    )
    with pytest.raises(RunError, match="above the limit"):
        forget(replace(more, method="group-privacy"))
    assert not (tmp_path / "newer").exists()
    assert forget(more).method.name == "retrain"
    wider = replace(more, out=tmp_path / "last", largest_epsilon=bounds[1] * 1.01)
    assert forget(wider).method.guarantee.epsilon == pytest.approx(bounds[1])


def test_the_inventory_finds_images_wherever_they_are():
    data = data_of()
    inventory = Inventory.of(data)
    assert Inventory.from_state(inventory.to_state()) == inventory
    found = inventory.recognised(data)
    assert found.data is data
    assert (found.inventory, found.missing, found.others) == (inventory, (), 0)
    pool = torch.cat([data.test.images, data.train.images.flip(0)])
    labels = torch.cat([data.test.labels, data.train.labels.flip(0)])
    moved = replace(
        data,
        train=Split(images=pool[:30], labels=labels[:30]),
        test=Split(images=pool[30:], labels=labels[30:]),
    )
    assert inventory.recognised(moved).data.fingerprint == data.fingerprint
    assert torch.equal(inventory.tested(moved).images, data.test.images)
    part = inventory.recognised(some_rows(data, range(39)))
    assert part.missing == inventory.train[39:]
    assert part.inventory == inventory.some(range(39), range(8))
    with pytest.raises(RunError, match=rf"1 \({inventory.train[39].image.hex()[:16]}\) of 40"):
        _ = part.whole
    # Under another key nothing is recognised: the control.
    other = replace(inventory, key=bytes(32))
    with pytest.raises(RunError, match="without any of 40"):
        other.recognised(data)
    assert other.tested(data) is None


def test_images_have_names_of_their_source(tmp_path, shapes):
    data = load_data(shapes)
    assert data.train.ids[:3] == ("0", "1", "2")
    assert data.test.ids[0] == "64"
    random = np.random.default_rng(0)
    from PIL import Image

    for name in ("cat/1", "cat/2", "dog/1", "dog/2"):
        path = tmp_path / "pets" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    pets = load_data(str(tmp_path / "pets"))
    assert sorted((*pets.train.ids, *pets.test.ids)) == [
        "cat/1.png",
        "cat/2.png",
        "dog/1.png",
        "dog/2.png",
    ]


def test_a_method_without_a_guarantee_is_asked_for_as_such(tmp_path, shapes):
    recipe = Recipe(out=tmp_path / "run", data=shapes, epochs=1, model="compact")
    run(recipe)
    ids = csv_file(tmp_path / "ids.csv", "index", [0, 5])
    wanted = Forgetting(run=tmp_path / "run", ids=ids, out=tmp_path / "new", method="neggrad+")
    with pytest.raises(RunError, match="has no guarantee"):
        forget(wanted)
    assert not (tmp_path / "new").exists()
    found = forget(replace(wanted, no_guarantee=True))
    assert found.weight_change > 0
    assert not found.method.guarantee.exact
    assert found.method.guarantee.epsilon is None
    loaded = read_model(found.run.folder.model, unlocking=None)
    assert loaded.claims["unlearned"] == {"method": "neggrad+", "guarantee": False}
    assert model_digest(loaded.model) == found.run.record.model_digest
    signer = archive.generate_signer()
    certify(found, signer=signer, case=Case(), earlier=None)
    told = archive.verify_certificate(
        tmp_path / "new/certificate.json", trusted=[signer.verifier]
    ).value
    assert "no guarantee" in told.guarantee
    assert (told.exact, told.epsilon) == (False, None)
    run_sharded(replace(SHARDED, out=tmp_path / "sharded", data=shapes))
    other = replace(wanted, run=tmp_path / "sharded", out=tmp_path / "x", no_guarantee=True)
    with pytest.raises(RunError, match="in shards for neggrad"):
        forget(other)


# What walked around the promises


def test_a_copy_of_somebody_else_is_one_more_person(tmp_path):
    groups = tuple(f"person {row}" for row in range(40))
    data = data_of(groups=groups)
    images = data.train.images.clone()
    images[[20, 30]] = images[3].clone()
    data = replace(data, train=Split(images=images, labels=data.train.labels))
    request = read_request(csv_file(tmp_path / "ids.csv", "person", ["person 3"]), data)
    source = SimpleNamespace(data=data)
    assert units_of(source, request, "person") == 3
    assert units_of(source, request, "example") == 3


def test_whose_an_image_is_cannot_change_between(tmp_path):
    inventory = Inventory.of(data_of(groups=("ann",) * 40))
    told = inventory.recognised(data_of(groups=("ann",) * 39 + ("bob",)))
    with pytest.raises(RunError, match="persons"):
        _ = told.whole


def test_a_persons_test_images_leave_with_them(tmp_path):
    data = replace(
        data_of(groups=tuple(f"person {row % 8}" for row in range(40))),
        test_groups=tuple(f"person {row}" for row in range(8)),
    )
    run_sharded(replace(SHARDED, out=tmp_path / "run"), data=data)
    ids = csv_file(tmp_path / "ids.csv", "person", ["person 3"])
    found = forget_in(Forgetting(run=tmp_path / "run", ids=ids, out=tmp_path / "new"), data)
    assert len(found.request.rows) == 5
    assert found.request.tested == (3,)
    assert len(found.data.test) == 7


def test_a_plain_file_in_a_sealed_ones_place_is_refused(tmp_path, keys):
    sealing, unlocking = keys
    data = data_of()
    done = run_sharded(replace(SHARDED, out=tmp_path / "run"), data=data, sealing=sealing)
    record = done.record
    plain = done.folder.model.with_suffix(".safetensors")
    architecture = read_model(done.folder.model, unlocking=unlocking).architecture
    write_model(plain, done.model, architecture, claims=record.claims, sealing=None)
    replace(record, checkpoints=(f"checkpoints/{plain.name}",)).write(done.folder.record)
    ids = csv_file(tmp_path / "ids.csv", "index", [3])
    wanted = Forgetting(run=tmp_path / "run", ids=ids, out=tmp_path / "new")
    found = forget_in(wanted, data, sealing=sealing, unlocking=unlocking)
    assert found.source.files.run.sealed
    done.folder.model.unlink()
    with pytest.raises(archive.NotSealed, match="expected a sealed model"):
        forget_in(replace(wanted, out=tmp_path / "x"), data, sealing=sealing, unlocking=unlocking)


def test_an_unsigned_run_is_left_only_where_that_is_said(tmp_path, keys):
    sealing, unlocking = keys
    data = data_of()
    run_sharded(
        replace(SHARDED, out=tmp_path / "run"), data=data, sealing=replace(sealing, signer=None)
    )
    ids = csv_file(tmp_path / "ids.csv", "index", [3])
    wanted = Forgetting(run=tmp_path / "run", ids=ids, out=tmp_path / "new")
    with pytest.raises(archive.UntrustedSigner):
        forget_in(wanted, data, sealing=sealing, unlocking=unlocking)
    found = forget_in(replace(wanted, unsigned=True), data, sealing=sealing, unlocking=unlocking)
    assert found.run.record.status == "complete"


def test_weights_to_start_from_are_an_assumption(tmp_path, shapes):
    before = run(Recipe(out=tmp_path / "before", data=shapes, epochs=1, model="compact"))
    recipe = replace(SHARDED, out=tmp_path / "run", data=shapes, weights=before.folder.model)
    run_sharded(recipe)
    ids = csv_file(tmp_path / "ids.csv", "index", [3])
    found = forget(Forgetting(run=tmp_path / "run", ids=ids, out=tmp_path / "new"))
    assert "SHA-256" in found.method.guarantee.assumptions[-1]


def test_who_left_before_stays_counted(tmp_path, shapes):
    recipe = Recipe(
        out=tmp_path / "run", data=shapes, epochs=1, batch_size=64, model="compact", epsilon=1.0,
        baseline=False,
    )  # fmt: skip
    run(recipe)
    ids = csv_file(tmp_path / "ids.csv", "index", [3])
    found = forget(Forgetting(run=tmp_path / "run", ids=ids, out=tmp_path / "new"))
    assert found.run.record.run_id != found.source.record.run_id
    shutil.rmtree(tmp_path / "new/shards")
    more = csv_file(tmp_path / "more.csv", "index", [9])
    with pytest.raises(RunError, match="put the inventory"):
        forget(Forgetting(run=tmp_path / "new", ids=more, out=tmp_path / "newer"))


def test_a_finished_run_is_taken_up_after_a_kill(tmp_path, shapes):
    run(Recipe(out=tmp_path / "run", data=shapes, epochs=1, model="compact"))
    ids = csv_file(tmp_path / "ids.csv", "index", [3])
    wanted = Forgetting(run=tmp_path / "run", ids=ids, out=tmp_path / "new")
    first = forget(wanted)
    again = forget(wanted, resume=True)
    assert again.run.record.model_digest == first.run.record.model_digest
    shutil.rmtree(tmp_path / "new/shards")
    again = forget(wanted, resume=True)
    assert again.run.record.model_digest == first.run.record.model_digest


def test_exact_and_unchanged_is_not_certified(tmp_path, shapes):
    run(Recipe(out=tmp_path / "run", data=shapes, epochs=1, model="compact"))
    ids = csv_file(tmp_path / "ids.csv", "index", [3])
    found = forget(Forgetting(run=tmp_path / "run", ids=ids, out=tmp_path / "new"))
    same = replace(found, run=replace(found.run, model=found.source.loaded.model))
    with pytest.raises(RunError, match="got the same"):
        certify(same, signer=archive.generate_signer(), case=Case(), earlier=None)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"received": "yesterday"}, "a time in UTC"),
        ({"received": "2999-01-01T00:00:00Z"}, "has come"),
        ({"received": "2026-02-02T00:00:00Z", "deadline": "2026-01-01T00:00:00Z"}, "not behind"),
        ({"ground": "x" * 5000}, "at most 4000"),
    ],
)
def test_what_the_controller_says_is_checked_at_once(told, words):
    with pytest.raises(RunError, match=words):
        Case(**told)


def test_the_new_run_is_not_inside_the_old_one(tmp_path):
    with pytest.raises(RunError, match="outside"):
        Forgetting(run=tmp_path, ids=tmp_path / "ids", out=tmp_path / "new")


def test_a_record_that_hides_privacy_is_refused(tmp_path, shapes):
    done = run(
        Recipe(
            out=tmp_path / "run",
            data=shapes,
            epochs=1,
            model="compact",
            epsilon=1.0,
            baseline=False,
        )
    )
    settings = {**done.record.settings, "epsilon": None}
    replace(done.record, settings=settings).write(done.folder.record)
    ids = csv_file(tmp_path / "ids.csv", "index", [3])
    with pytest.raises(RunError, match="privacy"):
        forget(Forgetting(run=tmp_path / "run", ids=ids, out=tmp_path / "new"))


# Images that are gone before


def test_images_that_were_deleted_leave_where_that_is_said(tmp_path, quick):
    """The model is the one without them, and the certificate names them by their digests."""
    data, recipe, signer = (
        data_of(),
        replace(SHARDED, out=tmp_path / "run"),
        archive.generate_signer(),
    )
    run_sharded(recipe, data=data)
    here = [row for row in range(40) if row != 5]
    deleted = some_rows(data, here)
    ids = csv_file(tmp_path / "ids.csv", "index", [here.index(17)])
    wanted = Forgetting(run=tmp_path / "run", ids=ids, out=tmp_path / "new")
    with pytest.raises(RunError, match=r"without 1 .* let them leave too"):
        forget_in(wanted, deleted)
    with pytest.raises(RunError, match="no training image is missing"):
        forget_in(replace(wanted, ids=None, missing_leave=True), data)
    assert not (tmp_path / "new").exists()
    for gone, asked in (((5, 17), ids), ((5,), None)):
        out = tmp_path / f"new-{len(gone)}"
        found = forget_in(replace(wanted, ids=asked, out=out, missing_leave=True), deleted)
        rows = [row for row in range(40) if row not in gone]
        oracle = run_sharded(replace(recipe, out=out / "oracle"), data=some_rows(data, rows))
        assert found.run.record.model_digest == oracle.record.model_digest
        shutil.rmtree(out / "oracle")
        assert found.lost_stages == 0
        path = certify(found, signer=signer, case=Case(), earlier=None)
        told = archive.verify_certificate(path, trusted=[signer.verifier])
        key = found.inventory.key
        assert set(told.value.requests) == {
            archive.certificates.keyed_digest(key, "image", image_bytes(data.train, row)).hex()
            for row in gone
        }
        assert told.value.images == len(gone)
        assert any(f"What 1 of the {len(gone)} images" in each for each in told.value.not_known)
    # The next certificate goes on from there, with data that are said to be the same.
    more = csv_file(tmp_path / "more.csv", "index", [0])
    again = Forgetting(run=out, ids=more, out=tmp_path / "last")
    last = certify(forget_in(again, deleted), signer=signer, case=Case(), earlier=told)
    archive.verify_certificate(last, trusted=[signer.verifier], previous=path)


def test_who_asks_by_name_leaves_with_images_that_were_deleted(tmp_path):
    data = data_of(groups=tuple(f"person {row % 8}" for row in range(40)))
    inventory = Inventory.of(data)
    ids = csv_file(tmp_path / "ids.csv", "person", ["person 3"])
    here = [row for row in range(40) if row % 8 != 3]
    found = requests.read_request(ids, inventory.recognised(some_rows(data, here)))
    assert (found.people, found.rows, len(found.missing)) == (1, (), 5)
    assert found.digests == (inventory.person("person 3"),)
    there = inventory.recognised(some_rows(data, here[1:]))
    with pytest.raises(RunError, match="without 1 "):
        requests.read_request(ids, there)
    found = requests.read_request(ids, there, missing_leave=True)
    assert found.digests == (inventory.person("person 3"), inventory.train[0].image)
    assert units_of(None, found, "person") == 2
    assert units_of(None, found, "example") == 6
    with pytest.raises(RunError, match="person 9, not in it"):
        requests.read_request(csv_file(tmp_path / "x.csv", "person", ["person 9"]), there)


def test_a_copy_of_an_image_that_was_deleted_leaves_too():
    data = data_of()
    images = data.train.images.clone()
    images[20] = images[3]
    data = replace(data, train=Split(images=images, labels=data.train.labels))
    rows = [row for row in range(40) if row != 3]
    there = Inventory.of(data).recognised(some_rows(data, rows))
    assert requests.read_request(None, there, missing_leave=True).rows == (19,)


def test_a_class_that_was_deleted_does_not_leave():
    data = data_of()
    cats = Inventory.of(data).recognised(some_rows(data, range(1, 40, 2)))
    with pytest.raises(RunError, match="all images of cat"):
        requests.read_request(None, cats, missing_leave=True)


def test_who_was_deleted_counts_in_a_private_run_and_is_not_asked_by_a_heuristic(
    tmp_path, shapes, quick
):
    recipe = Recipe(
        out=tmp_path / "run", data=shapes, epochs=1, batch_size=64, model="compact", epsilon=1.0,
        baseline=False,
    )  # fmt: skip
    plan = run(recipe).record.privacy
    ids = csv_file(tmp_path / "ids.csv", "index", [3])
    wanted = Forgetting(run=tmp_path / "run", ids=ids, out=tmp_path / "new")
    with pytest.raises(RunError, match="it has no inventory that says which"):
        forget_in(wanted, some_rows(load_data(shapes), range(1, 64)))
    forget(wanted)
    deleted = some_rows(load_data(shapes), range(2, 64))
    more = Forgetting(run=tmp_path / "new", ids=None, out=tmp_path / "x", missing_leave=True)
    found = forget_in(replace(more, out=tmp_path / "newer"), deleted)
    steps = privacy.GaussianSteps(
        noise_multiplier=plan.noise_multiplier, sampling_rate=plan.sampling_rate, steps=plan.steps
    )
    assert found.method.guarantee.epsilon == pytest.approx(
        privacy.group_epsilon([steps], plan.delta, size=3)
    )
    loaded = read_model(found.run.folder.model, unlocking=None)
    assert loaded.claims["data"]["left"] == 3
    with pytest.raises(RunError, match="measure the run before"):
        target_of(found.run.record, loaded, shapes)
    run(replace(recipe, out=tmp_path / "plain", epsilon=None))
    forget(replace(wanted, run=tmp_path / "plain", out=tmp_path / "after"))
    other = replace(more, run=tmp_path / "after", method="neggrad+", no_guarantee=True)
    with pytest.raises(RunError, match="all images of who leaves for neggrad"):
        forget_in(other, deleted)
