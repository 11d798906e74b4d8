"""The two pretrained parts that SliME connects: a vision tower and a causal language model.

Any `CLIPVisionModel` (the paper: CLIP ViT-L/14 at 336 pixels) and any `AutoModelForCausalLM` with a
tokenizer (the paper: Vicuna, Llama 3) is built through transformers; their weights are read in
checkpoints/. For laptops and tests two small stand-ins ship inside the package, tiny/vision and
tiny/llm; tiny/README.md tells what they learned and how.

Legend: V views (global views and crops of a batch), S crop size in pixels, L patches per view, Dv
vision width, T packed tokens, H attention heads, Hkv of keys and values, Dh head size.
"""

from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    DynamicCache,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

TINY = Path(__file__).parent / "tiny"  # the stand-ins: TINY / "vision" and TINY / "llm"

# CLIP's pixel statistics (openai/clip-vit-large-patch14-336, preprocessor_config.json), RGB in 0 ..
# 1.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


class VisionTower(nn.Module):
    """A CLIP vision transformer, frozen, as far as the layer that is used (Sec. 2.1; the last but
    one, as in LLaVA). The final LayerNorm is not even built; the class token is dropped. Without
    weights: its parameters are on the meta device.
    """

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        with no_init_weights(), on_meta():
            self.clip = CLIPVisionModel(config)
            if getattr(config, "conv_stem", False):
                self.clip.embeddings.patch_embedding = ConvStem(config.hidden_size)
        self.clip.post_layernorm = nn.Identity()
        for name, values in (("mean", PIXEL_MEAN), ("std", PIXEL_STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, views: Tensor) -> Tensor:
        """uint8 [V, 3, S, S] -> [V, L, Dv] in the tower's dtype, row-major over the patches."""
        pixels = (views.float() / 255 - self.mean) / self.std
        return self.features(pixels.to(self.clip.dtype))

    def features(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [V, 3, S, S] -> [V, L, Dv]; with gradients, to train a stand-in."""
        return self.clip(pixel_values=pixels).last_hidden_state[:, 1:]


class ConvStem(nn.Module):
    """The tiny tower's patch embedding: strided convolutions to one vector per 8 x 8 patch.

    A linear embedding of this size learns colours but no digits; a few 3 x 3 convolutions read
    them. A CLIP config asks for it by `conv_stem: true`.
    """

    def __init__(self, width: int):
        super().__init__()
        half = width // 2
        self.to_fine = nn.Sequential(nn.Conv2d(3, half // 2, 3, 2, 1), nn.GELU(),
                                     nn.Conv2d(half // 2, half, 3, 2, 1))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(4, half), nn.GELU(), nn.Conv2d(half, half, 3, 1, 1),
                          nn.GELU(), nn.Conv2d(half, half, 3, 1, 1)) for _ in range(2))
        self.to_patch = nn.Sequential(nn.GroupNorm(4, half), nn.GELU(),
                                      nn.Conv2d(half, width, 3, 2, 1))

    @property
    def weight(self) -> Tensor:
        """CLIP asks its patch embedding for the dtype of its weight."""
        return self.to_patch[-1].weight

    def fine(self, pixels: Tensor) -> Tensor:
        """[V, 3, S, S] -> [V, Dv / 2, S / 4, S / 4]: a grid twice as fine as the patches."""
        x = self.to_fine(pixels)
        for block in self.blocks:
            x = x + block(x)
        return x

    def forward(self, pixels: Tensor) -> Tensor:
        """[V, 3, S, S] -> [V, Dv, S / 8, S / 8]."""
        return self.to_patch(self.fine(pixels))


# ----------------------------------------------------------------------------------- language model


def build_llm(config: dict, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A language model of the given transformers configuration (as `to_dict` gives it), without
    weights: its parameters are on the meta device."""
    config = AutoConfig.for_model(**config)
    with no_init_weights(), on_meta():
        llm = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False,
                                               attn_implementation="sliming_packed")
    llm.tie_weights()  # where the configuration ties input and output embedding
    return llm


@contextmanager
def on_meta():
    """What is built inside has its parameters on the meta device, without memory. Buffers are
    real: they are computed, not read."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Parameters to `dtype`, and never buffers: in bfloat16 a rotary frequency is wrong by radians
    at distances of thousands."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module


def packed_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
                     attention_mask: Tensor | None, scaling: float, dropout: float = 0.0,
                     segments: list[int] | None = None, key_segments: list[int] | None = None,
                     sliding_window: int | None = None, **_) -> tuple[Tensor, None]:
    """Causal attention of packed samples: query [1, H, T, Dh], key and value [1, Hkv, T, Dh] ->
    [1, T, H, Dh].

    `segments` are the samples' lengths, sum T. Each attends within itself through one SDPA call:
    sum T_i^2 work and no [T, T] mask, where the usual way of packing (positions that restart, a
    block mask) pays (sum T_i)^2. Without `segments` the row is one sample. Where a cache is
    continued there are more keys than queries: `key_segments[i]` of sample i. The signature is that
    of transformers' AttentionInterface, hence the unused arguments.
    """
    if sliding_window is not None or attention_mask is not None:
        raise ValueError("packed attention is causal over whole samples: it knows no sliding "
                         "window and no other mask")
    grouped = query.shape[1] != key.shape[1]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ahead = k.shape[2] - q.shape[2]  # keys of the cache that every query may see
        mask = None
        if ahead and q.shape[2] > 1:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(ahead)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling, enable_gqa=grouped,
            is_causal=ahead == 0 and q.shape[2] > 1)

    if segments is None:
        return attend(query, key, value).transpose(1, 2), None
    keys = segments if key_segments is None else key_segments
    parts = zip(query.split(segments, 2), key.split(keys, 2), value.split(keys, 2), strict=True)
    return torch.cat([attend(*part).transpose(1, 2) for part in parts], dim=1), None


AttentionInterface.register("sliming_packed", packed_attention)


class PackedCache(DynamicCache):
    """Keys and values of several samples of different lengths, nothing padded.

    Call `extend` before each call of the decoder.
    """

    def __init__(self):
        super().__init__()
        self.new: list[int] = []      # tokens of each sample in the call at hand
        self.lengths: list[int] = []  # and of all of it that is kept, the new ones included: T_i
        self.kept: dict[int, list[list[Tensor]]] = {}  # layer: (keys, values) of [1, Hkv, T_i, Dh]

    def extend(self, new: list[int]) -> tuple[list[int], list[int]]:
        """Announces each sample's number of new tokens; returns its tokens before and after."""
        before = self.lengths or [0] * len(new)
        self.new, self.lengths = new, [old + more for old, more in zip(before, new, strict=True)]
        return before, self.lengths

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_,
               **__) -> tuple[Tensor, Tensor]:
        new = [states.split(self.new, 2) for states in (key_states, value_states)]
        old = self.kept.get(layer_idx)
        if old is not None:
            new = [[torch.cat(pair, 2) for pair in zip(*both, strict=True)]
                   for both in zip(old, new, strict=True)]
        self.kept[layer_idx] = new
        return torch.cat(new[0], 2), torch.cat(new[1], 2)

    def keep(self, samples: list[int]) -> None:
        """Forgets all samples but these."""
        self.lengths = [self.lengths[i] for i in samples]
        self.kept = {layer: [[states[i] for i in samples] for states in both]
                     for layer, both in self.kept.items()}
