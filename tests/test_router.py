"""The router against a double loop over tokens in float64, by hand, and recorded selections.

Legend: M local tokens of an image, Q question tokens, D channels.
"""

import math
import re
from fractions import Fraction
from itertools import accumulate

import pytest
import torch
from reference import recorded_modules

from sliming.router import relevance, route, select


def scores_twin(local, question):
    """One image: the mean cosine of each image token with all text tokens, by a double loop."""
    scores = []
    for image_token in local.double():
        cosines = [float(image_token @ text_token / (image_token.norm() * text_token.norm()))
                   for text_token in question.double()]
        scores.append(sum(cosines) / len(cosines))
    return scores


def keep_twin(scores, gamma):
    """One image: sort, accumulate the softmax past gamma -> keep, distance of the cut to a tie."""
    total = sum(math.exp(score) for score in scores)
    p = [math.exp(score) / total for score in scores]
    keep, accumulated, margin, last = [False] * len(p), 0.0, math.inf, math.inf
    for i in sorted(range(len(p)), key=lambda i: -p[i]):
        if accumulated > gamma:
            margin = min(margin, last - p[i])
            break
        keep[i], last = True, p[i]
        accumulated += p[i]
        margin = min(margin, abs(accumulated - gamma))
    return keep, margin


def pair(tokens, words, dim=16, seed=0):
    """Random local tokens [M, D] and question tokens [Q, D]."""
    generator = torch.Generator().manual_seed(1000 * seed + 10 * tokens + words)
    return torch.randn(tokens + words, dim, generator=generator).split([tokens, words])


SIZES = [(7, 3), (1, 1), (144, 8), (49, 2), (9, 1), (2, 5)]  # (M, Q)


@pytest.mark.parametrize("gamma", [1e-6, 0.1, 0.5, 0.75, 0.95, 1 - 1e-6, 1])
@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("tokens, words", SIZES)
def test_route_is_the_double_loop(tokens, words, gamma, noise):
    local, question = pair(tokens, words)
    draws = torch.randn(tokens, generator=torch.Generator().manual_seed(0))
    keep = route(local, question, gamma, noise=noise * draws if noise else None)
    assert keep.dtype == torch.bool and keep.shape == (tokens,)
    scores = scores_twin(local, question)
    scores = [score + noise * n for score, n in zip(scores, draws.tolist(), strict=True)]
    expected, margin = keep_twin(scores, gamma)
    assert margin > 1e-7 or gamma == 1, "a tie within rounding decides nothing: choose another seed"
    assert keep.tolist() == expected


@pytest.mark.parametrize("tokens, words", SIZES)
def test_relevance_is_the_double_loop(tokens, words):
    local, question = pair(tokens, words)
    scores = relevance(local, question)
    assert scores.dtype == torch.float32
    expected = torch.tensor(scores_twin(local, question))
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(relevance(local, question, "sum"), scores * words)


@pytest.mark.parametrize("gamma, expected", [
    (0.4, [0]), (0.5, [0, 3]), (0.75, [0, 3]), (0.8, [0, 1, 3]), (1, [0, 1, 2, 3])])
def test_on_paper(gamma, expected):
    """Cosines 1, 0, -1, .707: exp 2.718, 1, .368, 2.028; softmax .445, .164, .060, .332.

    Sorted and accumulated: .445 (token 0), .776 (token 3), .940 (token 1), 1 (token 2).
    """
    local = torch.tensor([[1.0, 0], [0, 5], [-3, 0], [2, 2]])
    assert route(local, torch.tensor([[7.0, 0]]), gamma).nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("gamma", [0.25, 0.5, 0.75])
def test_ties_and_exact_cut(gamma):
    """Of n equal tokens those before the k-th weigh (k-1)/n: the first floor(gamma n) + 1 stay.

    A softmax in float32 rounds 1/n and its sums, and moves this cut.
    """
    for n in range(1, 60):
        number = min(n, math.floor(gamma * n) + 1)
        keep = route(torch.ones(n, 3), torch.ones(1, 3), gamma)
        assert keep.tolist() == [True] * number + [False] * (n - number)


def test_the_cut_is_exact():
    """20,000 tokens, added up as fractions; gamma a billionth around the mass before a token."""
    scores = torch.rand(20_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ranked = scores.sort(descending=True).values
    before = [Fraction(0), *accumulate(map(Fraction, (ranked - ranked[0]).exp().tolist()))]
    for k in range(1000, 20_000, 1234):
        for offset in (-1e-9, 1e-9):
            keep = select(scores, float(before[k] / before[-1]) + offset)
            assert keep.sum() == k + (offset > 0) and scores[keep].min() >= scores[~keep].max()


def test_gamma_one_keeps_everything():
    """Also where float32 would round the accumulated softmax above 1 early, and below 1 late."""
    for seed in range(20):
        assert route(*pair(300, 2, seed=seed), 1.0, noise=torch.randn(300)).all()


def test_edges():
    for random in (False, True):  # without a question, without tokens
        assert route(*pair(4, 0), 0.1, random=random).tolist() == [True] * 4
        assert route(*pair(0, 3), 0.1, random=random).shape == (0,)
    # A token of zeros has no direction: its cosine counts as 0, between match and opposite.
    local = torch.tensor([[-1.0, 0], [0, 0], [1, 0]])
    assert relevance(local, torch.tensor([[1.0, 0]])).tolist() == [-1, 0, 1]
    local[1] = torch.nan  # is not hidden
    assert route(local, torch.tensor([[1.0, 0]]), 0.3).all()


def test_random_control_keeps_as_many_and_is_uniform():
    """1,000 draws: each of 8 tokens is drawn equally often, and as many as the router keeps."""
    local, question = pair(8, 1)
    number = int(route(local, question, 0.4).sum())
    assert 1 < number < 7
    torch.manual_seed(0)
    keep = torch.stack([route(local, question, 0.4, random=True) for _ in range(1000)])
    assert (keep.sum(dim=1) == number).all()
    share = number / 8
    sigma = math.sqrt(share * (1 - share) / 1000)
    assert (keep.double().mean(dim=0) - share).abs().max() < 5 * sigma
    torch.manual_seed(0)
    assert torch.equal(route(local, question, 0.4, random=True), keep[0])


def test_no_graph_is_kept(monkeypatch):
    """The hard selection has no gradient: no [M, D] products may be held for a backward pass."""
    seen = []
    monkeypatch.setattr("sliming.router.select",
                        lambda scores, *_: seen.append(scores) or scores > 0)
    local, question = (tensor.requires_grad_() for tensor in pair(5, 2))
    assert not route(local, question, 0.5).requires_grad and not seen[0].requires_grad


@pytest.mark.parametrize("tokens, words", SIZES)
def test_half_precision_is_scored_in_float32(tokens, words):
    local, question = (tensor.bfloat16() for tensor in pair(tokens, words))
    scores = relevance(local, question)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, relevance(local.float(), question.float()))
    assert torch.equal(route(local, question, 0.5), route(local.float(), question.float(), 0.5))


@pytest.mark.parametrize("gamma, options, message", [
    *((gamma, {}, r"gamma must be in \(0, 1\]") for gamma in (0, -0.5, 1.01, math.nan)),
    *((0.5, options, 'score must be "mean" or "sum" and temperature above 0') for options in
      ({"score": "max"}, {"temperature": 0.0}, {"temperature": math.nan}))])
def test_wrong_options(gamma, options, message):
    with pytest.raises(ValueError, match=message):
        route(torch.ones(1, 2), torch.ones(1, 2), gamma, **options)


@pytest.mark.reference
def test_released_sampler():
    """Similarities 2e-5, softmax 1e-6, selected tokens exactly. Released scores are sums.

    Recorded selections keep a margin to the cut, except at top-p 1, where we keep everything.
    """
    compared = 0
    for _, tensors in recorded_modules("TextGuidedSampler"):
        local, text, mask = tensors["in/local"], tensors["in/text"], tensors["in/mask"].bool()
        mean = relevance(local, text)
        torch.testing.assert_close(mean, tensors["out/similarity_nomask_mean"], rtol=0, atol=2e-5)
        total = relevance(local, text[mask], "sum")
        torch.testing.assert_close(total, tensors["out/similarity"], rtol=0, atol=2e-5)
        for key, expected in tensors.items():
            form = r"out/(probs|indices)_(train_)?(?:topp([\d.]+)_)?temp([\d.]+)"
            if not (found := re.fullmatch(form, key)):
                continue
            kind, train, top_p, temperature = found.groups()
            noise, temperature = 0.1 * tensors["in/noise"] * bool(train), float(temperature)
            if kind == "probs":
                p = ((total + noise) / temperature).softmax(dim=0)
                torch.testing.assert_close(p, expected, rtol=0, atol=1e-6)
            elif float(top_p) < 1:
                keep = route(local, text[mask], float(top_p), score="sum",
                             temperature=temperature, noise=noise if train else None)
                assert torch.equal(keep.nonzero().flatten(), expected), key
            compared += 1
    assert compared
