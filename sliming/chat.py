"""Conversations as token ids: what is said, what is learned, and what the router may read.

A conversation is a list of turns in LLaVA's format, {"from": "human" or "gpt", "value": text}; the
marker `<image>` in a human turn says where an image goes. Text between two images or special tokens
is tokenised as a whole, as the language models met it in their own training; which tokens are
learned follows from where the template says that an answer begins and ends, through the tokenizer's
character offsets, and is not searched for afterwards. A special token spelled out in somebody's
text stays text.

Legend: N tokens of one conversation, each image one placeholder; Q tokens of the questions.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

IMAGE = "<image>"    # the marker in text
IMAGE_TOKEN = -200   # its place among token ids (LLaVA's convention; no tokenizer has negative ids)
IGNORE = -100        # label of a position that is not learned (torch's default ignore_index)

# How a question asks for its answer's form: Table 6, verbatim.
SINGLE_WORD = "Answer the question using a single word or phrase."
OPTION_LETTER = "Answer with the option's letter from the given choices directly."

# Table 5, verbatim (the spaces that the extraction of the paper's text loses restored).
DETAIL_PROMPTS = (
    "Describe the following image in detail",
    "Provide a detailed description of the given image",
    "Give an elaborate explanation of the image you see",
    "Share a comprehensive rundown of the presented image",
    "Offer a thorough analysis of the image",
    "Explain the various aspects of the image before you",
    "Clarify the contents of the displayed image with great detail",
    "Characterize the image using a well-detailed description",
    "Break down the elements of the image in a detailed manner",
    "Walk through the important details of the image",
    "Portray the image with a rich, descriptive narrative",
    "Narrate the contents of the image with precision",
    "Analyze the image in a comprehensive and detailed manner",
    "Illustrate the image through a descriptive explanation",
    "Examine the image closely and share its details",
    "Write an exhaustive depiction of the given image",
)


@dataclass(frozen=True)
class Template:
    """The fixed text around a conversation; `<|name|>` in it is one special token.

    `asks` False: human turns give their images only (captioning).
    """

    system: str = ""         # once, at the beginning
    user: str = ""
    assistant: str = ""
    answer: str = ""         # between the assistant's mark and its answer; learned with it
    end: str | None = None   # the token after an answer; None: the tokenizer's end of sequence
    asks: bool = True


TEMPLATES = {
    # Image, caption: stage I.
    "plain": Template(asks=False),
    # "USER: ... ASSISTANT: ...</s>"
    "chat": Template(user="USER: ", assistant=" ASSISTANT:", answer=" "),
    # Those that the released models were trained with (yfzhang114/SliME, llava/conversation.py).
    "vicuna_v1": Template(
        system="A chat between a curious user and an artificial intelligence assistant. The "
               "assistant gives helpful, detailed, and polite answers to the user's questions. ",
        user="USER: ", assistant=" ASSISTANT:", answer=" "),
    "llama3": Template(
        user="<|start_header_id|>user<|end_header_id|>\n\n",
        assistant="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", end="<|eot_id|>"),
}


@dataclass(frozen=True)
class Encoded:
    """One conversation: `ids` [N] with IMAGE_TOKEN per image, `labels` [N], `question` [Q] token
    ids for the router."""

    ids: list[int]
    labels: list[int]
    question: list[int]


def encode(conversation: list[dict], template: str, tokenizer: PreTrainedTokenizerBase,
           begin: bool = True) -> Encoded:
    """Token ids, labels and question of a conversation; one that ends with a human turn becomes a
    prompt to go on from.

    Answers and the end token after each are learned, nothing else (`labels` is IGNORE there).
    `question` holds the words of all human turns without image markers: no template, no answer
    (Sec. 2.2, "Text-Guided Router"). `begin` False: to go on with a conversation, without the
    beginning-of-sequence token and the system prompt.
    Raises ValueError where the tokenizer lacks a token of the template.
    """
    ids, labels, question = [], [], []
    previous = None if begin else end_token(template, tokenizer)
    # Runs of text, which are tokenised as one, between single tokens.
    for is_text, run in groupby(script(conversation, template, tokenizer, begin),
                                key=lambda piece: isinstance(piece.what, str)):
        pieces = list(run)
        new = tokenise(pieces, previous, tokenizer) if is_text else pieces
        ids += [token for token, _ in new]
        labels += [token if learned else IGNORE for token, learned in new]
        previous = ids[-1] if ids else previous
    if TEMPLATES[template].asks:
        for turn in conversation:
            for text in turn["value"].split(IMAGE) if turn["from"] == "human" else ():
                question += tokenizer(text.strip(), add_special_tokens=False,
                                      split_special_tokens=True)["input_ids"]
    return Encoded(ids, labels, question)


class Piece(NamedTuple):
    """A piece of a conversation in its template: text, or one token."""

    what: str | int
    learned: bool = False


def script(conversation: list[dict], template: str, tokenizer: PreTrainedTokenizerBase,
           begin: bool) -> Iterator[Piece]:
    """The conversation in its template, piece by piece."""
    form = TEMPLATES[template]

    def fixed(text: str) -> Iterator[Piece]:
        for piece in re.split(r"(<\|\w+\|>)", text):
            if piece.startswith("<|"):
                yield Piece(special_id(piece, tokenizer))
            elif piece:
                yield Piece(piece)

    if begin and tokenizer.bos_token_id is not None:
        yield Piece(tokenizer.bos_token_id)
    if begin:
        yield from fixed(form.system)
    for turn in conversation:
        if turn["from"] == "gpt":
            yield Piece(form.answer + turn["value"], learned=True)
            yield Piece(end_token(template, tokenizer), learned=True)
            continue
        yield from fixed(form.user)
        for index, text in enumerate(turn["value"].split(IMAGE)):
            if index:
                yield Piece(IMAGE_TOKEN)
            if form.asks:
                yield Piece(text)
        yield from fixed(form.assistant)


def tokenise(pieces: list[Piece], previous: int | None,
             tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, bool]]:
    """Tokens of the pieces read as one text, each with whether it is learned.

    A tokenizer may read the beginning of a text unlike what follows a special token: Llama's puts a
    space before the first word, and before the others only if it is of an older kind. So the
    special token before the text, `previous`, is read with it. What follows an image, or the token
    that begins everything, is read as a text of its own; so is one that spells out a special token,
    which must stay text.
    """
    text = "".join(piece.what for piece in pieces)
    if not text:
        return []
    learned = [piece.learned for piece in pieces for _ in piece.what]          # per character
    lead = ""
    if previous not in (None, IMAGE_TOKEN, tokenizer.bos_token_id):
        lead = tokenizer.convert_ids_to_tokens(previous)
    if any(special in text for special in tokenizer.get_added_vocab()):
        lead = ""
    read = tokenizer(lead + text, add_special_tokens=False, split_special_tokens=not lead,
                     return_offsets_mapping=True)
    tokens = []
    for token, (start, end) in zip(read["input_ids"], read["offset_mapping"], strict=True):
        if start >= len(lead) or end > len(lead):  # not the special token itself
            at = min(max(start - len(lead), 0), len(text) - 1)  # a token belongs where it starts
            tokens.append((token, learned[at]))
    return tokens


def without_markers(text: str) -> str:
    """The text without image markers, and without those that only appear as others go."""
    kept: list[str] = []
    for letter in text:
        kept.append(letter)
        if letter == IMAGE[-1] and "".join(kept[-len(IMAGE):]) == IMAGE:
            del kept[-len(IMAGE):]
    return "".join(kept)


def end_token(template: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the token that ends an answer."""
    end = TEMPLATES[template].end
    return tokenizer.eos_token_id if end is None else special_id(end, tokenizer)


def special_id(token: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of a special token of a template; ValueError where the tokenizer has none of that
    name."""
    number = tokenizer.convert_tokens_to_ids(token)
    # A tokenizer without it gives None or its unknown token.
    if number is None or tokenizer.convert_ids_to_tokens(number) != token:
        raise ValueError(f"the template needs the token {token}, which this tokenizer does not "
                         f"have: choose another template ({', '.join(TEMPLATES)})")
    return number
