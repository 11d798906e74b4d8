"""A page to try the model on: upload an image, ask, see what it looked at.

    pip install -e ".[demo]"
    python -m sliming.demo              the newest checkpoint in out/, at http://127.0.0.1:7860
    python -m sliming.demo --host 0.0.0.0    for everybody who reaches this computer

An answer comes word by word; behind it comes the page that `sample.py --explain page.html` writes.
"""

import html
from collections.abc import Iterator
from pathlib import Path

from sliming.config import COUNT, Parser, number
from sliming.guard import InputError, one_line

FILE = 20 * 2**20     # bytes of an image, at most
PIXELS = 50_000_000   # and pixels
WAITING = 16          # questions that wait for their turn, at most; one is answered at a time


@one_line("sliming.demo")
def main() -> None:
    parser = Parser(prog="python -m sliming.demo", description="Ask about an image in the browser.")
    parser.add_argument("--checkpoint", help="folder or hub id (default: the newest in --out)")
    parser.add_argument("--out", type=Path, default="out", help="folder that train.py wrote")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this "
                        "computer only)")
    parser.add_argument("--port", type=number(int, 1, 65535), default=7860, help="(default: 7860)")
    parser.add_argument("--max-new-tokens", type=COUNT, default=128, help="of an answer")
    flags = parser.parse_args()
    try:
        import gradio
    except ImportError as error:
        raise InputError('this needs gradio: pip install -e ".[demo]"') from error
    from sliming.checkpoints.files import newest
    from sliming.distributed import choose_dtype, rank_device
    from sliming.model import SliME
    device = rank_device()
    model = SliME.from_pretrained(flags.checkpoint or newest(flags.out),
                                  dtype=choose_dtype(None, device)).to(device)
    blocks(gradio, model, flags.max_new_tokens).queue(
        max_size=WAITING, default_concurrency_limit=1).launch(
        server_name=flags.host, server_port=flags.port, max_file_size=FILE, share=False)


def blocks(gradio, model, max_new_tokens: int):
    """The page with its three fields, as gradio has it."""
    def ask(image: str | None, question: str, gamma: float) -> Iterator[tuple[str, str]]:
        try:
            yield from respond(model, image, question, gamma, max_new_tokens)
        except (ValueError, OSError) as error:
            raise gradio.Error(html.escape(str(error))) from error

    with gradio.Blocks(title="sliming", analytics_enabled=False) as page:
        with gradio.Row():
            image = gradio.Image(type="filepath", label="Image")
            with gradio.Column():
                question = gradio.Textbox(label="Question", max_length=2000)
                gamma = gradio.Slider(0.01, 1, model.config.gamma, step=0.01,
                                      label="γ, share of the relevance to keep")
                button = gradio.Button("Ask", variant="primary")
                answer = gradio.Textbox(label="Answer", interactive=False)
        looked = gradio.HTML()
        for event in (button.click, question.submit):
            event(ask, [image, question, gamma], [answer, looked])
    return page


def respond(model, image: str | None, question: str, gamma: float,
            max_new_tokens: int) -> Iterator[tuple[str, str]]:
    """The answer so far and what to show below it, again and again; at the end the page."""
    from sliming.generate import Conversation
    from sliming.images import FORMATS, Image
    from sliming.page.page import page
    if not image:
        raise InputError("no image yet: upload one first")
    if not question.strip():
        raise InputError("no question yet: type one first")
    with Image.open(image, formats=FORMATS) as opened:  # its header only
        if opened.width * opened.height > PIXELS:
            raise InputError(f"an image of {opened.width} x {opened.height} pixels is too large "
                             f"here: at most {PIXELS:,} pixels")
    talk = Conversation(model, [image], gamma=gamma, max_new_tokens=max_new_tokens)
    said = ""
    for piece in talk.ask(question):
        said += piece
        yield said.strip(), ""
    # In a frame of its own, without rights: its script reaches nothing but the page itself.
    frame = (f'<iframe title="What the model looked at" sandbox="allow-scripts" style="width:100%;'
             f'height:90vh;border:0" srcdoc="{html.escape(page(model, [talk]))}"></iframe>')
    yield said.strip(), frame


if __name__ == "__main__":
    main()
