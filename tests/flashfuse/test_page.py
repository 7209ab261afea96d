"""The report page: what it holds, and how it behaves in a real browser (headless Chromium by Playwright, where there is one)."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
import torch

import flashfuse
from flashfuse.drawing import module_path, place
from flashfuse.report import Report


class Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(16, 48)

    def forward(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        m, n = torch.arange(x.shape[1])[:, None], torch.arange(x.shape[1])
        scores = (q @ k.mT * 0.25).masked_fill((n > m) | (m - n >= 100), float("-inf"))
        probabilities = scores.softmax(dim)
        return (probabilities @ v).transpose(1, 2).flatten(2)


class Model(torch.nn.Module):
    """Layers with a sliding window; the last one normalises over the queries, which is no attention."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Attention() for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            x = x + layer(x)
        return self.layers[-1](x, dim=-2)


@pytest.fixture(scope="module")
def report() -> Report:
    torch._dynamo.reset()
    return flashfuse.explain(Model(24), torch.randn(1, 256, 16))


@pytest.fixture(scope="module")
def page(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(report.to_html(), encoding="utf-8")
    return path


def data_of(text: str) -> dict:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_it_is_small_and_self_contained(page: Path):
    text = page.read_text(encoding="utf-8")
    assert len(text.encode()) < 5_000_000
    assert not re.findall(r'(?:src|href)\s*=\s*["\']?(?:https?:)?//', text)
    assert "@import" not in text
    assert not re.search(r"\{\{[A-Z]+\}\}", text)


def test_what_it_holds(report: Report, page: Path):
    data = data_of(page.read_text(encoding="utf-8"))
    assert [site["fused"] for site in data["sites"]] == [True] * 23 + [False]
    assert data["sites"][0]["code"] == "probabilities = scores.softmax(dim)"
    assert data["sites"][0]["map"]["rows"] == ["1000", "1100", "1110", "0111"]
    assert len(data["kernels"]) == 1
    before, after = data["graphs"][0]["before"], data["graphs"][0]["after"]
    assert sum(node[9] == "op" for node in after["nodes"]) == 23
    assert not any(node[9] == "fused" for node in after["nodes"])
    modules = [name for name, _columns, _rows in before["groups"]]
    assert "layers.0" in modules
    assert "layers.23" in modules
    inside = [node for node in after["nodes"] if node[9] == "op"]
    assert [after["groups"][node[2]][0] for node in inside] == [f"layers.{number}" for number in range(23)]
    assert all(0 <= node[3] < after["groups"][node[2]][1] for node in after["nodes"])
    assert len(report.drawings) == 1


def test_nodes_of_a_module_have_places_of_their_own(report: Report):
    for drawing in report.drawings[0]:
        for placed in place(drawing):
            assert len(set(placed.places.values())) == len(placed.places)
            assert all(row < placed.rows for _, row in placed.places.values())


def test_text_of_the_user_is_escaped():
    torch._dynamo.reset()

    def function(q):
        return (q @ q.mT * 0.25).softmax(-1) @ q  # </script><script>document.title = "planted"</script>

    text = flashfuse.explain(function, torch.randn(1, 2, 8, 16)).to_html()
    assert '<script>document.title = "planted"' not in text
    assert data_of(text)["sites"][0]["code"].endswith("</script>")


def test_a_report_without_attention_has_a_page_and_a_notebook_cell():
    torch._dynamo.reset()
    report = flashfuse.explain(lambda x: x.relu(), torch.ones(2))
    assert "0 attentions in 1 graph" in report.to_html()
    cell = report._repr_html_()
    assert cell.startswith("<iframe")
    assert html.escape("<h1>flashfuse</h1>") in cell


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("L['self'].layers[0].attn", "layers.0.attn"),
        ("L['self']._modules['layers']._modules['3']._modules['attn']", "layers.3.attn"),
        ("L['self']", ""),
    ],
)
def test_module_names(path: str, name: str):
    assert module_path(path) == name


# ------------------------------------------------------------------------------------------------ in a browser


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium: $FLASHFUSE_BROWSER, one on PATH, or Playwright's own."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    named = os.environ.get("FLASHFUSE_BROWSER") or next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    with playwright.sync_playwright() as started:
        try:
            found = started.chromium.launch(executable_path=named, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no browser: playwright install chromium, or set FLASHFUSE_BROWSER ({str(error).splitlines()[0]})")
        yield found
        found.close()


@pytest.fixture
def opened(browser, page: Path):
    tab = browser.new_page(viewport={"width": 1500, "height": 900}, color_scheme="light", offline=True)
    problems: list[str] = []
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("request", lambda request: problems.append(request.url) if not request.url.startswith("file:") else None)
    start = time.perf_counter()
    tab.goto(page.as_uri())
    tab.wait_for_selector("html[data-ready]")
    tab.ready_after = time.perf_counter() - start
    yield tab
    assert not problems
    tab.close()


def visible(tab) -> list[str]:
    return [item.inner_text() for item in tab.locator("#sites li").all() if item.is_visible()]


def test_it_is_ready_soon_and_refusals_come_first(opened):
    assert opened.ready_after < 2
    assert len(visible(opened)) == 24
    assert "FF202" in visible(opened)[0]
    assert "left alone" in opened.inner_text("#detail")


def test_search_and_filters(opened):
    opened.click("[data-filter=left]")
    assert len(visible(opened)) == 1
    opened.click("[data-filter=fused]")
    assert len(visible(opened)) == 23
    opened.click("[data-filter=all]")
    opened.fill("#search", "ff202 another")
    assert len(visible(opened)) == 1
    opened.fill("#search", "no such thing")
    assert visible(opened) == []
    assert opened.is_visible("#none")


def test_a_site_shows_its_mask_its_program_and_its_kernel(opened):
    opened.click("#sites li:nth-child(2)")
    detail = opened.inner_text("#detail")
    assert "n <= m and m - n < 100" in detail
    assert "44% skipped" in detail  # 7 of 16
    pixels = "(([x, y]) => document.querySelector('#blocks').getContext('2d').getImageData(x, y, 1, 1).data[3])"
    size = opened.evaluate("document.querySelector('#blocks').width")
    assert opened.evaluate(pixels, [size - 20, 20]) == 0  # future keys: empty
    assert opened.evaluate(pixels, [20, 20]) > 0
    assert not opened.is_visible("pre.kernel")
    opened.click("summary")
    assert "def flashfuse_forward" in opened.inner_text("pre.kernel")
    assert opened.locator("pre.kernel .k").count() > 10  # coloured


def test_clicking_a_node_shows_its_line_and_meaning(opened):
    opened.click("#sites li:nth-child(2)")
    opened.click("#canvas [data-name=probabilities]")
    text = opened.inner_text("#node")
    assert re.search(r"test_page.py:\d+ +probabilities = scores.softmax\(dim\)", text)
    assert "part of attention [1]" in text
    assert "layers.0" in text
    opened.click("[data-stage=after]")
    assert not opened.is_visible("#node")
    assert opened.locator("#canvas .op").count() == 23
    opened.locator("#canvas .op").first.click()
    assert "s * 0.25" in opened.inner_text("#node")


def test_the_graph_zooms_and_goes_to_a_module(opened):
    box = "document.querySelector('#canvas').getAttribute('viewBox').split(' ').map(Number)"
    first = opened.evaluate(box)
    opened.hover("#canvas")
    opened.mouse.wheel(0, 300)
    assert opened.evaluate(box)[2] > first[2]
    opened.select_option("#modules", label="layers.7")
    assert opened.evaluate(box) != first
    opened.click("#whole")
    assert opened.evaluate(box)[3] > 5000


def test_light_and_dark(opened):
    back = "getComputedStyle(document.body).backgroundColor"
    light = opened.evaluate(back)
    opened.click("#theme")
    dark = opened.evaluate(back)
    assert light != dark
    assert sum(map(int, re.findall(r"\d+", dark)[:3])) < 150 < sum(map(int, re.findall(r"\d+", light)[:3]))
    opened.click("#theme")
    assert opened.evaluate(back) == light
