"""The command line as a person and as a script meet it: what it prints, its exit codes, and one line for every mistake."""

from __future__ import annotations

import json
import os
import pty
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

import metered_ai
from metered_ai import Balance, Usage, connect
from metered_ai.cli import commands, main, show
from metered_ai.cli.dates import read_date
from metered_ai.core.steps import Place, Settle
from metered_ai.ledger.reports import Recovery, Verification
from metered_ai.ledger.spool import Spool

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
READERS = [("balance", "ada"), ("events",), ("holds",), ("recover",), ("verify",)]
ADA, GEN = "ada", "generations"
HOSTILE = "[red]x[/red]\x1b[31m\u202e:smile:\n"


@pytest.fixture
def path(tmp_path, monkeypatch):
    """Where the ledger is: named by the environment, as in an application."""
    path = tmp_path / "credits.db"
    monkeypatch.setenv("METERED_AI_BILLING", f"sqlite:///{path}")
    monkeypatch.chdir(tmp_path)
    return path


@pytest.fixture
def billing(path):
    """The application's own billing, beside which the command line works."""
    with connect(f"sqlite:///{path}", durability="relaxed") as billing:
        yield billing


@pytest.fixture
def cli(path, capsys):
    """Runs a command; gives its exit code, what it printed, and what it complained of."""

    def run(*arguments):
        code = main(arguments)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def start(*arguments, python=(), **options):
    """A command in a process of its own, as a shell starts it."""
    environment = {**os.environ, "PYTHONPATH": str(Path(metered_ai.__file__).parents[1]), **options.pop("env", {})}
    command = [sys.executable, *python, "-m", "metered_ai.cli", *arguments]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, **options)


def place(hold_id, **more):
    return Place(hold_id, ADA, GEN, 3, None, **more)


def abandon(billing):
    """One call in flight, and one whose time is over."""
    billing.grant(ADA, GEN, 10, id="order_1")
    billing.ledger.run(place("h_alive", model="gpt-5-mini"))
    billing.ledger.run(place("h_dead", max_call=1e-6))


def use(billing, count=3, customer=ADA):
    for n in range(count):
        billing.record(customer, GEN, transaction_id=f"export_{n}", amount=n)


# ---- grant and balance ----


def test_grant(cli, path):
    """A grant makes the ledger, for its owner's eyes only, and shows the balance. Repeated it gives nothing more, and says so."""
    code, out, err = cli("grant", ADA, GEN, "1200", "--id", "order_1", "--expires", "2126-12-31 18:00")
    again = cli("grant", ADA, GEN, "1200", "--id", "order_1")

    assert (0, "") == (code, err)
    assert "Granted 1,200 credits on generations to ada (id order_1, until 2126-12-31 18:00:00 UTC)." in out
    assert "0 of 1,200 used, 1,200 available" in out
    assert 0o600 == stat.S_IMODE(path.stat().st_mode)
    assert again[0] == 0
    assert "Granted before" in again[1]
    assert "0 of 1,200 used" in again[1]


def test_grant_conflict(cli):
    """The id of a grant with another amount is refused: exit 1, the first stands."""
    cli("grant", ADA, GEN, "10", "--id", "order_1")
    code, out, err = cli("grant", ADA, GEN, "11", "--id", "order_1")

    assert (1, "", 1) == (code, out, err.count("\n"))
    assert "order_1" in err
    assert "0 of 10 used" in cli("balance", ADA)[1]


def test_balance(cli, billing):
    """Each meter has its bar and numbers, one meter can be asked for, an unlimited account is shown as such."""
    billing.grant(ADA, GEN, 100, id="order_1")
    billing.record(ADA, GEN, transaction_id="t", amount=80)
    billing.ledger.run(place("h"))
    billing.set_unlimited(ADA, "images", True)
    billing.record(ADA, "images", transaction_id="t", amount=4)
    out = cli("balance", ADA)[1]

    assert "80 %  80 of 100 used, 17 available, 3 held (high)" in out
    assert "unlimited" in out
    assert "4 used without a limit" in out
    assert "images" not in cli("balance", ADA, GEN)[1]


def test_no_account(cli, billing):
    """A customer nobody has heard of has no account and 0 credits; that is no mistake."""
    billing.grant(ADA, GEN, 1, id="order_1")

    assert (0, "bob has no account: 0 credits.\n", "") == cli("balance", "bob")
    assert (0, "ada has no account on images: 0 credits.\n", "") == cli("balance", ADA, "images")
    assert [] == json.loads(cli("balance", "bob", "--json")[1])
    (zeros,) = json.loads(cli("balance", ADA, "images", "--json")[1])
    assert (False, 0, 0) == (zeros["has_account"], zeros["limit"], zeros["available"])


def drawn(balance, **options):
    """A bar with its colours, as a terminal gets it."""
    out = Console(file=StringIO(), force_terminal=True, color_system="standard", width=120, **options)
    out.print(show.balance_bars([balance]))
    return out.file.getvalue()


@pytest.mark.parametrize(
    ("used", "colour", "word"),
    [
        (0, 32, ""),
        (75, 32, ""),
        (76, 33, "(high)"),
        (90, 33, "(high)"),
        (91, 31, "(critical)"),
        (100, 31, "(exhausted)"),
    ],
)
def test_thresholds(used, colour, word, monkeypatch):
    """Over 75 % a bar is yellow, over 90 % red, and words say the same."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    bar = drawn(Balance(ADA, GEN, 100, used, 0, 100 - used, 0))

    assert {f"\x1b[{colour}m"} == {code for code in (f"\x1b[{n}m" for n in (31, 32, 33)) if code in bar}
    assert word in bar
    assert ("(" in bar) == bool(word)


@pytest.mark.parametrize(
    ("limit", "used", "held", "bar"),
    [
        (100, 0, 0, "░" * 28),
        (100, 1, 0, "█" + "░" * 27),
        (100, 99, 0, "█" * 27 + "░"),
        (100, 50, 25, "█" * 14 + "▓" * 7 + "░" * 7),
        (100, 100, 0, "█" * 28),
        (100, 130, 20, "█" * 28),
        (0, 0, 0, "█" * 28),
    ],
)
def test_bar(limit, used, held, bar):
    """A little use shows, a little that is left shows, too; what is held is told apart; debt fills the bar and no more."""
    left = limit - used - held
    balance = Balance(ADA, GEN, limit, used, held, max(0, left), max(0, -left))

    assert bar == str(show._bar(balance, 28))


# ---- lists ----


def test_events(cli, billing):
    """Events are a table, the newest last; filters work; a limit is said."""
    billing.grant(ADA, GEN, 100, id="order_1")
    use(billing)
    use(billing, 1, "bob")
    billing.ledger.run(place("h"))
    usage = Usage(model="gpt-5-mini", input_tokens=1200, output_tokens=34)
    billing.ledger.run(Settle("h", ADA, GEN, 3, "gen_resp_1", "reported", usage=usage))
    out = cli("events")[1]

    assert 6 == out.count("\n")
    assert out.splitlines()[0].split() == "time (UTC) customer meter credits basis model tokens transaction id".split()
    assert out.splitlines()[-1].split()[2:] == "ada generations 3 reported gpt-5-mini 1,200 + 34 gen_resp_1".split()
    assert "gen_resp_1" in cli("events", "--limit", "1")[1]
    assert "The newest 1 of 5 usage events; --limit 0 shows all." in cli("events", "--limit", "1")[1]
    assert ["bob"] == [event["customer"] for event in json.loads(cli("events", "--customer", "bob", "--json")[1])]
    assert "No usage events." in cli("events", "--until", "-1h")[1]
    assert 5 == len(json.loads(cli("events", "--since", "-1h", "--json")[1]))
    assert 2 == len(json.loads(cli("events", "--limit", "2", "--json")[1]))
    assert [] == json.loads(cli("events", "--meter", "images", "--json")[1])


def test_many_events(cli, billing):
    """A table ends at 50 rows unless told otherwise; JSON has them all."""
    use(billing, 60)

    assert 52 == cli("events")[1].count("\n")
    assert 61 == cli("events", "--limit", "0")[1].count("\n")
    assert 60 == len(json.loads(cli("events", "--json")[1]))
    assert 60 == len(json.loads(cli("events", "--json", "--limit", "0")[1]))


def test_holds(cli, billing):
    """Calls in flight and calls in doubt are told apart; filters work."""
    abandon(billing)
    billing.recover()
    out = cli("holds")[1]

    assert 3 == out.count("\n")
    assert "expired: unknown, in doubt" in out
    assert "h_alive" in out
    assert ["h_alive"] == [hold["id"] for hold in json.loads(cli("holds", "--state", "open", "--json")[1])]
    assert [True] == [hold["is_in_doubt"] for hold in json.loads(cli("holds", "--state", "expired", "--json")[1])]
    assert "No holds." in cli("holds", "--since", "+1h")[1]
    assert "No holds." in cli("holds", "--until", "-1h")[1]
    assert 1 == len(json.loads(cli("holds", "--limit", "1", "--json")[1]))


# ---- recover and verify ----


def test_recover(cli, billing):
    """What a dead process held is released and told; the living are left alone; a second time there is nothing to do."""
    abandon(billing)
    out, again = cli("recover")[1], cli("recover", "--json")[1]

    assert "Released 1 hold of calls whose process died; they cost the customer nothing." in out
    assert "In doubt: 1 call whose answer nobody got; the provider may have billed you." in out
    assert "1 call in flight, left alone: their leases run." in out
    assert {
        **dict.fromkeys(("released", "charged", "in_doubt", "charged_amount", "replayed", "parked"), 0),
        "still_open": 1,
    } == (json.loads(again))


def test_recover_spool(cli, billing, path):
    """Records that a dead process kept beside the ledger are brought in and told; one that can never be taken is exit 1."""
    billing.grant(ADA, GEN, 10, id="order_1")
    billing.ledger.run(place("h"))
    spool = Spool(path)
    spool.write(Settle("h", ADA, GEN, 3, "gen_resp_1", "reported"))
    spool.write(Settle("h_odd", ADA, GEN, -1, "gen_resp_2", "reported"))
    spool.close()
    code, out, _ = cli("recover")

    assert 1 == code
    assert "Brought in 1 record that a process had kept beside the ledger." in out
    assert "Put aside 1 record that the ledger can never take; they need a person." in out
    assert "3 of 10 used" in cli("balance", ADA)[1]


def test_recovery_words():
    """Charged holds are told with their credits."""
    words = show.recovery_words(Recovery(charged=2, charged_amount=1500), still_open=0)

    assert ["Charged 2 holds of calls whose process died: 1,500 credits."] == words


def test_verify(cli, billing):
    """A sound ledger is exit 0, with its counts, its doubt and its debt."""
    abandon(billing)
    billing.record(ADA, GEN, transaction_id="t", amount=12)
    billing.recover()
    code, out, err = cli("verify")

    assert (0, "") == (code, err)
    assert "Sound: 1 account, 1 usage event, 1 grant, 1 open hold; every sum adds up." in out
    assert "In doubt: 1 call of 3 credits, released, that may have cost you." in out
    assert "Debt: 5 credits over all meters." in out


def test_broken(cli, billing, path):
    """A ledger that was tampered with is exit 1, and each violation is a sentence."""
    billing.grant(ADA, GEN, 10, id="order_1")
    billing.record(ADA, GEN, transaction_id="t", amount=4)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE account SET used = 3, allocated = 0")
    code, out, err = cli("verify")
    told = json.loads(cli("verify", "--json")[1])

    assert (1, "") == (code, err)
    assert out.startswith("Broken: ")
    assert "'ada'" in out
    assert (False, 1) == (told["is_sound"], cli("verify", "--json")[0])
    assert len(told["broken"]) == out.count("\n") - 1


def test_hostile_verification():
    """A violation names its customer without passing on what the name does to a terminal."""
    words = show.verification_words(Verification(broken=("customer \x1b[31m is off",)))

    assert "  customer \\x1b[31m is off" == words[1]


# ---- JSON ----

KEYS = {
    (
        "grant",
        ADA,
        GEN,
        "10",
        "--id",
        "order_1",
    ): "customer meter id amount created_at expires_at spent expired revoked is_repeat",
    ("balance", ADA): (
        "customer meter limit used held available debt unlimited_used is_estimate percent_used level show_upgrade is_exhausted has_account"
    ),
    ("events",): (
        "customer meter transaction_id amount created_at basis kind hold_id usage request_id attempts properties price_slug parent "
        "is_unlimited is_late"
    ),
    ("holds",): (
        "id customer meter amount state placed_at expires_at ended_at reason sent transaction_id endpoint model parent is_unlimited "
        "is_repeat is_in_doubt"
    ),
    ("recover",): "released charged in_doubt charged_amount replayed parked still_open",
    ("verify",): "is_sound accounts events grants open_holds in_doubt in_doubt_amount debt broken",
}


@pytest.mark.parametrize("command", KEYS, ids=lambda command: command[0])
def test_json(command, cli, billing):
    """JSON has the keys that --help names, and only those: programs lean on them."""
    abandon(billing)
    billing.ledger.run(place("h_used"))
    billing.ledger.run(Settle("h_used", ADA, GEN, 3, "gen_1", "reported", usage=Usage(model="m"), properties={"a": 1}))
    code, out, err = cli(*command, "--json")
    told = json.loads(out)
    first = told[0] if isinstance(told, list) else told
    documented = cli(command[0], "--help")[1].split("JSON", 1)[1].split("Options:")[0]

    assert (0, "") == (code, err)
    assert KEYS[command].split() == list(first)
    keys = [*first, *(first["usage"] if command == ("events",) else ())]
    assert [] == [key for key in keys if key not in documented.replace(",", " ").replace(".", " ").split()]


def test_json_values(cli, billing):
    """Times in JSON are ISO 8601 in UTC; a name is there as it is, however odd."""
    billing.record(HOSTILE.strip(), GEN, transaction_id="t", amount=2**53 - 1)
    _, out, _ = cli("events", "--json")
    (event,) = json.loads(out)

    assert (HOSTILE.strip(), 2**53 - 1) == (event["customer"], event["amount"])
    assert timedelta(0) == datetime.fromisoformat(event["created_at"]).utcoffset()
    assert out.isascii()
    assert "\x1b" not in out


# ---- what people type ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2026-12-31", "2026-12-31T00:00:00+00:00"),
        ("2026-12-31 18:00", "2026-12-31T18:00:00+00:00"),
        (" 2026-12-31T18:00:05 ", "2026-12-31T18:00:05+00:00"),
        ("2026-12-31 18:00 UTC", "2026-12-31T18:00:00+00:00"),
        ("2026-12-31T18:00:00Z", "2026-12-31T18:00:00+00:00"),
        ("2026-12-31T18:00:00+02:00", "2026-12-31T16:00:00+00:00"),
        ("now", "2026-11-23T12:00:00+00:00"),
        ("+30d", "2026-12-23T12:00:00+00:00"),
        ("-12h", "2026-11-23T00:00:00+00:00"),
        ("+2w", "2026-12-07T12:00:00+00:00"),
        ("-90m", "2026-11-23T10:30:00+00:00"),
        ("+5s", "2026-11-23T12:00:05+00:00"),
    ],
)
def test_dates(text, expected, monkeypatch):
    """Dates as people write them, in UTC wherever the machine is."""
    with monkeypatch.context() as there:
        there.setenv("TZ", "JST-9")
        time.tzset()
        read = read_date(text, "--since", NOW).isoformat()
    time.tzset()

    assert expected == read


@pytest.mark.parametrize(
    "text", ["", "tomorrow", "2026-13-01", "31.12.2026", "30d", "+30", "+999999999d", "0001-01-01T00:00:00+14:00"]
)
def test_bad_dates(text):
    """What is no date is refused with its text."""
    with pytest.raises(ValueError, match="--since must be a date such as") as caught:
        read_date(text, "--since", NOW)

    assert repr(text) in str(caught.value)


MISTAKES = [
    (("frobnicate",), "frobnicate"),
    (("grnt",), "Did you mean 'grant'?"),
    (("grant", ADA, GEN, "5"), "--id"),
    (("grant", ADA), "METER"),
    (("grant", ADA, GEN, "1.5", "--id", "x"), "'1.5'"),
    (("grant", ADA, GEN, "0", "--id", "x"), "AMOUNT must be an int from 1"),
    (("grant", ADA, GEN, "-5", "--id", "x"), "-5"),
    (("grant", ADA, GEN, "1_000", "--id", "x"), "'1_000'"),
    (("grant", ADA, GEN, "٣", "--id", "x"), "'٣'"),
    (("grant", ADA, GEN, str(2**53), "--id", "x"), "9007199254740991"),
    (("grant", ADA, GEN, "9" * 5000, "--id", "x"), "'9999"),
    (("grant", "", GEN, "5", "--id", "x"), "CUSTOMER must have 1 to 256 characters"),
    (("grant", ADA, " ", "5", "--id", "x"), "METER must not begin or end with white space"),
    (("grant", ADA, GEN, "5", "--id", ""), "--id must have 1 to 255 characters"),
    (("grant", ADA, GEN, "5", "--id", "x", "--expires", "soon"), "'soon'"),
    (("grant", "\udcff", GEN, "5", "--id", "x"), "lone surrogates"),
    (("balance", ""), "CUSTOMER"),
    (("balance", ADA, ""), "METER"),
    (("balance",), "CUSTOMER"),
    (("events", "--since", "soon"), "--since must be a date"),
    (("events", "--customer", ""), "--customer"),
    (("events", "--limit", "-1"), "--limit"),
    (("events", "--limit", "many"), "--limit"),
    (("events", "--frob"), "--frob"),
    (("holds", "--state", "lost"), "lost"),
    (("balance", ADA, "--ledger", ""), "''"),
    (("balance", ADA, "--ledger", "credits.db"), "credits.db"),
    (("balance", ADA, "--ledger", "oracle://user:secret@host"), "oracle://"),
    (("balance", ADA, "--ledger", "postgresql://user:secret@host"), "postgresql"),
    (("balance", ADA, "--ledger", "sqlite:///a%00b"), "null"),
    (("balance", ADA, "--ledger", "memory://"), "memory://"),
    (("grant", ADA, GEN, "5", "--id", "x", "--ledger", "memory://"), "memory://"),
    (("grant", ADA, GEN, "5", "--id", "x", "--ledger", "sqlite:////nowhere/at/all.db"), "'/nowhere/at'"),
    (("verify", "--ledger", "sqlite:////"), "'/'"),
    (("grant", ADA, GEN, "5", "--id", "x\x1b[31m", "--ledger", "sqlite:///\x1b[31m/x.db"), "\\x1b[31m"),
]


@pytest.mark.parametrize(
    ("arguments", "said"), MISTAKES, ids=lambda value: None if isinstance(value, str) else " ".join(value)[:40]
)
def test_mistakes(arguments, said, cli, tmp_path):
    """A mistake is exit 2 and one line that says what is wrong; nothing is printed, nothing made, no secret repeated."""
    code, out, err = cli(*arguments)

    assert (2, "", 1) == (code, out, err.count("\n"))
    assert err.startswith("metered-ai: ")
    assert said.lower() in err.lower()
    assert "secret" not in err
    assert "\x1b" not in err
    assert [] == list(tmp_path.iterdir())


@pytest.mark.parametrize("command", READERS, ids=lambda command: command[0])
def test_missing(command, cli, path):
    """A command that reads makes no ledger: not where there is no file, and not out of an empty one."""
    missing = cli(*command)
    made = path.exists()
    path.touch()
    empty = cli(*command)

    assert (2, "", 1) == (missing[0], missing[1], missing[2].count("\n"))
    assert f"there is no ledger at '{path}'" in missing[2]
    assert not made
    assert missing == empty
    assert 0 == path.stat().st_size


def test_default_file(cli, monkeypatch, tmp_path):
    """Without --ledger and METERED_AI_BILLING the ledger is metered_ai.db in this folder; --ledger comes first."""
    monkeypatch.delenv("METERED_AI_BILLING")
    cli("grant", ADA, GEN, "5", "--id", "x")
    here = (tmp_path / "metered_ai.db").exists()
    cli("grant", ADA, GEN, "5", "--id", "x", "--ledger", "sqlite:///other.db")

    assert here
    assert (tmp_path / "other.db").exists()


# ---- ledgers that cannot be used ----


def test_locked(cli, billing, path, monkeypatch):
    """A ledger that another process keeps locked is exit 2 after a short wait."""
    billing.grant(ADA, GEN, 5, id="order_1")
    monkeypatch.setattr(commands, "PATIENCE", 0.05)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        before = time.monotonic()
        code, out, err = cli("grant", ADA, GEN, "5", "--id", "order_2")
        waited = time.monotonic() - before

    assert waited < 10
    assert (2, "", 1) == (code, out, err.count("\n"))
    assert "locked" in err


@contextmanager
def opened(path):
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        yield connection


def newer(path):
    with opened(path) as connection:
        connection.execute("PRAGMA user_version = 99")


def foreign(path):
    path.unlink()
    with opened(path) as connection:
        connection.execute("CREATE TABLE t (x)")


def garbage(path):
    path.write_bytes(b"no database at all\n" * 100)


def folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("spoil", "said"), [(newer, "99"), (foreign, "not a ledger"), (garbage, "database"), (folder, "credits.db")]
)
def test_unusable(spoil, said, cli, path):
    """A newer, foreign, damaged or impossible file is exit 2 and left as it is."""
    cli("grant", ADA, GEN, "5", "--id", "order_1")
    spoil(path)
    for command in READERS:
        code, out, err = cli(*command)

        assert (2, "", 1) == (code, out, err.count("\n"))
        assert said in err


# ---- terminals ----


def test_hostile(cli, billing):
    """Names with markup, escapes or tricks of direction are shown as text in every command: nothing reaches the terminal."""
    name = HOSTILE.strip()
    billing.grant(name, name, 10, id=name)
    billing.record(name, name, transaction_id=name, amount=1, properties={name: name})
    billing.ledger.run(Place("h", name, name, 1, None, model=name, max_call=1e-6))
    commands = [
        ("grant", name, name, "10", "--id", name),
        ("grant", name, name, "11", "--id", name),
        ("balance", name),
        ("balance", name, "\x1b]0;pwned\x07"),
        ("balance", f"{name}!"),
        ("events",),
        ("events", "--customer", f"{HOSTILE}"),
        ("holds",),
        ("recover",),
        ("verify",),
    ]
    said = ["".join(cli(*command)[1:]) for command in commands]

    assert [] == [text for text in said if not text.replace("\n", "").isprintable()]
    assert all("[red]x[/red]" in text for text in said[:-2])
    assert all("\\x1b[31m\\u202e:smile:" in text for text in said[:3])


def in_terminal(*arguments, **environment):
    """What a command writes to a real terminal."""
    ours, its = pty.openpty()
    with start(
        *arguments, stdin=its, stdout=its, env={"TERM": "xterm-256color", "COLUMNS": "100", **environment}
    ) as process:
        os.close(its)
        said = b""
        try:
            while part := os.read(ours, 4096):
                said += part
        except OSError:
            # How Linux says that the other side is closed.
            pass
        process.wait(30)
    os.close(ours)
    return said.decode()


def test_colours(billing, monkeypatch):
    """Colours are for terminals: not with NO_COLOR, not in a pipe."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    billing.grant(ADA, GEN, 5, id="order_1")
    billing.close()
    coloured, plain = in_terminal("balance", ADA), in_terminal("balance", ADA, NO_COLOR="1")
    with start("balance", ADA, stdout=subprocess.PIPE) as process:
        piped = process.communicate(timeout=30)[0].decode()

    assert "\x1b[32m" in coloured
    assert not {f"\x1b[{code}m" for code in (31, 32, 33, 90)} & set(plain.replace("\x1b", "\n\x1b").split("\n"))
    assert "\x1b[32" not in plain
    assert "\x1b" not in piped
    assert "░" in piped


def test_ascii(billing):
    """A terminal that knows only ASCII gets a bar and names all the same."""
    billing.grant("søren", GEN, 5, id="order_1")
    billing.close()
    with start(
        "balance", "søren", stdout=subprocess.PIPE, env={"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    ) as process:
        out, err = process.communicate(timeout=30)

    assert (b"", 0) == (err, process.returncode)
    assert b"s\\xf8ren" in out
    assert b"-" * 28 in out


def test_closed_pipe(billing):
    """`metered-ai events --json | head` ends quietly."""
    use(billing, 2000)
    billing.close()
    with start("events", "--json", stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        complaint = process.stderr.read()

    assert (b"", 141) == (complaint, process.returncode)


def test_interrupt(billing):
    """Ctrl-C is exit 130, without a trace."""
    use(billing, 2000)
    billing.close()
    with start("events", "--json", stdout=subprocess.PIPE) as process:
        # Then it is in the middle of it, and waits for us to read on.
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate(timeout=30)

    assert (b"", 130) == (complaint, process.returncode)


# ---- the program itself ----


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_no_extra(package, monkeypatch, capsys):
    """Without the extra's packages it says what to install: exit 2."""
    monkeypatch.setitem(sys.modules, package, None)
    code = main(["balance", ADA])

    assert (2, f"metered-ai: {package} is not installed: pip install 'metered-ai[cli]'\n") == (
        code,
        capsys.readouterr().err,
    )


def test_help(cli):
    """Without arguments it explains itself; every command has a help with its JSON keys."""
    code, out, err = cli()
    names = "demo grant balance events holds recover verify".split()

    assert (0, "") == (code, err)
    assert [] == [name for name in names if name not in out]
    assert [] == [name for name in names if "JSON" not in cli(name, "--help")[1]]


def test_warnings(cli, path):
    """What the library warns of is one line on stderr beside the answer, not a log record with its trace."""
    cli("grant", ADA, GEN, "5", "--id", "order_1")
    path.with_name("credits.db.spool-1-abc").write_bytes(b"not a line\n")
    code, out, err = cli("balance", ADA)

    assert 0 == code
    assert "0 of 5 used" in out
    assert err.startswith("metered-ai: warning: 1 lines of a spool are damaged")
    assert 1 == err.count("\n")
