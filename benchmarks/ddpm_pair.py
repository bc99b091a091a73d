"""Two small networks for which diffusion samples are the natural proxies: one knows digits, one knows garments.

    python -m benchmarks.ddpm_pair FOLDER      # some four minutes of one core; nothing is done twice
    DDPM_PAIR=FOLDER datafree merge recipes/diffusion.yaml

A is trained on MNIST. For B there is no labelled data: its images are samples of the Fashion-MNIST diffusion model, and
its ten classes are their ten clusters by pixels. It is therefore the easier task, and its proxies come from the very
model that its training images came from (other seeds), which is the best case for a diffusion source.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from datafree.spec import expand_variables

PROJECT = Path(__file__).resolve().parent.parent
SHARED = "${DATAFREE_DATA}"
TRAIN, TEST, STEPS, CLUSTERS = 1920, 640, 20, 10
SEED = 1_000_000  # of the first garment; proxies take their seeds elsewhere
MEAN, STD = 0.2, 0.33  # as the recipe says
REAL = 512  # images of each kind for the oracle


def small_net(num_classes: int = 10) -> nn.Sequential:
    """Four convolutions with batch norm for 28 x 28 grey images."""
    layers: list[nn.Module] = []
    for before, after, stride in ((1, 16, 1), (16, 32, 2), (32, 64, 2), (64, 64, 1)):
        convolution = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))


def sample_garments(weights: Path, count: int) -> np.ndarray:
    """uint8 (count, 28, 28)"""
    # Imported only here: a recipe reads this file from elsewhere, for `small_net`.
    from benchmarks.ddpm import pipeline

    sampler = pipeline(str(weights))
    sampler.set_progress_bar_config(disable=True)
    made = []
    for start in range(0, count, 64):
        generators = [torch.Generator().manual_seed(SEED + start + row) for row in range(64)]
        output: Any = sampler(
            batch_size=64, generator=generators, num_inference_steps=STEPS, output_type="pt"
        )
        made.append(output.images[:, 0].clamp(0, 1).mul(255).round().to(torch.uint8))
        print(f"garments {start + 64} of {count}", end="\r", flush=True)
    return torch.cat(made)[:count].numpy()


def clusters(images: np.ndarray) -> np.ndarray:
    """Which of ten means each image is nearest to, int64; Lloyd's algorithm from a seeded start."""
    pixels = torch.from_numpy(images).flatten(1).float() / 255
    generator = torch.Generator().manual_seed(0)
    centres = pixels[torch.randperm(len(pixels), generator=generator)[:CLUSTERS]]
    for _ in range(50):
        nearest = torch.cdist(pixels, centres).argmin(1)
        centres = torch.stack([pixels[nearest == number].mean(0) for number in range(CLUSTERS)])
    return torch.cdist(pixels, centres).argmin(1).numpy().astype(np.int64)


def inputs_of(images: np.ndarray) -> Tensor:
    return (torch.from_numpy(images)[:, None].float() / 255 - MEAN) / STD


def train(images: np.ndarray, labels: np.ndarray, seed: int, steps: int = 800) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = small_net().train()
        optimiser = torch.optim.AdamW(model.parameters(), weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 5e-3, steps)
        x, y = inputs_of(images), torch.from_numpy(labels)
        for _ in range(steps):
            chosen = torch.randint(len(x), (128,))
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
            optimiser.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    return float((model(inputs_of(images)).argmax(1).numpy() == labels).mean())


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--threads", default=1, show_default=True)
def main(folder: Path, threads: int) -> None:
    """Write digits.safetensors, garments.safetensors, garments.npz and real.npz to FOLDER, those that are missing."""
    torch.set_num_threads(threads)
    shared = Path(expand_variables(SHARED, PROJECT / "recipes"))
    folder.mkdir(parents=True, exist_ok=True)
    garments = folder / "garments.npz"
    if not garments.exists():
        weights = shared / "checkpoints" / "brianpulfer_ddpm_fashion.pt"
        images = sample_garments(weights, TRAIN + TEST)
        labels = clusters(images)
        parts = {"train": slice(0, TRAIN), "test": slice(TRAIN, None)}
        arrays = {f"x_{name}": images[part] for name, part in parts.items()}
        arrays |= {f"y_{name}": labels[part] for name, part in parts.items()}
        np.savez(garments, **arrays)  # pyright: ignore[reportArgumentType]
    sets = {"digits": np.load(shared / "data" / "mnist.npz"), "garments": np.load(garments)}
    for seed, (name, data) in enumerate(sets.items()):
        target = folder / f"{name}.safetensors"
        if not target.exists():
            model = train(data["x_train"], data["y_train"].astype(np.int64), seed)
            right = accuracy(model, data["x_test"], data["y_test"])
            print(f"{name}: {100 * right:.1f} % of {len(data['y_test'])} test images")
            save_file(model.state_dict(), target)
    both = [data["x_train"][:REAL] for data in sets.values()]
    np.savez(folder / "real.npz", x=np.stack(both, 1).reshape(-1, 28, 28))
    print(f"export DDPM_PAIR={folder.resolve()}")


if __name__ == "__main__":
    main()
