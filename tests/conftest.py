"""What every test can count on: one thread, a cache of its own, and the real data where there is some."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from datafree.cache.store import CACHE_VARIABLE
from datafree.spec import DATA_VARIABLE

PROJECT = Path(__file__).resolve().parent.parent

hypothesis.settings.register_profile("any machine", deadline=None)  # how long an example takes proves nothing
hypothesis.settings.load_profile("any machine")


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    """A shell's background job ignores SIGINT, and so would every process that a test starts and interrupts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tests compare numbers and run beside each other: one thread gives the same sums and is fast enough."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache for the session, so that no test sees, or leaves anything in, the user's."""
    patch = pytest.MonkeyPatch()
    patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def project() -> Path:
    """The root of the repository."""
    return PROJECT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real images and checkpoints; a test that asks for it is skipped where it is absent."""
    folder = Path(os.environ.get(DATA_VARIABLE) or PROJECT.parent / "shared").expanduser().resolve()
    if not (folder / "data").is_dir() or not (folder / "checkpoints").is_dir():
        pytest.skip(
            f"no real data at {folder}: set {DATA_VARIABLE} to the folder that holds data/ and checkpoints/"
        )
    return folder
