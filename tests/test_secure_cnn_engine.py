"""The one training loop, against loops, schedules and averages written out by hand."""

import copy
import math
import os
import signal
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secure_cnn.engine import (
    CrossEntropy,
    MeanUpdate,
    Schedule,
    WeightAverage,
    on_device,
    train,
)
from secure_cnn.errors import RunError
from secure_cnn.interruption import StopRequest, stop_on_signals

STEPS, EPOCHS, PEAK, WARMUP = 12, 3, 0.2, 2


class Watch:
    """A monitor that writes down what it is told."""

    def __init__(self, model=None):
        self.steps, self.epochs, self.losses, self.model = [], [], [], model

    def batch(self, losses, *, step):
        self.steps.append(step)
        self.losses.append(losses)

    def epoch(self, epoch, *, step):
        self.epochs.append((epoch, step))
        if self.model is not None:
            self.model.eval()


def network(seed=0):
    """A small convolutional network with fixed weights."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(),
            nn.Linear(4 * 36, 3),
        )  # fmt: skip


def batches(count=STEPS, size=5):
    """Batches of images and labels of three classes."""
    draw = torch.Generator().manual_seed(1)
    return [
        (
            torch.rand(size, 1, 6, 6, generator=draw),
            torch.randint(3, (size,), generator=draw),
        )
        for _ in range(count)
    ]


def optimizer_of(name, model):
    """One of the optimizers of a recipe."""
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.1)
    return torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9, weight_decay=0.01)


def schedule(**changes):
    """The schedule of these tests."""
    return Schedule(**{"peak": PEAK, "steps": STEPS, "epochs": EPOCHS, "warmup": WARMUP, **changes})


def rate(step):
    """The learning rate, written out."""
    if step < WARMUP:
        return PEAK * (step + 1) / WARMUP
    return PEAK / 2 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))


def trained(model, optimizer, given, **options):
    """A training by the engine; its steps and its watch."""
    watch = options.pop("monitor", None) or Watch()
    update = options.pop("update", None) or MeanUpdate(optimizer)
    arguments = {"optimizer": optimizer, "schedule": schedule(), "monitor": watch, **options}
    return train(model, CrossEntropy(), given, update, **arguments), watch


def same(first, second):
    """Whether two models have bit-identical weights."""
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_loop_is_the_loop_that_anyone_would_write(name):
    """Bit-identical weights to a hand-written loop with the closed-form learning rate."""
    model, by_hand = network(), network()
    steps, _ = trained(model, optimizer_of(name, model), batches())
    optimizer = optimizer_of(name, by_hand)
    for step, (images, labels) in enumerate(batches()):
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.zero_grad()
        F.cross_entropy(by_hand(images), labels).backward()
        optimizer.step()
    assert steps == STEPS
    assert same(model, by_hand)
    assert not same(model, network())


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_going_on_from_a_step_gives_the_uninterrupted_weights(name):
    """Stopped after five steps and gone on with the rest: the same weights, bit for bit."""
    whole, parts = network(), network()
    trained(whole, optimizer_of(name, whole), batches())
    optimizer = optimizer_of(name, parts)
    trained(parts, optimizer, batches()[:5])
    steps, watch = trained(parts, optimizer, batches()[5:], start_step=5)
    assert steps == STEPS
    assert watch.steps == list(range(6, STEPS + 1))
    assert same(whole, parts)


def test_the_monitor_sees_every_batch_and_every_epoch():
    """Batches by step, epochs at their ends; the model trains on after an evaluation."""
    model = network()
    optimizer = optimizer_of("sgd", model)
    modes = []
    model.register_forward_pre_hook(lambda *_: modes.append(model.training))
    _, watch = trained(model, optimizer, batches(), monitor=Watch(model))
    assert watch.steps == list(range(1, STEPS + 1))
    assert watch.epochs == [(1, 4), (2, 8), (3, 12)]
    assert all(losses.shape == (5,) and not losses.requires_grad for losses in watch.losses)
    assert modes == [True] * STEPS


def test_batches_that_go_on_for_ever_end_with_the_schedule():
    """An endless iterable is left after the last step of the schedule."""
    model = network()
    steps, watch = trained(model, optimizer_of("sgd", model), iter(lambda: batches(1)[0], None))
    assert (steps, len(watch.steps)) == (STEPS, STEPS)


def test_several_batches_may_make_one_step():
    """Steps, learning rates, averages and epochs count steps of the optimizer, not batches."""
    model = network()
    optimizer = optimizer_of("sgd", model)
    average, rates, kept = WeightAverage(model, decay=0.5), [], []

    def every_third(losses):
        kept.append(losses)
        rates.append(optimizer.param_groups[0]["lr"])
        return len(kept) % 3 == 0

    steps, watch = trained(model, optimizer, batches(40), update=every_third, average=average)
    assert steps == STEPS
    assert watch.steps == [n // 3 for n in range(1, 3 * STEPS + 1)]
    assert rates == pytest.approx([rate(n // 3) for n in range(3 * STEPS)])
    assert watch.epochs == [(1, 4), (2, 8), (3, 12)]
    assert average.state_dict()["updates"] == STEPS


def test_a_stop_request_ends_the_training_after_the_step():
    """The step under way is finished, and none is begun."""
    model, stop = network(), StopRequest()

    class Stopper(Watch):
        def batch(self, losses, *, step):
            super().batch(losses, step=step)
            if step == 7:
                stop.set()

    optimizer = optimizer_of("sgd", model)
    steps, watch = trained(model, optimizer, batches(), monitor=Stopper(), stop=stop)
    seven = network()
    trained(seven, optimizer_of("sgd", seven), batches(7))
    assert (steps, watch.steps[-1]) == (7, 7)
    assert same(model, seven)


def test_a_stop_waits_for_the_step_that_several_batches_make():
    """A request in the middle of a step does not tear it apart."""
    model, stop, count = network(), StopRequest(), iter(range(1, 100))
    stop.set()
    steps, watch = trained(
        model, optimizer_of("sgd", model), batches(), stop=stop, update=lambda _: next(count) == 3
    )
    assert (steps, watch.steps) == (1, [0, 0, 1])


def test_a_training_that_diverged_says_so_before_it_steps():
    """Losses that are all not finite: an error with the step, and weights as they were."""
    model = network()
    given = batches(2)
    given[1][0].fill_(math.nan)
    after_one = network()
    trained(after_one, optimizer_of("sgd", after_one), given[:1])
    with pytest.raises(RunError, match=r"step 2: .*diverged; lower the learning rate"):
        trained(model, optimizer_of("sgd", model), given)
    assert same(model, after_one)


def test_one_bad_example_is_no_divergence():
    """A single loss that is not finite does not end a training whose update can cope with it."""
    model, given = network(), batches(1)
    given[0][0][0] = math.inf
    steps, _ = trained(model, optimizer_of("sgd", model), given, update=lambda _: True)
    assert steps == 1


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_label_smoothing_is_that_of_the_definition(smoothing):
    """(1 - s) times the cross-entropy plus s times the mean over all classes, in float64."""
    model, (images, labels) = network().double(), batches(1)[0]
    losses = CrossEntropy(label_smoothing=smoothing)(model, images.double(), labels)
    logs = model(images.double()).log_softmax(1)
    expected = -(1 - smoothing) * logs[torch.arange(5), labels] - smoothing * logs.mean(1)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        losses,
        nn.CrossEntropyLoss(reduction="none", label_smoothing=smoothing)(
            model(images.double()), labels
        ),
    )
    assert CrossEntropy.per_example is True


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, math.nan])
def test_a_smoothing_out_of_range_is_refused(smoothing):
    """All of the target cannot be spread."""
    with pytest.raises(RunError, match="label_smoothing: expected 0 up to 1"):
        CrossEntropy(label_smoothing=smoothing)


def test_the_schedule_is_its_closed_form():
    """Linear warm-up, half a cosine, the peak between them, near zero at the end."""
    rates = [schedule().at(step) for step in range(STEPS)]
    assert rates == pytest.approx([rate(step) for step in range(STEPS)], rel=1e-15)
    assert max(rates) == rates[WARMUP - 1] == rates[WARMUP] == PEAK
    assert rates[-1] < PEAK / 10
    assert schedule(warmup=0).at(0) == PEAK


@settings(deadline=None, derandomize=True)
@given(data=st.data(), epochs=st.integers(1, 60))
def test_every_epoch_ends_once(data, epochs):
    """For any number of steps: epochs 1 to the last, in order, the last with the last step."""
    steps = data.draw(st.integers(epochs, 2000))
    plan = Schedule(peak=1.0, steps=steps, epochs=epochs)
    ends = {step: plan.epoch_ended(step) for step in range(1, steps + 1)}
    reached = [(epoch, step) for step, epoch in ends.items() if epoch is not None]
    assert [epoch for epoch, _ in reached] == list(range(1, epochs + 1))
    assert reached[-1] == (epochs, steps)
    lengths = torch.tensor([0, *(step for _, step in reached)]).diff().tolist()
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(
    "changes",
    [
        {"peak": 0.0},
        {"peak": math.inf},
        {"peak": math.nan},
        {"steps": 0},
        {"epochs": 0},
        {"epochs": STEPS + 1},
        {"warmup": STEPS},
        {"warmup": -1},
    ],
)
def test_a_schedule_out_of_range_is_refused(changes):
    """Every field has its range."""
    with pytest.raises(RunError, match="expected"):
        schedule(**changes)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.99])
def test_the_average_is_its_recurrence(decay):
    """Average <- d average + (1 - d) weight with d = min(decay, (1 + t) / (10 + t)), in float64."""
    model = nn.Linear(3, 2).double()
    average = WeightAverage(model, decay=decay)
    expected = model.weight.detach().clone()
    draw = torch.Generator().manual_seed(0)
    for t in range(30):
        with torch.no_grad():
            model.weight.copy_(torch.randn(2, 3, generator=draw, dtype=torch.float64))
        average.update(model)
        d = min(decay, (1 + t) / (10 + t))
        expected = d * expected + (1 - d) * model.weight.detach()
    with average.applied(model):
        torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-12, atol=1e-14)
    if decay == 0:
        assert torch.equal(expected, model.weight.detach())


def test_applied_gives_the_weights_back_whatever_happens():
    """The same parameters with the same values afterwards, after an exception too."""
    model = network()
    average = WeightAverage(model, decay=0.9)
    trained(model, optimizer_of("sgd", model), batches(), average=average)
    parameters, before = list(model.parameters()), copy.deepcopy(model)
    with average.applied(model) as averaged:
        assert averaged is model
        assert not same(model, before)
    assert same(model, before)
    with pytest.raises(ZeroDivisionError), average.applied(model):
        raise ZeroDivisionError
    assert same(model, before)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_settle_leaves_the_average():
    """For good, in the model's own parameters, and in any layout."""
    model = network().to(memory_format=torch.channels_last)
    average = WeightAverage(model, decay=0.9)
    trained(model, optimizer_of("sgd", model), batches(), average=average)
    with average.applied(model):
        averaged = copy.deepcopy(model)
    average.write_to(model)
    assert same(model, averaged)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_an_average_goes_on_from_its_state():
    """Saved after five steps and read into a new one: the uninterrupted average, bit for bit."""
    model = network()
    whole, saved = WeightAverage(model, decay=0.9), WeightAverage(model, decay=0.9)
    optimizer = optimizer_of("sgd", model)
    trained(model, optimizer, batches()[:5], average=whole)
    saved.load_state_dict(copy.deepcopy(whole.state_dict()))
    middle = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    trained(model, optimizer, batches()[5:], average=whole, start_step=5)
    model.load_state_dict(middle[0].state_dict())
    optimizer.load_state_dict(middle[1])
    trained(model, optimizer, batches()[5:], average=saved, start_step=5)
    for a, b in zip(
        whole.state_dict()["averages"].values(),
        saved.state_dict()["averages"].values(),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_the_average_of_another_model_is_refused():
    """By names and shapes; what was averaged so far stays."""
    average = WeightAverage(nn.Linear(2, 2), decay=0.5)
    before = copy.deepcopy(average.state_dict()["averages"])
    for other in (nn.Linear(2, 3), nn.Sequential(nn.Linear(2, 2))):
        with pytest.raises(RunError, match="another model"):
            average.load_state_dict(WeightAverage(other, decay=0.5).state_dict())
    for name, value in average.state_dict()["averages"].items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("decay", [-0.1, 1.0, math.nan])
def test_a_decay_out_of_range_is_refused(decay):
    """A decay of one would never take anything in."""
    with pytest.raises(RunError, match="average_decay"):
        WeightAverage(nn.Linear(1, 1), decay=decay)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_request(number):
    """It is only noted; afterwards the handlers are those of before."""
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with stop_on_signals() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGTERM)  # again, and still only a request
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_ctrl_c_after_a_request_interrupts_at_once(first):
    """Whoever does not want to wait presses again; the handlers are restored then too."""
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]

    def impatient():
        with stop_on_signals():
            os.kill(os.getpid(), first)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        impatient()
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_outside_the_main_thread_no_handler_is_set():
    """Python allows none there; the request can still be made by hand."""
    before, seen = signal.getsignal(signal.SIGINT), []

    def work():
        with stop_on_signals() as stop:
            seen.append(signal.getsignal(signal.SIGINT))
            stop.set()
            seen.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before, True]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_batches_arrive_in_the_models_layout(layout):
    """Same values, in the layout asked for."""
    images, labels = torch.rand(2, 3, 4, 4), torch.tensor([0, 1])
    ((moved, told),) = on_device([(images, labels)], torch.device("cpu"), layout)
    assert torch.equal(moved, images)
    assert torch.equal(told, labels)
    assert moved.is_contiguous(memory_format=layout)


def test_features_that_are_no_images_have_one_layout():
    """A vector, or a channel of points, for each example."""
    for features in (torch.rand(2, 3), torch.rand(2, 3, 4)):
        batches_of_one = [(features, torch.tensor([0, 1]))]
        ((moved, _),) = on_device(batches_of_one, torch.device("cpu"), torch.channels_last)
        assert torch.equal(moved, features)
        assert moved.is_contiguous()


def test_the_cpu_computes_in_the_models_own_precision():
    """No autocast where there is no GPU: a float64 model has float64 losses."""
    model = network().double()
    given = [(images.double(), labels) for images, labels in batches(1)]
    _, watch = trained(model, optimizer_of("sgd", model), given)
    assert watch.losses[0].dtype == torch.float64


def stepped(clip_grad_norm, scale):
    """The step of SGD at rate 1 on a loss of this scale, and the gradient it was made from."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    before = [weight.detach().clone() for weight in model.parameters()]
    images = torch.randn(5, 4)
    losses = scale * model(images).pow(2).sum(1)
    gradients = torch.autograd.grad(losses.mean(), list(model.parameters()), retain_graph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    assert MeanUpdate(optimizer, clip_grad_norm=clip_grad_norm)(losses)
    steps = [old - new.detach() for old, new in zip(before, model.parameters(), strict=True)]
    return torch.cat([x.flatten() for x in steps]), torch.cat([x.flatten() for x in gradients])


@pytest.mark.parametrize("largest", [0.5, 1.0, 3.0])
def test_a_long_mean_gradient_is_shortened_and_a_short_one_left_alone(largest):
    """As a whole, over all weights: its direction stays."""
    step, gradient = stepped(largest, scale=100.0)
    assert gradient.norm() > largest
    torch.testing.assert_close(step, largest * gradient / gradient.norm(), rtol=1e-4, atol=1e-5)
    step, gradient = stepped(largest, scale=1e-3)
    assert gradient.norm() < largest
    torch.testing.assert_close(step, gradient, rtol=1e-3, atol=1e-6)


def test_no_gradient_is_clipped_unless_asked():
    """The engine's own default, for loops that have a limit of their own."""
    step, gradient = stepped(0.0, scale=100.0)
    torch.testing.assert_close(step, gradient, rtol=1e-3, atol=1e-4)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(RunError, match="clip_grad_norm: expected a finite number >= 0"):
            MeanUpdate(optimizer, clip_grad_norm=wrong)
