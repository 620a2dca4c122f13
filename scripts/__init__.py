"""Commands; `python -m pdiff_hf` runs them from an installed package."""
