"""
Prices: by token with a true upper bound, and any function from `Usage` to whole credits.

Needs OPENAI_API_KEY; OPENAI_BASE_URL for another server.
"""

from decimal import Decimal

from metered_ai import MeteredOpenAI, PriceUnknownError, Usage, bill_to, per_token

# Credits per 1,000 tokens. cap_output sends an output limit where the call has none, so no call can cost more than was held.
by_token = per_token(input=Decimal("0.25"), output=2, per=1000, cap_output=True)

RATES = {"gpt-5-mini": 1, "gpt-5": 5}


def by_model(usage: Usage) -> int:
    """Used twice: for the hold, with what the call may use at most, and for the charge, with what it did use."""
    for name, rate in RATES.items():
        if usage.model is not None and usage.model.split("-20")[0] == name:
            return rate * (1 + (usage.output_tokens or 0) // 1000)
    raise PriceUnknownError(f"no price for {usage.model!r}")


client = MeteredOpenAI(meter="credits")
client.billing.grant("ada", "credits", 100, id="order_42")

with bill_to("ada", pricing=by_token) as bill:
    client.responses.create(model="gpt-5-mini", input="Say hello in five words.")
event = bill.events[0]
print(f"by token: {event.amount} ({event.usage.input_tokens} in, {event.usage.output_tokens} out)")

with bill_to("ada", pricing=by_model) as bill:
    client.responses.create(model="gpt-5", input="Say hello in five words.")
    print(f"by model: {bill.amount}")
    try:
        client.responses.create(model="gpt-2", input="Say hello in five words.")
    except PriceUnknownError as error:
        print(f"not sent: {error}")
