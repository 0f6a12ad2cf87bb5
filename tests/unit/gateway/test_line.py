"""The line for a busy target: priority, fairness among projects, nobody waits for ever, nobody is lost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tertulia.gateway.line import AGED_SECONDS, HIGH, LOW, NORMAL, Line, Ticket


def ticket(project: str = "p", level: int = NORMAL, since: float = 0.0, name: str = "") -> Ticket:
    return Ticket(name, level, project, since, 0)


def served(line: Line, now: float = 0.0) -> list[Ticket]:
    found = []
    while (one := line.next(now)) is not None:
        line.go(one)
        found.append(one)
    return found


def test_projects_take_turns() -> None:
    line = Line()
    for project in ("a", "a", "a", "a", "b", "c", "c"):
        line.join(ticket(project))
    assert [one.project for one in served(line)] == ["a", "b", "c", "a", "c", "a", "a"]


def test_higher_priorities_go_first_and_within_one_who_came_first() -> None:
    line = Line()
    for name, level in (("1", LOW), ("2", NORMAL), ("3", HIGH), ("4", NORMAL), ("5", HIGH)):
        line.join(ticket(level=level, name=name))
    assert [one.holder for one in served(line)] == ["3", "5", "2", "4", "1"]


def test_who_is_old_has_every_fourth_turn_however_low() -> None:
    line = Line()
    line.join(ticket(level=LOW, name="low"))
    for at in range(8):
        line.join(ticket(level=HIGH, name=f"high {at}", since=float(at)))
    names = [one.holder for one in served(line, AGED_SECONDS + 0.1)]
    assert names.index("low") == 3
    assert [name for name in names if name != "low"] == [f"high {at}" for at in range(8)]


def test_who_leaves_is_out_of_every_line() -> None:
    one, other, mine = Line(), Line(), ticket()
    one.join(mine)
    other.join(mine)
    mine.leave()
    mine.leave()
    assert len(one) == len(other) == 0 and one.next(0.0) is None
    one.join(mine)
    other.join(mine)
    one.go(mine)
    assert other.next(0.0) is None


def test_how_many_are_ahead() -> None:
    line = Line()
    for project, level in (("a", NORMAL), ("a", NORMAL), ("a", NORMAL), ("b", HIGH), ("b", LOW)):
        line.join(ticket(project, level))
    assert line.ahead(HIGH, "a") == 1
    assert line.ahead(NORMAL, "a") == 4
    assert line.ahead(NORMAL, "b") == 2  # a's second and third come after b's first
    assert line.ahead(LOW, "b") == 5


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([HIGH, NORMAL, LOW]), st.booleans()), max_size=40),
    st.floats(0, 20),
)
def test_everybody_is_served_once_or_has_left(comers: list[tuple[str, int, bool]], now: float) -> None:
    line = Line()
    tickets = [ticket(project, level) for project, level, _ in comers]
    for one in tickets:
        line.join(one)
    staying = []
    for one, (_, _, leaves) in zip(tickets, comers, strict=True):
        if leaves:
            one.leave()
        else:
            staying.append(one)
    assert len(line) == len(staying)
    found = served(line, now)
    assert len(found) == len(staying) and set(found) == set(staying) and len(line) == 0
    assert all(line.ahead(level, "a") == 0 for level in (HIGH, NORMAL, LOW))
    for project in "abc":  # within one project and level, in the order they came
        for level in (HIGH, NORMAL, LOW):
            mine = [one for one in found if (one.project, one.level) == (project, level)]
            assert mine == sorted(mine, key=tickets.index)
