"""The report: one page on a build, from its manifests, that opens in a browser without network or error."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adaptc
from adaptc.errors import AdaptcError
from adaptc.html_table import html_table
from tests.command_line import run
from tests.families import perturb

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(Block() for _ in range(3)), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two products of a small model, one of them quantized, in folders of their own."""
    folder = tmp_path_factory.mktemp("build")
    torch.manual_seed(0)
    spec: dict[str, Any] = {
        "adapt": [{"method": "lora", "target": ["layers.*.up", "</script><b>me"], "r": 2}],
        "quantize": [{"method": "int8", "target": ["layers.0.down", "layers.1.down"]}],
    }
    made = adaptc.compile(spec, model=Model(), example_inputs=(torch.randn(4, 16),), dynamic={"x": {0: "b"}})
    perturb(made.module)
    made.emit("onnx", folder / "onnx" / "model.onnx")
    made.emit("torch", folder / "trainable")
    return folder


@pytest.fixture
def page(build: Path, tmp_path: Path) -> Path:
    return adaptc.report(build, tmp_path / "report.html")


def held(page: Path) -> dict[str, Any]:
    """The data in a page."""
    text = page.read_text().split('<script type="application/json" id="data">')[1]
    return json.loads(text.split("</script>")[0])


def test_a_page_holds_what_the_manifests_say(page: Path) -> None:
    data, text = held(page), page.read_text()
    modules = data["graph"]["modules"]
    assert modules["layers.0.up"]["added"]
    assert modules["layers.0.up"]["before"] == {"linear": 1}
    assert "added" not in modules["head"]
    assert modules["layers.1.down"]["after"] != modules["layers.1.down"]["before"]
    assert "after" not in modules["layers.2.down"]
    names = list(modules)
    assert [names.index("layers.0.up"), names.index("layers.0")] in data["graph"]["flows"]
    assert {site["module"] for site in data["sites"]} == {f"layers.{i}.up" for i in range(3)}
    errors = [layer["output"] for layer in data["quantization"]["layers"]]
    assert errors == sorted(errors, reverse=True)
    assert len(errors) == 2
    assert {chart["title"].split(" for")[0] for chart in data["bars"]} == {
        "Parameters", "Memory", "Operations", "Files",
    }  # fmt: skip
    for word in ("onnx/model.onnx", "trainable/program.pt2", "torch artifact", "trainable module"):
        assert word in text
    assert len(text) < 2_000_000


def test_errors_are_told_by_output_and_size(build: Path, page: Path) -> None:
    proof = json.loads((build / "onnx/manifest.json").read_text())["products"]["model.onnx"]["proof"]
    assert proof["errors"]["output"].keys() == set(proof["shapes"])
    assert max(proof["errors"]["output"].values()) == proof["relative"]
    assert f"{proof['relative']:.1e}" in page.read_text()


def test_what_a_person_wrote_is_no_html(page: Path) -> None:
    text = page.read_text()
    assert "<b>me" not in text
    assert "&lt;/script&gt;&lt;b&gt;me" in text
    assert "http://" not in text.replace("http://www.w3.org", "").split("<script>")[0]


def test_a_build_of_an_earlier_version_is_told_as_such(build: Path, tmp_path: Path) -> None:
    shutil.copytree(build / "onnx", tmp_path / "old")
    path = tmp_path / "old/manifest.json"
    manifest = json.loads(path.read_text())
    for key in ("graph", "cost"):
        del manifest[key]
    path.write_text(json.dumps(manifest))
    page = adaptc.report(tmp_path / "old/model.onnx")
    assert page == tmp_path / "old/report.html"
    assert "holds no outline of its graph" in page.read_text()


def test_latency_is_that_of_a_benchmark(build: Path, tmp_path: Path) -> None:
    timing = {
        "product": "p",
        "threads": 1,
        "batch": 2,
        "length": None,
        "median": 0.0021,
        "p95": 0.003,
        "calls": 9,
    }
    result = {"against": "p", "timings": [timing | {"ratio": 1.5}], "decodings": [], "accuracies": []}
    (tmp_path / "bench.json").write_text(json.dumps(result))
    text = adaptc.report(build, tmp_path / "r.html", bench=tmp_path / "bench.json").read_text()
    assert "2.10 ms" in text
    assert "1.50" in text
    (tmp_path / "bench.json").write_text("[]")
    with pytest.raises(
        AdaptcError, match=r"bench\.json: no result of a benchmark(.|\n)*adaptc bench BUILD --json"
    ):
        adaptc.report(build, tmp_path / "r.html", bench=tmp_path / "bench.json")


def test_where_there_is_nothing_to_report(build: Path, tmp_path: Path) -> None:
    with pytest.raises(AdaptcError, match=r"no manifest\.json there or below"):
        adaptc.report(tmp_path)
    with pytest.raises(AdaptcError, match="no such file or folder"):
        adaptc.report(tmp_path / "missing")
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(AdaptcError, match=r"is there, and is no report of adaptc"):
        adaptc.report(build, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == "mine"


def test_the_command(build: Path, tmp_path: Path) -> None:
    ran = run("report", build, "--output", tmp_path / "r.html", "--json")
    assert ran.json == {"path": str(tmp_path / "r.html")}


def test_notebooks_show_tables(zoo: Any) -> None:
    made = zoo.compiled("mlp", [{"method": "lora", "target": ["*"], "r": 2}])
    made.fold()
    proof = made.proofs[-1]
    assert f"<td style='text-align: left'>{proof.name}</td>" in made._repr_html_()
    assert made.plan.entries[0].selection.sites[0].module in made.plan._repr_html_()
    assert f"{max(proof.errors['output'].values()):.1e}</td>" in proof._repr_html_()
    assert "&lt;i&gt;" in html_table("<i>", ("a",), [("<i>",)])
    assert "<i>" not in html_table("<i>", ("a",), [("<i>",)])


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium; a test that needs it skips where there is none."""
    if CHROMIUM is None or find_spec("playwright") is None:
        pytest.skip("Chromium, or the package playwright, is not installed")
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield opened
        opened.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_opens_in_a_browser(browser: Any, page: Path, width: int, scheme: str) -> None:
    told: list[str] = []
    requests: list[str] = []
    tab = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    tab.on("console", lambda message: told.append(message.text))
    tab.on("pageerror", lambda error: told.append(str(error)))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(page.as_uri())
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    tab.fill("#search", "layers.1.up")
    assert "layers.1.up (Linear): operations before: 1, after: 4" in tab.inner_text("#module")
    assert tab.evaluate("adaptcViews[1].$('.match').map((node) => node.id())") == ["layers.1.up"]
    before = tab.evaluate("adaptcViews[1].zoom()")
    tab.click("#nearer")
    assert tab.evaluate("adaptcViews.map((view) => view.zoom())") == pytest.approx([1.4 * before] * 2)
    tab.click("#close")
    assert tab.evaluate("adaptcViews[0].nodes().map((node) => node.id()).sort()") == ["head", "layers"]
    tab.click("#open")
    assert tab.evaluate("adaptcViews[1].$id('layers.2.up').data('kind')") == "adapted"
    assert tab.evaluate("adaptcViews[1].$id('layers.0.down').data('kind')") == "quantized"
    assert tab.evaluate("adaptcViews[0].$id('layers.2.up').data('kind')") == "plain"
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(246, 247, 249)", "dark": "rgb(16, 21, 28)"}[scheme]
    assert told == []
    assert requests == [page.as_uri()]
    tab.close()
