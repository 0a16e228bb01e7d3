"""Robust accuracy of any module of your own: images in [0, 1] go in, logits come out."""

import torch
from torch import nn

import defenses
import secure_cnn


def main() -> None:
    data = secure_cnn.load_data("digits")
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))  # yours
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    images, labels = data.train.batch(torch.arange(len(data.train)))
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    threat = defenses.ThreatModel(norm="linf", eps=0.05)
    report = defenses.evaluate(model, data.test, threat)
    low, high = report.worst_case_interval
    print(f"clean {report.clean_accuracy:.1%}")
    for name, accuracy in report.attack_accuracy.items():
        print(f"{name}, after the attacks before it: {accuracy:.1%}")
    print(f"worst case {report.worst_case_accuracy:.1%}, 95 % interval {low:.1%} to {high:.1%}")


if __name__ == "__main__":
    main()
