"""A small classifier of scikit-learn's handwritten digits: the yardstick for samples of digits.

It takes the part that an Inception network has for photographs: its class predictions tell whether
a sample shows the digit that was asked for, its last hidden layer gives the features of the Fréchet
distance. It is trained in seconds from a fixed seed, so nothing has to be shipped or downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from dydit.errors import ShapeError

IMAGE_SHAPE = (1, 8, 8)
NUM_CLASSES = 10
FEATURE_DIM = 32  # small, so that a few hundred samples fit its covariance well
INK_MAX = 16.0  # scikit-learn's digits hold 0..16

EPOCHS, BATCH_SIZE, PEAK_LR = 25, 64, 4e-3
NOISE_STD = 0.1  # samples carry a little residual noise; the features should not measure that


@dataclass(frozen=True)
class DigitSplit:
    """The 1797 digits in two class-balanced halves; images (n, 1, 8, 8) in [−1, 1], labels (n,) int64."""

    train_images: Tensor
    train_labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor


@dataclass(frozen=True)
class DigitClassifier:
    """A trained digit classifier.

    Attributes:
        trunk: images → features (n, 32).
        head: features → class scores (n, 10).
        held_out_accuracy: fraction of the held-out half it gets right.
    """

    trunk: nn.Module
    head: nn.Module
    held_out_accuracy: float

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(n, 1, 8, 8) images in [−1, 1] → (n, 32) float32 features on the CPU.

        Values outside [−1, 1] are clamped: a picture cannot show them.

        Raises:
            ShapeError: the images are not (n, 1, 8, 8).
        """
        if tuple(images.shape[1:]) != IMAGE_SHAPE:
            raise ShapeError(
                f"images of shape {tuple(images.shape)}",
                expected="(n, 1, 8, 8) digits",
                remedy="measure other data with metrics of its own",
            )
        return self.trunk(images.detach().to("cpu", torch.float32).clamp(-1.0, 1.0))

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """(n, 1, 8, 8) images in [−1, 1] → (n,) int64 predicted digits. Raises as ``features``."""
        return self.head(self.features(images)).argmax(dim=1)

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Fraction of ``images`` (n, 1, 8, 8) predicted as their ``labels`` (n,)."""
        return (self.predict(images) == labels.cpu()).double().mean().item()


def load_digit_split(seed: int = 0) -> DigitSplit:
    """scikit-learn's embedded digits, halved at random within each class; the same for the same seed."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / (INK_MAX / 2) - 1.0
    labels = torch.from_numpy(digits.target).long()
    train, held_out = train_test_split(
        range(len(labels)), test_size=0.5, stratify=digits.target, random_state=seed
    )
    return DigitSplit(images[train], labels[train], images[held_out], labels[held_out])


def train_digit_classifier(split: DigitSplit, seed: int = 0) -> DigitClassifier:
    """Train on one half, report the accuracy on the other (about 99 %). A few seconds on a CPU.

    The same seed gives the same weights on the same machine, however many threads torch may use; its
    global generator and thread count are left as they were.
    """
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(seed)
        trunk, head = _build()
        _fit(nn.Sequential(trunk, nn.Dropout(0.2), head), split)
    trunk.eval().requires_grad_(False)
    head.eval().requires_grad_(False)
    accuracy = DigitClassifier(trunk, head, 0.0).accuracy(split.held_out_images, split.held_out_labels)
    return DigitClassifier(trunk, head, accuracy)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Batches this small gain little from threads, and on a busy machine wait for each other 100× longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _build() -> tuple[nn.Sequential, nn.Linear]:
    trunk = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),  # (n, 32, 8, 8)
        nn.GELU(),
        nn.Conv2d(32, 64, 3, padding=1),  # (n, 64, 8, 8)
        nn.GELU(),
        nn.MaxPool2d(2),  # (n, 64, 4, 4)
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, FEATURE_DIM),
        nn.GELU(),
    )
    return trunk, nn.Linear(FEATURE_DIM, NUM_CLASSES)


def _fit(network: nn.Module, split: DigitSplit) -> None:
    count = len(split.train_labels)
    batches_per_epoch = -(-count // BATCH_SIZE)
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_LR, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=EPOCHS * batches_per_epoch)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(count).split(BATCH_SIZE):
            scores = network(_augment(split.train_images[chosen]))
            loss = F.cross_entropy(scores, split.train_labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def _augment(images: Tensor) -> Tensor:
    """Shift a batch by up to a pixel and add a little noise: half of 1797 images are few."""
    height, width = images.shape[-2:]
    top, left = torch.randint(0, 3, (2,)).tolist()
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)  # -1 is paper
    shifted = padded[..., top : top + height, left : left + width]
    return shifted + NOISE_STD * torch.randn_like(shifted)
