"""Released checkpoints against numbers recorded from the released code, and back again."""

import json
import shutil
from dataclasses import replace
from functools import cache
from unittest.mock import Mock

import pytest
import torch
from reference import part_of, reference_folder
from safetensors.torch import load_file, save_file

from sliming.chat import IGNORE, IMAGE_TOKEN, Encoded
from sliming.checkpoints import released as official
from sliming.checkpoints.files import CheckpointError, download
from sliming.inputs import Batch, Sample
from sliming.model import SliME
from sliming.router import relevance


@cache
def recorded():
    """-> the recorded model, its folder, what was recorded about it."""
    folder = reference_folder("golden/e2e")
    return SliME.from_pretrained(folder), folder, json.loads((folder / "meta.json").read_text())


def sample(model, ids, labels, image):
    image = model.processor.slice(reference_folder("golden") / image)
    return Sample(Encoded(ids, labels, []), [image])


def prompt(model, tensors, image):
    ids = tensors["input_ids"].tolist()
    return sample(model, ids, [IGNORE] * len(ids), image)


def close(got, expected, atol, what):
    assert got.shape == expected.shape, what
    assert (got.detach() - expected).abs().max() <= atol, what


def hidden_and_logits(model, batch, visual):
    embeddings, labels, lengths = model.embed(batch, visual)
    logits = model.llm.get_output_embeddings()(model.decode(embeddings, lengths))
    return embeddings.split(lengths), logits.split(lengths), labels.split(lengths)


def router_text(model, batch):
    """What the released router reads: every token that is no image, as embeddings, per sample."""
    return model.llm.get_input_embeddings()(batch.words).split(batch.lengths)


def scores(model, batch, visual, image):
    """Similarities of one image's local tokens with its sample's text, one image per sample."""
    text = router_text(model, batch)[image]
    return relevance(visual.local[image], text, model.config.router_score)


@pytest.mark.reference
@torch.no_grad()
def test_answers_to_prompts():
    """Gates, tokens, the router's choice, embeddings, logits and greedy answers, at each gamma."""
    model, folder, meta = recorded()
    assert meta["examples"]
    words, head = model.llm.get_input_embeddings(), model.llm.get_output_embeddings()
    for name, record in meta["examples"].items():
        tensors = load_file(folder / f"{name}.safetensors")
        one = prompt(model, tensors, record["image"])
        assert list(one.images[0].grid) == record["grid_cols_rows"]
        batch = Batch.pack([one])
        features = torch.cat(model.encode(batch))
        compressed = model.compression(features[1:])
        former = model.adapter.query_former(features[:1])
        mlp = model.adapter.mlp
        parts = {"vision": features, "vision_stride8": features[:, ::8], "post_qformer": compressed,
                 "post_qformer_stride4": compressed[:, ::4], "expert0": mlp(features[0]),
                 "expert1": mlp(former)[0], "local_projected": mlp(compressed)}
        for key in parts.keys() & tensors.keys():
            close(parts[key], tensors[key], 5e-5, f"{name}: {key}")
        assert {"vision_stride8", "post_qformer_stride4"} <= tensors.keys()
        visual = model.see(batch, gamma=1.0)
        close(visual.gates[0], tensors["gates"], 2e-6, f"{name}: gates")
        # They are divided by 1e-6 too much; over all tokens rounding averages out.
        sums = [gates.double().sum(1).mean() for gates in (visual.gates[0], tensors["gates"])]
        assert abs(sums[0] - sums[1]) < 2e-7, f"{name}: sum of the gates"
        close(visual.whole[0], tensors["global_features"], 5e-5, f"{name}: global")
        close(visual.local[0], tensors["local_spatial"], 5e-5, f"{name}: local")
        (text,) = router_text(model, batch)
        expected = tensors["text_embedding"][tensors["text_mask"].bool()]
        assert torch.equal(text, expected), f"{name}: text of the router"
        similarity = scores(model, batch, visual, 0)
        close(similarity, tensors["similarity"], 2e-5, f"{name}: similarity")
        probs = (similarity / model.config.router_temperature).softmax(0)
        close(probs, tensors["probs"], 1e-6, f"{name}: probs")
        for gamma, run in record["runs"].items():
            visual = model.see(batch, gamma=float(gamma))
            there, what = part_of(tensors, f"topp{gamma}/"), f"{name} {gamma}"
            assert torch.equal(visual.keep[0].nonzero()[:, 0], there["indices"]), what
            (embeddings,), (logits,), _ = hidden_and_logits(model, batch, visual)
            if "inputs_embeds" in there:
                close(embeddings, there["inputs_embeds"], 5e-5, f"{what}: embeddings")
            close(logits[::8], there["logits_stride8"], 2e-4, f"{what}: logits")
            close(logits[-64:], there["logits_tail64"], 2e-4, f"{what}: last logits")
            count = len(run["generated_ids"])
            answer = list(model.generate(one, gamma=float(gamma), max_new_tokens=count))
            assert answer == run["generated_ids"] == there["generated_ids"].tolist(), what
            said = words(torch.tensor(answer[:-1]))
            hidden = model.decode(torch.cat([embeddings, said]), [len(embeddings) + len(said)])
            close(head(hidden[-count:]), there["generated_scores"], 2e-4, f"{what}: scores")


@pytest.mark.reference
def test_answers_to_all_prompts_at_once():
    model, folder, meta = recorded()
    records = meta["examples"]
    samples = [prompt(model, load_file(folder / f"{name}.safetensors"), record["image"])
               for name, record in records.items()]
    for gamma in set.intersection(*(set(record["runs"]) for record in records.values())):
        expected = [record["runs"][gamma]["generated_ids"] for record in records.values()]
        said = model.generate_batch(samples, gamma=float(gamma), max_new_tokens=len(expected[0]))
        assert said == expected, gamma


def recorded_batch(model, folder, meta, **noise):
    tensors, samples = load_file(folder / "batch.safetensors"), []
    for row, mask in enumerate(tensors["attention_mask"].bool()):
        ids, labels = (tensors[name][row][mask].tolist() for name in ("input_ids", "labels"))
        one = sample(model, ids, labels, meta["batch"]["images"][row])
        samples.append(replace(one, **{name: draws[row] for name, draws in noise.items()}))
    return Batch.pack(samples), tensors


def compare_rows(tensors, embeddings, labels, visual):
    """Embeddings, labels, lengths and the router's choice of each row, where recorded."""
    for row, mask in enumerate(tensors["out_attention_mask"].bool()):
        assert mask.sum() == len(embeddings[row]), f"row {row}: length"
        assert torch.equal(labels[row], tensors["out_labels"][row][mask]), f"row {row}: labels"
        for stride, key in ((1, "inputs_embeds"), (4, "inputs_embeds_stride4")):
            if key in tensors:
                expected = tensors[key][row][mask[::stride]]
                close(embeddings[row][::stride], expected, 5e-5, f"{key} {row}")
        if f"indices{row}" in tensors:
            kept = visual.keep[row].nonzero()[:, 0]
            assert torch.equal(kept, tensors[f"indices{row}"]), f"row {row}: indices"


@pytest.mark.reference
@torch.no_grad()
def test_a_batch():
    model, folder, meta = recorded()
    batch, tensors = recorded_batch(model, folder, meta)
    for gamma, run in meta["batch"]["runs"].items():
        visual = model.see(batch, gamma=float(gamma))
        for row, local in enumerate(visual.local):
            close(visual.whole[row], tensors[f"global_features{row}"], 5e-5, f"row {row}: global")
            close(local, tensors[f"local_spatial{row}"], 5e-5, f"row {row}: local")
            similarity = scores(model, batch, visual, row)
            close(similarity, tensors[f"similarity{row}"], 2e-5, f"row {row}: similarity")
        embeddings, logits, labels = hidden_and_logits(model, batch, visual)
        assert [len(row) for row in embeddings] == run["seq_lens"]
        there = part_of(tensors, f"topp{gamma}/")
        compare_rows(there, embeddings, labels, visual)
        for row, expected in enumerate(there["logits_stride8"]):
            close(logits[row][::8], expected[:len(logits[row][::8])], 2e-4, f"row {row}: logits")
        loss = model(batch, visual=visual).loss
        assert loss.item() == pytest.approx(there["loss"].item(), abs=2e-5)


@pytest.mark.reference
@pytest.mark.parametrize("stage", ["1a", "1b", "2", "3"])
def test_training_stages(stage):
    """Losses, the router's choice under recorded noise, embeddings, gradients and their norms."""
    model, folder, meta = recorded()
    train = part_of(load_file(folder / "train.safetensors"), f"stage{stage}/")
    record, flags = meta["stages"][stage], meta["stages"][stage]["flags"]
    parts = "global" if flags["use_global_only"] else "local" if flags["use_local_only"] else "both"
    draws = [train[f"noise{i}"] for i in range(len(record["randn_like_shapes"]))]
    noise = {"gate_noise": [draw[None] for draw in draws if draw.dim() == 2],
             "router_noise": [draw for draw in draws if draw.dim() == 1]}
    noise = {name: draws for name, draws in noise.items() if draws}
    batch, _ = recorded_batch(model, folder, meta, **noise)
    expert = flags["mm_learnable_gated"]
    try:
        model.adapter.expert = None if expert < 0 else expert
        model.train()
        model.requires_grad_(True)
        model.vision.requires_grad_(False)
        visual = model.see(batch, parts=parts, gamma=flags["golden_topp"])
        output = model(batch, parts=parts, visual=visual)
        output.loss.backward()
        gradients = official.packed({name: torch.zeros_like(p) if p.grad is None else p.grad
                                     for name, p in model.named_parameters()})
    finally:
        model.adapter.expert = None
        model.zero_grad()
        model.eval()
    assert output.loss.item() == pytest.approx(train["loss"].item(), abs=2e-5)
    embeddings, _, labels = hidden_and_logits(model, batch, visual)
    compare_rows(train, embeddings, labels, visual)
    assert record["grad_norms"]
    for name, norm in record["grad_norms"].items():
        assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-7), name
    for name in record["no_grad_although_trainable"]:  # positions are no parameter here
        assert name.endswith("pos_embed") or not gradients[name].any(), name
    for name, expected in part_of(train, "grad/").items():
        close(gradients[name], expected, 1e-5, name)


# ------------------------------------------------------------------------------------------- files


@pytest.fixture
def released(model, tmp_path):
    """The tiny preset under the released names, with the released code's behaviour."""
    torch.nn.init.normal_(model.adapter.w_noise)
    model.config = replace(model.config, slicing="official", global_view="squash",
                           router_score="sum", router_text="all", gate_noise="w_gate",
                           gate_epsilon=1e-6, gamma=0.95)
    official.export(model, tmp_path / "released")
    return tmp_path / "released"


def equal(model, other):
    ours, theirs = model.tensors(), other.tensors()
    assert set(ours) == set(theirs)
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def edit(folder, file="config.json", **changes):
    """Sets fields of a JSON file; None takes one away."""
    fields = {**json.loads((folder / file).read_text()), **changes}
    fields = {key: value for key, value in fields.items() if value is not None}
    (folder / file).write_text(json.dumps(fields))


def rewrite(folder, keep=lambda name: True, **tensors):
    """The weights of a folder with some left out and others given; -> what they were."""
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if keep(name)}
    save_file({**kept, **tensors}, folder / "model.safetensors", {"format": "pt"})
    return weights


def refused(folder, message, error=CheckpointError):
    """That a folder is refused, in one line."""
    with pytest.raises(error, match=message) as caught:
        SliME.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_round_trip_is_bit_identical(model, released):
    again = SliME.from_pretrained(released)
    assert again.config == model.config and equal(model, again)
    again.save_pretrained(released.parent / "ours")
    assert equal(SliME.from_pretrained(released.parent / "ours"), model)


@pytest.mark.reference
def test_export_of_a_released_model_gives_its_names(tmp_path):
    model, folder, _ = recorded()
    official.export(model, tmp_path)
    before, after = (load_file(where / "model.safetensors") for where in (folder, tmp_path))
    layers = model.config.vision_config["num_hidden_layers"]
    used = layers + 1 + model.config.vision_layer
    behind = ["post_layernorm"]  # the tower is not even built that far
    behind += [f"encoder.layers.{layer}." for layer in range(used, layers)]
    assert not [name for name in set(before) ^ set(after) if not any(b in name for b in behind)]
    for name, tensor in after.items():
        if name not in official.UNUSED:
            assert torch.equal(before[name].float(), tensor), name
    assert equal(SliME.from_pretrained(tmp_path), model)


def test_settings_without_our_own(released):
    """From the released code's fields alone: the same behaviour."""
    with_ours = SliME.from_pretrained(released)
    edit(released, sliming=None, mm_vision_select_layer=-1)
    config = SliME.from_pretrained(released).config
    for name in ("slicing", "global_view", "router_score", "router_text", "gate_noise",
                 "gate_epsilon", "gamma", "num_queries", "expert", "router_temperature"):
        assert getattr(config, name) == getattr(with_ours.config, name), name
    assert config.template == "vicuna_v1"


def test_sharded_and_pickled_files(model, released):
    weights = load_file(released / "model.safetensors")
    (released / "model.safetensors").unlink()
    names = sorted(weights)
    files = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({name: weights[name] for name in names if files[name] == file}, released / file)
    (released / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    assert equal(model, SliME.from_pretrained(released))
    (released / "pytorch_model-00002-of-00002.bin").unlink()
    refused(released, "pytorch_model-00002-of-00002.bin: unreadable weights")


def test_nothing_but_tensors_is_unpickled(released):
    (released / "model.safetensors").unlink()
    for content in ({"model.norm.weight": CheckpointError("code")}, torch.zeros(1),
                    {"model.norm.weight": 1}):
        torch.save(content, released / "pytorch_model.bin")
        refused(released, "unreadable weights")


def test_the_tower_comes_from_where_the_config_says(model, released):
    weights = rewrite(released, keep=lambda name: "vision_tower" not in name)
    assert model.config.vision == "tiny" and equal(model, SliME.from_pretrained(released))
    one = next(name for name in weights if "vision_tower" in name)
    rewrite(released, **{name: tensor for name, tensor in weights.items() if name != one})
    refused(released, "lacks 1 tensors: model.vision_tower.vision_tower.vision_model.")


def lora_folder(model, released, tmp_path):
    """Adapters on q and down projections, what else was trained, on a base folder of the LLM."""
    base, lora = tmp_path / "base", tmp_path / "lora"
    base.mkdir()
    lora.mkdir()
    shutil.copy(released / "model.safetensors", base)
    weights = rewrite(base, keep=lambda name: name.startswith(
        ("model.layers", "model.norm", "model.embed", "lm_head")))
    model.processor.tokenizer.save_pretrained(base)
    torch.manual_seed(1)
    adapters, expected = {}, dict(weights)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"):
        out, into = weights[f"{name}.weight"].shape
        down, up = torch.randn(4, into), torch.randn(out, 4)
        adapters |= {f"base_model.model.{name}.lora_A.weight": down,
                     f"base_model.model.{name}.lora_B.weight": up}
        expected[f"{name}.weight"] = weights[f"{name}.weight"] + 8 / 4 * (up @ down)
    save_file(adapters, lora / "adapter_model.safetensors", {"format": "pt"})
    expected["model.norm.weight"] = weights["model.norm.weight"] + 1  # not the base model's
    ours = {f"base_model.model.{name}": tensor for name, tensor in expected.items()
            if any(part in name for part in ("mm_projector", "sampler", "model.norm."))
            and not name.endswith("pos_embed")}
    torch.save(ours, lora / "non_lora_trainables.bin")
    (lora / "adapter_config.json").write_text("{}")
    edit(lora, "adapter_config.json", r=4, lora_alpha=8, base_model_name_or_path=str(base))
    shutil.copy(released / "config.json", lora)
    return lora, expected


def test_lora_is_merged_and_positions_are_computed(model, released, tmp_path):
    lora, expected = lora_folder(model, released, tmp_path)
    got = official.packed(SliME.from_pretrained(lora).tensors())
    for name, tensor in got.items():
        if name.endswith("pos_embed"):
            assert torch.equal(tensor, expected[name].half().float()), name
        else:
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6, msg=name)


def test_bad_lora_folders(model, released, tmp_path, monkeypatch):
    lora, _ = lora_folder(model, released, tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for changes, message in (
            ({"base_model_name_or_path": "a/b"}, "neither a folder nor to be had from the hub"),
            ({"base_model_name_or_path": None}, "names no base model")):
        edit(lora, "adapter_config.json", **changes)
        refused(lora, message)


def test_stage_files(model, released, tmp_path):
    weights = load_file(released / "model.safetensors")
    for part in ("mm_projector", "sampler"):
        torch.save({name: tensor for name, tensor in weights.items()
                    if part in name and name not in official.UNUSED}, tmp_path / f"{part}.bin")
    fresh = SliME.from_backbones(model.config)
    assert not equal(fresh, model)
    official.fill_stage_files(fresh, tmp_path)
    assert equal(fresh, model)
    torch.save({"model.sampler.odd": torch.zeros(1)}, tmp_path / "sampler.bin")
    message = "sampler.bin: the checkpoint has unknown 1 tensors: model.sampler.odd"
    with pytest.raises(CheckpointError, match=message):
        official.fill_stage_files(fresh, tmp_path)
    with pytest.raises(CheckpointError, match="no mm_projector.bin"):
        official.fill_stage_files(fresh, released)


def test_wrong_weights_are_named(released):
    weights = rewrite(released, **{"model.new_thing.weight": torch.zeros(1)})
    refused(released, "has unknown 1 tensors: model.new_thing.weight")
    rewrite(released, keep=lambda name: "new_thing" not in name and "ln_post.bias" not in name)
    refused(released, "lacks 2 tensors: model.mm_projector.attn.ln_post.bias, "
                      "model.sampler.post_qformer.ln_post.bias")
    rewrite(released, lambda name: False, **weights | {"model.norm.weight": torch.zeros(3)})
    refused(released, r"model.norm.weight has shape \[3\], the config asks for \[128\]")
    path = released / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    refused(released, "model.safetensors: unreadable weights .*download the file again")


@pytest.mark.parametrize("change, message", [
    ({"mm_resampler_type": "perceiver"},
     "mm_resampler_type is 'perceiver'; the released models have 'cosine'"),
    ({"mm_projector_type": "mlp2x_gelu"}, "mm_projector_type is 'mlp2x_gelu'"),
    ({"use_local_only": True}, "use_local_only is True; the released models have False"),
    ({"mm_resampler_dim": None}, "lacks mm_resampler_dim"),
    ({"mm_vision_tower": "/data/clip"},
     "names the vision tower /data/clip, which is neither a folder nor to be had")])
def test_other_configs_are_refused(released, change, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    edit(released, sliming=None, **change)
    refused(released, message)


def test_a_folder_that_is_no_checkpoint(released, tmp_path):
    refused(tmp_path / "nowhere", "no such checkpoint folder", FileNotFoundError)
    (released / "model.safetensors").unlink()
    refused(released, "has no weights: neither model.safetensors nor pytorch_model.bin")
    for text, message in (('{"mm_proj', "config.json: cannot be read as JSON"),
                          ("[]", "holds list, not an object"),
                          ('{"model_type": "llama"}', "not that of a sliming checkpoint")):
        (released / "config.json").write_text(text)
        refused(released, message)
    (released / "config.json").unlink()
    refused(released, "no config.json, so this is no checkpoint", FileNotFoundError)


def test_the_hub_is_asked_for_weights_once(tmp_path, monkeypatch):
    """As safetensors where there are any; a LoRA's other weights are .bin in any case."""
    asked = []
    monkeypatch.setattr(
        "sliming.checkpoints.files.snapshot_download", lambda name, allow_patterns, **_:
        asked.append("*.bin" in allow_patterns) or str(tmp_path))
    for file, with_bin in (("config.json", True), ("model.safetensors", False),
                           ("adapter_config.json", True)):
        (tmp_path / file).write_text("")
        asked.clear()
        assert download("someone/something") == tmp_path and any(asked) is with_bin, file


def test_the_hub_cannot_be_reached(monkeypatch):
    monkeypatch.setattr("sliming.checkpoints.files.snapshot_download",
                        Mock(side_effect=OSError("no\nnet")))
    refused("a/b", "a/b: neither a folder nor to be had from the hub [(]no[)]", FileNotFoundError)


def test_a_checkpoint_is_not_written_over(model, released):
    with pytest.raises(CheckpointError, match="holds a checkpoint already"):
        official.export(model, released)


def test_adapters_may_stay_in_float32(released):
    parts = ("adapter", "compression")
    model = SliME.from_pretrained(released, dtype=torch.bfloat16, float32=parts)
    exact = SliME.from_pretrained(released)
    assert model.llm.dtype == torch.bfloat16
    for part in parts:
        ours, theirs = (getattr(which, part).state_dict() for which in (model, exact))
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.mark.reference
def test_ids_alone_need_no_tokenizer():
    model, _, _ = recorded()
    assert model.processor.tokenizer is None and IMAGE_TOKEN < 0
    with pytest.raises(ValueError, match="came without tokenizer files"):
        model.processor.prompt([{"from": "human", "value": "hello"}], [])
