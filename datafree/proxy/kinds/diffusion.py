"""Samples of a diffusion pipeline that lies on disk, through the diffusers library.

Three families are told apart by what the pipeline takes: unconditional (`batch_size`), class-conditional
(`class_labels`), text-to-image (`prompt`). Every image has a generator of its own, so the number made at a
time changes no image beyond float rounding and may be halved when memory runs out. Images that a pipeline's
safety checker blacked out are drawn again with the image's next seed, never kept.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal

import pydantic
import torch
from torch import Tensor, nn

from datafree.cache.store import content_hash
from datafree.errors import RunError, UsageError
from datafree.images.preprocess import match_channels
from datafree.offline import is_offline
from datafree.proxy.kinds.images import frame
from datafree.proxy.kinds.prompts import compose
from datafree.proxy.source import SHARD, Request, Shard, Source, SourceSpec, register
from datafree.references.registry import _call, _module_by_name, _module_from_file
from datafree.spec import expand_variables, resolve_path

_REDRAWS = 8  # seeds tried for one image before its pipeline is said to refuse the prompt
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
_PYTHON = "python:"

Family = Literal["unconditional", "class-conditional", "text-to-image"]


@register
class DiffusionSpec(SourceSpec):
    """Diffusion samples.

    pipeline:  a folder that diffusers saved, with safetensors weights; or python:relative/file.py:callable,
               called with `arguments`, that returns a pipeline; or, with allow_download, a name on the hub
    steps:     of the sampler; None: 50 for unconditional, 25 for others, 4 for LCM and Turbo pipelines
    guidance:  None: 2 for text, 1.5 for classes, 0 for Turbo, 1 for LCM; low, as variety is wanted
    scheduler: auto: where the pipeline's own needs many steps, DPM-Solver++ for text and DDIM for others;
               own: the pipeline's; or ddim, dpm
    prompts:   None: the parents' class names in varied settings, or neutral subjects
    labels:    None: the parents' classes where the pipeline knows them by name, else all
    batch:     images at a time, halved when memory runs out; changes no image
    """

    irrelevant: ClassVar[frozenset[str]] = frozenset({"share", "batch", "allow_download"})

    kind: Literal["diffusion"] = "diffusion"
    pipeline: str
    arguments: dict[str, Any] = pydantic.Field(default_factory=dict)
    steps: int | None = pydantic.Field(default=None, ge=1)
    guidance: float | None = pydantic.Field(default=None, ge=0)
    scheduler: Literal["auto", "own", "ddim", "dpm"] = "auto"
    prompts: tuple[str, ...] | None = pydantic.Field(default=None, min_length=1)
    labels: tuple[int, ...] | None = pydantic.Field(default=None, min_length=1)
    precision: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    batch: int = pydantic.Field(default=16, ge=1)
    allow_download: bool = False

    @pydantic.model_validator(mode="after")
    def _arguments_go_to_a_callable(self) -> DiffusionSpec:
        if self.arguments and not self.pipeline.startswith(_PYTHON):
            raise ValueError("`arguments` go to a python: pipeline; this one is a folder: remove them")
        return self

    def bind(self, request: Request) -> Source:
        if self.pipeline.startswith(_PYTHON):
            return _Diffusion(self, request, None)
        folder = resolve_path(self.pipeline, request.base)
        if folder.is_dir():
            inspect_folder(folder)
        elif not self.allow_download:
            raise UsageError(
                f"diffusion pipeline {self.pipeline!r}: there is no folder {folder}. Give the folder of a "
                "pipeline that "
                "diffusers saved (it holds model_index.json), or `allow_download: true` for a name on the hub"
            )
        return _Diffusion(self, request, folder if folder.is_dir() else None)


def inspect_folder(folder: Path) -> None:
    """Raises UsageError unless `folder` is a diffusers pipeline whose loading runs no code and unpickles
    nothing.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise UsageError(f"{folder} is not a diffusers pipeline: it holds no model_index.json")
    try:
        described = json.loads(index.read_text(encoding="utf-8"))
        parts = {name: part for name, part in described.items() if not name.startswith("_")}
    except (ValueError, AttributeError) as error:
        raise UsageError(f"{index} is not a pipeline's description ({error})") from error
    code = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.py"))
    if code or not isinstance(described.get("_class_name"), str):
        what = f"brings code of its own ({', '.join(code[:3])})" if code else "asks for a class of its own"
        raise UsageError(
            f"diffusion pipeline {folder} {what}, which is not run. If you trust it, build the pipeline in a "
            "Python file of yours and name that: pipeline: python:relative/file.py:callable"
        )
    _check_class(folder, described["_class_name"])
    for name in parts:
        files = list((folder / name).glob("*")) if (folder / name).is_dir() else []
        pickled = sorted(file.name for file in files if file.suffix in _PICKLED)
        if pickled and not any(file.suffix == ".safetensors" for file in files):
            named = ", ".join(pickled[:3])
            raise UsageError(
                f"diffusion pipeline {folder}: {name} has only pickled weights ({named}), which can run code "
                "when read: save the pipeline again with save_pretrained(..., safe_serialization=True)"
            )


def _check_class(folder: Path, name: str) -> None:
    import diffusers

    if name not in dir(diffusers):  # asking for the attribute would import the pipeline
        raise UsageError(
            f"diffusion pipeline {folder} asks for the class {name}, which diffusers {diffusers.__version__} "
            "does not have: update diffusers, or save another pipeline"
        )


@dataclass(frozen=True)
class _Loaded:
    """A pipeline ready to sample, and how it will be asked."""

    pipeline: Any
    family: Family
    steps: int
    guidance: float
    labels: tuple[int, ...]


class _Diffusion:
    limit: int | None = None
    notes: Sequence[str] = ()

    def __init__(self, spec: DiffusionSpec, request: Request, folder: Path | None) -> None:
        self._spec = spec
        self._request = request
        self._folder = folder
        self._loaded: _Loaded | None = None
        self._batch = spec.batch

    def key(self) -> Mapping[str, Any]:
        if self._spec.pipeline.startswith(_PYTHON):
            weights = _components_hash(self._load().pipeline)
        else:
            weights = _folder_hash(self._fetched())
        return {
            "pipeline": weights,
            "classes": [list(parent.classes or ()) for parent in self._request.parents],
        }

    def shard(self, index: int) -> Shard:
        loaded = self._load()
        images = torch.empty((SHARD, self._request.channels, *self._request.size), dtype=torch.uint8)
        waiting = [(row, 0) for row in range(SHARD)]  # (row, seeds used up)
        redrawn = 0
        with _own_randomness(self._request.generator(index, "global").initial_seed()):
            while waiting:
                now, waiting = waiting[: self._batch], waiting[self._batch :]
                try:
                    pixels, flagged = self._sample(loaded, index, now)
                except (torch.OutOfMemoryError, RuntimeError) as error:
                    self._make_room(error)
                    waiting = now + waiting
                    continue
                for (row, tries), picture, bad in zip(now, pixels, flagged, strict=True):
                    if not bad:
                        images[row] = picture
                    elif tries + 1 < _REDRAWS:
                        waiting.append((row, tries + 1))
                        redrawn += 1
                    else:
                        raise RunError(
                            f"the pipeline's safety checker refused image {index * SHARD + row} "
                            f"{_REDRAWS} times: give other prompts under proxy.sources"
                        )
        facts: dict[str, Any] = {"redrawn": redrawn, "family": loaded.family}
        if redrawn:
            facts["notes"] = [f"shard {index}: {redrawn} images were flagged by the pipeline and drawn again"]
        return Shard(images, facts)

    def _sample(
        self, loaded: _Loaded, index: int, rows: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Sequence[bool]]:
        """Framed uint8 images for (row, seed number) pairs of shard `index`, and which of them were
        flagged.
        """
        generators = [self._request.generator(index, "image", str(row), str(tries)) for row, tries in rows]
        arguments: dict[str, Any] = {
            "generator": generators,
            "num_inference_steps": loaded.steps,
            "output_type": "pt",
        }
        if loaded.family == "unconditional":
            arguments["batch_size"] = len(rows)
        elif loaded.family == "class-conditional":
            arguments["class_labels"] = [
                loaded.labels[(index * SHARD + row) % len(loaded.labels)] for row, _ in rows
            ]
            arguments["guidance_scale"] = loaded.guidance
        else:
            arguments["prompt"] = [self._prompt(index * SHARD + row) for row, _ in rows]
            arguments["guidance_scale"] = loaded.guidance
        output = loaded.pipeline(**arguments)
        pixels = output.images.detach().float().cpu()
        if not torch.isfinite(pixels).all():
            raise RunError(
                f"the pipeline {self._spec.pipeline} gave pixels that are not finite in "
                f"{self._spec.precision} precision: set precision: float32"
            )
        flagged = getattr(output, "nsfw_content_detected", None) or [False] * len(rows)
        pictures = match_channels((pixels.clamp(0, 1) * 255).round().to(torch.uint8), self._request.channels)
        return frame(pictures, self._request.size), flagged

    def _prompt(self, image: int) -> str:
        if self._spec.prompts is not None:
            return self._spec.prompts[image % len(self._spec.prompts)]
        names = [parent.classes or () for parent in self._request.parents]
        return compose(names, self._request.generator(image // SHARD, "prompt", str(image % SHARD)))

    def _make_room(self, error: RuntimeError) -> None:
        """Halve the batch after running out of memory; any other error goes on up."""
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise error
        if self._batch == 1:
            raise RunError(
                f"the pipeline {self._spec.pipeline} does not fit in memory even one image at a time: use "
                "precision: float16, a smaller pipeline, or another device"
            ) from error
        self._batch //= 2
        if self._request.device.type == "cuda":
            torch.cuda.empty_cache()

    def _fetched(self) -> Path:
        if self._folder is None:
            from diffusers.pipelines.pipeline_utils import DiffusionPipeline

            try:
                found = DiffusionPipeline.download(
                    self._spec.pipeline, use_safetensors=True, local_files_only=is_offline()
                )
            except OSError as error:
                why = "--offline, and it is not in the hub's cache" if is_offline() else str(error)
                raise UsageError(
                    f"diffusion pipeline {self._spec.pipeline!r} could not be fetched "
                    f"({why.splitlines()[0]}): save it to a folder where there is a network, and name that"
                ) from error
            self._folder = Path(found)
            inspect_folder(self._folder)
        return self._folder

    def _load(self) -> _Loaded:
        if self._loaded is None:
            self._loaded = self._prepare(self._read())
        return self._loaded

    def _read(self) -> Any:
        from diffusers.pipelines.pipeline_utils import DiffusionPipeline
        from diffusers.utils import logging

        precision = _precision(self._spec.precision, self._request.device)
        logging.disable_progress_bar()
        if self._spec.pipeline.startswith(_PYTHON):
            pipeline = _from_python(self._spec, self._request.base)
            if not isinstance(pipeline, DiffusionPipeline):
                raise UsageError(
                    f"{self._spec.pipeline} returned a {type(pipeline).__name__}: it must return a "
                    "diffusers pipeline"
                )
            return pipeline.to(self._request.device)  # its precision is the callable's business
        folder = self._fetched()
        try:
            pipeline = DiffusionPipeline.from_pretrained(
                str(folder),
                local_files_only=True,
                use_safetensors=True,
                dtype=precision,
                low_cpu_mem_usage=find_spec("accelerate") is not None,
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"diffusion pipeline {folder} cannot be loaded: {str(error).splitlines()[0]}"
            ) from error
        return pipeline.to(self._request.device)

    def _prepare(self, pipeline: Any) -> _Loaded:
        pipeline.set_progress_bar_config(disable=True)
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.eval().requires_grad_(False)
        family = _family(pipeline, self._spec.pipeline)
        own = type(pipeline.scheduler).__name__
        name = f"{self._spec.pipeline} {getattr(pipeline.config, '_name_or_path', '')}".lower()
        lcm, turbo = own.startswith("LCM"), "turbo" in name
        many_steps = own.startswith(("DDPM", "DDIM", "PNDM")) and not turbo
        if self._spec.scheduler in ("ddim", "dpm"):
            _replace_scheduler(pipeline, self._spec.scheduler)
        elif self._spec.scheduler == "auto" and many_steps:
            _replace_scheduler(pipeline, "dpm" if family == "text-to-image" else "ddim")
        steps = self._spec.steps or (4 if lcm or turbo else 50 if family == "unconditional" else 25)
        guidance = self._spec.guidance
        if guidance is None:
            guidance = 1.0 if lcm else 0.0 if turbo else 2.0 if family == "text-to-image" else 1.5
        labels: tuple[int, ...] = ()
        if family == "class-conditional":
            labels = self._labels(pipeline)
            if _classes(pipeline) != 1000:
                guidance = 1.0  # diffusers takes class 1000 for "no class": without it, nothing to guide from
        return _Loaded(pipeline, family, steps, guidance, labels)

    def _labels(self, pipeline: Any) -> tuple[int, ...]:
        """Labels in the seeded order in which images take them, each as often as the others."""
        known = _classes(pipeline)
        if self._spec.labels is not None:
            wrong = [label for label in self._spec.labels if not 0 <= label < known]
            if wrong:
                raise UsageError(
                    f"the pipeline {self._spec.pipeline} knows the labels 0 to {known - 1}, not "
                    f"{wrong[0]}: correct labels"
                )
            chosen = list(self._spec.labels)
        else:
            wanted = {name.lower() for parent in self._request.parents for name in parent.classes or ()}
            named = getattr(pipeline, "labels", None) or {}
            chosen = sorted({label for name, label in named.items() if name.lower() in wanted}) or list(
                range(known)
            )
        order = torch.randperm(len(chosen), generator=self._request.generator(0, "labels"))
        return tuple(chosen[int(place)] for place in order)


def _from_python(spec: DiffusionSpec, base: Path) -> Any:
    """What the callable behind `pipeline: python:...` returns; variables in its arguments are expanded."""
    place, colon, name = spec.pipeline.removeprefix(_PYTHON).rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise UsageError(
            f"{spec.pipeline!r} is not complete: write python:package.module:callable or "
            "python:relative/file.py:callable"
        )
    if place.endswith(".py"):
        module = _module_from_file(place, base, spec.pipeline)
    else:
        module = _module_by_name(place, spec.pipeline)
    function = getattr(module, name, None)
    if not callable(function):
        raise UsageError(f"{spec.pipeline}: {place} has no callable {name!r}")
    arguments = {
        key: expand_variables(value, base) if isinstance(value, str) else value
        for key, value in spec.arguments.items()
    }
    return _call(function, spec.pipeline, arguments)


def _family(pipeline: Any, name: str) -> Family:
    taken = inspect.signature(type(pipeline).__call__).parameters
    families: dict[str, Family] = {
        "prompt": "text-to-image",
        "class_labels": "class-conditional",
        "batch_size": "unconditional",
    }
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = {
        key
        for key, value in taken.items()
        if value.kind in named and value.default is inspect.Parameter.empty
    }
    for key, family in families.items():
        if key in taken and needed <= {key, "self"} and {"generator", "num_inference_steps"} <= set(taken):
            return family
    asked = ", ".join(key for key in taken if key != "self")
    raise UsageError(
        f"diffusion pipeline {name} is a {type(pipeline).__name__}, which is not used here: it must make "
        f"images from nothing, from class labels or from a prompt, with a generator (this one takes {asked})"
    )


def _classes(pipeline: Any) -> int:
    return int(pipeline.transformer.config.num_embeds_ada_norm)


def _replace_scheduler(pipeline: Any, name: Literal["ddim", "dpm"]) -> None:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

    cls = DDIMScheduler if name == "ddim" else DPMSolverMultistepScheduler
    pipeline.scheduler = cls.from_config(pipeline.scheduler.config)


def _precision(wanted: str, device: torch.device) -> torch.dtype:
    if wanted != "auto":
        return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[wanted]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def _folder_hash(folder: Path) -> str:
    """Of the names and contents of all files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"\x00{path.relative_to(folder)}\x00".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _components_hash(pipeline: Any) -> str:
    """Of the weights of a pipeline's networks, its scheduler's settings and its class."""
    states = {}
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            states |= {f"{name}.{key}": value for key, value in part.state_dict().items()}
    settings = json.dumps(dict(pipeline.scheduler.config), sort_keys=True, default=str)
    return content_hash(states, f"{type(pipeline).__name__} {settings}")


@contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """Whatever a pipeline draws outside its generators starts from `seed`, and the caller's state comes
    back.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
