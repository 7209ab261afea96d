"""Every spelling is read as what it means; every near miss is refused with its code and the user's own line."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

import pytest
import torch

from flashfuse.options import Options
from flashfuse.patterns.attention import Match
from flashfuse.patterns.normalise import normalise
from flashfuse.patterns.search import Site, find_attention

sys.path.insert(0, str(Path(__file__).parent))

from zoo import NEAR_MISSES, SPELLINGS, NearMiss, Spelling


def sites_of(function, inputs, *, dynamic: bool = False) -> list[Site]:
    """What the matcher finds in a function, by Dynamo's own capture."""
    found: list[Site] = []

    def backend(module, _inputs):
        form = normalise(module, writes_of=lambda node: True)
        found.extend(find_attention(
            form.graph, requires_grad=lambda node: False, overwritten=form.overwritten, sdpa=Options().sdpa
        ))
        return module.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, dynamic=dynamic)(*inputs)
    return found


@pytest.mark.parametrize("entry", SPELLINGS, ids=lambda entry: entry.name)
def test_spelling_is_read_as_what_it_means(entry: Spelling):
    sites = sites_of(entry.function, entry.inputs())
    assert len(sites) == entry.sites
    for site in sites:
        assert isinstance(site.found, Match), site.found
        words = dict(site.found.spec.describe())
        assert (words["score"], words.get("keeps")) == (entry.score, entry.keeps)
        assert (words.get("weight"), words.get("sink")) == (entry.weight, entry.sink)
        assert site.found.spec.empty_rows.value == entry.rows


@pytest.mark.parametrize("entry", SPELLINGS, ids=lambda entry: entry.name)
def test_spelling_is_read_with_dynamic_shapes(entry: Spelling):
    sites = sites_of(entry.function, entry.inputs(), dynamic=True)
    assert len(sites) == entry.sites
    assert all(isinstance(site.found, Match) for site in sites), sites


@pytest.mark.parametrize("entry", NEAR_MISSES, ids=lambda entry: entry.name)
def test_near_miss_is_refused_at_the_users_line(entry: NearMiss):
    sites = sites_of(entry.function, entry.inputs())
    if entry.code == "FF303":
        pytest.skip("found when the match is mapped back to the captured graph: see test_end_to_end")
    assert len(sites) == entry.sites
    site = sites[0]
    assert not any(isinstance(each.found, Match) for each in sites)
    assert site.found.code == entry.code, str(site.found)
    lines, start = inspect.getsourcelines(entry.function)
    name, line = site.found.where.split(":")
    assert name.startswith("zoo")
    assert start <= int(line) < start + len(lines)
    assert site.found.found
    assert site.found.entry.meaning


def test_every_near_miss_has_a_twin_that_fuses():
    names = {entry.name for entry in SPELLINGS}
    assert {entry.twin for entry in NEAR_MISSES} <= names
