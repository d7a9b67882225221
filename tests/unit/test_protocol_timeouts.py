import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.protocol.timeouts import derive, validate


@given(st.floats(0.5, 3600), st.floats(0, 86_400))
def test_every_promise_gives_timeouts_that_are_in_order(within_s: float, warmup_s: float) -> None:
    timeouts = derive(within_s, warmup_s)

    validate(timeouts)
    assert timeouts.stopped_s < within_s
    assert timeouts.silence_s < within_s
    assert timeouts.collective_s > max(timeouts.warmup_s, timeouts.save_s)


def test_the_default_promise_is_printed_with_the_rule_that_each_number_follows() -> None:
    table = {name: (value, rule) for name, value, rule in derive(10.0, 600.0).table()}

    assert table["silence_s"] == (6.0, "0.6 detectWithin; at least 4 beats")
    assert table["collective_s"][0] == 1200.0
    assert set(table) == set(derive(10.0, 600.0).__struct_fields__) - {"detect_within_s"}


@pytest.mark.parametrize("within_s", [0.0, 0.49, 3601.0, -1.0])
def test_a_promise_that_nobody_could_keep_is_refused_with_the_range(within_s: float) -> None:
    with pytest.raises(ValueError, match=r"expected 0.5 s to 3600 s"):
        derive(within_s, 600.0)


def test_timeouts_out_of_order_are_refused_with_both_names_and_why() -> None:
    wrong = msgspec.structs.replace(derive(10.0, 600.0), collective_s=5.0)

    with pytest.raises(ValueError, match=r"form_s .* collective_s .* the library would give up"):
        validate(wrong)
