"""What is of another kind than was asked for is told by its name, before any model is trained."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.score_tables import planted
from torch import nn
from torch.utils.data import TensorDataset

from privacy import GaussianSteps
from privacy.errors import LeakageError, PlanError
from privacy.leakage import (
    MEMBERSHIP_ATTACKS,
    AugmentationVotes,
    Confidence,
    Inversion,
    NoiseVotes,
    Promise,
    Question,
    ShadowDesign,
    TopProbabilities,
    allowed_tpr,
    area,
    areas,
    balanced_halves,
    confidence,
    controls,
    extract,
    global_threshold,
    input_of_linear,
    invert,
    labels_of,
    lira,
    membership,
    membership_report,
    oracle_threshold,
    point,
    resolved,
    rmia,
    score_tables,
    shadow_thresholds,
    shared_gradient,
    similarity,
)

KEY = b"sixteen bytes or more"
IMAGES = torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(40) % 3
DATA = TensorDataset(IMAGES, LABELS)
TABLE = planted(1, pool=20)


def model():
    """One that knows three classes."""
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()


def never(*_, **__):
    """What is not to be called."""
    raise AssertionError


def design(**changes):
    """Around a target that knows the first twenty."""
    asked = {"members": np.arange(20), "others": np.arange(20, 40)} | changes
    settings = {"shadows": 2, "pool": None, "seed": 0}
    settings |= {name: asked.pop(name) for name in settings if name in asked}
    return ShadowDesign.around(asked["members"], asked["others"], **settings)


def tables(train=never, **changes):
    """Of a model that is there, and shadow models that must not be trained."""
    asked = {"dataset": DATA, "design": design()} | changes
    settings = {"recipe": "r", "questions": {"sure": Question()}} | changes
    for name in ("dataset", "design"):
        settings.pop(name, None)
    return score_tables(train, asked["dataset"], asked["design"], **settings)


def copied(**changes):
    """A copy of ten answers."""
    asked = {"victim": model(), "pool": IMAGES, "learn": lambda *_, seed: model()} | changes
    settings = {"test": (IMAGES, LABELS), "budgets": [10]} | changes
    for name in ("victim", "pool", "learn"):
        settings.pop(name, None)
    return extract(asked["victim"], asked["pool"], asked["learn"], **settings)


def inverted(**changes):
    """A search of one step."""
    own = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    gradient = shared_gradient(own, IMAGES[:1], LABELS[:1])
    asked = {"model": own, "gradient": gradient} | changes
    settings = {"shape": (1, 4, 4), "labels": LABELS[:1], "inversion": Inversion(steps=1)} | changes
    for name in ("model", "gradient"):
        settings.pop(name, None)
    return invert(asked["model"], asked["gradient"], **settings)


def test_the_same_calls_with_what_was_asked_for_are_answered():
    """Control: what is refused below is refused for the one argument that is changed."""
    assert tables(lambda _, seed: model())["sure"].signals.shape == (38, 3)
    assert membership(lambda _, seed: model(), DATA, shadows=2, key=bytearray(16)).shadows == 2
    assert copied()[0].queries == 10
    assert inverted().images.shape == (1, 1, 4, 4)
    steps = GaussianSteps(noise_multiplier=2.0, sampling_rate=1.0, steps=4)
    assert len(Promise.of([steps], 0.01, others=[0.1]).pairs) == 2


WHOLE = {
    "shadows": lambda value: membership(never, DATA, shadows=value),
    "pool": lambda value: membership(never, DATA, pool=value),
    "seed": lambda value: membership(never, DATA, seed=value),
    "around, shadows": lambda value: design(shadows=value),
    "around, pool": lambda value: design(pool=value),
    "around, seed": lambda value: design(seed=value),
    "design, seed": lambda value: replace(design(), seed=value),
    "halves, examples": lambda value: balanced_halves(value, 2, np.random.default_rng(0)),
    "halves, shadows": lambda value: balanced_halves(4, value, np.random.default_rng(0)),
    "queries": lambda value: Question(queries=value),
    "most": lambda value: Question(most=value),
    "exposed": lambda value: membership_report(TABLE, key=KEY, exposed=value),
    "controls, seed": lambda value: controls(TABLE, MEMBERSHIP_ATTACKS, seed=value),
    "shift": lambda value: AugmentationVotes(shift=value),
    "draws": lambda value: NoiseVotes(sigma=0.1, draws=value),
    "noise, seed": lambda value: NoiseVotes(sigma=0.1, seed=value),
    "steps": lambda value: Inversion(steps=value),
    "restarts": lambda value: Inversion(restarts=value),
    "inversion, seed": lambda value: Inversion(seed=value),
    "labels, count": lambda value: labels_of(torch.zeros(3), count=value),
    "top, count": lambda value: TopProbabilities(count=value),
    "digits": lambda value: TopProbabilities(digits=value),
    "budgets": lambda value: copied(budgets=[value]),
    "extract, seed": lambda value: copied(seed=value),
    "invert, shape": lambda value: inverted(shape=(1, 4, value)),
}


@pytest.mark.parametrize("value", [2.0, "2", True, -1, [2], float("nan")])
@pytest.mark.parametrize("name", WHOLE)
def test_what_is_no_whole_number_is_told_by_its_name(name, value):
    """A float, a text, a flag, a negative one, a list."""
    word = name.rpartition(" ")[2]
    with pytest.raises(LeakageError, match=rf"{word}: expected a whole number, at least \d, got"):
        WHOLE[name](value)


@pytest.mark.parametrize("name", [n for n in WHOLE if n not in ("pool", "around, pool", "most")])
def test_none_is_no_whole_number(name):
    """But where it says that all are taken."""
    with pytest.raises(LeakageError, match=r"expected a whole number, at least \d, got None"):
        WHOLE[name](None)


NUMBERS = {
    "sigma": lambda value: NoiseVotes(sigma=value),
    "rate": lambda value: Inversion(rate=value),
    "total_variation": lambda value: Inversion(total_variation=value),
    "fpr": lambda value: allowed_tpr(value, epsilon=1.0, delta=0.1),
    "promise, fpr": lambda value: Promise(pairs=((1.0, 0.1),)).allowed_tpr(value),
    "epsilon": lambda value: allowed_tpr(0.1, epsilon=value, delta=0.1),
    "delta": lambda value: allowed_tpr(0.1, epsilon=1.0, delta=value),
    "pair, promise": lambda value: Promise(pairs=((1.0, value),)),
    "another, promise": lambda value: Promise(pairs=((value, 0.1),)),
}


@pytest.mark.parametrize("value", ["1", None, True, -1, [1.0], float("nan")])
@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_number_is_told_by_its_name(name, value):
    """Nor one that is out of range."""
    with pytest.raises(LeakageError, match=rf"{name.rpartition(' ')[2]}: expected an? "):
        NUMBERS[name](value)


KINDS = [
    (lambda: membership(3, DATA), "train: expected a function"),
    (lambda: membership(model(), DATA), "train: expected a function of .*, got a model"),
    (lambda: membership(lambda indices: None, DATA), "train: .*seed.* unexpected keyword"),
    (lambda: membership(lambda *, seed: None, DATA), "train: .* got one with too many positional"),
    (
        lambda: membership(lambda indices, s: None, DATA),
        "train: .* the seed is given by its name: name a parameter seed",
    ),
    (lambda: tables(target=lambda: None), "target: .* got one with too many positional"),
    (lambda: Question(signal=lambda answer: None), "signal: .* got one with too many"),
    (lambda: membership(never, DATA, attacks={"a": lambda: 0}), "attacks: a: .* too many"),
    (lambda: controls(TABLE, {"a": lambda _: None}), "attacks: a: expected an array of numbers"),
    (lambda: controls(TABLE, {"a": lambda t: t.signals[:3]}), "attacks: expected a number for"),
    (lambda: copied(learn=lambda images, targets: model()), "learn: .* unexpected keyword"),
    (lambda: copied(mode=lambda: 0), "mode: .* got one with too many"),
    (lambda: copied(victim=lambda: 0), "victim: .* got one with too many"),
    (lambda: copied(pool=LABELS), r"pool: expected images \[n, ...\], got \[40\]"),
    (lambda: shared_gradient(model(), IMAGES, LABELS + 1), "labels: expected 0 to 2, as the mode"),
    (lambda: shared_gradient(model(), IMAGES, LABELS[:3]), "logits: expected one row for each"),
    (lambda: inverted(labels=LABELS[:1] + 7), "model: expected one that takes 1 images of"),
    (lambda: inverted(shape=(1, 5, 5)), "model: expected one that takes 1 images of"),
    (lambda: membership(never, DATA, question=3), "question: expected a Question, got 3"),
    (lambda: membership(never, DATA, attacks=["lira"]), "attacks: expected attacks by name"),
    (lambda: membership(never, DATA, attacks={}), "attacks: expected at least one, got none"),
    (lambda: membership(never, DATA, attacks={"a": 3}), "attacks: a: expected a function"),
    (lambda: membership(never, DATA, promise=3.0), "promise: expected a Promise, got 3.0"),
    (lambda: membership(never, DATA, key="s" * 20), "key: expected at least 16 secret bytes, got"),
    (lambda: membership(never, DATA, key=3), "key: expected at least 16 secret bytes, got int"),
    (lambda: membership_report(3, key=KEY), "table: expected a ScoreTable, got 3"),
    (lambda: membership_report(TABLE, key=None), "key: expected at least 16 secret bytes, got N"),
    (lambda: membership_report(TABLE, key=KEY, promise=1), "promise: expected a Promise, got 1"),
    (lambda: controls(None, MEMBERSHIP_ATTACKS), "table: expected a ScoreTable, got None"),
    (lambda: controls(TABLE, None), "attacks: expected attacks by name, got None"),
    (lambda: tables(questions=3), "questions: expected questions by name, got 3"),
    (lambda: tables(questions={"q": 3}), "questions: q: expected a Question, got 3"),
    (lambda: tables(questions={3: Question()}), "questions: expected questions by name"),
    (lambda: tables(design=3), "design: expected a ShadowDesign, got 3"),
    (lambda: tables(recipe=3), "recipe: expected a str, got 3"),
    (lambda: tables(target=3), "target: expected a model"),
    (lambda: tables(keep=3), "keep: expected a function"),
    (lambda: Question(signal=3), "signal: expected what asks a model"),
    (lambda: Promise(pairs=3), "promise: expected a tuple, got 3"),
    (lambda: Promise(pairs=(3,)), "promise: expected pairs of an epsilon and a delta, got 3"),
    (lambda: Promise.of([], 0.1, others=3), "others: expected deltas, got 3"),
    (lambda: replace(TABLE, recipes=None), "recipes: expected a tuple, got None"),
    (lambda: replace(TABLE, seeds=[1]), r"seeds: expected a tuple, got \[1\]"),
    (lambda: confidence(None, LABELS), "logits: expected a tensor of floats, got NoneType"),
    (lambda: confidence(torch.zeros(40, 3), None), r"labels: expected whole numbers \[n\]"),
    (lambda: confidence(torch.zeros(1, 3), torch.tensor([0.5])), "labels: expected whole numbers"),
    (lambda: labels_of(None, count=1), "bias_gradient: expected a tensor of floats with 1 axes"),
    (lambda: labels_of(torch.zeros(0), count=1), "bias_gradient: expected one of a class"),
    (lambda: input_of_linear(None, torch.ones(2)), "weight_gradient: expected a tensor of floats"),
    (lambda: similarity(None, IMAGES[0]), "found: expected a tensor of floats with 3 axes"),
    (lambda: shared_gradient(None, IMAGES, LABELS), "model: expected a Module, got None"),
    (lambda: inverted(model=None), "model: expected a Module, got None"),
    (lambda: inverted(gradient=3), "gradient: expected gradients by name, got 3"),
    (lambda: inverted(gradient={"1.bias": 3}), "gradient: 1.bias: expected a Tensor, got 3"),
    (lambda: inverted(shape=3), "shape: expected channels, height and width, got 3"),
    (lambda: inverted(labels=[1]), r"labels: expected whole numbers \[n\], got \[1\]"),
    (lambda: inverted(labels=LABELS[:0]), "labels: expected one or more"),
    (lambda: inverted(inversion=3), "inversion: expected an Inversion, got 3"),
    (lambda: inverted(stop=3), "stop: expected a function"),
    (lambda: copied(victim=3), "victim: expected a model"),
    (lambda: copied(victim=lambda images: None), "answer: expected a tensor of floats"),
    (lambda: copied(learn=3), "learn: expected a function that trains"),
    (lambda: copied(learn=lambda *_, seed: None), "learn: expected a student, got None"),
    (lambda: copied(mode=3), "mode: expected what a victim shows"),
    (lambda: copied(mode=lambda logits: None), "mode: expected a tensor of floats"),
    (lambda: copied(pool=3), "pool: expected a Tensor, got 3"),
    (lambda: copied(budgets=3), "budgets: expected numbers of questions, got 3"),
    (lambda: copied(test=3), "test: expected images and their labels, got 3"),
    (lambda: copied(test=(IMAGES, LABELS[:3])), "test: expected images with a label each"),
    (lambda: copied(labels=3), r"labels: expected whole numbers \[n\], got 3"),
]


SCORES, MEMBERS = TABLE.signals, TABLE.members
WRONG_SCORES = [
    None,
    3,
    "x",
    [1.0],
    SCORES.astype(str),
    SCORES * np.nan,
    torch.from_numpy(SCORES.copy()),
]


@pytest.mark.parametrize("wrong", WRONG_SCORES, ids=lambda each: type(each).__name__)
def test_scores_and_members_are_arrays_of_one_shape(wrong):
    """NaN is no score: it is above nothing and below nothing."""
    one, mine = SCORES[:, 0], MEMBERS[:, 0]
    two = wrong[:, 0] if isinstance(wrong, (np.ndarray, torch.Tensor)) else wrong
    for call in (
        lambda: area(two, mine),
        lambda: areas(wrong, MEMBERS),
        lambda: oracle_threshold(two, mine, 0.1),
        lambda: shadow_thresholds(wrong, MEMBERS, [0.1]),
    ):
        with pytest.raises(LeakageError, match="scores: expected an array of numbers, none of"):
            call()
    for call in (
        lambda: area(one, two),
        lambda: areas(SCORES, wrong),
        lambda: oracle_threshold(one, mine.astype(int), 0.1),
        lambda: shadow_thresholds(SCORES, MEMBERS[1:], [0.1]),
    ):
        with pytest.raises(LeakageError, match="members: expected an array of bool"):
            call()
    if not isinstance(wrong, list):
        with pytest.raises(LeakageError, match="positives: expected an array of numbers"):
            point(two, one, threshold=0.0, fpr=0.1)


@pytest.mark.parametrize("wrong", [None, "0.1", True, -0.1, 1.5, float("nan"), [0.1]])
def test_a_rate_is_a_fraction(wrong):
    """Whoever asks for one."""
    one, mine = SCORES[:, 0], MEMBERS[:, 0]
    for call in (
        lambda: oracle_threshold(one, mine, wrong),
        lambda: shadow_thresholds(SCORES, MEMBERS, [wrong]),
        lambda: point(one, one, threshold=0.0, fpr=wrong),
        lambda: resolved(100, wrong),
    ):
        with pytest.raises(LeakageError, match=r"fpr: expected a fraction in \[0, 1"):
            call()
    with pytest.raises(LeakageError, match=r"prior: expected a share in \(0, 1\)"):
        point(one, one, threshold=0.0, fpr=0.1).ppv(wrong)
    with pytest.raises(LeakageError, match="gamma: expected a number of at least 1"):
        rmia(TABLE, gamma=wrong if wrong != 1.5 else 0.5)


def test_other_arguments_of_metrics_are_told():
    """By their names."""
    one = SCORES[:, 0]
    with pytest.raises(LeakageError, match="fprs: expected fractions, got 3"):
        shadow_thresholds(SCORES, MEMBERS, 3)
    with pytest.raises(LeakageError, match="threshold: expected a number, got None"):
        point(one, one, threshold=None, fpr=0.1)
    with pytest.raises(LeakageError, match="negatives: expected a whole number"):
        resolved(2.5, 0.1)
    assert point([2.0], (1.0,), threshold=-np.inf, fpr=0.0).hits == 1


@pytest.mark.parametrize(("call", "words"), KINDS, ids=[words for _, words in KINDS])
def test_what_is_of_another_kind_is_told_by_its_name(call, words):
    """And what came."""
    with pytest.raises(LeakageError, match=words):
        call()


@pytest.mark.parametrize("name", MEMBERSHIP_ATTACKS)
def test_an_attack_is_on_a_table(name):
    """And on nothing else."""
    with pytest.raises(LeakageError, match="table: expected a ScoreTable, got 3"):
        MEMBERSHIP_ATTACKS[name](3)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda _: None,
        lambda _: [1.0, 2.0],
        lambda table: torch.zeros(table.signals.shape),
        lambda table: table.signals.astype(str),
        lambda table: table.signals.astype(object),
        lambda table: table.signals.astype(complex),
    ],
)
def test_an_attack_that_gives_no_numbers_is_named(wrong):
    """As one that gives too few is."""
    with pytest.raises(LeakageError, match="attacks: expected an array of numbers from mine, got"):
        membership_report(TABLE, key=KEY, attacks={"mine": wrong})


def test_attacks_that_need_a_population_are_refused_before_a_model_is_trained():
    """Where none is left, or the question asks about a few alone."""
    attacks = {name: MEMBERSHIP_ATTACKS[name] for name in ("rmia", "attack-p")}
    few = Question(most=8)
    for how in ({"pool": 40}, {"question": few}):
        with pytest.raises(LeakageError, match="got none: those named need a population"):
            membership(never, DATA, shadows=2, attacks=attacks, **how)


@pytest.mark.parametrize("given", [None, 3, "x", [], {}, IMAGES.numpy(), {"a": 1}])
def test_what_is_no_data_set_is_refused(given):
    """Before anything is trained; a file of arrays is no data set of pairs either."""
    with pytest.raises((LeakageError, PlanError), match="dataset: expected"):
        membership(never, given)
    with pytest.raises((LeakageError, PlanError), match="expected"):
        tables(dataset=given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (TensorDataset(IMAGES), "dataset: expected pairs of an image and a label, got 1"),
        (TensorDataset(IMAGES, LABELS, LABELS), "dataset: expected pairs .* got 3"),
        ([{"image": IMAGES[0], "label": 1}] * 40, "dataset: expected pairs .* got dict"),
        (TensorDataset(IMAGES, torch.full((40,), torch.nan)), "labels: expected whole numbers"),
        (TensorDataset(IMAGES, LABELS + 0.5), "labels: expected whole numbers"),
        (TensorDataset(IMAGES, torch.zeros(40, 3)), r"labels: .* got torch.float32 \[38, 3\]"),
    ],
)
def test_examples_that_are_no_pairs_of_an_image_and_a_label_are_refused(given, words):
    """By what they are."""
    with pytest.raises(LeakageError, match=words):
        tables(dataset=given)


@pytest.mark.parametrize(
    ("indices", "words"),
    [
        (None, r"members: expected indices of examples, int64 \[n\], got None"),
        ("abc", "members: expected indices"),
        (np.arange(20.0), r"members: expected indices of examples, .* got float64 \[20\]"),
        (np.arange(20).reshape(4, 5), r"members: .* got int64 \[4, 5\]"),
        (np.arange(40) < 20, "members: expected indices .* give np.flatnonzero of flags"),
        (np.arange(-5, 15), "members: expected indices of at least 0, got -5 to 14"),
        (np.array([1, 2**63], dtype=np.uint64), "members: expected indices of at least 0"),
        (np.array(["a", "b"]), "members: expected indices"),
    ],
)
def test_what_are_no_indices_is_told(indices, words):
    """Flags, floats, tables of them, and those that are counted from the end."""
    with pytest.raises(LeakageError, match=words):
        design(members=indices)


def test_indices_of_any_whole_kind_are_taken():
    """Lists, ranges, tensors and other widths: the same design."""
    own = design()
    for kind in (list, tuple, torch.from_numpy, lambda i: i.astype(np.uint8)):
        assert np.array_equal(design(members=kind(np.arange(20))).pool, own.pool)
    with pytest.raises(LeakageError, match="always: expected indices of examples"):
        replace(own, always=np.zeros(3))
    with pytest.raises(LeakageError, match="halves: expected a ndarray, got 3"):
        replace(own, halves=3)


def test_a_design_of_another_data_set_is_refused():
    """One that goes beyond this one's end, before a model is trained."""
    beyond = design(others=np.arange(20, 41))
    words = "design: expected indices of the 40 examples of the data set, got 40"
    with pytest.raises(LeakageError, match=words):
        tables(design=beyond)


COUNT = len(design().asked)


@pytest.mark.parametrize(
    "known",
    [
        3,
        "x",
        [1],
        {0: None},
        {0: [1]},
        {0: {"sure": None}},
        {0: {"sure": [0.0] * COUNT}},
        {0: {"sure": np.zeros(COUNT, np.float32)}},
        {0: {"sure": np.zeros((COUNT, 1))}},
        {0: {"sure": np.full(COUNT, np.nan)}},
        {"0": {"sure": np.zeros(COUNT)}},
        {True: {"sure": np.zeros(COUNT)}},
        {-1: {"sure": np.zeros(COUNT)}},
    ],
)
def test_what_is_known_is_signals_of_models(known):
    """Of each example of the design a finite number, by model and question."""
    with pytest.raises(LeakageError, match=r"known: (expected|of model)"):
        tables(known=known)


@pytest.mark.parametrize("trained", [None, 3, "model", {"weights": 1}])
def test_a_training_that_gives_no_model_is_told(trained):
    """It is asked as soon as it is there."""
    with pytest.raises(LeakageError, match="train: expected a model, or what else gives logits"):
        tables(lambda _, seed: trained)


@pytest.mark.parametrize("votes", [Confidence(), AugmentationVotes(), NoiseVotes(sigma=0.1)])
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda images: None, "logits: expected a tensor of floats, got NoneType"),
        (lambda images: np.zeros((len(images), 3)), "logits: expected a tensor of floats, got fl"),
        (
            lambda images: torch.zeros(len(images), 3, dtype=torch.complex64),
            "logits: .* torch.complex64",
        ),
        (lambda images: torch.zeros(len(images)), "logits: expected one row for each of 38 labels"),
        (
            lambda images: torch.zeros(len(images) + 1, 3),
            "logits: expected one row for each of 38 labels",
        ),
        (lambda images: (torch.zeros(len(images), 3),), "logits: expected .* got tuple"),
    ],
)
def test_a_model_that_answers_with_no_logits_is_named(votes, answer, words):
    """By its number, whatever is asked of it."""
    with pytest.raises(LeakageError, match=f"model 0: {words}"):
        tables(target=answer, questions={"q": Question(signal=votes)})


@pytest.mark.parametrize("said", [None, 3, [0.0], np.float64(1.0), torch.zeros(40)])
def test_a_signal_that_gives_no_array_is_told(said):
    """With what came."""
    question = Question(signal=lambda *_: said)
    with pytest.raises(LeakageError, match="model 0: signal: expected a ndarray, got"):
        tables(target=model(), questions={"q": question})


def test_scores_that_are_no_numbers_are_refused():
    """NaN of an attack; infinities are scores."""
    nothing = {"mine": lambda table: table.signals * np.nan}
    with pytest.raises(LeakageError, match="attacks: expected a number for each"):
        membership_report(TABLE, key=KEY, attacks=nothing)
    always = {"mine": lambda table: np.where(table.members, np.inf, lira(table))}
    assert membership_report(TABLE, key=KEY, attacks=always).attack("mine").area == 1.0
    assert global_threshold(TABLE).shape == TABLE.signals.shape
