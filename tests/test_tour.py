"""The tour's steps are the model's own, and it says when the model is untrained."""

import sys

import torch
from PIL import Image

from sliming import tour
from sliming.inputs import Batch
from sliming.tiny.held_out import held_out_scene
from sliming.tiny.pictures import render


def test_the_steps_are_the_models_own(model, tmp_path, monkeypatch, capsys):
    picture, question = render(*held_out_scene(3)), "How many bars are there?"
    seen = []
    embed = model.embed
    monkeypatch.setattr(model, "embed", lambda batch, visual: seen.append((batch, visual)) or
                        embed(batch, visual))
    answer = tour.tour(model, picture, question, tmp_path / "tour.png")
    batch, by_hand = seen[0]
    whole = model.see(batch)
    for ours, its in zip(by_hand.local + by_hand.keep, whole.local + whole.keep, strict=True):
        torch.testing.assert_close(ours, its)
    torch.testing.assert_close(by_hand.whole, whole.whole)
    assert answer == model.answer(picture, question)
    said = capsys.readouterr().out
    tokens = len(model.embed(Batch.pack([model.processor.ask(picture, question)]), whole)[0])
    assert f"[{tokens}, 128]" in said and f"[{int(whole.keep[0].sum())}, 128]" in said
    with Image.open(tmp_path / "tour.png") as drawn:
        assert drawn.width > 1000 and len(drawn.convert("RGB").getcolors(1 << 24)) > 100


def test_without_a_checkpoint_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tour"])
    tour.main()
    assert "the tiny preset untrained" in capsys.readouterr().out
    assert (tmp_path / "tour.png").exists()
