"""The whole model against an obvious twin: one sample at a time, transformers' own attention,
logits everywhere."""

import json
import shutil
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from sliming.backbones import TINY
from sliming.chat import IGNORE, IMAGE_TOKEN, encode
from sliming.config import PRESETS, SliMEConfig
from sliming.generate import Conversation, answer_file, sample_tokens
from sliming.inputs import Batch, Sample
from sliming.model import SliME
from sliming.qformer import QueryFormer
from sliming.router import route
from sliming.tiny.pictures import generator, render, sample_scene


def picture(seed, size=None):
    rng = generator("train", 0, 0, seed)
    image = render(sample_scene(rng), rng)
    return image.resize(size) if size else image


def sample(model, *values, images=()):
    conversation = [{"from": "gpt" if i % 2 else "human", "value": value}
                    for i, value in enumerate(values)]
    return Sample(encode(conversation, "chat", model.processor.tokenizer),
                  [model.processor.slice(image) for image in images])


@pytest.fixture
def samples(model):
    """Unequal in every way: no image, one, three; one crop and many; short and long answers;
    several turns."""
    return [
        sample(model, "<image>\nWhat is this?", "a red bar", images=[picture(1)]),
        sample(model, "No picture here", "yes, none at all, and a longer answer"),
        sample(model, "<image>One <image>\ntwo<image>", "three", "Are you sure?", "no",
               images=[picture(2, (64, 64)), picture(3, (250, 40)), picture(4)]),
        sample(model, "<image>", "an image without a question", images=[picture(5)]),
    ]


def twin_embeddings(model, one, parts="both"):
    """Embeddings [T, D] and labels [T] of one sample, view by view, token by token."""
    embedding, config = model.llm.get_input_embeddings(), model.config
    question = embedding(torch.tensor(one.text.question, dtype=torch.long))
    rows, labels, images = [], [], iter(one.images)
    for token, label in zip(one.text.ids, one.text.labels, strict=True):
        if token != IMAGE_TOKEN:
            rows.append(embedding(torch.tensor(token)))
            labels.append(label)
            continue
        slices = next(images)
        columns, grid_rows = slices.grid
        features = model.vision(slices.global_view[None])
        gates = (features @ model.adapter.w_gate).softmax(-1)
        seen = []
        if parts != "local":
            query_former = model.adapter.mlp(model.adapter.query_former(features))
            mixed = gates[..., :1] * model.adapter.mlp(features) + gates[..., 1:] * query_former
            seen += list(mixed[0])
        if parts == "both":
            comma = model.processor.tokenizer(",", add_special_tokens=False)["input_ids"][-1]
            seen.append(embedding(torch.tensor(comma)))
        if parts != "global":
            side = model.compression.side
            raster = [[None] * (columns * side) for _ in range(grid_rows * side)]
            for place, crop in enumerate(slices.crops):
                tokens = model.adapter.mlp(model.compression(model.vision(crop[None])))[0]
                for i, token_vector in enumerate(tokens):
                    y, x = place // columns * side + i // side, place % columns * side + i % side
                    raster[y][x] = token_vector
            local = torch.stack([vector for line in raster for vector in line])
            keep = torch.ones(len(local), dtype=torch.bool)
            if parts == "both":
                keep = route(local, question, config.gamma)
            seen += list(local[keep])
        rows += seen
        labels += [IGNORE] * len(seen)
    return torch.stack(rows), labels


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("parts", ["both", "global", "local"])
def test_packed_equals_alone_forward_and_every_gradient(model, samples, parts):
    """With the paper's query former: the square of look_nearby's gain multiplies rounding, too."""
    model.compression = QueryFormer(model.compression.query.shape[1], len(model.compression.query))
    model.requires_grad_(True)
    model.vision.requires_grad_(False)
    output = model(Batch.pack(samples), parts=parts)
    fast = gradients(model, output.loss)
    reference = LlamaForCausalLM._from_config(model.llm.config, attn_implementation="eager").eval()
    reference.load_state_dict(model.llm.state_dict())
    model.llm = reference  # its gradients are compared below under the same names
    losses, logits = [], []
    for one in samples:
        embeddings, labels = twin_embeddings(model, one, parts)
        every = reference(inputs_embeds=embeddings[None]).logits[0]
        learned = [t for t, label in enumerate(labels) if label != IGNORE]
        logits.append(every[[t - 1 for t in learned]])
        targets = torch.tensor([labels[t] for t in learned])
        losses.append(F.cross_entropy(logits[-1], targets, reduction="sum"))
    torch.testing.assert_close(output.logits, torch.cat(logits), atol=2e-5, rtol=1e-4)
    loss = sum(losses) / sum(len(part) for part in logits)
    torch.testing.assert_close(output.loss, loss, atol=1e-6, rtol=1e-5)
    slow = gradients(model, loss)
    # Batch-wide modules get zeros where the twin gives none (an unused expert, unused noise).
    assert set(slow) <= set(fast)
    for name, gradient in fast.items():
        other = slow.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, other, atol=2e-6, rtol=2e-3,
                                   msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_loss_in_chunks_is_the_same_loss(model, samples, monkeypatch, chunk):
    """Without keeping logits: loss and every gradient, in chunks of any size."""
    monkeypatch.setattr("sliming.model.CHUNK", chunk)
    model.requires_grad_(True)
    whole, pieces = (model(Batch.pack(samples), logits=logits) for logits in (True, False))
    assert pieces.logits is None
    torch.testing.assert_close(pieces.loss, whole.loss)
    grads = [gradients(model, output.loss) for output in (pieces, whole)]
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-4)


def test_noise_travels_with_its_sample(model, samples):
    """In training a sample sees its own noise whatever it is batched with, so losses do not depend
    on the sharing of work."""
    L, Nq = model.adapter.num_tokens, model.config.num_queries
    noisy = [replace(one, gate_noise=torch.randn(len(one.images), L, 2),
                     router_noise=torch.randn(sum(i.grid[0] * i.grid[1] * Nq for i in one.images)))
             for one in samples]
    model.train()
    together = model(Batch.pack(noisy)).logits
    alone = [model(Batch.pack([one])).logits for one in noisy]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)
    # The adapter's noise moves its gates alone, the router's its choice.
    louder = noisy[2].gate_noise + torch.tensor([1.0, 0])
    plain, gate, router = (model.see(Batch.pack([one])) for one in (
        noisy[2], replace(noisy[2], gate_noise=louder),
        replace(noisy[2], router_noise=-noisy[2].router_noise)))
    more = gate.gates[..., 0] - plain.gates[..., 0]
    assert (more >= 0).all() and (more > 0).float().mean() > 0.5  # where float32 has room
    assert torch.equal(torch.cat(gate.keep), torch.cat(plain.keep))
    assert not torch.equal(torch.cat(router.keep), torch.cat(plain.keep))
    model.eval()
    assert torch.equal(model.see(Batch.pack(noisy)).gates, model.see(Batch.pack(samples)).gates)


def test_router_reads_the_question_and_nothing_else(model):
    image = picture(7)
    def kept(question, answer):
        batch = Batch.pack([sample(model, "<image>\n" + question, answer, images=[image])])
        return torch.cat(model.see(batch, gamma=0.3).keep)
    same = kept("What number is on the red bar?", "12")
    assert torch.equal(same, kept("What number is on the red bar?",
                                  "a wholly different, longer answer: red, red"))
    assert not torch.equal(same, kept("triangle", "12"))
    assert 0 < int(same.sum()) < len(same)


def test_gamma_one_keeps_all_and_random_keeps_as_many(model, samples):
    batch = Batch.pack(samples)
    assert torch.cat(model.see(batch, gamma=1.0).keep).all()
    some, random = model.see(batch, gamma=0.5), model.see(batch, gamma=0.5, random_tokens=True)
    assert [int(k.sum()) for k in some.keep] == [int(k.sum()) for k in random.keep]
    assert not torch.equal(torch.cat(some.keep), torch.cat(random.keep))


def test_views_that_are_not_there_are_missed(model):
    """A batch made for one stage is not silently read as if it were made for another."""
    text = sample(model, "<image>What?", "yes", images=[picture(1)]).text
    for parts, other in (("global", "local"), ("local", "both")):
        batch = Batch.pack([Sample(text, [model.processor.slice(picture(1), parts=parts)])])
        model.see(batch, parts)
        with pytest.raises(ValueError, match=f"does not fit parts '{other}'"):
            model.see(batch, other)


def test_bad_batches_are_refused(model):
    good = sample(model, "<image>", "yes", images=[picture(1)])
    with pytest.raises(ValueError, match="1 <image> markers and 0 images"):
        Batch.pack([Sample(good.text, [])])
    masked = Sample(replace(good.text, labels=[IGNORE] * len(good.text.ids)), good.images)
    with pytest.raises(ValueError, match="no supervised token"):
        model(Batch.pack([masked]))
    model.llm.config.max_position_embeddings = 100
    with pytest.raises(ValueError, match="exceeds the language model's 100"):
        model(Batch.pack([good]), parts="both")
    with pytest.raises(ValueError, match="parts must be"):
        model(Batch.pack([good]), parts="globe")


# ---------------------------------------------------------------------------------------- answering


def test_generation_with_cache_equals_recomputing_everything(model):
    one = sample(model, "<image>\nWhat number is on the red bar?", images=[picture(3)])
    fast = list(model.generate(one, max_new_tokens=12))
    ids, slow = list(one.text.ids), []
    for _ in range(12):
        grown = Sample(replace(one.text, ids=ids, labels=[IGNORE] * len(ids)), one.images)
        batch = Batch.pack([grown])
        embeddings, _, lengths = model.embed(batch, model.see(batch))
        token = int(model.llm.lm_head(model.decode(embeddings, lengths)[-1]).argmax())
        if token == model.processor.tokenizer.eos_token_id:
            break
        slow.append(token)
        ids.append(token)
    assert fast == slow and fast


def answering_differently(model):
    """An untrained adapter makes every answer <s>, <s>, ...: a random output layer does not."""
    torch.manual_seed(5)
    model.llm.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.llm.lm_head.weight))


@pytest.mark.parametrize("limit", [3, 40])
def test_a_conversation_with_its_cache_equals_recomputing_everything(model, limit):
    """Two more turns, after answers that ended by themselves or were cut: the tokens of the whole
    conversation, anew."""
    answering_differently(model)
    conversation = Conversation(model, [picture(1)], gamma=1.0, max_new_tokens=limit)
    said, end = [], model.processor.tokenizer.eos_token_id
    for turn, question in enumerate(("How many bars are there?", "And rows?", "What?")):
        value = "<image>\n" + question if turn == 0 else question
        text = encode([{"from": "human", "value": value}], "chat", model.processor.tokenizer,
                      begin=turn == 0)
        said += text.ids
        images = [model.processor.slice(picture(1))]
        whole = Sample(replace(text, ids=list(said), labels=[IGNORE] * len(said)), images)
        expected = list(model.generate(whole, gamma=1.0, max_new_tokens=limit))
        assert "".join(conversation.ask(question)) == model.processor.tokenizer.decode(expected)
        said += [*expected, end]
    assert conversation.cache.lengths[0] < len(said) + 64 + 1 + 16 * 9


def test_a_refused_question_leaves_a_conversation_as_it_was(model):
    """And the model in its mode: the next question is the first, or goes on, as before."""
    answering_differently(model)
    talks = [Conversation(model.train(), [picture(1)], max_new_tokens=3) for _ in range(2)]
    for question in ("How many bars are there?", "And rows?"):
        with pytest.raises(ValueError, match="exceed"):
            list(talks[0].ask("many " * 3000))
        assert model.training and talks[0].unseen == talks[1].unseen
        first, second = ("".join(talk.ask(question)) for talk in talks)
        assert first == second


def test_questions_of_a_file_about_one_picture_read_it_once(model, tmp_path, monkeypatch):
    for name in ("a", "b"):
        picture(1).save(tmp_path / f"{name}.png")
    asked = [{"question_id": n, "image": f"{name}.png", "text": "How many?"}
             for n, name in enumerate("aaabba")]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, asked)))
    opened, open_ = [], type(model.processor).open
    monkeypatch.setattr(type(model.processor), "open",
                        lambda self, path: opened.append(path.name) or open_(self, path))
    answer_file(model, tmp_path / "questions.jsonl", tmp_path, tmp_path / "answers.jsonl", 2,
                max_new_tokens=2)
    assert opened == ["a.png", "b.png"]
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 6


def test_answers_to_a_batch_equal_those_to_each_alone(model):
    """Samples of all lengths, which end at different steps: by a token of their own, at once, or by
    the limit."""
    answering_differently(model)
    questions = [(picture(1), "How many bars are there?"), (None, "Who?"),
                 ([picture(2, (64, 64)), picture(3)], "Which?"),
                 (picture(4, (250, 40)), "A much longer question about the picture?")]
    prompts = [model.processor.ask(*pair) for pair in questions]
    model.end_ids = set()
    alone = [list(model.generate(prompt, max_new_tokens=12)) for prompt in prompts]
    model.end_ids = {alone[0][0], alone[2][5]}
    alone = [list(model.generate(prompt, max_new_tokens=12)) for prompt in prompts]
    assert alone[0] == [] and len({len(ids) for ids in alone}) > 2
    model.train()
    assert model.generate_batch(prompts, max_new_tokens=12) == alone and model.training
    assert model.answer_batch(questions, gamma=0.3, max_new_tokens=6) == [
        model.answer(*pair, gamma=0.3, max_new_tokens=6) for pair in questions]


def test_equal_views_are_encoded_once_for_an_answer(model, samples, monkeypatch):
    """Those of a picture that several questions are about, and blank crops."""
    batch = Batch.pack(samples + samples)
    seen, forward = [], type(model.vision).forward
    monkeypatch.setattr(type(model.vision), "forward",
                        lambda self, views: seen.append(views) or forward(self, views))
    for ours, plain in zip(model.encode_once(batch), model.encode(batch), strict=True):
        assert (ours - plain).abs().max() < 1e-5
    assert len(seen[0]) == len(torch.unique(seen[1], dim=0)) <= len(seen[1]) / 2
    words = model.encode_once(Batch.pack([model.processor.ask(None, "?")]))
    assert [len(part) for part in words] == [0, 0]


def test_streamed_pieces_are_whole_characters(model, monkeypatch):
    text = "né 漢 🙂 ok"
    ids = model.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(model, "generate", lambda sample: iter(ids))
    pieces = list(model.stream(None))
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    monkeypatch.setattr(model, "generate", lambda sample: iter(()))
    assert "".join(model.stream(None)) == ""


def test_sampling():
    logits = torch.tensor([[2.0, 1.0, 0.0, -50.0]])
    assert sample_tokens(logits, 0.0, 1.0).tolist() == [0]
    torch.manual_seed(0)
    draws = sample_tokens(logits.expand(2000, -1), 1.0, 0.7).tolist()
    assert set(draws) == {0, 1}  # softmax .67 .24 .09: the nucleus of .7 is the first two
    assert abs(draws.count(0) / 2000 - 0.73) < 0.03  # .67 / (.67 + .24) = .73; 3 standard errors
    for temperature, top_p in ((-1.0, 1.0), (float("nan"), 1.0), (1.0, 0.0)):
        with pytest.raises(ValueError, match="temperature"):
            sample_tokens(logits, temperature, top_p)


# ------------------------------------------------------------------------------- saving and loading


def test_round_trip_is_exact(model, samples, tmp_path):
    model.save_pretrained(tmp_path)
    again = SliME.from_pretrained(tmp_path)
    assert again.config == model.config
    pairs = zip(model.tensors().items(), again.tensors().items(), strict=True)
    for (name, old), (other, new) in pairs:
        assert name == other and torch.equal(old, new)
    batch = Batch.pack(samples)
    assert torch.equal(model(batch).loss, again(batch).loss)
    assert not list(tmp_path.glob("*.bin")) and not list(tmp_path.glob(".saving*"))


def test_loading_is_strict(model, tmp_path):
    model.save_pretrained(tmp_path)
    weights, path = load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors"
    config = json.loads((tmp_path / "config.json").read_text())

    def expect(message):
        with pytest.raises(ValueError, match=message):
            SliME.from_pretrained(tmp_path)

    without = {name: tensor for name, tensor in weights.items() if name != "adapter.w_gate"}
    for tensors, message in ((without, "lacks 1 tensors: adapter.w_gate"),
                             (weights | {"extra": torch.zeros(1)}, "unknown 1 tensors: extra"),
                             (without | {"adapter.w_gate": torch.zeros(3, 2)}, "w_gate has shape")):
        save_file(tensors, path)
        expect(message)
    path.write_bytes(path.read_bytes()[:10_000])
    expect("unreadable weights")
    for content, message in ((config | {"colour": 1}, "unknown field colour"),
                             ({"model_type": "bert"}, "not that of a sliming checkpoint")):
        (tmp_path / "config.json").write_text(json.dumps(content))
        expect(message)


def test_push_to_hub_uploads_a_loadable_checkpoint(model, tmp_path, monkeypatch):
    hub = Mock()
    hub().create_repo().repo_id = "somebody/something"
    hub().upload_folder = lambda folder_path, **_: shutil.copytree(folder_path, tmp_path / "there")
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", hub)
    model.push_to_hub("somebody/something")
    again = SliME.from_pretrained(tmp_path / "there")
    assert torch.equal(again.adapter.w_gate, model.adapter.w_gate)


# ---------------------------------------------------------------------------------------- backbones


@pytest.fixture
def clip_folder(tmp_path):
    """A real, small CLIP vision model in a folder that stands for its hub id."""
    torch.manual_seed(1)
    config = CLIPVisionConfig(hidden_size=128, intermediate_size=64, num_hidden_layers=3,
                              num_attention_heads=4, image_size=56, patch_size=14)
    clip = CLIPVisionModel(config).eval()
    clip.save_pretrained(tmp_path / "clip")
    return tmp_path / "clip", clip


def test_tower_runs_to_the_layer_that_is_used(clip_folder):
    folder, clip = clip_folder
    config = replace(PRESETS["tiny"].model, vision=str(folder))
    views = torch.randint(0, 256, (3, 3, 56, 56), dtype=torch.uint8)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    hidden = clip(pixel_values=(views / 255 - mean) / std, output_hidden_states=True).hidden_states
    for layer in (-1, -2, -3):
        tower = SliME.from_backbones(replace(config, vision_layer=layer)).vision
        torch.testing.assert_close(tower(views), hidden[layer][:, 1:], atol=1e-5, rtol=1e-5)
        assert len(tower.clip.encoder.layers) == 4 + layer
        assert not any(p.requires_grad for p in tower.parameters())
    with pytest.raises(ValueError, match="vision_layer must be"):
        SliME.from_backbones(replace(config, vision_layer=-5))


def test_backbones_from_folders_and_a_grouped_query_llm(clip_folder, tmp_path):
    folder, _ = clip_folder
    config = LlamaConfig(vocab_size=700, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
                         bos_token_id=0, eos_token_id=1, pad_token_id=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llm")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "llm" / name).write_bytes((TINY / "llm" / name).read_bytes())
    config = SliMEConfig(vision=str(folder), llm=str(tmp_path / "llm"), num_queries=4)
    model = SliME.from_backbones(config).eval()
    one = sample(model, "<image>\nWhat?", "yes", images=[picture(1)])
    embeddings, labels = twin_embeddings(model, one)
    eager = LlamaForCausalLM.from_pretrained(tmp_path / "llm", attn_implementation="eager")
    learned = [t for t, label in enumerate(labels) if label != IGNORE]
    expected = eager(inputs_embeds=embeddings[None]).logits[0, [t - 1 for t in learned]]
    torch.testing.assert_close(model(Batch.pack([one, one])).logits,
                               torch.cat([expected, expected]), atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path / "checkpoint")
    again = SliME.from_pretrained(tmp_path / "checkpoint")
    assert torch.equal(again(Batch.pack([one])).loss, model(Batch.pack([one])).loss)
    assert again.answer(picture(1), "What?", max_new_tokens=2) is not None
