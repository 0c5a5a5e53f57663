"""Scheduled refreshes: when they are due, what runs them, and a log of each run.

A *schedule* says what to refresh and when; a *night* is one attempt at one due time. Both are small
JSON files in a local or remote folder that any number of runners may share.
"""
