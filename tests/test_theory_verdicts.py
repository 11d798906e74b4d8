"""The thirteen verdicts (theory/verdicts.py) and theory/README.md, which holds their table."""

import re
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

THEORY = Path(__file__).resolve().parents[1] / "theory"
sys.path.insert(0, str(THEORY))  # scripts, not a package

import bilinear as lab  # noqa: E402
import verdicts as court  # noqa: E402

WORDS = ["misprint", *["holds"] * 4, "misprint", *["holds"] * 3, "incomplete", *["holds"] * 2,
         "false"]
README = re.sub(r"```markdown\n.*?```", "", (THEORY / "README.md").read_text(), flags=re.S)


@pytest.mark.parametrize(("c", "eta"), [(0.3, 0.1), (0.05, 1.2), (0.9, 1.0), (0.6, 10.0)])
def test_verdicts(c, eta):
    """Any problem, any step, beyond the stable ones, too: Theorem 3 is said of every eta."""
    rows = court.verdicts(c, eta)
    assert [row.verdict for row in rows] == WORDS
    for row in rows:
        order = row.statement.startswith("Eq. 6")  # an order of convergence, not an identity
        assert row.off_corrected <= (0.03 if order else 1e-11), row
        holds = row.verdict == "holds"
        assert row.off_printed == row.off_corrected if holds else row.off_printed > 0.05, row


def test_sizes_of_what_is_wrong():
    rows = dict(zip((s.__name__ for s in court.STATEMENTS), court.verdicts(0.5, 0.1), strict=True))
    # (ab' + cI)(ba' + cI) - XX' = (aa' + c X + c^2 I) - XX'; at 60 degrees, by hand
    h = np.sqrt(3) / 2
    a, b = np.array([1, 0]), np.array([0.5, h])
    X = np.outer(a, b) + np.outer(b, a)
    wrong = np.outer(a, a) + 0.5 * X + 0.25 * np.eye(2) - X @ X
    size = (np.abs(wrong) / np.maximum(1, np.abs(X @ X))).max()
    p = lab.Problem(0.5, np.array([h, 0.5]), np.array([0.5, -h]))
    assert court.gram_matrix(p, 0.1).off_printed == pytest.approx(size)
    assert rows["theorem_4"].off_printed == pytest.approx(np.sqrt(2))  # (-1, 0) to (0, 1)
    assert rows["ao_resolves"].off_printed == pytest.approx(1)  # all of 2c is left


@pytest.mark.parametrize(("errors", "word"), [
    ((1e-12,), "holds"), ((1e-12, 1e-12), "holds"), ((0.1, 1e-12), "misprint"),
    *((errors, "not confirmed") for errors in
      ((0.1,), (0.1, 0.1), (np.nan,), (0.1, np.nan), (1e-12, 0.1)))])
def test_judge_follows_the_measurement(errors, word):
    assert court.judge("", "", "", *errors, word="misprint").verdict == word


def test_frame_and_off():
    p = lab.make_problem(0.3, 6)
    A, M = court.frame(p)
    np.testing.assert_allclose(A.T @ A, M, atol=1e-14)
    np.testing.assert_allclose(M, [[1, 0.3], [0.3, 1]])
    a, b = A.T
    np.testing.assert_allclose(np.outer(a, b) + np.outer(b, a), p.X, atol=1e-14)
    assert court.off(np.array([1.0, 4.0]), np.array([1.5, 5.0])) == pytest.approx(1 / 3)


def test_a_part_outside_the_span():
    """GD: the part of u outside span(a, b) shrinks by 1 - eta v.v; AO: gone after one iteration."""
    p = lab.Problem(0.3, *np.eye(5)[:2])
    u, v = lab.generic_start(5, 0)
    after, _ = next(islice(lab.gradient_descent(p.X, u, v, 0.1), 1, None))
    np.testing.assert_allclose(after[2:], u[2:] * (1 - 0.1 * v @ v), rtol=1e-12)
    after, _ = next(islice(lab.alternating(p.X, u, v), 1, None))
    assert not after[2:].any()


def test_program(capsys, monkeypatch):
    assert court.main([]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 15 and len({line.count("|") for line in lines}) == 1
    for arguments in (["--c", "0"], ["--c", "-.3"], ["--eta", "0"], ["--cc", "1"]):
        with pytest.raises(SystemExit) as stopped:
            court.main(arguments)
        assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr(court, "STATEMENTS", (lambda p, eta: court.judge("x", "y", "z", 1.0),))
    assert court.main([]) == 1 and "not confirmed" in capsys.readouterr().out


def test_readme_holds_the_table_and_shows_pictures_and_flags_that_exist():
    """All of the table but the sizes of rounding, which differ between machines."""
    def cells(text):
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
        return [row[:2] + row[3:5] for row in rows if len(row) == 6]

    assert cells(court.table(court.verdicts())) == cells(README)
    for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        size = (THEORY / name).stat().st_size
        assert size <= (1_000_000 if name.endswith(".gif") else 150_000), name
    commands = re.findall(r"^python theory/(\w+)\.py(.*?)(?:  #.*)?$", README, flags=re.M)
    assert {name for name, _ in commands} == {"bilinear", "verdicts", "stages"}
    for name, rest in commands:
        source = (THEORY / f"{name}.py").read_text()
        assert all(f'"{flag}"' in source for flag in re.findall(r"--\w+", rest)), (name, rest)
