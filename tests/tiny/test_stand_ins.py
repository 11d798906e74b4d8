"""The stand-ins can do what they are for, and packed attention is exact."""

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from sliming.backbones import TINY, Segments, packed_attention
from sliming.config import PRESETS
from sliming.model import SliME
from sliming.tiny import pretrain
from sliming.tiny.pictures import generator, sample_scene
from sliming.tiny.pretrain import CLASSES, dense_labels, lookup_accuracy, tower_batch


def probe_data(tower, key, pictures):
    """Features [V*L, Dv], with a one beside them, and labels [V*L] by head."""
    rng = generator("pretraining", 9, key)
    views, labels = tower_batch(rng, scenes=pictures, small=pictures // 2)
    features = F.pad(tower(views).flatten(0, 1), (0, 1), value=1.0)
    return features, {head: grid.flatten() for head, grid in labels.items()}


def test_the_tower_reads_labels_in_a_crop():
    """A linear read-out of the frozen features, fitted on some pictures, reads others."""
    tower = SliME.from_backbones(PRESETS["tiny"].model).vision
    features, labels = probe_data(tower, 0, 400)
    fresh, truth = probe_data(tower, 1, 60)
    for head in ("tens", "ones", "letter", "colour"):
        shown, there = labels[head] > 0, truth[head] > 0
        x, target = features[shown], F.one_hot(labels[head][shown], len(CLASSES[head])).float()
        weights = torch.linalg.lstsq(x.T @ x + 1e-3 * torch.eye(x.shape[1]), x.T @ target).solution
        predicted = (fresh[there] @ weights).argmax(-1)
        accuracy = (predicted == truth[head][there]).float().mean().item()
        assert there.sum() > 100 and accuracy >= 0.95, (head, accuracy)


def test_dense_labels_by_hand():
    scenes = (sample_scene(generator("train", 0, 0, index), small=True) for index in range(50))
    scene = next(scene for scene in scenes if scene.kind == "shapes" and len(scene.items) == 1)
    labels = dense_labels(scene, 0, 0, 1, whole=True)
    item = scene.items[0]
    x, y = item.print_at
    patch = (y + 3) // 8 * 8 + (x + 5) // 8  # the patch under the middle of the number
    shown = {head: CLASSES[head][labels[head][patch]] for head in ("tens", "ones", "colour")}
    assert shown["tens"] + shown["ones"] == str(item.number) and shown["colour"] == item.colour
    assert set(labels["count"]) == {-100, 1}
    assert (labels["role"] == 0).sum() == (labels["count"] == 1).sum()


def test_the_language_model_looks_facts_up():
    """Greedy answers about held-out documents. Numbers in plain text are a known weakness."""
    llm = LlamaForCausalLM.from_pretrained(TINY / "llm").eval()
    scores = lookup_accuracy(llm, AutoTokenizer.from_pretrained(TINY / "llm"), seed=7)
    # Some 200 of each kind: the bounds lie three standard errors below what was measured.
    for kind, least in (("slot numbers", 0.9), ("slot words", 0.92), ("text words", 0.87)):
        assert scores[kind] >= least, scores


def test_the_stand_ins_can_be_made_again(tmp_path, monkeypatch, capsys):
    """Two steps of each, written and read back."""
    monkeypatch.setattr(pretrain, "VISION_STEPS", 2)
    monkeypatch.setattr(pretrain, "LLM_STEPS", 2)
    pretrain.pretrain(tmp_path, seed=0)
    assert re.findall("(vision|llm) step +1 ", capsys.readouterr().out) == ["vision", "llm"]
    for name in ("vision", "llm"):
        made, shipped = (load_file(folder / name / "model.safetensors")
                         for folder in (tmp_path, TINY))
        assert {key: t.shape for key, t in made.items()} == {key: t.shape
                                                             for key, t in shipped.items()}
    config = replace(PRESETS["tiny"].model, vision=str(tmp_path / "vision"))
    tower = SliME.from_backbones(config).vision
    assert tower(torch.zeros(1, 3, 64, 64)).isfinite().all()
    AutoTokenizer.from_pretrained(tmp_path / "llm")


@pytest.mark.parametrize("segments", [[5], [1, 7, 3], [64, 1, 1, 130]])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_packed_attention_is_a_block_of_causal_attentions(segments, kv_heads):
    """Against softmax with a block-diagonal causal mask; forward and every gradient, float64."""
    torch.manual_seed(0)
    total = sum(segments)
    q, k, v = (torch.randn(1, heads, total, 8, dtype=torch.float64, requires_grad=True)
               for heads in (4, kv_heads, kv_heads))
    out, _ = packed_attention(None, q, k, v, None, scaling=0.3, segments=Segments(segments, "cpu"))
    sample = torch.repeat_interleave(torch.arange(len(segments)), torch.tensor(segments))
    mask = (sample[:, None] == sample) & torch.ones(total, total, dtype=torch.bool).tril()
    repeated = [t.repeat_interleave(4 // kv_heads, dim=1) for t in (k, v)]
    scores = (q @ repeated[0].mT * 0.3).masked_fill(~mask, -torch.inf)
    expected = (scores.softmax(-1) @ repeated[1]).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    grads = (torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (out, expected))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("cached, new", [(0, 4), (6, 1), (6, 3)])
def test_attention_continues_a_cache(cached, new):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, length, 8) for length in (new, cached + new, cached + new))
    out, _ = packed_attention(None, q, k, v, None, scaling=1.0)
    mask = torch.ones(new, cached + new, dtype=torch.bool).tril(cached)
    scores = (q @ k.mT).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(out, (scores.softmax(-1) @ v).transpose(1, 2), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("mask, options",
                         [(None, {"sliding_window": 2}), (torch.ones(1, 1, 3, 3), {})])
def test_packed_attention_refuses_masks_it_would_ignore(mask, options):
    x = torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match="no sliding window and no other mask"):
        packed_attention(None, x, x, x, mask, scaling=1.0, **options)
