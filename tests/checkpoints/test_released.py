"""Released checkpoints against numbers recorded from the released code, and back again."""

import json
import shutil
from dataclasses import replace
from functools import cache

import pytest
import torch
from reference import reference_folder
from safetensors.torch import load_file, save_file

from sliming.checkpoints import released as official
from sliming.chat import IGNORE, IMAGE_TOKEN, Encoded
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
    return Sample(Encoded(ids, labels, []), [model.processor.slice(reference_folder("golden") / image)])


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
    return relevance(visual.local[image], router_text(model, batch)[image], model.config.router_score)


@pytest.mark.reference
@torch.no_grad()
def test_answers_to_prompts():
    """Gates, both token kinds, the router's choice, merged embeddings, logits and greedy answers, at every recorded gamma."""
    model, folder, meta = recorded()
    assert meta["examples"]
    for name, record in meta["examples"].items():
        tensors = load_file(folder / f"{name}.safetensors")
        ids = tensors["input_ids"].tolist()
        one = sample(model, ids, [IGNORE] * len(ids), record["image"])
        assert list(one.images[0].grid) == record["grid_cols_rows"]
        batch = Batch.pack([one])
        features = torch.cat(model.encode(batch))
        compressed = model.compression(features[1:])
        former = model.adapter.query_former(features[:1])
        parts = {"vision": features, "vision_stride8": features[:, ::8], "post_qformer": compressed,
                 "post_qformer_stride4": compressed[:, ::4], "expert0": model.adapter.mlp(features[0]),
                 "expert1": model.adapter.mlp(former)[0], "local_projected": model.adapter.mlp(compressed)}
        for key in parts.keys() & tensors.keys():
            close(parts[key], tensors[key], 5e-5, f"{name}: {key}")
        assert {"vision_stride8", "post_qformer_stride4"} <= tensors.keys()
        visual = model.see(batch, gamma=1.0)
        close(visual.gates[0], tensors["gates"], 2e-6, f"{name}: gates")
        # The sums tell the 1e-6 that they are divided by too much; over all tokens rounding averages out.
        sums = [gates.double().sum(1).mean() for gates in (visual.gates[0], tensors["gates"])]
        assert abs(sums[0] - sums[1]) < 2e-7, f"{name}: sum of the gates"
        close(visual.whole[0], tensors["global_features"], 5e-5, f"{name}: global")
        close(visual.local[0], tensors["local_spatial"], 5e-5, f"{name}: local")
        (text,) = router_text(model, batch)
        assert torch.equal(text, tensors["text_embedding"][tensors["text_mask"].bool()]), f"{name}: text of the router"
        similarity = scores(model, batch, visual, 0)
        close(similarity, tensors["similarity"], 2e-5, f"{name}: similarity")
        close((similarity / model.config.router_temperature).softmax(0), tensors["probs"], 1e-6, f"{name}: probs")
        for gamma, run in record["runs"].items():
            visual = model.see(batch, gamma=float(gamma))
            key = f"topp{gamma}"
            assert torch.equal(visual.keep[0].nonzero()[:, 0], tensors[f"{key}/indices"]), f"{name} {gamma}: indices"
            (embeddings,), (logits,), _ = hidden_and_logits(model, batch, visual)
            if f"{key}/inputs_embeds" in tensors:
                close(embeddings, tensors[f"{key}/inputs_embeds"], 5e-5, f"{name} {gamma}: embeddings")
            close(logits[::8], tensors[f"{key}/logits_stride8"], 2e-4, f"{name} {gamma}: logits")
            close(logits[-64:], tensors[f"{key}/logits_tail64"], 2e-4, f"{name} {gamma}: last logits")
            answer = list(model.generate(one, gamma=float(gamma), max_new_tokens=len(run["generated_ids"])))
            assert answer == run["generated_ids"] == tensors[f"{key}/generated_ids"].tolist(), f"{name} {gamma}: answer"
            said = model.llm.get_input_embeddings()(torch.tensor(answer[:-1]))
            hidden = model.decode(torch.cat([embeddings, said]), [len(embeddings) + len(said)])
            logits = model.llm.get_output_embeddings()(hidden[-len(answer):])
            close(logits, tensors[f"{key}/generated_scores"], 2e-4, f"{name} {gamma}: scores")


@pytest.mark.reference
def test_answers_to_all_prompts_at_once():
    model, folder, meta = recorded()
    records = meta["examples"]
    samples = []
    for name, record in records.items():
        ids = load_file(folder / f"{name}.safetensors")["input_ids"].tolist()
        samples.append(sample(model, ids, [IGNORE] * len(ids), record["image"]))
    for gamma in set.intersection(*(set(record["runs"]) for record in records.values())):
        expected = [record["runs"][gamma]["generated_ids"] for record in records.values()]
        assert model.generate_batch(samples, gamma=float(gamma), max_new_tokens=len(expected[0])) == expected, gamma


def recorded_batch(model, folder, meta, **noise):
    tensors = load_file(folder / "batch.safetensors")
    rows = zip(tensors["input_ids"], tensors["labels"], tensors["attention_mask"].bool(), meta["batch"]["images"])
    samples = [sample(model, ids[mask].tolist(), labels[mask].tolist(), image) for ids, labels, mask, image in rows]
    return Batch.pack([replace(one, **{name: draws[row] for name, draws in noise.items()})
                       for row, one in enumerate(samples)]), tensors


def compare_rows(tensors, prefix, embeddings, labels, visual):
    """Merged embeddings, labels, lengths and the router's choice of each row, wherever they were recorded."""
    for row, mask in enumerate(tensors[f"{prefix}/out_attention_mask"].bool()):
        assert mask.sum() == len(embeddings[row]), f"{prefix} {row}: length"
        assert torch.equal(labels[row], tensors[f"{prefix}/out_labels"][row][mask]), f"{prefix} {row}: labels"
        for stride, key in ((1, f"{prefix}/inputs_embeds"), (4, f"{prefix}/inputs_embeds_stride4")):
            if key in tensors:
                close(embeddings[row][::stride], tensors[key][row][mask[::stride]], 5e-5, f"{key} {row}")
        if f"{prefix}/indices{row}" in tensors:
            assert torch.equal(visual.keep[row].nonzero()[:, 0], tensors[f"{prefix}/indices{row}"]), f"{prefix} {row}: indices"


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
            close(scores(model, batch, visual, row), tensors[f"similarity{row}"], 2e-5, f"row {row}: similarity")
        embeddings, logits, labels = hidden_and_logits(model, batch, visual)
        assert [len(row) for row in embeddings] == run["seq_lens"]
        compare_rows(tensors, f"topp{gamma}", embeddings, labels, visual)
        for row, expected in enumerate(tensors[f"topp{gamma}/logits_stride8"]):
            close(logits[row][::8], expected[:len(logits[row][::8])], 2e-4, f"row {row}: logits")
        loss = model(batch, visual=visual).loss
        assert loss.item() == pytest.approx(tensors[f"topp{gamma}/loss"].item(), abs=2e-5)


@pytest.mark.reference
@pytest.mark.parametrize("stage", ["1a", "1b", "2", "3"])
def test_training_stages(stage):
    """Losses, the router's choice under recorded noise, merged embeddings, all gradient norms, recorded gradients."""
    model, folder, meta = recorded()
    train, record = load_file(folder / "train.safetensors"), meta["stages"][stage]
    flags = record["flags"]
    parts = "global" if flags["use_global_only"] else "local" if flags["use_local_only"] else "both"
    draws = [train[f"stage{stage}/noise{i}"] for i in range(len(record["randn_like_shapes"]))]
    noise = {"gate_noise": [draw[None] for draw in draws if draw.dim() == 2], "router_noise": [d for d in draws if d.dim() == 1]}
    batch, _ = recorded_batch(model, folder, meta, **{name: draws for name, draws in noise.items() if draws})
    try:
        model.adapter.expert = None if flags["mm_learnable_gated"] < 0 else flags["mm_learnable_gated"]
        model.train()
        model.requires_grad_(True)
        model.vision.requires_grad_(False)
        visual = model.see(batch, parts=parts, gamma=flags["golden_topp"])
        output = model(batch, parts=parts, visual=visual)
        output.loss.backward()
        gradients = official.packed({name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                                             for name, parameter in model.named_parameters()})
    finally:
        model.adapter.expert = None
        model.zero_grad()
        model.eval()
    assert output.loss.item() == pytest.approx(train[f"stage{stage}/loss"].item(), abs=2e-5)
    embeddings, _, labels = hidden_and_logits(model, batch, visual)
    compare_rows(train, f"stage{stage}", embeddings, labels, visual)
    assert record["grad_norms"]
    for name, norm in record["grad_norms"].items():
        assert gradients[name].norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-7), name
    for name in record["no_grad_although_trainable"]:
        assert name.endswith("pos_embed") or not gradients[name].any(), name  # positions are no parameter here
    for key, expected in train.items():
        if key.startswith(f"stage{stage}/grad/"):
            close(gradients[key.removeprefix(f"stage{stage}/grad/")], expected, 1e-5, key)


# --- files ---

@pytest.fixture
def released(model, tmp_path):
    """The tiny preset under the released names, with the released code's behaviour."""
    torch.nn.init.normal_(model.adapter.w_noise)
    model.config = replace(model.config, slicing="official", global_view="squash", router_score="sum", router_text="all",
                           gate_noise="w_gate", gate_epsilon=1e-6, gamma=0.95)
    official.export(model, tmp_path / "released")
    return tmp_path / "released"


def equal(model, other):
    ours, theirs = model.tensors(), other.tensors()
    assert set(ours) == set(theirs)
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in {**config, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def test_round_trip_is_bit_identical(model, released):
    again = SliME.from_pretrained(released)
    assert again.config == model.config and equal(model, again)
    again.save_pretrained(released.parent / "ours")
    assert equal(SliME.from_pretrained(released.parent / "ours"), model)


@pytest.mark.reference
def test_export_of_a_released_model_gives_its_names(tmp_path):
    model, folder, _ = recorded()
    official.export(model, tmp_path)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    layers = model.config.vision_config["num_hidden_layers"]
    behind = ["post_layernorm"]  # the tower is not even built that far
    behind += [f"encoder.layers.{i}." for i in range(layers + 1 + model.config.vision_layer, layers)]
    assert {name for name in set(before) ^ set(after) if not any(part in name for part in behind)} == set()
    for name, tensor in after.items():
        if name not in official.UNUSED:
            assert torch.equal(before[name].float(), tensor), name
    assert equal(SliME.from_pretrained(tmp_path), model)


def test_settings_without_our_own(released):
    """From the released code's fields alone: the same behaviour."""
    with_ours = SliME.from_pretrained(released)
    edit(released, sliming=None, mm_vision_select_layer=-1)
    config = SliME.from_pretrained(released).config
    for name in ("slicing", "global_view", "router_score", "router_text", "gate_noise", "gate_epsilon", "gamma", "num_queries",
                 "expert", "router_temperature"):
        assert getattr(config, name) == getattr(with_ours.config, name), name
    assert config.template == "vicuna_v1"


def test_sharded_and_pickled_files(model, released):
    weights = load_file(released / "model.safetensors")
    (released / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, part in shards.items():
        torch.save({name: weights[name] for name in part}, released / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (released / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert equal(model, SliME.from_pretrained(released))
    (released / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match="pytorch_model-00002-of-00002.bin: unreadable weights"):
        SliME.from_pretrained(released)


def test_nothing_but_tensors_is_unpickled(released):
    (released / "model.safetensors").unlink()
    for content in ({"model.norm.weight": CheckpointError("code")}, torch.zeros(1), {"model.norm.weight": 1}):
        torch.save(content, released / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match="unreadable weights"):
            SliME.from_pretrained(released)


def test_the_tower_comes_from_where_the_config_says(model, released):
    weights = load_file(released / "model.safetensors")
    save_file({name: tensor for name, tensor in weights.items() if "vision_tower" not in name},
              released / "model.safetensors", {"format": "pt"})
    edit(released, sliming={**json.loads((released / "config.json").read_text())["sliming"], "vision": "tiny"})
    assert equal(model, SliME.from_pretrained(released))
    one = next(name for name in weights if "vision_tower" in name)
    save_file({name: tensor for name, tensor in weights.items() if name != one}, released / "model.safetensors",
              {"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks 1 tensors: model.vision_tower.vision_tower.vision_model."):
        SliME.from_pretrained(released)


def lora_folder(model, released, tmp_path):
    """Adapters on q and down projections, everything of ours in non_lora_trainables.bin, on a base folder of the LLM."""
    weights = load_file(released / "model.safetensors")
    base, lora = tmp_path / "base", tmp_path / "lora"
    base.mkdir()
    lora.mkdir()
    save_file({name: tensor for name, tensor in weights.items()
               if name.startswith(("model.layers", "model.norm", "model.embed", "lm_head"))}, base / "model.safetensors",
              {"format": "pt"})
    model.processor.tokenizer.save_pretrained(base)
    torch.manual_seed(1)
    adapters, expected = {}, dict(weights)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"):
        out, into = weights[f"{name}.weight"].shape
        down, up = torch.randn(4, into), torch.randn(out, 4)
        adapters |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
        expected[f"{name}.weight"] = weights[f"{name}.weight"] + 8 / 4 * (up @ down)
    save_file(adapters, lora / "adapter_model.safetensors", {"format": "pt"})
    ours = {f"base_model.model.{name}": tensor for name, tensor in weights.items()
            if name.startswith(("model.mm_projector", "model.sampler")) and not name.endswith("pos_embed")}
    torch.save(ours, lora / "non_lora_trainables.bin")
    (lora / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, "base_model_name_or_path": str(base)}))
    shutil.copy(released / "config.json", lora)
    edit(lora, sliming={**json.loads((lora / "config.json").read_text())["sliming"], "vision": "tiny"})
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
    for name, message in ((None, "names no base model"), ("nobody/nothing", "neither a folder nor to be had from the hub")):
        (lora / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, "base_model_name_or_path": name}))
        with pytest.raises(CheckpointError, match=message):
            SliME.from_pretrained(lora)
    (lora / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, "use_dora": True,
                                                          "base_model_name_or_path": str(tmp_path / "base")}))
    with pytest.raises(CheckpointError, match="only plain LoRA"):
        SliME.from_pretrained(lora)


def test_stage_files(model, released, tmp_path):
    weights = load_file(released / "model.safetensors")
    torch.save({name: t for name, t in weights.items() if "mm_projector" in name and not name.endswith((".mean", ".std"))},
               tmp_path / "mm_projector.bin")
    torch.save({name: t for name, t in weights.items() if "sampler" in name}, tmp_path / "sampler.bin")
    fresh = SliME.from_backbones(model.config)
    assert not equal(fresh, model)
    official.fill_stage_files(fresh, tmp_path)
    assert equal(fresh, model)
    torch.save({"model.sampler.odd": torch.zeros(1)}, tmp_path / "sampler.bin")
    with pytest.raises(CheckpointError, match="sampler.bin: the checkpoint has unknown 1 tensors: model.sampler.odd"):
        official.fill_stage_files(fresh, tmp_path)
    with pytest.raises(CheckpointError, match="no mm_projector.bin"):
        official.fill_stage_files(fresh, released)


def test_unknown_and_missing_tensors_are_named(released):
    weights = load_file(released / "model.safetensors")
    save_file({**weights, "model.new_thing.weight": torch.zeros(1)}, released / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="has unknown 1 tensors: model.new_thing.weight"):
        SliME.from_pretrained(released)
    save_file({name: t for name, t in weights.items() if not name.endswith("ln_post.bias")}, released / "model.safetensors",
              {"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks 2 tensors: model.mm_projector.attn.ln_post.bias, "
                                              "model.sampler.post_qformer.ln_post.bias"):
        SliME.from_pretrained(released)
    save_file({**weights, "model.norm.weight": torch.zeros(3)}, released / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model.norm.weight has shape \[3\], the config asks for \[128\]"):
        SliME.from_pretrained(released)


def test_a_truncated_file(released):
    path = released / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="model.safetensors: unreadable weights .*download the file again"):
        SliME.from_pretrained(released)


@pytest.mark.parametrize("change, message", [
    ({"mm_resampler_type": "perceiver"}, "mm_resampler_type is 'perceiver'; the released models have 'cosine'"),
    ({"mm_projector_type": "mlp2x_gelu"}, "mm_projector_type is 'mlp2x_gelu'"),
    ({"use_local_only": True}, "use_local_only is True; the released models have False"),
    ({"mm_resampler_dim": None}, "lacks mm_resampler_dim"),
    ({"mm_vision_tower": "/data/clip"}, "names the vision tower /data/clip, which is neither a folder nor to be had")])
def test_other_configs_are_refused(released, change, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    edit(released, sliming=None, **change)
    with pytest.raises(CheckpointError, match=message):
        SliME.from_pretrained(released)


def test_a_folder_that_is_no_checkpoint(released, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such checkpoint folder"):
        SliME.from_pretrained(tmp_path / "nowhere")
    (released / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no weights: neither model.safetensors nor pytorch_model.bin"):
        SliME.from_pretrained(released)
    for text, message in (('{"mm_proj', "config.json: cannot be read as JSON"), ("[]", "holds list, not an object"),
                          ('{"model_type": "llama"}', "not that of a sliming checkpoint")):
        (released / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=message) as caught:
            SliME.from_pretrained(released)
        assert "\n" not in str(caught.value)
    (released / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no config.json, so this is no checkpoint"):
        SliME.from_pretrained(released)


def test_the_hub_is_asked_for_weights_once(tmp_path, monkeypatch):
    """As safetensors where there are any; a LoRA's other weights are .bin in any case."""
    asked = []

    def snapshot_download(name, allow_patterns, **_):
        asked.append("*.bin" in allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("sliming.checkpoints.files.snapshot_download", snapshot_download)
    for file, with_bin in (("config.json", True), ("model.safetensors", False), ("adapter_config.json", True)):
        (tmp_path / file).write_text("")
        asked.clear()
        assert download("someone/something") == tmp_path and any(asked) is with_bin, file


def test_the_hub_cannot_be_reached(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("sliming.checkpoints.files.snapshot_download", lambda *_, **__: (_ for _ in ()).throw(OSError("no\nnet")))
    with pytest.raises(FileNotFoundError, match="someone/something: neither a folder nor to be had from the hub [(]no[)]"):
        SliME.from_pretrained("someone/something")


def test_a_checkpoint_is_not_written_over(model, released):
    before = (released / "config.json").read_text()
    with pytest.raises(CheckpointError, match="holds a checkpoint already"):
        official.export(model, released)
    assert (released / "config.json").read_text() == before


def test_adapters_may_stay_in_float32(released):
    model = SliME.from_pretrained(released, dtype=torch.bfloat16, float32=("adapter", "compression"))
    exact = SliME.from_pretrained(released)
    assert model.llm.dtype == torch.bfloat16
    for part in ("adapter", "compression"):
        for ours, theirs in zip(getattr(model, part).parameters(), getattr(exact, part).parameters()):
            assert torch.equal(ours, theirs)


@pytest.mark.reference
def test_ids_alone_need_no_tokenizer():
    model, _, _ = recorded()
    assert model.processor.tokenizer is None and IMAGE_TOKEN < 0
    with pytest.raises(ValueError, match="came without tokenizer files"):
        model.processor.prompt([{"from": "human", "value": "hello"}], [])
