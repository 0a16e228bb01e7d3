"""`secure-cnn leakage`: the target's own recipe trains its shadow models, and what is kept."""

import copy
import json
import os
import re
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.leakage_records import extraction_of, inversion_of, record_of
from typer.testing import CliRunner

from privacy.leakage import MEMBERSHIP_ATTACKS
from secure_cnn import archive
from secure_cnn.checkpoint import Sealing, read_model
from secure_cnn.cli import app
from secure_cnn.cli.leakage import _demand
from secure_cnn.data import Split
from secure_cnn.errors import DataError, RunError
from secure_cnn.files import locked_folder
from secure_cnn.interruption import Stopped, StopRequest, stop_here
from secure_cnn.leakage import (
    ExtractionSettings,
    FixedPool,
    InversionSettings,
    LeakageSettings,
    MembershipSettings,
    Picture,
    Sharing,
    StudentTraining,
    Target,
    measure,
    measure_leakage,
    target_of,
)
from secure_cnn.leakage.earlier import keep_pictures, kept_pictures
from secure_cnn.leakage.measure import _notes
from secure_cnn.leakage.membership import LABEL_ONLY, _design
from secure_cnn.leakage.shadows import ShadowTraining
from secure_cnn.leakage.table_file import TableFolder, TableRecord, exposed_key
from secure_cnn.recipe import Recipe, RunFolder, run
from secure_cnn.recipe.outcome import privacy_record
from secure_cnn.recipe.seams import make_plan
from secure_cnn.record import (
    ExtractionRecord,
    InversionRecord,
    LeakageRecord,
    RateRecord,
    RunRecord,
)

QUICK = MembershipSettings(shadows=2, attacks=("lira", "global-threshold"))


@pytest.fixture(autouse=True, scope="module")
def trained_once() -> Iterator[None]:
    """Every shadow model of these tests is trained once: the same data and seed give the same one.

    `test_shadow_models_are_trained_as_the_run_trained` shows that; a request to stop still stops.
    """
    train, known = ShadowTraining.__call__, dict[tuple[object, ...], torch.nn.Module]()

    def remembered(self: ShadowTraining, indices: np.ndarray, /, *, seed: int) -> torch.nn.Module:
        stop_here(self.stop)
        key = (self.target.digest, self.target.data.fingerprint, indices.tobytes(), seed)
        if key not in known:
            known[key] = train(self, indices, seed=seed)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShadowTraining, "__call__", remembered)
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random images with random labels: what a model knows of them it has from training alone."""
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "noise.npz"
    np.savez(
        path,
        train_images=random.integers(0, 256, (80, 8, 8), dtype=np.uint8),
        train_labels=np.arange(80) % 4,
        test_images=random.integers(0, 256, (80, 8, 8), dtype=np.uint8),
        test_labels=np.arange(80) % 4,
    )
    return path


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has memorised them."""
    out = tmp_path_factory.mktemp("run") / "plain"
    run(Recipe(out=out, data=str(images), model="compact", epochs=40, batch_size=20))
    return out


def as_private(record: RunRecord) -> RunRecord:
    """The record as if its training had been private, with ε = 3."""
    recipe = Recipe.from_dict({**record.settings, "epsilon": 3.0, "baseline": False})
    plan = make_plan(recipe, record.data.train)
    assert plan is not None
    (chosen,), (result,) = record.chosen, record.results
    return replace(
        record,
        settings=recipe.to_dict(),
        privacy=privacy_record(recipe, plan),
        chosen=(replace(chosen, variant="private", steps=plan.steps),),
        results=(replace(result, variant="private"),),
        epochs=tuple(replace(e, variant="private", train_loss=None) for e in record.epochs),
    )


def target_in(folder: Path, images: Path) -> Target:
    record = RunRecord.read(folder / "run.json")
    loaded = read_model(folder / record.checkpoints[0], unlocking=None)
    return target_of(record, loaded, str(images))


def measured(
    target: Target, membership: MembershipSettings, out: Path, *, force: bool = False
) -> LeakageRecord:
    settings = LeakageSettings(membership=membership)
    return measure_leakage(target, settings, out, stop=StopRequest(), force=force).record


@pytest.fixture
def target(trained: Path, images: Path) -> Target:
    return target_in(trained, images)


def test_memorised_images_are_told_from_others(target: Target, tmp_path: Path) -> None:
    settings = MembershipSettings(shadows=4)
    found = measured(target, settings, tmp_path)
    assert found.membership is not None
    areas = {each.name: each.areas[0] for each in found.membership.attacks}
    # Labels are random: an image that is named right was trained on, but for one in four.
    assert found.train_accuracy == 1.0
    assert areas["lira"] > 0.9
    assert areas["noise-votes"] > 0.9
    assert found.membership.members == found.membership.others == 72
    assert [row.metric for row in found.rows][:1] == ["auc"]


def test_the_distance_to_the_boundary_is_asked_for_by_its_name(
    target: Target, tmp_path: Path
) -> None:
    """Where nothing else is said it is not made: it asks hundreds of times about each example."""
    assert "boundary" not in MembershipSettings().chosen
    settings = MembershipSettings(shadows=2, pool=24, attacks=("boundary",))
    found = measured(target, settings, tmp_path).membership
    assert found is not None
    (attack,) = found.attacks
    assert (attack.name, attack.queries) == ("boundary", 241)
    # 12 and 12: the area of a guess has a deviation of 0.12, of which this is three.
    assert attack.areas[0] > 0.86


def test_the_how_to_names_every_attack() -> None:
    page = (Path(__file__).parents[1] / "docs/how-to/leakage.md").read_text()
    assert [n for n in (*MEMBERSHIP_ATTACKS, *LABEL_ONLY) if f"`{n}`" not in page] == []


def test_a_model_of_other_images_tells_nothing(
    images: Path, target: Target, tmp_path: Path
) -> None:
    """The control: swapped halves of a pool are no members of a target that saw neither."""
    random = np.random.default_rng(1)
    other = tmp_path / "other.npz"
    np.savez(
        other,
        train_images=random.integers(0, 256, (80, 8, 8), dtype=np.uint8),
        train_labels=np.arange(80) % 4,
        test_images=np.load(images)["test_images"],
        test_labels=np.arange(80) % 4,
    )
    run(Recipe(out=tmp_path / "run", data=str(other), model="compact", epochs=40, batch_size=20))
    stranger = replace(target, model=target_in(tmp_path / "run", other).model)
    found = measured(stranger, MembershipSettings(shadows=4), tmp_path)
    assert found.membership is not None
    # 72 and 72: the area of a guess has a deviation of 0.048, so 0.27 is beyond 5.6 of them.
    for each in found.membership.attacks:
        assert abs(each.areas[0] - 0.5) < 0.27, each.name


def test_shadow_models_are_trained_as_the_run_trained(target: Target) -> None:
    """Bit for bit the target again, where they get its images and its seed."""
    train = ShadowTraining(target=target, stop=StopRequest(), advance=lambda _: None)
    again = train(target.members, seed=0)
    for name, tensor in target.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    other = train(target.members, seed=1)
    assert not torch.equal(other[-1].weight, again[-1].weight)


def test_private_shadow_models_have_the_plan_of_the_run(images: Path, tmp_path: Path) -> None:
    recipe = Recipe(
        out=tmp_path / "p",
        data=str(images),
        model="compact",
        epochs=1,
        epsilon=3.0,
        batch_size=4,
        baseline=False,
    )
    run(recipe)
    target = target_in(tmp_path / "p", images)
    found = measured(target, QUICK, tmp_path / "p")
    assert target.record.privacy is not None
    assert found.epsilon == pytest.approx(target.record.privacy.epsilon, rel=1e-9)
    assert found.passed
    assert found.notes  # who may read them


def test_gradients_are_inverted_under_the_protections_of_the_run(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the test images: nobody's picture is shown who was trained on."""
    asked = []

    def inverted(
        model: torch.nn.Module, images: Split, settings: InversionSettings, *, stop: StopRequest
    ) -> tuple[tuple[()], tuple[()]]:
        asked.append((images, settings))
        return (), ()

    monkeypatch.setattr(measure, "measure_inversion", inverted)
    monkeypatch.setattr(measure, "measure_membership", lambda *_, **__: (None, ()))
    settings = LeakageSettings(membership=QUICK, inversion=True, images=1)
    measure_leakage(target, settings, tmp_path, stop=StopRequest())
    private = replace(target.recipe, epsilon=3.0, max_grad_norm=2.0)
    measure_leakage(replace(target, recipe=private), settings, tmp_path / "p", stop=StopRequest())
    (plain, dp) = (settings for _, settings in asked)
    assert all(images is target.data.test for images, _ in asked)
    assert plain.protections == (Sharing(),)
    assert [each.protection for each in dp.protections] == ["plain", "clipped", "noised"]
    plan = replace(target, recipe=private).plan
    assert plan is not None
    assert dp.protections[-1].noise_multiplier == plan.noise_multiplier
    assert dp.protections[-1].max_grad_norm == 2.0


def test_of_an_older_run_it_is_said_that_nothing_binds_its_model(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "measure_membership", lambda *_, **__: (None, ()))
    assert "digest of its weights" not in "".join(measured(target, QUICK, tmp_path).notes)
    older = replace(target, record=replace(target.record, model_digest=""))
    assert "digest of its weights" in measured(older, QUICK, tmp_path).notes[-1]


def test_copies_are_judged_on_images_that_nobody_asked_about(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And students begin as the architecture does, whatever the run started from."""
    asked = []

    def copied(
        victim: object,
        judged: Split,
        pools: tuple[FixedPool, ...],
        learn: StudentTraining,
        settings: ExtractionSettings,
    ) -> tuple[()]:
        asked.append((judged, pools, learn, settings))
        return ()

    monkeypatch.setattr(measure, "measure_extraction", copied)
    monkeypatch.setattr(measure, "measure_membership", lambda *_, **__: (None, ()))
    settings = LeakageSettings(membership=QUICK, extraction=True)
    found = measure_leakage(target, settings, tmp_path, stop=StopRequest()).record
    budgets, adaptive = found.left_out
    assert budgets.startswith("100 and 1,000 and 5,000 questions were not asked: one half of the")
    assert "has 40." in budgets
    assert adaptive.endswith("without a larger budget it is left out.")
    ((judged, pools, learn, told),) = asked
    images = judged.batch(torch.arange(len(judged)))[0].flatten(1)
    assert not any((each == pools[0].images.flatten(1)).all(1).any() for each in images)
    assert [pool.name for pool in pools] == ["unseen images", "noise"]
    assert pools[1].labels is None
    assert told.budgets == (40,)
    assert told.attack is None
    assert torch.equal(learn.build(0)[-1].weight, target.initial.build()[-1].weight)


@pytest.fixture
def quick_parts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """In place of searches and copies: one row each, and the names of what was asked for."""
    asked = []

    def inverted(*_: object, **__: object) -> tuple[tuple[InversionRecord], tuple[Picture]]:
        asked.append("inversion")
        images = torch.linspace(0, 1, 64).reshape(1, 1, 8, 8)
        shown = Picture(protection="plain", batch=1, originals=images, found=1 - images)
        return (inversion_of("plain", 1, 2, 3),), (shown,)

    def copied(*_: object, **__: object) -> tuple[ExtractionRecord]:
        asked.append("extraction")
        return (extraction_of(),)

    monkeypatch.setattr(measure, "measure_inversion", inverted)
    monkeypatch.setattr(measure, "measure_extraction", copied)
    return asked


def test_what_is_not_asked_anew_stays(
    trained: Path, target: Target, tmp_path: Path, quick_parts: list[str]
) -> None:
    """Of the same model: the figures, their pictures and when they were measured."""
    command = ["leakage", str(trained), "--shadows", "2", "--attacks", "lira", "--out", tmp_path]
    command = [str(word) for word in command]
    done = CliRunner().invoke(app, [*command, "--against", "inversion,extraction"])
    assert done.exit_code == 0, done.output
    first, page = LeakageRecord.read(tmp_path / "leakage.json"), tmp_path / "leakage.html"
    pictures = page.read_text().count("<image")
    assert pictures > 0
    done = CliRunner().invoke(app, command)
    assert "inversion of 20" in done.output
    assert "--against extraction measures it anew" in done.output
    found = LeakageRecord.read(tmp_path / "leakage.json")
    assert (found.inversion, found.extraction) == (first.inversion, first.extraction)
    assert found.measured.keys() == {"membership", "inversion", "extraction"}
    assert page.read_text().count("<image") == pictures
    settings = LeakageSettings(membership=replace(QUICK, attacks=("lira",)), extraction=True)
    again = measure_leakage(target, settings, tmp_path, stop=StopRequest())
    assert quick_parts == ["inversion", "extraction", "extraction"]
    assert again.record.inversion == first.inversion
    assert [each.protection for each in again.pictures] == ["plain"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights": "00"}, "it is of another model"),
        ({"run": "another"}, "it is of another run"),
        ({}, "an older version wrote it"),
    ],
)
def test_of_another_model_nothing_is_kept_and_it_is_said(
    trained: Path,
    target: Target,
    tmp_path: Path,
    changes: dict[str, str],
    words: str,
) -> None:
    known = {"run": target.record.run_id, "weights": target.weights}
    before = record_of(**(known | changes), inversion=(inversion_of("plain", 1, 2, 3),)).to_dict()
    if not changes:
        del before["measured"]
    (tmp_path / "leakage.json").write_text(json.dumps(before))
    command = ["leakage", str(trained), "--shadows", "2", "--attacks", "lira"]
    done = CliRunner().invoke(app, [*command, "--out", str(tmp_path)])
    assert f"leakage.json: {words}, so that nothing of it is kept" in done.output.replace("\n", "")
    assert LeakageRecord.read(tmp_path / "leakage.json").inversion == ()


def test_pictures_of_other_rows_or_damaged_ones_are_not_shown(tmp_path: Path) -> None:
    rows, shape = (inversion_of("plain", 1, 2, 3),), (1, 8, 8)
    images = torch.rand(1, *shape)
    shown = Picture(protection="plain", batch=1, originals=images, found=1 - images)
    assert kept_pictures(tmp_path, rows, shape) == ()
    keep_pictures(tmp_path, rows, [shown])
    (found,) = kept_pictures(tmp_path, rows, shape)
    assert torch.equal(found.originals, images)
    assert torch.equal(found.found, 1 - images)
    assert kept_pictures(tmp_path, (inversion_of("plain", 1, 1, 3),), shape) == ()
    assert kept_pictures(tmp_path, rows, (1, 9, 9)) == ()
    path = tmp_path / "pictures.npz"
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_bytes(path.read_bytes()[:200])
    assert kept_pictures(tmp_path, rows, shape) == ()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "the same command again goes on with the next shadow model"),
        (["--force"], "the same command without --force goes on with the next shadow model"),
    ],
)
def test_how_an_interrupted_measurement_goes_on_is_said(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    words: str,
) -> None:
    """With --force it would begin anew, and lose what is done."""

    def stopped(self: ShadowTraining, indices: np.ndarray, /, *, seed: int) -> torch.nn.Module:
        raise Stopped

    monkeypatch.setattr(ShadowTraining, "__call__", stopped)
    command = ["leakage", str(trained), "--shadows", "2", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, [*command, *options])
    assert done.exit_code == 130
    assert words in done.output


def test_a_part_that_is_measured_is_written_before_the_next(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_parts: list[str]
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise Stopped

    monkeypatch.setattr(measure, "measure_extraction", stopped)
    command = ["leakage", str(trained), "--shadows", "2", "--attacks", "lira"]
    more = ["--out", str(tmp_path), "--against", "inversion,extraction"]
    done = CliRunner().invoke(app, [*command, *more])
    assert done.exit_code == 130
    assert "trains no shadow model again" in done.output
    found = LeakageRecord.read(tmp_path / "leakage.json")
    assert found.measured.keys() == {"membership", "inversion"}


def test_an_interrupted_measurement_goes_on_with_the_next_shadow(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measured(target, QUICK, tmp_path / "whole")
    trained = []
    train = ShadowTraining.__call__

    def stopped(self: ShadowTraining, indices: np.ndarray, /, *, seed: int) -> torch.nn.Module:
        if len(trained) == 1:
            raise Stopped
        trained.append(seed)
        return train(self, indices, seed=seed)

    monkeypatch.setattr(ShadowTraining, "__call__", stopped)
    with pytest.raises(Stopped):
        measured(target, QUICK, tmp_path / "parts")
    monkeypatch.setattr(ShadowTraining, "__call__", train)
    found = measured(target, QUICK, tmp_path / "parts")
    assert len(trained) == 1
    assert found.membership == whole.membership or _but_digests(found) == _but_digests(whole)


def _but_digests(record: LeakageRecord) -> dict[str, object]:
    assert record.membership is not None
    return {name: v for name, v in record.to_dict()["membership"].items() if name != "exposed"}


def test_a_table_of_another_design_is_refused(target: Target, tmp_path: Path) -> None:
    measured(target, QUICK, tmp_path)
    other = replace(QUICK, seed=1)
    with pytest.raises(RunError, match=r"table\.json: .* another pool or seed.*--out.*--force"):
        measured(target, other, tmp_path)
    measured(target, other, tmp_path, force=True)


def test_a_table_that_was_asked_more_is_enough(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some attacks alone, of a table of all of them, and no model is trained for that."""
    both = replace(QUICK, attacks=("lira", "noise-votes"))
    whole = measured(target, both, tmp_path)
    signals = (tmp_path / "leakage/signals.npz").read_bytes()
    monkeypatch.setattr(ShadowTraining, "__call__", None)
    for name in both.attacks:
        found = measured(target, replace(QUICK, attacks=(name,)), tmp_path).membership
        assert whole.membership is not None
        assert found is not None
        assert found.attacks == tuple(a for a in whole.membership.attacks if a.name == name)
    assert (tmp_path / "leakage/signals.npz").read_bytes() == signals
    measured(target, both, tmp_path)


def test_a_table_that_was_asked_more_goes_on_as_it_began(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays one table, whichever of its attacks are named when it is ended."""
    both = replace(QUICK, attacks=("lira", "noise-votes"))
    train = ShadowTraining.__call__

    def stopped(self: ShadowTraining, indices: np.ndarray, /, *, seed: int) -> torch.nn.Module:
        raise Stopped

    monkeypatch.setattr(ShadowTraining, "__call__", stopped)
    with pytest.raises(Stopped):
        measured(target, both, tmp_path)
    monkeypatch.setattr(ShadowTraining, "__call__", train)
    measured(target, replace(QUICK, attacks=("lira",)), tmp_path)
    monkeypatch.setattr(ShadowTraining, "__call__", stopped)
    measured(target, both, tmp_path)


def test_of_a_table_that_was_asked_fewer_it_is_said_which(target: Target, tmp_path: Path) -> None:
    measured(target, QUICK, tmp_path)
    more = replace(QUICK, attacks=("lira", "noise-votes", "augmentation-votes"))
    lacks = "nobody was asked for augmentation-votes, noise-votes;"
    with pytest.raises(RunError, match=f"got one of fewer questions: {lacks}"):
        measured(target, more, tmp_path)


def test_more_shadow_models_are_others(target: Target, tmp_path: Path) -> None:
    """None of those that are there fits: it is said what is lost, and by which option."""
    measured(target, QUICK, tmp_path)
    with pytest.raises(RunError, match="2 shadow models where 4 were asked for, none of") as error:
        measured(target, replace(QUICK, shadows=4), tmp_path)
    assert "--out FOLDER beside it" in str(error.value)
    assert "--force in its place, which loses what 2 of 2 shadow models said" in str(error.value)


def test_of_another_table_that_is_begun_it_is_said_how_far_it_is(tmp_path: Path) -> None:
    """What the target said costs nothing to ask again."""
    place = _place(tmp_path)
    place.begin(force=False)
    for kept in ({}, {0: {"q": np.arange(5.0)}, 2: {"q": np.arange(5.0)}}):
        place.keep(kept)
        with pytest.raises(RunError, match=f"loses what {len(kept) // 2} of 2 shadow models said"):
            _place(tmp_path, design="x").begin(force=False)


def test_a_run_of_another_recipe_has_another_digest(target: Target) -> None:
    longer = replace(target, recipe=replace(target.recipe, epochs=41))
    assert longer.digest != target.digest
    elsewhere = replace(target, recipe=replace(target.recipe, out="x", seed=7))
    assert elsewhere.digest == target.digest


def _place(tmp_path: Path, rows: int = 5, *, design: str = "c") -> TableFolder:
    digests = {"run": "a", "recipe": "b", "design": design, "target": "d", "data": "e"}
    (tmp_path / "t").mkdir(exist_ok=True)
    record = TableRecord(**digests, models=3, questions={"q": rows})
    return TableFolder(root=tmp_path / "t", record=record, key=bytes(32))


def test_a_kept_table_is_read_back(tmp_path: Path) -> None:
    place = _place(tmp_path)
    assert place.begin(force=False) == {}
    values = np.arange(5.0)
    place.keep({1: {"q": values}})
    (read,) = place.begin(force=False).values()
    assert np.array_equal(read["q"], values)
    assert (place.root / "signals.npz").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("cut", [0, 1, 40, 200])
def test_a_table_cut_short_is_refused(tmp_path: Path, cut: int) -> None:
    place = _place(tmp_path)
    place.begin(force=False)
    place.keep({1: {"q": np.arange(5.0)}})
    path = place.root / "signals.npz"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"signals\.npz: expected"):
        place.begin(force=False)


def test_a_table_of_objects_or_of_another_size_is_refused(tmp_path: Path) -> None:
    place = _place(tmp_path)
    place.begin(force=False)
    place.keep({})
    mark = np.load(place.root / "signals.npz")["table"]
    nothing = np.full(5, np.nan)
    for wrong in (np.arange(6.0), np.arange(5), np.array([{}] * 5, dtype=object), nothing):
        np.savez(place.root / "signals.npz", **{"0-q": wrong, "table": mark})
        with pytest.raises(DataError, match=r"signals\.npz: expected"):
            place.begin(force=False)


def test_signals_of_another_table_are_refused(tmp_path: Path) -> None:
    """As a second process leaves them that began a table of its own in the same folder."""
    first, second = _place(tmp_path), _place(tmp_path, design="x")
    first.begin(force=False)
    second.begin(force=True)
    first.keep({1: {"q": np.arange(5.0)}})
    with pytest.raises(DataError, match=r"those of another table; begin anew with --force"):
        second.begin(force=False)
    np.savez(first.root / "signals.npz", **{"1-q": np.arange(5.0)})
    with pytest.raises(DataError, match=r"signals\.npz: expected .*--force"):
        second.begin(force=False)


def test_signals_that_were_changed_are_refused(tmp_path: Path) -> None:
    """Shuffled, taken out, put in, or another model's; and so is what is sealed by another key."""
    place, random = _place(tmp_path), np.random.default_rng(0)
    place.begin(force=False)
    path = place.root / "signals.npz"
    place.keep({n: {"q": random.random(5)} for n in (0, 1)})
    kept = dict(np.load(path))
    assert len(place.begin(force=False)) == 2
    swapped = {"0-q": kept["1-q"], "1-q": kept["0-q"]}
    for change in ({"0-q": kept["0-q"][::-1]}, {"2-q": kept["0-q"]}, swapped, {"1-q": None}):
        arrays = {name: v for name, v in {**kept, **change}.items() if v is not None}
        np.savez(path, **arrays)
        with pytest.raises(DataError, match=r"signals\.npz: .*signals that were changed.*--force"):
            place.begin(force=False)
    np.savez(path, **{name: v for name, v in kept.items() if name != "mac"})
    with pytest.raises(DataError, match=r"where one of them is missing; .* --force"):
        place.begin(force=False)
    np.savez(path, **kept)
    with pytest.raises(DataError, match="or another key"):
        replace(place, key=bytes(31) + b"1").begin(force=False)
    assert len(place.begin(force=False)) == 2


def test_signals_whose_record_is_gone_are_not_removed(tmp_path: Path) -> None:
    """But with --force."""
    place = _place(tmp_path)
    place.begin(force=False)
    place.keep({0: {"q": np.arange(5.0)}})
    (place.root / "table.json").unlink()
    with pytest.raises(RunError, match=r"table\.json: expected .* found none; .*--force"):
        place.begin(force=False)
    assert (place.root / "signals.npz").exists()
    assert place.begin(force=True) == {}
    assert (place.root / "table.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", ["table.json", "signals.npz"])
def test_a_table_without_its_key_gets_no_other(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(RunError, match=rf"exposed\.key: expected the key of {name}.*--force"):
        exposed_key(tmp_path)
    assert not (tmp_path / "exposed.key").exists()
    assert exposed_key(tmp_path, force=True) == exposed_key(tmp_path)


def test_a_table_is_of_one_model_and_of_its_images(target: Target, tmp_path: Path) -> None:
    """What was asked of other weights, or about other images, is not what these answer."""
    measured(target, QUICK, tmp_path)
    changed = copy.deepcopy(target.model)
    with torch.no_grad():
        changed[-1].weight.mul_(1e-3)
    with pytest.raises(RunError, match="another target"):
        measured(replace(target, model=changed), QUICK, tmp_path)
    data = target.data
    turned = Split(images=data.train.images.flip(-1), labels=data.train.labels)
    other = replace(data, train=turned)
    with pytest.raises(RunError, match="another data"):
        measured(replace(target, data=other), QUICK, tmp_path)


def test_a_model_that_memorises_is_no_model_of_its_promise(target: Target, tmp_path: Path) -> None:
    """A forged record, or noise that was off: its private shadow models are unlike it."""
    private = replace(target.recipe, epsilon=0.1, delta=1e-5, epochs=2)
    found = measured(replace(target, recipe=private), QUICK, tmp_path)
    assert not found.passed
    assert any("on the target's own curve" in words for words in found.broken)


def test_a_demand_is_about_the_target_at_its_own_best_threshold(
    trained: Path, tmp_path: Path
) -> None:
    """Too few images to tell are no reason to pass, nor is a threshold that names nobody."""
    command = ["leakage", str(trained), "--shadows", "2", "--attacks", "lira,global-threshold"]
    done = CliRunner().invoke(app, [*command, "--out", str(tmp_path), "--require", "auc<=0.99"])
    assert done.exit_code == 7, done.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["tpr@0.1<=1"], r"with 100 test images,.*got one with 72; these data .* at most 80:"),
        (["tpr@0.1<=1", "--pool", "20"], "got one with 10; these data and attacks have at most 80"),
        (["tpr@0.01<=1", "--attacks", "noise-votes"], "with 1,000 test images"),
        (["auc<=1", "--pool", "20"], "with 50 test images for an area .*, got one with 10; leave"),
    ],
)
def test_a_rate_that_cannot_be_told_is_refused_before_any_training(
    trained: Path, tmp_path: Path, options: list[str], words: str
) -> None:
    out = tmp_path / "none"
    command = ["leakage", str(trained), "--shadows", "2", "--out", str(out)]
    done = CliRunner().invoke(app, [*command, "--require", *options])
    assert isinstance(done.exception, RunError)
    assert re.search(words, str(done.exception))
    assert not out.exists()


def test_a_pool_that_can_tell_a_rate_is_named(target: Target) -> None:
    """Where the data have so many, it is said which; where they do, nothing is."""
    test = target.data.test
    drawn = torch.Generator().manual_seed(0)
    shape = (8 * len(test), *test.images.shape[1:])
    images = torch.randint(256, shape, generator=drawn).to(torch.uint8)
    several = [Split(images=half, labels=test.labels.repeat(4)) for half in images.chunk(2)]
    many = replace(target, data=replace(target.data, train=several[0], test=several[1]))
    demand = _demand("tpr@0.1<=0.5")
    with pytest.raises(RunError, match="got one with 10; give --pool 200"):
        demand.check(many, replace(QUICK, pool=20))
    demand.check(many, replace(QUICK, pool=200))
    _demand("auc<=0.5").check(target, QUICK)


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    """Of an array whose header says more than the table has, no byte is read."""
    place = _place(tmp_path)
    place.begin(force=False)
    path = place.root / "signals.npz"
    path.touch(mode=0o600)
    header = {"descr": "<f8", "fortran_order": False, "shape": (10**12,)}
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("table.npy", "w") as file,
    ):
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(10**6))
    with pytest.raises(DataError, match="expected 32 numbers"):
        place.begin(force=False)


def test_the_key_of_digests_is_private_and_stays(tmp_path: Path) -> None:
    key = exposed_key(tmp_path)
    assert key == exposed_key(tmp_path)
    assert (tmp_path / "exposed.key").stat().st_mode & 0o777 == 0o600
    (tmp_path / "exposed.key").write_bytes(b"short")
    with pytest.raises(RunError, match=r"exposed\.key: expected 32 bytes"):
        exposed_key(tmp_path)


def _untrained(*_: object, **__: object) -> None:
    raise AssertionError("a shadow model was trained")


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """No shadow model may be trained."""
    monkeypatch.setattr(ShadowTraining, "__call__", _untrained)


@pytest.mark.usefixtures("untrained")
def test_two_measurements_do_not_share_a_folder(target: Target, tmp_path: Path) -> None:
    """The second one's signals would be written over the first one's, and so would the key."""
    (tmp_path / "leakage").mkdir()
    with (
        locked_folder(tmp_path / "leakage"),
        pytest.raises(RunError, match=r"leakage: another measurement is under way in it; .*--out"),
    ):
        measured(target, QUICK, tmp_path, force=True)
    assert list((tmp_path / "leakage").iterdir()) == []


def test_a_folder_is_free_again_when_a_measurement_ended(target: Target, tmp_path: Path) -> None:
    """However it ended; the control of the lock."""
    stop = StopRequest()
    stop.set()
    with pytest.raises(Stopped):
        measure_leakage(target, LeakageSettings(membership=QUICK), tmp_path, stop=stop)
    with locked_folder(tmp_path / "leakage"):
        pass


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("name", [".", "leakage"])
def test_a_folder_that_cannot_be_written_to_is_refused_first(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Before a shadow model is trained: the folder of the table, and that of the record."""
    folder = (tmp_path / name).resolve()
    access = os.access

    def read_only(path: Path, mode: int) -> bool:
        return access(path, mode) and Path(path).resolve() != folder

    monkeypatch.setattr(os, "access", read_only)
    with pytest.raises(RunError, match=f"{folder}: expected a folder that can be written to"):
        measured(target, QUICK, tmp_path)


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("name", ["leakage.json", "leakage.html", "leakage"])
def test_what_is_no_file_of_a_measurement_is_refused_first(
    target: Target, tmp_path: Path, name: str
) -> None:
    """A folder where the record or its page goes; a file where the folder of the table goes."""
    if name == "leakage":
        (tmp_path / name).touch()
    else:
        (tmp_path / name).mkdir()
    with pytest.raises(RunError, match=f"{name}: expected a"):
        measured(target, QUICK, tmp_path)


@pytest.mark.parametrize("name", ["exposed.key", "signals.npz"])
def test_what_others_can_read_is_not_used(target: Target, tmp_path: Path, name: str) -> None:
    """As the keys of sealed files: with the key anybody looks up who is exposed."""
    place = tmp_path / "leakage" / name
    measured(target, QUICK, tmp_path)
    place.chmod(0o644)
    with pytest.raises(RunError, match=rf"{name}: others can .*mode 0644.*chmod 600 .*{name}"):
        measured(target, QUICK, tmp_path)
    place.chmod(0o600)
    measured(target, QUICK, tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"shadows": 3}, "shadows: expected an even number"),
        ({"shadows": 0}, "shadows: expected an even number"),
        ({"pool": 2}, "pool: expected"),
        ({"attacks": ("lyra",)}, "attacks: expected some of .*lira.*, boundary, got 'lyra'"),
        ({"seed": -1}, "seed: expected"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(RunError, match=words):
        MembershipSettings(**settings)  # type: ignore[arg-type]


def test_other_images_are_refused(trained: Path, images: Path, tmp_path: Path) -> None:
    arrays = dict(np.load(images))
    arrays["train_images"] = 255 - arrays["train_images"]
    np.savez(tmp_path / "other.npz", **arrays)
    with pytest.raises(RunError, match="data: expected the images that the run was trained on"):
        target_in(trained, tmp_path / "other.npz")


def test_a_model_of_another_run_is_refused(trained: Path, images: Path, tmp_path: Path) -> None:
    run(Recipe(out=tmp_path / "b", data=str(images), model="compact", epochs=1, seed=3))
    record = RunRecord.read(trained / "run.json")
    loaded = read_model(RunFolder(root=tmp_path / "b", sealed=False).model, unlocking=None)
    with pytest.raises(RunError, match="model: expected what the run's record says"):
        target_of(record, loaded, str(images))


def test_a_model_that_finds_the_same_is_refused_by_its_weights(trained: Path, images: Path) -> None:
    """Many name all test images right, and one of them leaks less; of an older run nobody knows."""
    record = RunRecord.read(trained / "run.json")
    loaded = read_model(trained / record.checkpoints[0], unlocking=None)
    assert record.model_digest
    with torch.no_grad():
        loaded.model[-1].weight.mul_(2.0)
        loaded.model[-1].bias.mul_(2.0)
    with pytest.raises(RunError, match="model: expected the one that the run left, got other"):
        target_of(record, loaded, str(images))
    target_of(replace(record, model_digest=""), loaded, str(images))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"epochs": 2}, "steps"),
        ({"epochs": 80}, "steps"),
        ({"batch_size": 10}, "batch_size"),
        ({"learning_rate": 0.5}, "learning_rate"),
        ({"warmup": 0.9}, "learning_rate"),
        ({"epsilon": 50.0}, "epsilon"),
    ],
)
def test_settings_that_are_not_those_of_the_training_are_refused(
    trained: Path, images: Path, changes: dict[str, object], name: str
) -> None:
    """Shadow models that learn less leave a model that leaks unseen, and a larger ε allows more."""
    record = RunRecord.read(trained / "run.json")
    loaded = read_model(trained / record.checkpoints[0], unlocking=None)
    if "epsilon" in changes:
        record = as_private(record)
        loaded = replace(loaded, claims={**loaded.claims, "variant": "private"})
    target_of(record, loaded, str(images))
    forged = replace(record, settings={**record.settings, **changes})
    with pytest.raises(RunError, match=f"run.json: expected settings .* got {name} "):
        target_of(forged, loaded, str(images))


def test_epochs_that_the_record_does_not_have_are_refused(trained: Path, images: Path) -> None:
    """Also where the number of steps was changed with them."""
    record = RunRecord.read(trained / "run.json")
    loaded = read_model(trained / record.checkpoints[0], unlocking=None)
    settings = {**record.settings, "epochs": 2}
    (chosen,) = record.chosen
    shorter = replace(chosen, steps=chosen.steps * 2 // 40)
    forged = replace(record, settings=settings, chosen=(shorter,))
    with pytest.raises(RunError, match="got epochs 2 by its settings and 40"):
        target_of(forged, loaded, str(images))
    older = replace(record, chosen=())
    target_of(older, loaded, str(images))
    with pytest.raises(RunError, match="got epochs 2 by its settings and 40"):
        target_of(replace(older, settings=settings), loaded, str(images))


def test_persons_are_refused(trained: Path, images: Path) -> None:
    record = RunRecord.read(trained / "run.json")
    settings = {**record.settings, "unit": "person", "epsilon": 3.0, "baseline": False}
    loaded = read_model(trained / record.checkpoints[0], unlocking=None)
    with pytest.raises(RunError, match="expected a run whose unit is an example"):
        target_of(replace(record, settings=settings), loaded, str(images))


def test_the_command_writes_record_and_page(trained: Path, images: Path, tmp_path: Path) -> None:
    command = ["leakage", str(trained), "--shadows", "2", "--attacks", "lira,global-threshold"]
    done = CliRunner().invoke(app, [*command, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    record = LeakageRecord.read(tmp_path / "leakage.json")
    assert record.run == RunRecord.read(trained / "run.json").run_id
    assert "lira" in (tmp_path / "leakage.html").read_text()
    # The table is there: nothing is trained again.
    again = CliRunner().invoke(app, [*command, "--out", str(tmp_path), "--require", "auc<=0.6"])
    assert again.exit_code == 7
    assert "missed: auc<=0.6" in again.output
    assert "strongest of 2: " in again.output
    assert "nothing was promised of this training" in again.output


def test_a_sealed_model_elsewhere_is_measured_by_its_run(images: Path, tmp_path: Path) -> None:
    """And by nothing without the key that opens it."""
    identity = archive.generate_identity()
    archive.write_key(tmp_path / "identity", identity)
    sealing = Sealing(recipients=(identity.recipient,))
    recipe = Recipe(out=tmp_path / "run", data=str(images), model="compact", epochs=1)
    run(recipe, sealing=sealing)
    moved = tmp_path / "model.sealed"
    (tmp_path / "run/checkpoints/model.sealed").rename(moved)
    command = ["leakage", str(tmp_path / "run"), "--shadows", "2", "--attacks", "lira"]
    done = CliRunner().invoke(app, [*command, "--checkpoint", str(moved)])
    assert isinstance(done.exception, archive.ArchiveError)
    key = ["--identity", str(tmp_path / "identity")]
    done = CliRunner().invoke(app, [*command, "--checkpoint", str(moved), *key])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, [*command, *key])
    assert isinstance(done.exception, RunError)  # which says that it is gone
    done = CliRunner().invoke(app, ["leakage", str(moved), *key])
    assert isinstance(done.exception, RunError)
    assert f"by --checkpoint {moved}" in str(done.exception)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--pool", "2"], "--pool: expected .* at least 4, got 2; leave it out"),
        (["--shadows", "3"], "--shadows: expected an even number .*, got 3; take 2 or 4"),
        (["--shadows", "1"], "--shadows: expected an even number .*, got 1; take 2, or 16"),
        (["--seed", "-1"], "--seed: expected .*, got -1; take 0, or leave"),
        (["--attacks", "nonsense"], "--attacks: expected some of .*lira.*; leave it out for all"),
        (["--attacks", "lira,lira"], "--attacks: expected each once, .*; name it once"),
        (["--attacks", ","], "--attacks: expected names with commas, got ','; or leave it out"),
        (["--against", "x"], "--against: expected inversion or extraction, got 'x'; for both"),
    ],
)
def test_a_wrong_value_is_told_by_its_option(trained: Path, options: list[str], words: str) -> None:
    done = CliRunner().invoke(app, ["leakage", str(trained), *options])
    assert isinstance(done.exception, RunError)
    assert re.match(words, str(done.exception))


@pytest.mark.parametrize("demand", ["auc", "tpr@0.5<=0.1", "tpr@0.01<=2", "auc>=0.4"])
def test_a_demand_that_is_none_is_refused(trained: Path, demand: str) -> None:
    done = CliRunner().invoke(app, ["leakage", str(trained), "--require", demand])
    assert done.exit_code == 2


def test_the_command_refuses_what_is_no_run(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["leakage", str(tmp_path / "nothing")])
    assert isinstance(done.exception, RunError)
    (tmp_path / "run.json").write_text(json.dumps({"schema": 1, "kind": "run"}))
    done = CliRunner().invoke(app, ["leakage", str(tmp_path)])
    assert isinstance(done.exception, RunError)


def test_a_demand_below_a_guess_is_never_kept(target: Target) -> None:
    """Where scores tie no threshold finds anybody at a rate, and a coin toss does."""
    rates = tuple(
        RateRecord(
            of=of,
            fpr=0.1,
            tpr=0.0,
            tpr_low=0.0,
            tpr_high=0.04,
            realised_fpr=0.0,
            hits=0,
            members=100,
            false_alarms=0,
            others=100,
            ties=150,
            ppv={"0.5": 1.0},
        )
        for of in ("target", "oracle")
    )
    attack = SimpleNamespace(rate=lambda fpr, of="target": rates[of == "oracle"])
    found = SimpleNamespace(membership=SimpleNamespace(attacks=[attack]), void=False)
    assert "got 0.100" in (_demand("tpr@0.1<=0").missed(found) or "")
    assert not rates[0].kept
    assert replace(rates[0], ties=0).kept


def test_images_that_are_there_twice_are_told_of_and_not_guessed_about(
    target: Target, tmp_path: Path
) -> None:
    """Test images that were trained on would count as others that are well known."""
    test = target.data.test
    images = test.images.clone()
    images[:20] = target.data.train.images[:20]
    mixed = replace(target.data, test=Split(images=images, labels=test.labels))
    copied = replace(target, data=mixed)
    count = len(target.data.train)
    assert set(range(count, count + 20)) <= set(copied.copies.tolist())
    assert not np.isin(copied.copies, _design(copied, QUICK).asked).any()
    assert any("more than once" in note for note in _notes(copied))
