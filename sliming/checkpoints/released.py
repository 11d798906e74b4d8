"""The paper's released checkpoints: read as they are, written back under their names.

    model = SliME.from_pretrained("yifanzhang114/SliME-Llama3-8B")       recognised by its config.json
    python -m sliming.official --export out/stage3 FOLDER                our checkpoint under the released names

Names, shapes and settings are those of the released code (yfzhang114/SliME, llava/model: llava_arch.py,
multimodal_projector/builder.py, multimodal_resampler/sampler.py). Whatever it does unlike the paper is a field of
SliMEConfig, set here in `settings`; nothing else in the package knows which kind of checkpoint it runs.

Three kinds of files are read, as safetensors or as PyTorch's .bin (tensors only, nothing else is unpickled):
  a whole model        config.json, model*.safetensors or pytorch_model*.bin, with or without the vision tower's weights
  a LoRA model         adapter_config.json and adapter_model.* on a base language model, non_lora_trainables.bin
  stages I and II      mm_projector.bin and sampler.bin, in `load_stage_files`

Legend: D vision width, H width of the language model, r rank of a LoRA, Nq queries, L patches.
"""

import argparse
import json
import pickle
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoTokenizer, CLIPVisionConfig, LlamaConfig

from sliming.backbones import VisionTower, build_llm, load_vision
from sliming.checkpoints.states import with_adapters
from sliming.model import CheckpointError, SliME, SliMEConfig, download, read_json
from sliming.qformer import sincos_2d

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
FORMER = {"pos_embed": "position", "query": "query", "attn.out_proj.weight": "w_o.weight", "attn.out_proj.bias": "w_o.bias",
          **{f"ln_{which}.{part}": f"ln_{which}.{part}" for which in ("q", "kv", "post") for part in ("weight", "bias")}}
UNUSED = ("model.mm_projector.mean", "model.mm_projector.std")  # buffers that no computation reads


def is_released(raw: dict) -> bool:
    """True if a config.json is one of the released code's, not one of this package's."""
    return raw.get("format") != "sliming" and any(key.startswith(("mm_projector", "mm_resampler")) for key in raw)


# -------------------------------------------------------------------------------------------------------------- the config


# What the released models are; a config may leave a setting out, but not give it another value.
SETTLED = {"mm_projector_type": ("gated",), "mm_resampler_type": ("cosine",), "mm_patch_merge_type": ("spatial",),
           "image_aspect_ratio": ("anyres",), "mm_vision_select_feature": ("patch",), "mm_learnable_gated": (-1, 0, 1),
           "use_global_only": (False,), "use_local_only": (False,), "mm_use_im_start_end": (False,),
           "mm_use_im_patch_token": (False,)}


def settings(raw: dict, folder: Path) -> SliMEConfig:
    """The released code's behaviour as a SliMEConfig. CheckpointError, with the field, for what it never shipped with."""
    for key, known in SETTLED.items():
        if raw.get(key, known[0]) not in known:
            raise CheckpointError(f"{folder}/config.json: {key} is {raw[key]!r}; the released models have "
                                  f"{' or '.join(map(repr, known))}, nothing else can be read")
    missing = [key for key in ("mm_vision_tower", "mm_vision_select_layer", "mm_resampler_dim", "mm_resampler_topp")
               if key not in raw]
    if missing:
        raise CheckpointError(f"{folder}/config.json lacks {', '.join(missing)}: is it a SliME checkpoint?")
    tower = raw["mm_vision_tower"]
    try:
        tower_config = CLIPVisionConfig.from_pretrained(folder / tower if (folder / tower).is_dir() else tower)
    except OSError as error:
        raise CheckpointError(no_tower(folder, tower)) from error
    llm_config = {key: raw[key] for key in LlamaConfig().to_dict() if key in raw and key not in ("model_type", "architectures")}
    llm_config |= {key: raw[key] for key in ("rope_theta", "rope_scaling") if raw.get(key) is not None}
    llm_config = LlamaConfig(**llm_config)
    return SliMEConfig(
        vision=tower, llm=raw.get("_name_or_path", ""), vision_layer=raw["mm_vision_select_layer"],
        num_queries=raw["mm_resampler_dim"], gamma=raw["mm_resampler_topp"], slicing="official", global_view="squash",
        router_score="sum", router_temperature=raw.get("mm_resampler_temp", 1.0), router_text="all", gate_noise="w_gate",
        gate_epsilon=1e-6, expert=None if raw.get("mm_learnable_gated", -1) < 0 else raw["mm_learnable_gated"],
        separator_id=raw.get("seperator", 1919),  # [sic]; 1919 is the released code's default, Vicuna's ","
        template="llama3" if llm_config.vocab_size >= 128_000 else "vicuna_v1",
        vision_config=json.loads(tower_config.to_json_string()), llm_config=json.loads(llm_config.to_json_string()))


def no_tower(folder: Path, tower: str) -> str:
    """The message for a vision tower that cannot be had."""
    return (f"{folder}/config.json names the vision tower {tower}, which is neither a folder nor to be had from the hub: "
            "download it and set mm_vision_tower")


# ------------------------------------------------------------------------------------------------------------- the weights


def tensors(folder: Path, stem: str) -> Iterator[tuple[str, Tensor]]:
    """All tensors of `stem`'s file or shards in a folder, one at a time; CheckpointError for a missing or broken file."""
    names = (f"{stem}.safetensors", "pytorch_model.bin" if stem == "model" else f"{stem}.bin")
    for name in names:
        index = folder / f"{name}.index.json"
        if index.is_file():
            for shard in sorted(set(read_json(index)["weight_map"].values())):
                yield from read_file(folder / shard)
            return
        if (folder / name).is_file():
            yield from read_file(folder / name)
            return
    raise CheckpointError(f"{folder} has no weights: neither {' nor '.join(names)} nor shards of them")


def read_file(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one safetensors or .bin file, read as they are asked for."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    yield name, file.get_tensor(name)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if not (isinstance(content, dict) and all(isinstance(tensor, Tensor) for tensor in content.values())):
                raise RuntimeError("it holds something else than tensors by name")
            yield from content.items()
    except (SafetensorError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: unreadable weights ({reason}); copy or download the file again") from error


def translate(name: str, tensor: Tensor) -> list[tuple[str, Tensor]] | None:
    """Our names and tensors for a released one: three for a packed projection, none for what is not used.

    None where the name means nothing here.
    """
    if name in UNUSED or name.endswith("rotary_emb.inv_freq"):
        return []
    prefix = next((prefix for prefix in NAMES if name == prefix or prefix.endswith(".") and name.startswith(prefix)), None)
    if prefix is None:
        return None
    ours, rest = NAMES[prefix], name[len(prefix):]
    if ours in ("adapter.query_former.", "compression."):
        if rest.startswith("attn.in_proj_"):                                          # [3 D, D] or [3 D]: q, k, v
            part = rest.removeprefix("attn.in_proj_")
            return [(f"{ours}w_{which}.{part}", piece) for which, piece in zip("qkv", tensor.chunk(3))]
        return [(ours + FORMER[rest], tensor)] if rest in FORMER else None
    return [(ours + rest, tensor)]


def fill(model: SliME, pieces: Iterator[tuple[str, Tensor]], source: str, optional: tuple[str, ...] = ()) -> set[str]:
    """Copies released tensors into the model and returns our names of those it found.

    Strict: a name without meaning, a wrong shape, or (unless it begins with one of `optional`) a tensor of the model that
    the source lacks, is a CheckpointError. The layers of the vision tower behind the used one are passed over.
    """
    own, found, unknown = model.tensors(), set(), []
    for name, tensor in pieces:
        translated = translate(name, tensor)
        if translated is None or any(key not in own and not key.startswith("vision.clip.") for key, _ in translated):
            unknown.append(name)
            continue
        for key, value in translated:
            if key not in own:
                continue  # of the vision tower: a layer behind the one that is used, or its last LayerNorm
            if own[key].shape != value.shape:
                raise CheckpointError(f"{source}: {name} has shape {list(tensor.shape)}, the config asks for "
                                      f"{list(own[key].shape)}")
            with torch.no_grad():
                own[key].copy_(value)
            found.add(key)
    missing = {key: tensor for key, tensor in own.items() if key not in found and not key.startswith(optional)}
    for what, names in (("has unknown", unknown), ("lacks", list(released_names(missing)))):
        if names:
            some = ", ".join(sorted(names)[:8]) + (" ..." if len(names) > 8 else "")
            raise CheckpointError(f"{source} {what} {len(names)} tensors: {some}")
    return found


def with_lora(folder: Path, base: Path) -> Iterator[tuple[str, Tensor]]:
    """A base language model's tensors with the adapters of `folder` added: W + B A alpha / r, A [r, in], B [out, r].

    Then what was trained beside them (non_lora_trainables.bin).
    """
    adapter = read_json(folder / "adapter_config.json")
    if adapter.get("use_rslora") or adapter.get("use_dora") or adapter.get("rank_pattern") or adapter.get("alpha_pattern"):
        raise CheckpointError(f"{folder}/adapter_config.json: only plain LoRA can be merged, not rsLoRA, DoRA or rank patterns")
    low_rank = {name.removeprefix("base_model.model.").replace(".default.", "."): tensor
                for name, tensor in tensors(folder, "adapter_model")}
    trained = {name.removeprefix("base_model.").removeprefix("model.") if name.startswith("base_model.") else name: tensor
               for name, tensor in read_file(folder / "non_lora_trainables.bin")}

    def merged(name: str, tensor: Tensor) -> tuple[str, Tensor]:
        stem = name.removesuffix(".weight")
        down, up = low_rank.pop(f"{stem}.lora_A.weight", None), low_rank.pop(f"{stem}.lora_B.weight", None)
        if down is not None and up is not None:
            tensor = with_adapters(tensor, down, up, adapter)
        return name, tensor

    for name, tensor in tensors(base, "model"):
        if name not in trained:  # what was trained in full has its later value there
            yield merged(name, tensor)
    for name, tensor in trained.items():
        yield merged(name, tensor)
    yield from low_rank.items()  # left over, with no weight to be added to: they are reported as unknown


def load(folder: Path, dtype: torch.dtype = torch.float32, float32: tuple[str, ...] = ()) -> SliME:
    """A released checkpoint as a SliME; `float32`: submodules that stay in float32 whatever `dtype` is."""
    raw = read_json(folder / "config.json")
    config = SliMEConfig(**raw["sliming"]) if "sliming" in raw else settings(raw, folder)
    lora = (folder / "adapter_config.json").is_file()
    pieces, words = tensors(folder, "model"), folder
    if lora:
        words = base_folder(folder, read_json(folder / "adapter_config.json").get("base_model_name_or_path"))
        pieces = with_lora(folder, words)
    tokenizer = None  # without tokenizer files the model takes and gives token ids
    for place in (folder, words):
        if (place / "tokenizer_config.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(place)
            break
    vision = VisionTower(CLIPVisionConfig.from_dict(config.vision_config), config.vision_layer)
    model = SliME(config, vision, build_llm(config.llm_config, dtype), tokenizer).to(dtype)
    for name in float32:
        getattr(model, name).float()
    # A LoRA checkpoint holds what was trained: fixed positions are computed, as the released code does, in float16.
    for former in (model.adapter.query_former, model.compression):
        former.position.copy_(sincos_2d(former.query.shape[1], former.side).half())
    positions = ("adapter.query_former.position", "compression.position") if lora else ()
    found = fill(model, pieces, str(folder), optional=("vision.clip.", *positions))
    seen = {key for key in found if key.startswith("vision.clip.")}
    wanted = {key for key in model.tensors() if key.startswith("vision.clip.")}
    if not seen:  # the tower was not trained; the config names it
        tower = folder / config.vision
        try:
            tower = load_vision(str(tower) if tower.is_dir() else config.vision, config.vision_layer)
        except OSError as error:
            raise CheckpointError(no_tower(folder, config.vision)) from error
        model.vision.clip.load_state_dict(tower.clip.state_dict())
    elif seen != wanted:
        raise CheckpointError(f"{folder} has only a part of the vision tower; it lacks {', '.join(sorted(wanted - seen)[:8])}")
    return model.eval()


def base_folder(folder: Path, name: str | None) -> Path:
    """Where the base language model of a LoRA checkpoint lies; CheckpointError where there is none."""
    if not name:
        raise CheckpointError(f"{folder} holds LoRA adapters and adapter_config.json names no base model: add its "
                              "base_model_name_or_path")
    if Path(name).is_dir():
        return Path(name)
    try:
        return download(name)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} holds LoRA adapters for {name}, which is neither a folder nor to be had from the "
                              "hub: download it and set base_model_name_or_path in adapter_config.json") from error


def load_stage_files(model: SliME, folder: Path) -> None:
    """Fills adapter and compression from a stage folder of the released code: mm_projector.bin, and sampler.bin if there.

    CheckpointError where a file holds something else.
    """
    for file, part in (("mm_projector.bin", "adapter."), ("sampler.bin", "compression.")):
        if not (folder / file).is_file():
            if file == "mm_projector.bin":
                raise CheckpointError(f"{folder} has no mm_projector.bin: is it a stage folder of the released code?")
            continue
        others = tuple(key for key in model.tensors() if not key.startswith(part))
        # w_noise is never trained by the released code, positions are fixed: both may be left out.
        fill(model, read_file(folder / file), str(folder / file),
             optional=(*others, f"{part}w_noise", f"{part}position", f"{part}query_former.position"))


# --------------------------------------------------------------------------------------------------------------- and back


def released_names(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors (or their gradients) by our names -> by the released names, q, k and v packed into one projection."""
    back = sorted(((our, released) for released, our in NAMES.items()), key=lambda pair: -len(pair[0]))
    former_back = {our: released for released, our in FORMER.items()}
    out, packed = {}, {}
    for key, tensor in ours.items():
        our, released = next((our, released) for our, released in back if key.startswith(our))
        rest = key[len(our):]
        if our in ("adapter.query_former.", "compression."):
            if rest[:4] in ("w_q.", "w_k.", "w_v."):
                packed.setdefault(f"{released}attn.in_proj_{rest[4:]}", {})[rest[2]] = tensor
                continue
            rest = former_back[rest]
        out[released + rest] = tensor.contiguous()
    return out | {name: torch.cat([parts[which] for which in "qkv"]) for name, parts in packed.items()}


def export(model: SliME, folder: Path) -> None:
    """Writes a model under the released names: config.json, safetensors, the tower's config, the tokenizer.

    The released code has no fields for the paper's own choices, so our configuration travels along in "sliming", which
    `load` reads. CheckpointError for a language model that is no Llama, and where the folder holds a checkpoint already.
    """
    if (folder / "config.json").exists():
        raise CheckpointError(f"{folder} holds a checkpoint already: choose another folder")
    llm, c = model.llm.config.to_dict(), model.config
    if llm["model_type"] != "llama":
        raise CheckpointError(f"the released code knows Llama language models only, not {llm['model_type']!r}")
    weights = released_names(model.tensors())
    weights |= {name: torch.full((1,), float(name.endswith("std"))) for name in UNUSED}
    tower = f"vision/{Path(c.vision).name}" if Path(c.vision).is_absolute() or c.vision == "tiny" else c.vision
    config = {**llm, "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava_llama", "mm_vision_tower": tower,
              "mm_hidden_size": model.vision.clip.config.hidden_size, "mm_vision_select_layer": c.vision_layer,
              "mm_vision_select_feature": "patch", "mm_projector_type": "gated", "mm_resampler_type": "cosine",
              "mm_resampler_dim": c.num_queries, "mm_resampler_topp": c.gamma, "mm_resampler_temp": c.router_temperature,
              "mm_learnable_gated": -1 if c.expert is None else c.expert, "mm_patch_merge_type": "spatial",
              "image_aspect_ratio": "anyres", "seperator": model.separator_id, "tokenizer_padding_side": "right",
              "tokenizer_model_max_length": 2048, "use_mm_proj": True, "use_global_only": False, "use_local_only": False,
              "rope_theta": llm["rope_parameters"]["rope_theta"], "sliming": asdict(c)}
    (folder / tower).mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(weights, folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / tower / "config.json").write_text(json.dumps({**c.vision_config, "model_type": "clip_vision_model"}, indent=2)
                                                + "\n")
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sliming.official", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", nargs=2, metavar=("OURS", "FOLDER"), required=True,
                        help="read the checkpoint OURS (a folder or a hub id) and write it to FOLDER under the released names")
    ours, folder = parser.parse_args().export
    try:
        export(SliME.from_pretrained(ours), Path(folder))
    except (ValueError, OSError) as error:
        sys.exit(f"sliming.official: {error}")
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
