"""How good generated networks are, beside what trivial generators make."""
