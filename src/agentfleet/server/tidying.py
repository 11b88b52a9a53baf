"""Keeps Python's garbage collector from stopping the server: its full passes visit every object there is.

A hundred fleets of a thousand instances are millions of objects, almost none of them garbage, and a full pass over them
takes one to two seconds in which nobody is answered. So what has lived for a while is set apart (`gc.freeze`), where
only reference counts free it, as they do almost everything; cycles among that are found once an hour.
"""

from __future__ import annotations

import gc

import anyio

_YOUNG = (10_000, 50, 1_000_000)
"""The collector's thresholds: the young are looked at as often as that pays, the old never by themselves."""
_SET_APART = 20.0
"""Seconds after which what still lives is set apart."""
_ALL = 3600.0
"""Seconds between two full passes."""


async def keep_tidy() -> None:
    """Do so until cancelled; everything is as it was then."""
    before = gc.get_threshold()
    gc.set_threshold(*_YOUNG)
    passed = anyio.current_time()
    try:
        while True:
            await anyio.sleep(_SET_APART)
            if anyio.current_time() - passed >= _ALL:
                gc.unfreeze()
                gc.collect()
                passed = anyio.current_time()
            else:
                gc.collect(1)
            gc.freeze()
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)
