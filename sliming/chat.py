"""Conversations as token ids: what is said, what is learned, and what the router may read.

A conversation is a list of turns in LLaVA's format, {"from": "human" or "gpt", "value": text}, the
first of which may be {"from": "system", ..}; the marker `<image>` in a human turn says where an
image goes. Text between two images or special tokens
is tokenised as a whole, as the language models met it in their own training; which tokens are
learned follows from where the template says that an answer begins and ends, through the tokenizer's
character offsets, and is not searched for afterwards. A special token spelled out in somebody's
text stays text.

Legend: N tokens of one conversation, each image one placeholder; Q tokens of the questions.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, groupby
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

    system: str = ""         # once, at the beginning, unless the conversation brings its own,
    around: tuple[str, str] = ("", " ")  # which stands between these
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
        around=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
        user="<|start_header_id|>user<|end_header_id|>\n\n",
        assistant="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", end="<|eot_id|>"),
    "tokenizer": Template(),  # its own chat template; see `rendered`
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
    Raises ValueError where the tokenizer lacks a token of the template, or a template that fits.
    """
    # Read as a text of its own is what follows these; released models were trained so.
    apart = {None, IMAGE_TOKEN, None if template == "tokenizer" else tokenizer.bos_token_id}
    ids, labels, question = [], [], []
    previous = None if begin else end_token(template, tokenizer)
    # Runs of text, which are tokenised as one, between single tokens.
    for is_text, run in groupby(script(conversation, template, tokenizer, begin),
                                key=lambda piece: isinstance(piece.what, str)):
        pieces = list(run)
        lead = "" if previous in apart else tokenizer.convert_ids_to_tokens(previous)
        new = tokenise(pieces, lead, tokenizer) if is_text else pieces
        ids += [token for token, _ in new]
        labels += [token if learned else IGNORE for token, learned in new]
        previous = ids[-1] if ids else previous
    labels[:1] = [IGNORE][:len(labels)]  # nothing stands before it that could predict it
    if TEMPLATES[template].asks:
        for turn in conversation:
            for text in turn["value"].split(IMAGE) if turn["from"] == "human" else ():
                question += [token for token, _ in tokenise([Piece(text.strip())], "", tokenizer)]
    return Encoded(ids, labels, question)


class Piece(NamedTuple):
    """A piece of a conversation in its template: text, or one token."""

    what: str | int
    learned: bool = False


def script(conversation: list[dict], template: str, tokenizer: PreTrainedTokenizerBase,
           begin: bool) -> Iterator[Piece]:
    """The conversation in its template, piece by piece."""
    if template == "tokenizer":
        yield from rendered(conversation, tokenizer, begin)
        return
    form, turns = TEMPLATES[template], conversation
    own = turns[0]["value"] if turns[0]["from"] == "system" and form.asks else None

    def set_text(text: str) -> Iterator[Piece]:
        return fixed(text, r"<\|\w+\|>", tokenizer)

    if begin and tokenizer.bos_token_id is not None:
        yield Piece(tokenizer.bos_token_id)
    if begin and own is None:
        yield from set_text(form.system)
    elif begin:
        yield from set_text(form.around[0])
        yield Piece(own)
        yield from set_text(form.around[1])
    for turn in turns[turns[0]["from"] == "system":]:
        if turn["from"] == "gpt":
            yield Piece(form.answer + turn["value"], learned=True)
            yield Piece(end_token(template, tokenizer), learned=True)
            continue
        yield from set_text(form.user)
        for index, text in enumerate(turn["value"].split(IMAGE)):
            if index:
                yield Piece(IMAGE_TOKEN)
            if form.asks:
                yield Piece(text)
        yield from set_text(form.assistant)


# What is said, while a template renders: a number in private characters, between spaces of a rare
# kind, which are gone where the template trims.
MARK = re.compile("(\u2003?)\ue000([0-9]+)\ue001(\u2003?)")
INSTEAD = "; use a language model with another chat template, or a preset with a built-in one"


def rendered(conversation: list[dict], tokenizer: PreTrainedTokenizerBase,
             begin: bool) -> list[Piece]:
    """The conversation in the tokenizer's own chat template.

    All around what is said is the template's, and there special tokens are tokens; what is said
    stays text, whatever it spells. Learned are an answer, with a space before it, and what follows
    up to the first special token; ValueError where none ends it, and as `taken_apart` has it.
    """
    turns = list(conversation)
    if not begin:  # the template may have more to say behind an answer
        turns = [{"from": "human", "value": "-"}, {"from": "gpt", "value": "-"}, *turns]
    if asked := turns[-1]["from"] != "gpt":  # a prompt ends where an answer would begin
        turns.append({"from": "gpt", "value": "-"})
    around, said = taken_apart(turns, tokenizer)
    control, pieces = controls(tokenizer), []
    for number, (place, text) in enumerate(said):
        before, after = around[number:number + 2]
        if turns[place]["from"] != "gpt":
            pieces += fixed(before, control, tokenizer)
            parts = text.split(IMAGE) if turns[place]["from"] == "human" else [text]
            for index, part in enumerate(parts):
                pieces += [Piece(IMAGE_TOKEN)] * (index > 0) + [Piece(part)]
            continue
        pieces += fixed(before.removesuffix(" "), control, tokenizer)
        if asked and place + 1 == len(turns):
            return pieces
        if not (end := re.match(rf"\s*(?:{control})", after)):
            raise ValueError("the tokenizer's chat template ends an answer with "
                             f"{after[:40]!r}, which is no special token of its own" + INSTEAD)
        pieces.append(Piece(" " * before.endswith(" ") + text, learned=True))
        pieces += [Piece(piece.what, learned=True)
                   for piece in fixed(end[0], control, tokenizer)]
        around[number + 1] = after[end.end():]
        if not begin and place == 1:
            pieces = []
    return pieces + [*fixed(around[-1], control, tokenizer)]


def taken_apart(turns: list[dict],
                tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[tuple[int, str]]]:
    """What the template puts around the turns, one text more than they are, and (turn, what is
    said) as it gives it. A turn that says nothing is part of what is around.

    The template is a program, so it is asked and not read: it renders marks in the place of words.
    ValueError where it makes another text of the words themselves, and where its prompt for an
    answer is another than what stands before the answer, white space aside.
    """
    marks = [f"\u2003\ue000{place}\ue001\u2003" if turn["value"] else ""
             for place, turn in enumerate(turns)]
    whole = render(turns, marks, tokenizer)
    around, left, places, right = (MARK.split(whole)[group::4] for group in range(4))
    said = [turns[int(place)]["value"] for place in places]
    said = [text if kept else text.lstrip() for text, kept in zip(said, left, strict=True)]
    said = [text if kept else text.rstrip() for text, kept in zip(said, right, strict=True)]
    text = "".join(chain(*zip(around, [*said, ""], strict=True)))
    if text != render(turns, [turn["value"] for turn in turns], tokenizer):
        raise ValueError("the tokenizer's chat template changes what is said" + INSTEAD)
    for place, turn in enumerate(turns):
        if turn["from"] == "gpt":
            prompt = render(turns[:place], marks[:place], tokenizer,
                            add_generation_prompt=True)
            if prompt.split() != whole[:whole.index(marks[place].strip())].split():
                raise ValueError("the prompt of the tokenizer's chat template is not what stands "
                                 "before an answer" + INSTEAD)
    return around, list(zip(map(int, places), said, strict=True))


def render(turns: list[dict], said: list[str], tokenizer: PreTrainedTokenizerBase,
           **options) -> str:
    """What the chat template, in transformers' sandbox, makes of turns that say `said`."""
    role = {"human": "user", "gpt": "assistant"}
    messages = [{"role": role.get(turn["from"], turn["from"]), "content": text}
                for turn, text in zip(turns, said, strict=True)]
    if not tokenizer.chat_template:
        raise ValueError("this tokenizer has no chat template: use an instruction-tuned language "
                         "model, or a preset with a built-in template")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # there is no end to what a template can raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the tokenizer's chat template does not take a conversation of "
                         f"{', '.join(m['role'] for m in messages[:3])} .. ({reason}){INSTEAD}"
                         ) from error


def controls(tokenizer: PreTrainedTokenizerBase) -> str:
    """A pattern of the tokenizer's special tokens, with the white space that they swallow."""
    added = sorted(tokenizer.added_tokens_decoder.values(), key=lambda token: -len(token.content))
    return "|".join(r"\s*" * token.lstrip + re.escape(token.content) + r"\s*" * token.rstrip
                    for token in added) or "(?!)"


def fixed(text: str, control: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[Piece]:
    """Text of a template: its special tokens, which `control` finds, and what is between them."""
    for index, piece in enumerate(re.split(f"({control})", text)):
        if index % 2:
            yield Piece(special_id(piece.strip(), tokenizer))
        elif piece:
            yield Piece(piece)


def tokenise(pieces: list[Piece], lead: str,
             tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, bool]]:
    """Tokens of the pieces read as one text, each with whether it is learned.

    A tokenizer may read the beginning of a text unlike what follows a special token: Llama's puts a
    space before the first word, and before the others only if it is of an older kind. So the
    special token before the text, `lead`, is read with it. A text that spells out a special token,
    which must stay text, is read as one of its own; in two pieces where the token is of those that
    tokenizers never let pass as text.
    """
    text = "".join(piece.what for piece in pieces)
    if not text:
        return []
    learned = [piece.learned for piece in pieces for _ in piece.what]          # per character
    spelled = [token for token in tokenizer.get_added_vocab() if token in text]
    lead = "" if spelled else lead
    torn = "|".join(f"(?<={re.escape(token[0])})(?={re.escape(token[1:])})" for token in spelled
                    if token not in tokenizer.all_special_tokens and token[1:].strip()
                    and not token[0].isalnum())
    tokens, at = [], -len(lead)  # where in the text the piece begins
    for piece in re.split(torn, text) if torn else [lead + text]:
        read = tokenizer(piece, add_special_tokens=False, split_special_tokens=not lead,
                         return_offsets_mapping=True)
        for token, (start, end) in zip(read["input_ids"], read["offset_mapping"], strict=True):
            if at + start >= 0 or at + end > 0:  # not the special token itself
                place = min(max(at + start, 0), len(text) - 1)  # a token belongs where it starts
                tokens.append((token, learned[place]))
        at += len(piece)
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
    if template == "tokenizer":
        turns = [{"from": "human", "value": "-"}, {"from": "gpt", "value": "-"}]
        return [label for label in encode(turns, template, tokenizer).labels if label != IGNORE][-1]
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
