"""The PostgreSQL ledger keeps the contract of every ledger, on a real server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from metered_ai.ledger import Ledger
from metered_ai.ledger.postgres import PostgresLedger
from metered_ai.testing import Clock, SharedLedgerContract
from metered_ai.testing.contract.books import Together
from metered_ai.testing.contract.holds import Placing, Releasing
from metered_ai.testing.contract.serving import ServiceLedgerContract
from metered_ai.testing.contract.settles import Late, SameAnswer, Settling
from tests.postgres.server import drop_schemas, new_schema, with_schema


class TestPostgres(SharedLedgerContract):
    @pytest.fixture(autouse=True)
    def _server(self, postgres_server: str) -> Iterator[None]:
        self.server = postgres_server
        self.schemas: dict[Path, str] = {}
        yield
        drop_schemas(postgres_server, self.schemas.values())

    def make_ledger(self, tmp_path: Path, clock: Clock) -> Ledger:
        schema = self.schemas.setdefault(tmp_path, new_schema())
        return PostgresLedger(with_schema(self.server, schema), clock=clock)


class OneByOne(PostgresLedger):
    """Takes no batch: every step goes the way that unusual ones go."""

    def _together(self, *_: object) -> None:
        return


class TestPostgresOneByOne(Placing, Settling, SameAnswer, Late, Releasing, Together):
    """The chapters that are about what batches take otherwise."""

    _server = TestPostgres._server

    def make_ledger(self, tmp_path: Path, clock: Clock) -> Ledger:
        schema = self.schemas.setdefault(tmp_path, new_schema())
        return OneByOne(with_schema(self.server, schema), clock=clock)


class TestPostgresService(ServiceLedgerContract):
    """What it promises besides, where a remote service owns the balances."""

    _server = TestPostgres._server
    make_ledger = TestPostgres.make_ledger


class TestPostgresServiceOneByOne(ServiceLedgerContract):
    """The same where no step goes in a batch: triggers alone write the outbox."""

    _server = TestPostgres._server
    make_ledger = TestPostgresOneByOne.make_ledger
