"""The chat template that vLLM renders with, and how.

As vllm/renderers/hf.py does it: which template, which shape of content it wants, which variables it gets.
"""

from __future__ import annotations

import inspect
import json
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PythonBackend

from apollo_ipc.manifest import Serving
from apollo_worker.jobs.conversation import ContentFormat, Rendered, developer_as_system, invalid

# Arguments of `apply_chat_template` are not variables of a template; of these one, vLLM makes an exception.
_backend: Any = PythonBackend  # its parameters are of no declared type
_RESERVED = frozenset(inspect.signature(_backend.apply_chat_template).parameters) - {"documents"}


class ChatTemplate:
    """The template of requests with or without tools, bound to a tokenizer."""

    def __init__(self, tokenizer: Any, source: str, content_format: ContentFormat):
        self.content_format: ContentFormat = content_format
        self._tokenizer, self._source = tokenizer, source
        self._knows_developer = '"developer"' in source or "'developer'" in source

    def render(
        self,
        messages: list[Rendered],
        tools: list[dict[str, Any]] | None,
        variables: dict[str, Any],
        *,
        is_prompt: bool,
    ) -> str:
        """is_prompt: with the generation prompt, as vLLM renders a request. Raises TemplateRefusal."""
        if not self._knows_developer:
            messages = developer_as_system(messages)
        try:
            return self._tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=self._source,
                add_generation_prompt=is_prompt,
                tokenize=False,
                **variables,
            )
        except Exception as error:
            # By raise_exception, or by stumbling over what it did not expect: vLLM answers 400 to either.
            raise TemplateRefusal(_reason(error)) from error


class TemplateRefusal(Exception):
    """The template does not render these messages; the text says why, in the template's own words."""


def _reason(error: BaseException) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, TemplateError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__}: {error}"


def chat_template(
    tokenizer: Any, serving: Serving, model_dir: Path, *, has_tools: bool, field: str
) -> ChatTemplate:
    """Raises UserError at `field` where the model has none."""
    given = serving.tool_chat_template if has_tools else serving.chat_template
    if given is None and not has_tools:
        given = _processor_template(model_dir)
    try:
        source = tokenizer.get_chat_template(given, tools=[{}] if has_tools else None)
    except ValueError as error:
        reason = str(error).split("!")[0]
        raise invalid(
            f"the model's tokenizer has no usable chat template ({reason}): send prompt and completion, or "
            "token ids",
            field,
        ) from None
    wanted = serving.content_format
    return ChatTemplate(tokenizer, source, detect_content_format(source) if wanted == "auto" else wanted)


def _processor_template(model_dir: Path) -> str | None:
    """Of a multimodal model's processor, which vLLM prefers for requests without tools."""
    file = model_dir / "chat_template.json"
    if not file.exists() or not any(
        (model_dir / f"{kind}_config.json").exists() for kind in ("processor", "preprocessor")
    ):
        return None
    template = json.loads(file.read_bytes()).get("chat_template")
    return template if isinstance(template, str) else None


def template_variables(defaults: dict[str, Any], given: dict[str, Any] | None, field: str) -> dict[str, Any]:
    """`chat_template_kwargs` over --default-chat-template-kwargs. Raises UserError at what is no variable."""
    if reserved := sorted(_RESERVED & (given or {}).keys()):
        raise invalid(
            f"{reserved[0]!r} is not for the template: these are variables like enable_thinking",
            f"{field}.{reserved[0]}",
        )
    # None and "auto" mean "as if not given" to vLLM (renderers/params.py, merge_kwargs).
    return {**defaults, **{k: v for k, v in (given or {}).items() if v is not None and v != "auto"}}


class _Generation(Extension):
    """`{% generation %}` blocks, which only mark what is in them."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=32)
def detect_content_format(source: str) -> ContentFormat:
    """ "openai" where the template goes through the parts of a message's content, else "string"."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    try:
        tree = environment.parse(source)
    except TemplateError:
        return "string"
    lists = {"messages"}
    while (
        more := {
            one.target.name
            for one in tree.find_all(nodes.Assign)
            if isinstance(one.target, nodes.Name) and _name(one.node) in lists
        }
        - lists
    ):
        lists |= more
    loops = [one for one in tree.find_all(nodes.For) if isinstance(one.target, nodes.Name)]
    messages: set[str] = {cast(nodes.Name, one.target).name for one in loops if _name(one.iter) in lists}
    if any(_content_owner(one.iter) in messages for one in loops):
        return "openai"
    in_macros: set[int] = set()
    for macro in tree.find_all(nodes.Macro):
        inside = [one for one in macro.find_all(nodes.For) if isinstance(one.target, nodes.Name)]
        in_macros.update(map(id, inside))
        bound = _parameters_bound_to_content(tree, macro, messages)
        if any(isinstance(one.iter, nodes.Name) and one.iter.name in bound for one in inside):
            return "openai"
    by_name = (one for one in loops if isinstance(one.iter, nodes.Name) and one.iter.name == "content")
    return "openai" if any(id(one) not in in_macros for one in by_name) else "string"


def _parameters_bound_to_content(tree: nodes.Template, macro: nodes.Macro, messages: set[str]) -> set[str]:
    names = [one.name for one in macro.args]
    bound: set[str] = set()
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name == macro.name:
            given = [*zip(names, call.args, strict=False), *((one.key, one.value) for one in call.kwargs)]
            bound |= {name for name, value in given if _content_owner(value) in messages}
    return bound & set(names)


def _bare(node: Any) -> Any:
    """Without filters, tests and slices."""
    while isinstance(node, nodes.Filter | nodes.Test) or (
        isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
    ):
        node = node.node
    return node


def _name(node: Any) -> str | None:
    node = _bare(node)
    return node.name if isinstance(node, nodes.Name) and node.ctx == "load" else None


def _content_owner(node: Any) -> str | None:
    """`m` of `m.content` and `m["content"]`."""
    node = _bare(node)
    is_content = (isinstance(node, nodes.Getattr) and node.attr == "content") or (
        isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    )
    if not is_content or not isinstance(node.node, nodes.Name):
        return None
    return node.node.name if node.node.ctx == "load" else None
