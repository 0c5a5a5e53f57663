"""Hyper-parameters of a model's own: trial edits on some facts, judged on others.

tuned = tune(load_job("job.yaml"), Settings("tuned", budget_s=1200))
"""
