"""The configuration store without a fleet: validated, compared and set, kept, compared, rolled back, followed.

::

    python examples/config_store_alone.py
"""

from __future__ import annotations

import anyio
from pydantic import BaseModel, Field

from agentfleet import ConfigConflict, ConfigInvalid, ConfigStore


class Settings(BaseModel):
    """What the agents are told."""

    model: str
    temperature: float = Field(ge=0, le=2)


def no_preview(document: dict[str, object]) -> str | None:
    """A rule of your own."""
    return "preview models are not for production" if "preview" in str(document["model"]) else None


async def main() -> None:
    """Publish, fail twice, look back, go back."""
    store = ConfigStore()
    store.register("researchers", schema=Settings, validators=[no_preview])

    first = await store.put("researchers", {"model": "small", "temperature": 0.2}, author="ops", reason="first")
    for document in ({"model": "small", "temperature": 9}, {"model": "large-preview", "temperature": 1}):
        try:
            await store.put("researchers", document, author="ops", reason="try")
        except ConfigInvalid as error:
            print(error)

    trial = await store.dry_run("researchers", {"model": "large", "temperature": 0.2})
    print("would change:", ", ".join(f"{change.path} {change.before} -> {change.after}" for change in trial.changes))
    await store.put("researchers", {"model": "large", "temperature": 0.2}, author="ops", reason="larger", expect=1)
    try:
        await store.put("researchers", {"model": "tiny", "temperature": 0}, author="ci", reason="cheaper", expect=1)
    except ConfigConflict as error:
        print(error)

    back = await store.rollback("researchers", first.revision, author="ci", reason="too slow")
    print(f"revision {back.revision} restores {back.restores}: equal content: {back.digest == first.digest}")
    for revision in await store.history("researchers"):
        print(f"  {revision.revision} by {revision.author}: {revision.text} ({revision.reason})")
    async for revision in store.watch("researchers", after=2):
        print("a follower at revision 2 now sees", revision.revision)
        break


if __name__ == "__main__":
    anyio.run(main)
