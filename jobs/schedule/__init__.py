"""Nightly refreshes: when they are due, who runs them, and a log of what each did.

A *schedule* says what is refreshed and when; a *night* is one attempt at one due time. Both are
small JSON files in a folder that may be anywhere, and any number of runners may share it.
"""
