"""Seeds that follow from other seeds."""


def derive_seed(*numbers: int) -> int:
    """One seed from several numbers, such that neighbouring numbers give unrelated seeds (splitmix64)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state % 2**63


def named_seed(seed: int, name: str) -> int:
    """The seed of the purpose `name` within a run of that seed: a new purpose leaves all others as they are."""
    return derive_seed(seed, *name.encode())
