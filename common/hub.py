"""Errors of the model hub in one sentence with a remedy; its retries are printed as progress."""

import logging
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

from common.settings import stop


@contextmanager
def explained(name: str, remedy: str) -> Iterator[None]:
    """Stop with one sentence when the hub refuses `name` or cannot be reached; let all other errors through.

    The libraries wrap the hub's answer in exceptions of their own, with long texts and other remedies. Only the chain
    of causes shows whether `name` is gated, missing or broken, or the hub was not reached.
    """
    from huggingface_hub.errors import HfHubHTTPError

    http_error = HfHubHTTPError.__mro__[1]  # httpx's, or httpx2's from huggingface_hub 2 on; not always an OSError
    retry_loggers = [logging.getLogger(f"huggingface_hub.{module}") for module in ("utils._http", "file_download")]
    for logger in retry_loggers:
        logger.addFilter(_print_instead)
    try:
        yield
    except (OSError, ValueError, RuntimeError, http_error) as problem:
        sentence = _sentence(problem, name, remedy, http_error)
        if sentence:
            stop(sentence)
        raise
    finally:
        for logger in retry_loggers:
            logger.removeFilter(_print_instead)


def reason(problem: BaseException) -> str:
    """The first line of an exception's text, and the second if the first ends in a colon."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()] or [type(problem).__name__]
    return textwrap.shorten(" ".join(lines[: 2 if lines[0].endswith(":") else 1]), 300, placeholder=" ...")


def _print_instead(record: logging.LogRecord) -> bool:
    print(record.getMessage(), flush=True)
    return False


def _sentence(problem: BaseException, name: str, remedy: str, http_error: type[Exception]) -> str | None:
    from huggingface_hub import constants, errors

    chain = []
    while problem is not None and problem not in chain:
        chain.append(problem)
        problem = problem.__cause__ or problem.__context__
    text = str(chain[0])  # `datasets` drops the cause of some errors, so only their text remains

    def met(*kinds: type[BaseException]) -> bool:
        return any(isinstance(error, kinds) for error in chain)

    if met(errors.GatedRepoError) or "is a gated dataset" in text:
        return f"{name} is gated: accept its terms on its hub page, then log in with `hf auth login` or set HF_TOKEN"
    if met(errors.RevisionNotFoundError) or text.startswith("Revision "):
        return f"{name} has no branch main on the hub: check the name, or {remedy}"
    if met(errors.RepositoryNotFoundError) or "doesn't exist on the Hub" in text:
        return f"{name} is not on the hub, or is private: check the name, log in with `hf auth login`, or {remedy}"
    first = chain[0].__cause__ or chain[0]
    if isinstance(first, errors.RemoteEntryNotFoundError):
        return f"{name} lacks a file on the hub ({first.response.url.path}): check the name, or {remedy}"
    unreached = met(errors.LocalEntryNotFoundError, ConnectionError)
    if met(errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE and unreached:
        return f"{name} is not in the cache and HF_HUB_OFFLINE=1 forbids a download: unset it, or {remedy}"
    statuses = [error.response.status_code for error in chain if isinstance(error, errors.HfHubHTTPError)]
    for status in statuses:
        if status in (401, 403):
            return f"the hub refuses {name} ({status}): renew the login (`hf auth login` or HF_TOKEN), or {remedy}"
        if status == 429 or status >= 500:
            return f"the hub fails to send {name} (it answers {status}): try again later, or {remedy}"
    if unreached or not statuses and met(http_error):
        return f"no answer from {constants.ENDPOINT} about {name}: turn the network on, try again, or {remedy}"
    return None
