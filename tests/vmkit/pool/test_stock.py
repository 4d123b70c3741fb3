"""The stock of a pool: each machine goes to one client, in order, and none is lost."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vmkit.pool.stock import Give, Stock


def test_machines_and_clients_meet_in_their_order() -> None:
    stock = Stock(2)
    given: list[str] = []
    stock.add("a")
    stock.add("b")
    for _ in range(3):
        stock.ask(given.append)
    assert given == ["a", "b"]
    stock.add("c")
    assert given == ["a", "b", "c"]


def test_client_that_leaves_gets_nothing_and_costs_nothing() -> None:
    stock = Stock(1)
    given: list[str] = []
    stock.ask(given.append)
    stock.leave(given.append)
    stock.add("a")
    assert given == []
    assert list(stock.waiting) == ["a"]


def test_machine_that_was_left_is_given_to_no_other() -> None:
    stock = Stock(1)
    first: list[str] = []
    second: list[str] = []
    stock.add("a")
    stock.ask(first.append)
    stock.ask(second.append)
    stock.lose("a")
    assert stock.missing == 1
    stock.add("b")
    assert (first, second) == (["a"], ["b"])
    stock.settle("a")
    assert stock.taken == 0
    stock.settle("b")
    stock.settle("b")
    assert stock.taken == 1


def test_room_is_for_the_size_and_for_clients_that_wait() -> None:
    stock = Stock(1)
    assert stock.missing == 1
    stock.add("a")
    assert stock.missing == 0
    stock.ask(lambda _name: None)
    assert stock.missing == 0
    stock.ask(lambda _name: None)
    stock.ask(lambda _name: None)
    assert stock.missing == 2


class StockMachine(RuleBasedStateMachine):
    """Clients and machines come and go in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.stock = Stock(3)
        self.number = 0
        self.clients: list[list[str]] = []
        self.gives: list[Give] = []
        self.taken: list[str] = []

    @rule()
    def make(self) -> None:
        self.number += 1
        self.stock.add(f"m-{self.number}")

    @rule()
    def ask(self) -> None:
        client: list[str] = []
        self.clients.append(client)
        self.gives.append(client.append)
        self.stock.ask(self.gives[-1])

    @precondition(lambda self: self.gives)
    @rule(data=st.data(), is_taken=st.booleans())
    def finish(self, data: st.DataObject, is_taken: bool) -> None:
        index = data.draw(st.integers(0, len(self.gives) - 1))
        client, give = self.clients.pop(index), self.gives.pop(index)
        self.stock.leave(give)
        for name in client:
            if not is_taken:
                self.stock.lose(name)
            elif name in self.stock.promised:
                self.taken.append(name)
                self.stock.settle(name)

    @precondition(lambda self: self.number)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        self.stock.lose(f"m-{data.draw(st.integers(1, self.number))}")

    @invariant()
    def each_machine_is_in_one_place(self) -> None:
        assert not self.stock.promised & set(self.stock.waiting)
        assert len(set(self.stock.waiting)) == len(self.stock.waiting)
        assert len(set(self.taken)) == len(self.taken) == self.stock.taken
        assert all(len(client) <= 1 for client in self.clients)
        # A machine is given once.
        given = [name for client in self.clients for name in client]
        assert len(set(given)) == len(given)
        # No client waits beside a machine.
        assert not self.stock.waiting or all(self.clients)


TestStock = StockMachine.TestCase
TestStock.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
