"""The bilinear problem of "Beyond LLaVA-HD" (Sec. 2.3, App. C), drawn from exactly your options.

    python theory/bilinear.py                             out/bilinear.png and a table, in seconds
    python theory/bilinear.py --tau0 .01 --eta .1 --animate walk.gif

The question. The paper reads u as the adapter of SliME and v as its compression layer. It argues
that gradient descent (GD) on both at once need not reach the best rank-one fit, that alternating
optimisation (AO: solve for v, then for u, and again) must, and that one should train in turns.

The problem (Sec. 2.3). Unit vectors a, b with a.b = c, 0 < c < 1, and

    X = a b' + b a',        L(u, v) = |u v' - X|^2 / 2  ->  min

X has the eigenvectors p+- = (a +- b) / sqrt(2 (1 +- c)) with the eigenvalues 1 + c and -(1 - c). So
its singular values are sigma1 = 1 + c and sigma2 = 1 - c, and

    the optimum   u v' =  sigma1 p+ p+'    L = sigma2^2 / 2
    a saddle      u v' = -sigma2 p- p-'    L = sigma1^2 / 2, which is 2c higher

(c < 0 is the same problem with b and u reversed. At c = 0 both fits are equally good; at c = 1 the
second is zero.) How hard the two are to tell apart is rho = sigma2 / sigma1.

The plane (App. C.1). The paper starts from Eq. 2: u = alpha a + beta b, v = beta a + alpha b. With
tau = (alpha + beta) / sqrt 2 and nu = (alpha - beta) / sqrt 2 that is

    u = tau sqrt(sigma1) p+ + nu sqrt(sigma2) p-,    v = tau sqrt(sigma1) p+ - nu sqrt(sigma2) p-

with the optimum at (+-1, 0) and the saddle at (0, +-1). GD keeps this form for ever (Theorem 3).

Shapes: d is the dimension; u, v: [..., d] with any batch in front; X: [d, d]; all float64. One
iteration of any method is two products with X. Lengths and losses have no unit; eta is GD's step.
The drawing is in pictures.py, the paper's statements one by one in verdicts.py.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import count, islice

import numpy as np
from program import file, make_parser, markdown, number, plain

Array = np.ndarray
Pairs = Iterator[tuple[Array, Array]]   # an update: yields (u, v), the start first

FLOOR, LIMIT = 1e-12, 3000              # a run ends at this excess loss, or after this many steps
ARRIVED, ADAM_RATE = 1e-8, 0.03         # a run counts as arrived at this excess loss

# ---- The problem ---------------------------------------------------------------------------------

class Problem:
    """c in (0, 1) and orthonormal p+, p-: [d]; all else above follows from them."""

    def __init__(self, c: float, p_plus: Array, p_minus: Array) -> None:
        self.c, self.p_plus, self.p_minus = c, p_plus, p_minus
        self.sigma = s1, s2 = 1 + c, 1 - c
        # a b' + b a', written in its eigenvectors: [d, d]
        self.X = s1 * np.outer(p_plus, p_plus) - s2 * np.outer(p_minus, p_minus)

    def loss(self, u: Array, v: Array) -> Array:
        """L(u, v): [...]."""
        return 0.5 * ((u[..., :, None] * v[..., None, :] - self.X) ** 2).sum((-2, -1))

    def excess(self, u: Array, v: Array) -> Array:
        """L(u, v) less its minimum: [...], without subtracting two losses of order one.

        With R = u v' - sigma1 p+ p+' it is (|R + sigma2 p- p-'|^2 - sigma2^2) / 2, multiplied out.
        """
        s1, s2 = self.sigma
        R = u[..., :, None] * v[..., None, :] - s1 * np.outer(self.p_plus, self.p_plus)
        return 0.5 * (R * R).sum((-2, -1)) + s2 * (u @ self.p_minus) * (v @ self.p_minus)

    def start(self, tau: float | Array, nu: float | Array) -> tuple[Array, Array]:
        """Eq. 2's start at (tau, nu), numbers or [...]: u, v, each [..., d]."""
        along = np.multiply.outer(np.sqrt(self.sigma[0]) * tau, self.p_plus)
        across = np.multiply.outer(np.sqrt(self.sigma[1]) * nu, self.p_minus)
        return along + across, along - across

    def place(self, u: Array, v: Array) -> tuple[Array, Array]:
        """(tau, nu) of k u, where k makes |k u| = |v / k|: the product u v' does not see k."""
        u = u * np.sqrt(np.sqrt(dot(v, v) / dot(u, u)))
        s1, s2 = self.sigma
        return u @ self.p_plus / np.sqrt(s1), u @ self.p_minus / np.sqrt(s2)


def make_problem(c: float, d: int = 10, seed: int = 0) -> Problem:
    """A Problem with random orthonormal p+, p- in R^d, d >= 2."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((d, 2)))
    return Problem(c, q[:, 0], q[:, 1])


def generic_start(d: int, seed: int) -> tuple[Array, Array]:
    """u, v ~ N(0, I / d), independent: about unit length, and nothing special about them."""
    return tuple(np.random.default_rng([seed, 1]).standard_normal((2, d)) / np.sqrt(d))


# ---- The updates ---------------------------------------------------------------------------------

def dot(x: Array, y: Array) -> Array:
    """x.y along the last axis, kept: [..., 1]."""
    return (x * y).sum(-1, keepdims=True)


def gradients(X: Array, u: Array, v: Array) -> tuple[Array, Array]:
    """dL/du = (u v' - X) v and dL/dv = (v u' - X) u, without forming u v'; X is symmetric."""
    return u * dot(v, v) - v @ X, v * dot(u, u) - u @ X


def gradient_descent(X: Array, u: Array, v: Array, eta: float | Array) -> Pairs:
    """Both at once (Eq. 1):  u <- u - eta dL/du(u, v),  v <- v - eta dL/dv(u, v)."""
    while True:
        yield u, v
        du, dv = gradients(X, u, v)
        u, v = u - eta * du, v - eta * dv


def sequential_descent(X: Array, u: Array, v: Array, eta: float) -> Pairs:
    """One after the other:  v <- v - eta dL/dv(u, v),  u <- u - eta dL/du(u, the new v)."""
    while True:
        yield u, v
        v = v - eta * gradients(X, u, v)[1]
        u = u - eta * gradients(X, u, v)[0]


def alternating(X: Array, u: Array, v: Array, omega: float = 1.0) -> Pairs:
    """AO (App. C.2):  v <- X u / |u|^2,  u <- X v / |v|^2;  over-relaxed: omega > 1 of that way.

    The solve is a gradient step whose step size is 1 / |u|^2. AO never reads the v it starts with.
    """
    while True:
        yield u, v
        v = (1 - omega) * v + omega * (u @ X) / dot(u, u)
        u = (1 - omega) * u + omega * (v @ X) / dot(v, v)


def heavy_ball(X: Array, u: Array, v: Array, eta: float, beta: float) -> Pairs:
    """Momentum:  m <- beta m - eta dL,  (u, v) <- (u, v) + m."""
    mu, mv = np.zeros_like(u), np.zeros_like(v)
    while True:
        yield u, v
        du, dv = gradients(X, u, v)
        mu, mv = beta * mu - eta * du, beta * mv - eta * dv
        u, v = u + mu, v + mv


def adam(X: Array, u: Array, v: Array, eta: float) -> Pairs:
    """Adam (Kingma and Ba 2015):  (u, v) <- (u, v) - eta m / (sqrt s + 1e-8).

    m and s are the running means of dL (over about 10 steps) and of dL^2 (over about 1000), each
    divided by 1 - beta^t because it started at zero."""
    w, m, s = np.stack([u, v]), 0.0, 0.0                                     # w: [2, ..., d]
    for t in count(1):
        yield w[0], w[1]
        g = np.stack(gradients(X, w[0], w[1]))
        m, s = 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g * g
        w = w - eta * (m / (1 - 0.9**t)) / (np.sqrt(s / (1 - 0.999**t)) + 1e-8)


def tuned(c: float) -> dict[str, float]:
    """The best constants for a known c, near the optimum, where L's curvature h lies between 2c and
    2 sigma1: GD's "step"; "omega" of over-relaxation for two unknowns of coupling rho (Young 1954);
    heavy ball's "eta" and "beta" (Polyak 1964)."""
    rho, low, high = (1 - c) / (1 + c), np.sqrt(2 * c), np.sqrt(2 * (1 + c))
    return {"step": 1 / (1 + 2 * c), "omega": 2 / (1 + np.sqrt(1 - rho * rho)),
            "eta": (2 / (low + high)) ** 2, "beta": ((high - low) / (high + low)) ** 2}


METHODS: dict[str, Callable[[Problem, Array, Array, float], Pairs]] = {
    "gd": lambda p, u, v, eta: gradient_descent(p.X, u, v, eta),
    "sequential": lambda p, u, v, eta: sequential_descent(p.X, u, v, eta),
    "ao": lambda p, u, v, _: alternating(p.X, u, v),
    # these two are told c, which nobody knows of a network
    "over-relaxed": lambda p, u, v, _: alternating(p.X, u, v, tuned(p.c)["omega"]),
    "heavy-ball": lambda p, u, v, _: heavy_ball(p.X, u, v, tuned(p.c)["eta"], tuned(p.c)["beta"]),
    "adam": lambda p, u, v, _: adam(p.X, u, v, ADAM_RATE),
}

# ---- What theory says ----------------------------------------------------------------------------

def field(c: float, tau: Array, nu: Array) -> tuple[Array, Array]:
    """(tau', nu') of Eq. 6, which is GD for eta -> 0 with the time t = eta x iterations:

    tau' = (sigma1 - n) tau,   nu' = (sigma2 - n) nu,   n = |u|^2 = sigma1 tau^2 + sigma2 nu^2"""
    n = (1 + c) * tau**2 + (1 - c) * nu**2
    return (1 + c - n) * tau, (1 - c - n) * nu


def flow(c: float, tau0: float, nu0: float, t: Array) -> tuple[Array, Array]:
    """Eq. 6 solved: tau = tau0 e^{sigma1 t} / Delta, nu = nu0 e^{sigma2 t} / Delta, where

    Delta^2 = 1 + tau0^2 (e^{2 sigma1 t} - 1) + nu0^2 (e^{2 sigma2 t} - 1).

    Both equations become Delta' / Delta = n, and that integrates. So tau / nu grows as e^{2ct} from
    the first moment to the last: the part along the optimum is never lost, only late if small."""
    s1, s2 = 1 + c, 1 - c
    delta = np.sqrt(1 + tau0**2 * np.expm1(2 * s1 * t) + nu0**2 * np.expm1(2 * s2 * t))
    return tau0 * np.exp(s1 * t) / delta, nu0 * np.exp(s2 * t) / delta


def pair(e_u: float, e_v: float, s: float, sequential: bool) -> Array:
    """The two factors by which an iteration stretches (du, dv) along one singular pair: [2].

    Near a fixed point  du <- (1 - e_u) du + s dv,  dv <- (1 - e_v) dv + s du,  where for GD
    e_u = eta |v|^2, e_v = eta |u|^2 and s is eta times the pair's singular value. Both at once this
    is Jacobi's matrix; with dv first and du from the new dv, it is Gauss and Seidel's."""
    J = np.array([[1 - e_u, s], [s, 1 - e_v]])
    if sequential:
        J[0] = [1 - e_u + s * s, s * (1 - e_v)]
    return np.linalg.eigvals(J)


def rates(c: float, eta: float, k: float = 1.0) -> dict[str, tuple[float, float]]:
    """Per method but Adam: (tail, escape), the factors per iteration of the distance to the optimum
    and of the distance from the saddle. The excess loss falls with the tail's square.

    k = |u| / |v| where the run ends: GD pays for an imbalance, AO does not see it. AO is sequential
    GD with the steps 1 / |u|^2 and 1 / |v|^2, so that e = 1; over-relaxed AO has e = omega."""
    s1, s2 = 1 + c, 1 - c

    def tail(eta: float, k: float, sequential: bool) -> Array:
        e_u, e_v = eta * s1 / k, eta * s1 * k
        other = pair(e_u, e_v, eta * s2, sequential)
        # the optimum's own pair (less the factor 1 of rescaling u), and all outside span(a, b)
        own = (1 - e_u) * (1 - e_v) if sequential else 1 - e_u - e_v
        return np.abs([*other, own, 1 - e_u, 1 - e_v])

    def escape(eta: float, sequential: bool) -> float:
        return np.abs(pair(eta * s2, eta * s2, eta * s1, sequential)).max()

    best = tuned(c)
    omega, beta = best["omega"], best["beta"]
    # momentum turns a factor f of GD into the roots of g^2 - (beta + f) g + beta; at the optimum
    # Polyak's constants make the extreme ones double roots, of modulus sqrt beta
    ball = np.roots([1, -(beta + escape(best["eta"], False)), beta])
    return {"gd": (tail(eta, k, False).max(), escape(eta, False)),
            "sequential": (tail(eta, k, True).max(), escape(eta, True)),
            "ao": (tail(1 / s1, 1, True).max(), escape(1 / s2, True)),
            "over-relaxed": (tail(omega / s1, 1, True).max(), escape(omega / s2, True)),
            "heavy-ball": (np.sqrt(beta), ball.max())}


def derived_curve(curve: Array, tail: float, leaves: float | None, gap: float) -> Array | None:
    """Theory's excess loss at iterations 0, 1, ..., to lay over a run's: [T], or None.

    leaves is given near the saddle, and nothing is fitted there: the level `gap` until then, and
    from then on a fall by tail^2. Elsewhere the slope alone is derived; the line passes through the
    run's first point below 1e-4 of where it began."""
    t, low = np.arange(len(curve)), np.flatnonzero(curve < 1e-4 * curve[0])
    if tail >= 1 or (leaves is None and len(low) == 0):
        return None
    if leaves is not None:
        return gap * tail ** (2 * np.maximum(t - leaves, 0))
    return np.where(t >= low[0], curve[low[0]] * tail ** (2.0 * (t - low[0])), np.nan)


# ---- The experiment: every number that is drawn --------------------------------------------------

@dataclass(frozen=True)
class Setting:
    """What the command line chooses. eta None is GD's best step, 1 / (1 + 2c)."""

    c: float = 0.3
    eta: float | None = None
    tau0: float = 1e-6
    nu0: float = 1.0
    d: int = 10
    seed: int = 0
    methods: list[str] | tuple[str, ...] = tuple(METHODS)


def race(p: Problem, name: str, start: tuple, eta: float, tau0: float | None = None) -> dict:
    """One run from start, a pair (u, v): [d] each. "excess", [T], of iterations 0, 1, ... until
    FLOOR, LIMIT or a number that is not finite; "arrived", the first of them at most ARRIVED;
    "tail", "escape" and "derived", theory's; or None. tau0 is given for starts near the saddle."""
    curve = []
    with np.errstate(all="ignore"):                     # a diverging run overflows, and ends there
        for u, v in islice(METHODS[name](p, *start, eta), LIMIT + 1):
            curve.append(float(p.excess(u, v)))
            if not FLOOR < curve[-1] < 1e12:
                break
        k = float(np.sqrt(dot(u, u) / dot(v, v))[0]) if curve[-1] < ARRIVED else 1.0
    arrived = next((t for t, excess in enumerate(curve) if excess <= ARRIVED), None)
    tail, escape = rates(p.c, eta, k).get(name, (None, None))
    leaves = None
    if tau0 is not None and tail is not None:           # tau and nu are level after so many steps
        leaves = np.log(1 / abs(tau0)) / np.log(escape) if tau0 else np.inf
    return {"excess": np.array(curve), "arrived": arrived, "tail": tail, "escape": escape,
            "derived": derived_curve(np.array(curve), tail or 1, leaves, 2 * p.c)}


def walk(p: Problem, name: str, tau0: float, nu0: float, eta: float, steps: int) -> Array:
    """(tau, nu) of iterations 0 to `steps` from Eq. 2's start, fewer if it diverges: [T, 2]."""
    path = []
    with np.errstate(all="ignore"):
        for u, v in islice(METHODS[name](p, *p.start(tau0, nu0), eta), steps + 1):
            path.append(p.place(u, v))
            if not np.hypot(*path[-1]) < 1e3:
                break
    return np.array(path)


def ends(c: float, tau0: float, nu0: float, eta_sigma1: Array, steps: int = 2000) -> dict:
    """Where GD is from Eq. 2's start after `steps`, for each eta_sigma1: [n].

    "loss" of the last 32 iterations, [n, 32]; "kind", [n]: 0 at rest, 1 a two-cycle, 2 a longer
    cycle or chaos, 3 diverged; "ao", the loss of AO after as many steps, a number. Eq. 2's orbits
    stay in span(a, b), so d = 2 is enough."""
    p = make_problem(c, 2)
    start = p.start(tau0, nu0)
    u, v = (np.tile(x, (len(eta_sigma1), 1)) for x in start)                          # [n, 2]
    run = gradient_descent(p.X, u, v, eta_sigma1[:, None] / p.sigma[0])
    with np.errstate(all="ignore"):
        last = list(islice(run, steps, steps + 32))
        U, V = (np.stack(x, axis=1) for x in zip(*last, strict=True))                 # [n, 32, 2]
        moved = [np.abs(U[:, k:] - U[:, :-k]).max((1, 2)) for k in (1, 2)]
        loss = p.loss(U, V)
    kind = np.where(moved[0] < 1e-3, 0, np.where(moved[1] < 1e-3, 1, 2))
    kind[~np.isfinite(loss).all(1)] = 3
    ao = p.loss(*next(islice(alternating(p.X, *start), steps, None)))
    return {"eta_sigma1": eta_sigma1, "loss": loss, "kind": kind, "ao": float(ao)}


def experiment(setting: Setting) -> dict:
    """Everything that is drawn: the races, the walks, the ends, and what theory says of them."""
    p, tau0, nu0 = make_problem(setting.c, setting.d, setting.seed), setting.tau0, setting.nu0
    eta = setting.eta or tuned(setting.c)["step"]
    near_saddle = tau0 if abs(tau0) < 0.01 and 0.9 < abs(nu0) < 1.1 else None
    generic, eq2 = generic_start(setting.d, setting.seed), p.start(tau0, nu0)
    races = {"generic": {m: race(p, m, generic, eta) for m in setting.methods},
             "eq2": {m: race(p, m, eq2, eta, near_saddle) for m in setting.methods}}
    # three more starts of Eq. 2's kind, one in each of the other quadrants
    rng = np.random.default_rng([setting.seed, 2])
    angle, length = np.pi / 2 * (np.arange(1, 4) + rng.random(3)), rng.uniform(0.2, 1.4, 3)
    places = [(tau0, nu0), *zip(length * np.cos(angle), length * np.sin(angle), strict=True)]
    walks = {name: [walk(p, name, *place, eta, 300) for place in places] for name in ("gd", "ao")}
    return {"setting": asdict(setting) | {"eta": eta}, "races": races, "walks": walks,
            "ends": ends(setting.c, tau0, nu0, np.linspace(0.05, 2.2, 431))}


# ---- The program ---------------------------------------------------------------------------------

def table(results: dict) -> str:
    """Iterations from both starts; the tail's factor at the generic one, derived and measured."""
    rows = [("method", "generic start", "Eq. 2's start", "tail, derived", "tail, measured")]
    for name in results["races"]["eq2"]:
        runs = [results["races"][kind][name] for kind in ("generic", "eq2")]
        fall, tail = runs[0]["excess"], runs[0]["tail"]
        fall = fall[fall < 1e-4]
        measured = (fall[-1] / fall[0]) ** (0.5 / (len(fall) - 1)) if len(fall) > 2 else None
        rows.append((name, *("never" if r["arrived"] is None else str(r["arrived"]) for r in runs),
                     *("-" if x is None else f"{x:.4f}" for x in (tail, measured))))
    return markdown(rows)


def notes(results: dict) -> list[str]:
    """What a reader of these results must know about this choice of step and start."""
    s, said = results["setting"], []
    u_squared = (1 + s["c"]) * s["tau0"] ** 2 + (1 - s["c"]) * s["nu0"] ** 2
    if (share := s["eta"] * (1 + s["c"])) >= 1:
        said.append(f"eta sigma1 = {share:.3g}: from 1 on the optimum repels GD (panel 3).")
    if (share := s["eta"] * u_squared) >= 1 + s["eta"]:
        said.append(f"eta |u0|^2 = {share:.3g}: GD is sure to arrive only below 1 + eta.")
    if s["tau0"] == 0:
        first = [next((str(t) for t, (tau, _) in enumerate(paths[0]) if abs(tau) > 0.1), "never")
                 for paths in results["walks"].values()]
        said.append("tau0 = 0: in exact arithmetic no method here gets below the saddle's loss.\n"
                    "What does so here was helped by rounding, which differs between machines.\n"
                    f"Of 300 iterations, the first with |tau| > 0.1: GD {first[0]}, AO {first[1]}.")
    return said


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns the exit status, 2 with one line for a wrong value."""
    from pictures import animate, draw, save

    parser, default = make_parser("bilinear.py", __doc__.split("\n")[0]), Setting()
    add = parser.add_argument
    add("--c", type=number(float, 0.001, 0.99), help=f"a.b; if negative, reverse b [{default.c}]")
    add("--eta", type=number(float, 1e-4, 10), help="GD's step, sequential or not [1 / (1 + 2c)]")
    add("--tau0", type=number(float, -10, 10), help=f"Eq. 2's start, along p+ [{default.tau0:g}]")
    add("--nu0", type=number(float, -10, 10), help=f"Eq. 2's start, along p- [{default.nu0:g}]")
    add("--d", type=number(int, 2, 100), help=f"dimension [{default.d}]")
    add("--seed", type=number(int, 0, 10**6), help=f"of all that is random [{default.seed}]")
    add("--methods", choices=METHODS, nargs="+", help="those of panel 1 [all]")
    add("--out", type=file(".png", ".pdf", ".svg"), help="the figure [out/bilinear.png]")
    add("--json", type=file(".json"), help="write every number of the figure, too")
    add("--animate", type=file(".gif"), help="write a film of panel 2, too")
    parser.set_defaults(**asdict(default))
    args = parser.parse_args(arguments)
    setting = Setting(**{key: getattr(args, key) for key in asdict(default)})
    if setting.tau0 == setting.nu0 == 0:
        parser.error("argument --tau0: must not be 0 with --nu0 0, where u = 0 and AO is undefined")
    out = args.out or file(".png")("out/bilinear.png")
    results = experiment(setting)
    says = "c = {c:g}, eta = {eta:.4g}, d = {d}, seed {seed}, (tau0, nu0) = ({tau0:g}, {nu0:g}).\n"
    says += "Iterations to an excess loss of 1e-8, and the factor of the last ones:"
    print("\n\n".join([says.format(**results["setting"]), table(results), *notes(results)]))
    save(draw(results), out)
    if args.json:
        args.json.write_text(json.dumps(plain(results)) + "\n")
    if args.animate:
        animate(setting, args.animate)
    print("\nwrote", ", ".join(str(path) for path in (out, args.json, args.animate) if path))
    return 0


if __name__ == "__main__":
    from bilinear import main as imported_main  # one copy: pictures.py imports it, too
    sys.exit(imported_main())
