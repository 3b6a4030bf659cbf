"""The load generator: one process, told by lines of JSON on its input what to do, answering each with one line.

Commands: ``open`` a target; ``probabilities`` of some rows; ``closed`` and ``arrivals``, see ``measure``; ``close``.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
from measure import Call, Window, closed_loop, open_loop, poisson_arrivals
from model import CALL_TIMEOUT_S
from targets import NotThere, Target, connect

MAX_IN_FLIGHT = 512
"""Calls of an open loop without an answer, at most."""


class Generator:
    """Carries out commands, on one target at a time."""

    def __init__(self, images_NHWC: npt.NDArray[np.uint8]) -> None:
        """Keep the pictures that are sent, in turn."""
        self._images_NHWC = images_NHWC
        self._target: Target | None = None
        self._requests: dict[int, list[Any]] = {}

    async def open(self, target: dict[str, Any]) -> dict[str, Any]:
        """Connect to a target, in place of the one before."""
        await self.close()
        self._target = connect(target)
        return {}

    async def close(self) -> dict[str, Any]:
        """Let go of the target."""
        if self._target is not None:
            await self._target.close()
        self._target, self._requests = None, {}
        return {}

    async def probabilities(self, rows: int, rows_per_call: int, timeout_s: float) -> dict[str, Any]:
        """Return what the target answers for the first rows, so many in a call."""
        assert self._target is not None
        answers = []
        for start in range(0, rows, rows_per_call):
            request = self._target.encode(self._images_NHWC[start : min(start + rows_per_call, rows)])
            answer = await asyncio.wait_for(self._target.call(request), timeout_s)
            answers.append(self._target.decode(answer))
        return {"probabilities": np.concatenate(answers).tolist()}

    async def closed(self, callers: int, rows_per_call: int, seconds: float) -> dict[str, Any]:
        """Run a closed loop."""
        call = self._call(rows_per_call)
        return await _measured(closed_loop(call, callers=callers, seconds=seconds, timeout_s=CALL_TIMEOUT_S))

    async def arrivals(self, rate: float, seconds: float, seed: int) -> dict[str, Any]:
        """Run an open loop of one row a call."""
        times = poisson_arrivals(rate, seconds, seed)
        run = open_loop(self._call(1), times, max_in_flight=MAX_IN_FLIGHT, timeout_s=CALL_TIMEOUT_S)
        return await _measured(run)

    def _call(self, rows_per_call: int) -> Call:
        assert self._target is not None
        target, requests = self._target, self._requests.get(rows_per_call)
        if requests is None:
            starts = range(0, len(self._images_NHWC) - rows_per_call + 1, rows_per_call)
            requests = [target.encode(self._images_NHWC[start : start + rows_per_call]) for start in starts]
            self._requests[rows_per_call] = requests

        async def call(number: int) -> int:
            found_BK = target.decode(await target.call(requests[number % len(requests)]))
            if len(found_BK) != rows_per_call:
                raise ValueError(f"{len(found_BK)} rows answered")
            return rows_per_call

        return call


async def _measured(run: Any) -> dict[str, Any]:
    before = resource.getrusage(resource.RUSAGE_SELF)
    found: Window = await run
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"window": asdict(found), "cpu_s": cpu_s}


async def main() -> None:
    generator = Generator(np.load(sys.argv[1]))
    # Answers go where standard output was; whatever libraries print goes to the log.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        command = json.loads(line)
        try:
            answer = await getattr(generator, command.pop("do"))(**command)
        except NotThere as error:
            answer = {"not_there": str(error)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(answer), file=answers, flush=True)
    await generator.close()


if __name__ == "__main__":
    asyncio.run(main())
