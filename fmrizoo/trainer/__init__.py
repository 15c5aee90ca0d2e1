"""The training loop on DeepSpeed: engine, schedule, checkpoints, devices."""
