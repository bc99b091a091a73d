"""A GPU for tests on machines without one: `with pretend_cuda() as waits: network.cuda()`.

Tensors sent to "cuda" come back as `Elsewhere`: they say cuda:0, keep their numbers in a CPU tensor, and the one rule
of CUDA that programs break is enforced, that an op takes tensors of one device only. Enough for forward passes,
gradients, linear algebra and exports; kernels, memory and speed are not imitated. `waits` counts, by line of our
sources, where the host has to wait for the device: to look at a number, or for a size that depends on numbers.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

GPU, HOST = torch.device("cuda:0"), torch.device("cpu")
# Ops that take a tensor of the other device by design: an index, or what is to be copied.
MIXES = {"aten::copy_", "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
# Ops that give the host a number or a size.
LOOKS = {
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "bincount",
}
OURS = ("/pleas/", "/datafree/")
_waits: Counter[str] = Counter()


class Elsewhere(Tensor):
    """A tensor of the pretended GPU; `here` holds its numbers."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype
        )
        made.here = here.detach()
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, FakeTensor) for kind in types):
            return NotImplemented  # the tracer's turn
        return run(func, args, kwargs or {})

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """As Tensor.to; C++ would take this tensor for one of the CPU, and leave it where it is."""
        device, dtype, *_ = torch._C._nn._parse_to(*_as_words(args), **kwargs)  # type: ignore[attr-defined]
        moved = self if dtype in (None, self.dtype) else super().to(dtype)
        if device is not None and device.type == "cpu":
            _count("copy")
        return moved.here.clone() if device is not None and device.type == "cpu" else moved  # type: ignore[attr-defined]

    def cpu(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.to(HOST)

    def cuda(self, *args: Any, **kwargs: Any) -> Tensor:
        return self

    def tolist(self) -> Any:
        _count("tolist")
        return self.here.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copied = Elsewhere(self.here.clone()).requires_grad_(self.requires_grad)
            if isinstance(self, torch.nn.Parameter):
                copied = torch.nn.Parameter(copied, self.requires_grad)
            memo[id(self)] = copied
        return memo[id(self)]

    def __repr__(self, *args: Any, **kwargs: Any) -> str:
        return f"Elsewhere({self.here})"


class Dispatcher(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Mover(TorchFunctionMode):
    """`tensor.to(other)` is decided in C++, which takes an Elsewhere for a tensor of the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.to and len(args) > 1 and isinstance(args[1], Elsewhere):
            args = (args[0], *_as_words(args[1:]))
        if func in (torch.tensor, torch.as_tensor) and (kwargs or {}).get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        return func(*args, **(kwargs or {}))


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One op: on the CPU if its tensors, or the device it names, are of the GPU."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    remote = [x for x in tensors if isinstance(x, Elsewhere)]
    named = kwargs.get("device")
    wanted = None if named is None else torch.device(named).type
    if _tracing() or not (remote or wanted == "cuda"):
        return func(*args, **kwargs)
    name = func._schema.name
    if name == "aten::_has_compatible_shallow_copy_type":
        return False  # module.to(device) makes new parameters
    if name.removeprefix("aten::") in LOOKS and remote:
        _count(name)
    if name == "aten::_to_copy":
        found = func(*tree_map_only(Elsewhere, _here, args), **{**kwargs, "device": HOST})
        return Elsewhere(found) if wanted in (None, "cuda") else found
    local = [x for x in tensors if not isinstance(x, Elsewhere) and x.dim()]
    if remote and local and name not in MIXES:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({name})"
        )
    owners = {id(x.here): x for x in remote}  # an op in place gives back the tensor itself
    if wanted is not None:
        kwargs = {**kwargs, "device": HOST}
    found = func(*tree_map_only(Elsewhere, _here, args), **tree_map_only(Elsewhere, _here, kwargs))
    if wanted == "cpu" or (tensors and not isinstance(tensors[0], Elsewhere) and name in MIXES):
        return tensors[0] if name.endswith("_") else found
    return tree_map_only(Tensor, lambda x: owners[id(x)] if id(x) in owners else Elsewhere(x), found)


def _count(what: str) -> None:
    """Note a wait at the innermost line of our sources."""
    frame = sys._getframe(1)
    while frame is not None and not any(part in frame.f_code.co_filename for part in OURS):
        frame = frame.f_back
    if frame is not None:
        file = frame.f_code.co_filename
        place = max(file.rfind(part) for part in OURS)
        _waits[f"{file[place + 1 :]}:{frame.f_code.co_name} {what}"] += 1


def _tracing() -> bool:
    """Whether an export is at work, whose stand-ins for tensors know of devices themselves."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None  # type: ignore[attr-defined]


def _here(tensor: Elsewhere) -> Tensor:
    return tensor.here


def _as_words(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of Tensor.to, another tensor replaced by what it stands for."""
    if args and isinstance(args[0], Tensor):
        return (args[0].device, args[0].dtype, *args[1:])
    return args


@contextlib.contextmanager
def pretend_cuda() -> Iterator[Counter[str]]:
    """Inside, torch.cuda says that there is one device, and tensors can be sent to it; gives the waits, counted."""
    answers = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "_lazy_init": lambda: None,
        "synchronize": lambda *_: None,
        "get_device_name": lambda *_: "pretended",
        "is_bf16_supported": lambda *_, **__: True,
        "get_rng_state": lambda *_: torch.zeros(0, dtype=torch.uint8),
        "set_rng_state": lambda *_: None,
    }
    torch._C._ensureCUDADeviceGuardSet()  # type: ignore[attr-defined]
    conversion = torch.__future__.get_overwrite_module_params_on_conversion()
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        # module.cuda() makes new parameters: `.data =` would drop what an Elsewhere holds
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, conversion)
        stack.enter_context(Dispatcher())
        stack.enter_context(Mover())
        _waits.clear()
        yield _waits
