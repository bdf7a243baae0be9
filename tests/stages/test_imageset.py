"""Image sets: decoded once per node, mapped by everyone, and right whatever happens to the cache."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from cluster import shards, storage
from cluster.errors import RunError
from stages import imageset
from stages.data import DataSpec
from stages.images import encode_png, to_pixels
from stages.imageset import load_image_set

SIZE = 16
DATA = DataSpec(SIZE, 3, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), ("ant", "bee", "cat"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PRISM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """One entry for every image decoded."""
    calls: list[int] = []

    def counting(*args):
        calls.append(1)
        return to_pixels(*args)

    monkeypatch.setattr(imageset, "to_pixels", counting)
    return calls


@cache
def encode(pixels: bytes, size: int) -> bytes:
    return encode_png(np.frombuffer(pixels, np.uint8).reshape(3, size, size))


def write(uri: str, pixels: np.ndarray, parts: int = 3, ids: list[int] | None = None) -> None:
    """Shards with rows in no order."""
    order = np.random.default_rng(1).permutation(len(pixels))
    schema = shards.image_schema(list(DATA.class_names), [*shards.IMAGE_FIELDS, pa.field("image_id", pa.int64())])
    for part, members in enumerate(np.array_split(order, parts)):
        images = [{"bytes": encode(pixels[k].tobytes(), pixels.shape[-1])} for k in members]
        rows = [
            {"image": image, "label": int(k) % 3, "image_id": ids[k] if ids else int(k)}
            for image, k in zip(images, members, strict=True)
        ]
        shards.write_shard(storage.join(uri, f"part-{part}.parquet"), pa.Table.from_pylist(rows, schema=schema))


def some(count: int = 10, size: int = SIZE, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, size, size), dtype=np.uint8)


def check(uri: str, pixels: np.ndarray) -> None:
    found = load_image_set(uri, DATA)
    assert np.array_equal(found.images.numpy(), pixels)
    assert found.labels.tolist() == [k % 3 for k in range(len(pixels))]
    assert (found.images.dtype, found.labels.dtype) == (torch.uint8, torch.int64)


@pytest.mark.parametrize("place", ["local", "memory"])
def test_decoded_once_for_all_readers(tmp_path, decoded, place):
    uri = str(tmp_path / "set") if place == "local" else f"memory://{tmp_path.name}/set"
    write(uri, some())
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: check(uri, some()), range(8)))
    assert len(decoded) == 10


def test_other_pixels_in_shards_of_the_same_names_and_sizes_are_seen(tmp_path):
    uri = str(tmp_path / "set")
    write(uri, some())
    sizes = storage.list_files(uri)
    check(uri, some())
    write(uri, some(seed=1))
    # Noise does not compress, so the sizes say nothing.
    assert storage.list_files(uri) == sizes
    check(uri, some(seed=1))


def test_another_space_is_another_set(tmp_path):
    write(str(tmp_path / "set"), some())
    check(str(tmp_path / "set"), some())
    grey = load_image_set(str(tmp_path / "set"), DataSpec(8, 1, (0.5,), (0.2,), DATA.class_names))
    assert grey.images.shape == (10, 1, 8, 8)


def test_without_a_cache_images_are_decoded_into_own_memory(tmp_path, decoded):
    (tmp_path / "cache").write_bytes(b"no folder")
    write(str(tmp_path / "set"), some())
    for _ in range(2):
        check(str(tmp_path / "set"), some())
    assert len(decoded) == 20


@pytest.mark.parametrize("ids", [[0, 1, 2, 4], [0, 1, 2, 2], [0, 1, 2, -1], []])
def test_missing_and_doubled_images_are_an_error(tmp_path, ids):
    write(str(tmp_path / "set"), some(len(ids)), parts=2 if ids else 1, ids=ids)
    with pytest.raises(RunError, match="run the recover stage again"):
        load_image_set(str(tmp_path / "set"), DATA)
    assert not [p for p in Path(os.environ["PRISM_CACHE"]).iterdir() if p.suffix != ".lock"]


def test_empty_folder(tmp_path):
    with pytest.raises(RunError, match="images are missing"):
        load_image_set(str(tmp_path / "none"), DATA)


def test_mapped_images_are_nobodys_own_memory(tmp_path):
    """Read from end to end, a set of 20 MB adds none of it."""
    data = DataSpec(128, 3, DATA.mean, DATA.std, DATA.class_names)
    write(str(tmp_path / "set"), np.repeat(some(4, 128), 100, axis=0), parts=10)
    load_image_set(str(tmp_path / "set"), data)
    before = own_mb()
    found = load_image_set(str(tmp_path / "set"), data)
    assert found.images.max() == 255
    assert found.images.nbytes > 19e6
    assert own_mb() - before < 8


def own_mb() -> float:
    """Resident memory that is no file's."""
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) / 1024


def test_large_sets_stay_with_the_host(tmp_path, monkeypatch):
    write(str(tmp_path / "set"), some())
    found = load_image_set(str(tmp_path / "set"), DATA)
    device = torch.device("meta")
    assert found.images_near(device).device == device
    monkeypatch.setattr(imageset, "DEVICE_BYTES", found.images.nbytes - 1)
    assert found.images_near(device) is found.images
