"""SliME: the whole model, from pixels and words to logits (Fig. 2).

    image --slicer--> views [1+P, 3, S, S] --vision tower (frozen)--> [1+P, L, Dv]
      global view [L, Dv]    --adapter (MLP and query former, gated)-->             [L, D]
      crops       [P, L, Dv] --compression--> [P, Nq, Dv] --adapter's MLP--> [P Nq, D] --router(question)--> [K, D]
    words --embedding--> [N, D]
    [words | global view | separator | kept local tokens | words] --packed--> language model --> logits

Samples are ragged: any number of images, none included, each with its own grid, question and number of kept tokens. They
are packed end to end into one row in which each sees only itself; nothing is padded. Logits are computed only where
there is something to learn: an image is 576 tokens and more, an answer often two.

Which parts a sample shows is the `parts` argument: "global" in stage I, "local" in stage II, "both" in stage III and
when answering (Sec. 2.2, "Alternating Training Scheme").

Legend: B samples, I images, V views, P crops of an image, S crop size, L patches per view, Nq queries per crop (g x g),
M local tokens of all images, K kept of them, N text tokens, T packed tokens, Dv vision width, D model width, C vocabulary.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import ModelHubMixin, save_torch_state_dict, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (AutoTokenizer, CLIPVisionConfig, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase)

from sliming.backbones import PackedCache, VisionTower, build_llm, load_llm, load_vision
from sliming.chat import IGNORE, IMAGE, IMAGE_TOKEN, Encoded, encode, end_token
from sliming.checkpoints.states import merge_lora
from sliming.moe_adapter import MoEAdapter
from sliming.qformer import QueryFormer, why_not_triton
from sliming.router import route
from sliming.slicer import ImageSource, Slices, slice_image

PARTS = ("both", "global", "local")


class CheckpointError(ValueError):
    """A folder that cannot be read as a checkpoint; the message is one line."""


def read_json(path: Path) -> dict:
    """A JSON file of a checkpoint; CheckpointError where it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); copy or download the file again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, not an object of settings")
    return content


def download(name: str, revision: str | None = None) -> Path:
    """The folder of a hub repository: settings, tokenizer, and weights once, as safetensors where it has them."""
    folder = Path(snapshot_download(name, revision=revision,
                                    allow_patterns=["*.json", "*.safetensors", "tokenizer*", "lora/*"]))
    # Older checkpoints are .bin files, and what was trained beside a released LoRA always is.
    if not list(folder.glob("*.safetensors")) or (folder / "adapter_config.json").is_file():
        snapshot_download(name, revision=revision, allow_patterns=["*.bin"], ignore_patterns=["*/*"])
    return folder


@dataclass
class SliMEConfig:
    """Everything a checkpoint needs to be built again. Defaults are the paper's.

    Where the released code departs from the paper, a field chooses; official.py sets them for released checkpoints.
    """

    vision: str = "openai/clip-vit-large-patch14-336"  # "tiny", a folder or a hub id: where the tower came from
    llm: str = "lmsys/vicuna-7b-v1.5"
    vision_layer: int = -2      # hidden state of the tower that is used
    num_queries: int = 144      # Nq: tokens left of each crop (Table 3)
    gamma: float = 0.75         # share of the relevance that the router keeps (Sec. 2.2, Table 3)
    router_noise: float = 0.1   # std of the noise on the router's scores in training
    router_score: str = "mean"  # or "sum": over the text tokens, of their similarity to an image token
    router_temperature: float = 1.0
    router_text: str = "question"  # or "all": whatever is no image, template and, in training, answer included
    gate_noise: str = "w_noise"  # or "w_gate": what the size of the gates' noise is learned by
    gate_epsilon: float = 0.0   # added to the gates' sum, which they are divided by
    expert: int | None = None   # 0: the MLP alone, 1: the query former alone; None: both, gated
    slicing: str = "paper"      # rule of slicer.choose_grid
    global_view: str = "pad"    # "pad" or "squash"
    max_side: int = 6           # crops along a side, at most
    max_crops: int | None = None  # crops of an image, at most
    separator: str = ","        # its last token's embedding stands between global view and local tokens
    separator_id: int | None = None  # that token, where it is known as a number only
    template: str = "chat"      # of chat.TEMPLATES, for answering
    vision_config: dict = field(default_factory=dict)  # of the backbones, as transformers writes them
    llm_config: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """One conversation and its images, in the order of their placeholders."""

    text: Encoded
    images: list[Slices]
    gate_noise: Tensor | None = None    # standard normals for training, float32 [I, L, 2] of this sample's images
    router_noise: Tensor | None = None  # and [M], its local tokens in raster order; each drawn by the model where None


@dataclass(frozen=True)
class Batch:
    """Samples end to end, ragged. Lengths and places are host integers, so that using them never waits for the device."""

    input_ids: Tensor           # int64 [N], IMAGE_TOKEN for an image
    labels: Tensor              # int64 [N], IGNORE where nothing is learned
    question: Tensor            # int64 [Q]: token ids of the samples' questions
    views: Tensor               # uint8 [V, 3, S, S]: per image its global view, then its crops
    lengths: list[int]          # text tokens per sample; sum N
    question_lengths: list[int]  # question tokens per sample; sum Q
    grids: list[tuple[int, int]]  # (columns, rows) per image
    image_places: list[list[int]]  # per sample, the places of its images among its text tokens
    gate_noise: Tensor | None = None    # float32 [I, L, 2], see Sample; None unless all samples bring theirs
    router_noise: Tensor | None = None  # float32 [M]

    @staticmethod
    def pack(samples: list[Sample]) -> "Batch":
        """Packs samples; raises ValueError if a sample has not one placeholder per image."""
        places = [[i for i, token in enumerate(s.text.ids) if token == IMAGE_TOKEN] for s in samples]
        for index, (sample, place) in enumerate(zip(samples, places)):
            if len(place) != len(sample.images):
                raise ValueError(f"sample {index} has {len(place)} {IMAGE} markers and {len(sample.images)} images")
        images = [image for sample in samples for image in sample.images]
        views = [view for image in images for view in (image.global_view[None], image.crops)]
        return Batch(
            input_ids=torch.tensor([token for s in samples for token in s.text.ids], dtype=torch.long),
            labels=torch.tensor([label for s in samples for label in s.text.labels], dtype=torch.long),
            question=torch.tensor([token for s in samples for token in s.text.question], dtype=torch.long),
            views=torch.cat(views) if views else torch.zeros(0, 3, 1, 1, dtype=torch.uint8),
            lengths=[len(s.text.ids) for s in samples],
            question_lengths=[len(s.text.question) for s in samples],
            grids=[image.grid for image in images], image_places=places,
            **{name: torch.cat([getattr(s, name) for s in samples])
               for name in ("gate_noise", "router_noise") if all(getattr(s, name) is not None for s in samples)})

    def to(self, device: torch.device | str) -> "Batch":
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


class Visual(NamedTuple):
    """What the language model gets to see of a batch's images."""

    whole: Tensor        # [I, L, D] tokens of the global views
    gates: Tensor        # float32 [I, L, 2] weights of MLP and query former
    local: Tensor        # [M, D] local tokens of all images, raster order over each image's whole grid
    local_lengths: list[int]  # per image, sum M
    keep: Tensor         # bool [M]: the router's choice


class Output(NamedTuple):
    loss: Tensor    # float32 scalar
    logits: Tensor  # [number of supervised tokens, C]
    tokens: int     # T: what the language model read


class SliME(nn.Module, ModelHubMixin):
    """The model of the paper. Build it from pretrained parts (`from_backbones`) or from a checkpoint (`from_pretrained`)."""

    def __init__(self, config: SliMEConfig, vision: VisionTower, llm: PreTrainedModel,
                 tokenizer: PreTrainedTokenizerBase | None):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        clip = vision.clip.config
        self.crop_size = clip.image_size
        patches = (clip.image_size // clip.patch_size) ** 2  # L
        self.vision = vision
        self.adapter = MoEAdapter(clip.hidden_size, llm.config.hidden_size, patches, gate_noise=config.gate_noise,
                                  gate_epsilon=config.gate_epsilon, expert=config.expert)
        self.compression = QueryFormer(clip.hidden_size, config.num_queries)
        self.compression.look_nearby()
        self.llm = llm
        self.separator_id = config.separator_id
        if self.separator_id is None:
            self.separator_id = tokenizer(config.separator, add_special_tokens=False)["input_ids"][-1]
        ends = llm.generation_config.eos_token_id  # None, a number or several
        self.end_ids = set(ends if isinstance(ends, list) else [ends])
        if tokenizer is not None:
            self.end_ids |= {tokenizer.eos_token_id, end_token(config.template, tokenizer)}

    @classmethod
    def from_backbones(cls, config: SliMEConfig, dtype: torch.dtype = torch.float32) -> "SliME":
        """A model to train: pretrained tower and language model, everything between them new."""
        vision = load_vision(config.vision, config.vision_layer).to(dtype)
        llm, tokenizer = load_llm(config.llm, dtype)
        # The tower is cut already: what it has left is used to its last layer.
        config = replace(config, vision_layer=-1, vision_config=json.loads(vision.clip.config.to_json_string()),
                         llm_config=json.loads(llm.config.to_json_string()))
        return cls(config, vision, llm, tokenizer).to(dtype)

    # ------------------------------------------------------------------------------------------------- the forward pass

    def see(self, batch: Batch, parts: str = "both", gamma: float | None = None, random_tokens: bool = False,
            features: Tensor | None = None) -> Visual:
        """Encodes a batch's images: the vision tower, the adapter, the compression and the router.

        `gamma` overrides the configuration's; `random_tokens` keeps as many local tokens as the router would, but any.
        `features` [V, L, Dv]: the tower's output for `batch.views`, where it is at hand already.
        """
        if parts not in PARTS:
            raise ValueError(f"parts must be one of {', '.join(PARTS)}, got {parts!r}")
        show = {True: parts != "local", False: parts != "global"}  # is it a global view? -> is it shown?
        is_global = [place == 0 for columns, rows in batch.grids for place in range(1 + columns * rows)]  # V
        wanted = [view for view, whole in enumerate(is_global) if show[whole]]
        device, dtype = self.adapter.w_gate.device, self.adapter.w_gate.dtype
        chosen = torch.tensor(wanted, dtype=torch.long, device=batch.views.device)
        if features is not None:
            features = features[chosen]
        elif wanted:  # only what is shown, the views of all samples in one call
            features = self.vision(batch.views if len(wanted) == len(is_global) else batch.views[chosen])
        else:
            features = torch.zeros(0, self.adapter.num_tokens, self.adapter.w_gate.shape[0], device=device)
        features = features.to(dtype)                                             # [shown, L, Dv]
        is_global = torch.tensor([is_global[view] for view in wanted], dtype=torch.bool, device=device)

        gate_noise = None if parts == "local" else batch.gate_noise
        whole, gates = self.adapter(features[is_global], gate_noise)              # [I or 0, L, D], [I or 0, L, 2]
        compressed = self.adapter.mlp(self.compression(features[~is_global]))     # [sum P or 0, Nq, D]
        grids = batch.grids if show[False] else []
        order = raster_order(grids, self.compression.side).to(device)
        local = compressed.flatten(0, 1)[order]                                   # [sum P * Nq, D] -> [M, D]
        local_lengths = [columns * rows * self.config.num_queries for columns, rows in grids]
        if gamma is None:
            gamma = self.config.gamma if parts == "both" else 1.0                 # stage II learns from every token
        keep = torch.ones(len(local), dtype=torch.bool, device=device)
        if grids and gamma != 1:  # each image is routed by its own sample's question
            ids, lengths = batch.question, batch.question_lengths
            if self.config.router_text == "all":
                ids = batch.input_ids[batch.input_ids != IMAGE_TOKEN]
                lengths = [length - len(places) for length, places in zip(batch.lengths, batch.image_places)]
            questions = self.llm.get_input_embeddings()(ids).split(lengths)       # B x [Q_b, D]
            owners = [b for b, places in enumerate(batch.image_places) for _ in places]
            noise = None
            if self.training and self.config.router_noise:
                noise = torch.randn(len(local), device=device) if batch.router_noise is None else batch.router_noise
                noise = self.config.router_noise * noise                          # [M]
            keep = route(local, local_lengths, torch.cat([questions[b] for b in owners]), [lengths[b] for b in owners],
                         gamma=gamma, score=self.config.router_score, temperature=self.config.router_temperature,
                         noise=noise, random=random_tokens)
        return Visual(whole, gates, local, local_lengths, keep)

    def embed(self, batch: Batch, visual: Visual) -> tuple[Tensor, Tensor, list[int]]:
        """Puts each image's tokens in the place of its marker: embeddings [T, D], labels [T], lengths per sample (sum T)."""
        table = self.llm.get_input_embeddings()
        words = table(batch.input_ids.clamp(min=0))                               # [N, D]
        separator = table(torch.tensor([self.separator_id], device=words.device))  # [1, D]
        pieces: list[list[Tensor]] = [[] for _ in batch.grids]
        for image, tokens in enumerate(visual.whole):
            pieces[image].append(tokens)                                          # [L, D]
        if visual.local_lengths:
            counts = torch.stack([part.sum() for part in visual.keep.split(visual.local_lengths)])
            kept = visual.local[visual.keep].split(counts.tolist())               # the one wait for the device
            for image, tokens in enumerate(kept):                                 # [K, D]
                pieces[image] += [separator, tokens] if pieces[image] else [tokens]
        images = [torch.cat(piece) for piece in pieces]
        embeddings, labels, lengths = [], [], []
        start, image = 0, 0
        for length, places in zip(batch.lengths, batch.image_places):
            at, total = start, length - len(places)
            for place in places:
                seen = images[image]
                embeddings += [words[at:start + place], seen]
                labels += [batch.labels[at:start + place], batch.labels.new_full((len(seen),), IGNORE)]
                at, image, total = start + place + 1, image + 1, total + len(seen)
            embeddings.append(words[at:start + length])
            labels.append(batch.labels[at:start + length])
            lengths.append(total)
            start += length
        longest = getattr(self.llm.config, "max_position_embeddings", None)
        if longest is not None and max(lengths) > longest:
            raise ValueError(f"a sample of {max(lengths)} tokens exceeds the language model's {longest}: "
                             "lower max_crops or gamma, or shorten the conversation")
        return torch.cat(embeddings).to(self.llm.dtype), torch.cat(labels), lengths

    def decode(self, embeddings: Tensor, lengths: list[int]) -> Tensor:
        """The language model over packed samples: embeddings [T, D] -> hidden states [T, D], positions restarting."""
        positions = torch.cat([torch.arange(length) for length in lengths]).to(embeddings.device)
        output = self.llm.get_decoder()(inputs_embeds=embeddings[None], position_ids=positions[None],
                                        segments=lengths, use_cache=False)
        return output.last_hidden_state[0]

    def forward(self, batch: Batch, *, parts: str = "both", visual: Visual | None = None,
                normalizer: float | Tensor | None = None) -> Output:
        """Loss and logits at the supervised positions.

        `visual` is `see(batch, parts)` unless given. The loss is the summed cross-entropy over `normalizer`, by default
        the batch's number of supervised tokens; with several ranks or micro-batches it is that of the global batch.
        Raises ValueError if nothing is supervised: a mean over nothing would be a loss of zero or NaN.
        """
        embeddings, labels, lengths = self.embed(batch, self.see(batch, parts) if visual is None else visual)
        hidden = self.decode(embeddings, lengths)
        supervised = torch.nonzero(labels != IGNORE)[:, 0]
        if len(supervised) == 0:
            raise ValueError("no supervised token in the batch: every answer is empty or masked")
        # A sample's first token is never supervised (it is the beginning-of-sequence token or template text), so the
        # position before a supervised one belongs to the same sample.
        logits = self.llm.get_output_embeddings()(hidden[supervised - 1])         # [supervised, C]
        loss = F.cross_entropy(logits.float(), labels[supervised], reduction="sum")
        return Output(loss / (len(supervised) if normalizer is None else normalizer), logits, len(embeddings))

    # ---------------------------------------------------------------------------------------------------------- answering

    def grid_rule(self, max_crops: int | None = None) -> dict:
        """This model's arguments of slicer.choose_grid, with at most `max_crops` crops where that is given."""
        c = self.config
        rule = c.slicing if max_crops is None else "paper"  # the released rule has nothing to bound
        return {"rule": rule, "crop_size": self.crop_size, "max_side": c.max_side if rule == "paper" else 6,
                "max_crops": max_crops or c.max_crops}

    def slice(self, image: ImageSource, max_crops: int | None = None) -> Slices:
        """Slices an image by this model's rules, into at most `max_crops` crops where that is given."""
        return slice_image(image, global_view=self.config.global_view, **self.grid_rule(max_crops))

    def prompt(self, conversation: list[dict], images: list[ImageSource]) -> Sample:
        """A conversation (chat.encode) with its images, ready for `generate`. ValueError without a tokenizer."""
        if self.tokenizer is None:
            raise ValueError("this checkpoint came without tokenizer files: put its tokenizer_config.json and tokenizer.json "
                             "(or tokenizer.model) into its folder")
        return Sample(encode(conversation, self.config.template, self.tokenizer), [self.slice(i) for i in images])

    def embed_prompts(self, samples: list[Sample], gamma: float | None) -> tuple[Tensor, list[int]]:
        """Prompts as the language model reads them, without the noise of training: [T, D], and lengths, sum T."""
        training = self.training
        self.eval()
        batch = Batch.pack(samples).to(self.adapter.w_gate.device)
        inputs, _, lengths = self.embed(batch, self.see(batch, gamma=gamma))
        self.train(training)
        return inputs, lengths

    @torch.no_grad()
    def generate(self, sample: Sample, *, gamma: float | None = None, max_new_tokens: int = 128, temperature: float = 0.0,
                 top_p: float = 1.0, generator: torch.Generator | None = None,
                 cache: DynamicCache | None = None) -> Iterator[int]:
        """Yields the answer's token ids as they come, without the end token; keys and values are cached.

        `temperature` 0 is greedy. `top_p` < 1 draws from the smallest set of tokens with that much probability. `cache`:
        keys and values of what came before `sample`; those of `sample` and of the answer, its last token not, are added.
        """
        inputs, _ = self.embed_prompts([sample], gamma)                           # [T, D]
        cache = DynamicCache(config=self.llm.config) if cache is None else cache
        position = cache.get_seq_length()
        for _ in range(max_new_tokens):
            positions = torch.arange(position, position + len(inputs), device=inputs.device)
            hidden = self.llm.get_decoder()(inputs_embeds=inputs[None], position_ids=positions[None],
                                            past_key_values=cache, use_cache=True).last_hidden_state
            logits = self.llm.get_output_embeddings()(hidden[0, -1]).float()      # [C]
            token = int(sample_token(logits, temperature, top_p, generator))
            if token in self.end_ids:
                return
            yield token
            position += len(inputs)
            inputs = self.llm.get_input_embeddings()(torch.tensor([token], device=inputs.device))

    @torch.no_grad()
    def generate_batch(self, samples: list[Sample], *, gamma: float | None = None, max_new_tokens: int = 128) -> list[list[int]]:
        """The greedy answers' token ids of several samples at once: what `generate` yields for each, but every step reads
        the language model's weights once for all."""
        inputs, lengths = self.embed_prompts(samples, gamma)                      # [T, D]
        answers: list[list[int]] = [[] for _ in samples]
        running, starts, cache = list(range(len(samples))), [0] * len(samples), PackedCache()
        for _ in range(max_new_tokens):
            cache.segments = lengths
            keys = cache.key_segments()
            positions = torch.cat([torch.arange(start, end) for start, end in zip(starts, keys)]).to(inputs.device)
            hidden = self.llm.get_decoder()(inputs_embeds=inputs[None], position_ids=positions[None], past_key_values=cache,
                                            segments=lengths, key_segments=keys, use_cache=True).last_hidden_state[0]
            cache.lengths = starts = keys
            last = torch.tensor(lengths, device=inputs.device).cumsum(0) - 1
            tokens = self.llm.get_output_embeddings()(hidden[last]).float().argmax(1).tolist()  # one per running sample
            going = [i for i, token in enumerate(tokens) if token not in self.end_ids]
            for i in going:
                answers[running[i]].append(tokens[i])
            if not going:
                break
            if len(going) < len(tokens):
                cache.keep(going)
            running, starts = [running[i] for i in going], cache.lengths
            inputs = self.llm.get_input_embeddings()(torch.tensor([tokens[i] for i in going], device=inputs.device))
            lengths = [1] * len(going)
        return answers

    def text(self, tokens: Iterator[int]) -> Iterator[str]:
        """Token ids as text, piece by piece; a piece ends where a character is complete."""
        ids, shown = [], ""
        for token in tokens:
            ids.append(token)
            text = self.tokenizer.decode(ids)
            if not text.endswith("\ufffd"):  # the replacement character: a multi-byte character is not yet whole
                yield text[len(shown):]
                shown = text
        yield self.tokenizer.decode(ids)[len(shown):]

    def stream(self, sample: Sample, **options) -> Iterator[str]:
        """The answer as text, piece by piece; options of `generate`."""
        return self.text(self.generate(sample, **options))

    def answer(self, image: ImageSource | list[ImageSource] | None, question: str, **options) -> str:
        """Answers a question about an image, several images or none; options of `generate`."""
        return "".join(self.stream(self.asked(image, question), **options)).strip()

    def answer_batch(self, questions: list[tuple[ImageSource | list[ImageSource] | None, str]], **options) -> list[str]:
        """`answer` for several pairs of image(s) and question at once, greedily; options of `generate_batch`."""
        answers = self.generate_batch([self.asked(*pair) for pair in questions], **options)
        return [self.tokenizer.decode(ids).strip() for ids in answers]

    def asked(self, image: ImageSource | list[ImageSource] | None, question: str) -> Sample:
        """A question about an image, several images or none, as a prompt."""
        images = [] if image is None else image if isinstance(image, list) else [image]
        return self.prompt([{"from": "human", "value": f"{IMAGE}\n" * len(images) + question}], images)

    def use_attention(self, choice: str) -> None:
        """How the query formers attend: "auto", "sdpa" or "triton" (qformer.query_attention); ValueError, with the reason,
        where "triton" cannot run."""
        for former in (self.adapter.query_former, self.compression):
            if choice == "triton" and (obstacle := why_not_triton(former.split_heads(former.query))):
                raise ValueError(f"attention 'triton' cannot run here: {obstacle}; use 'auto' or 'sdpa'")
            former.attention = choice

    # -------------------------------------------------------------------------------------------------- saving and loading

    def tensors(self) -> dict[str, Tensor]:
        """All parameters and persistent buffers by name; tied weights (input and output embedding) once."""
        names = {name for name, _ in self.named_parameters()} | {name for name, _ in self.named_buffers()}
        return {name: tensor for name, tensor in self.state_dict().items() if name in names}

    def save_pretrained(self, folder: str | Path, *, config: None = None, model_card_kwargs: dict | None = None,
                        tensors: dict[str, Tensor] | None = None) -> None:
        """Writes config.json, safetensors (sharded above 5 GB) and the tokenizer's files.

        `tensors`: instead of the model's own, which may be divided among ranks. The other two keywords are what the mixin's
        `push_to_hub` passes along; the configuration is the model's own.

        Everything is written beside the old files first and moved over them last, so that a full disk (OSError) leaves
        a checkpoint that was there before whole.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as new:
            try:
                save_torch_state_dict(self.tensors() if tensors is None else tensors, new)
            except SafetensorError as error:  # how safetensors reports a failed write
                raise OSError(f"{folder}: cannot save ({error}); free some space, what was there is unchanged") from error
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(new)
            config = {"format": "sliming", **asdict(self.config)}
            (Path(new) / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            for path in sorted(Path(new).iterdir(), key=lambda path: path.name == "config.json"):  # config.json last
                os.replace(path, folder / path.name)
        shutil.rmtree(folder / "lora", ignore_errors=True)  # adapters of another model that lay here

    @classmethod
    def from_pretrained(cls, name: str | Path, *, dtype: torch.dtype = torch.float32, float32: tuple[str, ...] = (),
                        revision: str | None = None) -> "SliME":
        """Reads a checkpoint from a folder or a hub id. Strict: every tensor of the model comes from it, and no other.

        LoRA adapters beside the weights are merged. `float32`: submodules that stay in float32 whatever `dtype` is.

        Raises FileNotFoundError or CheckpointError, in one line, for what is not a checkpoint of this package.
        """
        folder = Path(name)
        if not folder.is_dir():
            if folder.is_absolute() or len(folder.parts) != 2 or str(name).startswith("."):
                raise FileNotFoundError(f"{name}: no such checkpoint folder")
            try:
                folder = download(str(name), revision)
            except OSError as error:
                reason = str(error).partition("\n")[0]
                raise FileNotFoundError(f"{name}: neither a folder nor to be had from the hub ({reason})") from error
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder}: no config.json, so this is no checkpoint")
        raw = read_json(folder / "config.json")
        from sliming.checkpoints import released as official  # which builds on this file
        if official.is_released(raw):
            return official.load(folder, dtype, float32)
        if raw.pop("format", None) != "sliming":
            raise CheckpointError(f"{folder}: config.json is not that of a sliming checkpoint")
        if unknown := sorted(set(raw) - {f.name for f in fields(SliMEConfig)}):
            raise CheckpointError(f"{folder}/config.json: unknown field {', '.join(unknown)}; was it written by a newer version?")
        config = SliMEConfig(**raw)
        vision = VisionTower(CLIPVisionConfig.from_dict(config.vision_config), config.vision_layer)
        model = cls(config, vision, build_llm(config.llm_config, dtype), AutoTokenizer.from_pretrained(folder)).to(dtype)
        for name in float32:
            getattr(model, name).float()
        model.load(folder)
        if (folder / "lora" / "adapter_config.json").is_file():
            merge_lora(model.llm, folder / "lora")
        return model.eval()

    def load(self, folder: Path) -> None:
        """Fills the model from the safetensors files of a folder, strictly."""
        found = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                found |= load_file(path)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path}: unreadable weights ({error}); copy or download the file again") from error
        own = self.tensors()
        for what, names in (("lacks", set(own) - set(found)), ("has unknown", set(found) - set(own))):
            if names:
                some = ", ".join(sorted(names)[:5]) + (" ..." if len(names) > 5 else "")
                raise CheckpointError(f"{folder}: the checkpoint {what} {len(names)} tensors: {some}")
        for name, tensor in own.items():
            if tensor.shape != found[name].shape:
                raise CheckpointError(f"{folder}: {name} has shape {list(found[name].shape)}, the model {list(tensor.shape)}")
            tensor.copy_(found[name])


class Conversation:
    """Questions and answers about images, with one cache of keys and values: each turn computes its own tokens only.

    The router chooses the local tokens for the first question; later turns see the same ones. To route by a later
    question, begin a new conversation. `options` are those of `SliME.generate`.
    """

    def __init__(self, model: SliME, images: list[ImageSource], *, gamma: float | None = None, max_new_tokens: int = 128,
                 temperature: float = 0.0, top_p: float = 1.0):
        self.model, self.images, self.max_new_tokens = model, images, max_new_tokens
        self.options = {"gamma": gamma, "max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        self.cache = DynamicCache(config=model.llm.config)
        self.first: Sample | None = None  # the first turn, with the images
        self.unseen: list[int] = []       # what is said already, but not in the cache: the end of the last answer

    def ask(self, question: str) -> Iterator[str]:
        """The answer as text, piece by piece. The next question is asked when it has been read."""
        model, template = self.model, self.model.config.template
        if self.first is None:
            turn = {"from": "human", "value": f"{IMAGE}\n" * len(self.images) + question}
            sample = self.first = model.prompt([turn], self.images)
        else:
            text = encode([{"from": "human", "value": question}], template, model.tokenizer, begin=False)
            ids = self.unseen + text.ids
            sample = Sample(replace(text, ids=ids, labels=[IGNORE] * len(ids)), [])
        tokens: list[int] = []

        def answer() -> Iterator[int]:
            for token in model.generate(sample, cache=self.cache, **self.options):
                tokens.append(token)
                yield token

        ended = False
        try:
            yield from model.text(answer())
            ended = len(tokens) < self.max_new_tokens
        finally:  # an answer cut short, by its length or by the reader, lacks its last token in the cache
            self.unseen = ([] if ended else tokens[-1:]) + [end_token(template, model.tokenizer)]


def raster_order(grids: list[tuple[int, int]], side: int) -> Tensor:
    """Index [M] that brings compressed crops, one after other, into one raster per image.

    Crops come row by row, each with side x side tokens; the raster runs over the image's (rows * side) x (columns * side)
    tokens, as if the crops were glued together (the released code's `spatial` order).
    """
    orders, start = [torch.zeros(0, dtype=torch.long)], 0
    for columns, rows in grids:
        index = torch.arange(columns * rows * side * side).view(rows, columns, side, side)  # [row, column, y, x]
        orders.append(start + index.transpose(1, 2).reshape(-1))                            # [row, y, column, x] -> [M_i]
        start += columns * rows * side * side
    return torch.cat(orders)


def sample_token(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """Draws one token id from logits [C]: greedy at temperature 0, else from the nucleus of mass `top_p`."""
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"need temperature >= 0 and 0 < top_p <= 1, got {temperature} and {top_p}")
    if temperature == 0:
        return logits.argmax()
    probabilities, order = (logits / temperature).softmax(0).sort(descending=True)
    outside = probabilities.cumsum(0) - probabilities >= top_p  # the token that crosses the mass is inside
    return order[probabilities.masked_fill(outside, 0).multinomial(1, generator=generator)[0]]
