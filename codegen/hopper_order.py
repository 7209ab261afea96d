"""How many heads make a section, in the order in which the Hopper kernels take their tiles."""

from __future__ import annotations

from functools import lru_cache

L2_BYTES = 16 << 20  # of keys and values that the tiles under way may read: a third of an H100's L2 cache

_EVEN = 0.93  # of an even load, at which a section is good enough
_START = 2  # blocks of keys that a tile's beginning and end take as long as
_SIMULATED = 32  # sections, after which loads repeat


def heads_that_fit(heads: int, bytes_a_head: int) -> int:
    """As many of the heads, all in equal sections, as the L2 cache holds of what each of them reads; at least one."""
    most = max(1, min(L2_BYTES // max(bytes_a_head, 1), heads))
    return next(number for number in range(most, 0, -1) if heads % number == 0)


@lru_cache(maxsize=1024)
def heads_of_section(heads: int, bytes_a_head: int, blocks: int, programs: int, keys: float) -> int:
    """Heads whose tiles are taken together by a persistent kernel under a causal mask, in the order of its `tile_of`.

    The most that the L2 cache holds and that load all programs evenly: where a section has about as many tiles as there are
    programs, the turns up and down run in step with the programs' turns to and fro, and some always get the longest
    tiles. If no number does, more heads than the cache holds, and then the least uneven. `blocks`: of queries a
    head; `keys`: blocks of keys in one as long.
    """
    divisors = [number for number in range(1, heads + 1) if heads % number == 0]
    most = heads_that_fit(heads, bytes_a_head)
    order = [number for number in reversed(divisors) if number <= most] + [number for number in divisors if number > most]
    loads = {}
    for number in order:
        loads[number] = evenness(min(heads, _SIMULATED * number), number, blocks, programs, keys)
        if loads[number] >= _EVEN:
            return number
    return max(order, key=lambda number: loads[number])


def evenness(heads: int, section: int, blocks: int, programs: int, keys: float) -> float:
    """The mean load of a program over the largest, under a causal mask."""
    loads = [0.0] * programs
    for tile in range(heads * blocks):
        turn, place = divmod(tile, programs)
        at, number = divmod(tile, section * blocks)
        block = number // min(heads - at * section, section)
        down = ((heads - 1) // section - at) % 2 == 0
        length = (blocks - block if down else block + 1) * keys + _START
        loads[place if turn % 2 == 0 else programs - 1 - place] += length
    return sum(loads) / programs / max(loads)
