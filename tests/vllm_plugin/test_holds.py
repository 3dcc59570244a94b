"""A request whose blocks two hold is let go once, when both have named it."""

from vllm_plugin.holds import Frees, Holds


def test_what_one_holds_is_let_go_when_it_is_named():
    assert Holds().release({"a"}, {"b"}) == {"a", "b"}


def test_what_both_hold_waits_for_the_second():
    holds = Holds()
    holds.add({"a", "b"})
    assert holds.release({"a"}, {"b"}) == set()
    assert holds.release({"b"}, {"a"}) == {"a", "b"}
    assert holds.release(set(), set()) == set()


def test_both_may_name_it_at_once():
    holds = Holds()
    holds.add({"a"})
    assert holds.release({"a"}, {"a"}) == {"a"}


class TestFrees:
    def test_what_ended_is_freed_when_it_is_stored(self):
        frees = Frees()
        frees.hold("a")
        assert frees.release({"a"}, set()) == {"a"}
        assert frees.release({"a"}, set()) == set()

    def test_what_was_loaded_before_it_ended_is_freed_when_it_is_stored(self):
        frees = Frees()
        frees.load("a")
        assert frees.release(set(), {"a"}) == set()
        frees.hold("a")
        assert frees.release({"a"}, set()) == {"a"}

    def test_what_is_aborted_while_it_is_loaded_is_not_freed_before_and_not_twice(self):
        for order in (({"a"}, set()), (set(), {"a"})), ((set(), {"a"}), ({"a"}, set())), (({"a"}, {"a"}),):
            frees = Frees()
            frees.load("a")
            frees.hold("a")
            assert [frees.release(*named) for named in order] == [set()] * len(order)
