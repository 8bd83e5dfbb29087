"""Training prefixes on a frozen base: `accelerate launch … -m pipeline.training JOB.yaml`."""
