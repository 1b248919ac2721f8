"""Losses for what adaptc compiles: rankings of pairs, preferences, and answers chosen among several.

Every function takes and gives tensors, so that it serves a compiled module, its trunk, or any other model. `logits` and
`labels` are aligned: `logits[..., t, :]` predicts `labels[..., t]`. A model that reads and writes one text predicts
the next token, so it is `logits[..., :-1, :]` and `labels[..., 1:]`. The label -100 is no token: it counts nowhere.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from adaptc.inputs import IGNORED


def pairwise_ranking_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """`-mean log σ(r_chosen - r_rejected)`        Ouyang et al. 2022, section 3.5

    Args:
        chosen: rewards `(batch,)` of the better texts.
        rejected: rewards `(batch,)` of the worse ones.

    Returns:
        a scalar of their dtype.
    """
    return -functional.logsigmoid(chosen - rejected).mean()


def dpo_loss(
    chosen: Tensor, rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float = 0.1
) -> Tensor:
    """`-mean log σ(β ((log π_c - log π_r) - (log ρ_c - log ρ_r)))`        Rafailov et al. 2023, equation 7

    Args:
        chosen: log probabilities `(batch,)` of the better texts by the model π, as `sequence_log_probability` gives.
        rejected: those of the worse texts.
        reference_chosen: log probabilities of the better texts by the model ρ that training started from.
        reference_rejected: those of the worse texts.
        beta: how strongly the model is held to ρ.

    Returns:
        a scalar of their dtype.
    """
    gain = (chosen - rejected) - (reference_chosen - reference_rejected)
    return -functional.logsigmoid(beta * gain).mean()


def sequence_log_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """`Σ_t log p(y_t | x, y_<t)` of every text.

    Args:
        logits: `(..., tokens, vocabulary)`.
        labels: `(..., tokens)`, int64.

    Returns:
        `(...)`, of the logits' dtype; 0 for a text without tokens.
    """
    return _log_probabilities(logits, labels).sum(-1)


def choice_scores(logits: Tensor, labels: Tensor) -> Tensor:
    """`β = 1/T Σ_t log p(y_t | x, y_<t)` of every answer, which ranks them.        Liu et al. 2022, section 3.2

    Args:
        logits: `(batch, choices, tokens, vocabulary)`.
        labels: `(batch, choices, tokens)`, int64; where a row has fewer answers, the others hold -100 alone.

    Returns:
        `(batch, choices)`, of the logits' dtype; `-inf` for an answer without tokens.
    """
    count = _count(labels)
    mean = sequence_log_probability(logits, labels) / count.clamp(min=1)
    return mean.masked_fill(count == 0, -torch.inf)


def rank_classification(logits: Tensor, labels: Tensor) -> Tensor:
    """The answer of the largest `β`, as `choice_scores` takes them: `(batch,)`, int64."""
    return choice_scores(logits, labels).argmax(-1)


def likelihood_loss(logits: Tensor, labels: Tensor, correct: Tensor) -> Tensor:
    """`L_LM = -β` of the correct answers, the mean of a batch.        Liu et al. 2022, equation 1

    Args:
        logits: `(batch, choices, tokens, vocabulary)`.
        labels: `(batch, choices, tokens)`, int64.
        correct: the number `(batch,)` of the correct answer of each row, int64.

    Returns:
        a scalar of the logits' dtype.
    """
    return -choice_scores(logits, labels).gather(1, correct.unsqueeze(1)).mean()


def unlikelihood_loss(logits: Tensor, labels: Tensor, correct: Tensor) -> Tensor:
    """`L_UL = -Σ_n Σ_t log(1 - p(ŷ_t | x, ŷ_<t)) / Σ_n T_n`, over the wrong answers.        Liu et al. 2022, equation 2

    Args:
        logits: `(batch, choices, tokens, vocabulary)`.
        labels: `(batch, choices, tokens)`, int64.
        correct: the number `(batch,)` of the correct answer of each row, int64.

    Returns:
        the mean of a batch, a scalar of the logits' dtype; a row without wrong answers counts 0.
    """
    wrong = labels.scatter(1, correct.view(-1, 1, 1).expand(-1, 1, labels.shape[-1]), IGNORED)
    # A probability that rounds to one would have an infinite loss, and no gradient.
    log_p = _log_probabilities(logits, wrong).clamp(max=-torch.finfo(logits.dtype).eps)
    log_rest = torch.log(-torch.expm1(log_p)).masked_fill(wrong == IGNORED, 0.0)
    return -(log_rest.sum((1, 2)) / _count(wrong).sum(1).clamp(min=1)).mean()


def length_normalized_loss(logits: Tensor, labels: Tensor, correct: Tensor) -> Tensor:
    """`L_LN = -log(exp β(y) / (exp β(y) + Σ_n exp β(ŷ_n)))`, the mean of a batch.        Liu et al. 2022, equation 4

    Args:
        logits: `(batch, choices, tokens, vocabulary)`.
        labels: `(batch, choices, tokens)`, int64.
        correct: the number `(batch,)` of the correct answer of each row, int64.

    Returns:
        a scalar of the logits' dtype.
    """
    return functional.cross_entropy(choice_scores(logits, labels), correct)


def t_few_loss(logits: Tensor, labels: Tensor, correct: Tensor) -> Tensor:
    """`L = L_LM + L_UL + L_LN`, T-Few's loss for (IA)³, of the same arguments.        Liu et al. 2022, section 3.2"""
    return sum(
        (f(logits, labels, correct) for f in (likelihood_loss, unlikelihood_loss, length_normalized_loss)),
        logits.new_zeros(()),
    )


def _log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """`log p` of every label `(..., tokens)`; 0 at those that are no token."""
    absent = labels == IGNORED
    of_labels = logits.log_softmax(-1).gather(-1, labels.masked_fill(absent, 0).unsqueeze(-1)).squeeze(-1)
    return of_labels.masked_fill(absent, 0.0)


def _count(labels: Tensor) -> Tensor:
    """The number of tokens of every text `(...)`, int64."""
    return (labels != IGNORED).sum(-1)
