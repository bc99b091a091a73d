"""The groups, by name."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.pairs import data
from benchmarks.pairs.data import npz_task, public_photographs, training_images
from benchmarks.pairs.group import Group
from datafree.models import Parent, ParentSpec, load_parent
from datafree.preprocess import PreprocessSpec

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR = PreprocessSpec(size=32, mean=MEAN, std=STD)
IMAGENET = PreprocessSpec(size=224, mean=MEAN, std=STD)


def published(model: str, file: str, preprocess: PreprocessSpec, outputs: int) -> Callable[[str], Parent]:
    """A checkpoint of DATAFREE_DATA in a network of ours; model: as in a recipe, without `python:benchmarks.`."""

    def load(name: str) -> Parent:
        spec = ParentSpec(
            model=f"python:benchmarks.{model}",
            arguments={"num_classes": outputs},
            weights=str(data.data_folder() / "checkpoints" / file),
            preprocess=preprocess,
        )
        return load_parent(spec, name, data.PROJECT)

    return load


def resnet(file: str, outputs: int = 10, depth: int = 20) -> Callable[[str], Parent]:
    return published(f"cifar_resnet:resnet{depth}", file, CIFAR, outputs)


def mobilenet(file: str) -> Callable[[str], Parent]:
    return published("pairs.mobilenet:mobilenet025", file, IMAGENET, 1000)


_AKAMASTER = resnet("akamaster_resnet20.th")
_DANSUN = resnet("dansun18_run_8-1_resnet20.th")
_ZHENGJIAKUN = resnet("zhengjiakun_resnet20.th")
_CIFAR_TASK = npz_task("cifar10", "cifar10", 32)
_CIFAR_REAL = training_images(["cifar10"], 32)
_PHOTOGRAPHS = public_photographs(32)

PAIRS: dict[str, Group] = {
    group.name: group
    for group in (
        Group(
            "resnet20",
            "shared",
            {"akamaster": _AKAMASTER, "dansun": _DANSUN},
            (_CIFAR_TASK,),
            _CIFAR_REAL,
            _PHOTOGRAPHS,
        ),
        Group(
            "resnet20_other",
            "shared",
            {"zhengjiakun": _ZHENGJIAKUN, "dansun": _DANSUN},
            (_CIFAR_TASK,),
            _CIFAR_REAL,
            _PHOTOGRAPHS,
        ),
        Group(
            "resnet20_three",
            "shared",
            {"akamaster": _AKAMASTER, "dansun": _DANSUN, "zhengjiakun": _ZHENGJIAKUN},
            (_CIFAR_TASK,),
            _CIFAR_REAL,
            _PHOTOGRAPHS,
        ),
        Group(
            "resnet56",
            "shared",
            {
                "akamaster": resnet("akamaster_resnet56.th", depth=56),
                "dansun": resnet("dansun18_run_6-3_resnet56.th", depth=56),
            },
            (_CIFAR_TASK,),
            _CIFAR_REAL,
            _PHOTOGRAPHS,
        ),
        Group(
            "halves",
            "separate",
            {
                "half0": resnet("cifar10_half0_resnet20.safetensors", 5),
                "half1": resnet("cifar10_half1_resnet20.safetensors", 5),
            },
            (
                npz_task("classes 0-4", "cifar10", 32, "half0", last=4),
                npz_task("classes 5-9", "cifar10", 32, "half1", first=5),
            ),
            _CIFAR_REAL,
            _PHOTOGRAPHS,
        ),
        Group(
            "imagenet_mobilenet",
            "shared",
            {"a": mobilenet("mobilenet025_a.safetensors"), "b": mobilenet("mobilenet025_b.safetensors")},
            (data.photographs_task,),
            lambda: data.photographs("proxies")[0],
            data.public_besides_imagenet,
        ),
    )
}
