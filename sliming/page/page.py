"""What the model looked at for its questions, as one HTML file that moves (Fig. 2).

The model is asked once, here, for all that the page may show; page.html gets it as JSON and page.js
does the rest in the browser. The router's choice follows gamma there: its scores and the weights
that it adds up travel bit for bit, so that the same rule keeps the same tokens.

Legend: M local tokens of one image in raster order, L tokens of its global view, S crop size, Q
tokens of the question, D channels of the LLM.
"""

import base64
import io
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sliming.explain import draw, raster
from sliming.generate import Conversation
from sliming.guard import naming, plain
from sliming.images import ImageSource, full_size, open_image
from sliming.inputs import Batch
from sliming.model import Visual
from sliming.router import relevance
from sliming.slicer import Slices, weigh_grids

GAMMAS = (1.0, 0.75, 0.5, 0.25)  # whose answers are shown
SIDE = 1400                      # pixels of a picture in the page, at most
SHARP = 512                      # up to here it is kept as it is, beyond it is a JPEG


def explain(model: nn.Module, talks: list[Conversation], path: Path) -> None:
    """Writes what the model looked at in conversations about the same images: a page of all of
    them (.html), or a picture (any other suffix) of the first question. OSError."""
    if path.suffix.lower() in (".html", ".htm"):
        with naming(path):
            path.write_text(page(model, talks), encoding="utf-8")
    else:
        first = talks[0]
        draw(model, first.first, first.options.get("gamma"), first.turns[0][1], path)


def page(model: nn.Module, talks: list[Conversation]) -> str:
    """The page of one conversation or more, each of at least one turn, about the same images."""
    c, processor = model.config, model.processor
    first = talks[0]
    shown = {
        "model": {"crop": processor.crop_size, "side": model.compression.side,
                  "patches": processor.num_patches, "slicing": c.slicing, "score": c.router_score,
                  "temperature": c.router_temperature, "text": c.router_text,
                  "vision": c.vision, "llm": c.llm},
        "images": [picture(model, *pair) for pair in zip(first.images, first.first.images,
                                                         strict=True)],
        "questions": [look(model, talk) for talk in talks],
    }
    # No "<" of a question, an answer or a file's name can end the script that the JSON lies in.
    data = json.dumps(shown).replace("<", "\\u003c")
    template, script = (Path(__file__).with_name(name).read_text(encoding="utf-8")
                        for name in ("page.html", "page.js"))
    return template.replace("@script@", script).replace('"@shown@"', data)


def picture(model: nn.Module, source: ImageSource, slices: Slices) -> dict:
    """An image as the model got it, and all the grids that the rule weighed for it."""
    columns, rows = slices.grid
    size = full_size(open_image(source))
    weighed = weigh_grids(*size, **model.processor.grid_rule(None))
    named = isinstance(source, str | os.PathLike)
    return {"name": plain(Path(source).name) if named else "image", "size": size,
            "grid": slices.grid, "canvas": data_uri(raster(slices.crops, columns, rows)),
            "view": data_uri(slices.global_view.permute(1, 2, 0).numpy()),
            "weighed": [[*grid, *pixels] for grid, pixels in weighed.items()]}


@torch.no_grad()
def look(model: nn.Module, talk: Conversation) -> dict:
    """What a conversation's first question made of its images, and what was said."""
    c, processor, sample = model.config, model.processor, talk.first
    batch = Batch.pack([sample])
    features, batch = model.encode_once(batch), batch.to(model.device)
    visual = model.see(batch, gamma=1.0, features=features)
    # The words that the router reads, as model.choose takes them.
    ids = batch.words if c.router_text == "all" else batch.question
    words = spell(processor.tokenizer, ids.tolist())
    embedded = model.llm.get_input_embeddings()(ids)                           # [Q, D]
    images = []
    for local, gates in zip(visual.local, visual.gates, strict=True):          # [M, D], [L, 2]
        scores = relevance(local, embedded, c.router_score) / c.router_temperature  # [M]
        cosines = [relevance(local, word) for word in embedded.split([n for _, n in words])]
        images.append({"scores": floats(scores), "weights": floats((scores - scores.max()).exp()),
                       "cosines": [shorts(word) for word in cosines],
                       "gates": [shorts(gate) for gate in gates.T]})
    gamma = talk.options.get("gamma")
    return {"turns": talk.turns, "words": [text for text, _ in words],
            "gamma": c.gamma if gamma is None else gamma, "images": images,
            "text": len(batch.words), "answers": answers(model, batch, visual, talk.max_new_tokens)}


def answers(model: nn.Module, batch: Batch, visual: Visual, max_new_tokens: int) -> list[dict]:
    """The most probable answers at each gamma: with the tokens that the router keeps, and with as
    many drawn at random."""
    def answer(keep: list[Tensor]) -> str | None:
        try:
            inputs, _, lengths = model.embed(batch, replace(visual, keep=keep))
        except ValueError:  # more than the language model can read
            return None
        (ids,) = model.go_on(inputs, lengths, max_new_tokens=max_new_tokens)
        return model.processor.tokenizer.decode(ids).strip()

    rows = []
    for gamma in GAMMAS:
        routed, drawn = (model.choose(batch, visual.local, gamma, random) for random in
                         (False, True))
        rows.append({"gamma": gamma, "kept": sum(int(keep.sum()) for keep in routed),
                     "router": answer(routed), "random": answer(drawn)})
    return rows


def spell(tokenizer, ids: list[int]) -> list[tuple[str, int]]:
    """Tokens as text, each with its number: one, or as many as a character takes."""
    found, text, done = [], "", 0
    for end in range(1, len(ids) + 1):
        longer = tokenizer.decode(ids[:end])
        if end == len(ids) or not longer.endswith("\ufffd"):  # a character is not yet whole
            found.append((longer[len(text):], end - done))
            text, done = longer, end
    return found


# ---------------------------------------------------------------------------- what travels, and how


def floats(values: Tensor) -> str:
    """float32, bit for bit, in base64."""
    return base64.b64encode(values.float().cpu().numpy().astype("<f4").tobytes()).decode()


def shorts(values: Tensor) -> str:
    """Numbers of -1 to 1 in steps of 1/32767, in base64."""
    whole = (values.float().cpu().nan_to_num() * 32767).round().numpy()
    return base64.b64encode(whole.astype("<i2").tobytes()).decode()


def data_uri(pixels: np.ndarray) -> str:
    """A picture uint8 [height, width, 3] for an <img>: small ones as they are, others scaled."""
    image, file = Image.fromarray(pixels), io.BytesIO()
    kind = "png" if max(image.size) <= SHARP else "jpeg"
    image.thumbnail((SIDE, SIDE))
    image.save(file, kind, quality=82, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
