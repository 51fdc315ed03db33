"""The fake provider: what the client tests stand on, so it is tried with the bare SDK, as strict as that goes."""

from __future__ import annotations

import http.client
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from metered_ai.testing.provider import FakeProvider, ProviderProcess

HI = [{"role": "user", "content": "Hi"}]
PICTURE = ("a.png", b"\x89PNG\r\n", "image/png")
SOUND = ("a.wav", b"RIFF\x00\r\n--", "audio/wav")


@pytest.fixture
def client(provider):
    client = openai.OpenAI(
        base_url=provider.base_url, api_key="secret", max_retries=0, timeout=10, _strict_response_validation=True
    )
    with client:
        yield client


def chat(client, **options):
    return client.chat.completions.create(model="gpt-5-mini", messages=HI, **options)


def chat_stream(client, **options):
    return list(chat(client, stream=True, **options))


def lax(client):
    """The same client for what the SDK's own types are too strict for: a null finish reason, vectors in base64."""
    return client.copy(_extra_kwargs={"_strict_response_validation": False})


def run_thread(client, **options):
    return client.beta.threads.runs.create("thread_1", assistant_id="asst_1", **options)


CALLS = {
    "chat": chat,
    "chat n": lambda c: chat(c, n=3),
    "chat stream": chat_stream,
    "completion": lambda c: c.completions.create(model="m", prompt="Hi"),
    "completion stream": lambda c: list(lax(c).completions.create(model="m", prompt="Hi", stream=True)),
    "response": lambda c: c.responses.create(model="m", input="Hi"),
    "response stream": lambda c: list(c.responses.create(model="m", input="Hi", stream=True)),
    "beta response": lambda c: c.beta.responses.create(model="m", input="Hi"),
    "compact": lambda c: c.responses.compact(model="m", input="Hi"),
    "embedding": lambda c: lax(c).embeddings.create(model="m", input=["a", "b"]),
    "embedding of floats": lambda c: c.embeddings.create(model="m", input="a", encoding_format="float"),
    "image": lambda c: c.images.generate(model="m", prompt="a fox", n=2),
    "image stream": lambda c: list(c.images.generate(model="m", prompt="a fox", stream=True, partial_images=2)),
    "edit": lambda c: c.images.edit(model="m", image=PICTURE, prompt="a fox"),
    "edit stream": lambda c: list(c.images.edit(model="m", image=PICTURE, prompt="a fox", stream=True)),
    "variation": lambda c: c.images.create_variation(image=PICTURE),
    "speech": lambda c: c.audio.speech.create(model="m", voice="alloy", input="Hi").read(),
    "speech events": lambda c: c.audio.speech.create(model="m", voice="alloy", input="Hi", stream_format="sse").read(),
    "transcription": lambda c: c.audio.transcriptions.create(model="m", file=SOUND),
    "transcription text": lambda c: c.audio.transcriptions.create(model="m", file=SOUND, response_format="text"),
    "transcription long": lambda c: c.audio.transcriptions.create(
        model="m", file=SOUND, response_format="verbose_json"
    ),
    "transcription stream": lambda c: list(c.audio.transcriptions.create(model="m", file=SOUND, stream=True)),
    "translation": lambda c: c.audio.translations.create(model="m", file=SOUND),
    "translation long": lambda c: c.audio.translations.create(model="m", file=SOUND, response_format="verbose_json"),
    "moderation": lambda c: c.moderations.create(input="Hi"),
    "search": lambda c: list(c.vector_stores.search("vs_1", query="fox")),
    "grader": lambda c: c.fine_tuning.alpha.graders.run(
        grader={"type": "string_check", "name": "g", "input": "a", "operation": "eq", "reference": "a"},
        model_sample="a",
    ),
    "thread run": run_thread,
    "thread run stream": lambda c: list(run_thread(c, stream=True)),
}
if hasattr(openai.OpenAI, "decisions"):
    CALLS["decision"] = lambda c: c.decisions.create(model="m", input="Is it a fox?", questions=[])
if hasattr(openai.OpenAI, "content_provenance_checks"):
    CALLS["provenance"] = lambda c: c.content_provenance_checks.create(file=PICTURE)
FREE = {
    "models": lambda c: c.models.list().data[0].id,
    "input tokens": lambda c: c.post("/responses/input_tokens", body={"model": "m"}, cast_to=object),
    "cancel": lambda c: c.post("/responses/resp_1/cancel", cast_to=object),
}


class TestGoodAnswers:
    # The SDK warns of endpoints that OpenAI wants to be rid of.
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
    def test_endpoint(self, provider, client, call):
        """Every endpoint that generates answers as the SDK's own types demand, and is counted as issued."""
        assert call(client)

        assert [request.index for request in provider.requests] == [issued.index for issued in provider.issued]

    @pytest.mark.parametrize("call", FREE.values(), ids=FREE)
    def test_free(self, provider, client, call):
        """What costs nothing is answered and issues nothing."""
        call(client)

        assert provider.issued == []

    def test_plain(self, provider, client):
        """A plain answer carries text, a new id each time and the usage that was issued."""
        first, second = chat(client), chat(client)

        assert "The quick brown fox jumps over the lazy dog." == first.choices[0].message.content
        assert (10, 9, 19) == (first.usage.prompt_tokens, first.usage.completion_tokens, first.usage.total_tokens)
        assert [first.id, second.id] == [issued.id for issued in provider.issued]
        assert first.id != second.id
        assert [first._request_id, second._request_id] == [issued.request_id for issued in provider.issued]

    def test_tool_calls(self, provider, client):
        """Tool calls arrive whole, plain and streamed, from chat and from responses."""
        provider.answer(tool_calls=[("weather", '{"city": "Bern"}')], times=4)

        plain = chat(client).choices[0]
        with client.chat.completions.stream(model="m", messages=HI) as stream:
            streamed = stream.get_final_completion().choices[0]
        response = client.responses.create(model="m", input="Hi").output[0]
        with client.responses.stream(model="m", input="Hi") as stream:
            last = stream.get_final_response().output[0]

        assert ["tool_calls"] * 2 == [plain.finish_reason, streamed.finish_reason]
        calls = [plain.message.tool_calls[0].function, streamed.message.tool_calls[0].function, response, last]
        assert [("weather", '{"city": "Bern"}')] * 4 == [(call.name, call.arguments) for call in calls]

    def test_helpers(self, client):
        """The SDK's stream helpers put the same text together."""
        with client.chat.completions.stream(model="m", messages=HI) as stream:
            text = stream.get_final_completion().choices[0].message.content
        with client.responses.stream(model="m", input="Hi") as stream:
            response = stream.get_final_response()

        assert text == response.output_text
        assert ("completed", 10, 9) == (response.status, response.usage.input_tokens, response.usage.output_tokens)

    @pytest.mark.parametrize(
        ("finish", "status"), [("length", "incomplete"), ("failed", "failed"), ("cancelled", "cancelled")]
    )
    def test_response_status(self, provider, client, finish, status):
        """A response ends as it was told to."""
        provider.answer(finish=finish)

        assert status == client.responses.create(model="m", input="Hi").status

    def test_azure(self, provider):
        """Azure's paths are understood, and its key stays out of the log, too."""
        with openai.AzureOpenAI(azure_endpoint=provider.url, api_key="secret", api_version="v1") as client:
            chat(client)

        assert "/chat/completions" == provider.requests[0].path
        assert "secret" not in repr(provider.requests)

    def test_connection_is_kept(self, provider):
        """One connection serves many requests, and a chunked request body is read whole."""
        connection = http.client.HTTPConnection(provider.url.removeprefix("http://"), timeout=10)
        for _ in range(2):
            connection.request("POST", "/v1/chat/completions", iter([b'{"model": ', b'"m"}']), encode_chunked=True)
            local = connection.sock.getsockname()
            connection.getresponse().read()
            assert local == connection.sock.getsockname()
        connection.close()

        assert [{"model": "m"}] * 2 == [request.body for request in provider.requests]


class TestUsage:
    ASKED = {"stream_options": {"include_usage": True}}

    @staticmethod
    def told(chunks):
        return [
            (len(chunk.choices), chunk.usage.prompt_tokens, chunk.usage.completion_tokens)
            for chunk in chunks
            if chunk.usage
        ]

    @pytest.mark.parametrize(
        ("usage", "asked", "unasked"),
        [
            ("asked", [(0, 10, 27)], []),
            ("never", [], []),
            ("unasked", [(1, 10, 27)], [(1, 10, 27)]),
            ("repeated", [(0, 10, 9)] * 3, []),
            ("zero", [(0, 0, 0)], []),
            ({"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}, [(0, 3, 4)], []),
        ],
        ids=str,
    )
    def test_stream(self, provider, client, usage, asked, unasked):
        """A stream tells its usage as often, where and when it was told to."""
        provider.answer(usage=usage, times=2)

        assert asked == self.told(chat_stream(client, n=3, **self.ASKED))
        assert unasked == self.told(chat_stream(client, n=3))

    def test_every(self, provider, client):
        """A usage on every chunk grows to the whole."""
        provider.answer(usage="every")

        told = self.told(chat_stream(client))

        assert sorted(told) == told
        assert (11, (1, 10, 9)) == (len(told), told[-1])

    @pytest.mark.parametrize(
        ("usage", "expected"), [("never", None), ("zero", (0, 0)), ("repeated", (10, 9)), ("unasked", (10, 27))]
    )
    def test_plain(self, provider, client, usage, expected):
        """A plain answer tells the same, without being asked."""
        provider.answer(usage=usage)

        usage = chat(client, n=3).usage

        assert expected == (usage and (usage.prompt_tokens, usage.completion_tokens))

    def test_malformed(self, provider, client):
        """A malformed usage holds no number that means anything."""
        provider.answer(usage="malformed")

        told = json.loads(client.chat.completions.with_raw_response.create(model="m", messages=HI).content)["usage"]

        assert ["many", -1, None, "many", -1] == list(told.values())

    def test_issued(self, provider, client):
        """What was issued is the truth, also where the client is told nothing or less."""
        provider.answer(usage="never")
        provider.answer(usage={"prompt_tokens": 3, "completion_tokens": 4})
        provider.answer(output_tokens=500, input_tokens=1)
        chat_stream(client)
        chat_stream(client)
        chat_stream(client)

        assert [(10, 9), (3, 4), (1, 500)] == [(one.input_tokens, one.output_tokens) for one in provider.issued]


class TestFaults:
    @pytest.mark.parametrize(
        ("fault", "call", "error"),
        [
            ({"status": 400}, chat, openai.BadRequestError),
            ({"status": 429, "headers": {"retry-after": "1"}}, chat_stream, openai.RateLimitError),
            ({"status": 500}, chat, openai.InternalServerError),
            ({"reset": True}, chat, openai.APIConnectionError),
            ({"cut_bytes": 0}, chat, openai.APIConnectionError),
            ({"cut_bytes": 100}, chat, openai.APIConnectionError),
            ({"cut_after": 3}, chat_stream, Exception),
            ({"cut_after": 0}, chat_stream, Exception),
            ({"cut_bytes": 500}, chat_stream, Exception),
            ({"error_after": 3}, chat_stream, openai.APIError),
            ({"body": '{"id": '}, chat, json.JSONDecodeError),
            ({"body": "<html>Try later</html>"}, chat, openai.APIResponseValidationError),
            ({"body": {"error": "no"}}, chat, openai.APIResponseValidationError),
        ],
    )
    def test_raises(self, provider, client, fault, call, error):
        """A fault reaches the caller as the SDK's own error; the next answer is good again."""
        provider.answer(**fault)

        with pytest.raises(error):
            call(client)
        assert call(client)

    def test_what_a_fault_issues(self, provider, client):
        """Refusals and foreign bodies issue nothing; an answer that breaks off was generated."""
        provider.answer(status=500)
        provider.answer(body={"error": "no"})
        provider.answer(reset=True)
        provider.answer(cut_bytes=100)
        for error in (openai.InternalServerError, openai.APIResponseValidationError, *[openai.APIConnectionError] * 2):
            with pytest.raises(error):
                chat(client)

        provider.wait_for_completed(2)

        assert [3] == [issued.index for issued in provider.issued]
        assert [0, 1] == provider.completed

    @pytest.mark.parametrize(("cut_after", "expected"), [(4, 4), (11, 11)])
    def test_cut_after(self, provider, client, cut_after, expected):
        """A cut stream gives exactly as many events as were asked for; also where only its proper end is missing."""
        provider.answer(cut_after=cut_after, done=False)
        seen = []

        with pytest.raises(Exception, match=r"incomplete|Connection error"):
            seen.extend(collect(chat(client, stream=True), seen))
        assert expected == len(seen)

    def test_no_marker(self, provider, client):
        """Without its terminal marker a stream just ends."""
        provider.answer(done=False, times=2)

        assert 11 == len(chat_stream(client))
        types = [event.type for event in client.responses.create(model="m", input="Hi", stream=True)]
        assert "response.output_item.done" == types[-1]

    def test_response_error_event(self, provider, client):
        """An error event ends a response stream, well formed."""
        provider.answer(error_after=3)

        types = [event.type for event in client.responses.create(model="m", input="Hi", stream=True)]

        assert ["response.created", "response.in_progress", "response.output_item.added", "error"] == types

    @pytest.mark.parametrize("call", [chat, chat_stream])
    def test_gzip(self, provider, client, call):
        """Compressed answers are read like any other."""
        provider.answer(gzip=True)

        assert call(client)

    def test_ids(self, provider, client):
        """Ids repeat, are empty, or lack, as they were told to."""
        provider.answer(id="chatcmpl-424", created=7, times=2)
        provider.answer(id="", headers={"x-request-id": None})
        answers = [chat(client) for _ in range(3)]

        assert ["chatcmpl-424", "chatcmpl-424", ""] == [answer.id for answer in answers]
        assert [7, 7] == [answer.created for answer in answers[:2]]
        assert answers[2]._request_id is None

    def test_script(self, provider, client):
        """Answers are used up in order, each by the first request that it fits; a misspelled fault is refused."""
        provider.answer(path="/embeddings", status=400)
        provider.answer(text="one")
        provider.answer(text="two")
        with pytest.raises(TypeError):
            provider.answer(statuss=500)

        assert ["one", "two"] == [chat(client).choices[0].message.content for _ in range(2)]
        with pytest.raises(openai.BadRequestError):
            client.embeddings.create(model="m", input="a")


def collect(stream, seen):
    """Put each chunk into `seen` at once, so that those before a break are there."""
    for chunk in stream:
        seen.append(chunk)
    return ()


class TestTime:
    def test_gate(self, provider, client):
        """Headers wait for the gate; the request is on record before."""
        gate = threading.Event()
        provider.answer(gate=gate)
        with ThreadPoolExecutor() as pool:
            answer = pool.submit(chat, client)
            provider.wait_for_requests(1)
            assert not provider.issued
            gate.set()

            assert answer.result(timeout=10).id

    def test_silence(self, provider, client):
        """A gate that nobody opens is a time-out."""
        provider.answer(gate=threading.Event())

        with pytest.raises(openai.APITimeoutError):
            chat(client.with_options(timeout=0.2))

    def test_stall(self, provider, client):
        """A stalled stream goes on when it may."""
        resume = threading.Event()
        provider.answer(stall_after=3, resume=resume)
        stream = iter(chat(client, stream=True))
        seen = [next(stream) for _ in range(3)]
        assert not provider.completed
        resume.set()
        seen.extend(stream)
        provider.wait_for_completed(1)

        assert 11 == len(seen)

    def test_waiting_has_an_end(self, provider):
        """Waiting for what does not come says so."""
        with pytest.raises(TimeoutError, match="2 requests did not come"):
            provider.wait_for_requests(2, timeout=0.01)

    def test_close_frees_the_stalled(self):
        """Closing a provider ends what it holds up, and its threads."""
        provider = FakeProvider()
        provider.answer(stall_after=1)
        provider.answer(gate=threading.Event())
        client = openai.OpenAI(base_url=provider.base_url, api_key="none", max_retries=0)
        with ThreadPoolExecutor() as pool, client:
            calls = [pool.submit(chat_stream, client), pool.submit(chat_stream, client)]
            provider.wait_for_requests(2)
            provider.close()
            provider.close()

            assert all(call.exception(timeout=10) for call in calls)
        assert not [thread for thread in threading.enumerate() if thread.name == "fake-provider"]

    def test_start(self):
        """Starting and closing takes less than 50 ms."""

        def cycle():
            start = time.perf_counter()
            FakeProvider().close()
            return time.perf_counter() - start

        assert min(cycle() for _ in range(5)) < 0.05

    def test_many(self, provider, client):
        """64 connections at once are all served, each request answered once."""
        gate = threading.Event()
        provider.default = type(provider.default)(gate=gate)
        with ThreadPoolExecutor(64) as pool:
            answers = [pool.submit(chat, client) for _ in range(64)]
            provider.wait_for_requests(64)
            gate.set()
            ids = {answer.result(timeout=30).id for answer in answers}

        assert {issued.id for issued in provider.issued} == ids
        assert 64 == len(ids)

    def test_pause(self, provider, client):
        """A latency delays the headers and each event."""
        provider.answer(pause=0.01)
        start = time.perf_counter()
        chat_stream(client)

        assert time.perf_counter() - start > 0.12


class TestProcesses:
    def test_client_that_vanishes(self, provider, client):
        """A client that is gone in mid-answer harms nobody else."""
        resume = threading.Event()
        provider.answer(stall_after=1, resume=resume)
        connection = http.client.HTTPConnection(provider.url.removeprefix("http://"), timeout=10)
        connection.request("POST", "/v1/chat/completions", json.dumps({"stream": True}))
        provider.wait_for_requests(1)
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
        resume.set()

        assert chat(client)

    def test_fork(self, provider, client):
        """A forked child neither keeps a connection open that was cut, nor closes its parent's."""
        resume = threading.Event()
        provider.answer(stall_after=3, resume=resume, cut_after=3)
        provider.answer(stall_after=3, resume=resume)
        cut, whole = (iter(chat(client, stream=True)) for _ in range(2))
        next(cut), next(whole)
        child_end, parent_end = socket.socketpair()
        if (child := os.fork()) == 0:
            provider.close()
            child_end.send(b"closed")
            parent_end.close()
            child_end.recv(1)
            os._exit(0)
        child_end.close()
        assert b"closed" == parent_end.recv(6)
        resume.set()

        with pytest.raises(Exception, match=r"incomplete|Connection error"):
            list(cut)
        assert 10 == len(list(whole))
        parent_end.close()
        os.waitpid(child, 0)


class TestRecords:
    def test_request(self, provider, client):
        """A request is kept as it came, its credentials masked."""
        chat(client, user="ada", extra_headers={"X-Trace": "t1"})
        request = provider.requests[0]

        assert ("POST", "/chat/completions", "/v1/chat/completions") == (request.method, request.path, request.url)
        assert {"model": "gpt-5-mini", "messages": HI, "user": "ada"} == request.body
        assert ("***", "t1") == (request.headers["authorization"], request.headers["x-trace"])
        assert "secret" not in repr(provider.requests)

    def test_form(self, provider, client):
        """A form's text fields are read like JSON; its files stay in `content`."""
        client.audio.transcriptions.create(model="whisper", file=SOUND, language="en")

        assert {"model": "whisper", "language": "en"} == provider.requests[0].body
        assert SOUND[1] in provider.requests[0].content

    def test_log(self, tmp_path):
        """An answer is in the log before anybody has seen any of it."""
        log = tmp_path / "issued"
        with FakeProvider(log=log) as provider, openai.OpenAI(base_url=provider.base_url, api_key="none") as client:
            provider.answer(stall_after=1)
            first = next(iter(chat(client, stream=True)))
            logged = json.loads(log.read_text())

        assert (first.id, 10, 9) == (logged["id"], logged["input_tokens"], logged["output_tokens"])

    def test_process(self, tmp_path):
        """In a process of its own it answers, logs, and is gone when closed."""
        log = tmp_path / "issued"
        with ProviderProcess(log=log) as provider, openai.OpenAI(base_url=provider.base_url, api_key="none") as client:
            ids = [chat(client).id for _ in range(3)]

        assert ids == [json.loads(line)["id"] for line in log.read_text().splitlines()]
        assert provider.process.returncode is not None

    def test_process_ends_with_its_starter(self):
        """A provider's process does not outlive the one that started it, however that ends."""
        starter = (
            "import os\n"
            "from metered_ai.testing.provider import ProviderProcess\n"
            "print(ProviderProcess().pid, flush=True)\n"
            "os._exit(1)\n"
        )
        output = subprocess.run(
            [sys.executable, "-c", starter], capture_output=True, text=True, timeout=60, check=False
        )
        pid = int(output.stdout)

        deadline = time.monotonic() + 20
        while is_alive(pid):
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def test_process_that_fails(self, tmp_path):
        """A provider that cannot start says why."""
        with pytest.raises(RuntimeError, match="No such file"):
            ProviderProcess(log=tmp_path / "nowhere" / "issued")


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A process that has ended and is not yet collected by its new parent counts as gone.
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(state) and not state.startswith("Z")
