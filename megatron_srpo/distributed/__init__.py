"""What every process needs: process groups, Megatron behind the CPU shim, heartbeat, files.

No model and no training.
"""
