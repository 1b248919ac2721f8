"""What the documentation makes from the code: equations, options, and a place for every public name."""

from __future__ import annotations

import re

import pytest

import adaptc
from adaptc.methods.method import METHODS, summary
from adaptc.quantization.scheme import SCHEMES
from tests.docs.pages import DOCS

pytest.importorskip("latex2mathml", reason="the extra `docs` is not installed")

from docs.generator import commands, equations, methods, schema


@pytest.mark.parametrize(
    ("text", "tex"),
    [
        ("W' = W + (alpha / r) B A", r"W' = W + \frac{\alpha}{r}\, B\, A"),
        ("V / ‖V‖", r"V / \Vert V\Vert"),
        ("H_i = I - 2 u_i u_iᵀ", r"H_{i} = I - 2\, u_{i}\, u_{i}^{\mathsf{T}}"),
        ("W_down h + b_up", r"W_{\text{down}}\, h + b_{\text{up}}"),
        ("B (out, r)", r"B\, (\text{out}, r)"),
    ],
)
def test_an_equation_is_typeset(text: str, tex: str) -> None:
    assert equations.tex(text) == tex
    assert equations.typeset(text).startswith("<math")


def test_a_summary_is_taken_apart() -> None:
    told = equations.parts("K' = [P_k; K]   V' = [P_v; V]   P (n, total)    Liu et al. 2022, section 3")
    assert told.equations == ("K' = [P_k; K]", "V' = [P_v; V]")
    assert told.where == ("P (n, total)",)
    assert told.source == "Liu et al. 2022, section 3"


def test_every_method_has_a_page_with_its_equation_and_options() -> None:
    pages = methods.pages()
    for folder, registry in (("methods", METHODS), ("schemes", SCHEMES)):
        for name, cls in registry.items():
            if not cls.__module__.startswith("adaptc.passes."):
                continue
            page = pages[f"reference/{folder}/{name}.md"]
            for equation in equations.parts(summary(cls)).equations:
                assert equations.typeset(equation, block=True) in page
            options = schema.entries()[name]["properties"]
            shared = schema.shared(list(registry)) | {"name", "target", "method"}
            aliases = {key for key, o in options.items() if schema.ALIAS in (o.get("description") or "")}
            assert not {key for key in set(options) - shared - aliases if f"| `{key}` |" not in page}, name


def test_every_command_is_listed() -> None:
    page = commands.commands_page()
    assert {"compile", "plan", "verify"} <= set(re.findall(r"^## adaptc (\w+)$", page, re.MULTILINE))
    assert "`--set`" in page


def test_every_public_name_is_on_its_page() -> None:
    page = (DOCS / "reference/python.md").read_text()
    listed = set(re.findall(r"^::: adaptc\.(\w+)$", page, re.MULTILINE))
    assert set(adaptc.__all__) - {"passes", "__version__"} == listed
