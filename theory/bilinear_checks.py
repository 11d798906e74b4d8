"""The checks of the bilinear chapter, each beside a mutation that it must notice.

A check is a function of one flag that returns a measured error; `broken` puts the named mistake into the
formula under test. It passes if the error is within the tolerance, and is itself proven if the mistake's
error is not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

import bilinear as lab
import bilinear_figure
from bilinear import Setting, make_problem, make_start


@dataclass(frozen=True)
class Check:
    """What is measured, the largest error allowed, the mistake to notice, and the function of `broken`."""
    name: str
    tolerance: float
    mutation: str
    measure: Callable[[bool], float]


CHECKS: list[Check] = []


def check(tolerance: float, mutation: str) -> Callable:
    """Put a function into CHECKS, its docstring's first paragraph as the name."""
    def enter(function: Callable[[bool], float]) -> Callable[[bool], float]:
        name = " ".join(function.__doc__.split("\n\n")[0].split()).rstrip(".")
        CHECKS.append(Check(name, tolerance, mutation, function))
        return function
    return enter


@check(1e-12, "M for M^2")
def gram(broken: bool) -> float:
    """XX' = A M A' and XX' A = A M^2."""
    worst = 0.0
    for c in (-0.9, -0.3, 0.0, 0.1, 0.5, 0.99, 1.0):
        p = make_problem(c)
        square = p.M if broken else p.M @ p.M
        worst = max(worst, lab.gap(p.X @ p.X, p.A @ p.M @ p.A.T), lab.gap(p.X @ p.X @ p.A, p.A @ square))
    return worst


@check(1e-10, "the proof's lost eta")
def reduced_descent(broken: bool) -> float:
    """Theorem 3: GD in R^d is z_{t+1} = F_t z_t."""
    worst = 0.0
    for c, eta in ((0.3, 0.1), (-0.6, 0.2), (0.05, 0.5)):
        p = make_problem(c)
        tau, nu = lab.eq2_starts(Setting(seeds=20))
        U, V = lab.trajectory(lab.gradient_descent(p.X, *p.embed(tau, nu), eta), 200)
        Z = lab.theorem_3_orbit(p, tau, nu, eta, 200, lost_eta=broken)
        worst = max(worst, lab.gap(U, Z @ p.A.T), lab.gap(V, Z[..., ::-1] @ p.A.T))
    return worst


@check(1e-10, "a random v0")
def lemma(broken: bool) -> float:
    """Lemma 1: tau and nu step by step."""
    rows = [lab.lemma_1(Setting(c=c, seeds=20)) for c in (0.3, -0.6, 0.05)]
    return max(row.printed if broken else row.error for row in rows)


@check(1e-10, "M for M^2")
def recursion(broken: bool) -> float:
    """Theorems 2 and 5: AO's direction and recursion."""
    return max(max(lab.alternating_errors(Setting(c=c), power=1 if broken else 2)) for c in (0.3, -0.6, 0.05))


@check(1e-8, "-c for c")
def closed_form(broken: bool) -> float:
    """The flow's closed form against Runge-Kutta in R^d."""
    worst = 0.0
    for c in (0.3, -0.6, 0.05):
        p = make_problem(c, 4)
        tau, nu = lab.eq2_starts(Setting(seeds=20))
        u, v = lab.integrate_flow(p, *p.embed(tau, nu), 5.0, 0.005)
        worst = max(worst, lab.gap(u, p.embed(*lab.flow(-c if broken else c, tau, nu, 5.0))[0]))
    return worst


@check(1e-8, "the paper's two points")
def five_points(broken: bool) -> float:
    """Theorem 4: Newton from 500 starts finds the five fixed points and no other."""
    claimed = [(1, 0), (0, 1)] if broken else [(f.tau, f.nu) for f in lab.fixed_points(0.3, 2)]
    return max(lab.set_distance(lab.newton_fixed_points(c), np.array(claimed)) for c in (0.3, 0.7, -0.3))


@check(0.03, "a second-order integrator")
def order_one(broken: bool) -> float:
    """Eq. 6: GD is the flow up to an error of order one in eta."""
    etas = 0.025 / 2.0 ** np.arange(4)
    return max(np.abs(lab.slopes(etas, lab.discretisation_errors(c, etas, midpoint=broken)) - 1).max()
               for c in (0.05, 0.3, 0.6))


@check(1e-10, "the sign of 2c at the saddle")
def hessians(broken: bool) -> float:
    """Losses and Hessians at the fixed points (complex-step derivatives)."""
    worst, d = 0.0, 5
    for c in (0.1, 0.3, 0.8):
        p = make_problem(c, d)
        for point in lab.fixed_points(c, d):
            w = np.concatenate(p.embed(point.tau, point.nu)) + 1e-20j * np.eye(2 * d)          # [2d, 2d]
            hessian = np.concatenate(lab.gradients(p.X, w[:, :d], w[:, d:]), axis=1).imag / 1e-20
            claimed = np.where(np.isclose(point.hessian, -2 * c) & broken, 2 * c, point.hessian)
            worst = max(worst, np.abs(np.linalg.eigvalsh(hessian) - np.sort(claimed)).max(),
                        abs(p.loss(*p.embed(point.tau, point.nu)) - point.loss))
            field = np.array([lab.flow_field(c, point.tau + 1e-20j * s, point.nu + 1e-20j * (1 - s))
                              for s in (1, 0)])
            worst = max(worst, np.abs(field.imag / 1e-20 - np.diag(point.reduced)).max())
    return worst


@check(0, "tau0 = 0")
def discrete_convergence(broken: bool) -> float:
    """GD, Eq. 2's start, c > 0, eta (1 + c) < 1, eta |u0|^2 < 1 + eta: failures among 20,000 starts with tau0
    != 0.

    Why: write n = |u|^2, f+- = 1 + eta (lambda+- - n), K = 1 + eta lambda+ < 2. While eta n < 1 + eta, f+ > 0
    and |f-| < f+, so n_next <= f+^2 n <= 4 K^3 / (27 eta) < (1 + eta) / eta: the bound perpetuates itself,
    with room, so |nu / tau| falls geometrically, and what is left, tau <- (1 + a - a tau^2) tau with a = eta
    lambda+ < 1, goes to +-1.
    """
    rng = np.random.default_rng(7)
    c, a, share, angle = rng.uniform((0.15, 0.2, 0.01, 0), (0.95, 0.97, 0.999, 2 * np.pi), (20_000, 4)).T
    eta = a / (1 + c)
    length = np.sqrt(share * (1 + eta) / eta)
    tau, nu = length * np.cos(angle) / np.sqrt(1 + c), length * np.sin(angle) / np.sqrt(1 - c)
    if broken:
        tau[0] = 0.0
    sign = np.sign(np.cos(angle))
    for _ in range(1500):
        n = (1 + c) * tau * tau + (1 - c) * nu * nu
        tau, nu = (1 + eta * (1 + c - n)) * tau, (1 + eta * (1 - c - n)) * nu
    return float((~((np.abs(tau - sign) < 1e-6) & (np.abs(nu) < 1e-6))).sum())


@check(0, "theta = 1")
def hyperplane(broken: bool) -> float:
    """The sign of s predicts the optimum that the flow reaches: mismatches among 480 starts."""
    misses = 0
    for seed, c in enumerate((0.15, 0.3, -0.6)):
        p = make_problem(c, 5, seed)
        u, v = make_start(p, "unbalanced", 0, 160)
        end, _ = lab.integrate_flow(p, u, v, 20 / abs(c))
        (p1, _), _ = p.pairs
        misses += (np.sign(end @ p1) != np.sign(lab.basin_side(p, u, v, theta=1.0 if broken else None))).sum()
    return float(misses)


@check(1e-12, "theta = 1")
def side_equation(broken: bool) -> float:
    """s' = (sigma1 theta - |v|^2) s and D' = 0 along the flow."""
    worst = 0.0
    for c in (0.3, -0.6, 0.05):
        p = make_problem(c, 5)
        u, v = make_start(p, "unbalanced", 0, 50)
        imbalance, s1 = (lab.square(u) - lab.square(v))[..., 0], p.sigma[0]
        theta = np.ones(50) if broken else (-imbalance + np.sqrt(imbalance ** 2 + 4 * s1 ** 2)) / (2 * s1)
        du, dv = (-g for g in lab.gradients(p.X, u, v))
        s, ds = lab.basin_side(p, u, v, theta), lab.basin_side(p, du, dv, theta)
        worst = max(worst, np.abs(ds - (s1 * theta - lab.square(v)[..., 0]) * s).max(),
                    np.abs((u * du - v * dv).sum(-1)).max())
    return worst


@check(0, "tau0 = 1e-12")
def exact(broken: bool) -> float:
    """tau0 = 0 stays 0 in GD and in AO, in rational arithmetic."""
    tau0 = Fraction(int(broken), 10 ** 12)
    runs = [lab.exact_run(c, Fraction(1, 10), tau0, 5) for c in (Fraction(1, 2), Fraction(3, 10))]
    return float(max(abs(value) for rows in runs for row in rows for value in row))


@check(0, "tau and nu not exchanged")
def mirror(broken: bool) -> float:
    """(c, tau, nu) and (-c, nu, tau) are one problem, bit for bit."""
    tau, nu = lab.eq2_starts(Setting(seeds=50))
    one, other = (tau, nu), (tau, nu) if broken else (nu, tau)
    for _ in range(100):
        one = tuple(x + 0.1 * dx for x, dx in zip(one, lab.flow_field(0.3, *one), strict=True))
        other = tuple(x + 0.1 * dx for x, dx in zip(other, lab.flow_field(-0.3, *other), strict=True))
    return float(max(np.abs(one[0] - other[1]).max(), np.abs(one[1] - other[0]).max()))


@check(0, "a kick of 1e-6")
def tied_for_ever(broken: bool) -> float:
    """v = -u (c > 0) or u (c < 0) is kept bit for bit by GD, heavy ball, Adam, scaled GD and the balance
    term.
    """
    worst = 0.0
    for c in (0.3, -0.3):
        p = make_problem(c)
        u, v = make_start(p, "tied", 0, 5)
        u = lab.kicked(u) if broken else u
        for name in ("gd", "heavy-ball", "adam", "scaled", "balance"):
            u1, v1 = lab.after(lab.METHODS[name].run(p, u, v, 0.1), 200)
            worst = max(worst, np.abs(u1 + np.sign(c) * v1).max())
    return float(worst)


@check(1e-10, "AO in GD's place")
def neither_nested(broken: bool) -> float:
    """u0 orthogonal to p1: AO ends at the saddle, GD at the optimum; v0 = -u0: the other way round."""
    p = make_problem(0.3)
    (p1, _), _ = p.pairs
    u, v = make_start(p, "generic", 0, 20)
    across, tied = u - np.outer(u @ p1, p1), make_start(p, "tied", 0, 20)

    def excess(method: str, u: np.ndarray, v: np.ndarray, steps: int) -> np.ndarray:
        return p.excess(*lab.after(lab.METHODS["ao" if broken else method].run(p, u, v, 0.1), steps))

    # AO is stopped after 12 sweeps: it converges by .29 a sweep, and amplifies rounding by 3.4
    return float(max(np.abs(p.excess(*lab.after(lab.alternating(p.X, across, v), 12)) - p.saddle_gap).max(),
                     np.abs(excess("gd", across, v, 800)).max(),
                     np.abs(excess("gd", *tied, 800) - p.saddle_gap).max(),
                     np.abs(p.excess(*lab.after(lab.alternating(p.X, *tied), 40))).max()))


@check(5e-3, "rho for AO's rho^2")
def tails(broken: bool) -> float:
    """Tail factors of all methods at the optimum, relative."""
    worst = 0.0
    for c in (0.1, 0.3, -0.3):
        for name, (tail, _) in lab.rates(c, 0.1).items():
            measured, _ = lab.measured_rates(make_problem(c), name, 0.1)
            derived = np.sqrt(tail) if broken and name == "ao" else tail
            worst = max(worst, abs(measured / derived - 1))
    return worst


@check(5e-3, "rho for 1 / rho in the pair matrix")
def escapes(broken: bool) -> float:
    """Escape factors of all methods at the saddle, relative."""
    worst = 0.0
    for c in (0.1, 0.3, -0.3):
        for name, (_, escape) in lab.rates(c, 0.1).items():
            if broken and name == "ao":
                escape = abs(lab.pair_factors(1.0, make_problem(c).rho, True)[0])
            worst = max(worst, abs(lab.measured_rates(make_problem(c), name, 0.1)[1] / escape - 1))
    return worst


@check(1, "c for 2c")
def escape_counts(broken: bool) -> float:
    """Steps that 10^6 in tau0 cost: ln 10^6 / ln(1 + 2c eta) within .5 % + 2 (GD), / 4 artanh c within 1
    (AO).
    """
    worst = 0.0
    for c, eta in ((0.05, 0.1), (0.1, 0.1), (0.3, 0.1), (0.3, 0.4)):
        p = make_problem(c)
        (p1, _), _ = p.pairs

        def leaves(update: str, tau0: float) -> int:
            run = lab.METHODS[update].run(p, *make_start(p, "paper", tau0, 1), eta)
            return next(t for t, (u, _) in enumerate(run) if abs(u[0] @ p1) > 0.1)

        factor = 1 if broken else 2
        for name, rate in (("gd", np.log1p(factor * c * eta)), ("ao", 2 * factor * np.arctanh(c))):
            derived = np.log(1e6) / rate
            allowed = 0.005 * derived + 2 if name == "gd" else 1
            worst = max(worst, abs(leaves(name, 1e-10) - leaves(name, 1e-4) - derived) / allowed)
    return worst


@check(0, "GD given sequential GD's limit")
def thresholds(broken: bool) -> float:
    """Steps of .97 and 1.03 of the stable one: of 16 runs, how many stay at their optimum, or leave, against
    the rule.

    "Stay" includes the imbalance: above its limit GD leaves an unbalanced optimum for a balanced one, which
    is stable.
    """
    wrong = 0
    for c in (0.1, 0.5):
        p = make_problem(c)
        (p1, q1), (p2, q2) = p.pairs
        s1 = p.sigma[0]
        limits = {"gd": (2 if broken else 1) / s1, "sequential": 2 / s1, "scaled": 1.0,
                  "unbalanced gd": 2 / (s1 * (4 + 1 / 4))}
        for name, limit in limits.items():
            k = 2.0 if name == "unbalanced gd" else 1.0
            u, v = (np.sqrt(s1) * k * p1 + 1e-3 * (p1 + p2), np.sqrt(s1) / k * q1 + 1e-3 * (q1 + q2))
            for share in (0.97, 1.03):
                step = share * limit
                update = {"sequential": lab.blocks, "scaled": lab.scaled_gradient_descent}
                run = update.get(name, lab.gradient_descent)(p.X, u, v, step)
                with np.errstate(all="ignore"):
                    u1, v1 = lab.after(run, 2000)
                    moved = abs(u1 @ u1 - v1 @ v1 - u @ u + v @ v)
                    wrong += (p.excess(u1, v1) < 1e-10 and moved < 0.1) != (share < 1)
    return float(wrong)


@check(0, "the limits exchanged")
def momentum_thresholds(broken: bool) -> float:
    """Heavy ball, beta = .9: stable for eta sigma1 < 1.9 together, < .2 in turn; misjudged runs of 8."""
    wrong, beta = 0, 0.9
    for c in (0.1, 0.5):
        p = make_problem(c)
        (p1, q1), _ = p.pairs
        s1 = p.sigma[0]
        u, v = np.sqrt(s1) * p1 * (1 + 1e-6), np.sqrt(s1) * q1
        for sequential in (False, True):
            limit = (2 * (1 - beta) if sequential != broken else 1 + beta) / s1
            for share in (0.97, 1.03):
                run = lab.heavy_ball(p.X, u, v, share * limit, beta, sequential)
                wrong += bool(p.excess(*lab.after(run, 3000)) < 1e-14) != (share < 1)
    return float(wrong)


@check(5e-3, "2k for k")
def block_rates(broken: bool) -> float:
    """Escape rate of k-step blocks, relative; 1.00, .91, .40, .21 of GD's at k eta = .1, 1, 5, 10."""
    eta, ks = 0.02, np.array([5, 50, 250, 500])
    worst = 0.0
    for c in (0.1, 0.3):
        derived = bilinear_figure.block_rates(c, eta, 2 * ks if broken else ks)
        measured = np.array([bilinear_figure.measured_block_rate(make_problem(c), eta, int(k)) for k in ks])
        worst = max(worst, np.abs(measured / derived - 1).max())
    return worst


@check(0.08, "-1/2 for AO's slope")
def scaling(broken: bool) -> float:
    """Iterations against c: slopes -1 (best GD, AO) and -1/2 (heavy ball, over-relaxed AO)."""
    cs = np.geomspace(0.003, 0.05, 4)
    slope = {"gd-tuned": -1, "ao": -0.5 if broken else -1, "heavy-ball": -0.5, "over-relaxed": -0.5}
    return max(abs(np.polyfit(np.log(cs), np.log(counts), 1)[0] - slope[name])
               for name, counts in bilinear_figure.scaling_counts(cs).items())


@check(1e-8, "the rate at D = 0")
def unbalanced_escape(broken: bool) -> float:
    """Rate at which the flow leaves the saddle with imbalance D: (sqrt(D^2 + 4 sigma1^2) - sqrt(D^2 + 4
    sigma2^2)) / 2.
    """
    worst = 0.0
    for c in (0.1, 0.3, -0.3):
        p = make_problem(c)
        (p1, q1), (p2, q2) = p.pairs
        for k in (1.0, 1.5, 3.0):
            u, v = np.sqrt(p.sigma[1]) * k * p2, np.sqrt(p.sigma[1]) / k * q2
            # the flow linearised there, in (p1.u, q1.v), by complex steps: [2, 2]
            derivative = np.empty((2, 2))
            for j, (du, dv) in enumerate(((p1, 0 * q1), (0 * p1, q1))):
                gu, gv = lab.gradients(p.X, u + 1e-20j * du, v + 1e-20j * dv)
                derivative[:, j] = -(gu @ p1).imag / 1e-20, -(gv @ q1).imag / 1e-20
            rate = lab.escape_rate(p, 0.0 if broken else u @ u - v @ v)
            worst = max(worst, abs(np.linalg.eigvalsh(derivative).max() - rate))
    return float(worst)


@check(1e-12, "the cosine for the sine")
def half_sweep(broken: bool) -> float:
    """A half-sweep of AO is a GD step of 1 / |u|^2 on v, and leaves an excess of 2|c| sin^2(u, p1) for u in
    span(a, b).
    """
    worst = 0.0
    for c in (0.1, 0.3, -0.6):
        p = make_problem(c)
        (p1, _), _ = p.pairs
        u, _ = p.embed(*lab.eq2_starts(Setting(seeds=20)))
        v = make_start(p, "generic", 0, 20)[1]
        _, solved = next(lab.alternating(p.X, u, v))
        stepped = v - lab.gradients(p.X, u, v)[1] / lab.square(u)
        cosine = (u @ p1) ** 2 / lab.square(u)[:, 0]
        worst = max(worst, np.abs(solved - stepped).max(),
                    np.abs(p.excess(u, solved) - p.saddle_gap * (cosine if broken else 1 - cosine)).max())
    return worst


@check(0.1, "no noise")
def minibatch(broken: bool) -> float:
    """Excess floors under minibatch noise, GD at .1 and exact AO, relative to the derived (ratio .06)."""
    p, noise = make_problem(0.1), 0.1
    worst = 0.0
    for name, step in (("gd", 0.1), ("ao", 1.0)):
        floor = lab.noise_floor(p, name, 0.0 if broken else noise, step, 1000)
        worst = max(worst, abs(floor / lab.predicted_floor(p, name, noise, step) - 1))
    return worst


@check(0.25, "GD in ALS's place")
def rank_r(broken: bool) -> float:
    """Rank r: ALS, over-relaxed ALS, scaled GD need as many iterations at sigma_1 / sigma_r = 30 as at 1."""
    names = ("scaled GD", "GD" if broken else "ALS", "over-relaxed ALS")
    return max(abs(lab.rank_iterations(name, 30) / lab.rank_iterations(name, 1) - 1) for name in names)


def run_all(check: bool, mutants: bool) -> list[dict]:
    """Measure every check as it is and, if asked, broken: one dict each; `ok` says whether all went as it
    must.
    """
    rows = []
    for item in CHECKS:
        with np.errstate(all="ignore"):
            error = item.measure(False) if check else None
            mutant = item.measure(True) if mutants else None
        passed = None if error is None else bool(error <= item.tolerance)
        caught = None if mutant is None else not mutant <= item.tolerance           # NaN counts as noticed
        rows.append({"check": item.name, "tolerance": item.tolerance, "error": error, "passed": passed,
                     "mutation": item.mutation, "mutant_error": mutant, "caught": caught,
                     "ok": passed is not False and caught is not False})
    return rows


def report(rows: list[dict]) -> str:
    """One line per check, and a count."""
    lines = []
    for row in rows:
        line = f"{'ok  ' if row['ok'] else 'FAIL'} {row['check']}: "
        if row["error"] is not None:
            line += f"{row['error']:.1e} (tolerance {row['tolerance']:g}) "
        if row["mutant_error"] is not None:
            seen = "noticed" if row["caught"] else "NOT NOTICED"
            line += f"[{row['mutation']}: {row['mutant_error']:.1e}, {seen}]"
        lines.append(line.rstrip())
    return "\n".join([*lines, f"{sum(row['ok'] for row in rows)} of {len(rows)} as they must be"])
