"""What the slow path costs: one small transformer in three ways, into docs/slow-path.json."""

from pathlib import Path

import torch
from torch import Tensor, nn

import secure_cnn
from secure_cnn import bench
from secure_cnn.bench.overhead import on_this_machine


class Vision(nn.Module):
    """One block of a vision transformer for digits, with a token of its own or a fixed one."""

    def __init__(self, name: str, token: Tensor, scale: nn.Module) -> None:
        super().__init__()
        self.name, self.token, self.scale = name, token, scale
        self.patches = nn.Conv2d(1, 16, 4, stride=4)
        self.body = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, 10] of images [n, 1, height, width]."""
        patches = self.patches(images).flatten(2).mT
        tokens = self.scale(self.token).expand(len(images), -1, -1)
        return self.head(self.body(torch.cat([tokens, patches], 1))[:, 0])


def main() -> None:
    """Measures a private step of each against its plain one."""
    fixed, own = torch.zeros(1, 1, 16), nn.Parameter(torch.zeros(1, 1, 16))
    models = (
        Vision("a fixed token: every layer has a rule", fixed, nn.Identity()),
        Vision("a token of its own: what uses it runs again", own, nn.Identity()),
        Vision("a token that a layer changes: all runs again", own, nn.Linear(16, 16)),
    )
    digits = secure_cnn.load_data("digits")
    settings = bench.OverheadSettings(batch_size=64, steps=5, rounds=41, memory=False)
    variants = bench.combinations({}, average=False, sealed=False)
    rows = [
        row
        for model in models
        for row in bench.overhead(model, digits, variants, settings=settings).rows
    ]
    on_this_machine(rows, models[0]).write(Path(__file__).with_name("slow-path.json"))


if __name__ == "__main__":
    main()
