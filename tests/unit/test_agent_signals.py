"""What becomes of a table of signals if somebody has another one."""

from pathlib import Path

import pytest

from orchestrator.agent.devices import Devices
from orchestrator.agent.signals import BadTableError, Judge, Reading, overridden, read_table

GPU = "0000:3b:00"
OWN = Devices(gpus=frozenset({GPU}))


def judge(root: Path, text: str) -> Judge:
    path = root / "other.yaml"
    path.write_text(text, encoding="utf-8")
    return Judge(overridden(read_table(), read_table(path)), OWN, shared=False)


def xid(code: int) -> str:
    return f"NVRM: Xid (PCI:{GPU}): {code}, pid=1"


def test_of_codes_those_that_the_other_table_has_are_replaced_and_others_stay(
    tmp_path: Path,
) -> None:
    (ours,) = (signal for signal in read_table() if signal.name == "xid")
    assert len(ours.codes) > 20
    other = judge(
        tmp_path,
        f"""
        signals:
          - name: xid
            pattern: '{ours.pattern}'
            own: gpu
            codes:
              43: {{action: unusable, text: as often as we can bear, count: 2, window: 60}}
              79: {{action: report, text: not to be believed here}}
        """,
    )

    assert other.hear(xid(79), 0.0) == ""
    assert [symptom.words for symptom in other.symptoms(0.0)] == [
        f"xid 79 of {GPU}: not to be believed here; the kernel says: {xid(79)}"
    ]
    assert other.hear(xid(43), 1.0) == ""
    assert "2 within 60 s" in other.hear(xid(43), 2.0)
    assert other.hear(xid(95), 3.0) != "", "as in ours"


def test_a_gauge_is_given_another_limit_and_what_ours_does_not_have_is_added(
    tmp_path: Path,
) -> None:
    other = judge(
        tmp_path,
        """
        signals:
          - {name: gpu-hot, reads: temperature_c, over: 70, own: gpu, action: drain, text: hot}
          - {name: fan, pattern: 'fan of (?P<device>\\S+) stands', action: unusable, text: fan}
        """,
    )
    reading = Reading("gpu", GPU, {"temperature_c": 71.0, "over_slowdown_c": 0.0})

    assert other.read(reading, 0.0) == ""
    assert other.read(reading, 60.0) == ""
    assert [(symptom.name, symptom.action) for symptom in other.symptoms(60.0)] == [
        ("gpu-hot", "drain")
    ]
    assert other.hear("fan of psu0 stands still", 1.0).startswith("fan of psu0: fan")


@pytest.mark.parametrize("entry", ["{name: x, text: t}", "{name: x, pattern: y, reads: z}"])
def test_an_entry_is_of_lines_or_of_a_gauge(tmp_path: Path, entry: str) -> None:
    path = tmp_path / "other.yaml"
    path.write_text(f"signals: [{entry}]", encoding="utf-8")

    with pytest.raises(BadTableError, match="of pattern and reads, expected one of them"):
        read_table(path)
