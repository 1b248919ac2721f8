"""The losses, against values worked out by hand."""

from __future__ import annotations

from math import exp, log

import pytest
import torch

from adaptc import losses

P = torch.tensor([[[[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]], [[0.2, 0.4, 0.4], [0.1, 0.8, 0.1]]]]).log()
"""Logits of one row with two answers of two tokens, among three words."""
LABELS = torch.tensor([[[0, 1], [1, -100]]])
"""The first answer has the probabilities 0.5 and 0.25, the second 0.4 alone."""
FIRST, SECOND = torch.tensor([0]), torch.tensor([1])
BETA = (log(0.5) + log(0.25)) / 2, log(0.4)


def near(value: torch.Tensor, *expected: float) -> None:
    torch.testing.assert_close(value.flatten(), torch.tensor(expected), atol=1e-6, rtol=1e-6)


def test_scores_are_the_mean_log_probabilities_of_an_answers_tokens() -> None:
    near(losses.choice_scores(P, LABELS), *BETA)
    near(losses.sequence_log_probability(P, LABELS), 2 * BETA[0], BETA[1])
    assert losses.rank_classification(P, LABELS).tolist() == [1]
    absent = torch.tensor([[[0, 1], [-100, -100]]])
    assert losses.choice_scores(P, absent)[0, 1] == -torch.inf
    assert losses.rank_classification(P, absent).tolist() == [0]


def test_t_few_losses() -> None:
    near(losses.likelihood_loss(P, LABELS, FIRST), -BETA[0])
    near(losses.unlikelihood_loss(P, LABELS, FIRST), -log(0.6))
    near(losses.unlikelihood_loss(P, LABELS, SECOND), -(log(0.5) + log(0.75)) / 2)
    chosen = -log(exp(BETA[0]) / (exp(BETA[0]) + exp(BETA[1])))
    near(losses.length_normalized_loss(P, LABELS, FIRST), chosen)
    near(losses.t_few_loss(P, LABELS, FIRST), -BETA[0] - log(0.6) + chosen)


def test_the_losses_of_a_batch_are_means_of_its_rows() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 2, 4, 5), torch.randint(0, 5, (3, 2, 4))
    labels[0, 1, 2:] = labels[2, 0, 1:] = labels[1, 1] = -100
    correct = torch.tensor([0, 0, 1])
    for loss in (losses.likelihood_loss, losses.unlikelihood_loss, losses.length_normalized_loss):
        rows = [loss(logits[i : i + 1], labels[i : i + 1], correct[i : i + 1]) for i in range(3)]
        near(loss(logits, labels, correct), float(sum(rows)) / 3)


def test_a_certain_wrong_answer_has_a_finite_loss_and_gradient() -> None:
    logits = torch.tensor([[[[0.0, 1.0]], [[0.0, 200.0]]]], requires_grad=True)
    loss = losses.unlikelihood_loss(logits, torch.tensor([[[1], [1]]]), FIRST)
    loss.backward()
    assert loss.item() > 10
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_pairwise_ranking_and_dpo() -> None:
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 3.0])
    near(losses.pairwise_ranking_loss(a, b), (log(1 + exp(-1)) + log(1 + exp(3))) / 2)
    reference = torch.tensor([0.5, 1.0]), torch.tensor([0.5, 0.0])
    want = (log(1 + exp(-0.5 * 1)) + log(1 + exp(-0.5 * -4))) / 2
    near(losses.dpo_loss(a, b, *reference, beta=0.5), want)


@pytest.mark.parametrize(
    "loss", [losses.likelihood_loss, losses.unlikelihood_loss, losses.length_normalized_loss]
)
def test_gradients_are_those_of_finite_differences(loss: object) -> None:
    torch.manual_seed(1)
    logits = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 4, (2, 2, 3))
    labels[0, 1, 1:] = -100
    assert torch.autograd.gradcheck(lambda x: loss(x, labels, torch.tensor([0, 1])), (logits,))  # type: ignore[operator]
