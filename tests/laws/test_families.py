"""Every family beside the ones that the other laws run quickly: traced, adapted, folded, as PEFT merges it."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from adaptc.ir.module import bind
from adaptc.rewriter.catalog import load_passes
from adaptc.rewriter.pipeline import run
from tests.families import (
    FAMILIES,
    HUGGING_FACE,
    QUICK,
    SHAPES,
    Zoo,
    close,
    differs,
    inputs,
    marked,
    outputs,
    perturb,
    without_cache,
)

peft = pytest.importorskip("peft")


@pytest.mark.parametrize(
    "name",
    marked((name for name in HUGGING_FACE if name not in QUICK), ("mixtral", "vit", "resnet")),
)
def test_a_family_is_traced_adapted_and_folded_as_peft_merges_it(zoo: Zoo, name: str, tmp_path: Path) -> None:
    target = [pattern.removeprefix("*.").replace("*", r"\w*") for pattern in FAMILIES[name].target]
    options = {"r": 4, "lora_alpha": 6, "target_modules": rf"(.*\.)?({'|'.join(target)})"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(zoo.fresh(name), peft.LoraConfig(**options))
    perturb(theirs)
    theirs.save_pretrained(tmp_path)
    compiled = zoo.compiled(name, [{"adapter": str(tmp_path)}])
    live = theirs.eval()
    folded = bind(run(compiled.graph, [load_passes()["fold"]()])).eval()
    base, more = bind(compiled.base).eval(), without_cache(zoo.eager(name))
    for number, (batch, length) in enumerate(SHAPES[:2]):
        tensors = inputs(name, batch, length, pad=number == 0, seed=number)
        with torch.no_grad():
            eager = zoo.run_eager(name, tensors)
            want = outputs(live, tensors, compiled.base.outputs, **more)
            traced = outputs(base, tensors, compiled.base.outputs)
            got = outputs(folded, tensors, compiled.base.outputs)
        for key in want:
            close(traced[key], eager[key], 8)
            close(got[key], want[key])
        differs(want["logits"], eager["logits"])
    merged = theirs.merge_and_unload().state_dict()
    assert list(folded.state_dict()) == list(merged)
    for key, value in folded.state_dict().items():
        close(value, merged[key], 16)
