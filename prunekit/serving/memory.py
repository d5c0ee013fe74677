"""How long a context and how many rows fit into a GPU: arithmetic on weights and KV cache, nothing is run."""

GIGABYTES = (24, 40, 80)  # of common cards
USABLE = 0.9  # of a card's memory: what vLLM takes unless it is told otherwise
BATCH_CONTEXT = 4096  # tokens of each row of a batch


def fits(
    parameters: int, kv_bytes_per_token: int, positions: int, weights: int | None = None
) -> dict[str, dict[str, int | str]]:
    """For each card (GB): the `context` (tokens) of one row and what limits it, and the `batch` (rows).

    Two bytes a parameter and a number of the cache, whatever the file has; activations are not counted. `weights` are
    the bytes of those that are quantised, in place of two a parameter. A batch's rows have BATCH_CONTEXT tokens, or all
    the model's positions if those are fewer. 0: the weights alone don't fit.
    """
    found: dict[str, dict[str, int | str]] = {}
    for size in GIGABYTES:
        room = max(0, int(USABLE * size * 10**9) - (weights or 2 * parameters)) // max(1, kv_bytes_per_token)
        limit = "positions" if positions <= room else "memory"
        batch = room // min(BATCH_CONTEXT, positions)
        found[str(size)] = {"context": min(positions, room), "limit": limit, "batch": batch}
    return found
