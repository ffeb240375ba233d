"""Imported first: keeps packages that are only passed through from talking."""

from __future__ import annotations

import logging

# PEFT imports bitsandbytes where it is installed, which then warns of a kernel that nobody here asked for.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# LLM.int8() multiplies in float16, and says so at every layer of every step whose input is not.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
