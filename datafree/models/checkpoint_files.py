"""Checkpoint files, judged by what is in them and not by their ending, and never run.

A file is a safetensors file, a zip archive of `torch.save`, or the older stream of pickles that `torch.save` wrote
before; anything else is named for what it looks like. Before torch reads an archive it is seen to be whole
(checksums) and as large as its records, so that no file takes more memory than it is long.
"""

from __future__ import annotations

import argparse
import io
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError

from datafree.cache.store import read_safetensors
from datafree.errors import UsageError

_TORCH_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")  # the number that begins older files of torch.save
_HEADER_LIMIT = 100_000_000  # bytes of a safetensors header, as its format says
_PROTOCOL = 2  # of pickle, the one that torch reads without running anything
_LOOKS_LIKE = {
    b"\x89HDF": "an HDF5 file (Keras?): export the weights to PyTorch first",
    b"\x1f\x8b": "compressed with gzip: unpack it first",
    b"BZh": "compressed with bzip2: unpack it first",
    b"\xfd7zXZ": "compressed with xz: unpack it first",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: fetch it with `git lfs pull`",
    b"\x93NUMPY": "a NumPy array: save a state dict with torch.save or safetensors",
    b"GGUF": "a GGUF file: take the PyTorch or safetensors weights it was made from",
    b"<": "a web page or XML: the download did not give the file itself",
    b"{": "a JSON text: give the file with the weights",
}


def read_checkpoint(path: Path) -> object:
    """What the file holds: tensors on the CPU, and plain Python values around them.

    Raises UsageError, naming the file and what to do, for a file that is missing, damaged, not a checkpoint, or that
    holds pickled Python objects; those are never executed.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is not a file" if path.exists() else "does not exist"
        raise UsageError(f"weights file {path} {what}: give a .safetensors, .pt, .pth or .th file")
    try:
        with path.open("rb") as file:
            head, size = file.read(4096), path.stat().st_size
    except OSError as error:
        raise UsageError(
            f"weights file {path} cannot be read ({error.strerror}): change its permissions"
        ) from error
    if head.startswith(b"PK"):
        _check_archive(path)
        return _read_torch(path)
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= min(size, _HEADER_LIMIT):
        return _read_safetensors(path)
    if head.startswith(b"\x80"):
        _check_protocol(path, head, legacy=True)
        return _read_torch(path)
    if path.suffix == ".safetensors":
        raise UsageError(
            f"{path} is not a safetensors file, or it is truncated ({_described(head)}): fetch it again"
        )
    raise UsageError(
        f"{path} is not a PyTorch checkpoint: {_described(head)}; it was perhaps not fetched whole"
    )


def _described(head: bytes) -> str:
    for magic, what in _LOOKS_LIKE.items():
        if head.startswith(magic):
            return f"it looks like {what}"
    if head[257:262] == b"ustar":
        return "it looks like a tar archive: unpack it, or save the state dict again with a current PyTorch"
    return f"it begins with the bytes {head[:4]!r}" if head else "it is empty"


def _read_safetensors(path: Path) -> object:
    try:
        return read_safetensors(path)[1]
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"{path} is not a safetensors file, or it is truncated ({_shortened(error)}): fetch it again"
        ) from error


def _check_archive(path: Path) -> None:
    """Raise UsageError unless the archive is one of torch's, uncompressed and whole."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            data = next((name for name in names if name.endswith("/data.pkl") or name == "data.pkl"), None)
            if data is None:
                arrays = any(name.endswith(".npy") for name in names)
                what = "arrays of NumPy" if arrays else "no data.pkl"
                raise UsageError(
                    f"{path} is a zip archive but no PyTorch checkpoint ({what}): save a state dict"
                )
            if any(name.endswith("constants.pkl") for name in names):
                raise UsageError(
                    f"{path} is a TorchScript archive: save its state_dict() with torch.save and give that file"
                )
            if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
                raise UsageError(
                    f"{path} is compressed or encrypted, which torch.save never does: unpack it, or save it again"
                )
            if sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise UsageError(
                    f"{path} is truncated or damaged (it is shorter than its records): fetch it again"
                )
            with archive.open(data) as file:
                _check_protocol(path, file.read(64), legacy=False)
            broken = archive.testzip()
    except (
        zipfile.BadZipFile, zlib.error, struct.error, RuntimeError, ValueError, EOFError, OSError,
        OverflowError, LookupError,
    ) as error:  # fmt: skip
        raise _damaged(path, error) from error
    if broken is not None:
        raise UsageError(
            f"{path} is damaged: the checksum of its record {broken[:80]} is wrong; fetch it again (or save it again, "
            "where it was saved without checksums)"
        )


def _check_protocol(path: Path, head: bytes, *, legacy: bool) -> None:
    """torch reads pickle protocol 2 without running anything; others are not Python objects for that reason."""
    protocol = head[1] if len(head) > 1 and head[:1] == b"\x80" else _PROTOCOL
    if protocol == _PROTOCOL or (legacy and _TORCH_MAGIC not in head[:64]):
        return
    raise UsageError(
        f"{path} was saved with pickle protocol {protocol}, and only protocol {_PROTOCOL} can be read without running "
        "code: load it where you trust it and save it again, torch.save(state_dict, FILE) without pickle_protocol"
    )


def _read_torch(path: Path) -> object:
    try:
        allowed = torch.serialization.safe_globals([argparse.Namespace])  # a script's arguments: plain values
        with path.open("rb") as file, warnings.catch_warnings(), allowed:
            warnings.simplefilter(
                "ignore", UserWarning
            )  # what they warn of is told below, or does not matter
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found is None and not _is_plain_pickle(path):
            raise _damaged(path, error) from error
        raise UsageError(
            f"{path} holds pickled Python objects{f' ({found.group(1)})' if found else ''} besides tensors; "
            "unpickling them could run code, so they are refused. Save model.state_dict() alone and give that file"
        ) from error
    except Exception as error:  # torch's reader trusts its input: a flipped bit raises almost anything
        raise _damaged(path, error) from error


def _is_plain_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(64)
    return head.startswith(b"\x80") and _TORCH_MAGIC not in head


def _damaged(path: Path, error: Exception) -> UsageError:
    return UsageError(
        f"{path} is truncated or not a PyTorch checkpoint ({_shortened(error)}): fetch it again"
    )


def _shortened(error: Exception) -> str:
    text = io.StringIO(str(error)).readline().strip()
    return text[:120] or type(error).__name__
