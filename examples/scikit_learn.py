"""Which rows made a logistic regression say so, and what removing some of them would do.

    python examples/scikit_learn.py

Needs scikit-learn and pandas: pip install 'forebear[sklearn]'
"""

from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

import forebear as fb


def main() -> None:
    x, y = load_breast_cancer(return_X_y=True)
    x = StandardScaler().fit_transform(x)
    train, queries = slice(0, 500), slice(500, 510)
    estimator = LogisticRegression(C=0.1).fit(x[train], y[train])

    explained = fb.explain(estimator, x[train], y[train])
    scores = explained.scores(x[queries], y[queries])  # [query, row]
    print(scores)
    print("rows that did most for the first query's label")
    print(explained.top(x[500], y[500], k=5))
    print("rows that did most against it")
    print(explained.top(x[500], y[500], k=5, opponents=True))

    suspects = explained.self_influence().topk(5).indices.tolist()
    print("rows the model had to bend for:", suspects)

    removed = explained.group(suspects, "newton_step", bound=True)
    effect = removed.effect(x[queries], y[queries]).mean().item()
    helped = "helped" if effect > 0 else "hurt"
    print(f"together they {helped} the queries: {effect:+.4f} of log-likelihood in the mean;")
    print(f"without them the parameters move by {removed.shift.norm():.3f}, which is off by about")
    print(f"{removed.error.item():.3f} and provably by {removed.bound.distance.item():.3f} at most")


if __name__ == "__main__":
    main()
