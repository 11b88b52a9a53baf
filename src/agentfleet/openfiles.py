"""How many files and sockets this process may have open: what the system allows, not the few that shells begin with."""

from __future__ import annotations

import logging
import resource

log = logging.getLogger(__name__)

ENOUGH = 65_536
"""One for each of many instances or streams, and room for everything else that a program does."""


def raise_file_limit(wanted: int = ENOUGH) -> int:
    """Raise the soft limit of open files towards the hard one, for this program and what it starts from then on.

    Args:
        wanted: Files and sockets that should be allowed; a limit that is higher stays.

    Returns:
        How many of them are allowed now.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    if soft == resource.RLIM_INFINITY or soft >= allowed:
        return allowed
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    except (OSError, ValueError) as error:  # some systems allow less than they say
        log.info("the limit of open files stays at %d: %s", soft, error)
        return soft
    return allowed
