"""The bilinear chapter (theory/bilinear.py, pictures.py): by hand, against loops, on the figure."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "theory"))  # scripts, not a package

import bilinear as lab  # noqa: E402
import pictures  # noqa: E402

OTHER = lab.Setting(c=0.2, eta=0.3, tau0=-1e-4, nu0=1.05, d=4, seed=3)
BLUE, RED, DARK = "#0072b2", "#d55e00", "#222222"
COLOURS = {"gd": BLUE, "sequential": "#56b4e9", "ao": RED, "over-relaxed": "#e69f00",
           "heavy-ball": "#009e73", "adam": "#cc79a7"}


def by_hand(name, X, u, v, eta, c, steps):
    """Every method as two lines with the full gradients (u v' - X) v and (v u' - X) u; the path."""
    path, mu, mv, su, sv = [(u, v)], 0, 0, 0, 0
    omega = 2 / (1 + np.sqrt(1 - ((1 - c) / (1 + c)) ** 2))
    root = np.sqrt(2 * c), np.sqrt(2 + 2 * c)
    for t in range(1, steps + 1):
        gu, gv = (np.outer(u, v) - X) @ v, (np.outer(v, u) - X) @ u
        if name == "gd":
            u, v = u - eta * gu, v - eta * gv
        elif name == "sequential":
            v = v - eta * gv
            u = u - eta * (np.outer(u, v) - X) @ v
        elif name == "ao":
            v = X @ u / (u @ u)
            u = X @ v / (v @ v)
        elif name == "over-relaxed":
            v = v + omega * (X @ u / (u @ u) - v)
            u = u + omega * (X @ v / (v @ v) - u)
        elif name == "heavy-ball":
            step, beta = 4 / sum(root) ** 2, ((root[1] - root[0]) / sum(root)) ** 2
            mu, mv = beta * mu - step * gu, beta * mv - step * gv
            u, v = u + mu, v + mv
        elif name == "adam":
            mu, mv = 0.9 * mu + 0.1 * gu, 0.9 * mv + 0.1 * gv
            su, sv = 0.999 * su + 0.001 * gu**2, 0.999 * sv + 0.001 * gv**2
            a, b = 1 - 0.9**t, 1 - 0.999**t
            u = u - 0.03 * (mu / a) / (np.sqrt(su / b) + 1e-8)
            v = v - 0.03 * (mv / a) / (np.sqrt(sv / b) + 1e-8)
        path.append((u, v))
    return path


def losses(X, path):
    return np.array([0.5 * ((np.outer(u, v) - X) ** 2).sum() for u, v in path])


# ---- by hand: d = 2, a and b at 60 degrees, so c = 1/2, sigma1 = 3/2, sigma2 = 1/2 ---------------


def test_hand_problem():
    h = np.sqrt(3) / 2
    a, b = np.array([1, 0]), np.array([0.5, h])
    p = lab.Problem(0.5, np.array([h, 0.5]), np.array([0.5, -h]))
    np.testing.assert_allclose(p.X, np.outer(a, b) + np.outer(b, a), atol=1e-15)
    assert p.sigma == (1.5, 0.5)
    assert p.loss(np.zeros(2), np.zeros(2)) == pytest.approx(1.25)  # 1 + c^2
    assert p.loss(*p.start(1.0, 0.0)) == pytest.approx(0.125)  # sigma2^2 / 2
    assert p.loss(*p.start(0.0, 1.0)) == pytest.approx(1.125)  # sigma1^2 / 2
    # alpha = 1, beta = 0, so u = a, v = b, is tau = nu = 1 / sqrt 2
    np.testing.assert_allclose(p.start(np.sqrt(0.5), np.sqrt(0.5)), (a, b), atol=1e-15)


def test_hand_constants():
    # c = 1/2: rho = 1/3; the curvatures lie between 1 and 3
    omega = 2 / (1 + np.sqrt(8) / 3)
    assert lab.tuned(0.5) == pytest.approx(
        {"step": 0.5, "omega": omega, "beta": 7 - 4 * np.sqrt(3), "eta": 4 / (1 + np.sqrt(3)) ** 2})
    rates = lab.rates(0.5, 0.5)
    assert rates["gd"] == pytest.approx((1 / 2, 3 / 2))  # 1 - 2c eta, 1 + 2c eta
    assert rates["ao"] == pytest.approx((1 / 9, 9))  # rho^2 and its inverse
    assert rates["over-relaxed"][0] == pytest.approx(omega - 1, rel=1e-6)
    assert rates["heavy-ball"][0] == pytest.approx(2 - np.sqrt(3))


def test_excess_is_loss_less_the_least():
    p = lab.make_problem(0.3, 6, 2)
    assert p.p_plus @ p.p_minus == pytest.approx(0) and p.p_plus @ p.p_plus == pytest.approx(1)
    u, v = np.random.default_rng(0).standard_normal((2, 20, 6))
    least = 0.5 * (np.linalg.svd(p.X)[1][1:] ** 2).sum()
    np.testing.assert_allclose(p.excess(u, v), p.loss(u, v) - least, atol=1e-13)
    np.testing.assert_allclose(p.loss(u, v), losses(p.X, zip(u, v, strict=True)))


def test_a_run_has_a_bound(monkeypatch):
    """First of all tests that run long: one that would arrive later ends at LIMIT."""
    monkeypatch.setattr(lab, "LIMIT", 5)
    p = lab.make_problem(0.5, 2)
    run = lab.race(p, "gd", p.start(0.1, 1.0), 0.1)
    assert len(run["excess"]) == 6 and run["arrived"] is None and run["derived"] is None


def test_generic_start_is_about_unit_and_independent():
    u, v = lab.generic_start(10_000, 1)
    assert u @ u == pytest.approx(1, abs=0.05) and v @ v == pytest.approx(1, abs=0.05)
    assert abs(u @ v) < 0.05


# ---- theory against plain loops ------------------------------------------------------------------


def test_field_is_a_short_step_of_gd_and_flow_follows_it():
    p, eta, here = lab.make_problem(0.3, 5), 1e-6, np.array((0.7, -0.4))
    after = p.place(*by_hand("gd", p.X, *p.start(*here), eta, 0.3, 1)[1])
    np.testing.assert_allclose((after - here) / eta, lab.field(0.3, *here), atol=1e-5)
    np.testing.assert_allclose(lab.flow(0.3, *here, 0.0), here)
    for t in (0.5, 2.0, 5.0):
        before, there, after = (np.array(lab.flow(0.3, *here, t + dt)) for dt in (-1e-5, 0, 1e-5))
        np.testing.assert_allclose((after - before) / 2e-5, lab.field(0.3, *there), atol=1e-8)


def factors(name, p, u, v, eta):
    """Eigenvalues of a hand-written iteration at (u, v), by differences: [2d]."""
    w, d, J = np.concatenate([u, v]), len(u), []
    for e in 1e-6 * np.eye(2 * d):
        ahead, behind = (np.concatenate(by_hand(name, p.X, x[:d], x[d:], eta, p.c, 1)[1])
                         for x in (w + e, w - e))
        J.append((ahead - behind) / 2e-6)
    return np.linalg.eigvals(np.array(J).T)


@pytest.mark.parametrize("eta", [0.1, 0.45, 0.7, 3.0])
@pytest.mark.parametrize("name", ["gd", "sequential", "ao", "over-relaxed"])
def test_rates_are_eigenvalues_of_an_iteration(name, eta):
    """Of hand-written ones, at an unbalanced optimum, stable or not, and at the saddle."""
    k, p = 1.4, lab.make_problem(0.3, 4)
    u, v = p.start(1.0, 0.0)
    known = abs(factors(name, p, np.sqrt(k) * u, v / np.sqrt(k), eta))
    # one of them is 1: the rescaling of u and v, along which nothing changes
    neutral = np.abs(known - 1).argmin()
    assert known[neutral] == pytest.approx(1, abs=1e-5)
    tail, escape = lab.rates(0.3, eta, k)[name]
    # over-relaxed AO's is a double root, which differences split by the root of their error
    close = 1e-2 if name == "over-relaxed" else 1e-5
    assert tail == pytest.approx(np.delete(known, neutral).max(), abs=close)
    known = abs(factors(name, p, *p.start(0.0, 1.0), eta))
    assert escape == pytest.approx(known.max(), rel=1e-4)


def test_rates_of_heavy_ball():
    """A factor f of GD becomes the roots of g^2 - (f + beta) g + beta."""
    p, best = lab.make_problem(0.3, 4), lab.tuned(0.3)
    for rate, start in zip(lab.rates(0.3, 0.1)["heavy-ball"], ((1.0, 0), (0, 1.0)), strict=True):
        known = [np.abs(np.roots([1, -(f + best["beta"]), best["beta"]])).max()
                 for f in factors("gd", p, *p.start(*start), best["eta"]).real if abs(f - 1) > 1e-4]
        assert rate == pytest.approx(max(known), abs=1e-3)


def test_derived_curve():
    curve = 8 * 0.5 ** np.arange(30.0)
    near = lab.derived_curve(curve, 0.9, 10.0, 0.6)
    assert near[0] == near[10] == 0.6 and near[12] == pytest.approx(0.6 * 0.9**4)
    far = lab.derived_curve(curve, 0.8, None, 0.6)  # 2^-14 < 1e-4 < 2^-13
    assert np.isnan(far[:14]).all() and far[14] == curve[14]
    assert far[16] == pytest.approx(curve[14] * 0.8**4)
    assert lab.derived_curve(curve, 1.1, 10.0, 0.6) is None
    assert lab.derived_curve(curve[:5], 0.8, None, 0.6) is None


def test_near_the_saddle_theory_foretells_the_run():
    """Nothing is fitted there, so both the level and the time of the fall are tests of theory."""
    for eta in (0.1, 0.4):
        races = lab.experiment(lab.Setting(eta=eta))["races"]["eq2"]
        for name in ("gd", "sequential", "ao"):
            run = races[name]
            half, foretold = (np.flatnonzero(run[of] < 0.3)[0] for of in ("excess", "derived"))
            # of 2c = .6; the run bends where theory has a corner: while tau / nu grows by e
            assert abs(half - foretold) <= 0.6 / np.log(run["escape"]) + 1, (name, eta)
            fall = run["excess"][run["excess"] < 1e-5]
            measured = (fall[-1] / fall[0]) ** (0.5 / (len(fall) - 1))
            assert measured == pytest.approx(run["tail"], abs=0.01)


# ---- every number that is drawn ------------------------------------------------------------------


@pytest.fixture(scope="module")
def results():
    return lab.experiment(OTHER)


def test_races(results):
    p = lab.make_problem(OTHER.c, OTHER.d, OTHER.seed)
    assert results["setting"]["eta"] == 0.3 and list(results["races"]["eq2"]) == list(COLOURS)
    for kind, start in (("generic", lab.generic_start(4, 3)), ("eq2", p.start(-1e-4, 1.05))):
        for name, run in results["races"][kind].items():
            path = by_hand(name, p.X, *start, 0.3, 0.2, len(run["excess"]) - 1)
            known = losses(p.X, path) - 0.32  # .8^2 / 2
            np.testing.assert_allclose(run["excess"], known, rtol=1e-6, atol=1e-10, err_msg=name)
            assert run["arrived"] == np.flatnonzero(run["excess"] <= 1e-8)[0]
            assert run["excess"][-1] <= 1e-12 < run["excess"][-2]
            if name == "adam":
                assert run["derived"] is None
                continue
            k = np.linalg.norm(path[-1][0]) / np.linalg.norm(path[-1][1])
            tail, escape = lab.rates(0.2, 0.3, k)[name]
            assert (run["tail"], run["escape"]) == pytest.approx((tail, escape))
            leaves = np.log(1e4) / np.log(escape) if kind == "eq2" else None
            derived = lab.derived_curve(run["excess"], tail, leaves, 0.4)
            np.testing.assert_allclose(run["derived"], derived)


def test_walks(results):
    p = lab.make_problem(OTHER.c, OTHER.d, OTHER.seed)
    assert list(results["walks"]) == ["gd", "ao"]
    for name, paths in results["walks"].items():
        firsts = np.array([path[0] for path in paths])
        np.testing.assert_allclose(firsts[0], (-1e-4, 1.05), atol=1e-12)
        # the others: one in each other quadrant
        assert [(tau > 0, nu > 0) for tau, nu in firsts[1:]] == [(0, 1), (0, 0), (1, 0)]
        for path in paths:
            known = by_hand(name, p.X, *p.start(*path[0]), 0.3, 0.2, 12)
            for (u, v), place in zip(known, path, strict=False):
                u = u * np.sqrt(np.linalg.norm(v) / np.linalg.norm(u))
                tau, nu = u @ p.p_plus / np.sqrt(1.2), u @ p.p_minus / np.sqrt(0.8)
                np.testing.assert_allclose((tau, nu), place, atol=1e-9)
            assert abs(path[-1][0]) == pytest.approx(1) and abs(path[-1][1]) < 1e-6


def test_ends_against_loops_and_the_cubic_map():
    shares = np.array([0.5, 1.1, 1.5, 2.2])
    e = lab.ends(0.3, 0.2, 0.5, shares)
    assert e["kind"].tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(e["loss"][0], 0.245, atol=1e-12)  # .7^2 / 2
    assert e["ao"] == pytest.approx(0.245)
    p = lab.make_problem(0.3, 2)
    for share, loss in zip(shares[:2], e["loss"], strict=False):
        path = by_hand("gd", p.X, *p.start(0.2, 0.5), share / 1.3, 0.3, 2031)
        np.testing.assert_allclose(loss, losses(p.X, path[-32:]), atol=1e-9)
    # on the cycle the lengths x, y in units of 1 / sqrt eta have x y = 1 and x^2 + y^2 = 2.1
    squares = np.array([2.1 - np.sqrt(0.41), 2.1 + np.sqrt(0.41)]) / 2 / (1.1 / 1.3)
    known = ((squares - 1.3) ** 2 + 0.49) / 2
    np.testing.assert_allclose(sorted(e["loss"][1][:2]), sorted(known), atol=1e-9)


def test_ends_change_where_theory_says():
    """At rest below 1, a two-cycle up to sqrt 5 - 1, no rest above; all gone beyond 2."""
    e = lab.experiment(lab.Setting(tau0=0.1))["ends"]
    x = e["eta_sigma1"]
    assert (e["kind"][x < 0.99] == 0).all() and (e["kind"][(x > 1.01) & (x < 1.22)] == 1).all()
    assert (e["kind"][x > 1.01] > 0).all() and (e["kind"][x > 2.01] == 3).all()


# ---- what the README says of GD and AO -----------------------------------------------------------


def test_gd_arrives_from_eq2_under_two_conditions():
    """eta sigma1 < 1 and eta u.u < 1 + eta are enough, and neither can be left out."""
    rng = np.random.default_rng(0)
    c, share = rng.uniform(0.05, 0.95, 2000), rng.uniform(0.1, 0.99, 2000)
    eta = share / (1 + c)
    n, angle = rng.uniform(0, 0.999, 2000) * (1 + eta) / eta, rng.uniform(0.01, 6.28, 2000)
    tau, nu = np.sqrt(n / (1 + c)) * np.cos(angle), np.sqrt(n / (1 - c)) * np.sin(angle)
    for _ in range(3000):
        n = (1 + c) * tau**2 + (1 - c) * nu**2
        tau, nu = (1 + eta * (1 + c - n)) * tau, (1 + eta * (1 - c - n)) * nu
    assert (np.abs(np.abs(tau) - 1) <= 1e-3).all() and (np.abs(nu) <= 1e-3).all()
    large = lab.experiment(lab.Setting(eta=0.1, tau0=4.0, nu0=2.0))["races"]["eq2"]
    assert large["gd"]["arrived"] is None and not large["gd"]["excess"][-1] < 1e12
    assert large["ao"]["arrived"] == 7
    assert lab.ends(0.3, 0.1, 1.0, np.array([0.8 * 1.3]))["kind"] == 1  # eta = .8: a cycle


@pytest.mark.parametrize(("c", "gd", "ao"), [(0.3, 63, 19), (0.5, 47, 11), (0.02, 560, 268)])
def test_counts_from_the_default_start(c, gd, ao):
    races = lab.experiment(lab.Setting(c=c, methods=("gd", "ao")))["races"]["eq2"]
    assert (races["gd"]["arrived"], races["ao"]["arrived"]) == (gd, ao)


def test_bad_starts_of_gd_and_ao_are_not_the_same():
    """u0 orthogonal to p+: GD arrives, AO does not. v0 = -u0: the other way round."""
    p = lab.Problem(0.3, *np.eye(5)[:2])  # aligned: a zero stays a zero
    for seed in range(8):
        u, v = lab.generic_start(5, seed)
        across = np.array([0, 1, 1, 1, 1]) * u
        assert lab.race(p, "gd", (across, v), 0.3)["arrived"] is not None
        assert lab.race(p, "ao", (across, v), 0.3)["excess"][-1] == pytest.approx(0.6)
        assert lab.race(p, "gd", (u, -u), 0.3)["excess"][-1] == pytest.approx(0.6)
        assert lab.race(p, "ao", (u, -u), 0.3)["arrived"] is not None


# ---- the figure ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(results):
    """The three axes, and what was given to streamplot."""
    from matplotlib.axes import Axes
    given, original = {}, Axes.streamplot

    def spy(ax, x, y, u, v, **options):
        given.update(ax=ax, x=x, y=y, u=u, v=v)
        return original(ax, x, y, u, v, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Axes, "streamplot", spy)
        return pictures.draw(results).axes, given


def lines(ax, colour, style=None):
    return [line for line in ax.lines if line.get_color() == colour and len(line.get_xdata())
            and style in (None, line.get_linestyle())]


def test_panels_stand_in_their_order(drawn):
    (top, left, right), _ = drawn
    for ax, first, x, y in ((top, "1", "iteration", "excess loss"), (left, "2", "τ", "ν"),
                            (right, "3", "η σ₁", "loss")):
        assert ax.get_title(loc="left").startswith(first)
        assert ax.get_xlabel().startswith(x) and ax.get_ylabel().startswith(y)
    assert top.get_yscale() == "log" and top.get_xscale() == right.get_yscale() == "linear"


def test_panel_1(drawn, results):
    ax, races = drawn[0][0], results["races"]
    for name, colour in COLOURS.items():
        for kind, style in (("generic", "-"), ("eq2", "--")):
            (line,) = lines(ax, colour, style)
            excess = races[kind][name]["excess"]
            np.testing.assert_array_equal(line.get_xdata(), np.arange(len(excess)))
            shown = excess > 1e-12
            np.testing.assert_array_equal(line.get_ydata()[shown], excess[shown])
    thin = [line.get_ydata() for line in lines(ax, DARK, "-") if len(line.get_xdata()) > 2]
    runs = [run for kind in ("generic", "eq2") for run in races[kind].values()]
    known = [run["derived"] for run in runs if run["derived"] is not None]
    assert len(known) == 10
    for line, derived in zip(thin, known, strict=True):
        np.testing.assert_array_equal(line, derived)
    (level,) = lines(ax, DARK, ":")
    assert set(level.get_ydata()) == {0.4}  # 2c
    handles, labels = ax.get_legend().legend_handles, ax.get_legend().get_texts()
    entries = {label.get_text(): handle for label, handle in zip(labels, handles, strict=True)}
    words = ("GD, step η", "sequential GD, step η", "AO", "over-relaxed AO*", "heavy ball*",
             "Adam at 0.03")
    for (name, colour), word in zip(COLOURS.items(), words, strict=True):
        text = f"{word}: {races['generic'][name]['arrived']} / {races['eq2'][name]['arrived']}"
        assert entries[text].get_color() == colour
    assert entries["generic start"].get_linestyle() == "-"
    assert entries["Eq. 2, (τ, ν) = (-0.0001, 1.05)"].get_linestyle() == "--"
    longest = max(len(run["excess"]) for run in runs if run["tail"] is not None)  # all but Adam
    assert ax.get_xlim() == (0, longest) and ax.get_ylim()[0] == 1e-12


def test_panel_2(drawn, results):
    ax, given = drawn[0][1], drawn[1]
    tau, nu = np.meshgrid(given["x"], given["y"])
    n = 1.2 * tau**2 + 0.8 * nu**2
    assert given["ax"] is ax
    np.testing.assert_allclose(given["u"], (1.2 - n) * tau)
    np.testing.assert_allclose(given["v"], (0.8 - n) * nu)
    for name, colour, label in (("gd", BLUE, "GD, step η"), ("ao", RED, "AO")):
        assert lines(ax, colour)[0].get_label() == label
        for line, path in zip(lines(ax, colour), results["walks"][name], strict=True):
            np.testing.assert_array_equal(line.get_xydata(), path)
    points = {line.get_label(): sorted(map(tuple, line.get_xydata())) for line in ax.lines}
    assert points["optimum"] == [(-1, 0), (1, 0)] and points["saddle"] == [(0, -1), (0, 1)]
    assert set(points["source"]) == {(0, 0)}


def test_panel_3(drawn, results):
    ax, e = drawn[0][2], results["ends"]
    (cloud,), (level,) = lines(ax, BLUE), lines(ax, RED)
    bounded = e["kind"] < 3
    np.testing.assert_array_equal(cloud.get_ydata(), e["loss"][bounded].ravel())
    np.testing.assert_array_equal(cloud.get_xdata()[::32], e["eta_sigma1"][bounded])
    assert set(level.get_ydata()) == {e["ao"]} and level.get_label().startswith("AO")
    assert set(lines(ax, DARK, ":")[0].get_ydata()) == {0.72}  # 1.2^2 / 2
    assert set(lines(ax, DARK, "--")[0].get_xdata()) == {0.3 * 1.2}  # eta sigma1
    said, places = zip(*((t.get_text(), t.get_position()[0]) for t in ax.texts), strict=True)
    assert said == ("at rest", "two-cycle", "longer cycles, chaos", "diverges")
    assert places[0] < 1 < places[1] < 1.24 < places[2] < places[3]
    assert ax.get_ylim()[1] > e["loss"][bounded].max() and ax.get_ylim()[0] == 0


def test_film(tmp_path):
    path = tmp_path / "walk.gif"
    pictures.animate(lab.Setting(tau0=0.01, eta=0.1), path)
    film = Image.open(path)
    assert 35 <= film.n_frames <= 40 and path.stat().st_size < 1_000_000

    def counted(frame):
        """Pixels of the colours of GD and AO, in the field and beside the losses: [2, 2]."""
        film.seek(frame)
        halves = np.split(np.asarray(film.convert("RGB"), dtype=int), 2, axis=1)
        near = [[np.abs(half - rgb).sum(-1) < 24 for rgb in ((0, 114, 178), (213, 94, 0))]
                for half in halves]
        return np.sum(near, axis=(2, 3))

    first, middle, last = map(counted, (0, 12, film.n_frames - 1))
    assert (last > first).all()
    assert (middle[:, 1] > middle[:, 0]).all()  # AO is ahead of GD


# ---- the program ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def default_figure(tmp_path_factory):
    out = tmp_path_factory.mktemp("default") / "figure.png"
    assert lab.main(["--out", str(out)]) == 0
    return out.read_bytes()


@pytest.mark.parametrize("option", ["--c .35", "--eta .5", "--tau0 .001", "--nu0 .8", "--d 9",
                                    "--seed 1", "--methods gd ao"])
def test_every_option_changes_the_figure(option, default_figure, tmp_path):
    out = tmp_path / "figure.png"
    assert lab.main([*option.split(), "--out", str(out)]) == 0
    assert out.read_bytes() != default_figure


def test_default_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert lab.main(["--json", "deep/results.json"]) == 0
    assert 20_000 < (tmp_path / "out/bilinear.png").stat().st_size < 150_000
    found = json.loads((tmp_path / "deep/results.json").read_text(), parse_constant=pytest.fail)
    assert found["races"]["eq2"]["ao"]["arrived"] == 19 and found["setting"]["c"] == 0.3
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.startswith("| gd "))
    fall = [excess for excess in found["races"]["generic"]["gd"]["excess"] if excess < 1e-4]
    measured = f"{(fall[-1] / fall[0]) ** (1 / (2 * len(fall) - 2)):.4f}"
    assert [cell.strip() for cell in row.split("|")[2:6]] == ["28", "63", "0.6418", measured]
    assert "tau0 = 0" not in out and "sigma1" not in out


def test_notes_say_what_a_choice_brings():
    def said(**chosen):
        return " ".join(lab.notes(lab.experiment(replace(lab.Setting(methods=("ao",)), **chosen))))

    assert "eta sigma1 = 1.04" in said(eta=0.8) and "1 + eta" not in said(eta=0.8)
    assert "eta |u0|^2 = 2.36" in said(eta=0.1, tau0=4.0, nu0=2.0)
    assert "rounding" in said(tau0=0.0) and said() == ""
    assert said(eta=0.3, tau0=1.5) == ""  # eta |u0|^2 = 1.09 is below 1 + eta


@pytest.mark.parametrize("arguments", [
    "--c .001 --tau0 0", "--c .99 --d 2", "--eta 10 --methods gd adam", "--tau0 -10 --nu0 10",
    "--eta .0001 --methods gd"])
def test_edges(arguments, tmp_path, recwarn):
    json_file = tmp_path / "x.json"
    out = ["--out", str(tmp_path / "x.png"), "--json", str(json_file)]
    assert lab.main([*arguments.split(), *out]) == 0
    json.loads(json_file.read_text(), parse_constant=pytest.fail)
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


@pytest.mark.parametrize(("arguments", "wanted"), [
    ("--c 1", "0.001 to 0.99"), ("--c nan", "0.001 to 0.99"), ("--c 1e-9", "0.001 to 0.99"),
    ("--eta 0", "0.0001 to 10"), ("--eta inf", "0.0001 to 10"), ("--tau0 11", "-10 to 10"),
    ("--nu0 x", "-10 to 10"), ("--d 1", "whole number from 2 to 100"), ("--d 500", "2 to 100"),
    ("--d 2.5", "whole number"), ("--seed -1", "0 to 1e+06"), ("--methods gd fast", "'sequential'"),
    ("--out a.doc", ".png"), ("--json .", ".json"), ("--animate a.mp4", ".gif"),
    ("--tau0 0 --nu0 0", "--nu0"), ("--method gd", "--method"),
    ("--json /proc/none/x.json", "cannot write"), ("--json /proc/x.json", "cannot write")])
def test_wrong_values_get_one_line(arguments, wanted, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        lab.main(arguments.split())
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == "" and err.count("\n") == 1 and wanted in err
