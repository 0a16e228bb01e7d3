"""How well members of your own training are told from its model, and what privacy changes."""

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import privacy
import secure_cnn
from privacy import leakage

DATA = secure_cnn.load_data("digits").train  # or any map-style data set of (image, label)
EPSILON, DELTA = 4.0, 1e-4


def network(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def train(indices: np.ndarray, seed: int) -> nn.Module:
    """Plain: until the examples are known by heart."""
    model, (images, labels) = network(seed), DATA.batch(torch.from_numpy(indices))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.eval()


def plan(samples: int) -> privacy.DPPlan:
    drawn = privacy.DPPlan(samples=samples, batch_size=samples, epochs=20)
    return drawn.calibrate(epsilon=EPSILON, delta=DELTA)


def train_privately(indices: np.ndarray, seed: int) -> nn.Module:
    model, mine = network(seed), torch.utils.data.Subset(DATA, indices.tolist())
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    private = privacy.attach(plan(len(mine)), model, optimizer, mine)
    for images, labels in private.batches:
        private.step(cross_entropy(private.model(images), labels, reduction="none"))
    private.detach()
    return model.eval()


def main() -> None:
    promise = leakage.Promise.of([plan(len(DATA) // 2).event()], DELTA)
    for name, how, promised in (("plain", train, None), ("private", train_privately, promise)):
        report = leakage.membership(how, DATA, shadows=4, promise=promised)
        best = max(report.attacks, key=lambda each: each.area)
        # At one rate of false alarms for both: learnt thresholds name others at rates of their own.
        found = best.oracle[0]
        print(f"{name:8}area {best.area:.3f} by {best.name}, {found.tpr:.1%} of the members found")
        print(f"{'':8}at {found.fpr:.0%} false alarms, the best threshold; {report.verdict}")


if __name__ == "__main__":
    main()
