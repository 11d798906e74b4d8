"""How the tiny preset's two stand-ins come to be: a tower that reads, an LLM that looks things up.

`python -m sliming.tiny --pretrain FOLDER` runs this. The stand-ins are to CLIP and Vicuna what the
tiny preset is to SliME: something competent to freeze. They are *not* a small CLIP and Vicuna:

* The vision tower learns from the picture generator's own dense labels. Its patch features carry,
  linearly: colour and role of what covers the patch, the number and letter printed there if large
  enough to be read and, on background patches of whole pictures, a summary as CLIP's do (kind,
  count, colour that stands out).
* The language model learns to look facts up. In a third of its documents the facts are plain text.
  In the others they come as *slots*: one vector per fact, the sum of its words' embeddings, in
  random order among blanks and noise, which is what an adapter's output can look like to it.

Legend: V views, L = 64 patches per view (8 x 8), S = 64 pixels, D = 128 width of the language
model, C vocabulary, B documents of T positions, W words in the sum at one position.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sliming.backbones import ConvStem, VisionTower
from sliming.chat import DETAIL_PROMPTS
from sliming.qformer import sincos_2d
from sliming.slicer import slice_image
from sliming.tiny import pictures
from sliming.tiny.pictures import CROP, KINDS, SHAPES, Scene, caption, description, generator

VISION_STEPS = 2500
# The language model's three lessons: steps, learning rate and most noise on slots. In the last two
# the embeddings stay as they are; see README.md.
LESSONS = ((900, 3e-3, 1.0), (600, 2e-3, 1.0), (600, 2e-3, 2.5))
# How often a document asks each kind of question, where its picture has it.
OFTEN = {"What number": 4, "How many": 1, "What shape": 2, "What colour": 2}
PATCH = 8
SIDE = CROP // PATCH
ROLES = ("", "bar", "row", "header", *SHAPES)
CLASSES = {"colour": ("", *pictures.COLOURS), "role": ROLES, "letter": ("", *pictures.LETTERS),
           "tens": ("", *"123456789"), "ones": ("", *"0123456789"),
           "kind": KINDS, "count": range(6), "accent": ("", *pictures.COLOURS)}
GLYPH_CLASSES = ("", *"0123456789", *pictures.LETTERS)

# --------------------------------------------------------------------------------- the vision tower


def dense_labels(scene: Scene, x0: float, y0: float, scale: float,
                 whole: bool) -> dict[str, np.ndarray]:
    """What each patch of a view shows: {head: int64 [L]}, -100 where nothing is asked. "glyph" has
    [4 L], the stem's finer grid.

    The picture's upper left corner lies at (x0, y0) of the view, in the view's pixels, and is drawn
    at `scale`. `whole`: the view shows the whole picture.
    """
    centre = (np.arange(SIDE) + 0.5) * PATCH           # of each patch; x and y are the picture's
    x = np.broadcast_to((centre - x0) / scale, (SIDE, SIDE))
    y = np.broadcast_to(((centre - y0) / scale)[:, None], (SIDE, SIDE))
    labels = {head: np.zeros((SIDE, SIDE), np.int64)
              for head in ("colour", "role", "letter", "tens", "ones")}
    labels["glyph"] = np.zeros((2 * SIDE, 2 * SIDE), np.int64)
    if scene.kind == "table":
        header = (y >= 3) & (y < scene.items[0].box[1]) & (x >= 3) & (x < scene.size[0] - 3)
        labels["role"][header] = ROLES.index("header")
        labels["colour"][header] = CLASSES["colour"].index(scene.accent)
    for item in scene.items:
        near_print = printed_here(item, x, y, scale)
        here = covered(item, x, y) | near_print
        labels["role"][here] = ROLES.index(item.role)
        labels["colour"][here] = CLASSES["colour"].index(item.colour)
        if scale == 1:
            labels["tens"][near_print] = item.number // 10
            labels["ones"][near_print] = 1 + item.number % 10
            labels["letter"][near_print] = CLASSES["letter"].index(item.letter)
            (left, top), (tens, ones) = item.print_at, str(item.number)
            printed = [(left, top, tens), (left + 6, top, ones)]
            if item.letter:
                printed.append((*item.letter_at, item.letter))
            for at_x, at_y, glyph in printed:
                column, row = int((at_x + 2.5 + x0) // 4), int((at_y + 3.5 + y0) // 4)
                if 0 <= column < 2 * SIDE and 0 <= row < 2 * SIDE:
                    labels["glyph"][row, column] = GLYPH_CLASSES.index(glyph)
    asked = whole & (labels["role"] == 0)
    for head, value in (("kind", scene.kind), ("count", len(scene.items)),
                        ("accent", scene.accent)):
        labels[head] = np.where(asked, CLASSES[head].index(value), -100)
    return {head: grid.reshape(-1) for head, grid in labels.items()}


def covered(item: pictures.Item, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points an item covers; the corners of a shape's box are background."""
    left, top, right, bottom = item.box
    inside = (x >= left) & (x < right) & (y >= top) & (y < bottom)
    u, v = (x - left) / (right - left) * 2 - 1, (y - top) / (bottom - top) * 2 - 1
    return inside & pictures.silhouette(item.role, u, v)


def printed_here(item: pictures.Item, x: np.ndarray, y: np.ndarray, scale: float) -> np.ndarray:
    """Which patches show an item's number: the nearest one and, at full size, its neighbours."""
    middle_x, middle_y = np.add(item.print_at, np.divide(pictures.NUMBER_SIZE, 2))
    wide, high = (8, 6) if scale == 1 else (PATCH / 2, PATCH / 2)
    return (abs(x - middle_x) * scale <= wide) & (abs(y - middle_y) * scale <= high)


def tower_batch(rng: np.random.Generator, scenes: int,
                small: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Views uint8 [V, 3, S, S] and their dense labels {head: int64 [V, L]} from fresh pictures."""
    views, labels = [], []
    for index in range(scenes + small):
        scene = pictures.sample_scene(rng, small=index >= scenes)
        slices = slice_image(pictures.render(scene, rng), crop_size=CROP)
        width, height = scene.size
        scale = CROP / max(width, height)
        x0, y0 = (CROP - width * scale) / 2, (CROP - height * scale) / 2
        views.append(slices.global_view)
        labels.append(dense_labels(scene, x0, y0, scale, whole=True))
        if scene.small:
            continue
        columns, rows = slices.grid
        for crop in rng.permutation(columns * rows)[:4]:
            row, column = divmod(crop, columns)
            views.append(slices.crops[crop])
            labels.append(dense_labels(scene, -column * CROP, -row * CROP, 1, whole=False))
    stacked = {head: np.stack([label[head] for label in labels]) for head in labels[0]}
    return torch.stack(views), {head: torch.from_numpy(grid) for head, grid in stacked.items()}


def balanced_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy; "something is here" and "nothing is here" (class 0) have a mean of their own.
    Few patches show print; in one mean over all patches they would drown (digits stay at chance).
    """
    labels = labels.flatten()
    loss = F.cross_entropy(logits.flatten(0, 1), labels, ignore_index=-100, reduction="none")
    return sum(loss[part].mean() for part in (labels > 0, labels == 0) if part.any())


def pretrain_vision(steps: int, seed: int) -> VisionTower:
    """Trains the tiny vision tower on dense labels; prints held-out accuracy per head."""
    torch.manual_seed(seed)
    config = CLIPVisionConfig(image_size=CROP, patch_size=PATCH, conv_stem=True, hidden_size=128,
                              intermediate_size=512, num_hidden_layers=2, num_attention_heads=4)
    tower = VisionTower(config)  # on the meta device, for weights from files; these are random
    tower.clip = clip = type(tower.clip)(config)
    clip.embeddings.patch_embedding, clip.post_layernorm = ConvStem(128), nn.Identity()
    clip.embeddings.position_embedding.weight.data[1:] = 0.5 * sincos_2d(128, SIDE)
    heads = nn.ModuleDict({head: nn.Linear(128, len(names)) for head, names in CLASSES.items()})
    glyph_head = nn.Linear(64, len(GLYPH_CLASSES))
    parameters = [*tower.parameters(), *heads.parameters(), *glyph_head.parameters()]

    def guesses(views: Tensor) -> dict[str, Tensor]:
        """Logits of every head, [V, L, its classes]."""
        pixels = (views.float() / 255 - tower.mean) / tower.std
        features = tower.features(pixels)
        fine = clip.embeddings.patch_embedding.fine(pixels).flatten(2).mT   # [V, 256, 64]
        logits = {head: linear(features) for head, linear in heads.items()}
        return logits | {"glyph": glyph_head(fine)}

    def loss_of(step: int) -> Tensor:
        views, labels = tower_batch(generator("pretraining", 0, seed, step), scenes=9, small=11)
        return sum(balanced_loss(logits, labels[head]) for head, logits in guesses(views).items())

    def accuracy() -> dict[str, float]:
        views, labels = tower_batch(generator("pretraining", 1, seed), scenes=40, small=40)
        right = {head: (logits.argmax(-1) == labels[head])[labels[head] > 0]
                 for head, logits in guesses(views).items()}
        return {head: hit.float().mean() for head, hit in right.items()}

    fit("vision", steps, 2e-3, (0.9, 0.99), parameters, loss_of, accuracy)
    return tower.requires_grad_(False)


def fit(name: str, steps: int, learning_rate: float, betas: tuple[float, float],
        parameters: list[nn.Parameter], loss_of: Callable[[int], Tensor],
        scores: Callable[[], dict[str, float]]) -> None:
    """Lowers `loss_of(step)` for some steps, and prints held-out scores on the way."""
    optimizer = torch.optim.AdamW(parameters, learning_rate, betas=betas, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=0.08)
    start = time.time()
    for step in range(steps):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            with torch.no_grad():
                listed = "  ".join(f"{what} {score:.3f}" for what, score in scores().items())
            print(f"{name} step {step:5d}  loss {loss.item():.3f}  {time.time() - start:.0f} s  "
                  f"{listed}", flush=True)


# ------------------------------------------------------------------------------- the language model


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE: any UTF-8 text has tokens, the built-in pictures' words have one each, and
    so have numbers of one or two digits (in Llama 3, of up to three). With a token per digit the
    small model looks the second digit up by the first, and answers 68 for 62."""
    texts = []
    for index in range(4000):
        rng = generator("pretraining", 2, index)
        scene = pictures.sample_scene(rng, small=index % 2 == 0)
        pairs = pictures.detail_questions(scene) + pictures.global_questions(scene)
        texts += [" " + caption(scene, rng, readable=scene.small), " " + description(scene, rng)]
        texts += [f"USER: \n{question} ASSISTANT: {answer}" for question, answer in pairs]
    texts += [prompt for prompt in DETAIL_PROMPTS for _ in range(200)]
    bpe = Tokenizer(models.BPE())
    words = Regex(r" ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(words, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=1024, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>",
                                   pad_token="</s>")


@dataclass
class Document:
    """One training text. Each position holds the weighted sum of up to W word embeddings."""

    words: list[list[tuple[int, float]]] = field(default_factory=list)  # (token id, weight)
    slot: list[int] = field(default_factory=list)       # -1 text, else number of the fact it shows
    learn: list[bool] = field(default_factory=list)     # is this position's token a target?
    answers: list[tuple[int, int]] = field(default_factory=list)        # spans [start, end)
    asked: list[tuple[int, int, int]] = field(default_factory=list)     # question's span, its fact

    def text(self, ids: list[int], learn: bool = True) -> tuple[int, int]:
        start = len(self.words)
        self.words += [[(token, 1.0)] for token in ids]
        self.slot += [-1] * len(ids)
        self.learn += [learn] * len(ids)
        return start, len(self.words)


def ask_all(scene: Scene) -> list[tuple[str, str, int]]:
    """(question, answer, fact it asks for); the number of items stands for the whole picture."""
    pairs = [(*pair, fact) for fact, pair in enumerate(pictures.detail_questions(scene))]
    by_name = {item.role: index for index, item in enumerate(scene.items)}
    by_name |= {item.colour: index for index, item in enumerate(scene.items)}
    for question, answer in pictures.global_questions(scene):
        whole = question.startswith("How many") or scene.kind != "shapes"
        pairs.append((question, answer, len(scene.items) if whole
                      else by_name[question.rstrip("?").split()[-1]]))
    return pairs


def draw_question(pairs: list[tuple[str, str, int]],
                  rng: np.random.Generator) -> tuple[str, str, int]:
    """One of `ask_all`'s, as often as `OFTEN` says: of all alike, few ask for a colour by a shape,
    which is learned last."""
    kinds = [" ".join(question.split()[:2]) for question, *_ in pairs]
    weight = np.array([OFTEN[kind] / kinds.count(kind) for kind in kinds])
    return pairs[rng.choice(len(pairs), p=weight / weight.sum())]


def write_document(rng: np.random.Generator, tokenizer: PreTrainedTokenizerFast,
                   small: float) -> Document:
    """Facts as text or as slots, then a caption, a description or up to five questions and answers;
    `small`: the share of small pictures, which have one or two facts."""
    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def show(text: str) -> tuple[int, int]:
        return document.text(ids(text), learn=False)

    def teach(text: str) -> tuple[int, int]:
        return document.text(ids(text) + [tokenizer.eos_token_id])

    fits_one_crop, document = rng.random() < small, Document()
    scene = pictures.sample_scene(rng, fits_one_crop)
    if scene.kind != "shapes":  # they are asked about in most ways: 5 documents in 9 are theirs
        scene = pictures.sample_scene(rng, fits_one_crop)
    document.text([tokenizer.bos_token_id], learn=False)
    as_text = rng.random() < 0.35
    form = rng.choice(["questions", "questions", "questions", "description", "caption"])
    if form != "caption":
        show("USER: ")
    if as_text:
        facts = f" {caption(scene, rng, readable=scene.small)} {description(scene, rng)}"
        document.text(ids(facts))
        form = "questions"
    else:
        local_only = form == "description" and rng.random() < 0.7
        write_slots(document, scene, rng, ids, show_global=not local_only,
                    show_local=form != "caption")
    if form == "caption":
        teach(caption(scene, rng, readable=scene.small))
        return document
    show("\n")
    if form == "description":
        show(DETAIL_PROMPTS[rng.integers(len(DETAIL_PROMPTS))] + " ASSISTANT:")
        teach(" " + description(scene, rng))
        return document
    pairs = ask_all(scene)
    for turn in range(int(rng.integers(2, 6))):
        if turn:
            show("USER: ")
        question, answer, fact = draw_question(pairs, rng)
        document.asked.append((*show(question), fact))
        show(" ASSISTANT:")
        document.answers.append(teach(" " + answer))
    return document


def write_slots(document: Document, scene: Scene, rng: np.random.Generator, ids, *,
                show_global: bool, show_local: bool) -> None:
    """Adds slots of a global view (print only in a small picture), a separator, local views."""
    def word(text: str) -> int:
        (token,) = ids(" " + text)
        return token

    facts = range(len(scene.items))
    names = [[word(part) for part in item.name.split()] for item in scene.items]
    printed = [name + ids(f" {item.number}") for name, item in zip(names, scene.items, strict=True)]
    plain = [[word("row")]] * len(names) if scene.kind == "table" else names
    noun = {"chart": "bars", "table": "rows", "shapes": "shapes"}[scene.kind]
    standing_out = {"chart": ["tallest", scene.accent], "table": ["header", scene.accent]}
    whole = [noun, pictures.COUNTS[len(scene.items)], *standing_out.get(scene.kind, [])]

    def times(low: int, high: int) -> int:
        return int(rng.integers(low, high))

    def add(slots: list[tuple[list[int], int]]) -> None:
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

    if show_global:
        slots = [([word(text) for text in whole], len(scene.items))] * times(2, 9)
        for fact in facts:
            slots += [((printed if scene.small else plain)[fact], fact)] * times(1, 4)
        add(slots + [([], -2)] * times(0, 6))
    if show_global and show_local:
        document.text(ids(","), learn=False)
    if show_local:
        slots = []
        for fact in facts:
            slots += [(printed[fact], fact)] * times(1, 4) + [(plain[fact], -2)] * times(0, 4)
        # A crop's own summary is not the picture's.
        misleading = [word(noun), word(pictures.COUNTS[rng.integers(1, 6)])]
        slots += [(misleading, -2)] * times(0, 6)
        add(slots + [([], -2)] * times(0, 16))


def lm_batch(rng: np.random.Generator, tokenizer: PreTrainedTokenizerFast, count: int,
             small: float = 0.3, width: int = 10) -> dict[str, Tensor]:
    """Documents, right-padded: words and weights [B, T, W], positions, targets and slot [B, T]."""
    documents = [write_document(rng, tokenizer, small) for _ in range(count)]
    shape = (count, max(len(document.words) for document in documents))
    words, weights = np.zeros((*shape, width), np.int64), np.zeros((*shape, width), np.float32)
    targets, slot, steps = np.full(shape, -100), np.full(shape, -1), np.ones(shape, np.int64)
    for row, document in enumerate(documents):
        for at, entry in enumerate(document.words):
            for k, pair in enumerate(entry):
                words[row, at, k], weights[row, at, k] = pair
            if document.learn[at]:
                targets[row, at] = entry[0][0]
        slot[row, :len(document.slot)] = document.slot
        # Slots lie at random in a much longer row, to meet the distances of real visual tokens.
        is_slot = slot[row] != -1
        longest = 2 + int(rng.integers(0, 8))
        steps[row, is_slot] = rng.integers(1, longest, size=int(is_slot.sum()))
    arrays = {"words": words, "weights": weights, "targets": targets, "slot": slot,
              "positions": steps.cumsum(1) - 1}
    return {name: torch.from_numpy(array) for name, array in arrays.items()} | {
        "documents": documents}


def read(llm: LlamaForCausalLM, batch: dict, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, logits [B, T - 1, C], inputs [B, T, D] before the slots' noise) of some documents."""
    embedding, words = llm.get_input_embeddings().weight, batch["words"]    # [C, D], [B, T, W]
    vectors = F.embedding_bag(words.flatten(0, 1), embedding, mode="sum",
                              per_sample_weights=batch["weights"].flatten(0, 1))
    vectors = vectors.view(*words.shape[:2], -1)                            # [B*T, D] -> [B, T, D]
    is_slot = (batch["slot"] != -1)[..., None]
    inputs = vectors + noise * is_slot * torch.randn_like(vectors) * vectors.shape[-1] ** -0.5
    logits = llm(inputs_embeds=inputs, position_ids=batch["positions"],
                 attention_mask=torch.ones_like(batch["slot"])).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), batch["targets"][:, 1:].flatten(),
                           ignore_index=-100)
    return loss, logits, vectors


def look_back(attention: nn.Module, distances: tuple[float, ...]) -> None:
    """Makes the first heads begin by copying what stands a given number of tokens back.

    So a number's position starts out knowing the words before it, and the end of a question the
    words that it asks about; what remains to be learned is to match the two. The queries and keys
    of such a head are its biases alone: the rotary positions turn the key away from the query by
    (position difference) x frequency in each plane, and the query starts `distance` steps ahead.
    """
    size, half = attention.head_dim, attention.head_dim // 2
    frequency = 10000.0 ** (-torch.arange(half) / half)
    for head, distance in enumerate(distances):
        # High frequencies tell neighbours apart, lower ones see wider.
        planes = slice(0, 5) if distance <= 3 else slice(2, 6)
        amplitude = torch.zeros(half)
        amplitude[planes] = (8 * size ** 0.5 / len(frequency[planes])) ** 0.5  # scores peak at 8
        rows = slice(head * size, (head + 1) * size)
        attention.q_proj.weight[rows], attention.k_proj.weight[rows] = 0, 0
        attention.k_proj.bias[rows] = torch.cat([amplitude, torch.zeros(half)])
        attention.q_proj.bias[rows] = torch.cat([amplitude * torch.cos(frequency * distance),
                                                 -amplitude * torch.sin(frequency * distance)])


@torch.no_grad()
def new_llm(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The tiny language model before training."""
    llm = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=8, head_dim=32, attention_bias=True,
        max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id))
    embedding = llm.get_input_embeddings().weight
    embedding.normal_(std=128 ** -0.5)
    # A number starts as its tens plus its ones, as it is seen.
    digits = 0.7 * 128 ** -0.5 * torch.randn(2, 10, 128)
    for number in range(10, 100):
        (token,) = tokenizer(f" {number}", add_special_tokens=False)["input_ids"]
        embedding[token] = digits[0, number // 10] + digits[1, number % 10]
    # Looking up starts as matching and copying: keys like queries, outputs that undo the values.
    for layer in llm.model.layers:
        attention = layer.self_attn
        attention.q_proj.weight.normal_(std=128 ** -0.5)
        attention.v_proj.weight.normal_(std=128 ** -0.5)
        attention.k_proj.weight.copy_(attention.q_proj.weight)
        attention.o_proj.weight.copy_(attention.v_proj.weight.T / 2)
    look_back(llm.model.layers[0].self_attn, distances=(1, 2, 3, 4.5))
    return llm


def alignment(batch: dict, vectors: Tensor) -> Tensor:
    """Pulls questions' mean embeddings to the slots of their facts: what the router relies on."""
    terms = []
    for row, document in enumerate(batch["documents"]):
        slots = batch["slot"][row]
        candidates = torch.nonzero(slots != -1)[:, 0]
        for start, end, fact in document.asked[:2]:
            wanted = slots[candidates] == fact
            if wanted.any():
                question = F.normalize(vectors[row, start:end], dim=-1).mean(0)
                shown = vectors[row, candidates] + 0.02 * torch.randn(len(candidates), 128)
                score = F.normalize(shown, dim=-1) @ F.normalize(question, dim=-1) / 0.05
                terms.append(score.logsumexp(0) - score[wanted].logsumexp(0))
    return torch.stack(terms).mean()


def pretrain_llm(lessons: tuple, seed: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Trains the tiny language model on documents; prints how often it answers exactly."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer()
    llm = new_llm(tokenizer)
    embedding = llm.get_input_embeddings().weight
    for lesson, (steps, learning_rate, noise) in enumerate(lessons):
        embedding.requires_grad_(lesson == 0)

        def loss_of(step: int, lesson=lesson, steps=steps, noise=noise) -> Tensor:
            small = 0.3 if lesson else max(0.3, 1 - 2.5 * step / steps)  # few facts first
            batch = lm_batch(generator("pretraining", 3, seed, step, lesson + 1), tokenizer, 32,
                             small)
            loss, _, vectors = read(llm, batch, noise * float(torch.rand(())))
            return loss if lesson else loss + 0.3 * alignment(batch, vectors)

        fit(f"llm lesson {lesson + 1}", steps, learning_rate, (0.9, 0.98),
            [weight for weight in llm.parameters() if weight.requires_grad], loss_of,
            lambda: lookup_accuracy(llm, tokenizer, seed))
    return llm, tokenizer


@torch.no_grad()
def lookup_accuracy(llm: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast,
                    seed: int) -> dict[str, float]:
    """Share of held-out questions answered exactly (argmax at every position), by kind of facts.
    `llm` has one of transformers' own attentions, as the documents are padded."""
    hits = {f"{source} {kind}": [] for source in ("text", "slot") for kind in ("numbers", "words")}
    batch = lm_batch(generator("pretraining", 4, seed), tokenizer, count=192)
    _, logits, _ = read(llm, batch, noise=0.3)
    predicted = logits.argmax(-1)
    for row, document in enumerate(batch["documents"]):
        source = "slot" if max(document.slot) >= 0 else "text"
        for start, end in document.answers:
            target = batch["targets"][row, start:end]
            kind = "numbers" if tokenizer.decode(target[0]).strip().isdigit() else "words"
            hits[f"{source} {kind}"].append(torch.equal(predicted[row, start - 1:end - 1], target))
    return {name: float(np.mean(values)) for name, values in hits.items()}


def pretrain(out: Path, seed: int) -> None:
    """Makes both stand-ins and writes them to out/vision and out/llm, in transformers' formats."""
    tower = pretrain_vision(VISION_STEPS, seed)
    tower.clip.config.save_pretrained(out / "vision")
    save_file({name: tensor.contiguous() for name, tensor in tower.clip.state_dict().items()},
              out / "vision" / "model.safetensors", metadata={"format": "pt"})
    llm, tokenizer = pretrain_llm(LESSONS, seed)
    llm.save_pretrained(out / "llm")
    tokenizer.save_pretrained(out / "llm")
    print(f"wrote {out / 'vision'} and {out / 'llm'}")
