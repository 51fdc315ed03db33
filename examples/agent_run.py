"""
One price for an agent's run, however many calls it makes: they are recorded at 0 credits, linked to the run.

Needs OPENAI_API_KEY; OPENAI_BASE_URL for another server.
"""

from metered_ai import Billing, InsufficientCreditsError, MeteredOpenAI, connect


def run_agent(client: MeteredOpenAI, task: str) -> str:
    """Somebody else's code: it knows nothing of customers and credits."""
    text = task
    for step in ("Plan", "Do", "Check"):
        text = client.responses.create(model="gpt-5-mini", input=f"{step}: {text}").output_text
    return text


def sell(billing: Billing, client: MeteredOpenAI, customer: str) -> None:
    with billing.charge(customer, "runs", amount=10, covers_calls=True) as charge:
        run_agent(client, "Water the garden.")
    used = [event.usage.output_tokens for event in charge.receipt.events]
    print(f"{customer}: {charge.event.amount} credits for {len(used)} calls, which cost {charge.receipt.amount}")


with connect() as billing, MeteredOpenAI(billing=billing) as client:
    billing.grant("ada", "runs", 15, id="order_42")
    sell(billing, client, "ada")
    try:
        sell(billing, client, "ada")
    except InsufficientCreditsError as error:
        print(f"ada: refused before the first call, {error.available} of {error.required} credits")
