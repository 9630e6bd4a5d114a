"""The claim ledger: the paper's claims and ours, where each stands, and what says so.

The claims are in claims.yaml.
"""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import yaml

from drlora_ref.experiments.given import StrictLoader, check_name

FILE = Path(__file__).with_name("claims.yaml")
WHOSE = ("paper", "ours")
STATUSES = ("holds", "holds in one trial", "partly", "contradicted on a toy",
            "contradicted in one trial", "not seen in one trial", "not run")  # fmt: skip


class Claim(NamedTuple):
    """One line of the ledger.

    whose and status are words of WHOSE and STATUSES; source: where it is claimed. evidence: each
    item is "notebook 08", or the path of a record, a folder of records or a test from the project's
    root. note: what the status leaves out.
    """

    id: str
    claim: str
    whose: str
    source: str
    status: str
    evidence: tuple[str, ...]
    note: str = ""


@cache
def claims() -> tuple[Claim, ...]:
    """Every claim, in the ledger's order.

    >>> [claim.status for claim in claims() if claim.id == "glue"]
    ['not run']
    """
    entries = yaml.load(FILE.read_text(encoding="utf-8"), StrictLoader)
    return tuple(Claim(**entry | {"evidence": tuple(entry["evidence"])}) for entry in entries)


def ledger(whose: str = "") -> pd.DataFrame:
    """The ledger as a table, one row a claim: the paper's, ours, or all.

    Raises ValueError for another word.

    >>> set(ledger("paper").status) <= set(STATUSES)
    True
    """
    if whose:
        check_name("whose", whose, WHOSE)
    rows = [claim._asdict() for claim in claims() if whose in ("", claim.whose)]
    return pd.DataFrame(rows).set_index("id")


def as_markdown(whose: str = "") -> str:
    """The ledger, or one side of it, as a table for a README; ValueError as `ledger`."""
    rows = ["| claim | where | verdict | seen in |", "|---|---|---|---|"]
    for claim in ledger(whose).itertuples():
        note = f": {claim.note[0].lower()}{claim.note[1:]}" if claim.note else ""
        seen = ", ".join(item.removeprefix("notebook ") for item in claim.evidence)
        rows.append(f"| {claim.claim} | {claim.source} | **{claim.status}**{note} | {seen} |")
    return "\n".join(rows) + "\n"
