"""How numbers are written for people: every one with its unit."""

from __future__ import annotations


def seconds(value: float | None) -> str:
    """Return a span in words that stay short at every length; "-" for none.

    >>> [seconds(s) for s in (0.0123, 4.2, 63.0, 7265.0)]
    ['12 ms', '4.20 s', '1 min 03 s', '2 h 01 min']
    """
    if value is None:
        return "-"
    if value < 0:
        return f"-{seconds(-value)}"
    if value < 0.9995:
        return f"{value * 1000:.0f} ms"
    if value < 59.995:
        return f"{value:.2f} s"
    if value < 3599.5:
        minutes, rest = divmod(round(value), 60)
        return f"{minutes} min {rest:02d} s"
    hours, rest = divmod(round(value / 60), 60)
    return f"{hours} h {rest:02d} min"


def clock(value: float) -> str:
    """Return a moment on the run's clock as hours, minutes and seconds since its start.

    >>> clock(3723.42)
    '01:02:03.4'
    """
    tenths = int(value * 10)
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{rest // 10:02d}.{rest % 10}"


def rate(value: float) -> str:
    """Return tokens per second, rounded to three digits.

    >>> [rate(r) for r in (93.17, 4210.0, 38_512_000.0)]
    ['93.2', '4.21k', '38.5M']
    """
    for limit, divisor, letter in ((1e3, 1.0, ""), (1e6, 1e3, "k"), (1e9, 1e6, "M")):
        if value < limit * 0.9995:
            return f"{value / divisor:.3g}{letter}"
    return f"{value / 1e9:.3g}G"


def loss(value: float | None) -> str:
    """Return a loss with the digits that a person compares; "not finite" for None."""
    return "not finite" if value is None else f"{value:.4f}"


def percent(ratio: float) -> str:
    """Return a ratio in percent.

    >>> percent(0.98765)
    '98.8 %'
    """
    return f"{ratio * 100:.1f} %"


def size(value: int) -> str:
    """Return a number of bytes with its binary unit.

    >>> [size(n) for n in (17, 1536, 5 << 30)]
    ['17 B', '1.5 KiB', '5.0 GiB']
    """
    amount = float(value)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.1f} {unit}" if unit != "B" else f"{value} B"
        amount /= 1024
    return f"{amount:.1f} TiB"


def count(number: int, noun: str) -> str:
    """Return a number of things.

    >>> [count(n, "step") for n in (0, 1, 2)]
    ['0 steps', '1 step', '2 steps']
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def first_line(text: str) -> str:
    """Return the first line of a text; the whole one is for `describe`."""
    return text.splitlines()[0] if text else ""


def encodable(text: str) -> str:
    r"""Return a text that can be written as UTF-8: what a shell hands over may be any bytes.

    >>> encodable("a\udcffb")
    'a?b'
    """
    return text.encode(errors="replace").decode()


def printable(text: str) -> str:
    """Return a text without control characters other than line ends and tabs.

    What ranks say is shown on terminals, which must not take it for commands.
    """
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
