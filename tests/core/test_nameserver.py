"""What a container's name server answers, and what it leaves to others."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balenapy.core.nameserver import AAAA, MX, PTR, A, Answer, Forward, Owner, Question, Scope, decide

TXT, CHAOS = 16, 3
SIX = Owner("10.2.0.2", "six", (), "c6", "fd00::2")
WEB = Owner("10.0.0.2", "web", ("www", "app", "0123456789ab"), "0123456789ab" * 5 + "0123")
DB = Owner("10.0.0.3", "db", ("app", "sql"))
NAMELESS = Owner("10.0.0.4", "", ("cache", "abcdefabcdef"))
FRONT = Scope("front", (WEB, DB, NAMELESS), {"store": "db", "sql": "web", "gone": "nobody", "twelve": WEB.container_id})
BACK = Scope("back.office", (Owner("10.1.0.2", "db"), Owner("10.1.0.3", "web.front")))


def addresses(name: str, *scopes: Scope, kind: int = A) -> tuple[str, ...] | None:
    """None: forwarded."""
    answer = decide(Question(name, kind), scopes or (FRONT, BACK))
    return answer.addresses if isinstance(answer, Answer) else None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("web", ("10.0.0.2",)),
        ("www", ("10.0.0.2",)),
        ("0123456789ab", ("10.0.0.2",)),
        ("twelve", ("10.0.0.2",)),  # a link to an id
        ("web.front", ("10.1.0.3",)),  # the whole name comes before its parts
        ("db", ("10.0.0.3",)),  # the first network that knows it
        ("db.front", ("10.0.0.3",)),
        ("db.back.office", ("10.1.0.2",)),
        ("app", ("10.0.0.2", "10.0.0.3")),
        ("app.front", ("10.0.0.2", "10.0.0.3")),
        ("cache", ("10.0.0.4",)),
        ("store", ("10.0.0.3",)),  # a link
        ("sql", ("10.0.0.2",)),  # a link hides the alias
        ("gone", None),
        ("WEB", None),
        ("web.example.org", None),
        ("web.", None),
        ("", None),
        (".", None),
    ],
)
def test_names_aliases_networks_and_links(name: str, expected: tuple[str, ...] | None) -> None:
    assert addresses(name) == expected


def test_a_link_is_private_to_who_has_it() -> None:
    assert addresses("store", Scope("front", (WEB, DB))) is None


@pytest.mark.parametrize("kind", [AAAA, MX])
def test_what_else_is_asked_of_a_known_name_is_known_to_be_nothing(kind: int) -> None:
    assert addresses("web", kind=kind) == ()
    assert addresses("nobody", kind=kind) is None


def test_other_kinds_and_classes_are_forwarded() -> None:
    assert addresses("web", kind=TXT) is None
    assert Forward() == decide(Question("web", A, CHAOS), [FRONT])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("2.0.0.10.in-addr.arpa", "web.front"),
        ("2.0.0.10.IN-ADDR.ARPA", "web.front"),
        ("4.0.0.10.in-addr.arpa", "cache.front"),
        ("2.0.1.10.in-addr.arpa", "db.back.office"),
        ("9.0.0.10.in-addr.arpa", None),
        (".in-addr.arpa", None),
        ("web", None),
    ],
)
def test_addresses_have_names(name: str, expected: str | None) -> None:
    answer = decide(Question(name, PTR), [FRONT, BACK])

    assert expected == (answer.pointer if isinstance(answer, Answer) else None)


def test_who_wants_search_domains_keeps_names_without_dots_at_home() -> None:
    def ask(name: str, kind: int = A) -> Answer | Forward:
        return decide(Question(name, kind), [FRONT], ndots_set=True)

    assert Answer() == ask("nobody") == ask("nobody", AAAA)
    assert Forward() == ask("nobody.else") == ask("nobody", MX) == ask("nobody", TXT)
    assert Answer(("10.0.0.2",)) == ask("web")


def test_several_owners_come_in_another_order() -> None:
    answer = decide(Question("app", A), [FRONT], shuffle=list.reverse)

    assert Answer(("10.0.0.3", "10.0.0.2")) == answer


names = st.sampled_from(["", ".", "a", "b", "a.b", "b.a", "a.b.a", "b..a", "1.0.0.10.in-addr.arpa"])
owners = st.builds(Owner, st.sampled_from(["10.0.0.1", "10.0.0.2"]), names, st.tuples(names), names)
scopes = st.builds(Scope, names, st.lists(owners, max_size=3), st.dictionaries(names, names, max_size=2))


@given(
    st.builds(Question, names, st.integers(0, 65535) | st.sampled_from([A, PTR, AAAA])), st.lists(scopes, max_size=3)
)
def test_every_question_has_one_answer_of_what_is_there(question: Question, seen: list[Scope]) -> None:
    answer = decide(question, seen)

    if isinstance(answer, Answer):
        assert set(answer.addresses) <= {owner.address for scope in seen for owner in scope.owners}
        assert not (answer.addresses and answer.pointer)


def test_names_have_addresses_of_ipv6_where_their_owners_have() -> None:
    both = Scope("both", (SIX, Owner("10.2.0.3", "six", (), "c7")))

    assert addresses("six", both) == ("10.2.0.2", "10.2.0.3")
    assert addresses("six", both, kind=AAAA) == ("fd00::2",)
    assert addresses("six", both, kind=MX) == ()
    reverse = ip_address("fd00::2").reverse_pointer
    assert decide(Question(reverse, PTR), (both,)) == Answer(pointer="six.both")
    assert isinstance(decide(Question(reverse[2:], PTR), (both,)), Forward)
