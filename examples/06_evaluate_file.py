"""Is a model of your own robust, and can the figure be believed? From a sealed or a plain file."""

import tempfile
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

import secure_cnn
from defenses import CheckSettings, ThreatModel, evaluate
from secure_cnn import archive


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))


def make_files(folder: Path, identity: archive.Identity) -> None:
    """Stands for whoever gave you the files."""
    data, model = secure_cnn.load_data("digits"), network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    images, labels = data.train.batch(torch.arange(len(data.train)))
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    archive.save(folder / "net.sealed", model.state_dict(), recipients=[identity.recipient])
    safetensors.torch.save_file(model.state_dict(), folder / "net.safetensors")


def main() -> None:
    identity = archive.generate_identity()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_files(folder, identity)

        model = network()
        model.load_state_dict(archive.load(folder / "net.sealed", identity=identity))
        # or: model.load_state_dict(safetensors.torch.load_file(folder / "net.safetensors"))
        test = secure_cnn.load_data("digits").test  # or any data set of (image, label)
        threat = ThreatModel(norm="linf", eps=0.05)
        checks = CheckSettings(samples=100, steps=20, queries=100)
        report = evaluate(model, test, threat, verdicts=checks, state=folder / "state.json")
        low, high = report.worst_case_interval
        print(f"robust accuracy {report.worst_case_accuracy:.1%} ({low:.1%} to {high:.1%})")
        for verdict in report.verdicts:
            print(f"{verdict.outcome:11}  {verdict.name}: {verdict.sentence}")
        report.save(folder / "robustness.json")


if __name__ == "__main__":
    main()
