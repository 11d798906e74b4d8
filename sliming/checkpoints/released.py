"""The paper's released checkpoints: read as they are, written back under their names.

Names, shapes and settings are those of the released code (yfzhang114/SliME, llava/model:
llava_arch.py, multimodal_projector/builder.py, multimodal_resampler/sampler.py). Whatever it does
unlike the paper is a field of SliMEConfig, set here in `settings`; nothing else in the package
knows which kind of checkpoint it runs.

Three kinds of files are read, as safetensors or as PyTorch's .bin (tensors only):
  a whole model        config.json, model*.safetensors or pytorch_model*.bin, with or without the
                       vision tower's weights
  a LoRA model         adapter_config.json and adapter_model.* on a base language model,
                       non_lora_trainables.bin
  stages I and II      mm_projector.bin and sampler.bin, in `fill_stage_files`

Legend: D vision width, Nq queries.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig

from sliming.checkpoints import files, pretrained
from sliming.checkpoints.files import (
    Checkpoint,
    CheckpointError,
    Tensors,
    checked,
    read_file,
    read_json,
    read_tokenizer,
    reading,
)
from sliming.config import SliMEConfig
from sliming.guard import naming
from sliming.qformer import sincos_2d
from sliming.records import inside

# Released name -> ours; a name that ends in a dot stands for everything below it.
NAMES = {
    "model.mm_projector.w_gate": "adapter.w_gate",
    "model.mm_projector.w_noise": "adapter.w_noise",
    "model.mm_projector.projection.": "adapter.mlp.",
    "model.mm_projector.attn.": "adapter.query_former.",
    "model.sampler.post_qformer.": "compression.",
    "model.vision_tower.vision_tower.vision_model.": "vision.clip.",
    "lm_head.": "llm.lm_head.",
    "model.": "llm.model.",
}
FORMER = {"pos_embed": "position", "query": "query"}
for part in ("weight", "bias"):
    FORMER[f"attn.out_proj.{part}"] = f"w_o.{part}"
    FORMER |= {f"ln_{which}.{part}": f"ln_{which}.{part}" for which in ("q", "kv", "post")}
UNUSED = ("model.mm_projector.mean", "model.mm_projector.std")  # buffers that no computation reads


def is_released(folder: Path) -> bool:
    """True if a folder's config.json is one of the released code's, not one of this package's."""
    raw = read_json(folder / "config.json")
    return raw.get("format") != "sliming" and any(
        key.startswith(("mm_projector", "mm_resampler")) for key in raw)


# ----------------------------------------------------------------------------------------- settings


# What the released models are; a config may leave a setting out, but not give it another value.
SETTLED = {"mm_projector_type": ("gated",), "mm_resampler_type": ("cosine",),
           "mm_patch_merge_type": ("spatial",), "image_aspect_ratio": ("anyres",),
           "mm_vision_select_feature": ("patch",), "mm_learnable_gated": (-1, 0, 1),
           "use_global_only": (False,), "use_local_only": (False,),
           "mm_use_im_start_end": (False,), "mm_use_im_patch_token": (False,)}
NEEDED = ("mm_vision_tower", "mm_vision_select_layer", "mm_resampler_dim", "mm_resampler_topp")
HUB = "which is neither a folder nor to be had from the hub: download it and set"


def settings(raw: dict, folder: Path) -> SliMEConfig:
    """The released code's behaviour; CheckpointError, with the field, for what it never had."""
    for key, known in SETTLED.items():
        if raw.get(key, known[0]) not in known:
            raise CheckpointError(f"{folder}/config.json: {key} is {raw[key]!r}; the released "
                                  f"models have {' or '.join(map(repr, known))}, nothing else can "
                                  "be read")
    if missing := [key for key in NEEDED if key not in raw]:
        raise CheckpointError(f"{folder}/config.json lacks {', '.join(missing)}: "
                              "is it a SliME checkpoint?")
    tower, inside = raw["mm_vision_tower"], folder / raw["mm_vision_tower"]
    try:
        tower_config = CLIPVisionConfig.from_pretrained(inside if inside.is_dir() else tower)
    except OSError as error:
        raise no_tower(folder, tower) from error
    llm = {key: raw[key] for key in LlamaConfig().to_dict()
           if key in raw and key not in ("model_type", "architectures")}
    llm |= {key: raw[key] for key in ("rope_theta", "rope_scaling") if raw.get(key) is not None}
    llm = LlamaConfig(**llm)
    expert = raw.get("mm_learnable_gated", -1)
    return SliMEConfig(
        vision=tower, llm=raw.get("_name_or_path", ""), vision_layer=raw["mm_vision_select_layer"],
        num_queries=raw["mm_resampler_dim"], gamma=raw["mm_resampler_topp"], slicing="official",
        global_view="squash", router_score="sum", router_text="all", gate_noise="w_gate",
        router_temperature=raw.get("mm_resampler_temp", 1.0), gate_epsilon=1e-6,
        expert=None if expert < 0 else expert,
        separator_id=raw.get("seperator", 1919),  # [sic]; the released default, Vicuna's ","
        template="llama3" if llm.vocab_size >= 128_000 else "vicuna_v1",
        vision_config=json.loads(tower_config.to_json_string()),
        llm_config=json.loads(llm.to_json_string()))


def no_tower(folder: Path, tower: str) -> CheckpointError:
    """For a vision tower that cannot be had."""
    return CheckpointError(f"{folder}/config.json names the vision tower {tower}, {HUB} "
                           "mm_vision_tower")


# ------------------------------------------------------------------------------------------ reading


def read_any(folder: Path) -> Checkpoint:
    """A checkpoint, the released code's or ours."""
    return read(folder) if is_released(folder) else files.read(folder)


def read(folder: Path) -> Checkpoint:
    """A released checkpoint. CheckpointError, with the released name or field, for what is none."""
    raw = read_json(folder / "config.json")
    with reading(folder / "config.json"):
        config = files.checked_settings(
            SliMEConfig(**raw["sliming"]) if "sliming" in raw else settings(raw, folder))
    if (folder / "adapter_config.json").is_file():
        adapter = read_json(folder / "adapter_config.json")
        words = base_folder(folder, adapter.get("base_model_name_or_path"))
        tensors = lora_tensors(folder, words)
    else:
        words, tensors = folder, files.read_weights(folder, "model")
    places = [place for place in (folder, words) if (place / "tokenizer_config.json").is_file()]
    # Without tokenizer files the model takes and gives token ids.
    tokenizer = read_tokenizer(places[0]) if places else None
    return Checkpoint(folder, config, tokenizer, completed(folder, config, tensors), released_names)


def completed(folder: Path, config: SliMEConfig, tensors: Tensors) -> Tensors:
    """The stream under our names, with what the released code leaves out of a checkpoint."""
    seen, vision = set(), CLIPVisionConfig.from_dict(config.vision_config)
    used = vision.num_hidden_layers + 1 + config.vision_layer
    for name, tensor in tensors:
        for ours, part in translate(name, tensor):
            seen.add(ours)
            layer = ours.removeprefix("vision.clip.encoder.layers.").partition(".")[0]
            unused = layer.isdecimal() and int(layer) >= used  # behind the layer that is used
            if not unused and not ours.startswith("vision.clip.post_layernorm."):
                yield ours, part
    # A LoRA checkpoint holds what was trained. Fixed positions are computed, in float16.
    for name, side in (("adapter.query_former.position", vision.image_size // vision.patch_size),
                       ("compression.position", int(config.num_queries**0.5))):
        if name not in seen and (folder / "adapter_config.json").is_file():
            yield name, sincos_2d(vision.hidden_size, side).half()
    if not any(name.startswith("vision.clip.") for name in seen):  # it was not trained
        try:
            tower = folder / config.vision
            tower = tower if tower.is_dir() else pretrained.place(config.vision, "vision")
            for name, tensor in pretrained.tower_tensors(tower, used):
                yield f"vision.clip.{name}", tensor
        except OSError as error:
            raise no_tower(folder, config.vision) from error


def translate(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """A released tensor under our names: three for a packed projection, none for an unused one.
    A name without meaning stays as it is, for `fill` to complain of."""
    if name in UNUSED or name.endswith("rotary_emb.inv_freq"):
        return []
    prefix = next((prefix for prefix in NAMES
                   if name == prefix or prefix.endswith(".") and name.startswith(prefix)), None)
    if prefix is None:
        return [(name, tensor)]
    ours, rest = NAMES[prefix], name[len(prefix):]
    if ours in ("adapter.query_former.", "compression."):
        if rest.startswith("attn.in_proj_"):                                # [3 D, D] or [3 D]
            part = rest.removeprefix("attn.in_proj_")
            return [(f"{ours}w_{which}.{part}", piece)
                    for which, piece in zip("qkv", tensor.chunk(3), strict=True)]
        return [(ours + FORMER[rest] if rest in FORMER else name, tensor)]
    return [(ours + rest, tensor)]


def lora_tensors(folder: Path, base: Path) -> Tensors:
    """A base language model's tensors, those trained in full instead, and the adapters added."""
    trained = {name.removeprefix("base_model.").removeprefix("model.")
               if name.startswith("base_model.") else name: tensor
               for name, tensor in read_file(folder / "non_lora_trainables.bin")}

    def both() -> Tensors:
        yield from (item for item in files.read_weights(base, "model") if item[0] not in trained)
        yield from trained.items()

    return files.with_lora(both(), folder)


def base_folder(folder: Path, name: str | None) -> Path:
    """Where a LoRA checkpoint's base language model lies; CheckpointError where there is none."""
    if not name:
        raise CheckpointError(f"{folder} holds LoRA adapters and adapter_config.json names no base "
                              "model: add its base_model_name_or_path")
    try:
        return checked(Path(name) if Path(name).is_dir() else files.download(name))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} holds LoRA adapters for {name}, {HUB} "
                              "base_model_name_or_path in adapter_config.json") from error


def fill_stage_files(model: nn.Module, folder: Path) -> None:
    """Fills adapter and compression from a stage folder: mm_projector.bin, sampler.bin if there.
    CheckpointError where a file holds something else."""
    for file, part in (("mm_projector.bin", "adapter."), ("sampler.bin", "compression.")):
        if not (folder / file).is_file():
            if file == "mm_projector.bin":
                raise CheckpointError(f"{folder} has no mm_projector.bin: is it a stage folder of "
                                      "the released code?")
            continue
        own = {name: tensor for name, tensor in model.tensors().items() if name.startswith(part)}
        pieces = (piece for item in read_file(folder / file) for piece in translate(*item))
        # w_noise is never trained by the released code, positions are fixed: both may be left out.
        files.fill(own, pieces, folder / file, released_names,
                   optional=("adapter.w_noise", f"{part}position", f"{part}query_former.position"))


# ----------------------------------------------------------------------------------------- and back


def released_names(ours: list[str]) -> list[str]:
    """Our names -> the released ones, three parts of a packed projection by one."""
    nothing = {name: torch.zeros(0) for name in ours if name.startswith(tuple(NAMES.values()))}
    return [*packed(nothing), *(name for name in ours if name not in nothing)]


def packed(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors (or their gradients) by our names -> by the released names, q, k and v in one."""
    back = sorted(NAMES.items(), key=lambda pair: -len(pair[1]))
    former_back = {our: released for released, our in FORMER.items()}
    out, thirds = {}, {}
    for key, tensor in ours.items():
        released, our = next(pair for pair in back if key.startswith(pair[1]))
        rest = key[len(our):]
        if our in ("adapter.query_former.", "compression."):
            if rest[:4] in ("w_q.", "w_k.", "w_v."):
                thirds.setdefault(f"{released}attn.in_proj_{rest[4:]}", {})[rest[2]] = tensor
                continue
            rest = former_back[rest]
        out[released + rest] = tensor.contiguous()
    return out | {name: torch.cat([parts[q] for q in "qkv"]) for name, parts in thirds.items()}


def export(model: nn.Module, folder: Path) -> None:
    """Writes a model under the released names: config.json, safetensors, tower's config, tokenizer.

    The released code has no fields for the paper's own choices, so our configuration travels along
    in "sliming", for `read`. CheckpointError for a language model that is no Llama, and where the
    folder holds a checkpoint already.
    """
    if (folder / "config.json").exists():
        raise CheckpointError(f"{folder} holds a checkpoint already: choose another folder")
    llm, c = model.llm.config.to_dict(), model.config
    if llm["model_type"] != "llama":
        raise CheckpointError("the released code knows Llama language models only, "
                              f"not {llm['model_type']!r}")
    weights = packed(model.tensors())
    weights |= {name: torch.full((1,), float(name.endswith("std"))) for name in UNUSED}
    moved = c.vision == "tiny" or Path(c.vision).is_absolute()
    tower = f"vision/{Path(c.vision).name}" if moved else c.vision
    config = {
        **llm, "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava_llama",
        "mm_vision_tower": tower, "mm_hidden_size": model.vision.clip.config.hidden_size,
        "mm_vision_select_layer": c.vision_layer, "mm_vision_select_feature": "patch",
        "mm_projector_type": "gated", "mm_resampler_type": "cosine",
        "mm_resampler_dim": c.num_queries, "mm_resampler_topp": c.gamma,
        "mm_resampler_temp": c.router_temperature,
        "mm_learnable_gated": -1 if c.expert is None else c.expert,
        "mm_patch_merge_type": "spatial", "image_aspect_ratio": "anyres",
        "seperator": model.processor.separator_id, "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": 2048, "use_mm_proj": True, "use_global_only": False,
        "use_local_only": False, "rope_theta": llm["rope_parameters"]["rope_theta"],
        "sliming": asdict(c)}
    vision = {**c.vision_config, "model_type": "clip_vision_model"}
    inside(folder, tower).mkdir(parents=True, exist_ok=True)
    files.save_tensors(folder, weights, {name: part.dtype for name, part in weights.items()})
    for place, content in ((folder, config), (folder / tower, vision)):
        with naming(place / "config.json"):
            (place / "config.json").write_text(json.dumps(content, indent=2) + "\n")
    files.save_tokenizer(model.processor.tokenizer, folder)
