"""A LiteLLM configuration, imported and served: its names answer as they did."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import openai
import pytest

import mock_upstream
from conftest import serve

CONFIG = """
model_list:
  - model_name: pair
    litellm_params: {{model: "openai/tokens:3/a", api_base: "{0}", api_key: sk-in-clear, weight: 1}}
  - model_name: pair
    litellm_params: {{model: "openai/tokens:3/b", api_base: "{0}", api_key: os.environ/OTHER_KEY, weight: 1}}
  - model_name: broken
    litellm_params: {{model: "openai/fault:500@before", api_base: "{0}", api_key: os.environ/OTHER_KEY}}
  - model_name: shaped
    litellm_params: {{model: "openai/tokens:2", api_base: "{0}", api_key: none, temperature: 0.1}}
  - model_name: away
    litellm_params: {{model: bedrock/anthropic.claude-v2}}
router_settings:
  num_retries: 1
  fallbacks: [{{"broken": ["pair"]}}]
  model_group_alias: {{"nick": "pair"}}
"""


def test_what_was_imported_is_served(tmp_path: Path) -> None:
    with mock_upstream.started("--gap", "0") as mock:
        source = tmp_path / "config.yaml"
        source.write_text(CONFIG.format(mock.base_url))
        done = subprocess.run(
            [sys.executable, "-m", "tertulia", "import", "litellm", str(source)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert "put it into OPENAI_PAIR_KEY" in done.stderr and "bedrock does not speak" in done.stderr
        served = serve(
            tmp_path / "data", done.stdout, "--chat-model", "mock", "--embedding-model", "mock-embedding",
            environment={"OPENAI_PAIR_KEY": "one", "OTHER_KEY": "two"},
        )  # fmt: skip
        try:
            client = served.client()
            ask = client.chat.completions.with_raw_response.create
            hello = [{"role": "user", "content": "hi"}]
            for name, text in (("pair", " tok0 tok1 tok2"), ("nick", " tok0 tok1 tok2"), ("shaped", " tok0 tok1")):
                assert ask(model=name, messages=hello).parse().choices[0].message.content == text
            answer = ask(model="broken", messages=hello)
            assert answer.headers["x-tertulia-fallback"] == "broken"
            assert answer.parse().choices[0].message.content == " tok0 tok1 tok2"
            for name in ("away", "gpt-4o"):
                with pytest.raises(openai.NotFoundError):
                    ask(model=name, messages=hello)
            assert {"pair", "nick", "broken", "shaped"} <= {model.id for model in client.models.list()}
        finally:
            served.stop()
