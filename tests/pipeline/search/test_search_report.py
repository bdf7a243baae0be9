"""The report of made-up searches: what it says, what it leaves out, and how a browser shows it."""

from __future__ import annotations

import re
from pathlib import Path

import made_up
import pytest
from html_page import Page

from cluster import storage
from cluster.errors import UserError
from pipeline.search import importance
from pipeline.search.report import FINAL_FILE, SEARCH_FILE, write_search_report
from pipeline.search.table import TRIALS_FILE
from pipeline.search.trial import Trial

BOTH = {"objectives": ["top1_last", "gpu_seconds"]}


def page_of(*args, **kwargs) -> tuple[str, Page]:
    text = Path(made_up.write(*args, **kwargs)).read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture(scope="module", autouse=True)
def few_shuffles():
    """Pages are drawn often here; what chance gives is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importance, "SHUFFLES", 20)
        yield


@pytest.fixture(scope="module")
def one(few_shuffles, tmp_path_factory) -> str:
    """Page of a search of one objective, with its full runs."""
    return made_up.write(str(tmp_path_factory.mktemp("one")), made_up.trials(), final=made_up.FINAL)


@pytest.fixture(scope="module")
def two(few_shuffles, tmp_path_factory) -> str:
    """Page of a search of two objectives, without them."""
    return made_up.write(str(tmp_path_factory.mktemp("two")), made_up.trials(two_objectives=True), BOTH)


def read(path: str) -> Page:
    return Page(Path(path).read_text(encoding="utf-8"))


def bare(trials: list[Trial]) -> list[Trial]:
    """Without what most charts are drawn from."""
    return [trial.model_copy(update={"params": {}, "point": {}}) for trial in trials]


def words(page: Page) -> str:
    return re.sub(r"\s+", " ", page.words)


def test_page_says_what_was_found(one):
    said = words(read(one))
    # Means 41.1333 and 44.0, s² = 0.17333 and 0.21, three seeds each.
    assert "+2.87 ± 0.36 points over the default" in said
    assert "Trial 17 is better than the default by 2.87 ± 0.36 points." in said
    assert "41.13 ± 0.24 % (3 seeds)" in said
    assert "Full runs: runs/search/default and runs/search/winner ." in said
    assert "50 images of each class, cut from the training data" in said
    assert "they saw the test data, once" in said
    assert "By the table below, trial 19 would win now; the full run is that of trial 17." in said
    assert "24 of 24 trials · 3 rungs · top1_last" in said
    assert "finished 4 stopped 18 failed 2" in said
    assert "unit 00001-00000: CUDA out of memory 5" in said
    trials = made_up.trials()
    units = sum(r.units for t in trials for r in t.rungs)
    shared = sum(r.units_shared for t in trials for r in t.rungs)
    assert f"needed by trials {units} shared with others {shared} ({100 * shared / units:.0f} %)" in said


def test_table_of_trials(one):
    page = read(one)
    head = next(i for i, row in enumerate(page.rows) if row[:4] == ["Trial", "Rung 1", "Rung 2", "Rung 3"])
    assert page.rows[head][4:] == ["State", *made_up.SEARCH["space"]]
    rows = page.rows[head + 1 : head + 11]
    assert rows[0][0] == "19 winner"
    assert [row[0] for row in rows[:4]] == ["19 winner", "17", "9", "0 default"]
    assert rows[3][4:] == [
        "finished", "0.05", "0.01", "convnet, resnet10, resnet18, vgg8", "resnet18", "per_index", "0.5",
    ]  # fmt: skip
    assert all(row[3] == "–" for row in rows[4:]), "stopped before the last rung"
    assert "–" in {row[-1] for row in rows}, "a field that does not count has no value"


def test_default_is_always_shown(tmp_path):
    trials = bare(made_up.trials())
    trials[0] = trials[0].model_copy(update={"rungs": trials[0].rungs[:1], "state": "stopped"})
    _, page = page_of(str(tmp_path), trials)
    first = [row[0] for row in page.rows if row and row[0].startswith(("0 ", "19"))]
    assert first == ["19 winner", "0 default"]
    assert "The best 10 , and the default; 13 more are in" in words(page).replace("10,", "10 ,")
    assert "The default was not measured at the last rung." in words(page)


def test_charts(one):
    page = read(one)
    labels = [tag["aria-label"] for tag in page.all("svg")]
    assert [label.partition(",")[0] for label in labels] == [
        "Top-1 on the search split against recover.r_bn",
        "Top-1 on the search split against recover.lr",
        "Top-1 on the search split against recover.include_prob",
        "Importance of each parameter at rung 2",
        "Importance of each parameter at rung 1",
        "Difference in top-1 of trials with and without each teacher in recover.bn_teachers",
        "Difference in top-1 of trials with and without each teacher in recover.logit_teachers",
        "Best top-1 until each trial",
        "Best top-1 against time spent",
    ]
    assert "Accuracy and cost" not in page.words


def test_two_objectives(two):
    page = read(two)
    said = words(page)
    assert "1 rung · top1_last and gpu_seconds" in said
    assert page.all("svg")[-1]["aria-label"].startswith("Top-1 against planned GPU-seconds")
    # The default, with all four teachers, is the dearest and not the best.
    assert page.rows[[row[:2] for row in page.rows].index(["Trial", "GPU-seconds"]) + 1 :][:3] == [
        ["7", "65", "30.99"], ["9", "105", "31.36"], ["19", "145", "32.07"],
    ]  # fmt: skip
    assert "The full runs are not done yet, so it is not known whether there is a gain." in said
    assert "trial 19, best on the search split 32.07 %, +3.54 points over the default there" in said


@pytest.mark.parametrize(
    ("final", "sentence"),
    [
        ({**made_up.FINAL, "winner": {"number": 0}}, "The default itself is the winner: no trial did better."),
        (
            {**made_up.FINAL, "winner": {**made_up.FINAL["winner"], "top1": {"resnet18": [41.2, 41.5, 41.1]}}},
            "No difference that counts between trial 17 and the default: +0.13 ± 0.27 points",
        ),
        (
            {**made_up.FINAL, "winner": {**made_up.FINAL["winner"], "top1": {"resnet18": [31.2, 31.5, 31.1]}}},
            "Trial 17 is worse than the default by 9.87 ± 0.27 points.",
        ),
        (
            {**made_up.FINAL, "winner": {**made_up.FINAL["winner"], "top1": {"resnet18": [44.0]}}},
            "One seed does not tell whether trial 17 (+2.87 points) differs from the default.",
        ),
        (
            {**made_up.FINAL, "winner": {**made_up.FINAL["winner"], "top1": {"other": [44.0]}}},
            "The full runs have no student in common",
        ),
    ],
)
def test_verdicts(tmp_path, final, sentence):
    text, page = page_of(str(tmp_path), bare(made_up.trials()), final=final)
    assert sentence in words(page)
    assert ('class="good"' in text, 'class="bad"' in text) == (False, "worse" in sentence)


def test_two_students_have_two_gains(tmp_path):
    top1 = {"resnet18": [41.0, 41.6], "vgg": [30.0, 31.0]}
    final = {"default": {"out": "a", "top1": top1}, "winner": {"number": 19, "out": "b", "top1": top1}}
    _, page = page_of(str(tmp_path), bare(made_up.trials()), final=final)
    assert words(page).count("No difference that counts") == 2
    assert "would win now" not in page.words


def failed(trials):
    return [t.model_copy(update={"rungs": [], "state": "failed", "reason": "no GPU"}) for t in trials]


@pytest.mark.parametrize(
    ("trials", "search", "charts", "sentence"),
    [
        (None, {}, 0, "No trial has reached the last rung"),
        ([], {}, 0, "No trial has reached the last rung"),
        (failed(made_up.trials()), {}, 0, "no GPU 0, 1, 2, 3"),
        (failed(made_up.trials(True)), BOTH, 0, "No trial was measured at the last rung"),
        (made_up.trials()[:1], {}, 5, "No trial measured better than the default."),
        (made_up.trials(True)[:1], {"rungs": [{}]}, 5, "the configuration as it is"),
        ([t.model_copy(update={"rungs": t.rungs[:1], "state": "stopped"}) for t in made_up.trials()], {}, 6, "Rung 1"),
        (made_up.trials(), {"space": {"recover.selection": {"choice": ["fixed", "per_index"]}}}, 6, "19"),
        (bare(made_up.trials()), {}, 2, "is not shown"),
        ([t.model_copy(update={"state": "running", "rungs": []}) for t in made_up.trials()], {}, 0, "running 24"),
        # 0 has no place on a logarithmic axis.
        ([made_up.trials()[0].model_copy(update={"point": {"recover.r_bn": 0.0}})], {}, 3, "default"),
    ],
)
def test_whatever_is_missing(tmp_path, trials, search, charts, sentence):
    _, page = page_of(str(tmp_path), trials, search)
    assert sentence in words(page)
    assert len(page.all("svg")) == charts, [tag["aria-label"] for tag in page.all("svg")]
    references = {tag["href"] for _, tag in page.tags if "href" in tag}
    ids = [tag["id"] for _, tag in page.tags if "id" in tag]
    assert len(ids) == len(set(ids))
    assert {r.removeprefix("#") for r in references if r} <= set(ids)


@pytest.mark.parametrize("which", ["one", "two"])
def test_page_needs_nothing_but_itself(request, which):
    path = request.getfixturevalue(which)
    text, page = Path(path).read_text(encoding="utf-8"), read(path)
    assert "http" not in text
    assert "@import" not in text
    assert page.all("script") == page.all("link") == page.all("img") == []
    assert all(tag.get("aria-label") and tag.get("role") == "img" for tag in page.all("svg"))
    assert all(tag.get("scope") for tag in page.all("th"))
    assert page.all("html")[0]["lang"] == "en"


def evil(trials):
    """Names and texts that would be markup or formulas."""
    out = []
    for trial in trials:
        point = {f"{field}<i>$x$</i>": value for field, value in trial.point.items()}
        point["recover.bn_teachers<i>$x$</i>"] = ["<b>a</b>", "$y$ & $z_$"][: 1 + trial.number % 2]
        params = {f"<u>{name}$</u>$": value for name, value in trial.params.items()}
        out.append(trial.model_copy(update={"point": point, "params": params, "reason": trial.reason + "<s>'\""}))
    return out


def test_names_are_escaped(tmp_path):
    final = {"default": {"out": "<b>out</b>", "top1": {"<b>net</b>": [1.0]}},
             "winner": {"number": 3, "out": "&amp;", "top1": {"<b>net</b>": [2.0]}}}  # fmt: skip
    space = {"space": {"recover.r_bn<i>$x$</i>": {"log": [0.001, 1]}}}
    text, page = page_of(str(tmp_path), evil(made_up.trials()), space, final)
    for tag in ("b", "i", "u", "s"):
        assert page.all(tag) == []
    assert "<b>a</b>" in page.words
    assert "$y$ & $z_$" in page.words
    assert "<CIFAR-10>" in page.words
    assert "&amp;amp;" in text


def test_same_directory_same_bytes(one):
    first = Path(one).read_bytes()
    assert Path(write_search_report(str(Path(one).parents[1]))).read_bytes() == first


def test_missing_and_damaged_files(tmp_path):
    out = str(tmp_path)
    with pytest.raises(UserError, match=r"search/search\.yaml is missing; `prism search`"):
        write_search_report(out)
    made_up.write(out, [], final=made_up.FINAL)
    storage.write_bytes(storage.join(out, FINAL_FILE), b'{"default": 1}')
    with pytest.raises(UserError, match="does not say what the full runs found"):
        write_search_report(out)
    storage.write_bytes(storage.join(out, TRIALS_FILE), b"no table")
    with pytest.raises(UserError, match="is not a table of trials"):
        write_search_report(out)
    storage.write_bytes(storage.join(out, SEARCH_FILE), b"search: {spaces: {}}")
    with pytest.raises(UserError, match="has no valid section `search`"):
        write_search_report(out)


@pytest.mark.s3
def test_on_s3(one, s3_server):
    for path in Path(one).parent.iterdir():
        if path != Path(one):
            storage.write_bytes(f"{s3_server}/a-search/search/{path.name}", path.read_bytes())
    assert storage.read_bytes(write_search_report(f"{s3_server}/a-search")) == Path(one).read_bytes()


# In a browser


@pytest.mark.parametrize("width", [560, 1280])
@pytest.mark.parametrize(("which", "best"), [("one", [19, 17, 9, 0]), ("two", [19, 17, 9, 3])])
def test_in_a_browser(request, browser, width, which, best):
    seen = browser(Path(request.getfixturevalue(which)), width)
    assert seen.complaints == []
    assert seen.overflow == 0, f"{seen.width} px"
    assert len(seen.charts) == 9
    for chart in seen.charts:
        assert chart.width > 200, chart
        assert chart.height > 60, chart
        assert chart.cut == [], chart
    head = next(i for i, row in enumerate(seen.rows) if row[:2] == ["Trial", "Rung 1"])
    numbers = [int(row[0].split()[0]) for row in seen.rows[head + 1 :] if row[0].split()[0].isdigit()]
    assert numbers[:4] == best
    assert 0 in numbers[:11]


def luminance(colour: str) -> float:
    """Of ``rgb(r, g, b)``, as WCAG defines it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("dark", [False, True])
def test_charts_take_the_colours_of_the_page(one, browser, dark):
    seen = browser(Path(one), dark=dark)
    ink, paper = (luminance(colour) for colour in seen.colours)
    assert (paper < ink) == dark
    assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) > 7
    assert {colour for chart in seen.charts for colour in chart.colours} == {seen.colours[0]}


def test_a_page_without_trials_in_a_browser(tmp_path, browser):
    seen = browser(Path(made_up.write(str(tmp_path), [])))
    assert (seen.complaints, seen.overflow, seen.charts) == ([], 0, [])


def test_the_browser_would_tell(tmp_path, browser):
    page = tmp_path / "bad.html"
    page.write_text(
        '<!DOCTYPE html><html><head><title>x</title><link rel="stylesheet" href="https://example.com/a.css"></head>'
        '<body><div style="width: 3000px">wide</div><img src="https://example.com/a.png" alt="">'
        '<svg aria-label="s" width="40" height="0"><text x="-20" y="9">cut off</text></svg>'
        '<script>throw new Error("x")</script></body></html>'
    )
    seen = browser(page)
    told = "\n".join(seen.complaints)
    for complaint in ("style-src-elem: https://example.com/a.css", "img-src: https://example.com", "inline script"):
        assert complaint in told
    assert "CONSOLE" in told
    assert seen.overflow > 1000
    assert (seen.charts[0].height, seen.charts[0].cut) == (0, ["cut off"])
