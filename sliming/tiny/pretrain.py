"""How the two stand-ins of the tiny preset come to be: a vision tower that reads, a language model that looks things up.

`python -m sliming.tiny --pretrain FOLDER` runs this. The stand-ins are to CLIP and Vicuna what the tiny preset is to
SliME: something competent to freeze. They are *not* a small CLIP and a small Vicuna:

* The vision tower learns from the picture generator's own dense labels (what is drawn where, which glyphs), so it is a
  supervised reader. Its patch features are asked to carry, linearly: colour and role of what covers the patch, the
  number and the letter printed there if they are large enough to be read, and on background patches of whole pictures
  what CLIP's background patches are known to carry as well, a summary of the picture (kind, count, colour that stands out).
* The language model learns to look facts up. In a third of its documents the facts are plain text. In the others they come
  as *slots*: one vector per fact, the sum of its words' embeddings, in random order among blanks and noise, which is what
  an adapter's output can look like to it. Captions, descriptions, questions and answers are those of pictures.py, from a
  random stream of their own. It answers what is asked about slots well; in plain text it finds words, but mixes numbers
  up (see the README of this folder).

Legend: V views, L = 64 patches per view (8 x 8), Dv = 128 vision width, D = 128 language model width.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sliming.backbones import VisionTower
from sliming.qformer import sincos_2d
from sliming.slicer import slice_image
from sliming.tiny.pictures import (
    COLOURS,
    COUNTS,
    CROP,
    DETAIL_PROMPTS,
    KINDS,
    LETTERS,
    NUMBER_SIZE,
    SHAPES,
    Scene,
    caption,
    description,
    detail_questions,
    generator,
    global_questions,
    render,
    sample_scene,
)

VISION_STEPS, LLM_STEPS = 2500, 900
PATCH = 8
ROLES = ("", "bar", "row", "header", *SHAPES)
CLASSES = {"colour": ("", *COLOURS), "role": ROLES, "letter": ("", *LETTERS), "tens": ("", *"123456789"),
           "ones": ("", *"0123456789"), "kind": KINDS, "count": range(6), "accent": ("", *COLOURS)}
GLYPH_CLASSES = ("", *"0123456789", *LETTERS)

# ----------------------------------------------------------------------------------------------------- the vision tower


def dense_labels(scene: Scene, x0: float, y0: float, scale: float, whole: bool) -> dict[str, np.ndarray]:
    """What each patch of one view shows: {head: int64 [L]}, -100 where nothing is asked, and "glyph" on the finer grid.

    The picture's upper left corner lies at (x0, y0) of the view, in the view's pixels, and is drawn at `scale`.
    `whole`: the view shows the whole picture.
    """
    side = CROP // PATCH
    centre = (np.arange(side) + 0.5) * PATCH
    x = np.broadcast_to((centre - x0) / scale, (side, side))           # picture coordinates of each patch's centre
    y = np.broadcast_to(((centre - y0) / scale)[:, None], (side, side))
    labels = {head: np.zeros((side, side), dtype=np.int64) for head in ("colour", "role", "letter", "tens", "ones")}
    glyphs = np.zeros((2 * side, 2 * side), dtype=np.int64)            # the stem's grid
    width, height = scene.size
    if scene.kind == "table":
        header = (y >= 3) & (y < scene.items[0].box[1]) & (x >= 3) & (x < width - 3)
        labels["role"][header], labels["colour"][header] = ROLES.index("header"), CLASSES["colour"].index(scene.accent)
    for item in scene.items:
        left, top, right, bottom = item.box
        inside = (x >= left) & (x < right) & (y >= top) & (y < bottom)
        if item.role in SHAPES:  # the corners of a shape's box are background
            u, v = (x - left) / (right - left) * 2 - 1, (y - top) / (bottom - top) * 2 - 1
            reach = {"circle": u * u + v * v <= 1, "diamond": abs(u) + abs(v) <= 1,
                     "triangle": abs(u) <= (v + 1) / 2, "square": inside}[item.role]
            inside &= reach
        mid_x, mid_y = item.print_at[0] + NUMBER_SIZE[0] / 2, item.print_at[1] + NUMBER_SIZE[1] / 2
        nearest = (abs(x - mid_x) * scale <= PATCH / 2) & (abs(y - mid_y) * scale <= PATCH / 2)
        near_print = nearest | ((abs(x - mid_x) <= 8) & (abs(y - mid_y) <= 6)) if scale == 1 else nearest
        here = inside | near_print
        labels["role"][here] = ROLES.index(item.role)
        labels["colour"][here] = CLASSES["colour"].index(item.colour)
        if scale == 1:
            labels["tens"][near_print] = item.number // 10
            labels["ones"][near_print] = 1 + item.number % 10
            labels["letter"][near_print] = CLASSES["letter"].index(item.letter)
            printed = [(item.print_at, str(item.number)[0]), ((item.print_at[0] + 6, item.print_at[1]), str(item.number)[1])]
            for (gx, gy), glyph in printed + ([(item.letter_at, item.letter)] if item.letter else []):
                column, row = int((gx + 2.5 + x0) // 4), int((gy + 3.5 + y0) // 4)
                if 0 <= column < 2 * side and 0 <= row < 2 * side:
                    glyphs[row, column] = GLYPH_CLASSES.index(glyph)
    background = labels["role"] == 0
    for head, value in (("kind", KINDS.index(scene.kind)), ("count", len(scene.items)),
                        ("accent", CLASSES["accent"].index(scene.accent))):
        labels[head] = np.where(background & whole, value, -100)
    flat = {head: grid.reshape(-1) for head, grid in labels.items()}   # [8, 8] -> [L]
    flat["glyph"] = glyphs.reshape(-1)                                 # [16, 16] -> [256]
    return flat


def tower_batch(rng: np.random.Generator, scenes: int, small: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Views uint8 [V, 3, S, S] and their dense labels {head: int64 [V, L]} from fresh pictures."""
    views, labels = [], []
    for index in range(scenes + small):
        scene = sample_scene(rng, small=index >= scenes)
        slices = slice_image(render(scene, rng), crop_size=CROP)
        width, height = scene.size
        scale = CROP / max(width, height)
        views.append(slices.global_view)
        labels.append(dense_labels(scene, (CROP - width * scale) / 2, (CROP - height * scale) / 2, scale, whole=True))
        if scene.small:
            continue
        columns, rows = slices.grid
        for crop in rng.permutation(columns * rows)[:4]:
            views.append(slices.crops[crop])
            labels.append(dense_labels(scene, -(crop % columns) * CROP, -(crop // columns) * CROP, 1, whole=False))
    stacked = {head: torch.from_numpy(np.stack([label[head] for label in labels])) for head in labels[0]}
    return torch.stack(views), stacked


def balanced_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in which "something is here" and "nothing is here" (class 0) each have a mean of their own.

    Few patches show print; in one mean over all patches they would drown (digits stay at chance).
    """
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    labels = labels.flatten()
    total = logits.new_zeros(())
    for part in (labels > 0, labels == 0):
        if part.any():
            total = total + loss[part].mean()
    return total


def pretrain_vision(steps: int, seed: int, learning_rate: float = 2e-3) -> VisionTower:
    """Trains the tiny vision tower on dense labels; prints held-out accuracy per head."""
    torch.manual_seed(seed)
    config = CLIPVisionConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
                              image_size=CROP, patch_size=PATCH, conv_stem=True)
    tower = VisionTower(config, layer=-1).requires_grad_(True)
    with torch.no_grad():
        tower.clip.embeddings.position_embedding.weight[1:] = 0.5 * sincos_2d(128, CROP // PATCH)
    heads = nn.ModuleDict({head: nn.Linear(128, len(classes)) for head, classes in CLASSES.items()})
    glyph_head = nn.Linear(64, len(GLYPH_CLASSES))
    parameters = [*tower.parameters(), *heads.parameters(), *glyph_head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=0.08)

    def losses(views: Tensor, labels: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        pixels = (views.float() / 255 - tower.mean) / tower.std
        features = tower.features(pixels)
        logits = {head: linear(features) for head, linear in heads.items()}
        fine = tower.clip.embeddings.patch_embedding.fine(pixels).flatten(2).transpose(1, 2)  # [V, 256, 64]
        logits["glyph"] = glyph_head(fine)
        return {head: balanced_loss(logits[head], labels[head]) for head in logits}, logits

    start = time.time()
    for step in range(steps):
        rng = generator("pretraining", 0, seed, step)
        loss, _ = losses(*tower_batch(rng, scenes=9, small=11))
        total = sum(loss.values())
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            with torch.no_grad():
                views, labels = tower_batch(generator("pretraining", 1, seed), scenes=40, small=40)
                _, logits = losses(views, labels)
            scores = {head: (logits[head].argmax(-1) == labels[head])[labels[head] > 0].float().mean().item()
                      for head in logits}
            print(f"vision step {step:5d}  loss {total.item():.3f}  {time.time() - start:.0f} s  " +
                  "  ".join(f"{head} {score:.3f}" for head, score in scores.items()), flush=True)
    return tower.requires_grad_(False)


# -------------------------------------------------------------------------------------------------- the language model


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE: any UTF-8 text has tokens, the words of the built-in pictures have one each.

    A number of one or two digits is one token, as numbers of up to three digits are in Llama 3's vocabulary. With a token
    per digit the small model looks the second digit up by the first, and answers 68 for 62.
    """
    texts = []
    for index in range(4000):
        rng = generator("pretraining", 2, index)
        scene = sample_scene(rng, small=index % 2 == 0)
        pairs = detail_questions(scene) + global_questions(scene)
        texts += [" " + caption(scene, rng, readable=scene.small), " " + description(scene, rng)]
        texts += [f"USER: \n{question} ASSISTANT: {answer}" for question, answer in pairs]
    texts += [prompt for prompt in DETAIL_PROMPTS for _ in range(200)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r" ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=1024, special_tokens=["<s>", "</s>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@dataclass
class Document:
    """One training text of the language model. Each position holds the weighted sum of up to W word embeddings."""

    words: list[list[tuple[int, float]]] = field(default_factory=list)  # per position: (token id, weight)
    slot: list[int] = field(default_factory=list)       # per position: -1 text, else the number of the fact it shows
    learn: list[bool] = field(default_factory=list)     # per position: is this token a target?
    answers: list[tuple[int, int]] = field(default_factory=list)   # spans [start, end) of the answers' tokens
    asked: list[tuple[int, int, int]] = field(default_factory=list)  # question's span and the fact it asks for

    def text(self, ids: list[int], learn: bool = True) -> tuple[int, int]:
        start = len(self.words)
        self.words += [[(token, 1.0)] for token in ids]
        self.slot += [-1] * len(ids)
        self.learn += [learn] * len(ids)
        return start, len(self.words)


def write_document(rng: np.random.Generator, tokenizer: PreTrainedTokenizerFast, small: float) -> Document:
    """One document: facts as text or as slots, then a caption, a description or up to five questions and answers.

    `small`: the share of small pictures, which have one or two facts."""
    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    scene = sample_scene(rng, small=rng.random() < small)
    document = Document()
    details, general = detail_questions(scene), global_questions(scene)
    pairs = [(question, answer, fact) for fact, (question, answer) in enumerate(details)]
    summary = len(scene.items)  # the number of the "fact" that is the whole picture
    by_name = {item.role: index for index, item in enumerate(scene.items)} | {
        item.colour: index for index, item in enumerate(scene.items)}
    for question, answer in general:
        asks_whole = question.startswith("How many") or scene.kind != "shapes"
        pairs.append((question, answer, summary if asks_whole else by_name[question.rstrip("?").split()[-1]]))
    document.text([tokenizer.bos_token_id], learn=False)
    as_text = rng.random() < 0.35
    form = rng.choice(["questions", "questions", "questions", "description", "caption"])
    if form != "caption":
        document.text(ids("USER: "), learn=False)
    if as_text:
        document.text(ids(f" {caption(scene, rng, readable=scene.small)} {description(scene, rng)}"))
        form = "questions"
    else:
        local_only = form == "description" and rng.random() < 0.7
        global_only = form == "caption"
        _write_slots(document, scene, rng, ids, show_global=not local_only, show_local=not global_only)
    if form == "caption":
        document.text(ids(caption(scene, rng, readable=scene.small)) + [tokenizer.eos_token_id])
        return document
    document.text(ids("\n"), learn=False)
    if form == "description":
        document.text(ids(DETAIL_PROMPTS[rng.integers(len(DETAIL_PROMPTS))] + " ASSISTANT:"), learn=False)
        document.text(ids(" " + description(scene, rng)) + [tokenizer.eos_token_id])
        return document
    for turn in range(int(rng.integers(2, 6))):
        if turn:
            document.text(ids("USER: "), learn=False)
        question, answer, fact = pairs[rng.integers(len(pairs))]
        document.asked.append((*document.text(ids(question), learn=False), fact))
        document.text(ids(" ASSISTANT:"), learn=False)
        document.answers.append(document.text(ids(" " + answer) + [tokenizer.eos_token_id]))
    return document


def _write_slots(document, scene, rng, ids, show_global: bool, show_local: bool) -> None:
    """Adds slots for a global view (no print unless the picture is small), a separator, and local views."""
    def word(text: str) -> int:
        (token,) = ids(" " + text)
        return token

    plain, printed = [], []
    for item in scene.items:
        name = [word(part) for part in item.name.split()]
        plain.append(name)
        printed.append(name + ids(f" {item.number}"))
    noun = {"chart": "bars", "table": "rows", "shapes": "shapes"}[scene.kind]
    standing_out = {"chart": ["tallest", scene.accent], "table": ["header", scene.accent], "shapes": []}[scene.kind]
    whole = [word(text) for text in (noun, COUNTS[len(scene.items)], *standing_out)]
    summary = len(scene.items)

    def place(slots: list[tuple[list[int], int]], blanks: int) -> None:
        slots = slots + [([], -2)] * blanks
        for index in rng.permutation(len(slots)):
            tokens, fact = slots[index]
            strength = rng.uniform(0.6, 1.4)
            words = [(token, strength) for token in tokens]
            if rng.random() < 0.3:  # a neighbour shines through
                other = slots[rng.integers(len(slots))][0]
                words += [(token, strength * 0.3) for token in other]
            document.words.append(words[:10])
            document.slot.append(fact)
            document.learn.append(False)

    facts = range(len(scene.items))
    if show_global:
        slots = [(whole, summary)] * int(rng.integers(2, 9))
        for fact in facts:
            shown = printed[fact] if scene.small else plain[fact] if scene.kind != "table" else [word("row")]
            slots += [(shown, fact)] * int(rng.integers(1, 4))
        place(slots, blanks=int(rng.integers(0, 6)))
    if show_global and show_local:
        document.text(ids(","), learn=False)
    if show_local:
        slots = []
        for fact in facts:
            slots += [(printed[fact], fact)] * int(rng.integers(1, 4))
            slots += [(plain[fact] if scene.kind != "table" else [word("row")], -2)] * int(rng.integers(0, 4))
        misleading = [word(noun), word(COUNTS[rng.integers(1, 6)])]  # a crop's own summary is not the picture's
        slots += [(misleading, -2)] * int(rng.integers(0, 6))
        place(slots, blanks=int(rng.integers(0, 16)))


def lm_batch(rng: np.random.Generator, tokenizer, count: int, small: float = 0.3, width: int = 10) -> dict[str, Tensor]:
    """`count` documents, right-padded: words and weights [B, T, W], positions, targets, slot [B, T], and the documents."""
    documents = [write_document(rng, tokenizer, small) for _ in range(count)]
    length = max(len(document.words) for document in documents)
    words = np.zeros((count, length, width), dtype=np.int64)
    weights = np.zeros((count, length, width), dtype=np.float32)
    targets = np.full((count, length), -100, dtype=np.int64)
    positions = np.zeros((count, length), dtype=np.int64)
    slot = np.full((count, length), -1, dtype=np.int64)
    for row, document in enumerate(documents):
        for at, entry in enumerate(document.words):
            for k, (token, weight) in enumerate(entry):
                words[row, at, k], weights[row, at, k] = token, weight
            if document.learn[at]:
                targets[row, at] = entry[0][0]
        size = len(document.words)
        slot[row, :size] = document.slot
        # Slots take random places in a much longer row, so that the distances of real visual tokens are met.
        steps = np.ones(size, dtype=np.int64)
        is_slot = np.array(document.slot) != -1
        steps[is_slot] = rng.integers(1, 2 + int(rng.integers(0, 8)), size=int(is_slot.sum()))
        positions[row, :size] = np.cumsum(steps) - 1
        positions[row, size:] = positions[row, size - 1] + np.arange(1, length - size + 1)
    batch = {"words": words, "weights": weights, "targets": targets, "positions": positions, "slot": slot}
    return {name: torch.from_numpy(array) for name, array in batch.items()} | {"documents": documents}


def read(llm: LlamaForCausalLM, batch: dict, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """Runs a batch of documents: (loss, logits [B, T - 1, C], input vectors [B, T, D] before the slots' noise)."""
    embedding, words = llm.get_input_embeddings().weight, batch["words"]          # [C, D], [B, T, W]
    vectors = F.embedding_bag(words.flatten(0, 1), embedding, mode="sum", per_sample_weights=batch["weights"].flatten(0, 1))
    vectors = vectors.view(*words.shape[:2], -1)                                  # [B * T, D] -> [B, T, D]
    is_slot = (batch["slot"] != -1)[..., None]
    inputs = vectors + noise * is_slot * torch.randn_like(vectors) * vectors.shape[-1] ** -0.5
    logits = llm(inputs_embeds=inputs, position_ids=batch["positions"],
                 attention_mask=torch.ones_like(batch["slot"])).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), batch["targets"][:, 1:].flatten(), ignore_index=-100)
    return loss, logits, vectors


def look_back(attention: nn.Module, distances: tuple[float, ...]) -> None:
    """Makes the first heads begin by looking a given number of tokens back, whatever stands there, and copying it.

    So a number's position starts out knowing the words before it, and the end of a question the words that it asks about;
    what remains to be learned is to match the two. The queries and keys of such a head are its biases alone: the rotary
    positions turn the key away from the query by (position difference) x frequency in each plane, and the query starts
    `distance` steps ahead.
    """
    size, half = attention.head_dim, attention.head_dim // 2
    frequency = 10000.0 ** (-torch.arange(half) / half)
    for head, distance in enumerate(distances):
        planes = slice(0, 5) if distance <= 3 else slice(2, 6)  # high frequencies tell neighbours apart, lower ones see wider
        amplitude = torch.zeros(half)
        amplitude[planes] = (8 * size ** 0.5 / len(frequency[planes])) ** 0.5  # the scores' peak is 8
        rows = slice(head * size, (head + 1) * size)
        attention.q_proj.weight[rows], attention.k_proj.weight[rows] = 0, 0
        attention.k_proj.bias[rows] = torch.cat([amplitude, torch.zeros(half)])
        attention.q_proj.bias[rows] = torch.cat([amplitude * torch.cos(frequency * distance),
                                                 -amplitude * torch.sin(frequency * distance)])


def pretrain_llm(steps: int, seed: int, learning_rate: float = 3e-3) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Trains the tiny language model on documents; prints how often it answers questions exactly."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer()
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=3,
                         num_attention_heads=8, num_key_value_heads=8, head_dim=32, attention_bias=True,
                         max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
                         eos_token_id=tokenizer.eos_token_id)
    llm = LlamaForCausalLM(config)
    embedding = llm.get_input_embeddings().weight
    with torch.no_grad():
        embedding.normal_(std=128 ** -0.5)
        digits = 0.7 * 128 ** -0.5 * torch.randn(2, 10, 128)  # a number starts as its tens plus its ones, as it is seen
        for number in range(10, 100):
            (token,) = tokenizer(f" {number}", add_special_tokens=False)["input_ids"]
            embedding[token] = digits[0, number // 10] + digits[1, number % 10]
        for layer in llm.model.layers:
            # Looking up starts as matching and copying: keys like queries, outputs that undo the values.
            attention = layer.self_attn
            attention.q_proj.weight.normal_(std=128 ** -0.5)
            attention.v_proj.weight.normal_(std=128 ** -0.5)
            attention.k_proj.weight.copy_(attention.q_proj.weight)
            attention.o_proj.weight.copy_(attention.v_proj.weight.T / 2)
        look_back(llm.model.layers[0].self_attn, distances=(1, 2, 3, 4.5))
    optimizer = torch.optim.AdamW(llm.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=0.08)

    def alignment(batch: dict, vectors: Tensor) -> Tensor:
        """Pulls a question's mean embedding towards the slots of the fact it asks for: what the router relies on."""
        terms = []
        for row, document in enumerate(batch["documents"]):
            slots = batch["slot"][row]
            candidates = torch.nonzero(slots != -1)[:, 0]
            for start, end, fact in document.asked[:2]:
                wanted = slots[candidates] == fact
                if wanted.any():
                    question = F.normalize(F.normalize(vectors[row, start:end], dim=-1).mean(0), dim=-1)
                    shown = vectors[row, candidates] + 0.02 * torch.randn(len(candidates), 128)
                    score = F.normalize(shown, dim=-1) @ question / 0.05
                    terms.append(score.logsumexp(0) - score[wanted].logsumexp(0))
        return torch.stack(terms).mean()

    start = time.time()
    for step in range(steps):
        small = max(0.3, 1 - 2.5 * step / steps)  # few facts first
        batch = lm_batch(generator("pretraining", 3, seed, step), tokenizer, count=32, small=small)
        loss, _, vectors = read(llm, batch, noise=float(torch.rand(())))
        contrast = alignment(batch, vectors)
        optimizer.zero_grad()
        (loss + 0.3 * contrast).backward()
        nn.utils.clip_grad_norm_(llm.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            exact = lookup_accuracy(llm, tokenizer, seed)
            print(f"llm step {step:5d}  loss {loss.item():.3f}  contrast {contrast.item():.3f}  {time.time() - start:.0f} s"
                  "  exact: " + "  ".join(f"{name} {score:.3f}" for name, score in exact.items()), flush=True)
    return llm, tokenizer


@torch.no_grad()
def lookup_accuracy(llm: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> dict[str, float]:
    """Share of held-out questions whose whole answer is the argmax at every position, by how the facts were given.

    `llm` has one of transformers' own attentions, as the documents are padded.
    """
    hits: dict[str, list[bool]] = {"text numbers": [], "text words": [], "slot numbers": [], "slot words": []}
    batch = lm_batch(generator("pretraining", 4, seed), tokenizer, count=192)
    _, logits, _ = read(llm, batch, noise=0.3)
    predicted = logits.argmax(-1)
    for row, document in enumerate(batch["documents"]):
        source = "slot" if max(document.slot) >= 0 else "text"
        for start, end in document.answers:
            target = batch["targets"][row, start:end]
            kind = "numbers" if tokenizer.decode(target[0]).strip().isdigit() else "words"
            hits[f"{source} {kind}"].append(bool((predicted[row, start - 1:end - 1] == target).all()))
    return {name: float(np.mean(values)) for name, values in hits.items()}


def pretrain(out: Path, seed: int) -> None:
    """Makes both stand-ins and writes them to out/vision and out/llm, in transformers' own formats."""
    tower = pretrain_vision(VISION_STEPS, seed)
    tower.clip.config.save_pretrained(out / "vision")
    save_file({name: tensor.contiguous() for name, tensor in tower.clip.state_dict().items()},
              out / "vision" / "model.safetensors", metadata={"format": "pt"})
    llm, tokenizer = pretrain_llm(LLM_STEPS, seed)
    llm.save_pretrained(out / "llm")
    tokenizer.save_pretrained(out / "llm")
    print(f"wrote {out / 'vision'} and {out / 'llm'}")
