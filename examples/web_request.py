"""
A web application: who is logged in pays, and a refusal is an HTTP 402, for a streamed answer as well.

Run it with `uvicorn web_request:app` (pip install fastapi uvicorn). Needs OPENAI_API_KEY; OPENAI_BASE_URL for another server.
"""

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Depends, FastAPI, Header, Request
from fastapi.responses import JSONResponse, StreamingResponse
from openai import AsyncStream
from openai.types.chat import ChatCompletionChunk

from metered_ai import AsyncMeteredOpenAI, InsufficientCreditsError, MeteringError, bill_to

app = FastAPI()
client = AsyncMeteredOpenAI()  # without a customer: a call that names none is refused, and lands on nobody's bill


def logged_in(x_user: Annotated[str, Header()]) -> str:
    """Your application's own way to know who asks; never a value that the user can choose."""
    return x_user


Customer = Annotated[str, Depends(logged_in)]


@app.exception_handler(MeteringError)
async def refused(_: Request, error: MeteringError) -> JSONResponse:
    body = error.to_dict() if isinstance(error, InsufficientCreditsError) else {"error": "billing"}
    return JSONResponse(body, status_code=error.http_status)


@app.post("/answer")
async def answer(question: str, customer: Customer) -> dict[str, object]:
    with bill_to(customer) as bill:
        response = await client.responses.create(model="gpt-5-mini", input=question)
    return {"answer": response.output_text, "credits": bill.amount}


@app.post("/stream")
async def stream(question: str, customer: Customer) -> StreamingResponse:
    # Started before the response is: the status line has not been sent yet, so a refusal can still be a 402.
    with bill_to(customer):
        chunks = await client.chat.completions.create(
            model="gpt-5-mini", messages=[{"role": "user", "content": question}], stream=True
        )
    return StreamingResponse(words(chunks), media_type="text/plain")


async def words(chunks: AsyncStream[ChatCompletionChunk]) -> AsyncIterator[str]:
    async with chunks:  # closes, and so settles, also when the browser goes away
        async for chunk in chunks:
            if chunk.choices:
                yield chunk.choices[0].delta.content or ""
