"""What a real server says about its own work: the truth that a ledger is compared with."""

from __future__ import annotations

import time
from contextlib import contextmanager

HI = [{"role": "user", "content": "Tell me about water in winter."}]

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "nice": {"type": "boolean"}},
    "required": ["name", "age", "nice"],
}


@contextmanager
def counted(server):
    """What the server counts while the block runs, until it works on nothing any more: prompt tokens and predicted tokens."""
    count = []
    before = idle(server)
    yield count
    after = idle(server)
    count.extend(after[name] - before[name] for name in ("prompt_tokens_total", "tokens_predicted_total"))


def idle(server, timeout=30.0):
    """The server's metrics, once every request has ended: of a stream that was left early it learns a little later."""
    deadline = time.monotonic() + timeout
    while (metrics := server.metrics())["requests_processing"] or metrics["requests_deferred"]:
        assert time.monotonic() < deadline, metrics
        time.sleep(0.01)
    return metrics


def tokens(billing, customer=None):
    """The ledger's count of the same: input and output tokens of every usage event, added up."""
    sums = list(billing.usage(customer, by=()))
    return [sum(each.input_tokens for each in sums), sum(each.output_tokens for each in sums)]


def all_ended(shell, billing, timeout=30.0):
    """Wait until no call is held any more, while the loop, if there is one, runs on."""
    deadline = time.monotonic() + timeout
    while holds := list(billing.holds(state="open")):
        assert time.monotonic() < deadline, holds
        shell.pause(0.01)
        time.sleep(0.01)
