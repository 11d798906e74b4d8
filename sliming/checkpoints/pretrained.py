"""The pretrained parts as they are published: a CLIP tower and a causal language model.

From a folder or a hub id in transformers' format, or "tiny" for the stand-ins that ship with the
package. Read as streams of tensors, like a checkpoint (files.py): in training every rank takes its
own rows of each, and no process ever holds a whole model.
"""

import json
from dataclasses import replace
from pathlib import Path

from transformers import AutoConfig, CLIPVisionConfig, GenerationConfig

from sliming.backbones import TINY
from sliming.checkpoints import files
from sliming.checkpoints.files import (
    Checkpoint,
    CheckpointError,
    Tensors,
    checked,
    read_tokenizer,
    read_weights,
    reading,
)
from sliming.config import SliMEConfig


def read(config: SliMEConfig) -> Checkpoint:
    """The two backbones of a new model; what lies between them is not in the stream. The tower is
    cut to the layer that is used. CheckpointError, OSError for what cannot be had."""
    tower, words = place(config.vision, "vision"), place(config.llm, "llm")
    with reading(tower / "config.json"):
        vision = cut(CLIPVisionConfig.from_pretrained(tower), config.vision_layer)
        files.check_sizes(vision)
    with reading(words / "config.json"):
        llm = AutoConfig.from_pretrained(words, trust_remote_code=False)
        files.check_sizes(llm)
        if (words / "generation_config.json").is_file():  # it may name more ends of an answer
            llm.eos_token_id = GenerationConfig.from_pretrained(words).eos_token_id
    tokenizer = read_tokenizer(words)
    config = replace(config, vision_layer=-1, vision_config=json.loads(vision.to_json_string()),
                     llm_config=json.loads(llm.to_json_string()))

    def tensors() -> Tensors:
        yield from ((f"vision.clip.{name}", part) for name, part in
                    tower_tensors(tower, vision.num_hidden_layers))
        for name, part in read_weights(words, "model"):
            if not (llm.tie_word_embeddings and name == "lm_head.weight"):
                yield f"llm.{name}", part

    return Checkpoint(words, config, tokenizer, tensors(), optional=("adapter.", "compression."))


def place(name: str, tiny: str) -> Path:
    """The folder of a backbone."""
    if name == "tiny":
        return TINY / tiny
    return checked(Path(name) if Path(name).is_dir() else files.download(name))


def cut(config: CLIPVisionConfig, layer: int) -> CLIPVisionConfig:
    """The settings of a tower that ends with hidden state `layer`, counted as transformers does: -2
    is the output of the last layer but one, -1 that of the last."""
    used = config.num_hidden_layers + 1 + layer
    if layer >= 0 or used < 1:
        raise CheckpointError(f"vision_layer must be -1 .. -{config.num_hidden_layers}, "
                              f"got {layer}")
    return CLIPVisionConfig.from_dict({**config.to_dict(), "num_hidden_layers": used})


def tower_tensors(folder: Path, layers: int) -> Tensors:
    """The vision half of a CLIP model, its first `layers` layers."""
    unused = ("text_", "visual_projection", "logit_scale", "post_layernorm",
              "embeddings.position_ids")
    for name, tensor in read_weights(folder, "model"):
        name = name.removeprefix("vision_model.")
        layer = name.removeprefix("encoder.layers.").partition(".")[0]
        if not name.startswith(unused) and not (layer.isdecimal() and int(layer) >= layers):
            yield name, tensor
