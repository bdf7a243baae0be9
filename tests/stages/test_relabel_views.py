import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop

from stages.data import DataSpec
from stages.recover.options import Crop
from stages.relabel.options import Mix, RelabelOptions
from stages.relabel.views import draw_views, render_views

KINDS = ["none", "cutmix", "mixup"]


def spec(size: int, channels: int = 3) -> DataSpec:
    return DataSpec(size, channels, (0.5, 0.4, 0.3)[:channels], (0.2, 0.3, 0.25)[:channels], ("a", "b"))


def options(kind: str = "cutmix", **values) -> RelabelOptions:
    return RelabelOptions(mix=Mix(kind=kind), **values)


def pixels(count: int, size: int, channels: int = 3) -> torch.Tensor:
    rng = np.random.default_rng(5)
    return torch.from_numpy(rng.integers(0, 256, (count, channels, size, size), dtype=np.uint8))


def reference(images, views, image_id: int, kind: str, data: DataSpec) -> torch.Tensor:
    """One view the slow way in float64: slice, interpolate, flip, mix, normalise."""
    size = images.shape[-1]

    def unmixed(k: int) -> torch.Tensor:
        top, left, height, width = (round(float(v) * size) for v in views.crop[k])
        crop = images[k : k + 1, :, top : top + height, left : left + width].double()
        view = F.interpolate(crop, (size, size), mode="bilinear", align_corners=False)[0]
        return torch.flip(view, [2]) if views.flip[k] else view

    own, other = unmixed(image_id), unmixed(int(views.partner[image_id]))
    lam = float(views.lam[image_id])
    if kind == "mixup":
        own = lam * own + (1 - lam) * other
    elif kind == "cutmix":
        top, left, height, width = (round(float(v) * size) for v in views.box[image_id])
        for y in range(top, top + height):
            for x in range(left, left + width):
                own[:, y, x] = other[:, y, x]
    mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (data.mean, data.std))
    return (own / 255 - mean) / std


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "channels"), [(32, 3), (28, 1), (31, 3)])
def test_renderer_equals_slow_reference(kind, size, channels):
    data, images = spec(size, channels), pixels(24, size, channels)
    views = draw_views(3, 1, len(images), size, options(kind, crop=Crop(min_scale=0.08)))
    rendered = render_views(images, views, views.order, data)
    assert rendered.dtype == torch.float32
    for row, k in enumerate(views.order):
        expected = reference(images, views, int(k), kind, data)
        torch.testing.assert_close(rendered[row].double(), expected, rtol=1e-5, atol=5e-6)
    assert views.flip.any()
    assert not views.flip.all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_view_has_the_same_bits_in_any_batch(kind, threads):
    data, images = spec(33), pixels(130, 33)
    views = draw_views(0, 0, len(images), 33, options(kind))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = render_views(images, views, views.order, data)
        for batch in (7, 50, 128):
            parts = [render_views(images, views, ids, data) for ids in np.split(views.order, range(batch, 130, batch))]
            assert torch.equal(torch.cat(parts), whole)
        shuffled = np.random.default_rng(0).permutation(130)
        assert torch.equal(render_views(images, views, views.order[shuffled], data), whole[shuffled])
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_view_has_the_same_bits_in_any_batch_on_a_gpu(kind):
    data, images = spec(33), pixels(130, 33).cuda()
    views = draw_views(0, 0, len(images), 33, options(kind))
    whole = render_views(images, views, views.order, data)
    for batch in (7, 50, 128):
        parts = [render_views(images, views, ids, data) for ids in np.split(views.order, range(batch, 130, batch))]
        assert torch.equal(torch.cat(parts), whole)
    torch.testing.assert_close(whole.cpu(), render_views(images.cpu(), views, views.order, data))
    # Of a set that stays with the host, batches are moved to the device.
    moved = render_views(images.cpu(), views, views.order, data, torch.device("cuda"))
    assert torch.equal(moved, whole)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 10**6),
    count=st.integers(1, 60),
    size=st.integers(8, 256),
    kind=st.sampled_from(KINDS),
    min_scale=st.floats(0.01, 1),
)
def test_laws_of_views(seed, epoch, count, size, kind, min_scale):
    chosen = options(kind, crop=Crop(min_scale=min_scale))
    views = draw_views(seed, epoch, count, size, chosen)
    draw_views(seed, epoch + 1, count, size, chosen)
    again = draw_views(seed, epoch, count, size, chosen)
    for name, values in vars(views).items():
        assert np.array_equal(values, getattr(again, name)), name
    assert sorted(views.order) == list(range(count))
    assert sorted(views.partner) == list(range(count))
    for boxes in (views.crop, views.box):
        grid = np.rint(boxes * size)
        # Exact in both directions: the stored fractions are those of whole pixels.
        assert np.array_equal((grid / size).astype(np.float32), boxes)
        assert (grid >= 0).all()
        assert (grid[:, :2] + grid[:, 2:] <= size).all()
    assert (np.rint(views.crop * size)[:, 2:] >= 1).all()
    assert ((views.lam >= 0) & (views.lam <= 1)).all()
    if kind == "none":
        assert np.array_equal(views.partner, np.arange(count))
        assert (views.lam == 1).all()
    elif count > 1:
        assert (views.partner != np.arange(count)).all()


def test_epochs_and_seeds_differ():
    a, b, c = (draw_views(s, e, 50, 32, options()) for s, e in ((0, 0), (0, 1), (1, 0)))
    for other in (b, c):
        assert not np.array_equal(a.order, other.order)
        assert not np.array_equal(a.crop, other.crop)


def test_cutmix_share_is_the_kept_area():
    size = 37
    data = DataSpec(size, 1, (0.0,), (1.0,), ("a", "b"))
    views = draw_views(9, 0, 400, size, options(crop=Crop(min_scale=1.0)))
    # Image k is all grey level k mod 256, so the level of a pixel tells whose it is.
    levels = (torch.arange(400) % 256).to(torch.uint8)
    images = levels.view(-1, 1, 1, 1).expand(400, 1, size, size).contiguous()
    ids = np.arange(400)
    rendered = render_views(images, views, ids, data)[:, 0] * 255
    own = torch.isclose(rendered, levels.float().view(-1, 1, 1)).double().mean(dim=(1, 2)).numpy()
    differs = levels[views.partner].numpy() != levels.numpy()
    np.testing.assert_allclose(own[differs], views.lam[differs], atol=1e-6)
    assert views.lam.std() > 0.15


def test_cutmix_boxes_follow_the_paper():
    """Before cutting at the edge a box has the sides S·√(1−λ), λ uniform, around a uniform centre."""
    views = draw_views(1, 0, 20000, 224, options())
    area = 1 - views.lam.astype(np.float64)
    # E over λ ~ U(0,1) of the clipped area, by numeric integration of (E over centre of the clipped side)².
    side = np.sqrt(np.linspace(0, 1, 2001))
    clipped = side - side**2 / 4
    assert area.mean() == pytest.approx((clipped**2).mean(), abs=0.01)
    centre = views.box[:, 0] + views.box[:, 2] / 2
    assert centre[area > 0].mean() == pytest.approx(0.5, abs=0.01)
    np.testing.assert_allclose(views.lam, 1 - views.box[:, 2] * views.box[:, 3], atol=1e-6)


def test_mixup_lambda_is_beta():
    lam = draw_views(0, 0, 20000, 32, RelabelOptions(mix=Mix(kind="mixup", alpha=0.8))).lam
    assert lam.mean() == pytest.approx(0.5, abs=0.01)
    assert lam.var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.003)


@pytest.mark.parametrize(("size", "min_scale"), [(32, 0.08), (64, 0.5), (224, 0.25)])
def test_crops_are_distributed_as_torchvisions(size, min_scale):
    crop = np.rint(draw_views(0, 0, 20000, size, options(crop=Crop(min_scale=min_scale))).crop * size)
    image = torch.zeros(1, size, size)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = np.array([RandomResizedCrop.get_params(image, [min_scale, 1.0], [3 / 4, 4 / 3]) for _ in range(6000)])
    for ours, other in ((f(crop), f(theirs)) for f in (_area, _log_ratio, _top, _left)):
        # Two-sample Kolmogorov–Smirnov at a level of 10⁻⁴.
        grid = np.unique(np.concatenate([ours, other]))
        cdf = [np.searchsorted(np.sort(v), grid, side="right") / len(v) for v in (ours, other)]
        limit = math.sqrt(-math.log(1e-4 / 2) / 2) * math.sqrt(1 / len(ours) + 1 / len(other))
        assert np.abs(cdf[0] - cdf[1]).max() < limit


def _area(box):
    return box[:, 2] * box[:, 3]


def _log_ratio(box):
    return np.log(box[:, 3] / box[:, 2])


def _top(box):
    return box[:, 0]


def _left(box):
    return box[:, 1]


def test_switches():
    views = draw_views(0, 0, 500, 32, options("none", crop=Crop(min_scale=1.0), flip=False))
    assert (views.crop == [0, 0, 1, 1]).all()
    assert not views.flip.any()
    images, data = pixels(500, 32), spec(32)
    assert torch.equal(render_views(images, views, np.arange(500), data), data.normalise(images))
    assert draw_views(0, 0, 2000, 32, options()).flip.mean() == pytest.approx(0.5, abs=0.05)
