"""What only a machine with a GPU can show: ``scripts/gpu_check.sh``. Skipped without one."""
