"""What the model reads: samples, batches of them, and the processor that makes samples of images
and words.

Samples are ragged: any number of images, none included, each with its own grid, question and
length. A batch lays them end to end; nothing is padded.

Legend: B samples, I images, S crop size, L patches per view, P crops of an image, Nq queries per
crop, M local tokens of all images, N words (text tokens) of all samples, Q of their questions.
"""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionConfig, PreTrainedTokenizerBase

from sliming.chat import IGNORE, IMAGE, IMAGE_TOKEN, Encoded, encode, without_markers
from sliming.config import SliMEConfig
from sliming.images import ImageSource, open_image
from sliming.slicer import Slices, choose_grid, inner, slice_image


@dataclass(frozen=True)
class Sample:
    """One conversation and its images, in the order of their markers."""

    text: Encoded
    images: list[Slices]
    # Standard normals for training; drawn by the model where None.
    gate_noise: Tensor | None = None    # float32 [I, L, 2] of this sample's images
    router_noise: Tensor | None = None  # float32 [M], its local tokens in raster order


@dataclass(frozen=True)
class Batch:
    """Samples end to end. Lengths are host integers, so that using them never waits for the GPU."""

    words: Tensor                  # int64 [N] token ids, images left out
    labels: Tensor                 # int64 [N], IGNORE where nothing is learned
    question: Tensor               # int64 [Q] token ids of the samples' questions
    global_views: Tensor           # uint8 [I, 3, S, S], or none of them in stage II
    crops: Tensor                  # uint8 [sum P, 3, S, S], or none of them in stage I; both may
                                   # be the tower's features instead: float [.., L, Dv]
    runs: list[list[int]]          # per sample: words before, between and behind its images; sum N
    question_lengths: list[int]    # per sample; sum Q
    grids: list[tuple[int, int]]   # (columns, rows) per image
    gate_noise: Tensor | None = None    # float32 [I, L, 2]; None unless all samples bring theirs
    router_noise: Tensor | None = None  # float32 [M]

    @staticmethod
    def pack(samples: list[Sample]) -> "Batch":
        """Packs samples; ValueError if a sample has not one marker per image."""
        words, labels, runs = [], [], []
        for index, sample in enumerate(samples):
            runs.append([0])
            for token, label in zip(sample.text.ids, sample.text.labels, strict=True):
                if token == IMAGE_TOKEN:
                    runs[-1].append(0)
                else:
                    words.append(token)
                    labels.append(label)
                    runs[-1][-1] += 1
            if len(runs[-1]) - 1 != len(sample.images):
                raise ValueError(f"sample {index} has {len(runs[-1]) - 1} {IMAGE} markers and "
                                 f"{len(sample.images)} images")
        images = [image for sample in samples for image in sample.images]
        views = [image.global_view[None] for image in images if image.global_view is not None]
        crops = [image.crops for image in images if image.crops is not None]
        nothing = torch.zeros(0, 3, 1, 1, dtype=torch.uint8)
        return Batch(
            words=torch.tensor(words, dtype=torch.long),
            labels=torch.tensor(labels, dtype=torch.long),
            question=torch.tensor([t for s in samples for t in s.text.question], dtype=torch.long),
            global_views=torch.cat(views) if views else nothing,
            crops=torch.cat(crops) if crops else nothing,
            runs=runs,
            question_lengths=[len(sample.text.question) for sample in samples],
            grids=[image.grid for image in images],
            **{noise: torch.cat([getattr(sample, noise) for sample in samples])
               for noise in ("gate_noise", "router_noise")
               if all(getattr(sample, noise) is not None for sample in samples)})

    @property
    def lengths(self) -> list[int]:
        """Words per sample; sum N."""
        return [sum(run) for run in self.runs]

    def to(self, device: torch.device | str) -> "Batch":
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """What a DataLoader calls, so that `to` need not wait."""
        return self.map(Tensor.pin_memory)

    def map(self, change) -> "Batch":
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: change(tensor) for name, tensor in tensors.items()
                                if isinstance(tensor, Tensor)})


class Processor:
    """Turns images and words into samples as a model's settings ask. It carries no weights, so that
    every data worker may have one."""

    def __init__(self, config: SliMEConfig, tokenizer: PreTrainedTokenizerBase | None):
        self.config, self.tokenizer = config, tokenizer
        tower = CLIPVisionConfig.from_dict(config.vision_config)
        self.crop_size = tower.image_size                                      # S
        self.num_patches = (tower.image_size // tower.patch_size) ** 2         # L
        self.separator_id = config.separator_id
        if self.separator_id is None:
            tokens = tokenizer(config.separator, add_special_tokens=False)["input_ids"]
            self.separator_id = tokens[-1]

    @property
    def context(self) -> int | None:
        """Tokens that the language model can read, where it says so."""
        return self.config.llm_config.get("max_position_embeddings")

    def grid(self, width: int, height: int, max_crops: int | None = None) -> tuple[int, int]:
        """(columns, rows) of an image by the model's rule, `max_crops` crops at most if given."""
        return choose_grid(width, height, **self.grid_rule(max_crops))

    def slice(self, image: ImageSource | Slices, max_crops: int | None = None,
              parts: str = "both") -> Slices:
        """Slices an image by the model's rules, see `slicer.slice_image`; one that is sliced
        already stays as it is."""
        if isinstance(image, Slices):
            return image
        return slice_image(self.open(image), global_view=self.config.global_view, parts=parts,
                           resize=self.config.resize, **self.grid_rule(max_crops))

    def open(self, source: ImageSource) -> Image.Image:
        """Opens an image to be sliced. Where torch resizes, a JPEG file whose canvas has at most
        half of its width and height is decoded smaller: most of its pixels would be thrown away."""
        def on_canvas(width: int, height: int) -> tuple[int, int]:
            columns, rows = self.grid(width, height)
            return inner((width, height), columns * self.crop_size, rows * self.crop_size)

        return open_image(source, on_canvas if self.config.resize == "torch" else None)

    def grid_rule(self, max_crops: int | None) -> dict:
        """The arguments of `slicer.choose_grid`."""
        c = self.config
        rule = c.slicing if max_crops is None else "paper"  # the released rule bounds nothing
        return {"rule": rule, "crop_size": self.crop_size, "max_crops": max_crops or c.max_crops,
                "max_side": c.max_side if rule == "paper" else 6}

    def prompt(self, conversation: list[dict], images: list[ImageSource | Slices]) -> Sample:
        """A conversation (see `chat.encode`) with its images. ValueError without a tokenizer."""
        if self.tokenizer is None:
            raise ValueError("this checkpoint came without tokenizer files: put its "
                             "tokenizer_config.json and tokenizer.json (or tokenizer.model) into "
                             "its folder")
        text = encode(conversation, self.config.template, self.tokenizer)
        return Sample(text, [self.slice(image) for image in images])

    def ask(self, image: ImageSource | Slices | list[ImageSource | Slices] | None,
            question: str) -> Sample:
        """A question about an image, several images or none, as a prompt. Markers in the question
        are dropped."""
        images = [] if image is None else image if isinstance(image, list) else [image]
        turn = {"from": "human", "value": f"{IMAGE}\n" * len(images) + without_markers(question)}
        return self.prompt([turn], images)

    def token_count(self, text: Encoded, grids: list[tuple[int, int]], parts: str) -> int:
        """Tokens of a sample for the language model, before the router drops any."""
        local = sum(columns * rows for columns, rows in grids) * self.config.num_queries
        whole = len(grids) * (self.num_patches + (parts == "both"))            # and the separator
        return (len(text.ids) - len(grids) + (whole if parts != "local" else 0)
                + (local if parts != "global" else 0))

    def with_noise(self, sample: Sample, *key: int) -> Sample:
        """The sample with the training noise of `key`: the same on any rank and in any batch."""
        generator = torch.Generator().manual_seed(seed_of(*key))
        local = sum(c * r for c, r in (image.grid for image in sample.images))
        return replace(
            sample,
            gate_noise=torch.randn(len(sample.images), self.num_patches, 2, generator=generator),
            router_noise=torch.randn(local * self.config.num_queries, generator=generator))

    def blank(self, learned: bool) -> Sample:
        """One dark crop: what a rank without images runs, so that all ranks run the same modules.

        `learned` False: nothing of it is supervised. True: one token is, for a batch of its own
        whose loss counts nothing.
        """
        view = torch.zeros(3, self.crop_size, self.crop_size, dtype=torch.uint8)
        word = self.separator_id
        labels = [IGNORE, IGNORE, word if learned else IGNORE]
        sample = Sample(Encoded([word, IMAGE_TOKEN, word], labels, [word]),
                        [Slices(view, view[None], (1, 1))])
        return self.with_noise(sample, 0)


def seed_of(*key: int) -> int:
    """One seed for torch from several numbers."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
