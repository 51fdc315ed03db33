"""
A real inference server for tests and the demonstration: llama.cpp on loopback, with a tiny model that is made on the spot.

```python
with LlamaServer() as server:
    client = OpenAI(base_url=server.base_url, api_key="none")
```

The server, its tokenizer, grammars and token counts are llama.cpp's own; only the model knows nothing. It needs the extra `demo`.
"""

from __future__ import annotations

import argparse
import os
import re
import string
import tempfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.request import Request, urlopen

from .process import ServerProcess, ready

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["LlamaServer", "write_model"]


class LlamaServer(ServerProcess):
    """
    A llama.cpp server in a process of its own; a context manager, ready when constructed.

    Answers are random words, `mean_length` tokens on average (0: only a limit ends them), and never empty in a chat. `parallel`
    requests are worked on at once, the others wait. With `embedding` it serves embeddings instead. It answers to any model name.
    """

    def __init__(
        self, *, embedding: bool = False, mean_length: int = 24, parallel: int = 4, api_key: str | None = None
    ) -> None:
        missing = [name for name in ("xllamacpp", "gguf", "numpy") if find_spec(name) is None]
        if missing:
            raise RuntimeError(f"{', '.join(missing)} is not installed: pip install 'metered-ai[demo]'")

        self._api_key = api_key
        options = ["--mean-length", str(mean_length), "--parallel", str(parallel)]
        if embedding:
            options.append("--embedding")
        # In the environment, since everybody on the machine may read a command line.
        super().__init__(__name__, options, environment={} if api_key is None else {"LLAMA_API_KEY": api_key})

    def metrics(self) -> dict[str, int]:
        """
        What the server itself has counted since its start: `prompt_tokens_total`, `tokens_predicted_total` and others.

        This is the truth to compare a ledger with. Prompts are counted whole: nothing is reused from earlier ones.
        """
        request = Request(self.base_url.removesuffix("/v1") + "/metrics")  # noqa: S310 - our own server.
        if self._api_key is not None:
            request.add_header("Authorization", f"Bearer {self._api_key}")
        with urlopen(request, timeout=30) as response:  # noqa: S310 - as above.
            text = response.read().decode()
        return {name: int(float(value)) for name, value in re.findall(r"^llamacpp:(\w+) (\S+)$", text, re.MULTILINE)}


class _Token(NamedTuple):
    text: str
    kind: int
    score: float = 0.0


_NORMAL, _UNKNOWN, _CONTROL, _PLAIN, _BYTE = 1, 2, 3, 4, 6
_BEGIN, _END, _CALL = "<|im_start|>", "<|im_end|>", "<tool_call>"
_SPACE = "\u2581"  # How the tokenizer writes a blank.
_NEWLINE = "<0x0A>"

_WORDS = """
a about after again all also always an and any around as at away back be because before best big both bring build but by call
can clear close come day do door each early end enough even every far fast few field find first for free from full garden get
give go good great green grow half hand have head hear here high hill home house idea in into it keep kind know last late
lead learn leave less let letter light like line little long look made make many mark may mean meet more morning most move
much must name near need never new next night no not now number of off often old on once one only open or order other our
out over own paper part pass people place plan point put quick quiet rain read ready real rest right river road room round run
same save say sea second see seem set share she short show side sing small so some soon sound stand start stay still stone
story street such sun table take talk tell than that the then there these they thing think this time to together too tree
true try turn two under until up use very walk want warm was water way we well what when where which while white who why will
wind winter with wood word work world would write year yes yet you young
""".split()

# ChatML, with tools as models of the Hermes kind are told of them: llama.cpp derives its grammar for calls from it.
_TEMPLATE = """
{%- macro turn(role, text) -%}<|im_start|>{{ role }}
{{ text }}<|im_end|>
{% endmacro -%}
{%- if tools -%}
<|im_start|>system
You may call functions, which are described in <tools></tools>:
<tools>
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
</tools>
A call is a JSON object between tags: <tool_call>{"name": <name>, "arguments": <object>}</tool_call><|im_end|>
{% endif -%}
{%- for message in messages -%}
{%- if message.role == "assistant" -%}
<|im_start|>assistant
{{ message.content or "" }}
{%- for call in message.tool_calls or [] -%}
<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>
{%- endfor -%}
<|im_end|>
{% elif message.role == "tool" -%}
{{ turn("user", "<tool_response>" ~ message.content ~ "</tool_response>") }}
{%- else -%}
{{ turn(message.role, message.content) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""

_WIDTH = 64
_CONTEXT = 4096
_NEVER = -60.0


def write_model(path: Path, mean_length: int = 24) -> None:
    """
    Write a model of about 0.5 MB: the tokenizer of a real one, and weights that say random words.

    Its layers add nothing, so what comes next depends on the last token alone and can be set outright. Every embedding has the
    length at which llama.cpp's normalization leaves it as it is; channel 0 is 4 in each of them, so that column 0 of the
    output is a bias; channel 1 marks the newline that ends a prompt, after which no answer may end.
    """
    import gguf
    import numpy as np

    tokens = _tokens()
    texts = [token.text for token in tokens]
    random = np.random.default_rng(seed=7)

    embedding = random.standard_normal((len(tokens), _WIDTH))
    embedding[:, :2] = 0.0
    embedding *= np.sqrt(_WIDTH - 16.0) / np.linalg.norm(embedding, axis=1, keepdims=True)
    embedding[:, 0] = 4.0
    embedding[texts.index(_NEWLINE), 1] = 4.0

    output = random.standard_normal((len(tokens), _WIDTH)) * 0.1
    output[:, :2] = 0.0
    bias = np.array([_liking(token) for token in tokens])
    # How likely all the words are together, compared with a token of bias 0, after an average one.
    likely = float(np.exp(embedding @ output.T + bias).sum(axis=1).mean())
    # These end an answer, or what a grammar is waiting for, once in so many tokens and whatever the last token was.
    for text, once_in in ((_END, mean_length), ('"', 40), ("}", 200), (_CALL, 200)):
        at = texts.index(text)
        output[at] = 0.0
        bias[at] = np.log(likely / once_in) if once_in else _NEVER
    output[:, 0] = bias / 4.0
    output[texts.index(_END), 1] = _NEVER

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("random words")
    writer.add_context_length(_CONTEXT)
    writer.add_embedding_length(_WIDTH)
    writer.add_feed_forward_length(_WIDTH)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(_WIDTH // 2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(texts)
    writer.add_token_scores([token.score for token in tokens])
    writer.add_token_types([token.kind for token in tokens])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(texts.index("<s>"))
    writer.add_eos_token_id(texts.index(_END))
    writer.add_add_space_prefix(False)
    writer.add_chat_template(_TEMPLATE)
    for name, values in _tensors(embedding, output).items():
        writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(embedding: npt.NDArray[np.float64], output: npt.NDArray[np.float64]) -> dict[str, npt.NDArray[np.float64]]:
    import numpy as np

    ones, silent = np.ones(_WIDTH), np.zeros((_WIDTH, _WIDTH))
    layer = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    return {
        "token_embd.weight": embedding,
        "output.weight": output,
        "output_norm.weight": ones,
        "blk.0.attn_norm.weight": ones,
        "blk.0.ffn_norm.weight": ones,
        **{f"blk.0.{name}.weight": silent for name in layer},
    }


def _tokens() -> list[_Token]:
    """Words with a blank before them and all their beginnings, so that the tokenizer can put them together; and every byte."""
    pieces = dict.fromkeys([_SPACE, *string.ascii_letters, *string.digits, *string.punctuation])
    for word in _WORDS:
        pieces |= dict.fromkeys(_SPACE + word[:length] for length in range(1, len(word) + 1))
    return [
        _Token("<unk>", _UNKNOWN),
        _Token("<s>", _CONTROL),
        _Token(_BEGIN, _CONTROL),
        _Token(_END, _CONTROL),
        _Token(_CALL, _PLAIN),
        *(_Token(f"<0x{byte:02X}>", _BYTE) for byte in range(256)),
        # The longer piece wins.
        *(_Token(piece, _NORMAL, float(len(piece))) for piece in pieces),
    ]


def _liking(token: _Token) -> float:
    """How much a token is liked, as a logarithm: words above all, single characters only where a grammar wants them."""
    if token.kind != _NORMAL or token.text == _SPACE:
        return _NEVER
    return 0.0 if token.text.removeprefix(_SPACE) in _WORDS and token.text.startswith(_SPACE) else -8.0


def main() -> None:
    """Run a server until the process that started this one ends."""
    parser = argparse.ArgumentParser(
        prog="python -m metered_ai.testing.llama", description="A tiny llama.cpp server on loopback."
    )
    parser.add_argument("--embedding", action="store_true", help="serve embeddings instead of answers")
    parser.add_argument("--mean-length", type=int, default=24, help="tokens of an answer on average; 0: it never ends")
    parser.add_argument("--parallel", type=int, default=4, help="requests worked on at once")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    options = parser.parse_args()

    # A compiled module without types.
    xllamacpp: Any = import_module("xllamacpp")

    with tempfile.TemporaryDirectory(prefix="metered-ai-", ignore_cleanup_errors=True) as folder:
        model = Path(folder) / "words.gguf"
        write_model(model, options.mean_length)

        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        # Without a name of its own it would answer with the path of the file.
        params.model_alias = {"words"}
        params.hostnames = ["127.0.0.1"]
        params.port = options.port
        params.n_parallel = options.parallel
        params.n_ctx = _CONTEXT * options.parallel
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        # Each kept-alive connection occupies one; with the default, others wait for seconds.
        params.n_threads_http = 64
        params.use_jinja = True
        params.warmup = False
        params.verbosity = 1
        params.endpoint_metrics = True
        # So that every prompt is worked on, and counted, whole.
        params.cache_prompt = False
        params.cache_ram_mib = 0
        # The plain distribution: these would cut off what is rare, and with it the end of an answer.
        params.sampling.temp, params.sampling.top_k, params.sampling.top_p, params.sampling.min_p = 1.0, 0, 1.0, 0.0
        params.api_keys = [key for key in (os.environ.get("LLAMA_API_KEY"),) if key]
        if options.embedding:
            params.embedding = True
            params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
        server = xllamacpp.Server(params)
    ready(f"{server.listening_address}/v1")


if __name__ == "__main__":
    main()
