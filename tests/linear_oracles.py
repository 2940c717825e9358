"""Oracles: linear models fitted one at a time in numpy. Nothing here comes from the library."""

import numpy as np

Array = np.ndarray


def logistic(x: Array, y: Array, penalty: Array, weights: Array | None = None) -> Array:
    """Optimum of `Σ w ℓ + ½ Σ λ θ²` by plain Newton iterations."""
    w = np.ones(len(x)) if weights is None else weights
    theta = np.zeros(x.shape[1])
    for _ in range(100):
        p = 1 / (1 + np.exp(-x @ theta))
        gradient = x.T @ (w * (p - y)) + penalty * theta
        hessian = (x * (w * p * (1 - p))[:, None]).T @ x + np.diag(penalty)
        step = np.linalg.solve(hessian, gradient)
        theta -= step
        if np.linalg.norm(step) < 1e-13:
            return theta
    raise AssertionError("the oracle did not converge")


def least_squares(x: Array, y: Array, penalty: Array, weights: Array | None = None) -> Array:
    """Normal equations."""
    w = np.ones(len(x)) if weights is None else weights
    return np.linalg.solve((x * w[:, None]).T @ x + np.diag(penalty), x.T @ (w * y))


def softmax(x: Array, y: Array, classes: int, penalty: Array) -> Array:
    """Optimum `[p, c]`, by scipy."""
    from scipy.optimize import minimize
    from scipy.special import log_softmax

    hot = np.eye(classes)[y]

    def objective(flat: Array) -> tuple[float, Array]:
        theta = flat.reshape(-1, classes)
        logs = log_softmax(x @ theta, axis=1)
        gradient = x.T @ (np.exp(logs) - hot) + penalty[:, None] * theta
        value = -(hot * logs).sum() + 0.5 * (penalty[:, None] * theta**2).sum()
        return value, gradient.ravel()

    start = np.zeros(x.shape[1] * classes)
    options = {"maxiter": 5000, "gtol": 1e-11, "ftol": 1e-16}
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    return found.x.reshape(-1, classes)


def two_classes(n: int, d: int, seed: int, signal: float = 2.0) -> tuple[Array, Array]:
    """Standard normal features, labels along the first."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d))
    return x, (rng.random(n) < 1 / (1 + np.exp(-signal * x[:, 0]))).astype(int)


def cosines(one: Array, other: Array) -> Array:
    """Of the rows of two matrices."""
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return (one * other).sum(1) / norms
