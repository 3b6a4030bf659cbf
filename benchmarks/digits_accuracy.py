"""Few labels: digits with 20 labelled pictures a class, over several draws, through a real cluster.

Three ways on the same rows: ``embedding="auto"``, the usual probe on the last layer, and raw pixels with scikit-learn's
logistic regression. The held-out rows are all the others.
"""

from __future__ import annotations

import argparse

import numpy as np
from common import digits, embedded_cluster, report
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

PER_CLASS = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=5)
    arguments = parser.parse_args()
    pictures, labels = digits()
    table: list[tuple[str, ...]] = [("draw", 'embedding="auto"', "last layer", "raw pixels", "slices chosen")]
    scores = []
    with embedded_cluster() as cluster, cluster.connect() as client:
        stem = client.stem("efficientnet_lite0", cut="blocks.2", input_size=96)
        for draw in range(arguments.draws):
            rng = np.random.default_rng(draw)
            chosen = np.concatenate(
                [rng.permutation(np.flatnonzero(labels == digit))[:PER_CLASS] for digit in range(10)]
            )
            rest = np.setdiff1d(np.arange(len(labels)), chosen)
            data = client.upload(pictures[chosen], labels[chosen], name="digits", stem=stem)
            auto = client.train(data, name="auto", seed=draw).result(progress=False)
            pooled = client.train(data, name="pooled", embedding="pooled", seed=draw).result(progress=False)
            flat = pictures.reshape(len(pictures), -1).astype(float)
            scaler = StandardScaler().fit(flat[chosen])
            raw = LogisticRegression(C=0.1, max_iter=5000).fit(scaler.transform(flat[chosen]), labels[chosen])
            row = (
                auto.evaluate(pictures[rest], labels[rest], stem=stem).accuracy,
                pooled.evaluate(pictures[rest], labels[rest], stem=stem).accuracy,
                raw.score(scaler.transform(flat[rest]), labels[rest]),
            )
            scores.append(row)
            table.append((str(draw), *(f"{score:.4f}" for score in row), ", ".join(auto.slices)))
    mean = np.mean(scores, axis=0)
    table.append(("mean", *(f"{score:.4f}" for score in mean), ""))
    report(
        "digits_accuracy",
        "Digits, 20 labelled pictures a class: accuracy on the rest",
        table,
        [
            f"Above the last layer by {mean[0] - mean[1]:.3f}, above raw pixels by {mean[0] - mean[2]:.3f}.",
            "Draw N takes numpy's default_rng(N). Raw pixels: 64 standardised columns, C = 0.1.",
        ],
    )


if __name__ == "__main__":
    main()
