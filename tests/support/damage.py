"""
Files that are damaged or made to do harm: whatever is read either works or ends in an error that the docstrings name.
Nothing crashes, hangs, takes all memory, runs code from a file, or writes outside the folder that it was given.

Every case starts from files that are whole, and changes some of their bytes, or some of the values inside them. There
are some 1,150 cases in the tests `test_damaged_*`, the same in every run; with `pytest --full`, 17,250.
"""

import contextlib
import copy
import json
import math
import resource
import signal
import struct
from collections.abc import Callable, Iterator

from hypothesis import HealthCheck, settings, strategies as st

# No case takes more memory than this beyond what the process had, and none more seconds: far above what any needs.
MEMORY, SECONDS = 2 * 2**30, 60


class TookTooLong(BaseException):
    """Not an `Exception`, so that no reader takes it for an error of the file."""


def fuzz(test: Callable, cases: int, full: bool) -> None:
    """Runs `test`, a property of hypothesis, on so many cases, or on a fifteenth of them."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    checks = (
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.filter_too_much,
        HealthCheck.large_base_example,
    )
    settings(
        max_examples=cases if full else cases // 15,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=checks,
    )(test)()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY


@contextlib.contextmanager
def only(*errors: type[Exception]) -> Iterator[None]:
    """What is in the block works, or raises one of `errors`, in time."""

    def stop(*_):
        raise TookTooLong

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    except errors as error:
        assert str(error).strip()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


NUMBERS = st.sampled_from(
    [0, 1, -1, 2, 3, 7, 64, 255, 2**31 - 1, 2**31, 2**32 + 1, 10**9, 10**12, 2**53, 2**63 - 1, 2**63, -(2**63), 10**30]
    + [0.5, -1.5, 1e-300, 1e38, 1e300, math.nan, math.inf, -math.inf]
)
WORDS = "__class__ __init__ os sys os.system builtins eval torch diffusers pdiff_hf pickle weight null DDIMScheduler"
WORDS += " float32 float64 int8 bool F32 F64 BF16 I64 F8_E4M3 C64 . .. ../../canary /tmp/canary a/b a\\b ü/→.☃ e\u0301"
NAMES = st.sampled_from(["", "a\0b", "a b", "\u202e", "x" * 3000, *WORDS.split()]) | st.text(max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | NAMES | st.builds(lambda: [1] * 62),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """`content` with some bits turned, bytes replaced, inserted, taken out or doubled, or cut off."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        length = draw(st.sampled_from([1, 1, 2, 4, 8, 64, len(content)]))
        kind = draw(st.sampled_from(["flip", "flip", "replace", "insert", "remove", "double", "cut"]))
        if kind == "flip" and start < len(content):
            changed = content[start] ^ (1 << draw(st.integers(0, 7)))
            content = content[:start] + bytes([changed]) + content[start + 1 :]
        elif kind == "replace":
            new = draw(st.sampled_from([b"\0", b"\xff", b"\x80", b"\x7f"])) * length
            content = content[:start] + new + content[start + length :]
        elif kind == "insert":
            content = content[:start] + draw(st.binary(min_size=1, max_size=16)) + content[start:]
        elif kind == "remove":
            content = content[:start] + content[start + length :]
        elif kind == "double":
            content = content[:start] + content[start : start + length] + content[start:]
        else:
            content = content[:start]
    return content


def _places(value, path=()) -> list[tuple]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, item in inner for place in _places(item, (*path, key))]


@st.composite
def changed(draw, value):
    """`value`, as it comes from JSON, with one to three values replaced, removed, renamed or added."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        places = _places(value)
        if not places:
            return draw(VALUES)
        *path, key = draw(st.sampled_from(places))
        owner = value
        for step in path:
            owner = owner[step]
        kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename", "add"]))
        if kind == "replace":
            owner[key] = draw(VALUES)
        elif kind == "remove":
            del owner[key]
        elif isinstance(owner, dict):
            owner[draw(NAMES)] = owner.pop(key) if kind == "rename" else draw(VALUES)
        else:
            owner.insert(key, draw(VALUES) if kind == "add" else owner.pop(key))
    return value


@st.composite
def damaged_safetensors(draw, content: bytes) -> bytes:
    """The same for a safetensors file: its bytes, the values of its header, or the length of its header."""
    (length,) = struct.unpack("<Q", content[:8])
    header, body = content[8 : 8 + length], content[8 + length :]
    kind = draw(st.sampled_from(["bytes", "header", "header", "valid", "valid", "valid", "length", "values"]))
    if kind == "bytes":
        return draw(damaged(content))
    if kind == "length":
        return (
            struct.pack("<Q", draw(st.sampled_from([0, 1, length - 1, 10**8 + 1, 2**40, 2**63, 2**64 - 1])))
            + content[8:]
        )
    if kind == "values":  # those of another kind of number
        special = draw(st.sampled_from([math.nan, math.inf, -math.inf, 1e-45, -0.0, 3e38]))
        start = draw(st.integers(0, max(0, len(body) // 4 - 1))) * 4
        return content[: 8 + length] + body[:start] + struct.pack("<f", special) + body[start + 4 :]
    header = json.loads(header)
    if kind == "header":
        header = draw(changed(header))
    else:  # still a safetensors file: tensors with other names, of other types, or in other shapes and places
        tensors = [name for name in header if name != "__metadata__"]
        one, other = draw(st.sampled_from(tensors)), draw(st.sampled_from(tensors))
        change = draw(st.sampled_from(["rename", "type", "shape", "swap", "drop"]))
        if change == "rename":
            header[draw(NAMES)] = header.pop(one)
        elif change == "type":
            widths = [["F32", "I32", "U32"], ["F16", "BF16", "I16", "U16"], ["I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"]]
            header[one]["dtype"] = draw(
                st.sampled_from(next((w for w in widths if header[one]["dtype"] in w), ["F64", "I64", "U64", "C64"]))
            )
        elif change == "shape":
            size = math.prod(header[one]["shape"])
            header[one]["shape"] = draw(st.sampled_from([[size], [1, size], [size, 1], [1] * 70 + [size]]))
        elif change == "swap":
            header[one], header[other] = header[other], header[one]
        else:
            del header[one]
    header = json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + body
