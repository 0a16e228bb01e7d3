"""The drop-in's loss: one by which examples depend on each other is refused, the others clipped.

Oracle: the loss of one example alone, its gradient in float64, clipped and summed by hand.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from privacy import StepError
from privacy.opacus import PrivacyEngine

CLASSES, FEATURES, SAMPLES = 3, 4, 12
ROUNDING = 1e-4
"""Clipping factors are a little below C over the norm, so that rounding never exceeds C."""
WEIGHTS = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
PRIOR = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def data_of(count: int) -> TensorDataset:
    """Every class; the last example is of the rare one."""
    random = torch.Generator().manual_seed(0)
    images = torch.randn(count, FEATURES, generator=random, dtype=torch.float64)
    labels = torch.arange(count) % 2
    labels[2] = labels[-1] = 2  # the first three are 0, 1, 2: as the rows' own numbers
    return TensorDataset(images, labels)


def network(outputs: int = CLASSES) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


def flat(tensors) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def clipped_sum(loss, count: int, *, reduction: str = "mean", make=network, steps: int = 1):
    """What a step on the whole data set adds up, with next to no noise."""
    net = make()
    model, optimizer, loader = PrivacyEngine().make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=1.0),
        data_loader=DataLoader(data_of(SAMPLES + 1), batch_size=SAMPLES + 1),
        noise_multiplier=1e-9,
        max_grad_norm=1.0,
        loss_reduction=reduction,
    )
    # The sample is all examples; the neighbour lacks the last, as its coin could have fallen.
    loader.batch_sampler._generator.bernoulli = lambda n, p: (
        torch.arange(n) < (count() if callable(count) else count)
    )
    for _ in range(steps):
        before = flat(net.parameters())
        ((images, labels),) = loader
        optimizer.zero_grad()
        loss(model(images), labels).backward()
        optimizer.step()
    divisor = SAMPLES + 1 if reduction == "mean" else 1
    return divisor * (before - flat(net.parameters()))


def oracle(loss, count: int, make=network) -> torch.Tensor:
    """The same by hand: each example's own loss, clipped to 1."""
    net, total = make(), 0
    images, labels = data_of(SAMPLES + 1).tensors
    for i in range(count):
        own = loss(net(images[i : i + 1]), labels[i : i + 1])
        gradient = flat(torch.autograd.grad(own, list(net.parameters())))
        total = total + gradient / max(1.0, float(gradient.norm()))
    return total


def onehot(labels):
    return F.one_hot(labels, CLASSES).double()


def own_cross_entropy(out, y):
    return -out.log_softmax(1)[torch.arange(len(y)), y].mean()


def focal(out, y):
    losses = F.cross_entropy(out, y, reduction="none")
    return ((1 - (-losses).exp()) ** 2 * losses).mean()


def trades(out, y):
    shifted = out * 0.9 + 0.1
    robust = F.kl_div(shifted.log_softmax(1), out.softmax(1), reduction="batchmean")
    return F.cross_entropy(out, y) + 6.0 * robust


def largest_margin(out, y):
    own = out.gather(1, y[:, None]).squeeze(1)
    others = out.masked_fill(onehot(y).bool(), -1e9).amax(1)
    return F.relu(1 - own + others).mean()


def in_place(out, y):
    losses = F.cross_entropy(out, y, reduction="none")
    losses *= WEIGHTS[y]
    losses.clamp_(max=5.0)
    return losses.mean()


def several(out, y):
    terms = torch.stack([F.cross_entropy(out, y), 0.1 * out.square().mean()])
    return 0.5 * terms.sum() + sum([out.abs().mean(), out.std(1).mean()]) / 2


def by_top(out, y):
    values, _ = out.topk(2, dim=1)
    return (values[:, 0] - values[:, 1]).square().mean() + out.max(dim=1).values.mean()


MEANS = {
    "cross entropy": F.cross_entropy,
    "smoothed": lambda out, y: F.cross_entropy(out, y, label_smoothing=0.1),
    "soft labels": lambda out, y: F.cross_entropy(out, onehot(y) * 0.8 + 0.05),
    "module": nn.CrossEntropyLoss(),
    "own cross entropy": own_cross_entropy,
    "weights by rows": lambda out, y: F.cross_entropy(
        out, y, weight=WEIGHTS, reduction="none"
    ).mean(),
    "weights of labels": lambda out, y: (
        WEIGHTS[y] * F.cross_entropy(out, y, reduction="none")
    ).mean(),
    "by the number of rows": lambda out, y: F.cross_entropy(out, y, reduction="sum") / len(y),
    "times its inverse": lambda out, y: (
        F.cross_entropy(out, y, reduction="none").sum() * (1 / out.shape[0])
    ),
    "by a tensor of it": lambda out, y: (
        F.cross_entropy(out, y, reduction="sum") / torch.tensor(len(y))
    ),
    "nll": lambda out, y: F.nll_loss(out.log_softmax(1), y),
    "binary": lambda out, y: F.binary_cross_entropy_with_logits(out, onehot(y)),
    "binary, weighted": lambda out, y: F.binary_cross_entropy_with_logits(
        out, onehot(y), weight=PRIOR, pos_weight=WEIGHTS
    ),
    "probabilities": lambda out, y: F.binary_cross_entropy(out.sigmoid(), onehot(y)),
    "squares": lambda out, y: F.mse_loss(out, onehot(y)),
    "smooth": lambda out, y: F.smooth_l1_loss(out, onehot(y)),
    "margin": F.multi_margin_loss,
    "margin, weighted": lambda out, y: F.multi_margin_loss(out, y, weight=WEIGHTS),
    "hinge": largest_margin,
    "focal": focal,
    "trades": trades,
    "poisson": lambda out, y: F.poisson_nll_loss(out[:, 0], y.double()),
    "temperature": lambda out, y: F.cross_entropy(out / 2.0, y),
    "prior": lambda out, y: F.cross_entropy(out + PRIOR.log(), y),
    "in place": in_place,
    "several": several,
    "top": by_top,
    "flattened": lambda out, y: F.mse_loss(out.view(len(y), -1).flatten(), onehot(y).flatten()),
    "transposed": lambda out, y: out.t().square().sum(0).mean(),
    "columns": lambda out, y: out.square().mean(0).sum(),
    "chunks": lambda out, y: sum(part.square().sum(1).mean() for part in out.chunk(3, dim=1)),
    "from zero": lambda out, y: torch.zeros(()) + F.cross_entropy(out, y) - 1.0,
}


@pytest.mark.parametrize("loss", MEANS.values(), ids=MEANS)
def test_a_mean_of_rows_is_clipped_row_by_row(loss):
    """The sum is the oracle's, for both neighbours: one example moves it by at most C."""
    for count in (SAMPLES, SAMPLES + 1):
        got = clipped_sum(loss, count)
        torch.testing.assert_close(got, oracle(loss, count), rtol=0, atol=ROUNDING)
    moved = clipped_sum(loss, SAMPLES + 1) - clipped_sum(loss, SAMPLES)
    assert moved.norm() <= 1 + 1e-6


def test_a_sum_of_rows_is_clipped_row_by_row():
    """The same where the loss and the plan say sum."""

    def loss(out, y):
        return F.cross_entropy(out, y, weight=WEIGHTS, reduction="sum")

    for count in (SAMPLES, SAMPLES + 1):
        got = clipped_sum(loss, count, reduction="sum")
        torch.testing.assert_close(got, oracle(loss, count), rtol=0, atol=ROUNDING)


def weighted_mean(out, y):
    weights = WEIGHTS[y]
    return (weights * F.cross_entropy(out, y, reduction="none")).sum() / weights.sum()


def weighted_mean_of_numbers(out, y):
    weights = WEIGHTS[y]
    return (weights * F.cross_entropy(out, y, reduction="none")).sum() / weights.sum().item()


def normalised_weights(out, y):
    weights = WEIGHTS[y] / WEIGHTS[y].sum()
    return (weights * F.cross_entropy(out, y, reduction="none")).sum()


def masked(out, y):
    return F.cross_entropy(out, y, reduction="none")[y > 0].mean()


def masked_by_count(out, y):
    mask = (y > 0).double()
    return (mask * F.cross_entropy(out, y, reduction="none")).sum() / mask.sum()


def hard_examples(out, y):
    return F.cross_entropy(out, y, reduction="none").topk(3).values.mean()


def normalised_focal(out, y):
    losses = F.cross_entropy(out, y, reduction="none")
    weights = (1 - (-losses).exp()).detach()
    return (weights * losses).sum() / weights.sum()


def contrastive(out, y):
    similarity = F.normalize(out, dim=1) @ F.normalize(out, dim=1).t()
    return F.cross_entropy(similarity, torch.arange(len(y)))


def written(out, y):
    out[y > 1] = 0.0
    return F.cross_entropy(out, y)


def broadcast(out, y):
    return F.mse_loss(out[:, :1], y.double())


def chosen(out, y):
    losses = F.cross_entropy(out, y, reduction="none")
    return losses.masked_fill(losses < losses.mean(), 0.0).mean()


COUPLED = {
    "chosen by the mean": chosen,
    "class weights": nn.CrossEntropyLoss(weight=WEIGHTS),
    "class weights, nll": lambda out, y: F.nll_loss(out.log_softmax(1), y, weight=WEIGHTS),
    "class weights, smoothed": nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.1),
    "ignored labels": nn.CrossEntropyLoss(ignore_index=1),
    "ignored labels, nll": lambda out, y: F.nll_loss(out.log_softmax(1), y, ignore_index=0),
    "a weighted mean": weighted_mean,
    "a weighted mean by a number": weighted_mean_of_numbers,
    "normalised weights": normalised_weights,
    "a mask": masked,
    "a mask by its count": masked_by_count,
    "hard examples": hard_examples,
    "normalised focal": normalised_focal,
    "contrastive": contrastive,
    "softmax over the batch": lambda out, y: F.cross_entropy(out.softmax(0), y),
    "centred": lambda out, y: F.cross_entropy(out - out.mean(0), y),
    "sorted": lambda out, y: F.mse_loss(out.sort(dim=0).values, onehot(y)),
    "cumulated": lambda out, y: out.cumsum(0).square().mean(),
    "neighbours": lambda out, y: (out[1:] - out[:-1]).square().mean(),
    "rolled": lambda out, y: F.mse_loss(out, out.roll(1, 0).detach()),
    "the largest": lambda out, y: F.cross_entropy(out, y, reduction="none").max(),
    "log of the mean": lambda out, y: F.cross_entropy(out, y).log(),
    "flooded": lambda out, y: (F.cross_entropy(out, y) - 0.5).abs() + 0.5,
    "squared": lambda out, y: F.cross_entropy(out, y) ** 2,
    "by the mean": lambda out, y: F.cross_entropy(out, y) / F.cross_entropy(out, y).detach(),
    "entropy of the mean": lambda out, y: out.softmax(1).mean(0).log().sum(),
    "standard deviation": lambda out, y: out.std(0).mean(),
    "norm of all": lambda out, y: out.norm(),
    "logsumexp of all": lambda out, y: out.logsumexp((0, 1)),
    "broadcast": broadcast,
    "written": written,
    "batch norm": lambda out, y: F.cross_entropy(
        F.batch_norm(out, None, None, training=True), y
    ),
    "sum, not mean": lambda out, y: F.cross_entropy(out, y, reduction="sum"),
    "rows": lambda out, y: out.sum(),
    "a mean and a sum": lambda out, y: F.cross_entropy(out, y) + out.square().sum(),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")
@pytest.mark.parametrize("loss", COUPLED.values(), ids=COUPLED)
def test_a_loss_that_joins_examples_is_refused(loss):
    """Before anything is released; the message says what joined them."""
    with pytest.raises(StepError, match="the loss"):
        clipped_sum(loss, SAMPLES + 1)


def test_a_mean_under_a_plan_of_sums_is_refused():
    """Its divisor is the number of examples in the sample, which one example changes."""
    with pytest.raises(StepError, match="loss_reduction is 'sum'"):
        clipped_sum(F.cross_entropy, SAMPLES, reduction="sum")


def test_without_the_refusal_one_example_would_move_the_sum_by_more(monkeypatch):
    """Control: what is refused does break the bound, by far."""
    from privacy.opacus.module import Outputs

    monkeypatch.setattr(Outputs, "_check", lambda *_: None)
    for name in ("class weights", "a weighted mean", "normalised weights"):
        moved = clipped_sum(COUPLED[name], SAMPLES + 1) - clipped_sum(COUPLED[name], SAMPLES)
        assert moved.norm() > 1.05, name


@pytest.mark.parametrize("name", ["weights", "number"])
def test_a_value_that_changes_from_step_to_step_is_refused(name):
    """One beside the rows can be the batch's: weights or a factor, computed anew."""
    values = iter([1.0, 2.0])

    def loss(out, y):
        value = next(values)
        losses = F.cross_entropy(out, y, weight=WEIGHTS * value, reduction="none")
        return losses.mean() if name == "weights" else value * F.cross_entropy(out, y)

    with pytest.raises(StepError, match="not the one of the step before"):
        clipped_sum(loss, SAMPLES, steps=2)


def test_a_tensor_of_as_many_values_as_examples_is_known_from_other_steps():
    """A prior over three classes, and a sample of three: refused first, taken once it was seen."""

    def loss(out, y):
        return F.cross_entropy(out + PRIOR.log(), y)

    with pytest.raises(StepError, match="a value an example"):
        clipped_sum(loss, 3)
    counts = iter([5, 3, 3])
    clipped_sum(loss, lambda: next(counts), steps=3)


def test_one_row_has_nobody_to_depend_on():
    """A sample of one: weighted means are the row's own."""
    got = clipped_sum(nn.CrossEntropyLoss(weight=WEIGHTS), 1)
    torch.testing.assert_close(got, oracle(F.cross_entropy, 1), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
    "loss",
    [
        lambda out, y: torch.autograd.backward(F.cross_entropy(out, y)),
        lambda out, y: F.cross_entropy(out, y, reduction="none").backward(torch.ones(len(y))),
    ],
    ids=["by the function", "of rows"],
)
def test_a_backward_pass_that_is_not_seen_is_refused(loss):
    """It is not taken for a good one."""
    net = network()
    model, optimizer, loader = PrivacyEngine().make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=1.0),
        data_loader=DataLoader(data_of(8), batch_size=8),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    ((images, labels),) = loader
    loss(model(images), labels)
    with pytest.raises(StepError, match=r"loss\.backward\(\)|not joined"):
        optimizer.step()


def test_metrics_beside_the_loss_are_free():
    """What does not lead to the loss may join examples, and its values are plain numbers."""
    seen = []

    def loss(out, y):
        seen.append((out.argmax(1) == y).double().mean().item())
        seen.append(out.detach().softmax(0).mean().item())
        seen.append(out.detach().max().item())
        out.cpu().detach().numpy().tolist()
        str(out)
        return F.cross_entropy(out, y)

    got = clipped_sum(loss, SAMPLES)
    torch.testing.assert_close(got, oracle(F.cross_entropy, SAMPLES), rtol=0, atol=ROUNDING)
    assert all(isinstance(value, float) for value in seen)


def test_sequences_are_blocks_of_rows():
    """A model of five tokens an example, flattened with its labels as language models do."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(FEATURES, 5 * CLASSES)

        def forward(self, images):
            return self.head(images).view(len(images), 5, CLASSES)

    def make():
        torch.manual_seed(1)
        return Tokens().double()

    def loss(out, y):
        labels = (y[:, None] + torch.arange(5)) % CLASSES
        return F.cross_entropy(out.view(-1, CLASSES), labels.view(-1))

    got = clipped_sum(loss, SAMPLES, make=make)
    torch.testing.assert_close(got, oracle(loss, SAMPLES, make=make), rtol=0, atol=ROUNDING)
    transposed = lambda out, y: F.cross_entropy(  # noqa: E731
        out.transpose(1, 2), (y[:, None] + torch.arange(5)) % CLASSES
    )
    got = clipped_sum(transposed, SAMPLES, make=make)
    torch.testing.assert_close(got, oracle(transposed, SAMPLES, make=make), rtol=0, atol=ROUNDING)
    padded = lambda out, y: F.cross_entropy(  # noqa: E731
        out.view(-1, CLASSES), torch.where(y > 1, -100, y).repeat_interleave(5)
    )
    with pytest.raises(StepError, match="ignore_index"):
        clipped_sum(padded, SAMPLES + 1, make=make)
