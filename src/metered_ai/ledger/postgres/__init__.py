"""The ledger of a fleet: PostgreSQL (extra `postgres`)."""

from .ledger import PostgresLedger

__all__ = ["PostgresLedger"]
