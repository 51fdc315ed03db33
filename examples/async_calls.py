"""
Async calls for several customers at once. Each pays for its own; ten calls on five credits are five answers and five refusals.

Needs OPENAI_API_KEY; OPENAI_BASE_URL for another server.
"""

import asyncio

from metered_ai import AsyncMeteredOpenAI, InsufficientCreditsError, bill_to


async def ask(client: AsyncMeteredOpenAI, customer: str) -> str:
    # A block belongs to its task: calls for other customers that run meanwhile never see it.
    with bill_to(customer):
        try:
            await client.responses.create(model="gpt-5-mini", input="Say hello in five words.")
        except InsufficientCreditsError:
            return "refused"
    return "answered"


async def main() -> None:
    async with AsyncMeteredOpenAI() as client:
        for customer in ("ada", "bob"):
            await client.billing.agrant(customer, "generations", 5, id="welcome")

        answers = await asyncio.gather(*(ask(client, customer) for customer in ["ada"] * 10 + ["bob"] * 3))
        print(f"ada: {answers[:10].count('answered')} answered, {answers[:10].count('refused')} refused")
        print(f"bob: {answers[10:].count('answered')} answered, {answers[10:].count('refused')} refused")

        for customer in ("ada", "bob"):
            balance = await client.billing.abalance(customer, "generations")
            print(f"{customer}: {balance.available} left")


asyncio.run(main())
