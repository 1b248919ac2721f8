"""The modules of a SentenceTransformer after its transformer, built from their configurations.

Each maps features to features, as sentence-transformers does: `token_embeddings` (batch, seq, width) and
`attention_mask` (batch, seq) are there at first, and `sentence_embedding` (batch, width) once they are pooled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from adaptc.checkpoints.sentence_transformer import ModuleFolder
from adaptc.errors import TraceError, unknown

TOKENS, SENTENCE, MASK = "token_embeddings", "sentence_embedding", "attention_mask"
PROMPT = "prompt_length"
"""The number of tokens of a prompt, for a pooling that leaves prompts out."""
OLD_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""A switch in older configurations -> its mode. The order is the one in which several are concatenated."""
SMALLEST = 1e-9
"""The least that a sum of weights is divided by, as in sentence-transformers."""


class SentenceModule(nn.Module):
    """A module after the transformer.

    Attributes:
        reads: the name of the features that it needs.
        writes: the name of those that it adds or replaces.
    """

    reads: str = SENTENCE
    writes: str = SENTENCE


class Pooling(SentenceModule):
    """One vector for each sentence, from those of its tokens; several modes are concatenated."""

    reads = TOKENS

    def __init__(self, settings: Mapping[str, Any]):
        super().__init__()
        self.modes = _modes(settings)
        self.include_prompt = bool(settings.get("include_prompt", True))

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add `sentence_embedding`."""
        tokens = features[TOKENS]
        mask = features.get(MASK)
        mask = torch.ones(tokens.shape[:2], dtype=torch.int64, device=tokens.device) if mask is None else mask
        positions = torch.arange(tokens.shape[1], device=tokens.device) - _first(mask).unsqueeze(1)
        pooled = mask
        if not self.include_prompt and PROMPT in features:
            pooled = torch.where(positions < features[PROMPT], 0, mask)
        vectors = [POOLINGS[mode](tokens, pooled, positions) for mode in self.modes]
        return features | {SENTENCE: torch.cat(vectors, dim=-1)}


def _first(mask: Tensor) -> Tensor:
    """The position of each sentence's first token: (batch, seq) -> (batch,)."""
    return mask.to(torch.int32).argmax(dim=1)


def _token(tokens: Tensor, position: Tensor) -> Tensor:
    """One token of each sentence: (batch, seq, width), (batch,) -> (batch, width)."""
    index = position.view(-1, 1, 1).expand(-1, 1, tokens.shape[-1])
    return torch.gather(tokens, 1, index).squeeze(1)


def _max(tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    return tokens.masked_fill(mask.unsqueeze(-1) == 0, float("-inf")).amax(dim=1)


def _last(tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    last = mask.shape[1] - 1 - _first(mask.flip(1))
    last = torch.where(mask.sum(1) == 0, 0, last)
    return _token(tokens * mask.unsqueeze(-1).to(tokens.dtype), last)


def _sums(tokens: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted sum of tokens (batch, width), and the sum of their weights (batch, 1), in float32 or wider."""
    wide = torch.promote_types(tokens.dtype, torch.float32)
    weights = weights.unsqueeze(-1).to(wide)
    return (tokens * weights).sum(dim=1), weights.sum(dim=1).clamp(min=SMALLEST)


def _mean(tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    total, count = _sums(tokens, mask)
    return (total / count).to(tokens.dtype)


def _mean_of_root(tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    total, count = _sums(tokens, mask)
    return (total / count.sqrt()).to(tokens.dtype)


def _weighted_mean(tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    total, count = _sums(tokens, mask * (positions + 1))
    return (total / count).to(tokens.dtype)


POOLINGS: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "cls": lambda tokens, mask, positions: _token(tokens, _first(mask)),
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_of_root,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}
"""Mode -> its function of tokens (batch, seq, width), mask (batch, seq) and the tokens' places in their sentence."""


def _modes(settings: Mapping[str, object]) -> tuple[str, ...]:
    """The modes of a pooling, from either spelling of its configuration.

    Raises:
        TraceError: a mode is unknown.
    """
    stated: Any = settings.get("pooling_mode")
    if stated is None:
        switches = any(key in settings for key in OLD_MODES)
        stated = [mode for key, mode in OLD_MODES.items() if settings.get(key)] if switches else []
        stated = stated or ["mean"]
    modes = (stated,) if isinstance(stated, str) else tuple(cast("list[str]", stated))
    for mode in modes:
        if mode not in POOLINGS:
            raise TraceError(unknown("pooling mode", mode, POOLINGS))
    return modes


class Dense(SentenceModule):
    """y = f(W x + b), and y + x, or y + R x, with a residual."""

    def __init__(self, settings: Mapping[str, Any]):
        super().__init__()
        width, out = int(settings["in_features"]), int(settings["out_features"])
        self.linear = nn.Linear(width, out, bias=bool(settings.get("bias", True)))
        self.activation_function = _activation(settings.get("activation_function", "torch.nn.Tanh"))
        self.is_residual = bool(settings.get("use_residual", False))
        if self.is_residual and width != out:
            self.residual = nn.Linear(width, out, bias=False)
        self.reads, self.writes = _places(settings)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Replace the features that it reads, or add those that it writes."""
        x = features[self.reads]
        y = self.activation_function(self.linear(x))
        if self.is_residual:
            y = y + (self.residual(x) if hasattr(self, "residual") else x)
        return features | {self.writes: y}


def _places(settings: Mapping[str, Any]) -> tuple[str, str]:
    """Which features a module reads, and which it writes."""
    reads = settings.get("module_input_name") or SENTENCE
    return reads, settings.get("module_output_name") or reads


def _activation(name: str) -> nn.Module:
    """An activation of torch by its full name; no module is imported for it.

    Raises:
        TraceError: it is none of torch.nn.
    """
    kind = getattr(nn, name.rpartition(".")[2], None) if name.startswith("torch.nn.") else None
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TraceError(f"Dense: its activation_function is {name}; expected a class of torch.nn")
    return kind()


class Normalize(SentenceModule):
    """y = x / max(||x||, 1e-12)."""

    def __init__(self, settings: Mapping[str, Any]):
        super().__init__()
        self.reads, self.writes = _places(settings)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Replace the features that it reads, or add those that it writes."""
        return features | {self.writes: nn.functional.normalize(features[self.reads], p=2.0, dim=-1)}


class Norm(SentenceModule):
    """The layer norm of a sentence's vector."""

    def __init__(self, settings: Mapping[str, Any]):
        super().__init__()
        self.norm = nn.LayerNorm(int(settings["dimension"]))

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Replace `sentence_embedding`."""
        return features | {SENTENCE: self.norm(features[SENTENCE])}


class Dropout(SentenceModule):
    """Dropout of a sentence's vector, in training."""

    def __init__(self, settings: Mapping[str, Any]):
        super().__init__()
        self.dropout_layer = nn.Dropout(float(settings.get("dropout", 0.2)))

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Replace `sentence_embedding`."""
        return features | {SENTENCE: self.dropout_layer(features[SENTENCE])}


KINDS: Mapping[str, Callable[[Mapping[str, Any]], SentenceModule]] = {
    "Pooling": Pooling,
    "Dense": Dense,
    "Normalize": Normalize,
    "LayerNorm": Norm,
    "Dropout": Dropout,
}
"""The class of a module in sentence-transformers -> ours."""


def build(folder: ModuleFolder) -> SentenceModule:
    """A module from its configuration; its weights are not loaded.

    Raises:
        TraceError: adaptc has no module of its kind, or the configuration lacks a setting.
    """
    if folder.kind not in KINDS:
        raise TraceError(
            f"the module {folder.name} is of the kind {folder.kind}, which adaptc cannot build",
            f"it builds Transformer, {', '.join(KINDS)}; task: feature-extraction takes the transformer alone",
        )
    try:
        return KINDS[folder.kind](folder.settings)
    except KeyError as error:
        raise TraceError(f"{folder.path}/config.json: {error.args[0]} is missing") from None
