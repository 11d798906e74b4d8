"""The two pretrained parts that SliME connects: a vision tower and a causal language model.

Any `CLIPVisionModel` (the paper: CLIP ViT-L/14 at 336 pixels) and any `AutoModelForCausalLM` with a
tokenizer (the paper: Vicuna, Llama 3) is built through transformers; their weights are read in
checkpoints/. For laptops and tests two small stand-ins ship inside the package, tiny/vision and
tiny/llm; tiny/README.md tells what they learned and how.

Legend: V views (global views and crops of a batch), S crop size in pixels, L patches per view, Dv
vision width, T packed tokens, H attention heads, Hkv of keys and values, Dh head size.
"""

from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
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
        with without_cudnn(pixels.device):
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
    weights: its parameters are on the meta device. ValueError for one whose attention is another
    than `packed_attention`."""
    config = AutoConfig.for_model(**config)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    others = {*(getattr(config, "layer_types", None) or ())} - {"full_attention"}
    others |= {name for name in ("sliding_window", "attention_chunk_size", "attn_logit_softcapping")
               if getattr(config, name, None)}
    if not getattr(kind, "_supports_attention_backend", False):
        others.add("an attention of its own")
    if others:
        raise ValueError(f"the language model {config.model_type} has {', '.join(sorted(others))}; "
                         "take one that attends to everything: Llama, Qwen2, Qwen2.5, SmolLM2, "
                         "Mistral from its version 0.2 on")
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


def takes_all_at_once(device: torch.device) -> bool:
    """Whether torch's flash attention for packed rows, of two-byte numbers, runs there."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


class Segments:
    """Where the samples of a packed row begin and end: made once per call of the decoder, for all
    of its layers.

    `lengths`: tokens of each sample in the row, sum T. Where a cache is continued there are more
    keys: `keys[i]` of sample i, the first of its `rooms[i]` rows, this call's tokens the last of
    them. The host keeps its numbers, so that using them waits for no GPU; what the GPU needs of
    them goes there in one copy that nothing waits for.
    """

    def __init__(self, lengths: list[int], device: torch.device | str,
                 rooms: list[int] | None = None, keys: list[int] | None = None):
        self.lengths, self.rooms, self.keys = lengths, rooms or lengths, keys or lengths
        self.longest, self.most = max(lengths), max(self.keys)  # of a sample: tokens, keys
        self.at_once = takes_all_at_once(torch.device(device))
        starts = [0, *accumulate(self.rooms)]
        bounds = [0, *accumulate(lengths), *starts, *self.keys]
        places = [np.arange(end - new, end) for new, end in zip(lengths, self.keys, strict=True)]
        rows = [place + start for place, start in zip(places, starts[:-1], strict=True)]
        packed = torch.from_numpy(np.concatenate([bounds, *places, *rows]))
        if torch.device(device).type == "cuda":
            packed = packed.pin_memory()
        packed = packed.to(device, non_blocking=True)
        bounds, self.positions, self.rows = packed.split(  # the latter two int64 [T]: each token's
            [len(bounds), sum(lengths), sum(lengths)])     # place in its sample, row among the keys
        count = len(lengths) + 1
        self.bounds, self.key_bounds, used = bounds.int().split([count, count, count - 1])
        self.used = None if keys is None else used


def packed_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
                     attention_mask: Tensor | None, scaling: float, dropout: float = 0.0,
                     segments: Segments | None = None, sliding_window: int | None = None,
                     **_) -> tuple[Tensor, None]:
    """Causal attention of packed samples: query [1, H, T, Dh], key and value [1, Hkv, Tk, Dh] ->
    [1, T, H, Dh].

    Each sample attends within itself: sum T_i^2 work and no [T, T] mask, where the usual way of
    packing (positions that restart, a block mask) pays (sum T_i)^2. On a GPU that is one call for
    all samples, elsewhere and in float32 one call for each. Without `segments` the row is one
    sample, its tokens the last of the keys. The signature is that of transformers'
    AttentionInterface, hence the unused arguments.
    """
    if sliding_window is not None or attention_mask is not None:
        raise ValueError("packed attention is causal over whole samples: it knows no sliding "
                         "window and no other mask")
    device = query.device
    if segments is None:
        segments = Segments([query.shape[2]], device, keys=[key.shape[2]], rooms=[key.shape[2]])
    if torch.is_autocast_enabled(device.type):  # the rotation by float32 angles gives float32
        query, key, value = (t.to(torch.get_autocast_dtype(device.type))
                             for t in (query, key, value))
    at_once = (segments.at_once and dropout == 0 and query.element_size() == 2
               and query.shape[3] <= 256 and query.shape[3] % 8 == 0)
    attend = attend_at_once if at_once else attend_in_turn
    return attend(query, key, value, segments, scaling, dropout), None


def attend_at_once(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float,
                   _: float) -> Tensor:
    """One call of flash attention. Its causal mask ends with the last query at the last key, and
    queries of the same group of heads share the keys without a copy."""
    out = varlen_attn(
        *(t[0].transpose(0, 1) for t in (query, key, value)),                  # [T or Tk, .., Dh]
        segments.bounds, segments.key_bounds, segments.longest, segments.most, scale=scaling,
        # A single query sees every key: without a mask they are divided among more programs.
        window_size=(-1, 0) if segments.longest > 1 else (-1, -1),
        enable_gqa=query.shape[1] != key.shape[1], seqused_k=segments.used)
    return out[None]


def attend_in_turn(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float,
                   dropout: float) -> Tensor:
    """A call of SDPA for each sample."""
    grouped, out = query.shape[1] != key.shape[1], []
    if grouped and query.is_cuda:  # where only kernels that hold the whole [T, Tk] know groups
        heads = query.shape[1] // key.shape[1]
        key, value, grouped = (key.repeat_interleave(heads, 1),
                               value.repeat_interleave(heads, 1), False)
    samples = zip(query.split(segments.lengths, 2), key.split(segments.rooms, 2),
                  value.split(segments.rooms, 2), segments.keys, strict=True)
    with without_cudnn(query.device):
        for q, k, v, keys in samples:
            if keys < k.shape[2]:
                k, v = k[:, :, :keys], v[:, :, :keys]
            ahead, mask = keys - q.shape[2], None  # keys of the cache that every query may see
            if ahead and q.shape[2] > 1:
                mask = torch.ones(q.shape[2], keys, dtype=torch.bool, device=q.device).tril(ahead)
            out.append(F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling, enable_gqa=grouped,
                is_causal=ahead == 0 and q.shape[2] > 1).transpose(1, 2))
    return torch.cat(out, dim=1)


def compile_layers(llm: PreTrainedModel, bf16: bool, device: torch.device) -> None:
    """torch.compile for each of the decoder's layers. ValueError where not all samples attend in
    one call: a call for each makes another program of every batch."""
    if not (bf16 and takes_all_at_once(device)):
        raise ValueError("--compile needs --bf16 and a GPU of the Ampere generation or newer")
    for layer in llm.get_decoder().layers:
        layer.compile(dynamic=True)  # packed rows have a new length in every batch


def without_cudnn(device: torch.device) -> AbstractContextManager:
    """SDPA on a GPU without cuDNN's way, which plans anew for every length and number of views."""
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
                        SDPBackend.MATH])


AttentionInterface.register("sliming_packed", packed_attention)


class PackedCache(DynamicCache):
    """Keys and values of several samples of different lengths. Nothing is padded, but behind each
    sample there is room: what is new is written there, and nothing that is kept is copied.

        [ sample 0: T_0 rows | room | sample 1: T_1 rows | room | ... ]

    Call `extend` before each call of the decoder, and hand it what that returns.
    """

    ROOM = 128  # tokens that a sample may grow by before all are moved to new rooms

    def __init__(self):
        super().__init__()
        self.lengths: list[int] = []  # tokens kept of each sample, those of the call at hand
        self.starts: list[int] = []   # included, and the row where each sample's room begins
        self.rows = 0                 # of all rooms
        self.moves: list[tuple[int, int, int]] | None = None  # (from, to, tokens) in this call
        self.kept: dict[int, list[Tensor]] = {}  # layer: keys and values, each [rows, Hkv, Dh]

    def extend(self, new: list[int], device: torch.device) -> Segments:
        """Announces each sample's number of new tokens, and finds them room."""
        if not self.starts:  # the first call
            self.lengths, self.starts = [0] * len(new), [0] * len(new)
        before, self.moves = self.lengths, None
        self.lengths = [old + more for old, more in zip(before, new, strict=True)]
        ends = [start + length for start, length in zip(self.starts, self.lengths, strict=True)]
        if any(end > room for end, room in zip(ends, self.limits(), strict=True)):
            *starts, self.rows = accumulate((length + self.ROOM for length in self.lengths),
                                            initial=0)
            self.moves = list(zip(self.starts, starts, before, strict=True))
            self.starts = starts
        rooms = [end - start for start, end in zip(self.starts, self.limits(), strict=True)]
        self.segments = Segments(new, device, rooms, list(self.lengths))
        return self.segments

    def limits(self) -> list[int]:
        """The row where each sample's room ends."""
        return [*self.starts[1:], self.rows]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_,
               **__) -> tuple[Tensor, Tensor]:
        new = [states[0].transpose(0, 1) for states in (key_states, value_states)]  # [T, Hkv, Dh]
        if self.moves is not None:
            rooms = [states.new_empty(self.rows, *states.shape[1:]) for states in new]
            for room, old in zip(rooms, self.kept.get(layer_idx, rooms), strict=True):
                for source, target, count in self.moves:  # none where nothing was kept
                    room[target:target + count] = old[source:source + count]
            self.kept[layer_idx] = rooms
        views = []
        for room, states in zip(self.kept[layer_idx], new, strict=True):
            used = room[self.starts[0]:]
            used.index_copy_(0, self.segments.rows, states)
            views.append(used.transpose(0, 1)[None])                           # [1, Hkv, rows, Dh]
        return tuple(views)

    def keep(self, samples: list[int]) -> None:
        """Forgets all samples but these; their rooms lie idle until all are moved."""
        self.lengths = [self.lengths[i] for i in samples]
        self.starts = [self.starts[i] for i in samples]
