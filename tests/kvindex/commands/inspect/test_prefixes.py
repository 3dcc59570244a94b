"""Which prefixes many prompts share."""

from kvindex.commands.inspect.admin_api import Chain
from kvindex.commands.inspect.prefixes import Prefix, hottest


def chain(*hashes: int, stride: int = 1, pool_id: str = "p") -> Chain:
    return Chain(pool_id, len(hashes) * stride, stride, hashes)


def found(*chains: Chain, limit: int = 10) -> list[tuple[int, int, int]]:
    return [(each.block, each.depth_blocks, each.num_prompts) for each in hottest(chains, limit)]


def test_a_prefix_is_as_deep_as_so_many_prompts_share_it():
    chains = [chain(1, 2, 3, 10), chain(1, 2, 3, 11), chain(1, 2, 20, 21), chain(1, 2, 20, 21), chain(5, 6)]
    assert found(*chains) == [(2, 2, 4), (21, 4, 2), (3, 3, 2)]
    assert found(*chains, limit=1) == [(2, 2, 4)]


def test_what_only_one_prompt_has_is_not_hot():
    assert found() == []
    assert found(chain(1, 2), chain(3)) == []


def test_pools_are_apart_and_strides_count():
    assert found(chain(1, 2), chain(1, 2, pool_id="q")) == []
    assert hottest([chain(1, 2, stride=4)] * 3, 5) == [
        Prefix(pool_id="p", block=2, depth_blocks=8, num_prompts=3)
    ]
