"""Jobs on a Ray cluster: packing a job, submitting it under a name, reading its state."""
