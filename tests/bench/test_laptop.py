"""The laptop's rows are measured and printed."""

import subprocess

import torch

from sliming.bench import laptop

CPU = torch.device("cpu")


def test_rows_of_the_laptop(capsys, monkeypatch, tmp_path):
    laptop.resizing(CPU, tmp_path, sizes=((1500, 900),), repeats=1)
    laptop.features(CPU, tmp_path, steps=1)
    laptop.answers(CPU, tmp_path, questions=4)
    ran = []
    monkeypatch.setattr(subprocess, "run", lambda words, **_: ran.append(words[1:3]))
    laptop.starting(CPU, tmp_path, repeats=1)
    assert ran == [["train.py", "--help"], ["sample.py", "--help"], ["sample.py", "--checkpoint"]]
    rows = capsys.readouterr().out.splitlines()
    for begin, numbers in (("1500 x 900, decoded", 9), ("1500 x 900, JPEG", 9), ("stage 2", 3),
                           ("one question a picture", 3), ("all questions of a picture", 3),
                           ("sample.py, one question", 1)):
        row = next(row for row in rows if row.startswith(begin))
        assert len([float(cell) for cell in row.removeprefix(begin).split()]) == numbers
