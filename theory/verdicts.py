"""The thirteen statements of "Beyond LLaVA-HD" about its bilinear problem, each run and judged.

    python theory/verdicts.py --c .3 --eta .1       the table of theory/README.md, as Markdown

Each statement is one function, which measures two errors: of the statement as printed, and as
corrected. The verdict follows from these two alone, in one of four words:

    holds        as printed, under the paper's own conditions (Eq. 2's start)
    misprint     a letter is wrong, and what is meant holds
    incomplete   what is said is so, and something that is needed is not said
    false        something that is said is not so

or "not confirmed" where the corrected form is off, too. What is said of every iteration is measured
in one, from many random places, as in the step of an induction: a long run at a large eta would
measure how chaos magnifies rounding.

Notation as in bilinear.py. z = (alpha, beta), so that u = A z with A = (a, b), and M = A'A =
[[1, c], [c, 1]] with the eigenvectors w+- = (1, +-1) / sqrt 2; S exchanges alpha and beta.
"""

import sys
from collections import namedtuple
from itertools import islice

import bilinear as lab
import numpy as np
from bilinear import Array, Problem
from program import make_parser, markdown, number

S = np.array([[0.0, 1.0], [1.0, 0.0]])


# one row: both forms, and by how much each is off, relative to numbers of order one
Verdict = namedtuple("Verdict", "statement printed corrected verdict off_printed off_corrected")


def judge(statement: str, printed: str, corrected: str, off_printed: float,
          off_corrected: float | None = None, word: str = "", tolerance: float = 1e-9) -> Verdict:
    """`word` is the verdict if the printed form is off and the corrected one is not.

    Rounding in what is measured here stays below 1e-11, so that the tolerance is above it."""
    right = off_printed if off_corrected is None else off_corrected
    found = "holds" if off_printed <= tolerance else word
    verdict = found if right <= tolerance else "not confirmed"
    return Verdict(statement, printed, corrected, verdict, float(off_printed), float(right))


def off(x: Array, y: Array) -> float:
    """The largest |x - y|, relative to max(1, |y|)."""
    return float((np.abs(x - y) / np.maximum(1, np.abs(y))).max())


def after(update: lab.Pairs, steps: int) -> tuple[Array, Array]:
    """The pair (u, v) after so many iterations."""
    return next(islice(update, steps, None))


def frame(p: Problem) -> tuple[Array, Array]:
    """A = (a, b): [d, 2], and M = A'A: [2, 2]."""
    along, across = np.sqrt(np.divide(p.sigma, 2))[:, None] * [p.p_plus, p.p_minus]
    return np.stack([along + across, along - across], axis=1), np.array([[1, p.c], [p.c, 1]])


def places() -> Array:
    """Random z of order one: [200, 2]."""
    return np.random.default_rng(3).uniform(-1.5, 1.5, (200, 2))


def one_step(p: Problem, eta: float) -> tuple[Array, Array, Array, Array]:
    """z: [n, 2]; u.u: [n, 1]; and the u, v of one GD step from u = A z, v = A S z: [n, d] each."""
    (A, _), z = frame(p), places()
    u, v = z @ A.T, z @ S @ A.T
    return z, lab.dot(u, u), *after(lab.gradient_descent(p.X, u, v, eta), 1)


# ---- Sec. 2.3 ------------------------------------------------------------------------------------

def gram_matrix(p: Problem, eta: float) -> Verdict:
    """A number, b'a, stands where the matrix ba' is meant."""
    A, M = frame(p)
    (a, b), scalar = A.T, p.c * np.eye(len(A))
    printed = (np.outer(a, b) + scalar) @ (np.outer(b, a) + scalar)
    meant = (np.outer(a, b) + np.outer(b, a)) @ (np.outer(b, a) + np.outer(a, b))
    top = A @ [1, 1]                                            # the conclusion: A w+ is on top
    right = max(off(meant, A @ M @ A.T), off(meant @ top, p.sigma[0] ** 2 * top))
    return judge("top eigenvector of XX' (Sec. 2.3)", "XX' = (ab' + b'a)(ba' + a'b) = AMA'",
                 "XX' = (ab' + ba')(ba' + ab') = AMA'; its conclusion stands",
                 off(printed, A @ M @ A.T), right, "misprint")


def in_the_span(p: Problem, eta: float) -> Verdict:
    """GD keeps u and v in span(a, b), where Eq. 2 has them; AO takes them there from anywhere."""
    _, _, u, v = one_step(p, eta)
    anywhere = np.random.default_rng(4).standard_normal((2, 50, len(p.p_plus)))
    solved, _ = after(lab.alternating(p.X, *anywhere), 1)
    both = np.stack([p.p_plus, p.p_minus])
    return judge("u = Az (Sec. 2.3)", "u has to lie in span(a, b)",
                 "so it is from Eq. 2's start; elsewhere AO sees to it at once, GD bit by bit",
                 max(off(x @ both.T @ both, x) for x in (u, v, solved)))


def optimal_z(p: Problem, eta: float) -> Verdict:
    """Along w+ for c > 0; and -b makes -X of X, so that -u does as well there as u here."""
    A, _ = frame(p)
    best, along = np.linalg.svd(p.X)[0][:, 0], A @ [1, 1] / np.linalg.norm(A @ [1, 1])
    u, v = lab.generic_start(len(best), 5)
    mirrored = 0.5 * ((np.outer(-u, v) + p.X) ** 2).sum()
    return judge("the optimal z (Sec. 2.3)", "aligned with the largest eigenvector of M",
                 "so it is; c < 0 is the same problem with b and u reversed",
                 max(off(along * (along @ best), best), off(mirrored, p.loss(u, v))))


def left_of_saddle(p: Problem, name: str, tau0: float, steps: int) -> float:
    """Excess loss, over 2c, after `steps` from (tau0, 1), on axes where a zero stays a zero."""
    aligned = Problem(p.c, *np.eye(2))
    run = lab.METHODS[name](aligned, *aligned.start(tau0, 1.0), lab.tuned(p.c)["step"])
    return float(aligned.excess(*after(run, steps))) / (2 * p.c)


def theorem_1(p: Problem, eta: float) -> Verdict:
    """One start that fails is enough; of generic ones, count those that do."""
    starts = np.random.default_rng(6).standard_normal((2, 300, len(p.p_plus))) / np.sqrt(10)
    run = lab.gradient_descent(p.X, *starts, 0.4 / p.sigma[0])
    for u, v in islice(run, 0, 40_001, 100):
        if not (failing := int((p.excess(u, v) > 0.02 * p.c).sum())):       # 1 % of the saddle's
            break
    return judge("Theorem 1 (Sec. 2.3)", "GD does not necessarily converge to the optimum",
                 "so it is: from τ₀ = 0, or where η or the start is too large; and from "
                 f"{failing} of 300 generic starts", abs(left_of_saddle(p, "gd", 0.0, 1000) - 1))


def theorem_2(p: Problem, eta: float) -> Verdict:
    """AO is power iteration on M^2: the directions of 20 iterations."""
    (A, M), z, worst = frame(p), places(), 0.0
    for u, _ in islice(lab.alternating(p.X, z @ A.T, z @ A.T), 20):
        ray = z @ A.T
        worst = max(worst, off(u / np.sqrt(lab.dot(u, u)), ray / np.sqrt(lab.dot(ray, ray))))
        z = z @ M @ M / np.sqrt(lab.dot(z, z))
    return judge("Theorem 2 (Sec. 2.3)", "z_t ∝ M²ᵗ z₀ under AO", "so it is for any v₀", worst)


# ---- App. C.1, gradient descent ------------------------------------------------------------------

def theorem_3(p: Problem, eta: float) -> Verdict:
    """z_{t+1} = F_t z_t; the statement has v_0 for v_t, the proof loses an eta beside b."""
    (A, M), (z, n, u, v) = frame(p), one_step(p, eta)
    new = z * (1 - eta * n) + eta * z @ M                       # F_t z_t
    right = max(off(u, new @ A.T), off(v, new @ S @ A.T), off(lab.dot(u, u), lab.dot(v, v)))
    lost = new + (1 - eta) * p.c * z * [1, 0] @ S
    wrong = max(off(z @ S @ A.T, new @ S @ A.T), off(lost @ A.T, u))
    return judge("Theorem 3, Eq. 3 (App. C.1)", "v₀ = β_t a + α_t b; in the proof, ... + a'b α_t",
                 "v_t; ... + η a'b α_t; then z_{t+1} = F_t z_t and u·u = v·v for every η",
                 wrong, right, "misprint")


def equation_4(p: Problem, eta: float) -> Verdict:
    """u.u in the eigenvectors of M."""
    (A, _), z = frame(p), places()
    tau, nu = z @ [1, 1] / np.sqrt(2), z @ [1, -1] / np.sqrt(2)
    return judge("Eq. 4 (App. C.1)", "u·u = (1 + c) τ² + (1 - c) ν²", "so it is",
                 off(lab.dot(z @ A.T, z @ A.T)[:, 0], (1 + p.c) * tau**2 + (1 - p.c) * nu**2))


def lemma_1(p: Problem, eta: float) -> Verdict:
    """Theorem 3 in the eigenvectors of M."""
    z, n, u, _ = one_step(p, eta)
    old = np.stack([z @ [1, 1], z @ [1, -1]], axis=1) / np.sqrt(2)                # tau, nu
    new = np.stack([u @ p.p_plus, u @ p.p_minus], axis=1) / np.sqrt(p.sigma)
    return judge("Lemma 1, Eq. 5 (App. C.1)",
                 "τ ← (1 + η(1 + c - u·u)) τ, ν ← (1 + η(1 - c - u·u)) ν", "so it is, for every η",
                 off(new, (1 + eta * (np.array(p.sigma) - n)) * old))


def equation_6(p: Problem, eta: float) -> Verdict:
    """GD tends to the flow: halving eta halves its error at t = 1. Measured: the order, less 1."""
    exact, errors = p.start(*lab.flow(p.c, 0.3, 0.6, 1.0))[0], []
    for steps in (80, 160, 320, 640):
        u, _ = after(lab.gradient_descent(p.X, *p.start(0.3, 0.6), 1 / steps), steps)
        errors.append(np.abs(u - exact).max())
    order = np.log2(np.divide(errors[:-1], errors[1:]))
    return judge("Eq. 6 (App. C.1)", "small η: dτ/dt = (1 + c - u·u) τ, dν/dt = (1 - c - u·u) ν",
                 "so it is, with t = η × iterations and an error of order η",
                 np.abs(order - 1).max(), tolerance=0.03)       # terms of order eta^2 remain


def theorem_4(p: Problem, eta: float) -> Verdict:
    """Newton's method from 500 places finds the fixed points; eigenvalues there say their kind."""
    def jacobian(x: Array) -> Array:                            # of `field`, by complex steps
        ahead = [lab.field(p.c, *(x + 1e-30j * e).T) for e in np.eye(2)]
        return np.imag(ahead).transpose(2, 1, 0) / 1e-30        # [n, 2, 2]

    x = np.random.default_rng(7).uniform(-1.5, 1.5, (500, 2))
    for _ in range(200):
        slope, there = jacobian(x) + 1e-300 * np.eye(2), np.transpose(lab.field(p.c, *x.T))
        x = x - np.linalg.solve(slope, there[..., None])[..., 0]
    x = x[np.abs(lab.field(p.c, *x.T)).max(0) < 1e-12]
    five, (s1, s2) = np.array([[0, 0], [1, 0], [-1, 0], [0, 1], [0, -1.0]]), p.sigma
    growth = [[s2, s1], *[[-2 * s1, -2 * p.c]] * 2, *[[-2 * s2, 2 * p.c]] * 2]   # < 0 attracts
    found = np.sort(np.linalg.eigvals(jacobian(five)).real)

    def apart(known: Array) -> float:                           # Hausdorff distance of two sets
        table = np.linalg.norm(x[:, None] - known, axis=-1)
        return max(table.min(0).max(), table.min(1).max())

    return judge("Theorem 4 (App. C.1)", "Eq. 6 has two limits, τ → 1, ν → 0 and τ → 0, ν → 1",
                 "five: 0, (±1, 0), (0, ±1); only (±1, 0) attract, and do from every τ₀ ≠ 0",
                 apart(five[[1, 3]]), max(apart(five), off(found, np.array(growth))), "incomplete")


def equation_7(p: Problem, eta: float) -> Verdict:
    """d(u.u)/dt, which is to vanish at a fixed point: the chain rule."""
    tau, nu = places().T
    n, (dtau, dnu) = (1 + p.c) * tau**2 + (1 - p.c) * nu**2, lab.field(p.c, tau, nu)
    chain = 2 * (1 + p.c) * tau * dtau + 2 * (1 - p.c) * nu * dnu
    formula = 2 * (1 - n) * n + 2 * p.c * ((1 + p.c) * tau**2 - (1 - p.c) * nu**2)
    return judge("Eq. 7 (App. C.1)", "2(1 - u·u) u·u + 2c((1 + c) τ² - (1 - c) ν²) = 0 at a limit",
                 "so it is; it follows from Eq. 6 and adds nothing to it", off(formula, chain))


# ---- App. C.2, alternating optimisation ----------------------------------------------------------

def theorem_5(p: Problem, eta: float) -> Verdict:
    """One iteration of AO, v first."""
    (A, M), z = frame(p), places()
    u = z @ A.T
    new, v = after(lab.alternating(p.X, u, u), 1)
    return judge("Theorem 5 (App. C.2)", "z_{t+1} = M² z_t / (u_t·u_t v_t·v_t)",
                 "so it is for any v₀", off(new, z @ M @ M @ A.T / (lab.dot(u, u) * lab.dot(v, v))))


def ao_resolves(p: Problem, eta: float) -> Verdict:
    """AO's condition is GD's: what is left of 2c is all of it from tau0 = 0, nothing else."""
    enough = int(60 / np.log1p(2 * p.c * lab.tuned(p.c)["step"]))
    right = max(abs(left_of_saddle(p, name, tau0, enough) - (tau0 == 0))
                for name in ("gd", "ao") for tau0 in (0.0, 1e-3))
    return judge("AO resolves GD's limitation (Sec. 2.3, App. C.2)",
                 "z_t is guaranteed to converge to the largest eigenvector of M",
                 "if τ₀ ≠ 0, which is GD's condition, too; from τ₀ = 0 only rounding lets it out",
                 left_of_saddle(p, "ao", 0.0, enough), right, "false")


STATEMENTS = (gram_matrix, in_the_span, optimal_z, theorem_1, theorem_2, theorem_3, equation_4,
              lemma_1, equation_6, theorem_4, equation_7, theorem_5, ao_resolves)


def verdicts(c: float = 0.3, eta: float = 0.1) -> list[Verdict]:
    """All thirteen, in the paper's order; 0 < c < 1."""
    return [statement(lab.make_problem(c), eta) for statement in STATEMENTS]


def table(rows: list[Verdict]) -> str:
    """The verdicts as Markdown."""
    cells = [("statement", "as printed", "off by", "verdict", "in its right form", "off by")]
    cells += [(r.statement, r.printed, f"{r.off_printed:.0e}", f"**{r.verdict}**", r.corrected,
               f"{r.off_corrected:.0e}") for r in rows]
    return markdown(cells)


def main(arguments: list[str] | None = None) -> int:
    """Run the program; exit status 1 if a verdict could not be confirmed."""
    parser = make_parser("verdicts.py", __doc__.split("\n")[0])
    parser.add_argument("--c", type=number(float, 0.001, 0.99), default=0.3, help="a.b [0.3]")
    parser.add_argument("--eta", type=number(float, 1e-4, 10), default=0.1, help="GD's step [0.1]")
    rows = verdicts(**vars(parser.parse_args(arguments)))
    print(table(rows))
    return int(any(row.verdict == "not confirmed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
