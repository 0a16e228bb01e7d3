"""What changes between `attach` and a step: what mixes examples is refused, what does not works."""

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import defenses
from privacy import DPPlan, PrivacyError, PrivateTraining, StepError, UnsupportedLayer, attach
from privacy.clipping.watch import admitted


class Activation(nn.Module):
    """A user's module without parameters; one of its flags makes it mix."""

    def __init__(self) -> None:
        super().__init__()
        self.mixes, self.calls = False, 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return mixed(inputs) if self.mixes else inputs


class InTraining(nn.Module):
    """Mixes examples in train mode and keeps no statistics: unknown to any list of types."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return mixed(inputs) if self.training else inputs


def mixed(values: torch.Tensor) -> torch.Tensor:
    """Rows that know each other."""
    return values - 0.5 * values.mean(0)


def network() -> nn.Module:
    """One of each kind of place that can change."""
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.Identity(),
        nn.Dropout(0.1),
        Activation(),
        InTraining(),
        nn.Flatten(),
        nn.Linear(144, 3),
        nn.Softmax(dim=1),
    )
    for place in (1, 5):
        model[place].eval().requires_grad_(False)
    return model


def attached(model: nn.Module) -> PrivateTraining:
    """A training with no noise to speak of."""
    data = [(torch.rand(1, 6, 6), i % 3) for i in range(16)]
    plan = DPPlan(samples=16, batch_size=8, epochs=4, noise_multiplier=1e-6)
    return attach(plan, model, torch.optim.SGD(model.parameters(), lr=0.1), data)


def losses_of(private: PrivateTraining, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(private.model(images), labels, reduction="none")


Change = Callable[[nn.Module], Callable[[], Any]]


def trained(model: nn.Module) -> Callable[[], Any]:
    model.train()
    return lambda: [model[place].eval() for place in (1, 5)]


def batch_norm_trained(model: nn.Module) -> Callable[[], Any]:
    model[1].train()
    return lambda: model[1].eval()


def batch_norm_without_momentum(model: nn.Module) -> Callable[[], Any]:
    model[1].train().momentum = 0.0
    return lambda: setattr(model[1].eval(), "momentum", 0.1)


def statistics_forgotten(model: nn.Module) -> Callable[[], Any]:
    kept = model[1].running_mean, model[1].running_var
    model[1].running_mean = model[1].running_var = None

    def undo() -> None:
        model[1].running_mean, model[1].running_var = kept

    return undo


def unknown_layer_trained(model: nn.Module) -> Callable[[], Any]:
    model[5].training = True
    return lambda: setattr(model[5], "training", False)


def hooked(register: str, hook: Callable[..., Any], place: int = 2) -> Change:
    def change(model: nn.Module) -> Callable[[], Any]:
        handle = getattr(model[place], register)(hook)
        return handle.remove

    return change


def hooked_on_all(model: nn.Module) -> Callable[[], Any]:
    hook = nn.modules.module.register_module_forward_hook
    handle = hook(lambda module, _, output: mixed(output) if module is model[2] else None)
    return handle.remove


def swapped(model: nn.Module) -> Callable[[], Any]:
    before, model[2] = model[2], nn.BatchNorm2d(4, affine=False, track_running_stats=False)
    return lambda: model.__setitem__(2, before)


def added(model: nn.Module) -> Callable[[], Any]:
    model.append(InTraining().train())
    return lambda: model.__delitem__(9)


def forward_replaced(model: nn.Module) -> Callable[[], Any]:
    model[2].forward = mixed
    return lambda: vars(model[2]).pop("forward")


def recorded_forward_wrapped(model: nn.Module) -> Callable[[], Any]:
    recorded = model[7].forward
    model[7].forward = lambda inputs: recorded(mixed(inputs))
    return lambda: setattr(model[7], "forward", recorded)


def forward_of_the_class(model: nn.Module) -> Callable[[], Any]:
    before = nn.Identity.forward
    nn.Identity.forward = lambda self, inputs: mixed(inputs)  # type: ignore[method-assign]
    return lambda: setattr(nn.Identity, "forward", before)


def call_replaced(model: nn.Module) -> Callable[[], Any]:
    model[2]._call_impl = mixed
    return lambda: vars(model[2]).pop("_call_impl")


def class_replaced(model: nn.Module) -> Callable[[], Any]:
    model[2].__class__ = types.new_class("Other", (InTraining,))
    return lambda: setattr(model[2], "__class__", nn.Identity)


def parametrized(model: nn.Module) -> Callable[[], Any]:
    parametrize.register_parametrization(model[7], "bias", nn.Identity())
    return lambda: parametrize.remove_parametrizations(model[7], "bias")


def dimension(model: nn.Module) -> Callable[[], Any]:
    model[8].dim = 0
    return lambda: setattr(model[8], "dim", 1)


def flag(model: nn.Module) -> Callable[[], Any]:
    model[4].mixes = True
    return lambda: setattr(model[4], "mixes", False)


def compiled(model: nn.Module) -> Callable[[], Any]:
    model[2]._compiled_call_impl = mixed
    return lambda: setattr(model[2], "_compiled_call_impl", None)


CHANGES: dict[str, Change] = {
    "train mode of the whole model": trained,
    "train mode of a BatchNorm": batch_norm_trained,
    "train mode of a BatchNorm that writes nothing": batch_norm_without_momentum,
    "statistics taken from a BatchNorm": statistics_forgotten,
    "train mode of an unknown layer": unknown_layer_trained,
    "forward hook": hooked("register_forward_hook", lambda m, i, o: mixed(o)),
    "forward pre-hook": hooked("register_forward_pre_hook", lambda m, i: (mixed(i[0]),)),
    "backward hook": hooked(
        "register_full_backward_hook", lambda m, given, out: (mixed(given[0]),)
    ),
    "backward pre-hook": hooked("register_full_backward_pre_hook", lambda m, g: (mixed(g[0]),)),
    "hook on a recorded layer": hooked("register_forward_hook", lambda m, i, o: mixed(o), 7),
    "hook on all modules": hooked_on_all,
    "module swapped": swapped,
    "module added": added,
    "forward replaced": forward_replaced,
    "forward of a recorded layer wrapped": recorded_forward_wrapped,
    "forward of the class replaced": forward_of_the_class,
    "_call_impl replaced": call_replaced,
    "class replaced": class_replaced,
    "parametrization": parametrized,
    "dimension of a Softmax": dimension,
    "flag of a user's module": flag,
    "compiled": compiled,
}
each_change = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


@contextmanager
def undone(undo: Callable[[], Any]) -> Iterator[None]:
    try:
        yield
    finally:
        undo()


@each_change
def test_what_mixes_in_the_forward_pass_and_is_put_back_before_the_step_is_refused(
    change: Change,
) -> None:
    """Forward in one state and step in another; nothing is spent."""
    model = network()
    private = attached(model)
    images, labels = next(private.batches)

    def forward_and_step() -> None:
        with undone(change(model)):
            losses = losses_of(private, images, labels)
        private.step(losses)

    with pytest.raises(PrivacyError):
        forward_and_step()
    assert private.steps == 0


@each_change
def test_what_changed_and_stays_is_refused_at_the_step(change: Change) -> None:
    """Though the forward pass ran before; a mode that no forward pass saw changes nothing."""
    model = network()
    private = attached(model)
    images, labels = next(private.batches)
    losses = losses_of(private, images, labels)
    with undone(change(model)):
        if change is unknown_layer_trained:
            assert private.step(losses)
            return
        with pytest.raises(PrivacyError):
            private.step(losses)
    assert private.steps == 0


def test_a_change_that_is_undone_costs_nothing() -> None:
    """Control: the same model, changed and put back before the forward pass, trains."""
    model = network()
    private = attached(model)
    batches = private.batches
    for change in CHANGES.values():
        if change is parametrized:  # It replaces the parameter for good.
            continue
        change(model)()
    for step, (images, labels) in zip(range(4), batches, strict=False):
        private.step(losses_of(private, images, labels))
        assert private.steps == step + 1


@pytest.mark.parametrize("write", ["train mode", "data", "numpy", "new object", "counter"])
def test_a_buffer_that_was_written_between_steps_is_refused(write: str) -> None:
    """However it was written: counters of versions see only some of these."""
    model = network()
    private = attached(model)
    images, labels = next(private.batches)
    norm = model[1]
    if write == "train mode":
        with torch.no_grad():
            norm.train()(torch.rand(4, 4, 6, 6))
        norm.eval()
    elif write == "data":
        norm.running_mean.data.add_(1)
    elif write == "numpy":
        norm.running_mean.numpy()[1] = 7
    elif write == "new object":
        norm.running_var = norm.running_var + 1
    else:
        norm.num_batches_tracked = torch.tensor(3)
    losses = losses_of(private, images, labels)
    with pytest.raises(
        UnsupportedLayer, match=r"^1\.(running|num).*a buffer was written since"
    ) as e:
        private.step(losses)
    assert "have moved by them, which no epsilon covers: build the model anew" in str(e.value)
    assert private.steps == 0


def test_a_model_that_was_converted_before_the_step_is_refused() -> None:
    """With what to do, and not with torch's words about a scalar type."""
    model = network()
    private = attached(model)
    images, labels = next(private.batches)
    losses = losses_of(private, images, labels)
    model.double()
    with pytest.raises(StepError, match=r"expected torch\.float32 .* got torch\.float64 .* attach"):
        private.step(losses)
    assert private.steps == 0
    model.float()
    assert private.step(losses)


def test_a_buffer_that_was_put_back_is_not() -> None:
    """As an attack's scope does it: other versions, the same bytes; NaN is equal to itself."""
    model = network()
    model[4].register_buffer("unused", torch.tensor([float("nan")]))
    private = attached(model)
    images, labels = next(private.batches)
    with defenses.scope.attack_scope(model):
        model[1].running_mean.add_(1)
    assert private.step(losses_of(private, images, labels))


def test_dropout_may_come_and_go_and_attacks_may_use_eval_mode() -> None:
    """Modes that do not mix are proved once each; the forward pass of an attack is not stepped."""
    model = network()
    private = attached(model)
    proofs = []
    watch: Any = private._clipped._tape._watch
    prove = watch._prove
    watch._prove = lambda: (proofs.append(1), prove())
    for step, (images, labels) in enumerate(private.batches):
        model[3].train(step % 2 == 0)
        model[3].p = 0.1 * (step % 3)
        perturbed = images.clone().requires_grad_()
        before = [module.training for module in model.modules()]
        model.eval()
        losses_of(private, perturbed, labels).sum().backward()
        for module, mode in zip(model.modules(), before, strict=True):
            module.training = mode
        private.step(losses_of(private, images, labels))
    assert private.steps == private.plan.steps
    assert len(proofs) == 1


def test_a_forward_pass_that_is_not_stepped_may_run_in_any_mode_that_is_not_known_to_mix() -> None:
    """A diagnosis with gradients, a layer in train mode: only its losses would be refused."""
    model = network()
    private = attached(model)
    images, labels = next(private.batches)
    model[5].train()
    diagnosis = losses_of(private, images, labels)
    model[5].eval()
    private.step(losses_of(private, images, labels))
    next(private.batches)
    with pytest.raises(UnsupportedLayer, match=r"moved the output|reached rows of others"):
        private._clipped.gradients_of(diagnosis, torch.ones(len(diagnosis), dtype=torch.bool))
    assert not model[5].training


def test_an_admitted_observer_may_hook() -> None:
    """By its exact type: a subclass may do something else."""

    @admitted
    class Listener:
        def hear(self, *_: object) -> None: ...

    class Louder(Listener): ...

    model = network()
    private = attached(model)
    batches = private.batches
    for listener in (Listener(), Louder()):
        handle = model.register_forward_hook(listener.hear)
        images, labels = next(batches)
        if type(listener) is Listener:
            private.step(losses_of(private, images, labels))
            handle.remove()
        else:
            with pytest.raises(UnsupportedLayer, match=r"^Sequential: its hooks changed since"):
                losses_of(private, images, labels)


def test_hooks_from_before_attach_stay() -> None:
    """They were there when the model was probed."""
    model, heard = network(), []
    model[2].register_forward_hook(lambda module, inputs, output: heard.append(1))
    private = attached(model)
    for images, labels in private.batches:
        private.step(losses_of(private, images, labels))
    assert heard


class Statistic(nn.Module):
    """Keeps a running mean in one of the places that torch does not count as buffers."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place = place
        self.data: Any = None
        mean = torch.zeros(4, 1, 1)
        self.mean = nn.Parameter(mean, requires_grad=False) if place == "parameter" else mean

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.training:
            now = inputs.detach().mean((0, 2, 3))[:, None, None]
            if self.place == "new object":
                self.mean = 0.9 * self.mean + 0.1 * now
            else:
                self.mean.data.lerp_(now, 0.1)
        return inputs if self.training else inputs - self.mean


def with_statistic(place: str) -> nn.Module:
    model = network()
    model[2] = Statistic(place)
    return model


PLACES = ["parameter", "in place", "new object"]


@pytest.mark.parametrize("place", PLACES)
def test_a_statistic_outside_of_buffers_is_refused_at_attach(place: str) -> None:
    """By name, and it is what it was."""
    model = with_statistic(place)
    with pytest.raises(UnsupportedLayer, match=r"writes to 2\.mean: statistics of the examples"):
        attached(model)
    if place != "new object":
        assert not model[2].mean.any()


@pytest.mark.parametrize("place", PLACES)
def test_a_statistic_outside_of_buffers_that_was_written_between_steps_is_refused(
    place: str,
) -> None:
    """In eval mode nothing is written; between two steps it gathered, and is in eval mode again."""
    model = with_statistic(place)
    model[2].eval()
    private = attached(model)
    images, labels = next(private.batches)
    losses = losses_of(private, images, labels)
    with torch.no_grad():
        model[2].train()(torch.rand(4, 4, 6, 6))
    model[2].eval()
    kind = "a parameter that is not trained" if place == "parameter" else "a tensor"
    with pytest.raises(UnsupportedLayer, match=rf"^2\.mean: {kind} was written since .*detach\(\)"):
        private.step(losses)
    assert private.steps == 0


class Scalar(nn.Module):
    """Holds a number as a tensor without dimensions: a constant, or one that each pass makes."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.number = what, torch.tensor(2.0)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        now = inputs.detach().mean()
        if self.what == "last":
            self.number = now
        elif self.what == "any":
            self.number = (inputs > 0).any()
        elif self.what == "statistic":
            self.number = 0.9 * self.number + 0.1 * now
        return inputs


@pytest.mark.parametrize("what", ["constant", "last", "any", "statistic"])
def test_a_tensor_without_dimensions_is_told_apart_as_others_are(what: str) -> None:
    """Only what is carried from pass to pass is refused; a loss may be noted between steps."""
    model = network()
    model[2] = Scalar(what)
    if what == "statistic":
        with pytest.raises(UnsupportedLayer, match=r"2\.number"):
            attached(model)
        return
    private = attached(model)
    for images, labels in private.batches:
        losses = losses_of(private, images, labels)
        private.step(losses)
        model.last_loss = losses.mean().detach()
    assert private.steps == private.plan.steps


class Late(nn.Module):
    """Gathers a statistic only after some passes, in a tensor that was not there before."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.calls = what, 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls > 40:
            now = inputs.detach().mean((0, 2, 3))
            kept = getattr(self, "kept", torch.zeros(4))
            self.kept = now if self.what == "last" else 0.9 * kept + 0.1 * now
        return inputs


def test_a_tensor_that_appears_later_is_proved_to_hold_the_last_pass_only() -> None:
    """A statistic is refused by name; an activation that is kept to be looked at is not."""
    for what in ("last", "statistic"):
        model = network()
        model[2] = Late(what)
        private = attached(model)
        images, labels = next(private.batches)
        model[2].calls = 40
        losses = losses_of(private, images, labels)
        if what == "last":
            private.step(losses)
            continue
        with pytest.raises(UnsupportedLayer, match=r"writes to 2\.kept: statistics"):
            private.step(losses)


class Keeps(nn.Module):
    """Keeps what is no statistic in plain attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.utils.spectral_norm(nn.Linear(144, 8)).eval().requires_grad_(False)
        self.head = nn.Linear(8, 3)
        self.seen = self.grid = self.hidden = None
        self.mask = torch.tensor([0.0, float("-inf"), float("nan")])
        self.alias = self.head.weight.data
        self.large = torch.rand(300, 300)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.grid is None:
            self.grid = torch.arange(8.0)
        self.hidden = self.linear(inputs) + self.grid
        self.seen = self.hidden.detach()
        self.signs = self.head.weight.detach().sign()
        return self.head(self.hidden)


def test_what_is_kept_of_the_last_pass_alone_is_not_refused() -> None:
    """Activations to be looked at, weights that are computed, constants made at the first pass."""
    model = network()
    model[7] = Keeps()
    model[7].linear.eval()
    private = attached(model)
    for images, labels in private.batches:
        private.step(losses_of(private, images, labels))
        with torch.no_grad():
            model(images)
    assert private.steps == private.plan.steps


@pytest.mark.parametrize("name", ["grid", "large"])
def test_a_constant_of_a_layer_stays(name: str) -> None:
    """Though it was made in the first pass; of large ones a single number is seen."""
    model = network()
    model[7] = Keeps()
    private = attached(model)
    images, labels = next(private.batches)
    getattr(model[7], name).numpy().reshape(-1)[-1] += 1e-3
    with pytest.raises(UnsupportedLayer, match=rf"^7\.{name}: a tensor was written since"):
        private.step(losses_of(private, images, labels))


def test_large_frozen_weights_are_watched() -> None:
    """By sums of their bits, so that no copy of them is held."""
    model = network()
    model.insert(7, nn.Linear(144, 1000).requires_grad_(False))
    model[8] = nn.Linear(1000, 3)
    private = attached(model)
    images, labels = next(private.batches)
    model[7].weight.data[500, 7] += 1e-4
    with pytest.raises(
        UnsupportedLayer,
        match=r"^7\.weight: a parameter that is not trained was .* outside of the model",
    ):
        private.step(losses_of(private, images, labels))


def test_a_counter_of_passes_is_refused_with_its_cure() -> None:
    """Nothing says that it only counts."""
    model = network()
    private = attached(model)
    images, labels = next(private.batches)
    model[1].num_batches_tracked += 1
    with pytest.raises(
        UnsupportedLayer, match=r"num_batches_tracked: .*of passes, in a Python int"
    ):
        private.step(losses_of(private, images, labels))


class Remembers(nn.Module):
    """Reads what the pass before left, where no tensor is watched."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: list[float] = [0.0]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        last, self.memory = self.memory[0], [float(inputs.detach().abs().max())]
        return inputs + last


def test_what_a_pass_reads_of_the_one_before_is_refused() -> None:
    model = network()
    model[2] = Remembers()
    with pytest.raises(UnsupportedLayer):
        attached(model)
