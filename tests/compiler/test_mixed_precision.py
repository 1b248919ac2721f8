"""Bits chosen for each layer, within a budget."""

from __future__ import annotations

import torch

import adaptc
from tests.families import randomise
from tests.small_models import Words


def test_a_larger_budget_is_nearer() -> None:
    """Bits go where the outputs lose most; a budget is kept to."""
    model = randomise(Words()).eval()
    x = torch.randint(0, 29, (4, 6))
    x[0, 0] = 29
    found = {}
    for budget in ({"size": 0.2}, {"size": 0.26}, {"size": 0.5}, {"error": 0.05}, {"error": 1e-9}):
        made = adaptc.compile(
            {"quantize": [{"method": "int4", "block_size": 16, "target": "*"}], "budget": budget},
            model=model,
            example_inputs=(x,),
            dynamic={"x": {0: "batch", 1: "seq"}},
        )
        errors = made.quantization_errors()
        notes = [note for note in made.plan.notes if note.startswith("budget, ")]
        assert len(notes) == 1, "what was chosen is told"
        if errors is None:
            assert budget == {"error": 1e-9}, "only then all layers stay in floats"
            assert "floats (`exclude`) for embed, up, down" in notes[0]
            continue
        assert all(layer.scheme in notes[0] for layer in errors.layers)
        found[str(budget)] = errors.outputs["output"]
        if "size" in budget:
            sizes = {q.site.parameter: q for q in made.graph.quantized.values()}
            floats = sum(
                p.numel() * 4 for n, p in model.named_parameters() if n not in sizes and p.dim() == 2
            )
            every = sum(p.numel() * 4 for p in model.parameters() if p.dim() == 2)
            assert (floats + sum(layer.bytes for layer in errors.layers)) / every <= budget["size"]
        else:
            assert errors.outputs["output"] <= budget["error"]
    a, b, c, d = found.values()
    assert a > b > c > 0 < d <= 0.05
