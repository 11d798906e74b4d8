"""Conversations as token ids: what is said, what is learned, and what the router may read.

A conversation is a list of turns in LLaVA's format, {"from": "human" or "gpt", "value": text}; the marker `<image>` in a
human turn says where an image goes. Text between two images or special tokens is tokenised as a whole, as the language models
met it in their own training; which tokens are learned follows from where the template says that an answer begins and ends,
through the tokenizer's character offsets, and is not searched for afterwards. A special token spelled out in somebody's text
stays text.

Legend: N tokens of one conversation, each image one placeholder; Q tokens of the questions.
"""

import re
from dataclasses import dataclass

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
    end: str | None = None   # the token after an answer, where it is not the tokenizer's end-of-sequence token
    asks: bool = True


TEMPLATES = {
    "plain": Template(asks=False),                                            # image, caption: stage I
    "chat": Template(user="USER: ", assistant=" ASSISTANT:", answer=" "),      # "USER: ... ASSISTANT: ...</s>"
    # Those that the released models were trained with (yfzhang114/SliME, llava/conversation.py).
    "vicuna_v1": Template(system="A chat between a curious user and an artificial intelligence assistant. The assistant "
                                 "gives helpful, detailed, and polite answers to the user's questions. ",
                          user="USER: ", assistant=" ASSISTANT:", answer=" "),
    "llama3": Template(user="<|start_header_id|>user<|end_header_id|>\n\n",
                       assistant="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", end="<|eot_id|>"),
}


@dataclass(frozen=True)
class Encoded:
    """One conversation: `ids` [N] with IMAGE_TOKEN per image, `labels` [N], `question` [Q] token ids for the router."""

    ids: list[int]
    labels: list[int]
    question: list[int]


def end_token(template: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the token that ends an answer."""
    end = TEMPLATES[template].end
    return tokenizer.eos_token_id if end is None else special_id(end, tokenizer)


def special_id(token: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of a special token of a template; ValueError where the tokenizer has none of that name."""
    number = tokenizer.convert_tokens_to_ids(token)
    if number is None or tokenizer.convert_ids_to_tokens(number) != token:  # None or the unknown token: there is none
        raise ValueError(f"the template needs the token {token}, which this tokenizer does not have: choose another template "
                         f"({', '.join(TEMPLATES)})")
    return number


def encode(conversation: list[dict], template: str, tokenizer: PreTrainedTokenizerBase, begin: bool = True) -> Encoded:
    """Token ids, labels and question of a conversation; one that ends with a human turn becomes a prompt to go on from.

    Answers and the end token after each are learned, nothing else (`labels` is IGNORE there). `question` holds
    the words of all human turns without image markers: no template, no answer (Sec. 2.2, "Text-Guided Router").
    `begin` False: to go on with a conversation, without the beginning-of-sequence token and the system prompt.
    Raises ValueError where the tokenizer lacks a token of the template.
    """
    form = TEMPLATES[template]
    ids, labels, question = [], [], []
    specials = tokenizer.get_added_vocab()
    waiting: list[tuple[str, bool]] = []  # pieces of text, and whether they are learned

    # A tokenizer may read the beginning of a text unlike what follows a special token: Llama's puts a space before the
    # first word, and before the others only if it is of an older kind. So the special token before a text is read with
    # it, unless the text spells out a special token, which must stay text.
    before = "" if begin else tokenizer.convert_ids_to_tokens(end_token(template, tokenizer))

    def flush() -> None:
        """Tokenises the waiting pieces as one text; a token belongs to the piece in which it starts."""
        if text := "".join(piece for piece, _ in waiting):
            learned = [flag for piece, flag in waiting for _ in piece]
            lead = "" if any(special in text for special in specials) else before
            new = tokenizer(lead + text, add_special_tokens=False, split_special_tokens=not lead, return_offsets_mapping=True)
            for token, (start, end) in zip(new["input_ids"], new["offset_mapping"]):
                if start >= len(lead) or end > len(lead):
                    ids.append(token)
                    labels.append(token if learned[min(max(start - len(lead), 0), len(text) - 1)] else IGNORE)
        waiting.clear()

    def add(token: int, learned: bool = False) -> None:
        nonlocal before
        flush()
        ids.append(token)
        labels.append(token if learned else IGNORE)
        # What follows an image, or the token that begins everything, is tokenised as a text of its own.
        own = token in (IMAGE_TOKEN, tokenizer.bos_token_id)
        before = "" if own else tokenizer.convert_ids_to_tokens(token)

    def add_fixed(text: str) -> None:
        for piece in re.split(r"(<\|\w+\|>)", text):
            if piece.startswith("<|"):
                add(special_id(piece, tokenizer))
            elif piece:
                waiting.append((piece, False))

    if begin:
        if tokenizer.bos_token_id is not None:
            add(tokenizer.bos_token_id)
        add_fixed(form.system)
    for turn in conversation:
        if turn["from"] == "gpt":
            waiting.append((form.answer + turn["value"], True))
            add(end_token(template, tokenizer), learned=True)
            continue
        add_fixed(form.user)
        for index, text in enumerate(turn["value"].split(IMAGE)):
            if index:
                add(IMAGE_TOKEN)
            if form.asks:
                waiting.append((text, False))
                question += tokenizer(text.strip(), add_special_tokens=False, split_special_tokens=True)["input_ids"]
        add_fixed(form.assistant)
    flush()
    return Encoded(ids, labels, question)
