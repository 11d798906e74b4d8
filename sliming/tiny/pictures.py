"""The built-in high-resolution question set: charts, tables and shapes whose small print only the
local crops show.

Three kinds of picture, drawn on the fly (about 1 ms each) and deterministic per index, so that the
paper's three stages run on a laptop without any download:

  chart   bars of different colours, a two-digit value printed inside the top of each bar
  table   a coloured header above rows; each row has a letter and a two-digit number
  shapes  coloured shapes, a two-digit number printed on each

The print is 7 pixels high. A large picture spans 2 to 4 crops a side, so that in the downscaled
global view the print is about 2 pixels high and cannot be read, while colours, shapes, counts and
heights can. From that follow two families of questions: *global* ones (How many bars are there?)
and *detail* ones (What is the value of the red bar?). Bars are drawn in the order of their values
and not to scale: heights tell which bar is the tallest but not what is printed on it. A small
picture fits one crop, and everything in it can be read there.

What makes the set easy, and should be known when reading the numbers it gives: the print has one
font and one size, pictures are whole multiples of a crop (so slicing does not rescale them), and a
printed label never lies across the seam of two crops unless `across_seams` is set.

Stages (Sec. 2.2, "Alternating Training Scheme"): I captions, II detailed descriptions asked for
with the sixteen instructions of Table 5, III questions and answers.

Legend: H, W picture height and width in pixels; S crop size in pixels.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from sliming.chat import DETAIL_PROMPTS
from sliming.slicer import Slices

CROP = 64  # S: side of one crop in pixels; the tiny vision tower's input size
KINDS = ("chart", "table", "shapes")
COLOURS = {"red": (214, 39, 40), "green": (44, 150, 60), "blue": (40, 80, 210),
           "yellow": (235, 205, 40), "purple": (140, 60, 180), "orange": (245, 135, 30),
           "cyan": (60, 195, 215), "brown": (120, 75, 45)}
SHAPES = ("circle", "square", "triangle", "diamond")
LETTERS = "ABCDEFGH"
COUNTS = ("zero", "one", "two", "three", "four", "five")
LARGE_GRIDS = ((3, 3), (3, 2), (2, 3), (4, 2), (2, 4))  # crops: (columns, rows)

# 5 x 7 pixel glyphs, seven rows of five bits each.
GLYPHS = {
    "0": "01110 10001 10011 10101 11001 10001 01110",
    "1": "00100 01100 00100 00100 00100 00100 01110",
    "2": "01110 10001 00001 00110 01000 10000 11111",
    "3": "11110 00001 00001 01110 00001 00001 11110",
    "4": "00010 00110 01010 10010 11111 00010 00010",
    "5": "11111 10000 11110 00001 00001 10001 01110",
    "6": "00110 01000 10000 11110 10001 10001 01110",
    "7": "11111 00001 00010 00100 01000 01000 01000",
    "8": "01110 10001 10001 01110 10001 10001 01110",
    "9": "01110 10001 10001 01111 00001 00010 01100",
    "A": "01110 10001 10001 11111 10001 10001 10001",
    "B": "11110 10001 10001 11110 10001 10001 11110",
    "C": "01110 10001 10000 10000 10000 10001 01110",
    "D": "11110 10001 10001 10001 10001 10001 11110",
    "E": "11111 10000 10000 11110 10000 10000 11111",
    "F": "11111 10000 10000 11110 10000 10000 10000",
    "G": "01110 10001 10000 10111 10001 10001 01110",
    "H": "10001 10001 10001 11111 10001 10001 10001",
}
GLYPHS = {glyph: np.array([[*map(int, row)] for row in rows.split()], dtype=bool)  # [7, 5]
          for glyph, rows in GLYPHS.items()}
NUMBER_SIZE = (11, 7)  # width and height of a printed two-digit number in pixels


@dataclass(frozen=True)
class Item:
    """One fact of a picture: what it is (`role`: bar, row or a shape), what names it, and the
    number printed on it."""

    role: str                         # "bar", "row" or one of SHAPES
    colour: str                       # name in COLOURS; "" for a row
    letter: str                       # a letter of LETTERS for a row, else ""
    number: int                       # 10 .. 99
    box: tuple[int, int, int, int]    # x0, y0, x1, y1 in pixels of what is drawn, end exclusive
    print_at: tuple[int, int]         # x, y of the number's upper left pixel
    letter_at: tuple[int, int] = (0, 0)

    @property
    def name(self) -> str:
        """How questions and most texts call it: "red bar", "row C", "blue circle"."""
        return f"row {self.letter}" if self.role == "row" else f"{self.colour} {self.role}"


@dataclass(frozen=True)
class Scene:
    """Everything a picture shows, before a pixel is drawn."""

    kind: str                # one of KINDS
    size: tuple[int, int]    # W, H in pixels
    items: tuple[Item, ...]
    accent: str              # the header's or the tallest bar's colour; "" for shapes
    paper: int               # grey level of the background

    @property
    def small(self) -> bool:
        """True if the picture fits one crop, so that even its global view shows the print."""
        return max(self.size) <= CROP


def sample_scene(rng: np.random.Generator, small: bool = False, across_seams: bool = False,
                 grids: tuple[tuple[int, int], ...] = LARGE_GRIDS) -> Scene:
    """Draws the facts and the geometry of one picture: of one crop if it is `small`, else of one of
    `grids`, (columns, rows), each of five crops or more. `across_seams` lets labels lie across the
    seam of two crops."""
    kind = KINDS[rng.integers(len(KINDS))]
    columns, rows = (1, 1) if small else grids[rng.integers(len(grids))]
    place = {"chart": _place_chart, "table": _place_table, "shapes": _place_shapes}[kind]
    items, accent = place(rng, columns, rows, across_seams)
    size = columns * CROP, rows * CROP
    return Scene(kind, size, tuple(items), accent, int(rng.integers(236, 256)))


def _free_of_seams(start: int, length: int, across_seams: bool) -> bool:
    """True if pixels start .. start + length - 1 lie in one crop (with margin 1), or need not."""
    return across_seams or (start - 1) // CROP == (start + length) // CROP


def _numbers(rng: np.random.Generator, count: int) -> list[int]:
    return rng.choice(np.arange(10, 100), size=count, replace=False).tolist()


def _place_chart(rng, columns, rows, across_seams):
    height, slots = rows * CROP, 2 * columns  # half a crop wide: bars do not lie across seams
    count = int(rng.integers(2, min(5, slots) + 1))
    colours = rng.choice(list(COLOURS), size=count, replace=False).tolist()
    floor = height - 5
    tops = [y for y in range(6, floor - 16) if _free_of_seams(y + 4, NUMBER_SIZE[1], across_seams)]
    step = max(4, height // 16)  # two bars' heights differ by 4 pixels of the global view or more
    chosen: list[int] = []
    while len(chosen) < count:
        top = tops[rng.integers(len(tops))]
        if all(abs(top - other) >= step for other in chosen):
            chosen.append(top)
        elif rng.random() < 0.02:  # the draw has painted itself into a corner: begin again
            chosen = []
    numbers = sorted(_numbers(rng, count))
    by_height = sorted(range(count), key=lambda bar: -chosen[bar])  # the lowest bar first
    value = dict(zip(by_height, numbers, strict=True))
    items = []
    for bar, slot in enumerate(sorted(rng.choice(slots, size=count, replace=False).tolist())):
        bar_width = int(rng.integers(21, 27))
        left = slot * (CROP // 2) + int(rng.integers(2, CROP // 2 - bar_width - 1))
        if across_seams and bar == count - 1:
            left = min(left + int(rng.integers(0, CROP // 2)), columns * CROP - bar_width - 2)
        print_x = left + (bar_width - NUMBER_SIZE[0]) // 2
        items.append(Item("bar", colours[bar], "", value[bar],
                          (left, chosen[bar], left + bar_width, floor), (print_x, chosen[bar] + 4)))
    return items, colours[by_height[-1]]


def _place_table(rng, columns, rows, across_seams):
    width, height = columns * CROP, rows * CROP
    header = int(rng.integers(13, 15)) if rows == 1 else int(rng.integers(18, 25))
    row_height = 22 if rows == 1 else int(rng.integers(24, 31))
    count = int(rng.integers(2, min(5, (height - 6 - header) // row_height) + 1))
    letters = rng.choice(list(LETTERS), size=count, replace=False).tolist()
    gap = int(rng.integers(5, 10))
    pair = 5 + gap + NUMBER_SIZE[0]  # the letter, a gap, the number
    places = [x for x in range(6, width - pair - 6) if _free_of_seams(x, pair, across_seams)]
    left = places[rng.integers(len(places))]
    items = []
    for row, (letter, number) in enumerate(zip(letters, _numbers(rng, count), strict=True)):
        top = 3 + header + row * row_height
        lines = [y for y in range(top + 3, top + row_height - 9)
                 if _free_of_seams(y, NUMBER_SIZE[1], across_seams)]
        y = lines[rng.integers(len(lines))]
        items.append(Item("row", "", letter, number, (3, top, width - 3, top + row_height),
                          (left + 5 + gap, y), (left, y)))
    return items, str(rng.choice(list(COLOURS)))


def _place_shapes(rng, columns, rows, across_seams):
    if columns * rows == 1:
        count = int(rng.integers(1, 3))
        cells = [(left, 0, CROP // count, CROP) for left in (0, CROP // 2)[:count]]
    else:
        count = int(rng.integers(2, 6))
        picked = rng.choice(columns * rows, size=count, replace=False).tolist()
        cells = [(c % columns * CROP, c // columns * CROP, CROP, CROP) for c in picked]
    names = rng.choice(len(COLOURS) * len(SHAPES), size=count, replace=False).tolist()
    items, numbers = [], _numbers(rng, count)
    for (cell_x, cell_y, cell_w, cell_h), name, number in zip(cells, names, numbers, strict=True):
        side = int(rng.integers(28, 31)) if cell_w < CROP else int(rng.integers(36, 55))
        x = cell_x + int(rng.integers(0, cell_w - side + 1))
        y = cell_y + int(rng.integers(0, cell_h - side + 1))
        if across_seams and cell_w == CROP:  # aside; neighbours may overlap a little, labels do not
            x = min(x + int(rng.integers(0, CROP // 2)), columns * CROP - side)
        shape, colour = SHAPES[name // len(COLOURS)], list(COLOURS)[name % len(COLOURS)]
        middle = 0.66 if shape == "triangle" else 0.5  # a triangle's room for print is below
        print_at = (x + (side - NUMBER_SIZE[0]) // 2, y + int(middle * side) - NUMBER_SIZE[1] // 2)
        items.append(Item(shape, colour, "", number, (x, y, x + side, y + side), print_at))
    return items, ""


# ------------------------------------------------------------------------------------------- pixels


def render(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Draws a scene as an RGB picture. `rng` varies the tints a little."""
    width, height = scene.size
    canvas = np.full((height, width, 3), scene.paper, dtype=np.uint8)  # [H, W, 3]

    def tint(colour: str) -> np.ndarray:
        varied = np.array(COLOURS[colour]) + rng.integers(-14, 15, size=3)
        return np.clip(varied, 0, 255).astype(np.uint8)

    if scene.kind == "table":
        header_end = scene.items[0].box[1]
        canvas[3:header_end, 3:width - 3] = tint(scene.accent)
    for index, item in enumerate(scene.items):
        x0, y0, x1, y1 = item.box
        if item.role == "row":
            canvas[y0:y1, x0:x1] = 252 if index % 2 else 205
            canvas[y1 - 1, x0:x1] = 110
        else:
            v, u = np.ogrid[0:y1 - y0, 0:x1 - x0]
            u, v = (u + 0.5) / (x1 - x0) * 2 - 1, (v + 0.5) / (y1 - y0) * 2 - 1
            canvas[y0:y1, x0:x1][silhouette(item.role, u, v)] = tint(item.colour)
            x, y = item.print_at
            canvas[y - 2:y + 9, x - 2:x + 13] = 255  # a white plate: the same contrast everywhere
        _print(canvas, item.print_at, str(item.number))
        _print(canvas, item.letter_at, item.letter)
    if scene.kind == "chart":
        canvas[height - 5:height - 3, 2:width - 2] = 60
    return Image.fromarray(canvas)


def silhouette(role: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Which points of its box, u to the right and v down from -1 to 1, a bar or a shape covers."""
    return {"circle": u * u + v * v <= 1, "diamond": abs(u) + abs(v) <= 1,
            "triangle": abs(u) <= (v + 1) / 2}.get(role, (abs(u) <= 1) & (abs(v) <= 1))


def _print(canvas: np.ndarray, at: tuple[int, int], text: str) -> None:
    x, y = at
    for glyph in text:
        canvas[y:y + 7, x:x + 5][GLYPHS[glyph]] = 20
        x += 6


# -------------------------------------------------------------------------------------------- words


def caption(scene: Scene, rng: np.random.Generator, readable: bool) -> str:
    """Stage I: what the global view shows; numbers and letters only if they are `readable` there,
    as in small pictures."""
    count = COUNTS[len(scene.items)]
    text = {"chart": f"a chart with {count} bars, the tallest is {scene.accent}",
            "table": f"a table with {count} rows, the header is {scene.accent}",
            "shapes": f"a picture with {count} shape{'s' * (count != 'one')}"}[scene.kind]
    if readable:
        return f"{text}: {description(scene, rng)}"
    names = ", ".join(name for name, _ in in_turn(scene, rng))
    return f"{text}." if scene.kind == "table" else f"{text}: {names}."


def description(scene: Scene, rng: np.random.Generator) -> str:
    """Stage II: every printed number with what it belongs to."""
    return ", ".join(f"{name} {number}" for name, number in in_turn(scene, rng)) + "."


def in_turn(scene: Scene, rng: np.random.Generator) -> list[tuple[str, int]]:
    """Every item's name and number, in random order. Half of the texts name shapes by their shape
    first ("circle in red"): from "red circle" alone nobody learns to find a colour by a shape."""
    items = [scene.items[i] for i in rng.permutation(len(scene.items))]
    by_shape = scene.kind == "shapes" and rng.random() < 0.5
    return [(f"{item.role} in {item.colour}" if by_shape else item.name, item.number)
            for item in items]


def global_questions(scene: Scene) -> list[tuple[str, str]]:
    """All (question, answer) pairs that the downscaled global view can answer."""
    count = COUNTS[len(scene.items)]
    if scene.kind == "chart":
        return [("How many bars are there?", count),
                ("What colour is the tallest bar?", scene.accent)]
    if scene.kind == "table":
        return [("How many rows are there?", count), ("What colour is the header?", scene.accent)]
    pairs = [("How many shapes are there?", count)]
    for item in scene.items:
        if sum(other.colour == item.colour for other in scene.items) == 1:
            pairs.append((f"What shape is {item.colour}?", item.role))
        if sum(other.role == item.role for other in scene.items) == 1:
            pairs.append((f"What colour is the {item.role}?", item.colour))
    return pairs


def detail_questions(scene: Scene) -> list[tuple[str, str]]:
    """All (question, answer) pairs that need the print."""
    return [(f"What number is {'in' if item.role == 'row' else 'on the'} {item.name}?",
             str(item.number)) for item in scene.items]


# ------------------------------------------------------------------------------------------ records

# Of the training pictures of each stage; see README, "What the tiny preset is".
SMALL_SHARE = {1: 0.6, 2: 0.3, 3: 0.15}
_STREAMS = {"train": 1, "held-out": 2, "pretraining": 3}  # disjoint random streams


def generator(split: str, *key: int) -> np.random.Generator:
    """The random stream of one sample; other splits and keys have disjoint ones (SeedSequence), but
    for zeros at a key's end, which count nothing."""
    return np.random.default_rng([_STREAMS[split], *key])


@dataclass(frozen=True)
class TrainingSet:
    """Endless training records of one stage, deterministic per (seed, index).

    With a `pool` there are so many pictures only, and new words about them every time. A record has
    the fields of LLaVA's format: `id`, `image` (here a PIL image instead of a path) and
    `conversations`.
    """

    stage: int
    seed: int = 0
    pool: int | None = None
    detail: float = 0.5         # share of detail questions in stage III
    across_seams: bool = False  # see `sample_scene`

    def __getitem__(self, index: int) -> dict:
        scene, rng = self.scene(index)
        turns = self.turns(scene, rng, index)
        return record(f"train-{self.stage}-{index}", render(scene, rng), turns)

    def scene(self, index: int) -> tuple[Scene, np.random.Generator]:
        """The picture of a record, and the stream that draws it and, without a pool, the words."""
        picture = index if self.pool is None else index % self.pool
        rng = generator("train", self.stage, self.seed, picture)
        small = rng.random() < SMALL_SHARE[self.stage]
        return sample_scene(rng, small, self.across_seams), rng

    def turns(self, scene: Scene, rng: np.random.Generator, index: int) -> list[tuple[str, str]]:
        """What a record says about its picture: (question, answer) pairs."""
        if self.pool is not None:
            rng = generator("train", self.stage, self.seed, index, 1)
        if self.stage == 1:
            return [("", caption(scene, rng, readable=scene.small))]
        if self.stage == 2:
            return [(DETAIL_PROMPTS[rng.integers(len(DETAIL_PROMPTS))], description(scene, rng))]
        # Up to six different questions about one picture, as in LLaVA's instruction data: words are
        # cheap, pixels not.
        pools = [list(rng.permutation(questions(scene)))
                 for questions in (detail_questions, global_questions)]
        turns = []
        for _ in range(int(rng.integers(1, 7))):
            pool = pools[int(rng.random() < 1 - self.detail)]
            if pool:
                turns.append(tuple(map(str, pool.pop())))
        return turns or [detail_questions(scene)[0]]


def record(name: str, image: Image.Image | Slices, turns: list[tuple[str, str]]) -> dict:
    conversations = []
    for index, (question, answer) in enumerate(turns):
        marker = "<image>\n" if index == 0 else ""
        conversations += [{"from": "human", "value": marker + question},
                          {"from": "gpt", "value": answer}]
    return {"id": name, "image": image, "conversations": conversations}
