"""From the engine's records to what the caller sees: outputs and stream chunks."""

from __future__ import annotations

from collections.abc import Sequence

from kvfold.engine.detokenize import Decoder, decode
from kvfold.engine.request import CompletionOutput, Logprob, RequestOutput, StreamChunk
from kvfold.engine.sampling import TokenLogprob
from kvfold.engine.state import Branch, Request, Status

__all__ = ["make_chunk", "make_output"]


def make_output(request: Request, tokenizer: Decoder | None) -> RequestOutput:
    """The finished ``request`` as its caller sees it."""
    branches = sorted(request.branches, key=lambda branch: branch.index)
    return RequestOutput(
        request_id=request.id,
        prompt_token_ids=request.prompt,
        outputs=[_completion(branch, tokenizer) for branch in branches],
        num_cached_tokens=request.cached_tokens or 0,
        error=request.error,
    )


def make_chunk(branch: Branch, tokenizer: Decoder | None, final: RequestOutput | None) -> StreamChunk:
    """What ``branch`` gained since its last chunk."""
    finished = branch.status is Status.FINISHED
    begin, branch.streamed = branch.streamed, branch.generated
    return StreamChunk(
        request_id=branch.request.id,
        index=branch.index,
        text_delta="" if branch.text is None else branch.text.take(final=finished),
        token_ids=branch.tokens[len(branch.request.prompt) + begin :],
        finish_reason=branch.finish_reason,
        stop_reason=branch.stop_reason,
        logprobs=None if branch.logprobs is None else _logprobs(branch.logprobs[begin:], tokenizer),
        final=final,
    )


def _completion(branch: Branch, tokenizer: Decoder | None) -> CompletionOutput:
    tokens = branch.completion
    if branch.text is not None:
        text = branch.text.text
    elif tokenizer is None:
        text = ""
    else:
        text = decode(tokenizer, tokens, skip_special_tokens=branch.request.params.skip_special_tokens)
    return CompletionOutput(
        index=branch.index,
        text=text,
        token_ids=tokens,
        finish_reason=branch.finish_reason,
        stop_reason=branch.stop_reason,
        logprobs=None if branch.logprobs is None else _logprobs(branch.logprobs, tokenizer),
        cumulative_logprob=None if branch.logprobs is None else branch.cumulative_logprob,
    )


def _logprobs(reports: Sequence[Sequence[TokenLogprob]], tokenizer: Decoder | None) -> list[dict[int, Logprob]]:
    texts: dict[int, str] = {}
    for report in reports:
        for token, _, _ in report:
            if token not in texts:
                texts[token] = "" if tokenizer is None else decode(tokenizer, [token], skip_special_tokens=False)
    return [{token: Logprob(value, rank, texts[token]) for token, value, rank in report} for report in reports]
