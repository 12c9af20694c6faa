"""Training: stages and resuming, training loops, devices and hosts."""
