"""SliME: the whole model, from pixels and words to logits (Fig. 2).

    image --slicer--> views [1+P, 3, S, S] --vision tower (frozen)--> [1+P, L, Dv]
      global view [L, Dv]    --adapter (MLP and query former, gated)-->              [L, D]
      crops       [P, L, Dv] --compression--> [P, Nq, Dv] --adapter's MLP--> [P Nq, D]
                                                          --router(question)-->      [K, D]
    words --embedding--> [N, D]
    [words | global view | separator | kept local tokens | words] --packed--> LLM --> logits

Samples are packed end to end into one row in which each sees only itself; nothing is padded.
Logits are computed only where there is something to learn: an image is 576 tokens and more, an
answer often two.

Which parts a sample shows is the `parts` argument: "global" in stage I, "local" in stage II, "both"
in stage III and when answering (Sec. 2.2, "Alternating Training Scheme").

Legend: B samples, I images, P crops of an image, S crop size, L patches per view, Nq = g x g
queries per crop, M = P Nq local tokens of an image, K kept of them, N words, T packed tokens, Dv
vision width, D model width, C vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import ModelHubMixin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPVisionConfig, PreTrainedModel

from sliming.backbones import Segments, VisionTower, build_llm, cast
from sliming.chat import IGNORE
from sliming.checkpoints import card, files, pretrained, released
from sliming.checkpoints.lora import without_lora
from sliming.config import SliMEConfig
from sliming.distributed import materialise
from sliming.generate import Answering
from sliming.inputs import Batch, Processor
from sliming.moe_adapter import MoEAdapter
from sliming.qformer import QueryFormer
from sliming.router import route

CHUNK = 2048  # supervised tokens whose logits are there at once in training


@dataclass
class Visual:
    """What the language model gets to see of a batch's images; local tokens in raster order."""

    whole: Tensor        # [I, L, D] tokens of the global views; [0, L, D] where not shown
    gates: Tensor        # float32 [I, L, 2] weights of MLP and query former
    local: list[Tensor]  # I of [M, D]; empty where not shown
    keep: list[Tensor]   # I of bool [M]: the router's choice


class Output(NamedTuple):
    loss: Tensor           # float32 scalar
    logits: Tensor | None  # [number of supervised tokens, C]
    tokens: int            # T: what the language model read


class SliME(nn.Module, Answering, ModelHubMixin):
    """The model of the paper. Build it from pretrained parts (`from_backbones`) or from a
    checkpoint (`from_pretrained`)."""

    def __init__(self, config: SliMEConfig, vision: VisionTower, llm: PreTrainedModel,
                 processor: Processor):
        super().__init__()
        self.config, self.processor = config, processor
        width = vision.clip.config.hidden_size                                 # Dv
        self.vision = vision
        self.adapter = MoEAdapter(width, llm.config.hidden_size, processor.num_patches,
                                  gate_noise=config.gate_noise, gate_epsilon=config.gate_epsilon,
                                  expert=config.expert)
        self.compression = QueryFormer(width, config.num_queries)
        if config.look_nearby:
            self.compression.look_nearby(**config.look_nearby)
        self.llm = llm

    # ----------------------------------------------------------------------------- the forward pass

    def forward(self, batch: Batch, *, parts: str = "both", visual: Visual | None = None,
                normalizer: float | Tensor | None = None, logits: bool = True) -> Output:
        """Loss and logits at the supervised positions.

        `visual` is `see(batch, parts)` unless given. The loss is the summed cross-entropy over
        `normalizer`, by default the batch's number of supervised tokens; with several ranks or
        micro-batches it is that of the global batch. `logits` False: they are not kept, which at a
        large vocabulary saves gigabytes. ValueError if nothing is supervised: a mean over nothing
        would be a loss of zero or NaN.
        """
        visual = self.see(batch, parts) if visual is None else visual
        embeddings, labels, lengths = self.embed(batch, visual)
        hidden = self.decode(embeddings, lengths)                              # [T, D]
        supervised = torch.nonzero(labels != IGNORE)[:, 0]
        if len(supervised) == 0:
            raise ValueError("no supervised token in the batch: every answer is empty or masked")
        # The position before a supervised one predicts it. It belongs to the same sample, as what a
        # sample begins with is never supervised.
        hidden, targets = hidden[supervised - 1], labels[supervised]
        if logits:
            scores, loss = self.score(hidden, targets)                         # [supervised, C], []
        else:  # a chunk at a time, made again in the backward pass
            pieces = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
            scores, loss = None, sum(checkpoint(lambda *piece: self.score(*piece)[1], *piece,
                                                use_reentrant=False) for piece in pieces)
        normalizer = len(supervised) if normalizer is None else normalizer
        return Output(loss / normalizer, scores, len(embeddings))

    def score(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of hidden states, [A, D] -> [A, C], and their summed cross-entropy."""
        logits = self.llm.get_output_embeddings()(hidden)
        return logits, F.cross_entropy(logits.float(), targets, reduction="sum")

    def see(self, batch: Batch, parts: str = "both", gamma: float | None = None,
            random_tokens: bool = False, features: tuple[Tensor, Tensor] | None = None) -> Visual:
        """Encodes a batch's images: vision tower, adapter, compression, router.

        `gamma` overrides the configuration's; `random_tokens` keeps as many local tokens as the
        router would, but any. `features`: what `encode` gives, where it is at hand.
        ValueError for other `parts`, and where the batch brings no views for them.
        """
        if parts not in ("both", "global", "local"):
            raise ValueError(f'parts must be "both", "global" or "local", got {parts!r}')
        views, crops = self.encode(batch, parts) if features is None else features
        grids = batch.grids if parts != "global" else []
        if len(views) != (len(batch.grids) if parts != "local" else 0) or len(crops) != sum(
                columns * rows for columns, rows in grids):
            raise ValueError(f"the batch has {len(views)} global views and {len(crops)} crops for "
                             f"{len(batch.grids)} images, which does not fit parts {parts!r}")
        # The whole at a glance: both experts, all L tokens.
        whole, gates = self.adapter(views, batch.gate_noise if len(views) else None)  # [I, L, D]
        # The details: each crop condensed, and an image's crops joined into one raster.
        tokens = self.adapter.mlp(self.compression(crops))                     # [sum P, Nq, D]
        tokens = tokens.split([columns * rows for columns, rows in grids])     # I of [P, Nq, D]
        local = [stitch(t, grid) for t, grid in zip(tokens, grids, strict=True)]  # I of [M, D]
        if gamma is None:
            gamma = self.config.gamma if parts == "both" else 1.0  # stage II learns from all
        return Visual(whole, gates, local, self.choose(batch, local, gamma, random_tokens))

    def encode(self, batch: Batch, parts: str = "both") -> tuple[Tensor, Tensor]:
        """The frozen tower's features of global views [I, L, Dv] and of crops [sum P, L, Dv], in
        one call; of what `parts` leaves out there are none."""
        views = batch.global_views if parts != "local" else batch.global_views[:0]
        crops = batch.crops if parts != "global" else batch.crops[:0]
        shown = [part for part in (views, crops) if len(part)]
        w_gate = self.adapter.w_gate
        features = w_gate.new_zeros(0, self.adapter.num_tokens, len(w_gate))   # [0, L, Dv]
        if shown:
            shown = torch.cat(shown)  # pixels, or what the tower has said of them
            shown = shown if shown.is_floating_point() else self.vision(shown)
            features = shown.to(w_gate.dtype)                                  # [V, L, Dv]
        return features.split([len(views), len(crops)])

    def choose(self, batch: Batch, local: list[Tensor], gamma: float,
               random: bool = False) -> list[Tensor]:
        """The router: I local rasters [M, D] -> I choices bool [M], each by its sample's
        question."""
        c = self.config
        if gamma == 1 or not local:
            return [tokens.new_ones(len(tokens), dtype=torch.bool) for tokens in local]
        ids, lengths = batch.question, batch.question_lengths
        if c.router_text == "all":
            ids, lengths = batch.words, batch.lengths
        questions = self.llm.get_input_embeddings()(ids).split(lengths)        # B of [Q, D]
        owners = [sample for sample, runs in enumerate(batch.runs) for _ in runs[1:]]  # I
        noise = [None] * len(local)
        if self.training and c.router_noise:
            sizes = [len(tokens) for tokens in local]
            noise = batch.router_noise                                         # [sum M]
            if noise is None:
                noise = torch.randn(sum(sizes), device=local[0].device)
            noise = (c.router_noise * noise).split(sizes)                      # I of [M]
        return [route(tokens, questions[owner], gamma, score=c.router_score,
                      temperature=c.router_temperature, noise=draws, random=random)
                for tokens, owner, draws in zip(local, owners, noise, strict=True)]

    def embed(self, batch: Batch, visual: Visual) -> tuple[Tensor, Tensor, list[int]]:
        """Puts each image's tokens between its words: embeddings [T, D], labels [T], lengths per
        sample (sum T). ValueError where one exceeds the language model's context."""
        table = self.llm.get_input_embeddings()
        # Images: global view, separator, what is kept of the local tokens.
        images = [[view] for view in visual.whole] or [[] for _ in batch.grids]  # I of [[L, D]]
        if visual.local:
            separator = table(batch.words.new_full((1,), self.processor.separator_id))
            counts = torch.stack([keep.sum() for keep in visual.keep]).tolist()  # waits for a GPU
            kept = torch.nonzero_static(torch.cat(visual.keep), size=sum(counts))[:, 0]
            kept = torch.cat(visual.local)[kept].split(counts)                 # I of [K, D]
            for image, tokens in zip(images, kept, strict=True):
                image += [separator, tokens] if image else [tokens]            # [1, D], [K, D]
        images = iter([torch.cat(image) for image in images])
        # Samples: words, image, words, image, words.
        pieces = [length for runs in batch.runs for length in runs]
        words = iter(table(batch.words).split(pieces))                         # of [run, D]
        labels = iter(batch.labels.split(pieces))
        rows, targets, lengths = [], [], []
        for runs in batch.runs:
            rows.append(next(words))
            targets.append(next(labels))
            length = len(rows[-1])
            for _ in runs[1:]:
                image = next(images)
                rows += [image, next(words)]
                targets += [batch.labels.new_full((len(image),), IGNORE), next(labels)]
                length += len(image) + len(rows[-1])
            lengths.append(length)
        longest = getattr(self.llm.config, "max_position_embeddings", None)
        if longest is not None and max(lengths) > longest:
            raise ValueError(f"a sample of {max(lengths)} tokens exceeds the language model's "
                             f"{longest}: lower max_crops or gamma, or shorten the conversation")
        return torch.cat(rows).to(self.llm.dtype), torch.cat(targets), lengths

    def decode(self, embeddings: Tensor, lengths: list[int]) -> Tensor:
        """The language model over packed samples, positions restarting: [T, D] -> [T, D]."""
        segments = Segments(lengths, embeddings.device)
        output = self.llm.get_decoder()(inputs_embeds=embeddings[None], segments=segments,
                                        position_ids=segments.positions[None], use_cache=False)
        return output.last_hidden_state[0]

    def use_attention(self, choice: str) -> None:
        """How the query formers attend, see `qformer.query_attention`."""
        self.adapter.query_former.attention = self.compression.attention = choice

    # -------------------------------------------------------------------------- reading and writing

    @classmethod
    def from_backbones(cls, config: SliMEConfig, dtype: torch.dtype = torch.float32) -> "SliME":
        """A model to train: pretrained tower and language model, everything between them new."""
        found = pretrained.read(config)
        return cls.build(found, dtype).fill(found, "cpu")

    @classmethod
    def from_pretrained(cls, name: str | Path, *, dtype: torch.dtype = torch.float32,
                        float32: tuple[str, ...] = (), revision: str | None = None) -> "SliME":
        """Reads a checkpoint, ours or a released one, from a folder or a hub id. Strict: every
        tensor of the model comes from it, and no other. LoRA adapters are merged. `float32`:
        submodules that stay in float32 whatever `dtype` is. FileNotFoundError or CheckpointError,
        in one line, for what is no checkpoint."""
        found = released.read_any(files.find(name, revision))
        return cls.build(found, dtype, float32).fill(found, "cpu").eval()

    @classmethod
    def build(cls, found: files.Checkpoint, dtype: torch.dtype,
              float32: tuple[str, ...] = ()) -> "SliME":
        """The model of a checkpoint, tower and language model still without weights (`fill`)."""
        c = found.config
        with files.reading(found.folder / "config.json"):
            tower = pretrained.cut(CLIPVisionConfig.from_dict(c.vision_config), c.vision_layer)
            model = cls(c, VisionTower(tower), build_llm(c.llm_config, dtype),
                        Processor(c, found.tokenizer))
        for name, part in model.named_children():
            cast(part, torch.float32 if name in float32 else dtype)
        return model

    def fill(self, found: files.Checkpoint, device: torch.device | str,
             offload: bool = False) -> "SliME":
        """Moves the model to a device and reads its weights, or this rank's part of them."""
        materialise(self, device, offload)
        self.source = found.folder
        self.llm.tie_weights()
        files.fill(without_lora(self.tensors()), found.tensors, found.folder, found.called,
                   found.optional)
        return self

    def save_pretrained(self, folder: str | Path, *, config: None = None,
                        model_card_kwargs: dict | None = None) -> None:
        """Writes config.json, safetensors and the tokenizer's files, or nothing (OSError); and a
        model card (see `card.write`). `push_to_hub` passes the keywords along."""
        files.write(Path(folder), self.config, self.tensors(), self.processor.tokenizer)
        card.write(Path(folder), self.config, getattr(self, "source", None), model_card_kwargs)

    def tensors(self) -> dict[str, Tensor]:
        """All parameters and persistent buffers by name; tied weights once."""
        names = dict(self.named_parameters()) | dict(self.named_buffers())
        return {name: tensor for name, tensor in self.state_dict().items() if name in names}


def stitch(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """An image's crops, row by row [P, g * g, D], as one raster over the whole image [M, D], as if
    glued together (the released code's `spatial` order)."""
    side = int(tokens.shape[1] ** 0.5)                                         # g
    tokens = tokens.unflatten(0, grid[::-1])                                   # [row, column, ..]
    tokens = tokens.unflatten(2, (side, side))                                 # [.., .., y, x, D]
    return tokens.transpose(1, 2).flatten(0, 3)                                # [M, D]
