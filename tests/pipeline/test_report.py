"""The report of a made-up run directory: what it says, and that it needs nothing but itself."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from html_page import Page
from PIL import Image

from cluster import shards, storage
from cluster.errors import UserError
from pipeline.charts import Curve, accuracy_chart, cosine_chart
from pipeline.report import write_report

CLASSES = ["ant & bee", "<b>cow</b>", "dog"]
IPC = 2
RUN_YAML = """\
name: a made-up run
recipe: prism
data: {image_size: 16}
teachers: {resnet: {arch: "builtin:resnet10"}, vgg: {arch: "builtin:vgg8"}}
recover: {logit_teachers: [resnet], bn_teachers: [resnet, vgg]}
relabel: {teachers: [resnet]}
"""


def picture(value: int) -> bytes:
    pixels = np.full((16, 16, 3), value, np.uint8)
    pixels[4:12, 4:12] = 255 - value
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def write_units(folder: str, base: int, recovered: bool) -> None:
    """One shard per IPC index; index 0 matches both teachers, index 1 the first alone."""
    for ipc in range(IPC):
        rows = [
            {
                "image": {"bytes": picture(base + 10 * ipc + label), "path": f"{label}.png"},
                "label": label,
                "image_id": ipc * len(CLASSES) + label,
                "ipc": ipc,
                "source_id": f"train/{label}/{ipc}.jpg",
                "unit_seed": 1,
            }
            for label in range(len(CLASSES))
        ]
        if recovered:
            for row in rows:
                row |= {
                    "logit_teacher": "resnet",
                    "bn_teachers": ["resnet", "vgg"][: 2 - ipc],
                    "loss_ce": 0.5 + ipc,
                    "loss_bn": [4.0 + ipc, 7.25][: 2 - ipc],
                    "iterations": 40 - 10 * ipc,
                }
        table = pa.Table.from_pylist(rows, schema=shards.image_schema(CLASSES, shards.RECOVERED_FIELDS))
        shards.write_shard(storage.join(folder, f"unit-{ipc:05d}-00000.parquet"), table)


def result(method: str, seed: int, last: float, best: float) -> dict:
    return {
        "method": method,
        "recipe": "prism",
        "student": "resnet18",
        "protocol": "default",
        "seed": seed,
        "ipc": IPC,
        "epochs": 20,
        "top1_last": last,
        "top1_best": best,
        "top5_last": 90.0 + seed,
        "curve": [
            {"epoch": 10, "top1": best, "top5": 80.0, "loss": 1.0},
            {"epoch": 20, "top1": last, "top5": 90.0, "loss": 0.5},
        ],
    }


def card(top1: float | None) -> dict:
    return {"arch": "builtin:x", "bn_channels": [16, 32], "parameters": 12345, "train_top1": top1, "val_top1": top1}


@pytest.fixture
def run(tmp_path) -> str:
    out = str(tmp_path / "run")
    storage.write_bytes(storage.join(out, "run.yaml"), RUN_YAML.encode())
    write_units(storage.join(out, "recovered"), 100, recovered=True)
    write_units(storage.join(out, "init"), 20, recovered=False)
    results = [result("prism", 0, 56.0, 57.0), result("prism", 1, 54.0, 58.0)]
    results += [result("random_real", 0, 51.0, 51.5), result("random_real", 1, 52.0, 52.5)]
    for record in results:
        storage.write_json(storage.join(out, "eval", f"{record['method']}--s{record['seed']}.json"), record)
    for name, top1 in (("resnet", 0.875), ("vgg", None)):
        storage.write_json(storage.join(out, "teachers", name, "card.json"), card(top1))
    summary = {
        "name": "a made-up run",
        "recipe": "prism",
        "config_sha256": "abc" * 20,
        "seed": 0,
        "results": [{k: v for k, v in record.items() if k != "curve"} for record in results],
        "diversity": {
            "feature_model": "resnet",
            "distilled": {"cosine_mean": 0.6125, "cosine_std": 0.1, "per_class": [0.5, 0.6, 0.7375]},
            "real": {"cosine_mean": 0.4, "cosine_std": 0.2, "per_class": [0.3, 0.4, None]},
        },
        "bytes": {"images": 12_300, "labels": 45_600_000},
        "seconds": {"squeeze": 3.21, "recover": 75.0, "evaluate": 7300.0},
        "units": {"planned": 2, "done": 2, "retried": 1},
    }
    storage.write_json(storage.join(out, "summary.json"), summary)
    return out


def read_page(out: str) -> tuple[str, Page]:
    text = Path(out, "report.html").read_text(encoding="utf-8")
    return text, Page(text)


def test_page_says_what_the_run_found(run):
    write_report(run)
    _, page = read_page(run)
    words = re.sub(r"\s+", " ", page.words)
    assert "+3.50 points over random real images" in words
    assert "55.00 ± 1.41 % (best epoch 57.50)" in words
    assert "51.50 ± 0.71" in words
    assert "0.6125" in words
    for text in ("3.2 s", "1 min 15 s", "2 h 01 min", "12.3 KB", "45.6 MB", "2 of 2 units recovered", "1 restarts"):
        assert text in words, text
    assert "87.50 %" in words
    assert "cross-entropy, BN statistics, labels" in words
    # Teacher vgg: three images of index 0; resnet: all six.
    assert re.search(r"resnet 6 4\.5 4 5", words)
    assert re.search(r"vgg 3 7\.25 7\.25 7\.25", words)
    assert re.search(r"1 30 1\.5 5 –", words), "index 1 did not match vgg"


def test_page_needs_nothing_but_itself(run):
    write_report(run)
    text, page = read_page(run)
    assert not re.findall(r"(?:https?:)?//[\w.-]+\.\w+", text)
    assert "http" not in text
    assert page.all("script") == []
    assert page.all("link") == []
    assert "@import" not in text
    assert all((tag["src"] or "").startswith("data:image/png;base64,") for tag in page.all("img"))
    references = {tag[key] for _, tag in page.tags for key in ("href", "xlink:href") if key in tag}
    ids = [tag["id"] for _, tag in page.tags if "id" in tag]
    assert len(ids) == len(set(ids)), "an id stands for one element"
    assert {r.removeprefix("#") for r in references if r} <= set(ids)


def test_gallery_pairs_each_image_with_its_source(run):
    write_report(run)
    _, page = read_page(run)
    images = page.all("img")
    assert len(images) == 2 * IPC * len(CLASSES)
    decoded = [np.asarray(Image.open(io.BytesIO(base64.b64decode(i["src"].split(",")[1]))))[0, 0, 0] for i in images]
    expected = [v for label in range(3) for ipc in range(IPC) for v in (20 + 10 * ipc + label, 100 + 10 * ipc + label)]
    assert decoded == expected
    assert images[2]["title"] == "real: train/0/1.jpg"
    assert all(image["alt"] for image in images)


@pytest.mark.parametrize("width", [560, 1280])
def test_in_a_browser(run, browser, width):
    write_report(run)
    seen = browser(Path(run, "report.html"), width)
    assert seen.complaints == []
    assert seen.overflow == 0
    assert len(seen.charts) == 2
    assert all(chart.width > 200 and chart.height > 100 for chart in seen.charts)


def test_names_are_escaped(run):
    write_report(run)
    text, page = read_page(run)
    assert "<b>" not in text
    assert page.all("b") == []
    assert "<b>cow</b>" in page.words


def test_same_directory_same_bytes(run):
    write_report(run)
    first = Path(run, "report.html").read_bytes()
    write_report(run)
    assert Path(run, "report.html").read_bytes() == first


def test_accessible_structure(run):
    write_report(run)
    _, page = read_page(run)
    assert page.all("html")[0]["lang"] == "en"
    assert [name for name, _ in page.tags if name in ("main", "header", "footer", "h1")] == [
        "header", "h1", "main", "footer",
    ]  # fmt: skip
    assert all(tag.get("aria-label") and tag.get("role") == "img" for tag in page.all("svg"))
    assert all(tag.get("scope") for tag in page.all("th"))


def test_a_run_without_students_or_real_images_still_has_a_page(run):
    storage.remove(storage.join(run, "eval"))
    storage.remove(storage.join(run, "init"))
    summary = storage.read_json(storage.join(run, "summary.json"))
    summary["diversity"] = {"feature_model": "resnet", "distilled": {"per_class": [None] * 3}}
    storage.write_json(storage.join(run, "summary.json"), summary)
    write_report(run)
    _, page = read_page(run)
    assert len(page.all("img")) == IPC * len(CLASSES)
    assert page.all("svg") == []


def test_students_stand_in_the_order_of_the_configuration(run):
    storage.write_bytes(
        storage.join(run, "run.yaml"), (RUN_YAML + "evaluate: {students: {resnet18: {}, convnet: {}}}\n").encode()
    )
    for method in ("prism", "random_real"):
        record = result(method, 0, 30.0, 30.0) | {"student": "convnet"}
        storage.write_json(storage.join(run, "eval", f"a-{method}.json"), record)
        summary = storage.read_json(storage.join(run, "summary.json"))
        summary["results"].append(record)
        storage.write_json(storage.join(run, "summary.json"), summary)
    write_report(run)
    text, page = read_page(run)
    assert [tag["aria-label"].split()[3] for tag in page.all("svg")][:2] == ["resnet18", "convnet"]
    assert text.count("points over random") == 2


def test_a_worse_method_is_not_hidden(run):
    for seed in (0, 1):
        record = result("random_real", seed, 60.0, 60.0)
        storage.write_json(storage.join(run, "eval", f"random_real--s{seed}.json"), record)
    write_report(run)
    text, page = read_page(run)
    assert "−5.00" in page.words
    assert 'class="bad">−5.00' in text


def test_missing_or_damaged_summary(run):
    storage.write_bytes(storage.join(run, "summary.json"), b"{")
    with pytest.raises(UserError, match=r"summary\.json is not valid JSON"):
        write_report(run)
    storage.remove(storage.join(run, "summary.json"))
    with pytest.raises(UserError, match=r"summary\.json is missing; `prism run`"):
        write_report(run)


@pytest.mark.s3
def test_report_on_s3(run, s3_server):
    for path in Path(run).rglob("*"):
        if path.is_file():
            storage.write_bytes(f"{s3_server}/report-run/{path.relative_to(run)}", path.read_bytes())
    write_report(run)
    write_report(f"{s3_server}/report-run")
    assert storage.read_bytes(f"{s3_server}/report-run/report.html") == Path(run, "report.html").read_bytes()


def test_names_with_dollars_are_no_formulas():
    assert "US$ and A$ x_" in cosine_chart(["US$ and A$ x_", "b"], {"real": [0.1, 0.2]}, "label")


@pytest.mark.parametrize("classes", [3, 30, 200])
def test_cosine_chart_of_any_number_of_classes(classes):
    names = [f"class {i}" for i in range(classes)]
    svg = cosine_chart(names, {"real": [0.1] * classes, "distilled": [0.5] * (classes - 1) + [None]}, "label")
    assert svg.startswith('<svg role="img" aria-label="label"')
    assert ("class 2<" in svg) == (classes <= 30)
    assert "currentColor" in svg


def test_mean_of_the_seeds():
    curve = Curve("m", [1, 2], [[10.0, 20.0], [20.0, 40.0]])
    assert curve.mean == [15.0, 30.0]
    # More methods than colours, and a single epoch, are drawn too.
    assert "m6" in accuracy_chart([Curve(f"m{i}", [5], [[1.0]]) for i in range(7)], "x")
