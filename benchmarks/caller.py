"""
A program that calls the provider, bare or metered, in a process of its own.

For each line on its standard input, a number of calls (in milliseconds for `lag`), it prints one line of JSON: what the block cost.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from threading import Thread
from typing import Any

MESSAGES: list[Any] = [
    {"role": "system", "content": "You are the editor of a small publishing house. " * 8},
    {"role": "user", "content": "Write the opening of a story about three people who leave a village. " * 4},
]
MODEL = "gpt-5-mini"
CUSTOMERS = 100
THREADS = 16
TASKS = 64


class Caller:
    """One side of a comparison: how a client is made, and on whose bill a call goes."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        import openai

        options: dict[str, Any] = {"api_key": "sk-benchmark", "base_url": f"http://127.0.0.1:{arguments.port}/v1"}
        self.client: openai.OpenAI
        self.async_client: openai.AsyncOpenAI
        self.is_metered = arguments.side == "metered"
        if self.is_metered:
            import metered_ai

            billing = metered_ai.connect(f"sqlite:///{arguments.ledger}", durability=arguments.durability)
            for number in range(CUSTOMERS):
                billing.grant(f"customer_{number}", "generations", 10**12, id="benchmark")
            more: dict[str, Any] = {"billing": billing}
            if arguments.pricing == "per_token":
                more["pricing"] = metered_ai.per_token(input=1, cached_input=1, output=2)
            self.client = metered_ai.MeteredOpenAI(**options, **more)
            self.async_client = metered_ai.AsyncMeteredOpenAI(**options, **more)
            self.bill_to = metered_ai.bill_to
        else:
            self.client = openai.OpenAI(**options)
            self.async_client = openai.AsyncOpenAI(**options)
        self.made = 0

    def bill(self) -> AbstractContextManager[Any]:
        self.made += 1
        return self.bill_to(f"customer_{self.made % CUSTOMERS}") if self.is_metered else nullcontext()

    def call(self) -> None:
        with self.bill():
            self.client.chat.completions.create(model=MODEL, messages=MESSAGES)

    async def acall(self) -> None:
        with self.bill():
            await self.async_client.chat.completions.create(model=MODEL, messages=MESSAGES)

    def stream(self, chunks: int) -> None:
        with self.bill():
            stream = self.client.chat.completions.create(
                model=MODEL,
                messages=MESSAGES,
                stream=True,
                stream_options={"include_usage": True},
                max_completion_tokens=chunks,
            )
            for _ in stream:
                pass


def sequential(caller: Caller, count: int) -> None:
    for _ in range(count):
        caller.call()


def threads(caller: Caller, count: int) -> None:
    left = iter(range(count))

    def work() -> None:
        for _ in left:
            caller.call()

    workers = [Thread(target=work) for _ in range(THREADS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


async def tasks(caller: Caller, count: int) -> None:
    left = iter(range(count))

    async def work() -> None:
        for _ in left:
            await caller.acall()

    await asyncio.gather(*(work() for _ in range(TASKS)))


async def lag(caller: Caller, milliseconds: int) -> float:
    """Call as `tasks` do for so long, and tell how late the loop woke a sleeper: the 99th percentile, in milliseconds."""
    ends = time.perf_counter() + milliseconds / 1000
    lags: list[float] = []

    async def watch() -> None:
        while time.perf_counter() < ends:
            began = time.perf_counter()
            await asyncio.sleep(0.001)
            lags.append((time.perf_counter() - began) * 1000 - 1)

    async def work() -> None:
        while time.perf_counter() < ends:
            await caller.acall()

    await asyncio.gather(watch(), *(work() for _ in range(TASKS)))
    return sorted(lags)[len(lags) * 99 // 100]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=("bare", "metered"))
    parser.add_argument("way", choices=("sequential", "threads", "tasks", "stream", "lag"))
    parser.add_argument("--port", required=True)
    parser.add_argument("--ledger")
    parser.add_argument("--durability", default="full")
    parser.add_argument("--pricing", default="per_call")
    arguments = parser.parse_args()

    caller = Caller(arguments)
    ways: dict[str, Callable[[Caller, int], Any]] = {
        "sequential": sequential,
        "threads": threads,
        "tasks": tasks,
        "stream": Caller.stream,
        "lag": lag,
    }
    way = ways[arguments.way]
    with asyncio.Runner() as runner:
        # From the end of the last block: what threads in the background did since then belongs to the calls before.
        before = time.process_time()
        print("{}", flush=True)
        for line in sys.stdin:
            began = time.perf_counter()
            result = way(caller, int(line))
            if asyncio.iscoroutine(result):
                result = runner.run(result)
            wall = time.perf_counter() - began
            now = time.process_time()
            print(json.dumps({"cpu": now - before, "wall": wall, "result": result}), flush=True)
            if not gc.get_freeze_count():
                # What the start left is not looked through again: a full collection costs as much as ten calls, and when it comes
                # is chance. What calls leave behind is collected, and counted.
                gc.collect()
                gc.freeze()
            before = time.process_time()


if __name__ == "__main__":
    main()
