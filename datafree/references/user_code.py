"""The user's own Python: imported and called so that whatever goes wrong there is told with its file and line.

A file takes its folder along. Relative imports work (`from .blocks import Block`), and so do plain ones of what
lies beside it (`import blocks`); inside a package (folders with `__init__.py`) what lies beside the package is
found too. Nothing it prints reaches the standard output, which may carry JSON.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from datafree.errors import UsageError

_MARK = "datafree_reference_"  # begins the names under which files of users are known to Python
_LIBRARIES = tuple(
    {str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "purelib", "platlib")}
)
_OURS = str(Path(__file__).resolve().parents[1])
_beside: dict[str, Path] = {}  # module imported while a user's folder could be searched -> that folder


def import_file(path: Path, reference: str) -> ModuleType:
    """The module in file `path`, executed once per process. Raises UsageError for whatever goes wrong in it."""
    package = path.parent
    while (package / "__init__.py").is_file() and package.parent != package:
        package = package.parent
    top = path.parent if package == path.parent else package / path.relative_to(package).parts[0]
    # The package gets a name made of its path, so that packages of one name in two folders do not meet.
    name = _MARK + hashlib.sha256(str(top).encode()).hexdigest()[:16]
    inner = [*path.relative_to(top).parts[:-1], path.stem]
    with _searching(package), _located(reference, top):
        if name not in sys.modules:
            _execute(name, top / "__init__.py", top)
        if path.name == "__init__.py":
            inner = inner[:-1]
        dotted = ".".join([name, *inner])
        if all(part.isidentifier() for part in inner):
            return importlib.import_module(dotted)
        return sys.modules.get(dotted) or _execute(dotted, path, None)


def import_module(name: str, base: Path, reference: str) -> ModuleType:
    """The module called `name`, installed or lying in the folder `base`. Raises UsageError as `import_file` does."""
    with _searching(base), _located(reference, base):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # something that the module itself imports
            raise UsageError(
                f"{reference}: no module named {error.name!r}; install it, or give a file: "
                "python:relative/file.py:callable"
            ) from error


def call(
    function: Callable[..., Any], reference: str, arguments: Mapping[str, Any], base: Path | None = None
) -> Any:
    """`function(**arguments)`. Raises UsageError where it does not take them, or whatever goes wrong inside it."""
    shown = {
        key: value
        for key, value in arguments.items()
        if key not in ("model_name", "name", "weights", "pretrained")
    }
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise UsageError(f"{reference} does not take the arguments {shown}: {error}") from error
    except ValueError:  # a callable written in C, which says nothing of its arguments
        pass
    source = _source_folder(function)
    with _searching(base or source), _located(reference, source, shown):
        return function(**arguments)


def _source_folder(function: Callable[..., Any]) -> Path | None:
    try:
        return Path(inspect.getfile(inspect.unwrap(function))).resolve().parent
    except TypeError:
        return None


def _execute(name: str, path: Path, folder: Path | None) -> ModuleType:
    """Make the module `name` of the file `path`; of nothing where there is no such file (a folder as a package)."""
    if path.is_file():
        where = None if folder is None else [str(folder)]
        spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=where)
    else:
        spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
    if spec is None:
        raise ImportError(f"{path} cannot be loaded as a Python module")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if spec.loader is not None and path.is_file():
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return module


@contextlib.contextmanager
def _searching(folder: Path | None) -> Iterator[None]:
    """Modules in `folder` can be imported inside, and not those of the same name from another user's folder."""
    if folder is None:
        yield
        return
    for name, home in list(_beside.items()):
        top = name.partition(".")[0]
        if home != folder and ((folder / f"{top}.py").is_file() or (folder / top).is_dir()):
            sys.modules.pop(name, None)
            del _beside[name]
    before, path = set(sys.modules), list(sys.path)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = [place for place in sys.path if place != str(folder) or place in path]
        for name in set(sys.modules) - before:
            origin = getattr(sys.modules[name], "__file__", None)
            if not name.startswith(_MARK) and origin and Path(origin).resolve().is_relative_to(folder):
                _beside[name] = folder


@contextlib.contextmanager
def _located(
    reference: str, folder: Path | None, arguments: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Whatever the user's code raises becomes one sentence with file and line; what it prints goes to stderr."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        given = f" with the arguments {dict(arguments)}" if arguments else ""
        named = [key for key in arguments or {} if f"unexpected keyword argument {key!r}" in str(error)]
        if isinstance(error, TypeError) and named:
            raise UsageError(
                f"{reference} does not take the arguments {dict(arguments or {})}: {error}"
            ) from error
        where = place_of(error, folder)
        what = " ".join(str(error).split())[:300]
        raise UsageError(
            f"{reference}{given} fails{' ' * bool(where)}{where}: {type(error).__name__}: {what}{_remedy(error)}"
        ) from error


def place_of(error: BaseException, folder: Path | None = None) -> str:
    """`at FILE, line N`: the deepest line of the user's own code, in `folder` where that is known; "" for none."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"at {error.filename}, line {error.lineno}"
    frames = [
        (str(Path(frame.filename)), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)
    ]
    frames = [(name, line) for name, line in frames if Path(name).is_file() and not name.startswith(_OURS)]
    own = [place for place in frames if folder is not None and Path(place[0]).is_relative_to(folder)]
    own = [place for place in own or frames if not place[0].startswith(_LIBRARIES)]
    return f"at {own[-1][0]}, line {own[-1][1]}" if own else ""


def _remedy(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError):
        return ". Install what is missing, or put it beside the file"
    if isinstance(error, SystemExit):
        return ". Importing a model must not end the program: put what is a script under `if __name__ == '__main__':`"
    if "cuda" in str(error).lower() or "nvidia" in str(error).lower():
        return ". Build the model on the CPU, without .cuda(): it is moved where --device says"
    return ""
