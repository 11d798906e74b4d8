"""Conversations as token ids: what is said, what is learned, and what the router may read.

A conversation is a list of turns in LLaVA's format, {"from": "human" or "gpt", "value": text}; the marker `<image>` in a
human turn says where an image goes. Template pieces and spoken text are tokenised apart, so the label mask is known
exactly instead of being searched for afterwards, and a special token spelled out in somebody's text stays text.

Legend: N tokens of one conversation, each image one placeholder; Q tokens of the questions.
"""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

IMAGE = "<image>"    # the marker in text
IMAGE_TOKEN = -200   # its place among token ids (LLaVA's convention; no tokenizer has negative ids)
IGNORE = -100        # label of a position that is not learned (torch's default ignore_index)


@dataclass(frozen=True)
class Template:
    """The fixed text around a conversation. `asks` False: human turns give their images only (captioning)."""

    user: str = ""
    assistant: str = ""
    answer: str = ""   # between the assistant's mark and its answer
    asks: bool = True


TEMPLATES = {
    "plain": Template(asks=False),                                            # image, caption: stage I
    "chat": Template(user="USER: ", assistant=" ASSISTANT:", answer=" "),      # "USER: ... ASSISTANT: ...</s>"
}


@dataclass(frozen=True)
class Encoded:
    """One conversation: `ids` [N] with IMAGE_TOKEN per image, `labels` [N], `question` [Q] token ids for the router."""

    ids: list[int]
    labels: list[int]
    question: list[int]


def encode(conversation: list[dict], template: str, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Token ids, labels and question of a conversation; one that ends with a human turn becomes a prompt to go on from.

    Answers and the end-of-sequence token after each are learned, nothing else (`labels` is IGNORE there). `question` holds
    the words of all human turns without image markers: no template, no answer (Sec. 2.2, "Text-Guided Router").
    """
    form = TEMPLATES[template]
    ids = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    labels, question = [IGNORE] * len(ids), []

    def tokens(text: str, spoken: bool) -> list[int]:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=spoken)["input_ids"] if text else []

    def add(new: list[int], learned: bool) -> None:
        ids.extend(new)
        labels.extend(new if learned else [IGNORE] * len(new))

    for turn in conversation:
        if turn["from"] == "gpt":
            add(tokens(form.answer + turn["value"], spoken=True) + [tokenizer.eos_token_id], learned=True)
            continue
        add(tokens(form.user, spoken=False), learned=False)
        for index, text in enumerate(turn["value"].split(IMAGE)):
            if index:
                add([IMAGE_TOKEN], learned=False)
            if form.asks:
                add(tokens(text, spoken=True), learned=False)
                question += tokens(text.strip(), spoken=True)
        add(tokens(form.assistant, spoken=False), learned=False)
    return Encoded(ids, labels, question)
