"""The built-in question set: honest pictures, one answer each, disjoint and repeatable streams."""

from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from sliming.slicer import slice_image
from sliming.tiny import pictures
from sliming.tiny.held_out import held_out, held_out_scene
from sliming.tiny.pictures import CROP, DETAIL_PROMPTS, TrainingSet, render


def scenes(count, **options):
    for index in range(count):
        rng = pictures.generator("train", 0, 0, index)
        yield pictures.sample_scene(rng, **options), rng


def read_number(image, at):
    """Matches the pixels at `at` with the glyphs: the twin of printing."""
    (left, y), text = at, ""
    for x in (left, left + 6):
        dark = np.asarray(image)[y:y + 7, x:x + 5].max(axis=-1) < 60
        text += next((glyph for glyph, mask in pictures.GLYPHS.items()
                      if np.array_equal(mask, dark)), "?")
    return text


def test_every_printed_number_is_the_fact_s():
    for scene, rng in scenes(300):
        image = render(scene, rng)
        for item in scene.items:
            assert read_number(image, item.print_at) == str(item.number), (scene.kind, item)


def test_labels_stay_inside_one_crop_unless_asked():
    across = 0
    for seams in (False, True):
        for scene, _ in scenes(400, across_seams=seams):
            for item in scene.items:
                (x, y), (w, h) = item.print_at, (11, 7)
                crossing = x // CROP != (x + w - 1) // CROP or y // CROP != (y + h - 1) // CROP
                assert seams or not crossing
                across += crossing
    assert across > 100  # and with the option they do lie across


def test_pictures_are_whole_crops_and_slicing_does_not_rescale():
    for scene, rng in scenes(60):
        image = render(scene, rng)
        columns, rows = slice_image(image, crop_size=CROP).grid
        assert image.size == scene.size == (columns * CROP, rows * CROP) and max(columns, rows) >= 3


def test_global_view_loses_the_print_but_not_the_colours():
    """Of pictures that differ in numbers only, global views are almost the same, crops are not."""
    for scene, _ in scenes(40):
        items = (replace(item, number=10 + (item.number + 33) % 90) for item in scene.items)
        a, b = (slice_image(render(shown, np.random.default_rng(0)), crop_size=CROP)
                for shown in (scene, replace(scene, items=tuple(items))))
        coarse = (a.global_view.float() - b.global_view.float()).abs().mean()
        fine = (a.crops.float() - b.crops.float()).abs().amax(dim=(0, 1)).max()
        assert coarse < 1.5 and fine > 150  # grey levels of 255


def test_global_answers_follow_from_what_is_drawn():
    for scene, _ in scenes(300):
        answers = dict(pictures.global_questions(scene))
        assert pictures.COUNTS[len(scene.items)] in answers.values()
        if scene.kind == "chart":
            tallest = min(scene.items, key=lambda item: item.box[1])
            assert answers["What colour is the tallest bar?"] == tallest.colour
            assert tallest.number == max(item.number for item in scene.items)
        for question, answer in answers.items():
            if question.startswith("What shape is"):
                colour = question.rstrip("?").split()[-1]
                assert [item.role for item in scene.items if item.colour == colour] == [answer]


def test_detail_questions_have_one_answer_each():
    for scene, _ in scenes(300):
        questions = [question for question, _ in pictures.detail_questions(scene)]
        assert len(set(questions)) == len(questions) == len(scene.items)


def test_samples_are_repeatable_and_streams_are_disjoint():
    def key(record):
        return np.asarray(record["image"]).tobytes(), str(record["conversations"])

    assert key(TrainingSet(3, seed=1)[5]) == key(TrainingSet(3, seed=1)[5])
    seen = {key(TrainingSet(3, seed)[i])[0] for seed in (0, 1) for i in range(300)}
    seen |= {key(TrainingSet(2)[i])[0] for i in range(300)}
    assert len(seen) == 900
    assert not seen & {key(held_out("detail", i))[0] for i in range(300)}
    # Both families ask about the same pictures.
    glances, looks = ([held_out(family, i) for i in range(9)] for family in ("global", "detail"))
    assert all(key(a)[0] == key(b)[0] != key(looks[0])[0]
               for a, b in list(zip(glances, looks, strict=True))[1:])
    assert not {key(a)[1] for a in glances} & {key(b)[1] for b in looks}


def test_what_is_asked_does_not_hang_on_what_is_shown():
    """Any question about a picture has an equal chance."""
    first, expected = Counter(), Counter()
    for index in range(300):
        scene, _ = held_out_scene(index)
        asked = held_out("global", index)["conversations"][0]["value"]
        every = [question for question, _ in pictures.global_questions(scene)]
        first[scene.kind] += asked.endswith(every[0])
        expected[scene.kind] += 1 / len(every)
    for kind, mean in expected.items():
        assert abs(first[kind] - mean) < 4 * mean**0.5, kind


def test_stages_ask_as_the_paper_says():
    """Captions, with numbers for small pictures only; the instructions of Table 5; questions."""
    for index in range(200):
        records = [TrainingSet(stage)[index] for stage in (1, 2, 3)]
        asked = [record["conversations"][0]["value"].removeprefix("<image>\n")
                 for record in records]
        assert asked[0] == "" and asked[1] in DETAIL_PROMPTS and asked[2].endswith("?")
        caption = records[0]["conversations"][1]["value"]
        small = max(records[0]["image"].size) <= CROP
        assert any(character.isdigit() for character in caption) == small


def test_shapes_are_named_by_colour_or_by_shape_first():
    """Each in half of captions and descriptions; other items by their name alone."""
    turned = Counter()
    for index in range(600):
        scene, _ = held_out_scene(index)
        texts = [words(scene, pictures.generator("train", 0, index)) for words in (
            pictures.description, partial(pictures.caption, readable=False))]
        for kind, text in zip(("description", "caption"), texts, strict=True):
            named = [item.name in text for item in scene.items]
            in_turn = [f"{item.role} in {item.colour}" in text for item in scene.items]
            if scene.kind == "shapes":
                assert all(named) != all(in_turn) and not (any(named) and any(in_turn))
                turned[kind, all(in_turn)] += 1
            elif (scene.kind, kind) != ("table", "caption"):
                assert all(named) and not any(in_turn)
        for item in scene.items:
            assert f" {item.number}" in texts[0]
    for kind in ("description", "caption"):
        assert abs(turned[kind, True] - turned[kind, False]) < 4 * 200**0.5


@pytest.mark.reference
def test_detail_prompts_are_table_5_word_for_word():
    from reference import reference_folder
    paper = "".join(reference_folder("paper/beyond-llava-hd.txt").read_text().split())
    assert len(DETAIL_PROMPTS) == len(set(DETAIL_PROMPTS)) == 16
    for number, prompt in enumerate(DETAIL_PROMPTS, 1):  # the extracted text has lost its spaces
        assert f"{number}{''.join(prompt.split())}" in paper
