"""The bilinear problem of "Beyond LLaVA-HD" (Sec. 2.3, App. C): each statement run, judged and explained.

    python theory/bilinear.py                      verdict table, race of the methods, figure out/bilinear.png
    python theory/bilinear.py --c .02 --init tied  the same for another problem and another start
    python theory/bilinear.py --check --mutants    every claim below checked, every check shown able to fail
    python theory/bilinear.py --exact              a start from which nothing escapes, in rational arithmetic
    python theory/bilinear.py --panel rank         one panel alone (here: the extension to rank r)

1  The problem. Unit vectors a, b with c = a.b make the target X = a b' + b a'; L(u, v) = |u v' - X|^2 / 2 is
   to be minimised. The paper reads u as the adapter and v as the compression layer and argues: gradient
   descent (GD) on both at once need not reach the optimum, alternating optimisation (AO: solve for v, then
   for u) must, so train in turns.

2  Two numbers rule everything. X has the eigenvectors p+- = (a +- b) / sqrt(2 lambda+-) with eigenvalues
   +-lambda+-, where lambda+- = 1 +- c, so its singular values are sigma1 = 1 + |c| and sigma2 = 1 - |c|. The
   optimum is the top singular pair (p1, q1); the second pair is a strict saddle, 2|c| higher. rho = sigma2 /
   sigma1 says how hard the two are to tell apart. In the paper's coordinates u = tau sqrt(lambda+) p+ + nu
   sqrt(lambda-) p-.

3  From the paper's start (Eq. 2: v0 is u0 with alpha and beta exchanged) GD keeps that symmetry and is u <-
   ((1 - eta |u|^2) I + eta |X|) u. Its continuous-time limit has a closed form (`flow`) in which tau / nu
   grows exactly as e^{2ct}. So the component along the optimum is never lost: GD fails if and only if tau0 =
   0 (c > 0), and AO fails from that start if and only if tau0 = 0, too. "Alternation resolves the limitation"
   is false as stated.

4  Every rate is one 2 x 2 matrix. Near the optimum or the saddle, each singular pair of X decouples, and an
   update moves (du, dv) by the fraction e towards r times the other: both at once (Jacobi) or one after the
   other (Gauss-Seidel). `pair_factors(e, r, sequential)` holds that matrix's eigenvalues; r = rho gives the
   tail, r = 1 / rho the escape, and e = eta sigma is GD, e = 1 is AO, e = omega is over-relaxed AO. AO beats
   the best GD step by a factor of 2 (c -> 0) to 3.2 (c = 1/2), both cost 1/c; over-relaxation and momentum
   cost 1/sqrt(c).

5  One exact sense in which order matters: v = -u (c > 0) is kept for ever by every update that treats u and v
   alike, and leads to the saddle; sequential updates leave it. A kick of 1e-6 does the same.

6  What else matters more than the order: the step under minibatch noise (`predicted_floor`: exact solves
   average nothing), momentum (it makes sequential updates the less stable ones, `heavy_ball`), and the
   conditioning of a fit of rank r, which least squares solves undo and gradient steps do not
   (`rank_iterations`).

Shapes: d = dimension; a leading "..." is any batch of starts. u, v: [..., d]; X: [d, d], symmetric;
everything float64. Only numpy is needed for the mathematics; matplotlib is imported when a figure is drawn
(bilinear_figure.py), the checks are in bilinear_checks.py.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import numpy as np

Pairs = Iterator[tuple[np.ndarray, np.ndarray]]   # an update: yields (u, v), each [..., d], the start first

W_PLUS, W_MINUS = np.array([1.0, 1.0]) / np.sqrt(2), np.array([1.0, -1.0]) / np.sqrt(2)


# ------------------------------------------------------------------------------------------------------------
# 1. The problem

@dataclass(frozen=True)
class Problem:
    """min |u v' - X|^2 / 2 with X = a b' + b a' (Sec. 2.3), built from c in [-1, 1] and orthonormal p+, p-:
    [d].

    Building a, b from p+- rather than p+- from a, b keeps c = +-1 well defined.
    """
    c: float
    p_plus: np.ndarray
    p_minus: np.ndarray

    @cached_property
    def lam(self) -> np.ndarray:
        """(lambda+, lambda-) = (1 + c, 1 - c): eigenvalues of M, and of |X|."""
        return np.array([1 + self.c, 1 - self.c])

    @cached_property
    def A(self) -> np.ndarray:
        """(a, b): [d, 2], unit columns with a.b = c."""
        plus, minus = np.sqrt(self.lam / 2)
        along, across = plus * self.p_plus, minus * self.p_minus
        return np.stack([along + across, along - across], axis=1)

    @cached_property
    def X(self) -> np.ndarray:
        """a b' + b a' = lambda+ p+ p+' - lambda- p- p-': [d, d]."""
        a, b = self.A.T
        return np.outer(a, b) + np.outer(b, a)

    @cached_property
    def M(self) -> np.ndarray:
        """A'A = [[1, c], [c, 1]], eigenvectors w+ = (1, 1)/sqrt 2 and w- = (1, -1)/sqrt 2."""
        return np.array([[1, self.c], [self.c, 1]])

    @cached_property
    def sigma(self) -> np.ndarray:
        """Singular values (sigma1, sigma2) = (1 + |c|, 1 - |c|)."""
        return np.array([1 + abs(self.c), 1 - abs(self.c)])

    @property
    def rho(self) -> float:
        """sigma2 / sigma1, in [0, 1]: 1 when the optimum is not unique."""
        return self.sigma[1] / self.sigma[0]

    @cached_property
    def pairs(self) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """Singular pairs ((p1, q1), (p2, q2)): (p+, p+) and (p-, -p-), the larger lambda first."""
        both = (self.p_plus, self.p_plus), (self.p_minus, -self.p_minus)
        return both if self.c >= 0 else both[::-1]

    @property
    def saddle_gap(self) -> float:
        """Loss at the saddle, (1 + |c|)^2 / 2, minus loss at the optimum, (1 - |c|)^2 / 2."""
        return 2 * abs(self.c)

    def loss(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """L(u, v) = |u v' - X|^2 / 2: [...]."""
        return 0.5 * ((u[..., :, None] * v[..., None, :] - self.X) ** 2).sum((-2, -1))

    def excess(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """L - min L: [...], without the cancellation of subtracting two losses of order one.

        With R = u v' - sigma1 p1 q1':  L - min L = |R|^2 / 2 - sigma2 p2' R q2, and both terms are small at
        the optimum.
        """
        (p1, q1), (p2, q2) = self.pairs
        residual = u[..., :, None] * v[..., None, :] - self.sigma[0] * np.outer(p1, q1)        # [..., d, d]
        return 0.5 * (residual ** 2).sum((-2, -1)) - self.sigma[1] * (u @ p2) * (v @ q2)

    def embed(self, tau: np.ndarray | float, nu: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        """Eq. 2's start: z = tau w+ + nu w-, u = A z, v = A (z, alpha and beta exchanged): [..., d] each."""
        plus = np.multiply.outer(np.asarray(tau, float) * np.sqrt(self.lam[0]), self.p_plus)
        minus = np.multiply.outer(np.asarray(nu, float) * np.sqrt(self.lam[1]), self.p_minus)
        return plus + minus, plus - minus

    def coordinates(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(tau, nu) of u's part in span(a, b): [...] each; needs |c| < 1."""
        return u @ self.p_plus / np.sqrt(self.lam[0]), u @ self.p_minus / np.sqrt(self.lam[1])


def make_problem(c: float, d: int = 10, seed: int = 0) -> Problem:
    """A Problem with random orthonormal p+, p- in R^d, d >= 2."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((d, 2)))
    return Problem(c, q[:, 0], q[:, 1])


def make_start(problem: Problem, init: str, tau0: float, seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts (u0, v0): [seeds, d] each.

    paper       Eq. 2 at the saddle plus tau0 along the optimum, in alternating sign
    generic     u0, v0 ~ N(0, I/d), independent
    tied        generic u0 and v0 = -u0 (c >= 0) or u0 (c < 0), so that s = 0 (`basin_side`)
    unbalanced  generic, u0 doubled and v0 halved
    """
    d = problem.p_plus.size
    u, v = np.random.default_rng(1).standard_normal((2, seeds, d)) / np.sqrt(d)
    if init == "paper":
        top, other = tau0 * (-1.0) ** np.arange(seeds), np.ones(seeds)
        return problem.embed(*((top, other) if problem.c >= 0 else (other, top)))
    if init == "tied":
        return u, -u if problem.c >= 0 else u.copy()
    return (u, v) if init == "generic" else (2 * u, v / 2)


# ------------------------------------------------------------------------------------------------------------
# 2. The updates: generators of (u, v); one iteration is two matrix-vector products unless said otherwise

def times(X: np.ndarray, v: np.ndarray) -> np.ndarray:
    """X v for a batch: [..., d]; X is symmetric, so this is X' v as well."""
    return v @ X


def square(u: np.ndarray) -> np.ndarray:
    """|u|^2: [..., 1]."""
    return (u * u).sum(-1, keepdims=True)


def gradients(X: np.ndarray, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(dL/du, dL/dv) = ((u v' - X) v, (v u' - X) u)."""
    return u * square(v) - times(X, v), v * square(u) - times(X, u)


def gradient_descent(X: np.ndarray, u: np.ndarray, v: np.ndarray, eta: float, balance: float = 0.0) -> Pairs:
    """Simultaneous GD, Eq. 1; `balance` adds the gradient of balance (|u|^2 - |v|^2)^2 / 4."""
    while True:
        yield u, v
        du, dv = gradients(X, u, v)
        imbalance = balance * (square(u) - square(v)) if balance else 0.0
        u, v = u - eta * (du + imbalance * u), v - eta * (dv - imbalance * v)


def blocks(X: np.ndarray, u: np.ndarray, v: np.ndarray, eta: float, k: int = 1) -> Pairs:
    """k gradient steps on u, then k on v. k = 1 is sequential (Gauss-Seidel) GD; 2k products per yield."""
    while True:
        yield u, v
        for _ in range(k):
            u = u - eta * (u * square(v) - times(X, v))
        for _ in range(k):
            v = v - eta * (v * square(u) - times(X, u))


def alternating(X: np.ndarray, u: np.ndarray, v: np.ndarray, omega: float = 1.0) -> Pairs:
    """AO (App. C.2): solve for v, then for u; omega != 1 moves omega of the way (over- or under-relaxation).

    The exact solve v = X u / |u|^2 is one gradient step in v with step 1 / |u|^2. Yields u_t with the v
    solved from it, so the given v is used only where omega != 1.
    """
    v = (1 - omega) * v + omega * times(X, u) / square(u)
    while True:
        yield u, v
        u = (1 - omega) * u + omega * times(X, v) / square(v)
        v = (1 - omega) * v + omega * times(X, u) / square(u)


def scaled_gradient_descent(X: np.ndarray, u: np.ndarray, v: np.ndarray, eta: float) -> Pairs:
    """GD preconditioned by the other factor's Gram matrix, here 1 / |v|^2 and 1 / |u|^2 (ScaledGD; Tong et
    al. 2021).
    """
    while True:
        yield u, v
        du, dv = gradients(X, u, v)
        u, v = u - eta * du / square(v), v - eta * dv / square(u)


def heavy_ball(X: np.ndarray, u: np.ndarray, v: np.ndarray, eta: float, beta: float,
               sequential: bool = False) -> Pairs:
    """GD with momentum beta (Polyak 1964); sequential: v's gradient is taken at the new u.

    Momentum turns the order of stability round. At the optimum, in its own direction, with e = eta sigma1,
    the sum s = du + dv obeys z^2 - (1 + beta - 2 e) z + beta = 0 per simultaneous step, stable for e < 1 +
    beta, and (z - 1)(z^2 - beta) + e z^2 = 0 per sequential half-step, where z = -1 is a root at e = 2 (1 -
    beta): the wider limit of the two for beta < 1/3, a tenth of the other for beta = .9.
    """
    u_step, v_step = np.zeros_like(u), np.zeros_like(v)
    while True:
        yield u, v
        du, dv = gradients(X, u, v)
        u_step = beta * u_step - eta * du
        u = u + u_step
        v_step = beta * v_step - eta * (gradients(X, u, v)[1] if sequential else dv)
        v = v + v_step


def adam(X: np.ndarray, u: np.ndarray, v: np.ndarray, eta: float) -> Pairs:
    """Adam with its usual constants (Kingma and Ba 2015): beta1 .9, beta2 .999, epsilon 1e-8."""
    w, mean, second = np.stack([u, v]), 0.0, 0.0                               # w: [2, ..., d]
    for t in itertools.count(1):
        yield w[0], w[1]
        g = np.stack(gradients(X, w[0], w[1]))
        mean, second = 0.9 * mean + 0.1 * g, 0.999 * second + 0.001 * g * g
        w = w - eta * (mean / (1 - 0.9 ** t)) / (np.sqrt(second / (1 - 0.999 ** t)) + 1e-8)


def staged(X: np.ndarray, u: np.ndarray, v: np.ndarray, eta: float, first: int, second: int) -> Pairs:
    """The paper's recipe in this model: I, `first` steps on u alone; II, `second` on v alone; III, both.

    first and second even, so that each yield of I and II is two products, as one of III is.
    """
    for t in range((first + second) // 2):
        yield u, v
        for _ in range(2):
            if 2 * t < first:
                u = u - eta * (u * square(v) - times(X, v))
            else:
                v = v - eta * (v * square(u) - times(X, u))
    yield from gradient_descent(X, u, v, eta)


def kicked(u: np.ndarray, size: float = 1e-6) -> np.ndarray:
    """u plus a fixed random vector of length about `size`: enough to leave any set of measure zero."""
    return u + size * np.random.default_rng(2).standard_normal(u.shape) / np.sqrt(u.shape[-1])


def trajectory(update: Pairs, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The first steps + 1 pairs of an update: U, V [steps + 1, ..., d]."""
    pairs = list(itertools.islice(update, steps + 1))
    return np.stack([u for u, _ in pairs]), np.stack([v for _, v in pairs])


def after(update: Pairs, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The pair after `steps` iterations."""
    return next(itertools.islice(update, steps, None))


def tuned(c: float) -> dict[str, float]:
    """Best constants for a known c != 0, from the pair matrices of section 4.

    gd = 1 / (1 + 2|c|) equalises the factors 1 - 2|c| eta and 2 sigma1 eta - 1; omega is Young's for Jacobi
    radius rho; ball_* are Polyak's for Hessian eigenvalues between 2|c| and 2 sigma1.
    """
    c = abs(c)
    low, high, rho = np.sqrt(2 * c), np.sqrt(2 * (1 + c)), (1 - c) / (1 + c)
    return {"gd": 1 / (1 + 2 * c), "omega": 2 / (1 + np.sqrt(1 - rho * rho)), "scaled": 2 / (3 - rho),
            "ball_eta": (2 / (low + high)) ** 2, "ball_beta": ((high - low) / (high + low)) ** 2}


@dataclass(frozen=True)
class Method:
    """An entry of the race: `run(problem, u, v, eta)` yields pairs, each worth `cost` iterations of two
    products.
    """
    label: str
    run: Callable[[Problem, np.ndarray, np.ndarray, float], Pairs]
    cost: int = 1


METHODS = {                                        # * = tuned knowing c; "eta" = the command line's step
    "gd": Method("GD, eta", lambda p, u, v, eta: gradient_descent(p.X, u, v, eta)),
    "gd-tuned": Method("GD, best step*", lambda p, u, v, _: gradient_descent(p.X, u, v, tuned(p.c)["gd"])),
    "sequential": Method("sequential GD, 1/sigma1*", lambda p, u, v, _: blocks(p.X, u, v, 1 / p.sigma[0])),
    "blocks": Method("blocks of 10 GD steps, eta", lambda p, u, v, eta: blocks(p.X, u, v, eta, 10), cost=10),
    "stages": Method("I 200, II 200, III: GD, eta", lambda p, u, v, eta: staged(p.X, u, v, eta, 200, 200)),
    "ao": Method("AO", lambda p, u, v, _: alternating(p.X, u, v)),
    "over-relaxed": Method("over-relaxed AO*", lambda p, u, v, _: alternating(
        p.X, u, v, tuned(p.c)["omega"])),
    "scaled": Method("scaled GD, 1/2", lambda p, u, v, _: scaled_gradient_descent(p.X, u, v, 0.5)),
    "heavy-ball": Method("heavy ball*", lambda p, u, v, _: heavy_ball(
        p.X, u, v, tuned(p.c)["ball_eta"], tuned(p.c)["ball_beta"])),
    "adam": Method("Adam, 0.01", lambda p, u, v, _: adam(p.X, u, v, 0.01)),
    "balance": Method("GD + balance term, eta", lambda p, u, v, eta: gradient_descent(p.X, u, v, eta, 1.0)),
    "kick": Method("GD + 1e-6 kick, eta", lambda p, u, v, eta: gradient_descent(p.X, kicked(u), v, eta)),
}


# ------------------------------------------------------------------------------------------------------------
# 3. What is really going on

def flow(c: float, tau0: np.ndarray, nu0: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Closed form of Eq. 6, tau' = (lambda+ - n) tau, nu' = (lambda- - n) nu, n = lambda+ tau^2 + lambda-
    nu^2.

    Put tau = tau0 e^{lambda+ t} / Delta, nu = nu0 e^{lambda- t} / Delta: both equations become Delta' / Delta
    = n, that is (Delta^2)' = 2 lambda+ tau0^2 e^{2 lambda+ t} + 2 lambda- nu0^2 e^{2 lambda- t}, which
    integrates to Delta^2 = 1 + tau0^2 (e^{2 lambda+ t} - 1) + nu0^2 (e^{2 lambda- t} - 1). Arguments
    broadcast.
    """
    plus, minus = (1 + c) * t, (1 - c) * t
    delta = np.sqrt(1 + tau0 ** 2 * np.expm1(2 * plus) + nu0 ** 2 * np.expm1(2 * minus))
    return tau0 * np.exp(plus) / delta, nu0 * np.exp(minus) / delta


def flow_field(c: float, tau: np.ndarray, nu: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Right-hand side of Eq. 6."""
    n = (1 + c) * tau ** 2 + (1 - c) * nu ** 2
    return (1 + c - n) * tau, (1 - c - n) * nu


@dataclass(frozen=True)
class FixedPoint:
    """A fixed point of Eq. 6 for 0 < c < 1, its loss, its eigenvalues in (tau, nu), and those of L's Hessian:
    [2d].
    """
    tau: float
    nu: float
    kind: str
    loss: float
    reduced: tuple[float, float]
    hessian: np.ndarray


def fixed_points(c: float, d: int) -> list[FixedPoint]:
    """The five of 0 < c < 1. (Theorem 4 names two; c < 0 exchanges tau and nu; c = 0 gives 0 and the unit
    circle.)

    At a rescaled singular pair u = sqrt(s) p, v = sqrt(s) q the Hessian is [[s I, B], [B', s I]] with B = u
    v' + (u v' - X): its own pair gives 2s and 0 (the rescaling u -> k u, v -> v / k), the other pair s +- s',
    all else s twice.
    """
    hi, lo = 1 + c, 1 - c
    origin = np.array([hi, -hi, lo, -lo] + [0.0] * (2 * d - 4))
    best = np.array([2 * hi, 0, 2, 2 * c] + [hi] * (2 * d - 4))
    saddle = np.array([2 * lo, 0, 2, -2 * c] + [lo] * (2 * d - 4))
    return ([FixedPoint(0, 0, "source", 1 + c * c, (hi, lo), origin)]
            + [FixedPoint(s, 0, "optimum", lo * lo / 2, (-2 * hi, -2 * c), best) for s in (1, -1)]
            + [FixedPoint(0, s, "saddle", hi * hi / 2, (2 * c, -2 * lo), saddle) for s in (1, -1)])


def basin_side(problem: Problem, u: np.ndarray, v: np.ndarray, theta: float | None = None) -> np.ndarray:
    """s = p1.u + theta q1.v: [...]. Gradient flow from any (u, v), c != 0, reaches the optimum if and only if
    s != 0.

    D = |u|^2 - |v|^2 is conserved. For theta = (-D + sqrt(D^2 + 4 sigma1^2)) / (2 sigma1), the positive root
    of sigma1 theta^2 + D theta = sigma1, the flow gives s' = (sigma1 theta - |v|^2) s: the sign of s is kept,
    and at every other critical point the bracket is positive (at the saddle it is `escape_rate`), so s != 0
    cannot end there. On Eq. 2's orbits D = 0, theta = 1 and s = 2 p1.u: the condition is tau != 0 for GD and
    AO alike.
    """
    (p1, q1), _ = problem.pairs
    if theta is None:
        imbalance, s1 = (square(u) - square(v))[..., 0], problem.sigma[0]
        theta = (-imbalance + np.sqrt(imbalance ** 2 + 4 * s1 ** 2)) / (2 * s1)
    return u @ p1 + theta * (v @ q1)


def escape_rate(problem: Problem, imbalance: float) -> float:
    """Rate at which the flow leaves the saddle with |u|^2 - |v|^2 = imbalance; 2|c| at 0, less elsewhere."""
    s1, s2 = problem.sigma
    return (np.sqrt(imbalance ** 2 + 4 * s1 ** 2) - np.sqrt(imbalance ** 2 + 4 * s2 ** 2)) / 2


def integrate_flow(problem: Problem, u: np.ndarray, v: np.ndarray, time: float, step: float = 0.05) -> \
        tuple[np.ndarray, np.ndarray]:
    """Gradient flow of L by the classical Runge-Kutta scheme of order four: [..., d] each."""
    w = np.stack([u, v])                                                                       # [2, ..., d]

    def field(w: np.ndarray) -> np.ndarray:
        return -np.stack(gradients(problem.X, w[0], w[1]))

    for _ in range(round(time / step)):
        k1 = field(w)
        k2 = field(w + step / 2 * k1)
        k3 = field(w + step / 2 * k2)
        w = w + step / 6 * (k1 + 2 * k2 + 2 * k3 + field(w + step * k3))
    return w[0], w[1]


# ------------------------------------------------------------------------------------------------------------
# 4. Rates

def pair_factors(e: float, r: float, sequential: bool) -> np.ndarray:
    """Eigenvalues (largest modulus first) of one iteration on one singular pair: [2].

    Simultaneous: du <- (1 - e) du + e r dv, dv <- (1 - e) dv + e r du (old du), eigenvalues 1 - e +- e r.
    Sequential: the second line uses the new du; g^2 - (2 (1 - e) + e^2 r^2) g + (1 - e)^2 = 0. Here s = |u|^2
    = |v|^2 is the singular value of the point, r = s' / s for the pair with value s', and e the share of the
    way to the solve: eta s for GD, 1 - (1 - eta s)^k for k steps, 1 for AO, omega, or scaled GD's eta.
    """
    if not sequential:
        roots = np.array([1 - e + e * r, 1 - e - e * r])
    else:
        roots = np.roots([1, -(2 * (1 - e) + (e * r) ** 2), (1 - e) ** 2])
    return roots[np.argsort(-np.abs(roots))]


def rates(c: float, eta: float, k: int = 10) -> dict[str, tuple[float, float]]:
    """Per method: (tail factor at the optimum, escape factor at the balanced saddle) per yield, 0 < |c| < 1.

    The tail is the largest modulus over the pairs r = rho, r = 1 (less its neutral eigenvalue 1, the
    rescaling) and r = 0 (directions outside span(a, b)). It is the factor of the distance; the excess loss
    falls with its square.
    """
    s1, s2 = 1 + abs(c), 1 - abs(c)
    rho, best = s2 / s1, tuned(c)

    def both(share: Callable[[float], float], sequential: bool) -> tuple[float, float]:
        e = share(s1)
        neutral_partner = (1 - e) ** 2 if sequential else abs(1 - 2 * e)
        tail = max(abs(pair_factors(e, rho, sequential)[0]), neutral_partner, abs(1 - e))
        return tail, abs(pair_factors(share(s2), 1 / rho, sequential)[0])

    beta, growth = best["ball_beta"], 1 + best["ball_beta"] + 2 * abs(c) * best["ball_eta"]
    return {"gd": both(lambda s: eta * s, False), "gd-tuned": both(lambda s: best["gd"] * s, False),
            "sequential": both(lambda s: s / s1, True),
            "blocks": both(lambda s: 1 - (1 - eta * s) ** k, True),
            "ao": both(lambda s: 1.0, True), "over-relaxed": both(lambda s: best["omega"], True),
            "scaled": both(lambda s: 0.5, False),
            "heavy-ball": (np.sqrt(beta), (growth + np.sqrt(growth ** 2 - 4 * beta)) / 2)}


def fitted_factor(values: np.ndarray) -> float:
    """Dominant factor of a sequence [T] made of at most two geometric modes (Prony's method); NaN if T < 5.

    Least squares for x_{t+2} = s x_{t+1} - q x_t, each equation scaled by its own size; the larger root's
    modulus.
    """
    if len(values) < 5:
        return float("nan")                                 # too fast to fit
    rows = np.stack([values[1:-1], -values[:-2]], axis=1) / np.abs(values[2:, None])
    s, q = np.linalg.lstsq(rows, np.sign(values[2:]), rcond=1e-4)[0]
    return float(np.abs(np.roots([1, -s, q])).max())


def measured_rates(problem: Problem, name: str, eta: float) -> tuple[float, float]:
    """(tail, escape) of METHODS[name], fitted to runs from 1e-4 off the optimum, 1e-9 off the saddle."""
    (p1, q1), (p2, q2) = problem.pairs
    s1, s2 = np.sqrt(problem.sigma)

    def run(u: np.ndarray, v: np.ndarray, over: np.ndarray, under: np.ndarray, low: float,
            high: float) -> float:
        values = []
        for u, _ in itertools.islice(METHODS[name].run(problem, u, v, eta), 2, 4000):
            ratio = (u @ over) / (u @ under)
            if not low < abs(ratio) < high:
                break
            values.append(ratio)
        return fitted_factor(np.array(values))

    tail = run(s1 * p1 + 1e-4 * p2, s1 * q1 + 1e-4 * q2, p2, p1, 1e-11, 1)
    return tail, run(s2 * p2 + 1e-9 * p1, s2 * q2 + 1e-9 * q1, p1, p2, 1e-12, 1e-4)


def iterations_to(problem: Problem, name: str, u: np.ndarray, v: np.ndarray, eta: float, excess: float = 1e-8,
                  limit: int = 20_000) -> np.ndarray:
    """Iterations until L - min L <= excess: [batch], inf if `limit` or a rest is first. u, v: [batch, d]."""
    count = np.full(len(u), np.inf)
    method = METHODS[name]
    with np.errstate(all="ignore"):                 # a diverging run overflows: it counts as not arriving
        for t, (u, v) in enumerate(method.run(problem, u, v, eta)):
            now = problem.excess(u, v)
            count[(now <= excess) & np.isinf(count)] = t * method.cost
            waiting = np.isinf(count) & np.isfinite(now)
            if t * method.cost >= limit or not waiting.any():
                return count
            if t % 100 == 99 and max(np.abs(g[waiting]).max() for g in gradients(problem.X, u, v)) < 1e-13:
                return count                        # at rest at a point that is not the optimum


# ------------------------------------------------------------------------------------------------------------
# 5. The paper's statements, one function each: the correct form beside what is printed, and both measured

HOLDS, START, FALSE = "holds", "holds from Eq. 2's start", "false as stated"
TOLERANCE = 1e-9            # an identity holds if below this; rounding in the runs here stays under 1e-11


@dataclass(frozen=True)
class Setting:
    """What the command line chooses: the problem (c, d), GD's step, the start's tau0, and the number of
    random starts.
    """
    c: float = 0.3
    eta: float = 0.1
    tau0: float = 1e-6
    d: int = 10
    seeds: int = 5

    def problem(self) -> Problem:
        """The problem of this setting."""
        return make_problem(self.c, self.d)


@dataclass(frozen=True)
class Verdict:
    """One row of the table. `error`: of the correct form; `printed`: of the statement read as printed, and
    widely.
    """
    statement: str
    verdict: str
    error: float
    printed: float
    note: str


def judge(statement: str, error: float, printed: float, note: str, *, weaker: str = FALSE,
          tolerance: float = TOLERANCE) -> Verdict:
    """The verdict follows from the two errors alone: nothing here is decided in advance but the name of
    `weaker`.
    """
    verdict = "not confirmed" if not error <= tolerance else HOLDS if printed <= tolerance else weaker
    return Verdict(statement, verdict, float(error), float(printed), note)


def gap(x: np.ndarray, y: np.ndarray) -> float:
    """Largest |x - y|, relative to max(1, |y|)."""
    return float((np.abs(x - y) / np.maximum(1, np.abs(y))).max())


def gram_line(setting: Setting) -> Verdict:
    """Correct: X = a b' + b a' and XX' = A M A', so XX' A = A M^2: M's eigenvectors, its eigenvalues squared.

    Printed: factors (a b' + b'a)(b a' + a'b), a matrix plus a number; and XX' is then used as if it acted on
    z as M does.
    """
    p = setting.problem()
    error = max(gap(p.X @ p.X, p.A @ p.M @ p.A.T), gap(p.X @ p.X @ p.A, p.A @ p.M @ p.M))
    printed = np.linalg.norm(p.X @ p.X @ p.A - p.A @ p.M)
    return judge("XX' = A M A', acting as M", error, printed, "acts on z as M^2; both printed factors are X")


def largest_eigenvector(setting: Setting) -> Verdict:
    """Correct: the best rank one along A w, with w = w+ for c > 0, w- for c < 0, any w for c = 0.

    Printed: lambda+ = 1 + a.b is the largest eigenvalue of M, so w+ it is. Measured as excess loss, at c and
    at -c.
    """
    def excess(problem: Problem, direction: int) -> float:
        u, v = problem.embed(*np.eye(2)[direction])
        return abs(problem.excess(u, v))

    both = [make_problem(c, setting.d) for c in (setting.c, -setting.c)]
    error = max(excess(p, 0 if p.c >= 0 else 1) for p in both)
    return judge("the optimum lies along w+", error, max(excess(p, 0) for p in both),
                 "for c > 0; along w- for c < 0, where w+ costs what stands beside it")


def in_the_span(setting: Setting) -> Verdict:
    """Correct: true of the optimum, and of AO after half a sweep; GD shrinks the part outside by 1 - eta
    |v|^2 a step.

    Printed: "u has to lie in span(a, b)", used for iterates. Measured: share of u outside after 20 GD steps.
    """
    p = setting.problem()
    outside = np.eye(setting.d) - np.outer(p.p_plus, p.p_plus) - np.outer(p.p_minus, p.p_minus)
    u, v = make_start(p, "generic", 0, setting.seeds)
    U, V = trajectory(gradient_descent(p.X, u, v, setting.eta), 20)
    predicted = (u @ outside) * np.prod(1 - setting.eta * square(V[:-1]), axis=0)
    solved = after(alternating(p.X, u, v), 1)[0] @ outside
    share = np.sqrt(square(U[-1] @ outside) / square(U[-1])).max()
    return judge("u lies in span(a, b)", max(gap(U[-1] @ outside, predicted), np.abs(solved).max()), share,
                 "true of AO's iterates; GD's rest decays by 1 - eta v.v")


def eq2_starts(setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    """Random (tau0, nu0) of order one: [seeds] each."""
    return tuple(np.random.default_rng(3).uniform(-1, 1, (2, setting.seeds)))


def theorem_3_orbit(p: Problem, tau: np.ndarray, nu: np.ndarray, eta: float, steps: int,
                    lost_eta: bool = False) -> np.ndarray:
    """z_t of Eq. 3, t = 0..steps: [steps + 1, seeds, 2]. `lost_eta` drops the eta before a.b alpha, as the
    proof does.
    """
    orbit = [np.stack([tau, nu], axis=-1) @ np.stack([W_PLUS, W_MINUS])]
    across = np.array([[0, 1 if lost_eta else eta], [eta, 0]]) * p.c          # row: from, column: to
    for _ in range(steps):
        z = orbit[-1]
        n = np.einsum("si,ij,sj->s", z, p.M, z)[:, None]                     # |u|^2 by Eq. 4: [seeds, 1]
        orbit.append((1 + eta * (1 - n)) * z + z @ across)
    return np.stack(orbit)


def theorem_3(setting: Setting, steps: int = 200) -> Verdict:
    """Correct, for every eta: from v0 = S u0 (Eq. 2; S exchanges alpha and beta) u_t = A z_t, v_t = S u_t,
    |u_t| = |v_t|, z_{t+1} = F_t z_t with F_t = (1 - eta |u_t|^2) I + eta M. Any other v0 breaks it.

    Printed: v_0 for v_t in the statement and in the update, and no eta before a.b alpha in the proof's
    b-coefficients.
    """
    p, eta = setting.problem(), setting.eta
    tau, nu = eq2_starts(setting)
    u, v = start = p.embed(tau, nu)
    U, V = trajectory(gradient_descent(p.X, u, v, eta), steps)
    wild, _ = trajectory(gradient_descent(p.X, u, make_start(p, "generic", 0, setting.seeds)[1], eta), steps)
    Z = theorem_3_orbit(p, tau, nu, eta, steps)
    error = max(gap(U, Z @ p.A.T), gap(V, Z[..., ::-1] @ p.A.T), gap(square(U), square(V)))
    for _ in range(steps):                                                   # the update with v_0, as printed
        u, v = (u - eta * (u * (v * start[1]).sum(-1, keepdims=True) - times(p.X, start[1])),
                v - eta * gradients(p.X, u, v)[1])
    lost = gap(theorem_3_orbit(p, tau, nu, eta, steps, lost_eta=True) @ p.A.T, U)
    note = f"any eta; misprints: v_0 for v_t (off by {gap(u, U[-1]):.2g}), an eta lost ({lost:.2g})"
    return judge("Theorem 3: z_{t+1} = F_t z_t", error, gap(wild, Z @ p.A.T), note, weaker=START)


def equation_4(setting: Setting) -> Verdict:
    """As printed: |u|^2 = lambda+ tau^2 + lambda- nu^2 for every u = A z, because w+- are eigenvectors of A'A
    = M.
    """
    p = setting.problem()
    tau, nu = eq2_starts(setting)
    error = gap(square(p.embed(tau, nu)[0])[..., 0], p.lam[0] * tau ** 2 + p.lam[1] * nu ** 2)
    return judge("Eq. 4: u.u in tau, nu", error, error, "algebra")


def lemma_1(setting: Setting, steps: int = 200) -> Verdict:
    """As printed, from Eq. 2's start: tau <- (1 + eta (lambda+ - |u|^2)) tau, nu <- (1 + eta (lambda- -
    |u|^2)) nu.
    """
    p = setting.problem()
    tau, nu = eq2_starts(setting)
    start = p.embed(tau, nu)
    U, _ = trajectory(gradient_descent(p.X, *start, setting.eta), steps)
    generic = make_start(p, "generic", 0, setting.seeds)[1]
    wild, _ = trajectory(gradient_descent(p.X, start[0], generic, setting.eta), steps)
    lemma = []
    for _ in range(steps + 1):
        lemma.append(p.embed(tau, nu)[0])
        n = p.lam[0] * tau ** 2 + p.lam[1] * nu ** 2
        tau, nu = (1 + setting.eta * (p.lam[0] - n)) * tau, (1 + setting.eta * (p.lam[1] - n)) * nu
    lemma = np.stack(lemma)
    return judge("Lemma 1: tau, nu step by step", gap(U, lemma), gap(wild, lemma),
                 "Theorem 3 in M's eigenvectors", weaker=START)


def discretisation_errors(c: float, etas: np.ndarray, time: float = 1.0,
                          midpoint: bool = False) -> np.ndarray:
    """|GD at eta, after time / eta steps, minus `flow`| from one Eq. 2 start: [len(etas)].

    `midpoint` takes the gradient half a step ahead instead, an integrator of order two.
    """
    p, tau0, nu0 = make_problem(c, 4), np.array([0.3]), np.array([0.6])
    exact, errors = p.embed(*flow(c, tau0, nu0, time))[0], []
    for eta in etas:
        u, v = p.embed(tau0, nu0)
        for _ in range(round(time / eta)):
            du, dv = gradients(p.X, u, v)
            if midpoint:
                du, dv = gradients(p.X, u - eta / 2 * du, v - eta / 2 * dv)
            u, v = u - eta * du, v - eta * dv
        errors.append(np.abs(u - exact).max())
    return np.array(errors)


def slopes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Slopes of log y over log x between neighbours: [len(x) - 1]."""
    return np.diff(np.log(y)) / np.diff(np.log(x))


def equation_6(setting: Setting) -> Verdict:
    """Correct: with t = eta k, GD from Eq. 2's start tends to the flow as eta -> 0, its error falling with
    eta^1.

    Printed: "when eta is very small" the two can be written alike. Error: |order - 1|, at steps 1/40 to
    1/320.
    """
    etas = 0.025 / 2.0 ** np.arange(4)
    error = np.abs(slopes(etas, discretisation_errors(setting.c, etas)) - 1).max()
    return judge("Eq. 6: the ODE of GD", error, error,
                 "as eta -> 0; error = fitted order in eta, less 1", tolerance=0.03)


def equation_7(setting: Setting) -> Verdict:
    """As printed: d|u|^2/dt = 2 (1 - n) n + 2c (lambda+ tau^2 - lambda- nu^2), n = |u|^2. An identity implied
    by Eq. 6, so "combining" the two, as the proof of Theorem 4 does, adds nothing.
    """
    c, (tau, nu) = setting.c, eq2_starts(setting)
    dtau, dnu = flow_field(c, tau, nu)
    n = (1 + c) * tau ** 2 + (1 - c) * nu ** 2
    chain = 2 * (1 + c) * tau * dtau + 2 * (1 - c) * nu * dnu
    error = gap(2 * (1 - n) * n + 2 * c * ((1 + c) * tau ** 2 - (1 - c) * nu ** 2), chain)
    return judge("Eq. 7: d(u.u)/dt", error, error, "an identity: says nothing that Eq. 6 does not")


def newton_fixed_points(c: float, starts: int = 500) -> np.ndarray:
    """Zeros of `flow_field` found by Newton's method from random starts in [-1.5, 1.5]^2: [found, 2]."""
    tau, nu = np.random.default_rng(4).uniform(-1.5, 1.5, (2, starts))
    hi, lo = 1 + c, 1 - c
    for _ in range(200):
        n = hi * tau ** 2 + lo * nu ** 2
        f, g = flow_field(c, tau, nu)
        ft, fn = hi - n - 2 * hi * tau ** 2, -2 * lo * tau * nu
        gt, gn = -2 * hi * tau * nu, lo - n - 2 * lo * nu ** 2
        det = ft * gn - fn * gt
        det = np.where(np.abs(det) < 1e-300, 1e-300, det)
        tau, nu = tau - (gn * f - fn * g) / det, nu - (ft * g - gt * f) / det
    good = np.hypot(*flow_field(c, tau, nu)) < 1e-12
    return np.stack([tau[good], nu[good]], axis=1)


def set_distance(found: np.ndarray, claimed: np.ndarray) -> float:
    """Hausdorff distance of two finite sets of points, [n, 2] and [m, 2]: 0 when they are the same set."""
    table = np.linalg.norm(found[:, None] - claimed[None], axis=-1)                            # [n, m]
    return float(max(table.min(1).max(), table.min(0).max()))


def theorem_4(setting: Setting) -> Verdict:
    """Correct, 0 < |c| < 1: five fixed points, 0, (+-1, 0), (0, +-1); for c > 0 and tau0 != 0 the limit is
    (sign tau0, 0), the four others attract only tau0 = 0 or nothing. c = 0: the origin and the unit circle.
    |c| = 1: one coordinate is free.

    Printed: two limits, (1, 0) and (0, 1), as if equals; the proof drops the signs and u* = 0 and prints v*
    for nu*.
    """
    c = setting.c
    claimed = np.array([[1.0, 0], [0, 1]])
    if c == 0 or abs(c) == 1:
        found = newton_fixed_points(c)
        found = found[np.abs(found).max(1) < 1.5]           # |c| = 1: a whole line of fixed points
        radius, seen, unseen = np.hypot(*found.T), found[:, 0 if c == 1 else 1], found[:, 1 if c == 1 else 0]
        off = (np.minimum(radius, np.abs(radius - 1)) if c == 0                       # 0 or the circle
               else np.minimum(np.abs(seen), np.hypot(np.abs(seen) - 1, unseen)))     # the line or two points
        return judge("Theorem 4: the limits of Eq. 6", off.max(), set_distance(found, claimed),
                     "c = 0: a circle and the origin" if c == 0 else "c = +-1: a line and two points")
    found = newton_fixed_points(c)
    five = np.array([[f.tau, f.nu] for f in fixed_points(abs(c), 2)])
    return judge("Theorem 4: the limits of Eq. 6", set_distance(found, five), set_distance(found, claimed),
                 "five fixed points (Newton from 500 starts); one kind attracts")


def stuck(problem: Problem, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether the loss is still at or above the saddle's: [...]. GD lowers it, so once below, only the
    optimum is left.
    """
    return problem.excess(u, v) >= 0.999 * problem.saddle_gap if problem.c else problem.excess(u, v) > 1e-6


def theorem_1(setting: Setting) -> Verdict:
    """Correct: GD "does not necessarily converge to the optimum" (exactly so from tau0 = 0), but the starts
    that fail form a null set: s = 0 of `basin_side`; or eta or the start is too large. True, and it does not
    set GD apart from AO.

    Measured: share of 300 generic starts that fail, and the excess loss that remains from Eq. 2's start with
    tau0 = 0.
    """
    p = setting.problem()
    u, v = make_start(p, "generic", 0, 300)
    left = np.ones(len(u), bool)
    for t, (u, v) in enumerate(gradient_descent(p.X, u, v, 0.4 / p.sigma[0])):
        if t % 50 == 0:
            left = stuck(p, u, v)
        if t == 10_000 or not left.any():
            break
    u, v = after(gradient_descent(p.X, *make_start(p, "paper", 0.0, 1), 0.4 / p.sigma[0]), 20)
    remains = float(p.excess(u, v)[0])
    exists = remains > 1e-6 or p.c == 0         # it needs one start that fails; at c = 0 no limit is wrong
    return Verdict("Theorem 1: GD need not converge", HOLDS if exists and not left.any() else "not confirmed",
                   float(left.mean()), remains, "misleading: 0 of 300 random starts fail, only tau0 = 0 does"
                   .replace("0 of", f"{left.sum()} of", 1))


def alternating_errors(setting: Setting, power: int = 2, steps: int = 20) -> tuple[float, float]:
    """AO against (direction of M^{2t} z0, the recursion z <- M^power z / (|u|^2 |v|^2)); relative errors."""
    p = setting.problem()
    tau, nu = eq2_starts(setting)
    u, v = p.embed(tau, nu)[0], make_start(p, "generic", 0, setting.seeds)[1]
    z = np.stack([tau, nu], axis=-1) @ np.stack([W_PLUS, W_MINUS])                             # [seeds, 2]
    axis, recursion, direction = z, 0.0, 0.0
    for u, v in itertools.islice(alternating(p.X, u, v), steps):
        recursion = max(recursion, gap(u, z @ p.A.T))
        ray = axis @ p.A.T
        direction = max(direction, gap(u / np.sqrt(square(u)), ray / np.sqrt(square(ray))))
        z = z @ np.linalg.matrix_power(p.M, power) / (square(u) * square(v))
        axis = axis @ np.linalg.matrix_power(p.M, power)
        axis = axis / np.sqrt(square(axis))
    return direction, recursion


def theorem_2(setting: Setting) -> Verdict:
    """As printed, for any v0 (AO never reads it) and X u_t != 0: z_t is proportional to M^{2t} z0."""
    direction, _ = alternating_errors(setting)
    return judge("Theorem 2: z_t ~ M^{2t} z0", direction, direction, "any v0; power iteration on M^2")


def theorem_5(setting: Setting) -> Verdict:
    """As printed: z_{t+1} = M^2 z_t / (|u_t|^2 |v_t|^2), v_t solved from u_t. The limit is kappa w with kappa
    != 1 in general: AO keeps whatever imbalance the start had.
    """
    _, recursion = alternating_errors(setting)
    return judge("Theorem 5: AO's recursion", recursion, recursion, "any v0; the limit is kappa w, not w")


def exact_run(c: Fraction, eta: Fraction, tau0: Fraction, steps: int) -> list[tuple[Fraction, Fraction]]:
    """(p1-coordinate of GD, of AO) in rational arithmetic from Eq. 2's start, t = 0..steps, both scaled by
    sqrt 2.

    Vectors live in the coordinates of a and b: u = A z, v = A y, inner products z' M y, X v = A (M y,
    exchanged), so no step uses the statements under test. Here z0 = (tau0 + 1, tau0 - 1), which is sqrt 2
    (tau0 w+ + w-); c > 0.
    """
    def dot(z: tuple, y: tuple) -> Fraction:
        return z[0] * y[0] + z[1] * y[1] + c * (z[0] * y[1] + z[1] * y[0])

    def target(y: tuple) -> tuple:
        return c * y[0] + y[1], y[0] + c * y[1]

    def plus(s: Fraction, z: tuple, t: Fraction, y: tuple) -> tuple:
        return s * z[0] + t * y[0], s * z[1] + t * y[1]

    z = (tau0 + 1, tau0 - 1)
    y, x, rows = z[::-1], z, []
    for _ in range(steps + 1):
        rows.append(((z[0] + z[1]) / 2, (x[0] + x[1]) / 2))
        z, y = (plus(1 - eta * dot(y, y), z, eta, target(y)), plus(1 - eta * dot(z, z), y, eta, target(z)))
        w = target(x)                                       # AO: v = X u / |u|^2, u = X v / |v|^2
        w = (w[0] / dot(x, x), w[1] / dot(x, x))
        x = tuple(value / dot(w, w) for value in target(w))
    return rows


def alternation_resolves(setting: Setting) -> Verdict:
    """Correct: AO reaches the optimum if and only if p1.u0 != 0, from Eq. 2's start GD's own condition. From
    generic starts the two bad sets differ and neither contains the other.

    Printed: z_t "is guaranteed to converge to the largest eigenvector of M, thus resolving the limitation".
    Error: what rational arithmetic finds along p1 after 6 steps from tau0 = 0, GD and AO; beside it AO's
    remaining excess loss.
    """
    p = setting.problem()
    if abs(setting.c) == 1:
        return Verdict("AO resolves GD's limitation", "not defined at c = +-1", 0.0, 0.0, "tau0 = 0: u0 = 0")
    rows = exact_run(Fraction(abs(setting.c)).limit_denominator(1000), Fraction(1, 10), Fraction(0), 6)
    left = float(max(abs(value) for row in rows for value in row))
    u, v = after(alternating(p.X, *make_start(p, "paper", 0.0, 1)), 2)
    return judge("AO resolves GD's limitation", left, p.excess(u, v)[0],
                 "same condition as GD's: tau0 = 0 stays 0, exactly, in both")


STATEMENTS = (gram_line, largest_eigenvector, in_the_span, theorem_1, theorem_2, theorem_3, equation_4,
              lemma_1, equation_6, equation_7, theorem_4, theorem_5, alternation_resolves)


def verdicts(setting: Setting) -> list[Verdict]:
    """All statements, in the paper's order."""
    with np.errstate(all="ignore"):         # a step above the stable one overflows: then "not confirmed"
        return [statement(setting) for statement in STATEMENTS]


# ------------------------------------------------------------------------------------------------------------
# 6. Beyond the paper: minibatch noise, rank r

def noise_floor(problem: Problem, name: str, noise: float, step: float, steps: int = 3000) -> float:
    """Mean excess loss in the second half of a run in which every product sees X + noise N(0, 1), fresh each
    time.

    name: "gd" (step eta) or "ao" (relaxation omega = step; 1 is exact AO). One run of 40 chains, started at
    the optimum.
    """
    rng = np.random.default_rng(5)
    (p1, q1), _ = problem.pairs
    d, total = p1.size, 0.0
    u, v = (np.tile(np.sqrt(problem.sigma[0]) * w, (40, 1)) for w in (p1, q1))                 # [40, d]
    for t in range(steps):
        N = noise * rng.standard_normal((40, d, d))
        Nv, uN = (N @ v[..., None])[..., 0], (u[:, None] @ N)[:, 0]                            # [40, d] each
        if name == "gd":
            du, dv = gradients(problem.X, u, v)
            u, v = u - step * (du - Nv), v - step * (dv - uN)
        else:
            u = (1 - step) * u + step * (times(problem.X, v) + Nv) / square(v)
            uN = (u[:, None] @ (noise * rng.standard_normal((40, d, d))))[:, 0] # its own batch
            v = (1 - step) * v + step * (times(problem.X, u) + uN) / square(u)
        if t >= steps // 2:
            total += problem.excess(u, v).mean()
    return total / (steps - steps // 2)


def predicted_floor(problem: Problem, name: str, noise: float, eta: float) -> float:
    """Leading order of `noise_floor`: GD, the sum over Hessian eigenvalues h of w eta noise^2 sigma1 / (2 (2
    - eta h)), where w is 2 at h = 2 sigma1 (both products share a batch) and 1 elsewhere; exact AO, noise^2
    (d - 1/2) whatever c is, because each solve starts afresh from one noisy product and averages nothing.
    """
    d, s1 = problem.p_plus.size, problem.sigma[0]
    if name == "ao":
        return noise ** 2 * (d - 0.5)
    h = np.array([2 * s1, 2, problem.saddle_gap] + [s1] * (2 * d - 4))
    weight = np.array([2] + [1] * (2 * d - 2))
    return float((weight * eta * noise ** 2 * s1 / (2 * (2 - eta * h))).sum())


RANK_METHODS = ("GD", "scaled GD", "ALS", "over-relaxed ALS")


def rank_iterations(name: str, condition: float, d: int = 30, r: int = 3, gap_ratio: float = 0.5,
                    seed: int = 0, limit: int = 20_000) -> int:
    """Iterations to a relative excess of 1e-8 for the best rank-r fit U V' of a d x d matrix, U, V: [d, r].

    Its singular values fall from `condition` to 1 over the first r, then on from gap_ratio = sigma_{r+1} /
    sigma_r. GD takes its best step at the optimum, 2 / (2 sigma_1 + sigma_r - sigma_{r+1}), scaled GD 1/2,
    over-relaxed ALS `tuned`'s omega at rho = gap_ratio. A least squares solve undoes the other factor's
    conditioning, a gradient step does not. Random start.
    """
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((d, d)))[0] for _ in range(2))
    sigma = np.concatenate([np.geomspace(condition, 1, r), gap_ratio * 0.8 ** np.arange(d - r)])
    X, best = left * sigma @ right.T, 0.5 * (sigma[r:] ** 2).sum()
    U, V = rng.standard_normal((2, d, r)) * np.sqrt(condition / d)
    eta = 2 / (2 * condition + 1 - gap_ratio)
    omega = 2 / (1 + np.sqrt(1 - gap_ratio ** 2)) if name == "over-relaxed ALS" else 1.0
    for t in range(limit):
        if 0.5 * ((U @ V.T - X) ** 2).sum() - best <= 1e-8 * best:
            return t
        if name == "GD":
            residual = U @ V.T - X
            U, V = U - eta * residual @ V, V - eta * residual.T @ U
            continue
        U_solved = np.linalg.solve(V.T @ V, V.T @ X.T).T
        if name == "scaled GD":
            U, V = (U + U_solved) / 2, (V + np.linalg.solve(U.T @ U, U.T @ X).T) / 2
        else:
            U = (1 - omega) * U + omega * U_solved
            V = (1 - omega) * V + omega * np.linalg.solve(U.T @ U, U.T @ X).T
    return limit


# ------------------------------------------------------------------------------------------------------------
# 7. The program

def race(setting: Setting, init: str, methods: list[str]) -> list[dict]:
    """Per method: median iterations to an excess of 1e-8, how many starts arrived, and the rates, derived and
    measured.
    """
    p = setting.problem()
    rows, derived = [], rates(setting.c, setting.eta) if 0 < abs(setting.c) < 1 else {}
    for name in methods:
        count = iterations_to(p, name, *make_start(p, init, setting.tau0, setting.seeds), setting.eta)
        with np.errstate(all="ignore"):
            measured = measured_rates(p, name, setting.eta) if name in derived else (None, None)
        tail, escape = derived.get(name, (None, None))
        rows.append({"method": name, "label": METHODS[name].label, "iterations": float(np.median(count)),
                     "arrived": int(np.isfinite(count).sum()), "starts": setting.seeds, "tail": tail,
                     "tail_measured": measured[0], "escape": escape, "escape_measured": measured[1]})
    return rows


def verdict_table(rows: list[Verdict]) -> str:
    """The verdicts as Markdown, which is as legible on a terminal."""
    cells = [("statement", "verdict", "error, corrected", "error, as printed", "in its correct form")]
    cells += [(r.statement, r.verdict, f"{r.error:.1e}", f"{r.printed:.1e}", r.note) for r in rows]
    return markdown(cells)


def race_table(rows: list[dict]) -> str:
    """The race as Markdown; factors as derived / measured."""
    def pair(row: dict, key: str) -> str:
        if row[key] is None or not np.isfinite(row[key + "_measured"]):
            return "-" if row[key] is None else f"{row[key]:.5f} / -"
        return f"{row[key]:.5f} / {row[key + '_measured']:.5f}"

    cells = [("method (* knows c)", "iterations to 1e-8", "arrived", "tail factor", "escape factor")]
    cells += [(r["label"], f"{r['iterations']:.0f}" if np.isfinite(r["iterations"]) else "never",
               f"{r['arrived']} of {r['starts']}", pair(r, "tail"), pair(r, "escape")) for r in rows]
    return markdown(cells)


def markdown(cells: list[tuple]) -> str:
    """Rows of equal length, the header first, as an aligned Markdown table."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str) -> None:
        """Exit 2 with the message alone."""
        self.exit(2, f"{Path(sys.argv[0]).name}: {message}\n")


def number(kind: type, low: float, high: float, what: str, open_low: bool = False) -> Callable[[str], float]:
    """An argparse type: `kind` between low and high, else one line that says `what` is wanted."""
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high or (open_low and value == low):
            raise argparse.ArgumentTypeError(f"{what}, not {text!r}")
        return value
    return parse


def method_list(text: str) -> list[str]:
    """An argparse type: comma-separated names of METHODS."""
    names = text.split(",")
    for name in names:
        if name not in METHODS:
            raise argparse.ArgumentTypeError(f"unknown method {name!r}; known: {','.join(METHODS)}")
    return names


def parse_arguments(arguments: list[str] | None, panels: list[str]) -> argparse.Namespace:
    """The command line; every wrong value ends in one line and exit status 2."""
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    defaults = Setting()
    huge = sys.float_info.max
    add = parser.add_argument
    add("--c", type=number(float, -1, 1, "a.b of unit vectors must lie in [-1, 1]"),
        help=f"a.b [{defaults.c}]")
    add("--eta", type=number(float, 0, huge, "the step must be a positive number", open_low=True),
        help=f"step [{defaults.eta}]")
    add("--tau0", type=number(float, -1, 1, "tau0 must lie in [-1, 1]"),
        help=f"the paper start's component along the optimum [{defaults.tau0}]")
    add("--d", type=number(int, 2, 500, "the dimension must be a whole number from 2 to 500"),
        help=f"dimension [{defaults.d}]")
    add("--seeds", type=number(int, 1, 1000, "the number of starts must be a whole number from 1 to 1000"),
        help=f"random starts [{defaults.seeds}]")
    add("--methods", type=method_list, help=f"comma-separated, of {','.join(METHODS)} [all]")
    add("--init", choices=["paper", "tied", "generic", "unbalanced"], help="start of the race [paper]")
    add("--out", metavar="FIGURE", help="figure file [out/bilinear.png]")
    add("--panel", choices=panels, help="draw this panel alone [the six but rank]")
    add("--json", metavar="RESULTS", help="write everything printed here as JSON")
    add("--check", action="store_true", help="run all checks instead; exit 1 if one fails")
    add("--mutants", action="store_true", help="break each check's formula; exit 1 if one goes unnoticed")
    add("--exact", action="store_true", help="print the stuck start in rational arithmetic instead")
    add("--markdown", action="store_true", help="print the verdict table alone, for a README")
    args = parser.parse_args(arguments)
    chosen = {key: getattr(args, key) for key in asdict(defaults) if getattr(args, key) is not None}
    fixed = [f"--{key}" for key in [*chosen, "methods", "init"] if (args.check or args.mutants or args.exact)
             and getattr(args, key) is not None and not (args.exact and key in ("c", "eta", "tau0"))]
    if fixed:
        parser.error(f"argument {fixed[0]}: --check, --mutants and --exact do not use it; drop it")
    args.setting = Setting(**(asdict(defaults) | chosen))
    args.parser = parser
    return args


def print_exact(setting: Setting) -> list[dict]:
    """The exact runs from tau0 = 0 and from a small tau0, and what float64 makes of the first; returns the
    rows.
    """
    c = Fraction(abs(setting.c)).limit_denominator(1000)
    eta = Fraction(setting.eta).limit_denominator(1000)
    small = Fraction(setting.tau0).limit_denominator(10 ** 12)
    cells, steps = [("t", "GD, tau0 = 0", "AO, tau0 = 0", f"GD, tau0 = {small}", f"AO, tau0 = {small}")], 5
    nought, rows = exact_run(c, eta, Fraction(0), steps), exact_run(c, eta, small, steps)
    for t, (zero, some) in enumerate(zip(nought, rows, strict=True)):
        cells.append((str(t), str(zero[0]), str(zero[1]), f"{float(some[0]):.6e}", f"{float(some[1]):.6e}"))
    print(f"Component of u along p1, c = {c}, eta = {eta}, Eq. 2's start; fractions, so no rounding helps\n")
    print(markdown(cells))
    problem = make_problem(float(c), setting.d)
    (p1, _), _ = problem.pairs
    left = {}
    for name, update in (("GD", gradient_descent), ("AO", alternating)):
        u, v = make_start(problem, "paper", 0.0, 1)
        run = update(problem.X, u, v, *((setting.eta,) if name == "GD" else ()))
        with np.errstate(all="ignore"):
            away = (t for t, (u, _) in enumerate(itertools.islice(run, 20_000)) if abs(u[0] @ p1) > 0.1)
            left[name] = next(away, "no step within 20,000")
    print(f"\nThe same start in float64, where rounding acts as a kick: GD leaves at {left['GD']}, AO at "
          f"{left['AO']}.\nThat depends on the BLAS and on how a product is written: shown, not claimed.")
    return [{"t": t, "gd": str(z[0]), "ao": str(z[1])} for t, z in enumerate(nought)]


def finite(value: object) -> object:
    """The same value with every non-finite number as None, which JSON can hold."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns the exit status."""
    import bilinear_checks
    import bilinear_figure

    args = parse_arguments(arguments, list(bilinear_figure.PANELS))
    setting, failed, results = args.setting, False, {"setting": asdict(args.setting)}
    special = args.check or args.mutants or args.exact or args.markdown
    figure = None if special and not (args.out or args.panel) else Path(args.out or "out/bilinear.png")
    for path in (figure, args.json and Path(args.json)):
        try:
            if path and path.is_dir():
                raise IsADirectoryError("is a folder")
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as reason:
            args.parser.error(f"cannot write {path}: {reason}")
    if figure and figure.suffix.lower() not in (".png", ".pdf", ".svg"):
        args.parser.error(f"argument --out: a figure file ends in .png, .pdf or .svg, not {figure.name!r}")

    if args.check or args.mutants:
        results["checks"] = rows = bilinear_checks.run_all(args.check, args.mutants)
        print(bilinear_checks.report(rows))
        failed = not all(row["ok"] for row in rows)
    if args.exact:
        results["exact"] = print_exact(setting)
    if args.markdown or not special:
        rows = verdicts(setting)
        results["verdicts"] = [asdict(row) for row in rows]
        print(verdict_table(rows))
    if not special:
        results["init"] = args.init or "paper"
        results["race"] = race(setting, results["init"], args.methods or list(METHODS))
        tau0 = f", tau0 = {setting.tau0}" if results["init"] == "paper" else ""
        print(f"\nc = {setting.c}, eta = {setting.eta}, d = {setting.d}, {results['init']} start{tau0}; "
              f"median of {setting.seeds}; factors per iteration or cycle, derived / measured:\n")
        print(race_table(results["race"]))
        if setting.eta >= 1 / (1 + abs(setting.c)):
            print(f"\neta >= {1 / (1 + abs(setting.c)):.3g} = 1/(1 + |c|), GD's stable step: GD may diverge.")
    try:
        if args.json:
            Path(args.json).write_text(json.dumps(finite(results), indent=1) + "\n")
        if figure:
            bilinear_figure.draw(figure, setting, args.panel)
            print(f"\nfigure: {figure}")
    except OSError as reason:
        args.parser.error(f"cannot write: {reason}")
    return int(failed)


if __name__ == "__main__":
    from bilinear import main as imported_main      # one copy: the checks and the figure import it, too
    sys.exit(imported_main())
