"""Numbers of bytes and seconds as text.  No torch here."""


def format_bytes(count: float) -> str:
    """1234567 → 1.23 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def format_duration(seconds: float) -> str:
    """93784 → 26 h 3 min, 75 → 1 min 15 s, 0.1234 → 0.123 s."""
    if seconds < 59.5:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"
