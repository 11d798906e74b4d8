"""What the page is told: numbers against their slow, obvious twins, text that stays text, size."""

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel

import sliming.page.page
from sliming import demo
from sliming.backbones import TINY
from sliming.config import SliMEConfig
from sliming.generate import Conversation
from sliming.guard import InputError
from sliming.inputs import Batch
from sliming.model import SliME
from sliming.page.page import SIDE, explain, look, page, spell
from sliming.router import select
from sliming.slicer import choose_grid, weigh_grids
from sliming.tiny.held_out import held_out

EVIL = "</script><script>alert(1)</script><!--<img src=x onerror=alert(2)>&amp;@shown@\u2028"


def talk(model, images, *questions, **options):
    conversation = Conversation(model, images, max_new_tokens=4, **options)
    for question in questions:
        list(conversation.ask(question))
    return conversation


def told(text):
    """The JSON of a page."""
    return json.loads(re.search(r'<script type="application/json" id="shown">(.*?)</script>',
                                text, flags=re.S)[1])


def floats(text):
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), "<f4").copy())


def shorts(text):
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), "<i2") / 32767)


@pytest.fixture
def picture():
    return held_out("detail", 0)["image"]


@pytest.mark.parametrize("settings", [{}, {"router_text": "all", "router_score": "sum",
                                           "router_temperature": 0.25, "slicing": "official"}])
def test_numbers_are_the_routers(model, picture, settings):
    for name, value in settings.items():
        setattr(model.config, name, value)
    asked = talk(model, [picture, picture.resize((70, 40))], "What number is on the red bar?")
    found = look(model, asked)
    batch = Batch.pack([asked.first])
    visual = model.see(batch)
    ids = batch.words if settings else batch.question
    words = torch.nn.functional.normalize(model.llm.get_input_embeddings()(ids), dim=-1)
    assert "".join(found["words"]) == model.processor.tokenizer.decode(ids)
    assert len(found["words"]) == len(ids) and found["gamma"] == 0.75
    for image, local, gates in zip(found["images"], visual.local, visual.gates, strict=True):
        cosines = torch.nn.functional.normalize(local, dim=-1) @ words.T            # [M, Q]
        for text, expected in zip(image["cosines"], cosines.T, strict=True):
            assert (shorts(text) - expected).abs().max() < 3e-5
        expected = 4 * cosines.sum(1) if settings else cosines.mean(1)
        scores, weights = floats(image["scores"]), floats(image["weights"])
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(weights / weights.sum(), expected.softmax(0))
        assert (shorts(image["gates"][0]) - gates[:, 0]).abs().max() < 3e-5
    for row in found["answers"]:
        keep = model.see(batch, gamma=row["gamma"]).keep
        assert row["kept"] == sum(int(one.sum()) for one in keep)
        if row["gamma"] < 1:
            again = [select(floats(image["scores"]), row["gamma"]) for image in found["images"]]
            assert all(map(torch.equal, again, keep))
        assert row["router"] == model.answer(asked.images, "What number is on the red bar?",
                                             gamma=row["gamma"], max_new_tokens=4)
    assert found["answers"][0]["router"] == found["answers"][0]["random"]


def test_as_many_at_random(model, picture, monkeypatch):
    """The router's choice and the random one differ in which tokens, not in how many."""
    seen, embed = [], SliME.embed
    monkeypatch.setattr(SliME, "embed", lambda model, batch, visual: (
        seen.append(visual.keep[0]), embed(model, batch, visual))[1])
    asked = talk(model, [picture], "How many?")
    seen.clear()
    look(model, asked)
    assert len(seen) == 8
    for routed, drawn in zip(seen[2::2], seen[3::2], strict=True):
        assert routed.sum() == drawn.sum() and not torch.equal(routed, drawn)


def test_more_than_the_context_is_said(model, picture):
    asked = talk(model, [picture], "How many?", gamma=0.25)
    model.llm.config.max_position_embeddings = 130
    said = [row["router"] for row in look(model, asked)["answers"]]
    assert said[0] is None and said[-1] is not None


def test_grids_weighed_are_those_chosen_from(model, picture):
    rng = np.random.default_rng(0)
    for rule in ("paper", "official"):
        for width, height in rng.integers(1, 4000, (200, 2)).tolist():
            weighed = weigh_grids(width, height, rule=rule)
            best = max(utilised for utilised, _ in weighed.values())
            least = min(wasted for utilised, wasted in weighed.values() if utilised == best)
            assert weighed[choose_grid(width, height, rule=rule)] == (best, least)
            for (m, n), (utilised, wasted) in weighed.items():
                assert utilised + wasted == m * n * 336 * 336 and utilised <= width * height


def test_text_stays_text(model, picture, tmp_path):
    picture.save(tmp_path / "<script>alert(3)</script>.png".replace("/", "\u2215"))
    (file,) = tmp_path.glob("*.png")
    explain(model, [talk(model, [str(file)], EVIL, EVIL), talk(model, [str(file)], "")],
            tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count("<script") == text.count("</script>") == 2 and "@shown@" in text
    shown = told(text)
    assert shown["images"][0]["name"] == file.name
    assert [turn[0] for turn in shown["questions"][0]["turns"]] == [EVIL, EVIL]
    assert shown["questions"][1]["words"] == []  # nothing asked, nothing dropped
    assert len({row["kept"] for row in shown["questions"][1]["answers"]}) == 1
    for name in ("page.html", "page.js"):
        template = Path(sliming.page.page.__file__).with_name(name).read_text(encoding="utf-8")
        assert not re.search(r"(src|href)=|https?:|url\(|@import|innerHTML", template)


def test_characters_of_several_tokens_stay_whole():
    class Bytes:
        def decode(self, ids):
            return bytes(ids).decode(errors="replace")

    assert spell(Bytes(), list("né €!".encode())) == [
        ("n", 1), ("é", 2), (" ", 1), ("€", 3), ("!", 1)]
    assert spell(Bytes(), list("€".encode())[:2]) == [("\ufffd", 2)]


def test_a_large_photo_makes_a_small_page(tmp_path):
    """12 megapixels of noise, which no format makes small, cut as at the paper's size."""
    torch.manual_seed(0)
    clip = CLIPVisionConfig(hidden_size=128, intermediate_size=32, num_hidden_layers=1,
                            num_attention_heads=2, image_size=336, patch_size=14)
    CLIPVisionModel(clip).save_pretrained(tmp_path / "clip")
    model = SliME.from_backbones(SliMEConfig(
        vision=str(tmp_path / "clip"), llm=str(TINY / "llm"), vision_layer=-1)).eval()
    noise = np.random.default_rng(0).integers(0, 256, (3000, 4000, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.jpg")
    asked = Conversation(model, [tmp_path / "photo.jpg"], gamma=0.25, max_new_tokens=1)
    list(asked.ask("What is the number on the red bar, and how many bars are there in all of it?"))
    text = page(model, [asked])
    assert len(text) < 3_000_000 and told(text)["images"][0]["size"] == [4000, 3000]
    assert SIDE < 336 * told(text)["images"][0]["grid"][0]


# --------------------------------------------------------------------------------------------- demo


def test_the_demo_streams_and_then_shows_the_page(model, picture, tmp_path):
    file = tmp_path / "a.png"
    picture.save(file)
    steps = list(demo.respond(model, str(file), "How many bars?", 0.5, 4))
    assert len(steps) > 1 and all(frame == "" for _, frame in steps[:-1])
    assert steps[-1][0] == model.answer(str(file), "How many bars?", gamma=0.5, max_new_tokens=4)
    frame = steps[-1][1]
    assert 'sandbox="allow-scripts"' in frame and frame.count("<") == 2


def test_what_the_demo_refuses(model, picture, tmp_path, monkeypatch):
    file = tmp_path / "a.png"
    picture.save(file)
    monkeypatch.setattr(demo, "PIXELS", picture.width * picture.height - 1)
    for image, question, message in ((None, "?", "no image"), (str(file), " ", "no question"),
                                     (str(file), "?", "too large")):
        with pytest.raises(InputError, match=message):
            list(demo.respond(model, image, question, 0.5, 4))


def test_the_demo_listens_at_home_only(model, monkeypatch):
    """gradio is asked for this computer, one question at a time, limits; a stand-in is enough."""
    import sys
    from unittest.mock import MagicMock
    gradio = MagicMock()
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    monkeypatch.setattr(SliME, "from_pretrained", lambda *args, **options: model)
    monkeypatch.setattr(sys, "argv", ["demo", "--checkpoint", "x"])
    demo.main()
    blocks = gradio.Blocks.return_value.__enter__.return_value
    blocks.queue.assert_called_once_with(max_size=16, default_concurrency_limit=1)
    options = blocks.queue.return_value.launch.call_args.kwargs
    assert options["server_name"] == "127.0.0.1" and options["max_file_size"] <= 20 * 2**20
    assert not options["share"]
