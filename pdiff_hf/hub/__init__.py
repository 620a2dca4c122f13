"""Pushes generators with their cards, and parameter data sets, to the Hub."""
