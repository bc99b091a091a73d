"""The quickstart's experts: small residual networks, trained in seconds on scikit-learn's real handwritten
digits.

    upright, rotated   all ten digits, in two domains: as stored, and inverted and turned by 90 degrees
    low, high          digits 0-4 and 5-9, upright: two label spaces

Each is trained from its own seed on the training split when it is first asked for, and kept as safetensors in
the cache under a hash of its settings. The images are put aside after that: a merge sees the weights only.

Experts are also taught to be undecided on what is no digit (smooth noise, digits cut up and shuffled).
Without that each is as sure of itself on the other's images as on its own, so that nobody can tell from the
two who is right: the ensemble itself falls from 98 to about 70 %.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from datafree.cache.store import DamagedStage, Store, cache_folder, content_hash
from datafree.errors import UsageError
from datafree.images.image_set import DigitsSpec, ImageSpec, load_images
from datafree.images.preprocess import Preprocess
from datafree.seeds import derive_seed

Progress = Callable[[str, int, int], None]  # stage, done, total

PREPROCESS = Preprocess(size=(8, 8), mean=(0.5,), std=(0.4,))
STAGE = "digits"  # the experts' folder in the cache
SHIFT = 1  # pixels, the augmentation
PARTS = 4  # a side of a shuffled image is cut into so many
VERSION = 1  # raised whenever the code below would train other weights from the same settings


class Block(nn.Module):
    """Two 3 x 3 convolutions with batch norm; a 1 x 1 one on the shortcut where the shape changes."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or width_in != width:
            self.shortcut.append(nn.Conv2d(width_in, width, 1, stride, bias=False)).append(
                nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitsResNet(nn.Module):
    """Grey images -> class scores: a stem and a residual block per width, the later ones halving."""

    def __init__(self, num_classes: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.blocks = nn.Sequential(
            *(
                Block(widths[max(stage - 1, 0)], width, 2 if stage else 1)
                for stage, width in enumerate(widths)
            )
        )
        self.linear = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(functional.relu(self.bn1(self.conv1(x))))
        return self.linear(x.mean((2, 3)))


def digits_resnet(num_classes: int = 10, widths: tuple[int, ...] = (32, 64, 128)) -> DigitsResNet:
    """What `python:datafree.digits:digits_resnet` builds, with random weights."""
    return DigitsResNet(num_classes, tuple(widths))


@dataclass(frozen=True)
class Expert:
    """Settings of one expert: together with VERSION they decide its weights."""

    name: str
    domain: Literal["upright", "rotated"]
    digits: tuple[int, ...]
    seed: int
    epochs: int = 12
    batch: int = 50
    undecided: int = 12  # images of each kind that is no digit, beside every batch
    smoothing: float = 0.1
    learning_rate: float = 0.05
    weight_decay: float = 5e-3

    def key(self) -> str:
        """Hash of the settings and VERSION: other changes of our code leave the experts as they are."""
        settings = {**asdict(self), "version": VERSION, "preprocess": PREPROCESS.to_dict()}
        return content_hash({}, json.dumps(settings, sort_keys=True))

    def path(self) -> Path:
        """Where the cached weights lie, whether or not they are there yet."""
        return Store(cache_folder()).path(STAGE, self.key())


_ALL, _LOW, _HIGH = tuple(range(10)), tuple(range(5)), tuple(range(5, 10))
EXPERTS: dict[str, Expert] = {
    expert.name: expert
    for expert in (
        Expert("upright", "upright", _ALL, seed=1),
        Expert("rotated", "rotated", _ALL, seed=2),
        Expert("low", "upright", _LOW, seed=3),
        Expert("high", "upright", _HIGH, seed=4),
    )
}


def expert(name: str) -> Expert:
    """Raises UsageError for a name that is not in EXPERTS."""
    if name not in EXPERTS:
        near = difflib.get_close_matches(name, EXPERTS, n=1)
        hint = f"; did you mean 'digits:{near[0]}'?" if near else ""
        raise UsageError(
            f"'digits:{name}' is no expert of the quickstart; there are {', '.join(EXPERTS)}{hint}"
        )
    return EXPERTS[name]


def weights(expert: Expert, progress: Progress | None = None) -> tuple[dict[str, Tensor], str]:
    """State dict of `expert`, from the cache or trained and kept there; and a sentence that says which.

    Raises RunError when the cache cannot be written.
    """
    store = Store(cache_folder())
    said = "trained just now and cached"
    try:
        kept = store.read(STAGE, expert.key())
    except DamagedStage as error:
        kept, said = None, f"the cached weights were damaged ({error}); trained again and cached"
    if kept is not None:
        return dict(kept.tensors), f"digits:{expert.name}: cached at {expert.path()}"
    state = trained(expert, progress).state_dict()
    store.write(STAGE, expert.key(), state)
    return state, f"digits:{expert.name}: {said} at {expert.path()}"


def sketch(expert: Expert) -> dict[str, Tensor]:
    """State dict of `expert` before training, with the batch-norm statistics of some of its images.

    It stands in for the expert where only shapes and kinds of tensors matter, and is made in an instant.
    """
    return trained(replace(expert, epochs=0)).state_dict()


def trained(expert: Expert, progress: Progress | None = None) -> DigitsResNet:
    """The network that `expert`'s settings give, in evaluation mode."""
    spec = ImageSpec(digits=DigitsSpec(domain=expert.domain, split="train"), keep_labels=expert.digits)
    images = load_images(spec, Path())
    assert images.labels is not None
    pixels = PREPROCESS(images.batch(range(len(images))))
    targets = torch.from_numpy(images.labels - expert.digits[0])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # sums in another order would give other weights
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(expert.seed, "digits", expert.name))
            model = digits_resnet(len(expert.digits))
            model(pixels[: expert.batch])  # batch norms see data even where epochs is 0
            if expert.epochs:
                _fit(model, pixels, targets, expert, progress)
    finally:
        torch.set_num_threads(threads)
    return model.eval()


def _fit(
    model: DigitsResNet, pixels: Tensor, targets: Tensor, expert: Expert, progress: Progress | None
) -> None:
    """SGD with Nesterov momentum, one cosine cycle with warm-up, random shifts."""
    steps = len(pixels) // expert.batch
    optimiser = torch.optim.SGD(
        model.parameters(),
        lr=expert.learning_rate,
        momentum=0.9,
        nesterov=True,
        weight_decay=expert.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=expert.learning_rate, epochs=expert.epochs, steps_per_epoch=steps
    )
    for epoch in range(expert.epochs):
        order = torch.randperm(len(pixels))
        for step in range(steps):
            chosen = order[step * expert.batch : (step + 1) * expert.batch]
            digits = shifted(pixels[chosen])
            others = torch.cat([smooth_noise(expert.undecided), shuffled(digits[: expert.undecided])])
            logits = model(torch.cat([digits, others]))
            sure = functional.cross_entropy(
                logits[: len(digits)], targets[chosen], label_smoothing=expert.smoothing, reduction="sum"
            )
            unsure = -functional.log_softmax(logits[len(digits) :], 1).mean(1).sum()
            loss = (sure + unsure) / len(logits)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
        if progress is not None:
            progress(f"training the expert digits:{expert.name}", epoch + 1, expert.epochs)


def shifted(batch: Tensor) -> Tensor:
    """Each image moved by up to SHIFT pixels either way; what comes in at the edge repeats the edge."""
    count, _, height, width = batch.shape
    padded = functional.pad(batch, (SHIFT, SHIFT, SHIFT, SHIFT), mode="replicate")
    rows = torch.randint(2 * SHIFT + 1, (count, 1, 1)) + torch.arange(height).view(1, -1, 1)
    columns = torch.randint(2 * SHIFT + 1, (count, 1, 1)) + torch.arange(width).view(1, 1, -1)
    return padded[torch.arange(count).view(-1, 1, 1), 0, rows, columns].unsqueeze(1)


def smooth_noise(count: int) -> Tensor:
    """Smooth random shades with some grain, (count, 1, *size), normalised as pixels are."""
    height, width = PREPROCESS.size
    coarse = 1.2 * torch.randn(count, 1, height // PARTS, width // PARTS)
    shades = functional.interpolate(coarse, (height, width), mode="bilinear") + 0.3 * torch.randn(
        count, 1, height, width
    )
    black, white = (float((value - PREPROCESS.mean[0]) / PREPROCESS.std[0]) for value in (0, 1))
    return shades.clamp(black, white)


def shuffled(batch: Tensor) -> Tensor:
    """Each image cut into PARTS x PARTS pieces that change places."""
    count, _, height, width = batch.shape
    rows, columns = height // PARTS, width // PARTS
    pieces = batch.unfold(2, rows, rows).unfold(3, columns, columns).reshape(count, PARTS**2, rows, columns)
    order = torch.rand(count, PARTS**2).argsort(1)
    moved = pieces[torch.arange(count).view(-1, 1), order].view(count, PARTS, PARTS, rows, columns)
    return moved.permute(0, 1, 3, 2, 4).reshape(count, 1, height, width)
