"""Rows that are not examples: tokens in dimension 0, another order, copies beside each other."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from privacy import DPPlan, PhysicalBatches, PrivateTraining, UnsupportedLayer, attach
from privacy.clipping.tape import Tape
from privacy.differentiation import about_half, halves

ROWS = 8


class Around(nn.Module):
    """Calls its layer on rows in another arrangement, and arranges its output back."""

    def __init__(self, inner: nn.Module, arrange: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.inner, self.arrange = inner, arrange

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.arrange(self.inner(self.arrange(inputs)))


def swapped_axes(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.transpose(0, 1)


def reversed_rows(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.flip(0)


def neighbours(inputs: torch.Tensor) -> torch.Tensor:
    order = torch.arange(len(inputs))
    order[-2:] = order[-2:].flip(0)
    return inputs[order]


def attached(model: nn.Module, shape: tuple[int, ...], samples: int = ROWS) -> PrivateTraining:
    """Every example in every sample, one physical batch, C = 1, no noise to speak of."""
    data = [(torch.rand(shape), i % 2) for i in range(samples)]
    plan = DPPlan(samples=samples, batch_size=samples, epochs=30, noise_multiplier=1e-9)
    cut = PhysicalBatches(size=samples, multiple=samples)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return attach(plan, model, optimizer, data, physical_batches=cut)


@pytest.mark.parametrize("tokens", range(1, 9))
def test_a_layer_that_sees_tokens_in_dimension_0_is_refused(tokens: int) -> None:
    """However many, that of the batch and those of the rehearsal among them."""
    model = nn.Sequential(Around(nn.Linear(4, 1), swapped_axes), nn.Flatten())
    with pytest.raises(UnsupportedLayer, match=r"^0\.inner: "):
        attached(model, (tokens, 4), samples=max(tokens, 2))


@pytest.mark.parametrize("arrange", [reversed_rows, neighbours])
def test_a_layer_that_sees_examples_in_another_order_is_refused(
    arrange: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Its norm would be added to another example's; the outputs do not tell."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), Around(nn.Linear(3, 2), arrange))
    with pytest.raises(UnsupportedLayer, match=r"the loss of an example reached rows of others"):
        attached(model, (4,))


def test_layers_that_keep_the_order_pass() -> None:
    """Control: the same network, the rows left alone."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), Around(nn.Linear(3, 2), lambda rows: rows))
    private = attached(model, (4,))
    images, labels = next(private.batches)
    assert private.step(F.cross_entropy(model(images), labels, reduction="none"))


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


Losses = Callable[[nn.Module, torch.Tensor, torch.Tensor, int], torch.Tensor]


def interleaved(model: nn.Module, x: torch.Tensor, y: torch.Tensor, k: int) -> torch.Tensor:
    logits = model(x.repeat_interleave(k, dim=0))
    return F.cross_entropy(logits, y.repeat_interleave(k), reduction="none").view(-1, k)


def called_often(model: nn.Module, x: torch.Tensor, y: torch.Tensor, k: int) -> torch.Tensor:
    return torch.stack([F.cross_entropy(model(x), y, reduction="none") for _ in range(k)], dim=1)


def repeated(model: nn.Module, x: torch.Tensor, y: torch.Tensor, k: int) -> torch.Tensor:
    logits = model(x.repeat(k, 1))
    return F.cross_entropy(logits, y.repeat(k), reduction="none").view(k, -1).t()


def interleaved_and_turned(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, k: int
) -> torch.Tensor:
    return interleaved(model, x, y, k).t().reshape(-1, k)


def called_in_other_orders(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, k: int
) -> torch.Tensor:
    logits = [model(x.roll(i, 0)).roll(-i, 0) for i in range(k)]
    return torch.stack([F.cross_entropy(z, y, reduction="none") for z in logits], dim=1)


@pytest.mark.parametrize("copies", [1, 2, 4, 5])
@pytest.mark.parametrize("losses_of", [interleaved, called_often])
def test_copies_that_are_adjacent_pass(losses_of: Losses, copies: int) -> None:
    """Control: one pass on adjacent rows, or one pass a copy."""
    private = attached(network(), (4,))
    images, labels = next(private.batches)
    assert private.step(losses_of(private.model, images, labels, copies))


@pytest.mark.parametrize("copies", [2, 3, 4, 8])
@pytest.mark.parametrize(
    "losses_of",
    [
        repeated,
        interleaved_and_turned,
        called_in_other_orders,
    ],
)
def test_copies_in_another_order_are_refused(losses_of: Losses, copies: int) -> None:
    """Before anything is added; the batch can be stepped in the right order then."""
    private = attached(network(), (4,))
    images, labels = next(private.batches)
    for _ in range(2):
        with pytest.raises(UnsupportedLayer, match="the loss of an example reached rows of others"):
            private.step(losses_of(private.model, images, labels, copies))
    assert not any(bool(total.any()) for total in private._clipped.sums)
    assert private.step(interleaved(private.model, images, labels, copies))


def kept(x: torch.Tensor) -> torch.Tensor:
    return x


def noised(x: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return (x + 0.3 * torch.randn(x.shape, generator=generator)).clamp(0, 1)


def turned(x: torch.Tensor) -> torch.Tensor:
    turns = torch.arange(len(x)).view(-1, 1, 1, 1) % 2 == 1
    return torch.where(turns, x.flip(-1), x)


def shifted(x: torch.Tensor) -> torch.Tensor:
    rows = [row.roll((i % 3 - 1, i % 5 - 2), (-2, -1)) for i, row in enumerate(x)]
    return torch.stack(rows)


def drawn_anew(x: torch.Tensor) -> torch.Tensor:
    return torch.rand(x.shape, generator=torch.Generator().manual_seed(3))


def attached_to_images(samples: int, images: torch.Tensor | None = None) -> PrivateTraining:
    """A network whose first layer sees the normalised image."""
    if images is None:
        images = torch.rand(samples, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(108, 2))
    model.register_forward_pre_hook(lambda _, inputs: ((inputs[0] - 0.3) / 0.2,))
    data = [(images[i], i % 2) for i in range(samples)]
    plan = DPPlan(samples=samples, batch_size=samples, epochs=30, noise_multiplier=1e-9)
    cut = PhysicalBatches(size=samples, multiple=samples)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return attach(plan, model, optimizer, data, physical_batches=cut)


@pytest.mark.parametrize("samples", [4, 33])
@pytest.mark.parametrize("copies", [2, 3, 4])
@pytest.mark.parametrize("augment", [kept, noised, turned])
def test_a_batch_that_was_repeated_in_another_order_is_refused(
    augment: Callable[[torch.Tensor], torch.Tensor], copies: int, samples: int
) -> None:
    """Every layer agrees with the losses, and one example moves the sum by K times C."""
    private = attached_to_images(samples)
    images, labels = next(private.batches)
    logits = private.model(augment(images.repeat(copies, 1, 1, 1)))
    losses = F.cross_entropy(logits, labels.repeat(copies), reduction="none")
    with pytest.raises(UnsupportedLayer, match="look like other examples than those whose losses"):
        private.step(losses.view(-1, copies))


@pytest.mark.parametrize("samples", [2, 3, 8, 33])
@pytest.mark.parametrize("augment", [kept, noised, turned, shifted, drawn_anew])
def test_augmented_copies_in_their_places_pass(
    augment: Callable[[torch.Tensor], torch.Tensor], samples: int
) -> None:
    """Control: however much they are changed."""
    for copies in (2, 3, 4):
        private = attached_to_images(samples)
        images, labels = next(private.batches)
        logits = private.model(augment(images.repeat_interleave(copies, dim=0)))
        losses = F.cross_entropy(logits, labels.repeat_interleave(copies), reduction="none")
        assert private.step(losses.view(-1, copies))


@pytest.mark.parametrize("same", [0.0, 0.99])
def test_copies_of_images_that_are_alike_pass(same: float) -> None:
    """Control: all black, or hardly different from each other."""
    images = torch.rand(8, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    private = attached_to_images(8, same * images[:1] + (0.01 * images if same else 0.0 * images))
    x, labels = next(private.batches)
    logits = private.model(turned(x.repeat_interleave(4, dim=0)))
    losses = F.cross_entropy(logits, labels.repeat_interleave(4), reduction="none")
    assert private.step(losses.view(-1, 4))


@pytest.mark.parametrize("copies", [2, 3])
def test_a_call_on_reversed_images_is_refused(copies: int) -> None:
    """With their labels reversed too, its layers and losses agree."""
    private = attached_to_images(8)
    x, y = next(private.batches)
    calls = [(x, y)] * (copies - 1) + [(x.flip(0), y.flip(0))]
    losses = [F.cross_entropy(private.model(a), b, reduction="none") for a, b in calls]
    with pytest.raises(UnsupportedLayer, match="look like other examples than those whose losses"):
        private.step(torch.stack(losses, dim=1))


def test_copies_that_are_reordered_later_are_found_at_once() -> None:
    """Each step's losses are asked, down to the layer that they are made from."""
    private = attached(network(), (4,))
    batches = private.batches
    for _ in range(5):
        images, labels = next(batches)
        private.step(interleaved(private.model, images, labels, 4))
    images, labels = next(batches)
    with pytest.raises(UnsupportedLayer, match="repeat_interleave, not repeat"):
        private.step(repeated(private.model, images, labels, 4))
    assert private.steps == 5


Mixture = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


def centred(logits: torch.Tensor, y: torch.Tensor, weight: float) -> torch.Tensor:
    losses = F.cross_entropy(logits, y, reduction="none")
    return losses + weight * losses.mean()


def contrastive(logits: torch.Tensor, y: torch.Tensor, weight: float) -> torch.Tensor:
    others = (logits @ logits.t()).logsumexp(1)
    return F.cross_entropy(logits, y, reduction="none") + weight * others


def gated(logits: torch.Tensor, y: torch.Tensor, weight: float) -> torch.Tensor:
    gate = 1 + weight * torch.tanh(logits[0].sum())
    return F.cross_entropy(logits, y, reduction="none") * gate


def hooked(logits: torch.Tensor, y: torch.Tensor, weight: float) -> torch.Tensor:
    if weight:
        logits.register_hook(lambda gradient: gradient.sum(0, keepdim=True).expand_as(gradient))
    return F.cross_entropy(logits, y, reduction="none")


@pytest.mark.parametrize("mixture", [centred, contrastive, hooked])
@pytest.mark.parametrize("warm_up", [1, 2, 9, 20])
def test_a_loss_that_begins_to_mix_is_found_in_that_step(mixture: Mixture, warm_up: int) -> None:
    """With a weight of zero until then: its graph is the same before and after."""
    private = attached(network(), (4,))
    for images, labels in private.batches:
        if private.steps == warm_up:
            break
        private.step(mixture(private.model(images), labels, 0.0))
    with pytest.raises(UnsupportedLayer, match="or a loss depends on other examples than its own"):
        private.step(mixture(private.model(images), labels, 1.0))
    assert private.steps == warm_up


def test_what_all_losses_take_from_one_example_is_found_soon() -> None:
    """In a new graph at once; in an old one where that example is not among the chosen ones."""
    private = attached(network(), (4,))
    images, labels = next(private.batches)
    with pytest.raises(UnsupportedLayer, match="or a loss depends on other examples than its own"):
        private.step(gated(private.model(images), labels, 1.0))
    private = attached(network(), (4,))

    def trained() -> None:
        for images, labels in private.batches:
            private.step(gated(private.model(images), labels, float(private.steps > 1)))

    with pytest.raises(UnsupportedLayer, match="or a loss depends on other examples than its own"):
        trained()


class MixesLater(nn.Module):
    """Mixes examples inside of the network from some pass on; its number is not watched."""

    passes, until = 0.0, float("inf")

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return inputs + inputs.mean(0, keepdim=True) if self.passes > self.until else inputs


def test_a_network_of_another_graph_is_asked_anew() -> None:
    """What mixes between its layers the losses' own part of the graph does not show."""
    mixes = MixesLater()
    private = attached(nn.Sequential(nn.Linear(4, 3), mixes, nn.Linear(3, 2)), (4,))
    batches = private.batches
    for _ in range(3):
        images, labels = next(batches)
        private.step(F.cross_entropy(private.model(images), labels, reduction="none"))
    mixes.until = mixes.passes
    images, labels = next(batches)
    with pytest.raises(UnsupportedLayer, match="reached rows of others"):
        private.step(F.cross_entropy(private.model(images), labels, reduction="none"))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_are_asked_too(reentrant: bool) -> None:
    """Those of a reentrant checkpoint are in no graph; a skip around them reaches their input."""

    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            inside = checkpoint(self.inner, x, use_reentrant=reentrant)
            return self.last(x + inside) + x[:, :2]

    private = attached(Skips(), (4,))
    batches = private.batches
    for _ in range(4):
        images, labels = next(batches)
        private.step(F.cross_entropy(private.model(images), labels, reduction="none"))
    images, labels = next(batches)
    with pytest.raises(UnsupportedLayer, match="reached rows of others"):
        private.step(centred(private.model(images), labels, 1.0))


def test_a_loss_that_depends_on_other_examples_is_found_at_the_first_step() -> None:
    """It has no bounded contribution of an example."""
    private = attached(network(), (4,))
    images, labels = next(private.batches)
    losses = F.cross_entropy(private.model(images), labels, reduction="none")
    with pytest.raises(UnsupportedLayer, match="or a loss depends on other examples than its own"):
        private.step(losses - losses.mean())


def test_a_broken_example_is_not_taken_for_a_mixture() -> None:
    """Zero times its gradient is not finite either."""
    private = attached(network(), (4,))
    images, labels = next(private.batches)
    images[3] = float("nan")
    assert private.step(F.cross_entropy(private.model(images), labels, reduction="none"))
    assert private.non_finite == 1


@pytest.mark.parametrize("rows", range(2, 10))
def test_halves_tell_any_order_from_any_other(rows: int) -> None:
    """Every exchange of two rows moves one of them into a set or out of it."""
    sets = halves(rows)
    for one in range(rows):
        for other in range(one):
            assert any(chosen[one] != chosen[other] for chosen in sets)


def test_some_of_the_examples_tell_repeat_from_repeat_interleave() -> None:
    """At every size: some chosen example has a copy in the rows of one that is not."""
    for examples in range(2, 65):
        for copies in range(2, 17):
            chosen = about_half(examples, seed=1)
            assert chosen[0]
            assert not chosen[-1]
            rows = torch.arange(examples * copies)
            assert bool((chosen[rows % examples] & ~chosen[rows // copies]).any())


def test_earlier_gradients_and_the_tape_stay_as_they_were() -> None:
    """The question leaves nothing behind."""
    private = attached(network(), (4,))
    images, labels = next(private.batches)
    tape: Tape = private._clipped._tape
    with pytest.raises(UnsupportedLayer):
        private.step(repeated(private.model, images, labels, 2))
    assert not tape.recording
    assert not tape.tracing
    assert tape.take() == {}
    assert all(p.grad is None for p in private.model.parameters())
