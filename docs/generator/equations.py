"""Equations as the docstrings of methods write them, typeset as MathML: browsers show it without a script."""

from __future__ import annotations

import re
from dataclasses import dataclass

from latex2mathml.converter import convert

GREEK = {"alpha": r"\alpha", "beta": r"\beta", "gamma": r"\gamma"}
FUNCTIONS = {"diag", "softmax", "tanh", "mean", "cos", "sin", "mod", "Re", "MLP", "LSTM"}
SYMBOLS = {
    "σ": r"\sigma ", "θ": r"\theta ", "λ": r"\lambda ", "Ξ": r"\Xi ", "Σ": r"\sum ", "‖": r"\Vert ", "∘": r"\circ ",
    "⊗": r"\otimes ", "…": r"\ldots ", "≤": r"\le ", "·": r"\cdot ", "×": r"\times ", "√": r"\surd ", "ε": r"\epsilon ",
    "%": r"\%", "{": r"\{", "}": r"\}",
}  # fmt: skip
RAISED = {"ᵀ": r"\mathsf{T}", "⁻": "-", "¹": "1", "²": "2", "³": "3", "½": "1/2"}
TOKEN = re.compile(
    r"`(?P<code>[^`]*)`"
    rf"|(?P<raised>[{''.join(RAISED)}]+)"
    r"|\((?P<over>[A-Za-zλ]+) / (?P<under>[A-Za-z]+)\)"
    r"|(?P<sum>Σ)_(?P<index>\w)"
    r"|(?P<word>[A-Za-z]+)(?P<possessive>'s\b)?(?P<digits>\d*)(?:_(?P<sub>[A-Za-z0-9]+))?"
    r"|(?P<space>\s+)"
    r"|(?P<other>.)"
)
EQUATION = re.compile(r"[A-Z]'? = ")
SOURCE = re.compile(r"\b(?:et al\.|and \w+) \d{4}")
PRIME = re.compile(r"<msup>(<mi>[^<]*</mi>)<mi>&#x02032;</mi></msup>")
"""A prime as a superscript, which fonts without tables for mathematics draw too small."""
OPERATORS = "+-=/,;:≤∘⊗"
SENTENCE = 4
"""From so many words on, a part without an equals sign is a sentence, and no formula."""


@dataclass(frozen=True)
class Summary:
    """The first line of a method's docstring, taken apart.

    Attributes:
        equations: what is computed.
        where: shapes of its tensors, and conditions, as formulas.
        notes: sentences.
        source: the paper, where the line names it.
    """

    equations: tuple[str, ...]
    where: tuple[str, ...]
    notes: tuple[str, ...]
    source: str


def parts(line: str) -> Summary:
    """Take a line such as `W' = W + B A        A (r, in)   B (out, r)` apart."""
    pieces = [piece.strip() for piece in re.split(r"\s{3,}|;\s{2,}", line) if piece.strip()]
    source = next((piece for piece in pieces if SOURCE.search(piece)), "")
    rest = [piece for piece in pieces if piece != source]
    notes = [piece for piece in rest[1:] if _is_sentence(piece)]
    formulas = [piece for piece in rest if piece not in notes]
    equations = [piece for i, piece in enumerate(formulas) if i == 0 or EQUATION.match(piece)]
    return Summary(tuple(equations), tuple(p for p in formulas if p not in equations), tuple(notes), source)


def typeset(text: str, block: bool = False) -> str:
    """A formula as MathML, in its own line or within one."""
    return PRIME.sub(
        r"\1<mo lspace='0'>&#x2032;</mo>", convert(tex(text), display="block" if block else "inline")
    )


def tex(text: str) -> str:
    r"""A formula in TeX: `W' = W + (alpha / r) B A` is `W' = W + \frac{\alpha}{r} B A`."""
    matches = list(TOKEN.finditer(text))
    written = []
    for i, match in enumerate(matches):
        beside = [matches[j] for j in (i - 1, i + 1) if 0 <= j < len(matches)]
        written.append(_space(match, beside) if match["space"] else _token(match))
    return "".join(written).strip()


def _space(match: re.Match[str], beside: list[re.Match[str]]) -> str:
    """What stands for a space: wide between formulas, none beside an operator, thin in a product."""
    if len(match["space"]) > 1:
        return r"\quad "
    if any(token["other"] and token["other"] in OPERATORS for token in beside):
        return " "
    return r"\; " if any(map(_is_prose, beside)) else r"\, "


def _token(match: re.Match[str]) -> str:
    if match["code"] is not None:
        return rf"\mathtt{{{_escaped(match['code'])}}}"
    if match["raised"]:
        return "^{" + "".join(RAISED[c] for c in match["raised"]) + "}"
    if match["over"]:
        return rf"\frac{{{tex(match['over'])}}}{{{tex(match['under'])}}}"
    if match["sum"]:
        return rf"\sum_{{{match['index']}}} "
    if match["word"]:
        return _word(match)
    return SYMBOLS.get(match["other"], match["other"])


def _word(match: re.Match[str]) -> str:
    word, sub = match["word"], match["sub"] or match["digits"]
    if match["possessive"]:
        return rf"\text{{{word}'s}}"
    stem = GREEK.get(word) or (word if len(word) == 1 else rf"\text{{{word}}}")
    stem = rf"\operatorname{{{word}}}" if word in FUNCTIONS else stem
    if not sub:
        return stem + (" " if stem.startswith("\\") and not stem.endswith("}") else "")
    long = sub.isalpha() and (len(sub) > 2 or sub == "up")
    return rf"{stem}_{{\text{{{sub}}}}}" if long else f"{stem}_{{{sub}}}"


def _is_prose(match: re.Match[str]) -> bool:
    word = match["word"]
    plain = word is not None and len(word) > 1 and not match["digits"] and not match["sub"]
    return plain and word not in FUNCTIONS and word not in GREEK


def _is_sentence(piece: str) -> bool:
    return " = " not in piece and sum(map(_is_prose, TOKEN.finditer(piece))) >= SENTENCE


def _escaped(code: str) -> str:
    return re.sub(r"([_%&#{}])", r"\\\1", code)
