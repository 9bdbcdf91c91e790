"""Errors of the model hub in one sentence with a remedy."""

import logging
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

from common.settings import stop


@contextmanager
def explained(name: str, remedy: str) -> Iterator[None]:
    """Stop with one sentence if the hub refuses `name` or cannot be reached; let all other errors through."""
    from huggingface_hub import constants, errors

    http_error = errors.HfHubHTTPError.__mro__[1]  # httpx's, or httpx2's from huggingface_hub 2 on; not always OSError
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # each of its tries would be two lines
    try:
        yield
    except (OSError, ValueError, RuntimeError, http_error) as problem:
        # The libraries wrap the hub's answer in other exceptions. `datasets` keeps the text of some and no cause.
        chain, cause, text = [], problem, str(problem)
        while cause is not None and cause not in chain:
            chain.append(cause)
            cause = cause.__cause__ or cause.__context__
        statuses = [error.response.status_code for error in chain if isinstance(error, errors.HfHubHTTPError)]

        def met(*kinds: type[BaseException]) -> bool:
            return any(isinstance(error, kinds) for error in chain)

        if met(errors.GatedRepoError) or "is a gated dataset" in text:
            stop(f"{name} is gated: accept its terms on its hub page, then log in with `hf auth login` or set HF_TOKEN")
        if met(errors.RepositoryNotFoundError) or "doesn't exist on the Hub" in text:
            stop(f"{name} is not on the hub, or is private: check the name, log in with `hf auth login`, or {remedy}")
        unreached = met(errors.LocalEntryNotFoundError, ConnectionError) or met(http_error) and not statuses
        if met(errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE and unreached:
            stop(f"{name} is not in the cache and HF_HUB_OFFLINE=1 forbids a download: unset it, or {remedy}")
        if {401, 403} & set(statuses):
            stop(f"the hub refuses {name} ({statuses[0]}): renew the login (`hf auth login` or HF_TOKEN), or {remedy}")
        if unreached or any(status == 429 or status >= 500 for status in statuses):
            answer = f"answers {statuses[0]}" if statuses else "does not answer"
            stop(f"{constants.ENDPOINT} {answer} about {name}: check the network, try again later, or {remedy}")
        raise


def reason(problem: BaseException) -> str:
    """The first line of an exception's text, and the second if the first ends in a colon."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()] or [type(problem).__name__]
    return textwrap.shorten(" ".join(lines[: 2 if lines[0].endswith(":") else 1]), 300, placeholder=" ...")
