"""The groups, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from benchmarks.pairs import data
from benchmarks.pairs.data import (
    digits_task,
    digits_training,
    npz_task,
    public_photographs,
    training_images,
)
from benchmarks.pairs.experts import Expert
from benchmarks.pairs.group import Group, Labels
from datafree.images.preprocess import PreprocessSpec
from datafree.models.parent import Parent, ParentSpec, load_parent
from datafree.seeds import derive_seed

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR = PreprocessSpec(size=32, mean=MEAN, std=STD)
IMAGENET = PreprocessSpec(size=224, mean=MEAN, std=STD)

CIFAR_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
DIGIT_CLASSES = tuple("0123456789")
PACS_CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")


def published(
    model: str, file: str, preprocess: PreprocessSpec, outputs: int, classes: tuple[str, ...] | None = None
) -> Callable[[str], Parent]:
    """A checkpoint of DATAFREE_DATA in a network of ours; model: as in a recipe, without `python:benchmarks.`."""

    def load(name: str) -> Parent:
        spec = ParentSpec(
            model=f"python:benchmarks.{model}",
            arguments={"num_classes": outputs},
            weights=str(data.data_folder() / "checkpoints" / file),
            preprocess=preprocess,
            classes=classes,
        )
        return load_parent(spec, name, data.PROJECT)

    return load


def resnet(file: str, classes: tuple[str, ...] = CIFAR_CLASSES, depth: int = 20) -> Callable[[str], Parent]:
    return published(f"cifar_resnet:resnet{depth}", file, CIFAR, len(classes), classes)


def mobilenet(file: str) -> Callable[[str], Parent]:
    return published("mobilenet:mobilenet025", file, IMAGENET, 1000)


def cifar(name: str, **parents: Callable[[str], Parent]) -> Group:
    """Networks that all know CIFAR-10's ten classes."""
    return Group(name, "shared", parents, (npz_task("cifar10", "cifar10", 32),), _CIFAR_REAL, _PHOTOGRAPHS)


def digits(name: str, labels: Labels, *domains: str) -> Group:
    """One expert a domain, which all know 0 to 9."""
    parents = {domain: DIGITS[domain] for domain in domains}
    tasks = tuple(npz_task(domain, domain, 32, domain) for domain in domains)
    return Group(name, labels, parents, tasks, training_images(domains, 32), _PHOTOGRAPHS)


def pacs(name: str, *domains: str, base: Expert | None = None) -> Group:
    """One expert a domain, which all know the same seven classes; trained from `base`, or from their own seeds."""
    parents = {domain: pacs_expert(domain, base) for domain in domains}
    tasks = tuple(npz_task(domain, "pacs64", 64, domain, prefix=f"{domain}_") for domain in domains)
    real = training_images(domains, 64, file="pacs64")
    return Group(name, "shared", parents, tasks, real, public_photographs(64), base)


def pacs_expert(domain: str, base: Expert | None) -> Expert:
    settings = Expert(
        "pacs64",
        f"{domain}_x_train",
        PACS_SEEDS[domain],
        PACS_CLASSES,
        side=64,
        batch=32,
        reach=4,
        mirror=True,
    )
    if base is None:
        return replace(settings, epochs=40)
    return replace(settings, epochs=20, rate=0.03, base=base)


def vision_transformers(name: str, labels: Labels) -> Group:
    """The pair of `benchmarks.vit_pair` with seed 0, on scikit-learn's digits, 8 x 8 and grey."""
    known = {"shared": (range(10), range(10)), "separate": (range(5), range(5, 10))}[labels]
    parents = {letter: vision_transformer(tuple(digits)) for letter, digits in zip("ab", known, strict=True)}
    if labels == "shared":
        tasks = (digits_task("all", None, tuple(range(10))),)
    else:
        pairs = zip(("low", "high"), "ab", known, strict=True)
        tasks = tuple(digits_task(task, expert, tuple(digits)) for task, expert, digits in pairs)
    return Group(name, labels, parents, tasks, digits_training, public_photographs(8, channels=1))


def vision_transformer(known: tuple[int, ...]) -> Callable[[str], Parent]:
    def load(name: str) -> Parent:
        from benchmarks import vit_pair  # heavy, and read only where a transformer is asked for

        return vit_pair.parent(name, vit_pair.Training(known, derive_seed(0, "vit_pair", name) % 2**31))

    return load


_CIFAR_REAL = training_images(["cifar10"], 32)
_PHOTOGRAPHS = public_photographs(32)
_AKAMASTER = resnet("akamaster_resnet20.th")
_DANSUN = resnet("dansun18_run_8-1_resnet20.th")
_ZHENGJIAKUN = resnet("zhengjiakun_resnet20.th")

DIGITS = {
    "mnist": Expert("mnist", "x_train", 1, DIGIT_CLASSES, epochs=3),
    "usps": Expert("usps", "x_train", 2, DIGIT_CLASSES, epochs=5),
    "mnistm": Expert("mnistm", "x_train", 3, DIGIT_CLASSES, epochs=8),
}
PACS_SEEDS = {"photo": 11, "art_painting": 12, "cartoon": 13, "sketch": 14}
PACS_BASE = Expert(
    "cifar100", "x_train", 10, tuple(map(str, range(100))), side=64, epochs=10, reach=4, mirror=True
)
_HALVES = {
    "half0": resnet("cifar10_half0_resnet20.safetensors", CIFAR_CLASSES[:5]),
    "half1": resnet("cifar10_half1_resnet20.safetensors", CIFAR_CLASSES[5:]),
}
_HALVES_TASKS = (
    npz_task("classes 0-4", "cifar10", 32, "half0", last=4),
    npz_task("classes 5-9", "cifar10", 32, "half1", first=5),
)
_DIGITS_RESNET20 = Expert(  # beside the halves: the same network, other labels
    "mnistm", "x_train", 4, DIGIT_CLASSES, "cifar_resnet:resnet20", mean=MEAN, std=STD, epochs=4
)

PAIRS: dict[str, Group] = {
    group.name: group
    for group in (
        cifar("resnet20", akamaster=_AKAMASTER, dansun=_DANSUN),
        cifar("resnet20_other", zhengjiakun=_ZHENGJIAKUN, dansun=_DANSUN),
        cifar("resnet20_three", akamaster=_AKAMASTER, dansun=_DANSUN, zhengjiakun=_ZHENGJIAKUN),
        cifar(
            "resnet56",
            akamaster=resnet("akamaster_resnet56.th", depth=56),
            dansun=resnet("dansun18_run_6-3_resnet56.th", depth=56),
        ),
        Group("halves", "separate", _HALVES, _HALVES_TASKS, _CIFAR_REAL, _PHOTOGRAPHS),
        Group(
            "halves_digits",
            "separate",
            _HALVES | {"digits": _DIGITS_RESNET20},
            (*_HALVES_TASKS, npz_task("digits", "mnistm", 32, "digits")),
            training_images(["cifar10", "mnistm"], 32),
            _PHOTOGRAPHS,
        ),
        Group(
            "imagenet_mobilenet",
            "shared",
            {"a": mobilenet("mobilenet025_a.safetensors"), "b": mobilenet("mobilenet025_b.safetensors")},
            (data.photographs_task,),
            data.real_photographs,
            data.public_besides_imagenet,
        ),
        digits("mnist_usps", "shared", "mnist", "usps"),
        digits("mnist_mnistm", "shared", "mnist", "mnistm"),
        digits("mnist_mnistm_heads", "separate", "mnist", "mnistm"),
        digits("usps_mnist_mnistm", "shared", "usps", "mnist", "mnistm"),
        pacs("pacs_photo_sketch", "photo", "sketch"),
        pacs("pacs_photo_sketch_base", "photo", "sketch", base=PACS_BASE),
        vision_transformers("vit_digits", "shared"),
        vision_transformers("vit_digits_heads", "separate"),
    )
}
