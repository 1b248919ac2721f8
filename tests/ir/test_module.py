"""A graph as a module."""

from __future__ import annotations

from adaptc.ir.module import bind
from adaptc.quantization.quantized_weight import matrix_of
from tests.families import Zoo, scheme_entry


def test_bind_of_a_quantized_graph_is_small(zoo: Zoo) -> None:
    made = zoo.compiled(
        "llama", [], quantize=[{**scheme_entry("nf4"), "target": "all-linear", "double": True}]
    )
    held = bind(made.graph).state_dict()
    assert not set(made.graph.quantized) & set(held)
    q = next(iter(made.graph.quantized.values()))
    assert matrix_of(q.site, q.quantization.source.load()).shape == q.quantization.size
