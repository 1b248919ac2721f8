"""Points: the sites that are not weights, where activations, attentions and inputs are adapted."""

from __future__ import annotations

from dataclasses import dataclass

from adaptc.methods.site import Place, WeightSite


class Point(Place):
    """A site that is a value that the model computes, not a weight."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of the adapted value; empty where they are not known."""
        raise NotImplementedError

    @property
    def parameter(self) -> str:
        """The graph's name for the weight that the point is named after; "" where there is none."""
        return ""

    @property
    def piece(self) -> str:
        """The name of a slice, which a point never is: ""."""
        return ""

    @property
    def rows(self) -> tuple[tuple[int, int], ...]:
        """The rows of a slice, which a point never is: ()."""
        return ()

    def _sides(self) -> str:
        return str(list(self.shape))


@dataclass(frozen=True)
class SubLayer(Point):
    """The output h of a sub-layer, where it enters the sum with the residual stream; or a value that its node names.

    Attributes:
        width: the number of features, on the last axis of h; None where they are on another axis, or vary.
        reads: the node of the sub-layer's input; "" where it is not known.
        role: `attention.output` or `feed_forward.out`; "" for a value that its node names.
        value: the node whose value is adapted wherever it is read; "" where h is adapted at `uses` only.
    """

    width: int | None
    reads: str
    role: str = ""
    value: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """(number of features,); empty where it is not known."""
        return () if self.width is None else (self.width,)

    @property
    def node(self) -> str:
        """The sum that h enters, or the node whose value is adapted."""
        return self.value or super().node


@dataclass(frozen=True)
class Heads:
    """The heads of an attention: how many, the size of a key, and the size of a value."""

    count: int
    key: int
    value: int


@dataclass(frozen=True)
class AttentionSite(Point):
    """Where keys and values enter an attention: `uses` are the matrix products with the keys and with the values.

    Attributes:
        heads: its heads; None where its axes cannot be disambiguated.
        half: in an encoder-decoder model `encoder`, `decoder`, or `cross` where one attends to the other; else "".
    """

    heads: Heads | None
    half: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """(heads, size of a key, size of a value); empty where they are not known."""
        return () if self.heads is None else (self.heads.count, self.heads.key, self.heads.value)


@dataclass(frozen=True)
class InputSite(Point):
    """Where the numbers of tokens become vectors; `uses` is the output of the embedding.

    Attributes:
        table: the name of the embedding's table in the graph.
        leaf: its name inside the module.
        width: the number of features of an embedded token.
        ids: the placeholder of the tokens.
    """

    table: str
    leaf: str
    width: int
    ids: str

    @property
    def parameter(self) -> str:
        """The name of the embedding's table in the graph."""
        return self.table

    @property
    def name(self) -> str:
        """The full name of the table in its own module."""
        return ".".join(part for part in (self.module, self.leaf) if part)

    @property
    def shape(self) -> tuple[int, ...]:
        """(number of features of an embedded token,)."""
        return (self.width,)


@dataclass(frozen=True)
class HeadSite(Point):
    """What an output of the model is made of: the input of one of its heads, or an output without a head.

    `module` is the head's name, or that of the output. `uses` is where the features enter the head, or the output.

    Attributes:
        output: the name of the output that a new head takes the place of; "" where several follow from the features.
        width: the number of features, on the last axis.
        tokens: whether the features are those of each token `(batch, tokens, width)`; else `(batch, width)`.
        mask: the input that says which tokens are real; "" where there is none.
        ids: the input with the numbers of the tokens; "" where there is none.
    """

    output: str
    width: int
    tokens: bool
    mask: str
    ids: str

    @property
    def shape(self) -> tuple[int, ...]:
        """(number of features,)."""
        return (self.width,)


AnyPoint = SubLayer | AttentionSite | InputSite | HeadSite
"""Any site that is not a weight."""
Site = WeightSite | AnyPoint
"""Any site: a weight or a point."""
