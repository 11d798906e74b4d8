"""SliME as a model of lmms-eval, so that its tasks run without a line of code:

    lmms_eval --model sliming --model_args pretrained=out/stage3 --tasks pope,mme --batch_size 8

lmms-eval (0.7) finds it through the entry point `lmms_eval.models` of pyproject.toml. Its own
`slime` model is another one: it runs the authors' package. Requests are what it calls "simple": a
context, and images that come before it unless the context has a marker `<image>` for each.
"""

from collections.abc import Iterator

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from tqdm import tqdm

from sliming.chat import IMAGE, without_markers
from sliming.distributed import choose_dtype, rank_device
from sliming.generate import exact_match
from sliming.inputs import Batch, Sample
from sliming.model import SliME

MANIFEST = ModelManifest(model_id="sliming",
                         simple_class_path="sliming.evaluation.lmms.SliMEForLmmsEval")
MAX_NEW_TOKENS = 1024  # of a task that names no limit, as for lmms-eval's other models


class SliMEForLmmsEval(lmms):
    """A checkpoint behind lmms-eval's interface.

    `pretrained`: folder or hub id; `dtype`: a name of torch's, by default bfloat16 on a GPU and
    float32 elsewhere; `gamma`: the router's share in place of the checkpoint's. The other three
    come from lmms-eval's own command line.
    """

    is_simple = True

    def __init__(self, pretrained: str, dtype: str | None = None, gamma: float | None = None,
                 device: str | None = None, batch_size: int | str = 1,
                 max_batch_size: int | None = None):
        super().__init__()
        usual = device in (None, "cuda") or not torch.cuda.is_available()
        self.device = rank_device() if usual else torch.device(device)
        dtype = choose_dtype(dtype, self.device)
        self.model = SliME.from_pretrained(str(pretrained), dtype=dtype).to(self.device).eval()
        if gamma is not None:
            self.model.config.gamma = float(gamma)
        # For "auto" it is the limit.
        number = batch_size if str(batch_size).isdigit() else max_batch_size or 8
        self.batch_size = int(number)

    def document(self, doc_id: int, task: str, split: str) -> dict:
        return self.task_dict[task][split][doc_id]

    def sample(self, context: str, visuals: list | None, answer: str | None = None) -> Sample:
        """A request as the model takes it; with `answer`, to be judged instead of made."""
        images = list(flat(visuals))
        for image in images:
            if not isinstance(image, Image.Image):
                raise ValueError(f"sliming answers about images, not about {type(image).__name__}: "
                                 "choose a task without video or audio")
        if context.count(IMAGE) != len(images):
            context = f"{IMAGE}\n" * len(images) + without_markers(context).lstrip("\n")
        turns = [{"from": "human", "value": context}]
        if answer is not None:
            turns.append({"from": "gpt", "value": answer})
        return self.model.processor.prompt(turns, images)

    def answers(self, samples: list[Sample], options: dict) -> list[str]:
        """The answers under a task's generation_kwargs: max_new_tokens, temperature (0 is greedy),
        top_p and until."""
        limit = int(options.get("max_new_tokens") or MAX_NEW_TOKENS)
        temperature = float(options.get("temperature") or 0)
        if int(options.get("num_beams") or 1) > 1:
            raise ValueError("sliming has no beam search: set num_beams=1 (lmms-eval's "
                             "--gen_kwargs)")
        if options.get("do_sample") is False:
            temperature = 0.0
        answers = self.model.generate_batch(samples, max_new_tokens=limit, temperature=temperature,
                                            top_p=float(options.get("top_p") or 1.0))
        texts = [self.model.processor.tokenizer.decode(ids).strip() for ids in answers]
        until = options.get("until") or []
        for stop in [until] if isinstance(until, str) else until:
            texts = [text.split(stop)[0] if stop else text for text in texts]
        return texts

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answers to requests with args (context, generation_kwargs, doc_to_visual, doc_id,
        task, split)."""
        results: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):  # only requests of one kind can share a batch
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(place)
        chunks = [places[start:start + self.batch_size] for places in groups.values()
                  for start in range(0, len(places), self.batch_size)]
        for chunk in tqdm(chunks, desc="sliming", unit="batch", disable=self.rank != 0):
            samples = []
            for place in chunk:
                context, options, doc_to_visual, *where = requests[place].args
                samples.append(self.sample(context, doc_to_visual(self.document(*where))))
            for place, text in zip(chunk, self.answers(samples, options), strict=True):
                results[place] = text
                self.cache_hook.add_partial("generate_until", requests[place].args[:2], text)
        return results

    @torch.no_grad()
    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(mean loss of the target's tokens, would greedy decoding give it?) of requests with args
        (context, target, doc_to_visual, ...); `target` is text or a function of the document.

        A loss and not a likelihood, in spite of the name: lmms-eval's tasks choose the option with
        the smallest (api/task.py, process_results).
        """
        results = []
        for request in tqdm(requests, desc="sliming", unit="request", disable=self.rank != 0):
            context, target, *rest = request.args
            visuals = None
            if rest:  # without it, the target's loss by itself is asked for
                document = self.document(*rest[1:])
                visuals = rest[0](document)
                target = target(document) if callable(target) else target
            sample = self.sample(context, visuals, str(target).strip())
            batch = Batch.pack([sample]).to(self.device)
            output = self.model(batch)
            results.append((float(output.loss), exact_match(batch, output.logits)[0]))
        return results

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """All rounds' answers to requests with args (context, generation_kwargs, doc_to_visual,
        doc_to_text, doc_id, task, split).

        After each round the task's doc_to_text gives the next one's images and context and says
        whether it is over.
        """
        results = []
        for request in tqdm(requests, desc="sliming", unit="request", disable=self.rank != 0):
            context, options, doc_to_visual, doc_to_text, *where = request.args
            document = self.document(*where)
            visuals, rounds, over, info = doc_to_visual(document), [], False, None
            while not over:
                rounds = [*rounds, *self.answers([self.sample(context, visuals)], options)]
                visuals, context, over, rounds, info = doc_to_text(
                    document, previous_output=rounds, round_idx=len(rounds),
                    previous_round_info=info)
            results.append(list(rounds))
        return results


def flat(visuals: list | None) -> Iterator:
    """A document's images, which tasks give as a list, as a list in a list, or not at all."""
    for visual in visuals or []:
        if isinstance(visual, (list, tuple)):
            yield from flat(visual)
        elif visual is not None:
            yield visual
