"""Asks SliME about images: a model trained here, or a released one.

    python sample.py --image photo.png --prompt "How many bars are there?"
    python sample.py --image photo.png                  a conversation; an empty line ends it
    python sample.py --image photo.png --prompt "..." --explain out.png    and what it looked at
    python sample.py --checkpoint yifanzhang114/SliME-Llama3-8B --image a.jpg b.jpg --prompt "..."
    python sample.py --batch questions.jsonl --images photos --answers answers.jsonl

The checkpoint is the newest one in out/ unless --checkpoint names a folder or a hub id. A line of
--batch is {"question_id": 1, "image": "a.jpg" or a list or absent, "text": "..."}, one of --answers
{"question_id", "prompt", "text"}; answers that are there already are not made again.
"""

import argparse
import json
import sys
from pathlib import Path

from sliming.config import COUNT, SEED, Parser, number


def main() -> None:
    arguments = read_flags()
    # torch is loaded when the flags are known to be right.
    import torch

    from sliming.distributed import choose_dtype, rank_device
    from sliming.images import open_image
    from sliming.model import SliME
    device = rank_device()
    torch.manual_seed(arguments.seed)
    try:
        images = [open_image(path) for path in arguments.image]
        checkpoint = arguments.checkpoint or newest_checkpoint(arguments.out)
        model = SliME.from_pretrained(checkpoint, dtype=choose_dtype(arguments.dtype, device))
        model.to(device).use_attention(arguments.attention)
        if arguments.batch:
            answer_file(model, arguments)
        else:
            converse(model, images, arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"sample.py: {error}")


def converse(model, images: list, arguments: argparse.Namespace) -> None:
    """Answers --prompt or, without it, line after line from the keyboard."""
    from sliming.generate import Conversation
    conversation = Conversation(model, images, gamma=arguments.gamma,
                                max_new_tokens=arguments.max_new_tokens,
                                temperature=arguments.temperature, top_p=arguments.top_p)
    while question := arguments.prompt or read_question():
        answer, first = "", conversation.first is None
        for piece in conversation.ask(question):
            print(piece if answer else piece.lstrip(), end="", flush=True)
            answer += piece
        print()
        if arguments.explain and first:
            from sliming.explain import explain
            explain(model, conversation.first, arguments.gamma, answer.strip(), arguments.explain)
            print(f"wrote {arguments.explain}", file=sys.stderr)
        if arguments.prompt:
            break


def read_question() -> str:
    """One line from the keyboard; empty at the end of input, too."""
    try:
        return input("> ").strip()
    except EOFError:
        print()
        return ""


def answer_file(model, arguments: argparse.Namespace) -> None:
    """Answers every question of --batch that --answers does not hold yet, appending as they come.

    RecordError, with file and line, for a line that is no question and for an image that cannot be
    read; what is answered stays.
    """
    from tqdm import tqdm

    from sliming.chat import without_markers
    from sliming.records import RecordError, inside, lines, resume
    done = {json.dumps(row.get("question_id")) for row in resume(arguments.answers)}
    with open(arguments.answers, "a", encoding="utf-8") as out:
        for number, record in tqdm(list(lines(arguments.batch)), desc="questions", unit="question"):
            try:
                name, text, image = record["question_id"], record["text"], record.get("image") or []
                text = without_markers(text).strip()
            except (KeyError, TypeError, AttributeError) as error:
                raise RecordError(f"{arguments.batch}, line {number}: no question with question_id "
                                  f"and text ({error!r})") from error
            if json.dumps(name) in done:
                continue
            paths = image if isinstance(image, list) else [image]
            reply = model.answer([inside(arguments.images, path) for path in paths], text,
                                 gamma=arguments.gamma, max_new_tokens=arguments.max_new_tokens,
                                 temperature=arguments.temperature, top_p=arguments.top_p)
            row = {"question_id": name, "prompt": text, "text": reply}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            out.flush()


def newest_checkpoint(out: Path) -> Path:
    """The checkpoint folder in `out` that was written last; FileNotFoundError with the command that
    makes one."""
    found = [path.parent for path in out.glob("*/config.json")]
    if not found:
        raise FileNotFoundError(f"no checkpoint in {out}/; make one with: python train.py")
    return max(found, key=lambda folder: (folder / "config.json").stat().st_mtime)


def read_flags() -> argparse.Namespace:
    parser = Parser(prog="sample.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add, share = parser.add_argument, number(float, 0, 1, above=True)
    add("--image", nargs="+", action="extend", default=[], metavar="FILE",
        help="image(s) to ask about, also given several times; none: words only")
    add("--prompt", help="the question; without it, a conversation")
    add("--batch", type=Path, metavar="JSONL", help="questions, instead of --image and --prompt")
    add("--images", type=Path, default=".", help="folder that the images of --batch lie in")
    add("--answers", type=Path, default="answers.jsonl", help="where the answers to --batch go")
    add("--checkpoint", help="folder or hub id (default: the newest in --out)")
    add("--out", type=Path, default="out", help="folder that train.py wrote (default: out)")
    add("--explain", type=Path, metavar="PNG", help="draw what the model looked at for the "
        "question (in a conversation, the first)")
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
    arguments = parser.parse_args()
    if arguments.explain and not arguments.image:
        parser.error("--explain needs an --image")
    if arguments.batch and (arguments.image or arguments.prompt):
        parser.error("--batch brings its own images and questions: leave --image and --prompt away")
    return arguments


if __name__ == "__main__":
    main()
