"""Strategies of plain training: each does what it says; planted times become ratios."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from secure_cnn.bench.plain_training import PlainTraining
from secure_cnn.bench.strategies import (
    BEFORE,
    STRATEGIES,
    Done,
    StrategyLog,
    StrategySettings,
    measure_strategies,
    strategies,
)
from secure_cnn.bench.tutorial import TutorialLoop
from secure_cnn.bench.watch import Trained, Watch
from secure_cnn.cli import app
from secure_cnn.data import DataSpec, ImageData, Split
from secure_cnn.engine import MeanUpdate
from secure_cnn.errors import RunError
from secure_cnn.models import build_model
from secure_cnn.optimizers import Muon
from secure_cnn.recipe import Recipe, named
from secure_cnn.recipe.named import NAMED, NamedRecipe
from secure_cnn.record import Measurements

SPEC = DataSpec(shape=(1, 8, 8), classes=("left", "right"))


def halves(count=40):
    """Images whose left or right half is bright, told apart by their label; each is another one."""
    labels = torch.arange(count) % 2
    images = torch.zeros(count, 1, 8, 8, dtype=torch.uint8)
    images[labels == 0, :, :, :4] = 200
    images[labels == 1, :, :, 4:] = 200
    images[:, 0, 0, 0] += torch.arange(count).to(torch.uint8)
    return Split(images=images, labels=labels)


DATA = ImageData(name="halves", train=halves(), test=halves(8), spec=SPEC)


class Spy(nn.Module):
    """A network that remembers what it was given and how it was run while it trained."""

    def __init__(self, seed=0):
        super().__init__()
        self.net = build_model("compact", SPEC, generator_seed=seed)
        self.batches: list[torch.Tensor] = []
        self.casts: list[bool] = []
        self.asked = 0

    def forward(self, images):
        if self.training:
            self.batches.append(images.detach().clone(memory_format=torch.preserve_format))
            self.casts.append(torch.is_autocast_enabled("cpu"))
        self.asked += not self.training
        return self.net(images)


class Spies:
    """Makes spies, and keeps them."""

    def __init__(self):
        self.made: list[Spy] = []

    def __call__(self, seed):
        self.made.append(Spy(seed))
        return self.made[-1]


def trained(name, **changes):
    """The spy of the training of a strategy, and what its watch found."""
    make = Spies()
    plain = PlainTraining(make=make, **{"epochs": 3, "batch_size": 10, **changes})
    watch = Watch(DATA, target=0.9, clock=lambda: 0.0)
    strategies(plain, [name])[name](DATA, seed=0, watch=watch)
    (spy,) = make.made
    return spy, watch.result()


def of(name):
    """The settings of a strategy, those of the plain training as they are."""
    make = Spies()
    found = strategies(PlainTraining(make=make), [name])[name]
    assert isinstance(found, PlainTraining)
    return replace(found, make=make), PlainTraining(make=make)


def is_mirrored(batch):
    """Which images of a batch stand the other way round: their number is at the right."""
    return batch[:, 0, 0, 7] > batch[:, 0, 0, 0]


def numbered(count=40):
    """Black images with their number at the upper left."""
    images = torch.zeros(count, 1, 8, 8, dtype=torch.uint8)
    images[:, 0, 0, 0] = 1 + torch.arange(count).to(torch.uint8)
    return Split(images=images, labels=torch.arange(count) % 2)


NUMBERED = replace(DATA, train=numbered())


def turns(training):
    """By epoch, the numbers of the images that were mirrored in it."""
    make = Spies()
    watch = Watch(NUMBERED, target=0.9, clock=lambda: 0.0)
    replace(training, make=make, epochs=4, batch_size=10)(NUMBERED, seed=0, watch=watch)
    batches = make.made[0].batches
    epochs = [torch.cat(batches[start : start + 4]) for start in range(0, 16, 4)]
    right = [epoch[is_mirrored(epoch)] for epoch in epochs]
    return [{round(float(each.max()) * 255) for each in epoch} for epoch in right]


def test_every_strategy_changes_the_training_and_only_the_training():
    """All but the first differ from the plain one; all have its network."""
    for name in STRATEGIES:
        if name in (BEFORE, "by-index"):
            continue
        changed, plain = of(name)
        assert changed != replace(plain, make=changed.make), name


def test_all_are_measured_but_what_is_asked_for_by_name():
    """In the order of the table, with the tutorial's loop whatever was asked for."""
    plain = PlainTraining(make=Spy)
    assert list(strategies(plain)) == [name for name in STRATEGIES if name != "bfloat16"]
    assert list(strategies(plain, ["muon", "bfloat16"])) == [BEFORE, "bfloat16", "muon"]
    assert list(strategies(plain, [BEFORE])) == [BEFORE]


def test_batches_by_index_are_the_tutorials_training():
    """The same sizes of batch, steps and rate: only how a batch is made differs."""
    make = Spies()
    plain = PlainTraining(make=make, epochs=2, batch_size=16, flip=True)
    for each in strategies(plain, ["by-index"]).values():
        each(NUMBERED, seed=0, watch=Watch(DATA, target=1.0, clock=lambda: 0.0))
    before, after = make.made
    assert [len(batch) for batch in before.batches] == [16, 16, 8] * 2
    assert [len(batch) for batch in after.batches] == [16, 16, 8] * 2
    for spy in (before, after):
        first = torch.cat(spy.batches[:3])
        assert 0 < int(is_mirrored(first).sum()) < 40  # by coins


def test_layout_precision_batch_and_epochs():
    """As the network sees them."""
    plain, _ = trained("by-index")
    last, _ = trained("channels-last")
    assert last.net.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert not plain.net.conv2.weight.is_contiguous(memory_format=torch.channels_last)
    halved, _ = trained("bfloat16")
    assert all(halved.casts)
    assert not any(plain.casts)
    large, _ = trained("large-batch")
    assert [len(batch) for batch in large.batches] == [40] * 3
    fewer, _ = trained("fewer-epochs")
    assert len(fewer.batches) == 4
    assert len(plain.batches) == 12


def test_the_rate_rises_and_falls(monkeypatch):
    """One cycle: not at its peak at first, twice as high, nearly 0 at the end."""
    rates = {}
    for name in ("by-index", "one-cycle"):
        seen = rates.setdefault(name, [])

        class Seen(MeanUpdate):
            def __init__(self, optimizer, seen=seen):
                super().__init__(optimizer)
                self.group, self.seen = optimizer.param_groups[0], seen

            def __call__(self, losses):
                self.seen.append(self.group["lr"])
                return super().__call__(losses)

        monkeypatch.setattr("secure_cnn.bench.plain_training.MeanUpdate", Seen)
        trained(name, epochs=5)
    assert rates["by-index"][0] == max(rates["by-index"]) == 0.05
    assert rates["one-cycle"][0] < max(rates["one-cycle"]) == pytest.approx(0.1)
    assert max(rates["one-cycle"]) in rates["one-cycle"][3:5]
    assert rates["one-cycle"][-1] < 0.005


def test_smoothing_and_averaging():
    """Smoothed losses of a sure model are larger; an average has moved less than the weights."""
    smoothed, plain = of("label-smoothing")
    assert (smoothed.label_smoothing, plain.label_smoothing) == (0.1, 0.0)
    averaged, _ = of("averaging")
    make = Spies()
    kept = {}

    class Keeping:
        def judge(self, model):
            kept.update({n: w.clone() for n, w in model.state_dict().items()})

    replace(averaged, make=make, epochs=1, batch_size=10)(DATA, seed=0, watch=Keeping())
    (spy,) = make.made
    begun = Spy(0).state_dict()
    moved = sum(float((kept[n] - begun[n]).norm() ** 2) for n in kept)
    whole = sum(float((w - begun[n]).norm() ** 2) for n, w in spy.state_dict().items())
    assert 0 < moved < whole


def test_flips_alternate():
    """Two epochs show each image both ways; by coins they do not."""
    alternate, plain = of("alternate-flips")
    everything = set(range(1, 41))
    first, second, third, fourth = turns(alternate)
    assert first
    assert second
    assert first | second == everything
    assert not first & second
    assert (third, fourth) == (first, second)
    coins, _ = of("flips")
    one, two, *_ = turns(coins)
    assert one & two
    assert (one | two) != everything
    assert not any(turns(plain))  # control


def test_shifts_move_images():
    """Those of others stay where they are."""
    spy, _ = trained("shifts")
    still, _ = trained("by-index")
    rows = [
        {int(batch.sum((1, 3)).count_nonzero()) for batch in each.batches} for each in (spy, still)
    ]
    assert len(rows[0]) > 1
    assert len(rows[1]) == 1


def test_beginnings():
    """Identity in every later convolution, and a first layer that is not trained."""
    identity, plain = of("identity")
    model = identity._model(DATA, 0)
    drawn = plain._model(DATA, 0)
    begun = model.net.conv2.weight[torch.arange(16), torch.arange(16), 1, 1]
    assert torch.equal(begun, torch.ones(16))
    assert not torch.equal(model.net.conv2.weight, drawn.net.conv2.weight)
    whitened, _ = trained("whitening")
    assert not whitened.net.conv1.weight.requires_grad
    assert not torch.equal(whitened.net.conv1.weight, Spy(0).net.conv1.weight)


def test_muon_steps_and_mirror_views_answer():
    """By their optimizer, and by how often the network is asked."""
    muon, plain = of("muon")
    assert isinstance(muon._optimizer(Spy()), Muon)
    assert isinstance(plain._optimizer(Spy()), torch.optim.SGD)
    asked = [trained(name)[0].asked for name in ("by-index", "mirror-views")]
    assert asked[1] == 2 * asked[0]


class Clock:
    """A clock that only work moves."""

    def __init__(self):
        self.now, self.order = 0.0, []

    def __call__(self):
        return self.now


class Working:
    """A way to train that takes so many seconds an epoch, and is right at an epoch from then on."""

    def __init__(self, clock, name, seconds, right_at, epochs=4):
        self.clock, self.name, self.seconds = clock, name, seconds
        self.right_at, self.epochs = right_at, epochs

    def __call__(self, data, *, seed, watch):
        self.clock.order.append((self.name, seed))
        for epoch in range(1, self.epochs + 1):
            self.clock.now += self.seconds
            watch.judge(Told(self.clock, right=epoch >= self.right_at))


class Told(nn.Module):
    """Answers right or not, and takes long to answer."""

    def __init__(self, clock, *, right):
        super().__init__()
        self.clock, self.right = clock, right

    def forward(self, images):
        self.clock.now += 1000
        left = images[..., :4].sum((1, 2, 3)) > images[..., 4:].sum((1, 2, 3))
        return nn.functional.one_hot((left ^ self.right).long(), 2).float()


def measured(seeds=3, log=None, **more):
    """The rows of two planted ways to train, by variant and metric, and the clock."""
    clock = Clock()
    ways = {
        BEFORE: Working(clock, BEFORE, 6.0, right_at=3),
        "quick": Working(clock, "quick", 1.5, right_at=2),
        "never": Working(clock, "never", 3.0, right_at=9),
    }
    rows = measure_strategies(
        ways,
        DATA,
        settings=StrategySettings(seeds=seeds, target=0.92),
        case="planted",
        clock=clock,
        log=log or StrategyLog(conditions={}),
        **more,
    )
    return {(row.variant, row.metric): row for row in rows}, clock


def test_planted_times_become_ratios():
    """Judging takes a thousand seconds and counts for none."""
    rows, _ = measured()
    value = {key: row.median for key, row in rows.items()}
    assert value[BEFORE, "seconds"] == 24.0
    assert value["quick", "seconds"] == 6.0
    assert value["quick", "time_ratio"] == 0.25
    assert value["never", "time_ratio"] == 0.5
    assert value[BEFORE, "seconds_to_target"] == 18.0
    assert value["quick", "seconds_to_target"] == 3.0
    assert value["quick", "mean_seconds_to_target"] == 3.0
    assert value["quick", "target_ratio"] == pytest.approx(1 / 6)
    assert value["quick", "accuracy"] == value["quick", "macro_recall"] == 1.0
    assert value["never", "accuracy"] == 0.0
    assert value["never", "accuracy_gain"] == -1.0
    assert value["never", "macro_recall_gain"] == -1.0
    assert value["quick", "accuracy_gain"] == 0.0
    assert value["never", "reached"] == 0.0
    assert value["quick", "reached"] == 1.0
    assert ("never", "seconds_to_target") not in rows
    assert ("never", "target_ratio") not in rows
    assert (BEFORE, "time_ratio") not in rows
    assert all(row.n == 3 for row in rows.values())


def test_all_take_their_turn_with_a_seed_before_the_next():
    """In orders that differ, so that none is always last."""
    _, clock = measured(seeds=6)
    by_seed = [clock.order[start : start + 3] for start in range(0, 18, 3)]
    assert [{seed for _, seed in turn} for turn in by_seed] == [{n} for n in range(6)]
    assert all({name for name, _ in turn} == {BEFORE, "quick", "never"} for turn in by_seed)
    assert len({tuple(name for name, _ in turn) for turn in by_seed}) > 1


def test_what_was_trained_is_kept_and_not_trained_again(tmp_path):
    """Ended after any training and taken up, it gives the rows of one that was not."""
    whole, clock = measured()
    path = tmp_path / "state.json"
    left = 4

    class Ended(Exception):
        pass

    def keep(log):
        nonlocal left
        log.write(path)
        left -= 1
        if not left:
            raise Ended

    with pytest.raises(Ended):
        measured(keep=keep)
    log = StrategyLog.taken_up(path, {})
    assert len(log.done) == 4
    again, rest = measured(log=log)
    assert rest.order == clock.order[4:]
    assert again == whole


def test_a_log_of_other_conditions_is_refused(tmp_path):
    """And so is what is no log, or holds a training twice or an impossible figure."""
    path = tmp_path / "state.json"
    StrategyLog(conditions={"case": "a", "clock": "wall"}).write(path)
    assert StrategyLog.taken_up(path, {"case": "a", "clock": "wall"}).done == ()
    with pytest.raises(RunError, match="of the same clock, got others"):
        StrategyLog.taken_up(path, {"case": "a", "clock": "processor"})
    with pytest.raises(RunError, match="of the same clock, got others"):
        StrategyLog.taken_up(path, {"case": "a"})
    path.write_text("[]")
    with pytest.raises(RunError, match=r"state\.json"):
        StrategyLog.taken_up(path, {})
    good = Trained(accuracy=0.5, macro_recall=0.5, seconds=1.0, reached=None)
    twice = (Done(strategy="quick", seed=0, trained=good),) * 2
    with pytest.raises(RunError, match="each training once"):
        StrategyLog(conditions={}, done=twice)
    for values in ({"accuracy": 1.5}, {"seconds": -1.0}, {"reached": 2.0}, {"macro_recall": -1}):
        with pytest.raises(RunError):
            replace(good, **values)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"learning_rate": float("inf")}, "learning_rate: expected a finite number > 0, got inf"),
        ({"weight_decay": -1.0}, "weight_decay: expected a finite number >= 0"),
        ({"warmup": 1.0}, "warmup: expected a share"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"flip": True, "alternate_flips": True}, "choose one"),
    ],
)
def test_numbers_out_of_range_are_refused(values, said):
    """By the training, and by the tutorial's loop where it has them."""
    with pytest.raises(RunError, match=said):
        PlainTraining(make=Spy, **values)
    if set(values) <= set(TutorialLoop.__dataclass_fields__):
        with pytest.raises(RunError, match=said):
            TutorialLoop(make=Spy, **values)


def test_settings_names_and_a_lacking_reference_are_refused():
    """In words that say what to do."""
    with pytest.raises(RunError, match="seeds: expected at least 1"):
        StrategySettings(seeds=0)
    with pytest.raises(RunError, match="target: expected an accuracy"):
        StrategySettings(target=92.0)
    with pytest.raises(RunError, match="expected one of before, by-index"):
        strategies(PlainTraining(make=Spy), ["faster"])
    with pytest.raises(RunError, match="expected before among them"):
        measure_strategies(
            {},
            DATA,
            settings=StrategySettings(),
            case="none",
            clock=lambda: 0.0,
            log=StrategyLog(conditions={}),
        )
    with pytest.raises(RunError, match="train an epoch"):
        Watch(DATA, target=0.5, clock=lambda: 0.0).result()


def run(*words):
    """What a command came to, on a wide terminal."""
    return CliRunner().invoke(app, [*words], env={"COLUMNS": "200"})


def test_the_command_measures_keeps_and_goes_on(tmp_path):
    """On digits, an epoch and a seed each: rows in the file, and nothing trained a second time."""
    state, figures = tmp_path / "state.json", tmp_path / "figures.json"
    command = (
        *("bench", "strategies", "--data", "digits", "--epochs", "1", "--seeds", "1"),
        *("--strategy", "muon", "--target", "0.3", "--state", str(state), "--json", str(figures)),
    )
    first = run(*command)
    assert first.exit_code == 0, first.output
    assert "muon: epoch 1, accuracy" in first.stderr
    found = Measurements.read(figures)
    assert {row.variant for row in found.rows} == {BEFORE, "muon"}
    names = {row.metric for row in found.rows if row.variant == "muon"}
    assert names >= {"accuracy", "macro_recall", "seconds", "time_ratio", "reached"}
    assert "÷" in first.stdout
    assert "muon" in first.stdout
    again = run(*command)
    assert again.exit_code == 0
    assert "epoch 1" not in again.stderr
    assert Measurements.read(figures).rows == found.rows
    assert len(json.loads(state.read_text())["done"]) == 2
    other = run(*command, "--learning-rate", "0.01")
    assert isinstance(other.exception, RunError)
    assert "of the same rate" in str(other.exception)


def test_a_recipe_is_measured_beside_the_strategies(tmp_path, monkeypatch, shapes):
    """As it is, whatever the options of the loop; a state of other settings is refused."""
    recipe = Recipe(out="runs/tiny", data="digits", epochs=2, model="quick", learning_rate=0.2)
    one = NamedRecipe(name="tiny", says="Small.", recipe=recipe, source="none", chosen="untuned")
    known = {"tiny": one, "private": replace(one, recipe=replace(recipe, epsilon=8.0))}
    monkeypatch.setattr(named, "NAMED", known)
    state, figures = tmp_path / "state.json", tmp_path / "figures.json"
    command = (
        *("bench", "strategies", "--data", shapes, "--epochs", "1", "--seeds", "2"),
        *("--strategy", BEFORE, "--state", str(state), "--json", str(figures)),
    )
    done = run(*command, "--recipe", "tiny")
    assert done.exit_code == 0, done.output
    assert "tiny: epoch 2, accuracy" in done.stderr
    assert {row.variant for row in Measurements.read(figures).rows} == {BEFORE, "tiny"}
    known["tiny"] = replace(one, recipe=replace(recipe, epochs=3))
    other = run(*command, "--recipe", "tiny")
    assert "of the same recipe tiny" in str(other.exception)
    refused = run(*command, "--recipe", "private")
    assert "without protections, got private" in str(refused.exception)


def test_the_fast_strategy_is_the_training_of_the_fast_recipe():
    """Of the network and the loop that the recipe's source names."""
    recipe = NAMED["fashion-fast"].recipe
    fast = strategies(PlainTraining(make=Spy, epochs=3 * recipe.epochs), ["fast"])["fast"]
    assert isinstance(fast, PlainTraining)
    for setting in ("epochs", "batch_size", "learning_rate", "warmup", "weight_decay"):
        assert getattr(fast, setting) == getattr(recipe, setting), setting
    for setting in ("average_decay", "label_smoothing", "shift", "flip"):
        assert not getattr(fast, setting), setting
        assert not getattr(recipe, setting), setting
