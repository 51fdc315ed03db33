"""`metered-ai usage` and `revoke`, CSV, completion: what people and programs get."""

from __future__ import annotations

import csv
import json
import os
import pty
import re
import select
import signal
import subprocess
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from io import StringIO

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from metered_ai import Usage, connect
from metered_ai.cli import chart, main
from metered_ai.cli.chart import usage_chart
from metered_ai.core.steps import Place, Settle
from metered_ai.records import UsageSum
from tests.cli.test_cli import start

ADA, GEN = "ada", "generations"
TODAY = datetime.now(UTC).date()


def call(billing, amount, number, model="gpt-5-mini", customer=ADA, meter=GEN):
    billing.ledger.run(Place(f"h{number}", customer, meter, amount, None))
    usage = Usage(model=model, input_tokens=100, output_tokens=20)
    billing.ledger.run(Settle(f"h{number}", customer, meter, amount, f"gen_{number}", "reported", usage=usage))


@pytest.fixture
def used(billing):
    """Two customers with use on two meters and two models."""
    billing.grant(ADA, GEN, 100, id="order_1")
    billing.grant("bob", GEN, 100, id="order_1")
    call(billing, 30, 1)
    call(billing, 10, 2, model="gpt-5")
    call(billing, 5, 3, customer="bob")
    billing.record(ADA, "images", transaction_id="image_1", amount=4)
    return billing


def drawn(sums, width=40, **options):
    out = Console(file=StringIO(), width=120, color_system=None, **options)
    out.print(usage_chart(sums, width=width))
    return [line.rstrip() for line in out.file.getvalue().splitlines()]


def day_of(day, amount, model=None, meter=GEN):
    return UsageSum(None, meter, day, model, amount, 1, 0, 0)


# ---- usage ----


def test_usage(cli, used):
    """Credits by day and by model, each meter by itself; with a customer the balances stand above."""
    code, out, err = cli("usage", "--customer", ADA)
    lines = [" ".join(line.split()) for line in out.splitlines()]

    assert (0, "") == (code, err)
    assert "ada" == lines[0]
    assert "40 of 100 used, 60 available" in lines[1]
    assert "generations: 40 credits in 2 usage events" in lines
    assert re.search(rf"^{TODAY} █+ 40 2 ×$", "\n".join(lines), re.MULTILINE)
    assert re.search(r"^gpt-5-mini █{50} 30 1 ×$", "\n".join(lines), re.MULTILINE)
    assert re.search(r"^gpt-5 █{16}▋ 10 1 ×$", "\n".join(lines), re.MULTILINE)
    assert "images: 4 credits in 1 usage event" in lines
    assert "generations: 45 credits in 3 usage events" in cli("usage")[1]
    assert "images" not in cli("usage", "--meter", GEN)[1]


def test_chart():
    """A day without use is drawn as such, little use shows, and the largest bar has the whole width."""
    lines = drawn([day_of("2026-03-01", 1), day_of("2026-03-03", 1000)])

    assert ["2026-03-01", "2026-03-02", "2026-03-03"] == [line.split()[0] for line in lines[1:4]]
    assert ["▏", "0", "█" * 40] == [line.split()[1] for line in lines[1:4]]
    assert 4 == len(lines)


def test_chart_months():
    """More than two months are added up by month."""
    lines = drawn([day_of("2025-12-31", 5), day_of("2026-01-01", 2), day_of("2026-01-31", 3), day_of("2026-04-01", 1)])

    assert [("2025-12", "5"), ("2026-01", "5"), ("2026-02", "0"), ("2026-03", "0"), ("2026-04", "1")] == [
        (line.split()[0], line.split()[-3]) for line in lines[1:]
    ]


def test_usage_ascii(monkeypatch):
    """A terminal that knows only ASCII gets bars all the same."""
    monkeypatch.setattr(chart, "speaks_unicode", lambda: False)
    lines = drawn([day_of("2026-03-01", 1), day_of("2026-03-02", 20)])

    assert ["##", "#" * 40] == [line.split()[1] for line in lines[1:]]


def test_usage_json(cli, used):
    """JSON has a row for each sum; `--by` says what is told apart; meters always are."""
    every = json.loads(cli("usage", "--json")[1])
    by_customer = json.loads(cli("usage", "--json", "--by", "customer")[1])
    documented = cli("usage", "--help")[1].split("JSON", 1)[1].split("Options:")[0].replace(",", " ").replace(".", " ")

    assert "customer meter day model amount calls input_tokens output_tokens".split() == list(every[0])
    assert [] == [key for key in every[0] if key not in documented.split()]
    assert [(GEN, "gpt-5", 10), (GEN, "gpt-5-mini", 35), ("images", None, 4)] == [
        (row["meter"], row["model"], row["amount"]) for row in every
    ]
    assert [(ADA, GEN, 40), (ADA, "images", 4), ("bob", GEN, 5)] == [
        (row["customer"], row["meter"], row["amount"]) for row in by_customer
    ]
    assert [] == json.loads(cli("usage", "--json", "--until", "-40d", "--since", "-41d")[1])


def test_unknown(cli, used):
    """A customer or meter that nobody has heard of is said to be that, in one clear line."""
    for command in ("usage", "events", "holds"):
        what = {"usage": "usage", "events": "usage events", "holds": "holds"}[command]

        assert (0, f"No {what}. eve has no account.\n", "") == cli(command, "--customer", "eve")
        assert (0, f"No {what}. bob has no account on images.\n", "") == cli(
            command, "--customer", "bob", "--meter", "images"
        )
        assert (0, f"No {what}. No customer has an account on nix.\n", "") == cli(command, "--meter", "nix")
    assert "No usage.\n" == cli("usage", "--meter", GEN, "--until", "-1d")[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("usage", "--json", "--csv"), "--json and --csv cannot be had together"),
        (("usage", "--json", "--watch"), "--json and --watch cannot be had together"),
        (("usage", "--watch"), "--watch needs a terminal"),
        (("usage", "--by", "day"), "--by is for --json and --csv"),
        (("usage", "--by", "hour", "--json"), "--by"),
        (("usage", "--every", "0"), "--every"),
        (("usage", "--since", "soon"), "--since"),
        (("events", "--json", "--csv"), "--json and --csv"),
        (("balance", ADA, "--json", "--csv"), "--json and --csv"),
        (("revoke", ADA, GEN), "--id"),
    ],
)
def test_mistakes(arguments, said, cli, used):
    """A mistake is exit 2 and one line."""
    code, out, err = cli(*arguments)

    assert (2, "", 1) == (code, out, err.count("\n"))
    assert said in err


def read_until(terminal, words, seen=b"", seconds=30.0):
    """What a terminal shows until it has shown these words."""
    end = datetime.now(UTC) + timedelta(seconds=seconds)
    while words.encode() not in seen:
        ready, _, _ = select.select([terminal], [], [], max(0, (end - datetime.now(UTC)).total_seconds()))
        assert ready, (words, seen[-2000:])
        seen += os.read(terminal, 65536)
    return seen


def test_watch(used, path):
    """`--watch` shows what is used while it runs, rides over a ledger that is away, and ends quietly at Ctrl-C."""
    ours, its = pty.openpty()
    arguments = ("usage", "--customer", ADA, "--watch", "--every", "0.1")
    with start(
        *arguments, stdin=its, stdout=its, env={"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}
    ) as process:
        os.close(its)
        try:
            seen = read_until(ours, "40 of 100 used")
            call(used, 7, 4)
            seen = read_until(ours, "47 of 100 used", seen)
            hidden = path.with_name("hidden")
            path.rename(hidden)
            seen = read_until(ours, "not available now", seen)
            hidden.rename(path)
            read_until(ours, "47 of 100 used")
            process.send_signal(signal.SIGINT)
            with suppress(OSError):
                # How Linux says that the other side is closed.
                while select.select([ours], [], [], 30)[0] and os.read(ours, 65536):
                    pass
            process.wait(30)
        finally:
            # Whoever waits for it to end would wait for ever: nobody reads what it says any longer.
            process.kill()
        complaint = process.stderr.read()
    os.close(ours)

    assert (b"", 0) == (complaint, process.returncode)


@pytest.mark.parametrize("command", [("verify",), ("events",), ("holds",), ("recover",), ("usage",), ("why", "gen_1")])
def test_progress(command, cli, used, monkeypatch):
    """What may take long says so on a terminal's stderr, and for how long it has; elsewhere stderr stays empty."""
    quiet = cli(*command)[2]
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    code, _, err = cli(*command)

    assert (0, "") == (code, quiet)
    assert "…" in err
    assert re.search(r"0:00:0\d", err)


# ---- revoke ----


def test_revoke(cli, used):
    """A grant is taken back once: the rest is gone, what was spent is debt. One that was never made is exit 1."""
    code, out, err = cli("revoke", ADA, GEN, "--id", "order_1")
    again = cli("revoke", ADA, GEN, "--id", "order_1", "--json")
    unknown = [cli("revoke", ADA, GEN, "--id", "order_9"), cli("revoke", "eve", GEN, "--id", "order_1")]

    assert (0, "") == (code, err)
    assert "Took back grant order_1 of ada on generations: " in out
    assert "40 in debt" in out
    assert (0, True, 100) == (again[0], json.loads(again[1])["is_repeat"], json.loads(again[1])["amount"])
    assert [1, 1] == [each[0] for each in unknown]
    assert ["", ""] == [each[1] for each in unknown]
    assert "metered-ai: no grant of 'eve' on 'generations' has the id 'order_1'. eve has no account.\n" == unknown[1][2]


# ---- CSV ----

LISTS = [("balance", ADA), ("events",), ("holds",), ("usage",)]


@pytest.mark.parametrize("command", LISTS, ids=lambda command: command[0])
def test_csv(command, cli, used):
    """CSV has the rows and the keys of the JSON, in its order; what a call used has columns of its own."""
    used.ledger.run(Place("h_open", ADA, GEN, 1, None))
    rows = list(csv.DictReader(StringIO(cli(*command, "--csv")[1])))
    plain = json.loads(cli(*command, "--json")[1])
    keys = [
        column
        for key in plain[0]
        for column in ([f"usage_{name}" for name in plain[0][key]] if key == "usage" else [key])
    ]

    assert keys == list(rows[0])
    assert len(plain) == len(rows)
    for row, told in zip(rows, plain, strict=True):
        flat = {**told, **{f"usage_{name}": value for name, value in (told.get("usage") or {}).items()}}
        for key in keys:
            value = flat.get(key)
            expected = "" if value is None else value if isinstance(value, str) else json.dumps(value)

            assert expected == row[key]


@pytest.mark.parametrize("command", LISTS, ids=lambda command: command[0])
def test_csv_empty(command, cli, used):
    """An empty list has its header all the same, so that a program that reads it need not know."""
    empty = {"balance": ("balance", "eve"), "usage": ("usage", "--until", "-40d", "--since", "-41d")}
    arguments = empty.get(command[0], (*command, "--customer", "eve"))

    assert 1 == cli(*arguments, "--csv")[1].count("\n")
    assert cli(*arguments, "--csv")[1].splitlines()[0] == cli(*command, "--csv")[1].splitlines()[0]


def test_csv_limit(cli, used):
    """`--limit` holds for CSV as for JSON."""
    assert 3 == cli("events", "--csv", "--limit", "2")[1].count("\n")


# ---- every id ----


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.one_of(
        st.text(max_size=30), st.sampled_from(["a\rb", "=1+1", "<script>", "\x1b[31m", "a\u2028b", "-x", "--help"])
    )
)
def test_fuzz(name, tmp_path_factory, capsys):
    """Whatever an id is, each command is done or refuses it in one line: nothing fails, nothing reaches the terminal."""
    url = f"sqlite:///{tmp_path_factory.mktemp('fuzz') / 'credits.db'}"
    try:
        with connect(url, durability="relaxed") as billing:
            billing.grant(ADA, GEN, 1, id="g")
            billing.grant(name, name, 9, id=name)
            billing.record(name, name, transaction_id=name, amount=1, properties={"x": name})
        is_known = True
    except ValueError:
        is_known = False
    commands = [
        ["balance", "--ledger", url, "--", name],
        ["usage", "--ledger", url, f"--customer={name}"],
        ["events", "--ledger", url, f"--meter={name}"],
        ["events", "--ledger", url, "--json"],
        ["why", "--ledger", url, "--", name],
        ["revoke", "--ledger", url, f"--id={name}", "--", name, name],
    ]
    for command in commands:
        code = main(command)
        printed = capsys.readouterr()

        assert code == 0 if is_known else code in (0, 1, 2)
        assert printed.err.count("\n") == (code != 0)
        assert (printed.out + printed.err).replace("\n", "").isprintable()
    assert (0, 0) == (main(["events", "--ledger", url, "--csv"]), main(["verify", "--ledger", url]))
    rows = list(csv.DictReader(StringIO(capsys.readouterr().out.split("Sound:")[0], newline="")))
    assert not is_known or name in [row["customer"] for row in rows]


# ---- completion ----


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("metered-ai ver", {"verify"}),
        ("metered-ai usage --wa", {"--watch"}),
        ("metered-ai holds --state ex", {"expired"}),
    ],
)
def test_completion(words, offered, path, monkeypatch, capsys):
    """The shell completes commands, options and their values."""
    monkeypatch.setenv("_METERED_AI_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    with pytest.raises(SystemExit) as ended:
        main([])
    printed = capsys.readouterr()

    assert (0, "", offered) == (ended.value.code, printed.err, set(printed.out.split()))


def test_completion_script():
    """`--show-completion` prints what a shell needs."""
    with start("--show-completion", "bash", stdout=subprocess.PIPE) as process:
        out, _ = process.communicate(timeout=30)

    assert b"_METERED_AI_COMPLETE=complete_bash" in out
