"""Conversations as prompts: a list of messages goes through the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypedDict, TypeGuard

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from kvfold.engine.request import Chat
from kvfold.errors import RequestError

__all__ = ["ChatOptions", "Conversation", "as_chats", "encode_chat", "is_conversation"]

Conversation: TypeAlias = Sequence[Mapping[str, Any]]
"""Messages in their order: ``[{"role": "user", "content": "..."}, ...]``."""


class ChatOptions(TypedDict, total=False):
    """What the method ``chat`` of `Engine` and `AsyncEngine` takes beside messages and parameters, all optional."""

    request_id: str | Sequence[str] | None
    salt: bytes
    progress: bool
    raise_errors: bool
    chat_template: str | None
    add_generation_prompt: bool
    continue_final_message: bool
    chat_template_kwargs: Mapping[str, Any] | None


def is_conversation(prompt: object) -> TypeGuard[Conversation]:
    """Whether ``prompt`` is chat messages: a list of mappings that is not empty."""
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, (str, bytes))
        and len(prompt) > 0
        and all(isinstance(message, Mapping) for message in prompt)
    )


def as_chats(messages: object, **options: Any) -> list[Chat]:
    """The conversations of a call, one or several, with the ``options`` of `Chat`. RequestError for what is neither."""
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise _bad_messages(f"chat messages of type {type(messages).__name__}")
    many: Sequence[Any] = [messages] if is_conversation(messages) or not messages else messages
    for one in many:
        if isinstance(one, Sequence) and not one:
            raise RequestError("a chat of no messages", why="there is nothing to answer")
        if not is_conversation(one):
            raise _bad_messages("chat messages that are not mappings")
    return [Chat(one, **options) for one in many]


def encode_chat(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> list[int]:
    """Token ids of a conversation. The template writes the special tokens; the tokenizer adds none.

    RequestError for messages without a role, without a template, and for what the template refuses.
    """
    if chat.add_generation_prompt and chat.continue_final_message:
        why = "a new turn cannot begin in a message that goes on"
        raise RequestError("continue_final_message=True", why=why, hint="add add_generation_prompt=False")
    for message in chat.messages:
        if not isinstance(message.get("role"), str):
            raise _bad_messages(f"a message without a role, {dict(message)!r:.80}")
    if chat.chat_template is None and not tokenizer.chat_template:
        hint = "give the prompt as a text, or a chat_template to `chat`"
        raise RequestError("chat messages", why="the tokenizer has no chat template", hint=hint)
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in chat.messages],
            chat_template=chat.chat_template,
            add_generation_prompt=chat.add_generation_prompt,
            continue_final_message=chat.continue_final_message,
            tokenize=False,
            **(chat.chat_template_kwargs or {}),
        )
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise RequestError("the chat template refuses the messages", why=str(error)) from error
    return list(tokenizer.encode(str(text), add_special_tokens=False))


def _bad_messages(what: str) -> RequestError:
    hint = 'a chat is a list such as [{"role": "user", "content": "..."}], several chats are a list of such lists'
    return RequestError(what, why="every message needs a role and a content", hint=hint)
