"""
Streams: the credits are held before the first word and settled after the last one. A stream that is left early is settled, too.

Needs OPENAI_API_KEY; OPENAI_BASE_URL for another server.
"""

from openai import Stream
from openai.types.chat import ChatCompletionChunk

from metered_ai import MeteredOpenAI, bill_to

client = MeteredOpenAI()
client.billing.grant("ada", "generations", 10, id="order_42")


def tell() -> Stream[ChatCompletionChunk]:
    return client.chat.completions.create(
        model="gpt-5-mini", messages=[{"role": "user", "content": "Tell me a story about a fox."}], stream=True
    )


with bill_to("ada") as bill:
    for chunk in tell():
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()
    print(f"to the end: {bill.amount} credit")

with bill_to("ada") as bill:
    # `with` closes the stream when the block is left, which is when it is settled.
    with tell() as stream:
        for _ in stream:
            break
    client.billing.flush()  # an early end is settled in the background; a balance waits for it by itself
    print(f"left early: {bill.amount} credit")

held = client.billing.balance("ada", "generations").held
print(f"still held: {held}")
