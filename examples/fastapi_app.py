"""Chat endpoints in FastAPI, with the official asynchronous client; /chat/stream answers while the model writes.
Usage: python examples/fastapi_app.py, then
curl -sN localhost:5001/chat/stream -H 'content-type: application/json' -d '{"message": "Hello"}'

Needs `pip install fastapi uvicorn openai`, and OPENAI_BASE_URL and OPENAI_API_KEY, which `tertulia serve` prints;
CHAT_MODEL if another model shall answer, PORT for another port.
"""

import logging
import os
from collections.abc import AsyncIterator

import openai
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessageParam
from pydantic import BaseModel, Field

app = FastAPI()
client = openai.AsyncOpenAI(timeout=60)
MODEL = os.environ.get("CHAT_MODEL", "gpt-3.5-turbo")


class Question(BaseModel):
    message: str = Field(min_length=1, max_length=10_000)

    def messages(self) -> list[ChatCompletionMessageParam]:
        return [{"role": "user", "content": self.message}]


class Answer(BaseModel):
    response: str


@app.post("/chat")
async def chat(question: Question) -> Answer:
    answer = await client.chat.completions.create(model=MODEL, messages=question.messages(), max_tokens=200)
    return Answer(response=answer.choices[0].message.content or "")


@app.post("/chat/stream")
async def chat_stream(question: Question) -> StreamingResponse:
    # awaited here and not in the generator, so that a refusal can still become a status
    stream = await client.chat.completions.create(
        model=MODEL, messages=question.messages(), max_tokens=200, stream=True
    )
    return StreamingResponse(words(stream), media_type="text/plain; charset=utf-8")


async def words(stream: openai.AsyncStream[ChatCompletionChunk]) -> AsyncIterator[str]:
    async with stream:  # if our caller leaves, this closes the connection, and the model stops
        async for chunk in stream:
            for choice in chunk.choices:
                if choice.delta.content:
                    yield choice.delta.content


@app.exception_handler(openai.OpenAIError)
async def unavailable(request: Request, error: openai.OpenAIError) -> JSONResponse:
    if isinstance(error, openai.BadRequestError):
        return JSONResponse({"error": error.message}, 400)
    if isinstance(error, openai.RateLimitError):
        return JSONResponse({"error": "Too many requests, please try again later."}, 429)
    logging.getLogger("uvicorn.error").error("no answer from the model: %s", error)  # for us, not for our caller
    return JSONResponse({"error": "The model cannot answer now."}, 502)


if __name__ == "__main__":
    uvicorn.run(app, port=int(os.environ.get("PORT", "5001")))
