"""Asks SliME about images: a model trained here, or a released one.

    python sample.py --image photo.png --prompt "How many bars are there?"
    python sample.py --image photo.png                  a conversation; an empty line ends it
    python sample.py --image photo.png --prompt "..." --explain page.html  and what it looked at
    python sample.py --checkpoint yifanzhang114/SliME-Llama3-8B --image a.jpg b.jpg --prompt "..."
    python sample.py --batch questions.jsonl --images photos --answers answers.jsonl

The checkpoint is the newest one in out/ unless --checkpoint names a folder or a hub id. A line of
--batch is {"question_id": 1, "image": "a.jpg" or a list or absent, "text": "..."}, one of --answers
{"question_id", "prompt", "text"}; answers that are there already are not made again.
"""

# Before all others: an early Ctrl-C says nothing.
import sliming.quiet  # noqa: F401  # isort: skip
import argparse
import gc
import os
import sys
from pathlib import Path

from sliming.config import COUNT, SEED, Parser, number
from sliming.guard import one_line


@one_line("sample.py")
def main() -> None:
    flags = read_flags()
    # torch is loaded when the flags are known to be right. To look for garbage among its thousands
    # of modules would take a quarter of the time that one answer takes.
    gc.disable()
    import torch

    from sliming.checkpoints.files import newest
    from sliming.distributed import choose_dtype, rank_device
    from sliming.generate import answer_file
    from sliming.model import SliME
    gc.freeze()
    gc.enable()
    device = rank_device()
    torch.manual_seed(flags.seed)
    options = {"gamma": flags.gamma, "max_new_tokens": flags.max_new_tokens,
               "temperature": flags.temperature, "top_p": flags.top_p}
    model = SliME.from_pretrained(flags.checkpoint or newest(flags.out),
                                  dtype=choose_dtype(flags.dtype, device)).to(device)
    model.use_attention(flags.attention)
    if flags.batch:
        answer_file(model, flags.batch, flags.images, flags.answers, flags.batch_size, **options)
    else:
        converse(model, flags, options)


def converse(model, flags: argparse.Namespace, options: dict) -> None:
    """Answers each --prompt by itself or, without one, line after line from the keyboard as one
    conversation; an empty line ends it."""
    from sliming.generate import Conversation
    talks = []
    for question in flags.prompt or iter(read_line, ""):
        if flags.prompt or not talks:
            talks.append(Conversation(model, flags.image, **options))
        for index, piece in enumerate(talks[-1].ask(question)):
            print(piece if index else piece.lstrip(), end="", flush=True)
        print()
    if flags.explain and talks:
        from sliming.page.page import explain
        explain(model, talks, flags.explain)
        print(f"wrote {flags.explain}", file=sys.stderr)


def read_line() -> str:
    """A line from the keyboard; empty at the end of input, too."""
    try:
        return input("> ").strip()
    except EOFError:
        print()
        return ""


def read_flags() -> argparse.Namespace:
    parser = Parser(prog="sample.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add, share = parser.add_argument, number(float, 0, 1, above=True)
    add("--image", nargs="+", action="extend", default=[], metavar="FILE",
        help="image(s) to ask about, also given several times; none: words only")
    add("--prompt", action="append", help="the question, or several of them, each given so; "
        "without it, a conversation")
    add("--batch", type=Path, metavar="JSONL", help="questions, instead of --image and --prompt")
    add("--images", type=Path, default=".", help="folder that the images of --batch lie in")
    add("--answers", type=Path, default="answers.jsonl", help="where the answers to --batch go")
    add("--batch-size", type=COUNT, default=16, help="questions answered at once (default: 16)")
    add("--checkpoint", help="folder or hub id (default: the newest in --out)")
    add("--out", type=Path, default="out", help="folder that train.py wrote (default: out)")
    add("--explain", type=Path, metavar="FILE", help="show what the model looked at: a page of all "
        "questions (.html), or a picture of the first (.png)")
    add("--gamma", type=share, help="share of local relevance to keep (default: the checkpoint's)")
    add("--max-new-tokens", type=COUNT, default=128, help="of an answer (default: 128)")
    add("--temperature", type=number(float, 0, 100), default=0.0, help="0 (default): the most "
        "probable token")
    add("--top-p", type=share, default=1.0, help="draw from the tokens of this probability")
    add("--seed", type=SEED, default=0, help="of the draws at a temperature above 0")
    add("--dtype", choices=("float32", "bfloat16", "float16"),
        help="of weights and computation (default: bfloat16 on a GPU, float32 elsewhere)")
    add("--attention", choices=("auto", "sdpa", "triton"), default="auto",
        help="how the query formers attend")
    flags = parser.parse_args()
    if flags.explain and not flags.image:
        parser.error("--explain needs an --image")
    if flags.batch and (flags.image or flags.prompt):
        parser.error("--batch brings its own images and questions: leave --image and --prompt away")
    return flags


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # thousands of modules are not taken down one by one, either
