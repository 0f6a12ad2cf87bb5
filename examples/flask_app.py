"""A chat endpoint in Flask. Usage: python examples/flask_app.py, then
curl -s localhost:5000/chat -H 'content-type: application/json' -d '{"message": "Hello"}'

Needs `pip install flask openai`, and OPENAI_BASE_URL and OPENAI_API_KEY, which `tertulia serve` prints; CHAT_MODEL if
another model shall answer, PORT for another port.
"""

import os

import openai
from flask import Flask, jsonify, request
from flask.typing import ResponseReturnValue

app = Flask(__name__)
client = openai.OpenAI(timeout=60)  # one for all requests: it keeps connections open, and may be used by many threads


@app.post("/chat")
def chat() -> ResponseReturnValue:
    body = request.get_json(silent=True)
    message = body.get("message") if isinstance(body, dict) else None
    if not isinstance(message, str) or not message.strip():
        return jsonify(error='The body must be JSON like {"message": "Hello"}.'), 400
    answer = client.chat.completions.create(
        model=os.environ.get("CHAT_MODEL", "gpt-3.5-turbo"),
        messages=[{"role": "user", "content": message}],
        max_tokens=200,
    )
    return jsonify(response=answer.choices[0].message.content)


@app.errorhandler(openai.BadRequestError)
def refused(error: openai.BadRequestError) -> ResponseReturnValue:
    return jsonify(error=error.message), 400  # the message was too long, say: our caller can do something about it


@app.errorhandler(openai.RateLimitError)
def busy(error: openai.RateLimitError) -> ResponseReturnValue:
    return jsonify(error="Too many requests, please try again later."), 429


@app.errorhandler(openai.OpenAIError)
def unavailable(error: openai.OpenAIError) -> ResponseReturnValue:
    app.logger.error("no answer from the model: %s", error)  # for us; our caller need not know which key was wrong
    return jsonify(error="The model cannot answer now."), 502


if __name__ == "__main__":
    app.run(port=int(os.environ.get("PORT", "5000")))
