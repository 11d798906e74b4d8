"""Answers from a model: token by token, several questions at once, and conversations.

`Answering` is the half of `SliME` that answers; the half in model.py reads.

Legend: T packed tokens, D model width, C vocabulary, A supervised tokens of a batch.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from transformers import DynamicCache

from sliming.backbones import PackedCache
from sliming.chat import IGNORE, encode, end_token, without_markers
from sliming.inputs import Batch, Sample
from sliming.images import ImageSource


class Answering:
    """Generation for a model with `see`, `embed`, `llm`, `processor` and `end_ids`."""

    def answer(self, image: ImageSource | list[ImageSource] | None, question: str,
               **options) -> str:
        """The answer to a question about an image, several or none; options of `generate`."""
        return "".join(self.stream(self.processor.ask(image, question), **options)).strip()

    def answer_batch(self, questions: list[tuple[ImageSource | list[ImageSource] | None, str]],
                     **options) -> list[str]:
        """`answer` for several pairs of image(s) and question at once, greedily; options of
        `generate_batch`."""
        answers = self.generate_batch([self.processor.ask(*pair) for pair in questions], **options)
        return [self.processor.tokenizer.decode(ids).strip() for ids in answers]

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
                 temperature: float = 0.0, top_p: float = 1.0,
                 generator: torch.Generator | None = None,
                 cache: DynamicCache | None = None) -> Iterator[int]:
        """Yields the answer's token ids as they come, without the end token.

        `temperature` 0 is greedy. `top_p` < 1 draws from the smallest set of tokens with that much
        probability. `cache`: keys and values of what came before `sample`; those of `sample` and of
        the answer, its last token not, are added.
        """
        inputs, _ = self.embed_prompts([sample], gamma)                        # [T, D]
        cache = DynamicCache(config=self.llm.config) if cache is None else cache
        position = cache.get_seq_length()
        for _ in range(max_new_tokens):
            positions = torch.arange(position, position + len(inputs), device=inputs.device)
            hidden = self.llm.get_decoder()(
                inputs_embeds=inputs[None], position_ids=positions[None], cache=cache,
                use_cache=True).last_hidden_state                              # [1, T, D]
            logits = self.llm.get_output_embeddings()(hidden[0, -1]).float()   # [C]
            token = int(sample_token(logits, temperature, top_p, generator))
            if token in self.end_ids:
                return
            yield token
            position += len(inputs)
            inputs = self.embed_tokens([token])                                # [1, D]

    @torch.no_grad()
    def generate_batch(self, samples: list[Sample], *, gamma: float | None = None,
                       max_new_tokens: int = 128) -> list[list[int]]:
        """The greedy answers' token ids of several samples at once: what `generate` yields for
        each, but every step reads the language model's weights once for all."""
        inputs, lengths = self.embed_prompts(samples, gamma)                   # [T, D]
        answers: list[list[int]] = [[] for _ in samples]
        running, cache = list(range(len(samples))), PackedCache()
        for _ in range(max_new_tokens):
            starts, ends = cache.extend(lengths)
            positions = torch.cat([torch.arange(*span) for span in zip(starts, ends, strict=True)])
            hidden = self.llm.get_decoder()(
                inputs_embeds=inputs[None], position_ids=positions[None].to(inputs.device),
                cache=cache, segments=lengths, key_segments=ends,
                use_cache=True).last_hidden_state[0]                           # [T, D]
            last = torch.tensor(lengths, device=inputs.device).cumsum(0) - 1   # [running]
            logits = self.llm.get_output_embeddings()(hidden[last])            # [running, C]
            tokens = logits.argmax(1).tolist()
            going = [i for i, token in enumerate(tokens) if token not in self.end_ids]
            for i in going:
                answers[running[i]].append(tokens[i])
            if not going:
                break
            if len(going) < len(tokens):
                cache.keep(going)
            running = [running[i] for i in going]
            inputs = self.embed_tokens([tokens[i] for i in going])             # [running, D]
            lengths = [1] * len(going)
        return answers

    def embed_prompts(self, samples: list[Sample], gamma: float | None) -> tuple[Tensor, list[int]]:
        """Prompts as the language model reads them, without the noise of training: [T, D], and
        their lengths, sum T."""
        training = self.training
        self.eval()
        batch = Batch.pack(samples).to(self.device)
        inputs, _, lengths = self.embed(batch, self.see(batch, gamma=gamma))
        self.train(training)
        return inputs, lengths

    def embed_tokens(self, tokens: list[int]) -> Tensor:
        """Token ids -> [len(tokens), D]."""
        return self.llm.get_input_embeddings()(torch.tensor(tokens, device=self.device))


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
        self.cache = DynamicCache(config=model.llm.config)
        self.first: Sample | None = None  # the first turn, with the images
        self.unseen: list[int] = []       # said, but not in the cache: the end of the last answer

    def ask(self, question: str) -> Iterator[str]:
        """The answer as text, piece by piece. The next question is asked when it has been read."""
        processor, template = self.model.processor, self.model.config.template
        if self.first is None:
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
            end = end_token(template, processor.tokenizer)
            self.unseen = [end] if ended else [*tokens[-1:], end]


def sample_token(logits: Tensor, temperature: float, top_p: float,
                 generator: torch.Generator | None) -> Tensor:
    """Draws one token id from logits [C]: greedy at temperature 0, else from the nucleus of mass
    `top_p`. ValueError for a temperature or mass out of range."""
    if not temperature >= 0 or not 0 < top_p <= 1:
        raise ValueError(f"need temperature >= 0 and 0 < top_p <= 1, got {temperature} and {top_p}")
    if temperature == 0:
        return logits.argmax()
    probabilities, order = (logits / temperature).softmax(0).sort(descending=True)
    # The token that crosses the mass is inside.
    outside = probabilities.cumsum(0) - probabilities >= top_p
    return order[probabilities.masked_fill(outside, 0).multinomial(1, generator=generator)[0]]


def exact_match(batch: Batch, logits: Tensor) -> list[bool]:
    """Per sample: would greedy decoding give its answer to the letter and then stop?

    Decided in one forward pass with the answer as input, `logits` [A, C]: greedy decoding
    reproduces an answer if and only if each of its tokens is the most probable one behind those
    before it (by induction over the tokens).
    """
    supervised = batch.labels != IGNORE                                        # [N]
    right = (logits.argmax(-1) == batch.labels[supervised]).tolist()           # A
    counts = [int(part.sum()) for part in supervised.split(batch.lengths)]
    ends = torch.tensor(counts).cumsum(0).tolist()
    return [all(right[end - count:end]) for count, end in zip(counts, ends, strict=True)]
