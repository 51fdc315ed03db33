"""The public names."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import metered_ai
from metered_ai import errors

CLIENTS = {"MeteredOpenAI", "AsyncMeteredOpenAI", "MeteredAzureOpenAI", "AsyncMeteredAzureOpenAI"}
FUNCTIONS = {"bill_to", "connect", "operation_id", "per_call", "per_token"}
RECORDS = {"Balance", "Billing", "Grant", "Hold", "Receipt", "Request", "Usage", "UsageEvent", "UsageSum"}


def test_names():
    """What is exported is what is promised: the clients, `Billing` and its records, the functions, every error."""
    assert CLIENTS | FUNCTIONS | RECORDS | set(errors.__all__) == set(metered_ai.__all__)


def test_in_order():
    """`__all__` is sorted and names nothing twice, so that a diff shows what was added."""
    assert sorted(set(metered_ai.__all__)) == metered_ai.__all__


def test_all_is_all():
    """Every name in `__all__` is there, and nothing else is public but the modules."""
    public = {
        name for name, value in vars(metered_ai).items() if not name.startswith("_") and not inspect.ismodule(value)
    }

    assert public == set(metered_ai.__all__)


def test_star_import():
    """`from metered_ai import *` gives the public names."""
    names = {}
    exec("from metered_ai import *", names)

    assert set(metered_ai.__all__) == set(names) - {"__builtins__"}


def test_documented():
    """Everything public says what it is."""
    assert [] == [name for name in metered_ai.__all__ if not getattr(metered_ai, name).__doc__]


def test_methods_documented():
    """Every public method of our own classes says what it does."""
    types = [value for name in RECORDS if inspect.isclass(value := getattr(metered_ai, name))]
    methods = [
        method
        for kind in types
        for name, method in vars(kind).items()
        if not name.startswith("_") and (inspect.isfunction(method) or isinstance(method, property))
    ]

    assert len(methods) >= 30
    assert [] == [method for method in methods if not method.__doc__]


def test_package_only_imports():
    """The package's own file imports and lists names, nothing more."""
    body = ast.parse(Path(metered_ai.__file__).read_text()).body
    kinds = [type(node) for node in body if not isinstance(node, ast.ImportFrom)]

    assert [ast.Expr, ast.Assign] == kinds


def test_async_twins():
    """Every question to a `Billing` has an async form that begins with "a"."""
    own = [name for name in vars(metered_ai.Billing) if not name.startswith("_")]
    # in_transaction: psycopg's own connection, in the thread whose transaction it is.
    sync_only = {"charge", "ledger", "policies", "flush", "in_transaction"}
    missing = [name for name in own if name not in sync_only and not name.startswith("a") and f"a{name}" not in own]

    assert [] == missing
