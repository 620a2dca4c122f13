"""The tables and figures of the paper: their rows and numbers as data, and a runner that fills in our own numbers."""
