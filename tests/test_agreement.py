"""How the processes of a run agree, without processes: each is a thread here, and they exchange bytes as hosts do."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from ti_jax.errors import InputError
from ti_jax.training import multihost


class Hosts:
    """``count`` threads that take each other for the processes of a run."""

    def __init__(self, count, monkeypatch):
        self.count = count
        self.own = threading.local()
        self.barrier = threading.Barrier(count, timeout=20)
        self.given = [b""] * count
        monkeypatch.setattr(multihost.jax, "process_count", lambda: count)
        monkeypatch.setattr(multihost.jax, "process_index", lambda: self.own.index)
        monkeypatch.setattr(multihost, "_gather", self.gather)

    def gather(self, mine):
        self.given[self.own.index] = mine
        self.barrier.wait()
        everything = list(self.given)
        self.barrier.wait()  # nobody gives the next before all have read
        return everything

    def run(self, work):
        """What ``work(index)`` returns or raises in each."""

        def one(index):
            self.own.index = index
            try:
                return work(index)
            except InputError as error:
                return error

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(one, range(self.count)))


@pytest.fixture
def hosts(monkeypatch):
    return Hosts(3, monkeypatch)


def fails_in(*where):
    def work(index):
        if index in where:
            raise InputError(f"no picture on host {index}")
        return index

    return work


def test_all_succeed_or_all_end_with_the_reason_of_the_one_that_failed(hosts):
    def work(make):
        return lambda index: multihost.all_or_raise(lambda: make(index))

    assert hosts.run(work(fails_in())) == [0, 1, 2]
    first, own, last = hosts.run(work(fails_in(1)))
    assert all(isinstance(error, multihost.Agreed) for error in (first, own, last))
    assert str(first) == str(last) == "process 1 of 3: no picture on host 1"
    assert str(own) == "no picture on host 1"  # where it can be looked up, without the number
    assert [str(error) for error in hosts.run(work(fails_in(0, 2)))] == [
        "no picture on host 0", "process 0 of 3: no picture on host 0", "no picture on host 2",
    ]  # fmt: skip


def test_what_the_leader_does_is_done_once_and_reaches_all(hosts):
    done = []

    def work(index):
        return multihost.on_leader(lambda: done.append(index) or {"step": 7, "rows": [1.5, None]})

    assert hosts.run(work) == [{"step": 7, "rows": [1.5, None]}] * 3
    assert done == [0]


def test_what_the_leader_cannot_do_ends_all(hosts):
    def make():
        raise InputError("not a checkpoint folder")

    errors = hosts.run(lambda index: multihost.on_leader(make))
    assert [(type(error), str(error)) for error in errors] == [(multihost.Agreed, "not a checkpoint folder")] * 3


def test_other_settings_are_refused_by_name(hosts):
    same = {"seed": 0, "learning_rate": 0.1, "pictures": "abc"}
    assert hosts.run(lambda index: multihost.check_same(dict(same))) == [None] * 3
    other = {0: same, 1: same | {"learning_rate": 0.5, "pictures": "abd"}, 2: same}
    errors = hosts.run(lambda index: multihost.check_same(other[index]))
    assert all("learning_rate, pictures: not the same as in process 0" in str(error) for error in errors)
    assert str(errors[0]).startswith("process 1 of 3: ") and str(errors[1]).startswith("learning_rate")


def test_the_smallest_of_what_is_known(hosts):
    assert hosts.run(lambda index: multihost.smallest([3.0, None, 2.5][index])) == [2.5] * 3
    assert hosts.run(lambda index: multihost.smallest(None)) == [None] * 3


def test_alone_nothing_is_exchanged(monkeypatch):
    monkeypatch.setattr(multihost, "_gather", None)
    assert multihost.all_or_raise(lambda: 1) == multihost.on_leader(lambda: 1) == multihost.smallest(1) == 1
    with pytest.raises(InputError, match="no picture on host 0"):
        multihost.all_or_raise(lambda: fails_in(0)(0))
    with pytest.raises(InputError, match="no picture on host 0"):
        multihost.on_leader(lambda: fails_in(0)(0))
    multihost.check_same({"seed": 0})
