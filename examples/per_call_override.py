"""
Another meter, price or customer for one call, or for a part of a program: `with_billing` makes a client that bills differently.

Needs OPENAI_API_KEY; OPENAI_BASE_URL for another server.
"""

from metered_ai import MeteredOpenAI

client = MeteredOpenAI(customer="ada", meter="generations")
client.billing.grant("ada", "generations", 10, id="order_42")
client.billing.grant("ada", "images", 10, id="order_42")

client.responses.create(model="gpt-5-mini", input="Name a colour.")

# One call on another meter, at another price. It shares the connections of `client`, which stays as it was.
client.with_billing(meter="images", amount=4).images.generate(model="gpt-image-1", prompt="A fox in the snow")

# The nearest word wins field by field: the customer is still ada, here with an id of the application's own.
order = client.with_billing(transaction_id="invoice_7", properties={"feature": "invoices"})
order.responses.create(model="gpt-5-mini", input="Write an invoice.")

for event in client.billing.usage_events("ada"):
    print(
        event.meter,
        event.amount,
        event.transaction_id if event.transaction_id == "invoice_7" else "",
        event.properties or "",
    )
