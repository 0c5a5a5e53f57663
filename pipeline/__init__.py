"""The engine: stages on Ray, weights on DeepSpeed, data through Arrow and fsspec.

result = run_job(load_job("job.yaml"))
"""
