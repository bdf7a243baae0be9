"""Training of one teacher: the images it sees, the schedule, and that a stopped training ends like another."""

from __future__ import annotations

import gzip
import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray

from cluster import shards, storage
from cluster.errors import RunError, UserError
from cluster.rng import generator
from cluster.shards import Dataset
from cluster.worker import Worker
from stages.data import DataSpec
from stages.images import encode_png
from stages.squeeze.augment import augmented, check_squeeze, shift_and_flip
from stages.squeeze.core import TeacherTraining, lr_multiplier, train_epochs
from stages.squeeze.data import RealImages
from stages.squeeze.options import SqueezeOptions
from stages.teachers.options import TeacherSpec
from stages.teachers.pixels import read_pixels
from stages.teachers.teacher import fresh_teacher

CLASSES = [str(k) for k in range(10)]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def write_dataset(uri: str, pixels: NDArray[np.uint8], labels: NDArray[np.int64], rows: list[int]) -> Dataset:
    """Shards of the given sizes from uint8 [N, C, S, S]."""
    start, names = 0, []
    for index, count in enumerate(rows):
        encoded = [{"bytes": encode_png(p), "path": ""} for p in pixels[start : start + count]]
        table = pa.table(
            {"image": pa.array(encoded, shards.IMAGE_TYPE), "label": pa.array(labels[start : start + count])},
            schema=shards.image_schema(CLASSES),
        )
        names.append((f"part-{index:05d}.parquet", count))
        shards.write_shard(storage.join(uri, names[-1][0]), table)
        start += count
    dataset = Dataset(
        uri=uri, class_names=CLASSES, channels=pixels.shape[1], image_size=pixels.shape[2:], mean=[0.13], std=[0.31],
        shards=names, class_counts=np.bincount(labels, minlength=10).tolist(), fingerprint="f",
    )  # fmt: skip
    shards.save_dataset(dataset)
    return dataset


def spec_of(dataset: Dataset) -> DataSpec:
    return DataSpec(
        dataset.image_size[0], dataset.channels, tuple(dataset.mean), tuple(dataset.std), tuple(dataset.class_names)
    )


@pytest.fixture
def numbered(tmp_path):
    """37 images in shards of 10, 10, 10 and 7; image k has the value k and label k mod 10."""
    values = np.arange(37, dtype=np.uint8)
    pixels = np.broadcast_to(values[:, None, None, None], (37, 1, 8, 8)).copy()
    return write_dataset(str(tmp_path / "numbered"), pixels, values.astype(np.int64) % 10, [10, 10, 10, 7])


def seen(images: RealImages, batch: int, epoch: int = 0) -> list[list[int]]:
    out = []
    for pixels, labels in images.batches(batch, 3, epoch):
        values = pixels[:, 0, 0, 0].tolist()
        assert [v % 10 for v in values] == labels.tolist()
        out.append(values)
    return out


@pytest.mark.parametrize("budget", [37 * 64, 36 * 64, 20 * 64, 64])
def test_every_image_once_an_epoch(numbered, budget):
    """All but the incomplete last batch; resident and streamed, down to a window of one shard."""
    images = RealImages(numbered, spec_of(numbered), budget)
    assert images.resident == (budget == 37 * 64)
    batches = seen(images, 6)
    assert [len(b) for b in batches] == [6] * 6
    assert images.num_batches(6, 3, 0) == 6
    flat = [v for b in batches for v in b]
    assert len(set(flat)) == 36
    assert flat != sorted(flat)
    assert seen(RealImages(numbered, spec_of(numbered), budget), 6) == batches
    assert seen(images, 6, epoch=1) != batches
    assert len(seen(images, 50)[0]) == 37


def test_streamed_windows_mix_shards(numbered):
    """A window of two shards: neighbours in a batch come from both."""
    images = RealImages(numbered, spec_of(numbered), 40 * 64)
    images.resident = False
    for epoch in range(5):
        first = [v for b in seen(images, 8, epoch)[:2] for v in b]
        assert len({v // 10 for v in first}) == 2
        assert first != sorted(first)


@pytest.mark.parametrize("budget", [37 * 64, 20 * 64])
def test_workers_share_every_batch(numbered, budget):
    data = spec_of(numbered)
    workers = [RealImages(numbered, data, budget, rank, 2) for rank in range(2)]
    first, second = (seen(w, 6) for w in workers)
    assert len(first) == len(second) == workers[0].num_batches(6, 3, 0) == workers[1].num_batches(6, 3, 0)
    both = [v for b in first + second for v in b]
    assert len(set(both)) == len(both)
    assert all(len(b) == 3 for b in first + second)
    if budget == 37 * 64:
        alone = seen(RealImages(numbered, data, budget), 6)
        assert [sorted(a + b) for a, b in zip(first, second, strict=True)] == [sorted(b) for b in alone]
    parts = [v for w in workers for pixels, _ in w.parts() for v in pixels[:, 0, 0, 0].tolist()]
    assert sorted(parts) == list(range(37))


def test_shift_and_flip_against_numpy():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (12, 3, 9, 9), dtype=np.uint8)
    shift = rng.integers(-4, 5, (2, 12))
    flip = rng.random(12) < 0.5
    got = shift_and_flip(torch.from_numpy(pixels), shift, flip).numpy()
    for k in range(12):
        padded = np.pad(pixels[k], ((0, 0), (4, 4), (4, 4)), mode="reflect")
        top, left = shift[0, k] + 4, shift[1, k] + 4
        want = padded[:, top : top + 9, left : left + 9]
        assert np.array_equal(got[k], want[:, :, ::-1] if flip[k] else want)


@pytest.mark.parametrize("options", [{}, {"crop_padding": 3}, {"crop_min_scale": 0.3}])
def test_augmentation_is_drawn_by_counter(options):
    data = DataSpec(12, 3, (0.5,) * 3, (0.25,) * 3, ("a", "b"))
    pixels = torch.randint(0, 256, (64, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    options = SqueezeOptions(**options)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    a, b = (augmented(pixels, generator(1, "x", 2), options, data) for _ in range(2))
    assert torch.equal(a, b)
    assert torch.equal(state[0], torch.get_rng_state())
    assert np.array_equal(state[1], np.random.get_state()[1])
    plain = data.normalise(pixels)
    mirrored = (a == plain.flip(3)).flatten(1).all(1).float().mean()
    kept = (a == plain).flatten(1).all(1).float().mean()
    if not options.crop_padding and options.crop_min_scale is None:
        assert mirrored + kept == 1
        assert 0.3 < mirrored < 0.7
    else:
        assert kept < 0.2
    assert a.shape == pixels.shape
    assert (a.min(), a.max()) >= (plain.min() - 1e-4, plain.max() - 3)


def test_padding_ends_where_there_is_nothing_to_reflect():
    data = DataSpec(12, 1, (0.5,), (0.25,), ("a", "b"))
    check_squeeze(SqueezeOptions(crop_padding=11), data)
    pixels = torch.arange(12 * 12, dtype=torch.uint8).view(1, 1, 12, 12)
    corner = np.array([[-11], [-11]])
    assert torch.equal(shift_and_flip(pixels, corner, np.array([False])), pixels.flip(2, 3))
    for padding in (12, 23, 40):
        with pytest.raises(UserError, match=rf"squeeze\.crop_padding: {padding} .* side 12; choose less"):
            check_squeeze(SqueezeOptions(crop_padding=padding), data)


def test_two_kinds_of_crop_exclude_each_other():
    with pytest.raises(ValueError, match="crop_padding and crop_min_scale exclude each other"):
        SqueezeOptions(crop_padding=4, crop_min_scale=0.3)
    assert SqueezeOptions(crop_min_scale=0.3).crop_padding == 0


def test_no_augmentation():
    data = DataSpec(6, 1, (0.5,), (0.25,), ("a", "b"))
    pixels = torch.randint(0, 256, (8, 1, 6, 6), dtype=torch.uint8)
    assert torch.equal(augmented(pixels, generator(0, "x"), SqueezeOptions(flip=False), data), data.normalise(pixels))


def test_schedule():
    """Warm-up rises to 1 in equal steps, the cosine reaches about 0; no warm-up begins at 1."""
    rates = [lr_multiplier(k / 10, 0.1, 2.0, 6) for k in range(60)]
    assert np.allclose(rates[:20], np.arange(1, 21) / 20)
    want = [0.5 * (1 + math.cos(math.pi * (k - 20) / 40)) for k in range(20, 60)]
    assert np.allclose(rates[20:], want)
    assert lr_multiplier(0, 0.1, 0, 3) == 1
    # A warm-up as long as the training would never come down.
    assert lr_multiplier(0.5, 0.5, 1.0, 1) == 1
    assert lr_multiplier(0.99, 0.01, 1.0, 1) < 0.01


@pytest.fixture(scope="module")
def mnist(shared_data, tmp_path_factory) -> tuple[Dataset, Dataset]:
    """Real MNIST: 1,600 training and 400 test images."""
    out = []
    for split, count in (("train", 1600), ("t10k", 400)):
        folder = shared_data / "mnist"
        raw = gzip.decompress((folder / f"{split}-images-idx3-ubyte.gz").read_bytes())
        pixels = np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 1, 28, 28)[:count]
        raw = gzip.decompress((folder / f"{split}-labels-idx1-ubyte.gz").read_bytes())
        labels = np.frombuffer(raw, np.uint8, offset=8)[:count].astype(np.int64)
        out.append(write_dataset(str(tmp_path_factory.mktemp(split)), pixels, labels, [count // 2, count - count // 2]))
    return out[0], out[1]


OPTIONS = SqueezeOptions(epochs=3, batch=32, lr=0.05, warmup_epochs=0.3, flip=False, crop_padding=1)


def training_on(
    mnist, arch="builtin:resnet10", options=OPTIONS, **kwargs
) -> tuple[TeacherTraining, RealImages, RealImages]:
    data = spec_of(mnist[0])
    spec = TeacherSpec(arch=arch, kwargs=kwargs or {"width": 8})
    teacher = fresh_teacher("t", spec, data, 5)
    training = TeacherTraining(teacher, options, options.epochs, options.lr, 1, Worker())
    return training, RealImages(mnist[0], data), RealImages(mnist[1], data)


def test_learns_real_digits(mnist):
    training, train, val = training_on(mnist)
    states = [t.epoch for t in train_epochs(training, train, val)]
    assert states == [1, 2, 3]
    assert training.accuracies[-1] > 0.9
    assert training.losses == sorted(training.losses, reverse=True)
    assert not training.network.training
    # Independent count of the accuracy.
    right = 0
    for pixels, labels in val.parts():
        x = (pixels.float() / 255 - 0.13) / 0.31
        with torch.no_grad():
            right += int((training.network(x).argmax(1) == labels).sum())
    assert right / 400 == pytest.approx(training.accuracies[-1], abs=2.6e-3)


def few(dataset: Dataset, count: int, uri: str) -> Dataset:
    """The first images of the first shard."""
    data = spec_of(dataset)
    pixels, labels = read_pixels(dataset, 0, data, range(count))
    return write_dataset(uri, pixels.numpy(), labels.numpy(), [count])


@pytest.mark.parametrize(
    ("arch", "kwargs", "optimizer"),
    [
        ("builtin:resnet10", {"width": 8}, "sgd"),
        ("builtin:mobilenetv2", {"width_mult": 0.25}, "sgd"),
        ("builtin:shufflenetv2", {"width_mult": 0.5}, "adamw"),
    ],
)  # fmt: skip
def test_a_stopped_training_ends_with_the_same_bits(mnist, tmp_path, arch, kwargs, optimizer):
    """State to disk after the first epoch, back in a new process's place: equal weights to the last bit."""
    options = OPTIONS.model_copy(update={"optimizer": optimizer, "lr": 0.01, "batch": 64})
    small = tuple(few(dataset, 200, str(tmp_path / str(k))) for k, dataset in enumerate(mnist))
    whole, train, val = training_on(small, arch, options, **kwargs)
    for _ in train_epochs(whole, train, val):
        if whole.epoch == 1:
            torch.save(whole.state(), tmp_path / "state.pt")
    torch.randn(7)
    resumed, train, val = training_on(small, arch, options, **kwargs)
    resumed.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [t.epoch for t in train_epochs(resumed, train, val)] == [2, 3]
    want, got = whole.network.state_dict(), resumed.network.state_dict()
    assert all(torch.equal(want[k], got[k]) for k in want)
    assert (whole.losses, whole.accuracies) == (resumed.losses, resumed.accuracies)


def test_divergence_is_said(mnist):
    training, train, val = training_on(mnist, options=OPTIONS.model_copy(update={"lr": 1e30, "warmup_epochs": 0.0}))
    with pytest.raises(RunError, match=r"teachers\.t: the loss became .* teachers\.t\.lr"):
        list(train_epochs(training, train, val))


def test_unreadable_image_is_named(numbered):
    uri = numbered.shard_uri(1)
    table = shards.read_shard(uri)
    rows = table["image"].to_pylist()
    rows[4]["bytes"] = rows[4]["bytes"][:30]
    broken = table.set_column(0, table.schema.field("image"), pa.array(rows, shards.IMAGE_TYPE))
    shards.write_shard(uri, broken)
    with pytest.raises(RunError, match=r"part-00001\.parquet: row 4"):
        list(RealImages(numbered, spec_of(numbered)).batches(4, 0, 0))
