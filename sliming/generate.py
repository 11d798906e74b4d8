"""Answers from a model: token by token, several questions at once, and conversations.

`Answering` is the half of `SliME` that answers; the half in model.py reads.

Legend: T packed tokens, D model width, C vocabulary, A supervised tokens of a batch.
"""

import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sliming.backbones import PackedCache
from sliming.chat import IGNORE, encode, end_token, without_markers
from sliming.guard import naming, only_one
from sliming.images import ImageSource
from sliming.inputs import Batch, Sample
from sliming.records import RecordError, inside, lines, resume


class Answering:
    """Generation for a model with `see`, `embed`, `adapter`, `llm` and `processor`."""

    @property
    def device(self) -> torch.device:
        return self.adapter.w_gate.device

    @cached_property
    def end_ids(self) -> set[int]:
        """Tokens that end an answer: the language model's (none, one or several), the
        template's."""
        ends, tokenizer = self.llm.generation_config.eos_token_id, self.processor.tokenizer
        ids = set(ends if isinstance(ends, list) else [ends])
        if tokenizer is not None:
            ids |= {tokenizer.eos_token_id, end_token(self.config.template, tokenizer)}
        return ids

    def answer(self, image: ImageSource | list[ImageSource] | None, question: str,
               **options) -> str:
        """The answer to a question about an image, several or none; options of `generate`."""
        return "".join(self.stream(self.processor.ask(image, question), **options)).strip()

    def answer_batch(self, questions: list[tuple[ImageSource | list[ImageSource] | None, str]],
                     **options) -> list[str]:
        """`answer` for several pairs of image(s) and question at once; options of
        `generate_batch`."""
        answers = self.generate_batch([self.processor.ask(*pair) for pair in questions], **options)
        return [self.processor.tokenizer.decode(ids).strip() for ids in answers]

    def answer_all(self, todo: list, read: Callable[[Any], Sample], batch_size: int,
                   **options) -> Iterator[list[tuple[Any, str]]]:
        """Whatever `read` makes prompts of, each with its answer, batch after batch. The next batch
        is read while the model answers. Options of `generate_batch`."""
        batches = [todo[at:at + batch_size] for at in range(0, len(todo), batch_size)]
        with ThreadPoolExecutor(1) as reader:
            reading = (reader.submit(lambda batch=batch: [read(one) for one in batch])
                       for batch in batches)
            coming = next(reading, None)
            for batch in batches:
                samples, coming = coming.result(), next(reading, None)
                answers = self.generate_batch(samples, **options)
                texts = [self.processor.tokenizer.decode(ids).strip() for ids in answers]
                yield list(zip(batch, texts, strict=True))

    def stream(self, sample: Sample, **options) -> Iterator[str]:
        """The answer as text, piece by piece; options of `generate`."""
        return self.text(self.generate(sample, **options))

    def text(self, tokens: Iterator[int]) -> Iterator[str]:
        """Token ids as text, piece by piece; a piece ends where a character is complete."""
        ids, shown = [], ""
        for token in tokens:
            ids.append(token)
            text = self.processor.tokenizer.decode(ids)
            if not text.endswith("\ufffd"):  # a multi-byte character is not yet whole
                yield text[len(shown):]
                shown = text
        yield self.processor.tokenizer.decode(ids)[len(shown):]

    @torch.no_grad()
    def generate(self, sample: Sample, *, gamma: float | None = None, max_new_tokens: int = 128,
                 temperature: float = 0.0, top_p: float = 1.0, parts: str = "both",
                 cache: PackedCache | None = None) -> Iterator[int]:
        """Yields the answer's token ids as they come, without the end token.

        `temperature` 0 is greedy. `top_p` < 1 draws from the smallest set of tokens with that much
        probability. `parts`: what the sample shows, where not all. `cache`: keys and values of what
        came before `sample`; those of `sample` and of the answer, its last token not, are added.
        """
        inputs, lengths = self.embed_prompts([sample], gamma, parts)           # [T, D]
        cache = PackedCache() if cache is None else cache
        used = sum(cache.lengths) + len(inputs)
        if self.room(used) < max_new_tokens:
            raise ValueError(f"{used} tokens and an answer of {max_new_tokens} exceed the language "
                             f"model's context of {self.processor.context}: begin a new "
                             "conversation, or lower --max-new-tokens")
        for _ in range(max_new_tokens):
            token = sample_tokens(self.read(inputs, lengths, cache), temperature, top_p)  # [1]
            if int(token) in self.end_ids:
                return
            yield int(token)
            inputs, lengths = self.llm.get_input_embeddings()(token), [1]      # [1, D]

    @torch.no_grad()
    def generate_batch(self, samples: list[Sample], *, gamma: float | None = None,
                       **options) -> list[list[int]]:
        """The answers' token ids of several samples at once: what `generate` yields for each, but
        every step reads the language model's weights once for all. Options of `go_on`."""
        return self.go_on(*self.embed_prompts(samples, gamma), **options)

    @torch.no_grad()
    def go_on(self, inputs: Tensor, lengths: list[int], *, max_new_tokens: int = 128,
              temperature: float = 0.0, top_p: float = 1.0) -> list[list[int]]:
        """The answers' token ids behind embedded prompts [T, D]. All of them end where the longest
        has filled the language model's context."""
        answers: list[list[int]] = [[] for _ in lengths]
        running, cache = list(range(len(lengths))), PackedCache()
        for _ in range(min(max_new_tokens, self.room(max(lengths)))):
            tokens = sample_tokens(self.read(inputs, lengths, cache), temperature, top_p)
            ids = tokens.tolist()                                              # [running]
            going = [i for i, token in enumerate(ids) if token not in self.end_ids]
            for i in going:
                answers[running[i]].append(ids[i])
            if not going:
                break
            if len(going) < len(ids):
                cache.keep(going)
                tokens = tokens[going]
            running = [running[i] for i in going]
            inputs = self.llm.get_input_embeddings()(tokens)                   # [running, D]
            lengths = [1] * len(going)
        return answers

    def read(self, inputs: Tensor, lengths: list[int], cache: PackedCache) -> Tensor:
        """The language model reads on, for every sample where `cache` ends: [T, D] and lengths, sum
        T -> logits behind each sample's last token [samples, C]."""
        segments = cache.extend(lengths, inputs.device)
        output = self.llm.get_decoder()(
            inputs_embeds=inputs[None], position_ids=segments.positions[None], cache=cache,
            segments=segments, use_cache=True)
        last = output.last_hidden_state[0, segments.bounds[1:] - 1]            # [samples, D]
        return self.llm.get_output_embeddings()(last)

    def room(self, used: int) -> int:
        """How many tokens an answer may have behind `used` others. The last one is not read."""
        context = self.processor.context
        return sys.maxsize if context is None else context - used + 1

    def embed_prompts(self, samples: list[Sample], gamma: float | None,
                      parts: str = "both") -> tuple[Tensor, list[int]]:
        """Prompts as the language model reads them, without the noise of training: [T, D], and
        their lengths, sum T."""
        training, batch = self.training, Batch.pack(samples)
        self.eval()
        try:
            features, batch = self.encode_once(batch), batch.to(self.device)
            inputs, _, lengths = self.embed(batch, self.see(batch, parts, gamma, features=features))
        finally:
            self.train(training)
        return inputs, lengths

    def encode_once(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """`encode`, with equal views read once: those of an image that several questions are about,
        and blank crops."""
        views = [*batch.global_views, *batch.crops]
        if not views:
            return self.encode(batch)
        number: dict[bytes, int] = {}                  # of each different view, by its pixels
        numbers = [number.setdefault(view.numpy().tobytes(), len(number)) for view in views]
        different = torch.stack(list(dict(zip(numbers, views, strict=True)).values()))
        features = self.encode(replace(batch, crops=different).to(self.device), "local")[1]
        return features[numbers].split([len(batch.global_views), len(batch.crops)])


class Conversation:
    """Questions and answers about images, with one cache of keys and values: each turn computes its
    own tokens only.

    The router chooses the local tokens for the first question; later turns see the same ones. To
    route by a later question, begin a new conversation. `options` are those of `generate`.
    """

    def __init__(self, model: Answering, images: list[ImageSource], *, max_new_tokens: int = 128,
                 **options):
        self.model, self.images, self.max_new_tokens = model, images, max_new_tokens
        self.options = options
        self.cache = PackedCache()
        self.first: Sample | None = None  # the first turn, with the images
        self.turns: list[tuple[str, str]] = []  # questions and answers
        self.unseen: list[int] = []       # said, but not in the cache: the end of the last answer

    def ask(self, question: str) -> Iterator[str]:
        """The answer as text, piece by piece. The next question is asked when it has been read."""
        processor, template = self.model.processor, self.model.config.template
        if not self.cache.lengths:  # also after a first question that was refused
            sample = self.first = processor.ask(self.images, question)
        else:
            turn = {"from": "human", "value": without_markers(question)}
            text = encode([turn], template, processor.tokenizer, begin=False)
            ids = self.unseen + text.ids
            sample = Sample(replace(text, ids=ids, labels=[IGNORE] * len(ids)), [])
        tokens: list[int] = []

        def answer() -> Iterator[int]:
            for token in self.model.generate(sample, cache=self.cache,
                                             max_new_tokens=self.max_new_tokens, **self.options):
                tokens.append(token)
                yield token

        ended = False
        try:
            yield from self.model.text(answer())
            ended = len(tokens) < self.max_new_tokens
        finally:  # an answer cut short, by its length or its reader, lacks its last token there
            if ended or tokens:
                end = end_token(template, processor.tokenizer)
                self.unseen = [end] if ended else [tokens[-1], end]
                self.turns.append((question, processor.tokenizer.decode(tokens).strip()))


def answer_file(model: Answering, questions: Path, folder: Path, answers: Path, batch_size: int,
                **options) -> None:
    """Answers the lines of `questions` (see sample.py) that `answers` does not hold yet, appending
    as they come; images lie in `folder`. Options of `generate_batch`.

    RecordError, with file and line, for a line that is no question and for an image that cannot be
    read; what is answered stays.
    """
    slices = lru_cache(16)(model.processor.slice)  # questions about a picture often come together

    def read(question: tuple[int, dict]) -> Sample:
        line, record = question
        images = record.get("image") or []
        try:
            images = [slices(inside(folder, image))
                      for image in (images if isinstance(images, list) else [images])]
            return model.processor.ask(images, record["text"])
        except (ValueError, OSError, TypeError) as error:
            raise RecordError(f"{questions}, line {line}: {error}") from error

    with only_one(answers):
        answer_rest(model, questions, read, answers, batch_size, **options)


def answer_rest(model: Answering, questions: Path, read: Callable, answers: Path, batch_size: int,
                **options) -> None:
    """Answers the questions that have no line in `answers` yet."""
    todo = []
    done = {json.dumps(row.get("question_id")) for row in resume(answers)}
    for line, record in lines(questions):
        name, text = (record.get(key) if isinstance(record, dict) else None
                      for key in ("question_id", "text"))
        if not isinstance(name, int | str) or not isinstance(text, str):
            raise RecordError(f"{questions}, line {line}: no question with question_id and text")
        if json.dumps(name) not in done:
            todo.append((line, record))
    # Half a surrogate pair has no UTF-8; as \ud800 it is JSON.
    with (naming(answers), open(answers, "a", encoding="utf-8", errors="backslashreplace") as out,
          tqdm(total=len(todo), desc="questions", unit="question") as progress):
        for answered in model.answer_all(todo, read, batch_size, **options):
            for (_, record), text in answered:
                row = {"question_id": record["question_id"], "prompt": record["text"], "text": text}
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
                progress.update()
            out.flush()


def sample_tokens(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """One token id per row of logits [B, C]: greedy at temperature 0, else drawn from the nucleus
    of mass `top_p` with torch's generator. ValueError for a temperature or mass out of range."""
    if not temperature >= 0 or not 0 < top_p <= 1:
        raise ValueError(f"need temperature >= 0 and 0 < top_p <= 1, got {temperature} and {top_p}")
    if temperature == 0:
        return logits.argmax(1)
    probabilities = (logits.float() / temperature).softmax(1)
    probabilities, order = probabilities.sort(dim=1, descending=True)
    # The token that crosses the mass is inside.
    outside = probabilities.cumsum(1) - probabilities >= top_p                 # [B, C]
    drawn = probabilities.masked_fill(outside, 0).multinomial(1)               # [B, 1]
    return order.gather(1, drawn)[:, 0]


def exact_match(batch: Batch, logits: Tensor) -> list[bool]:
    """Per sample: would greedy decoding give its answer to the letter and then stop?

    Decided in one forward pass with the answer as input, `logits` [A, C]: greedy decoding
    reproduces an answer if and only if each of its tokens is the most probable one behind those
    before it (by induction over the tokens).
    """
    supervised = batch.labels != IGNORE                                        # [N]
    right = (logits.argmax(-1) == batch.labels[supervised]).cpu()              # [A]
    counts = [int(part.sum()) for part in supervised.cpu().split(batch.lengths)]
    return [bool(part.all()) for part in right.split(counts)]
