"""The page that classifies a review in the browser gives what the program gives in ONNX Runtime."""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import adaptc
from tests.reviews import WORDS, save_tokenizer

PAGE = Path(__file__).parents[2] / "examples/browser"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
    pytest.mark.skipif(find_spec("playwright") is None, reason="the package playwright is not installed"),
    pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed"),
]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *values: object) -> None:
        """Say nothing."""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The page on localhost, with a small classifier in 8 bits: its address and folder."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=24, initializer_range=0.5, id2label={0: "bad", 1: "good"},
    )  # fmt: skip
    folder = tmp_path / "site"
    shutil.copytree(PAGE, folder, ignore=shutil.ignore_patterns("node_modules", "model"))
    BertForSequenceClassification(config).save_pretrained(folder / "model")
    save_tokenizer(folder / "model")
    spec = {
        "base": {"model": str(folder / "model"), "task": "sequence-classification"},
        "adapt": [{"method": "lora", "target": "*.query", "r": 2}],
        "quantize": [{"method": "dynamic-int8", "target": "all-linear"}],
        "passes": ["insert", "fold", "quantize"],
    }
    adaptc.compile(spec).emit("onnx", folder / "model" / "model.onnx")
    ran = subprocess.run(["npm", "install", "--silent"], cwd=folder, capture_output=True, text=True)
    if ran.returncode:
        pytest.skip(f"npm cannot install: {ran.stderr[-200:]}")
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/", folder
        server.shutdown()


def test_the_page_gives_what_onnx_runtime_gives(site: tuple[str, Path]) -> None:
    from playwright.sync_api import sync_playwright

    address, folder = site
    told: list[str] = []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"] * (os.geteuid() == 0))
        tab = browser.new_page()
        tab.on("console", lambda message: told.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: told.append(str(error)))
        tab.goto(address)
        tab.wait_for_function("!document.getElementById('review').disabled", timeout=60_000)
        for text in (" ".join(WORDS[5:9]), " ".join(WORDS[-3:]), WORDS[6]):
            tab.fill("#review", text)
            best = adaptc.predict(folder / "model" / "model.onnx", text, tokenizer=str(folder / "model"))
            expected = f"{best.label}, {100 * max(each.score for each in best.scored):.1f} %"
            tab.wait_for_function(
                f"document.getElementById('answer').textContent === {expected!r}", timeout=20_000
            )
        browser.close()
    assert told == []
