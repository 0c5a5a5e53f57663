"""Hyper-parameters of a model's own: trial edits on some facts, judged on others.

result = tune(load_job("job.yaml"), output="tuned", budget_s=1200)
"""
