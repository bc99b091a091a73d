"""Seeded damage to checkpoints of every format: a file is taken or refused in words, whatever was done to it."""

from __future__ import annotations

import random
import resource
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from datafree.errors import UsageError
from datafree.models.weights import load_into, load_weights
from tests.datafree.models.test_weights import Net, weights

MUTANTS = 120  # of each format
MEMORY = 400 << 20  # bytes by which reading a file of some kilobytes may grow the process


def _zip(path: Path) -> None:
    torch.save({"state_dict": weights(), "epoch": 3}, path)


def _legacy(path: Path) -> None:
    torch.save({"state_dict": weights(), "epoch": 3}, path, _use_new_zipfile_serialization=False)


def _safe(path: Path) -> None:
    save_file(weights(), path, metadata={"format": "pt"})


FORMATS: dict[str, Callable[[Path], None]] = {"zip": _zip, "legacy": _legacy, "safetensors": _safe}


def _mutants(whole: bytes, other: bytes, seed: int) -> Iterator[bytes]:
    """Truncated, bits flipped (mostly where the structure is), pieces moved or lengthened, heads of other formats."""
    chance = random.Random(seed)
    for number in range(MUTANTS):
        data = bytearray(whole)
        match number % 6:
            case 0:
                del data[chance.randrange(len(data)) :]
            case 1 | 2:
                reach = len(data) if number % 2 else min(len(data), 700)
                for _ in range(chance.choice([1, 1, 2, 8])):
                    place = chance.randrange(reach)
                    place = place if chance.random() < 0.5 else len(data) - 1 - place
                    data[place] ^= 1 << chance.randrange(8)
            case 3:
                head = chance.choice([8, 64, 512])
                data[:head] = other[:head]
            case 4:
                start, count = chance.randrange(len(data)), chance.randrange(1, 200)
                data[start : start + count] = bytes(chance.choice([b"\x00", b"\xff", b"9"])) * count
            case 5:
                start, count = chance.randrange(len(data)), chance.randrange(1, 500)
                data[start:start] = data[chance.randrange(len(data)) :][:count]
        yield bytes(data)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_damage_ends_in_words(tmp_path: Path, name: str) -> None:
    path, other = tmp_path / "w.pt", tmp_path / "other.pt"
    FORMATS[name](path)
    FORMATS[{"zip": "legacy", "legacy": "safetensors", "safetensors": "zip"}[name]](other)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused: list[str] = []
    for number, data in enumerate(_mutants(path.read_bytes(), other.read_bytes(), seed=7)):
        path.write_bytes(data)
        model = Net()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                load_into(model, load_weights(path, None, model)[0], path.name)
            except UsageError as error:
                refused.append(f"mutant {number}: {error}")
    assert len(refused) > MUTANTS / 3
    assert not [text for text in refused if path.name not in text or len(text) > 2000]
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < MEMORY, f"{grown / 2**20:.0f} MiB"


def _repacked(path: Path, edit: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, edit(name, data))


def _refused(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        load_weights(path)
    return str(caught.value)


def test_a_flipped_bit_of_a_weight_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"a": torch.full((100,), 7.0)}, path)
    data = bytearray(path.read_bytes())
    data[data.index(struct.pack("<f", 7.0)) + 1] ^= 1
    path.write_bytes(bytes(data))
    assert "is damaged: the checksum of its record w/data/0 is wrong; fetch it again" in _refused(path)


def test_an_archive_cannot_unpack_to_more_than_it_is(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"a": torch.zeros(1 << 20)}, path)
    _repacked(path, lambda _, data: data, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 17
    assert "is compressed or encrypted, which torch.save never does" in _refused(path)


def test_a_tensor_cannot_be_longer_than_its_record(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"a": torch.arange(4.0)}, path)
    long = b"J" + struct.pack("<i", 1 << 28)

    def lengthen(name: str, data: bytes) -> bytes:
        changed = data.replace(b"K\x04t", long + b"t").replace(b"K\x04\x85", long + b"\x85")
        assert not name.endswith("data.pkl") or changed != data
        return changed

    _repacked(path, lengthen)
    assert "is truncated or not a PyTorch checkpoint" in _refused(path)


def test_a_tensor_that_repeats_one_number_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    state = weights() | {"conv.weight": torch.zeros(1).expand(1 << 40)}
    torch.save(state, path)
    with pytest.raises(UsageError, match=r"wrongly shaped: conv.weight \(file \(1099511627776,\)"):
        load_into(Net(), load_weights(path)[0], path.name)
