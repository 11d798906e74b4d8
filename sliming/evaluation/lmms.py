"""SliME as a model of lmms-eval, so that its tasks run without a line of code: `pip install "sliming[eval]"`, then

    lmms_eval --model sliming --model_args pretrained=out/stage3 --tasks pope,mme --batch_size 8

lmms-eval (EvolvingLMMs-Lab/lmms-eval, 0.7) finds it through the entry point `lmms_eval.models` that pyproject.toml declares;
nothing of lmms-eval is changed. Its own `slime` model is another one: it runs the authors' package.

Requests are what lmms-eval calls "simple": a context, and images that come before it unless the context has a marker
`<image>` for each. Greedy requests are answered in batches (SliME.generate_batch), sampled ones one by one.
"""

import os
from collections.abc import Iterator

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from tqdm import tqdm

from sliming.chat import IMAGE
from sliming.evaluation.run import answer_batch, exact
from sliming.model import Batch, Sample, SliME

MANIFEST = ModelManifest(model_id="sliming", simple_class_path="sliming.evaluation.lmms.SliMEForLmmsEval")
MAX_NEW_TOKENS = 1024  # of a task that names no limit, as for lmms-eval's other models


class SliMEForLmmsEval(lmms):
    """A checkpoint behind lmms-eval's interface.

    `pretrained`: folder or hub id; `dtype`: a name of torch's, by default bfloat16 on a GPU and float32 elsewhere; `gamma`: the
    router's share in place of the checkpoint's. The other three come from lmms-eval's own command line.
    """

    is_simple = True

    def __init__(self, pretrained: str, dtype: str | None = None, gamma: float | None = None, device: str | None = None,
                 batch_size: int | str = 1, max_batch_size: int | None = None):
        super().__init__()
        if torch.cuda.is_available() and device in (None, "cuda"):
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        self.device = torch.device(device if torch.cuda.is_available() and device else "cpu")
        name = dtype or ("bfloat16" if self.device.type == "cuda" else "float32")
        self.model = SliME.from_pretrained(str(pretrained), dtype=getattr(torch, name)).to(self.device).eval()
        if gamma is not None:
            self.model.config.gamma = float(gamma)
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else int(max_batch_size or 8)  # "auto" is the limit

    def document(self, doc_id: int, task: str, split: str) -> dict:
        return self.task_dict[task][split][doc_id]

    def sample(self, context: str, visuals: list | None, answer: str | None = None) -> Sample:
        """A request as the model takes it; with `answer`, to be judged instead of made."""
        images = [image for image in flat(visuals)]
        if wrong := [type(image).__name__ for image in images if not isinstance(image, Image.Image)]:
            raise ValueError(f"sliming answers about images, not about {wrong[0]}: choose a task without video or audio")
        if context.count(IMAGE) != len(images):
            context = f"{IMAGE}\n" * len(images) + context.replace(IMAGE, "").lstrip("\n")
        turns = [{"from": "human", "value": context}]
        return self.model.prompt(turns if answer is None else [*turns, {"from": "gpt", "value": answer}], images)

    def answers(self, samples: list[Sample], options: dict) -> list[str]:
        """The answers under a task's generation_kwargs: max_new_tokens, temperature (0 is greedy), top_p and until."""
        limit, temperature = int(options.get("max_new_tokens") or MAX_NEW_TOKENS), float(options.get("temperature") or 0)
        if int(options.get("num_beams") or 1) > 1:
            raise ValueError("sliming has no beam search: set num_beams=1 (lmms-eval's --gen_kwargs)")
        if temperature == 0 or options.get("do_sample") is False:
            texts = answer_batch(self.model, samples, limit)
        else:
            texts = ["".join(self.model.stream(sample, max_new_tokens=limit, temperature=temperature,
                                               top_p=float(options.get("top_p") or 1.0))).strip() for sample in samples]
        until = options.get("until") or []
        for stop in [until] if isinstance(until, str) else until:
            texts = [text.split(stop)[0] if stop else text for text in texts]
        return texts

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answers to requests with args (context, generation_kwargs, doc_to_visual, doc_id, task, split)."""
        results: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):  # only requests of one kind can share a batch
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(place)
        with tqdm(total=len(requests), desc="sliming", unit="request", disable=self.rank != 0) as bar:
            for places in groups.values():
                for start in range(0, len(places), self.batch_size):
                    chunk = places[start:start + self.batch_size]
                    samples = []
                    for place in chunk:
                        context, _, doc_to_visual, doc_id, task, split = requests[place].args
                        samples.append(self.sample(context, doc_to_visual(self.document(doc_id, task, split))))
                    for place, text in zip(chunk, self.answers(samples, requests[chunk[0]].args[1])):
                        results[place] = text
                        self.cache_hook.add_partial("generate_until", requests[place].args[:2], text)
                    bar.update(len(chunk))
        return results

    @torch.no_grad()
    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(mean loss of the target's tokens, would greedy decoding give it?) of (context, target, doc_to_visual, ...).

        A loss and not a likelihood, in spite of the name: lmms-eval's tasks choose the option with the smallest
        (api/task.py, process_results). `target` is text or a function of the document.
        """
        results = []
        for request in tqdm(requests, desc="sliming", unit="request", disable=self.rank != 0):
            context, target, *rest = request.args
            visuals = None
            if rest:  # without it, the target's loss by itself is asked for
                document = self.document(*rest[1:])
                visuals, target = rest[0](document), target(document) if callable(target) else target
            batch = Batch.pack([self.sample(context, visuals, str(target).strip())]).to(self.device)
            output = self.model(batch)
            results.append((float(output.loss), exact(batch, output.logits)[0]))
        return results

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """All rounds' answers to (context, generation_kwargs, doc_to_visual, doc_to_text, doc_id, task, split).

        After each round the task's doc_to_text gives the next one's images and context and says whether it is over.
        """
        results = []
        for request in tqdm(requests, desc="sliming", unit="request", disable=self.rank != 0):
            context, options, doc_to_visual, doc_to_text, *where = request.args
            document = self.document(*where)
            visuals, rounds, over, info = doc_to_visual(document), [], False, None
            while not over:
                rounds = [*rounds, *self.answers([self.sample(context, visuals)], options)]
                visuals, context, over, rounds, info = doc_to_text(document, previous_output=rounds, round_idx=len(rounds),
                                                                   previous_round_info=info)
            results.append(list(rounds))
        return results


def flat(visuals: list | None) -> Iterator:
    """The images of a document, which tasks give as a list, as a list in a list, or not at all."""
    for visual in visuals or []:
        if isinstance(visual, (list, tuple)):
            yield from flat(visual)
        elif visual is not None:
            yield visual
