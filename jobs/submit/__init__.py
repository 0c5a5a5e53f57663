"""Jobs on a Ray cluster: what of a job travels there, under which name it runs, how it is doing."""
