"""The script that this package started from, on MNIST in the hub's layout; network, loops and output are unchanged.

    python -m experiments.mnist.seed --data DIR

torchvision's `MNIST` and `ToTensor` are reimplemented with the same work per sample, so torchvision is not needed. A
seed, a clock around `train`, and the output for the harness (`--out`) are added.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, Dataset


class ToTensor:
    """Like torchvision's: pixels from 0 to 1, channels first."""

    def __call__(self, picture: Image.Image) -> torch.Tensor:
        """Converts one picture to a tensor."""
        pixels = torch.from_numpy(np.array(picture, np.uint8, copy=True))
        return pixels.view(picture.size[1], picture.size[0], 1).permute(2, 0, 1).contiguous().to(torch.float32).div(255)


class MNIST(Dataset):
    """Like torchvision's: pixels as bytes in memory, converted to a PIL image for each sample."""

    def __init__(self, root: Path, train: bool, transform: Callable[[Image.Image], torch.Tensor]) -> None:
        rows = pq.read_table(sorted((root / "mnist").glob(f"{'train' if train else 'test'}-*.parquet")))
        pictures = (np.array(Image.open(io.BytesIO(image["bytes"]))) for image in rows["image"].to_pylist())
        self.data = torch.from_numpy(np.stack(list(pictures)))
        self.targets = torch.tensor(rows["label"].to_pylist())
        self.transform = transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        picture = Image.fromarray(self.data[index].numpy(), mode="L")
        return self.transform(picture), int(self.targets[index])


class Model(nn.Module):
    """The original network."""

    def __init__(self):
        super(Model, self).__init__()  # noqa: UP008
        self.conv1 = nn.Conv2d(1, 32, 3, 1)
        self.conv2 = nn.Conv2d(32, 64, 3, 1)
        self.dropout1 = nn.Dropout2d(0.25)
        self.dropout2 = nn.Dropout2d(0.5)
        self.fc1 = nn.Linear(9216, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x):
        """Log-probabilities."""
        x = self.conv1(x)
        x = nn.functional.relu(x)
        x = self.conv2(x)
        x = nn.functional.relu(x)
        x = nn.functional.max_pool2d(x, 2)
        x = self.dropout1(x)
        x = torch.flatten(x, 1)
        x = self.fc1(x)
        x = nn.functional.relu(x)
        x = self.dropout2(x)
        x = self.fc2(x)
        output = nn.functional.log_softmax(x, dim=1)
        return output


def train(model, data_loader, loss_func, optimizer):
    """The original training epoch."""
    model.train()
    for X, y in data_loader:
        optimizer.zero_grad()
        output = model(X)
        loss = loss_func(output, y)
        loss.backward()
        optimizer.step()


def test(model, data_loader, loss_func):
    """The original test; as there, the sum of batch means is divided by the number of samples, not of batches."""
    model.eval()
    test_loss = 0
    correct = 0
    with torch.no_grad():
        for X, y in data_loader:
            output = model(X)
            test_loss += loss_func(output, y).item()
            pred = output.argmax(dim=1)
            correct += (pred == y).sum().item()
    test_loss /= len(data_loader.dataset)
    accuracy = correct / len(data_loader.dataset)
    return test_loss, accuracy


def main(words: list[str] | None = None) -> None:
    """The original main program, with a clock."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="MNIST in the hub's layout, with the folder mnist")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_examples", type=int, help="of either split, for a trial")
    parser.add_argument("--out", type=Path, help="where to write seconds, losses and accuracies of the epochs")
    options = parser.parse_args(words)
    torch.manual_seed(options.seed)

    model = Model()
    loss_func = nn.CrossEntropyLoss()
    optimizer = SGD(model.parameters(), lr=0.01)

    train_data = MNIST(options.data, train=True, transform=ToTensor())
    test_data = MNIST(options.data, train=False, transform=ToTensor())
    for data in (train_data, test_data):
        data.data = data.data[: options.max_examples]
    train_loader = DataLoader(train_data, batch_size=64)
    test_loader = DataLoader(test_data, batch_size=64)

    found = {"seconds": [], "loss": [], "accuracy": []}
    for epoch in range(options.epochs):
        started = time.perf_counter()
        train(model, train_loader, loss_func, optimizer)
        found["seconds"].append(time.perf_counter() - started)
        test_loss, accuracy = test(model, test_loader, loss_func)
        print("Epoch: {}, Test loss: {:.4f}, Accuracy: {:.4f}".format(epoch, test_loss, accuracy))  # noqa: UP032
        found["loss"].append(test_loss)
        found["accuracy"].append(accuracy)
    if options.out:
        options.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
