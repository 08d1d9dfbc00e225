"""Expert tables that were timed with all of a token's choices on the rank.

SGLang's and vLLM's tables of an even load over several EP ranks give one rank's kernel tokens whose top-k all fall on its own
experts: one token reads eight experts' weights whatever EP is, and 8192 tokens take as long on 16 ranks as on 8. Such a
sheet is one of a rank alone with its share of the experts, and is offered as that: `layout: local`, `moe_ep` 1. Tables under a
power law and those of other engines count what a rank of several really gets.
"""

from __future__ import annotations

from twin.cost.profile import Profile, ProfileStore, Table

LOCAL = "local"
ENGINES = ("sglang", "vllm")


def with_local(store: ProfileStore) -> ProfileStore:
    """The store with a local table beside each that holds such sheets."""
    return ProfileStore(tuple(_with_local(profile) if profile.engine in ENGINES else profile for profile in store))


def _with_local(profile: Profile) -> Profile:
    found = [table for table in map(_local, profile.tables) if table is not None]
    return profile.model_copy(update={"tables": (*profile.tables, *found)}) if found else profile


def _local(table: Table) -> Table | None:
    """The sheets of several EP ranks as those of one rank; None for a table without any."""
    if table.operator != "moe" or table.attrs.get("layout", "fused") != "fused" or table.attrs.get("distribution") != "balanced" \
            or not {"experts", "moe_ep"} <= set(table.shape):
        return None
    experts, ranks = table.shape.index("experts"), table.shape.index("moe_ep")
    rows: dict[tuple[float, ...], tuple[float | None, ...]] = {}
    for sheet, row in zip(table.sheets, table.seconds, strict=True):
        if sheet[ranks] > 1:
            own = list(sheet)
            own[experts], own[ranks] = sheet[experts] / sheet[ranks], 1.0
            rows.setdefault(tuple(own), row)
    if not rows:
        return None
    return table.model_copy(update={"attrs": {**table.attrs, "layout": LOCAL}, "sheets": tuple(rows),
                                    "seconds": tuple(rows.values())})
