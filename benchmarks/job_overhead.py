"""What a job costs beyond its training: submit to result, less the seconds that the training itself took.

The features are cached, so neither the network nor the trunk has a part in it.
"""

from __future__ import annotations

import argparse
import time

from common import digits, embedded_cluster, report, summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=15)
    arguments = parser.parse_args()
    pictures, labels = digits()
    table: list[tuple[str, ...]] = [("embedding", "rows", "submit to result, s", "training itself, s", "overhead, s")]
    with embedded_cluster() as cluster, cluster.connect() as client:
        stem = client.stem("efficientnet_lite0", cut="blocks.2", input_size=96)
        for rows in (200, 1000):
            data = client.upload(pictures[:rows], labels[:rows], name=f"rows-{rows}", stem=stem)
            client.train(data, name="warm", embedding="pooled").result(progress=False)
            totals, trainings, overheads = [], [], []
            for seed in range(arguments.jobs):
                started = time.perf_counter()
                model = client.train(data, name="job", embedding="pooled", seed=seed).result(progress=False)
                totals.append(time.perf_counter() - started)
                trainings.append(model.metrics["train_s"])
                overheads.append(totals[-1] - trainings[-1])
            table.append(("pooled", str(rows), summary(totals), summary(trainings), summary(overheads)))
    report(
        "job_overhead",
        "A lane job's overhead",
        table,
        [f"{arguments.jobs} jobs one after another on cached features; median (least to most)."],
    )


if __name__ == "__main__":
    main()
