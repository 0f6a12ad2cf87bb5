"""What is known of the providers that LiteLLM names: which speak the OpenAI API, where, and where LiteLLM finds their
keys. A fact here ages; whoever imports sees the address in the file that is written.
"""

from __future__ import annotations

import re

import msgspec


class Provider(msgspec.Struct, frozen=True):
    """base: where its OpenAI API is, "" if only the configuration can say. key: the environment variable LiteLLM reads,
    "" if it needs none. root: what is added to an address without a path. note: what a caller loses, if anything."""

    base: str = ""
    key: str = ""
    root: str = ""
    note: str = ""


OPENAI = Provider("https://api.openai.com/v1", "OPENAI_API_KEY")
PROVIDERS = {
    "openai": OPENAI,
    "text-completion-openai": OPENAI,
    "custom_openai": Provider(key="OPENAI_API_KEY"),
    "openai_like": Provider(key="OPENAI_LIKE_API_KEY"),
    "azure": Provider(key="AZURE_API_KEY"),
    "azure_text": Provider(key="AZURE_API_KEY"),
    "litellm_proxy": Provider(key="LITELLM_PROXY_API_KEY"),
    "openrouter": Provider("https://openrouter.ai/api/v1", "OPENROUTER_API_KEY"),
    "groq": Provider("https://api.groq.com/openai/v1", "GROQ_API_KEY"),
    "mistral": Provider("https://api.mistral.ai/v1", "MISTRAL_API_KEY"),
    "codestral": Provider("https://codestral.mistral.ai/v1", "CODESTRAL_API_KEY"),
    "deepseek": Provider("https://api.deepseek.com/v1", "DEEPSEEK_API_KEY"),
    "together_ai": Provider("https://api.together.xyz/v1", "TOGETHERAI_API_KEY"),
    "fireworks_ai": Provider("https://api.fireworks.ai/inference/v1", "FIREWORKS_API_KEY"),
    "xai": Provider("https://api.x.ai/v1", "XAI_API_KEY"),
    "perplexity": Provider("https://api.perplexity.ai", "PERPLEXITYAI_API_KEY"),
    "gemini": Provider("https://generativelanguage.googleapis.com/v1beta/openai", "GEMINI_API_KEY"),
    "cerebras": Provider("https://api.cerebras.ai/v1", "CEREBRAS_API_KEY"),
    "sambanova": Provider("https://api.sambanova.ai/v1", "SAMBANOVA_API_KEY"),
    "nvidia_nim": Provider("https://integrate.api.nvidia.com/v1", "NVIDIA_NIM_API_KEY"),
    "deepinfra": Provider("https://api.deepinfra.com/v1/openai", "DEEPINFRA_API_KEY"),
    "meta_llama": Provider("https://api.llama.com/compat/v1", "LLAMA_API_KEY"),
    "moonshot": Provider("https://api.moonshot.ai/v1", "MOONSHOT_API_KEY"),
    "dashscope": Provider("https://dashscope-intl.aliyuncs.com/compatible-mode/v1", "DASHSCOPE_API_KEY"),
    "volcengine": Provider("https://ark.cn-beijing.volces.com/api/v3", "VOLCENGINE_API_KEY"),
    "anthropic": Provider(
        "https://api.anthropic.com/v1", "ANTHROPIC_API_KEY",
        note="goes through Anthropic's OpenAI-compatible endpoint: no prompt caching, no strict tool schemas",
    ),
    "ollama": Provider("http://localhost:11434/v1", root="/v1"),
    "ollama_chat": Provider("http://localhost:11434/v1", root="/v1"),
    "lm_studio": Provider("http://localhost:1234/v1", root="/v1"),
    "llamafile": Provider("http://127.0.0.1:8080/v1", root="/v1"),
    "vllm": Provider(root="/v1"),
    "hosted_vllm": Provider(root="/v1"),
}  # fmt: skip
# Names without a provider, as LiteLLM guesses them.
GUESSES = (
    (re.compile(r"(ft:)?(gpt-|chatgpt-|o\d|codex-|text-embedding-|davinci|babbage)"), "openai"),
    (re.compile(r"claude-"), "anthropic"),
)
# Providers with an API of their own that Tertulia does not speak.
OTHERS = frozenset(
    [
        "aleph_alpha",
        "azure_ai",
        "bedrock",
        "bedrock_converse",
        "cloudflare",
        "cohere",
        "cohere_chat",
        "databricks",
        "gigachat",
        "huggingface",
        "maritalk",
        "nlp_cloud",
        "oci",
        "oobabooga",
        "petals",
        "predibase",
        "replicate",
        "sagemaker",
        "sagemaker_chat",
        "snowflake",
        "triton",
        "vertex_ai",
        "vertex_ai_beta",
        "voyage",
        "watsonx",
        "watsonx_text",
    ]
)


def split(model: str, named: str | None, has_base: bool) -> tuple[str, str]:
    """(provider, the provider's own name of the model) of LiteLLM's `model`; provider "" if nobody knows.

    named: custom_llm_provider, if it is given; has_base: whether the address is.
    """
    first, slash, rest = model.partition("/")
    if named:
        return named, rest if slash and first == named else model
    if slash and (first in PROVIDERS or first in OTHERS):
        return first, rest
    for pattern, provider in GUESSES:
        if pattern.match(model):
            return provider, model
    return ("openai", model) if has_base else ("", model)
