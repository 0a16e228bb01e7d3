"""TRADES in your own loop: eps that warms up, averaged weights, and a look at what it brought."""

import torch

import defenses
import secure_cnn
from secure_cnn.data import ShuffledBatches
from secure_cnn.engine import WeightAverage

EPOCHS = 6


def main() -> None:
    data = secure_cnn.load_data("digits")
    model = secure_cnn.build_model("compact", data.spec)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    threat = defenses.ThreatModel(norm="linf", eps=0.1)
    objective = defenses.Trades(threat, beta=6.0)
    average = WeightAverage(model, decay=0.95)

    batches = ShuffledBatches(data.train, batch_size=64, epochs=EPOCHS, seed=0)
    steps = EPOCHS * -(-len(data.train) // 64)
    for step, (images, labels) in enumerate(batches):
        objective.strength = min(1.0, (step + 1) / (steps / 3))
        optimizer.zero_grad()
        objective(model, images, labels).mean().backward()
        optimizer.step()
        average.update(model)
    average.write_to(model)

    images, labels = data.test.batch(torch.arange(len(data.test)))
    found = defenses.attack("pgd", threat, steps=20)(model, images, labels, seed=0)
    with defenses.attack_scope(model), torch.no_grad():
        clean, robust = (
            (model(each).argmax(1) == labels).float().mean().item() for each in (images, found)
        )
    print(f"accuracy {clean:.1%}, under PGD-20 with eps {threat.eps:g}: {robust:.1%}")


if __name__ == "__main__":
    main()
