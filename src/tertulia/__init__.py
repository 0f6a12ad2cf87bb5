"""Tertulia: the ChatGPT API that you own."""

from __future__ import annotations

__version__ = "0.1.0"
