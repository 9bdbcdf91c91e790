"""What the model hub refused, in one sentence with its remedy; its retries as progress, not as errors."""

import logging
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

from common.settings import stop


@contextmanager
def explained(name: str, instead: str) -> Iterator[None]:
    """Stop with a sentence when the hub, or the way to it, does not give `name`; let every other problem through.

    The libraries wrap the hub's answer in their own exceptions, with texts of several lines that name other remedies:
    only the chain of causes says whether it was gated, missing, broken or never reached.
    """
    from huggingface_hub.errors import HfHubHTTPError

    http_error = HfHubHTTPError.__mro__[1]  # of httpx or, from huggingface_hub 2 on, of httpx2; not always an OSError
    retries = [logging.getLogger(f"huggingface_hub.{module}") for module in ("utils._http", "file_download")]
    for logger in retries:
        logger.addFilter(_told_on_standard_output)
    try:
        yield
    except (OSError, ValueError, RuntimeError, http_error) as problem:
        sentence = _sentence(problem, name, instead, http_error)
        if sentence:
            stop(sentence)
        raise
    finally:
        for logger in retries:
            logger.removeFilter(_told_on_standard_output)


def reason(problem: BaseException) -> str:
    """The first line of what an exception says, with the next where it ends in a colon."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()] or [type(problem).__name__]
    return textwrap.shorten(" ".join(lines[: 2 if lines[0].endswith(":") else 1]), 300, placeholder=" ...")


def _told_on_standard_output(record: logging.LogRecord) -> bool:
    print(record.getMessage(), flush=True)
    return False


def _sentence(problem: BaseException, name: str, instead: str, http_error: type[Exception]) -> str | None:
    from huggingface_hub import constants, errors

    chain = []
    while problem is not None and problem not in chain:
        chain.append(problem)
        problem = problem.__cause__ or problem.__context__

    said = str(chain[0])  # datasets cuts the chain of what it found out itself

    def met(*kinds: type[BaseException]) -> bool:
        return any(isinstance(one, kinds) for one in chain)

    if met(errors.GatedRepoError) or "is a gated dataset" in said:
        return f"{name} is gated: accept its terms on its hub page, then log in with `hf auth login` or set HF_TOKEN"
    if met(errors.RevisionNotFoundError) or said.startswith("Revision "):
        return f"{name} has no branch main on the hub: check the name, or {instead}"
    if met(errors.RepositoryNotFoundError) or "doesn't exist on the Hub" in said:
        return f"{name} is not on the hub, or private (then log in with `hf auth login`): check the name, or {instead}"
    absent = chain[0].__cause__ or chain[0]
    if isinstance(absent, errors.RemoteEntryNotFoundError):
        return f"{name} lacks a file on the hub ({absent.response.url.path}): check the name, or {instead}"
    unreached = met(errors.LocalEntryNotFoundError, ConnectionError)
    if met(errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE and unreached:
        return f"{name} is not in the cache and HF_HUB_OFFLINE=1 forbids a download: unset it, or {instead}"
    statuses = [one.response.status_code for one in chain if isinstance(one, errors.HfHubHTTPError)]
    for status in statuses:
        if status in (401, 403):
            return f"the hub refuses {name} ({status}): renew the login (`hf auth login` or HF_TOKEN), or {instead}"
        if status == 429 or status >= 500:
            return f"the hub fails to give {name} (it answers {status}): try again later, or {instead}"
    if unreached or not statuses and met(http_error):
        return f"no answer from {constants.ENDPOINT} to get {name}: turn the network on or try again, or {instead}"
    return None
