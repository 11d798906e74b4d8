"""The stand-ins can do what they are for, and packed attention is exact."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, LlamaForCausalLM

from sliming.backbones import TINY, Segments, packed_attention
from sliming.checkpoints.pretrained import load_vision
from sliming.tiny.pictures import generator, sample_scene
from sliming.tiny.pretrain import CLASSES, dense_labels, lookup_accuracy, tower_batch


def probe_data(tower, key, pictures):
    views, labels = tower_batch(generator("pretraining", 9, key), scenes=pictures, small=pictures // 2)
    return tower(views).flatten(0, 1), {head: grid.flatten() for head, grid in labels.items() if head != "glyph"}


def test_the_tower_reads_labels_in_a_crop():
    """A linear read-out of the frozen patch features, fitted on some pictures, names print and colours in others."""
    tower = load_vision("tiny", -1)
    features, labels = probe_data(tower, 0, 400)
    fresh, truth = probe_data(tower, 1, 60)
    ones = torch.ones(len(features), 1)
    for head, least in (("tens", 0.95), ("ones", 0.95), ("letter", 0.95), ("colour", 0.95)):
        shown = labels[head] > 0
        x = torch.cat([features, ones], 1)[shown]
        target = F.one_hot(labels[head][shown], len(CLASSES[head])).float()
        weights = torch.linalg.lstsq(x.T @ x + 1e-3 * torch.eye(x.shape[1]), x.T @ target).solution
        there = truth[head] > 0
        predicted = (torch.cat([fresh, torch.ones(len(fresh), 1)], 1)[there] @ weights).argmax(-1)
        accuracy = (predicted == truth[head][there]).float().mean().item()
        assert there.sum() > 100 and accuracy >= least, (head, accuracy)


def test_dense_labels_by_hand():
    scene = next(s for s in (sample_scene(generator("train", 0, 0, i), small=True) for i in range(50))
                 if s.kind == "shapes" and len(s.items) == 1)
    labels = dense_labels(scene, 0, 0, 1, whole=True)
    item = scene.items[0]
    x, y = item.print_at
    patch = (y + 3) // 8 * 8 + (x + 5) // 8  # the patch under the middle of the number
    assert CLASSES["tens"][labels["tens"][patch]] == str(item.number)[0]
    assert CLASSES["ones"][labels["ones"][patch]] == str(item.number)[1]
    assert CLASSES["colour"][labels["colour"][patch]] == item.colour
    assert set(labels["count"]) == {-100, 1} and (labels["role"] == 0).sum() == (labels["count"] == 1).sum()


def test_the_language_model_looks_facts_up():
    """Greedy answers about held-out documents. Numbers in plain text are its known weakness and not asserted: see README."""
    llm = LlamaForCausalLM.from_pretrained(TINY / "llm").eval()
    scores = lookup_accuracy(llm, AutoTokenizer.from_pretrained(TINY / "llm"), seed=7)
    # About 200 numbers and 200 words of each kind: the bounds lie three standard errors below what was measured.
    assert scores["slot numbers"] >= 0.9 and scores["slot words"] >= 0.92 and scores["text words"] >= 0.87, scores


@pytest.mark.parametrize("segments", [[5], [1, 7, 3], [64, 1, 1, 130]])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_packed_attention_is_a_block_of_causal_attentions(segments, kv_heads):
    """Against softmax written out with a block-diagonal causal mask; forward and every gradient, float64."""
    torch.manual_seed(0)
    total = sum(segments)
    q = torch.randn(1, 4, total, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, kv_heads, total, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    out, _ = packed_attention(None, q, k, v, None, scaling=0.3, segments=Segments(segments, "cpu"))
    sample = torch.repeat_interleave(torch.arange(len(segments)), torch.tensor(segments))
    mask = (sample[:, None] == sample) & torch.ones(total, total, dtype=torch.bool).tril()
    repeated = [t.repeat_interleave(4 // kv_heads, dim=1) for t in (k, v)]
    scores = (q @ repeated[0].mT * 0.3).masked_fill(~mask, -torch.inf)
    expected = (scores.softmax(-1) @ repeated[1]).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    for fast, slow in zip(torch.autograd.grad((out * weight).sum(), (q, k, v)),
                          torch.autograd.grad((expected * weight).sum(), (q, k, v))):
        torch.testing.assert_close(fast, slow)


@pytest.mark.parametrize("cached, new", [(0, 4), (6, 1), (6, 3)])
def test_attention_continues_a_cache(cached, new):
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, new, 8), torch.randn(1, 2, cached + new, 8), torch.randn(1, 2, cached + new, 8)
    out, _ = packed_attention(None, q, k, v, None, scaling=1.0)
    scores = (q @ k.mT).masked_fill(~torch.ones(new, cached + new, dtype=torch.bool).tril(cached), -torch.inf)
    torch.testing.assert_close(out, (scores.softmax(-1) @ v).transpose(1, 2), atol=1e-6, rtol=1e-5)


def test_packed_attention_refuses_masks_it_would_ignore():
    x = torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match="no sliding window and no other mask"):
        packed_attention(None, x, x, x, None, scaling=1.0, sliding_window=2)
    with pytest.raises(ValueError, match="no sliding window and no other mask"):
        packed_attention(None, x, x, x, torch.ones(1, 1, 3, 3), scaling=1.0)
