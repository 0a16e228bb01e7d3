"""A script written for Opacus: one import is changed, and the private step is the fused one."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import secure_cnn
from privacy.opacus import PrivacyEngine  # was: from opacus import PrivacyEngine

EPOCHS, DELTA = 20, 1e-4


def main() -> None:
    data = secure_cnn.load_data("digits")
    train, test = (s.batch(torch.arange(len(s))) for s in (data.train, data.test))
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(128, 10)),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    criterion = nn.CrossEntropyLoss()

    privacy_engine = PrivacyEngine()
    model, optimizer, train_loader = privacy_engine.make_private_with_epsilon(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(TensorDataset(*train), batch_size=256),
        target_epsilon=8.0,
        target_delta=DELTA,
        epochs=EPOCHS,
        max_grad_norm=1.0,
    )

    for _ in range(EPOCHS):
        model.train()
        for images, labels in train_loader:
            optimizer.zero_grad()
            loss = criterion(model(images), labels)
            loss.backward()
            optimizer.step()

    model.eval()
    with torch.no_grad():
        right = model(test[0]).argmax(1) == test[1]
    epsilon = privacy_engine.get_epsilon(DELTA)
    print(f"epsilon {epsilon:.2f} at delta {DELTA:g}, accuracy {right.float().mean():.1%}")


if __name__ == "__main__":
    main()
