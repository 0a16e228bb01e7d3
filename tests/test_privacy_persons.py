"""Persons as the unit of privacy: sampled whole, averaged inside, clipped once, noised as one."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from privacy import (
    AdaptiveClipping,
    AutomaticClipping,
    DPPlan,
    FlatClipping,
    GaussianSteps,
    Ledger,
    PerLayerClipping,
    PhysicalBatches,
    PlanError,
    PrivateTraining,
    SecureGenerator,
    StepError,
    attach,
    epsilon_of,
)
from privacy.persons import Persons

SIZES = (1, 5, 2, 1, 3, 9, 1, 4)
IDS = [f"person {i}" for i, size in enumerate(SIZES) for _ in range(size)]
"""Eight persons with 1 to 9 images, 26 in all."""
QUIET = 1e-9
"""A noise multiplier that leaves the sum to be seen."""


class Images:
    """Drawn images of different sizes of gradient; remembers what was read."""

    def __init__(self, count: int = len(IDS)) -> None:
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(count, 1, 6, 6, generator=generator, dtype=torch.float64)
        self.images = images * torch.linspace(0.2, 3, count, dtype=torch.float64).view(-1, 1, 1, 1)
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.read.append(index)
        return self.images[index], index % 2

    def taken(self) -> list[int]:
        """What was read since the last call."""
        taken, self.read = self.read, []
        return taken


def network() -> nn.Module:
    """A convolution, a normalisation, a linear layer and one on the slow path; float64."""
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.PReLU(), nn.Flatten(), nn.Linear(48, 2)
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.double()


def losses_of(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """A loss a row whose gradient grows with the image."""
    return model(images).square().sum(1) * images.abs().amax((1, 2, 3))


def plan_of(**changed: Any) -> DPPlan:
    """All eight persons are in every step, with three images each at most."""
    settings = {
        "samples": len(SIZES),
        "batch_size": len(SIZES),
        "epochs": 1,
        "max_grad_norm": 1.0,
        "noise_multiplier": QUIET,
        "unit": "person",
        "images_per_person": 3,
    }
    return DPPlan(**{**settings, **changed})


def attached(plan: DPPlan, data: Any, groups: Any = IDS, **changed: Any) -> PrivateTraining:
    """A training whose released gradient can be read."""
    model = network()
    return attach(
        plan, model, torch.optim.SGD(model.parameters(), lr=0.0), data, groups=groups, **changed
    )


def released(
    private: PrivateTraining, data: Images, copies: int = 1, *, passes: bool = False
) -> Any:
    """The sum of one step, hardly any noise in it, and the images of each person that were read."""
    found: list[torch.Tensor] = []
    private.optimizer.register_step_pre_hook(
        lambda *_: found.append(torch.cat([p.grad.flatten() for p in private.model.parameters()]))
    )
    persons: list[set[int]] = []
    data.taken()
    for images, _ in private.batches:
        read = data.taken()
        of_batch: dict[str, set[int]] = {}
        for index in read:
            of_batch.setdefault(IDS[index], set()).add(index)
        persons += of_batch.values()
        shifts = torch.linspace(0, 0.5, copies, dtype=torch.float64).view(1, copies, 1, 1, 1)
        copied = images.unsqueeze(1) + shifts
        if passes:
            losses = torch.stack(
                [losses_of(private.model, copied[:, k]) for k in range(copies)], dim=1
            )
        else:
            losses = losses_of(private.model, copied.flatten(0, 1)).view(-1, copies)
        if private.step(losses.squeeze(1) if copies == 1 else losses):
            break
    return found[0] * private.plan.batch_size, persons


def definition(data: Images, persons: list[set[int]], factor: Any, copies: int = 1) -> torch.Tensor:
    """The oracle: person after person, image after image; averaged, then scaled."""
    model = network()
    parameters = list(model.parameters())
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
    for person in persons:
        gradients = []
        for index in person:
            for shift in torch.linspace(0, 0.5, copies).tolist():
                loss = losses_of(model, data.images[index : index + 1] + shift).sum()
                parts = torch.autograd.grad(loss, parameters)
                gradients.append(torch.cat([part.flatten() for part in parts]))
        total += factor(torch.stack(gradients).mean(0))
    return total


def flat(gradient: torch.Tensor) -> torch.Tensor:
    """Flat clipping to 1."""
    return gradient * min(1.0, 1.0 / float(gradient.norm()))


def automatic(gradient: torch.Tensor) -> torch.Tensor:
    """AUTO-S."""
    return gradient / (float(gradient.norm()) + 0.01)


def per_layer(gradient: torch.Tensor) -> torch.Tensor:
    """Four layers, half of the norm each."""
    sizes = {"conv": 30, "norm": 6, "act": 1, "linear": 98}
    parts = gradient.split(list(sizes.values()))
    return torch.cat([part * min(1.0, 0.5 / float(part.norm())) for part in parts])


@pytest.mark.parametrize("most", [1, 2, 3, 16])
@pytest.mark.parametrize("size", [16, 512])
def test_a_persons_gradients_are_averaged_and_then_clipped(most: int, size: int) -> None:
    """Against a loop of one image at a time, in float64, for persons of 1 to 9 images."""
    data = Images()
    private = attached(
        plan_of(images_per_person=most), data, physical_batches=PhysicalBatches(size=size)
    )
    found, persons = released(private, data)
    assert sorted(map(len, persons)) == sorted(min(size, most) for size in SIZES)
    assert float((found - definition(data, persons, flat)).norm()) <= len(SIZES) * 1.1e-5


@pytest.mark.parametrize(
    ("changed", "factor"),
    [
        ({"clipping": AutomaticClipping()}, automatic),
        ({"clipping": PerLayerClipping()}, per_layer),
        ({"clipping": AdaptiveClipping(count_noise_multiplier=1.0)}, flat),
        ({"clipping": FlatClipping(), "float_safe": True}, flat),
    ],
    ids=["automatic", "per layer", "adaptive", "float safe"],
)
def test_every_clipping_takes_the_persons_mean(changed: Any, factor: Any) -> None:
    """The grid takes a thousandth of the norm."""
    data = Images()
    found, persons = released(attached(plan_of(**changed), data), data)
    assert len(persons) == len(SIZES)
    allowed = len(SIZES) * (2e-3 if "float_safe" in changed else 1.1e-5)
    assert float((found - definition(data, persons, factor)).norm()) <= allowed


@pytest.mark.parametrize("passes", [False, True], ids=["adjacent rows", "K passes"])
def test_copies_of_a_persons_images_are_averaged_with_them(passes: bool) -> None:
    """Two copies of each of up to three images are one mean of six."""
    data = Images()
    found, persons = released(attached(plan_of(), data), data, copies=2, passes=passes)
    expected = definition(data, persons, flat, copies=2)
    assert float((found - expected).norm()) <= len(SIZES) * 1.1e-5


@pytest.mark.parametrize("images", [1, 3, 9])
def test_one_person_moves_the_sum_by_the_clipping_norm_however_many_images(images: int) -> None:
    """Of one person alone the sum is what they add."""
    data = Images(images)
    data.images *= 100
    plan = plan_of(samples=1, batch_size=1, images_per_person=9)
    private = attached(plan, data, ["ann"] * images)
    found, _ = released(private, data)
    assert 0.999 <= float(found.norm()) <= 1


def test_images_that_are_examples_would_move_it_further() -> None:
    """Control: the same images of one person, each clipped by itself."""
    data = Images(9)
    data.images *= 100
    plan = plan_of(samples=9, batch_size=9, unit="example", images_per_person=None)
    found, _ = released(attached(plan, data, None), data)
    assert float(found.norm()) > 3


def test_a_broken_image_takes_its_person_out_and_nobody_else() -> None:
    """The person counts as zero; the filling of others is their own images."""
    data = Images()
    data.images[IDS.index("person 4")] = torch.nan
    private = attached(plan_of(images_per_person=16), data)
    found, persons = released(private, data)
    rest = [p for p in persons if IDS.index("person 4") not in p]
    assert private.non_finite == 1
    assert len(rest) == len(SIZES) - 1
    assert float((found - definition(data, rest, flat)).norm()) <= len(SIZES) * 1.1e-5


def test_persons_are_sampled_whole_at_the_plans_rate() -> None:
    """A person of 9 images no more often than one of 1; each count of 400 fair coins.

    A count leaves its bounds with a chance of 1e-9, 8 of them with 1e-8.
    """
    persons, generator = Persons.of(IDS, examples=len(IDS)), SecureGenerator()
    seen = np.zeros(len(SIZES))
    for _ in range(400):
        sample = generator.bernoulli(len(persons), 0.5).nonzero().squeeze(1)
        batches = persons.cut(sample, PhysicalBatches(size=16), generator, most=3)
        assert [batch.last for batch in batches] == [False] * (len(batches) - 1) + [True]
        here: list[str] = []
        for batch in batches:
            shares = batch.shares()
            each = 1 if shares is None else shares.shape[1]
            assert batch.rows <= 16
            assert batch.rows % each == 0
            for number, rows in enumerate(batch.indices.view(-1, each).tolist()):
                (owner,) = {IDS[row] for row in rows}
                here.append(owner)
                size = min(3, SIZES[int(owner.split()[1])])
                counted = torch.ones(1) if shares is None else shares[number]
                assert len(set(rows)) == size == int((counted > 0).sum())
                assert len({r for r, c in zip(rows, counted, strict=True) if c > 0}) == size
                assert counted[counted > 0].tolist() == [1 / size] * size
            if shares is not None:
                assert float(shares[~batch.mask()].sum()) == 0
        assert len(here) == len(set(here)) == len(sample)
        seen[sample] += 1
    low, high = stats.binom.ppf([5e-10, 1 - 5e-10], 400, 0.5)
    assert low <= seen.min() <= seen.max() <= high


def test_each_of_a_persons_images_is_drawn_as_often_and_afresh() -> None:
    """Three of nine, 900 times: each is in a third of them; a count errs with a chance of 1e-9."""
    persons, generator = Persons.of(["ann"] * 9, examples=9), SecureGenerator()
    counts = torch.zeros(9)
    for _ in range(900):
        (batch,) = persons.cut(torch.tensor([0]), PhysicalBatches(), generator, most=3)
        drawn = batch.indices.unique()
        assert len(drawn) == 3
        counts[drawn] += 1
    low, high = stats.binom.ppf([5e-10, 1 - 5e-10], 900, 1 / 3)
    assert low <= float(counts.min()) <= float(counts.max()) <= high


def test_few_rows_are_filled_in_vain() -> None:
    """A person with one image takes no row of those with many: at most half of all is filling."""
    ids = [i for i in range(200) for _ in range(1 if i else 64)]
    persons, generator = Persons.of(ids, examples=len(ids)), SecureGenerator()
    batches = persons.cut(torch.arange(200), PhysicalBatches(), generator, most=64)
    assert sum(batch.rows for batch in batches) <= 199 + 64 + 2 * 8


def test_an_empty_sample_is_a_step() -> None:
    """One batch of filling, as without persons."""
    persons = Persons.of(IDS, examples=len(IDS))
    empty = torch.zeros(0, dtype=torch.int64)
    (batch,) = persons.cut(empty, PhysicalBatches(), SecureGenerator(), most=3)
    assert batch.last
    assert not batch.mask().any()
    assert batch.shares() is None


def test_a_training_of_persons_spends_what_its_steps_cost() -> None:
    """Poisson samples of persons with real noise: the accountant's events, per person."""
    plan = plan_of(batch_size=2, noise_multiplier=1.0, delta=1e-2, epochs=2)
    data = Images()
    private = attached(plan, data)
    for images, _ in private.batches:
        private.step(losses_of(private.model, images))
    assert private.steps == plan.steps == 8
    event = GaussianSteps(noise_multiplier=1.0, sampling_rate=0.25, steps=8, unit="person")
    assert private.ledger.events == (event,)
    assert private.spent() == plan.epsilon() == epsilon_of([event], 1e-2)


def test_the_conditions_say_person() -> None:
    """In words and in a field, with how many images each may give."""
    conditions = plan_of().conditions()
    assert conditions["unit"] == "person"
    assert conditions["images_per_person"] == 3
    assert conditions["relation"] == "add or remove one person"
    assert plan_of(images_per_person=None).images_per_person == 8
    assert DPPlan.from_dict(json.loads(json.dumps(plan_of().to_dict()))) == plan_of()


def test_ids_may_be_anything_that_can_be_hashed() -> None:
    """Numbers, texts, tuples, arrays and tensors say the same persons."""
    numbers = [3, 1, 3, 2]
    for ids in (
        numbers,
        tuple(numbers),
        np.array(numbers),
        torch.tensor(numbers),
        [str(each) for each in numbers],
        np.array([str(each) for each in numbers]),
        [(each, "x") for each in numbers],
        (each for each in numbers),
    ):
        persons = Persons.of(ids, examples=4)
        assert persons.sizes.tolist() == [2, 1, 1]
        assert persons.rows.tolist() == [0, 2, 1, 3]
        assert persons.largest == 2


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ([1, 2], "expected 3 ids, one for each example .* got 2"),
        ([1, 2, None], "expected an id for each example, got None for example 2"),
        ([1.0, 2.0, math.nan], "expected an id for each example, got nan for example 2"),
        (np.array([1.0, np.nan, 2.0]), "got nan for example 1"),
        ([1, "1", 2], "ids of one type, got int, str"),
        ([True, 1, 2], "ids of one type, got bool, int"),
        ("ann", "expected a list of ids.* got str"),
        ({"ann": 1}, "expected a list of ids.* got dict"),
        (7, "expected a list of ids.* got int"),
        (torch.zeros(3, 1), r"in one dimension, got shape \[3, 1\]"),
        ([[1], [2], [3]], "can be hashed"),
        (list(torch.tensor([1, 1, 2])), r"equals nothing but itself.*item\(\)"),
        ([object(), object(), object()], "of example 0, which equals nothing but itself"),
        ([(torch.tensor(1),)] * 3, "of example 0, which equals nothing but itself"),
    ],
)
def test_what_are_no_ids_is_refused(ids: Any, says: str) -> None:
    """With the example that is wrong."""
    with pytest.raises(PlanError, match=f"groups: .*{says}"):
        Persons.of(ids, examples=3)


def test_a_plan_of_persons_needs_to_know_whose_each_example_is() -> None:
    """By the argument or by the data set's attribute; else there is no training."""
    data: Any = Images()
    with pytest.raises(PlanError, match="groups: expected one id an example, since the plan"):
        attached(plan_of(), data, None)
    data.groups = IDS
    assert len(released(attached(plan_of(), data, None), data)[1]) == len(SIZES)


def test_a_plan_for_other_persons_is_refused() -> None:
    """The number of images is not that of persons."""
    with pytest.raises(PlanError, match="the plan is for 26, the data set has 8 persons"):
        attached(plan_of(samples=26, batch_size=8), Images())


def test_a_person_must_fit_into_a_physical_batch() -> None:
    """Their gradients are averaged in one."""
    with pytest.raises(PlanError, match=r"a size of at least 9 rows.*got 8"):
        attached(plan_of(images_per_person=9), Images(), physical_batches=PhysicalBatches(size=8))


def test_a_plan_says_what_its_unit_may_be() -> None:
    """Another word, and images of a person where no person is the unit."""
    for unit in ("user", None, 1, ["person"]):
        with pytest.raises(PlanError, match="unit: expected example or person, got"):
            plan_of(unit=unit)
    with pytest.raises(PlanError, match='images_per_person: expected unit="person" with it'):
        plan_of(unit="example")
    for images in (0, 2.5, "3"):
        with pytest.raises(PlanError, match="images_per_person: expected"):
            plan_of(images_per_person=images)
    with pytest.raises(PlanError, match="the number of persons"):
        plan_of(batch_size=9)
    with pytest.raises(PlanError, match="publishing one person"):
        plan_of(delta=0.5)


def test_losses_must_be_one_a_row_and_the_batch_can_be_stepped_again() -> None:
    """The mean over a person is the step's work: one loss a person is refused."""
    data = Images()
    private = attached(plan_of(), data)
    images, _ = next(batches := private.batches)
    losses = losses_of(private.model, images)
    with pytest.raises(StepError, match=rf"shape \[{len(images)}\], got"):
        private.step(losses.view(-1, 2).mean(1) if len(losses) % 2 == 0 else losses[:1])
    private.step(losses_of(private.model, images))
    next(batches, None)


def test_a_state_of_one_unit_is_not_taken_up_by_the_other() -> None:
    """A ledger of persons is none of examples, in memory, in a state and in a file."""
    persons = plan_of(noise_multiplier=1.0)
    examples = plan_of(noise_multiplier=1.0, unit="example", images_per_person=None)
    for mine, theirs in ((persons, examples), (examples, persons)):
        spent = Ledger([theirs.event(3)])
        with pytest.raises(PlanError, match="ledger: expected steps that protect one"):
            spent.bind(mine)
        bound = Ledger()
        bound.bind(mine)
        with pytest.raises(PlanError, match="ledger: expected steps that protect one"):
            bound.resume(json.loads(json.dumps(spent.to_list())))
        with pytest.raises(PlanError, match="ledger: expected steps that protect one"):
            bound.record(theirs.event(1))
    with pytest.raises(PlanError, match="steps of one unit"):
        epsilon_of([persons.event(1), examples.event(1)], 1e-3)
    private = attached(persons, Images())
    other = {**private.state_dict(), "plan": examples.to_dict()}
    with pytest.raises(PlanError, match="plan: the checkpoint was trained under"):
        private.load_state_dict(other)


def test_a_ledgers_file_knows_its_unit(tmp_path: Path) -> None:
    """Opened again it is of persons; a file without a unit is of examples."""
    persons = plan_of(noise_multiplier=1.0)
    examples = plan_of(noise_multiplier=1.0, unit="example", images_per_person=None)
    for name, mine, other in (("p", persons, examples), ("e", examples, persons)):
        ledger = Ledger.open(tmp_path / name)
        ledger.bind(mine)
        ledger.record(mine.event(1))
        ledger.close()
        assert ("unit" in (tmp_path / name).read_text()) == (mine is persons)
        again = Ledger.open(tmp_path / name)
        assert again.events == (mine.event(1),)
        with pytest.raises(PlanError, match="protect one"):
            again.bind(other)
        again.close()


def test_a_row_of_another_unit_is_refused() -> None:
    """A forged ledger names no third unit."""
    row = {"noise_multiplier": 1.0, "sampling_rate": 0.5, "steps": 1, "unit": "crowd"}
    with pytest.raises(PlanError, match="unit: expected example or person"):
        Ledger.from_list([row])


def test_a_state_of_persons_goes_on() -> None:
    """Plan, ledger and norm come back."""
    plan = plan_of(noise_multiplier=1.0, epochs=4)
    data = Images()
    private = attached(plan, data)
    released(private, data)
    state = json.loads(json.dumps(private.state_dict()))
    other = attached(plan, data)
    other.load_state_dict(state)
    assert other.steps == 1
    assert other.ledger.events == (plan.event(1),)


def test_a_state_of_other_persons_is_refused() -> None:
    """As many of them, but with other images; the same ones under other names go on."""
    plan = plan_of(noise_multiplier=1.0, epochs=4)
    data = Images()
    private = attached(plan, data)
    released(private, data)
    state = json.loads(json.dumps(private.state_dict()))
    renamed = attached(plan, data, [f"other {each}" for each in IDS])
    renamed.load_state_dict(state)
    assert renamed.steps == 1
    for groups in (list(reversed(IDS)), [*IDS[1:], IDS[0]]):
        other = attached(plan, data, groups)
        with pytest.raises(PlanError, match=r"^groups: the checkpoint was trained with examples"):
            other.load_state_dict(state)
        assert other.steps == 0
    del state["persons"]
    with pytest.raises(PlanError, match=r"^groups: .* or does not say how"):
        attached(plan, data).load_state_dict(state)
