"""A payment and its credits in one transaction, here with SQLAlchemy: both are there, or neither. Needs PostgreSQL."""

import os

from sqlalchemy import create_engine, text

from metered_ai import connect

billing = connect()  # METERED_AI_BILLING, such as postgresql://app@db/shop
engine = create_engine(os.environ["DATABASE_URL"])  # the same database: postgresql+psycopg://app@db/shop


def paid(order: str, customer: str, credits: int, *, is_fraud: bool = False) -> None:
    """What the payment provider's webhook calls; it may come twice."""
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO orders VALUES (:id) ON CONFLICT DO NOTHING"), {"id": order})
        # The psycopg connection underneath, with SQLAlchemy's transaction on it.
        with billing.in_transaction(connection.connection.driver_connection) as books:
            books.grant(customer, "generations", credits, id=order)
        if is_fraud:
            raise ValueError(f"{order} is refused")


if __name__ == "__main__":
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE IF NOT EXISTS orders (id text PRIMARY KEY)"))

    paid("order_1", "ada", 100)
    paid("order_1", "ada", 100)
    try:
        paid("order_2", "ada", 50, is_fraud=True)
    except ValueError as error:
        print(error)
    with engine.connect() as connection:
        print("orders:", connection.execute(text("SELECT count(*) FROM orders")).scalar())
    print("credits:", billing.balance("ada", "generations").available)
    billing.close()
