"""The nightly refresh: keeps a model in line with the latest fact dump.

result = refresh(load_refresh("refresh.yaml"))
"""
