"""The baseline for timing: the main jobs as bare torch scripts. Nothing is saved; one line is printed per evaluation.

python tests/bench/bare.py disc
python tests/bench/bare.py mnist ROOT
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn


def main() -> None:
    torch.set_num_threads(1)  # faster than two for layers of this size, here and in Trainyard
    torch.manual_seed(1)
    if sys.argv[1] == "disc":
        make_disc_dataset()
    else:
        load_mnist(sys.argv[2])


def make_disc_dataset() -> None:
    points = torch.rand(1000, 2)
    labels = ((points**2).sum(1) < 1 / (2 * torch.pi)).long()
    points = (points - points.mean()) / points.std()
    layers: list[nn.Module] = []
    for width in (2, 4, 8, 16, 32, 64, 128):
        layers += [nn.Linear(width, 2 * width), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(256, 2))
    train_model(
        model, points, labels, epochs=100, lr=0.1, shuffle=False, evaluate_every=10, validation=(points, labels)
    )


def load_mnist(root: str) -> None:
    from torchvision.datasets import MNIST

    data = MNIST(root)
    images, labels = data.data.float().div(255).flatten(1), data.targets
    order = torch.randperm(60000)
    train, val = order[:48000], order[48000:]
    model = nn.Sequential(nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))
    for lr in (0.5, 0.1):
        train_model(
            model, images[train], labels[train], epochs=5, lr=lr, shuffle=True, validation=(images[val], labels[val])
        )


def train_model(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    epochs: int,
    lr: float,
    shuffle: bool,
    validation: tuple[Tensor, Tensor],
    evaluate_every: int = 1,
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for epoch in range(epochs):
        order = torch.randperm(len(inputs)) if shuffle else torch.arange(len(inputs))
        for rows in order.split(100):
            loss = nn.functional.cross_entropy(model(inputs[rows]), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if (epoch + 1) % evaluate_every == 0:
            with torch.no_grad():
                outputs = model(validation[0])
                loss = nn.functional.cross_entropy(outputs, validation[1])
                accuracy = (outputs.argmax(1) == validation[1]).float().mean()
            print(f"epoch {epoch + 1} loss {loss:.4f} accuracy {accuracy:.4f}")


if __name__ == "__main__":
    main()
