"""Experts of one domain each, trained here from seeds of their own and kept in the cache.

A file in the cache is named by a hash of the expert's settings and VERSION. Training runs on one thread, so that the
sums are always made in the same order.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.pairs.data import PROJECT, read
from datafree.cache.store import DamagedStage, Store, cache_folder, content_hash
from datafree.images.preprocess import Preprocess, PreprocessSpec
from datafree.models.parent import Parent, ParentSpec, load_parent
from datafree.references.registry import build_model
from datafree.seeds import derive_seed

STAGE = "pairs"  # the experts' folder in the cache
VERSION = 1  # raised whenever the code below would train other weights from the same settings


@dataclass(frozen=True)
class Expert:
    """Settings of one expert; together with VERSION they decide its weights.

    file, key: of the training images in DATAFREE_DATA    classes: their names, in the order of the outputs
    network:   a function `num_classes -> module` in `benchmarks`, its head called `linear`
    side:      of the network's input, in pixels
    base:      the expert whose weights, but for the head, training starts from; None: random ones
    reach:     largest random shift, in pixels    mirror: half of the images are mirrored
    """

    file: str
    key: str
    seed: int
    classes: tuple[str, ...]
    network: str = "pairs.small_resnet:small_resnet"
    side: int = 32
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    base: Expert | None = None
    epochs: int = 10
    batch: int = 64
    rate: float = 0.1
    decay: float = 1e-3
    reach: int = 2
    mirror: bool = False

    def __str__(self) -> str:
        return f"{self.file} {self.key}, seed {self.seed}" + (f", from ({self.base})" if self.base else "")

    def __call__(self, name: str) -> Parent:
        """The parent of that name, from the cache or trained and kept there."""
        spec = ParentSpec(
            model=self.reference,
            arguments={"num_classes": len(self.classes)},
            weights=str(weights(self)),
            preprocess=PreprocessSpec(size=self.side, mean=self.mean, std=self.std),
            classes=self.classes,
        )
        return load_parent(spec, name, PROJECT)

    @property
    def reference(self) -> str:
        """The network as a recipe would name it."""
        return f"python:benchmarks.{self.network}"


def weights(expert: Expert) -> Path:
    """The expert's safetensors file in the cache; it is trained if there is none.

    Raises RunError when the cache cannot be written.
    """
    store = Store(cache_folder())
    key = content_hash({}, json.dumps(asdict(expert) | {"version": VERSION}, sort_keys=True))
    try:
        kept = store.read(STAGE, key)
    except DamagedStage as error:
        print(f"an expert is trained again: {error}", flush=True)
        kept = None
    if kept is None:
        started = time.perf_counter()
        store.write(STAGE, key, trained(expert).state_dict(), str(expert))
        print(f"trained an expert on {expert}: {time.perf_counter() - started:.0f} s", flush=True)
    return store.path(STAGE, key)


def trained(expert: Expert) -> nn.Module:
    """The network that the settings give, in evaluation mode."""
    images, labels = read(expert.file, expert.key, expert.side)
    assert labels is not None
    preprocess = Preprocess((expert.side, expert.side), expert.mean, expert.std)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(expert.seed, "pairs", expert.file, expert.key))
            model = build_model(expert.reference, {"num_classes": len(expert.classes)}, PROJECT)
            if expert.base is not None:
                model.load_state_dict(model.state_dict() | trained_body(expert.base))
            fit(model, preprocess(torch.from_numpy(images)), torch.from_numpy(labels), expert)
    finally:
        torch.set_num_threads(threads)
    return model.eval()


def trained_body(expert: Expert) -> dict[str, Tensor]:
    """The state dict of a cached or newly trained expert, without its head."""
    state = expert("base").module.state_dict()
    return {name: value for name, value in state.items() if not name.startswith("linear.")}


def fit(model: nn.Module, pixels: Tensor, targets: Tensor, expert: Expert) -> None:
    """SGD with Nesterov momentum, one cosine cycle with warm-up."""
    steps = len(pixels) // expert.batch
    optimiser = torch.optim.SGD(
        model.parameters(), lr=expert.rate, momentum=0.9, nesterov=True, weight_decay=expert.decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, max_lr=expert.rate, epochs=expert.epochs, steps_per_epoch=steps
    )
    model.train()
    for _ in range(expert.epochs):
        order = torch.randperm(len(pixels))
        for step in range(steps):
            chosen = order[step * expert.batch : (step + 1) * expert.batch]
            seen = moved(pixels[chosen], expert.reach, expert.mirror)
            loss = functional.cross_entropy(model(seen), targets[chosen])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()


def moved(batch: Tensor, reach: int, mirror: bool) -> Tensor:
    """Each image (N, C, H, W) shifted by up to `reach` pixels either way, its edge repeated; half mirrored."""
    count, _, height, width = batch.shape
    padded = functional.pad(batch, (reach,) * 4, mode="replicate")
    rows = torch.randint(2 * reach + 1, (count, 1, 1)) + torch.arange(height).view(1, -1, 1)
    columns = torch.randint(2 * reach + 1, (count, 1, 1)) + torch.arange(width).view(1, 1, -1)
    shifted = padded.movedim(1, -1)[torch.arange(count).view(-1, 1, 1), rows, columns].movedim(-1, 1)
    if not mirror:
        return shifted
    chosen = (torch.rand(count) < 0.5).view(-1, 1, 1, 1)
    return torch.where(chosen, shifted.flip(-1), shifted)
