"""What vLLM was started with that changes the tokens of a request: told to the worker in the manifest.

The engine knows its tokenizer and where it stops; the options of chats live in the API server alone, which
adds them to the manifest once its engine is there.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import msgspec

from apollo_ipc.manifest import Serving, read_manifest, write_manifest


def engine_serving(model_config: Any) -> Serving:
    """Leans on vllm/tokenizers/registry.py and vllm/config/model.py (try_get_generation_config)."""
    from vllm.tokenizers.registry import tokenizer_args_from_config

    ids = model_config.try_get_generation_config().get("eos_token_id")
    is_harmony = (
        model_config.hf_config.model_type == "gpt_oss"
    )  # rendered by openai_harmony, not by a template
    is_own = model_config.tokenizer == model_config.model
    return Serving(
        tokenizer="" if is_own else str(model_config.tokenizer),
        tokenizer_mode="harmony" if is_harmony else str(tokenizer_args_from_config(model_config)[0]),
        trust_remote_code=bool(model_config.trust_remote_code),
        stop_ids=[ids] if isinstance(ids, int) else list(ids or []),
    )


def tell_chat_options(runtime_dir: Path, args: Namespace) -> None:
    """Adds the API server's options to the manifest that its engine has written. Raises AttachError."""
    manifest = read_manifest(runtime_dir)
    if manifest is None:  # nothing is shared, and no job can come
        return
    template = getattr(args, "chat_template", None)
    if template is not None:
        from vllm.renderers.chat_utils import load_chat_template

        template = load_chat_template(template)
    serving = msgspec.structs.replace(
        manifest.serving,
        chat_template=template,
        tool_chat_template=template,
        content_format=getattr(args, "chat_template_content_format", "auto"),
        default_chat_template_kwargs=dict(getattr(args, "default_chat_template_kwargs", None) or {}),
    )
    if serving != manifest.serving:
        write_manifest(msgspec.structs.replace(manifest, serving=serving), runtime_dir)
