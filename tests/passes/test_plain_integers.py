"""Kernels of plain integers compute what the calibrated schemes mean."""

from __future__ import annotations

import dataclasses
from typing import Any

from adaptc.ir.module import bind
from adaptc.quantization.scheme import SCHEMES
from adaptc.rewriter.catalog import load_passes
from adaptc.rewriter.pipeline import run
from tests.families import Zoo, close, inputs, outputs


def test_plain_integers(zoo: Zoo) -> None:
    for name in ("awq", "gptq"):
        graph = dataclasses.replace(zoo.graph("mlp"), calibration_rows=[inputs("mlp", 9)])
        more = {"act_order": True} if name == "gptq" else {}
        item: Any = load_passes()[f"quantize-{name}"]
        known = {"target": "re:up|down", **SCHEMES[name].small, **more}
        quantized = run(graph, [item(**known), load_passes()["quantized-products"]()])
        plain = run(quantized, [load_passes()["plain-integers"]()])
        assert f"{name} {{" in quantized.text()
        assert f"{name} {{" not in plain.text()
        tensors = inputs("mlp", 5, 2)
        close(*(outputs(bind(g).eval(), tensors, g.outputs)["output"] for g in (plain, quantized)))
