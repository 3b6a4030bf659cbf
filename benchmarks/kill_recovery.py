"""Kill -9 of each part of an embedded cluster, at work: how long until service was back, and what was lost."""

from __future__ import annotations

import argparse
import os
import signal
import time
from pathlib import Path

from common import digits, embedded_cluster, report, summary
from trunkline_worker.cluster.processes import processes_of


def pid_of(cluster_id: str, title: str) -> int:
    """Return the process of the cluster whose title starts so."""
    for pid in processes_of(cluster_id):
        if Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").startswith(title):
            return pid
    raise RuntimeError(f"no process {title}")


def wait_for_replicas(cluster_id: str, title: str, count: int) -> None:
    """Wait until a deployment has all its replicas again."""
    while True:
        titles = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in processes_of(cluster_id)]
        if sum(one.startswith(f"ray::ServeReplica:{title}".encode()) for one in titles) >= count:
            return
        time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--replicas", type=int, default=1, help="of gateway and backbone")
    arguments = parser.parse_args()
    pictures, labels = digits()
    table: list[tuple[str, ...]] = [("killed", "back after, s", "lost")]
    replicas = str(arguments.replicas)
    with (
        embedded_cluster(gateway_replicas=replicas, backbone_replicas=replicas) as cluster,
        cluster.connect() as client,
    ):
        stem = client.stem("efficientnet_lite0", cut="blocks.2", input_size=96)
        data = client.upload(pictures[:300], labels[:300], name="rows", stem=stem)
        model = client.train(data, name="model", embedding="pooled").result(progress=False)
        expected = model.predict(pictures[:8]).labels

        def kill(title: str) -> float:
            os.kill(pid_of(cluster.id, title), signal.SIGKILL)
            return time.perf_counter()

        for name, title in (("backbone replica", "trunkline-backbone"), ("gateway replica", "trunkline-gateway")):
            seconds = []
            for _ in range(arguments.times):
                started = kill(f"ray::ServeReplica:{title}")
                assert model.predict(pictures[:8], timeout_s=120).labels == expected
                seconds.append(time.perf_counter() - started)
                wait_for_replicas(cluster.id, title, arguments.replicas)
            table.append((name, summary(seconds), "nothing: the call in progress was answered"))

        seconds = []
        for turn in range(arguments.times):
            job = client.train(data, name="through", embedding="pooled", seed=turn)
            started = kill("ray::Controller")
            client.job(job.id, timeout_s=120)
            seconds.append(time.perf_counter() - started)
            job.result(progress=False, timeout_s=120)
        table.append(("controller", summary(seconds), "nothing: the job queued before finished"))

        seconds = []
        for turn in range(arguments.times):
            job = client.train(data, name="taken-back", seed=turn)
            for event in job.events():
                if event.phase in ("select", "fit"):
                    break
            started = kill("ray::RayTrainWorker")
            next(event for event in job.events() if event.phase == "restart")
            seconds.append(time.perf_counter() - started)
            job.result(progress=False, timeout_s=120)
        table.append(("lane worker", summary(seconds), "nothing: the job was taken back and finished"))
    report(
        f"kill_recovery_{arguments.replicas}",
        "Kill -9 of each part, at work",
        table,
        [
            f"Replicas of gateway and backbone: {arguments.replicas}. {arguments.times} times each;",
            "median (least to most). Of replicas: until a prediction sent at the moment of death was answered.",
            "Of the controller: until a job sent before could be looked at. Of the lane's worker: until its job was",
            "queued again.",
        ],
    )


if __name__ == "__main__":
    main()
