"""A page in a real browser: headless Chromium, told to allow no network, and asked what it sees."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from html_page import Page

# Anything that would be fetched, and any script but ours, is refused, and told.
HEAD = """<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'nonce-test'">
<script nonce="test">
window.complaints = [];
addEventListener("securitypolicyviolation", e => complaints.push(`${e.violatedDirective}: ${e.blockedURI}`));
addEventListener("error", e => complaints.push(`error: ${e.message || e.target.outerHTML}`), true);
addEventListener("load", () => {
  const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.width, r.height]; };
  const style = getComputedStyle(document.body);
  document.documentElement.dataset.seen = JSON.stringify({
    complaints,
    fetched: performance.getEntriesByType("resource").map(e => e.name),
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    width: innerWidth,
    colours: [style.color, style.backgroundColor],
    charts: [...document.querySelectorAll("svg")].map(svg => ({
      label: svg.getAttribute("aria-label"), box: box(svg),
      texts: [...svg.querySelectorAll("text")].map(t => [t.textContent, getComputedStyle(t).fill, box(t)]),
    })),
  });
});
</script>
"""


@dataclass(frozen=True)
class Chart:
    """An SVG as laid out: size in pixels, text colours, and texts that reach beyond its edges."""

    label: str
    width: float
    height: float
    colours: set[str]
    cut: list[str]


@dataclass(frozen=True)
class Seen:
    """What the browser made of a page.

    Attributes:
        complaints: errors, refused fetches, console messages.
        overflow: pixels by which the page is wider than the window.
        width: of the window; Chromium may have a least one.
        colours: of text and background.
        charts: every SVG.
        rows: texts of the cells of every table row of the DOM.
    """

    complaints: list[str]
    overflow: float
    width: int
    colours: list[str]
    charts: list[Chart]
    rows: list[list[str]]


@functools.cache
def find_browser() -> str | None:
    """Path of a Chromium that runs; Ubuntu's packages are stubs that do not."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        path = shutil.which(name)
        if path and subprocess.run([path, "--version"], capture_output=True, timeout=60).returncode == 0:
            return path
    return None


def look_at(program: str, page: Path, scratch: Path, width: int = 1280, dark: bool = False) -> Seen:
    """Open a copy of a page, from ``file://``, that tells what it sees."""
    scratch.mkdir(exist_ok=True)
    copy = scratch / "page.html"
    copy.write_text(page.read_text(encoding="utf-8").replace("<head>", "<head>" + HEAD, 1), encoding="utf-8")
    # The sandbox does not work for root, nor /dev/shm in a container.
    command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr",
               "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={scratch / 'profile'}",
               f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--window-size={width},900", "--dump-dom",
               copy.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    dom = Page(done.stdout)
    seen = json.loads(dom.all("html")[0]["data-seen"])
    console = [line for line in done.stderr.splitlines() if re.search(r"\bCONSOLE\b", line)]
    return Seen(
        complaints=seen["complaints"] + seen["fetched"] + console,
        overflow=seen["overflow"],
        width=seen["width"],
        colours=seen["colours"],
        charts=[_chart(chart) for chart in seen["charts"]],
        rows=dom.rows,
    )


def _chart(chart: dict) -> Chart:
    left, top, width, height = chart["box"]
    cut = []
    for text, _, (x, y, w, h) in chart["texts"]:
        # A pixel or two of a glyph's box are empty.
        if x < left - 2 or y < top - 2 or x + w > left + width + 2 or y + h > top + height + 2:
            cut.append(text)
    return Chart(chart["label"], width, height, {fill for _, fill, _ in chart["texts"]}, cut)
