"""Crash-safe writes of files and folders, memory, errors and seeds."""
