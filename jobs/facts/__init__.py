"""Fact dumps: checking, comparing and converting tables of subject, relation and object.

``check``, ``diff`` and ``convert`` build on a survey of the dump (``dump``); ``dataset`` converts
public data sets (``formats``).
"""
