"""
The OpenAI client, metered: change the import, say who pays, and every call costs credits.

Needs OPENAI_API_KEY; OPENAI_BASE_URL for another server. Credits are kept in sqlite:///metered_ai.db, or where METERED_AI_BILLING says.
"""

from metered_ai import InsufficientCreditsError, MeteredOpenAI, bill_to

client = MeteredOpenAI(meter="generations")
client.billing.grant("ada", "generations", 2, id="order_42")  # once, however often this program runs

with bill_to("ada") as bill:
    for _ in range(3):
        try:
            answer = client.responses.create(model="gpt-5-mini", input="Say hello in five words.")
            print(answer.output_text)
        except InsufficientCreditsError as error:
            print(f"refused: {error.available} available, {error.required} required")

for event in bill.events:
    print(f"billed: {event.amount} credit, transaction {event.transaction_id}")

balance = client.billing.balance("ada", "generations")
print(f"balance: {balance.used} of {balance.limit} used")
