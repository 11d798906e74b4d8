"""The theory lab (theory/): every check and its mutation, one case by hand, the programs' command lines.

The numbers by hand: d = 2, a and b at 60 degrees, so c = 1/2, lambda+- = 3/2 and 1/2,
    a = (1, 0), b = (1/2, sqrt 3 / 2), X = [[1, sqrt 3 / 2], [sqrt 3 / 2, 0]].
"""

import json
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "theory"))        # theory/ is a folder of scripts, not a package

import bilinear as lab  # noqa: E402
import bilinear_checks  # noqa: E402

HALF_ROOT_3 = np.sqrt(3) / 2


@pytest.fixture
def sixty() -> lab.Problem:
    """a, b at 60 degrees: p+ halves the angle, p- is orthogonal to it."""
    return lab.Problem(0.5, np.array([HALF_ROOT_3, 0.5]), np.array([0.5, -HALF_ROOT_3]))


# every check of the program, as it is and with its mistake

@pytest.mark.parametrize("check", bilinear_checks.CHECKS, ids=lambda check: check.measure.__name__)
def test_check_holds_and_notices_its_mutation(check: bilinear_checks.Check):
    with np.errstate(all="ignore"):
        assert check.measure(False) <= check.tolerance
        assert not check.measure(True) <= check.tolerance, f"went unnoticed: {check.mutation}"


# by hand

def test_hand_problem(sixty):
    np.testing.assert_allclose(sixty.A, [[1, 0.5], [0, HALF_ROOT_3]], atol=1e-15)
    np.testing.assert_allclose(sixty.X, [[1, HALF_ROOT_3], [HALF_ROOT_3, 0]], atol=1e-15)
    np.testing.assert_allclose(np.linalg.eigvalsh(sixty.X), [-0.5, 1.5], atol=1e-15)


def test_hand_losses(sixty):
    nought = np.zeros(2)
    assert sixty.loss(nought, nought) == pytest.approx(1.25)                  # 1 + c^2
    assert sixty.loss(*sixty.embed(1, 0)) == pytest.approx(0.125)             # optimum, (1 - c)^2 / 2
    assert sixty.loss(*sixty.embed(0, 1)) == pytest.approx(1.125)             # saddle, (1 + c)^2 / 2
    assert sixty.excess(*sixty.embed(0, 1)) == pytest.approx(1.0)             # 2c


def test_hand_gradient_step(sixty):
    # u0 = a, v0 = b (alpha = 1, beta = 0): |u|^2 = 1; at eta = .1 F = [[1, .05], [.05, 1]], z1 = (1, .05)
    a, b = sixty.A.T
    u, v = lab.after(lab.gradient_descent(sixty.X, a, b, 0.1), 1)
    np.testing.assert_allclose(u, [1.025, 0.05 * HALF_ROOT_3], atol=1e-15)              # a + .05 b
    np.testing.assert_allclose(v, [0.55, HALF_ROOT_3], atol=1e-15)                      # .05 a + b


def test_hand_alternating_step(sixty):
    # v = X a = (1, sqrt 3 / 2), |v|^2 = 7/4; X v = (7/4, sqrt 3 / 2); u1 = (1, 2 sqrt 3 / 7) = A (5/7, 4/7)
    # and M^2 z0 / (|u|^2 |v|^2) = (5/4, 1) / (7/4)
    a, b = sixty.A.T
    (u0, v0), (u1, _) = [step for step, _ in zip(lab.alternating(sixty.X, a, b), range(2))]
    np.testing.assert_allclose(v0, [1, HALF_ROOT_3], atol=1e-15)
    np.testing.assert_allclose(u1, [1, 4 * HALF_ROOT_3 / 7], atol=1e-15)
    np.testing.assert_allclose(u1, sixty.A @ [5 / 7, 4 / 7], atol=1e-15)


def test_hand_rates():
    # c = 1/2: rho = 1/3; AO's tail 1/9, its escape 9; best GD 1 / (1 + 2c) = 1/2; GD at eta = .1: 1 -+ .1
    rates = lab.rates(0.5, 0.1)
    assert rates["ao"] == pytest.approx((1 / 9, 9))
    assert rates["gd-tuned"][0] == pytest.approx(0.5)
    assert rates["gd"] == pytest.approx((0.9, 1.1))
    assert np.log(9) / np.log(2) == pytest.approx(4 * np.arctanh(0.5) / np.log(1 + 2 * 0.5))   # 3.17


def test_hand_exact_step():
    # tau0 = 0, c = 1/2: u = a - b, |u|^2 = 1, X u = -u / 2, v = -u: GD gives (1 - .1 + .05) u, AO u again
    rows = lab.exact_run(Fraction(1, 2), Fraction(1, 10), Fraction(0), 3)
    assert rows == [(0, 0)] * 4
    # z0 = (2, 0): u = 2a, v = 2b, |v|^2 = 4, X v = A (2, 1): z1 = .6 (2, 0) + .1 (2, 1) = (1.4, .1), half its
    # sum 3/4; AO: v = A (1, 2) / 4, |v|^2 = 7/16, X v = A (5/8, 1/2): z1 = (10/7, 8/7), half its sum 9/7
    rows = lab.exact_run(Fraction(1, 2), Fraction(1, 10), Fraction(1), 1)
    assert rows[1] == (Fraction(3, 4), Fraction(9, 7))


# the updates' details that no check reads

def test_a_batch_is_its_members():
    p = lab.make_problem(0.3, 5)
    u, v = lab.make_start(p, "generic", 0, 4)
    for name, method in lab.METHODS.items():
        if name == "kick":                                    # its kick is drawn for the whole batch
            continue
        together, _ = lab.after(method.run(p, u, v, 0.1), 7)
        alone = [lab.after(method.run(p, u[i], v[i], 0.1), 7)[0] for i in range(4)]
        np.testing.assert_allclose(together, alone, rtol=1e-12, atol=1e-14, err_msg=name)


def test_excess_is_loss_less_the_best_loss():
    for c in (-1.0, -0.4, 0.0, 0.3, 1.0):
        p = lab.make_problem(c, 6)
        u, v = lab.make_start(p, "generic", 0, 20)
        np.testing.assert_allclose(p.excess(u, v), p.loss(u, v) - (1 - abs(c)) ** 2 / 2, atol=1e-13)
        assert np.all(p.excess(u, v) >= -1e-13)


def test_stages_turn_to_gradient_descent_on_both():
    p = lab.make_problem(0.3, 5)
    u, v = lab.make_start(p, "generic", 0, 3)
    U, V = lab.trajectory(lab.staged(p.X, u, v, 0.1, 4, 6), 6)
    assert np.all(V[:3] == v) and not np.any(U[2] == u)       # I: 4 steps on u, two to a yield
    assert np.all(U[2:6] == U[2]) and not np.any(V[5] == v)   # II: 6 on v
    np.testing.assert_array_equal(U[6], lab.after(lab.gradient_descent(p.X, U[5], V[5], 0.1), 1)[0])


def test_tied_start_divides_the_methods():
    p = lab.make_problem(0.3)
    start = lab.make_start(p, "tied", 0, 3)
    counts = {name: lab.iterations_to(p, name, *start, 0.1, limit=3000) for name in lab.METHODS}
    equivariant = {"gd", "gd-tuned", "scaled", "heavy-ball", "adam", "balance"}
    assert {name for name, count in counts.items() if not np.isfinite(count).any()} == equivariant
    assert all(np.isfinite(count).all() for name, count in counts.items() if name not in equivariant)


@pytest.mark.parametrize("c", [-0.3, 0.05, 0.3, 0.9])
def test_verdicts(c: float):
    rows = {row.statement.split(":")[0]: row.verdict for row in lab.verdicts(lab.Setting(c=c))}
    assert len(rows) == 13 and "not confirmed" not in rows.values()
    assert rows["Theorem 3"] == rows["Lemma 1"] == lab.START
    assert rows["Theorem 4"] == rows["AO resolves GD's limitation"] == lab.FALSE
    assert rows["Theorem 1"] == rows["Theorem 2"] == rows["Theorem 5"] == rows["Eq. 4"] == lab.HOLDS


def test_verdicts_follow_the_measurement():
    assert lab.judge("", 1e-12, 1e-12, "").verdict == lab.HOLDS
    assert lab.judge("", 1e-12, 0.1, "").verdict == lab.FALSE
    assert lab.judge("", 0.1, 0.1, "").verdict == "not confirmed"
    assert lab.judge("", float("nan"), 0.0, "").verdict == "not confirmed"
    with np.errstate(all="ignore"):                         # a diverging step confirms nothing
        assert lab.theorem_3(lab.Setting(eta=5.0)).verdict == "not confirmed"


# the programs

def run(*arguments: str, folder: Path, program: str = "bilinear.py") -> subprocess.CompletedProcess:
    """Run a program of theory/ in `folder`, on one core."""
    return subprocess.run([sys.executable, str(ROOT / "theory" / program), *arguments], cwd=folder, text=True,
                          capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=600)


def test_no_arguments(tmp_path: Path):
    pytest.importorskip("matplotlib")
    done = run("--json", "results.json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| Theorem 4: the limits of Eq. 6" in done.stdout
    assert (tmp_path / "out" / "bilinear.png").stat().st_size > 50_000
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["verdicts"]) == len(lab.STATEMENTS) and len(results["race"]) == len(lab.METHODS)
    assert {row["method"]: row["iterations"] for row in results["race"]}["ao"] < 30


@pytest.mark.parametrize("c", ["-1", "0", "1", "1e-9"])
def test_edges_of_c(c: str, tmp_path: Path):
    pytest.importorskip("matplotlib")
    done = run("--c", c, "--panel", "tied", "--methods", "ao,gd-tuned", "--d", "2", "--seeds", "1",
               "--out", "x.svg", folder=tmp_path)
    assert done.returncode == 0 and done.stderr == "" and (tmp_path / "x.svg").exists(), done.stderr


@pytest.mark.parametrize("arguments", [
    "--c 1.01", "--c nan", "--c x", "--eta 0", "--eta -1", "--eta inf", "--tau0 2", "--d 1", "--d 2.5",
    "--seeds 0", "--methods gd,fast", "--init random", "--panel none", "--out figure.doc", "--json .",
    "--check --c .2", "--what"])
def test_wrong_values_get_one_line(arguments: str, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        lab.main(arguments.split())
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == "" and err.count("\n") == 1 and len(err) > 20


def test_failing_check_exits_1(monkeypatch, capsys):
    broken = bilinear_checks.Check("one that fails", 0.5, "none", lambda broken: 1.0)
    unnoticing = bilinear_checks.Check("one that notices nothing", 0.5, "nothing", lambda broken: 0.0)
    monkeypatch.setattr(bilinear_checks, "CHECKS", [unnoticing])
    assert lab.main(["--check"]) == 0 and lab.main(["--mutants"]) == 1
    monkeypatch.setattr(bilinear_checks, "CHECKS", [unnoticing, broken])
    assert lab.main(["--check"]) == 1
    assert "FAIL one that fails" in capsys.readouterr().out


def test_exact_and_markdown(capsys):
    assert lab.main(["--exact", "--c", "0.5"]) == 0
    assert "| 5 | 0            | 0            |" in capsys.readouterr().out
    assert lab.main(["--markdown"]) == 0
    table = capsys.readouterr().out.strip().splitlines()
    assert len(table) == 2 + len(lab.STATEMENTS) and len({line.count("|") for line in table}) == 1


# the stages

torch = pytest.importorskip("torch")
import stages  # noqa: E402


@pytest.mark.parametrize("name", ["gd", "balance", "heavy-ball", "adam"])
def test_updates_against_torch(name: str):
    """The updates written out in bilinear.py are torch's optimisers on the loss and autograd's gradients."""
    p = lab.make_problem(0.3, 5)
    u, v = lab.make_start(p, "unbalanced", 0, 1)
    w = [torch.tensor(x[0], requires_grad=True) for x in (u, v)]
    best, X = lab.tuned(0.3), torch.tensor(p.X)
    if name == "adam":
        optimiser = torch.optim.Adam(w, lr=0.01)
    elif name == "heavy-ball":
        optimiser = torch.optim.SGD(w, lr=best["ball_eta"], momentum=best["ball_beta"])
    else:
        optimiser = torch.optim.SGD(w, lr=0.1)
    for _ in range(6):
        optimiser.zero_grad()
        loss = 0.5 * (torch.outer(*w) - X).square().sum()
        if name == "balance":
            loss = loss + (w[0] @ w[0] - w[1] @ w[1]) ** 2 / 4
        loss.backward()
        optimiser.step()
    ours = lab.after(lab.METHODS[name].run(p, u, v, 0.1), 6)
    for mine, theirs in zip(ours, w, strict=True):
        np.testing.assert_allclose(mine[0], theirs.detach().numpy(), rtol=1e-10)


def test_runs_in_a_batch_are_independent():
    """A run's update does not depend on the other runs: two seeds together are the two alone."""
    world, w = stages.make_world(2, 1), stages.make_parameters(2, 1)
    batch = stages.make_batch(world, 6, 1, torch.Generator().manual_seed(0))
    together = torch.autograd.grad(stages.loss_per_run(world, w, batch, "both").sum(), list(w.values()))
    for i in range(2):
        one = slice(i, i + 1)
        alone_world = stages.World(*(tensor[one] for tensor in vars(world).values()))
        alone_w = {name: p[one].detach().requires_grad_() for name, p in w.items()}
        alone_batch = {name: x if name == "detail" else x[one] for name, x in batch.items()}
        loss = stages.loss_per_run(alone_world, alone_w, alone_batch, "both").sum()
        alone = torch.autograd.grad(loss, list(alone_w.values()))
        for ours, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(ours[one], theirs, rtol=1e-4, atol=1e-6)


def test_answer_against_loops():
    """The batched network against one written token by token."""
    world, w = stages.make_world(1, 1), stages.make_parameters(1, 1)
    batch = stages.make_batch(world, 2, 1, torch.Generator().manual_seed(0))
    adapter, queries, key, value = (w[name][0] for name in ("adapter", "queries", "key", "value"))
    for image in range(2):
        tokens = [view @ adapter for view in batch["global"][0, image]]
        for crop in batch["local"][0, image]:
            for query in queries:
                score = torch.stack([query @ key @ patch for patch in crop]) / stages.F ** 0.5
                mixed = sum(a * patch for a, patch in zip(score.softmax(0), crop, strict=True))
                tokens.append(mixed @ value @ adapter)
        question = batch["question"][0, image]
        look = torch.stack([4 * (t @ world.head_key[0]) @ question for t in tokens]).softmax(0)
        expected = sum(a * (t @ world.head_value[0]) for a, t in zip(look, tokens, strict=True))
        ours = stages.answer(world, w, batch, "both")[0, image]
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_schedules_spend_the_same_updates():
    adapter, compressor = ("adapter",), stages.COMPRESSOR
    assert [stages.schedule("three stages", t, 6) for t in (0, 2, 4)] == [
        ("global", adapter), ("local", compressor), ("both", adapter + compressor)]
    assert stages.schedule("interleaved", 4, 99) == ("local", compressor)
    assert [stages.schedule("sequential", t, 99)[1] for t in (0, 1, 2)] == [adapter, compressor, adapter]
    turns = [stages.schedule("alternating", t, 99)[1] for t in range(2 * stages.BLOCK)]
    assert turns == [adapter] * stages.BLOCK + [compressor] * stages.BLOCK
    assert stages.schedule("end to end", 5, 99) == ("both", adapter + compressor)


def test_balance_equalises_and_precondition_descends():
    world, w = stages.make_world(3, 1), stages.make_parameters(3, 1)
    batch = stages.make_batch(world, 16, 1, torch.Generator().manual_seed(0))
    before = stages.loss_per_run(world, w, batch, "both")
    grads = dict(zip(w, torch.autograd.grad(before.sum(), list(w.values())), strict=True))
    even = stages.balance(grads, w)
    share = [stages.size([even[n] for n in names]) / stages.size([w[n] for n in names])
             for names in (("adapter",), stages.COMPRESSOR)]
    torch.testing.assert_close(share[0], share[1])
    moved = {name: w[name] - 1e-3 * g for name, g in stages.precondition(grads, w, batch).items()}
    assert torch.all(stages.loss_per_run(world, moved, batch, "both") < before)


@pytest.mark.parametrize("optimiser", list(stages.RATES))
def test_training_learns(optimiser: str):
    result = stages.train("end to end", optimiser, seeds=2, steps=60, batch=16)
    assert result["curve"][-1] < 0.9 * result["curve"][0]
    assert len(result["scores"]["local"]["detail"]) == 2


def test_stages_wrong_values(capsys):
    for arguments in (["--seeds", "1"], ["--steps", "x"], ["--out", "a.doc"]):
        with pytest.raises(SystemExit) as stopped:
            stages.main(arguments)
        assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1
