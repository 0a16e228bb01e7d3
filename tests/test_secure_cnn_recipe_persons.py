"""A run that protects persons: planned, trained, recorded, claimed and resumed as such."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer.testing
from PIL import Image

import privacy
from privacy.persons import Persons
from secure_cnn.checkpoint import read_model
from secure_cnn.cli import app
from secure_cnn.data import load_data
from secure_cnn.data.groups import one_name
from secure_cnn.errors import RunError
from secure_cnn.interruption import StopRequest
from secure_cnn.recipe import Recipe, run
from secure_cnn.recipe import training as training_room
from secure_cnn.recipe.notes import notes_before
from secure_cnn.recipe.persons import GROUPED_NOTE, group_cost_of, samples_of
from secure_cnn.recipe.seams import make_plan
from secure_cnn.record import RunRecord

PERSONS = 30


def people(root: Path, persons: int = PERSONS) -> Path:
    """Two classes of drawn images, thirty persons with one to four images in each."""
    random = np.random.default_rng(0)
    for label, kind in enumerate(("dark", "light")):
        for person in range(persons):
            folder = root / kind / f"p{person}"
            folder.mkdir(parents=True)
            for number in range(1 + person % 4):
                pixels = random.integers(0, 128, (8, 8)) + 127 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return root


def recipe_of(tmp_path: Path, **changed) -> Recipe:
    """Two turns of every person, three images each."""
    settings = {
        "data": tmp_path / "people",
        "out": tmp_path / "run",
        "epochs": 2,
        "batch_size": 6,
        "epsilon": 8.0,
        "unit": "person",
        "groups": "folder",
        "images_per_person": 3,
        "robust_samples": 2,
        "baseline": False,
    }
    return Recipe(**{**settings, **changed})


def test_a_run_protects_persons_and_says_so(tmp_path):
    """In the plan, in the record, in the claims and on the page."""
    people(tmp_path / "people")
    recipe = recipe_of(tmp_path)
    data = load_data(recipe.data, groups="folder", seed=recipe.seed)
    persons = len(set(data.groups))
    assert persons < PERSONS < len(data.train)
    done = run(recipe)
    terms = done.record.privacy
    assert (terms.unit, terms.images_per_person) == ("person", 3)
    assert terms.relation == "add or remove one person"
    assert terms.sampling_rate == 6 / persons
    assert terms.delta == min(1e-5, 0.1 / persons)
    claims = read_model(done.folder.model, unlocking=None).claims
    assert claims["privacy"]["unit"] == "person"
    assert claims["privacy"]["images_per_person"] == 3
    assert claims["data"]["groups"] == "folder"
    page = done.folder.page.read_text(encoding="utf-8")
    assert "person in the training data, with all their images" in page
    assert "each person joining a step with probability" in page
    assert RunRecord.read(done.folder.root / "run.json").privacy == terms


def test_copies_and_persons_go_together(tmp_path):
    """Two copies of each of up to three images."""
    people(tmp_path / "people")
    recipe = recipe_of(tmp_path, copies=2, flip=True, average_decay=0.0)
    assert run(recipe).record.status == "complete"


@pytest.mark.slow
def test_adversarial_examples_of_persons_are_made_row_by_row(tmp_path):
    """Both protections in one step, and copies too."""
    people(tmp_path / "people")
    record = run(recipe_of(tmp_path, eps=0.05, attack="fgsm", copies=2, epochs=1)).record
    assert record.status == "complete"
    assert record.results[-1].variant == "private+fgsm"


def test_from_the_command_line_with_a_csv_file(tmp_path):
    """As people type it; evaluated on the same side of the split."""
    root = people(tmp_path / "people")
    table = tmp_path / "whose.csv"
    files = sorted(root.rglob("*.png"))
    rows = [f"{file.relative_to(root).as_posix()},{file.parent.name}" for file in files]
    table.write_text("path,person\n" + "\n".join(rows))
    out, cli = tmp_path / "run", typer.testing.CliRunner()
    said = cli.invoke(
        app,
        [
            *("train", "--data", str(root), "--out", str(out), "--epochs", "1", "--no-baseline"),
            *("--epsilon", "8", "--unit", "person", "--groups", str(table)),
        ],
    )
    assert said.exit_code == 0, said.output
    record = RunRecord.read(out / "run.json")
    assert record.privacy.images_per_person == 8
    assert record.claims["data"]["groups"] == "file"
    assert str(table) not in json.dumps(dict(record.claims))
    model = str(out / "checkpoints" / "model.safetensors")
    said = cli.invoke(app, ["evaluate", model, "--data", str(root), "--groups", str(table)])
    assert said.exit_code == 0, said.output


@pytest.mark.slow
def test_a_run_of_persons_is_audited_with_canaries_that_are_persons(tmp_path):
    """The recipe's own training, put together as it was."""
    people(tmp_path / "people", persons=48)
    run(recipe_of(tmp_path, epochs=1, average_decay=0.0))
    said = typer.testing.CliRunner().invoke(
        app,
        [
            *("audit", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "audit")),
            *("--canaries", "4", "--steps", "20"),
        ],
    )
    assert said.exit_code == 0, said.output
    report = json.loads((tmp_path / "audit" / "audit.json").read_text())["report"]
    assert (report["unit"], report["passed"]) == ("person", True)


def test_an_array_of_the_file_is_enough(tmp_path):
    """No option names it; who is in both parts is refused."""
    images = np.random.default_rng(0).integers(0, 255, (60, 8, 8)).astype(np.uint8)
    labels, groups = np.arange(60) % 2, np.arange(60) // 4
    np.savez(tmp_path / "a.npz", images=images, labels=labels, groups=groups)
    recipe = recipe_of(tmp_path, data=tmp_path / "a.npz", groups=None)
    data = load_data(recipe.data)
    assert samples_of(recipe, data) == len(set(data.groups)) < 15
    both = {"test_images": images[:4], "test_labels": labels[:4], "test_groups": groups[:4]}
    np.savez(tmp_path / "b.npz", images=images, labels=labels, groups=groups, **both)
    with pytest.raises(RunError, match="on one side, got 1 persons"):
        run(replace(recipe, data=tmp_path / "b.npz"))
    assert not (tmp_path / "run").exists()


def test_persons_must_be_known(tmp_path):
    """Before the folder is touched."""
    with pytest.raises(RunError, match="expected to know whose each image of digits is"):
        run(recipe_of(tmp_path, data="digits", groups=None))
    assert not (tmp_path / "run").exists()


def test_folders_that_are_persons_are_cut_by_persons_once_that_is_said(tmp_path):
    """A cut by image put them on both sides; the refusal names the option, and it helps."""
    people(tmp_path / "people")
    recipe = recipe_of(tmp_path, groups=None)
    with pytest.raises(RunError, match=r"on one side, .*--groups folder \(groups\) cuts"):
        samples_of(recipe, load_data(recipe.data))
    said = replace(recipe, groups="folder")
    assert samples_of(said, load_data(said.data, groups="folder")) > 1


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"epsilon": None}, "unit=person: expected epsilon with it"),
        ({"unit": "example"}, "images_per_person: expected unit=person with it.*protect persons"),
        ({"unit": "user"}, "unit: expected example or person, got user"),
        ({"images_per_person": 0}, "images_per_person: expected a whole number >= 1"),
        ({"groups": 7}, "groups: expected folder, or a path"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, changed, says):
    """When the recipe is made."""
    with pytest.raises(RunError, match=says):
        recipe_of(tmp_path, **changed)


@pytest.mark.slow
def test_a_run_of_images_says_what_epsilon_is_for_who_has_several(tmp_path, capsys):
    """Folders inside class folders may be persons; figures of the data are told, not written."""
    people(tmp_path / "people")
    recipe = recipe_of(tmp_path, unit="example", images_per_person=None, groups=None, epochs=1)
    done = run(recipe)
    data = load_data(recipe.data, seed=recipe.seed)
    plan = make_plan(recipe, len(data.train))
    note = group_cost_of(plan, data)
    assert GROUPED_NOTE in done.record.notes
    assert note not in (done.folder.root / "run.json").read_text(encoding="utf-8")
    largest = max(data.groups.count(each) for each in set(data.groups))
    theirs = privacy.group_epsilon([plan.event()], plan.delta, size=largest)
    assert f"for a person with {largest} it is {theirs:.3g}" in note
    told = " ".join(capsys.readouterr().err.split())
    assert f"note: {' '.join(note.split())}" in told
    assert group_cost_of(make_plan(recipe_of(tmp_path), 20), data) == ""


def test_a_state_of_other_persons_is_not_gone_on_from(tmp_path, monkeypatch):
    """As many persons, but others: epsilon would be about neither."""
    root = people(tmp_path / "people")
    table = tmp_path / "whose.csv"
    files = sorted(root.rglob("*.png"))

    def name(owners: list[str]) -> None:
        rows = [f"{f.relative_to(root).as_posix()},{o}" for f, o in zip(files, owners, strict=True)]
        table.write_text("path,person\n" + "\n".join(rows))

    owners = [file.parent.name for file in files]
    name(owners)
    recipe = recipe_of(tmp_path, groups=table)
    data = load_data(root, groups=table, seed=recipe.seed)
    monkeypatch.setattr(training_room, "train", stopped_train(training_room.train))
    assert run(recipe).record.status == "interrupted"
    monkeypatch.undo()
    # Two persons of the training part change their names for one image each.
    here = sorted(set(data.groups))
    swapped = dict(zip(here[:2], reversed(here[:2]), strict=True))
    first = {person: owners.index(person) for person in swapped}
    for person, place in first.items():
        owners[place] = swapped[person]
    name(owners)
    assert load_data(root, groups=table, seed=recipe.seed).fingerprint == data.fingerprint
    with pytest.raises(RunError, match="trained with other persons"):
        run(recipe, resume=True)


def stopped_train(train):
    """`train` that is asked to stop at its first step."""

    def stopping(*args, stop: StopRequest, **settings):
        stop.requested = True
        return train(*args, stop=stop, **settings)

    return stopping


def test_the_record_of_persons_says_what_of_their_images_is_public(tmp_path):
    """A person changes the number of images by several; a plan of images has no such note."""
    images = Recipe(out=tmp_path / "images", epsilon=8.0)
    said = [" ".join(notes_before(recipe)) for recipe in (recipe_of(tmp_path), images)]
    assert ["is taken as public" in words for words in said] == [True, False]


def test_ids_are_spelt_by_one_rule_in_files_and_in_loops():
    """Blanks around them and the encoding of accents make no other person; a letter does."""
    spelt = ["Andr\u00e9", "Andre\u0301", " Andr\u00e9\t", "Andre", "andr\u00e9"]
    alike = [len(set(map(one_name, spelt))), len(Persons.of(spelt, examples=len(spelt)))]
    assert alike == [3, 3]
