"""What a product says of a text: classes by their names, an embedding, the next tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

SHOWN = 8
"""How many numbers of an embedding are printed."""


@dataclass(frozen=True)
class Scored:
    """A label and its score.

    Attributes:
        label: a class, a token, or an answer.
        score: a probability; of a regression the value itself.
        token: the token of the text that it is about; "" where it is about the whole text.
    """

    label: str
    score: float
    token: str = ""


@dataclass(frozen=True)
class Prediction:
    """What a product says of a text.

    Attributes:
        task: of the base, such as `sequence-classification`.
        text: the text.
        pair: the second text, where there is one.
        scored: labels with their scores, the largest first; of tokens, in the order of the text.
        embedding: the embedding of the text; empty where the task gives none.
        similarity: the cosine of the angle between the embeddings of the two texts; None where there is no pair.
    """

    task: str
    text: str
    pair: str | None = None
    scored: tuple[Scored, ...] = ()
    embedding: tuple[float, ...] = ()
    similarity: float | None = None

    @property
    def label(self) -> str:
        """The label with the largest score; "" where there is none."""
        return max(self.scored, key=lambda each: each.score).label if self.scored else ""

    def to_json(self) -> dict[str, Any]:
        """Plain data, without what the task does not give."""
        data: Mapping[str, Any] = asdict(self)
        scored = [
            {key: value for key, value in each.items() if key != "token" or value} for each in data["scored"]
        ]
        rest = {key: value for key, value in data.items() if value not in (None, (), "")}
        return {**rest, **({"scored": scored} if scored else {})}

    def __str__(self) -> str:
        lines = [
            f"{each.token + '  ' if each.token else ''}{each.label}  {each.score:.4f}" for each in self.scored
        ]
        if self.embedding:
            first = ", ".join(f"{value:.4f}" for value in self.embedding[:SHOWN])
            lines.append(f"embedding of {len(self.embedding)} numbers: {first}, ...")
        if self.similarity is not None:
            lines.append(f"cosine similarity of the two texts: {self.similarity:.4f}")
        return "\n".join(lines)
