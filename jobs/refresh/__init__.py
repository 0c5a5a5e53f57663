"""The nightly refresh: a model that holds what the latest fact dump says.

result = refresh(load_refresh("refresh.yaml"))
"""
